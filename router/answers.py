"""What clients get: OpenAI's response objects, whole or as server-sent events.

Everything that is the same in all events of a stream is encoded once; an event is then three byte strings.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

from engine_core.messages import TokenChunk
from router.choice import ChatLogprobs, Choice, CompletionLogprobs
from router.http import encode_json
from router.tokenizer import TextCodec

DONE = b"data: [DONE]\n\n"


class Echo(NamedTuple):
    """A prompt."""

    text: str
    token_ids: Sequence[int]


NO_ECHO = Echo("", ())


class Answer:
    """What all parts of one response share.

    Args:
        response_id: made by the gateway.
        logprobs: whether the client asked for them.
        echoes: per choice, what to put before the answer.
    """

    def __init__(
        self,
        response_id: str,
        model: str,
        fingerprint: str,
        choices: Sequence[Choice],
        *,
        logprobs: bool,
        echoes: Sequence[Echo] | None,
    ) -> None:
        self.response_id = response_id
        self.created = int(time.time())
        self.model = model
        self.fingerprint = fingerprint
        self.choices = choices
        self.logprobs = logprobs
        self.echoes = echoes or [NO_ECHO] * len(choices)

    def head(self, kind: str) -> dict[str, Any]:
        """The fields of every object."""
        return {
            "id": self.response_id,
            "object": kind,
            "created": self.created,
            "model": self.model,
            "system_fingerprint": self.fingerprint,
        }


class Writer(Protocol):
    """Turns chunks into a response body."""

    def write(self, index: int, chunk: TokenChunk) -> bytes:
        """Take a chunk of a choice; return what can be sent of it."""
        ...

    def end(self, usage: dict[str, Any]) -> bytes:
        """The rest."""
        ...


def usage_of(prompt_tokens: int, completion_tokens: int, cached_tokens: int) -> dict[str, Any]:
    """OpenAI's usage object."""
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
        "prompt_tokens_details": {"cached_tokens": cached_tokens},
    }


class ChatStream:
    """Writer of chat.completion.chunk events."""

    def __init__(self, answer: Answer, codec: TextCodec, include_usage: bool) -> None:
        head = b"data: " + encode_json(answer.head("chat.completion.chunk"))[:-1]
        self._head = head
        self._tail = b',"usage":null}\n\n' if include_usage else b"}\n\n"
        self._choices = answer.choices
        self._prefixes = [head + b',"choices":[{"index":%d,"delta":' % index for index in range(len(answer.choices))]
        self._text_tail = b'},"logprobs":null,"finish_reason":null}]' + self._tail
        self._logprobs = ChatLogprobs(codec) if answer.logprobs else None
        self._include_usage = include_usage
        self._begun = [False] * len(answer.choices)

    def write(self, index: int, chunk: TokenChunk) -> bytes:
        """See Writer."""
        choice, prefix = self._choices[index], self._prefixes[index]
        text = choice.feed(chunk)
        event = b""
        if self._logprobs is not None:
            logprobs = encode_json({"content": self._logprobs.entries(chunk)})
            tail = b'},"logprobs":' + logprobs + b',"finish_reason":null}]' + self._tail
            event = prefix + b'{"content":' + encode_json(text) + tail
        elif text:
            event = prefix + b'{"content":' + encode_json(text) + self._text_tail
        if not self._begun[index]:
            self._begun[index] = True
            event = prefix + b'{"role":"assistant","content":""' + self._text_tail + event
        if choice.finish_reason is not None:
            reason = choice.finish_reason.encode()
            event += prefix + b'{},"logprobs":null,"finish_reason":"' + reason + b'"}]' + self._tail
        return event

    def end(self, usage: dict[str, Any]) -> bytes:
        """See Writer."""
        if not self._include_usage:
            return DONE
        return self._head + b',"choices":[],"usage":' + encode_json(usage) + b"}\n\n" + DONE


class CompletionStream:
    """Writer of text_completion events."""

    def __init__(self, answer: Answer, codec: TextCodec, include_usage: bool) -> None:
        head = b"data: " + encode_json(answer.head("text_completion"))[:-1]
        self._head = head
        self._tail = b',"usage":null}\n\n' if include_usage else b"}\n\n"
        self._choices = answer.choices
        self._prefixes = [head + b',"choices":[{"index":%d,"text":' % index for index in range(len(answer.choices))]
        self._text_tail = b',"logprobs":null,"finish_reason":null}]' + self._tail
        self._logprobs = _completion_logprobs(answer, codec)
        self._echoes = [echo.text for echo in answer.echoes]
        self._include_usage = include_usage

    def write(self, index: int, chunk: TokenChunk) -> bytes:
        """See Writer."""
        choice, prefix = self._choices[index], self._prefixes[index]
        text = choice.feed(chunk)
        if self._echoes[index]:
            text = self._echoes[index] + text
            self._echoes[index] = ""
        event = b""
        if self._logprobs is not None:
            columns = encode_json(self._logprobs[index].columns(chunk))
            event = prefix + encode_json(text) + b',"logprobs":' + columns + b',"finish_reason":null}]' + self._tail
        elif text:
            event = prefix + encode_json(text) + self._text_tail
        if choice.finish_reason is not None:
            reason = choice.finish_reason.encode()
            event += prefix + b'"","logprobs":null,"finish_reason":"' + reason + b'"}]' + self._tail
        return event

    def end(self, usage: dict[str, Any]) -> bytes:
        """See Writer."""
        if not self._include_usage:
            return DONE
        return self._head + b',"choices":[],"usage":' + encode_json(usage) + b"}\n\n" + DONE


class ChatWhole:
    """Writer of one chat.completion object."""

    def __init__(self, answer: Answer, codec: TextCodec) -> None:
        self._answer = answer
        self._texts = [""] * len(answer.choices)
        self._logprobs = ChatLogprobs(codec) if answer.logprobs else None
        self._entries: list[list[Any]] = [[] for _ in answer.choices]

    def write(self, index: int, chunk: TokenChunk) -> bytes:
        """See Writer."""
        self._texts[index] += self._answer.choices[index].feed(chunk)
        if self._logprobs is not None:
            self._entries[index] += self._logprobs.entries(chunk)
        return b""

    def end(self, usage: dict[str, Any]) -> bytes:
        """See Writer."""
        body = self._answer.head("chat.completion")
        body["choices"] = [
            {
                "index": index,
                "message": {"role": "assistant", "content": self._texts[index], "refusal": None},
                "logprobs": {"content": self._entries[index]} if self._logprobs is not None else None,
                "finish_reason": choice.finish_reason,
            }
            for index, choice in enumerate(self._answer.choices)
        ]
        body["usage"] = usage
        return encode_json(body)


class CompletionWhole:
    """Writer of one text_completion object."""

    def __init__(self, answer: Answer, codec: TextCodec) -> None:
        self._answer = answer
        self._texts = [echo.text for echo in answer.echoes]
        self._logprobs = _completion_logprobs(answer, codec)
        self._columns: list[dict[str, list[Any]]] = [{} for _ in answer.choices]

    def write(self, index: int, chunk: TokenChunk) -> bytes:
        """See Writer."""
        self._texts[index] += self._answer.choices[index].feed(chunk)
        if self._logprobs is not None:
            known = self._columns[index]
            for name, values in self._logprobs[index].columns(chunk).items():
                known.setdefault(name, []).extend(values)
        return b""

    def end(self, usage: dict[str, Any]) -> bytes:
        """See Writer."""
        body = self._answer.head("text_completion")
        body["choices"] = [
            {
                "index": index,
                "text": self._texts[index],
                "logprobs": self._columns[index] if self._logprobs is not None else None,
                "finish_reason": choice.finish_reason,
            }
            for index, choice in enumerate(self._answer.choices)
        ]
        body["usage"] = usage
        return encode_json(body)


def _completion_logprobs(answer: Answer, codec: TextCodec) -> list[CompletionLogprobs] | None:
    return [CompletionLogprobs(codec, echo.token_ids) for echo in answer.echoes] if answer.logprobs else None
