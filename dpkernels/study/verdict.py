"""What the data of a study bear, in plain words: derived from the rows, whatever they say."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import takewhile

from dpkernels.study.results import Row, budget

KEPT = 0.95
ABOVE_CHANCE = 0.05
RECOGNISED = 0.9


@dataclass(frozen=True)
class Verdict:
    """The conclusion.

    Attributes:
        kept_from: least budget from which on all keep `KEPT` of the non-private utility; None if
            none does or there is no non-private run.
        hidden_to: by adversary, the largest budget up to which all reconstructions are less than
            `ABOVE_CHANCE` above the chance correlation; None if none.
        sentences: in reading order.
    """

    kept_from: float | None
    hidden_to: dict[str, float | None]
    sentences: tuple[str, ...]

    def window(self, adversary: str) -> tuple[float, float] | None:
        """Least and largest budget that keep utility and hold this adversary at chance."""
        hidden = self.hidden_to[adversary]
        if self.kept_from is None or hidden is None or self.kept_from > hidden:
            return None
        return self.kept_from, hidden


def conclude(rows: Sequence[Row], metric: str, titles: Mapping[str, str], unit: str) -> Verdict:
    """Read the rows.

    Args:
        rows: by rising budget.
        metric: name of the utility.
        titles: by adversary.
        unit: what one record is.
    """
    private = [row for row in rows if math.isfinite(row.epsilon)]
    reference = next((row for row in rows if math.isinf(row.epsilon)), None)
    kept_from = None
    if reference is not None:
        kept_from = _last_of_run(private[::-1], lambda row: row.utility >= KEPT * reference.utility)
    hidden_to = {
        name: _last_of_run(private, lambda row, name=name: _at_chance(row, name))  # type: ignore[misc]
        for name in titles
    }
    found = Verdict(kept_from, hidden_to, ())
    sentences = [
        _utility(private, reference, kept_from, metric),
        *[_attack(private, rows, name, title, hidden_to[name]) for name, title in titles.items()],
        *[_window(found, name, title, private, metric) for name, title in titles.items()],
        *_worst_case(found, private, titles, unit),
        *_prior(rows, unit),
    ]
    return replace(found, sentences=tuple(sentences))


def _last_of_run(rows: Sequence[Row], holds: Callable[[Row], bool]) -> float | None:
    """The budget of the last row before `holds` fails for the first time."""
    held = list(takewhile(holds, rows))
    return held[-1].epsilon if held else None


def _at_chance(row: Row, adversary: str) -> bool:
    reached = row.attacks[adversary]
    return reached.ncc - reached.chance_ncc < ABOVE_CHANCE


def _utility(
    private: Sequence[Row], reference: Row | None, kept_from: float | None, metric: str
) -> str:
    if reference is None:
        return (
            f"Utility: no non-private run was part of the study, so {metric} cannot be compared; "
            "add `inf` to the budgets."
        )
    start = f"Utility: without privacy {metric} is {reference.utility:.3f}."
    lost = [row for row in private if row.utility < KEPT * reference.utility]
    if kept_from is None:
        return f"{start} No budget of the study keeps {KEPT:.0%} of it up to the largest one."
    text = f"{start} At least {KEPT:.0%} of it is kept from epsilon {budget(kept_from)} on."
    if lost:
        text += " Below, at " + ", ".join(
            f"epsilon {budget(row.epsilon)} {metric} is {row.utility:.3f}" for row in lost
        )
        text += "."
    return text


def _attack(
    private: Sequence[Row], rows: Sequence[Row], name: str, title: str, hidden_to: float | None
) -> str:
    chance = max(row.attacks[name].chance_ncc for row in rows)
    if hidden_to is None:
        text = f"Attack ({title}): no budget of the study holds it at chance"
    else:
        text = (
            f"Attack ({title}): at chance up to epsilon {budget(hidden_to)}, that is, its median "
            f"correlation with the record is less than {ABOVE_CHANCE} above the {chance:.3f} that "
            "pure noise reaches (the best reconstruction there has "
            f"{next(r for r in private if r.epsilon == hidden_to).attacks[name].best_ncc:.3f})"
        )
    text += "; " + ", ".join(
        f"{row.attacks[name].ncc:.3f} at {budget(row.epsilon)}"
        for row in private
        if not (hidden_to is not None and row.epsilon < hidden_to)
    )
    clear = next((row for row in rows if row.attacks[name].ncc > RECOGNISED), None)
    if clear is not None and math.isfinite(clear.epsilon):
        return (
            f"{text}. From epsilon {budget(clear.epsilon)} it is above {RECOGNISED}: a near copy."
        )
    return f"{text}. At no finite budget of the study is it above {RECOGNISED}."


def _window(found: Verdict, name: str, title: str, private: Sequence[Row], metric: str) -> str:
    window = found.window(name)
    if window is not None:
        low, high = window
        between = budget(low) if low == high else f"{budget(low)} to {budget(high)}"
        return (
            f"Conclusion ({title}): these data bear the claim that large budgets can keep both: at "
            f"epsilon {between} {metric} stays within {1 - KEPT:.0%} of non-private training and "
            "the attack is at chance."
        )
    if found.kept_from is None:
        return (
            f"Conclusion ({title}): these data do not show a budget that keeps {metric}, so they "
            "bear no claim about keeping both."
        )
    at = next(row for row in private if row.epsilon == found.kept_from)
    return (
        f"Conclusion ({title}): these data do not bear the claim: where {metric} is first kept, at "
        f"epsilon {budget(found.kept_from)}, the attack's median correlation is "
        f"{at.attacks[name].ncc:.3f}."
    )


def _worst_case(
    found: Verdict, private: Sequence[Row], titles: Mapping[str, str], unit: str
) -> list[str]:
    windows = [w for w in map(found.window, titles) if w is not None]
    if not windows:
        return []
    low, high = min(w[0] for w in windows), max(w[1] for w in windows)
    inside = [row for row in private if low <= row.epsilon <= high]
    bounds = sorted({f"{row.risk.worst_case:.3g}" for row in (inside[0], inside[-1])}, key=float)
    return [
        f"Limits: in that range the worst-case bound, on an attacker who knows every gradient and "
        f"only has to say which {unit} was there, is {' to '.join(bounds)}. Where it is near 1 "
        "nothing is guaranteed against such an attacker; what protects then is that real "
        "attackers know less. Attacks get better, bounds do not."
    ]


def _prior(rows: Sequence[Row], unit: str) -> list[str]:
    known = [row.prior_ncc for row in rows if row.prior_ncc is not None]
    if not known:
        return []
    return [
        f"For scale: without any model, the mean of the other {unit}s already correlates "
        f"{sum(known) / len(known):.2f} with a record. What an attack shows of one {unit} beyond "
        "all others is what counts; the pictures tell more than the number."
    ]
