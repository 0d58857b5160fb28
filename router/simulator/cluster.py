"""Plays a trace against a fleet in virtual time.

Gateway and workers talk through messages that take `message_s`. A crash is noticed after one message; the gateway
then places what was lost again, from the prompt and the tokens that it has.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import cast

import numpy as np

from engine_core.block_hash import BlockHasher
from engine_core.errors import ConfigError, NoWorkerAvailable
from engine_core.types import Request, Role, SamplingParams
from router.placement import PlacementConfig
from router.simulator.clock import EventQueue
from router.simulator.decode import DecodeWorker
from router.simulator.donation import num_fetched
from router.simulator.gateway import BEAT_S, Gateway
from router.simulator.job import Attempt, Job
from router.simulator.links import Links
from router.simulator.outcome import QUANTILES, Gaps, Outcome, Slo, is_good, spread
from router.simulator.prefill import PrefillWorker
from router.simulator.profile import WorkerProfile
from router.simulator.trace import Trace
from router.simulator.worker import NAMESPACE, Place, Worker, worker_info

RETRY_S = 0.1  # until the gateway looks again for a worker where there was none

AnyWorker = PrefillWorker | DecodeWorker


@dataclass(frozen=True, kw_only=True, slots=True)
class Crash:
    """A worker dies, and comes back empty.

    Attributes:
        worker_id: such as `prefill-0`.
        at_s: when.
        down_s: until its next life serves.
    """

    worker_id: str
    at_s: float
    down_s: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Scenario:
    """Everything that a run depends on but the trace.

    Attributes:
        policy: one of `policies.POLICIES`.
        placement: of joint placement.
        num_prefill, num_decode: workers at the start.
        profile: of every worker.
        speeds: per worker id, a factor on its step times; 1 where not named.
        crashes: in any order.
        lost_events: share of the block event messages that never arrive.
        max_wait_s: a request whose first token would take longer is refused.
        slo: what makes an answer good.
        seed: of all that is random.
    """

    policy: str
    placement: PlacementConfig
    num_prefill: int
    num_decode: int
    profile: WorkerProfile
    speeds: dict[str, float]
    crashes: tuple[Crash, ...]
    lost_events: float
    max_wait_s: float
    slo: Slo
    seed: int


class Cluster:
    """One run.

    Args:
        hashes: per request, its full blocks' (`hash_trace`).

    Attributes:
        workers, gone: by id; and those that have left or died.
        first_tokens: requests in the order in which their prompts were read, with the prefill seconds that took.
        finished: requests in the order of their end.

    Raises:
        ConfigError: a request does not fit into a worker's cache.
    """

    def __init__(self, trace: Trace, hashes: Sequence[Sequence[bytes]], scenario: Scenario) -> None:
        self.scenario = scenario
        self.events = EventQueue()
        self.jobs = [
            Job(number, request.arrival_s, request.input_tokens, request.output_tokens, hashes[number])
            for number, request in enumerate(trace.requests)
        ]
        self.gaps = Gaps()
        self.workers: dict[str, AnyWorker] = {}
        self.gone: list[AnyWorker] = []
        self.first_tokens: list[tuple[Job, float]] = []
        self.finished: list[Job] = []
        self._unread: dict[Job, None] = {}
        self._trace = trace
        self.links = Links(scenario.profile.link_bytes_per_s)
        self._place = Place(self.events, self.links, self)
        self._rng = np.random.default_rng(scenario.seed)
        self._incarnations: dict[str, int] = {}
        self._names = {role: itertools.count() for role in Role}
        self._num_open = len(self.jobs)
        self.num_arrived = 0
        self._sampling = SamplingParams(max_tokens=max(job.num_output for job in self.jobs))
        lost = np.random.default_rng((scenario.seed, 1))
        self.gateway = Gateway(
            scenario.policy,
            scenario.placement,
            scenario.seed,
            lose_event=lambda: bool(scenario.lost_events) and float(lost.random()) < scenario.lost_events,
            place=lambda job: self._try(job, ()),
            refuse=self._refuse,
        )
        _check_sizes(self.jobs, scenario.profile)
        for role, count in ((Role.PREFILL, scenario.num_prefill), (Role.DECODE, scenario.num_decode)):
            for _ in range(count):
                self.start_worker(role)

    def run(self) -> Outcome:
        """Play the whole trace."""
        began = time.perf_counter()
        self.play(lambda: False)
        assert self._num_open == 0, f"{self._num_open} requests were lost"
        return self._outcome(time.perf_counter() - began)

    def play(self, give_up: Callable[[], bool]) -> None:
        """Play the trace until its last answer, or until `give_up` says so."""
        self.events.at(self.jobs[0].arrival_s, self._arrive)
        for crash in self.scenario.crashes:
            self.events.at(crash.at_s, self._crash, crash)
        self.events.after(BEAT_S, self._beat)
        self.events.run(lambda: self._num_open == 0 or give_up())

    # the fleet

    def start_worker(self, role: Role) -> AnyWorker:
        """A worker that serves from now on."""
        return self._start(role, f"{role}-{next(self._names[role])}")

    def drain_worker(self, worker_id: str) -> None:
        """Give it nothing new; it leaves when it is empty."""
        self.workers[worker_id].draining = True
        self.gateway.hear(self.events.now)

    def num_late(self, ttft_s: float) -> int:
        """Requests that have waited longer than that for their first token."""
        return sum(self.events.now - job.arrival_s > ttft_s for job in self._unread)

    def _service_s(self, attempt: Attempt, cached_tokens: int) -> float:
        """Prefill seconds of what was not cached, by the costs that the router has learned."""
        reader = attempt.placed.prefill or attempt.placed.decode
        missing = attempt.num_tokens - cached_tokens
        return reader.steps.prefill_s(missing, cached_tokens, reader.info.chunk_tokens)

    def check_integrity(self) -> None:
        """Raise AssertionError where a finished run left something behind."""
        for worker in self.workers.values():
            assert worker.is_idle, f"{worker.info.worker_id} has requests"
            assert not isinstance(worker, DecodeWorker) or worker.kv_tokens == 0, f"{worker.info.worker_id} has tokens"
            worker.memory.cache.check_integrity()
            held = dict.fromkeys(worker.memory.cache.pages(), 1)
            worker.memory.cache.pool.check_integrity(held)
        for member in self.gateway.members.values():
            assert member.candidate.reserved_requests == 0, f"{member.candidate.name} has reservations"
            assert member.candidate.reserved_tokens == 0, f"{member.candidate.name} has reserved tokens"

    def _start(self, role: Role, worker_id: str) -> AnyWorker:
        scenario = self.scenario
        incarnation = self._incarnations[worker_id] = self._incarnations.get(worker_id, 0) + 1
        info = worker_info(role, worker_id, incarnation, scenario.profile, self._trace.block_tokens)
        seed = int(self._rng.integers(2**63))
        rng = np.random.default_rng(seed)
        kind = PrefillWorker if role is Role.PREFILL else DecodeWorker
        worker = kind(self._place, info, scenario.profile, rng)
        worker.speed = scenario.speeds.get(worker_id, 1.0)
        worker.started_at = self.events.now
        self.workers[worker_id] = worker
        self.gateway.join(worker, self.events.now)
        return worker

    def _crash(self, crash: Crash) -> None:
        worker = self.workers.pop(crash.worker_id, None)
        if worker is None:
            return
        lost = worker.crash()
        worker.ended_at = self.events.now
        self.gone.append(worker)
        self.events.after(self.scenario.profile.message_s, self._notice, worker, lost)
        self.events.after(crash.down_s, self._start, worker.info.role, crash.worker_id)

    def _notice(self, worker: AnyWorker, lost: Sequence[Attempt]) -> None:
        self.gateway.leave(worker)
        key = (worker.info.worker_id, worker.info.incarnation)
        for attempt in lost:
            if not attempt.over:
                self._end_attempt(attempt)
                self._try(attempt.job, (key,))

    def _beat(self) -> None:
        now = self.events.now
        self.gateway.hear(now)
        for worker in [one for one in self.workers.values() if one.draining and one.is_idle]:
            del self.workers[worker.info.worker_id]
            worker.alive = False
            worker.ended_at = now
            self.gone.append(worker)
            self.gateway.leave(worker)
        self.events.after(BEAT_S, self._beat)

    # requests

    def _arrive(self) -> None:
        job = self.jobs[self.num_arrived]
        self.num_arrived += 1
        if self.num_arrived < len(self.jobs):
            self.events.at(self.jobs[self.num_arrived].arrival_s, self._arrive)
        self._unread[job] = None
        self.gateway.admit(job, self.events.now + self.scenario.max_wait_s, self.events.now)

    def _refuse(self, job: Job) -> None:
        job.refused = True
        self._unread.pop(job, None)
        self._num_open -= 1

    def _try(self, job: Job, avoid: tuple[tuple[str, int], ...]) -> None:
        """Place a job, or look again a little later."""
        now, message_s = self.events.now, self.scenario.profile.message_s
        request = self._request(job)
        try:
            placed = self.gateway.place(request, job.hashes, now, avoid)
        except NoWorkerAvailable:
            self.events.after(RETRY_S, self._try, job, avoid)
            return
        job.num_attempts += 1
        attempt = job.attempt = Attempt(job, request, placed)
        target = self.workers[placed.decode.info.worker_id]
        assert isinstance(target, DecodeWorker)
        attempt.target = target
        if placed.donor is not None:
            attempt.donor = self.workers.get(placed.donor.info.worker_id)
            attempt.donor_blocks = placed.donor_blocks
        if attempt.donor is not None:
            self.events.after(message_s, attempt.donor.donations.add, attempt)
        if placed.prefill is not None:
            source = self.workers[placed.prefill.info.worker_id]
            assert isinstance(source, PrefillWorker)
            attempt.source = source
            self.events.after(message_s, source.add, attempt)
        self.events.after(message_s, target.add, attempt)

    def _request(self, job: Job) -> Request:
        size = self._trace.block_tokens
        tokens = np.repeat(self._trace.requests[job.number].blocks, size)[: job.num_prompt]
        if job.generated:
            tokens = np.concatenate([tokens, np.full(job.generated, -1 - job.number, np.int32)])
        return Request(
            f"{job.number:032x}",
            cast("list[int]", tokens),
            job.num_prompt,
            self._sampling,
            epoch=job.num_attempts,
        )

    def _end_attempt(self, attempt: Attempt) -> None:
        """Release what it holds, wherever."""
        attempt.over = True
        attempt.placed.release(self.events.now)
        for worker in (attempt.source, attempt.target):
            if worker is not None and worker.alive:
                self.events.after(self.scenario.profile.message_s, worker.cancel, attempt)
        self._dismiss_donor(attempt)

    def _dismiss_donor(self, attempt: Attempt) -> None:
        if attempt.donor is not None:
            self.events.after(self.scenario.profile.message_s, attempt.donor.donations.cancel, attempt)

    # what workers say; the gateway hears it one message later

    def on_first_token(self, attempt: Attempt, cached_tokens: int) -> None:
        """A prompt has been read."""
        job = attempt.job
        if attempt.over:
            return
        job.generated += 1
        if job.first_token_at < 0:
            job.first_token_at = self.events.now + self.scenario.profile.message_s
            job.cached_tokens = cached_tokens
            size = self._trace.block_tokens
            job.fetched_tokens = size * num_fetched(attempt.fetched, cached_tokens // size)
            self._unread.pop(job, None)
            self.first_tokens.append((job, self._service_s(attempt, cached_tokens)))
        self.events.after(self.scenario.profile.message_s, self._was_read, attempt)

    def _was_read(self, attempt: Attempt) -> None:
        self._dismiss_donor(attempt)
        if not attempt.over:
            attempt.placed.release_prefill(self.events.now)
            self.gateway.on_room(self.events.now)

    def on_fetched(self, attempt: Attempt, reader: Worker, num_blocks: int, seconds: float) -> None:
        """Blocks came from the attempt's donor."""
        if num_blocks and attempt.donor is not None:
            donor, target = ((worker.info.worker_id, worker.info.incarnation) for worker in (attempt.donor, reader))
            self.gateway.transfers.learn(donor, target, num_blocks * reader.info.block_bytes, seconds)

    def on_second_token(self, attempt: Attempt, seconds: float) -> None:
        """A sequence began to decode, so long after its first token."""
        if not attempt.over:
            self.gateway.policy.handed_over(attempt.placed, seconds)

    def on_finished(self, attempt: Attempt) -> None:
        """The last token."""
        if attempt.over:
            return
        attempt.over = True
        job = attempt.job
        job.generated = job.num_output
        at = attempt.prefilled_at if attempt.left == 1 else self.events.now
        job.last_token_at = at + self.scenario.profile.message_s
        self.events.after(self.scenario.profile.message_s, self._close, attempt)

    def _close(self, attempt: Attempt) -> None:
        attempt.placed.release(self.events.now)
        self.gateway.policy.finished(attempt.job.num_output)
        self.finished.append(attempt.job)
        self._num_open -= 1
        self.gateway.on_room(self.events.now)

    def on_steps(self, rows: float, first_s: float, last_s: float, num_steps: int) -> None:
        """Decode steps."""
        self.gaps.add(rows, first_s, last_s, num_steps)

    # the result

    def _outcome(self, wall_s: float) -> Outcome:
        jobs, scenario = self.jobs, self.scenario
        served = [job for job in jobs if not job.refused]
        num_prompt = sum(job.num_prompt for job in served)
        ttft = np.array([job.first_token_at - job.arrival_s for job in served] or [0.0]) * 1e3
        itl = self.gaps.percentiles((50, 90, 99))
        good = sum(is_good(job, scenario.slo) for job in served)
        workers = [*self.gone, *self.workers.values()]
        busy = {role: [w.busy_s for w in workers if w.info.role is role] for role in Role}
        duration_s = self._trace.duration_s
        p50, p90, p99 = (float(x) for x in np.percentile(ttft, (50, 90, 99)))
        return Outcome(
            requests=len(jobs),
            finished=len(served),
            refused=len(jobs) - len(served),
            good=good,
            goodput_rps=good / duration_s,
            ttft_p50_ms=p50,
            ttft_p90_ms=p90,
            ttft_p99_ms=p99,
            ttft_mean_ms=float(ttft.mean()),
            itl_p50_ms=itl[0] * 1e3,
            itl_p90_ms=itl[1] * 1e3,
            itl_p99_ms=itl[2] * 1e3,
            hit_ratio=sum(job.cached_tokens for job in served) / num_prompt if served else 0.0,
            fetched_ratio=sum(job.fetched_tokens for job in served) / num_prompt if served else 0.0,
            local_prefills=sum(job.attempt is not None and job.attempt.source is None for job in served),
            prefill_spread=spread(busy[Role.PREFILL]),
            decode_spread=spread(busy[Role.DECODE]),
            transferred_gb=self.links.num_bytes / 1e9,
            preemptions=sum(worker.num_preemptions for worker in workers),
            retries=sum(job.num_attempts - 1 for job in served),
            makespan_s=self.events.now,
            wall_s=wall_s,
            ttft_quantiles_ms=[float(x) for x in np.percentile(ttft, QUANTILES)],
            load={w.info.worker_id: w.busy_s / self.events.now for w in self.workers.values()},
        )


def hash_trace(trace: Trace) -> list[list[bytes]]:
    """Names of each prompt's full blocks, as workers and gateway compute them."""
    hasher = BlockHasher(trace.block_tokens, b"", bytes.fromhex(NAMESPACE))
    size = trace.block_tokens
    known: dict[bytes, bytes] = {}
    return [
        [
            known.setdefault(block_hash, block_hash)
            for block_hash in hasher.extend(None, np.repeat(request.blocks[: request.input_tokens // size], size))
        ]
        for request in trace.requests
    ]


def _check_sizes(jobs: Sequence[Job], profile: WorkerProfile) -> None:
    for job in jobs:
        if job.num_prompt + job.num_output > profile.kv_tokens:
            raise ConfigError(
                f"request {job.number} has {job.num_prompt + job.num_output} tokens; the profile's kv_tokens is "
                f"{profile.kv_tokens}"
            )
