import json
import warnings

import pytest

from dpkernels.segmentation.layouts import read_scans
from dpkernels.segmentation.scans import scan_name


def drop_patient_ids(values):
    for entry in values["training"]:
        entry.pop("patient_id")


def test_scans_labels_and_patients_are_read(cohort):
    data = read_scans(cohort)
    assert data.labels == {0: "background", 1: "liver", 2: "cancer"}
    assert data.modalities == ("CT",)
    assert len(data.records) == len(data.patients) == 8
    assert data.notes == ()
    assert all(scan.image.is_file() and scan.label.is_file() for scan in data.records)


def test_scans_of_one_patient_are_one_group(folder, manifest):
    def three_scans_of_one(values):
        for entry in values["training"][:3]:
            entry["patient_id"] = "ann"

    manifest(folder, three_scans_of_one)
    patients = read_scans(folder).patients
    assert [scan.name for scan in patients["ann"]] == ["phantom_000", "phantom_001", "phantom_002"]
    assert len(patients) == 6


def test_csv_groups_scans_and_wins_over_dataset_json(cohort, tmp_path):
    table = tmp_path / "patients.csv"
    rows = [f"phantom_{i:03d}{'.nii.gz' if i % 2 else ''},patient{i // 2}" for i in range(8)]
    table.write_text("scan,patient_id\n" + "\n".join(rows) + "\n")
    assert list(read_scans(cohort, table).patients) == [f"patient{i}" for i in range(4)]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a,b\n1,2\n", "expected the columns scan,patient_id; found a,b"),
        ("scan,patient_id\nphantom_000,x\n", "no patient_id for phantom_001, .* and 2 more"),
        ("scan,patient_id\nfoo,x\n", "no patient_id for .*There is no such scan: foo"),
        ("scan,patient_id\nphantom_000,x\nphantom_000,y\n", "phantom_000 has two patients"),
        ("scan,patient_id\nphantom_000\n", "line 2 has no patient_id"),
        ("scan,patient_id\nphantom_000,  \n", "line 2 has no patient_id"),
    ],
)
def test_faulty_patient_tables_are_refused(cohort, tmp_path, text, message):
    table = tmp_path / "patients.csv"
    table.write_text(text)
    with pytest.raises(ValueError, match=message):
        read_scans(cohort, table)
    with pytest.raises(ValueError, match=r"other.csv: no such file.*scan,patient_id"):
        read_scans(cohort, tmp_path / "other.csv")


def test_what_spreadsheets_do_to_a_table_makes_no_new_patients(cohort, tmp_path):
    table = tmp_path / "patients.csv"
    rows = [f"phantom_{i:03d}{' ' * i},{' ' * (i % 3)}one{' ' * i}" for i in range(8)]
    table.write_text("scan,patient_id\n" + "\n".join(rows), encoding="utf-8-sig")
    assert list(read_scans(cohort, table).patients) == ["one"]
    table.write_bytes("scan,patient_id\nphantom_000,M\u00fcller\n".encode("latin-1"))
    with pytest.raises(ValueError, match=r"patients.csv: not a CSV in UTF-8"):
        read_scans(cohort, table)


def test_without_patient_ids_each_file_is_a_patient_and_a_warning_says_so(folder, manifest):
    manifest(folder, drop_patient_ids)
    with pytest.warns(UserWarning, match="holds per scan, not per patient"):
        data = read_scans(folder)
    assert len(data.patients) == 8
    assert data.unit == "scan"
    assert "per scan, not per patient" in data.notes[0]


def test_one_missing_patient_id_among_many_is_refused(folder, manifest):
    manifest(folder, lambda values: values["training"][5].pop("patient_id"))
    with pytest.raises(ValueError, match="no patient_id for phantom_005"):
        read_scans(folder)


@pytest.mark.parametrize("absent", [None, "", " "])
def test_absent_patient_ids_are_not_a_patient_of_their_own(folder, manifest, absent):
    def lose(values):
        for entry in values["training"][2:4]:
            entry["patient_id"] = absent

    manifest(folder, lose)
    with pytest.raises(ValueError, match="no patient_id for phantom_002, phantom_003"):
        read_scans(folder)


def test_names_of_channels_are_found_as_nnunet_writes_them(folder, manifest):
    manifest(folder, lambda v: v.update(channel_names={"0": v.pop("modality") and "MRI"}))
    assert read_scans(folder).modalities == ("MRI",)


def test_a_byte_order_mark_is_no_fault(folder):
    path = folder / "dataset.json"
    path.write_text(path.read_text(), encoding="utf-8-sig")
    assert len(read_scans(folder).records) == 8


def test_macos_leftovers_are_skipped(folder, manifest):
    leftover = {
        "image": "./imagesTr/._phantom_000.nii.gz",
        "label": "./labelsTr/._phantom_000.nii.gz",
    }
    manifest(folder, lambda values: values["training"].append(leftover))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        data = read_scans(folder)
    assert len(data.records) == 8
    assert "._phantom_000" in data.notes[0]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda v: v.pop("training"), "`training` must be a list"),
        (lambda v: v.update(training=[]), "lists no scan"),
        (lambda v: v["training"][2].pop("label"), "training entry 2 must have `image` and `label`"),
        (lambda v: v["training"][1].update(image=None), "training entry 1 .* the paths of two"),
        (lambda v: v.update(modality="CT"), "`modality` must map channels to names"),
        (lambda v: v.update(modality=["CT"]), "`modality` must map channels to names"),
        (lambda v: v.pop("labels"), "`labels` must map values to names"),
        (lambda v: v.update(labels={"0": "b", "2": "x"}), r"without gaps.* found \[0, 2\]"),
        (lambda v: v["training"].append(v["training"][0]), "phantom_000 is listed twice"),
    ],
)
def test_faulty_manifests_are_refused(folder, manifest, change, message):
    manifest(folder, change)
    with pytest.raises(ValueError, match=message) as refused:
        read_scans(folder)
    assert "dataset.json" in str(refused.value)


def test_a_missing_file_is_named(folder):
    (folder / "labelsTr" / "phantom_004.nii.gz").unlink()
    with pytest.raises(ValueError, match=r"labelsTr/phantom_004.nii.gz: no such file.*entry 4"):
        read_scans(folder)


def test_a_wrong_folder_is_named(cohort, tmp_path):
    with pytest.raises(ValueError, match="is not a folder"):
        read_scans(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"dataset.json: no such file.*did you mean .*phantom"):
        read_scans(cohort.parent)
    (tmp_path / "dataset.json").write_text("{")
    with pytest.raises(ValueError, match="not valid JSON"):
        read_scans(tmp_path)
    (tmp_path / "dataset.json").write_text(json.dumps([1]))
    with pytest.raises(ValueError, match="expected an object, found list"):
        read_scans(tmp_path)


def test_scan_names():
    assert scan_name("a/b/liver_1.nii.gz") == scan_name("liver_1.nii") == "liver_1"
    with pytest.raises(ValueError, match="expected a NIfTI file"):
        scan_name("liver.mha")
