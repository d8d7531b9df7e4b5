"""pytest-benchmark: what it saves may be committed, so it names no machine; ratios at the end."""

from __future__ import annotations

from typing import Any

import pytest

#: median seconds by case and rival: of this run, and of the one it is compared with
Medians = dict[tuple[str, str], float]
NOW: Medians = {}
_BEFORE: Medians = {}


@pytest.hookimpl(optionalhook=True)
def pytest_benchmark_update_machine_info(machine_info: dict[str, Any]) -> None:
    """Keep what says something about speed."""
    cpu = machine_info.get("cpu", {}).get("brand_raw", "")
    kept = ("machine", "system", "python_version")
    known = {name: machine_info[name] for name in kept if name in machine_info}
    machine_info.clear()
    machine_info.update(known, cpu={"brand_raw": cpu})


@pytest.hookimpl(optionalhook=True)
def pytest_benchmark_compare_machine_info(compared_benchmark: dict[str, Any]) -> None:
    """Remember the committed run; milliseconds of another machine mean little, ratios more."""
    for entry in compared_benchmark["benchmarks"]:
        key = entry["params"]["case"], entry["params"]["rival"]
        _BEFORE[key] = entry["stats"]["median"]


@pytest.hookimpl(trylast=True)
def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Ours over the ordinary step, case by case, beside the committed run."""
    now, before = _ratios(NOW), _ratios(_BEFORE)
    for case, ratio in now.items():
        earlier = f", committed run {before[case]:.2f}" if case in before else ""
        terminalreporter.write_line(f"{case}: {ratio:.2f} times the ordinary step{earlier}")


def _ratios(medians: Medians) -> dict[str, float]:
    return {
        case: own / medians[case, "ordinary"]
        for (case, rival), own in medians.items()
        if rival == "ours" and (case, "ordinary") in medians
    }
