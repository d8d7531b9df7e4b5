"""One place that decides which implementation of an op runs, and says why the others did not.

An op family is a package ``dpkernels.ops.<family>``. Its ``__init__`` holds the contracts: one
function per op, decorated with :func:`contract`, whose body checks the arguments and returns an
empty tensor of the result's shape and dtype (it is also the op's fake implementation for
``torch.library``). The modules beside it (``reference``, ``library``, ``cpu``, ``triton``,
``cuda``) hold the implementations under the same names and are imported only when they are first
asked for; ``library`` is calls of PyTorch's own kernels, on any device. A module may define

* ``unavailable() -> str | None``: why nothing in it can run on this machine (not built, no GPU);
* ``why_not_<op>(*args, **kwargs) -> str | None``: why it cannot take these arguments.

In automatic mode a reason is passed over silently; when a backend is forced (environment variable
``DPKERNELS_BACKEND`` or :func:`use_backend`) the reason is the error.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.util
import inspect
import os
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any, Generic, TypeVar

import torch

from dpkernels.ops.precision import full_precision

Result = TypeVar("Result")
"""What an op returns: a tensor, or the list of tensors that it mutates."""

BACKENDS = ("reference", "library", "cpu", "triton", "cuda")
_AUTO_ORDER = {
    "cpu": ("cpu", "library", "reference"),
    "cuda": ("cuda", "triton", "library", "reference"),
}
_ONLY_ON = {"cpu": "cpu", "cuda": "cuda"}  # triton's interpreter takes CPU tensors too

_forced: list[str] = []


class BackendUnavailable(RuntimeError):
    """A forced backend cannot run the op; the message carries the reason."""


def forced_backend() -> str | None:
    """The backend that the caller or ``DPKERNELS_BACKEND`` forces, or None in automatic mode."""
    name = _forced[-1] if _forced else os.environ.get("DPKERNELS_BACKEND") or None
    if name in (None, "auto"):
        return None
    if name not in BACKENDS:
        raise ValueError(f"backend={name!r}: expected 'auto' or one of {', '.join(BACKENDS)}")
    return name


@contextlib.contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Force one backend inside a ``with`` block; ``"auto"`` restores the automatic choice."""
    if name != "auto" and name not in BACKENDS:
        raise ValueError(f"backend={name!r}: expected 'auto' or one of {', '.join(BACKENDS)}")
    _forced.append(name)
    try:
        yield
    finally:
        _forced.pop()


@functools.cache
def _module(family: str, backend: str) -> ModuleType | str:
    """The module that implements `family` on `backend`, or why there is none."""
    path = f"{family}.{backend}"
    if importlib.util.find_spec(path) is None:
        return f"{family.rpartition('.')[2]} has no {backend} implementation"
    try:
        module = importlib.import_module(path)
    except ImportError as error:
        return f"{path} could not be imported: {error}"
    return getattr(module, "unavailable", lambda: None)() or module


class Op(Generic[Result]):
    """A named op: checks by its contract, runs on the best backend that can."""

    def __init__(self, contract: Callable[..., Result], mutates: tuple[str, ...]):
        functools.update_wrapper(self, contract)
        self.name = contract.__name__
        self.family = contract.__module__
        self._contract = contract
        self._mutates = mutates
        library_op = torch.library.custom_op(f"dpkernels::{self.name}", mutates_args=mutates)
        self._library_op = library_op(self._typed(self._dispatch))
        self._library_op.register_fake(self._typed(contract))
        _OPS[self.name] = self

    def _typed(self, function: Callable[..., Result]) -> Callable[..., Result | None]:
        """`function` under the contract's signature, from which torch infers the schema.

        A library op may not return what it mutates: one that mutates returns None.
        """

        @functools.wraps(self._contract)
        def call(*args: Any, **kwargs: Any) -> Result | None:
            result = function(*args, **kwargs)
            return None if self._mutates else result

        if self._mutates:
            signature = inspect.signature(self._contract, eval_str=True)
            call.__signature__ = signature.replace(return_annotation=None)  # type: ignore[attr-defined]
        return call

    def __call__(self, *args: Any, **kwargs: Any) -> Result:
        if torch.compiler.is_compiling():
            result = self._library_op(*args, **kwargs)
            if not self._mutates:
                return result
            return args[0] if args else kwargs[self._mutates[0]]
        return self._dispatch(*args, **kwargs)

    def why_not(self, backend: str, *args: Any, **kwargs: Any) -> str | None:
        """Why `backend` cannot run this op (with these arguments, if given); None if it can."""
        module = _module(self.family, backend)
        if isinstance(module, str):
            return module
        if not hasattr(module, self.name):
            return f"{self.name} has no {backend} implementation"
        if not args and not kwargs:
            return None
        device = _device_type(args, kwargs)
        if _ONLY_ON.get(backend, device) != device:
            return f"it takes {_ONLY_ON[backend]} tensors and these are on {device}"
        check = getattr(module, f"why_not_{self.name}", None)
        return check(*args, **kwargs) if check is not None else None

    def preferred(self, device_type: str) -> str | None:
        """The backend that automatic mode tries first on such tensors; None if there is none."""
        order = _AUTO_ORDER.get(device_type, ("reference",))
        return next((backend for backend in order if self.why_not(backend) is None), None)

    def _dispatch(self, *args: Any, **kwargs: Any) -> Result:
        function = self.implementation(*args, **kwargs)
        with full_precision():
            return function(*args, **kwargs)

    def implementation(self, *args: Any, **kwargs: Any) -> Callable[..., Result]:
        """The function that runs for these arguments.

        Raises:
            BackendUnavailable: a forced backend cannot, or no backend can.
        """
        return getattr(_module(self.family, self.backend(*args, **kwargs)), self.name)

    def backend(self, *args: Any, **kwargs: Any) -> str:
        """The name of the backend that runs for these arguments."""
        self._contract_check(*args, **kwargs)
        forced = forced_backend()
        if forced is not None:
            reason = self.why_not(forced, *args, **kwargs)
            if reason:
                raise BackendUnavailable(
                    f"{self.name}: backend {forced!r} was forced, but {reason}"
                )
            return forced
        reasons = []
        for backend in _auto_order(args, kwargs):
            reason = self.why_not(backend, *args, **kwargs)
            if reason is None:
                return backend
            reasons.append(f"{backend}: {reason}")
        raise BackendUnavailable(f"{self.name}: no backend can run it ({'; '.join(reasons)})")

    def candidates(self, *args: Any, **kwargs: Any) -> tuple[str, ...]:
        """The backends worth timing on these arguments, the automatic choice first.

        Every one that can run them, but the plain reference only where nothing else can; the
        forced one alone where one is forced.

        Raises:
            BackendUnavailable: a forced backend cannot, or no backend can.
        """
        chosen = self.backend(*args, **kwargs)
        if forced_backend() is not None or chosen == "reference":
            return (chosen,)
        order = _auto_order(args, kwargs)
        others = order[order.index(chosen) + 1 : -1]
        return (chosen, *(b for b in others if self.why_not(b, *args, **kwargs) is None))

    def _contract_check(self, *args: Any, **kwargs: Any) -> None:
        check = getattr(self._contract, "check", None)
        if check is not None:
            check(*args, **kwargs)


_OPS: dict[str, Op[Any]] = {}


def contract(*, mutates: tuple[str, ...] = ()) -> Callable[[Callable[..., Result]], Op[Result]]:
    """Declare an op: the decorated function is its signature, documentation and shape rule.

    A function attribute ``check`` (same arguments, returns nothing, raises ``ValueError``) is run
    before every dispatch. The op is registered with ``torch.library`` as ``dpkernels::<name>``.
    An op that mutates names one argument, its first (a tensor or a list of them), and returns it.
    """
    return lambda function: Op(function, mutates)


def all_ops() -> dict[str, Op[Any]]:
    """Every declared op by name (for ``python -m dpkernels info`` and the tests)."""
    return dict(_OPS)


def _auto_order(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[str, ...]:
    """The backends that automatic mode tries for these arguments; the reference is the last."""
    return _AUTO_ORDER.get(_device_type(args, kwargs), ("reference",))


def _device_type(args: tuple[Any, ...], kwargs: dict[str, Any]) -> str:
    each = (a if isinstance(a, (list, tuple)) else (a,) for a in (*args, *kwargs.values()))
    first = next((a for group in each for a in group if isinstance(a, torch.Tensor)), None)
    return "cpu" if first is None else first.device.type
