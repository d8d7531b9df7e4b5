"""What is raised where per-sample gradients cannot be told apart."""

from __future__ import annotations


class NotPerSample(ValueError):
    """No per-sample gradient can be told apart; the message names the module and the remedy."""


class Untried(NotPerSample):
    """A layer met rows that no trial has met: the batch under way must be tried too."""
