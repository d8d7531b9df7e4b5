"""One rule per kind of layer, a generic fallback, and refusals by name."""

from __future__ import annotations

from torch import nn

from dpkernels.layers.attention import AttentionRule
from dpkernels.layers.bilinear import BilinearRule
from dpkernels.layers.composite import CompositeRule
from dpkernels.layers.conv import ConvRule, ConvTransposeRule
from dpkernels.layers.embedding import EmbeddingRule
from dpkernels.layers.embedding_bag import EmbeddingBagRule
from dpkernels.layers.linear import LinearRule, TransposedLinearRule
from dpkernels.layers.norm import GroupNormRule, LayerNormRule, PReLURule
from dpkernels.layers.recurrent import DPRecurrentRule, RecurrentRule
from dpkernels.layers.refusals import (
    batch_norm_refusal,
    reparametrization_refusal,
    running_statistics_refusal,
)
from dpkernels.layers.rule import Rule

RULES: list[Rule] = [
    LinearRule(),
    EmbeddingRule(),
    ConvRule(),
    ConvTransposeRule(),
    GroupNormRule(),
    LayerNormRule(),
    PReLURule(),
    TransposedLinearRule(),
]
COMPOSITE_RULES: tuple[CompositeRule, ...] = (
    RecurrentRule(),
    DPRecurrentRule(),
    AttentionRule(),
    EmbeddingBagRule(),
    BilinearRule(),
)


def register_rule(rule: Rule) -> None:
    """Put a rule of one's own before the others, for models made private from now on.

    Raises:
        ValueError: it is not a :class:`dpkernels.layers.rule.Rule`.
    """
    if not isinstance(rule, Rule):
        raise ValueError(f"rule={rule!r}: expected an instance of dpkernels.layers.rule.Rule")
    RULES.insert(0, rule)


def find_rule(module: nn.Module) -> Rule | None:
    """The rule that holds for the module as it stands, or None (the generic fallback serves)."""
    return next((rule for rule in RULES if rule.applies(module)), None)


def find_composite_rule(module: nn.Module) -> CompositeRule | None:
    """The rule by which the module runs in parts, or None."""
    return next((rule for rule in COMPOSITE_RULES if rule.applies(module)), None)


def refusal(module: nn.Module) -> str | None:
    """Why this module has no per-sample gradients, with the remedy; None if it has."""
    rule = find_rule(module) or find_composite_rule(module)
    return (
        batch_norm_refusal(module)
        or running_statistics_refusal(module)
        or reparametrization_refusal(module)
        or (rule.refusal(module) if rule is not None else None)
    )
