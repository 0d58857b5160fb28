import json
import subprocess
import sys
from pathlib import Path

import pytest

from deploy import cli
from deploy.launch import check_port, read_config
from engine_core.errors import ConfigError

ROOT = Path(__file__).parents[2]


def baton(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "deploy.cli", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize(
    "command", ["", "serve", "chat", "bench", "scale", "drain", "status", "explain", "chaos", "version"]
)
def test_help_explains_with_examples(command: str) -> None:
    shown = baton(*command.split(), "--help")
    assert shown.returncode == 0
    assert "example" in shown.stdout or "baton bench" in shown.stdout or command == "version"


def test_help_is_fast_because_nothing_heavy_is_imported() -> None:
    script = (
        "import sys, deploy.cli\n"
        "deploy.cli.build_parser()\n"
        "heavy = {'ray', 'jax', 'fastapi', 'httpx', 'numpy', 'rich'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True, cwd=ROOT)


def test_version() -> None:
    assert baton("version").stdout.startswith("baton ")


def test_short_flags_stand_for_long_ones() -> None:
    flags = ["--model", "m", "--prefill", "3", "--cache.page_size", "64", "--batch.num_slots=8", "--numerics", "strict"]
    config = read_config(
        [*flags, "--port", "9", "--tp", "2", "--ep", "3", "--dp=4", "--fleet.drain_timeout_s", "3"], None
    )
    assert config.engine.model.path == "m"
    assert config.engine.cache.page_size == 64
    assert config.engine.batch.num_slots == 8
    assert config.engine.numerics == "strict"
    assert (config.engine.tp, config.engine.ep, config.engine.dp) == (2, 3, 4)
    assert (config.fleet.prefill, config.fleet.drain_timeout_s, config.gateway.port) == (3, 3.0, 9)


def test_the_gateway_learns_what_other_sections_imply(tmp_path: Path) -> None:
    assert read_config([], None).gateway.model_name == "demo"
    assert read_config(["--model", "Qwen/Qwen3-0.6B"], None).gateway.model_name == "Qwen/Qwen3-0.6B"
    assert read_config(["--model", str(tmp_path)], None).gateway.model_name == tmp_path.name
    named = read_config(["--model", str(tmp_path), "--gateway.model_name", "mine"], None)
    assert named.gateway.model_name == "mine" and not named.gateway.colocated
    assert read_config(["--colocated"], None).gateway.colocated
    assert read_config(["--prefill", "0"], None).gateway.colocated
    assert read_config(["--compile_cache", "/c"], None).gateway.compile_cache == "/c"
    assert read_config(["--compile_cache", ""], None).gateway.compile_cache == ""
    assert read_config(["--gateway.compile_cache", "/g"], None).gateway.compile_cache == "/g"


def test_every_field_is_listed_with_its_meaning() -> None:
    shown = baton("serve", "--help-config").stdout
    assert "--cache.page_size int" in shown and "--fleet.pin_cores" in shown and "--gateway.port" in shown


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["serve", "--model", "/nowhere"], "neither a directory nor a hub id"),
        (["serve", "--decode", "0"], "fleet.decode must be at least 1"),
        (["serve", "--decode", "many"], "decode"),
        (["serve", "--cache.nonsense", "1"], "nonsense"),
        (["serve", "--config", "/nowhere.toml"], "/nowhere.toml"),
        (["scale"], "say how many"),
        (["drain", "decode-0", "--port", "1"], "No Baton runs on port 1"),
        (["status", "--port", "1"], "No Baton runs on port 1"),
    ],
)
def test_what_cannot_work_is_one_line_and_status_2(arguments: list[str], words: str) -> None:
    shown = baton(*arguments)
    assert shown.returncode == 2
    assert shown.stderr.startswith("baton: error: ") and shown.stderr.count("\n") == 1
    assert words in shown.stderr


def test_a_truncated_checkpoint_is_refused_before_ray_starts(tmp_path: Path) -> None:
    config = {"architectures": ["LlamaForCausalLM"], "num_hidden_layers": 1, "hidden_size": 8, "intermediate_size": 8}
    config |= {"num_attention_heads": 2, "vocab_size": 32}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "tokenizer.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(b"\xff\x00\x00\x00\x00\x00\x00\x00{")
    shown = baton("serve", "--model", str(tmp_path), "--port", "0")
    assert shown.returncode == 2
    assert shown.stderr == (
        f"baton: error: {tmp_path}/model.safetensors is truncated or not a safetensors file (9 bytes)\n"
    )


def test_bench_hands_its_arguments_on(monkeypatch: pytest.MonkeyPatch) -> None:
    assert baton("bench", "nonsense").returncode == 2
    seen: list[list[str]] = []

    class Module:
        @staticmethod
        def main(argv: list[str]) -> int:
            seen.append(argv)
            return 7

    monkeypatch.setitem(sys.modules, "benchmarks.pd", Module)
    assert cli.main(["bench", "pd", "--help", "--json"]) == 7
    assert seen == [["--help", "--json"]]


def test_ports() -> None:
    check_port("127.0.0.1", 0)
    with pytest.raises(ConfigError, match="cannot listen on 203"):
        check_port("203.0.113.1", 0)
