"""Run by test_hand_off: a gateway's connections to two workers, which are asked for what neither can finish alone.

python -m tests.integration.bare_gateway PREFILL_PORT PREFILL_KV_PORT DECODE_PORT

Prints `asked`; then, of each worker by its name, `lost NAME` and `back NAME`.
"""

from __future__ import annotations

import asyncio
import sys
from typing import Any

from engine_core.errors import BatonError
from engine_core.messages import Decode, Message, PeerAddress, Prefill, WorkerInfo
from engine_core.types import Request, SamplingParams
from kv_transfer.control import ControlClient

HERE = "127.0.0.1"


class Events:
    """What it hears of a worker."""

    def __init__(self) -> None:
        self._name = ""

    def on_connected(self, client: ControlClient, info: WorkerInfo) -> None:
        if self._name:
            print("back", self._name, flush=True)
        self._name = info.worker_id

    def on_lost(self, client: ControlClient, error: BatonError) -> None:
        print("lost", self._name, flush=True)

    def ignore(self, client: ControlClient, message: Any) -> None:
        pass

    on_tokens = on_failed = on_load = on_measured = on_blocks = on_stats = ignore


def request(name: str) -> Request:
    return Request(name * 32, list(range(50)), 50, SamplingParams(temperature=0.0, max_tokens=60, ignore_eos=True))


async def main(prefill: PeerAddress, decode: PeerAddress) -> None:
    for address, message in ((prefill, Prefill(request("e"), 60_000)), (decode, Decode(request("f"), prefill, 60_000))):
        await ask(address, message)
    print("asked", flush=True)
    await asyncio.Event().wait()


async def ask(address: PeerAddress, message: Message) -> None:
    client = ControlClient(address, "bare", None, Events())
    client.start()
    await client.wait_connected()
    client.send(message)  # type: ignore[arg-type]


if __name__ == "__main__":
    prefill_port, kv_port, decode_port = map(int, sys.argv[1:])
    asyncio.run(main(PeerAddress(HERE, prefill_port, kv_port), PeerAddress(HERE, decode_port, 0)))
