"""Opens a replica: checkpoint to compiled buckets and, in strict numerics, the proof."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import jax

from engine_core.batch import BatchBuilder
from engine_core.config import EngineConfig
from engine_core.cpu_kernels import open_numbers
from engine_core.device_memory import device_memory
from engine_core.engine import Engine
from engine_core.errors import CheckpointError, ConfigError
from engine_core.follower import Exports, Follower
from engine_core.host_commands import Begin, Followers
from engine_core.mesh import replica_devices
from engine_core.models.registry import load_spec
from engine_core.platform_choice import choose_platforms
from engine_core.replica import Replica
from engine_core.resolve import checkpoint_identity, compute_dtype, resolve
from engine_core.sequence_memory import BlockUnion, SequenceMemory, split_memory
from engine_core.step_io import StepInputs
from engine_core.strict import prove
from engine_core.types import Numerics
from engine_core.worker_stats import StatsRecorder


def open_replica(
    config: EngineConfig,
    model_dir: Path,
    progress: Callable[[str], None],
    *,
    decodes: bool,
    followers: Followers | None = None,
) -> Replica:
    """Load a checkpoint and compile every bucket.

    Args:
        config: what the user asked for.
        model_dir: the checkpoint.
        progress: told short sentences on the way.
        decodes: compile the decode buckets; prefill workers have no use for them.
        followers: the other hosts, where this is the first of several; `jax.distributed` is initialized.

    Raises:
        ConfigError, CheckpointError: it cannot work.
        WorkerDied: one of the other hosts is gone.
    """
    replica = _load(config, model_dir, progress, followers)
    replica.engine.warm_up(buckets(replica, decodes=decodes), progress)
    if replica.resolved.numerics is not Numerics.STRICT:
        return replica
    progress("proving strict numerics")
    return dataclasses.replace(replica, identity=f"{replica.identity}-{prove(replica)}")


def open_follower(
    config: EngineConfig,
    model_dir: Path,
    progress: Callable[[str], None],
    *,
    decodes: bool,
    begin: Begin,
    exports: Exports | None,
) -> Follower:
    """Load a checkpoint as one of the other hosts of a worker; what to compile is the leader's to say.

    Args:
        decodes: as the leader's.
        begin: the leader's.
        exports: where KV heads that the leader lets go of are handed over; None on a decode worker.

    Raises:
        ConfigError, CheckpointError: it cannot work, or the checkpoint is not the leader's.
    """
    config = dataclasses.replace(config, cache=dataclasses.replace(config.cache, num_pages=begin.num_pages))
    replica = _load(config, model_dir, progress, None)
    if replica.identity != begin.fingerprint:
        raise CheckpointError(f"{model_dir} on this host is not the checkpoint of the worker's first host")
    return Follower(replica.engine, [inputs for _, inputs in buckets(replica, decodes=decodes)], exports)


def _load(
    config: EngineConfig, model_dir: Path, progress: Callable[[str], None], followers: Followers | None
) -> Replica:
    choose_platforms()
    use_compile_cache(config.compile_cache)
    if jax.process_count() > 1 and config.numerics is Numerics.STRICT:
        raise ConfigError("numerics is strict: its proof compares all KV, which no host of a worker over several has")
    progress("reading the checkpoint")
    devices = replica_devices(config.degrees) if jax.process_count() > 1 else jax.local_devices()
    spec, identity = load_spec(model_dir), checkpoint_identity(model_dir)
    dtype = compute_dtype(config.model.dtype, spec, devices[0].platform)
    numbers = open_numbers(config, dtype, devices[0].platform, model_dir, progress)
    resolved = resolve(config, spec, identity, devices, numbers.weight)
    if followers is not None:
        followers.begin(Begin(resolved.layout.num_pages, resolved.fingerprint))
    engine = Engine(config, resolved, numbers, model_dir, progress, followers)
    if followers is not None:
        progress("waiting for the other hosts")
        followers.wait_ready()
    shards = split_memory(
        resolved.row_shards,
        num_pages=resolved.layout.num_pages,
        page_size=resolved.layout.page_size,
        num_slots=resolved.num_slots,
        pages_per_seq=resolved.pages_per_seq,
        vocab_size=resolved.spec.vocab_size,
    )
    namespace = bytes.fromhex(resolved.fingerprint)
    tables = [shard.table for shard in shards]
    builder = BatchBuilder(tables) if engine.shards is None else BatchBuilder(tables, place=lambda sampling: sampling)
    return Replica(
        engine=engine,
        memory=SequenceMemory(shards, resolved.layout.page_size, namespace, reuse=config.prefix_cache),
        blocks=BlockUnion([shard.cache for shard in shards]),
        builder=builder,
        identity=resolved.fingerprint,
        stats=StatsRecorder(lambda: device_memory(jax.local_devices()[: config.degrees.num_devices])),
    )


def use_compile_cache(path: str) -> None:
    """Switch on JAX's persistent compilation cache, for small programs too. An empty path leaves it off."""
    if not path:
        return
    directory = Path(path).expanduser()
    directory.mkdir(parents=True, exist_ok=True)
    jax.config.update("jax_compilation_cache_dir", str(directory))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


def buckets(replica: Replica, *, decodes: bool) -> list[tuple[str, StepInputs]]:
    """Name and neutral inputs of each.

    Decode first: meanwhile a prefill worker that starts beside puts the others into the compilation cache.
    """
    resolved = replica.resolved
    builder = replica.builder
    found = []
    if decodes or resolved.numerics is Numerics.STRICT:
        found += [(f"decode of {size} sequences", builder.decode((), size).inputs) for size in resolved.decode_buckets]
    found += [
        (f"prefill of {size} tokens", builder.prefill((), size, resolved.prefill_rows).inputs)
        for size in resolved.prefill_buckets
    ]
    return found
