"""Models that torch.compile compiles: captured layers run outside the graphs."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from tests.engine.support import made_private, squared_loss, values
from tests.engine.truth import microbatching, relative_error

ROOT = Path(__file__).resolve().parents[2]


class Scaled(nn.Module):
    """A parameter beside a layer: captured as a bare parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.linspace(0.5, 1.5, 6))
        self.layer = nn.Linear(6, 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.tanh(self.layer(x) * self.scale)


class Quadratic(nn.Module):
    """A layer without a rule: captured sample by sample."""

    def __init__(self) -> None:
        super().__init__()
        self.form = nn.Parameter(torch.eye(6) + 0.1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.sin((x @ self.form) * x)


class Attended(nn.Module):
    """A layer that runs in parts."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(6, 2, batch_first=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cos(x + self.attention(x, x, x)[0])


def every_kind() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv1d(3, 4, 1), nn.Tanh(), nn.GroupNorm(2, 4), Attended(), Scaled(), Quadratic(),
        nn.Flatten(), nn.Linear(24, 3),
    )  # fmt: skip


class Graphs:
    """A backend that keeps the graphs it is given and runs them as they are, or compiled."""

    def __init__(self, compiler: str = "aot_eager") -> None:
        self.compiler = compiler
        self.found: list[torch.fx.GraphModule] = []

    def __call__(self, graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> object:
        self.found.append(graph)
        return torch._dynamo.lookup_backend(self.compiler)(graph, inputs)


@pytest.mark.parametrize("when", ["before", "after", "in place"])
def test_a_compiled_model_trains_with_the_same_gradients(when: str) -> None:
    """Graphs hold what lies between the captured layers; the trial makes none."""
    torch._dynamo.reset()
    model, graphs = every_kind(), Graphs()
    x = values(4, 3, 6).float()
    expected = microbatching(model, squared_loss, (x,), 1.0)
    if when == "in place":
        model.compile(backend=graphs)
    given = torch.compile(model, backend=graphs) if when == "before" else model
    _, wrapped, optimizer, _ = made_private(given, x)
    if when == "after":
        wrapped = torch.compile(wrapped, backend=graphs)
    for _ in range(2):
        optimizer.zero_grad()
        squared_loss(wrapped, (x,)).backward()
        for name, parameter in model.named_parameters():
            assert relative_error(parameter.grad, expected.gradients[name]) < 1e-4
    optimizer.step()
    assert 1 <= len(graphs.found) <= 3


def test_a_private_model_restored_in_a_new_process_is_captured_before_it_is_compiled(
    tmp_path: Path,
) -> None:
    """Nothing was installed in that process: the restored model brings its captured layers."""
    _, wrapped, _, _ = made_private(every_kind(), values(4, 3, 6).float())
    torch.save(wrapped, tmp_path / "private.pt")
    script = f"from {__name__} import train_restored; train_restored({str(tmp_path)!r})"
    subprocess.run([sys.executable, "-c", script], check=True, cwd=ROOT)


def train_restored(folder: str) -> None:
    """One compiled step of a private model from a file, in a process that made none private."""
    restored = torch.load(Path(folder) / "private.pt", weights_only=False)
    x = values(4, 3, 6).float()
    expected = microbatching(every_kind(), squared_loss, (x,), 1.0)
    _, wrapped, _, _ = made_private(restored, x)
    squared_loss(torch.compile(wrapped, backend="aot_eager"), (x,)).backward()
    trained = dict(wrapped.to_standard_module().named_parameters())
    for name, gradient in expected.gradients.items():
        assert relative_error(trained[name].grad, gradient) < 1e-4
