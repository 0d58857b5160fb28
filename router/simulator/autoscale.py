"""The router's real planner steering a simulated fleet: slices start slowly, drain before they leave, and are paid."""

from __future__ import annotations

import dataclasses
import math
import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial

from engine_core.types import Role
from router.planner import Observation, Plan, Planner, PlannerConfig, SliceSample
from router.pool_model import DecodeCosts, mean_costs
from router.simulator.cluster import AnyWorker, Cluster, Scenario, hash_trace
from router.simulator.job import Job
from router.simulator.oracle import mean_service_rps
from router.simulator.outcome import Outcome, Slo, is_good
from router.simulator.trace import Trace

JUDGED_S = 60.0  # windows in which the objective is judged


@dataclass(frozen=True, kw_only=True, slots=True)
class Bill:
    """What a run cost and whether it kept its promise.

    Attributes:
        slice_hours: from each slice's order until it has left, over both roles.
        windows_met: share of the windows of `JUDGED_S` in which enough requests met the objective.
        peak_slices: at any time.
        plans: those that changed something, as people read them.
    """

    slice_hours: float
    windows_met: float
    peak_slices: int
    plans: list[str]


class Autoscaler:
    """Observes a cluster, asks the planner, and does what it says.

    Args:
        config: of the planner; its window is the interval, too.
    """

    def __init__(self, cluster: Cluster, config: PlannerConfig) -> None:
        self._cluster = cluster
        self._config = config
        self._planner = Planner(config)
        self._starting = dict.fromkeys(Role, 0)
        self._paid_ahead_s = 0.0  # of slices that started, before they served
        self._seen_arrivals = 0
        self._seen_first = 0
        self._seen_finished = 0
        self._seen_bytes = 0
        self._flipping: dict[tuple[str, int], Role] = {}
        self.plans: list[Plan] = []
        self.texts: list[str] = []
        self.peak = len(cluster.workers)
        cluster.events.after(config.window_s, self._tick)

    def bill(self, slo: Slo) -> Bill:
        """After the run."""
        seconds = self._paid_ahead_s + paid_s(self._cluster)
        met = windows_met(self._cluster, slo, self._config.attainment)
        return Bill(slice_hours=seconds / 3600, windows_met=met, peak_slices=self.peak, plans=self.texts)

    def _tick(self) -> None:
        self._finish_flips()
        plan = self._planner.plan(self._observe())
        have = {role: len(self._serving(role)) + self._starting[role] for role in Role}
        if (plan.prefill, plan.decode) != (have[Role.PREFILL], have[Role.DECODE]):
            self.texts.append(f"{self._cluster.events.now:.0f} s: {plan.advise(have[Role.PREFILL], have[Role.DECODE])}")
        self.plans.append(plan)
        for source, target in plan.flips:
            worker = self._drain_one(source)
            if worker is not None:
                self._flipping[worker.info.worker_id, worker.info.incarnation] = target
                self._starting[target] += 1
                have[source] -= 1
                have[target] += 1
        for role in Role:
            for _ in range(plan.wanted(role) - have[role]):
                self._order(role, self._config.start_s)
            for _ in range(have[role] - plan.wanted(role)):
                self._drain_one(role)
        self.peak = max(self.peak, len(self._cluster.workers) + sum(self._starting.values()))
        self._cluster.events.after(self._config.window_s, self._tick)

    # doing

    def _order(self, role: Role, seconds: float) -> None:
        self._starting[role] += 1
        self._cluster.events.after(seconds, self._serve, role, seconds)

    def _serve(self, role: Role, seconds: float) -> None:
        self._starting[role] -= 1
        self._paid_ahead_s += seconds
        self._cluster.start_worker(role)

    def _drain_one(self, role: Role) -> AnyWorker | None:
        serving = self._serving(role)
        if len(serving) <= 1 and role is Role.DECODE:
            return None
        if not serving:
            return None
        worker = min(serving, key=lambda one: (one.num_running + one.num_waiting, -one.started_at))
        self._cluster.drain_worker(worker.info.worker_id)
        return worker

    def _finish_flips(self) -> None:
        for worker in self._cluster.gone:
            target = self._flipping.pop((worker.info.worker_id, worker.info.incarnation), None)
            if target is not None:
                self._starting[target] -= 1
                self._order(target, self._config.flip_s)

    # seeing

    def _serving(self, role: Role) -> list[AnyWorker]:
        return [one for one in self._cluster.workers.values() if one.info.role is role and not one.draining]

    def _observe(self) -> Observation:
        cluster, config = self._cluster, self._config
        now = cluster.events.now
        arrivals = cluster.num_arrived - self._seen_arrivals
        self._seen_arrivals = cluster.num_arrived
        first = cluster.first_tokens[self._seen_first :]
        self._seen_first = len(cluster.first_tokens)
        finished = cluster.finished[self._seen_finished :]
        self._seen_finished = len(cluster.finished)
        late = cluster.num_late(config.ttft_s)
        in_time = sum(job.first_token_at - job.arrival_s <= config.ttft_s for job, _ in first)
        count = len(finished)
        return Observation(
            at=now,
            requests=arrivals,
            service_s=[service_s for _, service_s in first],
            output_tokens=sum(job.num_output for job in finished) / count if count else 0.0,
            context_tokens=_mean_context(finished) if count else 0.0,
            ttft_met=in_time / (len(first) + late) if first or late else None,
            itl_met=sum(job.mean_itl_s <= config.itl_s for job in finished) / count if count else None,
            slices=[self._sample(worker, now) for role in Role for worker in self._serving(role)],
            starting=dict(self._starting),
            transfer_s=self._transfer_s(arrivals),
            decode=self._decode_costs(),
        )

    def _sample(self, worker: AnyWorker, now: float) -> SliceSample:
        pages = worker.info.num_pages
        return SliceSample(
            role=worker.info.role,
            age_s=now - worker.started_at,
            kv_share=1 - worker.memory.cache.num_available / pages,
        )

    def _transfer_s(self, arrivals: int) -> float:
        """Network seconds per request in this window, from the bytes that moved."""
        num_bytes = self._cluster.links.num_bytes - self._seen_bytes
        self._seen_bytes += num_bytes
        return num_bytes / arrivals / self._cluster.scenario.profile.link_bytes_per_s if arrivals else 0.0

    def _decode_costs(self) -> DecodeCosts:
        """As the router has learned them."""
        return mean_costs([candidate.decode_costs() for candidate in self._cluster.gateway.of(Role.DECODE)])


def _mean_context(jobs: list[Job]) -> float:
    """Tokens that a decoding row attends to, weighted by how long it is one."""
    outputs = sum(job.num_output for job in jobs)
    return sum((job.num_prompt + job.num_output / 2) * job.num_output for job in jobs) / max(outputs, 1)


def paid_s(cluster: Cluster) -> float:
    """Seconds that slices served or drained, together."""
    end = cluster.jobs[-1].arrival_s  # what is left then is the same for every fleet
    workers = [*cluster.gone, *cluster.workers.values()]
    return sum(max(0.0, min(worker.ended_at, end) - worker.started_at) for worker in workers)


def windows_met(cluster: Cluster, slo: Slo, attainment: float) -> float:
    """Share of the windows of arrival in which enough requests were answered well."""
    windows: dict[int, list[bool]] = {}
    for job in cluster.jobs:
        windows.setdefault(int(job.arrival_s // JUDGED_S), []).append(not job.refused and is_good(job, slo))
    return sum(sum(good) >= attainment * len(good) for good in windows.values()) / len(windows)


def planner_config(scenario: Scenario, budget: int, flip_s: float) -> PlannerConfig:
    """That fits a scenario: its objectives, and how long its slices take to start."""
    start_s = scenario.profile.start_s
    return PlannerConfig(
        ttft_s=scenario.slo.ttft_s,
        itl_s=scenario.slo.itl_s,
        start_s=start_s,
        cooldown_s=start_s,
        max_prefill=budget - 1,
        max_decode=budget - 1,
        budget=budget,
        flip_s=flip_s,
    )


def play(trace: Trace, scenario: Scenario, config: PlannerConfig) -> tuple[Bill, Outcome]:
    """Run a scenario under the planner; its numbers of workers are those at the start."""
    cluster = Cluster(trace, hash_trace(trace), scenario)
    scaler = Autoscaler(cluster, config)
    outcome = cluster.run()
    return scaler.bill(scenario.slo), outcome


@dataclass(frozen=True, kw_only=True, slots=True)
class StaticFleet:
    """A fleet that stays as it is.

    Attributes:
        slice_hours: of the whole trace.
        windows_met: share of the windows; where `gave_up`, at most so many.
        gave_up: the run was stopped when it could not meet the objective in enough windows any more.
    """

    prefill: int
    decode: int
    slice_hours: float
    windows_met: float
    gave_up: bool


class Hope:
    """Whether a fleet may still meet the objective in a share of all windows, looked at once per window."""

    def __init__(self, cluster: Cluster, slo: Slo, attainment: float, windows: float) -> None:
        self._cluster = cluster
        self._slo = slo
        self._attainment = attainment
        count = int(cluster.jobs[-1].arrival_s // JUDGED_S) + 1
        self._may_lose = count - math.ceil(windows * count - 1e-9)
        self._count = count
        self.num_lost = 0
        self._windows: list[list[Job]] = [[] for _ in range(count)]
        for job in cluster.jobs:
            self._windows[int(job.arrival_s // JUDGED_S)].append(job)
        self._next = 0
        cluster.events.at(JUDGED_S + slo.ttft_s, self._look)

    @property
    def is_lost(self) -> bool:
        """More windows than allowed have missed the objective."""
        return self.num_lost > self._may_lose

    @property
    def windows_met(self) -> float:
        """At most, as far as first tokens tell."""
        return 1 - self.num_lost / self._count

    def _look(self) -> None:
        jobs = self._windows[self._next]
        late = sum(not 0 <= job.first_token_at <= job.arrival_s + self._slo.ttft_s for job in jobs)
        self.num_lost += bool(jobs) and len(jobs) - late < self._attainment * len(jobs)
        self._next += 1
        if self._next < self._count:
            self._cluster.events.after(JUDGED_S, self._look)


def play_static(trace: Trace, scenario: Scenario, attainment: float, windows: float) -> StaticFleet:
    """Run a scenario as it is, until it is over or cannot meet the objective in a share `windows` any more."""
    cluster = Cluster(trace, hash_trace(trace), scenario)
    hope = Hope(cluster, scenario.slo, attainment, windows)
    cluster.play(lambda: hope.is_lost)
    num_slices = scenario.num_prefill + scenario.num_decode
    return StaticFleet(
        prefill=scenario.num_prefill,
        decode=scenario.num_decode,
        slice_hours=num_slices * cluster.jobs[-1].arrival_s / 3600,
        windows_met=hope.windows_met if hope.is_lost else windows_met(cluster, scenario.slo, attainment),
        gave_up=hope.is_lost,
    )


def smallest_static(
    trace: Trace, scenario: Scenario, attainment: float, windows: float, budget: int, num_processes: int
) -> list[StaticFleet]:
    """Fleets tried, in the order of their size, up to the first that meets the objective in `windows` of the windows.

    Fleets that could not even carry the mean load with infinite caches are left out.
    """
    tried: list[StaticFleet] = []
    rate = len(trace.requests) / trace.duration_s
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(num_processes, mp_context=context) as pool:
        for total in range(2, budget + 1):
            if total * mean_service_rps(trace, scenario.profile) < rate:
                continue
            fleets = [
                dataclasses.replace(scenario, num_prefill=total - decode, num_decode=decode)
                for decode in range(1, total)
            ]
            of_size = list(pool.map(partial(play_static, trace, attainment=attainment, windows=windows), fleets))
            tried += of_size
            if max(fleet.windows_met for fleet in of_size) >= windows:
                break
    return tried
