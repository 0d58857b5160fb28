"""The MoE layer: router, grouped and fused experts against each other and against Hugging Face's layers."""

from __future__ import annotations

import importlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from engine_core.config import Degrees
from engine_core.errors import ConfigError
from engine_core.kernels.moe.router import route
from engine_core.layers.linear import choose_numbers
from engine_core.layers.moe import MoeMlp, choose_experts
from engine_core.layers.params import Template
from engine_core.models.spec import ExpertNames, MoeSpec

EXPERTS, HIDDEN, SIZE, PER_TOKEN = 7, 24, 20, 3
LOADS = ["random", "one expert", "empty experts", "padded", "padding only"]


def moe_spec(*, normalize: bool) -> MoeSpec:
    return MoeSpec(
        num_experts=EXPERTS,
        experts_per_token=PER_TOKEN,
        intermediate_size=SIZE,
        normalize=normalize,
        layers=(True,),
        names=ExpertNames(block="mlp", gate="gate_proj", up="up_proj", down="down_proj"),
    )


def make_layer(experts: str, *, normalize: bool, dtype: str = "float32") -> Template:
    choice = choose_experts(experts, dtype, "cpu")
    return Template(MoeMlp(moe_spec(normalize=normalize), HIDDEN, choose_numbers(dtype, "cpu"), Degrees(), choice))


def run(layer: Template, leaves: list, x: np.ndarray, valid: np.ndarray) -> np.ndarray:
    return np.asarray(jax.jit(lambda leaves, x, valid: layer.bind(leaves)(x, valid))(leaves, x, valid))


def draw(layer: Template, load: str, num_rows: int) -> tuple[list[np.ndarray], np.ndarray, np.ndarray]:
    rng = np.random.default_rng(num_rows)
    leaves = [rng.standard_normal(param.shape).astype(np.float32) / 2 for param in layer.params]
    x = rng.standard_normal((num_rows, HIDDEN)).astype(np.float32)
    router = next(leaf for leaf in leaves if leaf.ndim == 2)
    if load == "one expert":  # every row's likeliest expert, by far, is number 4
        x = 5 * router[4] + 0.05 * x
    if load == "empty experts":  # 0, 1 and 2 are never among the top 3 of 7
        router[:3] = -(router[3:].sum(0))
        x = np.abs(x) * np.sign(router[3:].sum(0))
    valid = np.ones(num_rows, bool)
    if load.startswith("padd"):
        valid[num_rows // 2 if load == "padded" else 0 :] = False
    return leaves, x, valid


@pytest.mark.parametrize("load", LOADS)
@pytest.mark.parametrize("num_rows", [1, 13, 64])
@pytest.mark.parametrize("normalize", [False, True])
def test_grouped_equals_fused(load: str, num_rows: int, normalize: bool) -> None:
    grouped, fused = (make_layer(experts, normalize=normalize) for experts in ("grouped", "fused"))
    leaves, x, valid = draw(grouped, load, num_rows)
    found, wanted = (run(layer, leaves, x, valid) for layer in (grouped, fused))
    np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-4 * max(1, np.abs(wanted).max()))
    assert not found[~valid].any()
    assert found[valid].all()


def test_the_loads_are_what_they_are_called() -> None:
    layer = make_layer("fused", normalize=True)
    for load, hit in (("one expert", 1), ("empty experts", EXPERTS - 3)):
        leaves, x, valid = draw(layer, load, 64)
        router = next(leaf for leaf in leaves if leaf.ndim == 2)
        routing = route(jnp.asarray(x @ router.T), jnp.asarray(valid), PER_TOKEN, normalize=True)
        chosen = np.asarray(routing.experts[:, 0] if load == "one expert" else routing.experts)
        assert len(set(chosen.ravel().tolist())) <= hit


def test_padding_rows_are_routed_nowhere() -> None:
    logits = jnp.asarray(np.random.default_rng(0).standard_normal((4, EXPERTS)), jnp.float32)
    routing = route(logits, jnp.asarray([True, False, True, False]), PER_TOKEN, normalize=False)
    assert (np.asarray(routing.experts[1::2]) == EXPERTS).all()
    assert (np.asarray(routing.experts[::2]) < EXPERTS).all()
    assert (np.asarray(routing.weights[::2]).sum(-1) < 1).all()


def test_bfloat16_stays_near_float32() -> None:
    exact, rounded = (make_layer("grouped", normalize=True, dtype=dtype) for dtype in ("float32", "bfloat16"))
    leaves, x, valid = draw(exact, "random", 32)
    wanted = run(exact, leaves, x, valid)
    found = run(rounded, [jnp.asarray(leaf, jnp.bfloat16) for leaf in leaves], x, valid)
    difference = np.abs(wanted - found).max(-1)  # a row whose choice of experts flips may differ more
    assert 0 < np.median(difference) < 0.02 * np.abs(wanted).max()


@pytest.mark.torch
@pytest.mark.parametrize("experts", ["grouped", "fused"])
@pytest.mark.parametrize("load", ["random", "one expert", "empty experts"])
@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral"])
def test_equals_the_layer_of_transformers(experts: str, load: str, family: str) -> None:
    torch = pytest.importorskip("torch")
    modeling = importlib.import_module(f"transformers.models.{family}.modeling_{family}")
    configs = importlib.import_module(f"transformers.models.{family}.configuration_{family}")
    layer = make_layer(experts, normalize=family == "mixtral")
    leaves, x, valid = draw(layer, load, 29)
    sizes = {"hidden_size": HIDDEN, "num_experts_per_tok": PER_TOKEN}
    if family == "mixtral":
        config = configs.MixtralConfig(**sizes, num_local_experts=EXPERTS, intermediate_size=SIZE)
        block = modeling.MixtralSparseMoeBlock(config)
    else:
        config = configs.Qwen3MoeConfig(**sizes, num_experts=EXPERTS, moe_intermediate_size=SIZE)
        block = modeling.Qwen3MoeSparseMoeBlock(config)
    router, gate_up, down = (
        next(leaf for leaf in leaves if leaf.shape[:-2] == lead) for lead in ((), (EXPERTS, 2), (EXPERTS, 1))
    )
    hugging_face = {
        "gate.weight": router,
        "experts.gate_up_proj": np.concatenate([gate_up[:, 0], gate_up[:, 1]], axis=-1).swapaxes(1, 2),
        "experts.down_proj": down[:, 0].swapaxes(1, 2),
    }
    with torch.no_grad():
        for name, parameter in block.named_parameters():
            parameter.copy_(torch.tensor(hugging_face[name]))
        wanted = block(torch.tensor(x)[None])[0].numpy()
    found = run(layer, leaves, x, valid)
    np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-4 * np.abs(wanted).max())


def test_sizes_that_the_tpu_kernel_lacks_are_refused_when_the_model_is_built() -> None:
    choice = choose_experts("auto", "bfloat16", "tpu")
    with pytest.raises(ConfigError, match="depth 24 of an expert is no multiple of 16"):
        MoeMlp(moe_spec(normalize=False), HIDDEN, choose_numbers("bfloat16", "tpu"), Degrees(), choice)
