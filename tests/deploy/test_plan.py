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
        done = run_cli("plan", "--model", str(tmp_path), "--topology", "v6e-1", *flags)
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

    def test_a_slice_that_would_split_a_head_is_named(self, small):
        done = run_cli("plan", "--model", str(small), "--topology", "v6e-8")
        assert done.returncode == 2
        assert "--topology v6e-8 has 8 devices: tp 8 does not divide the model's num_key_value_heads 4" in done.stderr

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
