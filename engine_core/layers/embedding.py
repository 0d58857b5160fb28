"""Token embedding and logits head; the vocabulary is sharded over the tensor axis."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from engine_core import mesh
from engine_core.layers.linear import Numbers, matmul
from engine_core.layers.params import ParamSpec, Source, declare


class VocabTable(nnx.Module):
    """A `[V, D]` matrix: looked up as the embedding, multiplied as the head, or both when they are tied.

    The vocabulary is padded with zero rows to a multiple of the tensor-parallel degree.
    """

    def __init__(self, name: str, vocab: int, hidden: int, numbers: Numbers, tp: int) -> None:
        padded = -(-vocab // tp) * tp
        self.weight = declare(
            ParamSpec((padded, hidden), numbers.held(hidden), (mesh.TENSOR, None), (Source(name, vocab),)),
        )
        self.vocab = vocab
        self.numbers = numbers
        self.tp = tp

    def embed(self, tokens: jax.Array) -> jax.Array:
        """[T] i32 -> [T, D] in the residual dtype. One all-reduce: a device adds zeros for rows it does not hold."""
        weight = self.weight[...]
        local = tokens - mesh.shard_index(self.tp) * weight.shape[0]
        rows = weight.at[local].get(mode="clip").astype(self.numbers.residual)
        if self.tp > 1:
            rows = jnp.where(((local >= 0) & (local < weight.shape[0]))[:, None], rows, 0)
        return mesh.all_reduce(rows, self.tp)

    def logits(self, x: jax.Array) -> jax.Array:
        """[B, D] -> [B, V] f32, equal on every device. One all-gather."""
        local = matmul(x, self.weight[...], self.numbers)
        return mesh.all_gather(local, self.tp)[:, : self.vocab]
