"""The start-up proof of strict numerics: one sequence, computed in many ways, must give the same bits every time.

What is varied: chunk boundaries, the rows its tokens sit in, what the neighbouring rows compute, and prompt against
generated history. Compared are the sampled tokens, log probabilities of the likeliest tokens, and every KV byte.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import jax
import numpy as np

from engine_core.batch import Chunk
from engine_core.errors import ConfigError
from engine_core.replica import Replica
from engine_core.sequence import Sequence as Seq
from engine_core.types import MAX_TOP_LOGPROBS, Request, SamplingParams


def prove(replica: Replica) -> str:
    """Run the permutation test.

    Returns:
        A digest of the bits: workers with equal digests may exchange strict streams.

    Raises:
        ConfigError: the same sequence gave different bits; strict numerics cannot be had on this device.
    """
    rows = replica.resolved.decode_buckets[0]
    length = min(rows + 5, replica.resolved.max_model_len - 1)
    rng = np.random.default_rng(0)
    vocab = replica.resolved.spec.vocab_size
    prompt = rng.integers(0, vocab, length).tolist()
    neighbour = rng.integers(0, vocab, length).tolist()
    schedules = {
        "full chunks": ([rows], 0),
        "one token at a time": ([1], 0),
        "odd chunks": ([3, 7, 2], 0),
        "shifted rows beside another sequence": ([rows // 2 or 1], rows // 2),
        "one token beside another sequence": ([1], rows - 1),
    }
    last = len(replica.memory.shards) - 1
    bits = {name: _compute(replica, prompt, neighbour, sizes, lead, 0) for name, (sizes, lead) in schedules.items()}
    if last:
        name = "shifted rows beside another sequence"
        bits[f"{name}, on another row shard"] = _compute(replica, prompt, neighbour, *schedules[name], last)
    first = bits["full chunks"]
    for name, other in bits.items():
        if other != first:
            raise ConfigError(f"numerics=strict cannot be had here: {name!r} gave other bits than 'full chunks'")
    identity = f"{jax.__version__} {replica.resolved.fingerprint} {rows}".encode()
    return hashlib.blake2b(first, digest_size=16, key=hashlib.sha256(identity).digest()).hexdigest()


def _compute(
    replica: Replica, prompt: list[int], neighbour: list[int], sizes: Sequence[int], lead: int, shard: int
) -> bytes:
    """KV bytes and log probabilities of `prompt`, with `lead` rows of a neighbour in front of it in every step."""
    subject, other = _open(replica, "subject", prompt, shard), _open(replica, "other", neighbour, shard)
    probabilities = b""
    step = 0
    while subject.num_dispatched < len(prompt):
        beside = min(lead, len(neighbour) - other.num_dispatched)
        room = replica.resolved.decode_buckets[0] - beside
        size = min(sizes[step % len(sizes)], room, len(prompt) - subject.num_dispatched)
        chunks = [_advance(other, beside)] if beside else []
        chunks.append(_advance(subject, size))
        pending, output_rows = replica.dispatch_prefill(chunks)
        row = output_rows[-1]
        if chunks[-1].is_last:
            probabilities = repr((pending.tokens()[row], pending.logprobs(row, MAX_TOP_LOGPROBS))).encode()
        step += 1
    layers = replica.engine.gather(subject.pages).wait()
    size = replica.memory.page_size
    valid = [layer.reshape(-1, *layer.shape[2:])[: len(prompt)] for layer in layers]
    assert all(layer.shape[1] == size for layer in layers)
    for sequence in (subject, other):
        replica.memory.release(sequence)
    return probabilities + b"".join(np.ascontiguousarray(layer).tobytes() for layer in valid)


def _open(replica: Replica, name: str, tokens: list[int], shard: int) -> Seq:
    sampling = SamplingParams(temperature=0.0, logprobs=MAX_TOP_LOGPROBS)
    sequence = Seq.of(Request(name, tokens, len(tokens), sampling))
    placed = replica.memory.place(sequence, computes=True, shard=shard)
    assert placed, "nothing else holds pages yet"
    return sequence


def _advance(sequence: Seq, count: int) -> Chunk:
    start = sequence.num_dispatched
    sequence.num_dispatched += count
    return Chunk(sequence, start, count, is_last=sequence.num_dispatched == len(sequence.token_ids))
