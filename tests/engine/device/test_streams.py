"""Side streams and CUDA graphs: what is released does not depend on the stream, or is refused."""

from __future__ import annotations

import contextlib
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.engine.device.models import NETWORKS, network_of
from tests.engine.device.support import Private, private
from tests.engine.support import squared_loss

pytestmark = pytest.mark.gpu

ROOT = Path(__file__).resolve().parents[3]
#: clock cycles that a stream waits, about 50 ms: far longer than the kernels of a step take
CYCLES = 10**8


def gradients(
    made: Private,
    x: torch.Tensor,
    forward: torch.cuda.Stream | None,
    backward: torch.cuda.Stream | None,
    step: bool = False,
) -> list[torch.Tensor]:
    """Copies of ``p.grad``, or of the parameters after a step, as the stream of the loop sees them.

    The forward pass begins with a long wait on its stream, so that whoever does not wait for it
    reads memory that nobody has written yet.
    """
    made.optimizer.zero_grad(set_to_none=True)
    current = torch.cuda.current_stream()
    with torch.cuda.stream(forward) if forward else contextlib.nullcontext():
        torch.cuda.current_stream().wait_stream(current)
        torch.cuda._sleep(CYCLES)
        loss = squared_loss(made.wrapped, (x,))
    with torch.cuda.stream(backward) if backward else contextlib.nullcontext():
        loss.backward()
        if step:
            made.optimizer.step()
        copies = [p.detach().clone() if step else p.grad.clone() for p in made.model.parameters()]
    torch.cuda.synchronize()
    return copies


@pytest.mark.parametrize("where", ["outside", "inside", "backward only", "two streams"])
@pytest.mark.parametrize("name", NETWORKS)
def test_side_streams(name: str, where: str) -> None:
    """Bit for bit the gradients of the default stream, every time."""
    device = torch.device("cuda")
    model, x = network_of(name, 16, device)
    made = private(model, x, device, 1.0)
    gradients(made, x, None, None)
    expected = gradients(made, x, None, None)
    assert all(g.isfinite().all() for g in expected)
    side, other = torch.cuda.Stream(), torch.cuda.Stream()
    forward, backward = {
        "outside": (side, None),
        "inside": (side, side),
        "backward only": (None, side),
        "two streams": (side, other),
    }[where]
    for _ in range(3):
        found = gradients(made, x, forward, backward)
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("inside", [False, True])
def test_a_step_after_a_side_stream(inside: bool) -> None:
    """The optimizer steps with the gradients of this backward pass, not of memory's last use."""
    device = torch.device("cuda")
    model, x = network_of("rows", 16, device)
    after = []
    for stream in (None, torch.cuda.Stream()):
        made = private(model, x, device, 1.0)
        for _ in range(3):
            parameters = gradients(made, x, stream, stream if inside else None, step=True)
        after.append(parameters)
    assert all(torch.equal(a, b) for a, b in zip(*after, strict=True))


def capture(part: str) -> None:
    """Capture a step in a CUDA graph, which must be refused; run in a process of its own."""
    device = torch.device("cuda")
    model, x = network_of("rows", 16, device)
    made = private(model, x, device, 1.0, noise=1.0)

    def zero() -> None:
        made.optimizer.zero_grad(set_to_none=True)

    def rest() -> None:
        squared_loss(made.wrapped, (x,)).backward()
        made.optimizer.step()

    def step() -> None:
        zero()
        rest()

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    if part == "rest":
        zero()
    try:
        with torch.cuda.graph(torch.cuda.CUDAGraph()):
            {"step": step, "zero": zero, "rest": rest}[part]()
    except (RuntimeError, ValueError) as error:
        assert "CUDA graph" in str(error), error  # noqa: PT017 - the graph's own exit raises too
    else:
        raise AssertionError("a step was captured, and every replay would repeat its noise")
    step()
    torch.cuda.synchronize()
    print("refused by name")


@pytest.mark.parametrize("part", ["step", "zero", "rest"])
def test_a_captured_step_is_refused(part: str) -> None:
    """A replay would add the same noise again. A failed capture must not reach other tests."""
    script = f"from {__name__} import capture; capture({part!r})"
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "refused by name" in done.stdout
