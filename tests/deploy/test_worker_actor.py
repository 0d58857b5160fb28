import logging
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from deploy.worker_actor import WorkerActor, WorkerPlan, share_of_cores
from engine_core.config import EngineConfig
from engine_core.errors import CheckpointError


@pytest.fixture(autouse=True)
def handlers() -> Iterator[None]:
    """Take away the log handlers that an actor adds to its process."""
    root = logging.getLogger()
    before = list(root.handlers)
    yield
    for handler in [handler for handler in root.handlers if handler not in before]:
        root.removeHandler(handler)
        handler.close()


def plan(home: Path, num_places: int = 0) -> WorkerPlan:
    return WorkerPlan(
        worker_class="tests.deploy.fakes:FakeDecodeWorker",
        engine=EngineConfig(),
        model_dir=str(home),
        worker_id="decode-0",
        incarnation=1,
        host="127.0.0.1",
        log_dir=str(home),
        secret=None,
        place=0,
        num_places=num_places,
    )


async def test_a_worker_reports_from_the_first_moment(tmp_path: Path) -> None:
    actor = WorkerActor(plan(tmp_path))
    assert (await actor.report()).progress == "starting"
    info = await actor.start()
    assert info.worker_id == "decode-0" and info.address.port > 0
    report = await actor.report()
    assert report.healthy and report.load is not None and report.pid == os.getpid()
    await actor.drain(1)
    assert "compiling 2/3 buckets" in (tmp_path / "decode-0.log").read_text()


async def test_what_the_constructor_raises_comes_out(tmp_path: Path) -> None:
    (tmp_path / "refuse").write_text("truncated")
    with pytest.raises(CheckpointError, match="truncated"):
        await WorkerActor(plan(tmp_path)).start()


@pytest.mark.parametrize(
    ("cores", "places", "shares"),
    [
        ([0, 1], 2, [{0}, {1}]),
        ([0, 1], 4, [{0}, {1}, {0}, {1}]),
        ([4, 5, 6, 7], 2, [{4, 5}, {6, 7}]),
        ([0, 1, 2, 3, 4], 2, [{0, 1}, {2, 3}]),
        ([3], 1, [{3}]),
    ],
)
def test_cores_are_shared_evenly(cores: list[int], places: int, shares: list[set[int]]) -> None:
    assert [share_of_cores(cores, place, places) for place in range(places)] == shares


def test_pinning_reaches_every_thread() -> None:
    script = (
        "import os, threading\n"
        "from deploy.worker_actor import pin_process\n"
        "gate = threading.Event()\n"
        "threads = [threading.Thread(target=gate.wait, daemon=True) for _ in range(3)]\n"
        "[t.start() for t in threads]\n"
        "core = max(os.sched_getaffinity(0))\n"
        "pin_process({core})\n"
        "assert all(os.sched_getaffinity(t.native_id) == {core} for t in threads)\n"
        "gate.set()\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True, cwd=Path(__file__).parents[2])
