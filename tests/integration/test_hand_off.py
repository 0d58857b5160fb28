"""Disaggregated against colocated, on real workers with a real tiny model over real sockets."""

from __future__ import annotations

import asyncio
import random
import signal
import sys

import jax
import numpy as np
import pytest
import pytest_asyncio

from engine_core.types import Numerics, Request, SamplingParams
from tests.golden.cases import LENGTH_A
from tests.mini_cluster import GOLDEN, MiniCluster, damage_copies, tiny_config

VOCAB = 149
UNHEARD_S = 5.5  # workers free what a gateway asked for that has answered no beat for so long
PREFIXES = [[(i * 31 + j * 17) % VOCAB for j in range(40)] for i in range(3)]


@pytest_asyncio.fixture(scope="module", loop_scope="module", params=list(Numerics))
async def cluster(request):
    cluster = await MiniCluster.start(tiny_config(request.param))
    yield cluster
    await cluster.stop()


def mixed_request(rng: random.Random, name: str) -> Request:
    prompt = rng.choice(PREFIXES)[: rng.randrange(41)] + [rng.randrange(VOCAB) for _ in range(rng.randrange(1, 30))]
    greedy = rng.random() < 0.5
    sampling = SamplingParams(
        max_tokens=rng.randrange(1, 40),
        temperature=0.0 if greedy else rng.choice([0.5, 1.0, 1.5]),
        top_k=rng.choice([0, 0, 5]),
        top_p=rng.choice([1.0, 0.8]),
        min_p=rng.choice([0.0, 0.05]),
        frequency_penalty=rng.choice([0.0, 0.0, 0.7]),
        presence_penalty=rng.choice([0.0, 0.0, 0.7]),
        repetition_penalty=rng.choice([1.0, 1.0, 1.3]),
        logit_bias=rng.choice([(), ((7, 3.0),)]),
        seed=rng.getrandbits(64),
        ignore_eos=rng.random() < 0.5,
        logprobs=rng.choice([None, None, 0, 3]),
    )
    return Request(name, prompt, len(prompt), sampling, salt=rng.choice([b"", b"tenant"]))


@pytest.mark.asyncio(loop_scope="module")
async def test_disaggregated_tokens_equal_colocated_tokens(cluster, record_property):
    """Strict: identical, greedy and seeded, over hundreds of mixed requests in changing company. Fast: reported."""
    rng = random.Random(1)
    strict = cluster.workers[0].info().numerics is Numerics.STRICT
    total = 240 if strict else 80
    compiles = cluster.num_compiles
    different = 0
    for start in range(0, total, 12):
        requests = [mixed_request(rng, f"{start + i:032x}") for i in range(12)]
        shuffled = rng.sample(requests, len(requests))
        apart = await asyncio.gather(*(cluster.client.run(r, cluster.decode, cluster.prefill) for r in requests))
        together = await asyncio.gather(*(cluster.client.run(rename(r), cluster.colocated, None) for r in shuffled))
        by_name = {r.request_id: answer for r, answer in zip(shuffled, together, strict=True)}
        for request, answer in zip(requests, apart, strict=True):
            other = by_name[request.request_id]
            assert answer.failure is None and other.failure is None
            if (answer.token_ids, answer.finish_reason) != (other.token_ids, other.finish_reason):
                different += 1
            elif strict:
                assert answer.logprobs == other.logprobs
    record_property("share_that_differs", different / total)
    assert different == 0 if strict else different / total < 0.1
    await cluster.assert_at_rest()
    assert cluster.num_compiles == compiles, "mixed traffic compiled something that warm-up should have"


@pytest.mark.asyncio(loop_scope="module")
async def test_log_probabilities_of_a_prompt_are_those_of_transformers(cluster):
    """Also where its blocks are cached, in steps of several prompts, and while others decode."""
    golden = np.load(GOLDEN / "qwen3" / "expected.npz")
    texts = [golden[f"tokens_{x}"].tolist() for x in "ab"]
    sampling = SamplingParams(max_tokens=3, temperature=0.0, ignore_eos=True, logprobs=4, prompt_logprobs=True)
    plain = SamplingParams(max_tokens=30, temperature=0.0, ignore_eos=True)
    compiles = cluster.num_compiles
    asked = [Request(f"{0xA000 + i:032x}", texts[i % 2], len(texts[i % 2]), sampling) for i in range(4)]
    beside = [Request(f"{0xB000 + i:032x}", texts[0][:LENGTH_A], LENGTH_A, plain) for i in range(2)]
    found = await asyncio.gather(*(cluster.client.run(r, cluster.colocated, None) for r in (*beside, *asked)))
    for request, answer in zip(asked, found[2:], strict=True):
        logits = golden["logits_a" if request.token_ids == texts[0] else "logits_b"].astype(np.float64)
        expected = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        said = answer.prompt_logprobs
        assert len(said) == len(request.token_ids) - 1 and len(answer.token_ids) == 3
        for place, (token, entry) in enumerate(zip(request.token_ids[1:], said, strict=True)):
            assert entry.logprob == pytest.approx(expected[place, token], abs=2e-4)
            assert len(entry.top_ids) == 4 and entry.top_logprobs[0] == pytest.approx(expected[place].max(), abs=2e-4)
        assert answer.logprobs[0].logprob == pytest.approx(expected[-1].max(), abs=2e-4)
    await cluster.assert_at_rest()
    assert cluster.num_compiles == compiles


def rename(request: Request) -> Request:
    return Request(
        request.request_id[::-1], request.token_ids, request.num_prompt_tokens, request.sampling, request.salt, 7
    )


@pytest.mark.asyncio(loop_scope="module")
async def test_second_request_sends_only_what_decode_lacks(cluster):
    prompt = [(5 * i + 3) % VOCAB for i in range(33)]
    sampling = SamplingParams(temperature=0.0, max_tokens=3, ignore_eos=True)
    first = await cluster.client.run(Request("a" * 32, prompt, 33, sampling), cluster.decode, cluster.prefill)
    second = await cluster.client.run(Request("b" * 32, prompt, 33, sampling), cluster.decode, cluster.prefill)
    assert first.token_ids == second.token_ids
    assert first.cached_tokens == 0 and second.cached_tokens == 32
    await cluster.assert_at_rest()


@pytest.mark.asyncio(loop_scope="module")
@pytest.mark.parametrize("delay_s", [0, 0.002, 0.01, 0.05, 0.2])
async def test_cancel_frees_pages_and_slots_on_both_workers(cluster, delay_s):
    rng = random.Random(delay_s)
    sampling = SamplingParams(temperature=0.0, max_tokens=60, ignore_eos=True)
    requests = [
        Request(f"{i + int(delay_s * 1e4) * 100:032x}", [rng.randrange(VOCAB) for _ in range(50)], 50, sampling)
        for i in range(6)
    ]
    for request in requests:
        cluster.client.start(request, cluster.decode, cluster.prefill)
    await asyncio.sleep(delay_s)
    for request in requests:
        cluster.client.cancel(request, cluster.decode, cluster.prefill)
    await cluster.assert_at_rest()


@pytest.mark.asyncio(loop_scope="module")
async def test_a_lost_gateway_frees_everything(cluster):
    other = type(cluster.client)()
    decode = await other.connect(cluster.decode.info)
    prefill = await other.connect(cluster.prefill.info)
    sampling = SamplingParams(temperature=0.0, max_tokens=60, ignore_eos=True)
    other.start(Request("c" * 32, list(range(50)), 50, sampling), decode, prefill)
    await asyncio.sleep(0.02)
    await other.close()
    await cluster.assert_at_rest()


@pytest.mark.asyncio(loop_scope="module")
async def test_what_a_frozen_gateway_asked_for_is_freed_and_it_comes_back(cluster, record_property):
    if cluster.workers[0].info().numerics is Numerics.STRICT:
        pytest.skip("the same in both modes")
    prefill, decode = cluster.prefill.info.address, cluster.decode.info.address
    command = ["-m", "tests.integration.bare_gateway", *map(str, (prefill.port, prefill.kv_port, decode.port))]
    gateway = await asyncio.create_subprocess_exec(sys.executable, *command, stdout=asyncio.subprocess.PIPE)
    try:
        async with asyncio.timeout(60):
            assert await gateway.stdout.readline() == b"asked\n"
            while not all(worker.load().running or worker.load().waiting for worker in cluster.workers[:2]):  # noqa: ASYNC110
                await asyncio.sleep(0.01)
            gateway.send_signal(signal.SIGSTOP)
            frozen_at = asyncio.get_running_loop().time()
            await asyncio.sleep(2.5)
            assert all(worker.load().running or worker.load().waiting for worker in cluster.workers[:2]), "too early"
            await cluster.assert_at_rest(UNHEARD_S - 2.5 + 1)
            record_property("seconds", asyncio.get_running_loop().time() - frozen_at)
            gateway.send_signal(signal.SIGCONT)
            heard = {await gateway.stdout.readline() for _ in range(4)}
        assert heard == {b"lost p\n", b"lost d\n", b"back p\n", b"back d\n"}
    finally:
        gateway.kill()
        await gateway.wait()
    await cluster.assert_at_rest()


@pytest.mark.asyncio(loop_scope="module")
async def test_bad_requests_fail_alone(cluster):
    good = Request("d" * 32, list(range(20)), 20, SamplingParams(temperature=0.0, max_tokens=30, ignore_eos=True))
    running = asyncio.ensure_future(cluster.client.run(good, cluster.decode, cluster.prefill))
    bad = {
        "e": ([], 0, SamplingParams()),
        "f": ([1, 2, 3], 3, SamplingParams(max_tokens=0)),
        "1": ([1, VOCAB], 2, SamplingParams()),
        "2": ([1, -1], 2, SamplingParams()),
        "3": ([1] * 100, 100, SamplingParams(max_tokens=100)),
    }
    for letter, (tokens, count, sampling) in bad.items():
        answer = await cluster.client.run(Request(letter * 32, tokens, count, sampling), cluster.decode, None)
        assert answer.failure is not None and not answer.failure.retryable, letter
    assert len((await running).token_ids) == 30
    await cluster.assert_at_rest()


@pytest.mark.asyncio(loop_scope="module")
async def test_a_prefill_worker_that_leaves_is_there_until_its_blocks_are_collected(cluster, monkeypatch):
    prefill = cluster.workers[0]
    sampling = SamplingParams(temperature=0.0, max_tokens=5, ignore_eos=True)
    requests = [Request(f"{i + 900:032x}", [(7 * i + j) % VOCAB for j in range(50)], 50, sampling) for i in range(4)]
    answers = [cluster.client.start(request, cluster.decode, cluster.prefill) for request in requests]
    await asyncio.sleep(0.02)
    uncollected = [3, 2, 1]
    monkeypatch.setattr(
        type(prefill._outlet.sender),
        "inflight_bytes",
        property(lambda self: uncollected.pop() if uncollected else self._inflight_bytes),
    )
    try:
        await prefill.drain(30)
        assert not uncollected and prefill._outlet.sender.inflight_bytes == 0
        refused = cluster.client.start(Request("9" * 32, [1, 2, 3], 3, sampling), cluster.decode, cluster.prefill)
        for answer in answers:
            async with asyncio.timeout(30):
                await answer.done.wait()
            assert answer.failure is None and len(answer.token_ids) == 5
        async with asyncio.timeout(30):
            await refused.done.wait()
        assert refused.failure is not None and refused.failure.retryable
        cluster.client.cancel(Request("9" * 32, [1, 2, 3], 3, sampling), cluster.decode, cluster.prefill)
    finally:
        prefill._host.draining = False
    await cluster.assert_at_rest()


@pytest.mark.asyncio(loop_scope="module")
@pytest.mark.parametrize("sick", ["prefill", "decode"])
async def test_logits_that_are_not_finite_are_never_served(cluster, sick):
    """Weights of a worker are damaged, and then whole again: what it computed meanwhile is nowhere any more."""
    rng = random.Random(sick)
    prompt = [rng.randrange(VOCAB) for _ in range(61)]
    sampling = SamplingParams(max_tokens=12, temperature=0.0, ignore_eos=True)

    def attempt(epoch: int) -> Request:
        return Request(f"{0xD000 + (sick == 'decode'):032x}", prompt, len(prompt), sampling, epoch=epoch)

    expected = await cluster.client.run(attempt(0), cluster.colocated, None)
    engine = cluster.workers[0 if sick == "prefill" else 1]._replica.engine
    whole, compiles = engine._params, cluster.num_compiles
    engine._params = jax.tree.map(
        lambda leaf: jax.device_put(np.full(leaf.shape, np.nan, leaf.dtype), leaf.sharding), whole
    )
    failed = await cluster.client.run(attempt(1), cluster.decode, cluster.prefill)
    assert (failed.failure.code, failed.failure.retryable) == ("logits_not_finite", True)
    cluster.client.cancel(attempt(1), cluster.decode, cluster.prefill)
    engine._params = whole
    await cluster.assert_at_rest()
    said = await cluster.client.run(attempt(2), cluster.decode, cluster.prefill)
    if sick == "prefill" and said.failure is not None:  # the decode worker had kept damaged blocks, and found them so
        assert said.failure.code == "logits_not_finite"
        cluster.client.cancel(attempt(2), cluster.decode, cluster.prefill)
        said = await cluster.client.run(attempt(3), cluster.decode, cluster.prefill)
    assert said.failure is None
    if cluster.workers[0].info().numerics is Numerics.STRICT:
        assert said.token_ids == expected.token_ids
    await cluster.assert_at_rest()
    assert cluster.num_compiles == compiles


@pytest.mark.asyncio(loop_scope="module")
@pytest.mark.parametrize("damaged", [0, 12])
async def test_blocks_that_cannot_be_had_are_computed_by_decode(cluster, monkeypatch, caplog, damaged):
    """A bit flips in memory behind the copy, so that the frame is wrong however often it is sent."""
    frames = damage_copies(monkeypatch, cluster.workers[0]._outlet.sender, damaged)
    rng = random.Random(damaged)
    prompt = [rng.randrange(VOCAB) for _ in range(61)]
    sampling = SamplingParams(max_tokens=12, temperature=1.0, seed=3, ignore_eos=True, logprobs=2)
    request = Request(f"{0xC000 + damaged:032x}", prompt, len(prompt), sampling)
    compiles = cluster.num_compiles
    apart = await cluster.client.run(request, cluster.decode, cluster.prefill)
    together = await cluster.client.run(rename(request), cluster.colocated, None)
    assert frames and "are computed here" in caplog.text
    assert apart.failure is None and len(apart.token_ids) == 12
    if cluster.workers[0].info().numerics is Numerics.STRICT:
        assert (apart.token_ids, apart.logprobs) == (together.token_ids, together.logprobs)
    await cluster.assert_at_rest()
    assert cluster.num_compiles == compiles
