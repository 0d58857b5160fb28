"""Strict numerics on real clusters of very few pages: whatever happens to a request, its tokens stay the same bits.

In order: 1 prefill + 2 decode workers first, then one worker that does both; the last test stops it.
"""

from __future__ import annotations

import asyncio
import os
import random
import signal
import threading
import time
from typing import Any

import pytest

from benchmarks.mixed_load import Answer, answers, mixed_requests
from tests.baton_process import until
from tests.e2e.clusters import STOP_S, Cluster, Streaming
from tests.e2e.conftest import FEW_PAGES
from tests.e2e.model import VOCAB

pytestmark = [pytest.mark.ray, pytest.mark.timeout(900)]

TURNS = 10  # of a worker's leaving, until it has streams at that moment
MIXED = mixed_requests(220, VOCAB, max_prompt=300, max_tokens=40)
LONG = [
    {"prompt": [random.Random(index).randrange(3, VOCAB) for _ in range(40)], "max_tokens": 300, "ignore_eos": True}
    | ({"temperature": 0} if index % 2 else {"temperature": 1.0, "seed": index})
    for index in range(12)
]


def ask(cluster: Cluster, bodies: list[dict[str, Any]], concurrency: int, **options: Any) -> list[Answer | None]:
    return asyncio.run(answers(cluster.port, cluster.model, bodies, concurrency, **options))


def preemptions(cluster: Cluster) -> float:
    return sum(values["preemptions_total"] for values in cluster.metrics().values())


@pytest.fixture(scope="module")
def apart(clusters: Any) -> dict[str, list[Answer | None]]:
    """What the disaggregated cluster answers."""
    cluster = clusters.get("strict")
    found = {"mixed": ask(cluster, MIXED, 16), "alone": ask(cluster, LONG, 1)}
    assert cluster.num_placed(local=False) >= len(MIXED) + len(LONG)
    assert cluster.num_placed(local=True) == 0
    until(lambda: cluster.transfer_bytes() > 1 << 20, 5)
    assert cluster.num_retries() == 0
    return found


def test_a_full_cache_changes_no_answer(clusters: Any, apart: dict[str, list[Answer | None]]) -> None:
    """Twelve answers of 22 pages each at once, where two workers have 64."""
    cluster = clusters.get("strict")
    cluster.until_at_rest(FEW_PAGES)
    before = preemptions(cluster)
    assert ask(cluster, LONG, len(LONG)) == apart["alone"]
    cluster.until_at_rest(FEW_PAGES)
    assert preemptions(cluster) > before
    assert all(values["compiles_after_warmup"] == 0 for values in cluster.metrics().values())


def test_clients_that_leave_change_no_answer(clusters: Any, apart: dict[str, list[Answer | None]]) -> None:
    """Half of the requests are abandoned at any moment: queued, while KV is on its way, decoding."""
    cluster = clusters.get("strict")
    rng = random.Random(0)
    patience = [rng.uniform(0.01, 0.3) if rng.random() < 0.5 else None for _ in MIXED]
    found = ask(cluster, MIXED, 24, seed=2, patience_s=patience)
    stayed = [index for index, limit in enumerate(patience) if limit is None]
    assert [found[index] for index in stayed] == [apart["mixed"][index] for index in stayed]
    assert sum(answer is None for answer in found) > 20
    cluster.until_at_rest(FEW_PAGES)


def test_a_dead_worker_changes_no_answer(clusters: Any, apart: dict[str, list[Answer | None]]) -> None:
    """Streams of the one that is killed go on at the other."""
    cluster = clusters.get("strict")
    before = cluster.member("decode-1")
    found: list[list[Answer | None]] = []
    thread = threading.Thread(target=lambda: found.append(ask(cluster, LONG, 4)))
    thread.start()
    until(lambda: cluster.metrics()["decode-1"]["num_requests_running"] > 0, 30)
    os.kill(before["pid"], signal.SIGKILL)
    thread.join(200)
    assert found == [apart["alone"]]
    assert cluster.num_retries() > 0
    cluster.until_life("decode-1", before["incarnation"] + 1)


def test_workers_that_leave_change_no_answer(clusters: Any, apart: dict[str, list[Answer | None]]) -> None:
    """Under load a decode worker becomes a prefill worker, reads prompts, and leaves for a new decode worker."""
    cluster = clusters.get("strict")
    found: list[list[Answer | None]] = []
    done = threading.Event()

    def keep_asking() -> None:
        while not done.is_set():
            found.append(ask(cluster, LONG, 8))  # so many that neither decode worker is ever idle

    thread = threading.Thread(target=keep_asking)
    thread.start()
    before = cluster.num_retries()
    try:
        for _ in range(TURNS):
            until(lambda: cluster.metrics()["decode-1"]["num_requests_running"] > 0, 30)
            read = cluster.num_placed_at("prefill-1")
            flipped = cluster.cli("drain", "decode-1", "--flip")
            assert flipped.returncode == 0, flipped.stderr
            assert "wanted: 2 prefill, 1 decode" in flipped.stdout and "prefill-1  ready" in flipped.stdout
            moved = cluster.num_retries() > before  # none, where the worker's answers happened to be complete
            until(lambda read=read: cluster.num_placed_at("prefill-1") > read, 30)
            drained = cluster.cli("drain", "prefill-1")
            assert drained.returncode == 0, drained.stderr
            assert "wanted: 1 prefill, 1 decode" in drained.stdout and "prefill-1" not in drained.stdout
            assert cluster.cli("scale", "--decode", "2").returncode == 0
            if moved:
                break
        assert moved
    finally:
        done.set()
        thread.join(200)
    assert found and all(answers == apart["alone"] for answers in found)
    unknown = cluster.cli("drain", "decode-7")
    assert unknown.returncode == 2
    assert unknown.stderr == "baton: error: there is no worker 'decode-7', but decode-0, decode-1, prefill-0\n"
    cluster.until_at_rest(FEW_PAGES)


def test_the_same_tokens_apart_and_together(clusters: Any, apart: dict[str, list[Answer | None]]) -> None:
    cluster = clusters.get("colocated")
    together = ask(cluster, MIXED, 8, seed=1)
    different = [index for index, pair in enumerate(zip(apart["mixed"], together, strict=True)) if pair[0] != pair[1]]
    assert not different, [(MIXED[index], apart["mixed"][index], together[index]) for index in different[:2]]
    assert len({answer[0] for answer in together if answer}) > 150
    assert ask(cluster, LONG, len(LONG)) == apart["alone"]
    cluster.until_at_rest(FEW_PAGES)


def test_sigint_drains(clusters: Any) -> None:
    """Answers for which there is no room at once, so that some still wait when the signal comes."""
    cluster = clusters.get("colocated")
    stream = Streaming(cluster, max_tokens=450, n=4)
    assert stream.running
    begin = time.monotonic()
    assert cluster.stop(lambda: cluster.signal(signal.SIGINT), STOP_S) == 0
    assert time.monotonic() - begin < STOP_S
    texts = stream.texts()
    assert len(texts) == 4 and len(set(texts)) == 1
