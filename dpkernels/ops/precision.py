"""PyTorch's global switches of precision, and what they mean for norms and sums.

Since version 2.9 PyTorch has two families of switches for the precision of float32 products: the
older ``torch.backends.cuda.matmul.allow_tf32``, ``torch.backends.cudnn.allow_tf32`` and
``torch.set_float32_matmul_precision``, and the newer ``fp32_precision`` of ``torch.backends`` and
its backends. Once the newer ones are set, reading the older ones raises; the newer ones tell the
effective setting of both.
"""

from __future__ import annotations

import contextlib

import torch

#: what inputs of float32 products may be rounded to, from the finest on
PRECISIONS = ("ieee", "tf32", "bf16")
_AS_IT_IS = contextlib.nullcontext()


def float32_products(device_type: str, *kinds: str) -> str:
    """The coarsest precision to which the library may round inputs of float32 products.

    Args:
        device_type: ``"cuda"``; any other counts as ``"cpu"``.
        kinds: of the products: ``"matmul"``, ``"conv"``.

    Returns:
        ``"ieee"`` (not rounded), ``"tf32"`` (10 bits of significand) or ``"bf16"`` (7 bits).
    """
    read = _on_cuda if device_type == "cuda" else _on_cpu
    return max((_known(read(kind)) for kind in kinds), key=PRECISIONS.index)


def _known(precision: str) -> str:
    """PyTorch says ``"none"`` where nothing allows less than full precision."""
    return "ieee" if precision == "none" else precision


def _on_cuda(kind: str) -> str:
    cublas, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    if not hasattr(cudnn, "conv"):  # before PyTorch 2.9
        return "tf32" if (cudnn if kind == "conv" else cublas).allow_tf32 else "ieee"
    return (cudnn.conv if kind == "conv" else cublas).fp32_precision


def _on_cpu(kind: str) -> str:
    backend = getattr(torch.backends.mkldnn, kind, None)
    if backend is not None:
        return backend.fp32_precision
    if kind == "conv":
        return "ieee"
    stated = torch.get_float32_matmul_precision()
    return {"highest": "ieee", "high": "tf32", "medium": "bf16"}[stated]


def full_precision() -> contextlib.AbstractContextManager[object]:
    """Arithmetic in the dtype of its operands, also inside ``torch.autocast``.

    Under autocast a product of float32 norms, factors or gradients is rounded to half precision,
    so the sum would not be that of the values whose norms were taken.
    """
    return torch._C._DisableAutocast() if torch._C._is_any_autocast_enabled() else _AS_IT_IS
