import json

import pytest

from engine_core.errors import ConfigError
from router.simulator.profile import QWEN3_32B_TPU7X, from_plan, read_profile

PLAN = {
    "topology": {"name": "v6e-8", "devices": 8},
    "model": {"architecture": "M", "parameters": 32e9},
    "hbm_gib": {"kv": 8.0},
    "kv_tokens": 262144,
    "max_batch": 64,
    "context": 8192,
    "estimated_batch": 32,
    "decode_itl_ms": 16.0,
    "steps": {
        "prefill": {"estimate_ms": 200.0, "flops": 80e12},
        "decode": {"estimate_ms": 16.0, "hbm_bytes": 17179869184.0},
    },
    "assumptions": {"matmul_share": 0.7, "attention_share": 0.25, "prefill_step_tokens": 8192},
}


def test_plan_gives_back_its_own_operating_points():
    profile = from_plan(PLAN)
    assert profile.decode_s(32, 32 * 8192) == pytest.approx(0.016)
    assert profile.decode_step_s == pytest.approx(0.008)  # 8 of 16 GiB are KV
    pairs = 8192 * 4096
    assert profile.chunk_s(8192, pairs) == pytest.approx(0.2)
    assert profile.kv_token_bytes == 8 * 8 * 2**30 // 262144
    assert profile.chunk_tokens == 8192


def test_files(tmp_path):
    path = tmp_path / "profile.json"
    path.write_text(json.dumps(PLAN))
    assert read_profile(path) == from_plan(PLAN)
    fields = {
        name: getattr(QWEN3_32B_TPU7X, name)
        for name in ("source", "prefill_step_s", "prefill_token_s", "prefill_pair_s", "decode_step_s")
    }
    fields |= {"decode_row_s": 1e-6, "decode_token_s": 1e-9, "kv_tokens": 5000, "kv_token_bytes": 10}
    path.write_text(json.dumps(fields))
    assert read_profile(path).kv_tokens == 5000


@pytest.mark.parametrize(
    ("content", "text"),
    [
        ("{", "profile.json"),
        ("[]", "not a JSON object"),
        ('{"speed": 1}', "unknown field speed"),
        ('{"source": "x"}', "prefill_step_s is missing"),
        ('{"decode_itl_ms": 1}', "a plan of both roles"),
    ],
)
def test_bad_files_are_named(tmp_path, content, text):
    path = tmp_path / "profile.json"
    path.write_text(content)
    with pytest.raises(ConfigError, match=text):
        read_profile(path)
