"""Room for large results: an ordinary tensor, which the system may hold in huge pages."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from dpkernels import ops
from dpkernels.ops import pages

HUGE = Path("/sys/kernel/mm/transparent_hugepage/enabled")


def flags_at(address: int) -> set[str]:
    """Flags of the mapping that holds the address, as Linux tells them."""
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        head = line.split()[0]
        if "-" in head and not head.endswith(":"):
            begin, end = (int(each, 16) for each in head.split("-"))
            inside = begin <= address < end
        elif inside and head == "VmFlags:":
            return set(line.split()[1:])
    return set()


@pytest.mark.skipif(
    not sys.platform.startswith("linux") or not HUGE.is_file(),
    reason="this system has no transparent huge pages to ask for",
)
def test_large_stored_gradients_ask_for_huge_pages() -> None:
    inputs, grads = torch.randn(4, 16, 512), torch.randn(4, 16, 4096)
    stored = ops.linear_grad_sample(inputs, grads)
    assert stored.nbytes == 16 * pages.HUGE_PAGE
    for at in (0, stored.nbytes // 2, stored.nbytes - 1):
        assert "hg" in flags_at(stored.data_ptr() + at)
    assert torch.equal(stored, torch.bmm(grads.transpose(1, 2), inputs))


@pytest.mark.parametrize("shape", [(0,), (3, 5), (2, pages.HUGE_PAGE // 2 + 1)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_tensor_is_an_ordinary_one(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    like = torch.zeros(2, dtype=dtype)
    found, expected = pages.new_empty(like, shape), like.new_empty(shape)
    assert (found.shape, found.dtype, found.stride()) == (
        expected.shape,
        expected.dtype,
        expected.stride(),
    )
    found.fill_(1.0)
    assert found.sum() == found.numel()
