"""A Ray head of a test's own: `ray start --head` with the settings of deploy/ray, and an end that leaves nothing."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from deploy.secret_files import write_secret
from tests.baton_process import ROOT, free_port, until

FAKE_HEAD_ID = "f" * 51 + "00000"  # what Ray's fake node provider takes for the head's


class Head:
    """Its processes are known by their directory, and all that it started by the token's place in their environment.

    Args:
        resources: of the head.
        node_types: as in a cluster file; Ray's own autoscaler then starts such nodes as processes of this machine.
    """

    def __init__(self, home: Path, resources: Mapping[str, float], node_types: Mapping[str, Any] | None = None) -> None:
        write_secret(home / "ray-token")
        self.port = free_port()
        self.address = f"127.0.0.1:{self.port}"
        self._directory = f"/tmp/ray-{self.port}"
        self._head_processes: list[int] = []
        self._control_store: tuple[list[bytes], dict[bytes, bytes]] = ([], {})
        self._restarted: subprocess.Popen[bytes] | None = None
        self.settings = {
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN_PATH": str(home / "ray-token"),
            "RAY_gcs_rpc_server_reconnect_timeout_s": "600",
            "RAY_gcs_storage": "rocksdb",
            "RAY_gcs_storage_path": str(home / "gcs"),
            "RAY_USAGE_STATS_ENABLED": "0",
            "PYTHONPATH": str(ROOT),
        }
        self._command = [
            str(Path(sys.executable).with_name("ray")),
            *("start", "--head", f"--port={self.port}", "--node-ip-address=127.0.0.1", "--num-cpus=2"),
            *("--include-dashboard=false", f"--resources={json.dumps(resources)}", "--object-store-memory=100000000"),
            *("--disable-usage-stats", f"--temp-dir={self._directory}", "--dashboard-agent-listen-port=0"),
        ]
        environment = {**os.environ, **self.settings}
        if node_types is not None:
            (home / "cluster.json").write_text(json.dumps(self._cluster(resources, node_types)))
            self._command.append(f"--autoscaling-config={home / 'cluster.json'}")
            environment |= {
                "RAY_FAKE_CLUSTER": "1",
                "AUTOSCALER_UPDATE_INTERVAL_S": "1",
                "RAY_OVERRIDE_NODE_ID_FOR_TESTING": FAKE_HEAD_ID,
            }
        done = subprocess.run(self._command, env=environment, capture_output=True, text=True, timeout=180)
        assert done.returncode == 0, done.stdout + done.stderr

    def _cluster(self, resources: Mapping[str, float], node_types: Mapping[str, Any]) -> dict[str, Any]:
        commands = ("initialization", "setup", "head_setup", "worker_setup", "head_start_ray", "worker_start_ray")
        return {
            "cluster_name": "fake",
            "max_workers": 8,
            "idle_timeout_minutes": 0.05,
            "upscaling_speed": 100.0,
            "provider": {
                "type": "fake_multinode",
                "gcs_address": self.address,
                "use_node_id_as_ip": True,
                "disable_node_updaters": True,
                "disable_launch_config_check": True,
                "foreground_node_launch": True,
                "launch_multiple": True,
            },
            "auth": {},
            "docker": {},
            "file_mounts": {},
            "cluster_synced_files": [],
            "file_mounts_sync_continuously": False,
            "rsync_exclude": [],
            "rsync_filter": [],
            "head_node_type": "ray.head.default",
            "available_node_types": {
                "ray.head.default": {"resources": dict(resources), "node_config": {}, "max_workers": 0},
                **node_types,
            },
            **{f"{name}_commands": [] for name in commands},
        }

    def add_node(self, resources: Mapping[str, float]) -> None:
        """Another node of the same cluster, on this machine, too."""
        self._head_processes = self.processes("")
        done = subprocess.run(
            [
                *(
                    self._command[0],
                    "start",
                    f"--address={self.address}",
                    "--node-ip-address=127.0.0.1",
                    "--num-cpus=2",
                ),
                *(f"--resources={json.dumps(resources)}", "--object-store-memory=100000000"),
                *("--disable-usage-stats", "--dashboard-agent-listen-port=0"),
            ],
            env={**os.environ, **self.settings},
            capture_output=True,
            text=True,
            timeout=180,
        )
        assert done.returncode == 0, done.stdout + done.stderr

    def kill(self) -> None:
        """End every process of the head's node at once, actors included; the other node stays."""
        raylets = {pid for pid in self.processes("raylet") if pid in self._head_processes}
        actors = [int(e.name) for e in Path("/proc").glob("[0-9]*") if _parent(int(e.name)) in raylets]
        killed = [*self.processes("gcs_server"), *self._head_processes, *actors]
        for pid in killed:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        until(lambda: not set(killed) & set(self.processes("")), 10)  # the system may take a moment

    def kill_control_store(self) -> None:
        """End the GCS; the rest of the head stays."""
        pid = self.processes("gcs_server")[0]
        words, settings = (
            (Path(f"/proc/{pid}") / name).read_bytes().split(b"\0")[:-1] for name in ("cmdline", "environ")
        )
        self._control_store = (words, dict(setting.split(b"=", 1) for setting in settings))
        os.kill(pid, signal.SIGKILL)

    def restart_control_store(self) -> None:
        """Start the GCS that was killed: the same command and environment, and so the same store on the disk."""
        words, settings = self._control_store
        self._restarted = subprocess.Popen(words, env=settings, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    def processes(self, name: str) -> list[int]:
        """Ids of its processes that run this program; all for an empty name."""
        found = []
        for entry in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                words = (entry / "cmdline").read_bytes().split(b"\0")
                if any(self._directory.encode() in word for word in words) and words[0].endswith(name.encode()):
                    found.append(int(entry.name))
        return found

    def _family(self) -> list[int]:
        """Every process that has its token: Ray's client server, say, which names no directory."""
        mark = f"RAY_AUTH_TOKEN_PATH={self.settings['RAY_AUTH_TOKEN_PATH']}".encode()
        found = []
        for entry in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                if mark in (entry / "environ").read_bytes().split(b"\0") and int(entry.name) != os.getpid():
                    found.append(int(entry.name))
        return found

    def stop(self) -> None:
        for number in (signal.SIGTERM, signal.SIGKILL):
            for pid in {*self.processes(""), *self._family()}:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, number)
            with contextlib.suppress(AssertionError):
                until(lambda: not self.processes("") and not self._family(), 5)
        if self._restarted is not None:
            self._restarted.wait()
        shutil.rmtree(self._directory, ignore_errors=True)


def _parent(pid: int) -> int:
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    except OSError:
        return 0
