"""Decode and prefill speed of llama.cpp, a peer of `bench engine`; needs the packages llama-cpp-python and gguf."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gguf
import llama_cpp
import ml_dtypes
import numpy as np
from safetensors import safe_open

_QUANTIZATIONS = {"float32": gguf.GGMLQuantizationType.F32, "bfloat16": gguf.GGMLQuantizationType.BF16}


def write_gguf(model: Path, dtype: str, path: Path) -> None:
    """Convert a Qwen3 checkpoint of a single safetensors file, without its tokenizer: ids go in and out.

    Args:
        model: checkpoint directory.
        dtype: of the matrices, float32 or bfloat16.
        path: the file to write.

    Raises:
        ValueError: the checkpoint is of another architecture.
    """
    config = json.loads((model / "config.json").read_text())
    if config["model_type"] != "qwen3":
        raise ValueError(f"llama.cpp as a peer: model_type must be qwen3, not {config['model_type']!r}")
    writer = gguf.GGUFWriter(path, "qwen3")
    _write_sizes(writer, config)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.QWEN3, config["num_hidden_layers"])
    with safe_open(model / "model.safetensors", framework="numpy") as tensors:
        for name in tensors.keys():  # noqa: SIM118  not a dict
            theirs = names.get_name(name, try_suffixes=(".weight",))
            values = tensors.get_tensor(name)
            if values.ndim == 1 or dtype == "float32":
                writer.add_tensor(theirs, values.astype(np.float32))
            else:
                bits = values.astype(ml_dtypes.bfloat16).view(np.uint8)
                writer.add_tensor(theirs, bits, raw_dtype=_QUANTIZATIONS[dtype])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _write_sizes(writer: Any, config: dict[str, Any]) -> None:
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(config["head_dim"])
    writer.add_value_length(config["head_dim"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(config["rope_theta"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_tokenizer_model("no_vocab")


# Its log is a page per load. It calls this for as long as the process lives.
_SILENT = llama_cpp.llama_log_callback(lambda level, text, context: None)


class LlamaCppProbe:
    """The peer, driven step by step through its C interface.

    Args:
        model: checkpoint directory, see `write_gguf`.
        dtype: float32 or bfloat16, of weights and of its KV cache.
        max_batch: sequences at once.
        prompt: tokens of a prefill measurement.
        context: tokens in the cache when decoding starts.
        scratch: a directory for the converted checkpoint.
    """

    def __init__(self, model: Path, dtype: str, max_batch: int, prompt: int, context: int, scratch: Path) -> None:
        llama_cpp.llama_log_set(_SILENT, None)
        converted = scratch / f"{dtype}.gguf"
        write_gguf(model, dtype, converted)
        self._context = context
        self._batch = llama_cpp.llama_batch_init(max(prompt, max_batch), 0, 1)
        weights = llama_cpp.llama_model_load_from_file(str(converted).encode(), llama_cpp.llama_model_default_params())
        assert weights, "llama.cpp cannot read the converted checkpoint"
        options = llama_cpp.llama_context_default_params()
        options.n_ctx = (prompt + 128) * max_batch
        options.n_batch = options.n_ubatch = prompt
        options.n_seq_max = max_batch
        options.n_threads = options.n_threads_batch = len(os.sched_getaffinity(0))
        options.type_k = options.type_v = int(_QUANTIZATIONS[dtype])
        self._llama = llama_cpp.llama_init_from_model(weights, options)
        assert self._llama, "llama.cpp cannot make a context"

    def decode(self, batch: int, steps: int) -> float:
        """Tokens/s of the best of `steps` decode steps with `batch` sequences."""
        self._forget()
        for row in range(batch):
            self._run([(place % 1000, place, row) for place in range(self._context)])
        best = float("inf")
        for i in range(steps + 1):
            start = time.perf_counter()
            self._run([(i, self._context + i, row) for row in range(batch)], every_logit=True)
            best = min(best, time.perf_counter() - start)
        return batch / best

    def prefill(self, size: int, steps: int) -> float:
        """Tokens/s of the best of `steps` prefills of `size` tokens."""
        best = float("inf")
        for _ in range(steps):
            self._forget()
            start = time.perf_counter()
            self._run([(place % 1000, place, 0) for place in range(size)])
            best = min(best, time.perf_counter() - start)
        return size / best

    def _run(self, tokens: Sequence[tuple[int, int, int]], *, every_logit: bool = False) -> None:
        """One call for (token, position, sequence) triples; logits of all of them, or of the last."""
        batch = self._batch
        batch.n_tokens = len(tokens)
        for i, (token, place, row) in enumerate(tokens):
            batch.token[i], batch.pos[i] = token, place
            batch.n_seq_id[i], batch.seq_id[i][0] = 1, row
            batch.logits[i] = every_logit or i == len(tokens) - 1
        failed = llama_cpp.llama_decode(self._llama, batch)
        assert not failed, f"llama_decode returned {failed}"
        llama_cpp.llama_synchronize(self._llama)

    def _forget(self) -> None:
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(self._llama), False)
