#!/usr/bin/env bash
# What needs a GPU, in two runs of minutes, without a network:
#
#     bench/gpu.sh first|second OUT_DIR
#
# first (150 s): does it work? Versions, every production tile against float64, the engine on the
#     device, a trace of training steps, the other tests of ops, offenders under compute-sanitizer.
# second (450 s): how fast? Every backend against its roofline, whole steps against ordinary PyTorch
#     and a per-sample loop, what the planner chose and why, then Opacus and the other rivals.
#     `python -m bench adopt OUT_DIR` puts the rows among the others.
#
# Every stage has a limit of its own within what is left of the whole, and costs nobody but itself.
# After each one OUT_DIR holds summary.txt (stage, exit code, seconds, meaning), logs.tar.gz and the
# CSV files so far. The script ends with 0 if every stage ended well, with 1 if one did not.
#
# PYTHON                       interpreter with torch (default: python3)
# DPKERNELS_GPU_PACK           what bench/gpu-pack.sh made (default: .gpu); nothing of it must be there
# DPKERNELS_CUDA_ARCHITECTURES what to compile for if no extension is there (default: 90-real)
# DPKERNELS_COMMIT             names the commit where there is no .git (default: the pack's)
# DPKERNELS_GPU_REHEARSAL      1: on a machine without a GPU, small sizes, kernels launched into nothing
# DPKERNELS_GPU_PATIENCE       multiplies all limits, 10 or 0.1 (default: 1)
set -uo pipefail

usage() {
    echo "usage: bench/gpu.sh first|second OUT_DIR" >&2
    exit 2
}
[ $# -eq 2 ] || usage
case $1 in
    first) whole=150 ;;
    second) whole=450 ;;
    *) usage ;;
esac
run=$1
mkdir -p "$2" || exit 2
out=$(cd "$2" && pwd)
cd "$(dirname "$0")/.." || exit 2
python=${PYTHON:-python3}
pack=${DPKERNELS_GPU_PACK:-.gpu}
rehearsal=${DPKERNELS_GPU_REHEARSAL:-}
patience=${DPKERNELS_GPU_PATIENCE:-1}

# scaled SECONDS: so much patience, in whole seconds
scaled() {
    awk -v seconds="$1" -v patience="$patience" 'BEGIN { print int(seconds * patience + 0.5) }'
}
grace=$(awk -v patience="$patience" 'BEGIN { print 5 * patience }')
# Killing a stage and packing the last logs takes some of the time, too.
deadline=$(scaled $((whole - 8)))
scratch=$(mktemp -d)
logs=$scratch/logs
mkdir "$logs"
: >"$scratch/table"
once=() # what the command of a stage gets at its first try only
last=- # the exit code of the last stage
running= # the stage that runs, and
group= # the process group of its command
failed=0
device=cuda
processes=8
small=()

export PYTHONUNBUFFERED=1
export TRITON_CACHE_DIR=${TRITON_CACHE_DIR:-/tmp/dpkernels-triton-cache}
export DPKERNELS_LOST_GPU=$logs/lost-gpu.txt
export DPKERNELS_BUILD=cuda
export DPKERNELS_CUDA_ARCHITECTURES=${DPKERNELS_CUDA_ARCHITECTURES:-90-real}
: >"$DPKERNELS_LOST_GPU"
if ! command -v nvcc >/dev/null && [ -z "${CUDA_HOME:-}" ] && [ -d /usr/local/cuda ]; then
    export CUDA_HOME=/usr/local/cuda
fi

# failures: what failed, shortly: the tests by name, of other stages the end of the log
failures() {
    grep -hE '^(FAILED|ERROR) ' "$logs"/*.log 2>/dev/null | sort -u | cut -c 1-180 | head -n 40
    local name status
    while read -r name status _; do
        case $status in
            0 | -) continue ;;
        esac
        grep -qE '^(FAILED|ERROR) ' "$logs/$name.log" 2>/dev/null && continue
        echo "-- $name"
        tail -n 8 "$logs/$name.log" 2>/dev/null | cut -c 1-180
    done <"$scratch/table"
}

# save: OUT_DIR gets what there is
save() {
    local log
    for log in "$logs"/*; do
        if [ "$(wc -c <"$log")" -gt 4000000 ]; then
            { head -c 1000000 "$log" && echo "[...]" && tail -c 1000000 "$log"; } >"$scratch/cut"
            cat "$scratch/cut" >"$log"
        fi
    done
    { cat "$scratch/table" && echo && failures; } >"$scratch/summary.txt"
    tar -C "$scratch" -czf "$scratch/logs.tar.gz" logs
    cp "$scratch/summary.txt" "$scratch/logs.tar.gz" "$out"
    rm -f "$out"/*.partial
}

# record NAME STATUS SECONDS MEANING: a line of the table
record() {
    [ "$2" = 0 ] || failed=1
    printf '%-10s %4s %4s s  %s\n' "$@" | tee -a "$scratch/table"
    save
}

# shellcheck disable=SC2317  # called by the trap
finish() {
    trap - EXIT TERM INT HUP
    if [ -n "$running" ]; then
        kill -KILL -- "-$group" 2>/dev/null
        wait "$group" 2>/dev/null
        record "$running" 143 "$((SECONDS - started))" "stopped from outside" >/dev/null
    fi
    save
    echo
    failures | head -c 9000
    echo
    cat "$scratch/table"
    rm -rf "$scratch"
}
trap finish EXIT
trap 'exit 143' TERM INT HUP

compiled() {
    find "$TRITON_CACHE_DIR" -name '*.cubin' 2>/dev/null | wc -l
}

lost() {
    wc -l <"$DPKERNELS_LOST_GPU"
}

# meaning NAME STATUS: what an exit code says, with pytest's count where there is one
meaning() {
    local count
    count=$(grep -E '^=+ .*(passed|failed|errors?|skipped|no tests ran).* in ' "$logs/$1.log" |
        tail -n 1 | sed -E 's/^=+ //; s/ =+$//')
    case $2 in
        0) echo "ok${count:+: $count}" ;;
        3) echo "failed; torch finds no GPU" ;;
        5) echo "no test was found" ;;
        86) echo "GPU lost" ;;
        87) echo "hung" ;;
        124) echo "over its time" ;;
        137) echo "over its time, killed" ;;
        134 | 139) echo "crashed" ;;
        *) echo "failed${count:+: $count}" ;;
    esac
}

# stage NAME LIMIT TRIES COMMAND...: runs a command, its output in NAME.log. One that lost the GPU,
# hung or died begins again while tries and time are left: it leaves out by itself what did that.
# In the command @LEFT@ stands for the seconds that it may begin something in: importing comes before
# them, and ending what is begun after.
stage() {
    local name=$1 limit tries=$3 status=- left tried=0 before note begun=$SECONDS kernels offenders
    limit=$(scaled "$2")
    shift 3
    kernels=$(compiled)
    offenders=$(lost)
    started=$begun
    while [ "$tried" -lt "$tries" ]; do
        left=$((deadline - SECONDS))
        before=$((begun + limit - SECONDS))
        [ "$before" -lt "$left" ] && left=$before
        [ "$left" -ge 1 ] || break
        tried=$((tried + 1))
        [ "$tried" -eq 1 ] || echo "[$name again, exit $status before]" >>"$logs/$name.log"
        running=$name
        timeout --kill-after="$grace" "$left" "${@//@LEFT@/$((left > 30 ? left - 12 : left / 2))}" \
            "${once[@]}" >>"$logs/$name.log" 2>&1 &
        group=$!
        wait "$group"
        status=$?
        running=
        once=()
        # What the command has left behind would go on using the GPU.
        kill -KILL -- "-$group" 2>/dev/null
        case $status in
            86 | 87 | 124 | 134 | 137 | 139) ;;
            *) break ;;
        esac
    done
    if [ "$status" = - ]; then
        record "$name" - 0 "no time left"
        return
    fi
    last=$status
    note=$(meaning "$name" "$status")
    [ "$tried" -eq 1 ] || note="$note; begun $tried times"
    offenders=$(($(lost) - offenders))
    [ "$offenders" -eq 0 ] || note="$note; GPU lost in $offenders"
    kernels=$(($(compiled) - kernels))
    [ "$kernels" -le 0 ] || note="$note; $kernels kernels compiled"
    record "$name" "$status" "$((SECONDS - begun))" "$note"
}

# measure NAME LIMIT ITEM_LIMIT MODULE ARGUMENT...: runs a part of the bench, anew, item by item
measure() {
    local name=$1 limit=$2 item
    item=$(scaled "$3")
    shift 3
    once=(--fresh)
    stage "$name" "$limit" 4 "$python" -m "$@" --device "$device" --budget @LEFT@ \
        --item-seconds "$item"
    once=()
}

# tests NAME LIMIT PATH [OPTION...]: runs tests in parallel processes
tests() {
    local name=$1 limit=$2
    if [ ! -e "$3" ]; then
        record "$name" - 0 "missing: $3"
        return
    fi
    shift 2
    stage "$name" "$limit" 4 env "${environ[@]}" "$python" "${pytest[@]}" \
        --junitxml="$logs/$name.xml" "$@"
}

unpack() {
    local wheel
    if [ ! -d "$pack" ]; then
        record unpack 0 0 "nothing is carried: no $pack"
        return
    fi
    mkdir -p "$scratch/site" "$TRITON_CACHE_DIR"
    for wheel in "$pack"/wheels/*.whl; do
        [ ! -e "$wheel" ] || "$python" -m zipfile -e "$wheel" "$scratch/site"
    done >"$logs/unpack.log" 2>&1
    export PYTHONPATH="$scratch/site${PYTHONPATH:+:$PYTHONPATH}"
    if [ -e "$pack/triton-cache.tar.gz" ]; then
        tar -xzf "$pack/triton-cache.tar.gz" -C "$TRITON_CACHE_DIR" >>"$logs/unpack.log" 2>&1
    fi
    if [ "$(bench/gpu-pack.sh --sources)" = "$(cat "$pack/sources" 2>/dev/null)" ]; then
        cp "$pack"/extensions/*"$suffix" dpkernels/ 2>>"$logs/unpack.log"
    fi
    record unpack 0 "$SECONDS" "$(find "$scratch/site" -maxdepth 1 -name '*.dist-info' | wc -l)\
 wheels, $(find "$pack/extensions" -name "*$suffix" 2>/dev/null | wc -l) extensions, $(compiled) kernels"
}

suffix=$("$python" -c 'import sysconfig; print(sysconfig.get_config_var("EXT_SUFFIX"))')
unpack
if [ -z "${DPKERNELS_COMMIT:-}" ] && [ ! -e .git ] && [ -e "$pack/commit" ]; then
    DPKERNELS_COMMIT=$(cat "$pack/commit")
    export DPKERNELS_COMMIT
fi
environ=(OMP_NUM_THREADS=2)
pytest=(-m pytest -m gpu -v --tb=short --durations=10 -p no:cacheprovider --continue-on-collection-errors)
plugins=$("$python" -c '
import importlib.util
names = ("pytest", "xdist", "pytest_timeout")
print(*(name for name in names if importlib.util.find_spec(name)))')
if [ -n "$rehearsal" ]; then
    device=cpu
    processes=2
    small=(--quick)
    environ+=(PYTHONOPTIMIZE=1)
    pytest+=(-p bench.rehearsal.plugin --assert=plain)
fi
case " $plugins " in
    *" xdist "*) pytest+=(-n "$processes" --dist load --maxschedchunk 1 --max-worker-restart 64) ;;
esac
case " $plugins " in
    *" pytest_timeout "*) pytest+=("--timeout=$(scaled 30)" --timeout-method=thread) ;;
esac

if [ ! -e "dpkernels/_cuda$suffix" ]; then
    stage build 90 1 "$python" setup.py build_ext --inplace
fi
stage versions 25 1 "$python" -m bench.rehearsal.versions "$pack"
[ "$last" != 3 ] || exit 1
if [ "$run" = first ]; then
    tests tiles 60 tests/ops/production_tiles
    tests engine 50 tests/engine/device
    measure trace 30 20 bench trace --output "$out/trace.csv"
    tests ops 60 tests/ops --ignore=tests/ops/production_tiles
    number=0
    while read -r offender; do
        number=$((number + 1))
        if ! command -v compute-sanitizer >/dev/null; then
            record sanitizer - 0 "missing: compute-sanitizer"
            break
        fi
        stage "sanitizer$number" 40 1 env PYTORCH_NO_CUDA_MEMORY_CACHING=1 \
            compute-sanitizer --print-limit 5 --error-exitcode 86 \
            "$python" -m pytest -m gpu -x --tb=line -p no:cacheprovider "$offender"
    done < <(sort -u "$DPKERNELS_LOST_GPU")
else
    measure kernels 110 30 bench ops "${small[@]}" --output "$out/ops.csv"
    measure steps 170 45 bench "${small[@]}" --pass first --output "$out/steps.csv"
    measure explain 40 20 bench explain --output "$out/explain.csv"
    measure rivals 170 45 bench "${small[@]}" --pass second --output "$out/steps.csv"
fi
exit $failed
