import asyncio

import pytest

from engine_core.errors import WorkerDied
from engine_core.messages import TokenChunk
from router.mailbox import Mailbox

CHUNK = TokenChunk("r", 0, 0, [1])


async def test_takes_all_there_is_in_order() -> None:
    mailbox = Mailbox()
    mailbox.put(0, CHUNK)
    mailbox.put(1, CHUNK)
    assert [index for index, _ in await mailbox.take()] == [0, 1]


async def test_a_reader_that_waits_is_woken_and_hears_of_an_error_last() -> None:
    mailbox = Mailbox()
    reader = asyncio.create_task(mailbox.take())
    await asyncio.sleep(0)
    mailbox.put(0, CHUNK)
    mailbox.fail(WorkerDied("gone"))
    assert len(await reader) == 1
    with pytest.raises(WorkerDied):
        await mailbox.take()


@pytest.mark.parametrize("leave", [lambda box: box.put(0, CHUNK), lambda box: box.fail(WorkerDied("gone"))])
async def test_a_reader_that_was_cancelled_a_moment_ago_harms_nobody(leave) -> None:
    mailbox = Mailbox()
    reader = asyncio.create_task(mailbox.take())
    await asyncio.sleep(0)
    reader.cancel()
    leave(mailbox)
    with pytest.raises(asyncio.CancelledError):
        await reader
