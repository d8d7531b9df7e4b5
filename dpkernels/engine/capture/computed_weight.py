"""Layers whose weight is computed: weight standardisation, weight centring, weight norm.

``torch.nn.utils.parametrize`` makes a layer's weight a function of other parameters. The layer's
rule knows the gradient of each sample at the computed weight; the function's vector-Jacobian
product, once for every sample, carries each gradient to the parameters. The function is evaluated
once per call, so all samples see the same weight.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn.utils.parametrize import ParametrizationList

from dpkernels.engine.capture.layer import LayerCall, LayerForward, own_parameter, swapped
from dpkernels.engine.capture.refusals import NotPerSample
from dpkernels.layers import margins
from dpkernels.layers.costs import Cost, Offers
from dpkernels.layers.operands import Around, Call, Operand
from dpkernels.ops.sums import squared_norms


@dataclass(frozen=True)
class ComputedWeightOperand(Around):
    """The gradient at a parameter, from the operand of a tensor computed from the parameter.

    Attributes:
        operand: of the computed tensor.
        value: the computed tensor, attached to `leaf` by autograd.
        leaf: stands for the parameter.
    """

    value: torch.Tensor
    leaf: torch.Tensor

    def norm_sq(self) -> torch.Tensor:
        return squared_norms(self.grad_sample())

    def norm_bound(self, norm_sq: torch.Tensor) -> torch.Tensor:
        return margins.of_values(norm_sq)

    def grad_sample(self) -> torch.Tensor:
        return self._pull_back(self.operand.grad_sample())

    def clipped_grad(self, clip_factor: torch.Tensor) -> torch.Tensor:
        return self._pull_back(self.operand.clipped_grad(clip_factor)[None])[0]

    def _pull_back(self, gradients: torch.Tensor) -> torch.Tensor:
        """[n, *value.shape] -> [n, *leaf.shape]: each gradient's vector-Jacobian product."""
        (pulled,) = torch.autograd.grad(
            self.value,
            self.leaf,
            gradients.to(self.value.dtype),
            retain_graph=True,
            is_grads_batched=True,
            allow_unused=True,
        )
        if pulled is None:
            return self.leaf.new_zeros(len(gradients), *self.leaf.shape)
        return pulled

    def kernel(self, strategy: str) -> Call | None:
        return self.operand.kernel("store")

    def offers(self) -> Offers:
        """The computed tensor's offers, less those that form no gradients to carry on."""
        carried: Offers = {}
        for name, offer in self.operand.offers().items():
            if "gram" in name:
                carried[name] = "the weight is computed: only formed gradients can be carried on"
            elif isinstance(offer, Cost):
                carried[name] = Cost(offer.flops, 2.0 * offer.traffic, offer.kept)
            else:
                carried[name] = offer
        return carried


class ComputedWeightCall(LayerCall):
    """One call of a layer whose computed tensors are evaluated once and kept."""

    def __init__(self, owner: ComputedWeightForward, samples: int, wanted: frozenset[str]):
        super().__init__(owner, samples, wanted)
        self._values: dict[str, torch.Tensor] = {}
        self._leaves: dict[str, list[tuple[nn.Parameter, torch.Tensor]]] = {}
        for name, source in parametrizations(owner.module):
            slots = owner.slots(source.modules())
            leaves = {p: p.detach().requires_grad_() for _, _, p in slots}
            with (
                torch.enable_grad(),
                owner.session.paused(),
                swapped((module, key, leaves[p]) for module, key, p in slots),
            ):
                value = self._values[name] = source()
            _refuse_foreign(value, list(leaves.values()), owner.name, name)
            self._leaves[name] = list(leaves.items()) if value.requires_grad else []

    @contextlib.contextmanager
    def detached(self) -> Iterator[None]:
        module = self.owner.module
        own = self.wanted - self._values.keys()
        with (
            swapped((module, name, own_parameter(module, name).detach()) for name in own),
            self._computed(),
        ):
            yield

    def receive(self, backprops: torch.Tensor, saved: Sequence[torch.Tensor]) -> None:
        with self._computed():
            super().receive(backprops, saved)

    @contextlib.contextmanager
    def _computed(self) -> Iterator[None]:
        """The layer with the tensors of this call, out of autograd."""
        with contextlib.ExitStack() as stack:
            for name, source in parametrizations(self.owner.module):
                stack.enter_context(_returning(source, self._values[name].detach()))
            yield

    def trace(self, name: str, operand: Operand) -> Iterable[tuple[nn.Parameter, Operand]]:
        if name not in self._values:
            yield from super().trace(name, operand)
            return
        for parameter, leaf in self._leaves[name]:
            yield parameter, ComputedWeightOperand(operand, self._values[name], leaf)


class ComputedWeightForward(LayerForward):
    """Capture for a layer that has a rule and tensors that parametrizations compute."""

    def wanted(self) -> frozenset[str]:
        computed = (
            name
            for name, source in parametrizations(self.module)
            if any(self.session.guards.wanted(module) for module in source.modules())
        )
        return super().wanted().union(computed)

    def call(self, samples: int, wanted: frozenset[str]) -> LayerCall:
        return ComputedWeightCall(self, samples, wanted)


def parametrizations(module: nn.Module) -> list[tuple[str, ParametrizationList]]:
    """The module's computed tensors by name, each with the parametrizations that compute it."""
    found = module._modules.get("parametrizations")
    return [] if found is None else list(found.items())  # type: ignore[operator]


def _refuse_foreign(value: torch.Tensor, leaves: list[torch.Tensor], layer: str, name: str) -> None:
    """Raise where a tensor is computed from a parameter that its parametrization does not own."""
    known = {id(leaf) for leaf in leaves}
    pending, seen = [value.grad_fn], set()
    while pending:
        node = pending.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if id(getattr(node, "variable", None)) not in known and hasattr(node, "variable"):
            raise NotPerSample(
                f"layer {layer!r}: the parametrization of {name!r} uses a trained parameter that "
                "it does not own, whose gradient would be lost; register that parameter in the "
                "parametrization's module, or freeze it"
            )
        pending += [parent for parent, _ in node.next_functions]


@contextlib.contextmanager
def _returning(source: ParametrizationList, value: torch.Tensor) -> Iterator[None]:
    """Make the parametrization return `value` and compute nothing."""
    source.__dict__["forward"] = lambda: value
    try:
        yield
    finally:
        del source.__dict__["forward"]
