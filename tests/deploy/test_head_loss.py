"""Ray's head dies under streaming load; the data plane, on a node of its own, does not need it."""

from __future__ import annotations

import json
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest

from tests.baton_process import Baton, until
from tests.deploy.ray_head import Head
from tests.e2e.clusters import Cluster
from tests.e2e.model import make_checkpoint

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(400)]

ASKED = {"prompt": [7, 8, 9], "max_tokens": 900, "ignore_eos": True}
FLAGS = {
    "cache.num_pages": 256,
    "batch.num_slots": 2,
    "batch.prefill_tokens": 32,
    "batch.prefill_seqs": 1,
    "fleet.pool_resources": "true",
    "gateway.local_prefill_tokens": 0,
}


class Streams:
    """Some clients that read long answers at the same time."""

    def __init__(self, cluster: Cluster, count: int) -> None:
        self.texts = [""] * count
        self.longest_pause_s = 0.0
        self._cluster = cluster
        self._threads = [threading.Thread(target=self._read, args=(index,)) for index in range(count)]
        for thread in self._threads:
            thread.start()
        until(lambda: all(len(text) > 100 for text in self.texts))

    def _read(self, index: int) -> None:
        body = self._cluster.body(**ASKED, stream=True)
        last = time.monotonic()
        with httpx.stream("POST", f"{self._cluster.url}/v1/completions", json=body, timeout=60) as reply:
            for line in reply.iter_lines():
                if line.startswith("data: {"):
                    self.texts[index] += "".join(choice["text"] for choice in json.loads(line[6:])["choices"])
                    now = time.monotonic()
                    if len(self.texts[index]) > 100:
                        self.longest_pause_s = max(self.longest_pause_s, now - last)
                    last = now

    def until_ended(self) -> list[str]:
        for thread in self._threads:
            thread.join()
        return self.texts


@pytest.fixture
def head(tmp_path: Path) -> Iterator[Head]:
    running = Head(tmp_path, {})
    running.add_node({"baton-gateway": 1, "baton-prefill": 1, "baton-decode": 1})
    yield running
    running.stop()


def test_streams_outlive_the_head(
    head: Head, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, record_property: Callable[[str, object], None]
) -> None:
    for name, value in head.settings.items():
        monkeypatch.setenv(name, value)
    model = make_checkpoint(tmp_path / "tiny")
    flags = [word for name, value in FLAGS.items() for word in (f"--{name}", str(value))]
    cluster = Cluster(tmp_path, model, tmp_path / "xla", "--ray-address", head.address, *flags)
    try:
        assert cluster.wait_ready() == f"Baton is ready: {cluster.url}/v1\n", cluster.log.read_text()
        expected = cluster.complete(**ASKED)["choices"][0]["text"]

        streams = Streams(cluster, 2)
        head.kill_control_store()
        assert streams.until_ended() == [expected] * 2
        assert not head.processes("gcs_server")
        keeps_serving(cluster, expected, 3)
        head.restart_control_store()
        until(lambda: cluster.cli("status").returncode == 0, 60)
        lives = [(m["worker_id"], m["state"], m["incarnation"]) for m in cluster.status()["members"]]
        assert lives == [("prefill-0", "ready", 1), ("decode-0", "ready", 1)], "it found its workers again"

        streams = Streams(cluster, 2)
        head.kill()
        cluster.signal(signal.SIGKILL)  # `baton serve` runs on the head; before it, Ray would end its job
        assert len(head.processes("raylet")) == 1, "the workers' own"
        assert streams.until_ended() == [expected] * 2
        record_property("longest_pause_s", streams.longest_pause_s)
        assert streams.longest_pause_s < 5
        keeps_serving(cluster, expected, 5)
        assert httpx.get(f"{cluster.url}/readiness").status_code == 200
    finally:
        cluster.signal(signal.SIGKILL)
        cluster.process.wait()
        Baton.close(cluster)


def keeps_serving(cluster: Cluster, expected: str, seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        short = cluster.complete(**{**ASKED, "max_tokens": 50})["choices"][0]["text"]
        assert short and expected.startswith(short)
