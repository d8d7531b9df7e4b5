"""The base class of rules, one for each kind of layer."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn

from dpkernels.layers.operands import Operand

#: given a tensor's name and the number of rows, returns [rows, *shape]
ForEach = Callable[[str, int], torch.Tensor]


@dataclass(slots=True)
class CapturedCall:
    """One call of a layer, once the gradient at its output has arrived.

    Attributes:
        module: the layer.
        activations: the tensors that :meth:`Rule.forward` remembered, sample axis first.
        backprops: gradient at the layer's output, sample axis first, [rows, ...].
        samples: number of samples; rows are a multiple of it.
        wanted: names of the trained parameters, the only ones that need an operand.
    """

    module: Any
    activations: tuple[torch.Tensor, ...]
    backprops: torch.Tensor
    samples: int
    wanted: frozenset[str]


class Rule:
    """How one kind of layer turns (activations, backprops) into operands.

    A rule is stateless. The layer's own forward runs unchanged, with its parameters outside
    autograd; the rule says which tensors to remember and makes operands of them.
    """

    #: classes whose own ``forward`` this rule understands
    handles: ClassVar[tuple[type[nn.Module], ...]]
    #: methods that must not be overridden for the rule to hold
    methods: ClassVar[tuple[str, ...]] = ("forward",)
    #: the parameters that the rule knows
    parameters: ClassVar[tuple[str, ...]] = ("weight", "bias")
    #: the sample axis that the layer itself prescribes; None where the model decides
    sample_axis: ClassVar[int | None] = None

    def refusal(self, module: nn.Module) -> str | None:
        """Why the module has no per-sample gradient, with the remedy; None if it has one."""
        return None

    def batched(self, module: nn.Module, input: torch.Tensor) -> bool:
        """Whether the input has a sample axis in front of the axes of one sample."""
        return input.ndim >= 2

    def forward(
        self, module: nn.Module, input: torch.Tensor, run: Callable[[], torch.Tensor]
    ) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
        """The layer's output and the tensors to remember, all with the same sample axis.

        Args:
            module: the layer, the trained parameters out of autograd.
            input: the layer's input.
            run: runs the layer's own forward on `input`.
        """
        return run(), (input,)

    def forward_each(
        self, module: nn.Module, input: torch.Tensor, for_each: ForEach
    ) -> torch.Tensor | None:
        """Run the layer with one set of parameters per row (views).

        Autograd itself then returns per-sample gradients; :meth:`forward` and :meth:`operands` are
        not called.

        Args:
            module: the layer, the trained parameters out of autograd.
            input: the layer's input, [rows, ...].
            for_each: returns one of the layer's tensors once for every row.

        Returns:
            The output; None where :meth:`forward` with :meth:`operands` is cheaper.
        """
        return None

    def operands(self, call: CapturedCall) -> Iterable[tuple[str, Operand]]:
        """Operands by parameter name, for the wanted parameters only."""
        raise NotImplementedError

    def applies(self, module: nn.Module) -> bool:
        """Whether this rule holds for the module in its present state.

        A subclass or an instance that overrides one of `methods` computes something else and is
        left to the generic fallback; so is a module with a parameter that the rule does not know.
        A tensor that a parametrization computes counts as the parameter of the same name.
        """
        base = next((b for b in self.handles if isinstance(module, b)), None)
        if base is None:
            return False
        cls = type(module)
        own = {name for name, p in module._parameters.items() if p is not None}
        computed = set(getattr(module, "parametrizations", ()))
        return (
            all(getattr(cls, m) is getattr(base, m) for m in self.methods)
            and not any(m in module.__dict__ for m in self.methods)
            and own | computed <= set(self.parameters)
            and set(module._modules) <= {"parametrizations"}
        )
