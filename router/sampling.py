"""Validated request bodies to `SamplingParams`."""

from __future__ import annotations

import random
from collections.abc import Sequence

import msgspec

from engine_core.errors import RequestError, RequestTooLong
from engine_core.types import MAX_LOGIT_BIAS, SamplingParams
from router.openai_types import ChatBody, Common, CompletionBody

COMPLETION_MAX_TOKENS = 16
SEED_MASK = 2**64 - 1
_GOLDEN = 0x9E3779B97F4A7C15  # spreads the seeds of the choices of one request

_random = random.Random().getrandbits  # seeds shall differ between requests and gateways; they are no secret


def completion_sampling(body: CompletionBody, prompt_len: int, max_len: int, vocab_size: int) -> SamplingParams:
    """Of /v1/completions."""
    _check_len(prompt_len, max_len, "prompt")
    asked = _check_max_tokens(body.max_tokens, "max_tokens", prompt_len, max_len)
    max_tokens = asked or min(COMPLETION_MAX_TOKENS, max_len - prompt_len)
    sampling = _sampling(body, max_tokens, body.logprobs, vocab_size)
    if body.echo and body.logprobs is not None:
        return msgspec.structs.replace(sampling, prompt_logprobs=True)
    return sampling


def chat_sampling(body: ChatBody, prompt_len: int, max_len: int, vocab_size: int) -> SamplingParams:
    """Of /v1/chat/completions."""
    _check_len(prompt_len, max_len, "messages")
    if body.max_tokens is not None and body.max_completion_tokens not in (None, body.max_tokens):
        raise RequestError("max_tokens and max_completion_tokens differ: give one", "max_tokens")
    name = "max_completion_tokens" if body.max_completion_tokens is not None else "max_tokens"
    asked = _check_max_tokens(body.max_completion_tokens or body.max_tokens, name, prompt_len, max_len)
    if body.top_logprobs is not None and not body.logprobs:
        raise RequestError("top_logprobs needs logprobs to be true", "top_logprobs")
    logprobs = (body.top_logprobs or 0) if body.logprobs else None
    return _sampling(body, asked or max_len - prompt_len, logprobs, vocab_size)


def choice_seed(seed: int, index: int) -> int:
    """The seed of choice `index`; choice 0 has the request's own."""
    return (seed + index * _GOLDEN) & SEED_MASK


def stop_strings(body: Common) -> Sequence[str]:
    """As a list."""
    if body.stop is None:
        return ()
    return (body.stop,) if isinstance(body.stop, str) else body.stop


def too_long(prompt_len: int, max_len: int, param: str, at_least: str = "") -> RequestTooLong:
    """The error for a prompt that leaves no room for an answer."""
    return RequestTooLong(
        f"This model's maximum context length is {max_len} tokens, and your prompt has {at_least}{prompt_len} tokens. "
        "Please reduce its length.",
        param,
    )


def _check_len(prompt_len: int, max_len: int, param: str) -> None:
    if prompt_len == 0:
        raise RequestError("the prompt has no tokens", param, "empty_prompt")
    if prompt_len >= max_len:
        raise too_long(prompt_len, max_len, param)


def _check_max_tokens(asked: int | None, name: str, prompt_len: int, max_len: int) -> int | None:
    if asked is not None and prompt_len + asked > max_len:
        raise RequestTooLong(
            f"This model's maximum context length is {max_len} tokens, and you asked for {prompt_len + asked} tokens "
            f"({prompt_len} in the prompt, {asked} for the answer). Please reduce {name}.",
            name,
        )
    return asked


def _sampling(body: Common, max_tokens: int, logprobs: int | None, vocab_size: int) -> SamplingParams:
    if body.min_p == 1:
        raise RequestError("min_p must be below 1", "min_p")
    if body.stop_token_ids and max(body.stop_token_ids) >= vocab_size:
        raise RequestError(f"token ids must be below {vocab_size}", "stop_token_ids")
    return SamplingParams(
        max_tokens=max_tokens,
        temperature=1.0 if body.temperature is None else body.temperature,
        top_k=max(body.top_k or 0, 0),
        top_p=1.0 if body.top_p is None else body.top_p,
        min_p=body.min_p or 0.0,
        presence_penalty=body.presence_penalty or 0.0,
        frequency_penalty=body.frequency_penalty or 0.0,
        repetition_penalty=1.0 if body.repetition_penalty is None else body.repetition_penalty,
        logit_bias=_logit_bias(body.logit_bias, vocab_size) if body.logit_bias else (),
        stop_token_ids=tuple(body.stop_token_ids or ()),
        ignore_eos=bool(body.ignore_eos),
        seed=_random(64) if body.seed is None else body.seed & SEED_MASK,
        logprobs=logprobs,
    )


def _logit_bias(bias: dict[int, float], vocab_size: int) -> tuple[tuple[int, float], ...]:
    if len(bias) > MAX_LOGIT_BIAS:
        raise RequestError(f"at most {MAX_LOGIT_BIAS} tokens can be biased, not {len(bias)}", "logit_bias")
    if min(bias) < 0 or max(bias) >= vocab_size:
        raise RequestError(f"token ids must be from 0 to {vocab_size - 1}", "logit_bias")
    return tuple(bias.items())
