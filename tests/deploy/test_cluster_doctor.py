"""Each check of a whole cluster on nodes that are fine and on nodes that are not; a real cluster is in test_join."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import msgspec
import pytest
from ray.autoscaler._private.node_provider_availability_tracker import (
    NodeAvailabilityRecord,
    NodeAvailabilitySummary,
    UnavailableNodeInformation,
)

from deploy import cli
from deploy.cluster_doctor import LaunchFailure, NodeReport, judge, launch_failures, read_plan
from deploy.config import ServeConfig
from deploy.doctor import Finding, Level, Machine, examine_node
from deploy.launch import read_config
from engine_core.errors import ConfigError

VERSIONS = {"python": "3.12.1", "baton": "0.1.0", "ray": "2.60.0", "jax": "0.12.0"}
HEAD = NodeReport("head", {"CPU": 8, "baton-gateway": 1}, VERSIONS)
PREFILL = NodeReport("p", {"TPU": 8, "baton-prefill": 1}, {**VERSIONS, "libtpu": "0.0.40"}, 8, "v6e")
DECODE = NodeReport("d", {"TPU": 8, "baton-decode": 1}, {**VERSIONS, "libtpu": "0.0.40"}, 8, "v6e")
PLAN = {
    "fits": True,
    "topology": {"name": "v6e-8", "chips": 8, "devices": 8, "tensor_parallel": 8},
    "hbm_gib": {"limit": 31.24, "weights": 7.7, "kv": 18.0, "slots": 0.1, "workspace": 1.5},
}
FLAGS = ("--fleet.pool_resources", "true", "--fleet.tpus_per_worker", "8", "--tp", "8")


def config(*flags: str) -> ServeConfig:
    return read_config([*FLAGS, *flags], None)


def bad(*nodes: NodeReport, plan: Any = None, failures: tuple[LaunchFailure, ...] = (), flags: tuple[str, ...] = ()):
    findings = judge(nodes, config(*flags), plan, failures)
    assert all(bool(finding.fix) is (finding.level is not Level.OK) for finding in findings)
    return {finding.check: finding.level for finding in findings if finding.level is not Level.OK}


def changed(node: NodeReport, **changes: object) -> NodeReport:
    return msgspec.structs.replace(node, **changes)


def test_a_fine_cluster() -> None:
    assert bad(HEAD, PREFILL, DECODE, plan=PLAN) == {}


@pytest.mark.parametrize(
    ("nodes", "expected"),
    [
        ((HEAD, PREFILL, changed(DECODE, silent=True)), {"d answers": Level.FAIL, "baton-decode": Level.FAIL}),
        ((HEAD, PREFILL), {"baton-decode": Level.FAIL}),
        ((HEAD, PREFILL, changed(DECODE, versions=VERSIONS | {"jax": "0.10.2"})), {"jax everywhere": Level.FAIL}),
        ((HEAD, changed(PREFILL, versions=VERSIONS | {"baton": "0.2"}), DECODE), {"baton everywhere": Level.FAIL}),
        ((HEAD, PREFILL, changed(DECODE, chips=7)), {"d chips": Level.FAIL}),
        (
            (HEAD, PREFILL, changed(DECODE, chips=4, resources={"TPU": 4, "baton-decode": 1})),
            {"d slice": Level.FAIL},
        ),
        ((HEAD, PREFILL, changed(DECODE, skew_s=-2.5, skew_error_s=0.1)), {"d clock skew": Level.WARN}),
        ((HEAD, PREFILL, changed(DECODE, skew_s=-2.5, skew_error_s=2.0)), {}),
        (
            (HEAD, PREFILL, changed(DECODE, findings=(Finding("open files", Level.WARN, "10", "more"),))),
            {"d open files": Level.WARN},
        ),
    ],
)
def test_what_is_found(nodes: tuple[NodeReport, ...], expected: dict[str, Level]) -> None:
    assert bad(*nodes) == expected


@pytest.mark.parametrize(
    ("plan", "nodes", "expected"),
    [
        ({**PLAN, "fits": False}, (PREFILL, DECODE), {"plan": Level.FAIL}),
        (PLAN, (PREFILL, changed(DECODE, generation="v5e")), {"d HBM": Level.FAIL}),
        (PLAN, (PREFILL, changed(DECODE, generation="")), {"d HBM": Level.WARN}),
        (
            {**PLAN, "hbm_gib": {**PLAN["hbm_gib"], "kv": 30.0}},
            (PREFILL, DECODE),
            {"p HBM": Level.FAIL, "d HBM": Level.FAIL},
        ),
        ({**PLAN, "topology": {**PLAN["topology"], "tensor_parallel": 4}}, (PREFILL, DECODE), {"plan": Level.WARN}),
    ],
)
def test_memory_against_the_plan(plan: Any, nodes: tuple[NodeReport, ...], expected: dict[str, Level]) -> None:
    assert bad(HEAD, *nodes, plan=plan) == expected


def test_a_tpu7x_chip_is_two_devices() -> None:
    seven = {"chips": 4, "generation": "tpu7x"}
    nodes = [
        changed(node, **seven, resources={f"baton-{role}": 1, "TPU": 4})
        for node, role in ((PREFILL, "prefill"), (DECODE, "decode"))
    ]
    topology = {"name": "tpu7x-8", "chips": 4, "devices": 8, "tensor_parallel": 8}
    flags = ("--fleet.tpus_per_worker", "4", "--tp", "4")
    plan = {**PLAN, "topology": {**topology, "tensor_parallel": 4}}
    assert bad(HEAD, *nodes, plan=plan, flags=flags) == {}
    plan["hbm_gib"] = {**PLAN["hbm_gib"], "kv": 100.0}
    assert bad(HEAD, *nodes, plan=plan, flags=flags) == {"p HBM": Level.FAIL, "d HBM": Level.FAIL}


def test_missing_nodes_only_warn_where_the_autoscaler_may_get_them() -> None:
    assert bad(HEAD, PREFILL, flags=("--autoscale.mode", "act")) == {"baton-decode": Level.WARN}


@pytest.mark.parametrize(
    ("reason", "hint"),
    [
        ("QuotaExceeded Quota 'TPUV6EPerProject' exceeded", "more quota"),
        ("There is no more capacity in the zone (stockout)", "another zone"),
        ("403 Permission denied on resource", "roles/tpu.admin"),
        ("something else", "ray status"),
    ],
)
def test_quota_hints(reason: str, hint: str) -> None:
    finding = judge([HEAD, PREFILL, DECODE], config(), None, [LaunchFailure("decode", reason)])[-1]
    assert (finding.check, finding.level) == ("nodes", Level.WARN) and hint in finding.fix and reason in finding.text


def test_what_rays_autoscaler_says_is_read() -> None:
    gone = UnavailableNodeInformation("QUOTA", "Quota 'TPUV6EPerProject' exceeded")
    records = {
        "decode": NodeAvailabilityRecord("decode", False, 1.0, gone),
        "prefill": NodeAvailabilityRecord("prefill", True, 1.0, None),
    }
    report = {"node_availability_summary": dataclasses.asdict(NodeAvailabilitySummary(records))}
    assert launch_failures(json.dumps({"autoscaler_report": report})) == [
        LaunchFailure("decode", "QUOTA: Quota 'TPUV6EPerProject' exceeded")
    ]
    assert launch_failures(b"{}") == launch_failures(json.dumps({"autoscaler_report": None})) == []


def test_only_workers_need_chips_and_a_cache() -> None:
    machine = Machine(Path("/nowhere"))
    checks = {finding.check for finding in examine_node(machine, config(), False)}
    assert "tpu" not in checks and "compile cache" not in checks and "open files" in checks
    checks = {finding.check for finding in examine_node(machine, config(), True)}
    assert {"tpu", "compile cache"} <= checks


def test_the_generation_is_read_from_the_bus(tmp_path: Path) -> None:
    device = tmp_path / "sys/bus/pci/devices/0000:00:00.0"
    device.mkdir(parents=True)
    (device / "vendor").write_text("0x1ae0\n")
    (device / "device").write_text("0x006f\n")
    assert (Machine(tmp_path).tpu_generation(), Machine(tmp_path / "sys").tpu_generation()) == ("v6e", "")


def test_plans_that_are_none(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "plan.json"
    with pytest.raises(ConfigError, match=r"--plan .*: No such file"):
        read_plan(file)
    for text in ("", "[]", "{}", json.dumps({**PLAN, "hbm_gib": {}})):
        file.write_text(text)
        with pytest.raises(ConfigError, match="is not what `baton plan --json` writes"):
            read_plan(file)
    file.write_text(json.dumps(PLAN))
    assert read_plan(file) == PLAN
    assert cli.main(["doctor", "--plan", str(file)]) == 2
    assert "--plan needs --ray-address" in capsys.readouterr().err
