"""The examples are what they claim to be."""

from __future__ import annotations

import configparser
import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from test_serve_command import run

from kvcached.router.settings import ServeSettings
from kvcached.router.settings_file import load

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
KEYS = {"KVCACHED_OPERATOR_KEY": "sk-operators"}


def stop_s(settings: ServeSettings) -> float:
    """The longest that an end takes."""
    return settings.drain_s + max(model.stop_timeout_s for model in settings.models)


@pytest.mark.parametrize("name", ["kvcached.yaml", "cpu.yaml"])
def test_the_settings_pass_the_check(tmp_path: Path, toy_python: Path, name: str) -> None:
    """With the engines and the keys of this machine, and where it has no GPU without sleep modes of
    engines.
    """
    text = (EXAMPLES / "serve" / name).read_text()
    for python in ("/opt/vllm/bin/python", "/opt/sglang/bin/python"):
        text = text.replace(python, str(toy_python))
    key = tmp_path / "key"
    key.write_text("sk-shop")
    text = text.replace("/run/secrets/web-shop-key", str(key)).replace("engine-1", "stop")
    text = text.replace("env:KVCACHED_OPERATOR_KEY", "sk-operators")
    if "python:" not in text:
        text = text.replace("  - name:", f"  - python: {toy_python}\n    name:")
    path = tmp_path / name
    path.write_text(text)
    ran = run(str(path), "--check", "--json")
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert json.loads(ran.stdout)["ok"]


def test_the_unit_leaves_time_to_end_and_engines_alone() -> None:
    unit = configparser.ConfigParser(strict=False, interpolation=None)
    unit.optionxform = str  # type: ignore[assignment,method-assign]
    unit.read(EXAMPLES / "systemd" / "kvcached.service")
    service = unit["Service"]
    assert service["KillMode"] == "mixed"
    assert service["ExecStartPre"] == service["ExecStart"] + " --check"
    assert service["ExecStart"].startswith("/opt/kvcached/bin/kvcached serve ")
    settings = load(EXAMPLES / "serve" / "cpu.yaml", KEYS).settings
    assert float(service["TimeoutStopSec"]) > stop_s(settings)


def test_the_manifests_fit_together(tmp_path: Path) -> None:
    documents = list(yaml.safe_load_all((EXAMPLES / "kubernetes" / "kvcached.yaml").read_text()))
    by_kind: dict[str, Any] = {document["kind"]: document for document in documents}
    assert all(document["apiVersion"] and document["metadata"]["name"] for document in documents)
    path = tmp_path / "serve.yaml"
    path.write_text(by_kind["ConfigMap"]["data"]["serve.yaml"])
    settings = load(path, KEYS).settings
    deployment = by_kind["Deployment"]["spec"]
    pod = deployment["template"]["spec"]
    assert pod["terminationGracePeriodSeconds"] > stop_s(settings)
    assert deployment["replicas"] == 1 and deployment["strategy"]["type"] == "Recreate"
    labels = deployment["template"]["metadata"]["labels"]
    assert deployment["selector"]["matchLabels"] == labels == by_kind["Service"]["spec"]["selector"]
    (container,) = pod["containers"]
    (port,) = container["ports"]
    assert port["containerPort"] == settings.listen.port
    assert by_kind["Service"]["spec"]["ports"][0]["targetPort"] == port["name"]
    volumes = {volume["name"]: volume for volume in pod["volumes"]}
    for each in (*pod["initContainers"], container):
        assert {mount["name"] for mount in each["volumeMounts"]} <= set(volumes)
        assert each["command"][:3] == ["kvcached", "serve", "/etc/kvcached/serve.yaml"]
    claim = volumes["models"]["persistentVolumeClaim"]["claimName"]
    assert claim == by_kind["PersistentVolumeClaim"]["metadata"]["name"]
    assert volumes["settings"]["configMap"]["name"] == by_kind["ConfigMap"]["metadata"]["name"]
