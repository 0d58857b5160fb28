"""Run by `test_aot` with libtpu's environment: compiles paged attention for TPUs that are not there; prints JSON.

python -m tests.engine_core.kernels.aot_worker v6e-1 plain int8+tree ...
"""

from __future__ import annotations

import json
import sys
from dataclasses import replace

import jax
import jax.numpy as jnp
from jax.sharding import SingleDeviceSharding

from engine_core.aot.compiler import describe_devices, tracing_for
from engine_core.aot.topology import find_topology
from engine_core.kernels.paged_attention import Rows, Scoring, paged_attention
from engine_core.kv_cache import CacheLayout
from tests.engine_core.kernels.cases import FEATURES, Case

CASE = Case(heads=16, kv_heads=4, page_size=128)
CHANGES = {**FEATURES, **{f"page{size}": {"page_size": size} for size in (16, 32, 64, 256)}}
TOKENS, SEQS, PAGES_PER_SEQ, LAYERS, NUM_PAGES = 64, 8, 8, 2, 1024
NEW = 16  # of one sequence, the columns of a tree's mask


def page_shape(case: Case) -> tuple[int, ...]:
    """[page_size, words, pack, width], as the engine makes it where it knows the dtype."""
    wide = jnp.dtype(case.cache_dtype).itemsize > 1
    layout = CacheLayout(
        num_layers=LAYERS,
        num_pages=NUM_PAGES,
        page_size=case.page_size,
        num_kv_heads=case.kv_heads,
        head_dim=case.head_dim,
        dtype=case.cache_dtype if wide else "bfloat16",
        head_align=128,
    )
    width = -(-case.head_dim // 128) * 128
    return layout.page_shape if wide else (case.page_size, -(-2 * case.kv_heads // 4), 4, width)


def compile_step(device: jax.Device, names: str) -> dict:
    """A step of decode rows and others."""
    case = CASE
    for name in names.split("+"):
        case = replace(case, **CHANGES[name] if name != "plain" else {})
    ints = {
        "page_ids": (TOKENS,),
        "offsets": (TOKENS,),
        "page_table": (SEQS, PAGES_PER_SEQ),
        "kv_lens": (SEQS,),
        "cu_q_lens": (SEQS + 1,),
        "num_decode": (1,),
    }
    scoring = {"sinks": jax.ShapeDtypeStruct((case.heads,), jnp.float32)} if case.sinks else {}
    if case.tree:
        scoring["custom_mask"] = jax.ShapeDtypeStruct((TOKENS, NEW), jnp.bool_)
    if case.scales:
        scoring |= dict.fromkeys(("k_scale", "v_scale"), jax.ShapeDtypeStruct((), jnp.float32))
    q, k = (jax.ShapeDtypeStruct((TOKENS, heads, case.head_dim), case.dtype) for heads in (case.heads, case.kv_heads))
    cache = jax.ShapeDtypeStruct((LAYERS, NUM_PAGES, *page_shape(case)), case.cache_dtype)

    def attend(q, k, v, cache, layer, rows, scoring):
        fixed = {"scale": case.head_dim**-0.5, "window": case.window, "soft_cap": case.soft_cap}
        return paged_attention(q, k, v, cache, layer, Rows(**rows), Scoring(**fixed, **scoring), "tpu")

    rows = {name: jax.ShapeDtypeStruct(shape, jnp.int32) for name, shape in ints.items()}
    place = SingleDeviceSharding(device)
    jitted = jax.jit(attend, in_shardings=place, out_shardings=place, donate_argnums=3)
    with tracing_for(device):
        lowered = jitted.lower(q, k, k, cache, jax.ShapeDtypeStruct((), jnp.int32), rows, scoring)
    compiled = lowered.compile()
    memory, text = compiled.memory_analysis(), compiled.as_text()
    return {
        "names": names,
        "kernels": [kernel for kernel in ("decode", "prefill") if f"paged_attention_{kernel}" in text],
        "cache_bytes": cache.size * cache.dtype.itemsize,
        "alias_bytes": memory.alias_size_in_bytes,
        "temp_bytes": memory.temp_size_in_bytes,
    }


if __name__ == "__main__":
    device = describe_devices(find_topology(sys.argv[1]))[0]
    for names in sys.argv[2:]:
        print(json.dumps(compile_step(device, names)), flush=True)
