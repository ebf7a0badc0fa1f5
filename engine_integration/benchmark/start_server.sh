#!/usr/bin/env bash
# Starts an unmodified vLLM or SGLang server; kvcached is switched on by the environment alone.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

usage() {
    cat <<'END'
Usage: ./start_server.sh vllm|sgl [options] [-- arguments of the engine's own]

  --model MODEL    a Hugging Face name or a folder; meta-llama/Llama-3.1-8B on a GPU, the small model
                   of the demo without one
  --port PORT      12346 for vLLM, 30000 for SGLang
  --device DEVICE  auto, cpu or gpu; auto by default
  --plain          without kvcached, to compare
  --capacity SIZE  memory that all engines share on this device, such as 4GiB (KVCACHED_CAPACITY)
  --name NAME      what kvctl and kvtop call it (KVCACHED_NAME)

Start a second one with another --port: they share the memory. Watch them with kvtop, or
  engine_integration/vllm-kvcached-venv/bin/kvctl list
The server runs in the foreground; Ctrl-C ends it. Other KVCACHED_* variables are passed on
(docs/configuration.md).

Examples:
  ./start_server.sh vllm
  ./start_server.sh sgl --port 30001 --capacity 2GiB
  ./start_server.sh vllm --plain -- --max-model-len 4096
END
}

engine=${1:-}
case $engine in
    vllm|sgl) shift ;;
    -h|--help) usage; exit 0 ;;
    *) usage >&2; exit 2 ;;
esac
plain=
while [ $# -gt 0 ]; do
    case $1 in
        --model) MODEL=$2; shift 2 ;;
        --port) PORT=$2; shift 2 ;;
        --device) DEVICE=$2; shift 2 ;;
        --capacity) export KVCACHED_CAPACITY=$2; shift 2 ;;
        --name) export KVCACHED_NAME=$2; shift 2 ;;
        --plain) plain=yes; shift ;;
        --) shift; break ;;
        -h|--help) usage; exit 0 ;;
        *) echo "start_server.sh: unknown option '$1'" >&2; usage >&2; exit 2 ;;
    esac
done
settle "$engine"
case $DEVICE in cpu|gpu) ;; *) fail "--device must be auto, cpu or gpu, not '$DEVICE'" ;; esac

if [ -n "$plain" ]; then
    unset ENABLE_KVCACHED
    echo "start_server.sh: $engine without kvcached: $MODEL on the $DEVICE, port $PORT"
else
    export ENABLE_KVCACHED=true
    echo "start_server.sh: $engine with kvcached: $MODEL on the $DEVICE, port $PORT"
fi
export PATH=$VENV/bin:$PATH TOKENIZERS_PARALLELISM=false
if [ "$DEVICE" = cpu ]; then
    export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
    case $MODEL in /*|.*) export HF_HUB_OFFLINE=1 ;; esac
fi

if [ "$engine" = vllm ]; then
    arguments=(serve "$MODEL" --port "$PORT")
    if [ "$DEVICE" = cpu ]; then
        [ -z "$plain" ] || export VLLM_CPU_KVCACHE_SPACE=${VLLM_CPU_KVCACHE_SPACE:-1}
        arguments+=(--dtype float32 --enforce-eager --max-model-len 2048)
    fi
    exec "$VENV/bin/vllm" "${arguments[@]}" "$@"
fi
arguments=(--model-path "$MODEL" --port "$PORT")
if [ "$DEVICE" = cpu ]; then
    export SGLANG_USE_CPU_ENGINE=1 TRITON_INTERPRET=1
    arguments+=(--device cpu --dtype float32 --attention-backend torch_native)
    arguments+=(--sampling-backend pytorch --disable-cuda-graph --context-length 2048)
    # Old versions choose these by the GPU's memory.
    arguments+=(--chunked-prefill-size 2048 --mem-fraction-static 0.5 --cuda-graph-max-bs 8)
    [ -z "$plain" ] || arguments+=(--max-total-tokens 16384)
fi
exec "$VENV/bin/python" -m sglang.launch_server "${arguments[@]}" "$@"
