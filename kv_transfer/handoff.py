"""The hand-off's two state machines. No I/O, no clock, no threads: messages and time go in, effects come out.

`sender`, `receiver` and `inproc` carry effects out; the seeded simulator in the tests runs the same code through
reordering, loss, duplicates and page reuse.

Every block is kept by the sender until the receiver is done with it, so that one that was damaged or lost on the way
can be sent again. Blocks may travel on several connections: the first token may overtake them.
"""

from __future__ import annotations

import itertools
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

from engine_core import errors
from engine_core.errors import (
    BatonError,
    RequestCancelled,
    TicketExpired,
    TransferError,
    TransferTimeout,
)
from engine_core.messages import TokenChunk
from kv_transfer.ticket import Ticket
from kv_transfer.wire import KvAbort, KvBlocks, KvDone, KvWant, TicketCancel, TicketMsg

Key = tuple[str, int]
"""(request_id, epoch)."""
Peer = Hashable
"""Names a connection; the transport's own."""

TOMBSTONE_S = 120.0
MAX_TOMBSTONES = 100_000
MAX_PARKED_TICKETS = 10_000
MAX_WANTS = 3
"""How often blocks of one hand-off are asked for again; then they are given up, and decode computes them itself."""
WANT_AFTER_S = 1.0
"""Blocks that do not come for so long though all have been sent are lost."""


class Conversion(Protocol):
    """Makes blocks of the sender's layout into blocks of a receiver's, for one hand-off; see `repaging`."""

    def own_ticket(self, ticket: Ticket) -> Ticket:
        """The ticket in the sender's blocks."""
        ...

    def add(self, block_indices: Sequence[int], blocks: Any) -> list[tuple[tuple[int, ...], Any, int]]:
        """Receiver's block indices, source and bytes of what is complete now."""
        ...

    def flush(self) -> list[tuple[tuple[int, ...], Any, int]]:
        """The same of what will never be complete: the end of the prompt."""
        ...


# Effects


@dataclass(frozen=True, slots=True)
class Send:
    """Put a message on the way, behind all that was sent to this peer before."""

    peer: Peer
    message: TicketMsg | TicketCancel | KvWant | KvDone | KvAbort

    @property
    def key(self) -> Key:
        """What it is about."""
        named = self.message.ticket if isinstance(self.message, TicketMsg) else self.message
        return (named.request_id, named.epoch)


@dataclass(frozen=True, slots=True)
class SendBlocks:
    """Likewise the blocks of `source` at `places`, as (block_index, generation) `blocks`.

    `shipment` names this sending of them: to be told to `on_released` when the receiver is done with a part of it.
    """

    peer: Peer
    ticket: Ticket
    blocks: tuple[tuple[int, int], ...]
    source: Any
    places: tuple[int, ...]
    shipment: int

    @property
    def key(self) -> Key:
        """What it is about."""
        return self.ticket.key


@dataclass(frozen=True, slots=True)
class Unsend:
    """Forget what is queued for this request and has not begun to leave."""

    peer: Peer
    key: Key


@dataclass(frozen=True, slots=True)
class Ticketed:
    """To the prefill worker: `on_ticket`."""

    ticket: Ticket


@dataclass(frozen=True, slots=True)
class Cancelled:
    """To the prefill worker: `on_cancel`."""

    key: Key
    error: BatonError


@dataclass(frozen=True, slots=True)
class Landed:
    """To the decode worker: `on_blocks`."""

    header: KvBlocks


@dataclass(frozen=True, slots=True)
class Done:
    """To the decode worker: `on_done`; `lost` are the blocks that will not come."""

    key: Key
    first_token: TokenChunk
    lost: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Lost:
    """To the decode worker: `on_failed`."""

    key: Key
    error: BatonError


Effect = Send | SendBlocks | Unsend | Ticketed | Cancelled | Landed | Done | Lost


# Prefill side


class _Sent(NamedTuple):
    """A block that the receiver may still ask for again."""

    generation: int
    source: Any
    place: int
    num_bytes: int
    shipment: int


@dataclass(slots=True)
class _Outgoing:
    """One hand-off at the prefill worker: from the first of (offer, ticket) until its end, however it ends."""

    lease_s: float
    expires_at: float
    offered: bool = False
    peer: Peer = None
    ticket: Ticket | None = None
    wanted: dict[int, int] = field(default_factory=dict)  # block index -> generation, not sent yet
    held: list[tuple[tuple[int, ...], Any, int]] = field(default_factory=list)  # blocks, source, bytes: before a ticket
    sent: dict[int, _Sent] = field(default_factory=dict)  # block index -> not released by the receiver yet
    conversion: Conversion | None = None
    first_token: TokenChunk | None = None

    @property
    def told(self) -> Ticket:
        """The ticket as the prefill worker sees it."""
        assert self.ticket
        return self.conversion.own_ticket(self.ticket) if self.conversion else self.ticket

    @property
    def is_complete(self) -> bool:
        """Whether all there is has been sent."""
        return self.ticket is not None and self.first_token is not None


class SenderCore:
    """Prefill side: pairs offers with tickets, sends what the ticket names, each block once.

    Args:
        conversion_for: a new conversion for a hand-off to this peer; None where its blocks are like ours.
    """

    def __init__(self, conversion_for: Callable[[Peer], Conversion | None] = lambda peer: None) -> None:
        self._conversion_for = conversion_for
        self.held_bytes = 0
        """Of all blocks handed over that the receiver may still need."""
        self._open: dict[Key, _Outgoing] = {}
        self._shipments = itertools.count(1)
        self._tombstones: OrderedDict[Key, tuple[float, BatonError]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._open)

    def offer(self, now: float, key: Key, lease_s: float) -> list[Effect]:
        """The request is here."""
        if key in self._tombstones:
            return [Cancelled(key, self._tombstones[key][1])]
        entry = self._entry(now, key, lease_s)
        if entry.offered:
            return []
        entry.offered = True
        return [Ticketed(entry.told)] if entry.ticket else []

    def send_blocks(
        self, now: float, key: Key, block_indices: Sequence[int], source: Any, num_bytes: int
    ) -> list[Effect]:
        """Blocks are ready; `source` travels in the effects untouched."""
        entry = self._open.get(key)
        if entry is None or not entry.offered:
            return []
        entry.expires_at = now + entry.lease_s
        if entry.ticket is None:
            entry.held.append((tuple(block_indices), source, num_bytes))
            self.held_bytes += num_bytes
            return []
        return self._send(entry, block_indices, source, num_bytes)

    def peer(self, key: Key) -> Peer:
        """Who asked for an open hand-off; None while nobody has."""
        entry = self._open.get(key)
        return entry.peer if entry else None

    def finish(self, now: float, key: Key, first_token: TokenChunk) -> list[Effect]:
        """Everything has been sent."""
        entry = self._open.get(key)
        if entry is None or not entry.offered or entry.first_token is not None:
            return []
        entry.expires_at = now + entry.lease_s
        entry.first_token = first_token
        return self._complete(now, key, entry)

    def abort(self, now: float, key: Key, error: BatonError) -> list[Effect]:
        """The prefill worker gives up."""
        return self._end(now, key, error, tell_decode=True, tell_worker=False)

    def on_released(self, now: float, key: Key, shipment: int, block_indices: Iterable[int]) -> None:
        """The receiver is done with these blocks of a shipment: they will not be asked for again."""
        entry = self._open.get(key)
        if entry is None:
            return
        for index in block_indices:
            sent = entry.sent.get(index)
            if sent is not None and sent.shipment == shipment:
                del entry.sent[index]
                self.held_bytes -= sent.num_bytes
                entry.expires_at = now + entry.lease_s
        self._bury_if_over(now, key, entry)

    def on_message(self, now: float, peer: Peer, message: TicketMsg | TicketCancel | KvWant) -> list[Effect]:
        """From a decode worker."""
        if isinstance(message, TicketMsg):
            return self._on_ticket(now, peer, message.ticket)
        if isinstance(message, KvWant):
            return self._on_want(now, peer, message)
        key = (message.request_id, message.epoch)
        error = RequestCancelled("decode cancelled")
        return [Unsend(peer, key), *self._end(now, key, error, tell_decode=False, tell_worker=True)]

    def on_peer_lost(self, now: float, peer: Peer) -> list[Effect]:
        """The connection to a decode worker is gone, and with it whatever it was promised."""
        effects: list[Effect] = []
        for key in [key for key, entry in self._open.items() if entry.ticket and entry.peer == peer]:
            error = TransferError("lost the connection to the decode worker")
            effects += self._end(now, key, error, tell_decode=False, tell_worker=True)
        return effects

    def tick(self, now: float) -> list[Effect]:
        """End what has made no progress for its lease; forget old tombstones."""
        effects: list[Effect] = []
        for key in [key for key, entry in self._open.items() if now >= entry.expires_at]:
            error = TicketExpired(f"{_lack(self._open[key])} within the lease")
            effects += self._end(now, key, error, tell_decode=True, tell_worker=True)
        while self._tombstones and next(iter(self._tombstones.values()))[0] <= now:
            self._tombstones.popitem(last=False)
        return effects

    def _on_ticket(self, now: float, peer: Peer, ticket: Ticket) -> list[Effect]:
        if ticket.key in self._tombstones:
            former = self._tombstones[ticket.key][1]
            is_cancel = isinstance(former, RequestCancelled)  # of an earlier ticket; this one may be tried elsewhere
            return [_abort_message(peer, ticket, TicketExpired(str(former)) if is_cancel else former)]
        if ticket.key not in self._open and len(self._open) >= MAX_PARKED_TICKETS:
            return [_abort_message(peer, ticket, TransferError("too many tickets without a request"))]
        entry = self._entry(now, ticket.key, ticket.lease_ms / 1000)
        if entry.ticket is not None:
            return [] if ticket == entry.ticket else [_abort_message(peer, ticket, TransferError("a second ticket"))]
        entry.peer, entry.ticket, entry.conversion = peer, ticket, self._conversion_for(peer)
        entry.wanted = {landing.block_index: landing.generation for landing in ticket.landing}
        effects: list[Effect] = [Ticketed(entry.told)] if entry.offered else []
        for block_indices, source, num_bytes in entry.held:
            self.held_bytes -= num_bytes
            effects += self._send(entry, block_indices, source, num_bytes)
        entry.held = []
        return effects + self._complete(now, ticket.key, entry)

    def _entry(self, now: float, key: Key, lease_s: float) -> _Outgoing:
        entry = self._open.get(key)
        if entry is None:
            entry = self._open[key] = _Outgoing(lease_s, now + lease_s)
        entry.lease_s = max(entry.lease_s, lease_s)
        entry.expires_at = now + entry.lease_s
        return entry

    def _on_want(self, now: float, peer: Peer, message: KvWant) -> list[Effect]:
        """Send blocks again."""
        key = (message.request_id, message.epoch)
        entry = self._open.get(key)
        if entry is None or entry.ticket is None or entry.peer != peer or entry.ticket.serial != message.serial:
            error = TransferError("this hand-off has ended")
            return [Send(peer, KvAbort(*key, message.serial, error.code, str(error), error.retryable))]
        lost = [index for index in message.blocks if index not in entry.sent and index not in entry.wanted]
        if lost:
            error = TransferError(f"blocks {lost} are no longer here to be sent again")
            return self._end(now, key, error, tell_decode=True, tell_worker=True)
        entry.expires_at = now + entry.lease_s
        by_source: dict[int, list[int]] = defaultdict(list)
        for index in message.blocks:
            if index in entry.sent:
                by_source[id(entry.sent[index].source)].append(index)
        return [self._send_again(entry, indices) for indices in by_source.values()]

    def _send_again(self, entry: _Outgoing, indices: list[int]) -> SendBlocks:
        assert entry.ticket
        shipment = next(self._shipments)
        sent = [entry.sent[index] for index in indices]
        for index, block in zip(indices, sent, strict=True):
            entry.sent[index] = _Sent(block.generation, block.source, block.place, block.num_bytes, shipment)
        blocks = tuple((index, block.generation) for index, block in zip(indices, sent, strict=True))
        places = tuple(block.place for block in sent)
        return SendBlocks(entry.peer, entry.ticket, blocks, sent[0].source, places, shipment)

    def _send(self, entry: _Outgoing, block_indices: Sequence[int], source: Any, num_bytes: int) -> list[Effect]:
        if entry.conversion is None:
            return self._send_wanted(entry, block_indices, source, num_bytes)
        converted = entry.conversion.add(block_indices, source)
        return [effect for each in converted for effect in self._send_wanted(entry, *each)]

    def _send_wanted(self, entry: _Outgoing, block_indices: Sequence[int], source: Any, num_bytes: int) -> list[Effect]:
        assert entry.ticket
        found = [(place, index) for place, index in enumerate(block_indices) if index in entry.wanted]
        if not found:
            return []
        shipment, each = next(self._shipments), num_bytes // len(block_indices)
        blocks = tuple((index, entry.wanted.pop(index)) for _, index in found)
        for (place, index), (_, generation) in zip(found, blocks, strict=True):
            entry.sent[index] = _Sent(generation, source, place, each, shipment)
        self.held_bytes += each * len(found)
        return [SendBlocks(entry.peer, entry.ticket, blocks, source, tuple(place for place, _ in found), shipment)]

    def _complete(self, now: float, key: Key, entry: _Outgoing) -> list[Effect]:
        if entry.ticket is None or entry.first_token is None:
            return []
        rest = entry.conversion.flush() if entry.conversion and not entry.first_token.is_empty else []
        effects = [effect for each in rest for effect in self._send_wanted(entry, *each)]
        lost, entry.wanted = tuple(sorted(entry.wanted)), {}
        done = Send(entry.peer, KvDone(*key, entry.ticket.serial, entry.first_token, lost))
        self._bury_if_over(now, key, entry)
        return [*effects, done]

    def _bury_if_over(self, now: float, key: Key, entry: _Outgoing) -> None:
        if entry.is_complete and not entry.sent:
            self._bury(now, key, TicketExpired("this hand-off has ended"))

    def _end(self, now: float, key: Key, error: BatonError, *, tell_decode: bool, tell_worker: bool) -> list[Effect]:
        entry = self._open.get(key)
        if key not in self._tombstones:
            self._bury(now, key, error)
        if entry is None:
            return []
        effects: list[Effect] = []
        if entry.ticket:
            effects.append(Unsend(entry.peer, key))
            if tell_decode:
                effects.append(_abort_message(entry.peer, entry.ticket, error))
        if tell_worker and entry.offered and entry.first_token is None:  # `finish` was the worker's last word
            effects.append(Cancelled(key, error))
        return effects

    def _bury(self, now: float, key: Key, error: BatonError) -> None:
        """Forget the hand-off but its end: a ticket or offer that comes late is answered with `error`."""
        entry = self._open.pop(key, None)
        if entry:
            self.held_bytes -= sum(num_bytes for _, _, num_bytes in entry.held)
            self.held_bytes -= sum(sent.num_bytes for sent in entry.sent.values())
        self._tombstones[key] = (now + TOMBSTONE_S, error)
        if len(self._tombstones) > MAX_TOMBSTONES:
            self._tombstones.popitem(last=False)


def _lack(entry: _Outgoing) -> str:
    if entry.ticket is None:
        return "no ticket"
    return "no progress" if entry.offered else "no request"


def _abort_message(peer: Peer, ticket: Ticket, error: BatonError) -> Send:
    return Send(peer, KvAbort(*ticket.key, ticket.serial, error.code, str(error), error.retryable))


# Decode side


@dataclass(slots=True)
class _Incoming:
    """One open landing at the decode worker, until done, failed or cancelled."""

    peer: Peer
    ticket: Ticket
    expires_at: float
    missing: dict[int, int]  # block index -> generation
    lost: set[int] = field(default_factory=set)  # given up: asked for again in vain
    first_token: TokenChunk | None = None  # everything has been sent
    want_at: float = 0.0  # when what is missing counts as lost; of meaning once all has been sent
    num_wants: int = 0


class ReceiverCore:
    """Decode side: accepts a block only for an open landing of the same generation; needs no tombstones."""

    def __init__(self) -> None:
        self.num_stale = 0
        self._open: dict[Key, _Incoming] = {}

    def __len__(self) -> int:
        return len(self._open)

    def request(self, now: float, peer: Peer, ticket: Ticket) -> list[Effect]:
        """Open the landing and send the ticket. Replaces an earlier ticket of the same key."""
        missing = {landing.block_index: landing.generation for landing in ticket.landing}
        assert len(missing) == len(ticket.landing), "a block is named twice"
        former = self._open.pop(ticket.key, None)
        self._open[ticket.key] = _Incoming(peer, ticket, now + ticket.lease_ms / 1000, missing)
        effects: list[Effect] = [Send(former.peer, TicketCancel(*ticket.key))] if former else []
        return [*effects, Send(peer, TicketMsg(ticket))]

    def cancel(self, key: Key) -> list[Effect]:
        """No longer wanted."""
        entry = self._open.pop(key, None)
        return [Send(entry.peer, TicketCancel(*key))] if entry else []

    def wants(self, header: KvBlocks) -> bool:
        """Whether the payload is worth reading; `on_blocks` decides again once it is here."""
        entry = self._open.get((header.request_id, header.epoch))
        return entry is not None and _fits(entry, header)

    def on_blocks(self, now: float, header: KvBlocks, is_intact: bool) -> list[Effect]:
        """A frame has arrived in full; `is_intact`: its checksums are right."""
        key = (header.request_id, header.epoch)
        entry = self._open.get(key)
        if entry is None or not _fits(entry, header):
            self.num_stale += 1
            return []
        if not is_intact:
            return self._want(now, key, header.blocks)
        for index in header.blocks:
            del entry.missing[index]
        entry.expires_at = now + entry.ticket.lease_ms / 1000
        entry.want_at = now + WANT_AFTER_S
        return [Landed(header), *self._complete(key, entry)]

    def on_message(self, now: float, message: KvDone | KvAbort) -> list[Effect]:
        """From a prefill worker."""
        key = (message.request_id, message.epoch)
        entry = self._open.get(key)
        if entry is None or entry.ticket.serial != message.serial:
            self.num_stale += 1
            return []
        if isinstance(message, KvAbort):
            if entry.first_token is not None:  # all that is missing has been sent and cannot be had again
                return self._give_up(key, tuple(entry.missing))
            del self._open[key]
            return [Lost(key, error_named(message.code, message.message, message.retryable))]
        entry.first_token = message.first_token
        entry.want_at = now + WANT_AFTER_S
        return self._give_up(key, tuple(index for index in message.lost if index in entry.missing))

    def on_peer_lost(self, peer: Peer, error: BatonError) -> list[Effect]:
        """The connection is gone, and with it every landing behind it."""
        keys = [key for key, entry in self._open.items() if entry.peer == peer]
        for key in keys:
            del self._open[key]
        return [Lost(key, error) for key in keys]

    def tick(self, now: float) -> list[Effect]:
        """Give up what has made no progress for its lease."""
        effects: list[Effect] = []
        for key in [key for key, entry in self._open.items() if now >= entry.expires_at]:
            effects += self._fail(key, TransferTimeout("no block within the lease"))
        late = [key for key, entry in self._open.items() if entry.first_token is not None and now >= entry.want_at]
        for key in late:
            effects += self._want(now, key, tuple(self._open[key].missing))
        return effects

    def _complete(self, key: Key, entry: _Incoming) -> list[Effect]:
        if entry.missing or entry.first_token is None:
            return []
        del self._open[key]
        if not entry.lost:
            return [Done(key, entry.first_token)]
        return [Done(key, entry.first_token, tuple(sorted(entry.lost))), Send(entry.peer, TicketCancel(*key))]

    def _want(self, now: float, key: Key, blocks: tuple[int, ...]) -> list[Effect]:
        """Ask again, but not for ever."""
        entry = self._open[key]
        entry.num_wants += 1
        if entry.num_wants > MAX_WANTS:
            return self._give_up(key, blocks)
        entry.want_at = now + WANT_AFTER_S
        return [Send(entry.peer, KvWant(*key, entry.ticket.serial, blocks))]

    def _give_up(self, key: Key, blocks: tuple[int, ...]) -> list[Effect]:
        """Go on without these blocks. The first token must come: it is what decode continues behind."""
        entry = self._open[key]
        for index in blocks:
            del entry.missing[index]
        entry.lost.update(blocks)
        return self._complete(key, entry)

    def _fail(self, key: Key, error: BatonError) -> list[Effect]:
        entry = self._open.pop(key)
        return [Lost(key, error), Send(entry.peer, TicketCancel(*key))]


def _fits(entry: _Incoming, header: KvBlocks) -> bool:
    """The fence: an answer to this very ticket, every block still missing, every page of the generation reserved."""
    named = dict(zip(header.blocks, header.generations, strict=True))
    return header.serial == entry.ticket.serial and named.items() <= entry.missing.items()


def error_named(code: str, text: str, retryable: bool) -> BatonError:
    """The exception that `code` names; TransferError for a code we do not know."""
    kinds = (kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, BatonError))
    kind = next((kind for kind in kinds if kind.code == code), TransferError)
    error = kind(text)
    error.retryable = retryable
    return error
