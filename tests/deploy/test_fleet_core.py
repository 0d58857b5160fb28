import asyncio
import dataclasses
from collections.abc import Callable

import pytest

from deploy.config import FleetConfig
from deploy.fleet_core import FleetCore
from deploy.fleet_types import MemberState, Successor, WorkerSpec
from engine_core.errors import ConfigError
from engine_core.messages import Load
from engine_core.types import Role
from tests.deploy.fakes import FakeHandle

FAST = FleetConfig(
    health_interval_s=0.01, health_timeout_s=0.2, backoff_s=0.01, max_backoff_s=0.05, drain_timeout_s=0.5
)


class Lab:
    """A fleet of fake workers and every life it launched."""

    def __init__(self, config: FleetConfig = FAST) -> None:
        self.lives: list[FakeHandle] = []
        self.auto = True
        self.place_gate = asyncio.Event()  # clear: no node for those launched from now on
        self.place_gate.set()
        self.core = FleetCore(config, self.launch)

    def launch(self, spec: WorkerSpec) -> FakeHandle:
        handle = FakeHandle(spec)
        if not self.place_gate.is_set():
            handle.place_gate.clear()
        self.lives.append(handle)
        if self.auto:
            handle.become_ready()
        return handle

    def life(self, worker_id: str, incarnation: int) -> FakeHandle:
        return next(h for h in self.lives if (h.spec.worker_id, h.spec.incarnation) == (worker_id, incarnation))

    async def until(self, condition: Callable[[], bool]) -> None:
        async with asyncio.timeout(15):
            while not condition():  # noqa: ASYNC110
                await asyncio.sleep(0.005)

    async def ready(self) -> None:
        await self.until(lambda: self.core.status().ready)

    def serving(self) -> list[tuple[str, int]]:
        return sorted((m.worker_id, m.incarnation) for m in self.core.status().members if m.state is MemberState.READY)


async def serving_lab(wanted: dict[Role, int] | None = None) -> Lab:
    """All of its workers serve."""
    lab = Lab()
    await lab.core.start()
    if wanted is not None:
        await lab.core.scale(wanted)
    await lab.ready()
    return lab


async def test_start_publishes_every_worker() -> None:
    lab = await serving_lab()
    membership = await lab.core.wait_for_change(0, 1)
    assert sorted(w.worker_id for w in membership.workers) == ["decode-0", "prefill-0"]
    assert membership.version > 0
    assert [h.spec.place for h in lab.lives] == [0, 1]
    await lab.core.stop(0.5)
    assert all(h.killed for h in lab.lives)
    assert (await lab.core.wait_for_change(membership.version, 1)).workers == ()


async def test_progress_shows_while_a_worker_starts() -> None:
    lab = Lab()
    lab.auto = False
    await lab.core.start()
    await lab.until(lambda: all(m.progress == "loading weights 40 %" for m in lab.core.status().members))
    assert not lab.core.status().ready
    lab.lives[0].become_ready()
    lab.lives[1].become_ready()
    await lab.ready()
    await lab.core.stop(0.5)


@pytest.mark.parametrize("fault", ["dead", "sick", "silent"])
async def test_a_worker_that_dies_is_replaced_with_the_next_incarnation(fault: str) -> None:
    lab = await serving_lab()
    before = (await lab.core.wait_for_change(0, 1)).version
    victim = lab.life("decode-0", 1)
    if fault == "dead":
        victim.die()
    elif fault == "sick":
        victim.healthy = False
    else:
        victim.silent = True
    gone = await lab.core.wait_for_change(before, 2)
    assert [w.worker_id for w in gone.workers] == ["prefill-0"]
    await lab.until(lambda: lab.serving() == [("decode-0", 2), ("prefill-0", 1)])
    back = await lab.core.wait_for_change(gone.version, 2)
    assert {(w.worker_id, w.incarnation) for w in back.workers} == {("prefill-0", 1), ("decode-0", 2)}
    assert victim.killed
    await lab.core.stop(0.5)


async def test_a_config_error_at_start_is_fatal_and_kept_in_words() -> None:
    lab = Lab()
    lab.auto = False
    await lab.core.start()
    await lab.until(lambda: len(lab.lives) == 2)
    lab.lives[1].started.set_exception(ConfigError("the model does not fit"))
    await lab.until(lambda: lab.core.status().fatal is not None)
    status = lab.core.status()
    assert status.fatal == "the model does not fit" and status.fatal_is_config
    await lab.core.stop(0.5)


async def test_deaths_during_the_first_start_are_fatal_after_a_few() -> None:
    lab = Lab()
    lab.auto = False
    await lab.core.start()
    for incarnation in (1, 2, 3):
        await lab.until(lambda n=incarnation: any(h.spec.incarnation == n for h in lab.lives if h.spec.place == 1))
        lab.life("decode-0", incarnation).die("out of memory")
    await lab.until(lambda: lab.core.status().fatal is not None)
    assert "decode-0 died 3 times" in (lab.core.status().fatal or "")
    assert any("out of memory" in event for event in lab.core.status().events)
    await lab.core.stop(0.5)


async def test_a_config_error_after_the_fleet_served_is_tried_again() -> None:
    lab = await serving_lab()
    lab.auto = False
    lab.life("decode-0", 1).die()
    await lab.until(lambda: len(lab.lives) == 3)
    lab.lives[2].started.set_exception(ConfigError("disk gone"))
    await lab.until(lambda: len(lab.lives) == 4)
    lab.lives[3].become_ready()
    await lab.until(lambda: lab.serving() == [("decode-0", 3), ("prefill-0", 1)])
    assert lab.core.status().fatal is None
    await lab.core.stop(0.5)


async def test_a_worker_is_tried_again_however_often_it_has_died() -> None:
    """As over a weekend without a checkpoint: what doubles with each death must not grow for ever."""
    lab = Lab(dataclasses.replace(FAST, backoff_s=1e-6, max_backoff_s=1e-6))
    await lab.core.start()
    await lab.ready()
    lab.auto = False
    launch, lab.core._launch = lab.core._launch, lambda spec: _stillborn(lab.launch(spec))
    lab.life("decode-0", 1).die()
    await lab.until(lambda: len(lab.lives) > 1100)
    lab.core._launch, lab.auto = launch, True
    await lab.ready()
    await lab.core.stop(0.5)


def _stillborn(handle: FakeHandle) -> FakeHandle:
    handle.die("no checkpoint")
    return handle


async def test_scale_up_and_down_drains() -> None:
    lab = await serving_lab()
    await lab.core.scale({Role.PREFILL: 3})
    await lab.ready()
    assert lab.serving() == [("decode-0", 1), ("prefill-0", 1), ("prefill-1", 1), ("prefill-2", 1)]
    leaving = lab.life("prefill-2", 1)
    leaving.drain_gate.clear()
    await lab.core.scale({Role.PREFILL: 2})
    await lab.until(lambda: leaving.drained_with is not None)
    assert not leaving.killed
    assert "prefill-2" not in [w.worker_id for w in (await lab.core.wait_for_change(0, 1)).workers]
    leaving.drain_gate.set()
    await lab.until(lambda: leaving.killed)
    assert lab.serving() == [("decode-0", 1), ("prefill-0", 1), ("prefill-1", 1)]
    await lab.core.stop(0.5)


async def test_a_worker_asked_back_while_it_drains_lives_again() -> None:
    lab = await serving_lab()
    await lab.core.scale({Role.PREFILL: 2})
    await lab.ready()
    lab.life("prefill-1", 1).drain_gate.clear()
    await lab.core.scale({Role.PREFILL: 1})
    await lab.until(lambda: lab.life("prefill-1", 1).drained_with is not None)
    await lab.core.scale({Role.PREFILL: 2})
    lab.life("prefill-1", 1).drain_gate.set()
    await lab.until(lambda: ("prefill-1", 2) in lab.serving())
    await lab.core.stop(0.5)


async def test_scale_down_while_starting_kills_at_once() -> None:
    lab = await serving_lab()
    lab.auto = False
    await lab.core.scale({Role.DECODE: 2})
    await lab.until(lambda: len(lab.lives) == 3)
    await lab.core.scale({Role.DECODE: 1})
    await lab.until(lambda: lab.lives[2].killed)
    assert lab.lives[2].drained_with is None
    await lab.core.stop(0.5)


async def test_scale_refuses_what_cannot_serve() -> None:
    lab = Lab()
    await lab.core.start()
    with pytest.raises(ConfigError, match="decode must be at least 1"):
        await lab.core.scale({Role.DECODE: 0})
    await lab.core.stop(0.5)


async def test_colocated_has_no_prefill_workers() -> None:
    lab = Lab(FleetConfig(colocated=True, health_interval_s=0.01))
    await lab.core.start()
    await lab.ready()
    assert lab.serving() == [("decode-0", 1)]
    await lab.core.stop(0.5)


async def test_stop_ends_a_worker_whose_drain_never_ends() -> None:
    lab = await serving_lab()
    lab.life("decode-0", 1).drain_gate.clear()
    await asyncio.wait_for(lab.core.stop(0.05), 2)
    assert all(h.killed for h in lab.lives)


async def test_a_worker_without_a_node_is_pending_and_leaves_first() -> None:
    lab = await serving_lab()
    lab.place_gate.clear()
    await lab.core.scale({Role.DECODE: 2})
    await lab.until(lambda: any(m.state is MemberState.PENDING for m in lab.core.status().members))
    assert not lab.core.status().ready and lab.serving() == [("decode-0", 1), ("prefill-0", 1)]
    lab.life("decode-0", 1).die()
    await lab.until(lambda: sum(m.state is MemberState.PENDING for m in lab.core.status().members) == 2)
    lab.life("decode-0", 2).place_gate.set()  # its node is back, and the one of decode-1 never comes
    await lab.until(lambda: ("decode-0", 2) in lab.serving())
    await lab.core.scale({Role.DECODE: 1})
    await lab.until(lambda: lab.life("decode-1", 1).killed)
    await lab.until(lambda: lab.core.status().ready)
    assert lab.serving() == [("decode-0", 2), ("prefill-0", 1)]
    await lab.core.stop(0.5)


async def test_of_a_surplus_those_that_do_not_serve_leave_first_then_the_least_busy() -> None:
    lab = await serving_lab({Role.DECODE: 4})
    for number, running in enumerate((1, 5, 5, 5)):
        lab.life(f"decode-{number}", 1).load = Load(running, 0, 0, 64, False, 0)
    await lab.until(lambda: [m.load.running for m in lab.core.status().members if m.load][1:] == [1, 5, 5, 5])
    lab.place_gate.clear()
    lab.life("decode-2", 1).die()
    await lab.until(lambda: any(m.state is MemberState.PENDING for m in lab.core.status().members))
    await lab.core.scale({Role.DECODE: 2})
    await lab.until(lambda: lab.serving() == [("decode-1", 1), ("decode-3", 1), ("prefill-0", 1)])
    await lab.core.stop(0.5)


async def test_a_flip_starts_the_other_role_only_when_its_worker_is_gone() -> None:
    lab = await serving_lab({Role.DECODE: 2})
    leaving = lab.life("decode-1", 1)
    leaving.drain_gate.clear()
    await lab.core.flip(Role.DECODE)
    await lab.until(lambda: leaving.drained_with is not None)
    status = lab.core.status()
    assert status.wanted == {"prefill": 1, "decode": 1}
    assert [m.becomes for m in status.members if m.state is MemberState.DRAINING] == [Role.PREFILL]
    assert len(lab.lives) == 3
    leaving.drain_gate.set()
    await lab.until(lambda: lab.serving() == [("decode-0", 1), ("prefill-0", 1), ("prefill-1", 1)])
    assert lab.core.status().wanted == {"prefill": 2, "decode": 1}
    await lab.core.flip(Role.DECODE)
    assert lab.core.status().wanted == {"prefill": 2, "decode": 1}, "the last of a role stays"
    await lab.core.stop(0.5)


async def test_a_drained_worker_leaves_and_nobody_follows() -> None:
    lab = await serving_lab({Role.DECODE: 3})
    leaving = lab.life("decode-1", 1)
    leaving.drain_gate.clear()
    status = await lab.core.drain("decode-1", Successor.NONE)
    assert status.wanted == {"prefill": 1, "decode": 2}
    await lab.until(lambda: leaving.drained_with is not None)
    assert "decode-1" not in [w.worker_id for w in (await lab.core.wait_for_change(0, 1)).workers]
    with pytest.raises(ConfigError, match="decode-1 is leaving already"):
        await lab.core.drain("decode-1", Successor.SAME)
    leaving.drain_gate.set()
    await lab.until(lambda: leaving.killed)
    await lab.ready()
    assert lab.serving() == [("decode-0", 1), ("decode-2", 1), ("prefill-0", 1)] and len(lab.lives) == 4
    await lab.core.stop(0.5)


async def test_a_drain_by_hand_is_a_ceiling_until_somebody_scales() -> None:
    lab = await serving_lab({Role.DECODE: 4})
    await lab.core.flip(Role.DECODE)
    assert lab.core.status().ceilings == {}, "the autoscaler's own do not count"
    await lab.core.drain("decode-1", Successor.SAME)
    assert lab.core.status().ceilings == {}
    status = await lab.core.drain("decode-2", Successor.NONE)
    assert status.ceilings == {"prefill": 2, "decode": 2}, "with the worker that is about to flip"
    await lab.until(lambda: len(lab.serving()) == 4)
    assert (await lab.core.resize({Role.PREFILL: 1})).ceilings == {"prefill": 2, "decode": 2}
    assert (await lab.core.scale({Role.PREFILL: 1})).ceilings == {"decode": 2}
    assert (await lab.core.drain("decode-0", Successor.NONE)).ceilings == {"prefill": 1, "decode": 1}
    await lab.core.stop(0.5)


async def test_a_drained_worker_may_be_replaced_even_if_it_is_the_only_one() -> None:
    lab = await serving_lab()
    await lab.core.drain("decode-0", Successor.SAME)
    await lab.until(lambda: lab.serving() == [("decode-0", 2), ("prefill-0", 1)])
    assert lab.life("decode-0", 1).drained_with is not None
    assert any("decode-0 (incarnation 1) shall leave; its next life follows" in e for e in lab.core.status().events)
    await lab.core.stop(0.5)


async def test_a_drained_worker_may_become_one_of_the_other_role() -> None:
    lab = await serving_lab({Role.PREFILL: 2})
    status = await lab.core.drain("prefill-0", Successor.OTHER)
    assert [m.becomes for m in status.members] == [Role.DECODE, None, None]
    await lab.until(lambda: lab.serving() == [("decode-0", 1), ("decode-1", 1), ("prefill-1", 1)])
    assert lab.core.status().wanted == {"prefill": 1, "decode": 2}
    await lab.core.stop(0.5)


@pytest.mark.parametrize(
    ("config", "worker", "successor", "message"),
    [
        ({}, "decode-7", Successor.NONE, "there is no worker 'decode-7', but decode-0, prefill-0"),
        ({}, "decode-0", Successor.NONE, "decode-0 is the only decode worker that serves: scale up before"),
        ({}, "prefill-0", Successor.OTHER, "prefill-0 is the only prefill worker that serves"),
        ({"colocated": True, "decode": 2}, "decode-0", Successor.OTHER, "this fleet has no prefill workers"),
        ({"decode": 2, "prefill_hosts": 2}, "decode-0", Successor.OTHER, "span unlike numbers of machines"),
    ],
)
async def test_a_drain_that_cannot_be_is_refused(
    config: dict[str, int], worker: str, successor: Successor, message: str
) -> None:
    lab = Lab(dataclasses.replace(FAST, **config))
    await lab.core.start()
    await lab.ready()
    with pytest.raises(ConfigError, match=message):
        await lab.core.drain(worker, successor)
    assert lab.core.status().ready and all(handle.drained_with is None for handle in lab.lives)
    await lab.core.stop(0.5)


async def test_the_last_worker_that_serves_stays_and_one_without_a_node_may_leave() -> None:
    lab = await serving_lab()
    lab.place_gate.clear()
    await lab.core.scale({Role.DECODE: 2})
    await lab.until(lambda: any(m.state is MemberState.PENDING for m in lab.core.status().members))
    with pytest.raises(ConfigError, match="decode-0 is the only decode worker that serves"):
        await lab.core.drain("decode-0", Successor.NONE)
    await lab.core.drain("decode-1", Successor.NONE)
    await lab.until(lambda: lab.life("decode-1", 1).killed)
    await lab.ready()
    await lab.core.stop(0.5)
