"""How fast a simulated worker is, and how much it holds: coefficients of the same shape as the router learns.

A step over a prompt chunk takes `prefill_step_s + prefill_token_s * tokens + prefill_pair_s * pairs`, where pairs sum
up, over the chunk's tokens, how many each attends to; a decode step takes
`decode_step_s + decode_row_s * rows + decode_token_s * KV tokens`.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine_core.errors import ConfigError


@dataclass(frozen=True, kw_only=True, slots=True)
class WorkerProfile:
    """One worker (one slice).

    Attributes:
        source: where the figures come from.
        kv_tokens: KV cache, in tokens.
        kv_token_bytes: of the KV of one token.
        chunk_tokens, prefill_rows: tokens and prompts of one prefill step at most.
        num_slots: rows of the decode batch.
        link_bytes_per_s: of each worker's network interface, each way.
        message_s: one way, between any two processes.
        jitter: standard deviation of the logarithm of a step's time.
        start_s: from the order of a slice until it serves.
    """

    source: str
    prefill_step_s: float
    prefill_token_s: float
    prefill_pair_s: float
    decode_step_s: float
    decode_row_s: float
    decode_token_s: float
    kv_tokens: int
    kv_token_bytes: int
    chunk_tokens: int = 8192
    prefill_rows: int = 4
    num_slots: int = 128
    link_bytes_per_s: float = 25e9
    message_s: float = 0.0005
    jitter: float = 0.05
    start_s: float = 120.0

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.name != "source" and not (isinstance(value, int | float) and 0 <= value < float("inf")):
                raise ConfigError(f"{field.name} must be a number of at least 0, not {value!r}")
        for name in ("kv_tokens", "chunk_tokens", "prefill_rows", "num_slots", "link_bytes_per_s", "decode_step_s"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"{name} must be positive")
        if not self.prefill_step_s + self.prefill_token_s > 0:
            raise ConfigError("prefill_token_s must be positive")

    def prefill_s(self, num_tokens: int, context: int) -> float:
        """Compute so many tokens behind `context` others, alone, chunk by chunk."""
        pairs = num_tokens * context + num_tokens * (num_tokens + 1) / 2
        return self.prefill_step_s * (-(-num_tokens // self.chunk_tokens) - 1) + self.chunk_s(num_tokens, pairs)

    def chunk_s(self, num_tokens: int, num_pairs: float) -> float:
        """One step over so many tokens of prompts."""
        return self.prefill_step_s + self.prefill_token_s * num_tokens + self.prefill_pair_s * num_pairs

    def decode_s(self, num_rows: float, kv_tokens: float) -> float:
        """One decode step of so many sequences with so many KV tokens together."""
        return self.decode_step_s + self.decode_row_s * num_rows + self.decode_token_s * kv_tokens


# Qwen3-32B in bfloat16 on four TPU7x chips (tpu7x-8). Times: `baton plan --model Qwen/Qwen3-32B --topology tpu7x-8
# --context 12288 --prefill-tokens 8192` (a roofline at 85 % of HBM bandwidth, 70 % of peak FLOP/s in products, 25 % in
# attention; not measured on a TPU), split as `from_plan` does. KV: 85 % of 94.7 GiB per device less 7.6 GiB of weights
# and 2 GiB of workspace, at 32 KiB per token and device. Network: 200 Gbit/s.
QWEN3_32B_TPU7X = WorkerProfile(
    source="baton plan: Qwen3-32B on tpu7x-8 (roofline, not measured)",
    prefill_step_s=1e-3,
    prefill_token_s=1.9e-5,
    prefill_pair_s=1.25e-9,
    decode_step_s=4.9e-3,
    decode_row_s=5e-6,
    decode_token_s=1.05e-8,
    kv_tokens=2_200_000,
    kv_token_bytes=262_144,
)
PROFILES = {"qwen3-32b-tpu7x": QWEN3_32B_TPU7X}


def read_profile(path: Path) -> WorkerProfile:
    """A JSON object of this class's fields, or what `baton plan --json` printed.

    Raises:
        ConfigError: naming the field.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"--profile {path}: {error}") from None
    if not isinstance(content, dict):
        raise ConfigError(f"--profile {path}: not a JSON object")
    try:
        return from_plan(content) if "decode_itl_ms" in content else from_fields(content)
    except ConfigError as error:
        raise ConfigError(f"--profile {path}: {error}") from None


def from_fields(content: Mapping[str, Any]) -> WorkerProfile:
    """A profile from its fields by name."""
    known = {field.name: field for field in dataclasses.fields(WorkerProfile)}
    unknown = sorted(content.keys() - known.keys())
    if unknown:
        raise ConfigError(f"unknown field {unknown[0]}; the fields are {', '.join(known)}")
    missing = [n for n, f in known.items() if f.default is dataclasses.MISSING and n not in content]
    if missing:
        raise ConfigError(f"{missing[0]} is missing")
    return WorkerProfile(**content)


def from_plan(plan: Mapping[str, Any]) -> WorkerProfile:
    """Coefficients from the two operating points that a plan of both roles states.

    Decode: the planned step's time is split between weights and KV in proportion to their bytes. Prefill: between
    products and attention in proportion to their FLOPs over the share of the peak that the plan assumes for each; the
    chunk is taken to stand in the middle of its prompt.
    """
    try:
        assumed, hbm, steps = plan["assumptions"], plan["hbm_gib"], plan["steps"]
        prefill, decode = steps["prefill"], steps["decode"]
        devices = plan["topology"]["devices"]
        kv_tokens, context, batch = plan["kv_tokens"], plan["context"], plan["estimated_batch"]
        chunk = assumed["prefill_step_tokens"]
        token_bytes = hbm["kv"] * 2**30 / kv_tokens
        decode_s = decode["estimate_ms"] / 1e3
        kv_share = min(batch * context * token_bytes / decode["hbm_bytes"], 1.0)
        products = 2.0 * plan["model"]["parameters"] * chunk / devices
        attention_s = max(prefill["flops"] - products, 0.0) / assumed["attention_share"]
        attention_share = attention_s / (attention_s + products / assumed["matmul_share"])
        prefill_s = prefill["estimate_ms"] / 1e3
        source = f"baton plan: {plan['model']['architecture']} on {plan['topology']['name']}"
    except (KeyError, TypeError, ZeroDivisionError) as error:
        raise ConfigError(f"a plan of both roles that fits is needed ({type(error).__name__}: {error})") from None
    return WorkerProfile(
        source=source,
        prefill_step_s=0.0,
        prefill_token_s=prefill_s * (1 - attention_share) / chunk,
        prefill_pair_s=prefill_s * attention_share / (chunk * max(context / 2, chunk / 2)),
        decode_step_s=decode_s * (1 - kv_share),
        decode_row_s=0.0,
        decode_token_s=decode_s * kv_share / (batch * context),
        kv_tokens=int(kv_tokens),
        kv_token_bytes=round(token_bytes * devices),
        chunk_tokens=int(chunk),
        num_slots=int(plan["max_batch"]),
    )
