"""A program that behaves as an engine does from outside: processes, a port, HTTP, log lines.

It stands where `vllm` stands beside a Python. TOY_* variables say how it misbehaves. It keeps a
record of what it was asked, a line each, in TOY_RECORD.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, urlsplit


class Toy:
    def __init__(self, names: list[str]) -> None:
        self.names = names
        self.asleep: set[str] = set()
        self.tokens = 0
        self.lock = threading.Lock()

    def record(self, line: str) -> None:
        if path := os.environ.get("TOY_RECORD"):
            with self.lock, open(path, "a") as stream:
                stream.write(line + "\n")


class Handler(BaseHTTPRequestHandler):
    toy: Toy

    def log_message(self, *_: object) -> None:
        pass

    def _answer(self, body: object, status: int = 200) -> None:
        data = json.dumps(body).encode() if not isinstance(body, str) else body.encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def _refused(self) -> bool:
        """As vLLM, it wants its key for what begins with /v1, and for nothing else."""
        key = os.environ.get("VLLM_API_KEY")
        if not key or not self.path.startswith("/v1"):
            return False
        if self.headers.get("Authorization") == f"Bearer {key}":
            return False
        self._answer({"error": "Unauthorized"}, 401)
        return True

    def do_GET(self) -> None:
        if self._refused():
            return
        if self.path == "/health":
            time.sleep(float(os.environ.get("TOY_HEALTH_S", "0")))
            self._answer({})
        elif self.path == "/v1/models":
            self._answer({"data": [{"id": name} for name in self.toy.names]})
        elif self.path == "/is_sleeping":
            self._answer({"is_sleeping": bool(self.toy.asleep)})
        elif self.path == "/metrics":
            text = 'vllm:num_requests_running{engine="0"} 1.0\n'
            text += f'vllm:generation_tokens_total{{engine="0"}} {self.toy.tokens}\n'
            self._answer(text + "vllm:prompt_tokens_total 7\n")
        else:
            self._answer({}, 404)

    def do_POST(self) -> None:
        where = urlsplit(self.path)
        query = parse_qs(where.query)
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if self._refused():
            return
        self.toy.record(f"POST {self.path} {body.decode()}".rstrip())
        if where.path in os.environ.get("TOY_REFUSES", "").split(","):
            self._answer({"error": "no"}, 500)
            return
        if where.path in ("/sleep", "/release_memory_occupation"):
            time.sleep(float(os.environ.get("TOY_SLEEP_S", "0")))
            self.toy.asleep = {"weights", "kv_cache"}
        elif where.path in ("/wake_up", "/resume_memory_occupation"):
            time.sleep(float(os.environ.get("TOY_SLEEP_S", "0")))
            self.toy.asleep -= set(query.get("tags", ["weights", "kv_cache"]))
        elif where.path == "/v1/completions":
            status = 503 if self.toy.asleep else 200
            time.sleep(json.loads(body).get("seconds", 0))
            self._answer({"pid": os.getpid(), "model": self.toy.names[0]}, status)
            return
        self._answer({})


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--port", type=int)
    parser.add_argument("--host")
    parser.add_argument("--served-model-name", nargs="+")
    known, rest = parser.parse_known_args()
    toy = Toy(known.served_model_name)
    toy.record("START " + json.dumps(rest))
    print("a toy starts", flush=True)
    if os.environ.get("TOY_IGNORES_TERM"):
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    # A second process, as engines have them, that survives the first one's death.
    subprocess.Popen(["sleep", "600"], env={}, stdout=sys.stdout)
    time.sleep(float(os.environ.get("TOY_START_S", "0")))
    if fails := os.environ.get("TOY_FAILS"):
        with open(os.environ["TOY_RECORD"]) as stream:
            starts = sum(line.startswith("START") for line in stream)
        if starts <= int(fails):
            print(f"no luck with start {starts}", flush=True)
            raise SystemExit(3)
    Handler.toy = toy
    ThreadingHTTPServer((known.host, known.port), Handler).serve_forever()


if __name__ == "__main__":
    main()
