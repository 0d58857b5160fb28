"""Compiled kernels of the CPU: products against numpy, attention against the reference, a model against XLA's."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks.checkpoints import SHAPES, write_random_checkpoint
from engine_core.compiled_library import COMPILERS, find_compiler
from engine_core.config import Degrees, EngineConfig, ModelConfig
from engine_core.cpu_kernels import open_cpu_kernels, open_numbers
from engine_core.errors import ConfigError
from engine_core.kernels.cpu import attention, products
from engine_core.kernels.cpu.choice import CpuKernels, choose_kernels
from engine_core.kernels.cpu.heads import split_heads
from engine_core.kernels.cpu.library import open_library
from engine_core.layers.linear import choose_numbers, matmul
from engine_core.layers.rotary import inverse_frequencies, rotate, rotation
from engine_core.types import Numerics
from tests.engine_core.paged_runner import Chunk, PagedRunner
from tests.engine_core.parity import GOLDEN, check_parity, load_expected
from tests.engine_core.test_paged_attention import TOLERANCE, make_case, numpy_attention
from tests.engine_core.virtual_devices import results_of

HEADS = (6, 2, 32)


@pytest.fixture(scope="module")
def kept(tmp_path_factory):
    """A directory for compiled things."""
    return tmp_path_factory.mktemp("kept")


@pytest.fixture(scope="module")
def library(kept):
    if find_compiler(COMPILERS) is None:
        pytest.skip("no C++ compiler")
    built = open_library(kept / "cpu_kernels", COMPILERS)
    assert built is not None
    return built


@pytest.fixture(scope="module")
def kernels(library):
    return CpuKernels(library=library, rows=(1, 4, 16, 64, 256), weight="float32")


@pytest.fixture(scope="module")
def narrow(kernels):
    """Kernels of a float32 model that holds its weights in bfloat16."""
    return replace(kernels, weight="bfloat16")


@pytest.mark.parametrize(("dtype", "held"), [("float32", "float32"), ("bfloat16", "bfloat16"), ("float32", "bfloat16")])
@pytest.mark.parametrize(
    ("rows", "depth", "width"),
    [
        *((1, 32, 7), (2, 1024, 1), (5, 1056, 100), (7, 3072, 49), (12, 544, 50), (33, 64, 48), (130, 2080, 97)),
        *(
            (1, 32, 32),
            (9, 160, 64),
            (13, 96, 32),
            (17, 1056, 64),
            (40, 544, 96),
            (64, 96, 1056),
            (65, 64, 160),
            (97, 2080, 608),
        ),  # AMX takes these
    ],
)
def test_products_are_numpys(library, dtype, held, rows, depth, width):
    rng = np.random.default_rng(rows)
    x = jnp.asarray(rng.standard_normal((rows, depth)), dtype)
    weight = jnp.asarray(rng.standard_normal((width, depth)), held)
    exact = np.asarray(x, np.float64) @ np.asarray(weight, np.float64).T
    ours = jax.jit(lambda x, weight: products.matmul(x, weight, library.matmul))(x, weight)
    assert ours.shape == (rows, width) and ours.dtype == jnp.float32
    np.testing.assert_allclose(ours, exact, rtol=0, atol=1e-6 * depth**0.5 * 4)


@pytest.mark.parametrize(("rows", "depth", "width"), [(1, 32, 16), (65, 544, 48), (97, 1056, 608)])
def test_gated_products_are_numpys(library, rows, depth, width):
    if library.gated is None:
        pytest.skip("no tiles for bfloat16")
    rng = np.random.default_rng(rows)
    x = jnp.asarray(rng.standard_normal((rows, depth)), jnp.bfloat16)
    weight = jnp.asarray(rng.standard_normal((2 * width, depth)) * 4 / depth**0.5, jnp.bfloat16)
    gates, others = np.split(np.asarray(x, np.float64) @ np.asarray(weight, np.float64).T, 2, axis=1)
    ours = jax.jit(lambda x, weight: products.gated(x, weight, library.gated))(x, weight)
    assert ours.shape == (rows, width) and ours.dtype == jnp.bfloat16
    np.testing.assert_allclose(
        np.asarray(ours, np.float64), gates / (1 + np.exp(-gates)) * others, rtol=5e-3, atol=1e-5
    )


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("normed", [True, False], ids=["normed", "plain"])
@pytest.mark.parametrize("tokens", [1, 35])
def test_heads_are_the_layers(library, dtype, normed, tokens):
    heads, kv_heads, dim, eps = 6, 2, 96, 1e-5
    rng = np.random.default_rng(tokens)
    product, *scales = (
        jnp.asarray(rng.standard_normal(shape), jnp.float32)
        for shape in ((tokens, (heads + 2 * kv_heads) * dim), dim, dim)
    )
    turns = rotation(jnp.arange(100, 100 + tokens), inverse_frequencies(dim, 10_000.0, None))
    ours = split_heads(
        product,
        tuple(scales) if normed else None,
        turns,
        heads=heads,
        kv_heads=kv_heads,
        eps=eps,
        dtype=dtype,
        target=library.heads,
    )
    q, k, v = jnp.split(product.reshape(tokens, -1, dim), (heads, heads + kv_heads), axis=1)
    if normed:
        q, k = (
            y * jax.lax.rsqrt(jnp.mean(y * y, -1, keepdims=True) + eps) * scale
            for y, scale in zip((q, k), scales, strict=True)
        )
    tolerance = 1e-5 if dtype == "float32" else 5e-3
    for got, wanted in zip(ours, (rotate(q, *turns), rotate(k, *turns), v), strict=True):
        assert got.dtype == dtype
        np.testing.assert_allclose(np.asarray(got, np.float32), wanted, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(
    ("rows", "width", "held"), [(7, 50, "float32"), (9, 50, "float32"), (5, 64, "bfloat16"), (90, 64, "bfloat16")]
)
def test_a_row_of_a_product_does_not_see_its_neighbours(library, rows, width, held):
    rng = np.random.default_rng(0)
    x = rng.standard_normal((rows, 2048)).astype(np.float32)
    weight = jnp.asarray(rng.standard_normal((width, 2048)), held)
    product = jax.jit(lambda x: products.matmul(x, weight, library.matmul))
    other = np.full_like(x, np.inf)
    other[4] = x[4]
    np.testing.assert_array_equal(product(x)[4], product(other)[4])
    assert not np.isfinite(product(other)[3]).any()


@pytest.mark.parametrize(("rows", "width"), [(3, 33), (3, 32), (20, 32), (70, 32)])
def test_bits_of_float32_rows_are_kept_beside_bfloat16_weights(library, rows, width):
    """The lowest bits of one place are all that is left of the sum."""
    x = np.zeros((rows, 64), np.float32)
    x[:, 0], x[:, 37] = 1 + 2.0**-9 + np.arange(1, rows + 1) * 2.0**-23, -1 - 2.0**-9
    weight = jnp.ones((width, 64), jnp.bfloat16)
    ours = products.matmul(jnp.asarray(x), weight, library.matmul)
    np.testing.assert_array_equal(ours, np.tile(x[:, :1] + x[:, 37:38], (1, width)))


def test_products_of_rows_narrower_than_weights_are_refused(library):
    with pytest.raises(jax.errors.JaxRuntimeError, match="as wide as the weights"):
        products.matmul(jnp.zeros((1, 32), jnp.bfloat16), jnp.zeros((4, 32)), library.matmul).block_until_ready()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("window", [0, 1, 20])
def test_prefill_is_the_references(library, dtype, window):
    case = make_case([70, 1, 40, 5], [70, 90, 150, 64], heads=HEADS, dtype=dtype, padding=9)
    assert attention.attends(case.q, case.cache)
    wanted = case.attend("reference", window)
    np.testing.assert_allclose(case.attend(library, window), wanted, rtol=0, atol=TOLERANCE[dtype])
    assert not case.attend(library, window)[-9:].any()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("window", [0, 1, 40, 300])
@pytest.mark.parametrize("page_size", [16, 24])
def test_prefill_of_many_rows_is_the_references(library, dtype, window, page_size):
    """Several blocks of keys, whole and partial panels of rows, sequences that begin within one."""
    lens = [200, 3, 17, 40], [700, 90, 17, 300]
    case = make_case(*lens, heads=(6, 2, 64), dtype=dtype, page_size=page_size, padding=4)
    exact = numpy_attention(case, *lens, window=window)
    np.testing.assert_allclose(case.attend(library, window), exact, rtol=0, atol=TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_pages_before_the_window_may_hold_anything(library, dtype):
    case = make_case([200], [700], heads=(6, 2, 64), dtype=dtype, page_size=8)
    window, nowhere = 40, case.cache.shape[0] - 1  # a page of NaN
    first_seen = 700 - 200 + 1 - window
    other = replace(case, page_table=case.page_table.at[0, : first_seen // 8].set(nowhere))
    np.testing.assert_array_equal(other.attend(library, window), case.attend(library, window))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("window", [0, 1, 20])
def test_decode_is_the_references(library, dtype, window):
    lens = [1, 64, 0, 65, 130, 15]
    case = make_case([1] * 6, lens, heads=HEADS, dtype=dtype)
    wanted = case.attend("reference", window)
    np.testing.assert_allclose(case.attend(library, window), wanted, rtol=0, atol=TOLERANCE[dtype])
    assert not case.attend(library, window)[2].any()


def test_a_decode_row_does_not_see_its_neighbours(library):
    case = make_case([1] * 5, [9, 64, 200, 65, 33], heads=HEADS)
    together = case.attend(library)
    for row in range(5):
        np.testing.assert_array_equal(case.attend(library, rows=[row])[0], together[row])


def test_heads_that_do_not_fit_are_left_to_xla(library):
    case = make_case([5, 3], [9, 20], heads=(4, 2, 8))
    assert not attention.attends(case.q, case.cache)
    np.testing.assert_array_equal(case.attend(library), case.attend("xla"))


def test_a_model_with_compiled_products_matches_transformers(kernels):
    check_parity(
        GOLDEN / "qwen2", load_expected("qwen2"), scan=False, degrees=Degrees(), experts="auto", kernels=kernels
    )


@pytest.mark.parametrize("case", ["qwen2", "qwen3", "llama", "qwen3_moe"])
def test_a_float32_model_with_bfloat16_weights_matches_transformers(narrow, case):
    runner = check_parity(
        GOLDEN / case, load_expected(case), scan=False, degrees=Degrees(), experts="auto", kernels=narrow
    )
    for leaf in jax.tree.leaves(runner.params):  # vectors and experts are held as is computed
        is_narrow = leaf.ndim == 2 and leaf.shape[1] % products.DEPTH_ALIGN == 0
        assert leaf.dtype == ("bfloat16" if is_narrow else "float32"), leaf.shape


def test_bfloat16_weights_of_a_float32_model_on_four_devices(library, kept):
    """Where a device's part is too short for compiled products (16 places here), it is held in float32."""
    (result,) = results_of("tensor_parallel_worker", 4, str(kept / "cpu_kernels"))
    assert result["held"] == {"bfloat16": 8, "float32": 6}


@pytest.mark.parametrize(
    ("dtype", "held", "tolerance", "scan", "rows"),
    [
        ("float32", "float32", 1e-4, False, 64),
        ("float32", "float32", 1e-4, True, 64),
        ("bfloat16", "bfloat16", 0.1, False, 64),
        ("bfloat16", "bfloat16", 0.1, False, 128),
        ("float32", "bfloat16", 2e-5, False, 64),
        ("float32", "bfloat16", 2e-5, True, 64),
        ("float32", "bfloat16", 2e-5, False, 128),
    ],
    ids=["float32", "scanned", "bfloat16", "many rows", "narrow", "narrow, scanned", "narrow, many rows"],
)
def test_a_model_equals_xlas(kernels, tmp_path, dtype, held, tolerance, scan, rows):
    kernels = replace(kernels, weight=held)
    shape = SHAPES["qwen3-20m"] | {"num_hidden_layers": 2, "vocab_size": 512, "intermediate_size": 256}
    directory = write_random_checkpoint(tmp_path, shape)
    chunk = Chunk(pages=list(range(10)), start=0, tokens=range(3, 40), slot=0)
    ours = PagedRunner(directory, scan=scan, dtype=dtype, kernels=kernels).logits([chunk], rows, 2)[:37]
    theirs = PagedRunner(directory, scan=scan, dtype=dtype).logits([chunk], rows, 2)[:37]
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=tolerance)


def test_products_are_for_xla_where_it_is_the_faster(library):
    kernels = CpuKernels(library=library, rows=(4, 16), weight="float32")
    taken = [rows for rows in (1, 3, 4, 15, 16, 63, 64, 500) if kernels.multiplies(jnp.zeros((rows, 64)))]
    assert taken == [4, 15, 16, 63]
    assert not kernels.multiplies(jnp.zeros((4, 72)))
    numbers = replace(choose_numbers("float32", "cpu"), kernels=kernels)
    calls = str(jax.make_jaxpr(lambda x, w: matmul(x, w, numbers))(jnp.zeros((4, 64)), jnp.zeros((8, 64))))
    assert library.matmul in calls


def test_narrow_weights_are_held_where_their_products_are_the_faster(library):
    """At all row counts, as XLA would widen them in each step."""
    plain = choose_numbers("float32", "cpu")

    def slow(x, weight):
        return sum(matmul(x + i, weight, plain) for i in range(6))

    def fast(x, weight):
        return jnp.zeros((len(x), len(weight)))

    def fast_with_many_rows(x, weight):
        return (fast if len(x) > 64 else slow)(x, weight)

    chosen = choose_kernels(library, "float32", "bfloat16", slow)
    assert (chosen.weight, chosen.rows) == ("bfloat16", (1, 4, 16, 64, 256))
    assert choose_kernels(library, "float32", "float32", slow).weight == "float32"
    assert choose_kernels(library, "float32", "bfloat16", fast_with_many_rows).weight == "float32"
    assert choose_kernels(library, "bfloat16", "float32", fast).weight == "bfloat16"


def test_where_there_are_no_kernels_weights_are_held_as_is_computed():
    numbers = open_numbers(EngineConfig(), "float32", "cpu", GOLDEN / "qwen3", lambda _: None)
    assert (numbers.weight, numbers.kernels) == ("float32", None)


def test_xla_widens_narrow_weights_where_it_must(narrow):
    numbers = replace(choose_numbers("float32", "cpu"), kernels=replace(narrow, rows=()), weight="bfloat16")
    x = np.random.default_rng(0).standard_normal((3, 64), np.float32)
    weight = jnp.asarray(np.random.default_rng(1).standard_normal((8, 64)), jnp.bfloat16)
    np.testing.assert_allclose(matmul(jnp.asarray(x), weight, numbers), x @ np.asarray(weight, np.float32).T, atol=1e-5)
    assert (numbers.held(64), numbers.held(48)) == ("bfloat16", "float32")


def test_gated_products_are_for_many_bfloat16_rows_where_there_are_tiles(library):
    kernels = CpuKernels(library=replace(library, gated="tiles"), rows=(), weight="bfloat16")
    x, weight = jnp.zeros((65, 64), jnp.bfloat16), jnp.zeros((96, 64), jnp.bfloat16)
    assert (kernels.gated(x, weight), kernels.gated(x[:64], weight)) == ("tiles", None)
    assert kernels.gated(jnp.zeros((65, 72), jnp.bfloat16), weight) is None
    assert kernels.gated(x, weight[:80]) is None
    assert kernels.gated(x.astype(jnp.float32), weight) is None
    assert kernels.gated(x.astype(jnp.float32), weight.astype(jnp.float32)) is None
    assert replace(kernels, library=replace(library, gated=None)).gated(x, weight) is None


def test_without_a_compiler_there_is_no_library(tmp_path):
    assert open_library(tmp_path, ["no-such-compiler"]) is None


def test_a_compiler_that_fails_leaves_nothing(tmp_path, caplog):
    assert open_library(tmp_path, ["false"]) is None
    assert "cannot compile" in caplog.text
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "config",
    [
        EngineConfig(model=ModelConfig(cpu_kernels="xla")),
        EngineConfig(model=ModelConfig(cpu_kernels="compiled"), numerics=Numerics.STRICT),
        EngineConfig(model=ModelConfig(cpu_kernels="compiled"), compile_cache=""),
        EngineConfig(),
    ],
    ids=["xla asked for", "strict", "nowhere to keep them", "a small model"],
)
def test_xla_alone(config):
    assert open_cpu_kernels(config, "float32", Path(GOLDEN / "qwen3"), lambda _: None) is None


def test_kernels_that_are_asked_for_are_compiled_once_and_probed(kept, library):
    config = EngineConfig(model=ModelConfig(cpu_kernels="compiled"), compile_cache=str(kept))
    built = [file.stat().st_mtime_ns for file in (kept / "cpu_kernels").iterdir()]
    told: list[str] = []
    kernels = open_cpu_kernels(config, "bfloat16", GOLDEN / "qwen3", told.append)
    assert kernels is not None and kernels.library == library and told
    assert [file.stat().st_mtime_ns for file in (kept / "cpu_kernels").iterdir()] == built


def test_the_choice_is_checked():
    with pytest.raises(ConfigError, match="cpu_kernels"):
        EngineConfig(model=ModelConfig(cpu_kernels="gpu"))
