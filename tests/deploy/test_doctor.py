"""Each check on machines that are fine and on machines that are not."""

from __future__ import annotations

import json
import socket
from pathlib import Path

import pytest

from deploy import cli
from deploy.config import ServeConfig
from deploy.doctor import Level, Machine, describe, examine, exit_status
from deploy.launch import read_config
from tests.baton_process import free_port

FINE = {"jax": "0.10.2", "jaxlib": "0.10.2", "flax": "0.12.8", "ray": "2.60.0", "uvicorn": "0.54.0", "fastapi": "0.165"}


class FakeMachine(Machine):
    def __init__(self, **facts: object) -> None:
        self.facts = {
            "version": (3, 12, 1),
            "packages": FINE,
            "chips": 0,
            "series": "",
            "baton": False,
            "users": [],
            "free": 100.0,
            "files": 65536,
            "clock": "yes",
            "compiler": "/usr/bin/c++",
            "dns": True,
            **facts,
        }

    def python(self):
        return self.facts["version"]

    def package(self, name: str):
        return self.facts["packages"].get(name)

    def runs_baton(self, port: int):
        return self.facts["baton"]

    def libtpu_of_jax(self):
        return self.facts["series"]

    def tpu_chips(self):
        return self.facts["chips"]

    def tpu_users(self):
        return self.facts["users"]

    def free_gib(self, path: Path):
        return self.facts["free"]

    def open_files(self):
        return self.facts["files"]

    def compiler(self):
        return self.facts["compiler"]

    def clock(self):
        return self.facts["clock"]

    def resolves(self, name: str):
        return self.facts["dns"]


def config(*flags: str) -> ServeConfig:
    return read_config(["--port", str(free_port()), *flags], None)


def bad(machine: Machine, *flags: str, secret: bytes | None = None) -> dict[str, Level]:
    findings = examine(machine, config(*flags), secret)
    assert all(bool(finding.fix) is (finding.level is not Level.OK) for finding in findings)
    return {finding.check: finding.level for finding in findings if finding.level is not Level.OK}


def test_a_fine_machine() -> None:
    assert bad(FakeMachine()) == {}
    assert (
        bad(FakeMachine(chips=8, packages=FINE | {"libtpu": "0.0.40"}), "--fleet.tpus_per_worker", "8", "--tp", "8")
        == {}
    )


@pytest.mark.parametrize(
    ("facts", "flags", "expected"),
    [
        ({"version": (3, 10, 12)}, [], {"python": Level.FAIL}),
        ({"packages": FINE | {"jax": "0.9.1", "jaxlib": "0.9.1"}}, [], {"jax": Level.FAIL}),
        ({"packages": FINE | {"jaxlib": "0.9.0"}}, [], {"jaxlib": Level.FAIL}),
        ({"packages": {k: v for k, v in FINE.items() if k != "ray"}}, [], {"ray": Level.FAIL}),
        ({}, ["--fleet.tpus_per_worker", "4"], {"tpu": Level.FAIL}),
        ({"chips": 8}, [], {"tpu": Level.FAIL}),
        ({"chips": 4, "packages": FINE | {"libtpu": "1"}}, ["--tp", "8"], {"tpu": Level.FAIL}),
        ({"chips": 4, "packages": FINE | {"libtpu": "1"}, "users": ["python (7)"]}, [], {"tpu in use": Level.WARN}),
        (
            {"chips": 4, "packages": FINE | {"libtpu": "0.0.51.1"}, "series": "0.0.50"},
            ["--tp", "4"],
            {"libtpu": Level.WARN},
        ),
        ({"chips": 4, "packages": FINE | {"libtpu": "0.0.50.1"}, "series": "0.0.50"}, ["--tp", "4"], {}),
        ({"free": 0.5}, [], {"/dev/shm": Level.WARN, "compile cache": Level.WARN}),
        ({"free": 0.5}, ["--compile_cache", ""], {"/dev/shm": Level.WARN}),
        ({"files": 1024}, [], {"open files": Level.WARN}),
        ({"compiler": None}, [], {"C++ compiler": Level.WARN}),
        ({"compiler": None}, ["--compile_cache", ""], {}),
        ({"clock": "no"}, [], {"clock": Level.WARN}),
        ({"dns": False}, ["--model", "Qwen/Qwen3-8B"], {"model": Level.WARN}),
        ({}, ["--fleet.host", "node"], {"secret": Level.FAIL}),
    ],
)
def test_what_is_found(facts: dict, flags: list[str], expected: dict[str, Level]) -> None:
    assert bad(FakeMachine(**facts), *flags) == expected


def test_a_port_in_use_and_a_secret_that_is_given() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        findings = examine(FakeMachine(), config("--port", str(taken.getsockname()[1])), None)
        serving = examine(FakeMachine(baton=True), config("--port", str(taken.getsockname()[1])), None)
    assert [f.check for f in findings if f.level is Level.FAIL] == ["port"] and exit_status(findings) == 1
    assert exit_status(serving) == 0, "it is Baton that listens"
    assert bad(FakeMachine(), "--fleet.host", "node", secret=b"x" * 32) == {}


def test_chips_and_their_users_are_found_in_proc_and_sys(tmp_path: Path) -> None:
    for index, (vendor, kind) in enumerate([("0x1ae0", "0x120000"), ("0x1ae0", "0x020000"), ("0x8086", "0x120000")]):
        device = tmp_path / f"sys/bus/pci/devices/0000:00:0{index}.0"
        device.mkdir(parents=True)
        (device / "vendor").write_text(f"{vendor}\n")
        (device / "class").write_text(f"{kind}\n")
    process = tmp_path / "proc/41/fd"
    process.mkdir(parents=True)
    (process / "3").symlink_to("/dev/vfio/0")
    (tmp_path / "proc/41/comm").write_text("python\n")
    (tmp_path / "proc/42/fd").mkdir(parents=True)
    (tmp_path / "proc/42/fd/3").symlink_to("/dev/null")
    machine = Machine(tmp_path)
    assert (machine.tpu_chips(), machine.tpu_users()) == (1, ["python (41)"])


def test_the_libtpu_that_jax_asks_for_is_read_from_its_metadata() -> None:
    series = Machine(Path("/")).libtpu_of_jax()
    assert series.startswith("0.0.") and len(series.split(".")) == 3


def test_the_command(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    file = tmp_path / "baton.toml"
    file.write_text(f"[gateway]\nport = {free_port()}\n[fleet]\ntpus_per_worker = 4.0\n")
    assert cli.main(["doctor", "--config", str(file), "--json"]) == 1
    findings = {finding["check"]: finding for finding in json.loads(capsys.readouterr().out)}
    assert findings["tpu"]["level"] == "fail" and "TPU VM" in findings["tpu"]["fix"]
    assert cli.main(["doctor", "--config", str(file)]) == 1
    assert "fix: run it on a TPU VM" in capsys.readouterr().out


def test_text() -> None:
    findings = examine(FakeMachine(files=10), config(), None)
    text = describe(findings)
    assert "warn  open files" in text and "fix: ulimit -n 65536" in text
