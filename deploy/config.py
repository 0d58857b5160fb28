"""Configuration of a whole deployment: `baton serve` reads defaults < TOML file < flags into a `ServeConfig`."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field, replace
from enum import StrEnum

from engine_core.config import EngineConfig
from engine_core.errors import ConfigError
from engine_core.types import Numerics, Role
from router.config import GatewayConfig
from router.planner import PlannerConfig

NODE = "node"  # `fleet.host`: the address of the machine a worker runs on
DEVICES_PER_CHIP = {"v7x": 2, "tpu7x": 2}  # as JAX counts them, where it is more than one
DEMO = "demo"  # name of the embedded model


@dataclass(frozen=True, kw_only=True, slots=True)
class FleetConfig:
    """How many workers, where, and how their health is watched."""

    prefill: int = 1  # prefill workers
    decode: int = 1  # decode workers
    colocated: bool = False  # no prefill workers: decode workers read the prompts themselves
    gateways: int = 1  # HTTP servers; those of one machine share its port
    max_gateways: int = 0  # up to so many, as the choices in progress grow; 0: always `gateways`
    streams_per_gateway: int = 500  # choices in progress that one gateway shall carry, where max_gateways is set
    host: str = "127.0.0.1"  # where workers listen for gateways and each other; "node": at their machine's address
    pool_resources: bool = False  # each process takes one Ray resource baton-gateway, baton-prefill or baton-decode
    pin_cores: bool = False  # give each worker its own CPU cores, prefill workers first (for benchmarks)
    gpus_per_worker: float = 0.0  # GPUs that Ray reserves for each worker
    tpus_per_worker: float = 0.0  # TPU chips that Ray reserves for each worker
    hosts_per_worker: int = 1  # machines that one worker spans, each with an equal share of its devices
    topology: str = ""  # TPU slice of a worker over several machines, such as 4x4
    accelerator: str = ""  # and its generation, such as v6e
    prefill_hosts: int = 0  # hosts_per_worker of prefill workers; 0: the same
    prefill_tp: int = 0  # engine.tp of prefill workers; 0: the same
    prefill_tpus: float = 0.0  # tpus_per_worker of prefill workers; 0: the same
    prefill_topology: str = ""  # topology of prefill workers; empty: the same
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
        for name in ("decode", "gateways", "streams_per_gateway", "start_attempts", "hosts_per_worker"):
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
        if self.max_gateways and self.max_gateways < self.gateways:
            raise ConfigError(f"fleet.max_gateways must be 0 or at least fleet.gateways, not {self.max_gateways}")
        for name in ("prefill_hosts", "prefill_tp", "prefill_tpus"):
            if getattr(self, name) < 0:
                raise ConfigError(f"fleet.{name} must not be negative, not {getattr(self, name)}")
        if self.drain_timeout_s < 0:
            raise ConfigError(f"fleet.drain_timeout_s must not be negative, not {self.drain_timeout_s}")

    def count(self, role: Role) -> int:
        """Workers of a role at start."""
        if role is Role.PREFILL:
            return 0 if self.colocated else self.prefill
        return self.decode


@dataclass(frozen=True, kw_only=True, slots=True)
class WorkerShape:
    """What one worker of a role takes: of all its machines together.

    Attributes:
        engine: of the role.
        hosts: machines.
        gpus, tpus: that Ray reserves.
        topology, accelerator: of the TPU slice, where there are several machines with TPUs.
        pool: Ray resource that each machine's part takes one of; empty: none.
    """

    engine: EngineConfig
    hosts: int
    gpus: float
    tpus: float
    topology: str
    accelerator: str
    pool: str

    @property
    def chips_per_host(self) -> int:
        """TPU chips of each machine: what is reserved, and at least what the engine needs."""
        per_chip = DEVICES_PER_CHIP.get(self.accelerator, 1)
        return max(int(self.tpus), self.engine.degrees.num_devices // per_chip) // self.hosts


class AutoscaleMode(StrEnum):
    """What the planner may do."""

    OFF = "off"
    ADVISE = "advise"  # say what it would do
    ACT = "act"


@dataclass(frozen=True, kw_only=True, slots=True)
class AutoscaleConfig:
    """How pools grow and shrink by themselves; `router.planner` decides, by the gateway's objectives."""

    mode: AutoscaleMode = AutoscaleMode.OFF  # advise: only say what it would do
    min_prefill: int = 1  # prefill workers at least
    max_prefill: int = 4  # and at most
    min_decode: int = 1  # decode workers at least
    max_decode: int = 4  # and at most
    budget: int = 8  # workers in all, without those that drain
    attainment: float = 0.95  # share of requests that shall meet each objective
    window_s: float = 15.0  # the load is looked at so often
    start_s: float = 180.0  # from the order of a worker until it serves: its node, weights, compilation
    cooldown_s: float = 0.0  # between two changes of a pool; 0: as start_s
    flip_s: float = 0.0  # how long a worker takes to change its role; 0: none does
    node_timeout_s: float = 900.0  # a worker without a node for so long is given up, and for as long not asked for

    def __post_init__(self) -> None:
        """Refuse what can never work."""
        for name in ("window_s", "start_s", "node_timeout_s"):
            if getattr(self, name) <= 0:
                raise ConfigError(f"autoscale.{name} must be positive, not {getattr(self, name)}")
        if self.flip_s < 0:
            raise ConfigError(f"autoscale.flip_s must not be negative, not {self.flip_s}")
        if self.min_prefill < 1:
            raise ConfigError(f"autoscale.min_prefill must be at least 1, not {self.min_prefill}")
        try:
            self.planner(ttft_s=1.0, itl_s=1.0, local_share=0.0)
        except ConfigError as error:
            raise ConfigError(f"autoscale.{error}") from None

    def planner(self, *, ttft_s: float, itl_s: float, local_share: float) -> PlannerConfig:
        """The planner's configuration for these objectives."""
        return PlannerConfig(
            ttft_s=ttft_s,
            itl_s=itl_s,
            start_s=self.start_s,
            cooldown_s=self.cooldown_s or self.start_s,
            min_prefill=self.min_prefill,
            max_prefill=self.max_prefill,
            min_decode=self.min_decode,
            max_decode=self.max_decode,
            budget=self.budget,
            attainment=self.attainment,
            window_s=self.window_s,
            flip_s=self.flip_s,
            cold_s=min(30.0, self.start_s),
            local_share=local_share,
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class ServeConfig:
    """Everything `baton serve` needs."""

    engine: EngineConfig = field(default_factory=EngineConfig)
    fleet: FleetConfig = field(default_factory=FleetConfig)
    gateway: GatewayConfig = field(default_factory=GatewayConfig)
    autoscale: AutoscaleConfig = field(default_factory=AutoscaleConfig)
    log_dir: str = ""  # directory for logs; empty: a temporary one, removed after a clean stop

    def __post_init__(self) -> None:
        """Refuse what only the sections together make impossible."""
        for role in Role:
            if self.fleet.count(role):
                _check_hosts(self, role)
        if self.autoscale.mode is AutoscaleMode.OFF:
            return
        if self.fleet.count(Role.PREFILL) == 0:
            raise ConfigError("autoscale.mode needs prefill workers, and this fleet has none")
        for role in Role:
            count = self.fleet.count(role)
            least, most = getattr(self.autoscale, f"min_{role}"), getattr(self.autoscale, f"max_{role}")
            if not least <= count <= most:
                raise ConfigError(f"fleet.{role} must be in autoscale's {least}..{most}, not {count}")
        if sum(self.fleet.count(role) for role in Role) > self.autoscale.budget:
            raise ConfigError(f"fleet.prefill + fleet.decode must be at most autoscale.budget, {self.autoscale.budget}")

    def shape(self, role: Role) -> WorkerShape:
        """What a worker of a role takes."""
        fleet, engine = self.fleet, self.engine
        prefills = role is Role.PREFILL
        return WorkerShape(
            engine=replace(engine, tp=fleet.prefill_tp) if prefills and fleet.prefill_tp else engine,
            hosts=(fleet.prefill_hosts if prefills else 0) or fleet.hosts_per_worker,
            gpus=fleet.gpus_per_worker,
            tpus=(fleet.prefill_tpus if prefills else 0) or fleet.tpus_per_worker,
            topology=(fleet.prefill_topology if prefills else "") or fleet.topology,
            accelerator=fleet.accelerator,
            pool=f"baton-{role}" if fleet.pool_resources else "",
        )

    def planner(self) -> PlannerConfig:
        """How the autoscaler plans: by the gateway's objectives."""
        gateway = self.gateway
        share = 0.0 if gateway.local_prefill_tokens == 0 else 0.8
        return self.autoscale.planner(ttft_s=gateway.slo_ttft_s, itl_s=gateway.slo_itl_s, local_share=share)


def _check_hosts(config: ServeConfig, role: Role) -> None:
    """Refuse a worker over several machines that cannot be."""
    shape = config.shape(role)
    fleet = config.fleet
    own = role is Role.PREFILL and fleet.prefill_hosts
    field_name = "fleet.prefill_hosts" if own else "fleet.hosts_per_worker"
    if shape.hosts == 1:
        return
    if shape.engine.degrees.num_devices % shape.hosts:
        raise ConfigError(f"{field_name} is {shape.hosts}, which does not divide {shape.engine.degrees} devices")
    if shape.engine.numerics is Numerics.STRICT:
        raise ConfigError(f"engine.numerics is strict, which no worker over several machines can prove ({field_name})")
    if fleet.pin_cores:
        raise ConfigError(f"fleet.pin_cores shares one machine's cores, {field_name} is {shape.hosts}")
    for name, count in (("gpus_per_worker", shape.gpus), ("tpus_per_worker", shape.tpus)):
        if count % shape.hosts:
            raise ConfigError(f"{field_name} is {shape.hosts}, which does not divide fleet.{name} {count:g}")
    _check_slice(shape, field_name)
    if config.autoscale.flip_s and config.shape(Role.PREFILL).hosts != config.shape(Role.DECODE).hosts:
        raise ConfigError("autoscale.flip_s is set, but prefill and decode workers span unlike numbers of machines")


def _check_slice(shape: WorkerShape, field_name: str) -> None:
    """A worker over several machines with TPUs takes a whole slice."""
    if not shape.tpus:
        return
    if not (re.fullmatch(r"\d+(x\d+){1,2}", shape.topology) and shape.accelerator):
        raise ConfigError(f"{field_name} is {shape.hosts}: fleet.topology and fleet.accelerator must name the slice")
    chips = math.prod(map(int, shape.topology.split("x")))
    devices = chips * DEVICES_PER_CHIP.get(shape.accelerator, 1)
    if chips != shape.tpus or devices != shape.engine.degrees.num_devices:
        raise ConfigError(
            f"fleet.topology {shape.topology} has {chips} chips, {devices} devices; fleet.tpus_per_worker takes "
            f"{shape.tpus:g}, engine {shape.engine.degrees}: a worker over several machines takes all"
        )
