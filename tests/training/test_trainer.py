"""The course of a run, with the smallest task there is."""

import json
import math

import pytest
import torch

from dpkernels.accounting import get_epsilon
from dpkernels.training.run_folder import RunFolder, load_checkpoint
from dpkernels.training.settings import load_yaml
from dpkernels.training.trainer import TrainingResult
from tests.training.runs import weights
from tests.training.toy import FEATURES, ToyConfig, ToyTrainer, tiny

CROSS_ENTROPY = {"_target_": "torch.nn.CrossEntropyLoss"}


def test_a_run_leaves_everything_that_is_promised(finished):
    for name in (
        "config.yaml", "env.json", "split.json", "plan.json", "data.json", "metrics.csv",
        "metrics.json", "privacy_report.json", "privacy_report.md", "progress.png",
        "checkpoints/last.pt", "checkpoints/ema.pt", "checkpoints/steps.ledger",
    ):  # fmt: skip
        assert (finished / name).stat().st_size > 0, name
    assert not list(finished.rglob("*.partial"))
    assert ToyConfig.from_dict(load_yaml(finished / "config.yaml")).training.steps == 3
    split = json.loads((finished / "split.json").read_text())
    assert [len(split[part]) for part in ("train", "validation", "test")] == [4, 2, 2]


def test_the_result_is_that_of_the_report(tmp_path):
    result = ToyTrainer(tiny(), tmp_path / "run").fit()
    report = json.loads((tmp_path / "run" / "privacy_report.json").read_text())
    expected = get_epsilon(
        noise_multiplier=report["noise_multiplier"], sample_rate=2 / 6, steps=3, delta=1e-5
    )
    assert result.epsilon == report["epsilon"] == expected <= 8
    assert (result.steps, result.metric, result.folder) == (3, "accuracy", tmp_path / "run")
    assert result.utility == result.summary["all"]["accuracy"]
    assert report["notes"] == ["Vectors were drawn."]
    assert "That there are two classes is treated as public." in report["by_products"]
    assert isinstance(result, TrainingResult)
    assert ToyTrainer.from_run(tmp_path / "run").finished() == result


def test_without_privacy_it_learns(tmp_path):
    training = {"steps": 60, "batch_size": 6, "optimizer": {"lr": 0.5}}
    config = tiny({"training": training, "privacy": {"enabled": False}})
    result = ToyTrainer(config, tmp_path / "run").fit()
    assert (result.utility, result.epsilon) == (1.0, None)


def test_what_is_planned_is_what_is_trained_with(tmp_path):
    trainer = ToyTrainer(tiny(), tmp_path / "run")
    planned = trainer.planned()
    assert not (tmp_path / "run").exists(), "planning writes nothing"
    trainer.fit()
    assert ToyTrainer.from_run(tmp_path / "run").plan() == planned


def test_the_average_is_what_is_evaluated_and_attacked(finished):
    ema = load_checkpoint(finished / "checkpoints" / "ema.pt")["model"]["weight"]
    assert json.loads((finished / "metrics.json").read_text())["weights"] == "ema"
    exposed = ToyTrainer.from_run(finished).exposed(3)
    assert torch.equal(exposed.network.weight, ema)
    assert exposed.images.shape == (3, FEATURES)
    assert exposed.labels.shape == (3,)
    assert ToyTrainer.from_run(finished).plan().unit == "patient"
    assert len(ToyTrainer.from_run(finished).exposed(99).images) == 4


def test_a_run_without_weights_exposes_nothing(tmp_path):
    folder = RunFolder.create(tmp_path / "run")
    folder.write_yaml("config.yaml", tiny().to_dict())
    folder.write_json("split.json", {"train": ["p0"], "validation": [], "test": []})
    trainer = ToyTrainer.from_run(folder.root)
    with pytest.raises(ValueError, match="no such checkpoint"):
        trainer.exposed(1)


def test_training_goes_on_from_given_weights_and_in_chosen_layers(finished, tmp_path):
    start = finished / "checkpoints" / "last.pt"
    training = {"init_from": str(start), "train_layers": ["bias"]}
    ToyTrainer(tiny({"training": training}), tmp_path / "run").fit()
    before, after = (
        load_checkpoint(run / "checkpoints" / "last.pt")["model"]
        for run in (finished, tmp_path / "run")
    )
    assert torch.equal(before["weight"], after["weight"])
    assert not torch.equal(before["bias"], after["bias"])
    torch.save({"model": {"weight": torch.zeros(1)}}, tmp_path / "other.pt")
    training = {"init_from": str(tmp_path / "other.pt")}
    with pytest.raises(ValueError, match="training.init_from: .*other.pt is of another network"):
        ToyTrainer(tiny({"training": training}), tmp_path / "other").fit()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"data": {"damaged": ["p1", "p5"]}}, r"(?s)2 vectors are faulty:.*p1.*p5"),
        ({"data": {"patients": 2, "test_share": 0.9}}, "2 patients are too few"),
        ({"network": {"in_features": 2}}, "network.in_features must be 3, as the toy says"),
        ({"loss": {**CROSS_ENTROPY, "reduction": "sum"}}, "is not a mean over rows"),
        ({"training": {"batch_size": 7}}, "training.batch_size must be at most the 6 training"),
        ({"training": {"train_layers": ["head"]}}, "'head' matches no parameter"),
        ({"training": {"init_from": "no.pt"}}, "no.pt: no such checkpoint"),
    ],
)
def test_faults_end_before_the_first_step(tmp_path, change, message):
    with pytest.raises(ValueError, match=message):
        ToyTrainer(tiny(change), tmp_path / "run").fit()
    assert not (tmp_path / "run" / "checkpoints" / "steps.ledger").exists()
    assert not (tmp_path / "run" / "metrics.csv").exists()


def test_a_run_without_steps_is_neither_finished_nor_reported(tmp_path):
    with pytest.raises(ValueError, match="matches no parameter"):
        ToyTrainer(tiny({"training": {"train_layers": ["x"]}}), tmp_path / "run").fit()
    folder = RunFolder(tmp_path / "run")
    folder.write_yaml("config.yaml", tiny().to_dict())
    trainer = ToyTrainer.from_run(folder.root)
    folder.write_json("plan.json", trainer.planned().to_dict())
    assert trainer.finished() is None
    with pytest.raises(ValueError, match="no step was taken yet"):
        trainer.privacy_report()


def test_what_has_no_value_is_nan_again_when_a_finished_run_is_read(tmp_path):
    result = ToyTrainer(tiny(), tmp_path / "run").fit()
    RunFolder(tmp_path / "run").write_json(
        "metrics.json", {"summary": {"all": {"accuracy": math.nan}}}
    )
    again = ToyTrainer.from_run(tmp_path / "run").finished()
    assert math.isnan(again.utility)
    assert again.epsilon == result.epsilon


def test_fixed_noise_repeats_a_run_and_its_report_claims_nothing(tmp_path):
    config = tiny({"privacy": {"insecure_fixed_noise": 7}})
    for name in ("a", "b"):
        ToyTrainer(config, tmp_path / name).fit()
    ToyTrainer(tiny(), tmp_path / "c").fit()
    assert torch.equal(weights(tmp_path / "a"), weights(tmp_path / "b"))
    assert not torch.allclose(weights(tmp_path / "a"), weights(tmp_path / "c"))
    assert "no privacy guarantee" in (tmp_path / "a" / "privacy_report.md").read_text()


def test_a_run_has_a_folder_of_its_own_by_default(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    root = ToyTrainer(tiny()).folder.root
    assert root.parent.name == "runs"
    assert root.name.startswith("toy-2")
