"""The hand-off's state machines, case by case and in the simulator."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import pytest

from engine_core.errors import (
    NoFreePages,
    RequestCancelled,
    TicketExpired,
    TransferError,
    TransferTimeout,
)
from engine_core.messages import TokenChunk
from kv_transfer import handoff
from kv_transfer.handoff import (
    Cancelled,
    Done,
    Landed,
    Lost,
    ReceiverCore,
    Send,
    SendBlocks,
    SenderCore,
    Ticketed,
    Unsend,
)
from kv_transfer.ticket import Landing, Ticket
from kv_transfer.wire import KvAbort, KvBlocks, KvDone, KvWant, TicketCancel, TicketMsg
from tests.kv_transfer.simulation import Broken, World

KEY = ("r", 0)
TICKET = Ticket("r", 0, 7, (Landing(1, 41), Landing(2, 42)), 1000)
TOKEN = TokenChunk("r", 0, 0, [5])
NOTHING = TokenChunk("r", 0, 0, [])
DONE = Send("d", KvDone("r", 0, 7, TOKEN))


def header(*blocks: tuple[int, int], serial: int = 7) -> KvBlocks:
    indices, generations = zip(*blocks, strict=True)
    return KvBlocks("r", 0, serial, 0, indices, generations, (0, 1), (0, 1), "float32", (0,) * len(blocks), 64, None)


def codes(effects: list[Any]) -> list[Any]:
    return [effect.error.code if isinstance(effect, (Cancelled, Lost)) else type(effect) for effect in effects]


class TestSender:
    def test_ticket_first(self):
        core = SenderCore()
        assert core.on_message(0, "d", TicketMsg(TICKET)) == []
        assert core.offer(0, KEY, 1) == [Ticketed(TICKET)]
        assert core.send_blocks(0, KEY, [0, 1], "chunk", 10) == [SendBlocks("d", TICKET, ((1, 41),), "chunk", (1,), 1)]
        assert core.send_blocks(0, KEY, [1, 2, 3], "chunk2", 10) == [
            SendBlocks("d", TICKET, ((2, 42),), "chunk2", (1,), 2)
        ]
        assert core.finish(0, KEY, TOKEN) == [DONE]
        assert core.held_bytes == 5 + 3
        core.on_released(0, KEY, 1, [1])
        assert core.held_bytes == 3
        core.on_released(0, KEY, 2, [2])
        assert len(core) == core.held_bytes == 0

    def test_ticket_last(self):
        core = SenderCore()
        core.offer(0, KEY, 1)
        core.send_blocks(0, KEY, [0], "a", 10)
        core.send_blocks(0, KEY, [1, 2], "b", 20)
        core.finish(0, KEY, TOKEN)
        assert core.held_bytes == 30
        sent = SendBlocks("d", TICKET, ((1, 41), (2, 42)), "b", (0, 1), 1)
        assert core.on_message(0, "d", TicketMsg(TICKET)) == [Ticketed(TICKET), sent, DONE]
        assert core.held_bytes == 20
        core.on_released(0, KEY, 1, [1, 2])
        assert len(core) == core.held_bytes == 0

    def sent(self) -> SenderCore:
        core = SenderCore()
        core.on_message(0, "d", TicketMsg(TICKET))
        core.offer(0, KEY, 1)
        core.send_blocks(0, KEY, [1, 2], "a", 20)
        core.finish(0, KEY, TOKEN)
        return core

    def test_what_decode_wants_again_is_sent_again(self):
        core = self.sent()
        again = core.on_message(0.9, "d", KvWant(*KEY, 7, (2,)))
        assert again == [SendBlocks("d", TICKET, ((2, 42),), "a", (1,), 2)]
        core.on_released(0.9, KEY, 1, [1, 2])
        assert core.held_bytes == 10, "the first sending of block 2 is released, the second is under way"
        assert core.tick(1.8) == []
        core.on_released(1.8, KEY, 2, [2])
        assert len(core) == core.held_bytes == 0

    def test_what_is_gone_cannot_be_sent_again(self):
        core = self.sent()
        core.on_released(0, KEY, 1, [1])
        _, abort = core.on_message(0, "d", KvWant(*KEY, 7, (1, 2)))
        assert abort.message.code == TransferError.code
        (abort,) = core.on_message(0, "d", KvWant(*KEY, 7, (1, 2)))
        assert abort.message.serial == 7
        assert len(core) == core.held_bytes == 0

    def test_blocks_that_are_never_released_end_with_the_lease(self):
        core = self.sent()
        assert codes(core.tick(1.0)) == [Unsend, Send]
        assert len(core) == core.held_bytes == 0

    def test_wanted_blocks_that_were_not_handed_over_are_lost(self):
        core = SenderCore()
        core.on_message(0, "d", TicketMsg(TICKET))
        core.offer(0, KEY, 1)
        core.send_blocks(0, KEY, [1], "a", 10)
        assert core.finish(0, KEY, TOKEN) == [Send("d", KvDone("r", 0, 7, TOKEN, (2,)))]
        core.on_released(0, KEY, 1, [1])
        assert len(core) == core.held_bytes == 0

    @pytest.mark.parametrize("first_token", [TOKEN, NOTHING])
    def test_half_a_block_is_one_only_at_the_end_of_the_prompt(self, first_token):
        """A donor has no token to tell: what it holds of a block that the receiver wants whole is not that block."""

        class HalfABlock:
            own_ticket = staticmethod(lambda ticket: ticket)
            add = staticmethod(lambda indices, source: [((1,), source, 10)])
            flush = staticmethod(lambda: [((2,), "half", 10)])

        core = SenderCore(lambda peer: HalfABlock())
        core.on_message(0, "d", TicketMsg(TICKET))
        core.offer(0, KEY, 1)
        core.send_blocks(0, KEY, [1], "a", 10)
        *blocks, done = core.finish(0, KEY, first_token)
        assert [block.source for block in blocks] == (["half"] if first_token is TOKEN else [])
        assert done.message.lost == (() if first_token is TOKEN else (2,))

    @pytest.mark.parametrize("order", ["cancel, offer", "offer, cancel"])
    def test_cancel_from_decode(self, order):
        core = SenderCore()
        core.on_message(0, "d", TicketMsg(TICKET))
        if order == "offer, cancel":
            core.offer(0, KEY, 1)
            effects = core.on_message(0, "d", TicketCancel(*KEY))
        else:
            assert core.on_message(0, "d", TicketCancel(*KEY)) == [Unsend("d", KEY), Unsend("d", KEY)]
            effects = core.offer(0, KEY, 1)
        assert codes(effects)[-1] == RequestCancelled.code
        assert core.send_blocks(0, KEY, [1], "a", 10) == []
        assert core.finish(0, KEY, TOKEN) == []
        assert len(core) == core.held_bytes == 0

    def test_a_late_ticket_learns_why(self):
        core = SenderCore()
        core.offer(0, KEY, 1)
        assert core.abort(0, KEY, NoFreePages("full")) == []
        (answer,) = core.on_message(0, "d", TicketMsg(TICKET))
        assert answer.message == KvAbort("r", 0, 7, NoFreePages.code, "full", True)

    def test_leases_end(self):
        core = SenderCore()
        core.offer(0, ("no ticket", 0), 1)
        core.send_blocks(0.5, ("no ticket", 0), [0], "a", 10)
        core.on_message(0, "d", TicketMsg(TICKET))
        assert codes(core.tick(1.0)) == [Unsend, Send]
        assert core.tick(1.4) == []
        assert codes(core.tick(1.5)) == [TicketExpired.code]
        assert len(core) == core.held_bytes == 0
        assert len(core._tombstones) == 2
        core.tick(1.5 + handoff.TOMBSTONE_S)
        assert not core._tombstones

    def test_lost_connection(self):
        core = SenderCore()
        core.on_message(0, "d", TicketMsg(TICKET))
        core.offer(0, KEY, 1)
        core.offer(0, ("other", 0), 1)
        assert core.on_peer_lost(0, "elsewhere") == []
        assert codes(core.on_peer_lost(0, "d")) == [Unsend, TransferError.code]
        assert len(core) == 1

    def test_parked_tickets_are_bounded(self, monkeypatch):
        monkeypatch.setattr(handoff, "MAX_PARKED_TICKETS", 3)
        core = SenderCore()
        answers = [core.on_message(0, "d", TicketMsg(Ticket(str(i), 0, i, (), 1000))) for i in range(5)]
        assert [codes(answer) for answer in answers] == [[], [], [], [Send], [Send]]


class TestReceiver:
    def opened(self) -> ReceiverCore:
        core = ReceiverCore()
        assert core.request(0, "p", TICKET) == [Send("p", TicketMsg(TICKET))]
        return core

    def test_blocks_then_done(self):
        core = self.opened()
        assert core.on_blocks(0, header((2, 42)), True) == [Landed(header((2, 42)))]
        assert core.on_blocks(0, header((1, 41)), True) == [Landed(header((1, 41)))]
        assert core.on_message(0, DONE.message) == [Done(KEY, TOKEN)]
        assert len(core) == 0

    @pytest.mark.parametrize("blocks", [[(1, 40)], [(3, 41)], [(1, 41), (2, 41)], [(2, 41)]])
    def test_the_fence(self, blocks):
        core = self.opened()
        assert not core.wants(header(*blocks))
        assert core.on_blocks(0, header(*blocks), True) == []
        assert core.num_stale == 1
        assert core.on_message(0, DONE.message) == []

    def test_blocks_of_an_earlier_ticket_are_stale_even_if_the_generation_is_the_same(self):
        core = self.opened()
        assert not core.wants(header((1, 41), serial=6))
        assert core.on_blocks(0, header((1, 41), serial=6), True) == []

    def test_a_block_lands_once(self):
        core = self.opened()
        core.on_blocks(0, header((1, 41)), True)
        assert core.on_blocks(0, header((1, 41)), True) == []

    def test_the_first_token_may_overtake_blocks(self):
        core = self.opened()
        core.on_blocks(0, header((2, 42)), True)
        assert core.on_message(0, DONE.message) == []
        assert core.on_blocks(0.5, header((1, 41)), True) == [Landed(header((1, 41))), Done(KEY, TOKEN)]
        assert len(core) == 0

    def test_late_blocks_are_asked_for_again_but_not_for_ever(self):
        now = handoff.WANT_AFTER_S
        core = ReceiverCore()
        core.request(0, "p", Ticket("r", 0, 7, (Landing(1, 41), Landing(2, 42)), 10_000))
        core.on_message(0, DONE.message)
        for _ in range(handoff.MAX_WANTS):
            assert core.tick(now - 0.1) == []
            assert core.tick(now) == [Send("p", KvWant(*KEY, 7, (1, 2)))]
            now += handoff.WANT_AFTER_S
        assert core.tick(now) == [Done(KEY, TOKEN, (1, 2)), Send("p", TicketCancel(*KEY))]
        assert len(core) == 0

    def test_damaged_blocks_are_asked_for_again_but_not_for_ever(self):
        core = self.opened()
        for _ in range(handoff.MAX_WANTS):
            assert core.on_blocks(0, header((1, 41)), False) == [Send("p", KvWant(*KEY, 7, (1,)))]
        assert core.on_blocks(0, header((1, 41)), False) == []
        assert core.on_blocks(0, header((1, 41)), True) == []  # given up: it counts as computed elsewhere
        core.on_blocks(0, header((2, 42)), True)
        assert core.on_message(0, DONE.message) == [Done(KEY, TOKEN, (1,)), Send("p", TicketCancel(*KEY))]

    def test_without_the_first_token_nothing_is_given_up_for_good(self):
        core = self.opened()
        for _ in range(handoff.MAX_WANTS + 1):
            core.on_blocks(0, header((1, 41)), False)
        (lost,) = core.on_peer_lost("p", TransferError("gone"))
        assert lost == Lost(KEY, lost.error)

    def test_what_the_sender_no_longer_has_is_lost_once_all_has_been_sent(self):
        abort = KvAbort(*KEY, 7, TransferError.code, "no longer here", True)
        assert codes(self.opened().on_message(0, abort)) == [TransferError.code]
        core = self.opened()
        core.on_blocks(0, header((1, 41)), True)
        core.on_message(0, DONE.message)
        assert core.on_message(0, abort) == [Done(KEY, TOKEN, (2,)), Send("p", TicketCancel(*KEY))]

    @pytest.mark.parametrize("overtaken", [False, True])
    def test_what_the_sender_never_had_is_lost_and_the_rest_is_waited_for(self, overtaken):
        core, done = self.opened(), KvDone("r", 0, 7, NOTHING, (2, 9))
        over = [Done(KEY, NOTHING, (2,)), Send("p", TicketCancel(*KEY))]
        if overtaken:
            assert core.on_message(0, done) == []
            assert core.on_blocks(0, header((2, 42)), True) == []
            assert core.on_blocks(0, header((1, 41)), True) == [Landed(header((1, 41))), *over]
        else:
            core.on_blocks(0, header((1, 41)), True)
            assert core.on_message(0, done) == over

    def test_answers_to_an_earlier_ticket_are_stale(self):
        core = self.opened()
        core.cancel(KEY)
        core.request(0, "q", Ticket("r", 0, 8, (), 1000))
        assert core.on_message(0, DONE.message) == []
        assert core.on_message(0, KvAbort("r", 0, 7, "overloaded", "", True)) == []
        assert core.on_message(0, KvDone("r", 0, 8, TOKEN)) == [Done(KEY, TOKEN)]

    def test_abort_brings_its_error(self):
        (lost,) = self.opened().on_message(0, KvAbort("r", 0, 7, NoFreePages.code, "full", True))
        assert isinstance(lost.error, NoFreePages)
        (lost,) = self.opened().on_message(0, KvAbort("r", 0, 7, "from the future", "?", False))
        assert isinstance(lost.error, TransferError)
        assert not lost.error.retryable

    def test_the_lease_counts_from_the_last_progress(self):
        core = self.opened()
        core.on_blocks(0.9, header((1, 41)), True)
        core.on_blocks(1.0, header((1, 41)), True)
        assert core.tick(1.8) == []
        assert codes(core.tick(1.9)) == [TransferTimeout.code, Send]


def first_broken(seeds: range, sender: Any, receiver: Any) -> str:
    for seed in seeds:
        try:
            World(seed, sender, receiver).run()
        except Broken as error:
            return f"seed {seed}: {error}"
    return ""


def test_thousands_of_histories():
    assert first_broken(range(3000), SenderCore, ReceiverCore) == ""


def without_fence(entry: Any, frame: KvBlocks) -> bool:
    return set(frame.blocks) <= set(entry.missing)


def generation_alone(entry: Any, frame: KvBlocks) -> bool:
    return all(entry.missing.get(i) == g for i, g in zip(frame.blocks, frame.generations, strict=True))


@pytest.mark.parametrize(
    ("fence", "harm"),
    [(without_fence, "page with a new owner"), (generation_alone, "another prefill worker lands")],
)
def test_the_simulation_notices_a_weak_fence(monkeypatch, fence, harm):
    monkeypatch.setattr(handoff, "_fits", fence)
    assert harm in first_broken(range(3000), SenderCore, ReceiverCore)


def test_the_simulation_notices_missing_tombstones():
    class Forgetful(OrderedDict[Any, Any]):
        def __setitem__(self, key: Any, value: Any) -> None:
            pass

    class Sender(SenderCore):
        def __init__(self) -> None:
            super().__init__()
            self._tombstones = Forgetful()

    assert "though decode cancelled it" in first_broken(range(3000), Sender, ReceiverCore)
