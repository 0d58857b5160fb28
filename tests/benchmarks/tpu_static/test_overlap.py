"""What the page says of overlap: XLA moves a ring's pieces while it multiplies, and keeps a sum to itself."""

import pytest

from benchmarks.tpu_static.overlap import main
from tests.aot import compiles

pytestmark = [*compiles, pytest.mark.aot_matrix]


def test_three_ways(capsys):
    assert main(["--tokens", "256"]) == 0
    _, *rows = (line.split() for line in capsys.readouterr().out.splitlines())
    assert [row[1] for row in rows] == ["plain", "ring", "halves"]
    sums, permutes = ({row[1]: int(row[column]) for row in rows} for column in (4, 5))
    assert sums == {"plain": 1, "ring": 0, "halves": 1}, "XLA joins the sums of two halves"
    assert permutes == {"plain": 0, "ring": 7, "halves": 0}
    compute = {row[1]: float(row[2]) for row in rows}
    assert compute["plain"] < compute["ring"]
