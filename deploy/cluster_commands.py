"""`baton up|down|logs|doctor|secret`: grammar and what each does. Ray itself is reached through its command line."""

from __future__ import annotations

import argparse
import contextlib
import importlib
import io
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import msgspec

from engine_core.errors import ConfigError

EXIT_FAILED = 1
REMOTE_LOGS = "~/baton/logs"

UP_EPILOG = """\
The file is checked first, line by line: nothing is started, and nothing bought, while something in it is wrong.
deploy/ray/ holds files for v5e, v6e and tpu7x slices and for one machine. A manifest for Kubernetes (rendered: `kubectl
kustomize deploy/k8s/overlays/v6e > v6e.yaml`) is checked in the same way, then applied. docs/deploy.md explains them.

examples:
  baton up deploy/ray/v6e-2p2d.yaml --check     only check it
  baton up deploy/ray/v6e-2p2d.yaml
  baton up v6e.yaml --check                     a manifest for Kubernetes
  baton status --cluster deploy/ray/v6e-2p2d.yaml
  baton down deploy/ray/v6e-2p2d.yaml"""

LOGS_EPILOG = """\
examples:
  baton logs                                    all processes of the Baton that runs here
  baton logs --worker decode-0 -n 200
  baton logs --cluster deploy/ray/v6e-1p1d.yaml --worker gateway --follow"""

DOCTOR_EPILOG = """\
Exit status: 0 when Baton can run here, 1 when not.

examples:
  baton doctor                                  this machine, for what `baton serve` does by default
  baton doctor --config baton.toml --secret-file secret
  baton doctor --cluster deploy/ray/v6e-1p1d.yaml                          every node of that cluster
  baton doctor --config baton.toml --ray-address auto --plan plan.json     every node of a Ray cluster, on its head
  baton doctor --json | jq '.[] | select(.level != "ok")'"""

Command = Callable[[str, str, str, object], argparse.ArgumentParser]


def add_commands(command: Command) -> None:
    """Add the commands to the grammar of `baton`.

    Args:
        command: adds one, from its name, its purpose, its epilog and what runs it.
    """
    up = command("up", "check a cluster file or manifest, then start its cluster and Baton on it", UP_EPILOG, _up)
    up.add_argument("file", type=Path, help="cluster file for `ray up`, or manifest for Kubernetes")
    up.add_argument("--check", action="store_true", help="check the file and stop")
    down = command("down", "end a cluster that `baton up` started", "", _down)
    down.add_argument("file", type=Path, help="the same file")
    logs = command("logs", "show what Baton's processes wrote", LOGS_EPILOG, _logs)
    logs.add_argument(
        "--worker", default="*", metavar="NAME", help="serve, fleet, gateway or a worker such as decode-0"
    )
    logs.add_argument("-n", type=int, default=50, dest="lines", metavar="N", help="last lines of each (default 50)")
    logs.add_argument("--follow", action="store_true", help="go on with what they write from now on")
    logs.add_argument("--cluster", type=Path, metavar="FILE", help="on the head of this cluster")
    logs.add_argument("--port", type=int, metavar="N", help="of which Baton (needed only where several run here)")
    doctor = command("doctor", "check this machine or a cluster, and say what to fix", DOCTOR_EPILOG, _doctor)
    doctor.add_argument("--config", type=Path, metavar="FILE", help="configuration that shall run here")
    doctor.add_argument("--secret-file", type=Path, metavar="FILE", help="as for `baton serve`")
    which = doctor.add_mutually_exclusive_group()
    which.add_argument("--ray-address", metavar="ADDRESS", help="check every node of this Ray cluster, too")
    which.add_argument("--cluster", type=Path, metavar="FILE", help="the same on the head of this cluster")
    doctor.add_argument("--plan", type=Path, metavar="FILE", help="output of `baton plan --json`, for their memory")
    doctor.add_argument("--json", action="store_true", help="a JSON array instead of lines")
    secret = command("secret", "write a new random secret into a file that only you can read", "", _secret)
    secret.add_argument("file", type=Path, help="must not exist")


def on_head(cluster: Path, *words: str) -> int:
    """A command of Baton on the head of a cluster, with the settings that `ray up` gave its processes there."""
    return _shell_on_head(cluster, shlex.join(words))


def _shell_on_head(cluster: Path, words: str) -> int:
    settings = "RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH=$HOME/baton/ray-token PATH=$HOME/baton/env/bin:$PATH"
    return _ray("exec", str(cluster), f"{settings} baton {words}")


def _up(known: argparse.Namespace, unknown: list[str]) -> int:
    file = _opened(known.file)
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):  # Ray's own remarks
        problems = file.check()
    if problems:
        text = importlib.import_module("deploy.yaml_file").describe(file.path, problems)
        raise ConfigError(f"nothing was started:\n{text}")
    sys.stdout.write("".join(f"{line}\n" for line in [*file.notes, f"{known.file}: no problem found"]))
    if known.check:
        return 0
    return _kubectl("apply", known.file) if _is_manifest(known.file) else _ray("up", "--yes", str(known.file))


def _down(known: argparse.Namespace, unknown: list[str]) -> int:
    return _kubectl("delete", known.file) if _is_manifest(known.file) else _ray("down", "--yes", str(known.file))


def _is_manifest(path: Path) -> bool:
    """Whether the file is for Kubernetes, and not for `ray up`; a ConfigError where it cannot be read."""
    return bool(importlib.import_module("deploy.manifest").is_manifest(path))


def _opened(path: Path) -> Any:
    """The file, to be checked."""
    model_config = importlib.import_module("deploy.checkpoint").config_directory
    if _is_manifest(path):
        manifest = importlib.import_module("deploy.manifest")
        return manifest.Manifest(path, model_config, manifest.has_secret)
    return importlib.import_module("deploy.cluster_file").ClusterFile(path, model_config)


def _logs(known: argparse.Namespace, unknown: list[str]) -> int:
    tail = ["tail", f"--lines={known.lines}", *(["--follow=name", "--retry"] if known.follow else [])]
    if known.cluster is not None:
        pattern = f"{REMOTE_LOGS}/{_quoted_pattern(known.worker)}.log"
        return _ray("exec", str(known.cluster), f"{' '.join(tail)} {pattern}")
    run_file = importlib.import_module("deploy.run_file")
    run = run_file.find(run_file.DIRECTORY.expanduser(), known.port)
    found = sorted(str(path) for path in Path(run.log_dir).glob(f"{known.worker}.log"))
    if not found:
        there = ", ".join(sorted(path.stem for path in Path(run.log_dir).glob("*.log"))) or "nothing"
        raise ConfigError(f"{run.log_dir} has no log of {known.worker!r}, but of: {there}")
    return _run([*tail, *found])


def _doctor(known: argparse.Namespace, unknown: list[str]) -> int:
    if known.cluster is not None:
        if known.config or known.secret_file or known.plan:
            raise ConfigError("--cluster takes the configuration and the secret of the head: no other, and no plan")
        words = "doctor --config ~/baton/baton.toml --secret-file ~/baton/secret --ray-address auto"
        return _shell_on_head(known.cluster, words + " --json" * known.json)
    doctor = importlib.import_module("deploy.doctor")
    config = importlib.import_module("deploy.launch").read_config((), known.config)
    secret = (
        importlib.import_module("deploy.secret_files").read_secret(known.secret_file) if known.secret_file else None
    )
    if known.plan is not None and known.ray_address is None:
        raise ConfigError("--plan needs --ray-address: it is compared with a cluster's nodes")
    if known.ray_address is None:
        findings = doctor.examine(doctor.Machine(Path("/")), config, secret)
    else:
        findings = _examine_cluster(known.ray_address, known.plan, config, secret)
    text = msgspec.json.encode(findings).decode() + "\n" if known.json else doctor.describe(findings)
    sys.stdout.write(text)
    return int(doctor.exit_status(findings))


def _examine_cluster(address: str, plan_path: Path | None, config: Any, secret: bytes | None) -> list[Any]:
    """The nodes of a cluster, and of this machine what concerns the start of Baton."""
    doctor, cluster = (importlib.import_module(f"deploy.{name}") for name in ("doctor", "cluster_doctor"))
    plan = None if plan_path is None else cluster.read_plan(plan_path)
    with contextlib.redirect_stdout(io.StringIO()):  # Ray's own remarks
        nodes, failures = importlib.import_module("deploy.cluster_probe").probe(address, config)
    here = doctor.examine_start(doctor.Machine(Path("/")), config, secret)
    return [*here, *cluster.judge(nodes, config, plan, failures)]


def _secret(known: argparse.Namespace, unknown: list[str]) -> int:
    importlib.import_module("deploy.secret_files").write_secret(known.file)
    sys.stdout.write(f"{known.file}\n")
    return 0


def _quoted_pattern(name: str) -> str:
    """A file name for the remote shell, in which only * keeps its meaning."""
    return "*".join(shlex.quote(part) if part else "" for part in name.split("*"))


def _ray(*arguments: str) -> int:
    """Ray's command line, of the same environment as this Python."""
    beside = Path(sys.executable).with_name("ray")
    program = str(beside) if beside.exists() else shutil.which("ray")
    if program is None:
        raise ConfigError("the command `ray` is not installed; pip install 'ray[default]'")
    return _run([program, *arguments])


def _kubectl(verb: str, file: Path) -> int:
    program = shutil.which("kubectl")
    if program is None:
        raise ConfigError(f"{file} is for Kubernetes, and kubectl is not installed")
    return _run([program, verb, "--filename", str(file)])


def _run(command: Sequence[str]) -> int:
    sys.stdout.flush()
    done: subprocess.CompletedProcess[Any] = subprocess.run(command, check=False)
    return done.returncode if done.returncode >= 0 else EXIT_FAILED
