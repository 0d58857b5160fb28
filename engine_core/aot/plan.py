"""Will a model fit on a slice, and how fast can it be? Answered by compiling its real steps for that slice."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

from engine_core.aot import model_load
from engine_core.aot.compiler import describe_devices
from engine_core.aot.roofline import ASSUMED, PEAK, StepLoad, step_seconds
from engine_core.aot.split import AskedDegrees, choose_splits
from engine_core.aot.step_compile import CompiledStep, OutOfMemory, StepCompiler, StepSizes
from engine_core.aot.topology import Topology, find_topology, topologies
from engine_core.config import Degrees
from engine_core.errors import ConfigError
from engine_core.kv_cache import CacheLayout
from engine_core.layers.linear import choose_numbers
from engine_core.layers.moe import choose_experts
from engine_core.mesh import make_mesh
from engine_core.models.decoder import Decoder
from engine_core.models.registry import spec_from_config
from engine_core.models.spec import ModelSpec
from engine_core.resolve import cache_layout, check_attention, compute_dtype
from engine_core.types import Role

_GIB = 2**30
_SLOT_BYTES = 5  # per slot and vocabulary entry: counts (i32) and a flag, on every device
Progress = Callable[[str], None]


@dataclass(frozen=True, kw_only=True, slots=True)
class PlanRequest:
    """What is asked.

    Attributes:
        config: the model's config.json.
        topology: name of the slice.
        roles: what its workers do; both: colocated.
        max_batch: sequences decoding at once.
        context: prompt plus answer, tokens at most; 0: the model's own.
        prefill_tokens: tokens of one prefill step, of each row shard.
        prefill_rows: sequences packed into one prefill step, of each row shard.
        memory_fraction: of HBM, for weights and cache together.
        tp, ep, dp: how the model is to be split; None: as suits.
    """

    config: Mapping[str, Any]
    topology: str
    roles: tuple[Role, ...]
    max_batch: int
    context: int
    prefill_tokens: int
    prefill_rows: int
    memory_fraction: float
    tp: int | None = None
    ep: int | None = None
    dp: int | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class _Fit:
    """How a model lies on one slice. Bytes are per device.

    Attributes:
        short_bytes: missing; 0 where it fits.
        steps: compiled with `layout`'s cache; empty where it does not fit.
    """

    topology: Topology
    model: Decoder
    layout: CacheLayout
    sizes: StepSizes
    weight_bytes: int
    short_bytes: int
    reason: str
    steps: dict[Role, CompiledStep]

    @property
    def page_bytes(self) -> int:
        return self.layout.page_bytes // self.model.degrees.tp

    @property
    def kv_bytes(self) -> int:
        return self.layout.num_pages // self.row_shards * self.page_bytes

    @property
    def slot_bytes(self) -> int:
        return _SLOT_BYTES * self.sizes.num_slots // self.row_shards * self.model.spec.vocab_size

    @property
    def row_shards(self) -> int:
        return self.model.degrees.row_shards

    @property
    def num_sequences(self) -> int:
        """Of `pages_per_seq` pages, that the cache holds at once."""
        return self.layout.num_pages // self.row_shards // self.sizes.pages_per_seq * self.row_shards

    @property
    def workspace_bytes(self) -> int:
        return max((step.workspace_bytes for step in self.steps.values()), default=0)


def make_plan(request: PlanRequest, progress: Progress) -> dict[str, Any]:
    """Compile the steps of a model for a slice and judge them.

    Returns:
        Plain JSON: `fits`, `split`, `hbm_gib` (per device), `kv_tokens`, `concurrent_sequences`, `decode_itl_ms`,
        `prefill_tokens_per_s`, `collectives`, `steps`, `assumptions`; `suggestion`, the smallest slice that fits, where
        this one does not.

    Raises:
        ConfigError: an unknown slice, an unsupported model, or sizes that no slice could have.
    """
    spec = spec_from_config(request.config, {})
    context = request.context or spec.max_position
    if context > spec.max_position:
        raise ConfigError(f"--context {context}: the model's context is {spec.max_position}")
    request = replace(request, context=context)
    fit = _fit(spec, find_topology(request.topology), request, progress)
    suggestion = None if fit.steps else _smallest(spec, fit.topology, request, progress)
    return _report(fit, request) | {"suggestion": suggestion}


def _fit(spec: ModelSpec, topology: Topology, request: PlanRequest, progress: Progress) -> _Fit:
    """The first split that fits, or the one that lacks least."""
    asked = AskedDegrees(request.tp, request.ep, request.dp)
    try:
        splits = choose_splits(spec.num_kv_heads, topology.num_devices, asked, partial(_build, spec))
    except ConfigError as error:
        raise ConfigError(f"--topology {topology.name} has {topology.num_devices} devices: {error}") from None
    fits = []
    for degrees in splits:
        fits.append(_fit_model(_build(spec, degrees), topology, request, progress))
        if fits[-1].steps:
            return fits[-1]
    return min(fits, key=lambda fit: fit.short_bytes)


def _build(spec: ModelSpec, degrees: Degrees) -> Decoder:
    numbers = choose_numbers(compute_dtype("auto", spec, "tpu"), "tpu")
    return Decoder(spec, numbers, degrees=degrees, experts=choose_experts("auto", numbers.compute, "tpu"), scan=True)


def _fit_model(model: Decoder, topology: Topology, request: PlanRequest, progress: Progress) -> _Fit:
    devices = describe_devices(topology)
    shards = model.degrees.row_shards
    layout = cache_layout(model.spec, model.numbers.compute, 0, "tpu", model.degrees.tp)
    sizes = StepSizes(
        num_slots=-(-request.max_batch // shards) * shards,
        pages_per_seq=-(-request.context // layout.page_size),
        prefill_tokens=request.prefill_tokens,
        prefill_rows=request.prefill_rows,
    )
    rows = max(sizes.num_slots // shards, sizes.prefill_rows)
    check_attention(model.spec, layout, model.numbers.compute, devices[0].device_kind, rows * sizes.pages_per_seq)
    weights = model_load.weight_bytes(model)
    fit = _Fit(
        topology=topology,
        model=model,
        layout=layout,
        sizes=sizes,
        weight_bytes=weights,
        short_bytes=0,
        reason="",
        steps={},
    )
    room = int(topology.generation.hbm_bytes * request.memory_fraction) - weights
    num_pages = room // fit.page_bytes  # of one row shard
    if num_pages < sizes.pages_per_seq:
        reason = f"weights and the cache of one sequence of {request.context} tokens exceed the HBM of a device"
        return replace(fit, short_bytes=sizes.pages_per_seq * fit.page_bytes - room, reason=reason)
    while num_pages >= sizes.pages_per_seq:
        held = replace(fit, layout=replace(layout, num_pages=num_pages * shards))
        try:
            return replace(held, steps=_compile(held, devices, request, progress))
        except OutOfMemory as error:
            progress(
                f"{num_pages * shards * layout.page_size} tokens of KV leave too little workspace; trying with less"
            )
            words = str(error)
            num_pages = num_pages * 3 // 4
    needed = sizes.pages_per_seq * fit.page_bytes
    return replace(fit, short_bytes=max(needed - room, 1), reason=f"the steps' workspace does not fit: {words}")


def _compile(fit: _Fit, devices: list[Any], request: PlanRequest, progress: Progress) -> dict[Role, CompiledStep]:
    compiler = StepCompiler(fit.model, make_mesh(fit.model.degrees, devices), fit.layout, fit.sizes)
    compile_role = {Role.PREFILL: compiler.prefill, Role.DECODE: compiler.decode}
    steps = {}
    for role in request.roles:
        progress(f"compiling the {role.value} step for {fit.topology.name}, {fit.model.degrees}")
        steps[role] = compile_role[role]()
    return steps


def _smallest(spec: ModelSpec, failed: Topology, request: PlanRequest, progress: Progress) -> str | None:
    """The smallest slice that fits: of the same generation if there is one, else of any."""
    same = [one for one in topologies() if one.generation == failed.generation and one.num_chips > failed.num_chips]
    others = [one for one in topologies() if one.generation != failed.generation]
    others.sort(key=lambda one: one.num_devices * one.generation.hbm_bytes)
    for candidate in [*same, *others]:
        try:
            if _fit(spec, candidate, request, progress).steps:
                return candidate.name
        except ConfigError:  # the model cannot be split over that many devices
            continue
    return None


def _report(fit: _Fit, request: PlanRequest) -> dict[str, Any]:
    topology, spec = fit.topology, fit.model.spec
    kv_tokens = fit.layout.num_pages * fit.layout.page_size if fit.steps else 0
    concurrent = fit.num_sequences if fit.steps else 0
    batch = min(request.max_batch, concurrent)
    loads = {
        Role.PREFILL: model_load.prefill_load(fit.model, fit.layout, request.prefill_tokens, request.context),
        Role.DECODE: model_load.decode_load(fit.model, fit.layout, -(-batch // fit.row_shards), request.context),
    }
    steps = {role.value: _describe_step(fit, step, loads[role]) for role, step in fit.steps.items()}
    decode, prefill = steps.get(Role.DECODE.value), steps.get(Role.PREFILL.value)
    chunk = min(request.prefill_tokens, request.context)
    step_tokens = chunk * fit.row_shards
    degrees = fit.model.degrees
    return {
        "fits": bool(fit.steps),
        "reason": fit.reason,
        "short_gib": _gib(fit.short_bytes),
        "topology": {
            "name": topology.name,
            "chips": topology.num_chips,
            "devices": topology.num_devices,
        },
        "split": {"tp": degrees.tp, "ep": degrees.ep, "dp": degrees.dp},
        "model": {
            "architecture": spec.architecture,
            "parameters": model_load.num_parameters(fit.model),
            "dtype": fit.layout.dtype,
        },
        "hbm_gib": {
            "limit": _gib(topology.generation.hbm_bytes),
            "weights": _gib(fit.weight_bytes),
            "kv": _gib(fit.kv_bytes if fit.steps else 0),
            "slots": _gib(fit.slot_bytes),
            "workspace": _gib(fit.workspace_bytes),
        },
        "page_size": fit.layout.page_size,
        "kv_tokens": kv_tokens,
        "max_batch": request.max_batch,
        "context": request.context,
        "concurrent_sequences": concurrent,
        "estimated_batch": batch,
        "decode_itl_ms": decode and decode["estimate_ms"],
        "decode_tokens_per_s": decode and round(1e3 * batch / decode["estimate_ms"], 1),
        "prefill_tokens_per_s": prefill and round(1e3 * step_tokens / prefill["estimate_ms"], 1),
        "collectives": {role: step["collectives"] for role, step in steps.items()},
        "steps": steps,
        "assumptions": {
            **asdict(ASSUMED),
            "memory_fraction": request.memory_fraction,
            "prefill_chunk_tokens": chunk,
            "prefill_step_tokens": step_tokens,
        },
    }


def _describe_step(fit: _Fit, step: CompiledStep, load: StepLoad) -> dict[str, Any]:
    seconds = {
        name: step_seconds(load, step.collectives, fit.topology, fit.model.numbers.compute, assumed)
        for name, assumed in (("estimate_ms", ASSUMED), ("bound_ms", PEAK))
    }
    return {
        **{name: round(1e3 * value, 3) for name, value in seconds.items()},
        "flops": load.matmul_flops + load.attention_flops,
        "hbm_bytes": load.weight_bytes + load.kv_bytes,
        "temp_gib": _gib(step.temp_bytes),
        "layer_kv_gib": _gib(fit.kv_bytes // fit.model.spec.num_layers),
        "compile_s": round(step.compile_s, 1),
        "collectives": {kind: asdict(one) for kind, one in step.collectives.items()},
    }


def _gib(num_bytes: int) -> float:
    return round(num_bytes / _GIB, 3)
