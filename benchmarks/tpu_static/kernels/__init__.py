"""Kernels by short name: `module:function`, a `case.Builder`. The command line takes any other such path as well."""

from benchmarks.tpu_static.kernels.shapes import ATTENTION, GROUPED

_HERE = "benchmarks.tpu_static.kernels"
KERNELS = {
    "matmul": f"{_HERE}.matmul:build",
    "baton-grouped": f"{_HERE}.own_grouped:build",
    "baton-attention": f"{_HERE}.own_attention:build",
    "jax-rpa": f"{_HERE}.peer_attention:jax_rpa",
    "tokamax-rpa": f"{_HERE}.peer_attention:tokamax_rpa",
    "jax-megablox": f"{_HERE}.peer_grouped:megablox",
    "jax-ragged-dot": f"{_HERE}.peer_grouped:ragged_dot",
    "tokamax-gmm": f"{_HERE}.peer_grouped:tokamax_gmm",
}
SUITES = {
    "attention": ["baton-attention", "jax-rpa", "tokamax-rpa"],
    "grouped": ["baton-grouped", "jax-megablox", "jax-ragged-dot", "tokamax-gmm"],
}
SHAPES = {"attention": list(ATTENTION), "grouped": list(GROUPED)}
