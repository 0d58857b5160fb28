"""Workers over several hosts on a real Ray, and the configurations that are refused before anything starts."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from deploy.launch import read_config
from engine_core.errors import ConfigError
from engine_core.types import Role
from tests.baton_process import ROOT, until
from tests.e2e.clusters import STOP_S, Cluster
from tests.e2e.model import make_checkpoint

SLICE = {"fleet.topology": "4x4", "fleet.accelerator": "v6e", "fleet.tpus_per_worker": 16, "tp": 16}
TWO = {"fleet.hosts_per_worker": 2}
FLAGS = ("--fleet.prefill_hosts", "2", "--fleet.prefill_tp", "4", "--gateway.local_prefill_tokens", "0")
SMALL = (
    *("--cache.num_pages", "16", "--batch.max_model_len", "128", "--batch.num_slots", "1", "--model.layers", "scan"),
    *("--batch.prefill_tokens", "8"),
)
PATIENT = ("--gateway.suspect_after_s", "5", "--gateway.lost_after_s", "10")  # a crowded machine is no fault here


def config(**changed):
    fields = {"fleet.host": "127.0.0.1"} | changed
    return read_config([word for name, value in fields.items() for word in (f"--{name}", str(value))], None)


def test_each_role_has_its_shape() -> None:
    made = config(**TWO, **SLICE, **{"fleet.prefill_hosts": 1, "fleet.prefill_tp": 8, "fleet.prefill_tpus": 8})
    prefill, decode = made.shape(Role.PREFILL), made.shape(Role.DECODE)
    assert (prefill.hosts, prefill.tpus, prefill.engine.tp) == (1, 8, 8)
    assert (decode.hosts, decode.tpus, decode.engine.tp, decode.topology) == (2, 16, 16, "4x4")


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"fleet.hosts_per_worker": 0}, "fleet.hosts_per_worker must be at least 1"),
        ({"fleet.prefill_hosts": -1}, "fleet.prefill_hosts must not be negative"),
        ({"fleet.prefill_hosts": 2}, "fleet.prefill_hosts is 2, which does not divide dp 1 x ep 1 x tp 1 devices"),
        (TWO | {"tp": 3}, "fleet.hosts_per_worker is 2, which does not divide dp 1 x ep 1 x tp 3 devices"),
        (TWO | {"tp": 2, "numerics": "strict"}, "engine.numerics is strict, which no worker over several machines"),
        (TWO | {"tp": 2, "fleet.pin_cores": "true"}, "fleet.pin_cores shares one machine's cores"),
        (TWO | {"tp": 2, "fleet.gpus_per_worker": 3}, "which does not divide fleet.gpus_per_worker 3"),
        (TWO | SLICE | {"fleet.topology": ""}, "fleet.topology and fleet.accelerator must name the slice"),
        (TWO | SLICE | {"fleet.topology": "4by4"}, "fleet.topology and fleet.accelerator must name the slice"),
        (TWO | SLICE | {"fleet.accelerator": ""}, "fleet.topology and fleet.accelerator must name the slice"),
        (
            TWO | SLICE | {"fleet.topology": "4x8"},
            "fleet.topology 4x8 has 32 chips, 32 devices; fleet.tpus_per_worker takes 16",
        ),
        (TWO | SLICE | {"tp": 8}, "engine dp 1 x ep 1 x tp 8: a worker over several machines takes all"),
    ],
)
def test_what_cannot_be_is_refused(changed, message) -> None:
    with pytest.raises(ConfigError, match=message):
        config(**changed)


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Cluster]:
    model = make_checkpoint(tmp_path / "tiny")
    running = Cluster(tmp_path, model, tmp_path / "xla", *FLAGS, *SMALL, *PATIENT)
    yield running
    running.close()


def processes_of(cluster: Cluster, actor: bytes) -> list[int]:
    names = [(member.pid, Path(f"/proc/{member.pid}/cmdline").read_bytes()) for member in cluster.family()]
    return [pid for pid, name in names if name.startswith(b"ray::" + actor)]


@pytest.mark.ray
@pytest.mark.timeout(400)
def test_a_prefill_worker_over_two_hosts_lives_and_dies_as_one(cluster: Cluster) -> None:
    assert cluster.wait_ready().startswith("Baton is ready"), cluster.log.read_text()
    asked = {"prompt": "The lazy dog jumps over the quick brown fox", "max_tokens": 8, "ignore_eos": True}
    first = cluster.complete(**asked)["choices"][0]["text"]
    assert cluster.num_placed(local=False) == 1
    shards = cluster.member("prefill-0")["info"]["address"][3]
    assert [shard[2:] for shard in shards] == [[0, 1], [1, 1]]
    (follower,) = processes_of(cluster, b"FollowerActor")
    leader = cluster.member("prefill-0")["pid"]
    os.kill(follower, signal.SIGKILL)
    until(lambda: not Path(f"/proc/{leader}").exists(), 10)
    cluster.until_life("prefill-0", 2)
    assert cluster.complete(**asked)["choices"][0]["text"] == first
    assert cluster.stop(cluster.terminate, STOP_S) == 0


@pytest.mark.ray
@pytest.mark.timeout(200)
def test_a_worker_takes_a_whole_slice_and_numbers_its_hosts_as_the_slice_does(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tests.deploy.slice_cluster", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=150)
    assert done.returncode == 0 and "as it should be" in done.stdout, done.stderr[-4000:]
