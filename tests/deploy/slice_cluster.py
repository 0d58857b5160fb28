"""Run by test_hosts: a worker over the two hosts of a TPU slice, on Ray nodes that only claim to be such hosts.

python -m tests.deploy.slice_cluster LOG_DIR
"""

from __future__ import annotations

import asyncio
import os
import sys

import ray
from ray.cluster_utils import Cluster
from ray.util.placement_group import placement_group_table

from deploy.config import WorkerShape
from deploy.spanning_worker import TPU_WORKER_ID, SpanningWorkerHandle, _bundles_in_order
from deploy.worker_actor import WorkerPlan
from engine_core.config import EngineConfig

NUM_HOSTS = 2
SLICE = {
    "ray.io/tpu-slice-name": "a-slice",
    "ray.io/tpu-topology": "2x4",
    "ray.io/tpu-pod-type": "v6e-8",
    "ray.io/accelerator-type": "TPU-V6E",
}


def start() -> Cluster:
    os.environ["TPU_NAME"] = SLICE["ray.io/tpu-slice-name"]  # what a host of that slice has
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
    for number in reversed(range(NUM_HOSTS)):
        head = {"TPU-v6e-8-head": 1.0} if number == 0 else {}
        labels = SLICE | {TPU_WORKER_ID: str(number)}
        cluster.add_node(num_cpus=0, resources={"TPU": 4.0} | head, labels=labels)
    ray.init(address=cluster.address, log_to_driver=False)
    return cluster


async def check(log_dir: str) -> None:
    plan = WorkerPlan(
        worker_class="tests.deploy.fakes:FakeDecodeWorker",
        engine=EngineConfig(tp=8),
        model_dir=log_dir,
        worker_id="decode-0",
        incarnation=1,
        host="127.0.0.1",
        log_dir=log_dir,
        secret=None,
        place=0,
        num_places=0,
        num_hosts=NUM_HOSTS,
    )
    shape = WorkerShape(
        engine=plan.engine, hosts=NUM_HOSTS, gpus=0, tpus=8, topology="2x4", accelerator="v6e", pool="baton-decode"
    )
    handle = SpanningWorkerHandle(plan, shape)
    await asyncio.wait_for(handle.place(), 60)
    labels = {node["NodeID"]: node["Labels"] for node in ray.nodes()}
    nodes = placement_group_table(handle._group)["bundles_to_node_id"]
    order = [labels[nodes[bundle]][TPU_WORKER_ID] for bundle in _bundles_in_order(handle._group, NUM_HOSTS)]
    assert order == ["0", "1"], order
    assert ray.available_resources().get("TPU", 0) == 0
    await handle.kill()
    async with asyncio.timeout(20):
        while ray.available_resources().get("TPU", 0) < 8:  # noqa: ASYNC110
            await asyncio.sleep(0.1)
    print("as it should be")


if __name__ == "__main__":
    cluster = start()
    asyncio.run(check(sys.argv[1]))
    ray.shutdown()
    cluster.shutdown()
