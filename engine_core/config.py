"""Configuration of an engine: composed frozen dataclasses, the only place with defaults.

What is found at run time (free memory, the checkpoint's context length) is never written back here:
`engine_core.engine.resolve` derives it.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from engine_core.errors import ConfigError
from engine_core.types import Numerics

MIN_ARENA_BYTES = 16 << 20  # room for a few frames


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelConfig:
    """Which checkpoint, and how to hold it."""

    path: str = "demo"  # directory, hub id, or "demo" for the embedded model
    revision: str = ""  # of a hub id; empty: the default branch
    dtype: str = (
        "auto"  # auto | float32 | bfloat16; auto: the checkpoint's on TPU and GPU, the fastest exact one on CPU
    )
    experts: str = "auto"  # auto | grouped | fused: MoE by grouped products of sorted rows, or all experts on every row
    cpu_kernels: str = "auto"  # auto | xla | compiled: products and attention on a CPU; auto: compiled for large models
    layers: str = "auto"  # auto | scan | unroll; auto: scan on TPU and GPU, unroll on CPU


@dataclass(frozen=True, kw_only=True, slots=True)
class CacheConfig:
    """The paged KV cache."""

    dtype: str = "auto"  # auto (that of computation) | float8_e4m3fn (in units of each head, see `baton calibrate`)
    page_size: int = 0  # tokens per page; 0: 128 on TPU, 16 elsewhere
    num_pages: int = 0  # on all row shards together; 0: as many as `memory_fraction` holds
    memory_fraction: float = 0.85  # of the accelerator's memory for weights and cache together
    host_bytes: int = 1 << 30  # cache bytes where the device is a CPU and num_pages is 0


@dataclass(frozen=True, kw_only=True, slots=True)
class BatchConfig:
    """Static sizes: each bucket is compiled at warm-up, nothing later."""

    num_slots: int = 32  # sequences decoding at once, on all row shards (dp x ep) together
    max_model_len: int = 0  # prompt plus answer, tokens; 0: the model's own
    prefill_tokens: int = 512  # tokens of one prefill chunk, of each row shard
    prefill_seqs: int = 4  # sequences packed into one prefill step, of each row shard
    strict_rows: int = 32  # the single bucket of strict numerics


@dataclass(frozen=True, kw_only=True, slots=True)
class Degrees:
    """In how many parts one model replica is split; it takes their product of devices."""

    tp: int = 1
    ep: int = 1
    dp: int = 1

    @property
    def num_devices(self) -> int:
        """Devices of the replica."""
        return self.dp * self.ep * self.tp

    @property
    def row_shards(self) -> int:
        """Parts into which the rows of a batch, the slots and the cache's pages are split."""
        return self.dp * self.ep

    def __str__(self) -> str:
        return f"dp {self.dp} x ep {self.ep} x tp {self.tp}"


@dataclass(frozen=True, kw_only=True, slots=True)
class TransferConfig:
    """KV on its way from prefill to decode workers."""

    transport: str = "auto"  # auto | shared_memory | tcp; auto: shared memory where both ends can map it
    connections: int = 2  # of each pair of workers on different hosts
    arena_bytes: int = (
        256 << 20
    )  # memory for KV under way: of a prefill worker, and of a decode worker per prefill worker (over TCP a third more)
    encrypt: bool = False  # AES-GCM over all that leaves the host; either end of a pair can ask for it

    def __post_init__(self) -> None:
        """Refuse what can never work."""
        if self.transport == "device":
            raise ConfigError(
                "transfer.transport device is not for workers yet: their blocks lie on the host; see docs/adr/0013"
            )
        if self.transport not in ("auto", "shared_memory", "tcp"):
            raise ConfigError(f"transfer.transport must be auto, shared_memory or tcp, not {self.transport!r}")
        if self.connections < 1:
            raise ConfigError(f"transfer.connections must be at least 1, not {self.connections}")
        if self.arena_bytes < MIN_ARENA_BYTES:
            raise ConfigError(f"transfer.arena_bytes must be at least {MIN_ARENA_BYTES}, not {self.arena_bytes}")


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineConfig:
    """Everything one model replica needs."""

    model: ModelConfig = field(default_factory=ModelConfig)
    cache: CacheConfig = field(default_factory=CacheConfig)
    batch: BatchConfig = field(default_factory=BatchConfig)
    transfer: TransferConfig = field(default_factory=TransferConfig)
    tp: int = 1  # tensor-parallel degree: heads, ffw columns, vocabulary
    ep: int = 1  # expert-parallel degree: experts, and sequences outside them
    dp: int = 1  # data-parallel degree: sequences; experts are shared by all of its ranks' sequences
    numerics: Numerics = Numerics.FAST
    prefix_cache: bool = True
    step_timeout_s: float = 30.0  # a step that takes longer hangs: the worker is replaced
    compile_cache: str = "~/.cache/baton/xla"  # persistent compilation cache; empty: off

    def __post_init__(self) -> None:
        """Refuse what can never work."""
        for name, choice, first, second in (
            ("dtype", self.model.dtype, "float32", "bfloat16"),
            ("layers", self.model.layers, "scan", "unroll"),
            ("experts", self.model.experts, "grouped", "fused"),
            ("cpu_kernels", self.model.cpu_kernels, "xla", "compiled"),
        ):
            if choice not in ("auto", first, second):
                raise ConfigError(f"model.{name} must be auto, {first} or {second}, not {choice!r}")
        if self.cache.dtype not in ("auto", "float8_e4m3fn"):
            raise ConfigError(f"cache.dtype must be auto or float8_e4m3fn, not {self.cache.dtype!r}")
        if self.step_timeout_s <= 0:
            raise ConfigError(f"step_timeout_s must be positive, not {self.step_timeout_s}")
        if not 0 < self.cache.memory_fraction <= 1:
            raise ConfigError(f"cache.memory_fraction must be in (0, 1], not {self.cache.memory_fraction}")
        for name, value in (
            ("tp", self.tp),
            ("ep", self.ep),
            ("dp", self.dp),
            ("batch.num_slots", self.batch.num_slots),
            ("batch.prefill_tokens", self.batch.prefill_tokens),
            ("batch.prefill_seqs", self.batch.prefill_seqs),
            ("batch.strict_rows", self.batch.strict_rows),
        ):
            if value < 1:
                raise ConfigError(f"{name} must be at least 1, not {value}")
        for name, value in (
            ("cache.page_size", self.cache.page_size),
            ("cache.num_pages", self.cache.num_pages),
            ("batch.max_model_len", self.batch.max_model_len),
        ):
            if value < 0:
                raise ConfigError(f"{name} must not be negative, not {value}")

    @property
    def degrees(self) -> Degrees:
        """In how many parts the replica is split."""
        return Degrees(tp=self.tp, ep=self.ep, dp=self.dp)
