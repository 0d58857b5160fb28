"""Kernels by short name: `module:function`, a `case.Builder`. The command line takes any other such path as well."""

KERNELS = {
    "matmul": "benchmarks.tpu_static.kernels.matmul:build",
}
