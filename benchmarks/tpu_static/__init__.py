"""How fast a kernel can be on a TPU, from the compiler's own schedule; no TPU is needed.

libtpu compiles for every generation on any Linux machine and can write down what it schedules: bundles of instructions,
one per cycle, with its stalls. `bundles` reads that, `schedule` compiles one kernel in a child process, `estimate`
turns cycles and bytes into time, `cases` holds the kernels and shapes.
"""
