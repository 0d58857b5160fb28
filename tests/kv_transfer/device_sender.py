"""Run by test_device: a prefill worker's sender whose blocks wait on its own process's device."""

from __future__ import annotations

import asyncio
import sys

import jax

from engine_core.device_fabric import JaxFabric
from kv_transfer.sender import NetKvSender
from kv_transfer.wire import Transport
from tests.kv_transfer.test_transport import LAYOUT, Pair, first_token


async def main() -> None:
    pair = Pair(Transport.DEVICE, LAYOUT, LAYOUT)
    fabric = JaxFabric("127.0.0.1", jax.devices()[0])
    options = pair.options(Transport.DEVICE)
    sender = NetKvSender(pair.identity("p", "f"), b"secret", pair.prefill, 1 << 30, options, fabric)
    print(await sender.start("127.0.0.1", 0), flush=True)
    sender.offer("r", 0, 30)
    sender.send_blocks("r", 0, range(6), pair.layers(range(6)))
    sender.finish("r", 0, first_token("r"))
    await asyncio.to_thread(sys.stdin.read)
    await sender.close()


if __name__ == "__main__":
    jax.config.update("jax_platforms", "cpu")
    asyncio.run(main())
