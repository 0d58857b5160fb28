"""The host's mirror of the slots: page tables and sampling parameters, ready to be indexed into a batch."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from engine_core.types import MAX_LOGIT_BIAS, Request

I32 = NDArray[np.int32]
F32 = NDArray[np.float32]

_LOW_WORD = (1 << 32) - 1


class SlotTable:
    """Per-slot rows plus one neutral row (index `num_slots`) that padding points to.

    Args:
        num_slots: S.
        pages_per_seq: P.
        num_pages: size of the row shard's pool; also the id that means "no page" there.
        vocab_size: V; also the token id that means "no logit bias".
        first_page: id of the pool's first page; a step counts the pages of each row shard from 0.
    """

    def __init__(
        self, num_slots: int, pages_per_seq: int, num_pages: int, vocab_size: int, first_page: int = 0
    ) -> None:
        rows = num_slots + 1
        self._first_page = first_page
        self.num_slots = num_slots
        self.num_pages = num_pages
        self.vocab_size = vocab_size
        self.page_table: I32 = np.full((rows, pages_per_seq), num_pages, np.int32)
        self.num_prompt: I32 = np.zeros(rows, np.int32)
        self.temperature: F32 = np.zeros(rows, np.float32)
        self.top_k: I32 = np.zeros(rows, np.int32)
        self.top_p: F32 = np.ones(rows, np.float32)
        self.min_p: F32 = np.zeros(rows, np.float32)
        self.presence_penalty: F32 = np.zeros(rows, np.float32)
        self.frequency_penalty: F32 = np.zeros(rows, np.float32)
        self.repetition_penalty: F32 = np.ones(rows, np.float32)
        self.seed: NDArray[np.uint32] = np.zeros((rows, 2), np.uint32)
        self.bias_ids: I32 = np.full((rows, MAX_LOGIT_BIAS), vocab_size, np.int32)
        self.bias_values: F32 = np.zeros((rows, MAX_LOGIT_BIAS), np.float32)
        self.logprobs: NDArray[np.bool_] = np.zeros(rows, np.bool_)
        self.version = 0
        self._free = list(range(num_slots - 1, -1, -1))

    @property
    def num_free(self) -> int:
        """Slots that no sequence holds."""
        return len(self._free)

    def acquire(self, request: Request) -> int:
        """Give a slot to a request and fill its sampling row. The caller checks `num_free` first."""
        slot = self._free.pop()
        sampling = request.sampling
        self.num_prompt[slot] = request.num_prompt_tokens
        self.temperature[slot] = sampling.temperature
        self.top_k[slot] = sampling.top_k
        self.top_p[slot] = sampling.top_p
        self.min_p[slot] = sampling.min_p
        self.presence_penalty[slot] = sampling.presence_penalty
        self.frequency_penalty[slot] = sampling.frequency_penalty
        self.repetition_penalty[slot] = sampling.repetition_penalty
        self.seed[slot] = (sampling.seed & _LOW_WORD, (sampling.seed >> 32) & _LOW_WORD)
        self.bias_ids[slot] = self.vocab_size
        self.bias_values[slot] = 0.0
        for i, (token, value) in enumerate(sampling.logit_bias):
            self.bias_ids[slot, i] = token
            self.bias_values[slot, i] = value
        self.logprobs[slot] = sampling.logprobs is not None
        self.version += 1
        return slot

    def set_pages(self, slot: int, first: int, pages: list[int]) -> None:
        """Write page ids `[first, first + len(pages))` of a slot's page table row."""
        self.page_table[slot, first : first + len(pages)] = np.subtract(pages, self._first_page)

    def release(self, slot: int) -> None:
        """Take a slot back. Steps in flight keep the rows they were built from."""
        self.page_table[slot] = self.num_pages
        self._free.append(slot)
