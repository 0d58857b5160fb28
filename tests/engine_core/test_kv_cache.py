"""The cache's layout, and whole pages in and out of it."""

from __future__ import annotations

import os
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from engine_core.config import Degrees
from engine_core.errors import ConfigError
from engine_core.kv_cache import CacheLayout, create_cache, gather_pages, scatter_pages
from engine_core.mesh import make_mesh


def make_layout(**given):
    sizes = {"num_layers": 3, "num_pages": 7, "page_size": 4, "num_kv_heads": 2, "head_dim": 8}
    return CacheLayout(**(sizes | {"dtype": "float32", "head_align": 1} | given))


def test_layout():
    layout = make_layout(num_kv_heads=5, head_dim=80, head_align=128, dtype="bfloat16")
    assert layout.pack == 2
    assert layout.page_shape == (4, 5, 2, 128)
    assert layout.page_bytes == 3 * 4 * 10 * 128 * 2
    assert make_layout().page_shape == (4, 4, 1, 8)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("head_dim", "heads"), [(64, 8), (64, 2), (32, 8), (128, 1), (256, 3)])
@pytest.mark.parametrize("tp", [1, 2])
def test_no_byte_is_wasted(dtype, head_dim, heads, tp):
    """A token takes what its keys and values have, where the heads of each device fill rows of 128 lanes."""
    layout = make_layout(
        page_size=128, num_kv_heads=heads * tp, head_dim=head_dim, head_align=128, dtype=dtype, tp=tp, num_layers=1
    )
    assert layout.page_shape[-1] % 128 == 0
    assert layout.page_shape[1] % tp == 0, "the words of a page are split over the devices"
    assert (
        layout.page_bytes == layout.block_bytes == 128 * 2 * heads * tp * head_dim * (2 if dtype == "bfloat16" else 4)
    )


def test_padded_where_heads_fill_no_row():
    odd = make_layout(num_kv_heads=3, head_dim=64, head_align=128, dtype="bfloat16")
    assert (odd.heads_per_row, odd.page_shape) == (1, (4, 3, 2, 128))
    split = make_layout(num_kv_heads=8, head_dim=64, head_align=128, dtype="bfloat16", tp=8)
    assert (split.heads_per_row, split.page_shape) == (1, (4, 8, 2, 128)), "one head on each device"
    assert make_layout(num_kv_heads=2, head_dim=80, head_align=128).heads_per_row == 1
    assert make_layout(num_kv_heads=2, head_dim=8, head_align=1).heads_per_row == 1


@pytest.mark.parametrize("given", [{"dtype": "int8"}, {"num_pages": 0}, {"head_align": 0}])
def test_layout_refuses(given):
    with pytest.raises(ConfigError):
        make_layout(**given)


@pytest.mark.parametrize("stacked", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float8_e4m3fn"])
@pytest.mark.parametrize("head_align", [1, 16, 12])
def test_pages_come_back_and_others_stay(dtype, stacked, head_align):
    check_round_trip(make_layout(dtype=dtype, head_align=head_align), None, stacked)


@pytest.mark.parametrize(("heads", "tp"), [(3, 1), (2, 2), (6, 2)])
def test_float8_needs_two_heads_on_each_device(heads, tp):
    with pytest.raises(ConfigError, match="two KV heads in a word"):
        make_layout(num_kv_heads=heads, tp=tp, dtype="float8_e4m3fn")
    assert make_layout(num_kv_heads=2 * heads, tp=tp, dtype="float8_e4m3fn").page_bytes == 3 * 4 * 4 * heads * 8


def test_copies_of_heads_are_in_the_pages_and_never_outside():
    layout = make_layout(tp=6, dtype="bfloat16")
    check_round_trip(layout, None, stacked=False)
    cache = create_cache(layout, None, stacked=False)
    blocks = np.arange(4 * 4 * 8, dtype=np.float32).reshape(1, 4, 4, 8)
    cache = scatter_pages(cache, np.int32([1]), (blocks,) * 3)
    pairs = np.asarray(cache.layers[2][1]).reshape(4, 2, 3, 2, 8)  # [page_size, K, copies, (k, v), H]
    assert pairs.any() and (pairs == pairs[:, :, :1]).all()


def check_round_trip(layout, mesh, stacked):
    """Scatter, with ids out of range dropped; gather gives the same bits; pages not named stay as they were."""
    cache = create_cache(layout, mesh, stacked)
    assert len(cache.layers) == (1 if stacked else layout.num_layers)
    scatter = jax.jit(scatter_pages, donate_argnums=0)
    gather = jax.jit(gather_pages)
    rng = np.random.default_rng(0)
    shape = (4, layout.page_size, 2 * layout.num_kv_heads, layout.head_dim)
    blocks = tuple(np.asarray(jnp.asarray(rng.standard_normal(shape), layout.dtype)) for _ in range(layout.num_layers))
    placement = cache.layers[0].sharding
    cache = scatter(cache, np.int32([2, layout.num_pages, -1, 5]), blocks)
    assert cache.layers[0].sharding.is_equivalent_to(placement, cache.layers[0].ndim)
    got = gather(cache, np.arange(layout.num_pages, dtype=np.int32))
    for layer, block in zip(got, blocks, strict=True):
        assert layer.dtype == layout.dtype
        pages = np.asarray(layer)
        np.testing.assert_array_equal(pages[2], block[0])
        np.testing.assert_array_equal(pages[5], block[3])
        assert not pages[[0, 1, 3, 4, 6]].any()


def test_heads_must_divide():
    with pytest.raises(ConfigError, match="3 KV heads"):
        create_cache(make_layout(num_kv_heads=3), FakeMesh(), stacked=False)


class FakeMesh:
    """Two devices on the tensor axis, of which one is here."""

    shape = {"tensor": 2}
    devices = np.array(jax.devices()[:1])


def test_pages_of_a_cache_split_over_two_devices():
    """In a process of its own: the number of CPU devices is fixed when jax starts."""
    environment = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=2", "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-c", "from tests.engine_core import test_kv_cache; test_kv_cache.split_over_two()"]
    subprocess.run(command, env=environment, check=True, timeout=200)


def split_over_two():
    """Run by the test above; no page ever leaves its device."""
    mesh = make_mesh(Degrees(tp=2), jax.devices())
    for stacked in (False, True):
        for dtype in ("float32", "bfloat16"):
            layout = make_layout(dtype=dtype, num_kv_heads=4, head_align=16, tp=2)
            assert layout.heads_per_row == 2
            check_round_trip(layout, mesh, stacked)
            check_round_trip(make_layout(dtype=dtype, num_kv_heads=1, tp=2), mesh, stacked)
            cache = create_cache(layout, mesh, stacked)
            assert cache.layers[0].addressable_shards[0].data.size * 2 == cache.layers[0].size
            compiled = jax.jit(gather_pages).lower(cache, jnp.zeros(2, jnp.int32)).compile().as_text()
            assert "all-gather" not in compiled
            assert "all-reduce" not in compiled


def test_pages_of_a_cache_split_over_row_shards():
    """In a process of its own, as above."""
    environment = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=2", "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-c", "from tests.engine_core import test_kv_cache; test_kv_cache.split_over_rows()"]
    subprocess.run(command, env=environment, check=True, timeout=200)


def split_over_rows():
    """Run by the test above; the cache is never whole on a device, only the pages that are asked for."""
    mesh = make_mesh(Degrees(dp=2), jax.devices())
    layout = make_layout(num_pages=26)
    for stacked in (False, True):
        check_round_trip(make_layout(num_pages=8), mesh, stacked)
        cache = create_cache(layout, mesh, stacked)
        ids = jnp.zeros(2, jnp.int32)
        blocks = tuple(jnp.zeros((2, 4, 4, 8)) for _ in range(layout.num_layers))
        for compiled in (
            jax.jit(gather_pages).lower(cache, ids).compile(),
            jax.jit(scatter_pages, donate_argnums=0).lower(cache, ids, blocks).compile(),
        ):
            shapes = re.findall(r"f32\[[\d,]*\]", compiled.as_text())
            assert any("13," in shape for shape in shapes)
            assert not any("26," in shape for shape in shapes), shapes
