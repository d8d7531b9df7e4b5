"""The committed example report: its parts agree, and it shows what the study is there to show."""

from __future__ import annotations

import csv
import importlib.util
import json
import math
from pathlib import Path
from types import ModuleType

import pytest

DOCS = Path(__file__).resolve().parents[2] / "docs"
MOST_BYTES = 2_000_000


@pytest.fixture(scope="module")
def publisher() -> ModuleType:
    spec = importlib.util.spec_from_file_location("publish_study", DOCS / "publish_study.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def study() -> dict:
    return json.loads((DOCS / "study" / "study.json").read_text())


def test_table_page_and_tutorial_say_the_same(publisher: ModuleType, study: dict) -> None:
    with (DOCS / "study" / "table.csv").open() as file:
        head, *body = csv.reader(file)
    page = (DOCS / "study" / "report.html").read_text()
    markdown = (DOCS / "study" / "table.md").read_text()
    assert len(body) == len(study["rows"])
    for line, row in zip(body, study["rows"], strict=True):
        assert "".join(f"<td>{value}</td>" for value in line) in page
        assert f"| {' | '.join(line)} |" in markdown
        assert float(line[head.index("Dice")]) == pytest.approx(row["utility"], abs=5e-4)
        imprint = float(line[head.index("NCC imprint")])
        assert imprint == pytest.approx(row["attacks"]["imprint"]["ncc"], abs=5e-4)
    tutorial = (DOCS / "tutorials" / "segmentation.md").read_text()
    assert publisher.short_table(study) in tutorial
    assert publisher.between_marks(tutorial, publisher.short_table(study)) == tutorial


def test_it_is_small_and_whole(publisher: ModuleType) -> None:
    files = [DOCS / "study" / name for name in publisher.FILES]
    assert sum(file.stat().st_size for file in files) < MOST_BYTES


def test_it_has_the_published_shape(study: dict) -> None:
    """Utility is lost at 1 and kept from 1e6, where imprint is at chance; by 1e15 it copies."""
    rows = {row["epsilon"] or math.inf: row for row in study["rows"]}
    whole = rows[math.inf]["utility"]
    assert study["settings"]["accountant"] == "rdp"
    assert rows[1.0]["utility"] < 0.3 * whole
    assert all(row["utility"] >= 0.95 * whole for e, row in rows.items() if e >= 1e6)
    attack = {e: row["attacks"]["imprint"] for e, row in rows.items()}
    assert attack[1e6]["ncc"] - attack[1e6]["chance_ncc"] < 0.05
    assert all(reached["ncc"] > 0.9 for e, reached in attack.items() if e >= 1e15)
