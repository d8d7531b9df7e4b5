"""Arguments on which backends tend to break, by op: what every backend is tried with.

``names(op)`` lists them, ``arguments(op, name, dtype, layout)`` draws them. An op that is not here
has a test of its own for every backend: noise, recurrence, the statistics of normalisation,
fingerprints.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from tests.ops import shapes

Arguments = tuple[Any, ...]

SUMS = {
    f"{batch} of {list(shape)}": (batch, shape)
    for shape in ((0,), (1,), (9,), (2049,), (4, 3, 5, 7, 11), ())
    for batch in (0, 1, 5)
}
"""(B, shape of the parameter)"""

_RANDOM = torch.Generator()


def _draw(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=_RANDOM, dtype=torch.float64)


def _linear(shape: tuple[int, int, int, int]) -> Arguments:
    batch, positions, inputs, outputs = shape
    return _draw(batch, positions, inputs), _draw(batch, positions, outputs)


def _conv(case: shapes.Conv) -> Arguments:
    input = _draw(case.batch, case.channels_in, *case.size)
    return input, _draw(case.batch, case.channels_out, *case.output), *case.geometry


def _embedding(shape: tuple[int, int, int, int]) -> Arguments:
    batch, positions, width, rows = shape
    indices = torch.randint(rows, (batch, positions), generator=_RANDOM)
    return indices, _draw(batch, positions, width), rows, 0


def _pair(shape: tuple[int, int, int, int]) -> Arguments:
    batch, channels, positions, _ = shape
    return _draw(batch, channels, positions), _draw(batch, channels, positions)


def _normalized(shape: tuple[int, int, int, int]) -> Arguments:
    batch, groups = shape[0], shape[3]
    return *_pair(shape), _draw(batch, groups), _draw(batch, groups).exp()


def _normalized_last(shape: tuple[int, int, int, int]) -> Arguments:
    batch, width, positions, _ = shape
    pair = (each.transpose(1, 2) for each in _pair((batch, width, positions, 1)))
    return *pair, _draw(batch, positions), _draw(batch, positions).exp()


def _sum(shape: tuple[int, tuple[int, ...]]) -> Arguments:
    batch, size = shape
    return _draw(*size), _draw(batch, *size), _factor(batch)


def _finish(shape: tuple[int, tuple[int, ...]]) -> Arguments:
    key = torch.zeros(4, dtype=torch.int64)
    return *_sum(shape), 0.0, 0.125, key, 0, False


def _finish_all(shape: tuple[int, tuple[int, ...]]) -> Arguments:
    """Two parameters; the first sample of the second has NaN, and no weight."""
    (out, other), samples, factors = (
        list(each) for each in zip(_sum(shape), _sum((2, (3, 4))), strict=True)
    )
    samples[1][0], factors[1][0] = torch.nan, 0.0
    key = torch.zeros(4, dtype=torch.int64)
    return [out, other], samples, factors, 0.0, 0.125, key, [0, 300], [True, False]


def _factor(batch: int) -> torch.Tensor:
    return torch.linspace(0.2, 1.0, batch, dtype=torch.float64)


def _clipped(make: Callable[[Any], Arguments]) -> Callable[[Any], Arguments]:
    def arguments(shape: Any) -> Arguments:
        left, right, *rest = make(shape)
        return left, right, _factor(len(left)), *rest

    return arguments


OPS: Mapping[str, tuple[Mapping[str, Any], Callable[[Any], Arguments]]] = {
    "linear_norm_sq": (shapes.LINEAR, _linear),
    "linear_grad_sample": (shapes.LINEAR, _linear),
    "linear_clipped_grad": (shapes.LINEAR, _clipped(_linear)),
    "conv_norm_sq": (shapes.CONV, _conv),
    "conv_grad_sample": (shapes.CONV, _conv),
    "conv_clipped_grad": (shapes.CONV, _clipped(_conv)),
    "embedding_norm_sq": (shapes.EMBEDDING, lambda s: (*_embedding(s)[:2], 0)),
    "embedding_grad_sample": (shapes.EMBEDDING, _embedding),
    "embedding_clipped_grad": (shapes.EMBEDDING, _clipped(_embedding)),
    "affine_grad_sample": (shapes.REDUCTION, _pair),
    "affine_last_grad_sample": (shapes.REDUCTION, _pair),
    "affine_norm_sq": (shapes.REDUCTION, _pair),
    "affine_clipped_grad": (shapes.REDUCTION, _clipped(_pair)),
    "bias_grad_sample": (shapes.REDUCTION, lambda s: _pair(s)[:1]),
    "bias_last_grad_sample": (shapes.REDUCTION, lambda s: _pair(s)[:1]),
    "normalization_grad_sample": (shapes.REDUCTION, _normalized),
    "normalization_last_grad_sample": (shapes.REDUCTION, _normalized_last),
    "clip_factor": (SUMS, lambda s: (_draw(s[0]).square(), 0.5)),
    "weighted_sum_": (SUMS, _sum),
    "finish_grad_": (SUMS, _finish),
    "finish_grads_": (SUMS, _finish_all),
}


def names(op: str) -> list[str]:
    """What :func:`arguments` takes for `op`.

    Raises:
        ValueError: an op with a test of its own.
    """
    if op not in OPS:
        own = "test_noise, test_discrete_gaussian, test_recurrence, test_affine, test_fingerprint"
        raise ValueError(f"op={op!r}: expected one of {sorted(OPS)}; {own} draw the others'")
    return list(OPS[op][0])


def arguments(
    op: str, name: str, dtype: torch.dtype = torch.float32, layout: str = "contiguous"
) -> Arguments:
    """Flat arguments of `op`, always the same ones.

    Args:
        op: an op's name.
        name: one of its :func:`names`.
        dtype: of the operands. Vectors (clip factors, squared norms) and what the op changes are
            float32 at least.
        layout: a key of :data:`tests.ops.shapes.LAYOUTS`, for operands that the op does not change.
    """
    table, make = OPS[op]
    _RANDOM.manual_seed(41)
    wide = torch.promote_types(dtype, torch.float32)

    def settled(value: Any, kept: bool) -> Any:
        if isinstance(value, list):
            return [settled(each, kept) for each in value]
        if not isinstance(value, torch.Tensor) or not value.is_floating_point():
            return value
        if kept or value.ndim < 2:
            return value.to(wide)
        return shapes.LAYOUTS[layout](value.to(dtype))

    drawn = make(table[name])
    return tuple(settled(v, op.endswith("_") and at == 0) for at, v in enumerate(drawn))
