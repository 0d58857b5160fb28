"""`baton plan`: what it refuses, what it says, and that it is true to what the compiler says."""

import json

import pytest

from deploy.plan import describe
from tests.aot import MODELS, compiles, plan, run_cli

SMALL = {
    "architectures": ["Qwen3ForCausalLM"],
    "hidden_size": 512,
    "intermediate_size": 1024,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "vocab_size": 4096,
    "max_position_embeddings": 4096,
    "hidden_act": "silu",
    "torch_dtype": "bfloat16",
}


@pytest.fixture
def small(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(SMALL))
    return tmp_path


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--topology", "v9-8"], "--topology: unknown TPU topology 'v9-8'; known are v5e-1,"),
        (["--topology", "v6e-1", "--max-batch", "0"], "--max-batch must be at least 1, not 0"),
        (["--topology", "v6e-1", "--context", "-5"], "--context must be at least 1, not -5"),
        (["--topology", "v6e-1", "--context", "8192"], "--context is 8192, the model's context is 4096"),
        (["--topology", "v6e-1", "--context", "64", "--prefill-tokens", "4"], "--prefill-tokens must be at least 5"),
        (["--topology", "v6e-1", "--context", "64", "--ep", "0"], "--ep must be at least 1, not 0"),
    ],
)
def test_bad_flags_are_named(small, flags, message):
    done = run_cli("plan", "--model", str(small), *flags)
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"architectures": ["GPT2LMHeadModel"]}, "unsupported architecture (GPT2LMHeadModel)"),
        ({**SMALL, "hidden_size": -1}, "hidden_size must be a positive integer"),
        (None, "config.json does not exist"),
    ],
)
def test_a_bad_model_is_named(tmp_path, config, message):
    if config is not None:
        (tmp_path / "config.json").write_text(json.dumps(config))
    done = run_cli("plan", "--model", str(tmp_path), "--topology", "v6e-1")
    assert done.returncode == 2
    assert "--model" in done.stderr
    assert message in done.stderr


class TestCompiled:
    pytestmark = compiles

    @pytest.mark.parametrize(
        ("config", "flags", "message"),
        [
            ({"head_dim": 96}, (), "head_dim 96 is not supported; supported: 64, 128, 256"),
            ({}, ("--max-batch", "8192"), "a page table of 262144 ids does not fit scalar memory"),
        ],
    )
    def test_what_the_kernels_cannot_do_is_refused(self, tmp_path, config, flags, message):
        (tmp_path / "config.json").write_text(json.dumps(SMALL | config))
        done = run_cli("plan", "--model", str(tmp_path), "--topology", "v6e-1", "--context", "4096", *flags)
        assert done.returncode == 2
        assert message in done.stderr
        assert "Traceback" not in done.stderr

    def test_a_small_model_on_four_chips(self, small):
        status, result = plan(small, "--topology", "v6e-4", "--max-batch", "8", "--context", "1024")
        assert (status, result["fits"]) == (0, True)
        assert result["suggestion"] is None
        layers = SMALL["num_hidden_layers"]
        for role in ("prefill", "decode"):
            counts = {kind: one["count"] for kind, one in result["collectives"][role].items()}
            assert counts == {"all-reduce": 2 * layers + 1, "all-gather": 1}
        embedding = 2 * 4096 * 512
        layer = 512 * (8 + 2 * 4 + 8) * 128 + 3 * 512 * 1024
        norms = layers * (2 * 512 + 2 * 128) + 512
        assert result["model"]["parameters"] == embedding + layers * layer + norms
        weights = (2 * (embedding + layers * layer) / 4 + 4 * norms) / 2**30
        assert result["hbm_gib"]["weights"] == pytest.approx(weights, abs=1e-3)
        token_gib = layers * 2 * 4 * 128 * 2 / 4 / 2**30
        assert result["hbm_gib"]["kv"] == pytest.approx(result["kv_tokens"] * token_gib, abs=1e-3)
        used = sum(result["hbm_gib"][part] for part in ("weights", "kv", "slots", "workspace"))
        assert used <= result["hbm_gib"]["limit"]
        assert result["concurrent_sequences"] == result["kv_tokens"] // 1024
        assert result["decode_itl_ms"] > result["steps"]["decode"]["bound_ms"] > 0
        assert result["prefill_tokens_per_s"] > 0

    def test_more_devices_than_kv_heads_make_row_shards(self, small):
        status, result = plan(small, "--topology", "v6e-8", "--role", "decode", "--max-batch", "9", "--context", "1024")
        assert (status, result["split"]) == (0, {"tp": 4, "ep": 1, "dp": 2})
        counts = {kind: one["count"] for kind, one in result["collectives"]["decode"].items()}
        assert counts == {"all-reduce": 2 * SMALL["num_hidden_layers"] + 1, "all-gather": 1}
        token_gib = SMALL["num_hidden_layers"] * 2 * 4 * 128 * 2 / 4 / 2**30
        assert result["hbm_gib"]["kv"] == pytest.approx(result["kv_tokens"] / 2 * token_gib, abs=1e-3)
        assert result["concurrent_sequences"] == result["kv_tokens"] // 2 // 1024 * 2
        assert result["steps"]["decode"]["temp_gib"] < result["steps"]["decode"]["layer_kv_gib"] / 10

    def test_copies_of_kv_heads_where_asked_for(self, small):
        flags = ["--role", "decode", "--max-batch", "8", "--context", "1024"]
        status, result = plan(small, "--topology", "v6e-8", "--tp", "8", *flags)
        assert (status, result["split"]) == (0, {"tp": 8, "ep": 1, "dp": 1})
        token_gib = SMALL["num_hidden_layers"] * 2 * 1 * 128 * 2 / 2**30  # one head on each device
        assert result["hbm_gib"]["kv"] == pytest.approx(result["kv_tokens"] * token_gib, abs=1e-3)
        assert result["steps"]["decode"]["temp_gib"] < result["steps"]["decode"]["layer_kv_gib"] / 10

    def test_a_split_that_is_impossible_names_its_flags(self, small):
        done = run_cli("plan", "--model", str(small), "--topology", "v6e-8", "--tp", "3", "--context", "1024")
        assert done.returncode == 2
        assert "--topology v6e-8 has 8 devices: --tp 3: no split of that kind takes 8 devices" in done.stderr
        done = run_cli("plan", "--model", str(small), "--topology", "v6e-8", "--ep", "2", "--context", "1024")
        assert done.returncode == 2
        assert "--ep 2: ep is 2 but Qwen3ForCausalLM has no experts" in done.stderr

    def test_experts_take_the_devices_that_heads_leave(self, tmp_path):
        changes = {"architectures": ["Qwen3MoeForCausalLM"], "num_experts": 64, "num_experts_per_tok": 2}
        moe = {**SMALL, **changes, "moe_intermediate_size": 8192, "decoder_sparse_step": 1, "mlp_only_layers": []}
        (tmp_path / "config.json").write_text(json.dumps(moe))
        flags = ["--role", "decode", "--max-batch", "16", "--context", "1024"]
        status, result = plan(tmp_path, "--topology", "v6e-8", *flags)
        assert (status, result["split"]) == (0, {"tp": 4, "ep": 2, "dp": 1})
        layers, found = SMALL["num_hidden_layers"], result["collectives"]["decode"]
        # Of rows per layer two, of the embedding one, of counts per layer one (as a gather or a sum), of logits one.
        assert found["all-reduce"]["count"] + found["all-gather"]["count"] == 3 * layers + 2
        assert found["ragged-all-to-all"]["count"] == 2 * layers
        one_expert, one_layer_kv = 3 * 512 * 8192 * 2, result["steps"]["decode"]["layer_kv_gib"] * 2**30
        gathered = found["all-gather"]["largest_bytes"]
        assert gathered < one_expert and gathered < one_layer_kv / 10  # logits and counts: no weights, no cache
        of_a_device = 64 * one_expert / 8  # more than VMEM holds
        assert result["steps"]["decode"]["temp_gib"] * 2**30 < of_a_device / 10, "a layer's experts are copied"

    def test_one_role_compiles_one_step(self, small):
        _, result = plan(small, "--topology", "v5e-1", "--role", "decode", "--max-batch", "8", "--context", "1024")
        assert list(result["steps"]) == ["decode"]
        assert result["prefill_tokens_per_s"] is None
        assert result["collectives"] == {"decode": {}}

    def test_the_text_says_it_too(self, small):
        flags = ["--topology", "v6e-1", "--role", "prefill", "--max-batch", "8", "--context", "1024"]
        done = run_cli("plan", "--model", str(small), *flags)
        assert done.returncode == 0
        assert "It fits." in done.stdout
        assert "Prefill:" in done.stdout and "Decode:" not in done.stdout
        assert "compiling the prefill step for v6e-1" in done.stderr


@pytest.mark.slow
class TestLarge:
    pytestmark = compiles

    def test_what_does_not_fit_exits_3_and_names_the_smallest_slice_that_does(self):
        """64 GiB of weights: one chip of 31 GiB is too small, and so are two, with their cache."""
        flags = ["--topology", "v6e-1", "--role", "decode", "--max-batch", "8", "--context", "2048"]
        status, result = plan(MODELS / "qwen3-32b.json", *flags)
        assert (status, result["fits"], result["suggestion"]) == (3, False, "v6e-4")
        assert 30 < result["short_gib"] < 40
        text = describe("qwen3-32b", result)
        assert "It does not fit" in text and "v6e-4" in text


@pytest.mark.aot_matrix
@pytest.mark.timeout(1200)
@pytest.mark.parametrize(
    ("model", "topology", "split"),
    [
        ("qwen3-8b", "v6e-1", {"tp": 1, "ep": 1, "dp": 1}),
        ("qwen3-8b", "v6e-4", {"tp": 4, "ep": 1, "dp": 1}),
        ("qwen3-8b", "tpu7x-2", {"tp": 2, "ep": 1, "dp": 1}),
        ("qwen3-32b", "v6e-8", {"tp": 8, "ep": 1, "dp": 1}),
        ("qwen3-32b", "tpu7x-8", {"tp": 8, "ep": 1, "dp": 1}),
        ("qwen3-30b-a3b", "v6e-8", {"tp": 4, "ep": 2, "dp": 1}),
        ("qwen3-30b-a3b", "tpu7x-8", {"tp": 4, "ep": 2, "dp": 1}),
        ("qwen3-235b-a22b", "v6e-32", {"tp": 4, "ep": 8, "dp": 1}),
        ("qwen3-235b-a22b", "tpu7x-16", {"tp": 4, "ep": 4, "dp": 1}),
    ],
)
class TestWholeSteps:
    pytestmark = compiles

    def test_of_a_real_model(self, model, topology, split):
        """Neither weights nor cache are gathered or copied; a small batch, whose logits are small beside both."""
        batch, chunk, prefill_rows, vocab = 16, 512, 4, 151936
        flags = ["--topology", topology, "--max-batch", str(batch), "--prefill-tokens", str(chunk)]
        status, result = plan(MODELS / f"{model}.json", *flags)
        assert (status, result["split"]) == (0, split)
        shards = split["ep"] * split["dp"]
        for role, rows in (("decode", batch // shards), ("prefill", prefill_rows)):
            step = result["steps"][role]
            largest = {kind: one["largest_bytes"] for kind, one in step["collectives"].items()}
            assert largest.get("all-gather", 0) <= 4 * vocab * rows, "more than logits are gathered"
            assert largest.get("all-reduce", 0) <= 4 * 8192 * chunk, "more than activations are added up"
            assert ("all-reduce" in largest) == (split["tp"] > 1)
            assert ("ragged-all-to-all" in largest) == (split["ep"] > 1)
            exchange = largest.get("ragged-all-to-all", 0) / 2**30
            assert step["temp_gib"] < step["layer_kv_gib"] / 4 + 4 * exchange, role
