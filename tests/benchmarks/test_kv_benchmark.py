"""`baton bench kv`: links of a given rate, and what it prints."""

from __future__ import annotations

import argparse
import socket
import subprocess
import sys

import numpy as np
import pytest

from benchmarks import kv, kv_hand_off
from benchmarks.kv_link import listener_of, pace
from kv_transfer.wire import Transport

PACING_RATE = 47  # SO_MAX_PACING_RATE

ACCEPT = (
    "import socket\n"
    "listener = socket.create_server(('127.0.0.1', 0))\n"
    "print(listener.getsockname()[1], flush=True)\n"
    "accepted, _ = listener.accept()\n"
    f"print(int.from_bytes(accepted.getsockopt(socket.SOL_SOCKET, {PACING_RATE}, 8), 'little'), flush=True)\n"
)


def rate(connected: socket.socket) -> int:
    return int.from_bytes(connected.getsockopt(socket.SOL_SOCKET, PACING_RATE, 8), "little")


def borrow(pid: int, port: int) -> socket.socket:
    try:
        return listener_of(pid, port)
    except PermissionError as error:
        pytest.skip(f"sockets of other processes are not lent here: {error}")


def test_what_another_process_accepts_has_the_pace_of_its_listener() -> None:
    with subprocess.Popen([sys.executable, "-c", ACCEPT], stdout=subprocess.PIPE, text=True) as process:
        try:
            port = int(process.stdout.readline())
            with borrow(process.pid, port) as listener:
                pace(listener, 10, 2)
            with pytest.raises(OSError, match="does not listen"):
                listener_of(process.pid, 1)
            with socket.create_connection(("127.0.0.1", port)):
                assert int(process.stdout.readline()) == 625_000_000
        finally:
            process.kill()


@pytest.mark.parametrize("link_gbit", [None, 4.0])
def test_a_hand_off_over_a_link_is_paced(link_gbit: float | None) -> None:
    source = np.zeros(4 * kv.SMALL.block_bytes, np.uint8)
    way = kv_hand_off.HandOff("TCP", Transport.TCP, kv.SMALL, source, 2, planes=True, library=None, link_gbit=link_gbit)
    try:
        assert way.move(len(source)) > 0
        with borrow(way._sender.plane_pid, way.port) as listener:
            assert (rate(listener) == 250_000_000) is (link_gbit is not None)
    finally:
        way.close()


def moves(raw_s: list[float], tcp_s: list[float]) -> kv.Moves:
    seconds = {name: [1.0] * len(raw_s) for name in ("memcpy", "copy, digest, verify", "shared memory")}
    seconds |= {"raw sockets x1": [9.0] * len(raw_s), "raw sockets x2": raw_s, "TCP": tcp_s}
    return kv.Moves(256 << 20, seconds, dict.fromkeys(seconds, 0.1))


def test_json_names_the_ratio_at_each_link(capsys: pytest.CaptureFixture[str]) -> None:
    links = {10.0: moves([1.0, 1.0, 4.0], [1.0, 2.0, 4.0]), 2.5: moves([2.0], [4.0])}
    found = kv.summary([moves([1.0], [2.0])], {"TCP": 1.0}, links)
    assert found["tcp_vs_raw"] == 0.5
    assert found["tcp_vs_raw_at"] == {"10": 1.0, "2.5": 0.5}
    kv._print_tables([moves([1.0], [2.0])], {"TCP": 1.0}, links)
    assert "| 2.5 (0.31)" in capsys.readouterr().out


@pytest.mark.parametrize("text", ["0", "-1", "inf", "nan", "fast"])
def test_a_link_has_a_rate(text: str) -> None:
    with pytest.raises((argparse.ArgumentTypeError, ValueError)):
        kv._positive(text)
