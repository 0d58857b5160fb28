"""Grafana's dashboard JSON, as much of it as the boards need (schema of Grafana 10 and later)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

WIDTH = 24  # of Grafana's grid
SOURCE = {"type": "prometheus", "uid": "${datasource}"}


class Shape(StrEnum):
    """What a panel looks like; Grafana's own names of panel types."""

    LINES = "timeseries"
    NUMBER = "stat"
    BARS = "bargauge"
    MATRIX = "table"  # one query by two labels, as a coloured grid
    STATES = "state-timeline"
    HEATMAP = "heatmap"


@dataclass(frozen=True, slots=True)
class Query:
    """One PromQL expression; `legend` names its series from their labels."""

    expr: str
    legend: str


@dataclass(frozen=True, slots=True)
class Panel:
    """One panel.

    Attributes:
        help: what it shows and what is good, shown behind the (i).
        unit: Grafana's name, such as s, percentunit, Bps, short.
        width: of 24.
        rows, columns: labels of a MATRIX, else empty.
        warn, bad: thresholds, from which values are yellow and red; None for neither.
    """

    title: str
    help: str
    shape: Shape
    unit: str
    width: int
    queries: tuple[Query, ...]
    rows: str = ""
    columns: str = ""
    warn: float | None = None
    bad: float | None = None


@dataclass(frozen=True, slots=True)
class Row:
    """Panels side by side under a heading."""

    title: str
    height: int
    panels: tuple[Panel, ...]


@dataclass(frozen=True, slots=True)
class Board:
    """One dashboard. `uid` is part of its address."""

    uid: str
    title: str
    help: str
    rows: tuple[Row, ...]

    def queries(self) -> list[tuple[str, str]]:
        """(panel, expression) of every query."""
        return [(panel.title, query.expr) for row in self.rows for panel in row.panels for query in panel.queries]


def board_json(board: Board, links: Sequence[Board]) -> dict[str, Any]:
    """A board as Grafana imports it.

    Args:
        links: the boards to link to, this one included.
    """
    panels: list[dict[str, Any]] = []
    top = 0
    for row in board.rows:
        panels.append(_heading(len(panels) + 1, row.title, top))
        top += 1
        left = 0
        for panel in row.panels:
            place = {"h": row.height, "w": panel.width, "x": left, "y": top}
            panels.append(_panel(len(panels) + 1, panel, place))
            left += panel.width
        if left != WIDTH:
            raise ValueError(f"{board.title}, {row.title}: widths add up to {left}, not {WIDTH}")
        top += row.height
    return {
        "uid": board.uid,
        "title": board.title,
        "description": board.help,
        "tags": ["baton"],
        "schemaVersion": 39,
        "version": 1,
        "editable": True,
        "graphTooltip": 1,
        "refresh": "10s",
        "timezone": "browser",
        "time": {"from": "now-30m", "to": "now"},
        "templating": {"list": [_data_source(), _job()]},
        "annotations": {"list": []},
        "links": [_link(other) for other in links if other.uid != board.uid],
        "panels": panels,
    }


def _data_source() -> dict[str, Any]:
    return {"name": "datasource", "type": "datasource", "query": "prometheus", "label": "Data source", "hide": 0}


def _job() -> dict[str, Any]:
    query = "label_values(baton_build_info, job)"
    return {
        "name": "job",
        "type": "query",
        "label": "Baton",
        "datasource": SOURCE,
        "query": query,
        "refresh": 2,
        "includeAll": True,
        "multi": True,
        "allValue": ".+",
        "current": {"text": "All", "value": "$__all", "selected": True},
        "hide": 0,
    }


def _link(board: Board) -> dict[str, Any]:
    return {
        "title": board.title.removeprefix("Baton / "),
        "type": "link",
        "url": f"/d/{board.uid}",
        "keepTime": True,
        "includeVars": True,
        "asDropdown": False,
        "targetBlank": False,
        "tags": [],
        "icon": "dashboard",
        "tooltip": board.help,
    }


def _heading(number: int, title: str, top: int) -> dict[str, Any]:
    place = {"h": 1, "w": WIDTH, "x": 0, "y": top}
    return {"id": number, "type": "row", "title": title, "collapsed": False, "gridPos": place, "panels": []}


def _panel(number: int, panel: Panel, place: dict[str, int]) -> dict[str, Any]:
    return {
        "id": number,
        "type": str(panel.shape),
        "title": panel.title,
        "description": panel.help,
        "datasource": SOURCE,
        "gridPos": place,
        "targets": [_target(index, query, panel.shape) for index, query in enumerate(panel.queries)],
        "fieldConfig": {"defaults": _defaults(panel), "overrides": []},
        "options": _OPTIONS[panel.shape],
        "transformations": _transformations(panel),
    }


def _target(index: int, query: Query, shape: Shape) -> dict[str, Any]:
    now = shape in (Shape.MATRIX, Shape.BARS)
    return {
        "refId": chr(ord("A") + index),
        "datasource": SOURCE,
        "expr": query.expr,
        "legendFormat": query.legend,
        "instant": now,
        "range": not now,
        "format": {Shape.MATRIX: "table", Shape.HEATMAP: "heatmap"}.get(shape, "time_series"),
    }


def _defaults(panel: Panel) -> dict[str, Any]:
    steps: list[dict[str, Any]] = [{"color": "green", "value": None}]
    steps += [{"color": "yellow", "value": panel.warn}] if panel.warn is not None else []
    steps += [{"color": "red", "value": panel.bad}] if panel.bad is not None else []
    steps.sort(key=lambda step: float("-inf") if step["value"] is None else step["value"])
    if panel.warn is not None and panel.bad is not None and panel.bad < panel.warn:  # low is bad
        steps = [
            {"color": "red", "value": None},
            {"color": "yellow", "value": panel.bad},
            {"color": "green", "value": panel.warn},
        ]
    defaults: dict[str, Any] = {"unit": panel.unit, "thresholds": {"mode": "absolute", "steps": steps}}
    if panel.shape is Shape.LINES:
        defaults["color"] = {"mode": "palette-classic"}
        defaults["min"] = 0
        defaults["custom"] = {"lineWidth": 1, "fillOpacity": 8, "showPoints": "never", "spanNulls": False}
    elif panel.shape is Shape.MATRIX:
        defaults["color"] = {"mode": "continuous-BlYlRd"}
        defaults["custom"] = {"align": "center", "cellOptions": {"type": "color-background", "mode": "gradient"}}
    elif panel.shape is Shape.STATES:
        defaults["mappings"] = [
            {"type": "value", "options": {"0": {"text": "away", "color": "red"}, "1": {"text": "connected"}}}
        ]
    return defaults


def _transformations(panel: Panel) -> list[dict[str, Any]]:
    if panel.shape is not Shape.MATRIX:
        return []
    options = {"rowField": panel.rows, "columnField": panel.columns, "valueField": "Value", "emptyValue": "zero"}
    return [{"id": "groupingToMatrix", "options": options}]


_REDUCE = {"calcs": ["lastNotNull"], "fields": "", "values": False}
_OPTIONS: dict[Shape, dict[str, Any]] = {
    Shape.LINES: {
        "legend": {"displayMode": "list", "placement": "bottom", "showLegend": True, "calcs": []},
        "tooltip": {"mode": "multi", "sort": "desc"},
    },
    Shape.NUMBER: {
        "reduceOptions": _REDUCE,
        "colorMode": "value",
        "graphMode": "area",
        "textMode": "auto",
        "justifyMode": "auto",
        "orientation": "auto",
    },
    Shape.BARS: {
        "reduceOptions": _REDUCE,
        "displayMode": "gradient",
        "orientation": "horizontal",
        "valueMode": "color",
        "showUnfilled": True,
        "minVizWidth": 8,
        "minVizHeight": 16,
    },
    Shape.MATRIX: {"showHeader": True, "cellHeight": "sm"},
    Shape.STATES: {
        "showValue": "auto",
        "rowHeight": 0.9,
        "mergeValues": True,
        "alignValue": "left",
        "legend": {"displayMode": "list", "placement": "bottom", "showLegend": False, "calcs": []},
        "tooltip": {"mode": "single", "sort": "none"},
    },
    Shape.HEATMAP: {
        "calculate": False,
        "cellGap": 1,
        "color": {"mode": "scheme", "scheme": "Oranges", "steps": 64, "reverse": False},
        "legend": {"show": True},
        "tooltip": {"show": True, "yHistogram": False},
        "yAxis": {"unit": "s", "reverse": False},
    },
}
