"""Costs: every strategy has a cost or a reason, and one sample has a strategy of its own."""

from __future__ import annotations

import pytest
import torch

from dpkernels.layers.costs import STRATEGIES, Cost, offers, stored_bytes, stored_offers


@pytest.mark.parametrize("samples", [1, 4])
@pytest.mark.parametrize("gram", ["gram", "channel_gram"])
def test_offers_of_a_product(gram: str, samples: int) -> None:
    found = offers(samples, 100.0, 64, 24, gram, 30.0)
    assert set(found) == set(STRATEGIES)
    whole = Cost(flops=132.0, traffic=128.0, kept=64)
    other = ({"gram", "channel_gram"} - {gram}).pop()
    one, many = ("single", "store") if samples == 1 else ("store", "single")
    assert found[one] == whole
    assert found[gram] == Cost(flops=130.0, traffic=48.0, kept=24)
    assert found["recompute"] == Cost(flops=232.0, traffic=128.0, kept=24)
    assert all(isinstance(found[name], str) for name in (other, many))


def test_reasons_stand_for_offers_that_are_not_made() -> None:
    found = offers(4, 100.0, 64, 24, "gram", "too long", "formed twice")
    assert (found["gram"], found["recompute"]) == ("too long", "formed twice")


@pytest.mark.parametrize("samples", [1, 4])
def test_gradients_that_exist_are_only_stored(samples: int) -> None:
    found = stored_offers(samples, 64)
    assert set(found) == set(STRATEGIES)
    costs = {name: offer for name, offer in found.items() if isinstance(offer, Cost)}
    assert costs == {"single" if samples == 1 else "store": Cost(32.0, 64.0, 64)}


@pytest.mark.parametrize(
    ("dtype", "size"), [(torch.float64, 8), (torch.float32, 4), (torch.half, 4)]
)
def test_gradients_are_stored_in_float32_at_least(dtype: torch.dtype, size: int) -> None:
    assert stored_bytes(3, 5, torch.zeros(1, dtype=dtype)) == 15 * size
