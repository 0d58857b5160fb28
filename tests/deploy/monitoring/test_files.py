"""Generated files: equal to the committed ones, valid for Prometheus and Grafana; alerts fire when they should."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from deploy.monitoring.boards import BOARDS
from deploy.monitoring.files import FILES, RUNBOOK, generate
from deploy.monitoring.panels import Row, Shape, board_json
from deploy.monitoring.promql import BOARD, gauge, rate
from deploy.monitoring.rules import ALERTS
from router.metric_catalogue import AGGREGATES, SPECS, Kind
from tests.deploy.monitoring.alert_cases import CASES
from tests.deploy.monitoring.tools import tool

ROOT = Path(__file__).parents[3]


def test_committed_files_are_the_generated_ones() -> None:
    generated = generate(RUNBOOK)
    stale = [path for path, text in generated.items() if not _is(ROOT / path, text)]
    assert not stale, "run `python -m deploy.monitoring`"
    on_disk = {str(path.relative_to(ROOT)) for path in (ROOT / FILES).rglob("*") if path.is_file()}
    assert on_disk <= generated.keys()


def _is(path: Path, text: str) -> bool:
    return path.is_file() and path.read_text() == text


def test_every_alert_has_a_runbook_entry() -> None:
    headings = re.findall(r"^## (\w+)$", (ROOT / RUNBOOK).read_text(), re.MULTILINE)
    assert headings == [alert.name for alert in ALERTS]


def test_every_metric_is_on_a_board_or_in_an_alert() -> None:
    """And nothing there is unknown."""
    used = set(re.findall(r"(?<![:\w])baton_[a-z0-9_]+", " ".join(_expressions())))
    known = {name for spec in SPECS for name in _series(spec)}
    assert used <= known
    assert {spec.name for spec in SPECS if not used & set(_series(spec))} <= {"baton_build_info", "baton_prefill_steps"}


def _expressions() -> list[str]:
    boards = [expr for board in BOARDS for _, expr in board.queries()]
    files = generate(RUNBOOK)
    groups = [group for name in ("rules", "alerts") for group in yaml.safe_load(files[f"{FILES}/{name}.yml"])["groups"]]
    return boards + [rule["expr"] for group in groups for rule in group["rules"]]


def _series(spec: Any) -> list[str]:
    parts = ("_bucket", "_sum", "_count") if spec.kind is Kind.HISTOGRAM else ("",)
    return [spec.series + part for part in parts]


def test_an_unknown_metric_or_the_wrong_kind_is_an_error() -> None:
    with pytest.raises(KeyError):
        gauge(BOARD, "baton_nonsense", ())
    with pytest.raises(ValueError, match="is a gauge, not a counter"):
        rate(BOARD, "baton_free_pages", ())
    crooked = type(BOARDS[0])("uid", "title", "", (Row("row", 4, BOARDS[0].rows[0].panels[:1]),))
    with pytest.raises(ValueError, match="widths add up to 4"):
        board_json(crooked, ())


def test_alias_names_are_distinct() -> None:
    aliases = [spec.alias for spec in SPECS if spec.alias] + list(AGGREGATES)
    assert len(aliases) == len(set(aliases))


@pytest.mark.parametrize("board", BOARDS, ids=lambda board: board.uid)
def test_grafanas_own_sdk_reads_the_boards(board: Any) -> None:
    """Every field of ours survives a trip through Grafana's types: a misspelt or misplaced one would not."""
    dashboards = pytest.importorskip("grafana_foundation_sdk.models.dashboard")
    cog = pytest.importorskip("grafana_foundation_sdk.cog.encoder")
    plugins = pytest.importorskip("grafana_foundation_sdk.cog.plugins")
    plugins.register_default_plugins()
    ours = board_json(board, BOARDS)
    read = dashboards.Dashboard.from_json(json.loads(json.dumps(ours)))
    theirs = json.loads(cog.JSONEncoder().encode(read))
    _assert_contains(theirs, ours, board.uid)
    shapes = {panel["type"] for panel in ours["panels"]} - {"row"}
    assert shapes <= {str(shape) for shape in Shape}


def _assert_contains(theirs: Any, ours: Any, where: str) -> None:
    if isinstance(ours, dict):
        assert isinstance(theirs, dict), where
        for key, item in ours.items():
            if item in (None, [], {}, False, "", 0) and not theirs.get(key):
                continue
            assert key in theirs, f"{where}.{key} is unknown to Grafana"
            _assert_contains(theirs[key], item, f"{where}.{key}")
    elif isinstance(ours, list):
        assert len(theirs) == len(ours), where
        for index, (theirs_item, item) in enumerate(zip(theirs, ours, strict=True)):
            _assert_contains(theirs_item, item, f"{where}[{index}]")
    else:
        assert theirs == ours, where


def test_promtool_accepts_the_files(tmp_path: Path) -> None:
    promtool = tool("promtool")
    files = ROOT / FILES
    done = subprocess.run([promtool, "check", "config", str(files / "prometheus.yml")], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    done = subprocess.run(
        [promtool, "check", "rules", "--lint=all", "--lint-fatal", str(files / "rules.yml"), str(files / "alerts.yml")],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_alerts_fire_when_they_should(tmp_path: Path) -> None:
    """promtool's own unit tests: each alert has a case in which it fires, and a healthy one in which none does."""
    promtool = tool("promtool")
    assert {case.alert for case in CASES} == {alert.name for alert in ALERTS}
    rules = [str(ROOT / FILES / name) for name in ("rules.yml", "alerts.yml")]
    tests = [case.promtool() for case in CASES]
    (tmp_path / "tests.yml").write_text(
        yaml.safe_dump({"rule_files": rules, "evaluation_interval": "15s", "tests": tests})
    )
    done = subprocess.run([promtool, "test", "rules", str(tmp_path / "tests.yml")], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
