import copy
import json

import numpy as np
import pytest
import torch
from PIL import Image

from dpkernels.accounting import get_epsilon
from dpkernels.classification import ClassificationConfig, ClassificationTrainer
from dpkernels.classification.data import ImageStore, load_picture
from dpkernels.classification.folders import read_images
from dpkernels.classification.networks import ResNet9
from dpkernels.classification.presets import PRESETS
from dpkernels.training.augment import build_augmentation
from dpkernels.training.privacy import PrivacyPlan, PrivateUpdate
from dpkernels.training.run_folder import load_checkpoint
from dpkernels.training.sampling import flatten_views
from dpkernels.training.store import PatientDataset

TURNS = [{"_target_": "dpkernels.training.augment.RandTurnd", "keys": "image"}]


class Weighted(torch.nn.CrossEntropyLoss):
    """Class weights: torch divides by the sum of the weights in the batch, which mixes rows."""

    def __init__(self) -> None:
        super().__init__(weight=torch.tensor([1.0, 3.0]))


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """One finished run on synthetic lesions that it drew itself, used read only."""
    root = tmp_path_factory.mktemp("runs")
    changes = {
        "data": {"synthetic": {"lesions": 40, "size": 16}, "size": 16, "validation_share": 0.1},
        "network": {"channels": [4, 4, 4, 4]},
        "training": {"steps": 3, "batch_size": 6, "validate_every": 2, "device": "cpu"},
        "privacy": {"delta": 1e-3},
    }
    config = ClassificationConfig.from_preset("synthetic", changes)
    return ClassificationTrainer(config, root / "run").fit()


@pytest.mark.parametrize("name", PRESETS)
def test_presets_are_valid(name):
    config = ClassificationConfig.from_preset(name)
    assert ClassificationConfig.from_dict(config.to_dict()) == config
    assert config.data.views_per_patient == 4
    assert build_augmentation(config.data.augmentations) is not None


def test_the_run_folder_has_the_same_parts_as_a_segmentation_run(finished):
    run = finished.folder
    for name in (
        "config.yaml", "env.json", "split.json", "plan.json", "data.json", "metrics.csv",
        "metrics.json", "privacy_report.json", "privacy_report.md", "progress.png",
        "checkpoints/last.pt", "checkpoints/ema.pt", "overlays/predictions.png",
    ):  # fmt: skip
        assert (run / name).stat().st_size > 0, name
    metrics = json.loads((run / "metrics.json").read_text())
    assert set(metrics["summary"]) == {"all", "other", "akiec+bcc+mel"}
    assert finished.utility == metrics["summary"]["all"]["mcc"]
    assert finished.metric == "MCC"
    assert -1 <= finished.utility <= 1
    assert len(metrics["cases"]) == metrics["summary"]["all"]["images"]


def test_the_report_names_the_lesion_as_the_unit(finished):
    report = json.loads((finished.folder / "privacy_report.json").read_text())
    assert (report["unit"], report["patients"], report["views_per_patient"]) == ("lesion", 28, 4)
    assert (
        report["epsilon"]
        == finished.epsilon
        == get_epsilon(
            noise_multiplier=report["noise_multiplier"],
            sample_rate=report["sample_rate"],
            steps=3,
            delta=1e-3,
        )
    )
    text = (finished.folder / "privacy_report.md").read_text()
    assert "The unit is the lesion" in text
    assert "tells lesions apart, not patients" in text


def test_evaluation_and_prediction_agree_and_can_be_repeated(finished, tmp_path):
    before = json.loads((finished.folder / "metrics.json").read_text())
    trainer = ClassificationTrainer.from_run(finished.folder)
    trainer.evaluate()
    assert json.loads((finished.folder / "metrics.json").read_text()) == before
    data = next(finished.folder.parent.glob("synthetic-*"))
    named = ClassificationTrainer.from_run(finished.folder).predict(data, tmp_path / "out.csv")
    lines = (tmp_path / "out.csv").read_text().splitlines()
    assert lines[0] == "image,class,other,akiec+bcc+mel"
    assert named == [line.split(",")[0] for line in lines[1:]]
    predicted = {line.split(",")[0].split("/")[-1][:-4]: line.split(",")[1] for line in lines[1:]}
    classes = ("other", "akiec+bcc+mel")
    for case in before["cases"]:
        assert predicted[case["image"]] == classes[case["predicted"]]


def test_a_killed_run_resumes_with_its_history(tiny, tmp_path, monkeypatch):
    config = tiny({"training": {"steps": 4, "checkpoint_every": 1}})
    trainer = ClassificationTrainer(config, tmp_path / "run")
    step, taken = PrivateUpdate.step, []

    def die(self, loss_of_rows):
        taken.append(1)
        if len(taken) == 3:
            raise KeyboardInterrupt
        return step(self, loss_of_rows)

    monkeypatch.setattr(PrivateUpdate, "step", die)
    with pytest.raises(KeyboardInterrupt):
        trainer.fit()
    monkeypatch.undo()
    assert ClassificationTrainer.from_run(tmp_path / "run").fit(resume=True).steps == 4
    state = load_checkpoint(tmp_path / "run" / "checkpoints" / "last.pt")
    ((_, _, steps),) = state["update"]["accountant"]["history"]
    assert steps == 4


def released(network, dataset, bound):
    """What one noiseless step over every lesion releases, before the division by q N."""
    network = copy.deepcopy(network)
    before = torch.cat([p.detach().flatten().clone() for p in network.parameters()])
    plan = PrivacyPlan(True, len(dataset), 1.0, 10, 0.0, bound, 4, 1e-5, "tight")
    optimizer = torch.optim.SGD(network.parameters(), lr=1.0)
    loss = torch.nn.CrossEntropyLoss()
    PrivateUpdate(network, optimizer, dataset, plan, 2).step(
        lambda model, image, label: loss(model(image), label)
    )
    after = torch.cat([p.detach().flatten() for p in network.parameters()])
    return (before - after) * plan.expected_batch_size


def test_augmentations_of_one_lesion_are_averaged_and_clipped_once(lesions, tiny):
    """Multiplicity 4, lesions photographed once and twice, against one lesion at a time."""
    config = tiny({"data": {"views_per_patient": 4, "augmentations": TURNS}})
    store = ImageStore(read_images(lesions, positive=["mel", "bcc"]), config.data)
    store.read_all()
    names = sorted(store.folder.patients, key=lambda n: -len(store.folder.patients[n]))[:5]
    dataset = PatientDataset(names, store, build_augmentation(TURNS), seed=0)
    torch.manual_seed(0)
    network = ResNet9(3, 2, channels=(4, 4, 4, 4), groups=2).train()
    loss = torch.nn.CrossEntropyLoss()
    gradients = []
    for index in range(5):
        image, label = dataset[index]
        value = loss(network(flatten_views(image[None])), flatten_views(label[None]))
        parts = torch.autograd.grad(value, list(network.parameters()))
        gradients.append(torch.cat([g.flatten() for g in parts]))
    norms = torch.stack([g.norm() for g in gradients])
    bound = float(norms.median())
    expected = sum(g * min(1.0, bound / float(n)) for g, n in zip(gradients, norms, strict=True))
    found = released(network, dataset, bound)
    assert float((found - expected).norm() / expected.norm()) < 1e-4


def test_views_depend_on_seed_step_and_lesion_only(lesions, tiny):
    config = tiny({"data": {"views_per_patient": 6}})
    store = ImageStore(read_images(lesions), config.data)
    dataset = PatientDataset(list(store.folder.patients), store, build_augmentation(TURNS), 0)
    first, again = dataset[3][0], dataset[3][0]
    assert torch.equal(first, again)
    assert first.shape == (6, 3, 16, 16)
    assert 0 <= float(first.min()) < float(first.max()) <= 1
    dataset.step = 1
    assert not torch.equal(dataset[3][0], first)


def test_weights_are_standardised_and_a_wrong_shape_is_refused():
    network = ResNet9(1, 5, channels=(8, 8, 16, 16), groups=4)
    weight = network.stem[0][0].weight
    torch.testing.assert_close(weight.mean((1, 2, 3)), torch.zeros(8), atol=1e-6, rtol=0)
    assert network(torch.rand(2, 1, 24, 16)).shape == (2, 5)
    with pytest.raises(ValueError, match="four multiples of groups=32"):
        ResNet9(3, 2, channels=(64, 128, 100, 256))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"loss": {"label_smoothing": 2.0}}, "loss: "),
        ({"loss": {"_target_": "tests.classification.test_trainer.Weighted"}}, "not a mean over"),
        ({"loss": {"reduction": "sum"}}, "is not a mean over rows.*reduction"),
        ({"network": {"in_channels": 1}}, "network.in_channels must be 3, as the data set says"),
        ({"network": {"groups": 3}}, "network: cannot build"),
        ({"data": {"positive": ["melanoma"]}}, "has no class melanoma"),
        ({"data": {"layout": "isic"}}, "data.layout must be one of"),
        ({"data": {"channels": 4}}, "data.channels must be 1 or 3"),
        ({"training": {"batch_size": 31}}, "training.batch_size must be at most the 30 training l"),
        ({"privacy": {"delta": 0.1}}, "privacy.delta must be below 1 / 30 training lesions"),
    ],
)
def test_faulty_settings_end_before_the_first_step(tiny, tmp_path, change, message):
    with pytest.raises(ValueError, match=message):
        ClassificationTrainer(tiny(change), tmp_path / "run").fit()
    assert not (tmp_path / "run" / "checkpoints" / "steps.ledger").exists()


def test_every_damaged_image_is_named_before_training(folder, tiny, tmp_path):
    pictures = sorted(folder.rglob("*.jpg"))
    pictures[0].write_bytes(b"damaged")
    whole = pictures[1].read_bytes()
    pictures[1].write_bytes(whole[: len(whole) // 2])
    config = tiny(root=folder)
    with pytest.raises(ValueError, match=rf"(?s)2 images.*{pictures[0].name}.*{pictures[1].name}"):
        ClassificationTrainer(config, tmp_path / "run").fit()
    assert not (tmp_path / "run" / "checkpoints" / "steps.ledger").exists()


def test_grey_and_transparent_images_are_brought_to_the_stated_channels(folder, tiny):
    pictures = sorted(folder.rglob("*.jpg"))
    Image.fromarray(np.full((30, 20), 128, np.uint8)).save(pictures[0])
    for channels in (1, 3):
        config = tiny({"data": {"channels": channels}}, root=folder)
        store = ImageStore(read_images(folder), config.data)
        grey = next(p for p in store.folder.records if p.path == pictures[0])
        image = store.image(grey)
        assert image.shape == (channels, 16, 16)
        assert float((image - 128 / 255).abs().max()) < 0.02


@pytest.mark.parametrize(("kind", "mode"), [(np.uint16, "I;16"), (np.float32, "F")])
def test_deep_images_are_refused_as_8_bits_would_cut_them_off(tmp_path, kind, mode):
    path = tmp_path / "deep.tif"
    Image.fromarray(np.full((8, 8), 3000, kind)).save(path)
    with pytest.raises(ValueError, match=rf"deep.tif: pixels of mode {mode}, expected 8 bits"):
        load_picture(str(path), 8, 3)


def test_training_without_privacy_learns_the_synthetic_task(tmp_path):
    """Above chance: the images carry signal, and the whole way to the metric works.

    Batches are drawn by the system's entropy: four runs of 150 steps reached 0.44 to 0.67.
    """
    changes = {
        "data": {"synthetic": {"lesions": 240, "size": 16}, "size": 16, "views_per_patient": 1},
        "network": {"channels": [8, 8, 8, 8]},
        "training": {"steps": 200, "batch_size": 48, "device": "cpu"},
        "privacy": {"enabled": False},
    }
    config = ClassificationConfig.from_preset("synthetic", changes)
    result = ClassificationTrainer(config, tmp_path / "run").fit()
    assert result.utility > 0.2
    assert result.epsilon is None
