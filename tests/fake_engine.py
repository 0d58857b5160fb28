"""A replica whose device is numpy and whose answers can be computed by hand.

The "KV cache" holds token ids, so the next token is a function of exactly what a step reads through its page table:
a wrong page, a late write or a missing landing changes the answer.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from engine_core.batch import BatchBuilder
from engine_core.kv_cache import CacheLayout
from engine_core.models.spec import ModelSpec
from engine_core.replica import Replica
from engine_core.resolve import ResolvedEngine
from engine_core.sequence_memory import BlockUnion, SequenceMemory, split_memory
from engine_core.types import Numerics, TokenLogprobs
from engine_core.worker_stats import StatsRecorder

VOCAB = 97
EOS = 1


def next_token(context: Sequence[int]) -> int:
    """What the fake model says after `context`; never EOS, so that tests choose when it ends."""
    value = 7
    for token in context:
        value = (value * 31 + token + 3) % 1000003
    return 2 + value % (VOCAB - 2)


def generate(prompt: Sequence[int], count: int) -> list[int]:
    """The answer of `count` tokens, by hand."""
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(next_token(tokens))
    return tokens[len(prompt) :]


class FakeStep:
    """A step that is done when it is dispatched. The log probability of a token is its negative."""

    def __init__(self, tokens: list[int], scored: list[int]) -> None:
        self._tokens = tokens
        self._scored = scored

    def start_copy(self) -> None:
        pass

    def is_ready(self) -> bool:
        return True

    def tokens(self) -> list[int]:
        return self._tokens

    def logprobs(self, row: int, num_top: int) -> TokenLogprobs:
        return TokenLogprobs(-float(self._scored[row]), tuple(range(num_top)), (-0.5,) * num_top)


class FakePages:
    def __init__(self, layers: list[np.ndarray]) -> None:
        self._layers = layers

    def is_ready(self) -> bool:
        return True

    def wait(self) -> list[np.ndarray]:
        return self._layers


class FakeEngine:
    def __init__(self, resolved: ResolvedEngine) -> None:
        self.resolved = resolved
        self.cache = np.full((resolved.layout.num_pages, resolved.layout.page_size), -1, np.int64)
        self.last_tokens = np.zeros(resolved.num_slots, np.int64)
        self.num_steps = 0
        self.compiles_after_warmup = 0

    def dispatch(self, inputs) -> FakeStep:
        self.num_steps += 1
        shards = self.resolved.row_shards
        fields = ("rows", "token_slots", "tokens", "positions", "page_table", "kv_lens", "slots")
        parts = {name: np.split(getattr(inputs, name), shards) for name in fields}
        caches, slots = np.split(self.cache, shards), np.split(self.last_tokens, shards)
        sampled = [
            token
            for shard in range(shards)
            for token in self._run({name: parts[name][shard] for name in fields}, caches[shard], slots[shard])
        ]
        scored = zip(inputs.sampling.scored, sampled, strict=True)
        return FakeStep(sampled, [int(wanted) if wanted < VOCAB else drawn for wanted, drawn in scored])

    def _run(self, part, cache, last_tokens) -> list[int]:
        """One row shard's rows, over its own pages and slots (views)."""
        size = self.resolved.layout.page_size
        num_rows, num_slots = len(part["kv_lens"]), len(last_tokens)
        for t, row in enumerate(part["rows"]):
            if row == num_rows:
                continue
            slot = part["token_slots"][t]
            token = part["tokens"][t] if slot == num_slots else last_tokens[slot]
            page, offset = divmod(int(part["positions"][t]), size)
            cache[part["page_table"][row, page], offset] = token
        sampled = []
        for row in range(num_rows):
            length = int(part["kv_lens"][row])
            pages = part["page_table"][row, : -(-length // size)]
            sampled.append(next_token(cache[pages].reshape(-1)[:length].tolist()) if length else 0)
        for row, slot in enumerate(part["slots"]):
            if slot < num_slots:
                last_tokens[slot] = sampled[row]
        return sampled

    def init_slot(self, slot, prompt_ids, output_ids) -> None:
        pass

    def gather(self, pages, export=None) -> FakePages:
        return FakePages([self.cache[list(pages)][:, :, None, None].astype(np.float32)])

    def scatter(self, pages, layers) -> None:
        self.cache[list(pages)] = layers[0][:, :, 0, 0]


def spoil(engine: FakeEngine, length: int) -> None:
    """From now on logits of rows with so many tokens in the cache are not finite; -1: of none."""
    dispatch = type(engine).dispatch

    def spoiled(inputs) -> FakeStep:
        step = dispatch(engine, inputs)
        step._tokens = [
            -1 if kv_len == length else token for token, kv_len in zip(step._tokens, inputs.kv_lens, strict=True)
        ]
        return step

    engine.dispatch = spoiled


def fake_replica(
    *,
    num_pages: int = 64,
    page_size: int = 4,
    num_slots: int = 4,
    max_model_len: int = 64,
    prefill_tokens: int = 8,
    numerics: Numerics = Numerics.FAST,
    prefix_cache: bool = True,
    row_shards: int = 1,
) -> Replica:
    """Pages and slots are those of all row shards together."""
    spec = ModelSpec(
        architecture="Fake",
        num_layers=1,
        hidden_size=1,
        intermediate_size=1,
        num_heads=1,
        num_kv_heads=1,
        head_dim=1,
        vocab_size=VOCAB,
        rms_norm_eps=1e-6,
        rope_theta=1e4,
        rope_scaling=None,
        tie_embeddings=True,
        qk_norm=False,
        qkv_bias=False,
        sliding_window=(0,),
        max_position=max_model_len,
        eos_token_ids=(EOS,),
        dtype="float32",
        moe=None,
    )
    layout = CacheLayout(
        num_layers=1,
        num_pages=num_pages,
        page_size=page_size,
        num_kv_heads=1,
        head_dim=1,
        dtype="float32",
        head_align=1,
    )
    strict = numerics is Numerics.STRICT
    resolved = ResolvedEngine(
        spec=spec,
        layout=layout,
        dtype="float32",
        stacked=False,
        numerics=numerics,
        row_shards=row_shards,
        num_slots=num_slots,
        max_model_len=max_model_len,
        pages_per_seq=-(-max_model_len // page_size),
        decode_buckets=(num_slots * 2,) if strict else (1, num_slots // row_shards),
        prefill_buckets=() if strict else (prefill_tokens,),
        prefill_rows=2,
        scored_tokens=num_slots,
        fingerprint="00" * 16,
    )
    shards = split_memory(
        row_shards,
        num_pages=num_pages,
        page_size=page_size,
        num_slots=num_slots,
        pages_per_seq=resolved.pages_per_seq,
        vocab_size=VOCAB,
    )
    return Replica(
        engine=FakeEngine(resolved),
        memory=SequenceMemory(shards, page_size, b"test", reuse=prefix_cache),
        blocks=BlockUnion([shard.cache for shard in shards]),
        builder=BatchBuilder([shard.table for shard in shards]),
        identity="fake",
        stats=StatsRecorder(lambda: (0, 0)),
    )
