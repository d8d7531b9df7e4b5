"""One entry makes an accountant known wherever a name is accepted."""

from __future__ import annotations

import math
import pickle

import pytest
import torch
from opacus.accountants import create_accountant
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from typer.testing import CliRunner

from dpkernels import PrivacyEngine
from dpkernels.accounting import (
    Accountant,
    get_epsilon,
    get_history_epsilon,
    get_noise_multiplier,
    register_accountant,
)
from dpkernels.accounting.accountants import ACCOUNTANTS, guaranteeing
from dpkernels.accounting.events import History, Phase
from dpkernels.accounting.opacus_adapter import HistoryAccountant
from dpkernels.cli import app
from dpkernels.study.runner import StudySettings
from dpkernels.training.config import PrivacyConfig

RUN = {"sample_rate": 0.1, "steps": 20, "accountant": "double"}


def double(history: History, delta: float) -> float:
    """Twice the tight epsilon; no run of more than 1000 steps."""
    if sum(phase.steps for phase in history) > 1000:
        raise ValueError("accountant='double': expected at most 1000 steps")
    return 2 * get_history_epsilon(history, delta=delta)


@pytest.fixture(autouse=True)
def _registered(monkeypatch: pytest.MonkeyPatch) -> None:
    """`double` is known during the test, and "doubtful", which may fall below the truth."""
    for name in ("double", "doubtful"):
        accountant = Accountant(name, "twice the truth", double, upper_bound=name == "double")
        monkeypatch.setitem(ACCOUNTANTS, name, accountant)


def test_it_bounds_a_history_that_is_data() -> None:
    phases = [(1.0, 0.1, 5), Phase(2.0, 0.2, 7), (1.0, 0.1, 5)]
    found = get_history_epsilon(phases, delta=1e-5, accountant="double")
    assert found == 2 * get_history_epsilon([(1.0, 0.1, 10), (2.0, 0.2, 7)], delta=1e-5)
    assert get_history_epsilon([], delta=1e-5, accountant="double") == 0.0


def test_its_noise_is_searched_for() -> None:
    sigma = get_noise_multiplier(target_epsilon=3.0, target_delta=1e-5, **RUN)
    spent = get_epsilon(noise_multiplier=sigma, delta=1e-5, **RUN)
    assert 2.999 < spent <= 3.0
    tight = get_noise_multiplier(
        target_epsilon=1.5, target_delta=1e-5, **{**RUN, "accountant": "tight"}
    )
    assert sigma == pytest.approx(tight, rel=5e-3)


def test_its_own_calibration_is_asked_first(monkeypatch: pytest.MonkeyPatch) -> None:
    own = Accountant("own", "", double, calibrate=lambda *asked: float(len(asked)))
    monkeypatch.setitem(ACCOUNTANTS, "own", own)
    run = {**RUN, "accountant": "own"}
    assert get_noise_multiplier(target_epsilon=3.0, target_delta=1e-5, **run) == 4.0


def test_a_name_is_given_once(monkeypatch: pytest.MonkeyPatch) -> None:
    before = dict(ACCOUNTANTS)
    with pytest.raises(ValueError, match="name='tight': expected one that no other"):
        register_accountant(Accountant("tight", "", double))
    assert before == ACCOUNTANTS
    monkeypatch.delitem(ACCOUNTANTS, "double")
    register_accountant(before["double"])
    register_accountant(before["double"])
    assert before == ACCOUNTANTS


def test_the_engine_counts_and_calibrates_with_it() -> None:
    engine = PrivacyEngine(accountant="double")
    data = DataLoader(TensorDataset(torch.randn(20, 3)), batch_size=5)
    model = nn.Linear(3, 1)
    model, optimizer, loader = engine.make_private_with_epsilon(
        module=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
        data_loader=data,
        target_epsilon=3.0,
        target_delta=1e-5,
        epochs=2,
        max_grad_norm=1.0,
    )
    for (rows,) in (batch for _ in range(2) for batch in loader):
        optimizer.zero_grad()
        model(rows).sum(1).mean().backward()
        optimizer.step()
    assert 2.999 < engine.get_epsilon(delta=1e-5) <= 3.0
    assert engine.get_epsilon(1e-5) == 2 * get_history_epsilon(
        engine.accountant.history, delta=1e-5
    )


def test_opacus_knows_it_by_name_and_its_state_is_everybodys() -> None:
    PrivacyEngine()
    accountant = create_accountant("double")
    assert isinstance(accountant, HistoryAccountant)
    accountant.step(noise_multiplier=1.0, sample_rate=0.1)
    again = pickle.loads(pickle.dumps(accountant))
    assert (again.mechanism(), again.history) == ("double", [(1.0, 0.1, 1)])
    tight = create_accountant("tight")
    tight.load_state_dict(again.state_dict())
    assert 2 * tight.get_epsilon(1e-5) == again.get_epsilon(1e-5)
    again.step(noise_multiplier=0.0, sample_rate=0.1)
    assert again.get_epsilon(1e-5) == math.inf


def test_what_it_cannot_account_for_is_said_by_its_name() -> None:
    arguments = ["account", "--sample-rate", "0.1", "--delta", "1e-5", "--noise-multiplier", "1"]
    arguments += ["--accountant", "double", "--accountant", "tight", "--steps"]
    fine = CliRunner().invoke(app, [*arguments, "1000"])
    assert fine.exit_code == 0
    table = dict(line.split() for line in fine.stdout.splitlines()[1:])
    assert float(table["double"]) == pytest.approx(2 * float(table["tight"]), rel=1e-6)
    refused = CliRunner().invoke(app, [*arguments, "1001"])
    assert refused.exit_code == 0
    assert "double      refused: accountant='double': expected at most 1000" in refused.output


def test_a_guarantee_rests_on_an_upper_bound_only() -> None:
    assert {"tight", "rdp", "prv", "double"} <= set(guaranteeing())
    assert PrivacyConfig(accountant="double").accountant == "double"
    assert StudySettings(accountant="double").accountant == "double"
    for name in ("doubtful", "gdp"):
        with pytest.raises(ValueError, match="privacy.accountant must be tight, rdp, .*double"):
            PrivacyConfig(accountant=name)
        with pytest.raises(ValueError, match="accountant must be one of tight, rdp, .*double"):
            StudySettings(accountant=name)
