"""A donor over the fake engine: what it gives, in which portions, and that it holds nothing after every end."""

from __future__ import annotations

from collections import defaultdict

import numpy as np
import pytest

from engine_core.errors import RequestCancelled
from engine_core.messages import Donate
from engine_core.sequence import Sequence
from engine_core.types import Request, SamplingParams
from kv_transfer import donor as module
from kv_transfer.donor import Donor
from tests.fake_engine import FakePages, fake_replica

KEY = ("r", 0)
PROMPT = list(range(10, 40))
NUM_BLOCKS = 7  # full ones of the prompt


class Copy(FakePages):
    """Is on the host when it is waited for."""

    def __init__(self, layers: list[np.ndarray]) -> None:
        super().__init__(layers)
        self.ready = False

    def is_ready(self) -> bool:
        return self.ready

    def wait(self) -> list[np.ndarray]:
        self.ready = True
        return super().wait()


class Outlet:
    """A sender and its outlet, which say what they were told."""

    def __init__(self) -> None:
        self.writable = True
        self.sender = self
        self.leases: list[float] = []
        self.blocks: dict[int, list[int]] = defaultdict(list)
        self.portions: list[int] = []
        self.ends: list[object] = []

    def offer(self, request_id, epoch, lease_s) -> None:
        self.leases.append(lease_s)

    def send_blocks(self, request_id, epoch, indices, layers) -> None:
        self.portions.append(len(indices))
        for row, index in enumerate(indices):
            self.blocks[index] = layers[0][row, :, 0, 0].astype(int).tolist()

    def finish(self, request_id, epoch, first_token) -> None:
        assert not first_token.token_ids and first_token.finish_reason is None
        self.ends.append("finish")

    def abort(self, request_id, epoch, error) -> None:
        self.ends.append(error.code)


class Side:
    """A donor whose prefix cache holds the leading blocks of `PROMPT`."""

    def __init__(self, num_cached: int = NUM_BLOCKS, **options) -> None:
        self.replica, self.outlet = fake_replica(**options), Outlet()
        self.copies: list[Copy] = []
        self.donor = Donor(self.replica.memory, self.gather, self.outlet, 64)
        sequence = Sequence.of(self.request())
        assert self.replica.memory.place(sequence, computes=False)
        self.replica.engine.cache[sequence.pages[:NUM_BLOCKS]] = np.reshape(PROMPT[: 4 * NUM_BLOCKS], (-1, 4))
        self.replica.memory.store(sequence, 4 * num_cached)
        self.replica.memory.release(sequence)

    @staticmethod
    def request() -> Request:
        return Request(*KEY[:1], list(PROMPT), len(PROMPT), SamplingParams(), epoch=KEY[1])

    def gather(self, pages) -> Copy:
        self.copies.append(Copy(self.replica.engine.gather(pages)._layers))
        return self.copies[-1]

    def donate(self, num_blocks: int = NUM_BLOCKS, deadline_ms: int = 60_000) -> None:
        self.donor.add(Donate(self.request(), num_blocks, deadline_ms))

    def run(self) -> None:
        while self.donor.tick(wait=True):
            pass

    def assert_released(self) -> None:
        assert len(self.donor) == 0 and not self.donor._copies and not self.donor.is_giving
        memory = self.replica.memory
        assert memory.free_pages == self.replica.resolved.layout.num_pages
        for shard in memory.shards:
            assert shard.num_sequences == 0
            shard.cache.check_integrity()


@pytest.mark.parametrize("row_shards", [1, 2])
@pytest.mark.parametrize(
    ("num_cached", "num_blocks", "wanted", "given"),
    [
        (7, 7, range(7), range(7)),
        (7, 7, [3, 4, 6], [3, 4, 6]),
        (7, 4, range(7), range(4)),
        (5, 7, range(2, 7), [2, 3, 4]),
        (2, 7, range(2, 7), []),
        (7, 99, [], []),
    ],
)
def test_blocks_that_are_held_and_wanted_are_given(num_cached, num_blocks, wanted, given, row_shards):
    side = Side(num_cached, row_shards=row_shards)
    side.donate(num_blocks)
    assert side.outlet.leases == [module.LEASE_S]
    side.donor.grant(KEY, wanted)
    side.run()
    assert side.outlet.blocks == {i: PROMPT[4 * i : 4 * i + 4] for i in given}
    assert side.outlet.ends == ["finish"]
    side.assert_released()


def test_who_holds_nothing_says_so():
    side = Side(num_cached=0)
    side.donate()
    assert side.outlet.ends == ["transfer_error"] and not side.outlet.leases
    side.assert_released()


def test_the_lease_is_within_the_deadline():
    side = Side()
    side.donate(deadline_ms=700)
    assert side.outlet.leases == [0.7]


def test_portions_leave_one_per_round_without_a_wait_while_steps_run(monkeypatch):
    monkeypatch.setattr(module, "PORTION_PAGES", 2)
    side = Side()
    side.donate()
    side.donor.grant(KEY, range(7))
    for _ in range(5):
        side.donor.tick(wait=False)
    assert len(side.copies) == module.MAX_COPIES and not side.outlet.portions
    side.copies[0].ready = True
    assert side.donor.tick(wait=False)
    assert side.outlet.portions == [2]
    side.run()
    assert side.outlet.portions == [2, 2, 2, 1] and side.outlet.ends == ["finish"]
    side.assert_released()


def test_a_full_outlet_keeps_pages_on_the_device():
    side = Side()
    side.outlet.writable = False
    side.donate()
    side.donor.grant(KEY, range(7))
    assert not side.donor.tick(wait=True) and not side.copies and side.donor.is_giving
    side.outlet.writable = True
    side.run()
    assert side.outlet.ends == ["finish"]
    side.assert_released()


def test_held_pages_are_not_evicted():
    side = Side(num_pages=8)
    side.donate(4)
    other = Sequence.of(Request("x", list(range(50, 80)), 30, SamplingParams()))
    assert not side.replica.memory.place(other, computes=False)
    side.donor.grant(KEY, range(4))
    side.run()
    assert side.replica.memory.place(other, computes=False)
    side.replica.memory.release(other)
    side.assert_released()


@pytest.mark.parametrize("rounds", range(4))
def test_cancel_at_any_time_frees_everything(rounds, monkeypatch):
    monkeypatch.setattr(module, "PORTION_PAGES", 2)
    side = Side()
    side.donate()
    side.donate()
    side.donor.grant(KEY, range(7))
    for _ in range(rounds):
        side.donor.tick(wait=False)
    if rounds % 2:
        side.donor.cancel(KEY)
    else:
        side.donor.give_up(KEY, RequestCancelled("the gateway cancelled the request"))
    side.donor.cancel(KEY)
    side.donor.give_up(KEY, RequestCancelled("again"))
    side.donor.grant(KEY, range(7))
    side.run()
    assert side.outlet.ends == ([] if rounds % 2 else ["request_cancelled"])
    side.assert_released()


def test_blocks_that_turn_out_to_be_damaged_are_given_no_more(monkeypatch):
    monkeypatch.setattr(module, "PORTION_PAGES", 2)
    side = Side()
    side.donate()
    side.donor.grant(KEY, range(7))
    side.donor.tick(wait=True)
    side.replica.memory.distrust(0)
    side.run()
    assert side.outlet.ends == ["transfer_error"] and not side.outlet.portions
    side.assert_released()
