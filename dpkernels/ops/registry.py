"""One place that decides which implementation of an op runs, and says why the others did not.

An op family is a package ``dpkernels.ops.<family>``. Its ``__init__`` holds the contracts: one
function per op, decorated with :func:`contract`, whose body returns an empty tensor of the result's
shape and dtype (it is the op's fake implementation for ``torch.library``). The modules beside it
(``reference``, ``library``, ``cpu``, ``triton``, ``cuda``) hold the implementations under the same
names and signatures, and are imported only when they are first asked for; ``library`` is calls of
PyTorch's own kernels, on any device. A module may define

* ``unavailable() -> str | None``: why nothing in it can run on this machine (not built, no GPU);
* ``why_not_<op>(*arguments) -> str | None``: why it cannot take these arguments;
* ``why_not(*arguments) -> str | None``: the same for its ops that have no function of their own.

In automatic mode a reason is passed over silently; when a backend is forced (environment variable
``DPKERNELS_BACKEND`` or :func:`use_backend`) the reason is the error.

Callers and ``torch.library`` know flat arguments only. A contract's parameter whose type is a named
tuple stands for the tuple's fields: :class:`Op` takes the fields, and hands the tuple on.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.util
import inspect
import os
from collections.abc import Callable, Iterable, Iterator
from types import ModuleType
from typing import Any, Generic, TypeVar, get_type_hints

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

    __signature__: inspect.Signature

    def __init__(
        self,
        contract: Callable[..., Any],
        check: Callable[..., None] | None,
        mutates: tuple[str, ...],
        runs: Op[Any] | None,
    ):
        functools.update_wrapper(self, contract)
        self.name = contract.__name__
        self.family = contract.__module__
        signature, self._records = _flattened(contract)
        if mutates:
            signature = signature.replace(
                return_annotation=signature.parameters[mutates[0]].annotation
            )
        elif runs is not None:
            signature = signature.replace(return_annotation=runs.__signature__.return_annotation)
        self.__signature__: inspect.Signature = signature
        self._contract = contract
        self._check = check
        self._mutates = mutates
        self._runs = runs or self
        library_op = torch.library.custom_op(f"dpkernels::{self.name}", mutates_args=mutates)
        self._library_op = library_op(self._typed(self._dispatch))
        self._library_op.register_fake(self._typed(self._fake))
        _OPS[self.name] = self

    def _typed(self, function: Callable[..., Result]) -> Callable[..., Result | None]:
        """`function` under the flat signature, from which torch infers the schema.

        A library op may not return what it mutates: one that mutates returns None.
        """

        @functools.wraps(self._contract)
        def call(*args: Any, **kwargs: Any) -> Result | None:
            result = function(*args, **kwargs)
            return None if self._mutates else result

        signature = self.__signature__
        if self._mutates:
            signature = signature.replace(return_annotation=None)
        call.__signature__ = signature  # type: ignore[attr-defined]
        return call

    def __call__(self, *args: Any, **kwargs: Any) -> Result:
        if torch.compiler.is_compiling():
            result = self._library_op(*args, **kwargs)
            return self._mutated(args, kwargs) if self._mutates else result
        return self._dispatch(*args, **kwargs)

    def _mutated(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return args[0] if args else kwargs[self._mutates[0]]

    def _fake(self, *args: Any, **kwargs: Any) -> Result:
        return self._runs._contract(*self._arguments(args, kwargs))

    def _dispatch(self, *args: Any, **kwargs: Any) -> Result:
        arguments = self._arguments(args, kwargs)
        function = self._implementation(arguments)
        with full_precision():
            result = function(*arguments)
        return self._mutated(args, kwargs) if self._mutates else result

    def _implementation(self, arguments: tuple[Any, ...]) -> Callable[..., Any]:
        return getattr(_module(self.family, self._choice(arguments)), self._runs.name)

    def _gathered(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...]:
        """The contract's arguments, of flat ones."""
        if kwargs or (self._records and len(args) != len(self.__signature__.parameters)):
            bound = self.__signature__.bind(*args, **kwargs)
            bound.apply_defaults()
            args = bound.args
        for at, fields, record in self._records:
            args = (*args[:at], record(*args[at : at + fields]), *args[at + fields :])
        return args

    def _arguments(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...]:
        """The arguments of implementations, of flat ones."""
        arguments = self._gathered(args, kwargs)
        return arguments if self._runs is self else self._contract(*arguments)

    def why_not(self, backend: str, *args: Any, **kwargs: Any) -> str | None:
        """Why `backend` cannot run this op (with these arguments, if given); None if it can."""
        if not args and not kwargs:
            return self._why_not(backend, None, "")
        arguments = self._arguments(args, kwargs)
        return self._why_not(backend, arguments, _device_type(arguments))

    def _why_not(self, backend: str, arguments: tuple[Any, ...] | None, device: str) -> str | None:
        module = _module(self.family, backend)
        if isinstance(module, str):
            return module
        name = self._runs.name
        if not hasattr(module, name):
            return f"{self.name} has no {backend} implementation"
        if arguments is None:
            return None
        if _ONLY_ON.get(backend, device) != device:
            return f"it takes {_ONLY_ON[backend]} tensors and these are on {device}"
        check = getattr(module, f"why_not_{name}", None) or getattr(module, "why_not", None)
        return check(*arguments) if check is not None else None

    def preferred(self, device_type: str) -> str | None:
        """The backend that automatic mode tries first on such tensors; None if there is none."""
        order = _auto_order(device_type)
        return next((backend for backend in order if self.why_not(backend) is None), None)

    def backend(self, *args: Any, **kwargs: Any) -> str:
        """The name of the backend that runs for these arguments.

        Raises:
            BackendUnavailable: a forced backend cannot, or no backend can.
        """
        return self._choice(self._arguments(args, kwargs))

    def _choice(self, arguments: tuple[Any, ...]) -> str:
        if self._runs._check is not None:
            self._runs._check(*arguments)
        forced, device = forced_backend(), _device_type(arguments)
        if forced is not None:
            reason = self._why_not(forced, arguments, device)
            if reason:
                raise BackendUnavailable(
                    f"{self.name}: backend {forced!r} was forced, but {reason}"
                )
            return forced
        reasons = []
        for backend in _auto_order(device):
            reason = self._why_not(backend, arguments, device)
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
        arguments = self._arguments(args, kwargs)
        chosen = self._choice(arguments)
        if forced_backend() is not None or chosen == "reference":
            return (chosen,)
        device = _device_type(arguments)
        order = _auto_order(device)
        others = order[order.index(chosen) + 1 : -1]
        return (chosen, *(b for b in others if self._why_not(b, arguments, device) is None))


_OPS: dict[str, Op[Any]] = {}


def contract(
    *,
    check: Callable[..., None] | None = None,
    mutates: tuple[str, ...] = (),
    runs: Op[Any] | None = None,
) -> Callable[[Callable[..., Any]], Op[Any]]:
    """Declare an op: the decorated function is its signature, documentation and shape rule.

    The op is registered with ``torch.library`` as ``dpkernels::<name>``, under the flat signature.

    Args:
        check: takes the implementations' arguments, returns nothing and raises ``ValueError``; is
            run before every dispatch.
        mutates: the name of the op's first flat argument (a tensor or a list of them), which the op
            changes and returns. What an implementation returns then counts for nothing.
        runs: the op of the same family whose implementations, reasons, check and shape rule serve
            this op too: the decorated function returns the arguments for them.
    """
    return lambda function: Op(function, check, mutates, runs)


def all_ops() -> dict[str, Op[Any]]:
    """Every declared op by name (for ``python -m dpkernels info`` and the tests)."""
    return dict(_OPS)


def _flattened(
    contract: Callable[..., Any],
) -> tuple[inspect.Signature, list[tuple[int, int, Callable[..., Any]]]]:
    """The contract's signature with the fields of named tuples in the place of the tuples.

    Returns:
        The signature; for each named tuple its place among the contract's arguments, its number of
        fields, and what makes it of them: its classmethod ``of`` if it has one, whose types are
        then those of the fields.
    """
    signature = inspect.signature(contract, eval_str=True)
    flat: list[inspect.Parameter] = []
    records = []
    for at, parameter in enumerate(signature.parameters.values()):
        record = parameter.annotation
        if not hasattr(record, "_fields"):
            flat.append(parameter)
            continue
        make = getattr(record, "of", record)
        types = get_type_hints(make)
        records.append((at, len(record._fields), make))
        flat += [parameter.replace(name=n, annotation=types[n]) for n in record._fields]
    return signature.replace(parameters=flat), records


def _auto_order(device_type: str) -> tuple[str, ...]:
    """The backends that automatic mode tries on such tensors; the reference is the last."""
    return _AUTO_ORDER.get(device_type, ("reference",))


def _device_type(arguments: Iterable[Any]) -> str:
    """Where the first tensor is; the CPU where there is none."""
    tensor = _first_tensor(arguments)
    return "cpu" if tensor is None else tensor.device.type


def _first_tensor(arguments: Iterable[Any]) -> torch.Tensor | None:
    for argument in arguments:
        if isinstance(argument, torch.Tensor):
            return argument
        if isinstance(argument, (list, tuple)):
            found = _first_tensor(argument)
            if found is not None:
                return found
    return None
