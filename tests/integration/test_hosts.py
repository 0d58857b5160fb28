"""Workers over two processes of two virtual CPU devices each, with collectives between them."""

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

import msgspec
import pytest

from engine_core.messages import WorkerInfo
from tests.integration.host_worker import LOST, MARK, requests

ENVIRONMENT = {**os.environ, "JAX_PLATFORMS": "cpu"}
NUM_REQUESTS = 5


class Process(subprocess.Popen):
    """Of `host_worker`."""

    def __init__(self, *arguments: object) -> None:
        command = [sys.executable, "-m", "tests.integration.host_worker", *map(str, arguments)]
        super().__init__(command, env=ENVIRONMENT, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE)

    def __exit__(self, *exception: object) -> None:
        self.kill()
        super().__exit__(*exception)

    def lines(self, count: int) -> list[str]:
        """The next ones that it says itself."""
        found: list[str] = []
        for line in self.stdout:
            if line.startswith(MARK):
                found.append(line.removeprefix(MARK).strip())
            if len(found) == count:
                return found
        raise AssertionError(f"it ended with {self.wait()} after {found}")

    def rest(self) -> list[str]:
        """All that it says until it ends."""
        return [line.removeprefix(MARK).strip() for line in self.stdout if line.startswith(MARK)]

    def tell(self, line: str) -> None:
        self.stdin.write(line + "\n")
        self.stdin.flush()


@pytest.fixture(scope="module")
def cache(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("xla")


@pytest.fixture(scope="module")
def expected(cache: Path) -> list[str]:
    """Tokens of a worker of one process with as many devices."""
    with Process("decode", 0, 1, 0, 0, cache) as alone:
        lines = alone.lines(NUM_REQUESTS + 1)
        alone.communicate("\n")
        return lines[:NUM_REQUESTS]


@contextlib.contextmanager
def hosts(case: str, cache: Path) -> Iterator[list[Process]]:
    with socket.socket() as first, socket.socket() as second:
        first.bind(("127.0.0.1", 0))
        second.bind(("127.0.0.1", 0))
        ports = first.getsockname()[1], second.getsockname()[1]
    with Process(case, 0, 2, *ports, cache) as leader, Process(case, 1, 2, *ports, cache) as follower:
        yield [leader, follower]


def together(info: str, cache: Path) -> list[str]:
    """What a worker of one device and that one answer."""
    with Process("peer", cache) as peer:
        peer.tell(info)
        lines = peer.lines(NUM_REQUESTS + 1)
        assert lines.pop() == "done"
        return lines


def test_a_decode_worker_over_two_hosts(cache: Path, expected: list[str]) -> None:
    with hosts("decode", cache) as (leader, follower):
        lines = leader.lines(NUM_REQUESTS + 1)
        assert lines[:NUM_REQUESTS] == expected
        assert together(lines[-1], cache) == expected  # with KV from a prefill worker of other pages
        follower.send_signal(signal.SIGSTOP)  # its sockets live: only its silence tells
        began_at = time.monotonic()
        assert leader.lines(1) == ["host 1 of decode is lost: silent for 1.75 s"]
        assert leader.wait(10) == LOST
        assert time.monotonic() - began_at < 5


def test_a_prefill_worker_over_two_hosts(cache: Path, expected: list[str]) -> None:
    with hosts("prefill", cache) as (leader, follower):
        (info,) = leader.lines(1)
        shards = msgspec.json.decode(info, type=WorkerInfo).address.kv_shards
        assert [(shard.first_head, shard.num_heads) for shard in shards] == [(0, 2), (2, 2)]
        assert shards[0].kv_port != shards[1].kv_port
        assert together(info, cache) == expected
        leader.kill()
        *handed_over, last = follower.rest()
        assert last == "the leader is lost: it hung up"
        counts = [int(line.removesuffix(" blocks of 2 heads")) for line in handed_over]
        assert sum(counts) == sum(-(-len(request.token_ids) // 4) for request in requests("")), (
            "its half of every block"
        )
        assert follower.wait(10) == LOST


def test_sequences_lie_on_either_host(cache: Path, expected: list[str]) -> None:
    with hosts("rows", cache) as (leader, follower):
        assert leader.lines(NUM_REQUESTS) == expected
        leader.lines(1)
        leader.tell("")
        assert leader.lines(1) == ["at rest"]
        assert follower.wait(10) == LOST
