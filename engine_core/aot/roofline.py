"""How long a step takes if nothing but arithmetic, HBM and the wires between chips holds it up. Host module.

The shares of the peaks are assumptions that have not been measured on a TPU; every plan states them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from engine_core.aot.hlo import Collective
from engine_core.aot.topology import Topology


@dataclass(frozen=True, kw_only=True, slots=True)
class Assumptions:
    """What a step reaches of the peaks.

    Attributes:
        hbm_share: of the HBM bandwidth.
        matmul_share: of the peak FLOP/s, in matrix products with weights.
        attention_share: of the peak FLOP/s, in prefill attention; a head_dim of 128 fills half of a 256-wide MXU.
        hop_s: seconds that a message takes from chip to chip.
        ring_links: links of a chip that carry a collective, each at its share of the chip's links together.
    """

    hbm_share: float
    matmul_share: float
    attention_share: float
    hop_s: float
    ring_links: int


ASSUMED = Assumptions(hbm_share=0.85, matmul_share=0.70, attention_share=0.25, hop_s=1e-6, ring_links=2)
PEAK = Assumptions(hbm_share=1.0, matmul_share=1.0, attention_share=1.0, hop_s=0.0, ring_links=2)
_LINKS = {2: 4, 3: 6}  # of a chip, by dimensions of the torus


@dataclass(frozen=True, kw_only=True, slots=True)
class StepLoad:
    """What one step asks of one device.

    Attributes:
        matmul_flops: products with weights.
        attention_flops: products with keys and values.
        weight_bytes: read.
        kv_bytes: read and written.
        exchange_bytes: of rows sent to experts and back; the arrays they land in are sized for the worst case.
    """

    matmul_flops: float
    attention_flops: float
    weight_bytes: float
    kv_bytes: float
    exchange_bytes: float = 0.0


def step_seconds(
    load: StepLoad, collectives: Mapping[str, Collective], topology: Topology, dtype: str, assumed: Assumptions
) -> float:
    """The larger of arithmetic and HBM time, plus the collectives, which XLA leaves synchronous on most slices."""
    generation = topology.generation
    peak = generation.peak_flops(dtype)
    arithmetic = load.matmul_flops / (peak * assumed.matmul_share)
    arithmetic += load.attention_flops / (peak * assumed.attention_share)
    memory = (load.weight_bytes + load.kv_bytes) / (generation.hbm_bytes_per_s * assumed.hbm_share)
    moved = dict(collectives)
    if exchanges := moved.get("ragged-all-to-all"):
        moved["ragged-all-to-all"] = replace(exchanges, num_bytes=int(load.exchange_bytes))
    return max(arithmetic, memory) + collective_seconds(moved, topology, assumed)


def collective_seconds(collectives: Mapping[str, Collective], topology: Topology, assumed: Assumptions) -> float:
    """Ring algorithms: an all-reduce of n bytes on d devices sends 2 n (d - 1) / d of each, a gather half of that."""
    devices = topology.num_devices
    if devices == 1:
        return 0.0
    generation = topology.generation
    links = _LINKS[len(topology.grid)] / generation.devices_per_chip
    bandwidth = generation.ici_bytes_per_s / links * assumed.ring_links
    hops = sum(side // 2 for side in topology.grid)
    seconds = 0.0
    for kind, one in collectives.items():
        passes = 2 if kind == "all-reduce" else 1
        seconds += passes * (one.num_bytes * (devices - 1) / devices / bandwidth + one.count * hops * assumed.hop_s)
    return seconds
