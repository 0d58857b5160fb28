"""Autoscaling against Ray's own autoscaler: it starts nodes that do not exist, as processes of this machine."""

from __future__ import annotations

import json
import re
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.baton_process import Baton, free_port, until
from tests.deploy.paced import FULL
from tests.deploy.ray_head import Head
from tests.fakes import make_model_dir

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(400)]

TTFT_S = 2.0
NODE_TYPES = {
    "prefill": {
        "resources": {"CPU": 0, "baton-prefill": 1},
        "node_config": {},
        "min_workers": 1,
        "max_workers": 3,
    }
}
SETTINGS = {
    "gateway.slo_ttft_s": TTFT_S,
    "gateway.local_prefill_tokens": 0,
    "autoscale.mode": "act",
    "autoscale.window_s": 0.5,
    "autoscale.start_s": 2,
    "autoscale.max_prefill": 3,
    "autoscale.max_decode": 2,
    "autoscale.budget": 5,
    "autoscale.node_timeout_s": 8,
}


class Clients:
    """Asks for streams at a rate that can be changed; remembers how every request went."""

    def __init__(self, port: int, rate: float, max_tokens: int) -> None:
        self._url = f"http://127.0.0.1:{port}/v1/completions"
        asked = {"prompt": [5, 6, 7, 8] * 5, "max_tokens": max_tokens, "temperature": 0, "ignore_eos": True}
        self._body = {"model": "paced", "stream": True, **asked}
        self.rate = rate
        self.answers: list[tuple[float, int, float]] = []  # when it was sent, status, seconds
        self._over = threading.Event()
        self._threads: list[threading.Thread] = []
        self._pacer = threading.Thread(target=self._pace)
        self._pacer.start()

    def _pace(self) -> None:
        while not self._over.wait(1 / self.rate):
            asking = threading.Thread(target=self._ask)
            asking.start()
            self._threads.append(asking)

    def _ask(self) -> None:
        at = time.monotonic()
        try:
            with httpx.stream("POST", self._url, json=self._body, timeout=60) as reply:
                events = [line for line in reply.iter_lines() if line]
            whole = events[-1] == "data: [DONE]" and len(events) > 2 and not any('"error"' in event for event in events)
            status = reply.status_code if whole or reply.status_code != 200 else 0
        except httpx.TransportError:
            status = 0
        self.answers.append((at, status, time.monotonic() - at))

    def all_whole(self) -> bool:
        """Whether every stream came to its end, of those that were asked for before `stop`."""
        return {status for _, status, _ in self.answers} == {200}

    def in_time(self, since: float) -> float:
        """Share of those sent since then that were answered in time; their decoding takes next to nothing."""
        times = [seconds for at, _, seconds in self.answers if at >= since]
        return sum(seconds <= TTFT_S for seconds in times) / len(times) if times else 0.0

    def stop(self) -> None:
        self._over.set()
        for thread in (self._pacer, *self._threads):
            thread.join()


@pytest.fixture(scope="module")
def head(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Head]:
    running = Head(tmp_path_factory.mktemp("head"), {"baton-gateway": 1, "baton-decode": 1}, NODE_TYPES)
    yield running
    running.stop()


def test_advice_is_told_with_its_reasons_and_nothing_is_done(
    head: Head, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in head.settings.items():
        monkeypatch.setenv(name, value)
    port = free_port()
    baton = paced(tmp_path, port, make_model_dir(tmp_path / "paced"), head, SETTINGS | {"autoscale.mode": "advise"})
    clients = None
    try:
        assert baton.wait_ready(), baton.log.read_text()
        clients = Clients(port, 6.0, 4)  # a prefill worker reads four a second
        until(lambda: '"prefill: the floor is ' in reasons(baton), 30)
        time.sleep(3)
        state = baton.status()
        assert not any(decision["acted"] for decision in state["autoscale"]["decisions"])
        assert state["autoscale"]["target"]["prefill"] >= 2 and state["wanted"] == {"prefill": 1, "decode": 1}
        assert any(event.startswith("autoscale would: 1P1D -> ") for event in state["events"])
        assert pools(baton) == {"prefill": 1, "decode": 1} and not others(baton)
        assert len(head.processes("raylet")) == 2, "no node was asked for"
        text = baton.cli("status").stdout
        assert "autoscale: advise, wants " in text and "prefill: the floor is " in text
        metrics = httpx.get(f"http://127.0.0.1:{port}/metrics").text
        assert 'baton_fleet_wanted_workers{role="prefill"} 1.0' in metrics
        assert 'baton_autoscale_changes_total{cause="forecast",direction="up",role="prefill"}' in metrics
        shown = httpx.get(f"http://127.0.0.1:{port}/dashboard/state").json()["fleet"]["autoscale"]
        assert shown["mode"] == "advise" and not shown["decisions"][-1]["acted"]
        clients.stop()
        assert clients.all_whole()
    finally:
        if clients is not None:
            clients.stop()
        baton.close()


def test_pools_follow_the_load_onto_new_nodes_and_back(
    head: Head, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in head.settings.items():
        monkeypatch.setenv(name, value)
    model = make_model_dir(tmp_path / "paced")
    port = free_port()
    baton = paced(tmp_path, port, model, head, SETTINGS)
    clients = None
    try:
        assert baton.wait_ready(), baton.log.read_text()
        clients = Clients(port, 1.0, 4)
        time.sleep(3)
        assert pools(baton) == {"prefill": 1, "decode": 1} and len(head.processes("raylet")) == 2

        (model / FULL).touch()  # decode wants another worker, too, for which no node will ever come
        clients.rate = 6.0  # a prefill worker reads four a second
        until(lambda: state_of(baton, "decode-1") == "pending", 60)
        until(lambda: pools(baton)["prefill"] >= 2, 60)
        assert len(head.processes("raylet")) >= 3, "on a node that did not exist"
        recovered(clients)
        until(lambda: "no node came for decode-1 within 8 s" in reasons(baton), 30)
        a_drained_slice_stays_free(baton, clients)

        (model / FULL).unlink()
        clients.rate = 0.5
        until(lambda: pools(baton) == {"prefill": 1, "decode": 1} and not others(baton), 150)
        until(lambda: len(head.processes("raylet")) == 2, 30)
        clients.stop()
        assert len(clients.answers) > 60 and clients.all_whole()

        text = baton.cli("status").stdout
        assert "autoscale: act, wants 1 prefill, 1 decode" in text and "one less" in text
        metrics = httpx.get(f"http://127.0.0.1:{port}/metrics").text
        assert 'baton_autoscale_changes_total{cause="forecast",direction="up",role="prefill"}' in metrics
        assert 'baton_autoscale_changes_total{cause="unavailable",direction="down",role="decode"}' in metrics
        assert 'baton_fleet_wanted_workers{role="prefill"} 1.0' in metrics
        shown = httpx.get(f"http://127.0.0.1:{port}/dashboard/state").json()["fleet"]["autoscale"]
        assert shown["mode"] == "act" and shown["decisions"][-1]["acted"]
    finally:
        if clients is not None:
            clients.stop()
        baton.close()


def test_a_worker_changes_its_role_when_the_budget_is_spent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three slices, of which the prompts need two: a decode worker drains under load, and its slice reads prompts."""
    head = Head(tmp_path, {"baton-gateway": 1, "baton-prefill": 3, "baton-decode": 3, "TPU": 3})
    for name, value in head.settings.items():
        monkeypatch.setenv(name, value)
    model = make_model_dir(tmp_path / "paced")
    (model / FULL).touch()  # decode would rather have a third
    port = free_port()
    more = {"fleet.tpus_per_worker": 1, "fleet.decode": 2, "autoscale.budget": 3, "autoscale.flip_s": 1}
    baton = paced(tmp_path, port, model, head, SETTINGS | more)
    clients = None
    try:
        assert baton.wait_ready(), baton.log.read_text()
        clients = Clients(port, 6.0, 60)
        metrics = f"http://127.0.0.1:{port}/metrics"
        read = r'baton_placements_total{decode="decode-[01]",prefill="prefill-1"} \d'
        until(lambda: re.search(read, httpx.get(metrics).text), 60)
        clients.stop()
        assert len(clients.answers) > 10 and clients.all_whole()
        flip = 'baton_autoscale_changes_total{cause="forecast",direction="flip",role="prefill"}'
        assert flip in httpx.get(metrics).text
        told = "\n".join(baton.status()["events"])
        assert "autoscale: 1P2D -> 2P1D: make a decode slice a prefill slice" in told
        order = ("; a prefill worker takes its place", "is draining", "prefill-1 (incarnation 1) is starting")
        places = [told.index(event) for event in order]
        assert places == sorted(places)
    finally:
        if clients is not None:
            clients.stop()
        baton.close()
        head.stop()


def a_drained_slice_stays_free(baton: Baton, clients: Clients) -> None:
    """Though the load would have it, until somebody scales."""
    clients.rate = 10.0  # as many as there may be: none is on its way while one is drained
    until(lambda: pools(baton)["prefill"] == 3, 60)
    assert baton.cli("drain", "prefill-1").returncode == 0
    time.sleep(3)
    assert len([m for m in baton.status()["members"] if m["role"] == "prefill"]) == 2
    assert "a slice was drained: no more than 2 prefill, " in baton.cli("status").stdout
    assert baton.cli("scale", "--prefill", "2", "--no-wait").returncode == 0
    until(lambda: pools(baton)["prefill"] == 3, 60)


def paced(home: Path, port: int, model: Path, head: Head, settings: dict[str, object]) -> Baton:
    """`baton serve` on that cluster with workers that take the time they are told to."""
    flags = [word for name, value in settings.items() for word in (f"--{name}", str(value))]
    flags += ["--gateway.model_name", "paced"]
    return Baton(home, port, "-m", "tests.deploy.paced", str(port), str(model), head.address, *flags)


def recovered(clients: Clients) -> None:
    """Wait until requests are answered in time again, for three seconds."""
    since = time.monotonic()
    deadline = since + 60
    while clients.in_time(since) < 0.95 or time.monotonic() - since < 3:
        assert time.monotonic() < deadline, clients.answers[-20:]
        if time.monotonic() - since >= 3:
            since = time.monotonic()
        time.sleep(0.1)


def pools(baton: Baton) -> dict[str, int]:
    """Workers that serve, by role."""
    members = baton.status()["members"]
    return {role: sum(m["role"] == role and m["state"] == "ready" for m in members) for role in ("prefill", "decode")}


def others(baton: Baton) -> list[Any]:
    return [m for m in baton.status()["members"] if m["state"] != "ready"]


def state_of(baton: Baton, worker_id: str) -> str:
    return next((m["state"] for m in baton.status()["members"] if m["worker_id"] == worker_id), "")


def reasons(baton: Baton) -> str:
    return json.dumps([one["reasons"] for one in baton.status()["autoscale"]["decisions"]])
