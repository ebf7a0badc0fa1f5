#!/usr/bin/env bash
# Sets up vLLM and SGLang with kvcached, each in a virtual environment of its own.
# Safe to run again: what is done already is not done twice.
set -euo pipefail

usage() {
    cat <<'END'
Usage: ./setup.sh [vllm|sgl|all] [--cpu|--gpu]

Makes a virtual environment for each engine, installs the engine and kvcached, applies the patch
that lets the engine's source say so, and checks that kvcached takes hold.

  vllm, sgl, all   which engine; all by default
  --gpu            vLLM 0.8.4 and SGLang 0.4.6.post2 for NVIDIA GPUs (about 12 GB)
  --cpu            what runs without a GPU: vLLM's CPU package (0.32.0), SGLang 0.4.6.post2 in plain
                   torch, and the small model of the demo (about 7 GB)
                   Without either, it is --gpu where nvidia-smi finds a GPU.

The environments are engine_integration/vllm-kvcached-venv and engine_integration/
sglang-kvcached-venv; the log of everything is engine_integration/setup.log.
Then: engine_integration/benchmark/start_server.sh [vllm|sgl]
END
}

SCRIPTS=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
INTEGRATION=$(dirname "$SCRIPTS")
ROOT=$(dirname "$INTEGRATION")
LOG=$INTEGRATION/setup.log
VLLM_VERSION=0.8.4
SGLANG_VERSION=0.4.6.post2
UV_VERSION=0.7.12
# The engines name no upper bound for these, and newer ones do not fit them.
VLLM_PINS=(transformers==4.51.3 "setuptools<80")
SGLANG_PINS=(transformers==4.51.1 "setuptools<80")

which=all
kind=
for argument in "$@"; do
    case $argument in
        vllm|sgl|all) which=$argument ;;
        --cpu|--gpu) kind=${argument#--} ;;
        -h|--help) usage; exit 0 ;;
        *) echo "setup.sh: unknown argument '$argument'" >&2; usage >&2; exit 2 ;;
    esac
done

say() { printf '[%5d s] %s\n' "$SECONDS" "$*" | tee -a "$LOG"; }

# Runs a step into the log; says its end when it fails.
quietly() {
    echo "\$ $*" >>"$LOG"
    if ! "$@" >>"$LOG" 2>&1 </dev/null; then
        tail -n 25 "$LOG" >&2
        echo "setup.sh: this failed: $*" >&2
        echo "The whole log is $LOG. If a download failed, run setup.sh again: what is done stays." >&2
        exit 1
    fi
}

find_python() {
    local name
    for name in python3.11 python3.12 python3.10 python3; do
        if command -v "$name" >/dev/null && "$name" -c \
            'import sys, venv, ensurepip; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 13))' \
            2>/dev/null; then
            command -v "$name"
            return
        fi
    done
    echo "setup.sh: no Python 3.10 to 3.13 with the venv module on PATH; install for instance" \
        "python3.11 and python3.11-venv" >&2
    exit 1
}

# Sets UV to a uv that is new enough: the one on PATH, or one of our own.
find_uv() {
    local has
    if command -v uv >/dev/null; then
        has=$(uv --version | awk '{print $2}')
        if [ "$(printf '%s\n%s\n' "$UV_VERSION" "$has" | sort -V | head -n 1)" = "$UV_VERSION" ]; then
            UV=$(command -v uv)
            return
        fi
        say "uv $has is older than $UV_VERSION"
    fi
    UV=$INTEGRATION/uv-venv/bin/uv
    if [ ! -x "$UV" ]; then
        say "installing uv $UV_VERSION or newer into engine_integration/uv-venv"
        quietly "$PYTHON" -m venv "$INTEGRATION/uv-venv"
        quietly "$INTEGRATION/uv-venv/bin/python" -m pip install "uv>=$UV_VERSION"
    fi
}

# An environment with an engine for GPUs: folder, what it is in words, the patch, its requirements.
for_gpu() {
    local venv=$1 engine=$2 patch=$3
    shift 3
    if [ ! -x "$venv/bin/python" ]; then
        say "$engine: making $(basename "$venv")"
        quietly "$UV" venv --python "$PYTHON" --seed "$venv"
    fi
    say "$engine: installing it (gigabytes, minutes)"
    quietly "$UV" pip install --python "$venv/bin/python" "$@"
    say "$engine: compiling and installing kvcached"
    quietly "$UV" pip install --python "$venv/bin/python" -e "$ROOT[tools]"
    apply_patch "$venv" "$engine" "$patch"
}

apply_patch() {
    local venv=$1 engine=$2 patch=$3 packages
    packages=$("$venv/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
    if patch --dry-run -R -p1 -s -f -d "$packages" <"$patch" >/dev/null 2>&1; then
        say "$engine: the patch is applied already"
    else
        say "$engine: applying $(basename "$patch")"
        quietly patch -p1 -N -d "$packages" -i "$patch"
    fi
}

# Environments for CPUs are those of the project's own tests; here they only get a second name.
for_cpu() {
    local venv=$1 made=$2
    shift 2
    "$PYTHON" "$@" 2>&1 | tee -a "$LOG"
    ln -sfn "$made" "$venv"
}

# That kvcached really takes hold there: doctor's findings, and its exit status.
check() {
    local venv=$1 engine=$2
    say "$engine: checking with kvcached doctor"
    if ! ENABLE_KVCACHED=true "$venv/bin/python" -m kvcached.cli.main doctor --engine "${engine,,}" \
        2>&1 | tee -a "$LOG"; then
        echo "setup.sh: $engine is installed, but kvcached doctor has found something wrong" >&2
        exit 1
    fi
}

: >"$LOG"
PYTHON=$(find_python)
if [ -z "$kind" ]; then
    if command -v nvidia-smi >/dev/null && nvidia-smi -L 2>/dev/null | grep -q GPU; then
        kind=gpu
    else
        kind=cpu
        say "no NVIDIA GPU found: setting up what runs without one (--gpu insists)"
    fi
fi

if [ "$kind" = gpu ]; then
    find_uv
    if [ "$which" != sgl ]; then
        for_gpu "$INTEGRATION/vllm-kvcached-venv" "vLLM $VLLM_VERSION" \
            "$SCRIPTS/kvcached-vllm-v$VLLM_VERSION.patch" "vllm==$VLLM_VERSION" "${VLLM_PINS[@]}"
        check "$INTEGRATION/vllm-kvcached-venv" vLLM
    fi
    if [ "$which" != vllm ]; then
        for_gpu "$INTEGRATION/sglang-kvcached-venv" "SGLang $SGLANG_VERSION" \
            "$SCRIPTS/kvcached-sglang-v$SGLANG_VERSION.patch" "sglang[all]==$SGLANG_VERSION" \
            "${SGLANG_PINS[@]}"
        check "$INTEGRATION/sglang-kvcached-venv" SGLang
    fi
else
    # Also for SGLang alone: the small model is made there.
    say "vLLM: its CPU package, 0.32.0, instead of $VLLM_VERSION, which runs on GPUs only"
    for_cpu "$INTEGRATION/vllm-kvcached-venv" ../.venv "$ROOT/tools/setup_env.py"
    check "$INTEGRATION/vllm-kvcached-venv" vLLM
    if [ "$which" != vllm ]; then
        say "SGLang $SGLANG_VERSION in plain torch, with stand-ins for its GPU kernels"
        for_cpu "$INTEGRATION/sglang-kvcached-venv" "../.venv-sglang-$SGLANG_VERSION" \
            "$ROOT/tools/setup_sglang.py" "$SGLANG_VERSION"
        check "$INTEGRATION/sglang-kvcached-venv" SGLang
    fi
    say "making the small model of the demo"
    quietly "$INTEGRATION/vllm-kvcached-venv/bin/python" \
        "$INTEGRATION/benchmark/small_model.py" "$INTEGRATION/models"
fi
say "done. Start a server with engine_integration/benchmark/start_server.sh [vllm|sgl]"
