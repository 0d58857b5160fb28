"""The autoscaler at work: once per window, beside the fleet, in the fleet's own process."""

from __future__ import annotations

import asyncio
import logging
import time

from deploy.autoscale_core import AutoscaleCore
from deploy.config import ServeConfig
from deploy.fleet_core import FleetCore
from router.fleet_view import AutoscaleView
from router.load_meter import LoadTotals

logger = logging.getLogger(__name__)


class Autoscaler:
    """Asks the core once per window and lets the fleet do what it says.

    Args:
        config: its mode is not off.
    """

    def __init__(self, config: ServeConfig, fleet: FleetCore) -> None:
        self._core = AutoscaleCore(config.autoscale, config.planner())
        self._window_s = config.autoscale.window_s
        self._fleet = fleet
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Begin; the first step comes once the fleet has served."""
        self._task = asyncio.get_running_loop().create_task(self._run(), name="autoscale")
        self._task.add_done_callback(_tell_end)

    def stop(self) -> None:
        """No more steps."""
        if self._task is not None:
            self._task.cancel()

    def heard(self, gateway: str, totals: LoadTotals) -> None:
        """A gateway told its totals."""
        self._core.heard(gateway, totals, time.monotonic())

    def view(self) -> AutoscaleView:
        """For people."""
        return self._core.view()

    async def _run(self) -> None:
        while not self._fleet.status().ready:  # noqa: ASYNC110  # once, at start
            await asyncio.sleep(self._window_s)
        while True:
            await asyncio.sleep(self._window_s)
            await self._step()

    async def _step(self) -> None:
        step = self._core.step(self._fleet.status(), time.monotonic(), time.time())
        if step is None:
            return
        for source, _ in step.flips:
            await self._fleet.flip(source)
        if step.wanted:
            await self._fleet.resize(step.wanted)
        if step.decision is not None:
            logger.info("%s", "\n".join([step.decision.text, *step.decision.reasons]))
            done = "autoscale" if step.decision.acted else "autoscale would"
            await self._fleet.tell(f"{done}: {step.decision.text}")


def _tell_end(task: asyncio.Task[None]) -> None:
    """The fleet goes on as it is; only scaling has ended."""
    if not task.cancelled() and (error := task.exception()) is not None:
        logger.error("the autoscaler has ended", exc_info=error)
