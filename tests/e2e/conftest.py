"""Real clusters, one at a time; a test that asks for another one stops the one that runs."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.baton_process import Baton
from tests.e2e.clusters import STOP_S, Cluster
from tests.e2e.model import make_checkpoint

NUM_PAGES = 2048
FEW_PAGES = 64  # two sequences of the greatest length
PATIENT = ("--gateway.suspect_after_s", "5", "--gateway.lost_after_s", "10")  # a crowded machine is no fault here
STRICT = (*PATIENT, "--numerics", "strict", "--cache.num_pages", str(FEW_PAGES), "--batch.max_model_len", "512")
APART = ("--gateway.local_prefill_tokens", "0")  # an idle decode worker would read these short prompts itself
SMALL_CHUNKS = ("--batch.prefill_tokens", "64")  # so that a prompt keeps a worker busy for a while
FLAGS = {
    "fast": ("--cache.num_pages", str(NUM_PAGES), *APART),
    "strict": (*STRICT, "--prefill", "1", "--decode", "2", *APART),
    "colocated": (*STRICT, "--colocated"),
    "pairs": ("--prefill", "2", "--decode", "2", "--cache.num_pages", str(NUM_PAGES), *APART, *SMALL_CHUNKS),
}
MODULES = {"pairs": "tests.e2e.lossy_gateway"}  # where it is not the command line


class Clusters:
    """Starts and stops them."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._model_dir = make_checkpoint(directory / "tiny")
        self._running: tuple[str, Cluster] | None = None
        self._count = 0

    def get(self, name: str) -> Cluster:
        """A cluster of this kind: the running one, or a new one."""
        if self._running is not None and self._running[0] == name and self._running[1].process.poll() is None:
            return self._running[1]
        self.stop()
        self._count += 1
        home = self._directory / f"{name}-{self._count}"
        home.mkdir()
        cluster = Cluster(home, self._model_dir, self._directory / "xla", *FLAGS[name], module=MODULES.get(name))
        self._running = name, cluster
        assert cluster.wait_ready() == f"Baton is ready: {cluster.url}/v1\n", cluster.log.read_text()
        return cluster

    def stop(self) -> None:
        """Stop the running one, if any."""
        if self._running is None:
            return
        _, cluster = self._running
        self._running = None
        try:
            if cluster.process.poll() is None:
                assert cluster.stop(cluster.terminate, STOP_S) == 0
        finally:
            Baton.close(cluster)


@pytest.fixture(scope="session")
def clusters(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Clusters]:
    clusters = Clusters(tmp_path_factory.mktemp("e2e"))
    try:
        yield clusters
    finally:
        clusters.stop()


@pytest.fixture
def fast(clusters: Clusters) -> Cluster:
    return clusters.get("fast")
