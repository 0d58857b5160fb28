"""The real workers, reached through proxies. They say what they hold, for the count at the end."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

from benchmarks.chaos.station import register
from decode_worker.worker import DecodeWorker
from engine_core.config import EngineConfig
from engine_core.messages import PeerAddress, WorkerInfo
from engine_core.replica import Replica
from kv_transfer.wire import Transport
from prefill_worker.worker import PrefillWorker


class ChaosPrefillWorker(PrefillWorker):
    """A prefill worker behind proxies."""

    def __init__(
        self,
        config: EngineConfig,
        model_dir: Path,
        worker_id: str,
        incarnation: int,
        listen: PeerAddress,
        *,
        secret: bytes | None = None,
        progress: Callable[[str], None] = lambda _: None,
    ) -> None:
        super().__init__(config, model_dir, worker_id, incarnation, listen, secret=secret, progress=progress)
        self._model_dir = model_dir

    async def start(self) -> WorkerInfo:
        """See PrefillWorker."""
        return await register(self._model_dir, await super().start(), self._counts)

    def _counts(self) -> dict[str, int]:
        held = self._outlet.sender.inflight_bytes > 0
        return {**held_of(self._replica), "tickets": len(self._scheduler._tasks) + len(self._donor) + held}


class ChaosDecodeWorker(DecodeWorker):
    """A decode worker behind proxies. The first one fetches KV by TCP, the others as they like."""

    def __init__(
        self,
        config: EngineConfig,
        model_dir: Path,
        worker_id: str,
        incarnation: int,
        listen: PeerAddress,
        *,
        secret: bytes | None = None,
        progress: Callable[[str], None] = lambda _: None,
    ) -> None:
        super().__init__(config, model_dir, worker_id, incarnation, listen, secret=secret, progress=progress)
        self._model_dir = model_dir
        if worker_id.endswith("-0"):
            self._options = dataclasses.replace(self._options, transports=(Transport.TCP,))

    async def start(self) -> WorkerInfo:
        """See DecodeWorker."""
        return await register(self._model_dir, await super().start(), self._counts)

    def _counts(self) -> dict[str, int]:
        assert self._outlet is not None and self._donor is not None
        held = self._outlet.sender.inflight_bytes > 0
        tickets = len(self._scheduler._sequences) + self._receiver.num_open + len(self._donor) + held
        return {**held_of(self._replica), "tickets": tickets}


def held_of(replica: Replica) -> dict[str, int]:
    """Pages that sequences hold, and slots in use."""
    memory = replica.memory
    tables = [shard.table for shard in memory.shards]
    return {
        "pages": replica.resolved.layout.num_pages - memory.free_pages,
        "slots": sum(table.num_slots - table.num_free for table in tables),
    }
