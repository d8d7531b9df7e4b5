#!/usr/bin/env bash
# Makes, on a machine with nvcc and a network but no GPU, what bench/gpu.sh takes to a machine with
# a GPU and without a network, 60 MB at most:
#
#     bench/gpu-pack.sh OUT_FOLDER
#     bench/gpu-pack.sh --sources    only prints the digest of what the extensions are built from
#
# extensions/          the CPU and CUDA extensions for Python 3.12
# triton-cache.tar.gz  the Triton kernels of tests and benches, compiled for capability 9.0
# triton-key.json      what these depend on besides themselves (bench/rehearsal/versions.py)
# wheels/              pure Python that a machine with torch may lack
# commit, sources      of which commit all this is, and of which native sources
#
# PYTHON312             interpreter of the environment that is made if need be (default: python3.12)
# DPKERNELS_GPU_VENV    that environment, with the other machine's torch (default: .venv-gpu)
# TRITON_CACHE_DIR      where the kernels lie here and there: Triton's files name their folder, which
#                       is kept, so that a second run compiles only what is new
#                       (default: /tmp/dpkernels-triton-cache)
set -euo pipefail

cd "$(dirname "$0")/.."
sources() {
    find csrc CMakeLists.txt setup.py -type f | LC_ALL=C sort | xargs sha256sum | sha256sum | cut -c 1-64
}
case ${1:-} in
    --sources) sources && exit ;;
    "" | -*) echo "usage: bench/gpu-pack.sh OUT_FOLDER" >&2 && exit 2 ;;
esac
mkdir -p "$1"
pack=$(cd "$1" && pwd)
venv=${DPKERNELS_GPU_VENV:-.venv-gpu}
python=$venv/bin/python
cores=$(nproc)
export TRITON_CACHE_DIR=${TRITON_CACHE_DIR:-/tmp/dpkernels-triton-cache}
export OMP_NUM_THREADS=1

# step TEXT: says what is done, and the seconds so far
step() {
    echo "[$SECONDS s] $1"
}

if [ ! -e "$venv/.ready" ]; then
    step "environment $venv"
    install=("$python" -m pip --disable-pip-version-check install --quiet --constraint)
    "${PYTHON312:-python3.12}" -m venv "$venv"
    # Everything else at this checkout's versions; what depends on torch without its wishes.
    grep -vE '^(torch|triton|numpy|setuptools)==' constraints.txt |
        cat - stacks/torch-2.11.txt >"$venv/constraints.txt"
    "${install[@]}" "$venv/constraints.txt" torch triton numpy
    "${install[@]}" "$venv/constraints.txt" setuptools pybind11 cmake ninja scipy typer rich \
        opt_einsum pytest pytest-xdist pytest-timeout hypothesis pyyaml einops matplotlib
    "${install[@]}" "$venv/constraints.txt" --no-deps opacus monai nibabel
    touch "$venv/.ready"
fi

step "extensions"
build=$(mktemp -d)
trap 'rm -rf "$build"' EXIT
DPKERNELS_BUILD=cuda DPKERNELS_CUDA_ARCHITECTURES=${DPKERNELS_CUDA_ARCHITECTURES:-90-real} \
    "$python" setup.py --quiet build_ext --build-lib "$build/lib" --build-temp "$build/temp"
rm -rf "$pack/extensions" && mkdir "$pack/extensions"
cp "$build"/lib/dpkernels/_c*.so "$pack/extensions"

step "wheels"
rm -rf "$pack/wheels" && mkdir "$pack/wheels"
"$python" -m pip --disable-pip-version-check download --quiet --no-deps --only-binary :all: \
    --constraint constraints.txt --dest "$pack/wheels" opacus monai nibabel opt_einsum

step "Triton kernels of the benches"
export TRITON_STORE_BINARY_ONLY=1
for ((part = 0; part < cores; part++)); do
    "$python" -m bench.rehearsal.fill "$part" "$cores" &
done
# A call that fails here has said so: it is compiled where it succeeds.
wait
step "Triton kernels of the tests"
tests=(tests/ops)
[ ! -d tests/engine/device ] || tests+=(tests/engine/device)
# Tests that need more of a GPU than launches fail here, and what they compile is missing.
PYTHONOPTIMIZE=1 "$python" -m pytest -m gpu -p bench.rehearsal.plugin --assert=plain -n "$cores" \
    -p no:cacheprovider --timeout=300 --tb=no -q "${tests[@]}" | tail -n 1 || true

step "archive"
tar -C "$TRITON_CACHE_DIR" -czf "$pack/triton-cache.tar.gz" .
"$python" -m bench.rehearsal.versions --key >"$pack/triton-key.json"
"$python" -c 'from bench import results; print(results.commit())' >"$pack/commit"
sources >"$pack/sources"
size=$(du -sk "$pack" | cut -f 1)
step "$pack: $size KiB, $(find "$TRITON_CACHE_DIR" -name '*.cubin' | wc -l) kernels"
if [ "$size" -gt 60000 ]; then
    echo "$pack: $size KiB, and 60000 can be carried" >&2
    exit 1
fi
