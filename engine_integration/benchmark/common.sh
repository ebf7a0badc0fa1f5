# What start_server.sh and start_client.sh share. Sourced.
INTEGRATION=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
ROOT=$(dirname "$INTEGRATION")
BENCHMARK=$INTEGRATION/benchmark
GPU_MODEL=meta-llama/Llama-3.1-8B
SMALL_MODEL=$INTEGRATION/models/smollm2-135m

fail() { echo "$(basename "$0"): $*" >&2; exit 1; }

# Sets VENV, PORT, MODEL and DEVICE for the engine $1, unless they are set.
settle() {
    case $1 in
        vllm) VENV=$INTEGRATION/vllm-kvcached-venv; PORT=${PORT:-12346} ;;
        sgl) VENV=$INTEGRATION/sglang-kvcached-venv; PORT=${PORT:-30000} ;;
    esac
    [ -x "$VENV/bin/python" ] || fail "$VENV is not there: run engine_integration/scripts/setup.sh first"
    if [ -z "${DEVICE:-}" ] || [ "$DEVICE" = auto ]; then
        DEVICE=cpu
        if command -v nvidia-smi >/dev/null && nvidia-smi -L 2>/dev/null | grep -q GPU; then
            DEVICE=gpu
        fi
    fi
    if [ -z "${MODEL:-}" ]; then
        MODEL=$GPU_MODEL
        [ "$DEVICE" = gpu ] || MODEL=$SMALL_MODEL
    fi
    if [ "$MODEL" = "$SMALL_MODEL" ] && [ ! -d "$MODEL" ]; then
        fail "the small model is not there: run engine_integration/scripts/setup.sh --cpu first"
    fi
}
