"""Who is in a data set, and whose each record is."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest

from dpkernels.training.cohort import Cohort, assign_patients, read_table, shorten


@dataclass(frozen=True)
class Note:
    name: str
    patient_id: str


def assigned(*own, unit="patient", table="", **named):
    return assign_patients(own, unit, table, record="note", source="list.json", **named)


@pytest.fixture
def table(tmp_path):
    """`table(lines)`: a CSV of patients."""

    def write(*lines: str) -> Path:
        path = tmp_path / "patients.csv"
        path.write_text("\n".join(["note,patient_id", *lines]) + "\n")
        return path

    return write


def test_records_are_grouped_by_patient_in_their_order():
    notes = tuple(Note(str(n), patient) for n, patient in enumerate(("eve", "ann", "eve")))
    patients = Cohort(Path("data"), notes, "patient", ()).patients
    assert list(patients) == ["eve", "ann"]
    assert patients["eve"] == (notes[0], notes[2])


def test_what_the_data_set_says_counts_until_a_table_says_otherwise(table):
    own = (("a", "mole1"), ("b", "mole2"))
    assert assigned(*own, unit="lesion") == (["mole1", "mole2"], "lesion", ())
    rows = table(" a ,ann", "b,ann", "elsewhere,bob")
    assert assigned(*own, unit="lesion", table=rows) == (["ann", "ann"], "patient", ())
    shouted = table("A,ann", "B,bob")
    assert assigned(*own, table=shouted, name_of=str.lower)[0] == ["ann", "bob"]


@pytest.mark.parametrize(
    ("own", "unit"), [(("", ""), "patient"), (("a", "b"), "note"), (("a", "twins"), "note")]
)
def test_where_nobody_says_whose_the_records_are_the_report_says_so(own, unit):
    with pytest.warns(UserWarning, match="holds per note, not per patient"):
        patients, found, notes = assigned(("a", own[0]), ("b", own[1]), unit=unit)
    assert patients == [own[0] or "a", own[1] or "b"]
    assert found == "note"
    assert "columns note,patient_id" in notes[0]


def test_a_record_without_a_patient_among_others_with_one_is_refused(table):
    with pytest.raises(ValueError, match=r"list.json: no patient_id for b; give one to every n"):
        assigned(("a", "ann"), ("b", ""))
    message = r"patients.csv: no patient_id for b; .*There is no such note: B"
    with pytest.raises(ValueError, match=message):
        assigned(("a", ""), ("b", ""), table=table("a,ann", "B,bob"))


def test_twins_and_patients_at_odds_are_refused(table):
    with pytest.raises(ValueError, match=r"list.json: the note a is listed twice"):
        assigned(("a", "ann"), ("b", "bob"), ("a", "bob"))
    with pytest.raises(ValueError, match="the note a has two patients"):
        assigned(("a", ""), table=table("a,ann", "a,bob"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"", "expected the columns note,patient_id; found nothing"),
        (b"note,who\na,ann\n", "expected the columns note,patient_id; found note,who"),
        (b"note,patient_id\na,ann\nb\n", "line 3 has no patient_id"),
        (b"note,patient_id\na,ann\n ,bob\n", "line 3 has no note"),
        ("note,patient_id\nM\u00fcller,x\n".encode("latin-1"), "not a CSV in UTF-8"),
    ],
)
def test_faulty_tables_are_named(tmp_path, text, message):
    path = tmp_path / "table.csv"
    path.write_bytes(text)
    with pytest.raises(ValueError, match=f"table.csv: {message}"):
        read_table(path, ("note", "patient_id"))
    with pytest.raises(ValueError, match=r"other.csv: no such file; expected a CSV with note"):
        read_table(tmp_path / "other.csv", ("note",))


def test_long_lists_are_cut():
    assert shorten(["a", "b"]) == "a, b"
    assert shorten(list("abcdefg")) == "a, b, c, d, e and 2 more"
