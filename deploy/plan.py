"""`baton plan`: will a model fit on a TPU slice, and how fast can it be? Compiled here, no TPU needed."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, TextIO

from deploy import checkpoint
from engine_core.aot.environment import compiler_environment, require_libtpu
from engine_core.aot.topology import find_topology
from engine_core.config import BatchConfig, CacheConfig
from engine_core.errors import CheckpointError, ConfigError
from engine_core.models.registry import read_json, spec_from_config

EXIT_DOES_NOT_FIT = 3
_LOG_LINES = 5


def run(args: argparse.Namespace) -> int:
    """Plan as the command line asks; returns the exit status.

    Raises:
        ConfigError: a flag cannot be served, or libtpu is missing or died.
    """
    request = read_request(args)
    require_libtpu()
    result = _compile(request, sys.stderr)
    if "error" in result:
        raise ConfigError(result["error"])
    sys.stdout.write(f"{json.dumps(result)}\n" if args.json else describe(args.model, result))
    return 0 if result["fits"] else EXIT_DOES_NOT_FIT


def read_request(args: argparse.Namespace) -> dict[str, Any]:
    """Check what can be checked without a compiler.

    Raises:
        ConfigError: naming the flag.
    """
    try:
        find_topology(args.topology)
    except ConfigError as error:
        raise ConfigError(f"--topology: {error}") from None
    batch = BatchConfig()
    prefill_tokens = batch.prefill_tokens if args.prefill_tokens is None else args.prefill_tokens
    for flag, value, least in (
        ("--max-batch", args.max_batch, 1),
        ("--context", args.context, 1),
        ("--prefill-tokens", prefill_tokens, batch.prefill_seqs + 1),
        *((f"--{name}", getattr(args, name), 1) for name in ("tp", "ep", "dp")),
    ):
        if value is not None and value < least:
            raise ConfigError(f"{flag} must be at least {least}, not {value}")
    try:
        config = read_config(args.model)
        spec = spec_from_config(config, {})
    except CheckpointError as error:
        raise ConfigError(f"--model {args.model}: {error}") from None
    if args.context > spec.max_position:
        raise ConfigError(f"--context is {args.context}, the model's context is {spec.max_position}")
    return {
        "config": config,
        "topology": args.topology,
        "roles": [args.role] if args.role else ["prefill", "decode"],
        "max_batch": args.max_batch,
        "context": args.context,
        "prefill_tokens": prefill_tokens,
        "prefill_rows": batch.prefill_seqs,
        "memory_fraction": CacheConfig().memory_fraction,
        "tp": args.tp,
        "ep": args.ep,
        "dp": args.dp,
    }


def read_config(name: str) -> dict[str, Any]:
    """The config.json of a checkpoint directory, of a file of that kind, or of a model of the hub.

    Raises:
        CheckpointError: there is none.
    """
    path = Path(name).expanduser()
    if path.is_file():
        return read_json(path)
    if path.is_dir():
        return read_json(path / "config.json")
    return read_json(checkpoint.fetch_config(name))


def _compile(request: dict[str, Any], progress: TextIO) -> dict[str, Any]:
    """Run the compiler in a process of its own: libtpu may abort, and writes on standard error as it likes."""
    with tempfile.TemporaryDirectory(prefix="baton-plan-") as scratch:
        asked, answer, log = (Path(scratch, name) for name in ("request.json", "result.json", "log"))
        asked.write_text(json.dumps(request))
        command = [sys.executable, "-m", "engine_core.aot", str(asked), str(answer)]
        environment = compiler_environment(os.environ, [])
        with (
            log.open("w") as errors,
            subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=errors, text=True) as child,
        ):
            assert child.stdout is not None
            try:
                for line in child.stdout:
                    progress.write(f"baton plan: {line}")
                    progress.flush()
            except KeyboardInterrupt:
                child.terminate()
                raise
        if not answer.is_file():
            tail = "\n".join(log.read_text(errors="replace").strip().splitlines()[-_LOG_LINES:])
            raise ConfigError(f"the compiler ended with status {child.returncode} for {request['topology']}:\n{tail}")
        result: dict[str, Any] = json.loads(answer.read_text())
        return result


def describe(name: str, plan: dict[str, Any]) -> str:
    """A plan for people."""
    slice_, model = plan["topology"], plan["model"]
    lines = [
        f"{name}: {model['parameters'] / 1e9:.1f} billion parameters in {model['dtype']}, on {slice_['name']} "
        f"({slice_['chips']} chips, {slice_['devices']} devices, split as {_flags(plan['split'])})",
        "",
    ]
    if plan["fits"]:
        lines += ["It fits.", "", *_memory(plan), "", *_speed(plan), "", *_assumptions(plan)]
    else:
        smallest = plan["suggestion"]
        lines += [
            f"It does not fit: {plan['short_gib']:.2f} GiB are missing on each device ({plan['reason']}).",
            f"The smallest slice that it fits on is {smallest}." if smallest else "It fits on no known slice.",
        ]
    return "\n".join(lines) + "\n"


def _flags(split: dict[str, int]) -> str:
    """The degrees, as flags of `baton serve`."""
    return " ".join(f"--{name} {degree}" for name, degree in split.items() if degree > 1) or "--tp 1"


def _memory(plan: dict[str, Any]) -> list[str]:
    hbm = plan["hbm_gib"]
    used = sum(hbm[part] for part in ("weights", "kv", "slots", "workspace"))
    asked = f"{plan['max_batch']} sequences of {plan['context']} tokens"
    holds = plan["concurrent_sequences"]
    enough = f"enough for {asked}" if holds >= plan["max_batch"] else f"{holds} at a time where {asked} are asked for"
    return [
        f"HBM of each device: {hbm['limit']:.2f} GiB",
        f"  weights    {hbm['weights']:8.2f} GiB",
        f"  KV cache   {hbm['kv']:8.2f} GiB   {plan['kv_tokens']} tokens: {enough}",
        f"  slots      {hbm['slots']:8.2f} GiB",
        f"  workspace  {hbm['workspace']:8.2f} GiB",
        f"  left       {hbm['limit'] - used:8.2f} GiB",
    ]


def _speed(plan: dict[str, Any]) -> list[str]:
    lines = ["Steps (each device)"]
    for role, step in plan["steps"].items():
        collectives = ", ".join(f"{one['count']} {kind}" for kind, one in step["collectives"].items()) or "none"
        lines.append(
            f"  {role:<8} {step['flops'] / 1e12:.3f} TFLOP, {step['hbm_bytes'] / 2**30:.2f} GiB from HBM, "
            f"collectives: {collectives}; compiled in {step['compile_s']:.1f} s"
        )
    lines.append("")
    if plan["decode_itl_ms"] is not None:
        bound = plan["steps"]["decode"]["bound_ms"]
        lines.append(
            f"Decode:  {plan['decode_itl_ms']:.2f} ms between tokens, {plan['decode_tokens_per_s']:.0f} tokens/s "
            f"({plan['estimated_batch']} sequences, each with {plan['context']} tokens; at the peaks {bound:.2f} ms)"
        )
    if plan["prefill_tokens_per_s"] is not None:
        bound = plan["steps"]["prefill"]["bound_ms"]
        chunk = plan["assumptions"]["prefill_chunk_tokens"]
        lines.append(
            f"Prefill: {plan['prefill_tokens_per_s']:.0f} tokens/s (chunks of {chunk} of prompts of {plan['context']} "
            f"tokens; {plan['steps']['prefill']['estimate_ms']:.2f} ms a chunk, at the peaks {bound:.2f} ms)"
        )
    return lines


def _assumptions(plan: dict[str, Any]) -> list[str]:
    assumed = plan["assumptions"]
    return [
        "Memory and collectives are the compiler's own. Times are a roofline, not measured on a TPU; they assume",
        f"{assumed['hbm_share']:.0%} of the HBM bandwidth, {assumed['matmul_share']:.0%} of the peak FLOP/s in matrix "
        f"products and {assumed['attention_share']:.0%} in prefill attention,",
        f"collectives that overlap with nothing on {assumed['ring_links']} links of each chip, "
        f"{assumed['hop_s'] * 1e6:.0f} us from chip to chip, every sequence at its full length.",
        f"Weights and KV cache together take {assumed['memory_fraction']:.0%} of HBM (cache.memory_fraction).",
    ]
