"""Composition of many steps: discretise each law so that it dominates, convolve under a tilt.

The discretisation moves every cell's mass to the cell's two ends and keeps both its null mass and
its mixture mass, so each discrete step is at least as distinguishable as the true one. The tilt
exp(tilt * loss) centres the sum on the event of interest, which keeps *relative* accuracy at any
delta (docs/math.md, "Dominating discretisation" and "Tilted composition").
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.fft import irfft, next_fast_len, rfft
from scipy.special import logsumexp, ndtri_exp

from dpkernels.accounting.losses import Array, StepLaw

MAX_CELLS = 1 << 20
_UNIT = 2.3e-16


@dataclass(frozen=True)
class TiltedSum:
    """Law of the summed loss S under a tilt: P[S = l] = mass * exp(log_mgf - tilt * l).

    Attributes:
        losses: increasing grid, [cells].
        mass: tilted masses, [cells], summing to about 1.
        tilt: the exponent used.
        log_mgf: log E_P[exp(tilt * S)].
        escaped: bound on the tilted mass outside the grid.
        noise: standard deviation of the rounding error of one mass.
        steps: number of steps that were composed.
    """

    losses: Array
    mass: Array
    tilt: float
    log_mgf: float
    escaped: float
    noise: float
    steps: int

    def log_delta(self, epsilon: float, *, reverse: bool = False) -> float:
        """log of an upper bound on delta(epsilon), before the mass that was cut.

        Args:
            epsilon: any real number.
            reverse: the add direction; needs tilt <= -1. The remove direction needs tilt >= 0.
        """
        if reverse:
            rate = -1.0 - self.tilt
            cells = slice(0, int(np.searchsorted(self.losses, -epsilon, side="left")))
            over = -self.losses[cells] - epsilon
        else:
            rate = self.tilt
            cells = slice(int(np.searchsorted(self.losses, epsilon, side="right")), None)
            over = self.losses[cells] - epsilon
        weights = np.exp(-rate * over) * -np.expm1(-over)
        total = float(self.mass[cells] @ weights)
        rounding = 6 * self.noise * math.sqrt(float(weights @ weights))
        bound = total * (1 + 1e-14 * self.steps) + rounding + self.escaped
        return self.log_mgf - rate * epsilon + (math.log(bound) if bound > 0 else -math.inf)


@dataclass(frozen=True)
class Window:
    """A range of S under a tilt, and the Chernoff moves of the tilt that reach its ends."""

    tilt: float
    low: float
    high: float
    backward: float
    forward: float

    @property
    def width(self) -> float:
        return self.high - self.low


class _TiltedStep:
    """One discrete step under a tilt, to be taken `count` times."""

    def __init__(
        self, count: int, index: np.ndarray, log_mass: Array, tilt: float, spacing: float
    ) -> None:
        self.count = count
        self._index = index
        self._losses = index * spacing
        exponents = log_mass + tilt * self._losses
        self.log_mgf = float(logsumexp(exponents))
        self._log_mass = exponents - self.log_mgf
        self._mass = np.exp(self._log_mass)
        self.centre = round(float(self._mass @ index))
        self.lowest = count * int(index[0])
        self.highest = count * int(index[-1])

    def log_growth(self, move: float) -> float:
        """log E exp(move * sum) of the `count` tilted steps."""
        return self.count * float(logsumexp(self._log_mass + move * self._losses))

    def folded(self, size: int) -> Array:
        """Masses modulo `size`, the tilted mean at cell 0: keeps the phases small."""
        cells = (self._index - self.centre) % size
        return np.asarray(np.bincount(cells, weights=self._mass, minlength=size), np.float64)


class Composition:
    """Sum of independent step losses under the mixture, truncated where the mass is below `cut`.

    Args:
        laws: step laws; a law stands for `law.phase.steps` steps.
        log_cut: log of the mass that may be cut away in total under each hypothesis; the caller
            adds it to what it bounds.
    """

    def __init__(self, laws: Sequence[StepLaw], log_cut: float) -> None:
        self.laws = laws
        self.steps = sum(law.phase.steps for law in laws)
        self.log_cut = log_cut
        self._cut = float(-ndtri_exp(log_cut - math.log(2 * self.steps)))
        self._nodes = nodes = [law.nodes(self._cut) for law in laws]
        self._widest = max(float(losses[-1] - losses[0]) for losses, _ in nodes)
        self.rounding = _UNIT * (self.steps + 4 * math.log2(MAX_CELLS))
        self._counts = np.array([law.phase.steps for law in laws], dtype=np.float64)
        self.max_loss = float(self._counts @ [losses[-1] for losses, _ in nodes])
        self.min_loss = float(self._counts @ [losses[0] for losses, _ in nodes])

    def cumulants(self, tilts: Array | float) -> tuple[Array, Array, Array]:
        """log E exp(tilt * S) and its first two derivatives by quadrature: to choose, not to prove.

        Args:
            tilts: scalar or [n].

        Returns:
            Three arrays [n].
        """
        tilts = np.atleast_1d(np.asarray(tilts, dtype=np.float64))
        totals = np.zeros((3, tilts.size))
        for (losses, log_weights), count in zip(self._nodes, self._counts, strict=True):
            exponents = log_weights + tilts[:, None] * losses
            peak = exponents.max(axis=1, keepdims=True)
            weights = np.exp(exponents - peak)
            norm = weights.sum(axis=1)
            mean = weights @ losses / norm
            spread = np.einsum("ij,ij->i", weights, (losses - mean[:, None]) ** 2) / norm
            totals += count * np.stack([np.log(norm) + peak[:, 0], mean, spread])
        return totals[0], totals[1], totals[2]

    def window(self, tilt: float, spacing: float, exponent: float) -> Window:
        """The range of S that the tilted law leaves with probability about exp(-exponent) a side.

        The discrete law spreads further than the true one: by at most one cell a step, and in
        cumulants by about steps * (move * spacing)^2 / 8.

        Args:
            tilt: exponent of the tilt, any real number.
            spacing: grid step that will be used.
            exponent: > 0.
        """
        base, mean, spread = (float(value[0]) for value in self.cumulants(tilt))
        scale = 1 / math.sqrt(max(spread, 1e-300))
        moves = scale * np.geomspace(0.02, 200.0, 32)
        log_mgf = self.cumulants(np.concatenate([tilt + moves, tilt - moves]))[0]
        spread_out = exponent + self.steps * (moves * spacing) ** 2 / 8
        forward = (log_mgf[:32] - base + spread_out) / moves
        backward = (base - log_mgf[32:] - spread_out) / moves
        up, down = int(np.argmin(forward)), int(np.argmax(backward))
        low = max(float(backward[down]), self.min_loss - self.steps * spacing)
        high = min(float(forward[up]), self.max_loss + self.steps * spacing)
        return Window(
            tilt=tilt,
            low=min(low, mean),
            high=max(high, mean),
            backward=float(moves[down]),
            forward=float(moves[up]),
        )

    def compose(self, window: Window, spacing: float) -> TiltedSum:
        """Distribution of S on a grid.

        Args:
            window: range and tilt, from `window`.
            spacing: grid step wished for; it grows where the grid would exceed MAX_CELLS.
        """
        tilt = window.tilt
        spacing = max(spacing, window.width / MAX_CELLS, 2 * self._widest / MAX_CELLS)
        steps = [
            _TiltedStep(law.phase.steps, *self._discretise(law, spacing), tilt, spacing)
            for law in self.laws
        ]
        lowest = sum(step.lowest for step in steps)
        highest = sum(step.highest for step in steps)
        start = max(math.floor(window.low / spacing) - 3, lowest)
        stop = min(math.ceil(window.high / spacing) + 3, highest)
        size = next_fast_len(max(stop - start, 1) + 1, real=True)
        spectrum: Array | complex = 1.0
        for step in steps:
            spectrum = spectrum * rfft(step.folded(size)) ** step.count
        mass = np.maximum(irfft(spectrum, n=size), 0.0)
        offset = sum(step.count * step.centre for step in steps)
        losses = (start + np.arange(size)) * spacing
        escaped = 0.0
        for leaves, move, end in (
            (stop < highest, window.forward, losses[-1]),
            (start > lowest, -window.backward, losses[0]),
        ):
            if leaves:
                log_tail = sum(step.log_growth(move) for step in steps) - move * end
                escaped += math.exp(min(0.0, log_tail))
        return TiltedSum(
            losses=losses,
            mass=np.roll(mass, (offset - start) % size),
            tilt=tilt,
            log_mgf=sum(step.count * step.log_mgf for step in steps),
            escaped=escaped,
            noise=self.rounding * math.sqrt(float(mass @ mass) / size),
            steps=self.steps,
        )

    def _discretise(self, law: StepLaw, spacing: float) -> tuple[np.ndarray, Array]:
        """Grid indices and log masses (mixture) of one step, dominating the true step."""
        ends = np.array(law.support(self._cut))
        bottom, top = law.loss(ends)
        index = np.arange(math.floor(bottom / spacing), math.ceil(top / spacing) + 1)
        grid = index * spacing
        edges = np.clip(law.edges(grid), *ends)
        edges[0], edges[-1] = ends
        null, joined = law.masses(edges)
        mixture = (1 - law.rate) * null + law.rate * joined
        with np.errstate(divide="ignore", invalid="ignore"):
            tightness = grid[:-1] + np.log(null) - np.log(mixture)
            tightness = np.where(mixture > 0, np.clip(tightness, -spacing, 0.0), 0.0)
            right = np.expm1(tightness) / math.expm1(-spacing)
            mass = np.zeros(index.size)
            mass[:-1] += mixture * (1 - right)
            mass[1:] += mixture * right
            return index, np.log(mass)
