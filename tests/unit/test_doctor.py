"""``kvcached doctor``: each thing that can be wrong is made wrong, and named with what to do."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import pytest
from kvctl_runs import validator
from ledger_process import CAPACITY, Remote, wait_until

from kvcached import strangers
from kvcached.cli import main
from kvcached.cli.doctor import engines
from kvcached.config import child_environment
from kvcached.ledger import Ledger

DEVICE = f"host:doctor-{os.getpid()}"  # nobody else has it: doctor looks at all processes
GPU = "GPU-0a1b2c3d"


class Doctor:
    def __init__(self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
        self._patch, self._capsys = monkeypatch, capsys

    def __call__(self, *arguments: str) -> tuple[int, list[dict[str, str]]]:
        code, out = self.text("--json", *arguments)
        found = json.loads(out)
        validator().validate(found)
        assert found["ok"] is (code == 0)
        assert all(each["do"] for each in found["findings"] if each["level"] in BAD)
        return code, found["findings"]

    def text(self, *arguments: str) -> tuple[int, str]:
        self._patch.setattr(sys, "argv", ["kvcached", "doctor", *arguments])
        with pytest.raises(SystemExit) as ended:
            main.main()
        return int(ended.value.code or 0), self._capsys.readouterr().out


BAD = ("warning", "error")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in os.environ:
        if name.startswith("KVCACHED_") or name in ("ENABLE_KVCACHED", "VLLM_PLUGINS"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("KVCACHED_DIR", str(tmp_path / "ledger"))
    return tmp_path / "ledger"


@pytest.fixture
def doctor(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Doctor:
    return Doctor(monkeypatch, capsys)


@pytest.fixture
def ledger(folder: Path) -> Iterator[Ledger]:
    with Ledger.open(folder, DEVICE, CAPACITY) as opened:
        yield opened


def named(found: list[dict[str, str]], check: str, level: str) -> str:
    """The text of the one finding of this kind."""
    (one,) = [each for each in found if (each["check"], each["level"]) == (check, level)]
    return f"{one['text']} -> {one['do']}"


def test_a_healthy_machine(doctor: Doctor, ledger: Ledger) -> None:
    code, found = doctor()
    assert code == 0 and not [each for each in found if each["level"] == "error"]
    assert "kvcached" in named(found, "core", "ok")
    assert "can be had" in named(found, "host memory", "ok")
    assert "mode 700" in named(found, "folder", "ok")
    assert f"{DEVICE}: 0 instances" in named(found, "ledger", "ok")
    assert "ENABLE_KVCACHED=true" in named(found, "switch", "note")
    code, text = doctor.text()
    assert code == 0 and text.endswith("0 errors, 0 warnings\n")


def run_apart(*arguments: str, before: str = "", **environment: str) -> tuple[int, Any, str]:
    """In a process of its own, which ``before`` prepares; also what it has imported of engines."""
    script = (
        f"{before}\nimport sys, kvcached.cli.main as m\n"
        f"sys.argv = ['kvcached', 'doctor', '--json', *{arguments!r}]\n"
        "try: m.main()\n"
        "finally: print({*sys.modules} & {'torch', 'vllm', 'sglang', 'numpy'}, file=sys.stderr)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
    )
    return done.returncode, json.loads(done.stdout)["findings"], done.stderr


def test_a_core_that_does_not_load_is_a_finding(folder: Path) -> None:
    before = "import sys; sys.modules['kvcached.vmm_ops'] = None"
    code, found, err = run_apart(before=before)
    assert code == 1 and "does not load" in named(found, "core", "error")
    assert "build it for this Python" in named(found, "core", "error")
    assert err == "set()\n"


@pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed")
def test_the_installed_vllm_is_supported_and_hooked_up(folder: Path) -> None:
    """Found without importing it."""
    code, found, err = run_apart("--engine", "vllm", ENABLE_KVCACHED="1")
    version = importlib.metadata.version("vllm")
    assert f"vllm {version}: supported" in named(found, "engine vllm", "ok")
    assert "entry point vllm.general_plugins active" in named(found, "engine vllm", "ok")
    assert named(found, "switch", "ok").startswith("ENABLE_KVCACHED is on")
    assert code == 0 and err == "set()\n"


def make_engine(site: Path, name: str, version: str) -> str:
    """An engine as it lies in site-packages, which nobody may import."""
    (site / name).mkdir(parents=True)
    (site / name / "__init__.py").write_text("raise AssertionError('it was imported')")
    info = site / f"{name}-{version}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    return os.pathsep.join([str(site), os.environ.get("PYTHONPATH", "")])


@pytest.mark.parametrize("name", ["vllm", "sglang"])
def test_a_version_without_an_adapter(folder: Path, tmp_path: Path, name: str) -> None:
    path = make_engine(tmp_path / "site", name, "99.1.0")
    code, found, _ = run_apart("--engine", name, PYTHONPATH=path)
    text = named(found, f"engine {name}", "error")
    assert code == 1 and f"{name} 99.1.0 is not supported" in text
    assert "install a supported version" in text


def test_an_engine_that_never_calls_kvcached(
    doctor: Doctor, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = make_engine(tmp_path / "site", "vllm", "0.32.1")
    code, found, _ = run_apart("--engine", "vllm", PYTHONPATH=path, VLLM_PLUGINS="lora, other")
    text = named(found, "engine vllm", "error")
    assert code == 1 and "VLLM_PLUGINS='lora, other' leaves kvcached out" in text
    code, found, _ = run_apart("--engine", "vllm", PYTHONPATH=path, VLLM_PLUGINS="x,kvcached")
    assert code == 0 and "active" in named(found, "engine vllm", "ok")
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    monkeypatch.setattr(importlib.metadata, "entry_points", lambda **_: ())
    code, found = doctor("--engine", "vllm")
    assert code == 1 and "vllm never calls it" in named(found, "engine vllm", "error")


@pytest.mark.parametrize("there", [True, False])
def test_an_old_engine_needs_the_startup_file(folder: Path, tmp_path: Path, there: bool) -> None:
    """In an environment of its own, which has this kvcached's file in its site-packages or not."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path / "env"], check=True)
    (site,) = (tmp_path / "env" / "lib").glob("python*/site-packages")
    source = Path(main.__file__).parents[2]
    here = sysconfig.get_path("purelib")
    (site / "paths.pth").write_text(f"{source}\n{here}\n")
    make_engine(site, "sglang", "0.4.6.post2")
    if there:
        shutil.copy(source / "kvcached.pth", site)
    doctor = [tmp_path / "env" / "bin" / "python", "-m", "kvcached.cli.main", "doctor"]
    done = subprocess.run(
        [*doctor, "--engine", "sglang", "--json"],
        capture_output=True,
        text=True,
        env=child_environment({"KVCACHED_DIR": str(folder), "PYTHONPATH": ""}),
    )
    found = json.loads(done.stdout)["findings"]
    if there:
        assert done.returncode == 0
        assert "start-up file kvcached.pth active" in named(found, "engine sglang", "ok")
    else:
        assert done.returncode == 1
        text = named(found, "engine sglang", "error")
        assert "kvcached.pth is not active" in text and str(site) in text


def test_an_engine_that_is_not_there(doctor: Doctor, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engines, "_version", lambda hook: None)
    code, found = doctor("--engine", "vllm")
    assert code == 1 and "not installed" in named(found, "engine vllm", "error")
    assert doctor("--engine", "toaster")[0] == 1
    code, found = doctor()
    assert code == 0 and "~=0.32.0" in named(found, "engines", "note")


def test_variables(doctor: Doctor, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KVCACHED_LIMITS", "2GiB")
    code, found = doctor()
    assert code == 0 and "did you mean KVCACHED_LIMIT?" in named(found, "variables", "warning")
    assert doctor("--strict")[0] == 1
    monkeypatch.setenv("KVCACHED_LIMIT", "much")
    code, found = doctor()
    assert code == 1 and "'much'" in named(found, "variables", "error")


def test_the_folder(doctor: Doctor, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "the first engine makes it" in named(doctor()[1], "folder", "note")
    folder.mkdir()
    folder.chmod(0o770)
    code, found = doctor()
    assert code == 1 and f"chmod go-w {folder}" in named(found, "folder", "error")
    folder.rmdir()
    folder.write_text("")
    assert "is not a folder" in named(doctor()[1], "folder", "error")
    monkeypatch.setenv("KVCACHED_DIR", str(folder / "below"))
    assert doctor()[0] == 1


@pytest.mark.skipif(os.getuid() != 0, reason="only root can run a command as somebody else")
def test_a_folder_that_may_not_be_read(folder: Path, ledger: Ledger) -> None:
    for path in folder.parents[:3]:
        path.chmod(0o755)
    command = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", sys.executable]
    if subprocess.run([*command, "-c", "import kvcached"]).returncode != 0:
        pytest.skip("this checkout cannot be read by another user")
    done = subprocess.run(
        [*command, "-m", "kvcached.cli.main", "doctor", "--json"], capture_output=True, text=True
    )
    text = named(json.loads(done.stdout)["findings"], "folder", "error")
    assert done.returncode == 1 and "user 65534 may not look into it" in text
    for tool in (["kvctl", "list"], ["main", "list"], ["top.command", "--once"]):
        module, *words = tool
        said = subprocess.run(
            [*command, "-m", f"kvcached.cli.{module}", *words], capture_output=True, text=True
        )
        assert said.returncode == 1 and said.stderr.count("\n") == 1
        assert said.stderr.endswith(f"{folder}: Permission denied\n")


def test_leftovers_of_the_dead(doctor: Doctor, ledger: Ledger, folder: Path) -> None:
    remote = Remote(folder, DEVICE)
    remote.run("account = ledger.join('id', 'chat')")
    assert not [each for each in doctor()[1] if each["check"] == "leftovers"]
    remote.kill()
    wait_until(lambda: not ledger.snapshot().accounts[0].alive)
    code, found = doctor()
    assert code == 0 and "chat -> kvctl delete" in named(found, "leftovers", "warning")


def test_a_ledger_of_another_version_or_capacity(
    doctor: Doctor, ledger: Ledger, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder / "ledger-host-old").write_bytes(b"KVCLEDGR" + b"\x01" + bytes(200))
    code, found = doctor()
    text = named(found, "ledger", "error")
    assert code == 1 and "kvctl delete --ledger --device host:old" in text
    (folder / "ledger-host-old").unlink()
    monkeypatch.setenv("KVCACHED_DEVICE", DEVICE)
    monkeypatch.setenv("KVCACHED_CAPACITY", "7MiB")
    code, found = doctor()
    assert code == 1 and "7 MiB, the ledger's capacity 100 MiB" in named(found, "capacity", "error")


@pytest.mark.parametrize(("device", "level"), [("host:twice", "warning"), (GPU, "error")])
def test_two_ledgers_on_one_device(
    doctor: Doctor, folder: Path, tmp_path: Path, device: str, level: str
) -> None:
    """As in two containers that mount different folders."""
    remotes = [Remote(path, device) for path in (folder, tmp_path / "elsewhere")]
    for remote in remotes:
        remote.run("account = ledger.join('id', 'chat')")
    code, found = doctor()
    text = named(found, "two ledgers", level)
    assert code == (level == "error") and "KVCACHED_DIR" in text
    for remote, path in zip(remotes, (folder, tmp_path / "elsewhere"), strict=True):
        assert f"{path}/ledger-{device.replace(':', '-')} (processes {remote.pid})" in text
        remote.kill()


def test_a_ledger_that_was_deleted_under_its_engines(doctor: Doctor, folder: Path) -> None:
    remote = Remote(folder, DEVICE)
    remote.run("account = ledger.join('id', 'chat')")
    next(folder.glob("ledger-host-doctor-*")).unlink()
    text = named(doctor()[1], "two ledgers", "error")
    assert f"deleted while processes {remote.pid} use it" in text
    remote.kill()


def test_strangers_are_those_that_the_ledger_does_not_know(ledger: Ledger) -> None:
    account = ledger.join("id", "chat")
    processes = {os.getpid(): 5, 4194304: 7}
    assert strangers.strangers(processes, ledger.snapshot()) == {4194304: 7}
    assert strangers.strangers(processes, None) == processes
    account.close()


class DriversView:
    """What the driver's library would say of a GPU."""

    processes_: ClassVar[dict[int, int]] = {}

    def __init__(self, uuid: str) -> None:
        self.uuid = uuid

    def processes(self) -> dict[int, int]:
        return self.processes_


@pytest.fixture
def in_a_container(folder: Path) -> Iterator[tuple[Remote, int]]:
    """An engine's process in a PID namespace of its own, and its id out here."""
    if os.getuid() != 0:
        pytest.skip("only root can make a PID namespace")
    remote = Remote(folder, GPU, "unshare", "--pid", "--fork", "--mount-proc")
    try:
        assert remote.run("import os", "os.getpid()") == 1
        children = Path(f"/proc/{remote.pid}/task/{remote.pid}/children").read_text()
        yield remote, int(children)
        os.kill(int(children), signal.SIGKILL)
    finally:
        remote.kill()


def test_an_engine_in_a_container_is_no_stranger_to_the_host(
    in_a_container: tuple[Remote, int], doctor: Doctor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its process id in the ledger is the container's, and the driver says the host's."""
    remote, outside = in_a_container
    remote.run("account = ledger.join('id', 'chat')")
    monkeypatch.setattr("kvcached.nvml.uuids", lambda: [GPU])
    monkeypatch.setattr("kvcached.nvml.Gpu", DriversView)
    monkeypatch.setattr(DriversView, "processes_", {outside: 5 << 30})
    assert "all 1 processes on it are in its ledger" in named(doctor()[1], "strangers", "ok")

    monkeypatch.setattr(DriversView, "processes_", {outside: 5 << 30, remote.pid: 2 << 30})
    text = named(doctor()[1], "strangers", "note")
    assert f": {remote.pid} (unshare) 2 GiB" in text and str(outside) not in text

    # As the doctor in a container would see it: no such process.
    monkeypatch.setattr(DriversView, "processes_", {4194304: 5 << 30})
    text = named(doctor()[1], "strangers", "note")
    assert "1 processes with 5 GiB are not of this PID namespace" in text and "on the host" in text
