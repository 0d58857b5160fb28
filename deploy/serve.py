"""`baton serve` behind the command line: a private Ray, the fleet, the gateway, and an end that leaves nothing."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import importlib
import logging
import os
import re
import shutil
import signal
import socket
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Coroutine, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import msgspec
import ray
from ray._private import services

from deploy import ray_local, run_file
from deploy.config import ServeConfig
from deploy.fleet import NAMESPACE, FleetClient, FleetPlan
from deploy.fleet_types import FleetStatus, GatewayPlan, WorkerLost
from deploy.progress import Progress
from engine_core.errors import ConfigError
from engine_core.types import Role

logger = logging.getLogger(__name__)

EXIT_FAILED, EXIT_CONFIG, EXIT_INTERRUPTED = 1, 2, 130
STOP_GRACE_S = 10.0  # on top of the drain timeout
READINESS_S = 60.0
CONNECT_S = 5.0
SAME_SIGNAL_S = 0.3  # `timeout` and some shells deliver one Ctrl-C twice
PRESTARTED = 5  # fleet, a worker of each role, Serve's controller, the gateway
WATCH_S = 30.0


class ServePlan(msgspec.Struct, frozen=True):
    """One run of `baton serve`, everything resolved.

    Attributes:
        run_dir: short path (Unix sockets live below it), removed at the end.
        log_dir: kept where the run failed.
        worker_classes: `module:class` per role.
        ray_address: of the cluster to join; None: a private Ray is started and ended.
    """

    config: ServeConfig
    model_dir: str
    run_dir: Path
    log_dir: Path
    run_files: Path
    worker_classes: dict[Role, str]
    gateway_class: str
    secret: bytes | None
    ray_address: str | None

    @property
    def url(self) -> str:
        """What clients use as base URL."""
        gateway = self.config.gateway
        host = "127.0.0.1" if gateway.host in ("0.0.0.0", "::", "") else gateway.host
        return f"http://{host}:{gateway.port}/v1"


class Interrupts:
    """Ctrl-C, SIGTERM and a closed terminal: the first asks to stop, the second ends everything at once.

    Args:
        leave: what to do before this process ends at once, besides ending those below it.
    """

    def __init__(self, leave: Callable[[], None]) -> None:
        self._leave = leave
        self._first_at = 0.0
        self.count = 0
        self._stop: asyncio.Event | None = None
        self._loop: asyncio.AbstractEventLoop | None = None

    def install(self) -> None:
        """Take these signals (Ray takes SIGTERM for itself when it starts). `nohup` is respected."""
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            if number != signal.SIGHUP or signal.getsignal(number) is not signal.SIG_IGN:
                signal.signal(number, self._on_signal)

    def bind(self) -> asyncio.Event:
        """An event of the running loop that the first signal sets."""
        self._stop, self._loop = asyncio.Event(), asyncio.get_running_loop()
        return self._stop

    def unbind(self) -> None:
        """The loop has ended; the first signal is over, too."""
        self.count = max(self.count, 1)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self.count and time.monotonic() - self._first_at < SAME_SIGNAL_S:
            return
        self.count += 1
        if self.count > 1:
            ray_local.end(ray_local.descendants(), 0)
            self._leave()
            os._exit(EXIT_INTERRUPTED)
        self._first_at = time.monotonic()
        if self._stop is None or self._loop is None:
            raise KeyboardInterrupt
        self._loop.call_soon_threadsafe(self._stop.set)


def run(plan: ServePlan, progress: Progress) -> int:
    """Serve until a signal comes; returns the exit status. Every process started here has ended by then."""
    interrupts = Interrupts(lambda: _remove(plan))
    interrupts.install()
    status = EXIT_FAILED
    try:
        with quiet(plan.log_dir / "ray.log"):
            status = _run(plan, progress, interrupts)
    finally:
        (plan.run_dir / ray_local.TOKEN).unlink(missing_ok=True)
        if status == EXIT_FAILED:
            progress.say(f"Logs: {plan.log_dir}")  # and Ray's own, in the run directory
        else:
            _remove(plan)
    return status


def _remove(plan: ServePlan) -> None:
    """Leave no file behind."""
    run_file.path(plan.run_files, plan.config.gateway.port).unlink(missing_ok=True)
    shutil.rmtree(plan.run_dir, ignore_errors=True)


def _run(plan: ServePlan, progress: Progress, interrupts: Interrupts) -> int:
    try:
        address = start_ray(plan.run_dir) if plan.ray_address is None else join_ray(plan.ray_address)
        progress.say("Ray is up", detail=True)
        interrupts.install()
        asyncio.run(Serving(plan, progress, address).run(interrupts.bind))
    except (KeyboardInterrupt, SystemExit):  # the latter where SIGTERM comes while Ray starts: it has its own handler
        progress.say("Stopped while starting.")
        return EXIT_INTERRUPTED
    except ConfigError as error:
        progress.say(f"Error: {error}")
        return EXIT_CONFIG
    except WorkerLost as error:
        progress.say(f"Error: {error}")
        return EXIT_FAILED
    finally:
        interrupts.unbind()
        if plan.ray_address is None:
            stop_ray()
        else:
            ray.shutdown()
    progress.say("Stopped.")
    return 0


def start_ray(run_dir: Path) -> str:
    """Start Ray's processes as children of this one; `ray_local.prepare` has set the environment."""
    with _children_in_own_groups():
        context = ray.init(
            num_cpus=min(os.cpu_count() or 1, PRESTARTED),  # our actors ask for none: it only says how many to prestart
            include_dashboard=False,
            log_to_driver=False,
            logging_level=logging.ERROR,
            object_store_memory=ray_local.OBJECT_STORE_BYTES,
            namespace=NAMESPACE,
            _temp_dir=str(run_dir / "ray"),
        )
    return str(context.address_info["address"])


def join_ray(address: str) -> str:
    """Connect to a cluster that runs; its security settings are those of this process's environment."""
    host, _, port = address.rpartition(":")
    try:
        if host:  # Ray itself would try for minutes
            socket.create_connection((host, int(port)), CONNECT_S).close()
        context = ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR, namespace=NAMESPACE)
    except (OSError, ValueError, RuntimeError) as error:
        raise ConfigError(f"no Ray cluster answers at {address}: {error}") from None
    return str(context.address_info["gcs_address"])


@contextlib.contextmanager
def _children_in_own_groups() -> Iterator[None]:
    """Ray's processes in process groups of their own, which Ray has no option for.

    `timeout`, `make` and terminals signal whole groups: Ray would be gone before its requests are drained, and this
    process would wait a minute for it.
    """
    original = services.ConsolePopen  # on POSIX: subprocess.Popen
    services.ConsolePopen = functools.partial(original, process_group=0)
    try:
        yield
    finally:
        services.ConsolePopen = original


def stop_ray() -> None:
    """End Ray and whatever it started."""
    processes = ray_local.descendants()
    ray.shutdown()
    ray_local.end(processes, ray_local.STOP_GRACE_S)


@contextlib.contextmanager
def quiet(path: Path) -> Iterator[None]:
    """Ray's threads print to standard output whenever an actor dies: into a file with it."""
    with path.open("a") as file, contextlib.redirect_stdout(file), contextlib.redirect_stderr(file):
        yield


class Serving:
    """The part of a run that happens on the event loop."""

    def __init__(self, plan: ServePlan, progress: Progress, ray_address: str) -> None:
        self._plan = plan
        self._progress = progress
        self._ray_address = ray_address
        self._version = 0

    async def run(self, bind: Callable[[], asyncio.Event]) -> None:
        """Start, serve, stop. Raises ConfigError or WorkerLost when it cannot start or go on."""
        stop = bind()
        fleet = FleetClient.create(self._fleet_plan())
        announced = self._announce()
        try:
            await fleet.start()
            self._progress.say("Fleet is up", detail=True)
            gateways = asyncio.create_task(asyncio.to_thread(self._start_gateways))
            if await _unless(stop, self._until_ready(fleet, gateways)):
                self._progress.ready(f"Baton is ready: {self._plan.url}")
                await _unless(stop, self._watch(fleet))
            self._progress.say("Stopping; running requests may finish (Ctrl-C again stops at once) ...")
            await gateways
            await self._stop(fleet)
        finally:
            announced.unlink(missing_ok=True)

    async def _until_ready(self, fleet: FleetClient, gateways: asyncio.Task[None]) -> None:
        """Show progress until every worker serves and the gateway has found them."""
        await asyncio.gather(self._until_workers(fleet), asyncio.shield(gateways))
        await self._until_readiness()

    async def _until_workers(self, fleet: FleetClient) -> None:
        ready = False
        while not ready:
            status = await fleet.watch(self._version, WATCH_S)
            self._version = status.version
            self._progress.starting(status)
            ready = status.ready
            _raise_fatal(status)
        self._progress.say("Workers are ready", detail=True)

    def _start_gateways(self) -> None:
        try:
            _gateways().start_gateways(self._gateway_plan())
        except RuntimeError as error:  # Serve's, with the replica's traceback in its text
            logger.error("the gateway failed to start: %s", error)
            raise gateway_failure(str(error)) from None
        self._progress.say("Gateway listens", detail=True)

    async def _until_readiness(self) -> None:
        """Wait until the gateway says that it can take requests."""
        url = self._plan.url.removesuffix("/v1") + "/readiness"
        async with asyncio.timeout(READINESS_S):
            while not await asyncio.to_thread(_answers, url):  # noqa: ASYNC110
                await asyncio.sleep(0.05)

    async def _watch(self, fleet: FleetClient) -> None:
        """Tell about deaths and scaling, for ever."""
        while True:
            status = await fleet.watch(self._version, WATCH_S)
            self._version = status.version
            self._progress.running(status)

    async def _stop(self, fleet: FleetClient) -> None:
        """Gateway first, so that its running requests still have workers."""
        drain_s = self._plan.config.fleet.drain_timeout_s
        with contextlib.suppress(TimeoutError, WorkerLost):
            await asyncio.wait_for(asyncio.to_thread(_gateways().stop_gateways), drain_s + STOP_GRACE_S)
            await asyncio.wait_for(fleet.stop(drain_s), drain_s + STOP_GRACE_S)

    def _announce(self) -> Path:
        server = ray_local.process(os.getpid())
        run_file_ = run_file.RunFile(
            server=server or ray_local.Process(os.getpid(), 0),
            url=self._plan.url,
            model=self._plan.config.gateway.model_name,
            ray_address=self._ray_address,
            token_path="" if self._plan.ray_address else str(self._plan.run_dir / ray_local.TOKEN),
            log_dir=str(self._plan.log_dir),
        )
        return run_file.write(self._plan.run_files, self._plan.config.gateway.port, run_file_)

    def _fleet_plan(self) -> FleetPlan:
        plan = self._plan
        return FleetPlan(plan.config, plan.model_dir, str(plan.log_dir), plan.worker_classes, plan.secret)

    def _gateway_plan(self) -> GatewayPlan:
        plan = self._plan
        return GatewayPlan(
            gateway_class=plan.gateway_class,
            config=plan.config,
            model_dir=plan.model_dir,
            log_dir=str(plan.log_dir),
            drain_timeout_s=plan.config.fleet.drain_timeout_s,
            secret=plan.secret,
        )


def _gateways() -> Any:
    """The module that imports Ray Serve, which takes long: while the workers start, not before."""
    return importlib.import_module("deploy.gateway_deployment")


async def _unless(stop: asyncio.Event, work: Coroutine[Any, Any, None]) -> bool:
    """Do the work unless the event comes first; returns whether the work was done."""
    working, stopping = asyncio.create_task(work), asyncio.create_task(stop.wait())
    try:
        await asyncio.wait({working, stopping}, return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            working.result()
            return True
        return False
    finally:
        for task in (working, stopping):
            task.cancel()
        await asyncio.wait({working, stopping})


def gateway_failure(text: str) -> ConfigError | WorkerLost:
    """The last error of a traceback in words; a ConfigError where the gateway raised one."""
    errors = re.findall(r"^\s*([\w.]*(?:Error|Exception)): (.*)$", text, re.MULTILINE)
    name, message = errors[-1] if errors else ("", (text.splitlines() or ["no reason given"])[0])
    if name.rpartition(".")[2] in ("ConfigError", "CheckpointError"):
        return ConfigError(message)
    return WorkerLost(f"the gateway failed to start: {name.rpartition('.')[2]}: {message}")


def _raise_fatal(status: FleetStatus) -> None:
    if status.fatal is not None:
        raise ConfigError(status.fatal) if status.fatal_is_config else WorkerLost(status.fatal)


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=2) as response:
            return bool(response.status == 200)
    except (urllib.error.URLError, OSError):
        return False
