"""The training loop: when it stops, what it counts, what it writes."""

import math

import pytest
import torch
from torch import nn

from dpkernels.training.logs import read_metrics
from dpkernels.training.loop import TrainingLoop, rows_loss
from dpkernels.training.privacy import plan_privacy
from dpkernels.training.progress import Display
from dpkernels.training.run_folder import RunFolder, StepLedger, load_checkpoint, steps_begun
from tests.training.toy import FEATURES, ToyViews, tiny

CPU = torch.device("cpu")


def loop_of(folder: RunFolder, network: nn.Module | None = None, **training) -> TrainingLoop:
    config = tiny({"training": training})
    dataset = ToyViews([f"p{index}" for index in range(6)], config.data.views_per_patient)
    network = network or nn.Linear(FEATURES, 2)
    return TrainingLoop(config.training, plan_privacy(config, 6), folder, network, dataset)


def run(loop: TrainingLoop, validate=lambda: None, criterion=None) -> int:
    loss = rows_loss(criterion or nn.CrossEntropyLoss(), CPU, "float32")
    return loop.run(loss, validate, Display())


@pytest.fixture
def folder(tmp_path) -> RunFolder:
    return RunFolder.create(tmp_path / "run")


def test_training_stops_at_the_planned_steps(folder):
    assert run(loop_of(folder, steps=5)) == 5
    assert steps_begun(folder.ledger) == 5
    assert read_metrics(folder.metrics_csv)["step"] == [1, 2, 3, 4, 5]
    assert run(loop_of(folder, steps=5)) == 5, "nothing is left to do"
    assert steps_begun(folder.ledger) == 5


def test_steps_that_a_kill_took_are_counted_and_not_taken_again(folder):
    """Three steps are in the ledger, none in a checkpoint."""
    ledger = StepLedger(folder.ledger)
    for _ in range(3):
        ledger.begin()
    ledger.close()
    loop = loop_of(folder, steps=5)
    assert run(loop) == 5
    assert read_metrics(folder.metrics_csv)["step"] == [4, 5]
    ((_, _, counted),) = loop._update.state_dict()["accountant"]["history"]
    assert counted == 5


def test_the_epsilon_of_the_last_step_is_the_plans(folder):
    loop = loop_of(folder, steps=4)
    run(loop)
    assert read_metrics(folder.metrics_csv)["epsilon"][-1] == loop._plan.epsilon()


def test_the_learning_rate_follows_its_schedule(folder, tmp_path):
    run(loop_of(folder, steps=4, schedule="cosine"))
    rates = read_metrics(folder.metrics_csv)["learning_rate"]
    expected = [0.1 * 0.5 * (1 + math.cos(math.pi * step / 4)) for step in range(4)]
    assert rates == pytest.approx(expected)
    constant = RunFolder.create(tmp_path / "constant")
    run(loop_of(constant, steps=2))
    assert read_metrics(constant.metrics_csv)["learning_rate"] == [0.1, 0.1]


def test_validation_and_checkpoints_come_as_often_as_asked(folder, monkeypatch):
    saved = []
    save = RunFolder.save_checkpoint

    def note(self, name, state):
        saved.append((name, state.get("step")))
        save(self, name, state)

    monkeypatch.setattr(RunFolder, "save_checkpoint", note)
    scores = iter([0.25, 0.75])
    run(loop_of(folder, steps=5, validate_every=2, checkpoint_every=3, ema_decay=0.5),
        lambda: next(scores))  # fmt: skip
    found = read_metrics(folder.metrics_csv)["validation"]
    assert [value for value in found if not math.isnan(value)] == [0.25, 0.75]
    assert [math.isnan(value) for value in found] == [True, False, True, False, True]
    assert saved == [("last.pt", 3), ("last.pt", 5), ("ema.pt", None)]


def test_the_average_is_kept_only_where_it_was_asked_for(folder):
    run(loop_of(folder, steps=2))
    assert not (folder.checkpoints / "ema.pt").exists()


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_ends_the_run(folder, value):
    network = nn.Linear(FEATURES, 2)

    class Broken(nn.Module):
        def forward(self, output, label):
            return output.sum() * 0 + torch.tensor(value)

    with pytest.raises(FloatingPointError, match=rf"the loss is {value} at step \d"):
        run(loop_of(folder, network, steps=30, batch_size=6), criterion=Broken())
    assert not folder.last.exists(), "the last checkpoint is not overwritten by broken weights"


def test_ctrl_c_saves_what_was_trained(folder):
    def interrupt():
        raise KeyboardInterrupt

    network = nn.Linear(FEATURES, 2)
    with pytest.raises(KeyboardInterrupt):
        run(loop_of(folder, network, steps=9, validate_every=2), interrupt)
    state = load_checkpoint(folder.last)
    assert state["step"] == steps_begun(folder.ledger) == 2
    assert torch.equal(state["model"]["weight"], network.weight)


def test_what_requires_no_gradient_stays_as_it_is(folder):
    network = nn.Linear(FEATURES, 2)
    network.weight.requires_grad_(False)
    before = network.weight.clone(), network.bias.detach().clone()
    run(loop_of(folder, network, steps=3))
    assert torch.equal(network.weight, before[0])
    assert not torch.equal(network.bias, before[1])


@pytest.mark.parametrize(
    ("precision", "dtype"), [("float32", torch.float32), ("bfloat16", torch.bfloat16)]
)
def test_the_networks_precision_is_the_one_asked_for(precision, dtype):
    seen = []

    class Loss(nn.Module):
        def forward(self, output, label):
            seen.append(output.dtype)
            return output.float().mean()

    rows = torch.ones(4, FEATURES), torch.zeros(4)
    assert rows_loss(Loss(), CPU, precision)(nn.Linear(FEATURES, 2), *rows).dtype == torch.float32
    assert seen == [dtype]
