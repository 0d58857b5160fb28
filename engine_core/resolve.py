"""What a configuration means for one checkpoint on these devices. Everything found at run time lives here."""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass, replace
from pathlib import Path

import jax
import msgspec

from engine_core.config import Degrees, EngineConfig
from engine_core.errors import CheckpointError, ConfigError
from engine_core.kernels.paged_attention import TuningKey, check_supported
from engine_core.kv_cache import CacheLayout
from engine_core.mesh import kv_copies
from engine_core.messages import PROTOCOL_VERSION
from engine_core.models.spec import ModelSpec
from engine_core.types import Numerics

_DECODE_BUCKETS = (1, 8, 32, 64, 128, 256, 512)
_SAMPLE_BYTES = 1 << 16


@dataclass(frozen=True, kw_only=True, slots=True)
class ResolvedEngine:
    """Sizes and choices that hold for the life of an engine.

    Attributes:
        dtype: of activations and KV cache.
        stacked: layers are scanned over stacked weights; else unrolled.
        row_shards: parts of the slots and of the cache; a sequence lies on one of them.
        num_slots: S, of all row shards together, as is `layout.num_pages`.
        max_model_len: prompt plus answer, tokens at most.
        pages_per_seq: P.
        decode_buckets: B of each decode step of a row shard, ascending.
        prefill_buckets: T of each prefill step of a row shard, ascending; empty in strict numerics.
        prefill_rows: B of a prefill step of a row shard.
        scored_tokens: prompt tokens of one sequence whose log probabilities one step gives at most.
        fingerprint: workers whose fingerprints differ never exchange KV.
    """

    spec: ModelSpec
    layout: CacheLayout
    dtype: str
    stacked: bool
    numerics: Numerics
    row_shards: int
    num_slots: int
    max_model_len: int
    pages_per_seq: int
    decode_buckets: tuple[int, ...]
    prefill_buckets: tuple[int, ...]
    prefill_rows: int
    scored_tokens: int
    fingerprint: str

    def decode_bucket(self, count: int) -> int:
        """Smallest bucket that holds `count` sequences."""
        return next(b for b in self.decode_buckets if b >= count)

    def prefill_bucket(self, num_tokens: int) -> int:
        """Smallest bucket that holds `num_tokens` tokens."""
        return next(b for b in self.prefill_buckets if b >= num_tokens)


def resolve(
    config: EngineConfig, spec: ModelSpec, identity: str, devices: list[jax.Device], held: str
) -> ResolvedEngine:
    """Derive sizes from the checkpoint and the devices.

    Args:
        config: what the user asked for.
        spec: of the checkpoint.
        identity: names the checkpoint's weights.
        devices: visible to this process, or to all processes of a worker over several hosts.
        held: dtype of matrices, but for experts.

    Raises:
        ConfigError: the configuration contradicts the checkpoint.
        CheckpointError: weights and one sequence's cache do not fit in memory.
    """
    platform = devices[0].platform
    degrees = config.degrees
    if degrees.num_devices > len(devices):
        wanted = f"tp is {degrees.tp}" if degrees.num_devices == degrees.tp else str(degrees)
        raise ConfigError(f"{wanted} but only {len(devices)} device(s) are visible")
    if config.batch.num_slots % degrees.row_shards:
        raise ConfigError(
            f"batch.num_slots is {config.batch.num_slots}, which does not divide over dp {degrees.dp} x "
            f"ep {degrees.ep} row shards"
        )
    max_model_len = config.batch.max_model_len or spec.max_position
    if max_model_len > spec.max_position:
        raise ConfigError(f"batch.max_model_len is {max_model_len}, the model's context is {spec.max_position}")
    dtype = compute_dtype(config.model.dtype, spec, platform)
    cache_dtype = dtype if config.cache.dtype == "auto" else config.cache.dtype
    layout = cache_layout(spec, cache_dtype, config.cache.page_size, platform, degrees.tp)
    pages_per_seq = -(-max_model_len // layout.page_size)
    strict = config.numerics is Numerics.STRICT
    if platform == "tpu":
        if strict:
            raise ConfigError(
                "numerics is strict, which is not supported on TPUs: a strict step holds several rows of one sequence, "
                "and the TPU's decode kernel reads its pages before all of them are written; supported: fast"
            )
        rows = max(config.batch.num_slots // degrees.row_shards, config.batch.prefill_seqs)
        check_attention(spec, layout, dtype, devices[0].device_kind, rows * pages_per_seq)
    num_pages = _num_pages(config, layout, weight_bytes(spec, held, dtype, config.degrees), devices, pages_per_seq)
    layout = replace(layout, num_pages=num_pages)
    return ResolvedEngine(
        spec=spec,
        layout=layout,
        dtype=dtype,
        stacked=config.model.layers == "scan" or (config.model.layers == "auto" and platform != "cpu"),
        numerics=config.numerics,
        row_shards=degrees.row_shards,
        num_slots=config.batch.num_slots,
        max_model_len=max_model_len,
        pages_per_seq=pages_per_seq,
        decode_buckets=(_strict_rows(config),)
        if strict
        else _decode_buckets(config.batch.num_slots // degrees.row_shards),
        prefill_buckets=() if strict else _prefill_buckets(config.batch.prefill_tokens, config.batch.prefill_seqs),
        prefill_rows=config.batch.prefill_seqs,
        scored_tokens=1 if platform == "tpu" else config.batch.num_slots,
        fingerprint=_fingerprint(spec, identity, layout, config.numerics),
    )


def cache_layout(spec: ModelSpec, dtype: str, page_size: int, platform: str, tp: int) -> CacheLayout:
    """The cache of a model on a platform, of one page.

    Args:
        spec: of the checkpoint.
        dtype: of keys and values.
        page_size: tokens per page; 0: the platform's.
        platform: "cpu", "gpu" or "tpu".
        tp: devices that the KV heads, and where they are fewer, copies of them, are split over.
    """
    return CacheLayout(
        num_layers=spec.num_layers,
        num_pages=1,
        page_size=page_size or (128 if platform == "tpu" else 16),
        num_kv_heads=spec.num_kv_heads,
        head_dim=spec.head_dim,
        dtype=dtype,
        head_align=128 if platform == "tpu" else 1,
        tp=tp,
    )


def check_attention(spec: ModelSpec, layout: CacheLayout, dtype: str, device_kind: str, table_entries: int) -> None:
    """Refuse at start what the attention kernels for TPU would refuse at the first request.

    Args:
        spec: of the checkpoint.
        layout: of its cache.
        dtype: of computation.
        device_kind: as JAX names the TPU.
        table_entries: page ids of the largest step.

    Raises:
        ConfigError: naming what is not supported, and what is.
    """
    key = TuningKey(
        op="decode",
        num_heads=max(1, spec.num_heads // layout.tp),
        num_kv_heads=max(1, layout.num_held_heads // layout.tp),
        head_dim=spec.head_dim,
        dtype=dtype,
        cache_dtype=layout.dtype,
        page_size=layout.page_size,
    )
    check_supported(key, device_kind, table_entries)


def compute_dtype(asked: str, spec: ModelSpec, platform: str) -> str:
    """The dtype of computation, and of a cache without one of its own: as asked, or what suits the checkpoint."""
    if asked != "auto":
        return asked
    if platform == "cpu":
        return "float32"
    return "bfloat16" if spec.dtype == "float16" else spec.dtype


def _strict_rows(config: EngineConfig) -> int:
    slots = config.batch.num_slots // config.degrees.row_shards
    if config.batch.strict_rows < slots:
        raise ConfigError(
            f"batch.strict_rows is {config.batch.strict_rows}: strict numerics decode all {slots} sequences of a row "
            f"shard (batch.num_slots={config.batch.num_slots}) in one bucket, so it must be at least that"
        )
    return config.batch.strict_rows


def _decode_buckets(num_slots: int) -> tuple[int, ...]:
    return (*(b for b in _DECODE_BUCKETS if b < num_slots), num_slots)


def _prefill_buckets(num_tokens: int, num_rows: int) -> tuple[int, ...]:
    """The chunk size and two smaller ones for short prompts; all larger than the sequence rows (T > B)."""
    sizes = {num_tokens, num_tokens // 4, num_tokens // 16}
    return tuple(sorted(s for s in sizes if s > num_rows)) or (num_rows + 1,)


def _num_pages(
    config: EngineConfig,
    layout: CacheLayout,
    weights: int,
    devices: list[jax.Device],
    pages_per_seq: int,
) -> int:
    shards = config.degrees.row_shards
    budget = _memory_budget(config, devices, weights)
    asked = config.cache.num_pages
    if asked % shards:
        raise ConfigError(
            f"cache.num_pages is {asked}, which does not divide over dp {config.dp} x ep {config.ep} row shards"
        )
    num_pages = asked or budget // layout.page_bytes // shards * shards
    if num_pages // shards < pages_per_seq:
        place = f"on {shards} row shards " if shards > 1 else ""
        raise CheckpointError(
            f"the model does not fit: weights take {weights / 2**30:.2f} GiB, and the cache has {num_pages} pages "
            f"{place}of {layout.page_size} tokens where one sequence of batch.max_model_len needs {pages_per_seq}; "
            "lower batch.max_model_len, raise cache.num_pages or use more devices"
        )
    if asked and asked * layout.page_bytes + weights > _total_memory(devices):
        raise CheckpointError(
            f"cache.num_pages={asked} takes {asked * layout.page_bytes / 2**30:.2f} GiB beside "
            f"{weights / 2**30:.2f} GiB of weights, more than this machine has"
        )
    return num_pages


def _memory_budget(config: EngineConfig, devices: list[jax.Device], weights: int) -> int:
    """Bytes for the cache over all devices of the replica."""
    if devices[0].platform == "cpu":
        if weights > _total_memory(devices) * config.cache.memory_fraction:
            return 0
        return config.cache.host_bytes
    return max(0, int(_total_memory(devices[: config.degrees.num_devices]) * config.cache.memory_fraction) - weights)


def _total_memory(devices: list[jax.Device]) -> int:
    if devices[0].platform == "cpu":
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    own = devices
    if jax.process_count() > 1:  # other hosts have as much, which cannot be seen from here
        own = [d for d in devices if d in jax.local_devices()]
    return sum(int((d.memory_stats() or {}).get("bytes_limit", 0)) for d in own) * len(devices) // max(1, len(own))


def weight_bytes(spec: ModelSpec, matrices: str, experts: str, degrees: Degrees) -> int:
    """Bytes of all weights over all devices of a replica, copies counted, to within norms and biases.

    Args:
        spec: of the checkpoint.
        matrices: dtype of all but experts.
        experts: theirs.
        degrees: of the replica.
    """
    kv_heads = spec.num_kv_heads * kv_copies(spec.num_kv_heads, degrees.tp)
    attention = spec.hidden_size * spec.head_dim * (2 * spec.num_heads + 2 * kv_heads)
    embedding = spec.vocab_size * spec.hidden_size * (1 if spec.tie_embeddings else 2)
    sparse = 0 if spec.moe is None else sum(spec.moe.layers)
    dense = 3 * (spec.num_layers - sparse) * spec.intermediate_size * spec.hidden_size
    routers = expert_size = 0
    if spec.moe is not None:
        routers = sparse * spec.moe.num_experts * spec.hidden_size
        expert_size = 3 * sparse * spec.moe.num_experts * spec.moe.intermediate_size * spec.hidden_size
    shared = spec.num_layers * attention + dense + routers + embedding  # each row shard has them all
    sizes = {"float32": 4, "bfloat16": 2}
    return shared * degrees.row_shards * sizes[matrices] + expert_size * degrees.dp * sizes[experts]


def _fingerprint(spec: ModelSpec, identity: str, layout: CacheLayout, numerics: Numerics) -> str:
    """Hash of weights, their shape and the logical cache layout. Pool size and packing may differ between workers.

    Page size and dtype too, in fast numerics: KV is converted on its way.
    """
    cache: tuple[object, ...] = (layout.num_kv_heads, layout.head_dim)
    if numerics is Numerics.STRICT:
        cache += (layout.page_size, layout.dtype)
    parts = (msgspec.to_builtins(spec), identity, cache, str(numerics), PROTOCOL_VERSION)
    return hashlib.blake2b(repr(parts).encode(), digest_size=16).hexdigest()


def checkpoint_identity(model_dir: Path) -> str:
    """Names a checkpoint by its config and each weight file's size and samples of its bytes.

    Cheap, and enough to tell two checkpoints of one shape apart.
    """
    digest = hashlib.blake2b((model_dir / "config.json").read_bytes(), digest_size=16)
    for path in sorted(model_dir.glob("*.safetensors")):
        with path.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            digest.update(f"{path.name} {size}".encode())
            for start in (0, size // 2, max(0, size - _SAMPLE_BYTES)):
                file.seek(start)
                digest.update(file.read(_SAMPLE_BYTES))
    return digest.hexdigest()
