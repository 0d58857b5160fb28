"""`baton doctor`: what of a machine would keep Baton from starting or make it slow, and what to do about it.

Looks only: it starts nothing, and it does not take the TPU from whoever uses it.
"""

from __future__ import annotations

import importlib.metadata
import os
import re
import resource
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Iterable, Sequence
from enum import StrEnum
from pathlib import Path

import msgspec

from deploy import run_file
from deploy.config import ServeConfig
from deploy.launch import check_port, check_secret
from engine_core.compiled_library import COMPILERS, find_compiler
from engine_core.errors import ConfigError
from engine_core.types import Role

MIN_PYTHON = (3, 11)
MIN_OPEN_FILES = 8192
COMPILE_CACHE_GIB, SHM_GIB = 5.0, 1.0
TPU_VENDOR = "0x1ae0"  # Google's PCI vendor id
TPU_DEVICES = {"0x0062": "v5p", "0x0063": "v5e", "0x006f": "v6e", "0x0076": "tpu7x"}  # PCI device ids
NEEDED = {"jax": "0.10.2", "flax": "0.12.8", "ray": "2.60", "uvicorn": "0.40", "fastapi": "0.130"}


class Level(StrEnum):
    """How bad it is."""

    OK = "ok"
    WARN = "warn"
    FAIL = "fail"


class Finding(msgspec.Struct, frozen=True):
    """What one check found; `fix` says what to do, and is empty where all is well."""

    check: str
    level: Level
    text: str
    fix: str = ""


class Machine:
    """What the checks ask of the machine; tests put another one in its place."""

    def __init__(self, root: Path) -> None:
        self._root = root

    def python(self) -> tuple[int, ...]:
        """Version."""
        return sys.version_info[:3]

    def package(self, name: str) -> str | None:
        """Its version; None where it is not installed."""
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            return None

    def libtpu_of_jax(self) -> str:
        """The series of libtpu that the installed jax asks for, such as 0.0.50; empty where it does not say."""
        try:
            wanted = importlib.metadata.requires("jax") or []
        except importlib.metadata.PackageNotFoundError:
            return ""
        found = (re.match(r"libtpu==([\d.]+)\.\*", line) for line in wanted)
        return next((match[1] for match in found if match), "")

    def tpu_chips(self) -> int:
        """PCI devices of Google's that are accelerators."""
        devices = (self._root / "sys/bus/pci/devices").glob("*")
        return sum(_text(d / "vendor") == TPU_VENDOR and _text(d / "class").startswith("0x1200") for d in devices)

    def tpu_generation(self) -> str:
        """What its chips are, such as v6e; empty where there are none or they are unknown."""
        devices = (self._root / "sys/bus/pci/devices").glob("*")
        names = {TPU_DEVICES.get(_text(d / "device"), "") for d in devices if _text(d / "vendor") == TPU_VENDOR}
        return max(names, default="")

    def tpu_users(self) -> list[str]:
        """Processes that hold a TPU open, as "name (pid)"; only those of this user can be seen."""
        found = []
        for entry in (self._root / "proc").glob("[0-9]*"):
            try:
                links = [os.readlink(link) for link in (entry / "fd").iterdir()]
            except OSError:
                continue
            if any(re.match(r"/dev/(accel|vfio/)\d", link) for link in links):
                found.append(f"{_text(entry / 'comm')} ({entry.name})")
        return found

    def free_gib(self, path: Path) -> float:
        """Room at the nearest directory above `path` that exists."""
        while not path.exists() and path != path.parent:
            path = path.parent
        return shutil.disk_usage(path).free / 2**30

    def open_files(self) -> int:
        """The limit of this process."""
        return resource.getrlimit(resource.RLIMIT_NOFILE)[0]

    def compiler(self) -> str | None:
        """Of C++."""
        return find_compiler(COMPILERS)

    def clock(self) -> str:
        """yes or no: whether the clock follows others; empty where the machine cannot tell."""
        timedatectl = shutil.which("timedatectl")
        if timedatectl is None:
            return ""
        command = [timedatectl, "show", "--property=NTPSynchronized", "--value"]
        try:
            return subprocess.run(command, capture_output=True, text=True, timeout=5, check=False).stdout.strip()
        except (OSError, subprocess.TimeoutExpired):
            return ""

    def runs_baton(self, port: int) -> bool:
        """Whether a Baton of this user serves there."""
        try:
            run_file.find(run_file.DIRECTORY.expanduser(), port)
        except ConfigError:
            return False
        return True

    def resolves(self, name: str) -> bool:
        """Whether a host name can be looked up."""
        try:
            socket.getaddrinfo(name, None)
        except OSError:
            return False
        return True


def examine(machine: Machine, config: ServeConfig, secret: bytes | None) -> list[Finding]:
    """All checks of one machine.

    Args:
        config: what shall run here.
        secret: that gateways and workers share, or None.
    """
    checks: Sequence[Callable[[], Iterable[Finding]]] = (
        lambda: _check_python(machine),
        lambda: _check_packages(machine),
        lambda: _check_tpu(machine, config),
        lambda: _check_disk(machine, config),
        lambda: _check_compiler(machine, config),
        lambda: _check_limits(machine),
        lambda: _check_clock(machine),
        lambda: _check_network(machine, config, secret),
    )
    return [finding for check in checks for finding in check()]


def examine_start(machine: Machine, config: ServeConfig, secret: bytes | None) -> list[Finding]:
    """What of these checks concerns the machine that starts Baton on a cluster."""
    return list(_check_network(machine, config, secret))


def examine_node(machine: Machine, config: ServeConfig, is_worker: bool) -> list[Finding]:
    """What of these checks concerns any node of a cluster.

    Args:
        is_worker: whether prefill or decode workers run there: only they need chips and a compilation cache.
    """
    checks: list[Iterable[Finding]] = [_check_python(machine), _check_packages(machine)]
    if is_worker:
        checks += [_check_tpu(machine, config), _check_disk(machine, config)]
    checks += [_check_compiler(machine, config), _check_limits(machine), _check_clock(machine)]
    return [finding for check in checks for finding in check]


def _check_python(machine: Machine) -> Iterable[Finding]:
    version = ".".join(map(str, machine.python()))
    if machine.python() < MIN_PYTHON:
        yield Finding("python", Level.FAIL, f"Python {version}", "install Python 3.11 or newer: uv venv --python 3.12")
    else:
        yield Finding("python", Level.OK, f"Python {version}")


def _check_packages(machine: Machine) -> Iterable[Finding]:
    for name, least in NEEDED.items():
        version = machine.package(name)
        if version is None:
            yield Finding(name, Level.FAIL, f"{name} is not installed", f"pip install '{name}>={least}'")
        elif _numbers(version) < _numbers(least):
            fix = f"pip install --upgrade '{name}>={least}'"
            yield Finding(name, Level.FAIL, f"{name} {version} is older than {least}", fix)
        else:
            yield Finding(name, Level.OK, f"{name} {version}")
    jax, jaxlib = machine.package("jax"), machine.package("jaxlib")
    if jax and jaxlib and _numbers(jax)[:2] != _numbers(jaxlib)[:2]:
        fix = f"pip install jaxlib=={jax}"
        yield Finding("jaxlib", Level.FAIL, f"jax {jax} beside jaxlib {jaxlib}", fix)


def _check_tpu(machine: Machine, config: ServeConfig) -> Iterable[Finding]:
    chips = machine.tpu_chips()
    shapes = [config.shape(role) for role in Role if config.fleet.count(role)]
    wanted = min(int(shape.tpus) // shape.hosts for shape in shapes)  # of one machine
    if not chips:
        if wanted:
            text = f"no TPU is seen, fleet.tpus_per_worker wants {wanted}"
            yield Finding("tpu", Level.FAIL, text, "run it on a TPU VM; in a container, pass /dev/vfio or /dev/accel*")
        else:
            yield Finding("tpu", Level.OK, "no TPU, and none is asked for")
        return
    libtpu = machine.package("libtpu")
    if libtpu is None:
        fix = "pip install 'jax[tpu]'"
        yield Finding("tpu", Level.FAIL, f"{chips} TPU chips and no libtpu: JAX would run on the CPU", fix)
    elif (need := min(shape.chips_per_host for shape in shapes)) > chips:
        fix = "lower engine.tp (and ep, dp) and fleet.tpus_per_worker, or take a larger slice"
        yield Finding("tpu", Level.FAIL, f"{chips} TPU chips, a worker needs {need}", fix)
    else:
        yield Finding("tpu", Level.OK, f"{chips} TPU chips, libtpu {libtpu}")
    series = machine.libtpu_of_jax()
    if libtpu and series and _numbers(libtpu) != _numbers(series):
        text = f"libtpu {libtpu} beside jax {machine.package('jax')}, which asks for {series}.*"
        yield Finding("libtpu", Level.WARN, text, f"pip install 'libtpu=={series}.*'")
    if users := machine.tpu_users():
        fix = "end them before a worker starts: a chip has one user at a time"
        yield Finding("tpu in use", Level.WARN, f"held by {', '.join(users)}", fix)


def _check_disk(machine: Machine, config: ServeConfig) -> Iterable[Finding]:
    places = [("/dev/shm", Path("/dev/shm"), SHM_GIB, "mount it larger: Ray's object store lives there")]
    if config.engine.compile_cache:
        path = Path(config.engine.compile_cache).expanduser()
        fix = "free some, or set engine.compile_cache elsewhere; without it every start compiles anew"
        places.append(("compile cache", path, COMPILE_CACHE_GIB, fix))
    for name, path, least, fix in places:
        free = machine.free_gib(path)
        level, advice = (Level.OK, "") if free >= least else (Level.WARN, fix)
        yield Finding(name, level, f"{free:.1f} GiB free at {path}", advice)


def _check_compiler(machine: Machine, config: ServeConfig) -> Iterable[Finding]:
    if not config.engine.compile_cache:  # nowhere to keep what it makes
        return
    path = machine.compiler()
    if path is not None:
        yield Finding("C++ compiler", Level.OK, path)
    else:
        text = "none: requests take twice as long to place, KV to copy, and workers on CPUs have XLA's products only"
        yield Finding("C++ compiler", Level.WARN, text, "install g++ before the start")


def _check_limits(machine: Machine) -> Iterable[Finding]:
    limit = machine.open_files()
    if limit < MIN_OPEN_FILES:
        text = f"{limit} open files per process: each stream needs one"
        yield Finding("open files", Level.WARN, text, f"ulimit -n {8 * MIN_OPEN_FILES}")
    else:
        yield Finding("open files", Level.OK, f"{limit} per process")


def _check_clock(machine: Machine) -> Iterable[Finding]:
    found = machine.clock()
    if found == "no":
        fix = "enable NTP (timedatectl set-ntp true): logs of several machines cannot be compared"
        yield Finding("clock", Level.WARN, "the clock follows no other", fix)
    else:
        yield Finding("clock", Level.OK, "synchronized" if found else "this machine cannot tell")


def _check_network(machine: Machine, config: ServeConfig, secret: bytes | None) -> Iterable[Finding]:
    gateway = config.gateway
    try:
        check_port(gateway.host, gateway.port)
        yield Finding("port", Level.OK, f"{gateway.host}:{gateway.port} is free")
    except ConfigError as error:
        if machine.runs_baton(gateway.port):
            yield Finding("port", Level.OK, f"a Baton listens at {gateway.host}:{gateway.port}")
        else:
            yield Finding("port", Level.FAIL, str(error), "choose another gateway.port, or end what listens there")
    try:
        check_secret(config, secret)
        yield Finding("secret", Level.OK, "given" if secret else "none is needed: workers listen on loopback")
    except ConfigError as error:
        yield Finding("secret", Level.FAIL, str(error), "baton secret FILE, then --secret-file FILE on every start")
    model = config.engine.model.path
    is_hub_id = not Path(model).expanduser().exists() and model.count("/") == 1 and model[0] not in "./~"
    if is_hub_id and not machine.resolves("huggingface.co"):
        fix = "give this machine a way to the hub, or a directory with the checkpoint as engine.model.path"
        yield Finding("model", Level.WARN, f"{model} is on the Hugging Face hub, which cannot be looked up here", fix)


def describe(findings: Sequence[Finding]) -> str:
    """For people."""
    width = max(len(finding.check) for finding in findings)
    lines = []
    for finding in findings:
        lines.append(f"{finding.level:<5} {finding.check:<{width}}  {finding.text}")
        if finding.fix:
            lines.append(f"      {'':<{width}}  fix: {finding.fix}")
    return "\n".join(lines) + "\n"


def exit_status(findings: Sequence[Finding]) -> int:
    """1 where something would fail."""
    return int(any(finding.level is Level.FAIL for finding in findings))


def _text(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", version)[:3])
