"""Placement on a real cluster of two prefill and two decode workers, through HTTP alone.

In order: the last test stops the cluster.
"""

from __future__ import annotations

import json
import os
import random
import signal
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import httpx
import pytest

from router.block_index import PREDICTION_S
from tests.baton_process import until
from tests.e2e.clusters import STOP_S, Cluster
from tests.e2e.conftest import NUM_PAGES
from tests.e2e.lossy_gateway import LOSE
from tests.e2e.model import CONTEXT, VOCAB

pytestmark = [pytest.mark.ray, pytest.mark.timeout(300)]

PAGE = 16
PREFIX = 50 * PAGE


class Told(NamedTuple):
    """What one answer says of itself.

    Attributes:
        prefill, decode: worker ids.
        held_prefill, held_decode: prompt tokens that placement knew to be there.
        donor: whose blocks the prefill worker was to fetch; empty: nobody's.
        cached: `cached_tokens` of its usage.
    """

    request_id: str
    text: str
    prefill: str
    decode: str
    held_prefill: int
    held_decode: int
    donor: str
    cached: int


def text(seed: int, num_tokens: int) -> list[int]:
    rng = random.Random(seed)
    return [rng.randrange(3, VOCAB) for _ in range(num_tokens)]


def ask(cluster: Cluster, prompt: list[int], max_tokens: int = 4) -> Told:
    body = cluster.body(prompt=prompt, max_tokens=max_tokens, ignore_eos=True)
    reply = httpx.post(f"{cluster.url}/v1/completions", json=body, headers={"x-baton-debug": "1"}, timeout=120)
    assert reply.status_code == 200, reply.text
    answer = reply.json()
    said = dict(part.split("=") for part in reply.headers["x-baton-placement"].split("; "))
    return Told(
        answer["id"],
        answer["choices"][0]["text"],
        said["prefill"].rpartition(".")[0],
        said["decode"].rpartition(".")[0],
        int(said["held_prefill"]),
        int(said["held_decode"]),
        said["donor"].rpartition(".")[0],
        answer["usage"]["prompt_tokens_details"]["cached_tokens"],
    )


def ask_all(cluster: Cluster, prompts: list[list[int]]) -> list[Told]:
    """From four clients at once, so that no worker gets everything."""
    with ThreadPoolExecutor(4) as clients:
        return list(clients.map(lambda prompt: ask(cluster, prompt), prompts))


def reach_everyone(cluster: Cluster, seed: int) -> None:
    """Short prompts until each of the four workers has had one."""
    reached: set[str] = set()
    for first in range(seed, seed + 400, 12):
        for one in ask_all(cluster, [text(first + index, 2 * PAGE) for index in range(12)]):
            reached |= {one.prefill, one.decode}
        if len(reached) == 4:
            return
    raise AssertionError(reached)


def gaps(cluster: Cluster) -> float:
    return cluster._sum("block_feed_gaps_total")


@pytest.fixture
def pairs(clusters: Any) -> Cluster:
    return clusters.get("pairs")


@pytest.fixture(scope="module")
def step_times(clusters: Any) -> None:
    """What prompts cost is learned from some of different lengths."""
    for seed in range(16):
        ask(clusters.get("pairs"), text(1000 + seed, 1 + 60 * seed))


@pytest.mark.usefixtures("step_times")
def test_shared_prefixes_land_where_their_blocks_are(pairs: Cluster) -> None:
    """Two prefixes, asked for in turns: each has its home, and usage says what was found there."""
    prefixes = [text(1, PREFIX), text(2, PREFIX)]
    told = [[ask(pairs, prefix + text(10 + seed, 5)) for prefix in prefixes] for seed in range(6)]
    assert [one.cached for one in told[0]] == [0, 0]
    for of_prefix in zip(*told, strict=True):
        for one in of_prefix:
            assert one.cached >= one.held_prefill
            assert one.cached in (0, PREFIX)
        assert sum(one.cached == PREFIX for one in of_prefix[1:]) >= 4, of_prefix
        assert sum(one.held_decode == PREFIX for one in of_prefix[1:]) >= 3, of_prefix
    (attempt,) = pairs.get(f"/explain/{told[-1][0].request_id}")["attempts"]
    assert attempt["chosen"]["held_prefill_tokens"] == told[-1][0].held_prefill
    assert attempt["num_weighed"] >= 4  # pairs; those with a donor count for themselves


def test_a_hot_prefix_spreads_though_requests_come_one_at_a_time(pairs: Cluster) -> None:
    """One block that all share must not draw everything to the worker that had it first: no queue is ever seen.

    Neither must one that once looked slow be left alone for ever.
    """
    shared = text(3, PAGE)
    counts: Counter[str] = Counter()
    for seed in range(400):
        told = ask(pairs, shared + text(600 + seed, CONTEXT - 2 * PAGE), max_tokens=1)
        counts[told.prefill] += 1
        if len(counts) == 2 and min(counts.values()) >= 10:
            return
    raise AssertionError((counts, json.dumps(pairs.get(f"/explain/{told.request_id}"))))


def test_lost_events_are_noticed_and_made_good(pairs: Cluster) -> None:
    lose = pairs.home / LOSE
    prompts = [text(200 + seed, PREFIX + 5) for seed in range(12)]
    before = gaps(pairs)
    lose.touch()
    answers = ask_all(pairs, prompts)
    reach_everyone(pairs, 2000)
    time.sleep(2 * PREDICTION_S)  # what was foretold at placement is forgotten by now
    assert all(ask(pairs, prompt).held_prefill == 0 for prompt in prompts[:2]), "events were not lost"
    lose.unlink()
    reach_everyone(pairs, 2400)  # later events show the gaps
    until(lambda: gaps(pairs) >= before + 4, 10)
    time.sleep(0.5)  # for the snapshots
    again = [ask(pairs, prompt) for prompt in prompts]
    assert [one.text for one in again] == [one.text for one in answers]
    assert sum(one.held_prefill == one.cached == PREFIX for one in again) >= 10, again


@pytest.mark.parametrize("role", ["prefill", "decode"])
def test_a_worker_that_restarts_is_empty_and_fills_again(pairs: Cluster, role: str) -> None:
    """While a prefill worker is away, the other one fetches what decode workers hold of its prompts."""
    prompts = [text(400 + seed + (50 if role == "decode" else 0), PREFIX + 5) for seed in range(8)]
    before = ask_all(pairs, prompts)
    victim = pairs.member(getattr(before[0], role))
    at_once, *lost = [place for place, one in enumerate(before) if getattr(one, role) == victim["worker_id"]]
    os.kill(victim["pid"], signal.SIGKILL)
    assert ask(pairs, text(500, PREFIX)).text  # the other one serves
    known = before[at_once]
    while_away = ask(pairs, prompts[at_once])
    assert while_away.text == known.text
    assert while_away.cached == PREFIX
    if role == "prefill":
        assert (while_away.held_prefill, while_away.donor) == (0, known.decode)
        assert pairs._sum("fetches_total") >= 1
    life = victim["incarnation"] + 1
    pairs.until_life(victim["worker_id"], life)
    until(lambda: pairs.metrics().get(victim["worker_id"], {}).get("worker_incarnation") == life, 30)
    for place in lost:
        empty, full = ask(pairs, prompts[place]), ask(pairs, prompts[place])
        assert empty.text == full.text == before[place].text
        assert getattr(empty, f"held_{role}") == 0
        assert full.cached == PREFIX


def test_nothing_stays_held(pairs: Cluster) -> None:
    pairs.until_at_rest(NUM_PAGES)
    assert pairs.stop(pairs.terminate, STOP_S) == 0
