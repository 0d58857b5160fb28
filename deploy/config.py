"""Configuration of a whole deployment: `baton serve` reads defaults < TOML file < flags into a `ServeConfig`."""

from __future__ import annotations

from dataclasses import dataclass, field

from engine_core.config import EngineConfig
from engine_core.errors import ConfigError
from engine_core.types import Role
from router.config import GatewayConfig

NODE = "node"  # `fleet.host`: the address of the machine a worker runs on
DEMO = "demo"  # name of the embedded model


@dataclass(frozen=True, kw_only=True, slots=True)
class FleetConfig:
    """How many workers, where, and how their health is watched."""

    prefill: int = 1  # prefill workers
    decode: int = 1  # decode workers
    colocated: bool = False  # no prefill workers: decode workers read the prompts themselves
    gateways: int = 1  # HTTP servers; those of one machine share its port
    host: str = "127.0.0.1"  # where workers listen for gateways and each other; "node": at their machine's address
    pool_resources: bool = False  # each process takes one Ray resource baton-gateway, baton-prefill or baton-decode
    pin_cores: bool = False  # give each worker its own CPU cores, prefill workers first (for benchmarks)
    gpus_per_worker: float = 0.0  # GPUs that Ray reserves for each worker
    tpus_per_worker: float = 0.0  # TPU chips that Ray reserves for each worker
    start_attempts: int = 3  # lives a worker may lose before its first start-up counts as failed
    health_interval_s: float = 0.5  # between two looks at a worker
    health_timeout_s: float = 10.0  # a ready worker that is silent for so long is replaced
    backoff_s: float = 0.5  # before a dead worker's next life; doubles with each early death
    max_backoff_s: float = 30.0
    drain_timeout_s: float = 20.0  # time for running requests to finish when a worker leaves

    def __post_init__(self) -> None:
        """Refuse what can never work."""
        if self.prefill < 0:
            raise ConfigError(f"fleet.prefill must not be negative, not {self.prefill}")
        for name in ("decode", "gateways", "start_attempts"):
            if getattr(self, name) < 1:
                raise ConfigError(f"fleet.{name} must be at least 1, not {getattr(self, name)}")
        for name, seconds in (
            ("health_interval_s", self.health_interval_s),
            ("health_timeout_s", self.health_timeout_s),
            ("backoff_s", self.backoff_s),
            ("max_backoff_s", self.max_backoff_s),
        ):
            if seconds <= 0:
                raise ConfigError(f"fleet.{name} must be positive, not {seconds}")
        if self.drain_timeout_s < 0:
            raise ConfigError(f"fleet.drain_timeout_s must not be negative, not {self.drain_timeout_s}")

    def count(self, role: Role) -> int:
        """Workers of a role at start."""
        if role is Role.PREFILL:
            return 0 if self.colocated else self.prefill
        return self.decode


@dataclass(frozen=True, kw_only=True, slots=True)
class ServeConfig:
    """Everything `baton serve` needs."""

    engine: EngineConfig = field(default_factory=EngineConfig)
    fleet: FleetConfig = field(default_factory=FleetConfig)
    gateway: GatewayConfig = field(default_factory=GatewayConfig)
    log_dir: str = ""  # directory for logs; empty: a temporary one, removed after a clean stop
