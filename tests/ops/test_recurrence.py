"""An LSTM over time and back: every backend against the equations and ``nn.LSTM`` in float64."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import nn

from dpkernels import ops
from dpkernels.ops import native
from tests.ops import shapes
from tests.ops.compare import assert_as_exact_as_torch, skip_unless_runs

BACKENDS = ("reference", "library", "cpu")
#: the compiled steps take float32 alone
RUNS = [
    (b, d)
    for b in BACKENDS
    for d in (torch.float64, torch.float32)
    if (b, d) != ("cpu", torch.float64)
]
WIDE = torch.float64
built = pytest.mark.skipif(native.why_not_cpu() is not None, reason="not built")
Tensors = list[torch.Tensor]


def operands(
    name: str, projected: bool, dtype: torch.dtype = torch.float32, bias: bool = True
) -> tuple[Any, ...]:
    """Arguments of ``lstm`` but for the direction of time."""
    sizes, inputs, width = shapes.RECURRENCE[name]
    state = (width + 1) // 2 if projected else width
    generator = torch.Generator().manual_seed(29)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, dtype=WIDE).to(dtype)

    weights = draw(4 * width, inputs), draw(4 * width, state) / width**0.5
    projection = draw(state, width) / width**0.5 if projected else None
    vector = draw(4 * width) if bias else None
    first = draw(sizes[0], state), draw(sizes[0], width)
    return draw(sum(sizes), inputs), *weights, projection, vector, *first, list(sizes)


def incoming(arguments: tuple[Any, ...]) -> Tensors:
    """Gradients at the outputs, the last h and the last c."""
    data, _, _, _, _, h, c, _ = arguments
    generator = torch.Generator().manual_seed(31)
    likes = (data.new_empty(len(data), h.shape[1]), h, c)
    return [torch.randn(t.shape, generator=generator, dtype=WIDE).to(t.dtype) for t in likes]


def there_and_back(arguments: tuple[Any, ...], reverse: bool, grads: Tensors) -> Tensors:
    """What both ops return."""
    _, _, weight_hh, weight_hr, _, _, _, sizes = arguments
    forward = ops.lstm(*arguments, reverse)
    saved = forward[4:7]
    backward = ops.lstm_backward(*grads, *saved, weight_hh, weight_hr, sizes, reverse)
    return [*forward, *backward]


def widened(values: Any) -> tuple[Any, ...]:
    return tuple(v.double() if isinstance(v, torch.Tensor) else v for v in values)


@pytest.mark.parametrize(("backend", "dtype"), RUNS, ids=str)
@pytest.mark.parametrize("projected", [False, True], ids=["", "projected"])
@pytest.mark.parametrize("reverse", [False, True], ids=["", "reverse"])
@pytest.mark.parametrize("name", shapes.RECURRENCE)
def test_equals_the_equations(
    name: str, reverse: bool, projected: bool, dtype: torch.dtype, backend: str
) -> None:
    arguments = operands(name, projected, dtype, bias=not reverse)
    skip_unless_runs(ops.lstm, backend, *arguments, reverse)
    grads = incoming(arguments)
    with ops.use_backend(backend):
        actual = there_and_back(arguments, reverse, grads)
    with ops.use_backend("reference"):
        plain = there_and_back(arguments, reverse, grads)
        exact = there_and_back(widened(arguments), reverse, list(widened(grads)))
    for found, same_dtype, truth in zip(actual, plain, exact, strict=True):
        assert_as_exact_as_torch(found, same_dtype, truth, truth.abs().max())


@pytest.mark.parametrize("projected", [False, True], ids=["", "projected"])
@pytest.mark.parametrize("reverse", [False, True], ids=["", "reverse"])
@pytest.mark.parametrize("name", shapes.RECURRENCE)
def test_the_equations_are_those_of_the_module(name: str, reverse: bool, projected: bool) -> None:
    """Outputs, last states and, through autograd, gradients of input and first states."""
    projected = projected and shapes.RECURRENCE[name][2] > 1  # a module's is less than its width
    arguments = operands(name, projected, WIDE)
    data, weight_ih, weight_hh, weight_hr, bias, h, c, sizes = arguments
    module = nn.LSTM(
        data.shape[1], c.shape[1], bidirectional=reverse, proj_size=len(h[0]) * projected
    ).double()
    direction = "_reverse" if reverse else ""
    given = {"weight_ih": weight_ih, "weight_hh": weight_hh, "bias_ih": bias}
    given |= {"weight_hr": weight_hr} if projected else {}
    with torch.no_grad():
        getattr(module, f"bias_hh_l0{direction}").zero_()
        for kind, value in given.items():
            getattr(module, f"{kind}_l0{direction}").copy_(value)
    leaves = [t.clone().requires_grad_() for t in (data, h, c)]
    states = [torch.stack([t] * (1 + reverse)) for t in leaves[1:]]
    packed = nn.utils.rnn.PackedSequence(leaves[0], torch.tensor(sizes))
    output, last = module(packed, tuple(states))
    outcome = [output.data[:, -h.shape[1] :], *(state[-1] for state in last)]
    grads = incoming(arguments)
    expected = torch.autograd.grad(outcome, leaves, grads)
    with ops.use_backend("reference"):
        found = there_and_back(arguments, reverse, grads)
    at_gates, grad_h, grad_c = found[7 + projected :][:3]
    for actual, truth in zip(
        [*found[:3], at_gates @ weight_ih, grad_h, grad_c], [*outcome, *expected], strict=True
    ):
        torch.testing.assert_close(actual, truth, rtol=1e-11, atol=1e-11)


@built
def test_any_number_of_threads_gives_the_same_bits() -> None:
    rows, width = 65, 333
    kernels = native.load("cpu")
    generator = torch.Generator().manual_seed(37)
    sums, *states = (
        torch.randn(rows, columns, generator=generator)
        for columns in (4 * width, width, width, width)
    )
    found = []
    for count in (1, 2, 3):
        gates, grad_cell, grad_gates = sums.clone(), states[1].clone(), torch.empty_like(sums)
        results = [torch.empty(rows, width) for _ in range(3)]
        step, launch = (0, rows, width), (count, 0, 0)
        before, grad_hidden = states[0].data_ptr(), states[2].data_ptr()
        made = [t.data_ptr() for t in (gates, *results)]
        kernels.lstm_step(made[0], before, *made[1:], *step, launch)
        back = grad_gates.data_ptr(), grad_cell.data_ptr(), grad_hidden
        kernels.lstm_step_backward(*back, made[0], before, made[2], *step, launch)
        found.append([gates, *results, grad_cell, grad_gates])
    for others in found[1:]:
        for first, other in zip(found[0], others, strict=True):
            assert torch.equal(first, other)


_GATES = """
import sys, torch
from dpkernels import ops
from dpkernels.ops import native
assert native.load("cpu").instruction_set == sys.argv[1], native.load("cpu")
around = torch.logspace(-38, 1.9, 20_011)
x = torch.cat([around, -around, torch.linspace(-200, 200, 40_003), torch.zeros(1)])
zeros = torch.zeros(len(x), 1)
with ops.use_backend("cpu"):
    gates = ops.lstm(
        zeros, torch.zeros(4, 1), torch.ones(4, 1), None, None, x[:, None], zeros,
        [len(x)], False,
    )[4]
for gate, function in enumerate((torch.sigmoid, torch.sigmoid, torch.tanh, torch.sigmoid)):
    actual, exact = gates[:, gate].double(), function(x.double())
    units = ((actual - exact).abs() - 2.0**-125) / exact.abs().clamp(min=1e-300) * 2**24
    assert units.max() <= 5, (gate, units.max(), x[units.argmax()])
assert gates[-1, 2] == 0 and not gates[-1, 2].signbit()
special = torch.tensor([torch.inf, -torch.inf, torch.nan, 3e38, -3e38])[:, None]
zeros = torch.zeros(5, 1)
with ops.use_backend("cpu"):
    gates = ops.lstm(
        zeros, torch.zeros(4, 1), torch.ones(4, 1), None, None, special, zeros, [5], False
    )[4]
for gate in range(4):
    limits = [1.0, -1.0 if gate == 2 else 0.0]
    expected = torch.tensor([*limits, torch.nan, *limits])
    assert torch.allclose(gates[:, gate], expected, atol=1e-37, equal_nan=True), gates
"""


@built
@pytest.mark.parametrize("name", native.instruction_sets())
def test_gates_are_exact_on_every_instruction_set(name: str) -> None:
    """Sigmoid and tanh to five units of rounding or 2^-125, and at infinity and NaN."""
    environ = {**os.environ, "DPKERNELS_INSTRUCTION_SET": name}
    command = [sys.executable, "-c", _GATES, name]
    subprocess.run(command, check=True, env=environ, timeout=120)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_bad_sample_stays_alone(backend: str) -> None:
    arguments = operands("packed", True)
    skip_unless_runs(ops.lstm, backend, *arguments, False)
    data, h, sizes = arguments[0], arguments[5], arguments[7]
    grads = incoming(arguments)
    with ops.use_backend(backend):
        clean = there_and_back(arguments, False, grads)
        data[1] = h[1] = torch.nan
        spoilt = there_and_back(arguments, False, grads)
    rows = torch.cat([torch.arange(size) for size in sizes])
    for before, after in zip(clean, spoilt, strict=True):
        of_row = rows if len(after) == len(rows) else torch.arange(len(after))
        assert torch.equal(after[of_row != 1], before[of_row != 1])
    assert spoilt[0][rows == 1].isnan().all()


@pytest.mark.parametrize("layout", shapes.LAYOUTS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_any_memory_layout(backend: str, layout: str) -> None:
    arguments, move = operands("packed", True), shapes.LAYOUTS[layout]
    skip_unless_runs(ops.lstm, backend, *arguments, False)
    grads = incoming(arguments)
    moved = [move(v) if isinstance(v, torch.Tensor) and v.ndim == 2 else v for v in arguments]
    grads = [move(grad) for grad in grads]
    plain = [v.contiguous() if isinstance(v, torch.Tensor) else v for v in moved]
    with ops.use_backend(backend):
        expected = there_and_back(tuple(plain), False, [grad.contiguous() for grad in grads])
        actual = there_and_back(tuple(moved), False, grads)
    for found, truth in zip(actual, expected, strict=True):
        torch.testing.assert_close(found, truth, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("position", "value", "message"),
    [
        (0, torch.zeros(9, 4, dtype=torch.float16), "weight_ih: dtype"),
        (0, torch.zeros(9), "data: shape"),
        (1, torch.zeros(20, 3), "weight_ih: shape"),
        (2, torch.zeros(20, 4), "weight_hh: shape"),
        (3, torch.zeros(3, 4), "weight_hr: shape"),
        (4, torch.zeros(5), "bias: shape"),
        (5, torch.zeros(4, 2), "h: shape"),
        (6, torch.zeros(3, 5), "sizes="),
        (7, [4, 2, 3], "sizes="),
        (7, [4, 5], "sizes="),
        (7, [], "sizes="),
    ],
)
def test_arguments_that_do_not_fit(position: int, value: Any, message: str) -> None:
    arguments = list(operands("packed", True))
    arguments[position] = value
    with pytest.raises(ValueError, match=message):
        ops.lstm(*arguments, False)


def test_gradients_that_do_not_fit() -> None:
    arguments = operands("packed", False)
    grads = incoming(arguments)
    good = [*grads, *ops.lstm(*arguments, False)[4:7], arguments[2], None, arguments[7], False]
    for position in range(5):
        bad = list(good)
        bad[position] = good[position][:, 1:]
        with pytest.raises(ValueError, match=r"shape|sizes"):
            ops.lstm_backward(*bad)
        bad[position] = good[position].double()
        with pytest.raises(ValueError, match="dtype"):
            ops.lstm_backward(*bad)


def test_library_registration() -> None:
    arguments = operands("packed", True)
    grads = incoming(arguments)
    library = torch.ops.dpkernels
    torch.library.opcheck(library.lstm.default, (*arguments, True))
    saved = ops.lstm(*arguments, True)[4:7]
    back = (*grads, *saved, arguments[2], arguments[3], arguments[7], True)
    torch.library.opcheck(library.lstm_backward.default, back)
