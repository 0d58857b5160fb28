"""What each TPU generation can do: the constants of every roofline estimate, in one place.

A device is what JAX calls one: a whole chip, except on tpu7x, whose chips show as two devices each.

Sources: peaks, HBM bandwidth and inter-chip bandwidth are those of Google's system architecture pages
(docs.cloud.google.com/tpu/docs/v5e, v5p, v6e, tpu7x), divided by the devices of a chip. `hbm_bytes` is what libtpu
lets a program have, as its out-of-memory error says. `clock_hz` is the published bfloat16 peak over the operations per
cycle of a TensorCore whose MXU slots are all taken in libtpu's own schedule.
"""

from __future__ import annotations

from dataclasses import dataclass

_GIB = 2**30


@dataclass(frozen=True, kw_only=True, slots=True)
class Generation:
    """One TPU generation. Every figure is of one device.

    Attributes:
        name: as in the name of a slice, "v6e".
        cores_per_name: what the number in a slice's name counts is this many TensorCores of a chip (v5p-8 is 4 chips).
        devices_per_chip: that JAX shows.
        tensor_cores: TensorCores that one program drives; 2 on v5p.
        clock_hz: of a TensorCore.
        bf16_flops: peak of bfloat16 products per second.
        int8_flops: peak of int8 products per second.
        fp8_flops: peak of float8 products per second; the bfloat16 peak where the compiler widens them.
        hbm_bytes: that a compiled program may use.
        hbm_bytes_per_s: peak.
        ici_bytes_per_s: peak of all inter-chip links together, one direction.
        vmem_bytes: of a TensorCore.
    """

    name: str
    cores_per_name: int
    devices_per_chip: int
    tensor_cores: int
    clock_hz: float
    bf16_flops: float
    int8_flops: float
    fp8_flops: float
    hbm_bytes: int
    hbm_bytes_per_s: float
    ici_bytes_per_s: float
    vmem_bytes: int

    def peak_flops(self, dtype: str) -> float:
        """Products per second of operands of this dtype (a float32 operand takes several bfloat16 passes: 1/6)."""
        if dtype.startswith("float8"):
            return self.fp8_flops
        return {"bfloat16": self.bf16_flops, "int8": self.int8_flops, "float32": self.bf16_flops / 6}[dtype]


GENERATIONS = {
    generation.name: generation
    for generation in (
        Generation(
            name="v5e",
            cores_per_name=1,
            devices_per_chip=1,
            tensor_cores=1,
            clock_hz=1.503e9,
            bf16_flops=197e12,
            int8_flops=394e12,
            fp8_flops=197e12,
            hbm_bytes=int(15.75 * _GIB),
            hbm_bytes_per_s=819e9,
            ici_bytes_per_s=200e9,
            vmem_bytes=128 << 20,
        ),
        Generation(
            name="v5p",
            cores_per_name=2,
            devices_per_chip=1,
            tensor_cores=2,
            clock_hz=1.751e9,
            bf16_flops=459e12,
            int8_flops=918e12,
            fp8_flops=459e12,
            hbm_bytes=int(95.73 * _GIB),
            hbm_bytes_per_s=2765e9,
            ici_bytes_per_s=600e9,
            vmem_bytes=64 << 20,
        ),
        Generation(
            name="v6e",
            cores_per_name=1,
            devices_per_chip=1,
            tensor_cores=1,
            clock_hz=1.751e9,
            bf16_flops=918e12,
            int8_flops=1836e12,
            fp8_flops=918e12,
            hbm_bytes=int(31.24 * _GIB),
            hbm_bytes_per_s=1638e9,
            ici_bytes_per_s=400e9,
            vmem_bytes=128 << 20,
        ),
        Generation(
            name="tpu7x",
            cores_per_name=2,
            devices_per_chip=2,
            tensor_cores=1,
            clock_hz=2.200e9,
            bf16_flops=1153.5e12,
            int8_flops=1153.5e12,
            fp8_flops=2307e12,
            hbm_bytes=int(94.74 * _GIB),
            hbm_bytes_per_s=3690e9,
            ici_bytes_per_s=300e9,
            vmem_bytes=64 << 20,
        ),
    )
}
