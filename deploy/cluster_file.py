"""Checks of a cluster file for `ray up`, before any machine is bought: what is wrong, and in which line.

First Ray's own validation, then what Baton needs: files that are mounted exist, every Ray process authenticates, the
node types offer what the configuration's workers take, all that nodes install is pinned and alike, and the model fits
into a worker's chips.
"""

from __future__ import annotations

import importlib
import re
import shlex
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from deploy import yaml_file
from deploy.config import NODE, AutoscaleMode, ServeConfig, WorkerShape
from deploy.launch import read_config
from deploy.secret_files import read_keys, read_secret
from deploy.slice_fit import (
    CHIP_GIB,
    CORES_PER_CHIP,
    ModelConfig,
    lacks_chips,
    misfit,
    model_misfit,
    noting,
    num_hosts,
    release,
)
from deploy.yaml_file import Place, Problem
from engine_core.errors import ConfigError
from engine_core.types import Role

REQUIRED_SETTINGS = (
    "RAY_AUTH_MODE=token",
    "RAY_AUTH_TOKEN_PATH=",
    "RAY_gcs_rpc_server_reconnect_timeout_s=",
)
HEAD_SETTINGS = ("RAY_gcs_storage=rocksdb", "RAY_gcs_storage_path=")
EXPLICIT = ("ray", "baton")  # the file itself says which: `ray up` of another version may not speak with them
SETUPS = ("setup_commands", "head_setup_commands", "worker_setup_commands")
MOUNTED = {"config": "~/baton/baton.toml", "secret": "~/baton/secret", "keys": "~/baton/api-keys"}
WHEELS, CONSTRAINTS = "~/baton/wheel", "~/baton/constraints.txt"
RUNTIMES = {"tpuv5-lite": "v5litepod", "tpuv5": "v5p", "tpuv6e": "v6e", "tpu7": "tpu7x"}  # in runtimeVersion: for what


class ClusterFile:
    """A cluster file that YAML can read.

    Attributes:
        content: as plain lists and dicts.
        notes: what `check` could not tell.

    Raises:
        ConfigError: it is not there, or not YAML.
    """

    def __init__(self, path: Path, model_config: ModelConfig) -> None:
        documents = yaml_file.read(path)
        if len(documents) != 1:
            raise ConfigError(f"{path}:1: not a cluster file: it has {len(documents)} documents")
        self.path = path
        self._document = documents[0]
        self.notes: list[str] = []
        self._model_config = noting(model_config, self.notes)
        self.content = self._document.content

    def check(self) -> list[Problem]:
        """All problems, in the order of their lines."""
        problem = self._check_schema()
        if problem is not None:
            return [problem]
        found = [*self._check_mounts(), *self._check_settings(), *self._check_versions(), *self._check_zone()]
        config = self._config(found)
        if config is not None:
            found += [*self._check_pools(config), *self._check_memory(config)]
        return sorted(found, key=lambda problem: problem.line)

    def _check_schema(self) -> Problem | None:
        """As `ray up` does."""
        util = importlib.import_module("ray.autoscaler._private.util")
        jsonschema = importlib.import_module("jsonschema")
        try:
            util.validate_config(util.prepare_config(dict(self.content)))
        except jsonschema.ValidationError as error:
            return self._problem(tuple(error.absolute_path), f"{_dotted(tuple(error.absolute_path))}: {error.message}")
        except (ValueError, KeyError, NotImplementedError, AttributeError, TypeError) as error:
            return self._problem((), f"Ray refuses the file: {type(error).__name__}: {error}")
        return None

    def _check_mounts(self) -> Iterator[Problem]:
        readers: dict[str, Callable[[Path], object]] = {MOUNTED["secret"]: read_secret, MOUNTED["keys"]: read_keys}
        mounts = self.content.get("file_mounts") or {}
        for remote in MOUNTED.values():
            if remote not in mounts:
                yield self._problem(("file_mounts",), f"file_mounts lacks {remote}")
        for remote, local in mounts.items():
            place = ("file_mounts", remote)
            path = self.local(str(local))
            if not path.exists():
                yield self._problem(place, f"{local}, to be mounted at {remote}, does not exist")
            elif remote in readers:
                try:
                    readers[remote](path)
                except ConfigError as error:
                    yield self._problem(place, str(error))
            elif remote == WHEELS and not list(path.glob("*.whl")):
                yield self._problem(place, f"{local} has no wheel, which nodes install; `make wheel` writes it")

    def _check_settings(self) -> Iterator[Problem]:
        """Every `ray start` carries its security and patience settings: workers do not inherit the head's."""
        for name in ("head_start_ray_commands", "worker_start_ray_commands"):
            commands = self.content.get(name) or []
            starts = [(i, command) for i, command in enumerate(commands) if "ray start" in str(command)]
            if not starts:
                yield self._problem((name,), f"{name} has no `ray start`")
            wanted = REQUIRED_SETTINGS + (HEAD_SETTINGS if name.startswith("head") else ())
            for index, command in starts:
                for setting in wanted:
                    if setting not in command:
                        yield self._problem((name, index), f"`ray start` of {name} lacks {setting}")

    def _check_versions(self) -> Iterator[Problem]:
        """Head and workers are of one version: what is installed on both is pinned, and alike."""
        pinned: dict[str, str] = {}
        constraints = self._constraints()
        for name in SETUPS:
            for index, command in enumerate(self.content.get(name) or []):
                constrained = constraints if f"-c {CONSTRAINTS}" in str(command) else {}
                for package, version in _packages(str(command)):
                    tested = constrained.get(package, set())
                    known = pinned.setdefault(package, version)
                    if package not in EXPLICIT and not version and tested:
                        continue
                    if not version:
                        text = f"{name} does not say which {package}, so that nodes may differ: {package}==VERSION"
                    elif known and version != known:
                        text = f"{name} installs {package} {version}, other nodes {known}"
                    elif tested and version not in tested:
                        text = f"{name} wants {package} {version}, {CONSTRAINTS} {' or '.join(sorted(tested))}"
                    else:
                        continue
                    yield self._problem((name, index), text)
        docker = self.content.get("docker") or {}
        head, worker = (docker.get(f"{kind}_image") or docker.get("image") or "" for kind in ("head", "worker"))
        if release(head) != release(worker):
            place = "worker_image" if "worker_image" in docker else "head_image"
            yield self._problem(("docker", place), f"the head runs {head}, workers {worker}: not of one version")

    def _constraints(self) -> dict[str, set[str]]:
        """Versions of each package in the file that nodes get, of any Python."""
        local = (self.content.get("file_mounts") or {}).get(CONSTRAINTS)
        found: dict[str, set[str]] = {}
        if local is not None and self.local(local).is_file():
            for name, version in re.findall(r"^([\w.-]+)==([^\s;]+)", self.local(local).read_text(), re.MULTILINE):
                found.setdefault(name, set()).add(version)
        return found

    def _check_zone(self) -> Iterator[Problem]:
        """Zone and region are of one place, and a slice's software is for its generation."""
        provider = self.content["provider"]
        region, zone = provider.get("region"), provider.get("availability_zone")
        if region and zone and not str(zone).startswith(f"{region}-"):
            yield self._problem(
                ("provider", "availability_zone"), f"{zone} is not in {region}, the region of this file"
            )
        for name, kind in (self.content.get("available_node_types") or {}).items():
            found = _slice(kind)
            runtime = str((kind.get("node_config") or {}).get("runtimeVersion", ""))
            match = re.search("|".join(RUNTIMES), runtime)
            if found and match and RUNTIMES[match[0]] != found[0]:
                place = ("available_node_types", name, "node_config", "runtimeVersion")
                yield self._problem(place, f"{runtime} is for {RUNTIMES[match[0]]}, this slice is {found[0]}")

    def _config(self, found: list[Problem]) -> ServeConfig | None:
        local = (self.content.get("file_mounts") or {}).get(MOUNTED["config"])
        if local is None or not self.local(local).is_file():
            return None
        place = ("file_mounts", MOUNTED["config"])
        try:
            config = read_config((), self.local(local))
        except ConfigError as error:
            found.append(self._problem(place, f"{local}: {error}"))
            return None
        if config.fleet.host != NODE or not config.fleet.pool_resources:
            text = f'{local}: a cluster needs fleet.host = "{NODE}" and fleet.pool_resources = true'
            found.append(self._problem(place, text))
        return config

    def _check_pools(self, config: ServeConfig) -> Iterator[Problem]:
        wanted = {f"baton-{role}": config.fleet.count(role) for role in Role} | {"baton-gateway": config.fleet.gateways}
        types = self.content.get("available_node_types")
        if types is None:  # machines that are there anyway: their `ray start` says what they offer
            return
        if config.autoscale.mode is AutoscaleMode.ACT:
            wanted |= {"baton-prefill": config.autoscale.max_prefill, "baton-decode": config.autoscale.max_decode}
        for resource, count in wanted.items():
            offered = sum(
                int(kind.get("resources", {}).get(resource, 0)) * self._most(name, kind) for name, kind in types.items()
            )
            if offered < count:
                text = f"the node types offer {offered:g} of {resource}, the configuration wants {count}"
                yield self._problem(("available_node_types",), text)
        for name, kind in types.items():
            chips = kind.get("resources", {}).get("TPU", 0)
            for shape in _shapes(kind, config) if chips else ():
                if text := lacks_chips(shape, chips):
                    place = ("available_node_types", name, "resources", "TPU")
                    yield self._problem(place, f"node type {name} {text}")

    def _check_memory(self, config: ServeConfig) -> Iterator[Problem]:
        types = self.content.get("available_node_types") or {}
        slices = {name: found for name, kind in types.items() if (found := _slice(kind))}
        for name, (kind, chips) in slices.items():
            place = ("available_node_types", name, "node_config", "acceleratorType")
            if kind not in CHIP_GIB:
                yield self._problem(place, f"{kind} is not a TPU generation known here: {', '.join(CHIP_GIB)}")
                continue
            hosts = num_hosts(kind, chips)
            declared = types[name].get("resources", {}).get("TPU")
            if declared != chips // hosts:
                whole = f"this slice has {chips} chips" + (f" on {hosts} hosts" if hosts > 1 else "")
                yield self._problem(place, f"{whole}, resources.TPU says {declared}")
            for shape in _shapes(types[name], config):
                text = misfit(kind, hosts, chips, shape) or model_misfit(kind, shape, self._model_config)
                if text:
                    yield self._problem(place, text)

    def _most(self, name: str, kind: dict[str, Any]) -> int:
        return 1 if name == self.content.get("head_node_type") else int(kind.get("max_workers", 0))

    def local(self, path: str) -> Path:
        """A path of this machine, relative ones from where `ray up` runs."""
        return Path(path).expanduser()

    def _problem(self, place: Place, text: str) -> Problem:
        return self._document.problem(place, text)


def _packages(command: str) -> Iterator[tuple[str, str]]:
    """(ray, baton or jax, version) of what a command installs by name; an empty version: it does not say."""
    for word in shlex.split(command) if "pip install" in command else ():
        if match := re.fullmatch(r"(ray|baton|jax)(?:\[[\w,]*\])?(?:==([\w.]+)|)", word):
            yield match[1], match[2] or ""


def _dotted(place: Place) -> str:
    return ".".join(map(str, place)) or "the file"


def _slice(kind: dict[str, Any]) -> tuple[str, int] | None:
    """(generation, chips) of a node type with TPUs: ("v6e", 8) for v6e-8."""
    match = re.fullmatch(r"([a-z0-9]+)-(\d+)", str((kind.get("node_config") or {}).get("acceleratorType", "")))
    if match is None:
        return None
    return match[1], int(match[2]) // CORES_PER_CHIP.get(match[1], 1)


def _shapes(kind: dict[str, Any], config: ServeConfig) -> list[WorkerShape]:
    """What the workers take for which a node type offers a place; one where they are alike."""
    offered = kind.get("resources", {})
    roles = [role for role in Role if f"baton-{role}" in offered and config.fleet.count(role)]
    found: list[WorkerShape] = []
    for shape in (replace(config.shape(role), pool="") for role in roles):
        if shape not in found:
            found.append(shape)
    return found
