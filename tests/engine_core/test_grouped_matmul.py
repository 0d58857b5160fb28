"""Grouped matmul: every implementation against numpy, for every way in which rows can be spread over groups."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from engine_core.kernels.grouped_matmul import grouped_matmul

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


def draw(dtype, num_products, num_rows, seed=0):
    rng = np.random.default_rng(seed)
    x = (rng.standard_normal((num_rows, K)) / 4).astype(np.float32)
    values = rng.standard_normal((6, num_products, K, N))
    if dtype == "int8":
        return x, np.clip(values * 40, -127, 127).astype(np.int8), rng.uniform(0.01, 0.03, (6, num_products, N))
    if dtype.startswith("float8"):
        return x, values.astype(dtype), rng.uniform(0.5, 1.5, (6, num_products, N))
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
        ({"group_sizes": jnp.zeros(5, jnp.int32)}, "E is 5 but was 6"),
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
