"""`baton serve` from the outside: a real Ray, real processes and signals; only the model and the gateway are fakes."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from deploy.ray_local import process
from deploy.serve import SAME_SIGNAL_S
from tests.baton_process import READY_S, Baton, free_port, until


def fake(home: Path) -> Baton:
    port = free_port()
    flags = ("--fleet.max_gateways", "3", "--fleet.streams_per_gateway", "10")
    return Baton(home, port, "-m", "tests.deploy.serve_fake", str(port), str(home), "", *flags)


@pytest.fixture(scope="module")
def baton(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Baton]:
    home = tmp_path_factory.mktemp("home")
    (home / "slow").write_text("1.5")
    running = fake(home)
    try:
        assert running.wait_ready() == f"Baton is ready: http://127.0.0.1:{running.port}/v1\n"
        yield running
    finally:
        running.close()


@pytest.mark.ray
class TestRunning:
    """In order: the last test stops the cluster."""

    def test_progress_was_shown_without_rays_noise(self, baton: Baton) -> None:
        text = baton.log.read_text()
        assert "Starting Ray ..." in text
        assert "compiling" in text
        assert "INFO" not in text and "WARNING" not in text and "token" not in text.lower()

    def test_status_tells_of_every_worker(self, baton: Baton) -> None:
        status = baton.status()
        assert status["ready"] and status["url"].endswith(f":{baton.port}/v1")
        assert [(m["worker_id"], m["state"], m["incarnation"]) for m in status["members"]] == [
            ("prefill-0", "ready", 1),
            ("decode-0", "ready", 1),
        ]
        table = baton.cli("status")
        assert table.returncode == 0 and table.stderr == ""
        assert "prefill-0  ready" in table.stdout

    def test_a_killed_worker_is_replaced_and_the_gateway_sees_it(self, baton: Baton) -> None:
        assert baton.get("/workers") == [["decode-0", 1], ["prefill-0", 1]]
        victim = next(m["pid"] for m in baton.status()["members"] if m["worker_id"] == "decode-0")
        os.kill(victim, signal.SIGKILL)
        until(lambda: baton.get("/workers") == [["decode-0", 2], ["prefill-0", 1]])
        assert "decode-0 (incarnation 1) died" in baton.log.read_text()

    def test_a_killed_gateway_is_replaced_and_finds_the_workers(self, baton: Baton) -> None:
        lines = {pid: Path(f"/proc/{pid}/cmdline").read_text() for pid in (member.pid for member in baton.family())}
        victim = next(pid for pid, line in lines.items() if line.startswith("ray::ServeReplica"))
        os.kill(victim, signal.SIGKILL)

        def back() -> bool:
            with contextlib.suppress(OSError):
                return len(baton.get("/workers")) == 2
            return False

        until(lambda: process(victim) is None)
        until(back)

    def test_scale_up_and_down(self, baton: Baton) -> None:
        up = baton.cli("scale", "--prefill", "3")
        assert up.returncode == 0, up.stderr
        assert "prefill-2  ready" in up.stdout
        until(
            lambda: [name for name, _ in baton.get("/workers")] == ["decode-0", "prefill-0", "prefill-1", "prefill-2"]
        )
        down = baton.cli("scale", "--prefill", "1", "--decode", "1")
        assert down.returncode == 0, down.stderr
        assert [name for name, _ in baton.get("/workers")] == ["decode-0", "prefill-0"]
        refused = baton.cli("scale", "--decode", "0")
        assert refused.returncode == 2 and refused.stderr == "baton: error: decode must be at least 1, not 0\n"

    def test_serve_adds_a_gateway_when_streams_grow(self, baton: Baton) -> None:
        def gateways() -> int:
            lines = [Path(f"/proc/{member.pid}/cmdline").read_text() for member in baton.family()]
            return sum(line.startswith("ray::ServeReplica:baton:gateway") for line in lines)

        assert gateways() == 1
        (baton.home / "streams").write_text("15")
        until(lambda: gateways() == 2, 60)
        assert len(baton.get("/workers")) == 2

    def test_everything_listens_on_loopback_only(self, baton: Baton) -> None:
        """But for one port of Ray Serve's replica, meant for other deployments, which asks for Ray's token."""
        pids = {member.pid for member in baton.family()}
        listing = subprocess.run(["ss", "-ltnpH"], capture_output=True, text=True, check=True).stdout
        ours = [line for line in listing.splitlines() if any(f"pid={pid}," in line for pid in pids)]
        wide = [line for line in ours if "127.0.0.1" not in line.split()[3] and "ray::ServeRepli" not in line]
        assert ours and wide == []

    def test_engines_are_not_niced_and_ray_is_in_no_group_of_ours(self, baton: Baton) -> None:
        """Ray's default niceness would starve them; a signal to the group of `baton serve` must not reach them."""
        family = [member.pid for member in baton.family() if member.pid != baton.process.pid]
        assert {os.getpriority(os.PRIO_PROCESS, pid) for pid in family} == {os.getpriority(os.PRIO_PROCESS, 0)}
        assert os.getpgid(baton.process.pid) not in {os.getpgid(pid) for pid in family}

    def test_a_taken_port_is_one_clear_line(self, baton: Baton) -> None:
        second = baton.cli("serve", "--port", str(baton.port))
        assert second.returncode == 2
        assert second.stderr == (
            f"baton: error: port {baton.port} on 127.0.0.1 is already in use; choose another one with --port\n"
        )

    def test_ctrl_c_leaves_nothing(self, baton: Baton) -> None:
        family = baton.family()
        assert len(family) > 8
        run_dir = Path(
            json.loads(next((baton.home / ".cache/baton/run").glob("*.json")).read_text())["token_path"]
        ).parent
        baton.signal(signal.SIGINT)
        assert baton.process.wait(30) == 0
        assert baton.process.stdout is not None and baton.process.stdout.read() == b""
        until(lambda: not [member for member in family if process(member.pid) == member], 5)
        assert not run_dir.exists()
        assert list((baton.home / ".cache/baton/run").iterdir()) == []
        assert baton.log.read_text().endswith("Stopped.\n")
        assert baton.cli("status").returncode == 2


@pytest.mark.ray
def test_a_closed_terminal_stops_it_and_a_second_signal_at_once(tmp_path: Path) -> None:
    (tmp_path / "slow").write_text("60")
    running = fake(tmp_path)
    try:
        until(lambda: "compiling" in running.log.read_text(), READY_S)
        family = running.family()
        announced = next((tmp_path / ".cache/baton/run").iterdir())
        run_dir = Path(json.loads(announced.read_text())["token_path"]).parent
        running.signal(signal.SIGHUP)
        until(lambda: "Stopping;" in running.log.read_text())
        time.sleep(
            SAME_SIGNAL_S
        )  # from where the first was taken, however busy the machine: sooner, it is the same one
        running.signal(signal.SIGINT)
        assert running.process.wait(20) == 130  # it would compile for a minute
        until(lambda: not [member for member in family if process(member.pid) == member], 5)
        assert not announced.exists() and not run_dir.exists()
    finally:
        running.close()


@pytest.mark.ray
def test_sigterm_to_the_group_while_ray_starts(tmp_path: Path) -> None:
    running = fake(tmp_path)

    def run_dir_in_use() -> str | None:
        lines = [Path(f"/proc/{member.pid}/cmdline").read_text() for member in running.family()]
        found = re.search(r"gcs_server.*?(/tmp/baton-\w+)", "\n".join(lines))
        return found and found[1]

    try:
        run_dir = Path(until(run_dir_in_use, READY_S))
        family = running.family()
        os.killpg(running.process.pid, signal.SIGTERM)
        assert running.process.wait(20) == 130
        assert running.log.read_text().endswith("Stopped while starting.\n")
        until(lambda: not [member for member in family if process(member.pid) == member], 5)
        assert not run_dir.exists()
    finally:
        running.close()


@pytest.mark.ray
@pytest.mark.parametrize(
    ("script", "text", "code", "line"),
    [
        ("refuse", "model.safetensors is truncated", 2, "Error: model.safetensors is truncated\n"),
        ("gateway_refuses", "", 2, "Error: the chat template is broken\n"),
        ("bug", "", 1, "failed to start: ZeroDivisionError: a bug\n"),
    ],
)
def test_what_cannot_start_ends_it_with_one_line(tmp_path: Path, script: str, text: str, code: int, line: str) -> None:
    (tmp_path / script).write_text(text)
    running = fake(tmp_path)
    try:
        assert running.process.wait(READY_S) == code
        shown = running.log.read_text()
        assert line in shown and "Traceback" not in shown
        assert ("Logs: " in shown) == (code == 1)
        if code == 1:
            logs = Path(shown.rpartition("Logs: ")[2].strip())
            assert "ZeroDivisionError" in (logs / "fleet.log").read_text()
            shutil.rmtree(logs.parent)
    finally:
        running.close()
