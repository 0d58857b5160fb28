"""A real Prometheus scrapes a live Baton: every query of every board, rule and alert returns data."""

from __future__ import annotations

import math
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from deploy.monitoring.boards import BOARDS
from deploy.monitoring.files import generate
from deploy.monitoring.rules import ALERTS, RECORDINGS
from tests.baton_process import free_port, until
from tests.deploy.monitoring.tools import tool
from tests.live_baton import LiveBaton

pytestmark = [pytest.mark.slow]

RULES = ("rules.yml", "alerts.yml")


@pytest.fixture(scope="module")
def baton(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveBaton]:
    tool("prometheus")
    live = LiveBaton(tmp_path_factory.mktemp("model")).start()
    yield live
    live.stop()


@pytest.fixture(scope="module")
def prometheus(baton: LiveBaton, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Address of a Prometheus that has seen some traffic, with the generated files in a hurry."""
    directory = tmp_path_factory.mktemp("prometheus")
    files = {
        Path(path).name: yaml.safe_load(text) for path, text in generate("docs/runbook.md").items() if "yml" in path
    }
    config = files["prometheus.yml"]
    config["global"] = {"scrape_interval": "1s", "evaluation_interval": "1s"}
    config["scrape_configs"][0]["static_configs"] = [{"targets": [f"127.0.0.1:{baton.port}"]}]
    for name in RULES:
        for group in files[name]["groups"]:
            group["interval"] = "1s"
    for name in ("prometheus.yml", *RULES):
        (directory / name).write_text(yaml.safe_dump(files[name]))
    port = free_port()
    command = [
        tool("prometheus"),
        f"--config.file={directory / 'prometheus.yml'}",
        f"--storage.tsdb.path={directory / 'data'}",
        f"--web.listen-address=127.0.0.1:{port}",
    ]
    with (directory / "log").open("w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log)
    url = f"http://127.0.0.1:{port}"
    busy = threading.Event()
    traffic = threading.Thread(target=_traffic, args=(baton, busy))
    try:
        until(lambda: _is_ready(url))
        traffic.start()
        last = RECORDINGS[-1].record
        until(lambda: ask(url, last) and ask(url, "rate(baton_transfer_bytes_total[10s]) > 0"), 60)
        yield url
    finally:
        busy.set()
        if traffic.is_alive():
            traffic.join()
        process.terminate()
        process.wait(20)


def _traffic(baton: LiveBaton, enough: threading.Event) -> None:
    while not enough.wait(0.2):
        baton.ask(6)


def _is_ready(url: str) -> bool:
    try:
        return httpx.get(f"{url}/-/ready").status_code == 200
    except httpx.TransportError:
        return False


def ask(url: str, expr: str) -> list[dict[str, Any]]:
    reply = httpx.get(f"{url}/api/v1/query", params={"query": expr}, timeout=20).json()
    assert reply["status"] == "success", f"{expr}: {reply}"
    return list(reply["data"]["result"])


def test_every_board_query_returns_data(prometheus: str) -> None:
    empty = []
    for board in BOARDS:
        for panel, expr in board.queries():
            found = ask(prometheus, expr.replace("$job", ".+").replace("$__rate_interval", "15s"))
            if not found or all(math.isnan(float(series["value"][1])) for series in found):
                empty.append((board.title, panel, expr))
    assert not empty


def test_every_rule_and_alert_query_returns_data(prometheus: str) -> None:
    empty = [rule.record for rule in RECORDINGS if not ask(prometheus, rule.record)]
    empty += [alert.name for alert in ALERTS if not ask(prometheus, alert.query)]
    assert not empty
    groups = httpx.get(f"{prometheus}/api/v1/rules").json()["data"]["groups"]
    rules = [rule for group in groups for rule in group["rules"]]
    assert len(rules) == len(RECORDINGS) + len(ALERTS)
    assert [rule["name"] for rule in rules if rule["health"] != "ok"] == []


def test_nothing_fires_on_a_healthy_baton(prometheus: str) -> None:
    """But for compilations, which are counted by process: here the later workers' warm-up counts for the first."""
    firing = {alert["metric"]["alertname"] for alert in ask(prometheus, 'ALERTS{alertstate="firing"}')}
    assert firing <= {"BatonCompilesAfterWarmup"}


def test_values_are_those_of_the_workers(baton: LiveBaton, prometheus: str) -> None:
    decode = next(worker for worker in baton.cluster.workers if worker.info().worker_id == "d")
    before = decode._replica.stats.snapshot().decode_rows
    until(lambda: ask(prometheus, f'baton_decode_step_rows_total{{worker="d"}} >= {before}'), 20)
    link = ask(prometheus, 'baton_transfer_bytes_total{prefill="p", decode="d"}')
    assert len(link) == 1 and float(link[0]["value"][1]) > 0
    handed_over = ask(prometheus, 'baton_transfer_seconds_count{worker="d"}')[0]["value"][1]
    assert float(handed_over) == float(ask(prometheus, 'baton_transfers_total{decode="d"}')[0]["value"][1])
