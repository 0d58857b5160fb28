"""The two generating endpoints: what differs between chat completions and completions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from http import HTTPStatus
from typing import Protocol

import msgspec

from engine_core.errors import RequestError
from engine_core.types import Request, SamplingParams
from router.answers import Answer, ChatStream, ChatWhole, CompletionStream, CompletionWhole, Echo, Writer
from router.choice import Choice
from router.config import GatewayConfig
from router.http import HttpError
from router.openai_types import ChatBody, Common, CompletionBody, Unserved, decode_body
from router.prompts import chat_prompt, completion_prompts, num_prompts
from router.sampling import chat_sampling, choice_seed, completion_sampling, stop_strings
from router.service import Service

UNSERVED = Unserved(  # fields of a chat, and what they may hold nevertheless
    {
        "tools": (b"[]",),
        "tool_choice": (b'"none"', b'"auto"'),
        "functions": (b"[]",),
        "function_call": (b'"none"', b'"auto"'),
        "audio": (),
        "modalities": (b'["text"]',),
    }
)


@dataclass(slots=True)
class Job:
    """A validated HTTP request, ready to be placed.

    Attributes:
        requests, choices: one each per choice.
        n: choices per prompt.
        num_prompt_tokens: of all prompts, each counted once.
    """

    requests: list[Request]
    choices: list[Choice]
    writer: Writer
    n: int
    num_prompt_tokens: int
    stream: bool


class Dialect(Protocol):
    """One endpoint's bodies."""

    name: str

    async def prepare(self, body: bytes) -> Job:
        """Validate a body; raises RequestError."""
        ...


class ChatDialect:
    """/v1/chat/completions."""

    name = "chat.completions"

    def __init__(self, service: Service) -> None:
        self._service = service
        self._decoder = msgspec.json.Decoder(ChatBody)

    async def prepare(self, body: bytes) -> Job:
        """See Dialect."""
        service = self._service
        asked = decode_body(self._decoder, body)
        _check_common(asked, 1, service.config)
        _check_chat(asked)
        max_len = await service.context_length()
        prompt = await chat_prompt(asked, service.codec, max_len)
        sampling = chat_sampling(asked, len(prompt), max_len, service.codec.vocab_size)
        requests, choices, n = _requests(service, asked, [prompt], [sampling], is_chat=True)
        answer = Answer(
            f"chatcmpl-{requests[0].request_id}",
            service.config.model_name,
            service.fingerprint,
            choices,
            logprobs=sampling.logprobs is not None,
            echoes=None,
        )
        stream = bool(asked.stream)
        writer = ChatStream(answer, service.codec, _usage(asked)) if stream else ChatWhole(answer, service.codec)
        return Job(requests, choices, writer, n, len(prompt), stream)


class CompletionDialect:
    """/v1/completions."""

    name = "completions"

    def __init__(self, service: Service) -> None:
        self._service = service
        self._decoder = msgspec.json.Decoder(CompletionBody)

    async def prepare(self, body: bytes) -> Job:
        """See Dialect."""
        service, codec = self._service, self._service.codec
        asked = decode_body(self._decoder, body)
        _check_common(asked, num_prompts(asked), service.config)
        _check_completion(asked)
        max_len = await service.context_length()
        prompts = await completion_prompts(asked, codec, max_len, service.config.special_tokens_in_prompt)
        samplings = [completion_sampling(asked, len(prompt), max_len, codec.vocab_size) for prompt in prompts]
        requests, choices, n = _requests(service, asked, prompts, samplings, is_chat=False)
        echoes = [Echo(codec.decode(prompt), prompt) for prompt in prompts for _ in range(n)] if asked.echo else None
        answer = Answer(
            f"cmpl-{requests[0].request_id}",
            service.config.model_name,
            service.fingerprint,
            choices,
            logprobs=samplings[0].logprobs is not None,
            echoes=echoes,
        )
        stream = bool(asked.stream)
        writer = CompletionStream(answer, codec, _usage(asked)) if stream else CompletionWhole(answer, codec)
        return Job(requests, choices, writer, n, sum(map(len, prompts)), stream)


def _requests(
    service: Service,
    asked: Common,
    prompts: Sequence[list[int]],
    samplings: Sequence[SamplingParams],
    *,
    is_chat: bool,
) -> tuple[list[Request], list[Choice], int]:
    n = asked.n or 1
    stops = stop_strings(asked)
    requests, choices = [], []
    for prompt, sampling in zip(prompts, samplings, strict=True):
        for index in range(n):
            own = sampling
            if index:
                own = msgspec.structs.replace(sampling, seed=choice_seed(sampling.seed, index))
            requests.append(Request(service.new_request_id(), prompt, len(prompt), own, service.salt))
            choices.append(Choice(service.codec.detokenizer(prompt, is_chat), stops))
    return requests, choices, n


def _usage(asked: Common) -> bool:
    return asked.stream_options is not None and bool(asked.stream_options.include_usage)


def _check_common(asked: Common, num_prompts: int, config: GatewayConfig) -> None:
    if asked.model != config.model_name:
        raise model_not_found(asked.model)
    num_choices = num_prompts * (asked.n or 1)
    if num_choices > config.max_choices:
        name = "n" if asked.n not in (None, 1) else "prompt"
        raise RequestError(f"one request may ask for at most {config.max_choices} answers, not {num_choices}", name)
    if asked.min_tokens and not asked.ignore_eos:
        raise RequestError("min_tokens is supported together with ignore_eos only", "min_tokens", "unsupported_value")
    if asked.stream_options is not None and not asked.stream:
        raise RequestError("stream_options needs stream to be true", "stream_options")


def model_not_found(model: str) -> HttpError:
    """404, as OpenAI says it."""
    return HttpError(HTTPStatus.NOT_FOUND, f"The model '{model[:200]}' does not exist.", "model_not_found", "model")


def _check_completion(asked: CompletionBody) -> None:
    if asked.prompt is None:
        raise RequestError("Missing required parameter: 'prompt'.", "prompt", "missing_required_parameter")
    if asked.best_of not in (None, asked.n or 1):
        raise RequestError("best_of must equal n", "best_of", "unsupported_value")
    if asked.suffix:
        raise RequestError("suffix is not supported", "suffix", "unsupported_value")


def _check_chat(asked: ChatBody) -> None:
    name = UNSERVED.find(asked)
    if name is not None:
        raise RequestError(f"this value of {name} is not supported", name, "unsupported_value")
    if asked.response_format is not None and asked.response_format.type != "text":
        raise RequestError("only response_format {'type': 'text'} is supported", "response_format", "unsupported_value")
