"""Checks of a manifest for Kubernetes (a rendered overlay of deploy/k8s) before it is applied: what is wrong and where.

Its form is the API server's to judge. Here: that secrets exist, head and workers are of one version, Ray's processes
authenticate, and the groups of pods are the slices that the configuration's workers take.
"""

from __future__ import annotations

import json
import math
import re
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import yaml

from deploy import yaml_file
from deploy.config import AutoscaleMode, ServeConfig, WorkerShape
from deploy.launch import read_config
from deploy.slice_fit import ModelConfig, lacks_chips, model_misfit, noting, release
from deploy.yaml_file import Place, Problem
from engine_core.errors import ConfigError
from engine_core.types import Role

SERVICE = "RayService"
KINDS = {  # GKE's names of what the TPU API calls so
    "tpu-v5-lite-podslice": "v5litepod",
    "tpu-v5p-slice": "v5p",
    "tpu-v6e-slice": "v6e",
    "tpu7x": "tpu7x",
}
ACCELERATOR, TOPOLOGY = "cloud.google.com/gke-tpu-accelerator", "cloud.google.com/gke-tpu-topology"
CLUSTER: Place = ("spec", "rayClusterConfig")
QUOTES = " '`\""  # that KubeRay drops around rayStartParams.resources
HEAD_PORTS = ("dashboard", "serve")  # names by which KubeRay finds them
LOOK_UP_S = 15.0

HasSecret = Callable[[str, str], bool | None]
"""Whether a namespace has a secret of this name; None where that cannot be told."""


def is_manifest(path: Path) -> bool:
    """Whether a file is for Kubernetes. Raises ConfigError where it cannot be read."""
    return any("apiVersion" in document.content for document in yaml_file.read(path))


def has_secret(namespace: str, name: str) -> bool | None:
    """As the cluster says that `kubectl` talks to."""
    kubectl = shutil.which("kubectl")
    if kubectl is None:
        return None
    command = [kubectl, "--namespace", namespace, "get", "secret", name, "--output", "name"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=LOOK_UP_S, check=False)
    except subprocess.TimeoutExpired:
        return None
    return True if done.returncode == 0 else False if "NotFound" in done.stderr else None


class Manifest:
    """A file with the objects of one Baton.

    Attributes:
        notes: what `check` could not tell.

    Raises:
        ConfigError: it is not there, not YAML, or has no RayService.
    """

    def __init__(self, path: Path, model_config: ModelConfig, secrets: HasSecret) -> None:
        self.path = path
        self.notes: list[str] = []
        self._model_config = noting(model_config, self.notes)
        self._has_secret = secrets
        self._documents = yaml_file.read(path)
        services = [one for one in self._documents if one.content.get("kind") == SERVICE]
        if len(services) != 1:
            raise ConfigError(f"{path}:1: it has {len(services)} objects of the kind {SERVICE}, and not one")
        self._service = services[0]
        self._cluster: dict[str, Any] = self._service.content.get("spec", {}).get("rayClusterConfig") or {}

    def check(self) -> list[Problem]:
        """All problems, in the order of their lines."""
        found: list[Problem] = []
        try:
            found += [*self._check_secrets(), *self._check_versions(), *self._check_head()]
            config = self._config(found)
            if config is not None:
                found += self._check_groups(config)
        except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
            found.append(self._problem((), f"not the form of a {SERVICE}: {type(error).__name__}: {error}"))
        return sorted(found, key=lambda problem: problem.line)

    def _groups(self) -> Iterator[tuple[Place, dict[str, Any]]]:
        for index, group in enumerate(self._cluster.get("workerGroupSpecs") or []):
            yield (*CLUSTER, "workerGroupSpecs", index), group

    def _pods(self) -> Iterator[tuple[Place, dict[str, Any]]]:
        head = ((*CLUSTER, "headGroupSpec"), self._cluster.get("headGroupSpec") or {})
        for place, group in (head, *self._groups()):
            yield (*place, "template", "spec"), group.get("template", {}).get("spec", {})

    def _check_secrets(self) -> Iterator[Problem]:
        """Ray's processes have a token, and every secret that a pod mounts exists: without, pods never start."""
        auth = self._cluster.get("authOptions") or {}
        if auth.get("mode") != "token":
            yield self._problem(
                (*CLUSTER, "authOptions"), "Ray's processes do not authenticate: authOptions.mode is not token"
            )
        named = [((*CLUSTER, "authOptions", "secretName"), auth["secretName"])] if "secretName" in auth else []
        for place, pod in self._pods():
            for index, volume in enumerate(pod.get("volumes") or []):
                if "secret" in volume:
                    named.append(((*place, "volumes", index, "secret", "secretName"), volume["secret"]["secretName"]))
        namespace = self._service.content.get("metadata", {}).get("namespace", "default")
        seen = {one.content["metadata"]["name"] for one in self._documents if one.content.get("kind") == "Secret"}
        for place, name in named:
            if name in seen:
                continue
            seen.add(name)
            exists = self._has_secret(namespace, name)
            if exists is None:
                self.notes.append(f"not known, as no cluster answers: whether there is a secret {name}")
            elif not exists:
                yield self._problem(place, f"there is no secret {name} in the namespace {namespace}")

    def _check_versions(self) -> Iterator[Problem]:
        """All pods run images of one version."""
        images = [
            ((*place, "containers", index, "image"), str(container.get("image", "")))
            for place, pod in self._pods()
            for index, container in enumerate(pod.get("containers") or [])
        ]
        for place, image in images[1:]:
            if release(image) != release(images[0][1]):
                yield self._problem(place, f"the head runs {images[0][1]}, these pods {image}: not of one version")

    def _check_head(self) -> Iterator[Problem]:
        """KubeRay's operator reaches the head's dashboard, by which it hands the application over."""
        place: Place = (*CLUSTER, "headGroupSpec")
        head = self._cluster.get("headGroupSpec") or {}
        if (host := head.get("rayStartParams", {}).get("dashboard-host", "0.0.0.0")) != "0.0.0.0":
            text = f"dashboard-host is {host}, where KubeRay's operator cannot reach it: 0.0.0.0"
            yield self._problem((*place, "rayStartParams", "dashboard-host"), text)
        in_pod: Place = (*place, "template", "spec", "containers", 0, "ports")
        ports = {port.get("name") for port in head["template"]["spec"]["containers"][0].get("ports") or []}
        for name in HEAD_PORTS if ports else ():  # where it names none, KubeRay takes these
            if name not in ports:
                text = f"the head names ports and none is {name}: without it KubeRay never serves the application"
                yield self._problem(in_pod, text)

    def _config(self, found: list[Problem]) -> ServeConfig | None:
        """What the application reads, from its ConfigMap."""
        place: Place = ("spec", "serveConfigV2")
        try:
            served = yaml.safe_load(self._service.content["spec"]["serveConfigV2"])
            name = Path(served["applications"][0]["args"]["config_file"]).name
        except (KeyError, IndexError, TypeError, yaml.YAMLError):
            found.append(self._problem(place, "serveConfigV2 has no application with args.config_file"))
            return None
        maps = [one for one in self._documents if name in (one.content.get("data") or {})]
        if not maps:
            found.append(self._problem(place, f"no ConfigMap of this file has {name}, which the application reads"))
            return None
        with tempfile.NamedTemporaryFile("w", suffix=".toml") as file:
            file.write(maps[0].content["data"][name])
            file.flush()
            try:
                return read_config((), Path(file.name))
            except ConfigError as error:
                found.append(maps[0].problem(("data", name), str(error).replace(file.name, name)))
                return None

    def _check_groups(self, config: ServeConfig) -> Iterator[Problem]:
        offered: dict[str, tuple[Place, dict[str, Any]]] = {}
        for place, group in self._groups():
            text = group.get("rayStartParams", {}).get("resources", "{}")
            try:
                resources = json.loads(text.strip(QUOTES))
            except ValueError:
                at = (*place, "rayStartParams", "resources")
                yield self._problem(at, f"resources is not JSON within one pair of quotes, as KubeRay reads it: {text}")
                continue
            offered |= {name: (place, group) for name in ("gateway", *Role) if f"baton-{name}" in resources}
        for name in ("gateway", *Role):
            wanted, field = _wanted(config, name)
            if name not in offered:
                if wanted:
                    yield self._problem(
                        (*CLUSTER, "workerGroupSpecs"), f"no group offers baton-{name} (rayStartParams)"
                    )
                continue
            place, group = offered[name]
            if int(group.get(field, 0)) < wanted:
                text = f"{field} is {group.get(field, 0)}, the configuration wants {wanted} of baton-{name}"
                yield self._problem((*place, field), text)
            if name != "gateway" and wanted:
                yield from self._check_slices(place, group, config.shape(Role(name)))

    def _check_slices(self, place: Place, group: dict[str, Any], shape: WorkerShape) -> Iterator[Problem]:
        """One replica of the group is what one worker takes."""
        pod = group.get("template", {}).get("spec", {})
        limits = pod["containers"][0].get("resources", {}).get("limits", {})
        chips, hosts = int(limits.get("google.com/tpu", 0)), int(group.get("numOfHosts", 1))
        in_pod = (*place, "template", "spec")
        if hosts != shape.hosts:
            text = f"numOfHosts is {hosts}, a worker spans {shape.hosts} (fleet.hosts_per_worker)"
            yield self._problem((*place, "numOfHosts"), text)
        if not (chips or shape.tpus):
            return
        if text := lacks_chips(shape, chips):
            yield self._problem((*in_pod, "containers", 0, "resources", "limits", "google.com/tpu"), f"this pod {text}")
        selector = pod.get("nodeSelector") or {}
        topology, accelerator = str(selector.get(TOPOLOGY, "")), str(selector.get(ACCELERATOR, ""))
        if accelerator not in KINDS:
            text = f"{accelerator or 'nothing'} is not a TPU known here: {', '.join(KINDS)}"
            yield self._problem((*in_pod, "nodeSelector", ACCELERATOR), text)
        elif text := model_misfit(KINDS[accelerator], shape, self._model_config):
            yield self._problem((*in_pod, "nodeSelector", ACCELERATOR), text)
        if not re.fullmatch(r"\d+(x\d+)+", topology) or math.prod(map(int, topology.split("x"))) != chips * hosts:
            text = f"topology {topology or 'nothing'} is not that of {hosts} hosts with {chips} chips each"
            yield self._problem((*in_pod, "nodeSelector", TOPOLOGY), text)
        elif shape.hosts > 1 and topology != shape.topology:
            text = f"topology {topology} is not {shape.topology} of the configuration"
            yield self._problem((*in_pod, "nodeSelector", TOPOLOGY), text)

    def _problem(self, place: Place, text: str) -> Problem:
        return self._service.problem(place, text)


def _wanted(config: ServeConfig, name: str) -> tuple[int, str]:
    """How many of a group the configuration wants at most, and which field says how many there are."""
    if name == "gateway":
        return config.fleet.gateways, "replicas"
    if config.autoscale.mode is AutoscaleMode.ACT:
        return getattr(config.autoscale, f"max_{name}"), "maxReplicas"
    return config.fleet.count(Role(name)), "replicas"
