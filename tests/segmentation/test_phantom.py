import json

import matplotlib.pyplot as plt
import nibabel as nib
import numpy as np
import pytest

from dpkernels.segmentation.config import DataConfig
from dpkernels.segmentation.evaluate import CaseResult
from dpkernels.segmentation.phantom import LIVER, TUMOUR, make_phantom, write_phantom
from dpkernels.segmentation.pictures import draw_overlay
from dpkernels.segmentation.volume import Volume
from dpkernels.study.pictures import section


def test_a_patient_is_fixed_by_seed_and_number():
    first, again = make_phantom(3, size=20, seed=1), make_phantom(3, size=20, seed=1)
    np.testing.assert_array_equal(first.image, again.image)
    np.testing.assert_array_equal(first.label, again.label)
    np.testing.assert_array_equal(first.affine, again.affine)
    for other in (make_phantom(4, size=20, seed=1), make_phantom(3, size=20, seed=2)):
        assert other.image.shape != first.image.shape or (other.image != first.image).any()


def test_every_patient_has_a_liver_in_hounsfield_units_and_a_tumour():
    for patient in range(6):
        scan = make_phantom(patient, size=32)
        liver = scan.image[scan.label == LIVER]
        assert 0.02 < (scan.label == LIVER).mean() < 0.2
        assert (scan.label == TUMOUR).any()
        assert 60 < liver.mean() < 140
        assert scan.image.min() < -900
        assert scan.image.max() > 200
        assert scan.image[scan.label == TUMOUR].mean() < liver.mean() - 20


def test_the_liver_lies_on_the_patients_right():
    """An axis code names the end that the axis runs to: in RAS, the right has the high indices."""
    scan = make_phantom(0, size=32)
    across = np.argwhere(scan.label == LIVER)[:, 0]
    assert across.mean() > scan.label.shape[0] / 2
    assert nib.aff2axcodes(scan.affine) == ("R", "A", "S")


def test_pictures_show_the_patients_right_on_the_left(tmp_path):
    """As radiologists look at them; the bright half is the patient's right, front and head."""
    image = np.full((1, 12, 12, 12), -150.0, np.float32)
    image[0, 6:, 6:, :] = 200.0
    label = np.ones((12, 12, 12), np.uint8)
    scan = Volume("x", image, label, (2.0, 2.0, 2.0), np.diag([2.0, 2.0, 2.0, 1.0]))
    result = CaseResult("x", "x", {"liver": 1.0}, {"liver": 0.0})
    config = DataConfig(shape=(12, 12, 12))
    path = tmp_path / "overlay.png"
    draw_overlay(scan, label, result, {0: "background", 1: "liver"}, config, path)
    drawn = plt.imread(path)[..., :3].mean(axis=-1)
    height, width = drawn.shape
    axial = drawn[int(0.07 * height) : int(0.35 * height), : width // 3]
    halves = axial.shape[0] // 2, axial.shape[1] // 2
    bright = axial[: halves[0], : halves[1]].mean()
    assert bright > 0.5
    assert axial[:, halves[1] :].mean() < 0.2 * bright
    shown = section(image)
    assert (shown[:6, :6] == 200).all()
    assert (shown[:, 6:] == -150).all()


def test_layout_is_that_of_the_decathlon(cohort):
    manifest = json.loads((cohort / "dataset.json").read_text())
    assert manifest["labels"] == {"0": "background", "1": "liver", "2": "cancer"}
    assert manifest["modality"] == {"0": "CT"}
    assert manifest["numTraining"] == len(manifest["training"]) == 8
    for entry in manifest["training"]:
        image, label = nib.load(cohort / entry["image"]), nib.load(cohort / entry["label"])
        assert image.shape == label.shape
        np.testing.assert_array_equal(image.affine, label.affine)
        assert image.get_data_dtype() == np.int16
        assert label.get_data_dtype() == np.uint8


def test_written_once_and_never_over_something_else(tmp_path):
    folder = write_phantom(tmp_path / "p", patients=2, size=16)
    written = (folder / "imagesTr" / "phantom_000.nii.gz").stat().st_mtime_ns
    write_phantom(folder, patients=2, size=16)
    assert (folder / "imagesTr" / "phantom_000.nii.gz").stat().st_mtime_ns == written
    with pytest.raises(ValueError, match=r"folder must be empty .* holds something else"):
        write_phantom(folder, patients=3, size=16)


def test_a_phantom_whose_writing_was_interrupted_is_written_anew(tmp_path):
    def interrupt():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_phantom(tmp_path / "p", patients=2, size=16, on_progress=interrupt)
    folder = write_phantom(tmp_path / "p", patients=2, size=16)
    assert len(list((folder / "imagesTr").iterdir())) == 2


@pytest.mark.parametrize(("patients", "size", "name"), [(0, 16, "patients"), (1, 8, "size")])
def test_impossible_requests_are_refused(tmp_path, patients, size, name):
    with pytest.raises(ValueError, match=f"{name} must be at least"):
        write_phantom(tmp_path / "p", patients=patients, size=size)
