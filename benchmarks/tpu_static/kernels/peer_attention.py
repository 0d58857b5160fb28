"""Other people's paged attention: JAX's own (ragged paged attention v2) and tokamax's batched one."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks.tpu_static.case import Case, Runs, by_name, hot_chain, idle
from benchmarks.tpu_static.kernels.shapes import AttentionShape, attention_shape
from engine_core.aot.generation import Generation
from engine_core.errors import ConfigError

_JAX_DECODE, _JAX_PREFILL = (32, 16), (64, 8)  # queries and KV pages of a block
_TOKAMAX_SEQS, _TOKAMAX_KV, _TOKAMAX_QUERIES = 8, 512, 128  # its own defaults


def jax_rpa(generation: Generation, shape: str) -> Case:
    """`jax.experimental.pallas.ops.tpu.ragged_paged_attention`, without the write of this step's keys and values.

    Its table of block sizes asks for the running device, so they are given: those it holds for these shapes on v6e.
    """
    module = importlib.import_module("jax.experimental.pallas.ops.tpu.ragged_paged_attention.kernel")
    sizes = attention_shape(shape)
    queries, pages = _JAX_DECODE if sizes.q_len == 1 else _JAX_PREFILL

    def attend(*arguments: jax.Array) -> jax.Array:
        out: jax.Array = module.ragged_paged_attention(
            *arguments,
            sm_scale=sizes.head_dim**-0.5,
            num_kv_pages_per_block=pages,
            num_queries_per_block=queries,
            vmem_limit_bytes=generation.vmem_bytes * 3 // 4,
        )
        return out

    blocks = -(-sizes.num_tokens // queries)
    visits = max(blocks, sizes.num_seqs)  # of a block of queries to a sequence
    kv_blocks = -(-sizes.kv_len // (pages * sizes.page_size))  # it skips none for causality
    return _case(
        sizes,
        attend,
        (
            _queries(sizes),
            jax.ShapeDtypeStruct(
                (sizes.num_pages, sizes.page_size, 2 * sizes.num_kv_heads, sizes.head_dim), jnp.bfloat16
            ),
            _ints(sizes.num_seqs),
            _ints(sizes.num_seqs, sizes.pages_per_seq),
            _ints(sizes.num_seqs + 1),
            _ints(1),
        ),
        (),
        by_name({"ragged_paged_attention": hot_chain([blocks, visits, visits * kv_blocks], 1.0)}),
    )


def tokamax_rpa(generation: Generation, shape: str) -> Case:
    """Tokamax's batched ragged paged attention; this step's keys and values are written on the way.

    Its kernels for the other kinds of rows have nothing to do, but clear their buffers. The kernels that make its work
    lists count with one item each, which flatters it.
    """
    del generation
    try:
        wrapper = importlib.import_module("tokamax._src.ops.batched_rpa.kernel.wrapper")
        configs = importlib.import_module("tokamax._src.ops.batched_rpa.kernel.configs")
    except ImportError as error:
        raise ConfigError(f"tokamax is not installed (it needs Python 3.12): {error}") from None
    sizes = attention_shape(shape)
    decode = configs.BlockSizes(bq_sz=1, bq_c_sz=1, bkv_sz=_TOKAMAX_KV, batch_size=_TOKAMAX_SEQS, n_buffer=3)
    prefill = configs.BlockSizes(bq_sz=_TOKAMAX_QUERIES, bq_c_sz=64, bkv_sz=_TOKAMAX_KV, batch_size=2, n_buffer=3)

    def attend(*arguments: jax.Array) -> tuple[jax.Array, jax.Array]:
        out, cache, *_ = wrapper.ragged_paged_attention(
            *arguments,
            sm_scale=sizes.head_dim**-0.5,
            decode_block_sizes=decode,
            prefill_block_sizes=prefill,
        )
        return out, cache

    new = jax.ShapeDtypeStruct((sizes.num_tokens, sizes.num_kv_heads, sizes.head_dim), jnp.bfloat16)
    cache = (sizes.num_pages, sizes.page_size, sizes.num_kv_heads, 2, sizes.head_dim)
    if sizes.q_len == 1:
        items = sizes.num_seqs / _TOKAMAX_SEQS * sizes.kv_len / _TOKAMAX_KV
        kernels = {"RPAd": hot_chain([1, items], _TOKAMAX_KV / sizes.page_size)}
    else:
        blocks = range(sizes.kv_len - sizes.q_len + _TOKAMAX_QUERIES, sizes.kv_len + 1, _TOKAMAX_QUERIES)
        items = sizes.num_seqs * sum(-(-end // _TOKAMAX_KV) for end in blocks) / 2  # two blocks of queries at a time
        kernels = {"RPAp": hot_chain([1, items], 1.0)}
    return _case(
        sizes,
        attend,
        (
            _queries(sizes),
            new,
            new,
            jax.ShapeDtypeStruct(cache, jnp.bfloat16),
            _ints(sizes.num_seqs),
            _ints(sizes.num_pages),
            _ints(sizes.num_seqs + 1),
            _ints(3),
        ),
        (3,),
        by_name({**kernels, "RPA": idle}),
    )


def _case(
    sizes: AttentionShape, function: Callable[..., Any], arguments: tuple[Any, ...], donate: tuple[int, ...], runs: Runs
) -> Case:
    return Case(
        function=function,
        arguments=arguments,
        donate=donate,
        flops=sizes.flops,
        hbm_bytes=sizes.hbm_bytes,
        dtype="bfloat16",
        pass_dma_bytes=None,
        runs=runs,
    )


def _queries(sizes: AttentionShape) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct((sizes.num_tokens, sizes.num_heads, sizes.head_dim), jnp.bfloat16)


def _ints(*shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.int32)
