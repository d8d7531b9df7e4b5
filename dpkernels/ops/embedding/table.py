"""The shape of an embedding table, as contracts and implementations pass it around."""

from __future__ import annotations

from typing import NamedTuple


class Table(NamedTuple):
    """Positions that hold `padding_idx` do not count; -1 for none."""

    num_embeddings: int
    padding_idx: int
