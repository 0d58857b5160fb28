"""A seeded world of prefill and decode workers around the real hand-off cores: one seed replays one history.

Connections are FIFO and independent of each other; they are lost, and each end learns of it in its own time. Messages
may be dropped or doubled, requests cancelled, moved to the other prefill worker under the same epoch, pages reused at
once. The world checks what a page gets at the moment it gets it, and at the end that nobody holds anything.
"""

from __future__ import annotations

import heapq
import itertools
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from engine_core.errors import RequestCancelled, TransferError
from engine_core.messages import TokenChunk
from kv_transfer import handoff
from kv_transfer.handoff import Effect, Key, ReceiverCore, SenderCore
from kv_transfer.ticket import Landing, Ticket
from kv_transfer.wire import KvAbort, KvBlocks, KvDone, TicketCancel

LEASE_S = 30.0
NUM_PAGES = 8


class Broken(AssertionError):
    """The hand-off harmed someone."""


def check(condition: object, text: str) -> None:
    if not condition:
        raise Broken(text)


@dataclass(eq=False)
class Link:
    """One connection, seen from outside."""

    prefill: PrefillWorker
    up: bool = True
    up_at_prefill: bool = True
    up_at_decode: bool = True
    busy_until: dict[str, float] = field(default_factory=lambda: {"to_prefill": 0.0, "to_decode": 0.0})
    outbox: list[Any] = field(default_factory=list)


@dataclass(frozen=True)
class Frame:
    """Blocks on the wire, with who made them."""

    header: KvBlocks
    maker: PrefillWorker
    is_intact: bool
    shipment: int


class World:
    def __init__(self, seed: int, sender: Callable[[], SenderCore], receiver: Callable[[], ReceiverCore]) -> None:
        self.rng = random.Random(seed)
        self.now = 0.0
        self.heap: list[tuple[float, int, Callable[[], None]]] = []
        self.order = itertools.count()
        self.p_double, self.p_drop, self.p_damage = (self.rng.choice([0, 0, 0.05]) for _ in range(3))
        self.prefills = [PrefillWorker(self, sender()) for _ in range(2)]
        self.decode = DecodeWorker(self, receiver())

    def after(self, max_delay_s: float, action: Callable[[], None]) -> None:
        delay_s = self.rng.random() ** 3 * max_delay_s
        heapq.heappush(self.heap, (self.now + delay_s, next(self.order), action))

    def carry(self, link: Link, way: str, deliver: Callable[[], None]) -> None:
        """FIFO per link and way."""
        if self.rng.random() < self.p_drop:
            return
        at = link.busy_until[way] = max(link.busy_until[way], self.now + self.rng.random() ** 3 * 0.3)
        for _ in range(2 if self.rng.random() < self.p_double else 1):
            heapq.heappush(self.heap, (at, next(self.order), lambda: deliver() if link.up else None))

    def lose(self, link: Link) -> None:
        if not link.up:
            return
        link.up = False
        link.outbox.clear()
        self.after(0.2, lambda: link.prefill.on_lost(link))
        self.after(0.2, lambda: self.decode.on_lost(link))

    def drain(self) -> None:
        while self.heap:
            self.now, _, action = heapq.heappop(self.heap)
            action()

    def run(self) -> None:
        for number in range(6):
            self.schedule(f"r{number}", self.rng.randint(1, 4))
        self.drain()
        if not self.p_drop:
            self.check_quiet()
        self.now += LEASE_S
        for worker in self.prefills:
            worker.act(worker.core.tick(self.now))
        self.decode.act(self.decode.core.tick(self.now))
        self.drain()
        self.check_empty()

    def schedule(self, request_id: str, num_blocks: int) -> None:
        """What a gateway does to one request in its life."""
        rng, key = self.rng, (request_id, 0)
        first, second = rng.sample(self.prefills, 2)
        self.after(1, lambda: first.prefill(key, num_blocks))
        self.after(1, lambda: self.decode.decode(key, first, num_blocks))
        fate = rng.random()
        if fate < 0.3:
            self.after(1, lambda: self.cancel(key))
        elif fate < 0.6:
            self.after(1, lambda: second.prefill(key, num_blocks))
            self.after(1, lambda: self.decode.move(key, second))
        elif fate < 0.7:
            self.after(1, lambda: [self.lose(link) for link in list(self.decode.links.values())])
        elif fate < 0.8:
            self.after(1, lambda: first.abort(key))

    def cancel(self, key: Key) -> None:
        self.after(0.3, lambda: self.decode.cancel(key))
        for worker in self.prefills:
            self.after(0.3, lambda worker=worker: worker.abort(key))

    def check_quiet(self) -> None:
        """Nothing is under way: what is still held waits for a message that will never come, until its lease ends."""
        check(not self.decode.core, f"decode still waits for {self.decode.pages}")
        for worker in self.prefills:
            left = set(worker.core._open) & worker.cancelled
            check(not left, f"prefill holds {left} though decode cancelled it")

    def check_empty(self) -> None:
        check(not self.decode.pages and len(self.decode.free) == NUM_PAGES, "decode holds pages")
        for core in (self.decode.core, *(worker.core for worker in self.prefills)):
            check(not len(core), "a core holds a request")
        check(not any(worker.core.held_bytes for worker in self.prefills), "prefill holds blocks")


class PrefillWorker:
    def __init__(self, world: World, core: SenderCore) -> None:
        self.world, self.core = world, core
        self.cancelled: set[Key] = set()  # decode's cancel has been delivered
        self.stopped: set[Key] = set()

    def prefill(self, key: Key, num_blocks: int) -> None:
        self.act(self.core.offer(self.world.now, key, LEASE_S))
        self.compute(key, 0, num_blocks)

    def compute(self, key: Key, position: int, num_blocks: int) -> None:
        if key in self.stopped:
            return
        if position == num_blocks:
            token = TokenChunk(*key, 0, [1])
            self.act(self.core.finish(self.world.now, key, token))
            return
        end = self.world.rng.randint(position + 1, num_blocks)
        indices = range(position, end)
        self.act(self.core.send_blocks(self.world.now, key, indices, tuple(indices), len(indices)))
        self.world.after(0.3, lambda: self.compute(key, end, num_blocks))

    def abort(self, key: Key) -> None:
        self.stopped.add(key)
        self.act(self.core.abort(self.world.now, key, RequestCancelled("by the gateway")))

    def receive(self, link: Link, message: Any) -> None:
        if link.up_at_prefill:
            if isinstance(message, TicketCancel):
                self.cancelled.add((message.request_id, message.epoch))
            self.act(self.core.on_message(self.world.now, link, message))

    def on_lost(self, link: Link) -> None:
        link.up_at_prefill = False
        self.act(self.core.on_peer_lost(self.world.now, link))

    def act(self, effects: list[Effect]) -> None:
        for effect in effects:
            match effect:
                case handoff.Ticketed(ticket):
                    check(ticket.key not in self.cancelled, f"{ticket.key} starts though decode cancelled it")
                case handoff.Cancelled(key, _):
                    self.stopped.add(key)
                case handoff.Unsend(link, key):
                    link.outbox = [item for item in link.outbox if item.key != key]  # type: ignore[attr-defined]
                case handoff.Send(link, message):
                    self.enqueue(link, (message.request_id, message.epoch), message)
                case handoff.SendBlocks(link, ticket, blocks, source, places, shipment):
                    check(tuple(source[place] for place in places) == tuple(index for index, _ in blocks), "places")
                    check(ticket.key not in self.cancelled, f"{ticket.key} is sent though decode cancelled it")
                    self.enqueue(link, ticket.key, self.frame(ticket, blocks, shipment))

    def frame(self, ticket: Ticket, blocks: tuple[tuple[int, int], ...], shipment: int) -> Frame:
        indices, generations = zip(*blocks, strict=True)
        header = KvBlocks(
            *ticket.key, ticket.serial, 0, indices, generations, (0, 1), (0, 1), "float32", (0,) * len(blocks), 1, None
        )
        return Frame(header, self, self.world.rng.random() >= self.world.p_damage, shipment)

    def released(self, link: Link, frame: Frame) -> None:
        if link.up_at_prefill:
            key = (frame.header.request_id, frame.header.epoch)
            self.core.on_released(self.world.now, key, frame.shipment, frame.header.blocks)

    def enqueue(self, link: Any, key: Key, content: Any) -> None:
        if link.up_at_prefill:
            link.outbox.append(Queued(key, content))
            self.world.after(0.1, lambda: self.pump(link))

    def pump(self, link: Link) -> None:
        if link.outbox and link.up:
            content = link.outbox.pop(0).content
            self.world.carry(link, "to_decode", lambda: self.world.decode.receive(link, content))


@dataclass(frozen=True)
class Queued:
    key: Key
    content: Any


@dataclass
class Held:
    """A request's pages at the decode worker."""

    source: PrefillWorker
    num_blocks: int
    pages: dict[int, int]  # block -> page
    filled: set[int] = field(default_factory=set)


class DecodeWorker:
    def __init__(self, world: World, core: ReceiverCore) -> None:
        self.world, self.core = world, core
        self.links: dict[PrefillWorker, Link] = {}
        self.free = list(range(NUM_PAGES))
        self.generation = [0] * NUM_PAGES
        self.serial = itertools.count(1)
        self.pages: dict[Key, Held] = {}
        self.ended: set[Key] = set()

    def decode(self, key: Key, source: PrefillWorker, num_blocks: int) -> None:
        if key in self.ended or key in self.pages:
            return
        wanted = [index for index in range(num_blocks) if self.world.rng.random() < 0.9]
        if len(wanted) > len(self.free):
            self.world.after(0.3, lambda: self.decode(key, source, num_blocks))
            return
        held = self.pages[key] = Held(source, num_blocks, {index: self.free.pop() for index in wanted})
        for page in held.pages.values():
            self.generation[page] += 1
        landing = tuple(Landing(index, self.generation[page]) for index, page in held.pages.items())
        ticket = Ticket(*key, next(self.serial), landing, round(LEASE_S * 1000))
        self.act(self.core.request(self.world.now, self.link(source), ticket))

    def move(self, key: Key, source: PrefillWorker) -> None:
        """Give up on one prefill worker and ask the other, under the same epoch, for fresh pages."""
        if key not in self.pages:
            return
        num_blocks = self.pages[key].num_blocks
        self.act(self.core.cancel(key))
        self.release(key)
        self.decode(key, source, num_blocks)

    def cancel(self, key: Key) -> None:
        self.ended.add(key)
        self.act(self.core.cancel(key))
        self.release(key)

    def release(self, key: Key) -> None:
        held = self.pages.pop(key, None)
        self.free += held.pages.values() if held else ()

    def link(self, source: PrefillWorker) -> Link:
        if source not in self.links or not self.links[source].up_at_decode:
            self.links[source] = Link(source)
        return self.links[source]

    def on_lost(self, link: Link) -> None:
        link.up_at_decode = False
        self.act(self.core.on_peer_lost(link, TransferError("connection lost")))

    def receive(self, link: Link, content: Frame | KvDone | KvAbort) -> None:
        if not link.up_at_decode:
            return
        if isinstance(content, Frame):
            effects = self.core.on_blocks(self.world.now, content.header, content.is_intact)
            if effects:
                self.check_frame(content, effects)
            self.act(effects)
            self.world.carry(link, "to_prefill", lambda: link.prefill.released(link, content))
        else:
            self.act(self.core.on_message(self.world.now, content))

    def check_frame(self, frame: Frame, effects: list[Effect]) -> None:
        if not isinstance(effects[0], handoff.Landed):
            check(not frame.is_intact, "an intact frame was refused")
            return
        held = self.pages.get((frame.header.request_id, frame.header.epoch))
        check(held, "blocks land though nobody waits")
        check(frame.is_intact, "a damaged block is used")
        for index, generation in zip(frame.header.blocks, frame.header.generations, strict=True):
            check(index in held.pages, "an unwanted block lands")
            check(index not in held.filled, "a block lands twice")
            check(generation == self.generation[held.pages[index]], "a late block lands in a page with a new owner")
            check(frame.maker is held.source, "a block of another prefill worker lands")
            held.filled.add(index)

    def act(self, effects: list[Effect]) -> None:
        for effect in effects:
            match effect:
                case handoff.Send(link, message):
                    source = link.prefill  # type: ignore[attr-defined]
                    if link.up_at_decode:  # type: ignore[attr-defined]
                        self.world.carry(link, "to_prefill", lambda p=source, c=link, m=message: p.receive(c, m))
                case handoff.Done(key, _, lost):
                    held = self.pages[key]
                    check(held.filled | set(lost) == set(held.pages), "done before every block has landed or is lost")
                    check(not held.filled & set(lost), "a block that landed is called lost")
                    self.end(key)
                case handoff.Lost(key, _):
                    self.end(key)

    def end(self, key: Key) -> None:
        check(key not in self.ended, f"{key} ends twice")
        self.ended.add(key)
        self.release(key)
