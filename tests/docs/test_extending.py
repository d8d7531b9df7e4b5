"""docs/extending.md does what it says: every page is carried out in a copy of the repository."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.docs.pages import (
    ROOT,
    Block,
    blocks_of,
    changed,
    copy_of_the_repository,
    do,
    files_to_touch,
    pages_of,
)

PAGES = pages_of((ROOT / "docs" / "extending.md").read_text())
MOST_FILES = {
    "A layer": 4,
    "A backend for an existing op": 2,
    "An accountant": 3,
    "A dataset layout": 3,
    "A task": 4,
}


def test_there_is_a_page_for_each_extension() -> None:
    assert list(PAGES) == list(MOST_FILES)


@pytest.mark.parametrize("title", PAGES)
def test_a_page_names_few_files_and_touches_no_other(title: str) -> None:
    named = files_to_touch(PAGES[title])
    ours = {
        block.path
        for block in blocks_of(PAGES[title])
        if block.path is not None and (ROOT / block.path.partition("/")[0]).exists()
    }
    assert 0 < len(named) <= MOST_FILES[title]
    assert ours <= set(named)


@pytest.mark.timeout(900)
@pytest.mark.parametrize("title", PAGES)
def test_a_page_works_as_written(title: str, tmp_path: Path) -> None:
    root = copy_of_the_repository(tmp_path / "repository")
    blocks = blocks_of(PAGES[title])
    assert any(block.path is None for block in blocks), "nothing shows that it works"
    for block in blocks:
        do(block, root)


def test_a_change_is_made_where_its_lines_stand() -> None:
    assert changed("a\nb\nc\n", " b\n+x\n-c\n") == "a\nb\nx\n"
    assert changed("a\n\nc\n", " a\n\n-c\n+d\n") == "a\n\nd\n"


@pytest.mark.parametrize("block", [" d\n+x\n", " a\n+x\n", "a\n"])
def test_a_change_whose_lines_do_not_stand_there_once_is_noticed(block: str) -> None:
    with pytest.raises(ValueError, match=r"stand [02] times|expected a line"):
        changed("a\nb\na\n", block)


@pytest.mark.parametrize(
    ("block", "error"),
    [
        (Block("sh", None, "false\ntrue\n"), "ended with 1"),
        (Block("python", None, "import no_such_module\n"), "ModuleNotFoundError"),
        (Block("text", None, "x\n"), "needs title="),
        (Block("python", "there.py", "x\n"), "there already"),
    ],
)
def test_a_block_that_does_not_work_is_noticed(block: Block, error: str, tmp_path: Path) -> None:
    (tmp_path / "there.py").write_text("")
    with pytest.raises((RuntimeError, ValueError), match=error):
        do(block, tmp_path)


@pytest.mark.parametrize("page", ["```python\nx\n", "  ```python\nx\n  ```\n", "```py x\n```\n"])
def test_a_block_that_cannot_be_read_is_noticed(page: str) -> None:
    with pytest.raises(ValueError, match="fence"):
        blocks_of(page)
