"""`baton bench gateway`: what the gateway costs, beside a bare uvicorn app that returns the same bytes.

Both are one process on this machine, measured alternately in one run; medians are reported. Behind the gateway a
process without a model plays a prefill and a decode worker, so the gateway does all of its real work: validation, chat
template, tokenizing, placement, two messages out, frames in, journal, detokenizing, JSON, server-sent events. Requests
share a system prompt and differ in what the user says. Where there are two cores, each server has the last one for
itself, and the client and the worker the others: else the system may let the gateway wait for a worker that it shares a
core with, which has nothing to do but send tokens. For the same reason TTFT is that of short answers: the client would
wait for the worker, which says a long one in one go, as no real one does.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import uvloop
from rich.console import Console
from rich.table import Table
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

from benchmarks.http_load import post, run_load

TEXT = "Prefill reads the prompt and fills paged blocks of keys and values; decode carries on where it ended. " * 8
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "<|im_start|>assistant\n"
)
PATH = "/v1/chat/completions"
NUMBER = "00000000"
EXIT_S = 10


@dataclass
class Samples:
    """Of one server."""

    rps: list[float] = field(default_factory=list)
    chunks: list[float] = field(default_factory=list)
    ttft_ms: list[float] = field(default_factory=list)
    request_cpu_us: list[float] = field(default_factory=list)
    chunk_cpu_us: list[float] = field(default_factory=list)

    def medians(self) -> tuple[float, ...]:
        """Requests/s, chunks/s, TTFT in milliseconds, and the server's own CPU time per request and chunk."""
        return tuple(
            map(statistics.median, (self.rps, self.chunks, self.ttft_ms, self.request_cpu_us, self.chunk_cpu_us))
        )


def main(argv: Sequence[str]) -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(prog="baton bench gateway", description=__doc__)
    parser.add_argument("--json", action="store_true", help="print one JSON object as the last line")
    parser.add_argument("--rounds", type=int, default=5, help="alternations")
    parser.add_argument("--seconds", type=float, default=1.0, help="of each measurement")
    parser.add_argument("--connections", type=int, default=32, help="for requests/s and chunks/s; TTFT uses 1")
    parser.add_argument("--tokens", type=int, default=64, help="of a streamed answer")
    parser.add_argument("--short-tokens", type=int, default=4, help="of an answer that is not streamed, and for TTFT")
    arguments = parser.parse_args(argv)
    samples = uvloop.run(_measure(arguments))
    _report(samples, arguments)
    return 0


async def _measure(arguments: argparse.Namespace) -> dict[str, Samples]:
    cores = sorted(os.sched_getaffinity(0))
    with ExitStack() as stack:
        os.sched_setaffinity(0, cores[:-1] or cores)
        stack.callback(os.sched_setaffinity, 0, cores)
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        answer = _write_model(directory)
        workers, _ = _start(stack, "worker", {"answer": answer})
        last = cores[-1:]
        servers = {"gateway": _start(stack, "gateway", {"workers": workers, "model_dir": str(directory)}, last)}
        whole, stream = _requests(arguments.short_tokens, False), _requests(arguments.tokens, True)
        whole_bytes = await _response(servers["gateway"][0], whole())
        events = (await _response(servers["gateway"][0], stream())).split("\n\n")[:-1]
        for name, framework in (("FastAPI", True), ("plain ASGI", False)):
            bare = {"whole": whole_bytes, "events": [f"{event}\n\n" for event in events], "framework": framework}
            servers[name] = _start(stack, "bare", bare, last)
        short = _requests(arguments.short_tokens, True)
        samples = {name: Samples() for name in servers}
        for round_index in range(arguments.rounds + 1):
            for name, server in servers.items():
                kept = samples[name] if round_index else Samples()
                await _measure_once(server, whole, stream, short, arguments, kept)
    return samples


async def _measure_once(
    server: tuple[int, int],
    whole: Callable[[], bytes],
    stream: Callable[[], bytes],
    short: Callable[[], bytes],
    arguments: argparse.Namespace,
    samples: Samples,
) -> None:
    port, pid = server
    cpu_s = _cpu_s(pid)
    load = await run_load(port, whole, arguments.connections, arguments.seconds)
    samples.rps.append(load.requests / load.wall_s)
    samples.request_cpu_us.append(1e6 * (_cpu_s(pid) - cpu_s) / load.requests)
    cpu_s = _cpu_s(pid)
    load = await run_load(port, stream, arguments.connections, arguments.seconds)
    samples.chunks.append(load.events / load.wall_s)
    samples.chunk_cpu_us.append(1e6 * (_cpu_s(pid) - cpu_s) / load.events)
    load = await run_load(port, short, 1, arguments.seconds / 2)
    samples.ttft_ms.append(1000 * statistics.median(load.ttft_s))


def _cpu_s(pid: int) -> float:
    """CPU time of a process so far; 0 where the system does not tell."""
    stat = Path(f"/proc/{pid}/stat")
    if not stat.exists():
        return 0.0
    user, system = stat.read_text().rpartition(")")[2].split()[11:13]
    return (int(user) + int(system)) / os.sysconf("SC_CLK_TCK")


def _report(samples: dict[str, Samples], arguments: argparse.Namespace) -> None:
    title = f"Gateway, {arguments.connections} connections, medians of {arguments.rounds} rounds"
    table = Table("server", "requests/s", "chunks/s", "TTFT ms", "CPU us/request", "CPU us/chunk", title=title)
    for name, of_server in samples.items():
        rps, chunks, ttft_ms, request_us, chunk_us = of_server.medians()
        table.add_row(name, f"{rps:,.0f}", f"{chunks:,.0f}", f"{ttft_ms:.3f}", f"{request_us:.0f}", f"{chunk_us:.1f}")
    Console().print(table)
    rps, chunks, ttft_ms, *_ = samples["gateway"].medians()
    bare_rps, bare_chunks, bare_ttft_ms, *_ = samples["FastAPI"].medians()
    if arguments.json:
        ratios = {
            "rps_ratio": round(rps / bare_rps, 3),
            "chunks_ratio": round(chunks / bare_chunks, 3),
            "ttft_added_ms": round(ttft_ms - bare_ttft_ms, 3),
        }
        print(json.dumps(ratios))


def _requests(tokens: int, stream: bool) -> Callable[[], bytes]:
    """Makes one after the other, all of one length and no two the same."""
    body = {
        "model": "bench",
        "messages": [
            {"role": "system", "content": "You are a helpful assistant."},
            {"role": "user", "content": f"What does prefill do, and where does decode carry on? {NUMBER}"},
        ],
        "max_tokens": tokens,
        "temperature": 0,
        "stream": stream,
    }
    before, _, after = post(PATH, json.dumps(body).encode()).partition(NUMBER.encode())
    numbers = itertools.count()
    return lambda: b"%s%0*d%s" % (before, len(NUMBER), next(numbers), after)


async def _response(port: int, request: bytes) -> str:
    """The body that the bare app shall return."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(request.replace(b"host: bench", b"host: bench\r\nconnection: close"))
    head, _, body = (await reader.read()).decode().partition("\r\n\r\n")
    writer.close()
    if "chunked" not in head:
        return body
    text = ""
    while body:
        size, _, body = body.partition("\r\n")
        text += body.encode()[: int(size, 16)].decode()
        body = body.encode()[int(size, 16) + 2 :].decode()
    return text


def _write_model(directory: Path) -> list[int]:
    """A small tokenizer and a chat template; returns the ids of an answer."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=1000, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator([TEXT, "You are a helpful assistant. What does it do?"] * 2, trainer)
    tokenizer.add_special_tokens([AddedToken(f"<|im_{name}|>", special=True) for name in ("start", "end")])
    tokenizer.save(str(directory / "tokenizer.json"))
    settings = json.dumps({"chat_template": TEMPLATE})
    (directory / "tokenizer_config.json").write_text(settings, encoding="utf-8")
    ids: list[int] = tokenizer.encode(TEXT).ids
    return ids


def _start(stack: ExitStack, role: str, arguments: dict[str, object], cores: Sequence[int] = ()) -> tuple[Any, int]:
    """Start a process; returns what it says when it is ready, and its id. It ends with our end of its input.

    Args:
        cores: that it may use; none: those that we may use.
    """
    command = [sys.executable, "-m", "benchmarks.gateway_parts", role, json.dumps(arguments)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    if cores:
        os.sched_setaffinity(process.pid, cores)
    assert process.stdin is not None
    assert process.stdout is not None
    stack.callback(process.wait, EXIT_S)
    stack.callback(process.stdout.close)
    stack.callback(process.stdin.close)
    line = process.stdout.readline()
    if not line:
        raise RuntimeError(f"the {role} process did not start")
    return json.loads(line), process.pid


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
