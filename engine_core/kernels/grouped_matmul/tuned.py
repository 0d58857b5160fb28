"""Tile sizes of the TPU kernel: tuned ones from `tuned/<chip>.json`, else a rule."""

from __future__ import annotations

import functools
import json
import logging
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from engine_core.kernels.grouped_matmul.tpu import ROW_ALIGN, SLOTS, Tiles

logger = logging.getLogger(__name__)

_FOLDER = Path(__file__).parent / "tuned"
_LANES = 128
_RING_SHARE = 0.45  # of VMEM, for matrices
_PANEL_SHARE = 0.2  # for rows and results
_LOW_PANEL, _HIGH_PANEL = 256, 1024


@dataclass(frozen=True, kw_only=True, slots=True)
class TuningKey:
    """What tile sizes depend on; local to a device.

    Attributes:
        rows: M.
        depth: K.
        width: N.
        products: G.
        weight_dtype: name of the matrices' dtype.
    """

    rows: int
    depth: int
    width: int
    products: int
    weight_dtype: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Chip:
    """What the rule needs to know of a TPU.

    Attributes:
        name: such as "v6e"; names the file of tuned sizes.
        vmem_bytes: of a TensorCore.
        mxu_size: rows and columns of its MXU.
    """

    name: str
    vmem_bytes: int
    mxu_size: int


@functools.cache
def choose_tiles(key: TuningKey, chip: Chip) -> Tiles:
    """Tile sizes for a shape. That there are no tuned ones is said once in the log."""
    for entry in _entries(chip.name):
        if entry["key"] == asdict(key):
            sizes = entry["tiles"]
            return Tiles(panel=sizes["panel"], columns=sizes["columns"], rows=tuple(sizes["rows"]))
    logger.info("no tuned tile sizes for %s on TPU %s; using the rule", key, chip.name)
    return tiles_by_rule(key, chip)


def tiles_by_rule(key: TuningKey, chip: Chip) -> Tiles:
    """The widest column tile that fits (rows are read once per column tile), and panels that grow with the rows.

    A group that straddles two panels costs one more row tile; a high panel makes the first read and last write longer.
    """
    item = 1 if key.weight_dtype in ("int8", "float8_e4m3fn", "float8_e5m2") else 2
    column_bytes = SLOTS * key.products * key.depth * item
    columns = next(
        (size for size in _column_tiles(key.width) if size * column_bytes <= _RING_SHARE * chip.vmem_bytes),
        _column_tiles(key.width)[-1],
    )
    rows: tuple[int, ...] = (128, 256) if chip.mxu_size > _LANES else (32, 128)
    row_bytes = 2 * 2 * (key.depth + columns)
    high = int(_PANEL_SHARE * chip.vmem_bytes / row_bytes) // ROW_ALIGN * ROW_ALIGN
    panel = min(max(_LOW_PANEL, key.rows // 8), _HIGH_PANEL, max(high, rows[-1]))
    panel = max(panel // rows[-1], 1) * rows[-1]
    whole = -(-key.rows // ROW_ALIGN) * ROW_ALIGN
    if whole < panel:  # all rows are one panel
        panel = whole
        rows = tuple(sorted({min(height, whole) for height in rows}))
    return Tiles(panel=panel, columns=columns, rows=rows)


def _column_tiles(width: int) -> list[int]:
    """All widths of equal column tiles, the widest first."""
    counts = range(1, width // _LANES + 1)
    return [width] + [width // count for count in counts if count > 1 and width % (count * _LANES) == 0]


@functools.cache
def _entries(chip: str) -> list[dict[str, Any]]:
    path = _FOLDER / f"{chip}.json"
    entries: list[dict[str, Any]] = json.loads(path.read_text())["shapes"] if path.exists() else []
    return entries
