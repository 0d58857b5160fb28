"""A seeded fleet: gateway, prefill and decode workers and the index, around the real hand-off cores and journal.

Every attempt rolls tokens of its own, and each token remembers what it was conditioned on: a token that a stream takes
from another attempt shows. Blocks carry the tokens they stand for: a page that is attended to with others in it shows.
Workers crash and come back, links are cut (each end learns of it in its own time), blocks arrive damaged, streams are
moved while their tokens are under way, clients leave, the index misses events and keeps those of the dead.
"""

from __future__ import annotations

import heapq
import itertools
import random
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from engine_core.errors import RequestCancelled, TransferError
from engine_core.messages import TokenChunk
from engine_core.types import FinishReason
from kv_transfer import handoff
from kv_transfer.handoff import Effect, Key, ReceiverCore, SenderCore
from kv_transfer.ticket import Landing, Ticket
from kv_transfer.wire import KvBlocks, TicketCancel
from router.journal import Journal
from tests.kv_transfer.simulation import check

LEASE_S = 20.0
TICK_S = 0.5
BLOCK = 2  # tokens
NUM_PAGES = 9
DELAY_S = 0.2

Content = tuple[int, ...]
"""The tokens up to the end of a block: what its KV is a function of."""


class Pipe:
    """One way of a connection: FIFO until it is cut."""

    def __init__(self, fleet: Fleet, deliver: Callable[[Any], None]) -> None:
        self.up = True
        self._fleet, self._deliver, self._busy_until = fleet, deliver, 0.0

    def send(self, message: Any) -> None:
        fleet = self._fleet
        self._busy_until = max(self._busy_until, fleet.now + fleet.rng.random() ** 3 * DELAY_S)
        fleet.at(self._busy_until, lambda: self._deliver(message) if self.up else None)


class Fleet:
    def __init__(
        self,
        seed: int,
        sender: Callable[[], SenderCore] = SenderCore,
        receiver: Callable[[], ReceiverCore] = ReceiverCore,
        journal: Callable[[], Journal] = Journal,
    ) -> None:
        self.rng = random.Random(seed)
        self.now = 0.0
        self.heap: list[tuple[float, int, Callable[[], None]]] = []
        self.order = itertools.count()
        self.ids = itertools.count(100)
        self.conditioned_on: dict[int, Content] = {}
        self.sender, self.receiver, self.journal = sender, receiver, journal
        self.p_damage, self.p_event_lost = (self.rng.choice([0, 0.1]) for _ in range(2))
        self.prefills = [Prefill(self) for _ in range(2)]
        self.decodes = [Decode(self) for _ in range(2)]
        self.gateway = Gateway(self)

    def at(self, time: float, action: Callable[[], None]) -> None:
        heapq.heappush(self.heap, (time, next(self.order), action))

    def after(self, max_delay_s: float, action: Callable[[], None]) -> None:
        self.at(self.now + self.rng.random() ** 3 * max_delay_s, action)

    def roll(self, tokens: list[int]) -> int:
        """The next token of one attempt."""
        token = next(self.ids)
        self.conditioned_on[token] = tuple(tokens)
        return token

    def run(self) -> None:
        rng = self.rng
        prefix = [1, 2, 3, 4]
        for number in range(5):
            prompt = prefix[: rng.randrange(5)] + [10 * number + i for i in range(1, rng.randint(2, 5))]
            self.after(1, lambda n=number, p=prompt: self.gateway.accept(f"r{n}", p, rng.randint(1, 5)))
        for _ in range(rng.randrange(6)):
            self.after(2, rng.choice([self.crash, self.cut_kv, self.cut_control, self.move, self.leave, self.squeeze]))
        for tick in range(40):
            self.at(tick * TICK_S, self.tick)
        self.drain()
        for stream in self.gateway.streams.values():
            check(stream.ended, f"{stream.name} never ended, at token {len(stream.journal.token_ids)}")
        for prefill in self.prefills:
            left = set(prefill.core._open) & prefill.stopped
            check(not left, f"prefill holds {left} though it was cancelled")
        self.now += LEASE_S
        self.tick()
        self.drain()
        for worker in (*self.prefills, *self.decodes):
            worker.check_idle()

    def drain(self) -> None:
        while self.heap:
            self.now, _, action = heapq.heappop(self.heap)
            action()

    def tick(self) -> None:
        for worker in (*self.prefills, *self.decodes):
            worker.act(worker.core.tick(self.now))

    def crash(self) -> None:
        """A worker is gone with all it held; its next life has the same place."""
        workers: list[Any] = self.rng.choice([self.prefills, self.decodes])
        place = self.rng.randrange(len(workers))
        dead = workers[place]
        dead.alive = False
        self.hang_up(dead)
        for link in dead.kv_links():
            link.cut(self)
        workers[place] = type(dead)(self)

    def hang_up(self, worker: Any) -> None:
        """The connection between gateway and worker ends; each end learns of it in its time."""
        link = worker.control
        link.to_worker.up = link.to_gateway.up = False
        worker.control = Control(self, worker)
        self.after(DELAY_S, lambda: self.gateway.on_lost(worker, link))
        self.after(DELAY_S, lambda: worker.on_gateway_lost(link) if worker.alive else None)

    def cut_control(self) -> None:
        self.hang_up(self.rng.choice([*self.prefills, *self.decodes]))

    def cut_kv(self) -> None:
        for link in self.rng.choice(self.decodes).kv_links():
            link.cut(self)

    def move(self) -> None:
        """A worker drains, or is suspected without reason: its streams are taken away while it still sends."""
        running = [stream for stream in self.gateway.streams.values() if not stream.ended and stream.decode]
        if running:
            self.gateway.again(self.rng.choice(running))

    def squeeze(self) -> None:
        self.rng.choice(self.decodes).squeeze()

    def leave(self) -> None:
        running = [stream for stream in self.gateway.streams.values() if not stream.ended]
        if running:
            self.gateway.end(self.rng.choice(running))


class Control:
    """The connection between gateway and one worker."""

    def __init__(self, fleet: Fleet, worker: Any) -> None:
        self.to_worker = Pipe(fleet, lambda call: call() if worker.alive else None)
        self.to_gateway = Pipe(fleet, lambda call: call())


@dataclass(eq=False)
class Stream:
    name: str
    prompt: list[int]
    max_tokens: int
    journal: Journal
    prefill: Prefill | None = None
    decode: Decode | None = None
    ended: bool = False


class Gateway:
    def __init__(self, fleet: Fleet) -> None:
        self.fleet = fleet
        self.streams: dict[str, Stream] = {}
        self.index: dict[Decode, set[Content]] = {}

    def accept(self, name: str, prompt: list[int], max_tokens: int) -> None:
        stream = self.streams[name] = Stream(name, prompt, max_tokens, self.fleet.journal())
        self.place(stream)

    def place(self, stream: Stream) -> None:
        fleet, tokens = self.fleet, stream.prompt + stream.journal.token_ids
        blocks = contents(tokens)
        prefill = stream.prefill = fleet.rng.choice(fleet.prefills)
        decode = stream.decode = max(
            fleet.rng.sample(fleet.decodes, len(fleet.decodes)),
            key=lambda worker: sum(block in self.index.get(worker, ()) for block in blocks),
        )
        key, limit = (stream.name, stream.journal.epoch), stream.max_tokens
        start = len(stream.prompt)
        by, to = prefill.control, decode.control
        by.to_worker.send(lambda: prefill.prefill(by, key, tokens, start, limit))
        to.to_worker.send(lambda: decode.decode(to, key, tokens, start, limit, prefill))

    def release(self, stream: Stream) -> None:
        key = (stream.name, stream.journal.epoch)
        for worker in (stream.prefill, stream.decode):
            if worker is not None:
                worker.control.to_worker.send(lambda worker=worker: worker.cancel(key))
        stream.prefill = stream.decode = None

    def again(self, stream: Stream) -> None:
        self.release(stream)
        stream.journal.restart()
        self.fleet.after(0.1, lambda: None if stream.ended or stream.decode else self.place(stream))

    def end(self, stream: Stream) -> None:
        self.release(stream)
        stream.ended = True

    def on_chunk(self, chunk: TokenChunk) -> None:
        stream = self.streams[chunk.request_id]
        following: TokenChunk | None = chunk
        while following is not None and not stream.ended:
            before = tuple(stream.prompt + stream.journal.token_ids)
            if not stream.journal.accept(following):
                return
            for token in following.token_ids:
                check(self.fleet.conditioned_on[token] == before, f"{stream.name} takes a token of another attempt")
            check(len(stream.journal.token_ids) <= stream.max_tokens, "too many tokens")
            if following.finish_reason is not None:
                check(len(stream.journal.token_ids) == stream.max_tokens, "the stream ends too early")
                stream.ended = True
                stream.prefill = stream.decode = None
            following = stream.journal.next_early()

    def on_failed(self, worker: Any, key: Key) -> None:
        stream = self.streams[key[0]]
        if not stream.ended and stream.journal.epoch == key[1] and worker in (stream.prefill, stream.decode):
            self.again(stream)

    def on_lost(self, worker: Any, link: Control) -> None:
        self.index.pop(worker, None)
        for stream in self.streams.values():
            if not stream.ended and worker in (stream.prefill, stream.decode):
                self.again(stream)

    def on_stored(self, worker: Decode, blocks: list[Content]) -> None:
        self.index.setdefault(worker, set()).update(blocks)  # never removed: the index may be wrong


@dataclass(eq=False)
class KvLink:
    """Between one life of a decode worker and one of a prefill worker."""

    decode: Decode
    prefill: Prefill
    to_prefill: Pipe
    to_decode: Pipe

    def cut(self, fleet: Fleet) -> None:
        self.to_prefill.up = self.to_decode.up = False
        if self.decode.links.get(self.prefill) is self:
            fleet.after(DELAY_S, lambda: self.decode.on_link_lost(self) if self.decode.alive else None)
        fleet.after(DELAY_S, lambda: self.prefill.on_link_lost(self) if self.prefill.alive else None)


class Prefill:
    def __init__(self, fleet: Fleet) -> None:
        self.fleet, self.core, self.alive = fleet, fleet.sender(), True
        self.control = Control(fleet, self)
        self.stopped: set[Key] = set()
        self.running: dict[Key, Control] = {}
        self.cancelled: set[Key] = set()  # by a decode worker

    def kv_links(self) -> list[KvLink]:
        return [link for decode in self.fleet.decodes for link in decode.links.values() if link.prefill is self]

    def prefill(self, owner: Control, key: Key, tokens: list[int], start: int, limit: int) -> None:
        if key in self.stopped:
            return
        self.running[key] = owner
        self.act(self.core.offer(self.fleet.now, key, LEASE_S))
        self.compute(key, tokens, 0, start, limit)

    def compute(self, key: Key, tokens: list[int], position: int, start: int, limit: int) -> None:
        if key in self.stopped or not self.alive:
            return
        blocks, now = contents(tokens), self.fleet.now
        if position < len(blocks):
            end = self.fleet.rng.randint(position + 1, len(blocks))
            indices = range(position, end)
            self.act(self.core.send_blocks(now, key, indices, tuple(blocks[position:end]), len(indices)))
            self.fleet.after(DELAY_S, lambda: self.compute(key, tokens, end, start, limit))
            return
        generated = len(tokens) - start
        reason = FinishReason.LENGTH if generated + 1 == limit else None
        chunk = TokenChunk(*key, generated, [self.fleet.roll(tokens)], reason)
        self.control.to_gateway.send(lambda: self.fleet.gateway.on_chunk(chunk))
        self.act(self.core.finish(now, key, chunk))
        self.running.pop(key, None)

    def cancel(self, key: Key) -> None:
        self.stopped.add(key)
        self.running.pop(key, None)
        self.act(self.core.abort(self.fleet.now, key, RequestCancelled("by the gateway")))

    def on_gateway_lost(self, link: Control) -> None:
        for key in [key for key, owner in self.running.items() if owner is link]:
            self.cancel(key)

    def on_link_lost(self, link: KvLink) -> None:
        self.act(self.core.on_peer_lost(self.fleet.now, link))

    def receive(self, link: KvLink, message: Any) -> None:
        if not self.alive:
            return
        if isinstance(message, tuple):
            self.core.on_released(self.fleet.now, *message)
            return
        if isinstance(message, TicketCancel):
            self.cancelled.add((message.request_id, message.epoch))
        self.act(self.core.on_message(self.fleet.now, link, message))

    def act(self, effects: list[Effect]) -> None:
        for effect in effects:
            match effect:
                case handoff.Ticketed(ticket):
                    check(ticket.key not in self.cancelled, f"{ticket.key} starts though decode cancelled it")
                case handoff.Cancelled(key, _):
                    self.stopped.add(key)
                    self.running.pop(key, None)
                case handoff.Send(KvLink() as link, message):
                    link.to_decode.send(lambda link=link, m=message: link.decode.receive(link, m, ()))
                case handoff.SendBlocks(KvLink() as link, ticket, blocks, source, places, shipment):
                    indices, generations = zip(*blocks, strict=True)
                    header = KvBlocks(
                        *ticket.key, ticket.serial, shipment, indices, generations,
                        (0, 1), (0, 1), "f", (0,) * len(blocks), 1, None,
                    )  # fmt: skip
                    found = tuple(source[place] for place in places)
                    link.to_decode.send(lambda link=link, h=header, f=found: link.decode.receive(link, h, f))

    def check_idle(self) -> None:
        check(not len(self.core) and not self.core.held_bytes, "prefill holds a hand-off")
        check(not self.running, "prefill still works")


@dataclass(eq=False)
class Sequence:
    key: Key
    tokens: list[int]
    start: int
    limit: int
    pages: list[int]
    num_cached: int
    num_prompt: int
    prefill: Prefill
    landed: set[int] = field(default_factory=set)


class Decode:
    def __init__(self, fleet: Fleet) -> None:
        self.fleet, self.core, self.alive = fleet, fleet.receiver(), True
        self.control = Control(fleet, self)
        self.links: dict[Prefill, KvLink] = {}
        self.content: list[Content] = [()] * NUM_PAGES
        self.generation = [0] * NUM_PAGES
        self.users = [0] * NUM_PAGES
        self.order = list(range(NUM_PAGES))  # in which free pages are taken
        self.cache: OrderedDict[Content, int] = OrderedDict()
        self.sequences: dict[Key, Sequence] = {}
        self.gone: set[Key] = set()
        self.owners: dict[Key, Control] = {}
        self.serials = itertools.count(1)

    def kv_links(self) -> list[KvLink]:
        return list(self.links.values())

    def decode(self, owner: Control, key: Key, tokens: list[int], start: int, limit: int, prefill: Prefill) -> None:
        if key in self.gone or key in self.sequences or not self.alive:
            return
        self.owners[key] = owner
        blocks = contents(tokens)
        cached: list[int] = []
        for block in blocks:
            if len(block) != BLOCK * (len(cached) + 1) or block not in self.cache:
                break
            cached.append(self.cache[block])
        for page in cached:
            self.users[page] += 1
        fresh = self.allocate(len(blocks) - len(cached))
        if fresh is None:
            for page in cached:
                self.users[page] -= 1
            self.fleet.after(0.5, lambda: self.decode(owner, key, tokens, start, limit, prefill))
            return
        self.sequences[key] = Sequence(
            key, list(tokens), start, limit, cached + fresh, len(cached), len(tokens), prefill
        )
        landing = tuple(Landing(i, self.generation[page]) for i, page in enumerate(fresh, len(cached)))
        ticket = Ticket(*key, next(self.serials), landing, round(LEASE_S * 1000))
        self.act(self.core.request(self.fleet.now, self.link(prefill), ticket))

    def allocate(self, count: int) -> list[int] | None:
        held = set(self.cache.values())
        free = [page for page in self.order if not self.users[page] and page not in held]
        while len(free) < count:
            victim = next((block for block, page in self.cache.items() if not self.users[page]), None)
            if victim is None:
                return None
            free.append(self.cache.pop(victim))
        for page in free[:count]:
            self.users[page] += 1
            self.generation[page] += 1
            self.content[page] = ()
        return free[:count]

    def link(self, prefill: Prefill) -> KvLink:
        if prefill not in self.links:
            link = KvLink(self, prefill, None, None)  # type: ignore[arg-type]
            link.to_prefill = Pipe(self.fleet, lambda message: prefill.receive(link, message))
            link.to_decode = Pipe(self.fleet, lambda call: call())
            self.links[prefill] = link
            if not prefill.alive:
                link.cut(self.fleet)
        return self.links[prefill]

    def receive(self, link: KvLink, message: Any, found: tuple[Content, ...]) -> None:
        if not self.alive or self.links.get(link.prefill) is not link:
            return
        if not isinstance(message, KvBlocks):
            self.act(self.core.on_message(self.fleet.now, message))
            return
        is_intact = self.fleet.rng.random() >= self.fleet.p_damage
        effects = self.core.on_blocks(self.fleet.now, message, is_intact)
        for effect in effects:
            if isinstance(effect, handoff.Landed):
                self.write(message, found)
        self.act(effects)
        key = (message.request_id, message.epoch)
        link.to_prefill.send((key, message.frame, message.blocks))

    def write(self, header: KvBlocks, found: tuple[Content, ...]) -> None:
        sequence = self.sequences.get((header.request_id, header.epoch))
        check(sequence, "blocks land though nobody waits")
        assert sequence
        for index, generation, content in zip(header.blocks, header.generations, found, strict=True):
            page = sequence.pages[index]
            check(generation == self.generation[page], "a late block lands in a page with a new owner")
            self.content[page] = content
            sequence.landed.add(index)

    def squeeze(self) -> None:
        """One that waits for its blocks gives its pages to others, and asks again under the same name."""
        waiting = [sequence for key, sequence in self.sequences.items() if key in self.core._open]
        if not waiting:
            return
        sequence = self.fleet.rng.choice(waiting)
        owner = self.owners[sequence.key]
        self.act(self.core.cancel(sequence.key))
        del self.sequences[sequence.key]
        for page in sequence.pages:
            self.users[page] -= 1
        self.fleet.rng.shuffle(self.order)
        self.decode(owner, sequence.key, sequence.tokens, sequence.start, sequence.limit, sequence.prefill)

    def store(self, sequence: Sequence) -> None:
        """The leading full blocks that are here: they are found again by whoever comes next."""
        stored = []
        for index, block in enumerate(contents(sequence.tokens[: sequence.num_prompt])):
            here = index < sequence.num_cached or index in sequence.landed
            if not here or len(block) != BLOCK * (index + 1):
                break
            if block not in self.cache:
                self.cache[block] = sequence.pages[index]
                stored.append(block)
        if stored and self.fleet.rng.random() >= self.fleet.p_event_lost:
            self.control.to_gateway.send(lambda: self.fleet.gateway.on_stored(self, stored))

    def step(self, sequence: Sequence) -> None:
        if not self.alive or self.sequences.get(sequence.key) is not sequence:
            return
        position = len(sequence.tokens) - sequence.start
        token = self.fleet.roll(sequence.tokens)
        sequence.tokens.append(token)
        reason = FinishReason.LENGTH if position + 1 == sequence.limit else None
        chunk = TokenChunk(*sequence.key, position, [token], reason)
        self.control.to_gateway.send(lambda: self.fleet.gateway.on_chunk(chunk))
        if reason is not None:
            self.drop(sequence.key)
        else:
            self.fleet.after(DELAY_S, lambda: self.step(sequence))

    def drop(self, key: Key) -> None:
        self.gone.add(key)
        self.owners.pop(key, None)
        sequence = self.sequences.pop(key, None)
        for page in sequence.pages if sequence else ():
            self.users[page] -= 1

    def cancel(self, key: Key) -> None:
        self.act(self.core.cancel(key))
        if key in self.sequences:
            self.store(self.sequences[key])
        self.drop(key)

    def on_gateway_lost(self, link: Control) -> None:
        for key in [key for key, owner in self.owners.items() if owner is link]:
            self.cancel(key)

    def on_link_lost(self, link: KvLink) -> None:
        if self.links.get(link.prefill) is link:
            del self.links[link.prefill]
        self.act(self.core.on_peer_lost(link, TransferError("connection lost")))

    def act(self, effects: list[Effect]) -> None:
        for effect in effects:
            match effect:
                case handoff.Send(KvLink() as link, message):
                    link.to_prefill.send(message)
                case handoff.Done(key, first_token, lost):
                    self.recompute(self.sequences[key], lost)
                    self.begin(self.sequences[key], first_token)
                case handoff.Lost(key, _):
                    if key in self.sequences:
                        self.store(self.sequences[key])
                    self.drop(key)
                    self.control.to_gateway.send(lambda key=key: self.fleet.gateway.on_failed(self, key))

    def recompute(self, sequence: Sequence, lost: tuple[int, ...]) -> None:
        for index in lost:
            check(index not in sequence.landed, "a block that landed is called lost")
            self.content[sequence.pages[index]] = contents(sequence.tokens)[index]
            sequence.landed.add(index)

    def begin(self, sequence: Sequence, first_token: TokenChunk) -> None:
        for page, block in zip(sequence.pages, contents(sequence.tokens), strict=True):
            check(self.content[page] == block, f"{sequence.key} attends to a page that holds something else")
        self.store(sequence)
        sequence.tokens += first_token.token_ids
        if first_token.finish_reason is not None:
            self.drop(sequence.key)
        else:
            self.fleet.after(DELAY_S, lambda: self.step(sequence))

    def check_idle(self) -> None:
        check(not self.sequences and not len(self.core), "decode holds a sequence")
        check(not any(self.users), "decode holds pages")


def contents(tokens: list[int]) -> list[Content]:
    """Of each block, the last one perhaps not full."""
    return [tuple(tokens[: min(end + BLOCK, len(tokens))]) for end in range(0, len(tokens), BLOCK)]
