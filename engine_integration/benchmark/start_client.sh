#!/usr/bin/env bash
# Measures a running server with the engine's own serving benchmark, with requests of a real trace.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

usage() {
    cat <<'END'
Usage: ./start_client.sh vllm|sgl [options]

  --model MODEL      as given to start_server.sh
  --port PORT        12346 for vLLM, 30000 for SGLang
  --device DEVICE    auto, cpu or gpu: only for the default model
  --requests N       200 on a GPU, 24 without
  --rate RATE        requests a second, arriving at random; 8 on a GPU, 2 without
  --scale N          divides the trace's lengths; 1 on a GPU, 8 without

The requests have the lengths of the Azure LLM inference trace (conversation, 2023), in its order;
their texts are random. Prints throughput, time to first token and time per output token as the
engine's own benchmark does, then the memory of every instance over time, as the ledger said.

Example:
  ./start_client.sh vllm --requests 50 --rate 4
END
}

engine=${1:-}
case $engine in
    vllm|sgl) shift ;;
    -h|--help) usage; exit 0 ;;
    *) usage >&2; exit 2 ;;
esac
while [ $# -gt 0 ]; do
    case $1 in
        --model) MODEL=$2; shift 2 ;;
        --port) PORT=$2; shift 2 ;;
        --device) DEVICE=$2; shift 2 ;;
        --requests) REQUESTS=$2; shift 2 ;;
        --rate) RATE=$2; shift 2 ;;
        --scale) SCALE=$2; shift 2 ;;
        -h|--help) usage; exit 0 ;;
        *) echo "start_client.sh: unknown option '$1'" >&2; usage >&2; exit 2 ;;
    esac
done
settle "$engine"
if [ "$DEVICE" = gpu ]; then
    : "${REQUESTS:=200}" "${RATE:=8}" "${SCALE:=1}"
else
    : "${REQUESTS:=24}" "${RATE:=2}" "${SCALE:=8}"
    case $MODEL in /*|.*) export HF_HUB_OFFLINE=1 ;; esac
fi
unset ENABLE_KVCACHED # this is a client

if ! "$VENV/bin/python" -c "import urllib.request as u; u.urlopen('http://127.0.0.1:$PORT/health', timeout=5)" 2>/dev/null
then
    fail "no server answers on port $PORT: run start_server.sh $engine --port $PORT and wait until it is ready"
fi

out=$INTEGRATION/results/$engine-$(date +%Y%m%d-%H%M%S)
mkdir -p "$out"
"$VENV/bin/python" "$BENCHMARK/trace_dataset.py" --tokenizer "$MODEL" --requests "$REQUESTS" \
    --scale "$SCALE" --out "$out/requests.json"
"$VENV/bin/python" "$BENCHMARK/memory_over_time.py" --out "$out/memory.csv" &
watcher=$!
trap 'kill "$watcher" 2>/dev/null || true' EXIT

common=(--dataset-name sharegpt --dataset-path "$out/requests.json" --num-prompts "$REQUESTS")
common+=(--request-rate "$RATE" --port "$PORT" --host 127.0.0.1 --model "$MODEL" --seed 1)
status=0
if [ "$engine" = vllm ]; then
    if "$VENV/bin/python" -c "import vllm.benchmarks.datasets" >/dev/null 2>&1; then
        "$VENV/bin/vllm" bench serve --backend vllm "${common[@]}" --ignore-eos \
            --save-result --result-dir "$out" --result-filename result.json || status=$?
    else # that of old versions reads no requests from a file
        "$VENV/bin/python" "$BENCHMARK/replay.py" --url "http://127.0.0.1:$PORT" --model "$MODEL" \
            --requests "$out/requests.json" --rate "$RATE" --out "$out/result.json" || status=$?
    fi
else
    "$VENV/bin/python" -m sglang.bench_serving --backend sglang "${common[@]}" \
        --output-file "$out/result.jsonl" || status=$?
fi
kill "$watcher" 2>/dev/null || true
wait "$watcher" 2>/dev/null || true
"$VENV/bin/python" "$BENCHMARK/memory_over_time.py" --show "$out/memory.csv"
echo "results: $out"
exit "$status"
