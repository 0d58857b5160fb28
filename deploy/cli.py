"""The command line. It imports neither ray nor jax itself: `baton --help` must be fast."""

from __future__ import annotations

import argparse
import contextlib
import functools
import importlib
import sys
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deploy import cluster_commands
from engine_core.errors import ConfigError

EXIT_CONFIG, EXIT_INTERRUPTED = 2, 130
BENCHMARKS = {
    "pd": "time to first token and between tokens, disaggregated against colocated",
    "gap": "host time between decode steps in which the device is idle",
    "engine": "decode and prefill tokens/s against Hugging Face transformers",
    "gateway": "requests/s, streamed chunks/s and added latency of the gateway",
    "router": "cost of a placement decision, speed and size of the global index",
    "kv": "GB/s and latency of the KV hand-off beside memcpy, raw sockets and other libraries",
    "drift": "share of answers that differ between disaggregated and colocated serving",
}
DEFAULT_URL = "http://127.0.0.1:8000/v1"

TOP_EPILOG = """\
examples:
  baton serve                                   the embedded demo model, 1 prefill + 1 decode worker, port 8000
  baton serve --model Qwen/Qwen3-0.6B           a model of the Hugging Face hub (or any checkpoint directory)
  baton chat                                    talk to it
  baton status                                  which workers live
  baton scale --prefill 3                       more prefill workers, while it runs
  baton drain decode-1                          let this worker leave, while it runs
  baton replay --trace FILE                     what placement policies would make of your traffic
  baton plan --model Qwen/Qwen3-32B --topology v6e-8    does it fit there, and how fast is it; no TPU needed
  baton chaos --minutes 5                       kill, freeze, cut and drain under load; every stream must survive
  baton doctor                                  whether this machine is fit for it
  baton up deploy/ray/v6e-1p1d.yaml             a cluster of TPU slices
  baton bench pd                                what disaggregation costs and gains on this machine

`baton COMMAND --help` explains a command."""

SERVE_EPILOG = """\
examples:
  baton serve
  baton serve --model ./Qwen3-0.6B --prefill 2 --decode 2 --port 8080
  baton serve --colocated                       no prefill workers: decode workers read the prompts
  baton serve --config baton.toml --cache.page_size 64 --batch.num_slots 16

Any field of the configuration can be set as --section.field VALUE (--help-config lists them), or in the TOML file:
  [engine.model]  [engine.cache]  [engine.batch]  [engine]  [fleet]  [gateway]
The sections of `engine` need no prefix on the command line. Flags win over the file, the file over the defaults.

Ctrl-C (or SIGTERM) lets running requests finish and stops every process; a second Ctrl-C stops at once.
Exit status: 0 stopped as asked, 1 something failed (the path of the logs is told), 2 the configuration cannot work."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit status."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if arguments[:1] == ["replay"]:
        return _replay(arguments[1:])
    if arguments[:1] == ["chaos"]:
        return _bench("chaos.command", arguments[1:])
    if arguments[:1] == ["bench"] and len(arguments) > 1 and arguments[1] in BENCHMARKS:
        return _bench(arguments[1], arguments[2:])
    parser = build_parser()
    known, unknown = parser.parse_known_args(arguments)
    if unknown and known.command != "serve":
        parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    try:
        return int(known.run(known, unknown))
    except ConfigError as error:
        sys.stderr.write(f"baton: error: {error}\n")
        return EXIT_CONFIG
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED


def build_parser() -> argparse.ArgumentParser:
    """The whole grammar but for the configuration fields, which `engine_core.config_loader` knows."""
    parser = argparse.ArgumentParser(
        prog="baton",
        description="Serve large language models with prefill and decode on separate workers.",
        epilog=TOP_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _add_serve(_command(commands, "serve", "start gateway and workers, and serve until Ctrl-C", SERVE_EPILOG, _serve))
    _add_chat(_command(commands, "chat", "chat with a running Baton in this terminal", CHAT_EPILOG, _chat))
    calibrate = _command(commands, "calibrate", "measure the units of a float8 cache", CALIBRATE_EPILOG, _calibrate)
    _add_calibrate(calibrate)
    _add_plan(_command(commands, "plan", "tell whether a model fits on a TPU slice, and how fast", PLAN_EPILOG, _plan))
    bench = _command(commands, "bench", "measure Baton on this machine", BENCH_EPILOG, _bench_usage)
    bench.add_argument("name", choices=list(BENCHMARKS), metavar="NAME", help=", ".join(BENCHMARKS))
    _add_scale(_command(commands, "scale", "change the number of workers while Baton runs", SCALE_EPILOG, _scale))
    _add_drain(_command(commands, "drain", "let one worker leave while Baton runs", DRAIN_EPILOG, _drain))
    status = _command(commands, "status", "show the workers of a running Baton", STATUS_EPILOG, _status)
    status.add_argument("--json", action="store_true", help="one JSON object instead of a table")
    _add_which(status)
    commands.add_parser("chaos", help="disturb a real cluster under load, and prove that nothing came of it")
    commands.add_parser("replay", help="replay a trace against a simulated fleet, under several placement policies")
    _add_explain(_command(commands, "explain", "show why a request went where it did", EXPLAIN_EPILOG, _explain))
    cluster_commands.add_commands(functools.partial(_command, commands))
    _command(commands, "version", "print the version", "", _version)
    return parser


CHAT_EPILOG = """\
In the chat: /clear forgets the conversation, /system TEXT sets the system message, /exit (or Ctrl-D) leaves,
Ctrl-C stops an answer.

examples:
  baton chat
  baton chat --url http://gpu-box:8000/v1 --system "Answer in one sentence." --temperature 0"""

BENCH_EPILOG = "benchmarks (each has its own --help; --json prints one JSON object as the last line):\n" + "\n".join(
    f"  baton bench {name:<8} {text}" for name, text in BENCHMARKS.items()
)

PLAN_EPILOG = """\
The model's real prefill and decode steps are compiled for that slice on this machine, without a TPU and without
weights. Needs libtpu: pip install -e '.[aot]'.

examples:
  baton plan --model Qwen/Qwen3-32B --topology v6e-8
  baton plan --model ./Qwen3-8B --topology v5e-4 --role decode --max-batch 64 --context 4096
  baton plan --model Qwen/Qwen3-32B --topology tpu7x-8 --json | jq '{fits, kv_tokens, decode_itl_ms}'

Exit status: 0 it fits, 2 it cannot be planned (the message names the flag), 3 it does not fit."""

CALIBRATE_EPILOG = """\
Each line of the file is a prompt; some dozens of typical ones do. How large keys and values get is written beside the
weights, as kv_scales.safetensors: workers with `--cache.dtype float8_e4m3fn` then use the whole range of float8, head
by head. Without that file a unit is 1: 4 significant bits, and nothing beyond 448.

examples:
  baton calibrate --model ./Qwen3-8B --prompts prompts.txt"""

SCALE_EPILOG = """\
New workers load the model and join; surplus ones finish what they run and leave.

examples:
  baton scale --prefill 3
  baton scale --prefill 1 --decode 2 --no-wait"""

DRAIN_EPILOG = """\
The worker takes nothing new, its streams go on elsewhere, and it ends. Then its machine is free: the fleet wants one
fewer of its role until `baton scale` says otherwise, and an autoscaler in the mode act lets no pool grow before that.
The last worker of a role that serves stays, unless another one takes its place.

examples:
  baton drain decode-1                before its machine is worked on
  baton drain decode-1 --replace      a fresh process, where Ray finds room: on the same machine, if that is free
  baton drain decode-1 --flip         a prefill worker in its place

Exit status: 0 when it is gone and its successor serves, 1 when that takes longer, 2 when it cannot be."""

EXPLAIN_EPILOG = """\
The gateway remembers its last few thousand requests. A pair's cost is the sum of its terms, in milliseconds; the
least wins. "(itself)": the decode worker reads the prompt. With the header `x-baton-debug: 1` an answer says its pair.

examples:
  baton explain chatcmpl-4f1c9f5a6b7c8d9e0f1a2b3c4d5e6f70
  baton explain 4f1c9f5a6b7c8d9e0f1a2b3c4d5e6f70 --json | jq '.attempts[0].chosen'"""

STATUS_EPILOG = """\
Exit status: 0 when every wanted worker serves, 1 when not, 2 when no Baton runs.

examples:
  baton status
  baton status --json | jq '.members[].state'"""


if TYPE_CHECKING:
    Commands = argparse._SubParsersAction[argparse.ArgumentParser]


def _command(commands: Commands, name: str, text: str, epilog: str, run: object) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = commands.add_parser(
        name,
        help=text,
        description=text[0].upper() + text[1:] + ".",
        epilog=epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.set_defaults(run=run)
    return parser


def _add_serve(serve: argparse.ArgumentParser) -> None:
    serve.add_argument("--model", metavar="DIR_OR_HUB_ID", help="checkpoint directory, hub id, or demo (the default)")
    serve.add_argument("--prefill", metavar="N", help="prefill workers (default 1)")
    serve.add_argument("--decode", metavar="N", help="decode workers (default 1)")
    serve.add_argument("--tp", metavar="N", help="tensor-parallel degree of each worker (default 1)")
    serve.add_argument("--ep", metavar="N", help="expert-parallel degree of each worker (default 1)")
    serve.add_argument("--dp", metavar="N", help="data-parallel degree of each worker (default 1)")
    serve.add_argument("--host", help="address of the HTTP endpoint (default 127.0.0.1: this machine only)")
    serve.add_argument("--port", metavar="N", help="port of the HTTP endpoint (default 8000)")
    serve.add_argument("--colocated", action="store_true", help="no prefill workers: decode workers do both")
    serve.add_argument("--numerics", choices=["fast", "strict"], help="strict: token ids independent of placement")
    serve.add_argument("--config", type=Path, metavar="FILE", help="configuration in TOML")
    serve.add_argument("--secret-file", type=Path, metavar="FILE", help="secret that gateways and workers share")
    serve.add_argument("--api-keys-file", type=Path, metavar="FILE", help="API keys that clients may use, one per line")
    serve.add_argument("--ray-address", metavar="ADDRESS", help="join this Ray cluster (auto: the one of this machine)")
    serve.add_argument("--verbose", action="store_true", help="a timeline of the start-up")
    serve.add_argument("--help-config", action="store_true", help="list every configuration field, and exit")


def _add_chat(chat: argparse.ArgumentParser) -> None:
    chat.add_argument("--url", default=DEFAULT_URL, help="base URL of the OpenAI API (default %(default)s)")
    chat.add_argument("--model", help="which model (default: the first one served)")
    chat.add_argument("--system", default="", metavar="TEXT", help="system message")
    chat.add_argument("--temperature", type=float, help="0 always takes the likeliest token")
    chat.add_argument("--max-tokens", type=int, dest="max_tokens", help="longest answer")


def _add_explain(explain: argparse.ArgumentParser) -> None:
    explain.add_argument("request_id", metavar="REQUEST_ID", help="the id of the answer")
    explain.add_argument("--url", default=DEFAULT_URL, help="base URL of the OpenAI API (default %(default)s)")
    explain.add_argument("--api-key", metavar="KEY", help="where the gateway wants one")
    explain.add_argument("--json", action="store_true", help="one JSON object instead of tables")


def _add_calibrate(calibrate: argparse.ArgumentParser) -> None:
    calibrate.add_argument("--model", required=True, metavar="DIR_OR_HUB_ID", help="where the file is written, too")
    calibrate.add_argument("--prompts", required=True, type=Path, metavar="FILE", help="one per line")
    calibrate.add_argument(
        "--max-tokens", type=int, default=2048, dest="max_tokens", metavar="N", help="of a prompt (default 2048)"
    )


def _add_plan(plan: argparse.ArgumentParser) -> None:
    plan.add_argument("--model", required=True, metavar="DIR_OR_HUB_ID", help="only its config.json is read")
    plan.add_argument("--topology", required=True, metavar="NAME", help="such as v5e-4, v5p-8, v6e-8 or tpu7x-8")
    plan.add_argument("--role", choices=["prefill", "decode"], help="plan for one kind of worker (default: both)")
    plan.add_argument("--max-batch", type=int, default=128, metavar="N", help="sequences at once (default 128)")
    plan.add_argument("--context", type=int, default=8192, metavar="N", help="prompt plus answer (default 8192)")
    plan.add_argument("--prefill-tokens", type=int, metavar="N", help="of a chunk (default: that of the configuration)")
    plan.add_argument("--tp", type=int, metavar="N", help="tensor-parallel degree (default: what suits both)")
    plan.add_argument("--ep", type=int, metavar="N", help="expert-parallel degree (the same)")
    plan.add_argument("--dp", type=int, metavar="N", help="data-parallel degree (the same)")
    plan.add_argument("--json", action="store_true", help="one JSON object instead of text")


def _add_scale(scale: argparse.ArgumentParser) -> None:
    scale.add_argument("--prefill", type=int, metavar="N", help="prefill workers")
    scale.add_argument("--decode", type=int, metavar="N", help="decode workers, at least 1")
    scale.add_argument("--no-wait", action="store_true", help="return at once")
    scale.add_argument("--timeout", type=float, default=600.0, metavar="S", help="how long to wait (default 600)")
    _add_which(scale)


def _add_drain(drain: argparse.ArgumentParser) -> None:
    drain.add_argument("worker", metavar="WORKER", help="its name in `baton status`")
    successor = drain.add_mutually_exclusive_group()
    successor.add_argument("--replace", action="store_true", help="the next life of a worker of its role follows")
    successor.add_argument("--flip", action="store_true", help="a worker of the other role follows")
    drain.add_argument("--no-wait", action="store_true", help="return at once")
    drain.add_argument("--timeout", type=float, default=600.0, metavar="S", help="how long to wait (default 600)")
    _add_which(drain)


def _add_which(parser: argparse.ArgumentParser) -> None:
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--port", type=int, metavar="N", help="of which Baton (needed only where several run)")
    which.add_argument("--ray-address", metavar="ADDRESS", help="the Baton of this Ray cluster (in a pod: auto)")
    which.add_argument("--cluster", type=Path, metavar="FILE", help="on the head of this cluster (see `baton up`)")


def _serve(known: argparse.Namespace, unknown: list[str]) -> int:
    launch = importlib.import_module("deploy.launch")
    if known.help_config:
        sys.stdout.write(launch.describe_fields())
        return 0
    checkpoint = importlib.import_module("deploy.checkpoint")
    flags = list(unknown)
    for name in ("model", "prefill", "decode", "tp", "ep", "dp", "host", "port", "numerics"):
        if (value := getattr(known, name)) is not None:
            flags += [f"--{name}", value]
    if known.colocated:
        flags.append("--colocated")
    config = launch.read_config(flags, known.config)
    secrets = importlib.import_module("deploy.secret_files")
    if known.api_keys_file:
        config = launch.with_keys(config, secrets.read_keys(known.api_keys_file))
    launch.check_port(config.gateway.host, config.gateway.port)
    model = config.engine.model
    model_dir = checkpoint.resolve(model.path, model.revision, lambda text: sys.stderr.write(f"{text}\n"))
    checkpoint.validate(model_dir)
    return int(
        launch.launch(
            config,
            model_dir=model_dir,
            run_files=launch.default_run_files(),
            worker_classes=launch.WORKER_CLASSES,
            gateway_class=launch.GATEWAY_CLASS,
            timeline=known.verbose,
            secret=secrets.read_secret(known.secret_file) if known.secret_file else None,
            ray_address=known.ray_address,
        )
    )


def _chat(known: argparse.Namespace, unknown: list[str]) -> int:
    options = {"temperature": known.temperature, "max_tokens": known.max_tokens}
    given = {name: value for name, value in options.items() if value is not None}
    return int(importlib.import_module("deploy.chat").run(known.url, known.model, known.system, given))


def _explain(known: argparse.Namespace, unknown: list[str]) -> int:
    explain = importlib.import_module("deploy.explain")
    return int(explain.run(known.url, known.request_id, known.api_key, known.json))


def _calibrate(known: argparse.Namespace, unknown: list[str]) -> int:
    return int(importlib.import_module("deploy.calibrate").run(known))


def _plan(known: argparse.Namespace, unknown: list[str]) -> int:
    return int(importlib.import_module("deploy.plan").run(known))


def _scale(known: argparse.Namespace, unknown: list[str]) -> int:
    types = importlib.import_module("engine_core.types")
    wanted = {types.Role.PREFILL: known.prefill, types.Role.DECODE: known.decode}
    wanted = {role: count for role, count in wanted.items() if count is not None}
    if not wanted:
        raise ConfigError("say how many: --prefill N, --decode N, or both")
    if known.cluster is not None:
        counts = (word for role, count in wanted.items() for word in (f"--{role}", str(count)))
        return cluster_commands.on_head(known.cluster, "scale", *counts, *_waiting(known))
    admin, run = _connect(known)
    return int(admin.scale(run, wanted, not known.no_wait, known.timeout))


def _drain(known: argparse.Namespace, unknown: list[str]) -> int:
    successors = importlib.import_module("deploy.fleet_types").Successor
    successor = successors.SAME if known.replace else successors.OTHER if known.flip else successors.NONE
    if known.cluster is not None:
        how = ["--replace"] if known.replace else ["--flip"] if known.flip else []
        return cluster_commands.on_head(known.cluster, "drain", known.worker, *how, *_waiting(known))
    admin, run = _connect(known)
    return int(admin.drain(run, known.worker, successor, not known.no_wait, known.timeout))


def _waiting(known: argparse.Namespace) -> list[str]:
    return ["--timeout", f"{known.timeout:g}", *(["--no-wait"] if known.no_wait else [])]


def _status(known: argparse.Namespace, unknown: list[str]) -> int:
    if known.cluster is not None:
        return cluster_commands.on_head(known.cluster, "status", *(["--json"] if known.json else []))
    admin, run = _connect(known)
    return int(admin.status(run, known.json))


def _connect(known: argparse.Namespace) -> tuple[Any, Any]:
    """The admin module, and which Baton it shall talk to."""
    run_file = importlib.import_module("deploy.run_file")
    if known.ray_address is not None:
        return importlib.import_module("deploy.admin"), run_file.of_cluster(known.ray_address)
    run = run_file.find(run_file.DIRECTORY.expanduser(), known.port)
    if run.token_path:
        importlib.import_module("deploy.ray_local").prepare(Path(run.token_path))
    return importlib.import_module("deploy.admin"), run


def _replay(argv: list[str]) -> int:
    try:
        return int(importlib.import_module("deploy.replay").main(argv))
    except ConfigError as error:
        sys.stderr.write(f"baton: error: {error}\n")
        return EXIT_CONFIG
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED


def _bench(name: str, argv: list[str]) -> int:
    try:
        module = importlib.import_module(f"benchmarks.{name}")
    except ModuleNotFoundError as error:
        if error.name not in ("benchmarks", "benchmarks.chaos", f"benchmarks.{name}"):
            raise
        sys.stderr.write(f"baton: error: the benchmark {name} is not installed; run it from a checkout\n")
        return EXIT_CONFIG
    return int(module.main(argv) or 0)


def _bench_usage(known: argparse.Namespace, unknown: list[str]) -> int:
    return _bench(known.name, unknown)


def _version(known: argparse.Namespace, unknown: list[str]) -> int:
    number = "unknown"
    with contextlib.suppress(PackageNotFoundError):
        number = version("baton")
    sys.stdout.write(f"baton {number}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
