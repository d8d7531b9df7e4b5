"""What ``dpkernels info`` prints: facts about this installation and this machine."""

from __future__ import annotations

import importlib.metadata
import platform
import shutil

from rich.console import Console
from rich.table import Table

import dpkernels

_PACKAGES = ("torch", "opacus", "numpy", "scipy", "triton", "monai")


def show() -> None:
    """Print versions, device, native extensions and the backend of every op."""
    console = Console(width=max(100, shutil.get_terminal_size().columns))
    _print_facts(console, "Versions", version_rows())
    try:
        import torch  # noqa: F401
    except ImportError as error:
        console.print(f"No device and no ops: {error}")
        return
    _print_facts(console, "Device", device_rows())
    _print_facts(console, "Native extensions", native_rows())
    table = Table("op", "CPU tensors", "CUDA tensors", "cannot run", title="Ops")
    notes: dict[str, int] = {}
    for name, on_cpu, on_cuda, reasons in op_rows():
        marks = [f"{b} ({notes.setdefault(why, len(notes) + 1)})" for b, why in reasons.items()]
        table.add_row(name, on_cpu, on_cuda, ", ".join(marks))
    console.print(table)
    for reason, number in notes.items():
        console.print(f"({number}) {reason}", highlight=False)


def version_rows() -> list[tuple[str, str]]:
    """Name and version of the package, of Python and of what it builds on."""
    rows = [("dpkernels", dpkernels.__version__), ("python", platform.python_version())]
    return rows + [(name, _version(name)) for name in _PACKAGES]


def device_rows() -> list[tuple[str, str]]:
    """The processor and, if there is one, the GPU."""
    import torch

    capability = torch.backends.cpu.get_cpu_capability()
    rows = [
        ("cpu", f"{platform.machine()}, {capability}, {torch.get_num_threads()} threads"),
        ("cuda", "no CUDA device is available to PyTorch"),
    ]
    if torch.cuda.is_available():
        rows[1] = ("cuda", f"{torch.cuda.get_device_name()}, CUDA {torch.version.cuda}")
    return rows


def native_rows() -> list[tuple[str, str]]:
    """The compiled extensions: what they were built for, or why there are none."""
    from dpkernels.ops import native

    cpu, cuda = native.load("cpu"), native.load("cuda")
    return [
        ("cpu", cpu if isinstance(cpu, str) else f"compiled, {cpu.instruction_set}"),
        ("cuda", cuda if isinstance(cuda, str) else f"compiled, {cuda.architectures}"),
    ]


def op_rows() -> list[tuple[str, str, str, dict[str, str]]]:
    """Per op: the backend on CPU and on CUDA tensors, and why the others cannot run."""
    import torch

    from dpkernels import ops
    from dpkernels.ops.registry import BACKENDS

    rows = []
    for name, op in sorted(ops.all_ops().items()):
        reasons = {backend: why for backend in BACKENDS if (why := op.why_not(backend))}
        on_cuda = op.preferred("cuda") if torch.cuda.is_available() else None
        rows.append((name, op.preferred("cpu") or "-", on_cuda or "-", reasons))
    return rows


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _print_facts(console: Console, title: str, rows: list[tuple[str, str]]) -> None:
    table = Table(title=title, show_header=False)
    for row in rows:
        table.add_row(*row)
    console.print(table)
