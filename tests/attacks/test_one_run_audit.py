"""The audit end to end: a correct engine stays under its budget, a broken one is caught.

The confidence is 1 - 1e-6: a correct engine fails such a test once in a million runs, whatever the
seeds, and they are fixed beside.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from dpkernels import PrivacyEngine
from dpkernels.attacks.one_run_audit import AuditReport, one_run_audit
from dpkernels.engine.release import secure
from dpkernels.engine.release.clipping import Clipping
from dpkernels.engine.release.optimizer import FusedDPOptimizer
from dpkernels.engine.release.records import StepCounter

CONFIDENCE = 1 - 1e-6
CANARIES = 1000
#: far below the failure probability per canary, of which delta takes its share
DELTA = 1e-12


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def audited(**kwargs: object) -> AuditReport:
    torch.manual_seed(0)
    arguments = {
        "canaries": CANARIES, "confidence": CONFIDENCE, "delta": DELTA, "noise_multiplier": 4.0,
        "generator": seeded(0), **kwargs,
    }  # fmt: skip
    return one_run_audit(**arguments)


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"sample_rate": 0.5, "steps": 3},
        {"clipping": "automatic", "max_grad_norm": 7.0},
        {"noise_multiplier": 0.3},
    ],
    ids=str,
)
@pytest.mark.parametrize("secure_mode", [False, True])
def test_a_correct_engine_stays_within_its_budget(
    arguments: dict[str, object], secure_mode: bool
) -> None:
    seeds = {} if secure_mode else {"noise_generator": seeded(1)}
    report = audited(engine=PrivacyEngine(secure_mode=secure_mode), **seeds, **arguments)
    assert not report.violated
    assert report.lower_bound <= report.epsilon
    assert "No violation found" in report.to_text()
    assert report.correct > report.guesses / 2
    if "noise_multiplier" in arguments:
        assert report.lower_bound > 1.5, "an attack that never succeeds finds nothing"


def without_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FusedDPOptimizer, "_noise_std", lambda *_: 0.0)


def with_a_tenth_of_the_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    right = FusedDPOptimizer._noise_std
    monkeypatch.setattr(FusedDPOptimizer, "_noise_std", lambda *args: right(*args) / 10)


def without_clipping(monkeypatch: pytest.MonkeyPatch) -> None:
    right = Clipping.factors
    monkeypatch.setattr(
        Clipping,
        "factors",
        lambda *args: {p: torch.ones_like(f) for p, f in right(*args).items()},
    )


def with_clipping_by_the_largest_norm(monkeypatch: pytest.MonkeyPatch) -> None:
    """The noise follows C, the gradients another bound: a scheduler that moves only one."""
    right = Clipping.factors
    monkeypatch.setattr(
        Clipping, "factors", lambda self, norms, bound: right(self, norms, 20 * bound)
    )


def with_another_noise_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    def count(self: StepCounter, optimizer: FusedDPOptimizer) -> None:
        self.accountant.step(noise_multiplier=20.0, sample_rate=self.sample_rate)

    monkeypatch.setattr(StepCounter, "__call__", count)


BROKEN: dict[str, tuple[Callable[[pytest.MonkeyPatch], None], dict[str, object]]] = {
    "noise off": (without_noise, {}),
    "noise too small": (with_a_tenth_of_the_noise, {}),
    "clipping off": (without_clipping, {}),
    "clipping at another bound": (with_clipping_by_the_largest_norm, {}),
    "another noise counted": (with_another_noise_counted, {"noise_multiplier": 0.5}),
}


@pytest.mark.parametrize("fault", BROKEN)
def test_a_broken_engine_is_caught(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    broken, arguments = BROKEN[fault]
    broken(monkeypatch)
    report = audited(noise_generator=seeded(1), **arguments)
    assert report.violated
    assert "VIOLATION" in report.to_text()


def test_a_broken_secure_mode_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(secure, "discrete_gaussian_noise_", lambda total, *_: total)
    assert audited(engine=PrivacyEngine(secure_mode=True)).violated


def test_a_budget_beyond_what_canaries_can_show_is_said() -> None:
    report = audited(noise_multiplier=0.1, canaries=50)
    assert report.ceiling < report.epsilon
    assert "for a test that can fail" in report.to_text()


@pytest.mark.parametrize(
    ("name", "value"),
    [("sample_rate", 0.0), ("steps", 0), ("canaries", 3), ("clipping", "per_layer")],
)
def test_bad_input_is_named(name: str, value: object) -> None:
    with pytest.raises(ValueError, match=name):
        one_run_audit(**{name: value})
