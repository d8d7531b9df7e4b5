"""A pytest plugin: a test that costs its process the GPU ends that process, and is named.

After some errors (an address out of range, say) every later CUDA call of the process fails. Under
pytest-xdist a process that ends is replaced, and the remaining tests run in the new one.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
import torch

EXIT_CODE = 86


@pytest.hookimpl(trylast=True)
def pytest_runtest_teardown(item: pytest.Item) -> None:
    """Wait for the device after every test marked ``gpu``; without it no later test counts.

    The test's node id is appended to the file that the environment variable DPKERNELS_LOST_GPU
    names, if it is set.
    """
    if item.get_closest_marker("gpu") is None or not torch.cuda.is_available():
        return
    try:
        torch.cuda.synchronize()
    except RuntimeError as error:
        _leave(item, error)


def _leave(item: pytest.Item, error: RuntimeError) -> None:
    record = os.environ.get("DPKERNELS_LOST_GPU")
    if record:
        with Path(record).open("a", encoding="utf-8") as file:
            file.write(f"{item.nodeid}\n")
    capture = item.config.pluginmanager.getplugin("capturemanager")
    with capture.global_and_fixture_disabled():
        print(f"\n{item.nodeid}: the GPU is lost to this process: {error}", file=sys.stderr)
        sys.stderr.flush()
    os._exit(EXIT_CODE)
