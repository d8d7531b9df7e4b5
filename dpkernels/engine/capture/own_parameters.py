"""Modules that own bare parameters beside layers: a class token, position embeddings, a scale.

Such a module need not be one unit. Where a bare parameter can be replaced by one copy per sample,
the module runs on the whole batch, its layers keep their own rules, and ordinary autograd returns
the parameter's per-sample gradients. Whether a parameter can be replaced is not read off the code
but tried: with random parameters, different for each sample, the batch must return what each sample
returns alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from dpkernels.engine.capture.layer import Slot, swapped
from dpkernels.engine.capture.sample_by_sample import UnitCall, UnitForward, deterministic
from dpkernels.engine.capture.session import Session

#: the parameter moves no output: the parameter stays, and its guard refuses a gradient
_UNUSED = -2
#: how far two equal outputs may differ, relative to a parameter's effect on the output
_TOLERANCE = 1e-2
#: largest number of size-1 axes put between the sample axis and a parameter's own axes
_MOST_AXES = 3


class OwnParametersForward(UnitForward):
    """Capture for a module with bare parameters; a unit where they cannot be expanded."""

    def __init__(self, module: nn.Module, name: str, session: Session, axis: int):
        super().__init__(module, name, session, axis)
        #: by the kind of the call, by parameter: the layout in which the parameter is expanded;
        #: empty where the module runs as a unit
        self._layouts: dict[tuple[Any, ...], dict[int, int]] = {}

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        sink = self.session.open_sink
        slots = [] if sink is None else self.slots(_owners(self.module))
        if sink is None or not slots or self.axis != 0:
            return super().__call__(*args, **kwargs)
        call = self._take_apart(args, kwargs)
        kind = call.kind
        if kind not in self._layouts and call.samples > 1:
            self._layouts[kind] = self._find_layouts(call, slots)
        layouts = self._layouts.get(kind, {})
        if any(id(p) not in layouts for _, _, p in slots):
            return super().__call__(*args, **kwargs)
        self.show(sink, call)
        repeats = call.rows // call.samples
        expanded = [
            (m, n, self._expanded(p, call.samples, repeats, layouts[id(p)]))
            for m, n, p in slots
            if layouts[id(p)] != _UNUSED
        ]
        with swapped(expanded):
            return self.original(*args, **kwargs)

    def _expanded(
        self, parameter: nn.Parameter, samples: int, repeats: int, layout: int
    ) -> torch.Tensor:
        """[rows, 1, ..., *shape]: the per-sample parameter as the module's forward gets it."""
        per_sample = self._per_sample(parameter, samples)
        rows = per_sample if repeats == 1 else per_sample.repeat_interleave(repeats, 0)
        return _laid_out(rows, parameter, layout)

    def _find_layouts(self, call: UnitCall, slots: list[Slot]) -> dict[int, int]:
        """By parameter, the layout that stands the trial; empty if one parameter has none."""
        layouts: dict[int, int] = {}
        pair = call.part(0, 2).on_copies()
        for _, _, parameter in slots:
            if id(parameter) in layouts:
                continue
            layout = self._find_layout(pair, parameter)
            if layout is None:
                return {}
            layouts[id(parameter)] = layout
        return layouts

    def _find_layout(self, pair: UnitCall, parameter: nn.Parameter) -> int | None:
        for layout in _layouts_of(parameter):
            trial = self._trial(pair, parameter, layout)
            if trial is None:
                continue
            effect, error = trial
            if effect == 0.0:
                return _UNUSED
            if error <= _TOLERANCE * effect:
                return layout
        return None

    def _trial(
        self, pair: UnitCall, parameter: nn.Parameter, layout: int
    ) -> tuple[float, float] | None:
        """Run two samples with a parameter each, together and alone, and with one for both.

        Returns:
            The distance that other parameters move the outputs, and the largest distance between
            outputs that must be equal: together and alone, expanded and ordinary where both samples
            have the same parameter. None if the forward raises or the outputs cannot be compared.
        """
        generator = torch.Generator(parameter.device).manual_seed(0)

        def random(p: torch.Tensor, *rows: int) -> torch.Tensor:
            noise = torch.empty((*rows, *p.shape), dtype=p.dtype, device=p.device)
            noise.normal_(generator=generator)
            return p + noise * (p.std() + 0.1 if p.numel() > 1 else 1.0)

        everywhere = [
            (m, n, p)
            for m in self.module.modules()
            for n, p in m._parameters.items()
            if p is not None and p.is_floating_point() and p.device == parameter.device
        ]
        others = {id(p): random(p) for _, _, p in everywhere}

        def run(call: UnitCall, value: torch.Tensor) -> list[torch.Tensor]:
            values = {**others, id(parameter): value}
            with swapped((m, n, values[id(p)]) for m, n, p in everywhere):
                outputs = tree_leaves(call.run(call.leaves))
            return [t for t in outputs if isinstance(t, torch.Tensor) and t.is_floating_point()]

        repeats = pair.rows // 2
        own, control = random(parameter, 2), random(parameter, 2)
        alike = control[:1].expand_as(control)
        with torch.no_grad(), deterministic(self.module), self.session.paused():
            try:
                together, changed, same = (
                    run(pair, _laid_out(v.repeat_interleave(repeats, 0), parameter, layout))
                    for v in (own, control, alike)
                )
                plain = run(pair, control[0])
                alone = [run(pair.part(b, 1), own[b]) for b in range(2)]
            except Exception:  # a forward may raise anything for a parameter of another shape
                return None
        joined = [torch.cat(parts) for parts in zip(*alone) if parts[0].ndim]
        pairs = [*zip(joined, [t for t in together if t.ndim]), *zip(plain, same)]
        if not joined or any(a.shape != b.shape for a, b in pairs):
            return None
        effect = max(_distance(a, b) for a, b in zip(together, changed))
        return effect, max(_distance(a, b) for a, b in pairs)


def _owners(module: nn.Module) -> Iterator[nn.Module]:
    """The module and containers below it: without a forward of theirs, the module's uses them."""
    yield module
    for child in module.children():
        if type(child).forward is nn.Module.forward:
            yield from _owners(child)


def _layouts_of(parameter: torch.Tensor) -> list[int]:
    """Candidate layouts of a parameter.

    A layout is the number of size-1 axes between the sample axis and the parameter's own. -1: the
    parameter starts with a size-1 axis itself (a class token [1, 1, D]); the sample axis replaces
    that axis.
    """
    leading = [-1] if parameter.ndim and parameter.shape[0] == 1 else []
    return [*leading, *range(_MOST_AXES)]


def _laid_out(rows: torch.Tensor, parameter: torch.Tensor, layout: int) -> torch.Tensor:
    """[rows, *shape] -> [rows, 1, ..., *shape], see :func:`_layouts_of`."""
    between = [1] * max(layout, 0)
    own = parameter.shape[1:] if layout < 0 else parameter.shape
    return rows.reshape(rows.shape[0], *between, *own)


def _distance(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a.double() - b.double()).abs().max()) if a.numel() else 0.0
