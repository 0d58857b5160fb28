import io
import json
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from deploy.chat import ChatError, Conversation, answer, command, first_model, run
from engine_core.errors import ConfigError


class Server:
    """Answers with the pieces it is told to; keeps the bodies it was sent."""

    def __init__(self, *pieces: str) -> None:
        self.pieces = pieces
        self.bodies: list[Any] = []

    def __call__(self, request: httpx.Request) -> httpx.Response:
        if request.url.path == "/v1/models":
            return httpx.Response(200, json={"data": [{"id": "demo"}]})
        self.bodies.append(json.loads(request.content))
        if self.bodies[-1]["model"] == "wrong":
            return httpx.Response(404, json={"error": {"message": "no such model"}})
        events = [{"choices": [{"delta": {"role": "assistant"}}]}]
        events += [{"choices": [{"delta": {"content": piece}}]} for piece in self.pieces]
        lines = [f"data: {json.dumps(event, ensure_ascii=False)}\n\n" for event in events] + ["data: [DONE]\n\n"]
        return httpx.Response(200, text="".join(lines))


@pytest.fixture
def server() -> Server:
    return Server("Hel", "lo")


@pytest.fixture
def client(server: Server) -> Iterator[httpx.Client]:
    with httpx.Client(base_url="http://baton/v1", transport=httpx.MockTransport(server)) as made:
        yield made


def test_a_conversation_remembers(client: httpx.Client, server: Server) -> None:
    conversation = Conversation(client, first_model(client), "Be brief.", {"temperature": 0.0})
    assert list(conversation.ask("Hi")) == ["Hel", "lo"]
    assert list(conversation.ask("Again")) == ["Hel", "lo"]
    assert server.bodies[1] == {
        "model": "demo",
        "stream": True,
        "temperature": 0.0,
        "messages": [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": "Hi"},
            {"role": "assistant", "content": "Hello"},
            {"role": "user", "content": "Again"},
        ],
    }


def test_an_answer_may_have_line_separators_of_its_own(client: httpx.Client, server: Server) -> None:
    """JSON escapes none of these, and events end at line feeds only."""
    server.pieces = ("one\u2028two", "\x85three\u2029", "\n")
    assert list(Conversation(client, "demo", "", {}).ask("Hi")) == list(server.pieces)


def test_an_answer_that_was_stopped_is_remembered_as_far_as_it_came(client: httpx.Client) -> None:
    conversation = Conversation(client, "demo", "", {})

    class Interrupting(io.StringIO):
        def write(self, text: str) -> int:
            if text == "lo":
                raise KeyboardInterrupt
            return super().write(text)

    out = Interrupting()
    answer(conversation, "Hi", out)
    assert out.getvalue() == "Hel [stopped]\n"
    assert conversation.turns == [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]


def test_an_error_is_shown_and_its_question_forgotten(client: httpx.Client) -> None:
    conversation = Conversation(client, "wrong", "", {})
    out = io.StringIO()
    answer(conversation, "Hi", out)
    assert out.getvalue() == "[error: no such model]\n"
    assert conversation.turns == []
    with pytest.raises(ChatError):
        list(conversation.ask("Hi"))


def test_commands(client: httpx.Client) -> None:
    conversation = Conversation(client, "demo", "", {})
    list(conversation.ask("Hi"))
    assert "forgotten" in command(conversation, "/clear")
    assert conversation.turns == []
    command(conversation, "/system You are a poet.")
    assert conversation.system == "You are a poet."
    assert "/exit" in command(conversation, "/what")


def test_nobody_there_is_one_clear_line() -> None:
    with pytest.raises(ConfigError, match="nothing answers at http"):
        run("http://127.0.0.1:9/v1", None, "", {})
