"""A worker over two processes of two virtual CPU devices each, with collectives between them."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.integration.host_worker import LOST

ENVIRONMENT = {**os.environ, "JAX_PLATFORMS": "cpu"}


@pytest.fixture(scope="module")
def cache(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("xla")


def free_ports() -> list[int]:
    with socket.socket() as first, socket.socket() as second:
        first.bind(("127.0.0.1", 0))
        second.bind(("127.0.0.1", 0))
        return [first.getsockname()[1], second.getsockname()[1]]


def start(case: str, number: int, num_hosts: int, ports: list[int], cache: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "tests.integration.host_worker", case, number, num_hosts, *ports, cache]
    pipe = subprocess.PIPE
    return subprocess.Popen(list(map(str, command)), env=ENVIRONMENT, text=True, stdin=pipe, stdout=pipe)


@contextlib.contextmanager
def hosts(case: str, cache: Path) -> Iterator[list[subprocess.Popen[str]]]:
    ports = free_ports()
    processes = [start(case, number, 2, ports, cache) for number in range(2)]
    try:
        yield processes
    finally:
        for process in processes:
            process.kill()
            process.communicate()


def lines_until(process: subprocess.Popen[str], last: str) -> list[str]:
    assert process.stdout is not None
    lines = []
    for line in process.stdout:
        if line.startswith(last):
            return lines
        if not line.startswith("[Gloo]"):
            lines.append(line.strip())
    raise AssertionError(f"it ended with {process.wait()} after {lines}")


def test_two_hosts_say_what_one_says_and_one_ends_with_the_other(cache: Path) -> None:
    with contextlib.ExitStack() as stack:
        alone = stack.enter_context(start("decode", 0, 1, [0, 0], cache))
        expected = lines_until(alone, "served")
        alone.communicate("\n")
        leader, follower = stack.enter_context(hosts("decode", cache))
        assert lines_until(leader, "served") == expected and len(expected) == 5
        follower.send_signal(signal.SIGSTOP)  # its sockets live: only its silence tells
        began_at = time.monotonic()
        assert leader.wait(10) == LOST
        assert time.monotonic() - began_at < 5
        assert "host 1 of w is lost: silent for" in lines_until(leader, "host")[-1]
