"""Configuration of a gateway."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from engine_core.errors import ConfigError


@dataclass(frozen=True, kw_only=True, slots=True)
class GatewayConfig:
    """Everything one gateway process needs besides the model directory and the cluster's secret."""

    model_name: str = "demo"  # what clients put into "model"
    host: str = "127.0.0.1"  # address to listen on
    port: int = 8000  # 0: any free one
    colocated: bool = False  # the fleet has no prefill workers: ready as soon as a decode worker is there
    api_keys: tuple[str, ...] = ()  # accepted bearer tokens; empty: no authentication
    local_prefill_tokens: int = -1  # a decode worker may read at most so many tokens of a prompt itself; -1: any number
    max_body_bytes: int = 32 << 20  # of an HTTP request
    max_choices: int = 128  # answers of one HTTP request: prompts times n
    max_concurrent_choices: int = 4096  # answers in progress or waiting; beyond it clients get 429
    max_waiting: int = 2048  # requests that wait for room; beyond it clients get 429
    max_wait_s: float = 60.0  # until the first token, where the client does not say; longer waits get 429
    max_backlog_s: float = 2.0  # of prompts at each prefill worker, beyond which requests wait in the gateway
    tenant_weights: tuple[str, ...] = ()  # NAME=WEIGHT: shares of a crowded service; 1 for tenants not named
    max_attempts: int = 3  # in a row that bring a stream no token; each one that does counts anew
    request_timeout_s: float = 600.0  # from arrival to the last token
    worker_wait_s: float = 60.0  # how long a request waits for a worker to appear; a replacement has to start
    suspect_after_s: float = 1.0  # a worker silent for so long gets no new requests while others are there
    lost_after_s: float = 2.0  # a worker silent for so long loses its requests to others
    inline_tokenize_chars: int = 8192  # longer texts are tokenized on a thread
    special_tokens_in_prompt: bool = True  # /v1/completions parses special-token strings; chat never does
    block_salt: str = ""  # secret; keys the names of cached blocks. `baton serve` draws one per run
    slo_ttft_s: float = 1.0  # objective for the time to first token; goodput counts choices that meet both
    slo_itl_s: float = 0.1  # objective for the mean time between tokens of a choice
    metric_aliases: bool = True  # expose vllm:* names, too: what the Gateway API inference extension looks for
    trace_endpoint: str = ""  # OTLP/HTTP address for traces, such as http://127.0.0.1:4318/v1/traces; empty: none
    keep_alive_s: int = 75  # idle HTTP connections are closed after this
    compile_cache: str = ""  # where what is compiled of it is kept; empty: `baton serve` takes engine.compile_cache

    def __post_init__(self) -> None:
        """Refuse what can never work."""
        for name in (
            "max_body_bytes",
            "max_choices",
            "max_concurrent_choices",
            "max_attempts",
            "keep_alive_s",
            "max_waiting",
        ):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, not {getattr(self, name)}")
        for name in (
            "request_timeout_s",
            "worker_wait_s",
            "suspect_after_s",
            "lost_after_s",
            "max_wait_s",
            "max_backlog_s",
            "slo_ttft_s",
            "slo_itl_s",
        ):
            if getattr(self, name) <= 0:
                raise ConfigError(f"{name} must be positive, not {getattr(self, name)}")
        if not 0 <= self.port < 65536:
            raise ConfigError(f"port must be in 0..65535, not {self.port}")
        if not self.model_name:
            raise ConfigError("model_name must not be empty")
        if self.local_prefill_tokens < -1:
            raise ConfigError(f"local_prefill_tokens must be at least -1, not {self.local_prefill_tokens}")
        self.weights()
        if any(not key for key in self.api_keys):
            raise ConfigError("api_keys must not contain an empty key")

    def weights(self) -> dict[str, float]:
        """`tenant_weights` as numbers."""
        weights = {}
        for text in self.tenant_weights:
            name, _, weight = text.rpartition("=")
            try:
                weights[name] = float(weight)
            except ValueError:
                weights[name] = 0.0
            if not name or not 0 < weights[name] < float("inf"):
                raise ConfigError(f"tenant_weights must be NAME=WEIGHT with a positive weight, not {text!r}")
        return weights

    def public(self) -> dict[str, Any]:
        """The configuration without its secrets."""
        return {**asdict(self), "api_keys": len(self.api_keys), "block_salt": bool(self.block_salt)}
