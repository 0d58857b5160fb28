"""What of a whole Ray cluster would keep Baton from starting or make it slow.

Pure: reports of the nodes in, findings out. `deploy.cluster_probe` collects the reports.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec

from deploy.config import AutoscaleMode, ServeConfig
from deploy.doctor import Finding, Level
from engine_core.errors import ConfigError
from engine_core.types import Role

COMPARED = ("python", "baton", "ray", "jax", "jaxlib", "flax", "libtpu")
SKEW_S = 1.0
CHIP_GIB = {"v5e": 15.75, "v5p": 95.73, "v6e": 31.24, "tpu7x": 189.48}  # what programs may use, per chip
FROM_ONE_FILE = "install the same wheel and the same constraints on every node (`make wheel`, setup_commands)"


class NodeReport(msgspec.Struct, frozen=True):
    """One node of the cluster.

    Attributes:
        name: its address.
        resources: that it offers to Ray.
        versions: of what is in `COMPARED`; what is not installed is not in it.
        chips, generation: TPU chips that the machine sees, and of what kind.
        skew_s: how far its clock is ahead of this machine's, and `skew_error_s` how well that is known.
        findings: of the node by itself.
        silent: it did not answer; the rest is empty then.
    """

    name: str
    resources: dict[str, float]
    versions: dict[str, str] = {}
    chips: int = 0
    generation: str = ""
    skew_s: float = 0.0
    skew_error_s: float = 0.0
    findings: tuple[Finding, ...] = ()
    silent: bool = False

    @property
    def is_worker(self) -> bool:
        """Whether prefill or decode workers may run there."""
        return any(f"baton-{role}" in self.resources for role in Role) or "TPU" in self.resources


class LaunchFailure(msgspec.Struct, frozen=True):
    """What Ray's autoscaler says about a node that it could not get."""

    node_type: str
    reason: str


def judge(
    nodes: Sequence[NodeReport],
    config: ServeConfig,
    plan: Mapping[str, Any] | None,
    failures: Sequence[LaunchFailure],
) -> list[Finding]:
    """All findings about a cluster, those about single nodes first.

    Args:
        plan: what `baton plan --json` wrote, or None.
        failures: recent ones.
    """
    found: list[Finding] = []
    for node in nodes:
        found += _check_node(node)
    answered = [node for node in nodes if not node.silent]
    found += _check_versions(answered)
    found += _check_pools(answered, config)
    if plan is not None:
        found += _check_plan(answered, config, plan)
    found += [_quota(failure) for failure in failures]
    return found


def _check_node(node: NodeReport) -> Iterable[Finding]:
    if node.silent:
        fix = "look at `ray status` and that node's raylet log; a node that cannot run a task runs no worker"
        yield Finding(f"{node.name} answers", Level.FAIL, "it did not run a task in time", fix)
        return
    for finding in node.findings:
        yield msgspec.structs.replace(finding, check=f"{node.name} {finding.check}")
    declared = int(node.resources.get("TPU", 0))
    if declared and declared != node.chips:
        fix = "let resources.TPU of its node type say what the slice has, or find out why chips are missing"
        yield Finding(f"{node.name} chips", Level.FAIL, f"it offers TPU: {declared}, and sees {node.chips} chips", fix)
    if abs(node.skew_s) - node.skew_error_s > SKEW_S:
        fix = "enable NTP (timedatectl set-ntp true): logs of several machines cannot be compared"
        text = f"its clock is {abs(node.skew_s):.1f} s {'ahead' if node.skew_s > 0 else 'behind'}"
        yield Finding(f"{node.name} clock skew", Level.WARN, text, fix)


def _check_versions(nodes: Sequence[NodeReport]) -> Iterable[Finding]:
    for name in COMPARED:
        versions = {node.name: node.versions[name] for node in nodes if name in node.versions}
        if not versions:
            continue
        most, _ = Counter(versions.values()).most_common(1)[0]
        others = sorted(f"{version} on {node}" for node, version in versions.items() if version != most)
        if others:
            text = f"{most} on most nodes, {', '.join(others)}"
            yield Finding(f"{name} everywhere", Level.FAIL, text, FROM_ONE_FILE)
        else:
            yield Finding(f"{name} everywhere", Level.OK, f"{most} on {len(versions)} nodes")


def _check_pools(nodes: Sequence[NodeReport], config: ServeConfig) -> Iterable[Finding]:
    """Whether every worker and gateway finds a place; without pool resources Ray places them anywhere."""
    if not config.fleet.pool_resources:
        return
    wanted = {f"baton-{role}": config.fleet.count(role) for role in Role} | {"baton-gateway": config.fleet.gateways}
    grows = config.autoscale.mode is AutoscaleMode.ACT
    for resource, count in wanted.items():
        offered = int(sum(node.resources.get(resource, 0) for node in nodes))
        text = f"{offered} offered, the configuration wants {count}"
        if offered >= count:
            yield Finding(resource, Level.OK, text)
        else:
            level = Level.WARN if grows and resource != "baton-gateway" else Level.FAIL
            fix = f"more nodes that offer {resource} (min_workers, replicas), or fewer workers in [fleet]"
            yield Finding(resource, level, text, fix)
    for node in nodes:
        chips = int(node.resources.get("TPU", 0))
        roles = [role for role in Role if node.resources.get(f"baton-{role}") and config.fleet.count(role)] or [*Role]
        shapes = [config.shape(role) for role in roles]
        need = max(shape.chips_per_host if chips or shape.tpus else 0 for shape in shapes)
        if node.is_worker and chips < need:
            fix = "a larger slice, or a smaller engine.tp and fleet.tpus_per_worker"
            yield Finding(f"{node.name} slice", Level.FAIL, f"it offers {chips} chips, a worker needs {need}", fix)


def _check_plan(nodes: Sequence[NodeReport], config: ServeConfig, plan: Mapping[str, Any]) -> Iterable[Finding]:
    """HBM against what the plan needs of each device."""
    slice_, hbm = plan["topology"], plan["hbm_gib"]
    name = slice_["name"]
    if not plan["fits"]:
        fix = "another slice; the plan names the smallest that would do"
        yield Finding("plan", Level.FAIL, f"the model does not fit on {name}", fix)
        return
    if config.engine.tp != slice_["tensor_parallel"]:
        text = f"engine.tp is {config.engine.tp}, the plan is for {slice_['tensor_parallel']}"
        yield Finding("plan", Level.WARN, text, "plan again for the slice that you use, or set engine.tp")
    need = sum(hbm[part] for part in ("weights", "kv", "slots", "workspace"))
    generation = name.partition("-")[0]
    for node in nodes:
        if not node.is_worker:
            continue
        if node.generation not in CHIP_GIB:
            text = f"its chips are not known here: {need:.1f} GiB on each device are planned"
            yield Finding(f"{node.name} HBM", Level.WARN, text, "compare it with the plan by hand")
            continue
        have = CHIP_GIB[node.generation] * slice_["chips"] / slice_["devices"]
        text = f"{node.chips} chips of {node.generation}; {need:.1f} of {have:.1f} GiB on each device are planned"
        if node.generation != generation or node.chips < slice_["chips"] or need > have:
            fix = f"a slice {name}, or `baton plan` for this one"
            yield Finding(f"{node.name} HBM", Level.FAIL, f"{text} for {name}", fix)
        else:
            yield Finding(f"{node.name} HBM", Level.OK, text)


def _quota(failure: LaunchFailure) -> Finding:
    text = f"Ray could not start a node of type {failure.node_type}: {failure.reason}"
    words = failure.reason.lower()
    if "quota" in words:
        fix = "ask for more quota of this accelerator in this zone (IAM & Admin, Quotas), or use another zone"
    elif any(word in words for word in ("stockout", "capacity", "exhausted", "unavailable")):
        fix = "the zone has none at present: another zone, a reservation, or spot; the autoscaler goes on trying"
    elif any(word in words for word in ("permission", "forbidden", "403", "denied")):
        fix = "give the cluster's service account roles/tpu.admin and roles/iam.serviceAccountUser"
    else:
        fix = "look at `ray status` and the head's monitor.log"
    return Finding("nodes", Level.WARN, text, fix)


def launch_failures(status: bytes | str) -> list[LaunchFailure]:
    """The nodes that Ray's autoscaler lately could not get, from the status that it writes as JSON."""
    report = json.loads(status).get("autoscaler_report") or {}
    records = (report.get("node_availability_summary") or {}).get("node_availabilities") or {}
    found = []
    for kind, record in records.items():
        reason = record.get("unavailable_node_information")
        if reason:
            found.append(LaunchFailure(kind, f"{reason['category']}: {reason['description']}"))
    return found


def read_plan(path: Path) -> dict[str, Any]:
    """What `baton plan --json` wrote.

    Raises:
        ConfigError: it is not that.
    """
    try:
        plan = json.loads(path.read_text())
        assert isinstance(plan, dict)
        topology, hbm = plan["topology"], plan["hbm_gib"]
        fields = [plan["fits"], *(topology[key] for key in ("name", "chips", "devices", "tensor_parallel"))]
        fields += [hbm[key] for key in ("weights", "kv", "slots", "workspace")]
    except OSError as error:
        raise ConfigError(f"--plan {path}: {error.strerror or error}") from None
    except (ValueError, KeyError, TypeError, AssertionError):
        raise ConfigError(f"--plan {path} is not what `baton plan --json` writes") from None
    return plan
