import json
import shutil

import nibabel as nib
import numpy as np
import pytest
import torch
import yaml

from dpkernels.accounting import get_epsilon
from dpkernels.reconstruction import rero_bound
from dpkernels.segmentation.config import SegmentationConfig
from dpkernels.segmentation.trainer import SegmentationTrainer
from dpkernels.training.logs import read_metrics
from dpkernels.training.run_folder import load_checkpoint
from dpkernels.training.settings import load_yaml
from tests.training.runs import weights


def test_the_run_folder_holds_everything_that_is_promised(finished):
    for name in (
        "config.yaml",
        "env.json",
        "split.json",
        "plan.json",
        "data.json",
        "metrics.csv",
        "metrics.json",
        "privacy_report.json",
        "privacy_report.md",
        "progress.png",
        "checkpoints/last.pt",
        "checkpoints/ema.pt",
    ):
        assert (finished / name).stat().st_size > 0, name
    assert len(list((finished / "overlays").glob("*.png"))) == 1
    assert list((finished / "tensorboard").iterdir())
    assert not list(finished.rglob("*.partial"))
    metrics = json.loads((finished / "metrics.json").read_text())
    assert set(metrics["summary"]) == {"liver", "cancer"}
    assert 0 <= metrics["summary"]["liver"]["dice"] <= 1
    assert len(metrics["cases"]) == 2
    assert metrics["weights"] == "ema"
    columns = read_metrics(finished / "metrics.csv")
    assert columns["step"] == [1, 2, 3]
    assert [np.isfinite(v) for v in columns["validation"]] == [False, True, False]


def test_the_report_states_the_numbers_of_the_guarantee(finished):
    report = json.loads((finished / "privacy_report.json").read_text())
    assert report["unit"] == "patient"
    assert report["patients"] == 3
    assert report["sample_rate"] == pytest.approx(2 / 3)
    assert report["steps"] == report["planned_steps"] == 3
    expected = get_epsilon(
        noise_multiplier=report["noise_multiplier"],
        sample_rate=report["sample_rate"],
        steps=3,
        delta=1e-5,
    )
    assert report["epsilon"] == expected
    assert 7.8 < expected <= 8
    text = (finished / "privacy_report.md").read_text()
    for phrase in (
        "The unit is the patient",
        "3 training patients",
        "Not covered",
        "Opacus RDP",
        "Reconstruction risk",
        "worst-case attacker",
    ):
        assert phrase in text
    bound = rero_bound(
        noise_multiplier=report["noise_multiplier"], sample_rate=2 / 3, steps=3, kappa=1 / 3
    )
    assert bound in [row["value"] for row in report["risk"]["rows"]]


def test_the_resolved_configuration_reproduces_the_run(finished):
    config = SegmentationConfig.from_dict(load_yaml(finished / "config.yaml"))
    assert config.training.steps == 3
    assert config.data.phantom.patients == 6
    assert SegmentationTrainer.from_run(finished).config == config


def test_evaluation_can_be_repeated(finished, tmp_path):
    run = tmp_path / finished.name
    shutil.copytree(finished.parent, tmp_path, dirs_exist_ok=True)
    first = json.loads((run / "metrics.json").read_text())
    SegmentationTrainer.from_run(run).evaluate()
    assert json.loads((run / "metrics.json").read_text()) == first


def test_predictions_lie_on_the_grid_of_their_files(finished, tmp_path):
    phantom = next(finished.parent.glob("phantom-*"))
    source = tmp_path / "in"
    source.mkdir()
    original = phantom / "imagesTr" / "phantom_000.nii.gz"
    image = nib.load(original)
    turn = nib.orientations.ornt_transform(
        nib.io_orientation(image.affine), nib.orientations.axcodes2ornt(("L", "S", "P"))
    )
    nib.save(image.as_reoriented(turn), source / "turned.nii.gz")
    shutil.copy(original, source / "upright.nii.gz")
    (source / "._upright.nii.gz").write_bytes(b"leftover")
    trainer = SegmentationTrainer.from_run(finished)
    written = trainer.predict(source, tmp_path / "out")
    assert [path.name for path in written] == ["turned.nii.gz", "upright.nii.gz"]
    turned, upright = (nib.load(path) for path in written)
    for prediction, name in ((turned, "turned"), (upright, "upright")):
        scan = nib.load(source / f"{name}.nii.gz")
        assert prediction.shape == scan.shape
        np.testing.assert_allclose(prediction.affine, scan.affine, atol=1e-4)
    np.testing.assert_array_equal(
        np.asanyarray(upright.as_reoriented(turn).dataobj), np.asanyarray(turned.dataobj)
    )
    with pytest.raises(ValueError, match="OUT must be another folder"):
        trainer.predict(source, source)
    before = written[0].read_bytes()
    with pytest.raises(ValueError, match=r"OUT: .*turned.nii.gz exists already"):
        trainer.predict(source, tmp_path / "out")
    assert written[0].read_bytes() == before
    nib.save(nib.load(original), source / "upright.nii")
    with pytest.raises(ValueError, match=r"OUT: .*upright.nii.gz would be written twice"):
        trainer.predict(source, tmp_path / "empty")
    with pytest.raises(ValueError, match="does not exist"):
        trainer.predict(tmp_path / "nothing", tmp_path / "out")


def test_every_faulty_scan_is_listed_at_once(tiny, tmp_path, folder, rewrite):
    (folder / "imagesTr" / "phantom_003.nii.gz").write_bytes(b"damaged")
    rewrite(folder / "labelsTr" / "phantom_006.nii.gz", lambda array: array[1:])
    with pytest.raises(ValueError, match=r"(?s)2 scans are faulty.*phantom_003.*phantom_006"):
        SegmentationTrainer(tiny(root=folder), tmp_path / "run").fit()


def test_a_patient_with_three_scans_flipped_and_anisotropic_ones_and_leftovers_train(
    tiny, tmp_path, folder, manifest
):
    def three_scans_of_one_patient(values):
        for number, entry in enumerate(values["training"]):
            entry["patient_id"] = "many" if number < 3 else f"p{number}"

    manifest(folder, three_scans_of_one_patient)
    (folder / "imagesTr" / "._phantom_000.nii.gz").write_bytes(b"leftover")
    for kind in ("imagesTr", "labelsTr"):
        flipped = folder / kind / "phantom_001.nii.gz"
        image = nib.load(flipped)
        turn = nib.orientations.ornt_transform(
            nib.io_orientation(image.affine), nib.orientations.axcodes2ornt(("L", "S", "P"))
        )
        nib.save(image.as_reoriented(turn), flipped)
        anisotropic = folder / kind / "phantom_002.nii.gz"
        image = nib.load(anisotropic)
        thick = np.asanyarray(image.dataobj)[:, :, ::3]
        nib.save(nib.Nifti1Image(thick, image.affine @ np.diag([1, 1, 3, 1])), anisotropic)
    config = tiny({"training": {"steps": 2}}, root=folder)
    SegmentationTrainer(config, tmp_path / "run").fit()
    report = json.loads((tmp_path / "run" / "privacy_report.json").read_text())
    split = json.loads((tmp_path / "run" / "split.json").read_text())
    assert sum(map(len, split.values())) == 6
    assert report["patients"] == len(split["train"]) == 4


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda array: array[:, :, 1:], "a label map has the image's voxels"),
        (lambda array: np.where(array == 2, 7, array), r"label values \[7\] found"),
        (lambda array: np.stack([array, array], axis=-1), "a label map has the image's voxels"),
    ],
)
def test_faulty_labels_are_refused_before_the_first_step(
    tiny, tmp_path, folder, rewrite, damage, message
):
    rewrite(folder / "labelsTr" / "phantom_004.nii.gz", damage)
    with pytest.raises(ValueError, match=rf"phantom_004.*{message}"):
        SegmentationTrainer(tiny(root=folder), tmp_path / "run").fit()
    assert not (tmp_path / "run" / "checkpoints" / "steps.ledger").exists()


def test_a_run_without_steps_has_nothing_to_report(tiny, tmp_path):
    config = tiny({"network": {"norm": "BATCH"}})
    with pytest.raises(ValueError, match="BatchNorm"):
        SegmentationTrainer(config, tmp_path / "run").fit()
    with pytest.raises(ValueError, match="no step was taken yet"):
        SegmentationTrainer.from_run(tmp_path / "run").privacy_report()


@pytest.mark.filterwarnings("ignore:Nothing says")
def test_without_patient_ids_the_guarantee_is_not_said_to_be_per_patient(
    tiny, tmp_path, folder, manifest
):
    config = tiny(root=folder)
    assert SegmentationTrainer(config, tmp_path / "run").planned().unit == "patient"
    manifest(folder, lambda values: [entry.pop("patient_id") for entry in values["training"]])
    assert SegmentationTrainer(config, tmp_path / "run").planned().unit == "scan"


def test_fine_tuning_starts_from_a_checkpoint_and_trains_only_the_listed_layers(
    finished, tiny, tmp_path
):
    start = finished / "checkpoints" / "last.pt"
    network = {"num_res_units": 0, "bias": True}
    training = {"init_from": str(start), "train_layers": ["model.2.*"]}
    config = tiny({"network": network, "training": training})
    SegmentationTrainer(config, tmp_path / "run").fit()
    before = load_checkpoint(start)["model"]
    after = load_checkpoint(tmp_path / "run" / "checkpoints" / "last.pt")["model"]
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {name for name in before if name.startswith("model.2.")}
    text = (tmp_path / "run" / "privacy_report.md").read_text()
    assert "their budget adds to this one" in text
    for bad, message in (
        ({"train_layers": ["nothing.*"]}, "matches no parameter"),
        ({"init_from": str(tmp_path / "no.pt")}, "no such checkpoint"),
        ({"init_from": str(finished / "config.yaml")}, "not a readable checkpoint"),
    ):
        config = tiny({"network": network, "training": bad})
        with pytest.raises(ValueError, match=message):
            SegmentationTrainer(config, tmp_path / "other").fit()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"data": {"shape": None, "spacing": [9, 9, 9], "crop": [9, 8, 8]}}, "data.crop must be m"),
        ({"network": {"out_channels": 2}}, "network.out_channels must be 3"),
        ({"network": {"channels": [4]}}, "network: cannot build"),
        ({"network": {"norm": ["GROUP", {"num_groups": 4}]}}, "num_groups must divide the 3"),
        ({"network": {"norm": "BATCH"}}, "BatchNorm"),
        ({"loss": {"batch": True}}, "batch=True"),
        ({"training": {"optimizer": {"lr": -1.0}}}, "training.optimizer: .* is refused"),
        ({"training": {"device": "tpu"}}, "training.device must be"),
        ({"training": {"batch_size": 7}}, "training.batch_size must be at most the 6"),
    ],
)
def test_faulty_settings_end_before_the_first_step(tiny, tmp_path, change, message):
    with pytest.raises(ValueError, match=message):
        SegmentationTrainer(tiny(change), tmp_path / "run").fit()
    assert not (tmp_path / "run" / "metrics.json").exists()


def test_fixed_noise_repeats_a_run_and_the_report_withdraws_the_guarantee(tiny, tmp_path):
    config = tiny({"privacy": {"insecure_fixed_noise": 7}})
    for name in ("a", "b"):
        SegmentationTrainer(config, tmp_path / name).fit()
    torch.testing.assert_close(weights(tmp_path / "a"), weights(tmp_path / "b"), rtol=0, atol=1e-6)
    text = (tmp_path / "a" / "privacy_report.md").read_text()
    assert "no privacy guarantee" in text
    assert "INSECURE fixed seed 7" in text
    SegmentationTrainer(tiny(), tmp_path / "c").fit()
    assert not torch.allclose(weights(tmp_path / "a"), weights(tmp_path / "c"), atol=1e-3)


def test_two_modalities_and_empty_labels_train(folder, manifest, rewrite, tiny, tmp_path):
    manifest(folder, lambda values: values.update(modality={"0": "CT", "1": "CT"}))
    for path in (folder / "imagesTr").iterdir():
        rewrite(path, lambda array: np.stack([array, array // 2], axis=-1))
    for path in (folder / "labelsTr").iterdir():
        rewrite(path, np.zeros_like)
    crops = {"shape": None, "spacing": [17.0, 17.0, 17.0], "crop": [8, 8, 8]}
    SegmentationTrainer(tiny({"data": crops}, root=folder), tmp_path / "run").fit()
    assert len(json.loads((tmp_path / "run" / "data.json").read_text())["modalities"]) == 2
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert all(case["hd95"]["liver"] is None for case in metrics["cases"])


def test_other_modalities_need_zscore(folder, manifest, tiny, tmp_path):
    manifest(folder, lambda values: values.update(modality={"0": "MRI"}))
    with pytest.raises(ValueError, match="a Hounsfield window fits CT only"):
        SegmentationTrainer(tiny(root=folder), tmp_path / "run").fit()
    config = tiny({"data": {"intensity": "zscore"}}, root=folder)
    assert SegmentationTrainer(config, tmp_path / "run").fit().steps == 3


def test_bfloat16_and_deep_supervision_train(tiny, tmp_path):
    network = {
        "_target_": "monai.networks.nets.DynUNet",
        "spatial_dims": 3,
        "kernel_size": [3, 3, 3],
        "strides": [1, 2, 2],
        "upsample_kernel_size": [2, 2],
        "filters": [4, 4, 4],
        "deep_supervision": True,
        "deep_supr_num": 1,
    }
    config = tiny({"network": network, "training": {"precision": "bfloat16", "steps": 2}})
    assert yaml.safe_dump(config.to_dict())
    assert SegmentationTrainer(config, tmp_path / "run").fit().steps == 2
