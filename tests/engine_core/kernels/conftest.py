"""Fixtures of kernel tests."""

import pytest

from engine_core.kernels.paged_attention import tuned
from engine_core.kernels.paged_attention.tpu_decode import DecodeTiles
from tests.engine_core.kernels.cases import TILES


@pytest.fixture
def small_tiles(monkeypatch):
    """Through the op's face, tiles that the interpreter is done with soon; what TPUs get is compiled in `test_aot`."""
    monkeypatch.setattr(tuned, "decode_tiles", lambda key, kind: DecodeTiles(tile_kv=256, group=2, num_buffers=3))
    monkeypatch.setattr(tuned, "prefill_tiles", lambda key, kind: TILES)
