"""`kvcached serve` as a process of its own, with a settings file, and what its address tells."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import httpx

from kvcached.config import child_environment


class Served:
    """Runs from its making to ``end``; ``python`` is that of the service's environment."""

    def __init__(
        self,
        folder: Path,
        environment: Mapping[str, str],
        settings: Mapping[str, Any],
        python: Path | str = sys.executable,
    ) -> None:
        self.folder = folder
        path = folder / "serve.yaml"
        path.write_text(json.dumps(settings))  # JSON is YAML
        with (folder / "stderr").open("w") as errors:
            self.process = subprocess.Popen(
                [str(python), "-m", "kvcached.cli.main", "serve", str(path), "--json"],
                env=child_environment(environment),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
            )
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line.startswith("{"), line + self.output()
        self.url: str = json.loads(line)["url"]

    def output(self) -> str:
        return (self.folder / "stderr").read_text()

    def status(self) -> dict[str, Any]:
        found: dict[str, Any] = httpx.get(self.url + "/status", timeout=30).json()
        return found

    def engines(self, name: str) -> list[dict[str, Any]]:
        """A model's replicas."""
        return [each for each in self.status()["models"] if each["name"] == name]

    def model(self, name: str) -> dict[str, Any]:
        """A model of which there is one."""
        (found,) = self.engines(name)
        return found

    def end(self) -> int:
        """Ends it as SIGTERM does, or else at once; its exit status."""
        self.process.terminate()
        try:
            return self.process.wait(60)
        finally:
            self.process.kill()
            assert self.process.stdout is not None
            self.process.stdout.close()
