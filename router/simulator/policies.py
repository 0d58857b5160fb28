"""Ways to place a request: the router's own, and those it is measured against.

All see the same: the router's `Candidate`s, its index, its learned costs; and reserve in the same way.
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable, Collection, Sequence
from typing import Protocol

import numpy as np

from engine_core.block_hash import KEY_BYTES, Keys
from engine_core.errors import NoWorkerAvailable
from engine_core.types import Request
from router.block_index import BlockIndex
from router.candidate import Candidate, Work
from router.cost_model import TransferModel
from router.placement import JointPlacement, Placement, PlacementConfig

WorkerKey = tuple[str, int]


class Placed(Protocol):
    """A reservation; releases are idempotent."""

    prefill: Candidate | None
    decode: Candidate
    donor: Candidate | None
    donor_blocks: int

    def release_prefill(self, now: float) -> None:
        """The prompt has been read."""

    def release(self, now: float) -> None:
        """The attempt is over."""


class Policy(Protocol):
    """Chooses workers and reserves them."""

    def place(
        self,
        request: Request,
        hashes: Sequence[bytes],
        prefill: Sequence[Candidate],
        decode: Sequence[Candidate],
        now: float,
        avoid: Collection[WorkerKey],
    ) -> Placed:
        """`hashes` are those of the prompt's full blocks."""

    def has_room(self, prefill: Sequence[Candidate], decode: Sequence[Candidate], now: float) -> bool:
        """Whether a request placed now would begin soon."""

    def handed_over(self, placed: Placed, seconds: float) -> None:
        """The second token came so long after the first."""

    def finished(self, num_output_tokens: int) -> None:
        """A request ended after so many tokens."""


class Joint:
    """The router's real placement."""

    def __init__(self, placement: JointPlacement) -> None:
        self._placement = placement

    def place(
        self,
        request: Request,
        hashes: Sequence[bytes],
        prefill: Sequence[Candidate],
        decode: Sequence[Candidate],
        now: float,
        avoid: Collection[WorkerKey],
    ) -> Placement:
        """See `JointPlacement.place`, which hashes the prompt itself."""
        return self._placement.place(request, prefill, decode, now=now, avoid=avoid, session=None, donors=True)

    def has_room(self, prefill: Sequence[Candidate], decode: Sequence[Candidate], now: float) -> bool:
        """See `JointPlacement`."""
        return self._placement.has_room(prefill, decode, now)

    def handed_over(self, placed: Placed, seconds: float) -> None:
        """See `JointPlacement`."""
        assert isinstance(placed, Placement)
        self._placement.handed_over(placed, seconds)

    def finished(self, num_output_tokens: int) -> None:
        """A request ended after so many tokens."""
        self._placement.finished(num_output_tokens)


class Reservation:
    """What a simple policy chose."""

    __slots__ = ("_number", "decode", "donor", "donor_blocks", "prefill")

    def __init__(self, number: int, prefill: Candidate, decode: Candidate) -> None:
        self._number = number
        self.prefill: Candidate | None = prefill
        self.decode = decode
        self.donor: Candidate | None = None
        self.donor_blocks = 0

    def release_prefill(self, now: float) -> None:
        """The prompt has been read."""
        assert self.prefill is not None
        self.prefill.release_prefill(self._number, now)

    def release(self, now: float) -> None:
        """The attempt is over."""
        assert self.prefill is not None
        self.prefill.release(self._number, now)
        self.decode.release(self._number, now)


Choice = Callable[[Request, Keys, Sequence[Candidate], Sequence[Candidate], float], tuple[Candidate, Candidate]]


class Simple:
    """A policy that is one function.

    Args:
        choose: request, keys of its blocks, usable prefill and decode workers, now -> the pair.
        index: told where blocks will be.
        joint: asked only whether there is room, so that all policies admit alike: where prompts could be read.
    """

    def __init__(self, choose: Choice, index: BlockIndex, joint: JointPlacement) -> None:
        self._choose = choose
        self._index = index
        self._joint = joint
        self._number = 0

    def place(
        self,
        request: Request,
        hashes: Sequence[bytes],
        prefill: Sequence[Candidate],
        decode: Sequence[Candidate],
        now: float,
        avoid: Collection[WorkerKey],
    ) -> Reservation:
        """See `Policy`."""
        keys = keys_of(hashes)
        sources, targets = _usable(prefill, avoid), _usable(decode, avoid)
        if not sources or not targets:
            raise NoWorkerAvailable("a worker of each role is needed")
        source, target = self._choose(request, keys, sources, targets, now)
        self._number += 1
        num_tokens = len(request.token_ids)
        held = self._index.match(keys).get(source.key, 0) * source.info.page_size
        missing = num_tokens - min(held, num_tokens - 1)
        seconds = source.steps.prefill_s(missing, num_tokens - missing, source.info.chunk_tokens)
        source.reserve(self._number, Work(missing, round(1e6 * seconds), 0, 0), now)
        target.reserve(self._number, Work(0, 0, 1, num_tokens), now)
        for worker in (source, target):
            self._index.predict(worker.key, keys)
        return Reservation(self._number, source, target)

    def has_room(self, prefill: Sequence[Candidate], decode: Sequence[Candidate], now: float) -> bool:
        """See `JointPlacement`."""
        return self._joint.has_room(prefill, decode, now)

    def handed_over(self, placed: Placed, seconds: float) -> None:
        """Nothing to learn."""

    def finished(self, num_output_tokens: int) -> None:
        """Nothing to learn."""


def keys_of(hashes: Sequence[bytes]) -> Keys:
    """Index keys `[n] u64`."""
    return np.frombuffer(b"".join(block_hash[:KEY_BYTES] for block_hash in hashes), "<u8")


def _usable(workers: Sequence[Candidate], avoid: Collection[WorkerKey]) -> list[Candidate]:
    usable = [worker for worker in workers if worker.usable and worker.key not in avoid]
    return usable or [worker for worker in workers if worker.usable]


def _random(seed: int) -> Choice:
    rng = random.Random(seed)

    def choose(
        request: Request, keys: Keys, prefill: Sequence[Candidate], decode: Sequence[Candidate], now: float
    ) -> tuple[Candidate, Candidate]:
        return rng.choice(prefill), rng.choice(decode)

    return choose


def _round_robin(
    request: Request, keys: Keys, prefill: Sequence[Candidate], decode: Sequence[Candidate], now: float
) -> tuple[Candidate, Candidate]:
    return min(prefill, key=_turn), min(decode, key=_turn)


def _least_load(
    request: Request, keys: Keys, prefill: Sequence[Candidate], decode: Sequence[Candidate], now: float
) -> tuple[Candidate, Candidate]:
    """Prefill: fewest prompt tokens waiting. Decode: fewest requests."""
    return min(prefill, key=lambda worker: (worker.reserved_tokens, worker.turn)), _least_busy(decode)


def _prefix_only(index: BlockIndex) -> Choice:
    """Longest prefix on either side, whatever the load; of equals, whose turn it is."""

    def choose(
        request: Request, keys: Keys, prefill: Sequence[Candidate], decode: Sequence[Candidate], now: float
    ) -> tuple[Candidate, Candidate]:
        held = index.match(keys)

        def longest(worker: Candidate) -> tuple[int, int]:
            return -held.get(worker.key, 0), worker.turn

        return min(prefill, key=longest), min(decode, key=longest)

    return choose


def _prefill_then_decode(index: BlockIndex) -> Choice:
    """One after the other: the prefill worker with the least predicted TTFT, then the least busy decode worker."""

    def choose(
        request: Request, keys: Keys, prefill: Sequence[Candidate], decode: Sequence[Candidate], now: float
    ) -> tuple[Candidate, Candidate]:
        held = index.match(keys)
        num_tokens = len(request.token_ids)

        def ttft(worker: Candidate) -> tuple[float, int]:
            info = worker.info
            cached = min(held.get(worker.key, 0) * info.page_size, num_tokens - 1)
            seconds = worker.steps.prefill_s(num_tokens - cached, cached, info.chunk_tokens)
            return worker.queue_s(now) + seconds, worker.turn

        return min(prefill, key=ttft), _least_busy(decode)

    return choose


def _least_busy(decode: Sequence[Candidate]) -> Candidate:
    return min(decode, key=lambda worker: (worker.num_rows() / max(worker.info.num_slots, 1), worker.turn))


def _turn(worker: Candidate) -> int:
    return worker.turn


POLICIES = ("joint", "random", "round-robin", "least-load", "prefix-only", "prefill-then-decode")


def make_policy(name: str, index: BlockIndex, transfers: TransferModel, config: PlacementConfig, seed: int) -> Policy:
    """One of `POLICIES`; `seed` is of those that draw lots."""
    joint = JointPlacement(index, transfers, config, None)
    if name == "joint":
        return Joint(joint)
    choices: dict[str, Choice] = {
        "random": _random(seed),
        "round-robin": _round_robin,
        "least-load": _least_load,
        "prefix-only": _prefix_only(index),
        "prefill-then-decode": _prefill_then_decode(index),
    }
    remote = dataclasses.replace(config, local_prefill_tokens=0)
    return Simple(choices[name], index, JointPlacement(index, transfers, remote, None))
