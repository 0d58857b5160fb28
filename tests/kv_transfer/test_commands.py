"""What a worker tells its data plane: from any thread, in order, without waiting."""

from __future__ import annotations

import asyncio
import socket
import threading
from typing import Any

import pytest

from kv_transfer.channel import Channel
from kv_transfer.commands import Commands
from kv_transfer.plane_wire import PlaneCancel, to_plane

LARGE = "r" * 4000


async def heard_by(connected: socket.socket) -> tuple[list[Any], asyncio.Transport]:
    """What a data plane hears at the other end."""
    heard: list[Any] = []
    make = lambda: Channel(  # noqa: E731
        to_plane, lambda channel: None, lambda channel, message: heard.append(message), lambda channel, error: None
    )
    transport, _ = await asyncio.get_running_loop().create_connection(make, sock=connected)
    return heard, transport


async def until(condition: Any) -> None:
    async with asyncio.timeout(10):
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0.002)


async def test_every_thread_s_commands_arrive_in_its_order():
    mine, theirs = socket.socketpair()
    commands = Commands(mine)
    heard, transport = await heard_by(theirs)

    def speak(number: int) -> None:
        for epoch in range(200):
            commands.send(PlaneCancel(f"r{number}", epoch))

    threads = [threading.Thread(target=speak, args=(number,)) for number in range(3)]
    for thread in threads:
        thread.start()
    await until(lambda: len(heard) == 600)
    for number, thread in enumerate(threads):
        thread.join()
        assert [each.epoch for each in heard if each.request_id == f"r{number}"] == list(range(200))
    commands.close()
    mine.close()
    transport.close()


async def test_a_plane_that_does_not_read_holds_nobody_up_and_misses_nothing():
    mine, theirs = socket.socketpair()
    commands = Commands(mine)
    for epoch in range(1000):  # 4 MB: more than any socket takes
        commands.send(PlaneCancel(LARGE, epoch))
    heard, transport = await heard_by(theirs)
    await until(lambda: len(heard) == 1000)
    commands.send(PlaneCancel("last", 0))
    await until(lambda: len(heard) == 1001)
    assert [each.epoch for each in heard[:-1]] == list(range(1000))
    commands.close()
    mine.close()
    transport.close()


@pytest.mark.parametrize("by", ["closing", "the plane's end"])
async def test_behind_the_end_commands_are_dropped(by):
    mine, theirs = socket.socketpair()
    commands = Commands(mine)
    theirs.close()
    if by == "closing":
        commands.close()
    commands.send(PlaneCancel("r", 0))
    commands.close()
    commands.close()
    mine.close()
