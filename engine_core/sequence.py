"""The engine's mutable progress of one request."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

from engine_core.messages import TokenChunk
from engine_core.types import FinishReason, Request, TokenLogprobs


@dataclass(slots=True, eq=False)
class Sequence:
    """One request on its way through a worker.

    Who owns what: `pages[i]` holds tokens `[i * page_size, (i + 1) * page_size)`; the sequence holds one reference to
    each of its pages until `pages` is emptied by whoever releases them.

    Attributes:
        token_ids: prompt and, behind it, every token generated so far and read by the host.
        num_cached: leading tokens found in the prefix cache when the sequence was admitted.
        num_dispatched: tokens whose KV is in the cache or will be once the steps dispatched so far have run.
        num_stored: leading blocks that have been put into the prefix cache.
        num_sampled: generated tokens, counting those dispatched and not read yet.
        shard: row shard on which it lies, -1 while it holds nothing.
        slot: row of that shard's slot state, -1 while it has none.
        hashes: block hashes of the full blocks of `token_ids`, as far as they have been needed.
        prompt_logprobs: of prompt tokens 1, 2, ... as far as the host has read them.
        cached_told: its owner has been told `num_cached`.
        token_on_host: the next step's input is the last of `token_ids`; else it is on the device, in the slot.
        finished: no more tokens are wanted; rows of it still in flight are ignored.
        created_at, admitted_at, decoding_at: `time.monotonic()` when it came, had its pages, had its first token.
    """

    request: Request
    token_ids: list[int]
    num_cached: int = 0
    num_dispatched: int = 0
    num_stored: int = 0
    num_sampled: int = 0
    shard: int = -1
    slot: int = -1
    pages: list[int] = field(default_factory=list)
    hashes: list[bytes] = field(default_factory=list)
    prompt_logprobs: list[TokenLogprobs] = field(default_factory=list)
    cached_told: bool = False
    token_on_host: bool = False
    finished: bool = False
    created_at: float = field(default_factory=time.monotonic)
    admitted_at: float = 0.0
    decoding_at: float = 0.0

    @classmethod
    def of(cls, request: Request) -> Sequence:
        """A sequence that has done nothing yet."""
        generated = len(request.token_ids) - request.num_prompt_tokens
        return cls(request=request, token_ids=list(request.token_ids), num_sampled=generated)

    @property
    def key(self) -> tuple[str, int]:
        """What names this attempt on every wire."""
        return self.request.request_id, self.request.epoch

    @property
    def num_valid(self) -> int:
        """Tokens whose KV is in the cache and whose ids the host knows: these blocks may be named and shared."""
        return min(self.num_dispatched, len(self.token_ids))

    @property
    def num_generated(self) -> int:
        """Generated tokens that the host has read."""
        return len(self.token_ids) - self.request.num_prompt_tokens

    @property
    def scores_prompt(self) -> bool:
        """Whether log probabilities of the prompt are wanted: with the first token, so not once there is one."""
        return self.request.sampling.prompt_logprobs and not self.num_generated

    @property
    def wants_more(self) -> bool:
        """Whether another token may be dispatched: the limit is known without reading the device."""
        return not self.finished and self.num_sampled < self.request.sampling.max_tokens

    def accept(
        self, token: int, eos_ids: frozenset[int], logprobs: TokenLogprobs | None, cached_tokens: int = 0
    ) -> TokenChunk:
        """Take the next generated token and say what the client gets.

        Args:
            token: sampled token, for position `num_generated`.
            eos_ids: the model's end-of-sequence tokens.
            logprobs: of this token, where the request asked for them.
            cached_tokens: to report with this chunk.

        Returns:
            A chunk with the token, or an empty one when the token is a stop token; `finish_reason` is set on the last.
        """
        sampling = self.request.sampling
        position = self.num_generated
        is_first = len(self.token_ids) == len(self.request.token_ids)
        is_stop = token in sampling.stop_token_ids or (not sampling.ignore_eos and token in eos_ids)
        reason = FinishReason.STOP if is_stop else None
        if not is_stop:
            self.token_ids.append(token)
            if self.num_generated >= sampling.max_tokens:
                reason = FinishReason.LENGTH
        self.finished = reason is not None
        return TokenChunk(
            request_id=self.request.request_id,
            epoch=self.request.epoch,
            position=position,
            token_ids=[] if is_stop else [token],
            finish_reason=reason,
            logprobs=[logprobs] if logprobs is not None and not is_stop else [],
            cached_tokens=cached_tokens,
            prompt_logprobs=self.prompt_logprobs if position == 0 else [],
            stage_s=self._stage_s() if is_first or self.finished else (),
        )

    def _stage_s(self) -> tuple[float, ...]:
        """Queue, prefill or hand-over, decode; empty where nobody took the times."""
        if not self.decoding_at:
            return ()
        now = time.monotonic()
        return self.admitted_at - self.created_at, self.decoding_at - self.admitted_at, now - self.decoding_at
