"""What simulated workers of both roles share: an identity, memory, a queue of prompts, and what they tell gateways."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from engine_core.messages import BlockEvents, Load, PeerAddress, StepSums, WorkerInfo
from engine_core.types import Numerics, Role, Tier
from kv_transfer.block_publisher import BlockPublisher
from router.simulator.chunks import Readings
from router.simulator.clock import EventQueue
from router.simulator.donation import Donations, Fetches
from router.simulator.job import Attempt
from router.simulator.links import Links
from router.simulator.memory import Memory
from router.simulator.profile import WorkerProfile

MAX_SAMPLES = 8  # of steps, per beat
NAMESPACE = "5e"  # of block hashes: any will do


class Listener(Protocol):
    """Who hears what workers produce; called at the time of the event, before any network."""

    def on_first_token(self, attempt: Attempt, cached_tokens: int) -> None:
        """A prompt has been read."""

    def on_finished(self, attempt: Attempt) -> None:
        """The last token."""

    def on_fetched(self, attempt: Attempt, reader: Worker, num_blocks: int, seconds: float) -> None:
        """So many blocks came from the attempt's donor."""

    def on_second_token(self, attempt: Attempt, seconds: float) -> None:
        """A sequence began to decode, so long after its first token; told at the end of its first stretch."""

    def on_steps(self, rows: float, first_s: float, last_s: float, num_steps: int) -> None:
        """Decode steps of so many sequences; their times go from `first_s` to `last_s` in a straight line."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where workers live."""

    events: EventQueue
    links: Links
    listener: Listener


class Worker:
    """See the module; `prefill` and `decode` add what they do.

    Attributes:
        info: who it is.
        profile: how fast it is.
        speed: this worker's own factor on every step's time.
        alive: False after a crash or when it has left.
        draining: gets nothing new, and leaves when it is empty.
        busy_s: seconds in which it computed.
        started_at, ended_at: when it began to serve, and left.
        donations, fetches: what it gives others, and what they give it.
    """

    def __init__(self, place: Place, info: WorkerInfo, profile: WorkerProfile, rng: np.random.Generator) -> None:
        self.info = info
        self.profile = profile
        self.speed = 1.0
        self.alive = True
        self.draining = False
        self.busy_s = 0.0
        self.memory = Memory(info.num_pages, info.page_size)
        self.readings = Readings(self.memory, profile.chunk_tokens, profile.prefill_rows)
        self.publisher = BlockPublisher(info.worker_id, info.incarnation)
        self.num_preemptions = 0
        self.started_at = 0.0
        self.ended_at = float("inf")
        self._events = place.events
        self._links = place.links
        self._listener = place.listener
        self._rng = rng
        self._samples: list[StepSums] = []
        common = (place.events, place.links, self.memory, info.worker_id, profile.message_s)
        self.donations = Donations(*common, lambda: self.alive)
        self.fetches = Fetches(
            place.events, self.memory, info.worker_id, profile.message_s, info.block_bytes, self._on_landed
        )

    @property
    def num_running(self) -> int:
        """Sequences that hold pages and are past their queue."""
        raise NotImplementedError

    @property
    def num_waiting(self) -> int:
        """Sequences that wait."""
        raise NotImplementedError

    @property
    def is_idle(self) -> bool:
        """Whether it holds no request."""
        return self.num_running + self.num_waiting + len(self.donations) == 0

    def load(self) -> Load:
        """The beat."""
        return Load(
            running=self.num_running,
            waiting=self.num_waiting,
            queued_tokens=self.readings.queued_tokens,
            free_pages=self.memory.cache.num_available,
            draining=self.draining,
            compiles_after_warmup=0,
            preemptions=self.num_preemptions,
        )

    def block_events(self) -> BlockEvents | None:
        """What its cache gained and lost since the last call."""
        events = self.memory.cache.drain_events()
        return self.publisher.publish(Tier.DEVICE, events) if events else None

    def samples(self) -> list[StepSums]:
        """Steps since the last call, the first few."""
        samples, self._samples = self._samples, []
        return samples

    def _kick(self) -> None:
        """Something may be done."""
        raise NotImplementedError

    def _on_landed(self, attempt: Attempt, num_blocks: int, seconds: float) -> None:
        if self.alive:
            self._listener.on_fetched(attempt, self, num_blocks, seconds)
            self._kick()

    def _noisy(self, seconds: float) -> float:
        jitter = self.profile.jitter
        return self.speed * seconds * (math.exp(jitter * float(self._rng.standard_normal())) if jitter else 1.0)

    def _sample(self, sums: StepSums) -> None:
        if len(self._samples) < MAX_SAMPLES:
            self._samples.append(sums)


def worker_info(role: Role, worker_id: str, incarnation: int, profile: WorkerProfile, page_size: int) -> WorkerInfo:
    """As such a worker would introduce itself."""
    return WorkerInfo(
        worker_id=worker_id,
        incarnation=incarnation,
        role=role,
        address=PeerAddress(worker_id, 1, 1),
        fingerprint="simulated",
        numerics=Numerics.FAST,
        num_slots=profile.prefill_rows if role is Role.PREFILL else profile.num_slots,
        num_pages=profile.kv_tokens // page_size,
        page_size=page_size,
        max_model_len=2**31 - 1,
        chunk_tokens=profile.chunk_tokens,
        block_bytes=profile.kv_token_bytes * page_size,
        block_namespace=NAMESPACE,
    )
