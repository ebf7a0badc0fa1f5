"""A vLLM engine in a process of its own, beside SGLang's: waits for bursts as they do
(``python vllm_process.py JOB``, with the Python of an environment that has vLLM).
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from engine_process import serve_bursts

sys.path.append(str(Path(__file__).parents[1] / "engines"))

import llm_process


def main() -> None:
    job = json.loads(Path(sys.argv[1]).read_text())
    llm = llm_process.build(job)
    serve_bursts(job, lambda: llm_process.generate(llm, job))


if __name__ == "__main__":
    main()
