"""Asks every node of a Ray cluster about itself, for `deploy.cluster_doctor`: one short-lived actor on each."""

from __future__ import annotations

import asyncio
import logging
import time
from pathlib import Path
from typing import Any

import ray
from ray._private import ray_constants
from ray.exceptions import RayError
from ray.experimental import internal_kv
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from deploy.cluster_doctor import COMPARED, LaunchFailure, NodeReport, launch_failures
from deploy.config import ServeConfig
from deploy.doctor import Finding, Machine, examine_node
from deploy.serve import join_ray

ANSWER_S = 60.0
CLOCK_ASKS = 5

logger = logging.getLogger(__name__)


class NodeProbe:
    """Runs on the node that is asked about."""

    def describe(self, config: ServeConfig, is_worker: bool) -> tuple[dict[str, str], int, str, list[Finding]]:
        """Versions, TPU chips and their generation, findings."""
        machine = Machine(Path("/"))
        versions = {"python": ".".join(map(str, machine.python()))}
        for name in COMPARED:
            if version := machine.package(name):
                versions[name] = version
        return versions, machine.tpu_chips(), machine.tpu_generation(), examine_node(machine, config, is_worker)

    def clock(self) -> float:
        """Seconds since 1970."""
        return time.time()


def probe(address: str, config: ServeConfig) -> tuple[list[NodeReport], list[LaunchFailure]]:
    """Reports of all nodes, and what Ray's autoscaler could not get.

    Raises:
        ConfigError: no cluster answers there.
    """
    join_ray(address)
    try:
        nodes = [node for node in ray.nodes() if node["Alive"]]
        told = internal_kv._internal_kv_get(ray_constants.DEBUG_AUTOSCALING_STATUS)
        return asyncio.run(_ask_all(nodes, config)), launch_failures(told or b"{}")
    finally:
        ray.shutdown()


async def _ask_all(nodes: list[dict[str, Any]], config: ServeConfig) -> list[NodeReport]:
    return list(await asyncio.gather(*(_ask(node, config) for node in nodes)))


async def _ask(node: dict[str, Any], config: ServeConfig) -> NodeReport:
    report = NodeReport(_name(node), node["Resources"])
    strategy = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
    actor = ray.remote(NodeProbe).options(num_cpus=0, scheduling_strategy=strategy).remote()
    try:
        async with asyncio.timeout(ANSWER_S):
            versions, chips, generation, findings = await actor.describe.remote(config, report.is_worker)
            skews = [await _skew(actor) for _ in range(CLOCK_ASKS)]
    except (RayError, TimeoutError) as error:
        logger.warning("%s does not answer: %s", report.name, error)
        return NodeReport(report.name, report.resources, silent=True)
    finally:
        ray.kill(actor)
    error_s, skew_s = min(skews)
    return NodeReport(
        name=report.name,
        resources=report.resources,
        versions=versions,
        chips=chips,
        generation=generation,
        skew_s=skew_s,
        skew_error_s=error_s,
        findings=tuple(findings),
    )


async def _skew(actor: Any) -> tuple[float, float]:
    """(error, skew) of one exchange: the other clock was read somewhere between the two readings of this one."""
    before = time.time()
    there = await actor.clock.remote()
    after = time.time()
    return (after - before) / 2, there - (before + after) / 2


def _name(node: dict[str, Any]) -> str:
    """Its address; where a test has several nodes on one machine, with a part of its id."""
    return f"{node['NodeManagerAddress']}/{node['NodeID'][:6]}"
