"""Streams, CUDA graphs and autocast around ``backward()``: what can be shown without a device.

Streams and events are recorded by fakes, and the CPU stands for a GPU where the engine asks for
the device's kind.
"""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import nn

from dpkernels.engine.capture.session import Session
from dpkernels.engine.capture.streams import Streams
from dpkernels.engine.release.pending import ParameterGradient
from tests.engine.support import made_private, squared_loss, step, values

GPU = torch.device("cuda", 0)
LOG: list[tuple[str, str, str]] = []


@dataclass(frozen=True)
class FakeEvent:
    name: str


@dataclass(frozen=True)
class FakeStream:
    """Writes down who waits for whom."""

    name: str

    def wait_stream(self, other: FakeStream) -> None:
        LOG.append((self.name, "waits for", other.name))

    def wait_event(self, event: FakeEvent) -> None:
        LOG.append((self.name, "waits for", event.name))

    def record_event(self) -> FakeEvent:
        LOG.append((self.name, "records", f"event of {self.name}"))
        return FakeEvent(f"event of {self.name}")


MAIN, SIDE, OTHER = FakeStream("main"), FakeStream("side"), FakeStream("other")


@pytest.fixture
def on(monkeypatch: pytest.MonkeyPatch):
    """Sets the current stream of every device."""
    LOG.clear()

    def set_current(stream: FakeStream) -> None:
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: stream)

    set_current(MAIN)
    return set_current


def test_the_end_waits_for_every_stream_and_they_for_the_end(on) -> None:
    tracked = Streams()
    for stream in (SIDE, MAIN, SIDE, OTHER):
        on(stream)
        tracked.note(GPU)
    on(MAIN)
    tracked.gather()
    assert LOG == [("main", "waits for", "side"), ("main", "waits for", "other")]
    LOG.clear()
    tracked.complete()
    assert LOG == [
        ("main", "records", "event of main"),
        ("side", "waits for", "event of main"),
        ("other", "waits for", "event of main"),
    ]


def test_a_step_on_another_stream_waits_for_the_gradients(on) -> None:
    tracked = Streams()
    tracked.note(GPU)
    tracked.gather()
    tracked.complete()
    LOG.clear()
    on(OTHER)
    tracked.wait()
    assert LOG == [("other", "waits for", "event of main")]


def test_sums_of_a_pass_before_are_waited_for(on) -> None:
    """Physical batches of one logical batch may end on different streams."""
    tracked = Streams()
    tracked.note(GPU)
    tracked.gather()
    tracked.complete()
    LOG.clear()
    on(OTHER)
    tracked.note(GPU)
    tracked.gather()
    assert LOG == [("other", "waits for", "event of main")]


def test_a_cpu_has_no_streams(on) -> None:
    tracked = Streams()
    tracked.note(torch.device("cpu"))
    tracked.gather()
    tracked.complete()
    tracked.wait()
    assert LOG == []


class OnCpu(Streams):
    """Takes the CPU for a device with streams."""

    def note(self, device: torch.device) -> None:
        super().note(torch.device("cuda", 0))


def form_contributions_on(
    stream: FakeStream,
    model: nn.Module,
    on: Callable[[FakeStream], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The private model's layers ran on `stream`, so their backward does."""
    sink = model.session.sink
    add = sink.add

    def on_stream(*args: object) -> None:
        on(stream)
        add(*args)
        on(MAIN)

    monkeypatch.setattr(sink, "add", on_stream)


def test_the_engine_gathers_before_it_reads_and_steps_after_it_wrote(
    on, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dpkernels.engine.release.optimizer.Streams", OnCpu)
    x = values(4, 6).float()
    _, model, optimizer, _ = made_private(nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 2)), x)
    clip = optimizer._clip

    def noted(gradients):
        LOG.append(("main", "clips", ""))
        return clip(gradients)

    monkeypatch.setattr(optimizer, "_clip", noted)
    optimizer.zero_grad()
    loss = squared_loss(model, (x,))
    form_contributions_on(SIDE, model, on, monkeypatch)
    LOG.clear()
    loss.backward()
    assert LOG == [
        ("main", "waits for", "side"),
        ("main", "clips", ""),
        ("main", "records", "event of main"),
        ("side", "waits for", "event of main"),
    ]
    for use in (optimizer.step, optimizer.zero_grad):
        LOG.clear()
        on(OTHER)
        use()
        assert ("other", "waits for", "event of main") in LOG


def test_a_backward_pass_that_failed_leaves_no_stream_behind(on, monkeypatch) -> None:
    monkeypatch.setattr("dpkernels.engine.release.optimizer.Streams", OnCpu)
    x = values(4, 6).float()
    _, model, optimizer, _ = made_private(nn.Linear(6, 2), x)
    with pytest.raises(ValueError, match="not finite"):
        squared_loss(model, (x * torch.inf,)).backward()
    assert ("main", "records", "event of main") in LOG, "what was read may be overwritten now"
    LOG.clear()
    optimizer.streams.complete()
    assert LOG == []


def test_noise_alone_is_waited_for_too(on, monkeypatch) -> None:
    """It may add to sums of another stream, and a step on a third one may follow."""
    monkeypatch.setattr("dpkernels.engine.release.optimizer.Streams", OnCpu)
    x = values(4, 6).float()
    _, model, optimizer, _ = made_private(nn.Linear(6, 2), x, 1.0, poisson_sampling=False)
    on(SIDE)
    squared_loss(model, (x,)).backward()
    LOG.clear()
    on(MAIN)
    optimizer.make_private_noise_only()
    assert LOG == [("main", "waits for", "event of side"), ("main", "records", "event of main")]
    LOG.clear()
    on(OTHER)
    optimizer.step()
    assert ("other", "waits for", "event of main") in LOG


@pytest.mark.parametrize("stream", [MAIN, SIDE])
def test_factors_outlive_their_sum_where_another_stream_made_them(
    on, monkeypatch: pytest.MonkeyPatch, stream: FakeStream
) -> None:
    """Memory is taken again on the stream it is of, whoever still reads it."""
    monkeypatch.setattr("dpkernels.engine.release.optimizer.Streams", OnCpu)
    let_go: list[int] = []
    monkeypatch.setattr(ParameterGradient, "let_go", lambda self: let_go.append(1))
    x = values(4, 6).float()
    _, model, _, _ = made_private(nn.Linear(6, 2, bias=False), x, memory_budget=0)
    loss = squared_loss(model, (x,))
    form_contributions_on(stream, model, on, monkeypatch)
    loss.backward()
    assert bool(let_go) == (stream == MAIN)


def test_a_private_optimizer_still_copies_and_pickles(on, monkeypatch) -> None:
    """Events belong to a process and a device: a copy starts without."""
    x = values(4, 6).float()
    _, model, optimizer, _ = made_private(nn.Linear(6, 2), x)
    step(model, optimizer, x)
    optimizer.streams.note(GPU)
    optimizer.streams.complete()
    optimizer._noise = None  # its key does not travel either
    for twin in (copy.copy(optimizer), pickle.loads(pickle.dumps(optimizer))):
        LOG.clear()
        twin.streams.wait()
        assert LOG == []


def test_autograd_reaches_the_leaf_behind_the_anchor() -> None:
    """Which is what makes it end the pass on the streams from which ``backward()`` was called."""
    x = values(4, 6).float()
    _, model, _, _ = made_private(nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 2)), x)
    reached: list[str] = []
    node = model.session.anchor.grad_fn
    assert node is not None
    leaf = node.next_functions[0][0]
    assert leaf is not None
    assert type(leaf).__name__ == "AccumulateGrad"
    loss = squared_loss(model, (x,))
    leaf.register_prehook(lambda gradients: reached.append("leaf"))
    loss.backward()
    assert reached == ["leaf"]


def test_the_anchor_follows_the_parameters(monkeypatch: pytest.MonkeyPatch) -> None:
    placed: list[torch.device] = []
    monkeypatch.setattr(Session, "place_anchor", lambda self, device: placed.append(device))

    class OnGpu(nn.Parameter):
        device, is_cuda = GPU, True

    session = Session(nn.Linear(2, 2))
    session.anchor = torch.zeros(())
    session.refresh()
    assert placed == [torch.device("cpu")]
    session.root.weight = OnGpu(session.root.weight.detach())
    session.refresh()
    assert placed[1:] == [GPU]


@pytest.fixture
def capturing(monkeypatch: pytest.MonkeyPatch):
    def start() -> None:
        monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)

    return start


@pytest.mark.parametrize("what", ["forward", "backward", "step", "noise only", "zero"])
def test_a_cuda_graph_of_a_private_step_is_refused(capturing, what: str) -> None:
    x = values(4, 6).float()
    _, model, optimizer, _ = made_private(nn.Linear(6, 2), x, noise=1.0)
    loss = squared_loss(model, (x,))
    if what == "step":
        loss.backward()
    calls = {
        "forward": lambda: model(x),
        "backward": loss.backward,
        "step": optimizer.step,
        "noise only": optimizer.make_private_noise_only,
        "zero": optimizer.zero_grad,
    }
    capturing()
    with pytest.raises(RuntimeError, match="a CUDA graph is being captured.*same noise"):
        calls[what]()


def test_an_ordinary_forward_may_be_captured(capturing) -> None:
    """Evaluation has no noise to repeat."""
    x = values(4, 6).float()
    _, model, _, _ = made_private(nn.Linear(6, 2), x)
    capturing()
    with torch.no_grad():
        model(x)
    assert model.eval()(x).shape == (4, 2)
