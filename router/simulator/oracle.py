"""What a fleet could do for a trace if placement were perfect."""

from __future__ import annotations

import math
from collections import OrderedDict
from dataclasses import dataclass

import numpy as np

from router.simulator.profile import WorkerProfile
from router.simulator.trace import Trace

INFINITE = 2**62


@dataclass(frozen=True, kw_only=True, slots=True)
class Capacity:
    """Requests per second of a trace that a fleet can serve, by what limits it.

    Attributes:
        prefill_rps: all prefill workers busy all the time, with the hits of one cache as large as all of theirs.
        decode_rps: all decode workers' batches as full as slots and memory allow.
        link_rps: all network interfaces of the smaller pool busy with KV of what the same hits leave to be moved.
    """

    prefill_rps: float
    decode_rps: float
    link_rps: float

    @property
    def rps(self) -> float:
        """The least of them."""
        return min(self.prefill_rps, self.decode_rps, self.link_rps)


def pooled_hits(trace: Trace, num_blocks: int) -> list[int]:
    """Per request, the prompt tokens that one least-recently-used cache of `num_blocks` holds when it arrives.

    As if all workers' caches were one: a fleet whose workers evict in this order can do no better by placement, up to
    what the order of arrival and completion makes of it. The last token is always computed, and blocks count whole.
    """
    cache: OrderedDict[int, None] = OrderedDict()
    hits = []
    size = trace.block_tokens
    for request in trace.requests:
        blocks = request.blocks[: request.input_tokens // size].tolist()
        depth = 0
        while depth < len(blocks) and blocks[depth] in cache:
            depth += 1
        hits.append(size * min(depth, (request.input_tokens - 1) // size))
        for block in reversed(blocks):  # a child leaves before its parent
            cache[block] = None
            cache.move_to_end(block)
        while len(cache) > num_blocks:
            cache.popitem(last=False)
    return hits


def hit_ratio(trace: Trace, num_blocks: int) -> float:
    """Share of the input tokens that such a cache holds."""
    return sum(pooled_hits(trace, num_blocks)) / trace.input_tokens


def mean_service_rps(trace: Trace, profile: WorkerProfile) -> float:
    """Requests per second that one worker could do of both prefill, with infinite caches, and decode at full batches.

    No fleet does more per worker.
    """
    hits = pooled_hits(trace, INFINITE)
    return _both(_prefill_s(trace, profile, hits), _decode_s(trace, profile))


def _both(prefill_s: float, decode_s: float) -> float:
    return 1 / (prefill_s + decode_s)


def _prefill_s(trace: Trace, profile: WorkerProfile, hits: list[int]) -> float:
    """Of a request, on average."""
    seconds = (profile.prefill_s(r.input_tokens - hit, hit) for r, hit in zip(trace.requests, hits, strict=True))
    return sum(seconds) / len(trace.requests)


def _decode_s(trace: Trace, profile: WorkerProfile) -> float:
    """Of a request, on average: its share of steps that are as full as slots and memory allow."""
    output = np.array([request.output_tokens for request in trace.requests], float)
    context = np.array([request.input_tokens for request in trace.requests]) + output / 2
    mean_context = float((context * output).sum() / output.sum())
    rows = max(1.0, min(profile.num_slots, profile.kv_tokens / mean_context))
    return float(output.mean()) * profile.decode_s(rows, rows * mean_context) / rows


def capacity(trace: Trace, profile: WorkerProfile, num_prefill: int, num_decode: int) -> Capacity:
    """Of a fleet with workers for both roles; of one without prefill workers, its decode workers do both in turn."""
    readers = num_prefill or num_decode
    hits = pooled_hits(trace, readers * (profile.kv_tokens // trace.block_tokens))
    prefill_s, decode_s = _prefill_s(trace, profile, hits), _decode_s(trace, profile)
    if not num_prefill:
        both = num_decode * _both(prefill_s, decode_s)
        return Capacity(prefill_rps=both, decode_rps=both, link_rps=math.inf)
    moved = (trace.input_tokens - sum(hits)) / len(trace.requests) * profile.kv_token_bytes
    return Capacity(
        prefill_rps=num_prefill / prefill_s,
        decode_rps=num_decode / decode_s,
        link_rps=min(num_prefill, num_decode) * profile.link_bytes_per_s / max(moved, 1),
    )
