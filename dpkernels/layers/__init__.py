"""One rule per kind of layer, a generic fallback, and refusals by name."""

from __future__ import annotations

import inspect
from collections import OrderedDict

from torch import nn
from torch.utils.hooks import RemovableHandle

from dpkernels.layers.attention import AttentionRule
from dpkernels.layers.bilinear import BilinearRule
from dpkernels.layers.composite import CompositeRule
from dpkernels.layers.conv import ConvRule, ConvTransposeRule
from dpkernels.layers.embedding import EmbeddingRule
from dpkernels.layers.embedding_bag import EmbeddingBagRule
from dpkernels.layers.linear import LinearRule, TransposedLinearRule
from dpkernels.layers.norm import GroupNormRule, LayerNormRule, PReLURule
from dpkernels.layers.recurrent import DPRecurrentRule, RecurrentRule
from dpkernels.layers.refusals import refusal_without_rule
from dpkernels.layers.rule import Rule

#: what knows how to train one kind of layer
AnyRule = Rule | CompositeRule

_RULES: tuple[AnyRule, ...] = (
    RecurrentRule(),
    DPRecurrentRule(),
    AttentionRule(),
    EmbeddingBagRule(),
    BilinearRule(),
    LinearRule(),
    EmbeddingRule(),
    ConvRule(),
    ConvTransposeRule(),
    GroupNormRule(),
    LayerNormRule(),
    PReLURule(),
    TransposedLinearRule(),
)
#: by the id of its handle, the oldest first
_REGISTERED: OrderedDict[int, AnyRule] = OrderedDict()


def register_rule(rule: AnyRule) -> RemovableHandle:
    """Let a rule of one's own serve its layers, for models made private from now on.

    The rule comes before the package's own rules and before those that were registered earlier. A
    layer is served by the first rule whose ``applies`` says so.

    Example:
        >>> handle = register_rule(ScaleRule())
        >>> handle.remove()
        >>> with register_rule(ScaleRule()):
        ...     assert_per_sample(Scale(5), None, (torch.randn(4, 3, 5),))

    Args:
        rule: an instance of a subclass of :class:`dpkernels.layers.rule.Rule` or of
            :class:`dpkernels.layers.composite.CompositeRule`.

    Returns:
        A handle as PyTorch's hooks have it: ``handle.remove()`` takes the rule back, and so does
        the end of a ``with`` block. Models that were made private meanwhile keep the rule.

    Raises:
        ValueError: `rule` is no such instance, or its ``operands`` takes something else than a
            :class:`dpkernels.layers.rule.CapturedCall`.
    """
    if not isinstance(rule, (Rule, CompositeRule)):
        raise ValueError(
            f"rule={rule!r}: expected an instance of dpkernels.layers.rule.Rule or of "
            "dpkernels.layers.composite.CompositeRule"
        )
    try:
        if isinstance(rule, Rule):
            inspect.signature(rule.operands).bind(None)
    except TypeError:
        raise ValueError(
            f"rule={rule!r}: expected a method operands(call) of one argument, a "
            "dpkernels.layers.rule.CapturedCall with the module, activations, backprops, samples "
            "and wanted that operands() took before"
        ) from None
    handle = RemovableHandle(_REGISTERED)
    _REGISTERED[handle.id] = rule
    return handle


def find_rule(module: nn.Module) -> AnyRule | None:
    """The rule that holds for the module as it stands, or None (the generic fallback serves)."""
    rules = (*reversed(_REGISTERED.values()), *_RULES)
    return next((rule for rule in rules if rule.applies(module)), None)


def refusal(module: nn.Module) -> str | None:
    """Why this module has no per-sample gradients, with the remedy; None if it has."""
    rule = find_rule(module)
    return refusal_without_rule(module) or (None if rule is None else rule.refusal(module))
