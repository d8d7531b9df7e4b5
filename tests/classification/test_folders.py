import csv

import pytest

from dpkernels.classification.folders import read_images, single_pictures
from dpkernels.classification.synthetic import make_lesion, write_synthetic

KINDS = ("akiec", "bcc", "bkl", "mel", "nv")


def rewrite(path, change):
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    rows = change(rows) or rows
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


@pytest.fixture
def layouts(tmp_path):
    return {
        layout: write_synthetic(tmp_path / layout, lesions=20, size=16, layout=layout)
        for layout in ("ham10000", "folders", "table")
    }


def test_every_layout_is_recognised_and_holds_the_same_images(layouts):
    with pytest.warns(UserWarning, match="Nothing says which images show the same patient"):
        found = {layout: read_images(root) for layout, root in layouts.items()}
    classes = {layout: folder.classes for layout, folder in found.items()}
    assert len(set(classes.values())) == 1
    labels = {
        layout: sorted((p.path.stem, folder.classes[p.label]) for p in folder.records)
        for layout, folder in found.items()
    }
    assert labels["ham10000"] == labels["folders"] == labels["table"]
    assert {layout: folder.unit for layout, folder in found.items()} == {
        "ham10000": "lesion",
        "folders": "image",
        "table": "image",
    }


def test_photographs_of_one_lesion_are_one_unit(lesions):
    found = read_images(lesions)
    assert len(found.patients) == 40 < len(found.records)
    for lesion, pictures in found.patients.items():
        assert {f"LES_{p.name.split('_')[1]}" for p in pictures} == {lesion}
    assert "not patients" in found.notes[0]


def test_a_table_of_patients_makes_the_patient_the_unit(layouts, tmp_path):
    names = [p.name for p in read_images(layouts["ham10000"]).records]
    table = tmp_path / "patients.csv"
    lines = [f"{name},p{number // 3}" for number, name in enumerate(names)]
    table.write_text("\n".join(["image,patient_id", *lines]))
    found = read_images(layouts["ham10000"], patients_csv=str(table))
    assert (found.unit, found.notes) == ("patient", ())
    assert len(found.patients["p0"]) == 3
    table.write_text("\n".join(["image,patient_id", *lines[1:]]))
    with pytest.raises(ValueError, match=f"no patient_id for {names[0]}"):
        read_images(layouts["ham10000"], patients_csv=str(table))


def test_patient_ids_in_a_table_are_taken(layouts):
    path = layouts["table"] / "RadiologyAI_train.csv"
    rewrite(path, lambda rows: [{**row, "patient_id": f"p{i % 4}"} for i, row in enumerate(rows)])
    found = read_images(layouts["table"])
    assert found.unit == "patient"
    assert len(found.patients) == 4


def test_several_tables_are_one_data_set(layouts):
    whole = layouts["table"] / "RadiologyAI_train.csv"
    lines = whole.read_text().splitlines(keepends=True)
    whole.write_text("".join(lines[:6]))
    (layouts["table"] / "RadiologyAI_val.csv").write_text("".join([lines[0], *lines[6:]]))
    with pytest.warns(UserWarning, match="taken by itself"):
        found = read_images(layouts["table"])
    assert len(found.records) == len(lines) - 1
    assert "RadiologyAI_train.csv, RadiologyAI_val.csv" in found.notes[0]


def test_a_binary_task_tells_some_classes_from_the_others(lesions):
    found = read_images(lesions, positive=["mel", "bcc"])
    assert found.classes == ("other", "mel+bcc")
    every = {p.name: read_images(lesions).classes[p.label] for p in read_images(lesions).records}
    assert all(p.label == int(every[p.name] in ("mel", "bcc")) for p in found.records)


def test_leftovers_of_macos_are_passed_over(layouts):
    inner = next(p for p in layouts["folders"].iterdir() if p.is_dir())
    (inner / "._SYN_00000_0.png").write_bytes(b"leftover")
    part = layouts["ham10000"] / "HAM10000_images_part_1"
    (part / "._SYN_00000_0.jpg").write_bytes(b"leftover")
    with pytest.warns(UserWarning, match="taken by itself"):
        found = [read_images(layouts[layout]) for layout in ("folders", "ham10000")]
    assert not any(p.path.name.startswith("._") for f in found for p in f.records)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda root: (root / "HAM10000_images_part_1/SYN_00000_0.jpg").unlink(), "SYN_00000_0"),
        (
            lambda root: rewrite(
                root / "HAM10000_metadata.csv",
                lambda rows: [{k: v for k, v in r.items() if k != "lesion_id"} for r in rows],
            ),
            "expected the columns image_id,lesion_id,dx; found image_id,dx|found",
        ),
        (
            lambda root: rewrite(
                root / "HAM10000_metadata.csv", lambda rows: rows[0].update(dx="")
            ),
            "line 2 has no dx",
        ),
        (
            lambda root: rewrite(root / "HAM10000_metadata.csv", lambda rows: [*rows, rows[0]]),
            "SYN_00000_0 is listed twice",
        ),
        (
            lambda root: rewrite(
                root / "HAM10000_metadata.csv",
                lambda rows: [{**row, "dx": "nv"} for row in rows],
            ),
            "expected at least two classes, found nv",
        ),
    ],
)
def test_faults_are_named(folder, damage, message):
    damage(folder)
    with pytest.raises(ValueError, match=message):
        read_images(folder)


def test_what_is_no_data_set_is_refused(tmp_path, lesions):
    with pytest.raises(ValueError, match="is not a folder"):
        read_images(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="no image found"):
        read_images(tmp_path)
    with pytest.raises(ValueError, match=r"HAM10000_metadata.csv: no such file"):
        read_images(tmp_path, layout="ham10000")
    with pytest.raises(ValueError, match=r"data.positive: .* has no class melanoma"):
        read_images(lesions, positive=["melanoma"])
    with pytest.raises(ValueError, match="at least two classes"):
        read_images(lesions, positive=list(read_images(lesions).classes))
    with pytest.raises(ValueError, match="IN must hold images"):
        single_pictures(tmp_path)


def test_the_synthetic_data_set_is_fixed_by_its_seed(tmp_path):
    first, again = make_lesion(3, size=20), make_lesion(3, size=20)
    assert all((a.pixels == b.pixels).all() for a, b in zip(first, again, strict=True))
    assert (make_lesion(3, size=20, seed=1)[0].pixels != first[0].pixels).any()
    assert {make_lesion(i, size=16)[0].diagnosis for i in range(60)} == set(KINDS)
    folder = write_synthetic(tmp_path / "a", lesions=3, size=16)
    before = (folder / "HAM10000_metadata.csv").stat().st_mtime_ns
    write_synthetic(tmp_path / "a", lesions=3, size=16)
    assert (folder / "HAM10000_metadata.csv").stat().st_mtime_ns == before
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "mine.txt").write_text("keep")
    with pytest.raises(ValueError, match="not empty"):
        write_synthetic(tmp_path / "b", lesions=3)
    with pytest.raises(ValueError, match="layout must be one of"):
        write_synthetic(tmp_path / "c", lesions=3, layout="isic")
    with pytest.raises(ValueError, match="at least 16"):
        make_lesion(0, size=8)
