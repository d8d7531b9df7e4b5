"""pytest-benchmark: what it saves may be committed, so it names no machine."""

from __future__ import annotations

from typing import Any

import pytest


@pytest.hookimpl(optionalhook=True)
def pytest_benchmark_update_machine_info(config: Any, machine_info: dict[str, Any]) -> None:
    """Keep what says something about speed."""
    cpu = machine_info.get("cpu", {}).get("brand_raw", "")
    kept = ("machine", "system", "python_version")
    known = {name: machine_info[name] for name in kept if name in machine_info}
    machine_info.clear()
    machine_info.update(known, cpu={"brand_raw": cpu})
