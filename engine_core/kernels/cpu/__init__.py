"""Products, attention and what is between on a CPU by kernels of our own, compiled where it has a C++ compiler.

`matmul.cc`, `attention.cc` and `heads.cc` are the kernels (`common.h` between them), `library` compiles and registers
them, `products`, `attention` and `heads` call them. Where they cannot be had, XLA does the same.
"""
