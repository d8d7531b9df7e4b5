#!/usr/bin/env bash
# Everything that needs a GPU, in one command of under nine minutes, without a network:
#
#     bench/gpu.sh OUT_DIR
#
# Builds the extensions for the GPU at hand, runs the tests marked gpu, times every backend of every
# op against its roofline and whole steps against ordinary PyTorch, Opacus and a per-sample loop, and
# writes build.log, info.log, tests.log, kernels.log, bench.log, kernels.csv and steps.csv into
# OUT_DIR, row by row, so that a part that is cut off leaves what it has; short tables last. The
# limits of the parts add up to 530 s. `python -m bench adopt OUT_DIR` puts the rows among the others.
#
# PYTHON                       interpreter with torch (default: python3)
# DPKERNELS_WHEELS             folder of wheels for what that interpreter lacks (default: wheels)
# DPKERNELS_CUDA_ARCHITECTURES what to compile for (default: 90-real, an H100 or H200)
set -uo pipefail

if [ $# -ne 1 ]; then
    echo "usage: bench/gpu.sh OUT_DIR" >&2
    exit 2
fi
mkdir -p "$1"
out=$(cd "$1" && pwd)
cd "$(dirname "$0")/.." || exit 2
python=${PYTHON:-python3}
wheels=${DPKERNELS_WHEELS:-wheels}
export DPKERNELS_BUILD=cuda
export DPKERNELS_CUDA_ARCHITECTURES=${DPKERNELS_CUDA_ARCHITECTURES:-90-real}
export PYTHONUNBUFFERED=1
failed=0

# part NAME SECONDS COMMAND...: runs a part with a limit, its output in NAME.log
part() {
    local name=$1 limit=$2 start=$SECONDS
    shift 2
    timeout --kill-after=10 "$limit" "$@" >"$out/$name.log" 2>&1
    local status=$?
    echo "$name: exit $status after $((SECONDS - start)) s"
    if [ $status -ne 0 ]; then
        failed=1
        tail -n 15 "$out/$name.log"
    fi
}

missing=$("$python" - <<'END'
import importlib.util
import shutil
packages = ("setuptools", "pybind11", "numpy", "scipy", "opacus", "opt_einsum")
packages += ("typer", "rich", "pytest", "pytest_timeout", "hypothesis")
missing = [name for name in packages if importlib.util.find_spec(name) is None]
for name in ("cmake", "ninja"):
    if shutil.which(name) is None and importlib.util.find_spec(name) is None:
        missing.append(name)
print(" ".join(missing))
END
)
if [ -n "$missing" ] && [ -d "$wheels" ]; then
    site=$(mktemp -d)
    # One by one, so that a wheel that is not there costs only what needs it.
    # shellcheck disable=SC2016,SC2086
    part packages 30 bash -c 'install=(${1} -m pip install --quiet --no-index --no-deps); shift
        for name in "${@:3}"; do
            "${install[@]}" --find-links "$1" --target "$2" "$name" || status=1
        done
        exit ${status:-0}' install "$python" "$wheels" "$site" $missing
    export PYTHONPATH="$site${PYTHONPATH:+:$PYTHONPATH}"
elif [ -n "$missing" ]; then
    echo "not installed: $missing (put their wheels into $wheels)"
fi

if ! "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' 2>"$out/gpu.log"; then
    echo "$python: torch is missing or finds no GPU" >&2
    tail -n 3 "$out/gpu.log" >&2
    exit 2
fi
if ! command -v nvcc >/dev/null && [ -z "${CUDA_HOME:-}" ] && [ -d /usr/local/cuda ]; then
    export CUDA_HOME=/usr/local/cuda
fi
part build 110 "$python" setup.py build_ext --inplace
part info 20 "$python" -m dpkernels info
part tests 100 "$python" -m pytest tests/ops -m gpu -q --continue-on-collection-errors
part kernels 90 "$python" -m bench.kernels "$out/kernels.csv" --budget 70
part bench 180 "$python" -m bench --device cuda --fresh --budget 150 --output "$out/steps.csv"

grep -E "passed|failed|error" "$out/tests.log" | tail -n 1
"$python" -m bench.kernels "$out/kernels.csv" --show
"$python" -m bench report --short --source "$out/steps.csv"
exit $failed
