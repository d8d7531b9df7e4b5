"""The attacks by name: on first use, and under the name they had before."""

from __future__ import annotations

import importlib

import pytest

from dpkernels import attacks


def test_the_attacks_are_found_under_their_former_name() -> None:
    former = importlib.import_module("dpkernels.reconstruction.attacks")
    assert former.__all__ == attacks.__all__
    assert all(getattr(former, name) is getattr(attacks, name) for name in attacks.__all__)
    with pytest.raises(AttributeError, match="no attribute 'release'"):
        _ = attacks.release
