"""`baton chat`: a conversation in the terminal over the OpenAI API of a running Baton."""

from __future__ import annotations

import contextlib
import importlib
import json
import sys
from collections.abc import Iterator
from typing import Any, TextIO

import httpx

from engine_core.errors import ConfigError

HELP = """\
/clear    forget the conversation
/system   set the system message: /system You are a poet.
/exit     leave (or Ctrl-D)
Ctrl-C    stop the answer that is being written
"""


class Conversation:
    """What was said, and how to get the next answer.

    Args:
        client: its base_url ends in /v1.
        model: name to ask for.
        options: further fields of every request, such as temperature.
    """

    def __init__(self, client: httpx.Client, model: str, system: str, options: dict[str, Any]) -> None:
        self._client = client
        self._model = model
        self._options = options
        self.system = system
        self.turns: list[dict[str, str]] = []

    def clear(self) -> None:
        """Forget everything but the system message."""
        self.turns = []

    def ask(self, text: str) -> Iterator[str]:
        """The answer, piece by piece. What was received is remembered even if the caller stops listening."""
        self.turns.append({"role": "user", "content": text})
        pieces: list[str] = []
        try:
            for piece in self._stream():
                pieces.append(piece)
                yield piece
        finally:
            if pieces:
                self.turns.append({"role": "assistant", "content": "".join(pieces)})
            else:
                self.turns.pop()

    def _stream(self) -> Iterator[str]:
        system = [{"role": "system", "content": self.system}] if self.system else []
        body = {"model": self._model, "messages": system + self.turns, "stream": True, **self._options}
        with self._client.stream("POST", "chat/completions", json=body) as response:
            if response.is_error:
                response.read()
                raise ChatError(_error_message(response))
            for line in _lines(response):
                if not line.startswith("data: ") or line == "data: [DONE]":
                    continue
                event = json.loads(line.removeprefix("data: "))
                if "error" in event:
                    raise ChatError(event["error"].get("message", "unknown error"))
                for choice in event.get("choices", []):
                    if piece := choice.get("delta", {}).get("content"):
                        yield piece


def _lines(response: httpx.Response) -> Iterator[str]:
    """Of an event stream, which end at line feeds; httpx would end them at U+2028 and others, too, within an answer."""
    rest = ""
    for text in response.iter_text():
        *lines, rest = (rest + text).split("\n")
        yield from lines


class ChatError(Exception):
    """The server's own words."""


def _error_message(response: httpx.Response) -> str:
    try:
        return str(response.json()["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return f"HTTP {response.status_code}"


def run(url: str, model: str | None, system: str, options: dict[str, Any]) -> int:
    """Talk until the person leaves; returns the exit status."""
    with httpx.Client(base_url=url, timeout=httpx.Timeout(10, read=None)) as client:
        try:
            name = model or first_model(client)
        except httpx.HTTPError:
            raise ConfigError(f"nothing answers at {url}; `baton serve` starts a server") from None
        with contextlib.suppress(ImportError):
            importlib.import_module("readline")  # line editing and history for input()
        sys.stdout.write(f"Chatting with {name} at {url}. /help lists the commands.\n")
        talk(Conversation(client, name, system, options), sys.stdout)
    return 0


def first_model(client: httpx.Client) -> str:
    """What the server serves."""
    response = client.get("models")
    if response.is_error:
        raise ConfigError(f"{client.base_url} answers with {_error_message(response)}")
    return str(response.json()["data"][0]["id"])


def talk(conversation: Conversation, out: TextIO) -> None:
    """Read, answer, repeat."""
    bold, plain = ("\x1b[1m", "\x1b[0m") if out.isatty() else ("", "")
    while True:
        try:
            text = input(f"\n{bold}you>{plain} ").strip()
        except EOFError:
            out.write("\n")
            return
        except KeyboardInterrupt:
            out.write("  (/exit or Ctrl-D leaves)")
            continue
        if text == "/exit":
            return
        if text.startswith("/"):
            out.write(command(conversation, text))
        elif text:
            out.write(f"{bold}baton>{plain} ")
            answer(conversation, text, out)


def command(conversation: Conversation, text: str) -> str:
    """Obey a line that starts with a slash; returns what to print."""
    name, _, rest = text.partition(" ")
    if name == "/clear":
        conversation.clear()
        return "The conversation is forgotten.\n"
    if name == "/system":
        conversation.system = rest.strip()
        return "The system message is set.\n" if conversation.system else "There is no system message now.\n"
    return HELP


def answer(conversation: Conversation, text: str, out: TextIO) -> None:
    """Write one answer as it comes. Ctrl-C ends it, and the server frees its slot."""
    pieces = conversation.ask(text)
    try:
        with contextlib.closing(pieces):  # type: ignore[type-var]
            for piece in pieces:
                out.write(piece)
                out.flush()
    except KeyboardInterrupt:
        out.write(" [stopped]")
    except ChatError as error:
        out.write(f"[error: {error}]")
    except httpx.HTTPError as error:
        out.write(f"[the connection failed: {error}]")
    out.write("\n")
