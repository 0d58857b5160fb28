"""The text side of one choice: detokenizing, stop strings, log probabilities."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from engine_core.messages import TokenChunk
from engine_core.types import TokenLogprobs
from router.detokenizer import Detokenizer
from router.stop_strings import StopMatcher
from router.tokenizer import TextCodec

LOWEST_LOGPROB = -9999.0  # JSON has no -Infinity; OpenAI uses this number


class Choice:
    """One answer as it grows.

    Attributes:
        finish_reason: set once it is complete; later chunks must not be fed.
        stopped: a stop string ended it, so the workers do not know that it is over.
        num_tokens: generated so far.
    """

    __slots__ = ("_detokenizer", "_matcher", "finish_reason", "num_tokens", "stopped")

    def __init__(self, detokenizer: Detokenizer, stops: Sequence[str]) -> None:
        self.finish_reason: str | None = None
        self.stopped = False
        self.num_tokens = 0
        self._detokenizer = detokenizer
        self._matcher = StopMatcher(stops) if stops else None

    @property
    def has_stops(self) -> bool:
        """Whether its text may end it."""
        return self._matcher is not None

    def feed(self, chunk: TokenChunk) -> str:
        """The text that a chunk adds."""
        text = self._detokenizer.feed(chunk.token_ids)
        self.num_tokens += len(chunk.token_ids)
        ended = chunk.finish_reason is not None
        if ended:
            text += self._detokenizer.flush()
            self.finish_reason = chunk.finish_reason
        matcher = self._matcher
        if matcher is not None:
            text = matcher.feed(text)
            if matcher.stopped:
                self.stopped = not ended
                self.finish_reason = "stop"
            elif ended:
                text += matcher.flush()
        return text


class ChatLogprobs:
    """Log probabilities in the shape of chat completions."""

    def __init__(self, codec: TextCodec) -> None:
        self._codec = codec

    def entries(self, chunk: TokenChunk) -> list[dict[str, Any]]:
        """One per token."""
        return [
            {**self._token(token_id, entry.logprob), "top_logprobs": self._alternatives(entry)}
            for token_id, entry in zip(chunk.token_ids, chunk.logprobs, strict=False)
        ]

    def _alternatives(self, entry: TokenLogprobs) -> list[dict[str, Any]]:
        return [self._token(*pair) for pair in zip(entry.top_ids, entry.top_logprobs, strict=False)]

    def _token(self, token_id: int, logprob: float) -> dict[str, Any]:
        raw = self._codec.token_bytes(token_id)
        token = raw.decode(errors="replace")
        return {"token": token, "logprob": max(logprob, LOWEST_LOGPROB), "bytes": list(raw)}


class CompletionLogprobs:
    """Log probabilities in the shape of completions; `text_offset` counts characters of the text.

    Args:
        prompt_ids: echoed before the answer; the first has no log probability, and is null.
    """

    def __init__(self, codec: TextCodec, prompt_ids: Sequence[int]) -> None:
        self._codec = codec
        self._offset = 0
        self._prompt_ids = prompt_ids

    def columns(self, chunk: TokenChunk) -> dict[str, list[Any]]:
        """One row per token."""
        columns: dict[str, list[Any]] = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
        if self._prompt_ids:
            self._add(columns, self._prompt_ids, [None, *chunk.prompt_logprobs])
            self._prompt_ids = ()
        self._add(columns, chunk.token_ids, chunk.logprobs)
        return columns

    def _add(
        self, columns: dict[str, list[Any]], token_ids: Sequence[int], entries: Sequence[TokenLogprobs | None]
    ) -> None:
        for token_id, entry in zip(token_ids, entries, strict=False):
            token = self._text(token_id)
            columns["tokens"].append(token)
            columns["text_offset"].append(self._offset)
            self._offset += len(token)
            if entry is None:
                columns["token_logprobs"].append(None)
                columns["top_logprobs"].append(None)
                continue
            logprob = max(entry.logprob, LOWEST_LOGPROB)
            top = {
                self._text(alternative): max(value, LOWEST_LOGPROB)
                for alternative, value in zip(entry.top_ids, entry.top_logprobs, strict=False)
            }
            columns["token_logprobs"].append(logprob)
            columns["top_logprobs"].append(top | {token: logprob} if top else None)

    def _text(self, token_id: int) -> str:
        return self._codec.token_bytes(token_id).decode(errors="replace")
