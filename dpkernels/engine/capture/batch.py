"""The batch of one forward pass of the model."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class Batch:
    """What one forward pass of the model runs on, and what the pass' layers met.

    Attributes:
        rows: rows along the sample axis of the model's input, a blank sample's if `empty`.
        samples: number of samples; 1 if `empty`.
        empty: whether the batch had no sample, so a blank one runs in its place.
        marked: whether a captured layer's node is in the graph of the pass (none is where all
            layers run inside reentrant checkpoints).
        folded: a layer that had several rows per sample while no trial had been run.
    """

    rows: int
    samples: int
    empty: bool
    marked: bool = False
    folded: str | None = None
