"""How late the event loop wakes up: the first thing that breaks in a gateway written in Python."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

INTERVAL_S = 0.1


async def watch_loop(tell: Callable[[float], None]) -> None:
    """Report how late each of our wake-ups was, in seconds, for ever."""
    loop = asyncio.get_running_loop()
    while True:
        due = loop.time() + INTERVAL_S
        await asyncio.sleep(INTERVAL_S)
        tell(max(0.0, loop.time() - due))
