"""What a GPU machine is, and whether it takes the kernels that were compiled for it elsewhere.

    python -m bench.rehearsal.versions PACK
    python -m bench.rehearsal.versions --key

The first prints the versions and compares what enters the key of every kernel in Triton's cache,
besides the kernel itself, with the key in PACK/triton-key.json; the second prints that key. Ends
with 3 where torch finds no GPU, with 1 where kernels have to be compiled again.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import subprocess
import sys
import sysconfig
from pathlib import Path

import torch

from bench import results
from dpkernels import info


def key() -> dict[str, str]:
    """What Triton's cache depends on besides kernels, options and capability: name and value.

    Raises:
        ImportError: Triton is not installed.
    """
    from triton import knobs
    from triton._C.libtriton import get_cache_invalidating_env_vars
    from triton.backends.nvidia.compiler import CUDAOptions, get_ptxas_version
    from triton.runtime.build import platform_key
    from triton.runtime.cache import triton_key

    return {
        "triton": hashlib.sha256(triton_key().encode()).hexdigest(),
        "ptxas": get_ptxas_version(90).strip().splitlines()[-1],
        "options": CUDAOptions().hash(),
        "debug": str(knobs.runtime.debug),
        "environment": str(sorted(get_cache_invalidating_env_vars().items())),
        "platform": platform_key(),
        "extensions": sysconfig.get_config_var("EXT_SUFFIX"),
    }


def _say(*command: str) -> None:
    """What a program prints, or why it prints nothing."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10)
        print((done.stdout or done.stderr).strip(), flush=True)
    except (OSError, subprocess.TimeoutExpired) as error:
        print(f"{command[0]}: {error}", flush=True)


def main() -> int:
    """Print, and tell by the exit code."""
    if sys.argv[1:] == ["--key"]:
        print(json.dumps(key(), indent=1))
        return 0
    query = "name,driver_version,memory.total,memory.used,clocks.max.sm"
    _say("nvidia-smi", f"--query-gpu={query}", "--format=csv")
    _say("nvcc", "--version")
    print(f"commit {os.environ.get('DPKERNELS_COMMIT') or 'unknown'}")
    print(f"python {platform.python_version()}, CUDA {torch.version.cuda}, {os.cpu_count()} cores")
    packages = ("torch", "triton", "numpy", "pytest", "pytest-xdist", "pytest-timeout", "opacus")
    print(
        ", ".join(
            f"{name} {results.version_of(name) or 'missing'}"
            for name in (*packages, "monai", "nibabel")
        )
    )
    try:
        info.show()
    except Exception as error:
        print(f"dpkernels info: {type(error).__name__}: {error}")
    carried = Path(sys.argv[1]) / "triton-key.json"
    agree = True
    if carried.is_file():
        there, here = json.loads(carried.read_text()), key()
        for name in sorted(there.keys() | here.keys()):
            if there.get(name) != here.get(name):
                agree = False
                print(f"carried kernels are compiled again: {name} was {there.get(name)!r}")
                print(f"    and is {here.get(name)!r}")
        if agree:
            print("carried kernels are taken: all that enters their keys agrees")
    if torch.cuda.is_available():
        print(f"capability {torch.cuda.get_device_capability()}")
    elif not os.environ.get("DPKERNELS_GPU_REHEARSAL"):
        print("torch finds no GPU")
        return 3
    return 0 if agree else 1


if __name__ == "__main__":
    raise SystemExit(main())
