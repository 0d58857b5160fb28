"""How large keys and values get: the units of a float8 cache, from prompts that are computed over an exact one."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

from engine_core.batch import Chunk
from engine_core.errors import NotFinite
from engine_core.kv_cache import FLOAT8_MAX
from engine_core.kv_scales import KvScales
from engine_core.replica import Replica
from engine_core.sequence import Sequence as Seq
from engine_core.types import Request, SamplingParams

HEADROOM = 1.25  # what is served may be larger than what was seen; beyond it values are clipped


def calibrate(replica: Replica, prompts: Iterable[Sequence[int]]) -> KvScales:
    """Units by which the largest value of each head, and some more, is what float8 can just hold.

    Args:
        replica: its cache is not float8, and it serves nothing meanwhile.
        prompts: token ids; what is beyond the model's length is cut off.

    Raises:
        NotFinite: the model computes no finite values.
    """
    layout = replica.resolved.layout
    largest = np.zeros((layout.num_layers, 2 * layout.num_kv_heads), np.float32)
    for number, prompt in enumerate(prompts):
        known = prompt[: replica.resolved.max_model_len - 1]
        for layer, values in enumerate(_kv(replica, f"calibration-{number}", known)):
            largest[layer] = np.maximum(largest[layer], np.abs(values).max(axis=(0, 2)))
    if not np.isfinite(largest).all():
        raise NotFinite("the model's keys or values are not finite")
    units = np.where(largest > 0, largest * (HEADROOM / FLOAT8_MAX), 1)
    return tuple(tuple(row) for row in units.astype(np.float32).tolist())


def _kv(replica: Replica, name: str, prompt: Sequence[int]) -> list[np.ndarray]:
    """Of a prompt, per layer `[T, 2K, H]` f32."""
    sequence = Seq.of(Request(name, list(prompt), len(prompt), SamplingParams(temperature=0.0)))
    memory, most = replica.memory, replica.prefill_budget[0]
    placed = memory.place(sequence, computes=True)
    assert placed, "nothing else holds pages"
    try:
        replica.prepare_slot(sequence)
        while sequence.num_dispatched < len(prompt):
            start, count = sequence.num_dispatched, min(most, len(prompt) - sequence.num_dispatched)
            sequence.num_dispatched += count
            replica.dispatch_prefill([Chunk(sequence, start, count, is_last=start + count == len(prompt))])
        layers = replica.engine.gather(sequence.pages).wait()
    finally:
        memory.release(sequence)
    return [layer.reshape(-1, *layer.shape[2:])[: len(prompt)].astype(np.float32) for layer in layers]
