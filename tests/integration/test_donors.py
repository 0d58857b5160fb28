"""Prompts whose leading blocks a third worker has: what is fetched from it, and that no trouble with it matters."""

from __future__ import annotations

import asyncio
import dataclasses
import gc
import os
import random
import signal
from pathlib import Path

import msgspec
import pytest
import pytest_asyncio

from decode_worker.worker import DecodeWorker
from engine_core.messages import Decode, Donate, KvShard, PeerAddress, Prefill
from engine_core.types import Numerics, Request, SamplingParams
from kv_transfer.donor import Donor
from kv_transfer.receiver import NetKvReceiver
from kv_transfer.ticket import Landing, Ticket
from prefill_worker.worker import FETCH_LEASE_MS, PrefillWorker
from tests.mini_cluster import DEADLINE_MS, Answer, MiniCluster, damage_copies, tiny_config

VOCAB = 149
LENGTH = 61
NUM_BLOCKS = 15  # that can be fetched: the last token's is computed
CONFIG = tiny_config(Numerics.STRICT)


class Cluster(MiniCluster):
    """And another prefill worker."""

    async def open_others(self) -> None:
        self.names = {"p": self.workers[0], "d": self.workers[1], "c": self.workers[2]}
        self.links = {"p": self.prefill, "d": self.decode, "c": self.colocated}
        await self.add(PrefillWorker, "q")

    async def add(self, kind: type, name: str) -> None:
        worker = kind(CONFIG, Path(CONFIG.model.path), name, 1, PeerAddress("127.0.0.1", 0, 0))
        self.links[name] = await self.client.connect(await worker.start())
        self.names[name] = worker
        self.workers.append(worker)

    async def remove(self, name: str) -> None:
        worker = self.names.pop(name)
        self.workers.remove(worker)
        await worker.stop()

    async def teach(self, name: str, request: Request) -> Answer:
        """Let a worker, as it is without others, read a prompt; what it answers."""
        worker = self.names[name]
        other = self.colocated if isinstance(worker, PrefillWorker) else None
        decode, prefill = (other, self.links[name]) if other else (self.links[name], None)
        return await self.client.run(request, decode, prefill)

    def ask(self, request: Request, donor: str | None, num_blocks: int = NUM_BLOCKS) -> Answer:
        link = self.links[donor] if donor is not None else None
        return self.client.start(request, self.decode, self.prefill, link, num_blocks)

    async def run(self, request: Request, donor: str | None, num_blocks: int = NUM_BLOCKS) -> Answer:
        answer = self.ask(request, donor, num_blocks)
        async with asyncio.timeout(30):
            await answer.done.wait()
        return answer

    def cancel(self, request: Request, *names: str) -> None:
        self.client.cancel(request, *(self.links[name] for name in names))

    def fetched(self) -> int:
        """Tokens whose KV the prefill worker has had from donors."""
        worker = self.names["p"]
        num_bytes = sum(link.num_bytes for link in worker._replica.stats.snapshot().links.values())
        return 4 * num_bytes // worker._identity.layout.block_bytes

    async def assert_at_rest(self, within_s: float = 1.0) -> None:
        await super().assert_at_rest(within_s)
        async with asyncio.timeout(30):
            while any(worker._outlet.sender.inflight_bytes for worker in self.workers):
                gc.collect()  # what an idle device has read is let go at its next call, or so; slow on a busy machine
                await asyncio.sleep(0.02)
        for worker in self.workers:
            assert len(worker._donor) == 0 and worker._receiver.num_open == 0
            for shard in worker._replica.memory.shards:
                shard.cache.check_integrity()


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def cluster():
    cluster = await Cluster.start(CONFIG)
    await cluster.open_others()
    yield cluster
    await cluster.stop()


@pytest.fixture
def prompt(request: pytest.FixtureRequest) -> list[int]:
    rng = random.Random(f"{request.node.name} {getattr(request.node, 'execution_count', 1)}")  # new when run again
    return [rng.randrange(VOCAB) for _ in range(LENGTH)]


def asked(prompt: list[int], number: int, *, drawn: bool = False, max_tokens: int = 8) -> Request:
    name = f"{number:04x}{sum((i + 1) * t for i, t in enumerate(prompt)) & 0xFFFFFF:028x}"
    mode = {"temperature": 1.0, "seed": 7} if drawn else {"temperature": 0.0}
    return Request(
        name, prompt, len(prompt), SamplingParams(max_tokens=max_tokens, ignore_eos=True, logprobs=1, **mode)
    )


def assert_same(answer: Answer, expected: Answer) -> None:
    assert answer.failure is None and expected.failure is None
    assert (answer.token_ids, answer.logprobs) == (expected.token_ids, expected.logprobs)


def stop_after(monkeypatch: pytest.MonkeyPatch, donor: Donor, num_portions: int) -> list[int]:
    """Let a donor hand so many blocks over, one at a time, and then nothing until the list of these is cleared."""
    given: list[int] = []
    hand_over = donor._hand_over

    def slow(*, wait: bool) -> bool:
        if len(given) >= num_portions or not hand_over(wait=wait):
            return False
        given.append(1)
        return True

    monkeypatch.setattr(donor, "_portion", 1)
    monkeypatch.setattr(donor, "_hand_over", slow)
    return given


async def until(condition) -> None:
    async with asyncio.timeout(30):
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0.005)


@pytest.mark.asyncio(loop_scope="module")
@pytest.mark.parametrize("drawn", [False, True])
@pytest.mark.parametrize("donor", ["c", "q", "d"])
async def test_what_a_donor_has_is_not_computed_again(cluster, prompt, donor, drawn):
    """A decode worker, a prefill worker, and the decode worker that the prompt is for."""
    expected = await cluster.teach(donor, asked(prompt, 1, drawn=drawn))
    compiles, before = cluster.num_compiles, cluster.fetched()
    answer = await cluster.run(asked(prompt, 2, drawn=drawn), donor)
    assert_same(answer, expected)
    assert answer.cached_tokens >= 4 * NUM_BLOCKS and cluster.fetched() - before == 4 * NUM_BLOCKS
    again = await cluster.run(asked(prompt, 3, drawn=drawn), donor)
    assert_same(again, expected)
    assert cluster.fetched() - before == 4 * NUM_BLOCKS, "it has them now"
    await cluster.assert_at_rest()
    assert cluster.num_compiles == compiles


@pytest.mark.asyncio(loop_scope="module")
@pytest.mark.parametrize("num_known", [0, 5])
async def test_what_a_donor_lacks_is_computed(cluster, prompt, num_known):
    if num_known:
        await cluster.teach("q", asked(prompt[: 4 * num_known], 1))
    before = cluster.fetched()
    answer = await cluster.run(asked(prompt, 2), "q")
    assert cluster.fetched() - before == 4 * num_known
    assert_same(answer, await cluster.teach("c", asked(prompt, 3)))
    await cluster.assert_at_rest()


@pytest.mark.asyncio(loop_scope="module")
async def test_a_donor_that_dies_costs_only_what_it_has_not_given(
    cluster, prompt, monkeypatch, caplog, record_property
):
    caplog.set_level("INFO", logger="prefill_worker.worker")
    await cluster.add(DecodeWorker, "v")
    try:
        expected = await cluster.teach("v", asked(prompt, 1))
        victim = cluster.names["v"]
        stop_after(monkeypatch, victim._donor, 6)
        before = cluster.fetched()
        answer = cluster.ask(asked(prompt, 2), "v")
        await until(lambda: cluster.fetched() - before == 4 * 6)
        os.kill(victim._outlet.sender.plane_pid, signal.SIGKILL)
        killed_at = asyncio.get_running_loop().time()
        async with asyncio.timeout(30):
            await answer.done.wait()
        record_property("seconds", asyncio.get_running_loop().time() - killed_at)
        assert "are computed here: " in caplog.text and "within the lease" not in caplog.text
        assert_same(answer, expected)
        assert answer.cached_tokens == 4 * 6
        await until(lambda: not victim.healthy)
        await cluster.assert_at_rest()
    finally:
        await cluster.remove("v")


@pytest.mark.asyncio(loop_scope="module")
@pytest.mark.parametrize("num_given", [0, 6])
async def test_a_donor_that_is_frozen_is_given_up(cluster, prompt, monkeypatch, record_property, num_given):
    expected = await cluster.teach("c", asked(prompt, 1))
    donor = cluster.names["c"]
    given = stop_after(monkeypatch, donor._donor, num_given)
    before = cluster.fetched()
    if not num_given:
        os.kill(donor._outlet.sender.plane_pid, signal.SIGSTOP)
    began_at = asyncio.get_running_loop().time()
    try:
        answer = cluster.ask(asked(prompt, 2), "c")
        await until(lambda: cluster.fetched() - before == 4 * num_given)
        os.kill(donor._outlet.sender.plane_pid, signal.SIGSTOP)
        given.clear()
        async with asyncio.timeout(FETCH_LEASE_MS / 1000 + 2):
            await answer.done.wait()
        record_property("seconds", asyncio.get_running_loop().time() - began_at)
    finally:
        os.kill(donor._outlet.sender.plane_pid, signal.SIGCONT)
    assert_same(answer, expected)
    assert answer.cached_tokens == 4 * num_given
    await cluster.assert_at_rest(3)


@pytest.mark.asyncio(loop_scope="module")
@pytest.mark.parametrize("who", ["all", "decode"])
async def test_a_fetch_that_nobody_wants_any_more_frees_everything(cluster, prompt, monkeypatch, who):
    """The gateway cancels, or the decode worker gives up: either ends it on all three."""
    await cluster.teach("q", asked(prompt, 1))
    stop_after(monkeypatch, cluster.names["q"]._donor, 3)
    before = cluster.fetched()
    request = asked(prompt, 2)
    cluster.ask(request, "q")
    await until(lambda: cluster.fetched() - before == 12)
    cluster.cancel(request, *(("p", "d", "q") if who == "all" else ("d",)))
    await cluster.assert_at_rest()
    answer = await cluster.run(asked(prompt, 3), None)
    assert answer.cached_tokens == 12, "what had landed is kept"
    await cluster.assert_at_rest()


@pytest.mark.asyncio(loop_scope="module")
@pytest.mark.parametrize("donor", ["c", "q"])
async def test_a_donor_that_leaves_gives_until_it_is_gone(cluster, prompt, monkeypatch, donor):
    expected = await cluster.teach(donor, asked(prompt, 1))
    worker = cluster.names[donor]
    given = stop_after(monkeypatch, worker._donor, 3)
    worker._host.draining = True
    try:
        answer = cluster.ask(asked(prompt, 2), donor)
        await until(lambda: worker._donor.is_giving)
        leaving = asyncio.ensure_future(worker.drain(10))
        done, _ = await asyncio.wait([leaving], timeout=0.3)
        assert not done
        given.clear()
        monkeypatch.undo()
        worker._host.post(lambda: None)
        await asyncio.wait_for(leaving, 10)
        async with asyncio.timeout(30):
            await answer.done.wait()
        assert_same(answer, expected)
        assert answer.cached_tokens == 4 * NUM_BLOCKS
    finally:
        worker._host.draining = False
    await cluster.assert_at_rest()


@pytest.mark.asyncio(loop_scope="module")
@pytest.mark.parametrize("damaged", [0, 9])
async def test_a_block_that_is_damaged_on_the_way_is_computed(cluster, prompt, monkeypatch, damaged):
    """However often it is sent: the bit flips in the donor's memory, behind the digest."""
    expected = await cluster.teach("q", asked(prompt, 1))
    donor = cluster.names["q"]
    frames = damage_copies(monkeypatch, donor._outlet.sender, damaged)
    monkeypatch.setattr(donor._donor, "_portion", 1)
    answer = await cluster.run(asked(prompt, 2), "q")
    assert frames
    assert_same(answer, expected)
    assert answer.cached_tokens == 4 * damaged
    await cluster.assert_at_rest()


@pytest.mark.asyncio(loop_scope="module")
async def test_addresses_that_are_no_donors_are_passed_over(cluster, prompt):
    """Of a worker that hands nothing over, of one with several hosts, and its own."""
    own = cluster.prefill.info.address
    spanning = PeerAddress("127.0.0.1", 1, 2, (KvShard("127.0.0.1", 2, 0, 1), KvShard("127.0.0.1", 3, 1, 1)))
    for number, address in enumerate([PeerAddress("127.0.0.1", 1, 0), spanning, own]):
        before = cluster.fetched()
        request = asked([*prompt[:-1], number], 10 + number)
        cluster.decode.send(Decode(request, own, DEADLINE_MS))
        cluster.prefill.send(Prefill(request, DEADLINE_MS, address, NUM_BLOCKS))
        answer = cluster.client.answers[request.request_id, 0]
        async with asyncio.timeout(30):
            await answer.done.wait()
        assert answer.failure is None and cluster.fetched() == before
    await cluster.assert_at_rest()


@pytest.mark.asyncio(loop_scope="module")
async def test_who_fetches_and_is_lost_holds_no_page_of_the_donor(cluster, prompt, monkeypatch):
    request = asked(prompt, 1)
    await cluster.teach("q", request)
    donor, landed = cluster.names["q"], []
    stop_after(monkeypatch, donor._donor, 2)

    class Ears:
        on_blocks = staticmethod(lambda request_id, epoch, blocks, layers, generations: landed.extend(blocks))

    identity = dataclasses.replace(cluster.names["p"]._identity, worker_id="lost")
    receiver = NetKvReceiver(identity, None, Ears(), donor._options)
    again = msgspec.structs.replace(request, epoch=1)
    ticket = Ticket(again.request_id, 1, 1, tuple(Landing(i, 1) for i in range(NUM_BLOCKS)), DEADLINE_MS)
    receiver.request(donor.info().address, ticket)
    cluster.links["q"].send(Donate(again, NUM_BLOCKS, DEADLINE_MS))
    await until(lambda: landed == [0, 1])
    assert donor.load().free_pages < CONFIG.cache.num_pages
    await receiver.close()
    await cluster.assert_at_rest()


@pytest.mark.asyncio(loop_scope="module")
async def test_a_donor_that_answers_in_prefill_s_place_fails_the_hand_off(cluster, prompt):
    """It has no first token: the gateway places the request again."""
    await cluster.teach("q", asked(prompt, 1))
    request = asked(prompt, 2)
    cluster.decode.send(Decode(request, cluster.links["q"].info.address, DEADLINE_MS))
    cluster.links["q"].send(Donate(request, NUM_BLOCKS, DEADLINE_MS))
    answer = cluster.client.answers[request.request_id, 0]
    async with asyncio.timeout(30):
        await answer.done.wait()
    assert (answer.failure.code, answer.failure.retryable) == ("transfer_error", True)
    await cluster.assert_at_rest()


@pytest.mark.asyncio(loop_scope="module")
async def test_a_malformed_donation_harms_nobody(cluster, prompt):
    for tokens in ([], [-1] * 8, [2**40] * 8, [1] * 1000):
        cluster.links["q"].send(Donate(Request("x" * 32, tokens, len(tokens), SamplingParams()), 3, DEADLINE_MS))
    cluster.links["q"].send(Donate(asked(prompt, 1), -3, DEADLINE_MS))
    await asyncio.sleep(0.05)
    assert cluster.names["q"].healthy
    assert (await cluster.teach("q", asked(prompt, 2))).failure is None
    await cluster.assert_at_rest()
