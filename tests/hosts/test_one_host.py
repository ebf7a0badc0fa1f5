"""Without `hosts` a service knows nothing of Ray, also where it is installed."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from two_hosts import SOURCE, Served, wait_until

from kvcached.router.engine_command import misfits
from kvcached.router.settings_file import Problem, SettingsError, load


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


def test_the_check_looks_at_hosts_too(tmp_path: Path) -> None:
    """Fields, and that Ray is there; not at paths, which are other machines'."""
    path = tmp_path / "serve.yaml"
    path.write_text(
        "hosts: {ray: nowhere, lost_after_s: 0, node: [a]}\nmodels: [{name: a, replicas: 0}]\n"
    )
    problems = [str(problem) for problem in problems_of(path)]
    assert len(problems) == 4 and all(":1: hosts." in text for text in problems[:3]), problems
    assert "did you mean nodes" in "\n".join(problems) and "models[0].replicas" in problems[3]
    path.write_text("models: [{name: a, replicas: 2}]\n")
    (problem,) = problems_of(path)
    assert "replicas: more than one needs several hosts" in str(problem)
    path.write_text("hosts: {ray: auto}\nmodels: [{name: a, model: /no/folder, python: /no/one}]\n")
    settings = load(path, {}).settings
    found = list(misfits(settings, {}))
    if has_ray_module():
        assert not found
    else:
        ((where, text),) = found
        assert where == ("hosts",) and "kvcached[ray]" in text


def problems_of(path: Path) -> tuple[Problem, ...]:
    with pytest.raises(SettingsError) as caught:
        load(path, {})
    return caught.value.problems


def has_ray_module() -> bool:
    return importlib.util.find_spec("ray") is not None
