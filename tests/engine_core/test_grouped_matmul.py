"""Grouped matmul: every implementation against numpy, for every way in which rows can be spread over groups."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from engine_core.errors import ConfigError
from engine_core.kernels.grouped_matmul import check_supported, grouped_matmul, tpu, tuned

IMPLEMENTATIONS = ["reference", "tiled", "ragged_dot"]
SIZES = {
    "ragged": [3, 0, 17, 1, 0, 9],
    "one group": [0, 0, 0, 33, 0, 0],
    "first": [40, 0, 0, 0, 0, 0],
    "none": [0, 0, 0, 0, 0, 0],
    "even": [8, 8, 8, 8, 8, 8],
    "padding behind": [5, 6, 7, 0, 0, 2],
}
K, N = 48, 40


def numpy_grouped(x, weights, scales, sizes):
    wide = weights.astype(np.float64)
    if scales is not None:
        wide = wide * scales[:, :, None]
    out, at = [], 0
    for group, size in enumerate(sizes):
        rows = x[at : at + size].astype(np.float64)
        products = [rows @ wide[group, i] for i in range(weights.shape[1])]
        out.append(products[0] if len(products) == 1 else products[0] / (1 + np.exp(-products[0])) * products[1])
        at += size
    return np.concatenate(out)


def draw(dtype, num_products, num_rows, *, depth=K, width=N, rng=None):
    rng = rng or np.random.default_rng(0)
    x = (rng.standard_normal((num_rows, depth)) / 4).astype(np.float32)
    values = rng.standard_normal((6, num_products, depth, width))
    if dtype == "int8":
        return x, np.clip(values * 40, -127, 127).astype(np.int8), rng.uniform(0.01, 0.03, (6, num_products, width))
    if dtype.startswith("float8"):
        return x, values.astype(dtype), rng.uniform(0.5, 1.5, (6, num_products, width))
    return x, values.astype(ml_dtypes.bfloat16 if dtype == "bfloat16" else np.float32), None


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
@pytest.mark.parametrize("num_products", [1, 2])
def test_equals_numpy(implementation: str, sizes: list[int], num_products: int) -> None:
    num_rows = sum(sizes) + (4 if sizes == SIZES["padding behind"] else 0) or 3
    x, weights, _ = draw("float32", num_products, num_rows)
    y = grouped_matmul(
        jnp.asarray(x),
        jnp.asarray(weights),
        None,
        jnp.asarray(sizes, jnp.int32),
        out_dtype=jnp.float32,
        implementation=implementation,
    )
    assert y.shape == (num_rows, N)
    wanted = numpy_grouped(x, weights, None, sizes)
    np.testing.assert_allclose(np.asarray(y)[: sum(sizes)], wanted, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_takes_its_matrices_from_a_stack_of_many_layers(implementation: str) -> None:
    """The neighbours' are NaN."""
    sizes = SIZES["ragged"]
    x, weights, _ = draw("float32", 2, sum(sizes))
    nan = np.full_like(weights, np.nan)
    stack = jnp.asarray(np.concatenate([nan, weights, nan]))

    def run(first: jax.Array) -> jax.Array:
        counts = jnp.asarray(sizes, jnp.int32)
        given = {"out_dtype": jnp.float32, "implementation": implementation, "first": first}
        return grouped_matmul(jnp.asarray(x), stack, None, counts, **given)

    y = jax.jit(run)(jnp.int32(6))
    np.testing.assert_allclose(y, numpy_grouped(x, weights, None, sizes), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", ["bfloat16", "int8", "float8_e4m3fn"])
def test_narrow_weights(implementation: str, dtype: str) -> None:
    sizes = SIZES["ragged"]
    x, weights, scales = draw(dtype, 2, sum(sizes))
    x = x.astype(ml_dtypes.bfloat16)
    y = grouped_matmul(
        jnp.asarray(x),
        jnp.asarray(weights),
        None if scales is None else jnp.asarray(scales, jnp.float32),
        jnp.asarray(sizes, jnp.int32),
        out_dtype=jnp.float32,
        implementation=implementation,
    )
    np.testing.assert_allclose(y, numpy_grouped(x, weights, scales, sizes), rtol=2e-2, atol=2e-2)


def test_a_row_does_not_depend_on_its_neighbours() -> None:
    """Bitwise, in one executable: strict numerics need it."""
    run = jax.jit(lambda x, w, s: grouped_matmul(x, w, None, s, out_dtype=jnp.float32, implementation="tiled"))
    x, weights, _ = draw("float32", 2, 30)
    sizes = jnp.asarray([3, 0, 17, 1, 0, 9], jnp.int32)
    first = np.asarray(run(x, weights, sizes))
    moved = np.roll(x, 4, axis=0)  # the rows of group 2 now start at 7, behind others
    second = np.asarray(run(moved, weights, jnp.asarray([2, 5, 17, 0, 2, 4], jnp.int32)))
    np.testing.assert_array_equal(first[3:20], second[7:24])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weights": jnp.zeros((6, 3, K, N))}, "G must be 1 or 2"),
        ({"weights": jnp.zeros((6, 1, K + 1, N))}, "K is"),
        ({"weights": jnp.zeros((6, 1, K, N), jnp.int32)}, "weights must be one of .* not int32"),
        ({"group_sizes": jnp.zeros(7, jnp.int32)}, "W is 6, less than the 7 groups"),
        ({"group_sizes": jnp.zeros(6)}, "group_sizes must be int32"),
        ({"scales": jnp.zeros((6, 2, N))}, "G is 2 but was 1"),
    ],
)
def test_refuses_what_does_not_fit(change: dict, message: str) -> None:
    arguments = {
        "x": jnp.zeros((4, K)),
        "weights": jnp.zeros((6, 1, K, N)),
        "scales": None,
        "group_sizes": jnp.zeros(6, jnp.int32),
        **change,
    }
    with pytest.raises(ValueError, match=message):
        grouped_matmul(**arguments, out_dtype=jnp.float32, implementation="tiled")


PANELS = {
    "one panel": tpu.Tiles(panel=48, columns=256, rows=(16, 32)),
    "many panels": tpu.Tiles(panel=16, columns=128, rows=(16,)),
    "groups straddle": tpu.Tiles(panel=32, columns=128, rows=(16, 32)),
}
INTERPRET = pltpu.InterpretParams(detect_races=True, uninitialized_memory="nan")


@pytest.mark.parametrize(
    ("sizes", "tiles", "num_products", "dtype"),
    [
        ("ragged", "groups straddle", 1, "bfloat16"),
        ("ragged", "many panels", 2, "bfloat16"),
        ("one group", "many panels", 1, "bfloat16"),
        ("first", "groups straddle", 2, "int8"),
        ("none", "one panel", 1, "bfloat16"),
        ("even", "one panel", 2, "float8_e4m3fn"),
        ("padding behind", "groups straddle", 1, "int8"),
    ],
)
def test_the_tpu_kernel_in_the_interpreter(sizes: str, tiles: str, num_products: int, dtype: str) -> None:
    """Races are reported, and memory that nobody wrote is NaN."""
    counts = SIZES[sizes]
    num_rows = sum(counts) + (11 if sizes == "padding behind" else 0) or 3
    rng = np.random.default_rng(1)
    x, weights, scales = draw(dtype, num_products, num_rows, depth=128, width=256, rng=rng)
    x = x.astype(ml_dtypes.bfloat16)
    others = np.full_like(weights, np.nan if dtype == "bfloat16" else 1)  # of the layers around this one
    y = tpu.grouped_matmul(
        jnp.asarray(x),
        jnp.asarray(np.concatenate([others, weights, others])),
        None if scales is None else jnp.asarray(scales, jnp.float32),
        jnp.asarray(counts, jnp.int32),
        len(weights),
        jnp.float32,
        tiles=PANELS[tiles],
        interpret=INTERPRET,
    )
    assert y.shape == (num_rows, 256)
    wanted = numpy_grouped(x, weights, scales, counts)
    np.testing.assert_allclose(np.asarray(y)[: sum(counts)], wanted, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("rows", [1, 8, 37, 130, 1024, 16384])
@pytest.mark.parametrize(("depth", "width", "products"), [(2048, 768, 2), (192, 2048, 1), (14336, 4096, 1)])
@pytest.mark.parametrize("chip", [("v5e", 128, 128), ("v6e", 128, 256), ("tpu7x", 64, 256)])
def test_tiles_fit(rows: int, depth: int, width: int, products: int, chip: tuple[str, int, int]) -> None:
    name, mebibytes, mxu = chip
    key = tuned.TuningKey(rows=rows, depth=depth, width=width, products=products, weight_dtype="bfloat16")
    tiles = tuned.choose_tiles(key, tuned.Chip(name=name, vmem_bytes=mebibytes << 20, mxu_size=mxu))
    assert width % tiles.columns == 0 and (tiles.columns == width or tiles.columns % 128 == 0)
    assert tiles.panel >= tiles.rows[-1] and list(tiles.rows) == sorted(set(tiles.rows))
    assert all(size % 16 == 0 for size in (tiles.panel, *tiles.rows))
    weights = jax.ShapeDtypeStruct((8, products, depth, width), jnp.bfloat16)
    assert tpu.vmem_bytes(tiles, weights, None, 2, 2) < mebibytes << 20


@pytest.mark.parametrize(
    ("dtype", "weight_dtype", "depth", "message"),
    [
        ("float32", "bfloat16", 128, "dtype float32 is not supported"),
        ("bfloat16", "float32", 128, "weight dtype float32"),
        ("bfloat16", "bfloat16", 120, "depth 120"),
    ],
)
def test_refuses_at_start_what_the_tpu_kernel_cannot_do(
    dtype: str, weight_dtype: str, depth: int, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        check_supported(dtype, weight_dtype, depth, 256)


def test_a_shape_without_tuned_tiles_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    chip = tuned.Chip(name="v6e", vmem_bytes=128 << 20, mxu_size=256)
    known = tuned.TuningKey(rows=1024, depth=2048, width=768, products=2, weight_dtype="bfloat16")
    assert tuned.choose_tiles(known, chip) == tpu.Tiles(panel=256, columns=768, rows=(128, 256))
    assert not caplog.records
    unknown = tuned.TuningKey(rows=1040, depth=2048, width=768, products=2, weight_dtype="bfloat16")
    assert tuned.choose_tiles(unknown, chip) == tuned.choose_tiles(unknown, chip)
    assert len(caplog.records) == 1 and "rows=1040" in caplog.text
