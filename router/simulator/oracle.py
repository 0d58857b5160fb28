"""What caches of a given size could do for a trace if placement were perfect."""

from __future__ import annotations

from collections import OrderedDict

from router.simulator.trace import Trace


def ideal_hit_ratio(trace: Trace) -> float:
    """Share of the input tokens that an infinite cache holds when they arrive (the last token is always computed)."""
    return pooled_hit_ratio(trace, 2**62)


def pooled_hit_ratio(trace: Trace, num_blocks: int) -> float:
    """The same for one least-recently-used cache of `num_blocks`, as if all workers' caches were one.

    A fleet whose workers evict in this order can do no better by placement, up to what order of arrival and
    completion make of it.
    """
    cache: OrderedDict[int, None] = OrderedDict()
    hits = 0
    size = trace.block_tokens
    for request in trace.requests:
        blocks = request.blocks.tolist()
        depth = 0
        while depth < len(blocks) and blocks[depth] in cache:
            depth += 1
        hits += size * min(depth, (request.input_tokens - 1) // size)
        for block in reversed(blocks[: request.input_tokens // size]):  # a child leaves before its parent
            cache[block] = None
            cache.move_to_end(block)
        while len(cache) > num_blocks:
            cache.popitem(last=False)
    return hits / trace.input_tokens
