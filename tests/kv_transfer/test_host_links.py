"""A worker's leader and followers without devices: who is let in, what arrives, and that each ends with the other."""

from __future__ import annotations

import socket
import struct
import threading
import time
from queue import SimpleQueue
from typing import Any

import pytest

from engine_core.errors import CheckpointError, ConfigError, ProtocolError, WorkerDied
from engine_core.host_commands import Begin, InitSlot, KvPiece, Scatter
from engine_core.messages import KvShard
from kv_transfer import host_links, host_loop
from kv_transfer.framing import frame
from kv_transfer.host_links import HostLinks
from kv_transfer.leader_link import LeaderLink

BEGIN = Begin(64, "f")
WAIT_S = 10.0


class Executor:
    """Keeps what it was told."""

    def __init__(self) -> None:
        self.commands: SimpleQueue[Any] = SimpleQueue()

    def run(self, command: Any) -> None:
        if command == InitSlot(666, (), ()):
            raise ProtocolError("no such slot")
        self.commands.put(command)

    def tick(self) -> bool:
        return False


class Hosts:
    """A leader and its followers in one process; `lost` is what each end said of the other's loss."""

    def __init__(self, num_hosts: int = 2, secret: bytes | None = b"secret") -> None:
        self.lost: SimpleQueue[str] = SimpleQueue()
        self.leader = HostLinks("w", 7, num_hosts, secret, self.lost.put)
        self.port = self.leader.listen("127.0.0.1", 0)
        self.followers: list[LeaderLink] = []
        self.executors: list[Executor] = []

    def connect(self, number: int, secret: bytes | None = b"secret", life: int = 7) -> LeaderLink:
        link = LeaderLink("w", life, number, secret, self.lost.put)
        self.followers.append(link)
        link.connect("127.0.0.1", self.port, WAIT_S)
        return link

    def make_ready(self) -> None:
        self.leader.wait_connected(WAIT_S)
        self.leader.begin(BEGIN)
        for number, link in enumerate(self.followers, start=1):
            assert link.wait_begin() == BEGIN
            self.executors.append(Executor())
            link.serve(self.executors[-1], KvShard("127.0.0.1", 9, number, 1))
        self.leader.wait_ready()

    def close(self) -> None:
        for link in self.followers:
            link.close()
        self.leader.close()


@pytest.fixture
def hosts():
    made: list[Hosts] = []

    def make(*arguments: Any) -> Hosts:
        made.append(Hosts(*arguments))
        return made[-1]

    yield make
    for each in made:
        each.close()


def test_commands_arrive_in_order_and_each_follower_gets_its_own_kv(hosts):
    pair = hosts(3)
    pair.connect(1)
    pair.connect(2)
    pair.make_ready()
    assert [shard.first_head for shard in pair.leader.kv_shards] == [1, 2]
    for slot in range(50):
        pair.leader.send(InitSlot(slot, (1, 2), ()))
    pair.leader.send_each([KvPiece(b"one"), KvPiece(b"two")])
    pair.leader.send(Scatter((3,)))
    for executor, own in zip(pair.executors, (b"one", b"two"), strict=True):
        got = [executor.commands.get(timeout=WAIT_S) for _ in range(52)]
        assert got == [*(InitSlot(slot, (1, 2), ()) for slot in range(50)), KvPiece(own), Scatter((3,))]


@pytest.mark.parametrize(
    ("number", "secret", "life", "message"),
    [
        (1, b"other", 7, "wrong secret"),
        (1, None, 7, "wrong secret"),
        (1, b"secret", 6, "this is w, incarnation 7"),
        (0, b"secret", 7, "host 0 is not expected"),
        (2, b"secret", 7, "host 2 is not expected"),
    ],
)
def test_a_stranger_is_refused_and_the_others_are_not_harmed(hosts, number, secret, life, message):
    pair = hosts()
    with pytest.raises(ProtocolError, match=message):
        pair.connect(number, secret, life)
    pair.followers.pop().close()
    pair.connect(1)
    pair.make_ready()
    with pytest.raises(ProtocolError, match="host 1 is not expected"):
        pair.connect(1)
    pair.followers.pop().close()
    assert pair.lost.empty() and pair.followers[0].healthy


@pytest.mark.parametrize(
    "sent", [b"\xff" * 64, frame(b"\x91\xa8HostBeat", 0), frame(b"\x92\xa8HostBeat\x05", 0), b"\x00\xff\xff\xff" * 2]
)
def test_hostile_bytes_end_their_connection_only(hosts, sent):
    pair = hosts()
    pair.connect(1)
    with socket.create_connection(("127.0.0.1", pair.port)) as stranger:
        stranger.sendall(sent)
        stranger.settimeout(WAIT_S)
        while stranger.recv(1024):
            pass
    pair.make_ready()
    assert pair.lost.empty()


def test_a_silent_stranger_is_cut_off(hosts, monkeypatch):
    monkeypatch.setattr(host_links, "HANDSHAKE_TIMEOUT_S", 0.1)
    with socket.create_connection(("127.0.0.1", hosts().port)) as stranger:
        stranger.settimeout(WAIT_S)
        while stranger.recv(1024):
            pass


def test_a_follower_that_hangs_up_ends_the_leader(hosts):
    pair = hosts()
    link = pair.connect(1)
    pair.make_ready()
    link.close()
    assert pair.lost.get(timeout=WAIT_S).startswith("host 1 of w is lost")


@pytest.mark.parametrize("resets", [False, True])
def test_a_leader_that_hangs_up_ends_the_follower(hosts, resets):
    """The kernel resets a connection whose end has bytes to read that its process did not read."""
    pair = hosts()
    link = pair.connect(1)
    pair.make_ready()
    if resets:
        connected = pair.leader._hosts[1].channel._transport.get_extra_info("socket")
        connected.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    pair.leader.close()
    assert pair.lost.get(timeout=WAIT_S) == "the leader is lost: it hung up"
    assert not link.healthy


def test_a_silent_host_is_lost(hosts):
    pair = hosts()
    link = pair.connect(1)
    pair.make_ready()
    link._loop.post(time.sleep, (host_loop.SILENT_BEATS + 2) * host_loop.BEAT_S)
    assert "silent for 1.75 s" in pair.lost.get(timeout=WAIT_S)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_command_that_fails_ends_the_follower(hosts):
    pair = hosts()
    pair.connect(1)
    pair.make_ready()
    pair.leader.send(InitSlot(666, (), ()))
    assert "a command of the leader failed: ProtocolError: no such slot" in pair.lost.get(timeout=WAIT_S)


def test_a_follower_that_cannot_start_says_why(hosts):
    pair = hosts()
    link = pair.connect(1)
    pair.leader.begin(BEGIN)
    link.wait_begin()
    link.fail(CheckpointError("truncated"))
    with pytest.raises(ConfigError, match="host 1 of w is lost: truncated"):
        pair.leader.wait_ready()


def test_a_host_that_never_comes(hosts):
    with pytest.raises(WorkerDied, match=r"hosts \[1, 2\] of w did not connect within 0.1 s"):
        hosts(3).leader.wait_connected(0.1)


def test_no_leader_answers():
    link = LeaderLink("w", 1, 1, None, lambda reason: None)
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        with pytest.raises(WorkerDied, match="no leader answers"):
            link.connect("127.0.0.1", unused.getsockname()[1], 0.1)
    link.close()


def test_without_a_secret_only_loopback():
    links = HostLinks("w", 1, 2, None, lambda reason: None)
    with pytest.raises(ConfigError, match="loopback only"):
        links.listen("0.0.0.0", 0)
    links.close()


def test_nothing_is_left(hosts):
    before = threading.active_count()
    pair = Hosts()
    pair.connect(1)
    pair.make_ready()
    pair.close()
    deadline = time.monotonic() + WAIT_S
    while threading.active_count() > before:
        assert time.monotonic() < deadline, threading.enumerate()
        time.sleep(0.05)
