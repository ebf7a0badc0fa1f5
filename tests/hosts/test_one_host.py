"""Without `hosts` a service knows nothing of Ray, also where it is installed."""

from __future__ import annotations

import os
from pathlib import Path

from two_hosts import SOURCE, Served, wait_until


def test_a_service_on_one_host_does_not_import_ray(toy_python: Path, tmp_path: Path) -> None:
    """A module of that name stands first in the path, and tells of its import."""
    traps = tmp_path / "traps"
    traps.mkdir()
    seen = tmp_path / "imported"
    (traps / "ray.py").write_text(f"open({str(seen)!r}, 'w').close()\n")
    environment = {"PYTHONPATH": os.pathsep.join([str(traps), str(SOURCE)])}
    model = {"name": "a", "python": str(toy_python), "environment": {"ENABLE_KVCACHED": "0"}}
    settings = {"listen": "127.0.0.1:0", "memory": {"device": "host:toys"}, "models": [model]}
    served = Served(tmp_path, environment, settings)
    try:
        assert served.ask("a").status_code == 200
        wait_until(lambda: served.ready("a"), "it is ready", 10)
    finally:
        assert served.end() == 0, served.output()
    assert not seen.exists()


def test_the_trap_would_have_closed(toy_python: Path, tmp_path: Path) -> None:
    """With `hosts` the same module is imported: the test above can fail."""
    import subprocess
    import sys

    import yaml

    traps = tmp_path / "traps"
    traps.mkdir()
    seen = tmp_path / "imported"
    (traps / "ray.py").write_text(f"open({str(seen)!r}, 'w').close()\n")
    model = {"name": "a", "python": str(toy_python), "environment": {"ENABLE_KVCACHED": "0"}}
    path = tmp_path / "serve.yaml"
    path.write_text(yaml.safe_dump({"hosts": {}, "models": [model]}))
    ran = subprocess.run(
        [sys.executable, "-m", "kvcached.cli.main", "serve", str(path)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(traps), str(SOURCE)])},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert ran.returncode == 1 and "kvcached[ray]" in ran.stderr, ran.stderr
    assert seen.exists()
