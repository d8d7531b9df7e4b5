"""The rules of the house, read off syntax trees: who imports whom, and what csrc may contain."""

from __future__ import annotations

import ast
import graphlib
import json
import math
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "dpkernels"

MAY_IMPORT = {
    "ops": set(),
    "accounting": set(),
    "layers": {"ops"},
    "reconstruction": {"accounting"},
    "engine.capture": {"ops", "layers"},
    "engine.plan": {"ops", "layers"},
    "engine.trial": {"ops", "layers", "engine.capture"},
    "engine.processes": {"layers", "engine.capture", "engine.trial"},
    "engine.release": {"ops", "layers", "engine.capture", "engine.plan", "engine.processes"},
    "engine": {
        "ops", "layers", "accounting", "reconstruction", "engine.capture", "engine.plan",
        "engine.trial", "engine.processes", "engine.release",
    },
    "attacks": {"engine", "accounting", "reconstruction"},
    "reconstruction.attacks": {"attacks"},
    "testing": {"engine", "layers", "ops"},
    "training": {"engine", "accounting", "reconstruction"},
    "study": {"training", "accounting", "reconstruction", "attacks"},
    "segmentation": {"study", "training", "engine", "accounting", "reconstruction"},
    "classification": {"study", "training", "engine", "accounting", "reconstruction"},
}  # fmt: skip
ONLY_IN = {
    "monai": {"training", "segmentation"},
    "nibabel": {"segmentation"},
    "triton": {"ops"},
}
#: rooms of which each module has a test module of its own, in the folder of the same name
MIRRORED = ("layers", "training", "attacks")
ROOM_OF_NAME = {"PrivacyEngine": "engine"}
FRONT, ENGINE = "dpkernels.PrivacyEngine", "dpkernels.engine.privacy_engine"
LONG_FILE = 400


def imports_of(tree: ast.AST, top_level_only: bool = False) -> Iterator[tuple[int, str]]:
    """Line and absolute dotted name of everything that a module imports."""
    nodes = ast.iter_child_nodes(tree) if top_level_only else ast.walk(tree)
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            if node.level:
                yield node.lineno, "." * node.level + (node.module or "")
            else:
                yield from ((node.lineno, f"{node.module}.{alias.name}") for alias in node.names)


def room_of(name: str) -> str:
    """The room of a module, by its dotted name below the package; "" where there is none."""
    return next((prefix for prefix in prefixes_of(name) if prefix in MAY_IMPORT), "")


def prefixes_of(name: str) -> list[str]:
    """A dotted name and what it stands in, the longest first."""
    parts = name.split(".")
    return [".".join(parts[:n]) for n in range(len(parts), 0, -1)]


def room_violations(room: str, source: str) -> list[str]:
    """What is wrong with the imports of a module of `room`."""
    found = []
    for line, name in imports_of(ast.parse(source)):
        if name.startswith("."):
            found.append(f"line {line}: relative import {name}")
            continue
        parts = name.split(".")
        if parts[0] == "dpkernels":
            below = ".".join(parts[1:])
            target = ROOM_OF_NAME.get(below) or room_of(below) or below or "the whole package"
            if target not in {room, "__version__"} | MAY_IMPORT[room]:
                found.append(f"line {line}: {room} may not import {target}")
        elif parts[0] in ("tests", "bench"):
            found.append(f"line {line}: nothing imports {parts[0]}")
        elif room not in ONLY_IN.get(parts[0], {room}):
            found.append(f"line {line}: {parts[0]} belongs to {', '.join(ONLY_IN[parts[0]])}")
    return found


@pytest.mark.parametrize("room", MAY_IMPORT)
def test_import_rule(room: str) -> None:
    found = {
        str(path.relative_to(ROOT)): violations
        for path in modules_of(room)
        if (violations := room_violations(room, path.read_text()))
    }
    assert not found


def modules_of(room: str) -> list[Path]:
    """The files of a room, without those of a room inside it."""
    files = {path: path.relative_to(PACKAGE).with_suffix("") for path in PACKAGE.rglob("*.py")}
    return sorted(path for path, name in files.items() if room_of(".".join(name.parts)) == room)


def test_every_package_is_a_known_room() -> None:
    """Packages inside a room belong to it, except in the engine, whose rooms are all listed."""
    packages = {path.parent.relative_to(PACKAGE) for path in PACKAGE.rglob("*.py")} - {Path()}
    rooms = {".".join(p.parts) for p in packages if len(p.parts) == 1 or p.parts[0] == "engine"}
    assert rooms <= set(MAY_IMPORT)
    assert all(modules_of(room) for room in MAY_IMPORT)


def circle_in(sources: dict[str, str]) -> list[str]:
    """Modules that import each other in a circle, if any: wherever in a file the import stands.

    Args:
        sources: by dotted name; a package by its own.
    """
    imports: dict[str, set[str]] = {}
    for module, source in sources.items():
        names = [name for _, name in imports_of(ast.parse(source))]
        parts = [ENGINE if name == FRONT else name for name in names]
        found = (next((p for p in prefixes_of(name) if p in sources), None) for name in parts)
        imports[module] = {target for target in found if target} - {module, "dpkernels"}
    try:
        graphlib.TopologicalSorter(imports).prepare()
    except graphlib.CycleError as error:
        return error.args[1]
    return []


def test_no_modules_import_each_other_in_a_circle() -> None:
    sources = {
        ".".join(("dpkernels", *path.relative_to(PACKAGE).with_suffix("").parts)).removesuffix(
            ".__init__"
        ): path.read_text()
        for path in PACKAGE.rglob("*.py")
    }
    assert len(sources) > 150
    assert not circle_in(sources)


@pytest.mark.parametrize(
    "sources",
    [
        {"dpkernels.a": "import dpkernels.b", "dpkernels.b": "from dpkernels import a"},
        {
            "dpkernels.a": "def f():\n    from dpkernels.b import x",
            "dpkernels.b": "if TYPE_CHECKING:\n    from dpkernels.c import y",
            "dpkernels.c": "from dpkernels.a.z import w",
        },
        {ENGINE: "import dpkernels.a", "dpkernels.a": "from dpkernels import PrivacyEngine"},
    ],
)
def test_the_circle_rule_notices(sources: dict[str, str]) -> None:
    assert circle_in(sources)
    assert not circle_in(
        {**sources, "dpkernels.a": "from dpkernels.b.d import v"} | {"dpkernels.b": ""}
    )


@pytest.mark.parametrize(
    ("room", "source"),
    [
        ("ops", "from dpkernels.engine import module"),
        ("ops", "from dpkernels import PrivacyEngine"),
        ("ops", "import dpkernels"),
        ("layers", "def f():\n    import dpkernels.segmentation.loss"),
        ("engine", "from dpkernels import segmentation"),
        ("engine", "from . import module"),
        ("engine", "import monai.losses"),
        ("accounting", "from dpkernels.reconstruction.bounds import rero_bound"),
        ("segmentation", "from tests.engine import truth"),
        ("reconstruction", "from dpkernels import PrivacyEngine"),
        ("reconstruction", "from dpkernels.reconstruction import attacks"),
        ("reconstruction", "from dpkernels.attacks import imprint"),
        ("engine", "def f():\n    from dpkernels.reconstruction import attacks"),
        ("testing", "from dpkernels.training import trainer"),
        ("engine", "from dpkernels.testing import assert_per_sample"),
        ("study", "from dpkernels.segmentation.trainer import SegmentationTrainer"),
    ],
)
def test_the_rule_notices(room: str, source: str) -> None:
    assert room_violations(room, source)


def untested(room: str, tests: Path) -> list[str]:
    """Modules of a room that no ``test_<module>.py`` in a folder of tests imports."""
    found = []
    for module in modules_of(room):
        path = tests / f"test_{module.stem}.py"
        names = imports_of(ast.parse(path.read_text())) if path.is_file() else ()
        wanted = f"dpkernels.{room}.{module.stem}"
        if not any(wanted in prefixes_of(name) for _, name in names):
            found.append(module.stem)
    return [stem for stem in found if stem != "__init__"]


@pytest.mark.parametrize("room", MIRRORED)
def test_every_module_has_a_test_module_that_imports_it(room: str) -> None:
    assert not untested(room, ROOT / "tests" / room)


def test_the_mirror_notices(tmp_path: Path) -> None:
    modules = {path.stem for path in modules_of("attacks")} - {"__init__"}
    assert set(untested("attacks", tmp_path)) == modules
    (tmp_path / "test_optimal.py").write_text(
        "from dpkernels.attacks.optimal import linear_optimal"
    )
    (tmp_path / "test_gradient.py").write_text("from dpkernels.attacks import gradient")
    (tmp_path / "test_inversion.py").write_text("from dpkernels.attacks import optimal")
    assert set(untested("attacks", tmp_path)) == modules - {"optimal", "gradient"}


def printed(script: str) -> str:
    """What a script prints in a process of its own."""
    output = subprocess.run(
        [sys.executable, "-c", script], check=True, capture_output=True, text=True, cwd=ROOT
    )
    return output.stdout.strip()


def test_importing_the_package_loads_no_torch_and_no_native_code() -> None:
    script = (
        "import sys, dpkernels; dpkernels.__version__; "
        "print([m for m in ('torch', 'triton', 'opacus', 'dpkernels.ops') if m in sys.modules])"
    )
    assert printed(script) == "[]"


WITHOUT = """
import sys

class Absent:
    def find_spec(name, path=None, target=None):
        if name.partition(".")[0] in {absent}:
            raise ModuleNotFoundError(name)

sys.meta_path.insert(0, Absent)
{statement}
"""


COMMAND = "from dpkernels.cli import app; app({!r}.split(), standalone_mode=False)"
RUN = "--sample-rate 0.01 --steps 500 --delta 1e-5"
ACCOUNTS = ("--epsilon 8", "--epsilon 8 --accountant prv", "--noise-multiplier 1 --accountant gdp")


@pytest.mark.parametrize(
    ("absent", "statement"),
    [
        ({"torch", "opacus", "triton", "monai"}, "import dpkernels.accounting"),
        ({"torch", "opacus", "triton", "monai"}, "import dpkernels.reconstruction.metrics"),
        ({"torch", "opacus", "triton", "monai"}, "from dpkernels.info import show; show()"),
        ({"triton", "monai"}, "import dpkernels.ops"),
        *(({"torch"}, COMMAND.format(f"account {RUN} {asked}")) for asked in ACCOUNTS),
    ],
)
def test_what_must_not_be_needed(absent: set[str], statement: str) -> None:
    """Accounting (Opacus' own too), bounds and `info` work without torch; ops without triton."""
    script = WITHOUT.format(absent=absent, statement=statement)
    subprocess.run([sys.executable, "-c", script], check=True, cwd=ROOT)


def test_the_risk_report_states_opacus_epsilon_without_torch() -> None:
    """It would say why there is none, and end well all the same, if that needed torch."""
    command = COMMAND.format(f"risk {RUN} --noise-multiplier 1 --dataset-size 1000 --json")
    rows = json.loads(printed(WITHOUT.format(absent={"torch"}, statement=command)))["rows"]
    (rdp,) = [row for row in rows if "RDP" in row["quantity"]]
    assert 0.0 < rdp["value"] < math.inf, rdp["reading"]


def test_the_engine_imports_little_beside_opacus() -> None:
    """Half a second of imports, such as torch's compiler, would be felt at every start."""
    script = (
        "import sys, opacus; before = set(sys.modules); from dpkernels import PrivacyEngine; "
        "print(*sorted(set(sys.modules) - before))"
    )
    added = printed(script).split()
    assert "dpkernels.engine.privacy_engine" in added
    heavy = ("torch._dynamo", "torch._inductor", "triton", "matplotlib", "monai", "typer", "rich")
    assert not [name for name in added if name in heavy]


# csrc

SOURCES = sorted(path for path in (ROOT / "csrc").rglob("*.*") if path.suffix != ".md")
HEADERS = sorted((ROOT / "csrc" / "include").rglob("*.h"))
FORBIDDEN = re.compile(r'#include\s*[<"](torch|ATen|c10)/')
PYBIND = re.compile(r"pybind11|Python\.h")


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_torch_in_csrc_and_pybind_only_in_bindings(path: Path) -> None:
    text = path.read_text()
    assert not FORBIDDEN.search(text)
    if path.parent.name != "bindings":
        assert not PYBIND.search(text)


def pointers_without_shape(header: str) -> list[str]:
    """Pointer parameters on whose line no comment gives a shape in brackets."""
    code = [line for line in header.splitlines() if not line.strip().startswith("//")]
    pointer = re.compile(r"\b(?:void|float|double|std::\w+|int|\w+_t)\s*\*\s*\w+\s*[,)]")
    return [line for line in code if pointer.search(line) and not re.search(r"//.*\[", line)]


@pytest.mark.parametrize("path", HEADERS, ids=lambda path: path.name)
def test_every_pointer_states_its_shape(path: Path) -> None:
    assert not pointers_without_shape(path.read_text())


def test_the_shape_rule_notices() -> None:
    assert pointers_without_shape("void f(const float* x,\n       int n);")
    assert not pointers_without_shape("void f(const float* x,  // [n]\n       int n);")


def test_bindings_know_every_family() -> None:
    """Each header has kernels on a device, and that device's module defines each of them."""
    for header in HEADERS:
        devices = [
            device
            for device, suffix in (("cpu", "cpp"), ("cuda", "cu"))
            if (ROOT / "csrc" / device / f"{header.stem}.{suffix}").is_file()
        ]
        assert devices or header.stem == "types", header.name
        for device in devices:
            module = (ROOT / "csrc" / "bindings" / f"{device}_module.cpp").read_text()
            for kernel in re.findall(r"^void (\w+)\(", header.read_text(), re.MULTILINE):
                definition = f'define(m, "{kernel}", {device}::{kernel});'
                assert definition in module, (device, header.name)


def too_long(text: str) -> bool:
    return len(text.splitlines()) > LONG_FILE


def test_no_file_is_long() -> None:
    files = [path for room in ("dpkernels", "csrc") for path in (ROOT / room).rglob("*.*")]
    text = [path for path in files if path.suffix in {".py", ".h", ".cpp", ".cu", ".cuh"}]
    assert len(text) > 200
    assert not [str(path.relative_to(ROOT)) for path in text if too_long(path.read_text())]


def test_the_length_rule_notices() -> None:
    assert too_long("x\n" * 401)
    assert not too_long("x\n" * 400)
