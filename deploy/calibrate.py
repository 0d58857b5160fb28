"""`baton calibrate`: measure how large a model's keys and values get, and put the units of a float8 cache beside it."""

from __future__ import annotations

import argparse
import sys

from tokenizers import Tokenizer

from deploy import checkpoint
from engine_core.config import BatchConfig, EngineConfig, ModelConfig
from engine_core.errors import ConfigError
from engine_core.kv_calibration import calibrate
from engine_core.kv_scales import write_kv_scales
from engine_core.replica_loader import open_replica


def run(known: argparse.Namespace) -> int:
    """Write the file; returns the exit status."""
    model_dir = checkpoint.resolve(known.model, "", say)
    longest = checkpoint.validate(model_dir).max_position
    if known.max_tokens < 1:
        raise ConfigError(f"--max-tokens must be positive, not {known.max_tokens}")
    if not known.prompts.is_file():
        raise ConfigError(f"--prompts {known.prompts} is no file")
    texts = [line for line in known.prompts.read_text(encoding="utf-8").splitlines() if line.strip()]
    if not texts:
        raise ConfigError(f"--prompts {known.prompts} has no line of text")
    tokenizer = Tokenizer.from_file(str(model_dir / "tokenizer.json"))
    batch = BatchConfig(max_model_len=min(known.max_tokens + 1, longest))
    config = EngineConfig(model=ModelConfig(path=str(model_dir)), batch=batch, prefix_cache=False)
    replica = open_replica(config, model_dir, say, decodes=False)
    scales = calibrate(replica, (tokenizer.encode(text).ids for text in texts))
    try:
        path = write_kv_scales(model_dir, scales)
    except OSError as error:
        raise ConfigError(f"{model_dir} cannot be written to: {error}") from error
    flat = [unit for layer in scales for unit in layer]
    say(f"{len(texts)} prompts; units from {min(flat):.3g} to {max(flat):.3g}; wrote {path}")
    return 0


def say(text: str) -> None:
    """A line of progress."""
    sys.stderr.write(f"{text}\n")
