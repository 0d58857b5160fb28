import asyncio

import msgspec
import pytest

from engine_core.errors import WorkerDied
from engine_core.messages import TokenChunk
from engine_core.types import FinishReason, TokenLogprobs
from router.mailbox import Mailbox, joined

CHUNK = TokenChunk("r", 0, 0, [1])


async def test_takes_all_there_is_in_order() -> None:
    mailbox = Mailbox(asyncio.get_running_loop())
    mailbox.put(0, CHUNK)
    mailbox.put(1, CHUNK)
    assert [index for index, _ in await mailbox.take()] == [0, 1]


async def test_a_reader_that_waits_is_woken_and_hears_of_an_error_last() -> None:
    mailbox = Mailbox(asyncio.get_running_loop())
    reader = asyncio.create_task(mailbox.take())
    await asyncio.sleep(0)
    mailbox.put(0, CHUNK)
    mailbox.fail(WorkerDied("gone"))
    assert len(await reader) == 1
    with pytest.raises(WorkerDied):
        await mailbox.take()


async def test_a_reader_of_whole_answers_is_woken_when_a_choice_ends() -> None:
    mailbox = Mailbox(asyncio.get_running_loop())
    reader = asyncio.create_task(mailbox.take(until_end=True))
    for _ in range(3):
        await asyncio.sleep(0)
        mailbox.put(0, CHUNK)
    await asyncio.sleep(0)
    assert not reader.done()
    mailbox.put(1, msgspec.structs.replace(CHUNK, finish_reason=FinishReason.STOP))
    mailbox.put(0, CHUNK)
    assert [index for index, _ in await reader] == [0, 0, 0, 1, 0]
    reader = asyncio.create_task(mailbox.take(until_end=True))
    mailbox.put(0, CHUNK)
    mailbox.fail(WorkerDied("gone"))
    with pytest.raises(WorkerDied):
        await reader


def test_the_chunks_of_a_choice_are_joined() -> None:
    first, second = TokenLogprobs(-1.0), TokenLogprobs(-2.0)
    items = [
        (1, TokenChunk("b", 0, 0, [5], None, [first], 3, [second])),
        (0, TokenChunk("a", 0, 0, [1, 2])),
        (1, TokenChunk("b", 1, 1, [6, 7], FinishReason.STOP, [second, first])),
    ]
    assert joined(items) == [
        (1, TokenChunk("b", 0, 0, [5, 6, 7], FinishReason.STOP, [first, second, first], 3, [second])),
        (0, TokenChunk("a", 0, 0, [1, 2])),
    ]


@pytest.mark.parametrize("leave", [lambda box: box.put(0, CHUNK), lambda box: box.fail(WorkerDied("gone"))])
async def test_a_reader_that_was_cancelled_a_moment_ago_harms_nobody(leave) -> None:
    mailbox = Mailbox(asyncio.get_running_loop())
    reader = asyncio.create_task(mailbox.take())
    await asyncio.sleep(0)
    reader.cancel()
    leave(mailbox)
    with pytest.raises(asyncio.CancelledError):
        await reader
