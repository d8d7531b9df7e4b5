"""A page of the documentation taken at its word: its code blocks, done in a copy of the repository.

* ```` ```python title="path" ````: a new file (yaml, csv and others likewise).
* ```` ```diff title="path" ````: a change. The block without its ``+`` lines stands exactly once in
  the file, and the block without its ``-`` lines takes its place.
* ```` ```sh ````: commands for bash in the root of the copy; they end with status 0.
* ```` ```python ````: a script, run in the root of the copy.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
COPIED = ("dpkernels", "tests", "docs", "examples", "pyproject.toml", "README.md", "CHANGELOG.md")
BLOCK = re.compile(
    r'^```(?P<kind>\w*)(?: title="(?P<path>[^"]+)")?\n(?P<text>.*?)^```$', re.S | re.M
)
FILE = re.compile(r"^(?:\d+\.|[-*]) `(?P<path>[\w./]+)`", re.M)


@dataclass(frozen=True)
class Block:
    """A fenced block: its language, the file that it names (or None), what stands in it."""

    kind: str
    path: str | None
    text: str


def pages_of(document: str) -> dict[str, str]:
    """The parts of a document under its headings of the second level, by heading."""
    parts = re.split(r"^## (.+)\n", document, flags=re.M)[1:]
    return dict(zip(parts[::2], parts[1::2]))


def blocks_of(page: str) -> list[Block]:
    """Every fenced block of a page, in order.

    Raises:
        ValueError: a fence that does not close, or that begins in another way.
    """
    found = [Block(m["kind"], m["path"], m["text"]) for m in BLOCK.finditer(page)]
    if 2 * len(found) != len(re.findall(r"^\s*```", page, flags=re.M)):
        raise ValueError("a fence is not closed, is indented, or does not begin as ```kind title")
    return found


def files_to_touch(page: str) -> list[str]:
    """The paths of the list that follows **Files to touch**."""
    listed = page.partition("**Files to touch**")[2].partition("\n\n")[2].split("\n\n")[0]
    return [match["path"] for match in FILE.finditer(listed)]


def copy_of_the_repository(root: Path) -> Path:
    """A copy that a page may change, `root`."""
    for name in COPIED:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, root / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, root / name)
    return root


def changed(text: str, block: str) -> str:
    """`text` with the change of a diff block.

    Raises:
        ValueError: a line of another kind, or lines that do not stand exactly once in `text`.
    """
    lines = [line or " " for line in block.splitlines()]
    if strange := [line for line in lines if line[0] not in " +-"]:
        raise ValueError(f"{strange[0]!r}: expected a line that begins with a space, + or -")
    before, after = (
        "".join(f"{line[1:]}\n" for line in lines if line[0] != other) for other in "+-"
    )
    count = f"\n{text}".count(f"\n{before}")
    if count != 1:
        raise ValueError(f"the lines before the change stand {count} times in the file:\n{before}")
    return f"\n{text}".replace(f"\n{before}", f"\n{after}")[1:]


def do(block: Block, root: Path) -> None:
    """Write the file, make the change, or run the commands of a block.

    Raises:
        ValueError: a block that is none of these, or a file that is there already.
        RuntimeError: commands or a script that failed, with all that they printed.
    """
    if block.path is None:
        run(block, root)
        return
    target = root / block.path
    if block.kind == "diff":
        target.write_text(changed(target.read_text(), block.text))
    elif target.exists():
        raise ValueError(f"{block.path} is there already; a diff block changes a file")
    else:
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(block.text)


def run(block: Block, root: Path) -> None:
    """Run a block without a path in `root`, with this Python as ``python``."""
    if block.kind == "sh":
        command = ["bash", "-euo", "pipefail", "-c", block.text]
    elif block.kind == "python":
        command = [sys.executable, "-c", block.text]
    else:
        raise ValueError(f"a block of kind {block.kind!r} needs title=, or is sh or python")
    path = os.pathsep.join((str(Path(sys.executable).parent), os.environ["PATH"]))
    settings = {**os.environ, "PATH": path, "PYTHONPATH": str(root), "PYTEST_ADDOPTS": ""}
    done = subprocess.run(command, cwd=root, env=settings, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(
            f"{block.text}\nended with {done.returncode}:\n{done.stdout}{done.stderr}"
        )
