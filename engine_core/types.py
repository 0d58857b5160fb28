"""What a request asks for and what comes back. Plain msgpack-able structs; declared once, used by every process."""

from __future__ import annotations

from enum import IntEnum, StrEnum

import msgspec


class Role(StrEnum):
    """What a worker does."""

    PREFILL = "prefill"
    DECODE = "decode"


class Tier(IntEnum):
    """Where a worker keeps a cached block."""

    DEVICE = 0
    HOST = 1


class Numerics(StrEnum):
    """`fast`: no token lost, repeated or re-rolled. `strict`: ids bitwise independent of placement (DESIGN.md)."""

    FAST = "fast"
    STRICT = "strict"


class FinishReason(StrEnum):
    """Why a sequence ended. `stop` covers end-of-sequence tokens and, in the gateway, stop strings."""

    STOP = "stop"
    LENGTH = "length"


class SamplingParams(msgspec.Struct, frozen=True, omit_defaults=True):
    """How to pick tokens; validated by the gateway, trusted by workers.

    Attributes:
        max_tokens: generated tokens at most, >= 1.
        temperature: 0 means greedy.
        top_k: 0 means off.
        top_p: (0, 1]; 1 means off.
        min_p: [0, 1); 0 means off.
        presence_penalty: added once per token already generated.
        frequency_penalty: added per occurrence already generated.
        repetition_penalty: > 0; 1 means off; over prompt and generated tokens (CTRL paper, section 4.1).
        logit_bias: (token id, bias) pairs, at most `MAX_LOGIT_BIAS`.
        stop_token_ids: end the sequence; the token itself is not part of the answer.
        ignore_eos: do not stop at the model's own end-of-sequence tokens.
        seed: of the counter-based generator; the draw depends on (seed, position) alone.
        logprobs: None, or the number of alternatives per token, 0 to `MAX_TOP_LOGPROBS`.
        prompt_logprobs: those of the prompt's own tokens too, but for its first; needs `logprobs`.
    """

    max_tokens: int = 16
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    seed: int = 0
    logprobs: int | None = None
    prompt_logprobs: bool = False

    @property
    def has_penalties(self) -> bool:
        """Whether token counts influence the logits."""
        return self.presence_penalty != 0 or self.frequency_penalty != 0 or self.repetition_penalty != 1


MAX_TOP_LOGPROBS = 20
MAX_LOGIT_BIAS = 300


class TokenLogprobs(msgspec.Struct, frozen=True, array_like=True):
    """Log probabilities of one token, before temperature and penalties.

    Attributes:
        logprob: natural log probability of the token.
        top_ids: most likely tokens, best first.
        top_logprobs: theirs.
    """

    logprob: float
    top_ids: tuple[int, ...] = ()
    top_logprobs: tuple[float, ...] = ()


class Request(msgspec.Struct, frozen=True):
    """What the user asked, once tokenized; it never changes.

    Attributes:
        request_id: 128-bit random hex, made by the gateway; one per choice (`n`).
        token_ids: the prompt, and behind `num_prompt_tokens` what an earlier life of the stream generated.
        num_prompt_tokens: length of the prompt proper.
        sampling: see `SamplingParams`; `max_tokens` counts from the prompt's end, not from this attempt's start.
        salt: server-derived; blocks of different salts never match.
        epoch: attempt number; frames of older epochs are dropped.
    """

    request_id: str
    token_ids: list[int]
    num_prompt_tokens: int
    sampling: SamplingParams
    salt: bytes = b""
    epoch: int = 0
