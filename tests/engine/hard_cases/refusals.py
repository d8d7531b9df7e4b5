"""What a model is refused for that mixes samples."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader

from dpkernels import PrivacyEngine
from dpkernels.engine.capture.refusals import NotPerSample
from dpkernels.engine.trial.findings import Kind

#: of a model and its arguments: a scalar
Step = Callable[[nn.Module, tuple[Any, ...]], torch.Tensor]


class Around(nn.Module):
    """Two linear layers, and a program between them: ``second(program(first(x)))``.

    Args:
        program: of tensors [B, width]; more arguments of the model are passed on.
    """

    def __init__(self, program: Callable[..., torch.Tensor], width: int = 5) -> None:
        super().__init__()
        self.first, self.program, self.second = nn.Linear(5, width), program, nn.Linear(width, 3)

    def forward(self, x: torch.Tensor, *more: Any) -> torch.Tensor:
        return self.second(self.program(self.first(x), *more))


def squares(model: nn.Module, batch: tuple[Any, ...]) -> torch.Tensor:
    """A mean over samples of the outputs' squares."""
    output = model(*batch)
    return (output - 0.3).square().flatten(1).sum(1).mean()


def own_loss(model: nn.Module, batch: tuple[Any, ...]) -> torch.Tensor:
    """The loss that a model returns, alone or before other outputs."""
    output = model(*batch)
    return output[0] if isinstance(output, tuple) else output


def refusal(
    model: nn.Module,
    batches: Sequence[tuple[Any, ...]],
    loss: Step = squares,
    trial: str = "doubling",
    **geometry: Any,
) -> str | None:
    """Train a step for each batch; the refusal's message, None where all pass."""
    rows = len(batches[0][0]) if isinstance(batches[0][0], torch.Tensor) else 4
    _, private, optimizer, _ = _private(model, rows, trial, **geometry)
    for batch in batches:
        optimizer.zero_grad()
        try:
            loss(private, batch).backward()
        except NotPerSample as error:
            return str(error)
        optimizer.step()
    return None


def _private(model: nn.Module, rows: int, trial: str, **geometry: Any) -> tuple[Any, ...]:
    engine = PrivacyEngine()
    loader = DataLoader(range(rows), batch_size=rows)  # type: ignore[arg-type]
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    made = engine.make_private(
        module=model, optimizer=optimizer, data_loader=loader, noise_multiplier=0.0,
        max_grad_norm=1.0, poisson_sampling=False, trial=trial, **geometry,
    )  # fmt: skip
    return (engine, *made)


def assert_refused(message: str | None, where: str, kind: Kind) -> None:
    """The message names the place, says what moves, and has the kind's remedy."""
    assert message is not None, "nothing was found"
    assert message.startswith(where), message
    assert kind.value in message, message


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    """Standard normal numbers, float32, the same at every call."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
