"""Products and attention on a CPU by kernels of our own, compiled where the machine has a C++ compiler.

`matmul.cc` and `attention.cc` are the kernels (`common.h` between them), `library` compiles and registers them,
`products` and `attention` call them. Where they cannot be had, XLA does the same.
"""
