"""One rule per kind of layer, a generic fallback, and refusals by name."""

from __future__ import annotations

from torch import nn

from dpkernels.layers.attention import AttentionRule
from dpkernels.layers.composite import CompositeRule
from dpkernels.layers.conv import ConvRule, ConvTransposeRule
from dpkernels.layers.dense import EmbeddingRule, LinearRule
from dpkernels.layers.norm import GroupNormRule, LayerNormRule, PReLURule
from dpkernels.layers.recurrent import RecurrentRule
from dpkernels.layers.refusals import (
    batch_norm_refusal,
    reparametrization_refusal,
    running_statistics_refusal,
)
from dpkernels.layers.rule import Rule

RULES: tuple[Rule, ...] = (
    LinearRule(),
    EmbeddingRule(),
    ConvRule(),
    ConvTransposeRule(),
    GroupNormRule(),
    LayerNormRule(),
    PReLURule(),
)
COMPOSITE_RULES: tuple[CompositeRule, ...] = (RecurrentRule(), AttentionRule())


def find_rule(module: nn.Module) -> Rule | None:
    """The rule that holds for the module as it stands, or None (the generic fallback serves)."""
    return next((rule for rule in RULES if rule.applies(module)), None)


def find_composite_rule(module: nn.Module) -> CompositeRule | None:
    """The rule by which the module runs in parts, or None."""
    return next((rule for rule in COMPOSITE_RULES if rule.applies(module)), None)


def refusal(module: nn.Module) -> str | None:
    """Why this module has no per-sample gradients, with the remedy; None if it has."""
    rule = find_rule(module)
    return (
        batch_norm_refusal(module)
        or running_statistics_refusal(module)
        or reparametrization_refusal(module)
        or (rule.refusal(module) if rule is not None else None)
    )
