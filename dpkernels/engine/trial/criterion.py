"""A check on one batch: do the model or the criterion of a training loop mix samples?"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from dpkernels.engine.capture.session import Session
from dpkernels.engine.capture.trial_book import TrialBook
from dpkernels.engine.trial.batch_rows import BatchRows
from dpkernels.engine.trial.mixing import refuse_mixing


def check_criterion(
    model: nn.Module,
    session: Session,
    criterion: Callable[..., torch.Tensor],
    batch: Sequence[Any],
) -> None:
    """Raise :class:`NotPerSample` where model or criterion let samples influence each other.

    Args:
        model: the captured model, in training mode.
        session: the model's session.
        criterion: called as ``criterion(model(*inputs), target)``.
        batch: inputs, then the target; at least two samples.
    """
    rows = batch[0].shape[session.axis]
    at = BatchRows(rows, session.views, session.axis)
    if not at.can_tell(list(batch)):
        raise ValueError(f"batch: it holds {rows} rows, expected two samples or more that differ")

    def run(batch: Sequence[Any]) -> list[torch.Tensor]:
        *inputs, target = batch
        return [criterion(model(*inputs), target)]

    trials, session.trials = session.trials, TrialBook("off")
    try:
        while session.trials.turn < max(1, (at.samples - 1).bit_length()):
            refuse_mixing(session, run, list(batch), rows)
            session.trials.turn += 1
    finally:
        session.trials = trials
