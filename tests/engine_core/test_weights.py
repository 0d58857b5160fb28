"""Reading checkpoints: values, and every way in which one can be broken."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from engine_core import weights
from engine_core.config import Degrees
from engine_core.errors import CheckpointError
from engine_core.layers.linear import choose_numbers
from engine_core.layers.moe import choose_experts
from engine_core.mesh import make_mesh
from engine_core.models.decoder import Decoder
from engine_core.models.registry import load_spec
from engine_core.weights import load_params, stored_dtype

GOLDEN = Path(__file__).parents[1] / "golden"


def load(directory: Path, *, scan: bool = False, dtype: str = "float32", progress: weights.Progress | None = None):
    experts = choose_experts("auto", dtype, "cpu")
    model = Decoder(load_spec(directory), choose_numbers(dtype, "cpu"), degrees=Degrees(), experts=experts, scan=scan)
    return model, load_params(directory, model, make_mesh(Degrees(), jax.devices()), progress)


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """A copy of the tied qwen2 checkpoint that a test may break."""
    directory = tmp_path / "checkpoint"
    shutil.copytree(GOLDEN / "qwen2", directory)
    return directory


def rewrite(directory: Path, change) -> None:
    tensors = load_file(directory / "model.safetensors")
    change(tensors)
    save_file(tensors, directory / "model.safetensors")


def split(directory: Path) -> dict[str, str]:
    """Turn a checkpoint into two files with an index; returns the weight map."""
    tensors = load_file(directory / "model.safetensors")
    (directory / "model.safetensors").unlink()
    names = sorted(tensors)
    weight_map = {}
    for part, chosen in enumerate((names[::2], names[1::2])):
        file = f"model-{part}.safetensors"
        save_file({name: tensors[name] for name in chosen}, directory / file)
        weight_map |= dict.fromkeys(chosen, file)
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return weight_map


@pytest.mark.parametrize("case", ["qwen2", "qwen3_moe", "mixtral"])
def test_leaves_hold_the_tensors_their_plan_names(case: str) -> None:
    for scan in (False, True):
        model, params = load(GOLDEN / case, scan=scan)
        tensors = load_file(GOLDEN / case / "model.safetensors")
        plans = jax.tree.leaves(model.plan())
        arrays = jax.tree.leaves(params)
        for plan, array in zip(plans, arrays, strict=True):
            parts = [np.concatenate([tensors[source.name] for source in part]) for part in plan.parts]
            wanted = np.stack([part.T if plan.transposed else part for part in parts])
            np.testing.assert_array_equal(array, wanted.reshape(plan.shape).astype(np.float32))
        assert {source.name for plan in plans for part in plan.parts for source in part} == set(tensors)


def test_matrices_are_stored_in_the_compute_dtype_and_vectors_in_f32() -> None:
    _, params = load(GOLDEN / "llama", dtype="bfloat16")
    dtypes = {(array.ndim, array.dtype) for array in jax.tree.leaves(params)}
    assert dtypes == {(1, np.dtype(np.float32)), (2, np.dtype(ml_dtypes.bfloat16))}


@pytest.mark.parametrize(
    ("name", "dtype", "wanted"),
    [
        ("model.layers.1.mlp.up_proj.weight", "bfloat16", "bfloat16"),
        ("model.layers.1.mlp.up_proj.weight", "float32", "float32"),
        ("model.layers.1.mlp.up_proj.weight", "float16", "float32"),
        ("model.embed_tokens.weight", "float32", "float32"),
        ("model.norm.weight", "float32", "bfloat16"),
    ],
)
def test_matrices_that_are_stored_in_bfloat16_are_known(checkpoint: Path, name: str, dtype: str, wanted: str) -> None:
    def change(tensors: dict[str, np.ndarray]) -> None:
        tensors[name] = tensors[name].astype(dtype)

    rewrite(checkpoint, change)
    assert stored_dtype(checkpoint) == wanted
    split(checkpoint)
    assert stored_dtype(checkpoint) == wanted


def test_files_with_an_index_equal_a_single_file(checkpoint: Path) -> None:
    _, single = load(checkpoint)
    split(checkpoint)
    _, sharded = load(checkpoint)
    jax.tree.map(np.testing.assert_array_equal, sharded, single)


def test_progress_ends_at_the_total() -> None:
    seen: list[tuple[int, int]] = []
    load(GOLDEN / "qwen3", progress=lambda done, total: seen.append((done, total)))
    tensors = load_file(GOLDEN / "qwen3" / "model.safetensors")
    total = sum(tensor.nbytes for tensor in tensors.values())
    assert seen[-1] == (total, total)
    assert [done for done, _ in seen] == sorted({done for done, _ in seen})


def test_names_missing_weights(checkpoint: Path) -> None:
    rewrite(checkpoint, lambda tensors: tensors.pop("model.layers.1.self_attn.k_proj.bias"))
    with pytest.raises(CheckpointError, match=r"missing weights: model\.layers\.1\.self_attn\.k_proj\.bias$"):
        load(checkpoint)


def test_an_untied_model_needs_its_head(checkpoint: Path) -> None:
    config = json.loads((checkpoint / "config.json").read_text())
    (checkpoint / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": False}))
    with pytest.raises(CheckpointError, match=r"missing weights: lm_head\.weight$"):
        load(checkpoint)


def test_names_unexpected_weights(checkpoint: Path) -> None:
    def change(tensors: dict[str, np.ndarray]) -> None:
        tensors |= {f"model.layers.{i}.extra.weight": np.zeros(1, np.float32) for i in range(7)}

    rewrite(checkpoint, change)
    with pytest.raises(CheckpointError, match=r"unexpected weights: model\.layers\.0\.extra\.weight, .* and 2 more$"):
        load(checkpoint)


def test_what_is_derived_or_tied_may_be_there(checkpoint: Path) -> None:
    def change(tensors: dict[str, np.ndarray]) -> None:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].copy()
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.zeros(8, np.float32)

    rewrite(checkpoint, change)
    load(checkpoint)


def test_names_a_weight_of_another_shape(checkpoint: Path) -> None:
    def change(tensors: dict[str, np.ndarray]) -> None:
        tensors["model.norm.weight"] = tensors["model.norm.weight"][:-1].copy()

    rewrite(checkpoint, change)
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight has shape \[63\], config\.json asks for \[64\]"):
        load(checkpoint)


def test_names_a_weight_of_unknown_dtype(checkpoint: Path) -> None:
    def change(tensors: dict[str, np.ndarray]) -> None:
        tensors["model.norm.weight"] = np.zeros(64, np.int8)

    rewrite(checkpoint, change)
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight has unsupported dtype I8"):
        load(checkpoint)


@pytest.mark.parametrize("kept", [0, 4, 1000, -1])
def test_names_a_truncated_file(checkpoint: Path, kept: int) -> None:
    path = checkpoint / "model.safetensors"
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(CheckpointError, match=r"model\.safetensors is truncated"):
        load(checkpoint)


def test_names_an_absent_file(checkpoint: Path) -> None:
    split(checkpoint)
    (checkpoint / "model-1.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"model-1\.safetensors does not exist"):
        load(checkpoint)
    (checkpoint / "model.safetensors.index.json").unlink()
    with pytest.raises(CheckpointError, match=r"model\.safetensors does not exist"):
        load(checkpoint)


def test_an_index_may_not_name_what_no_file_holds(checkpoint: Path) -> None:
    weight_map = split(checkpoint) | {"model.ghost": "model-0.safetensors"}
    (checkpoint / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(CheckpointError, match=r"model\.ghost"):
        load(checkpoint)
    (checkpoint / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(CheckpointError, match="no weight_map"):
        load(checkpoint)


def fuse_experts(tensors: dict[str, np.ndarray]) -> None:
    """Rewrite a MoE checkpoint as transformers 5 holds it in memory: all experts of a layer in two tensors."""
    names = {"mlp": ("gate_proj", "up_proj", "down_proj"), "block_sparse_moe": ("w1", "w3", "w2")}
    for layer in range(4):
        for block, (gate, up, down) in names.items():
            prefix = f"model.layers.{layer}.{block}"
            count = sum(name.startswith(f"{prefix}.experts.") and name.endswith(f"{down}.weight") for name in tensors)
            if not count:
                continue
            experts = [
                [tensors.pop(f"{prefix}.experts.{e}.{x}.weight") for x in (gate, up, down)] for e in range(count)
            ]
            fused = f"model.layers.{layer}.mlp"
            tensors[f"{fused}.experts.gate_up_proj"] = np.stack([np.concatenate(e[:2]) for e in experts])
            tensors[f"{fused}.experts.down_proj"] = np.stack([e[2] for e in experts])
            tensors[f"{fused}.gate.weight"] = tensors.pop(f"{prefix}.gate.weight")


@pytest.mark.parametrize("case", ["qwen3_moe", "mixtral"])
def test_fused_experts_equal_single_ones(case: str, tmp_path: Path) -> None:
    directory = tmp_path / "fused"
    shutil.copytree(GOLDEN / case, directory)
    rewrite(directory, fuse_experts)
    seen: list[tuple[int, int]] = []
    _, fused = load(directory, scan=True, progress=lambda done, total: seen.append((done, total)))
    _, single = load(GOLDEN / case, scan=True)
    jax.tree.map(np.testing.assert_array_equal, fused, single)
    assert seen[-1][0] == seen[-1][1]


def test_fused_experts_of_another_shape(tmp_path: Path) -> None:
    directory = tmp_path / "fused"
    shutil.copytree(GOLDEN / "mixtral", directory)

    def change(tensors: dict[str, np.ndarray]) -> None:
        fuse_experts(tensors)
        name = "model.layers.1.mlp.experts.down_proj"
        tensors[name] = np.concatenate([tensors[name]] * 2)

    rewrite(directory, change)
    with pytest.raises(CheckpointError, match=r"experts\.0\.w2\.weight has shape \[10, 64, 72\]"):
        load(directory)


def test_no_host_of_a_slice_reads_all_weights() -> None:
    """Two processes as two hosts of two devices each: a host reads the parts of its own devices, each once."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "tests.engine_core.two_host_loader", str(port)]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""}
    hosts = [
        subprocess.Popen(
            [*command, str(host)], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        for host in range(2)
    ]
    try:
        answers = [host.communicate(timeout=120) for host in hosts]
    finally:
        for host in hosts:
            host.kill()
    for host, (_, errors) in zip(hosts, answers, strict=True):
        assert host.returncode == 0, errors[-4000:]
    for found, share in zip(zip(*(out.splitlines() for out, _ in answers), strict=True), (0.52, 0.75), strict=True):
        for result in map(json.loads, found):
            assert result["devices"] == [2, 4]
            assert result["read"] == result["own"] < share * result["whole"], result
            assert result["largest"] < result["whole"] / 4, result
