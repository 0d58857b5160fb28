"""What clients send: OpenAI's request bodies as strict structs, and the error for each way of getting them wrong."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from operator import attrgetter
from typing import Annotated, TypeVar

import msgspec
from msgspec import UNSET, Meta, Raw, Struct, UnsetType

from engine_core.errors import RequestError
from engine_core.types import MAX_TOP_LOGPROBS

MAX_STOPS = 4
MAX_STOP_CHARS = 1024
MAX_STOP_IDS = 128


Penalty = Annotated[float, Meta(ge=-2, le=2)] | None
Count = Annotated[int, Meta(ge=1, le=2**31 - 1)] | None
Unparsed = Raw | UnsetType  # what need not be understood is not parsed: a megabyte of it costs nothing
Seed = Annotated[int, Meta(ge=-(2**63), le=2**63 - 1)] | None
StopString = Annotated[str, Meta(min_length=1, max_length=MAX_STOP_CHARS)]
TokenId = Annotated[int, Meta(ge=0, le=2**31 - 1)]


class StreamOptions(Struct, forbid_unknown_fields=True):
    """How to stream."""

    include_usage: bool | None = None
    include_obfuscation: bool | None = None  # accepted, without effect


class ResponseFormat(Struct):
    """Only {"type": "text"} is served."""

    type: str


class ContentPart(Struct):
    """Part of a message; only text is served."""

    type: str
    text: str | None = None


class ChatMessage(Struct, forbid_unknown_fields=True):
    """One turn."""

    role: str
    content: str | list[ContentPart] | None = None
    name: str | None = None
    refusal: str | None = None
    tool_call_id: str | None = None
    tool_calls: Unparsed = UNSET
    function_call: Unparsed = UNSET
    audio: Unparsed = UNSET
    annotations: Unparsed = UNSET


class Common(Struct, forbid_unknown_fields=True, kw_only=True):
    """Fields of both endpoints."""

    model: str
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: Count = None
    n: Annotated[int, Meta(ge=1, le=2**31 - 1)] | None = None
    temperature: Annotated[float, Meta(ge=0, le=2)] | None = None
    top_p: Annotated[float, Meta(gt=0, le=1)] | None = None
    top_k: Annotated[int, Meta(ge=-1, le=2**31 - 1)] | None = None
    min_p: Annotated[float, Meta(ge=0, le=1)] | None = None
    presence_penalty: Penalty = None
    frequency_penalty: Penalty = None
    repetition_penalty: Annotated[float, Meta(gt=0, le=10)] | None = None
    logit_bias: dict[int, Annotated[float, Meta(ge=-100, le=100)]] | None = None
    stop: StopString | Annotated[list[StopString], Meta(max_length=MAX_STOPS)] | None = None
    stop_token_ids: Annotated[list[TokenId], Meta(max_length=MAX_STOP_IDS)] | None = None
    ignore_eos: bool | None = None
    min_tokens: Annotated[int, Meta(ge=0)] | None = None  # load generators send it; only together with ignore_eos
    seed: Seed = None
    user: str | None = None  # accepted, without effect


class CompletionBody(Common, forbid_unknown_fields=True, kw_only=True):
    """POST /v1/completions."""

    prompt: str | list[str | TokenId | list[TokenId]] | None = None
    echo: bool | None = None
    logprobs: Annotated[int, Meta(ge=0, le=MAX_TOP_LOGPROBS)] | None = None
    best_of: int | None = None
    suffix: str | None = None


class ChatBody(Common, forbid_unknown_fields=True, kw_only=True):
    """POST /v1/chat/completions. The last group is accepted without effect; what would have one is refused."""

    messages: list[ChatMessage]
    max_completion_tokens: Count = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Meta(ge=0, le=MAX_TOP_LOGPROBS)] | None = None
    response_format: ResponseFormat | None = None
    chat_template_kwargs: Unparsed = UNSET
    tools: Unparsed = UNSET
    tool_choice: Unparsed = UNSET
    functions: Unparsed = UNSET
    function_call: Unparsed = UNSET
    modalities: Unparsed = UNSET
    audio: Unparsed = UNSET

    metadata: Unparsed = UNSET
    store: bool | None = None
    parallel_tool_calls: bool | None = None
    service_tier: str | None = None
    reasoning_effort: str | None = None
    verbosity: str | None = None
    prediction: Unparsed = UNSET
    prompt_cache_key: str | None = None
    prompt_cache_retention: str | None = None
    safety_identifier: str | None = None


class Unserved:
    """Fields that are not served, and are not parsed.

    Args:
        harmless: field -> JSON texts that change nothing, besides null.
    """

    def __init__(self, harmless: Mapping[str, Collection[bytes]]) -> None:
        self._harmless = harmless
        self._values = attrgetter(*harmless)
        self._absent = (UNSET,) * len(harmless)

    def find(self, sent: Struct) -> str | None:
        """The first that was sent, and not as one of the harmless texts."""
        values = self._values(sent)
        if values == self._absent:
            return None
        for (name, texts), value in zip(self._harmless.items(), values, strict=True):
            if value is not UNSET and bytes(value) not in (b"null", *texts):
                return name
        return None


Body = TypeVar("Body", CompletionBody, ChatBody)

_UNKNOWN = re.compile(r"unknown field `(.*?)`")
_MISSING = re.compile(r"missing required field `(.*?)`")
_PATH = re.compile(r" - at (?:`key` in )?`\$\.?(.*?)`$")


def decode_body(decoder: msgspec.json.Decoder[Body], body: bytes) -> Body:
    """Parse and validate.

    Raises:
        RequestError: names the field.
    """
    try:
        return decoder.decode(body)
    except msgspec.ValidationError as error:
        raise _invalid(str(error)) from None
    except msgspec.DecodeError as error:
        raise RequestError(f"the request body is not valid JSON: {error}", None, "invalid_json") from None
    except UnicodeDecodeError as error:
        raise RequestError(f"the request body is not valid UTF-8: {error.reason}", None, "invalid_json") from None
    except RecursionError:
        raise RequestError("the request body is nested too deeply", None, "invalid_json") from None


def _invalid(message: str) -> RequestError:
    """msgspec says what and where in one sentence."""
    at = _PATH.search(message)
    param = at[1].removesuffix("[...]") if at else ""
    text = message[: at.start()] if at else message
    for pattern, code in ((_UNKNOWN, "unknown_parameter"), (_MISSING, "missing_required_parameter")):
        field = pattern.search(text)
        if field:
            path = f"{param}.{field[1]}" if param else field[1]
            what = "Unknown" if code == "unknown_parameter" else "Missing required"
            return RequestError(f"{what} parameter: '{path}'.", path, code)
    code = "invalid_type" if " got `" in text else "invalid_value"
    where = f"Invalid value for '{param}': " if param else "Invalid request body: "
    return RequestError(f"{where}{text}.", param or None, code)
