"""The exporter: its metrics against the ledger, promtool's rules, a real Prometheus server."""

from __future__ import annotations

import itertools
import json
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from page_pools import PAGE
from played_engine import Engine
from programs import DEVICE, PAGES, ROOT, exporter, program
from prometheus_client.parser import text_string_to_metric_families

from kvcached.ledger import Ledger
from kvcached.ports import free_port

EXAMPLES = ROOT / "examples" / "monitoring"
TOKEN = "correct-horse-battery"


@pytest.fixture
def address(folder: Path, engines: dict[str, Engine], tmp_path: Path) -> Iterator[str]:
    token = tmp_path / "token"
    token.write_text(TOKEN + "\n")
    arguments = ("--token-file", str(token), "--interval", "0.1")
    with exporter(folder, tmp_path / "log", *arguments) as url:
        yield url


def samples(address: str) -> dict[tuple[str, frozenset[tuple[str, str]]], float]:
    text = httpx.get(f"{address}/metrics").text
    families = text_string_to_metric_families(text)
    return {
        (sample.name, frozenset(sample.labels.items())): sample.value
        for family in families
        for sample in family.samples
    }


def test_metrics_are_what_the_ledger_says(address: str, ledger: Ledger) -> None:
    ledger.set_limit("chat", 20 * PAGE)
    found, now = samples(address), ledger.snapshot()
    device = {("device", DEVICE)}
    assert found["kvcached_device_capacity_bytes", frozenset(device)] == PAGES * PAGE
    assert found["kvcached_device_charged_bytes", frozenset(device)] == now.charge
    assert found["kvcached_device_free_bytes", frozenset(device)] == now.free
    for account in now.accounts:
        labels = {*device, ("instance", account.instance), ("name", account.name)}

        def value(name: str, *more: tuple[str, str], labels: Any = labels) -> float | None:
            return found.get((f"kvcached_instance_{name}", frozenset({*labels, *more})))

        assert value("charged_bytes") == account.charge
        assert value("demand_bytes") == account.demand
        assert value("leases_granted_total") == account.granted > 0
        assert value("mapped_bytes_total") == account.created_ever >= account.created
        assert value("prefix_miss_blocks_total") == account.misses > 0
        assert value("limit_bytes") == account.limit
        assert value("lease_wait_seconds_count") == account.waits
        states = [
            value("memory_bytes", ("state", state))
            for state in ("in_use", "cached", "warm", "in_transit")
        ]
        assert states[:3] == [account.in_use, account.cached, account.warm]
        assert sum(size for size in states if size is not None) == account.charge


def test_waits_are_a_histogram_in_seconds(address: str, ledger: Ledger) -> None:
    account = ledger.join("late", "late")
    ledger.set_limit("late", PAGE)
    account.set_demand(2 * PAGE)
    assert not account.lease(2 * PAGE)
    time.sleep(0.003)
    ledger.set_limit("late", None)
    assert account.lease(2 * PAGE)
    labels = {("device", DEVICE), ("instance", "late"), ("name", "late")}
    found = samples(address)
    assert found["kvcached_instance_lease_wait_seconds_count", frozenset(labels)] == 1
    assert found["kvcached_instance_lease_wait_seconds_sum", frozenset(labels)] >= 0.003
    name = "kvcached_instance_lease_wait_seconds_bucket"
    bounds = [0.000256 * 2**i for i in range(12)]
    values = [found[name, frozenset({*labels, ("le", f"{bound:g}")})] for bound in bounds]
    assert values == sorted(values) and values[0] == 0 and values[-1] == 1
    account.close()


def test_promtool_finds_nothing_to_say(address: str) -> None:
    text = httpx.get(f"{address}/metrics").content
    done = subprocess.run(
        [program("promtool"), "check", "metrics"], input=text, capture_output=True
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")


def test_openmetrics_is_spoken_to_who_asks_for_it(address: str) -> None:
    accept = {"Accept": "application/openmetrics-text; version=1.0.0"}
    reply = httpx.get(f"{address}/metrics", headers=accept)
    assert "openmetrics" in reply.headers["Content-Type"] and reply.text.endswith("# EOF\n")


class Prometheus:
    """A real server that scrapes the exporter ten times a second, with the project's own rules."""

    def __init__(self, folder: Path, target: str) -> None:
        self.url = f"http://127.0.0.1:{free_port()}"
        configuration = (EXAMPLES / "prometheus.yml").read_text()
        configuration = configuration.replace("127.0.0.1:9877", target.removeprefix("http://"))
        configuration = re.sub(r"_interval: \S+", "_interval: 200ms", configuration)
        (folder / "prometheus.yml").write_text(configuration)
        shutil.copy(EXAMPLES / "alerts.yml", folder)
        self.log = folder / "prometheus.log"
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [
                    program("prometheus"),
                    f"--config.file={folder / 'prometheus.yml'}",
                    f"--storage.tsdb.path={folder / 'data'}",
                    f"--web.listen-address={self.url.removeprefix('http://')}",
                ],
                stdout=log,
                stderr=subprocess.STDOUT,
            )

    def get(self, path: str, **parameters: str) -> Any:
        reply = httpx.get(f"{self.url}/api/v1/{path}", params=parameters)
        assert reply.status_code == 200, reply.text
        return reply.json()["data"]

    def query(self, expression: str) -> list[Any]:
        return list(self.get("query", query=expression)["result"])

    def until(self, condition: Callable[[], bool], limit_s: float = 30.0) -> None:
        end_s = time.monotonic() + limit_s
        while True:
            assert self.process.poll() is None, self.log.read_text()
            try:
                if condition():
                    return
            except httpx.TransportError:
                pass
            assert time.monotonic() < end_s, self.log.read_text()
            time.sleep(0.1)

    def close(self) -> None:
        self.process.terminate()
        self.process.wait(20)


@pytest.fixture
def prometheus(address: str, tmp_path: Path) -> Iterator[Prometheus]:
    server = Prometheus(tmp_path, address)
    try:
        server.until(lambda: httpx.get(f"{server.url}/-/ready").status_code == 200)
        server.until(lambda: bool(server.query("kvcached_instance_charged_bytes")))
        yield server
    finally:
        server.close()


def expressions() -> list[str]:
    """Every expression of the Grafana dashboard, with Grafana's own variables filled in."""
    dashboard = json.loads((EXAMPLES / "grafana-dashboard.json").read_text())
    found = [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]
    filled = {"$device": ".*", "$__rate_interval": "1m"}
    for name, value in filled.items():
        found = [expression.replace(name, value) for expression in found]
    return found


def test_a_real_prometheus_scrapes_and_answers(
    prometheus: Prometheus, ledger: Ledger, engines: dict[str, Engine]
) -> None:
    result = prometheus.query('kvcached_instance_charged_bytes{name="chat"}')
    assert [int(each["value"][1]) for each in result] == [engines["chat"].one.account.charge()]
    total = prometheus.query("sum(kvcached_instance_memory_bytes)")
    assert int(total[0]["value"][1]) == ledger.snapshot().charge
    assert "$" not in "".join(expressions())
    for expression in expressions():
        prometheus.query(expression)
    # Of the expressions that are no rates, each finds something (chat has a limit from here on).
    ledger.set_limit("chat", 20 * PAGE)
    prometheus.until(lambda: bool(prometheus.query("kvcached_instance_limit_bytes")))
    for expression in expressions():
        if "rate(" not in expression:
            assert prometheus.query(expression), expression


def test_the_alert_rules_load_and_one_is_pending(prometheus: Prometheus, ledger: Ledger) -> None:
    def rules() -> dict[str, Any]:
        groups = prometheus.get("rules")["groups"]
        return {rule["name"]: rule for group in groups for rule in group["rules"]}

    names = re.findall(r"alert: (\w+)", (EXAMPLES / "alerts.yml").read_text())
    prometheus.until(lambda: all(rule["health"] == "ok" for rule in rules().values()))
    assert sorted(rules()) == sorted(names) and len(names) == 7
    ledger.set_limit("chat", 0)
    prometheus.until(lambda: rules()["KvcachedOverLimit"]["state"] == "pending")


def test_the_rules_pass_promtool() -> None:
    command = [program("promtool"), "check", "rules", str(EXAMPLES / "alerts.yml")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0 and "7 rules found" in done.stdout, done.stderr


def test_grafanas_dashboard_is_whole() -> None:
    dashboard = json.loads((EXAMPLES / "grafana-dashboard.json").read_text())
    panels = dashboard["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    for first, second in itertools.combinations((panel["gridPos"] for panel in panels), 2):
        beside = first["x"] + first["w"] <= second["x"] or second["x"] + second["w"] <= first["x"]
        below = first["y"] + first["h"] <= second["y"] or second["y"] + second["h"] <= first["y"]
        assert beside or below
    assert {each["name"] for each in dashboard["templating"]["list"]} == {"datasource", "device"}


def post(address: str, body: Any, token: str | None = TOKEN) -> httpx.Response:
    headers = {} if token is None else {b"Authorization": f"Bearer {token}".encode("latin-1")}
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    return httpx.post(f"{address}/api/v1/limit", content=content, headers=headers)


def test_a_limit_changes_only_with_the_token(address: str, ledger: Ledger) -> None:
    wanted = {"device": DEVICE, "instance": "chat", "limit": "50%"}
    for token in (None, ".", "wrong", TOKEN + "x", TOKEN[:-1], "\xe9"):
        assert post(address, wanted, token).status_code == 401
    assert ledger.snapshot().accounts[0].limit is None
    done = post(address, wanted)
    assert done.status_code == 200 and done.json()["limit"] == PAGES * PAGE // 2
    account = ledger.snapshot().account("chat")
    assert account is not None and account.limit == PAGES * PAGE // 2
    assert post(address, {**wanted, "limit": None}).json()["limit"] is None


def test_wrong_requests_are_told_what_is_wrong(address: str) -> None:
    wanted = {"device": DEVICE, "instance": "chat", "limit": "50%"}
    for body in (
        *(b"", b"{", b"[" * 4000, b"null", b"\xff"),
        *({**wanted, "limit": limit} for limit in ("much", -1, 1.5, True, [], 1 << 70)),
        *({**wanted, "instance": name} for name in ("nobody", 5, None)),
        *({**wanted, "device": name} for name in ("", "nowhere", "../etc", 7)),
        {"device": DEVICE},
    ):
        reply = post(address, body)
        assert reply.status_code == 400 and reply.json()["error"], body
    none = post(address, {**wanted, "device": "host:none"})
    assert none.status_code == 409 and "no ledger" in none.json()["error"]
    assert post(address, b"x" * 5000).status_code == 400
    assert httpx.post(f"{address}/metrics", content=b"").status_code == 404
    assert httpx.get(f"{address}/../../etc/passwd").status_code == 404
    assert httpx.get(f"{address}/api/v1/state?after=x").status_code == 200
    assert httpx.get(f"{address}/healthz").text == "ok\n"


def test_without_a_token_nothing_can_be_changed(
    folder: Path, engines: dict[str, Engine], tmp_path: Path
) -> None:
    with exporter(folder, tmp_path / "log") as address:
        wanted = {"device": DEVICE, "instance": "chat", "limit": "50%"}
        for token in (None, ".", "None"):
            assert post(address, wanted, token).status_code == 403
        assert httpx.get(f"{address}/api/v1/state").json()["can_change"] is False


def test_the_state_goes_on_where_it_was_left(address: str, ledger: Ledger) -> None:
    first = httpx.get(f"{address}/api/v1/state").json()
    assert [event["event"] for event in first["events"]][:3] == ["ledger", "joined", "ready"]
    ledger.set_weight("chat", 2)
    later, end_s = first, time.monotonic() + 20
    while later is first or not (later["events"] or time.monotonic() > end_s):
        later = httpx.get(f"{address}/api/v1/state?after={first['sequence']}").json()
    assert [event["event"] for event in later["events"]] == ["weight"]
    assert later["samples"][0]["sequence"] == first["sequence"] + 1
    assert later["devices"][0]["accounts"][0]["weight"] == 2


def test_wrong_options_are_one_line(folder: Path, tmp_path: Path) -> None:
    short = tmp_path / "short"
    short.write_text("abc")
    for arguments, words in (
        (("--token-file", str(short)), "at least 16"),
        (("--token-file", str(tmp_path / "none")), "No such file"),
        (("--host", "203.0.113.1"), "203.0.113.1"),
        (("--port", "99999"), "65535"),
    ):
        command = [sys.executable, "-m", "kvcached.cli.main", "exporter", "--port", "0"]
        done = subprocess.run([*command, *arguments], capture_output=True, text=True, timeout=30)
        assert done.returncode == 2 and words in done.stderr and done.stderr.count("\n") == 1
