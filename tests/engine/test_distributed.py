"""DDP and FSDP2 with two real processes: the checks are in ``tests/engine/two_processes``."""

from __future__ import annotations

import pytest
import torch.distributed as dist

from tests.engine.two_processes import pair

pytestmark = pytest.mark.skipif(
    not (dist.is_available() and dist.is_gloo_available()), reason="PyTorch was built without gloo"
)


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return pair.run(tmp_path_factory.mktemp("pair"))


@pytest.mark.parametrize("name", pair.checks())
def test_in_two_processes(outcomes: dict[str, str], name: str) -> None:
    assert name in outcomes, "not reached: a check before it failed or hung"
    assert not outcomes[name], outcomes[name]
