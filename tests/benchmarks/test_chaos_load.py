"""The comparison at the heart of `baton chaos` sees what it should."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from benchmarks.chaos.command import Report
from benchmarks.chaos.fate import Fate
from benchmarks.chaos.load import Load, chaos_requests

BODY = {"prompt": [5], "max_tokens": 2, "temperature": 0}


def event(text: str, reason: str | None = None) -> str:
    choice = {"index": 0, "text": text, "finish_reason": reason, "logprobs": None}
    return json.dumps({"choices": [choice], "usage": None})


def usage(tokens: int) -> str:
    return json.dumps({"choices": [], "usage": {"prompt_tokens": 1, "completion_tokens": tokens}})


GOOD = [event("a"), event("b", "length"), usage(2), "[DONE]"]
CASES = {
    "the same": (GOOD, (0, 0)),
    "another token": ([event("a"), event("c", "length"), usage(2), "[DONE]"], (1, 0)),
    "a token less": ([event("a", "length"), usage(2), "[DONE]"], (1, 0)),
    "another reason": ([event("a"), event("b", "stop"), usage(2), "[DONE]"], (1, 0)),
    "another usage": ([event("a"), event("b", "length"), usage(3), "[DONE]"], (1, 0)),
    "no end": ([event("a")], (0, 1)),
    "no usage": ([event("a"), event("b", "length"), "[DONE]"], (0, 1)),
    "an error": ([event("a"), json.dumps({"error": {"message": "it broke"}})], (0, 1)),
}


@asynccontextmanager
async def answering(*answers: list[str] | None) -> AsyncIterator[str]:
    """A server that answers with these events, one list per request; the last one from then on. None: it hangs up."""
    left = list(answers)

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        length = int(next(line.split(b":")[1] for line in head.lower().split(b"\r\n") if b"content-length" in line))
        await reader.readexactly(length)
        events = left.pop(0) if len(left) > 1 else left[0]
        if events is None:
            writer.write(b"HTTP/1.1 200 OK\r\nconnection: close\r\ncontent-length: 99\r\n\r\ndata: ")
            writer.close()
            return
        body = "".join(f"data: {each}\n\n" for each in events).encode()
        writer.write(b"HTTP/1.1 200 OK\r\nconnection: close\r\ncontent-length: %d\r\n\r\n" % len(body) + body)
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    try:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/v1"
    finally:
        server.close()


@pytest.mark.parametrize("case", CASES)
async def test_a_stream_that_differs_is_counted(case: str) -> None:
    events, expected = CASES[case]
    async with answering(GOOD, events) as url:
        load = Load(url, "m", [BODY], Fate())
        await disturbed(load)
    score = load.score
    assert score.streams > 0
    assert (score.mismatched, score.lost) == (expected[0] * score.streams, expected[1] * score.streams)
    assert bool(score.errors) == any(expected)


async def test_only_line_feeds_end_events() -> None:
    text = "\u2028a\x85b\u2029"  # servers need not escape them
    said = [event("?", "length").replace("?", text), usage(1), "[DONE]"]
    async with answering(said) as url:
        load = Load(url, "m", [BODY], Fate())
        await disturbed(load)
    assert load.score.streams > 0 and not load.score.errors
    assert load._said[0][0] == ((text, "length", ()),)


async def test_a_stream_that_is_lost_undisturbed_ends_the_run() -> None:
    async with answering(CASES["no end"][0]) as url:
        with pytest.raises(RuntimeError, match="ended early"):
            await Load(url, "m", [BODY], Fate()).undisturbed(1)


async def disturbed(load: Load) -> None:
    await load.undisturbed(1)
    over = asyncio.Event()
    asyncio.get_running_loop().call_later(0.05, over.set)
    await load.until(over, 1)


@pytest.mark.parametrize("fate", ["dying", "died before", "lives"])
async def test_a_broken_stream_is_asked_again_only_where_its_gateway_was_killed(fate: str) -> None:
    died = Fate(num_killed=fate != "lives", num_gone=fate == "died before")
    async with answering(GOOD, None, GOOD) as url:
        load = Load(url, "m", [BODY], died)
        await disturbed(load)
    score = load.score
    assert score.streams > 0 and score.mismatched == 0
    assert (score.retried, score.lost) == ((1, 0) if fate == "dying" else (0, 1))


@pytest.mark.parametrize(("before", "frozen"), [(0, False), (1, False), (0, True), (1, True)])
def test_a_gap_while_a_gateway_stood_still_is_counted_apart(before: int, frozen: bool) -> None:
    fate = Fate(num_frozen=before + frozen, is_frozen=frozen)
    fate.latest = "freeze gateway"
    load = Load("", "m", [BODY], fate)
    load._note_gap(3.0, before)
    load._note_gap(2.0, before)
    assert load.score.gaps_s == {"freeze gateway": 3.0}
    assert load.score.longest_gap_s == (0.0 if frozen else 3.0)


def test_requests_are_of_every_kind_and_the_same_for_each_seed() -> None:
    bodies = chaos_requests(40, 300, 100, seed=3)
    assert bodies == chaos_requests(40, 300, 100, seed=3) != chaos_requests(40, 300, 100, seed=4)
    for feature in ("seed", "logprobs", "presence_penalty", "logit_bias", "stop", "n"):
        assert any(feature in body for body in bodies), feature
    assert any(body["temperature"] == 0 for body in bodies)


@pytest.mark.parametrize("harm", ["mismatched", "lost", "leaked", "changed"])
def test_a_report_is_clean_only_where_nothing_came_of_it(harm: str) -> None:
    assert Report(0, 1.0, streams=9).is_clean
    assert not Report(0, 1.0, streams=9, **{harm: 1}).is_clean
    assert not Report(0, 1.0).is_clean, "nothing was shown"
