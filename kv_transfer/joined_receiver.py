"""One hand-off from the several hosts of a prefill worker, each of which sends its KV heads.

Each host is a hand-off of its own (`ticket.part_id`) with its own connection; blocks are told on when all of their
heads are here. Parts are copied out of the transport's memory at once, so that no host waits for another.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import msgspec
import numpy as np

from engine_core.errors import BatonError, LayoutMismatch
from engine_core.messages import KvShard, PeerAddress, TokenChunk
from kv_transfer.base import Layers, ReceiverEvents
from kv_transfer.endpoint import KvIdentity
from kv_transfer.handshake import TransferOptions
from kv_transfer.layout import BlockLayout
from kv_transfer.plane import open_receiver
from kv_transfer.plane_link import PlaneProcess
from kv_transfer.plane_receiver import PlaneKvReceiver
from kv_transfer.receiver import NetKvReceiver
from kv_transfer.ticket import Ticket, part_id

Key = tuple[str, int]


@dataclass(slots=True, eq=False)
class _Group:
    """Blocks that came first together, and are told on together: per layer `[n, page_size, 2K, H]`."""

    blocks: tuple[int, ...]
    generations: tuple[int, ...]
    layers: list[np.ndarray]
    num_missing: int  # (block, host) pairs


@dataclass(slots=True, eq=False)
class _Joining:
    """One hand-off."""

    ids: tuple[str, ...]  # of its parts, host 0 first
    shards: tuple[KvShard, ...]
    places: dict[int, tuple[_Group, int]] = field(default_factory=dict)  # of each block: its group and row there
    lost: set[int] = field(default_factory=set)  # blocks of which some host lacks its heads
    open_parts: set[str] = field(default_factory=set)
    first_token: TokenChunk | None = None

    def add(
        self, part: int, blocks: Sequence[int], generations: Sequence[int], layers: Layers, layout: BlockLayout
    ) -> list[_Group]:
        """Take a part of some blocks in; the groups that are whole now."""
        fresh = [i for i, block in enumerate(blocks) if block not in self.places]
        if fresh:
            whole = [np.empty((len(fresh), *layout.shape), layout.numpy_dtype) for _ in layers]
            named = tuple(blocks[i] for i in fresh)
            group = _Group(named, tuple(generations[i] for i in fresh), whole, len(fresh) * len(self.shards))
            self.places.update((block, (group, row)) for row, block in enumerate(named))
        first = 2 * self.shards[part].first_head
        heads = slice(first, first + 2 * self.shards[part].num_heads)
        groups = {id(self.places[block][0]): self.places[block][0] for block in blocks}
        for group in groups.values():
            mine = [i for i, block in enumerate(blocks) if self.places[block][0] is group]
            rows = [self.places[blocks[i]][1] for i in mine]
            for target, layer in zip(group.layers, layers, strict=True):
                target[rows, :, heads] = layer[mine].view(target.dtype)
            group.num_missing -= len(mine)
        return [group for group in groups.values() if not group.num_missing]


class JoinedReceiver:
    """KvReceiver of a decode worker, for prefill workers of one host or of several. Construct on the event-loop thread.

    Args:
        identity: of this worker.
        secret: shared with prefill workers, or None.
        events: hears of whole blocks only.
        options: of each connection.
        process: where its data plane runs; None: in one of its own.
    """

    def __init__(
        self,
        identity: KvIdentity,
        secret: bytes | None,
        events: ReceiverEvents,
        options: TransferOptions,
        process: PlaneProcess | None = None,
    ) -> None:
        self._layout = identity.layout
        self._events = events
        self._loop = asyncio.get_running_loop()
        self._joining: dict[Key, _Joining] = {}
        self._keys: dict[Key, tuple[Key, int]] = {}  # of a part: its hand-off and its number
        self._inner: PlaneKvReceiver | NetKvReceiver = open_receiver(identity, secret, self, options, process)

    async def start(self) -> None:
        """Start the plane."""
        await self._inner.start()

    @property
    def num_open(self) -> int:
        """Hand-offs under way, each part counted."""
        return self._inner.num_open

    @property
    def healthy(self) -> bool:
        """Whether anything can be received."""
        return self._inner.healthy

    # KvReceiver

    def request(self, address: PeerAddress, ticket: Ticket) -> None:
        """See KvReceiver."""
        if not address.kv_shards:
            self._inner.request(address, ticket)
            return
        self._call(self._request, address, ticket)

    def cancel(self, request_id: str, epoch: int) -> None:
        """See KvReceiver."""
        self._call(self._cancel, (request_id, epoch))

    async def close(self) -> None:
        """See KvReceiver."""
        await self._inner.close()

    def _request(self, address: PeerAddress, ticket: Ticket) -> None:
        self._drop(ticket.key)
        starts = itertools.accumulate((shard.num_heads for shard in address.kv_shards), initial=0)
        expected = [*(shard.first_head for shard in address.kv_shards), self._layout.num_kv_heads]
        if min(shard.num_heads for shard in address.kv_shards) < 1 or list(starts) != expected:
            error = LayoutMismatch(f"{address.host}:{address.port} does not hand over each KV head once")
            self._events.on_failed(*ticket.key, error)
            return
        ids = tuple(part_id(ticket.request_id, shard.first_head) for shard in address.kv_shards)
        self._joining[ticket.key] = _Joining(ids, address.kv_shards, open_parts=set(ids))
        for number, (name, shard) in enumerate(zip(ids, address.kv_shards, strict=True)):
            self._keys[name, ticket.epoch] = (ticket.key, number)
            to_host = PeerAddress(shard.host, address.port, shard.kv_port, (shard,))
            self._inner.request(to_host, msgspec.structs.replace(ticket, request_id=name))

    def _cancel(self, key: Key) -> None:
        if not self._drop(key):
            self._inner.cancel(*key)

    def _drop(self, key: Key) -> bool:
        """Give up what is still to come; whether there was a hand-off of several parts."""
        joining = self._joining.pop(key, None)
        if joining is None:
            return False
        for name in joining.ids:
            del self._keys[name, key[1]]
            if name in joining.open_parts:
                self._inner.cancel(name, key[1])
        return True

    def _call(self, function: Callable[..., object], *arguments: object) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed: the worker is stopping
            self._loop.call_soon_threadsafe(function, *arguments)

    # ReceiverEvents of the parts, on the event loop

    def on_blocks(
        self, request_id: str, epoch: int, block_indices: Sequence[int], layers: Layers, generations: Sequence[int]
    ) -> None:
        """See ReceiverEvents."""
        found = self._keys.get((request_id, epoch))
        if found is None:
            self._events.on_blocks(request_id, epoch, block_indices, layers, generations)
            return
        key, number = found
        joining = self._joining[key]
        for group in joining.add(number, block_indices, generations, layers, self._layout):
            for block in group.blocks:
                del joining.places[block]
            self._events.on_blocks(*key, group.blocks, group.layers, group.generations)

    def on_done(self, request_id: str, epoch: int, first_token: TokenChunk, lost: Sequence[int]) -> None:
        """See ReceiverEvents. With a block that some host lacks, those that came together with it are lost, too."""
        found = self._keys.get((request_id, epoch))
        if found is None:
            self._events.on_done(request_id, epoch, first_token, lost)
            return
        key, number = found
        joining = self._joining[key]
        joining.open_parts.discard(request_id)
        joining.lost.update(lost)
        if number == 0:
            joining.first_token = first_token
        if not joining.open_parts:
            self._drop(key)
            assert joining.first_token is not None
            self._events.on_done(*key, joining.first_token, sorted(joining.lost.union(joining.places)))

    def on_failed(self, request_id: str, epoch: int, error: BatonError) -> None:
        """See ReceiverEvents."""
        found = self._keys.get((request_id, epoch))
        if found is None:
            self._events.on_failed(request_id, epoch, error)
            return
        key, _ = found
        self._joining[key].open_parts.discard(request_id)
        self._drop(key)
        self._events.on_failed(*key, error)
