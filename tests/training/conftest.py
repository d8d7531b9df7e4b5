from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.training.toy import ToyTrainer, tiny


@pytest.fixture(autouse=True)
def one_thread(threads):
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def finished(tmp_path_factory) -> Path:
    """One finished run on eight patients, used read only."""
    run = tmp_path_factory.mktemp("runs") / "run"
    changes = {
        "data": {"validation_share": 0.25},
        "training": {"ema_decay": 0.9, "validate_every": 2},
    }
    ToyTrainer(tiny(changes), run).fit()
    return run
