"""What TPU slices are, and whether a worker of the configuration is one: the checks before anything is bought."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from pathlib import Path

from deploy.config import DEVICES_PER_CHIP, WorkerShape
from engine_core.errors import BatonError

CHIP_GIB = {"v5litepod": 15.75, "v5p": 95.73, "v6e": 31.24, "tpu7x": 189.48}  # what a program may use, per chip
CORES_PER_CHIP = {"v5p": 2, "tpu7x": 2}  # what the number in these slices' names counts
CHIPS_PER_HOST = {"v5litepod": 8, "v6e": 8}  # of a slice of one host, where it is not SPREAD_CHIPS
DEVICE_KINDS = {"v5litepod": "TPU v5 lite", "v5p": "TPU v5", "v6e": "TPU v6 lite", "tpu7x": "TPU7x"}  # JAX's names
SPREAD_CHIPS = 4  # of each host of a larger slice

ModelConfig = Callable[[str], Path | None]
"""The directory with config.json of a model, from `engine.model.path`; None where that cannot be told."""


def num_hosts(kind: str, chips: int) -> int:
    """Of a slice as the TPU API makes it."""
    return 1 if chips <= CHIPS_PER_HOST.get(kind, SPREAD_CHIPS) else chips // SPREAD_CHIPS


def lacks_chips(shape: WorkerShape, chips: int) -> str:
    """Why a worker does not fit into machines of so many chips; empty where it does."""
    if chips >= shape.chips_per_host:
        return ""
    degrees = shape.engine.degrees
    split = f"engine.tp {degrees.tp}" if degrees.num_devices == degrees.tp else f"engine: {degrees}"
    hosts = f", {shape.hosts} hosts" if shape.hosts > 1 else ""
    return f"has {chips} TPU chips, a worker needs more ({split}, fleet.tpus_per_worker {shape.tpus:g}{hosts})"


def misfit(kind: str, hosts: int, chips: int, shape: WorkerShape) -> str:
    """Why a worker is not one slice of so many hosts; empty where it is, or several fit into one host."""
    if hosts != shape.hosts:
        return f"{kind} with {chips} chips is {hosts} hosts, a worker spans {shape.hosts} (fleet.hosts_per_worker)"
    if hosts > 1 and chips != shape.tpus:
        return f"{kind} with {chips} chips on {hosts} hosts is not topology {shape.topology} of the configuration"
    return ""


def model_misfit(kind: str, shape: WorkerShape, model_config: ModelConfig) -> str:
    """Why a worker could not start with its model on this slice; empty where it could, or config.json cannot be had."""
    path = shape.engine.model.path
    registry = importlib.import_module("engine_core.models.registry")
    resolve = importlib.import_module("engine_core.resolve")
    degrees = shape.engine.degrees
    limit = CHIP_GIB[kind] / DEVICES_PER_CHIP.get(kind, 1)
    try:
        directory = model_config(path)
        if directory is None:
            return ""
        spec = registry.load_spec(directory)
        need = resolve.weight_bytes(spec, "bfloat16", "bfloat16", degrees) / 2**30
        have = limit * degrees.num_devices * shape.engine.cache.memory_fraction
        if need > have:
            return (
                f"{path} has {need:.1f} GiB of weights; {degrees.num_devices} chips of {kind} "
                f"may use {have:.1f} GiB: a larger slice and engine.tp, or a smaller model"
            )
        importlib.import_module("engine_core.mesh").check_divisible(spec, degrees)
        device = PlannedDevice(DEVICE_KINDS[kind], int(limit * 2**30))
        dtype = resolve.compute_dtype(shape.engine.model.dtype, spec, "tpu")
        resolve.resolve(shape.engine, spec, "", [device] * degrees.num_devices, dtype)
    except BatonError as error:
        return f"{path}: {error}"
    return ""


class PlannedDevice:
    """As much of a JAX device as `engine_core.resolve` looks at, of a TPU that nobody has bought."""

    platform = "tpu"

    def __init__(self, device_kind: str, bytes_limit: int) -> None:
        self.device_kind = device_kind
        self._bytes_limit = bytes_limit

    def memory_stats(self) -> dict[str, int]:
        """What a program may use."""
        return {"bytes_limit": self._bytes_limit}


def noting(model_config: ModelConfig, notes: list[str]) -> ModelConfig:
    """The same, which asks once for each model (a hub that is away takes its time), and notes what it cannot tell."""

    @functools.cache
    def asked(path: str) -> Path | None:
        directory = model_config(path)
        if directory is None:
            notes.append(f"not known, as the hub does not answer: whether {path} fits")
        return directory

    return asked


def release(image: str) -> str:
    """What an image's tag says of the version: of REGISTRY/baton:0.2-tpu and REGISTRY/baton:0.2-cpu the same."""
    tag = image.rpartition("/")[2].partition(":")[2]
    return "-".join(part for part in tag.split("-") if part not in ("cpu", "tpu"))
