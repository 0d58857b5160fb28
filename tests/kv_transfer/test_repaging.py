"""KV between workers that differ in page size, dtype, packing and tensor parallelism."""

from __future__ import annotations

import dataclasses
import subprocess
import sys

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine_core.errors import LayoutMismatch
from kv_transfer.blocks import HostBlocks, as_layers, as_rows
from kv_transfer.layout import BlockLayout
from kv_transfer.repaging import Repaging, check_convertible
from kv_transfer.ticket import Landing, Ticket
from kv_transfer.wire import HOST_TRANSPORTS
from tests.kv_transfer.test_transport import first_token, open_pair, until

LAYERS, HEADS, HEAD_DIM = 2, 2, 8


def layout(page_size: int, dtype: str) -> BlockLayout:
    return BlockLayout(num_layers=LAYERS, page_size=page_size, num_kv_heads=HEADS, head_dim=HEAD_DIM, dtype=dtype)


def prompt_kv(num_tokens: int, dtype: str) -> list[np.ndarray]:
    """Per layer `[num_tokens, 2K, H]`."""
    rng = np.random.default_rng(num_tokens)
    shape = (num_tokens, 2 * HEADS, HEAD_DIM)
    return [rng.standard_normal(shape, np.float32).astype(layout(1, dtype).numpy_dtype) for _ in range(LAYERS)]


def pages_of(kv: list[np.ndarray], like: BlockLayout, indices: list[int]) -> list[np.ndarray]:
    """Those pages of the prompt, with rubbish behind its end."""
    size = like.page_size
    found = []
    for layer in kv:
        padded = np.full((-(-len(layer) // size) * size, *layer.shape[1:]), 99, layer.dtype)
        padded[: len(layer)] = layer
        found.append(padded.reshape(-1, size, *layer.shape[1:])[indices])
    return found


def check(kv: list[np.ndarray], theirs: BlockLayout, index: int, block: list[np.ndarray]) -> None:
    first = index * theirs.page_size
    for layer, got in zip(kv, block, strict=True):
        expected = layer[first : first + theirs.page_size].astype(theirs.numpy_dtype)
        assert got.dtype == theirs.numpy_dtype
        np.testing.assert_array_equal(got[: len(expected)], expected)


def check_all(kv: list[np.ndarray], theirs: BlockLayout, blocks: dict[int, list[np.ndarray]]) -> None:
    for index, block in blocks.items():
        check(kv, theirs, index, block)


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_every_block_wanted_comes_out_whole(data):
    sizes = st.sampled_from([1, 2, 3, 4, 5, 8, 16])
    dtypes = st.sampled_from(["float32", "bfloat16", "float8_e4m3fn"])
    mine, theirs = (layout(data.draw(sizes), data.draw(dtypes)) for _ in range(2))
    num_tokens = data.draw(st.integers(1, 60))
    kv = prompt_kv(num_tokens, mine.dtype)
    num_blocks = -(-num_tokens // theirs.page_size)
    wanted = data.draw(st.sets(st.integers(0, num_blocks - 1)))
    ticket = Ticket("r", 0, 1, tuple(Landing(index, index + 7) for index in wanted), 1000)
    repaging = Repaging(mine, theirs)
    mine_wanted = [
        landing.block_index
        for landing in repaging.own_ticket(ticket).landing
        if landing.block_index * mine.page_size < num_tokens
    ]
    out: dict[int, list[np.ndarray]] = {}

    def take(converted) -> None:
        for indices, blocks, num_bytes in converted:
            assert num_bytes == len(indices) * theirs.block_bytes == sum(row.nbytes for row in blocks.rows)
            layers = as_layers(blocks.rows, theirs)
            for place, index in enumerate(indices):
                assert index not in out
                out[index] = [layer[place] for layer in layers]

    while mine_wanted:
        count = data.draw(st.integers(1, len(mine_wanted)))
        chunk, mine_wanted = mine_wanted[:count], mine_wanted[count:]
        rows = as_rows(pages_of(kv, mine, chunk), len(chunk), mine)
        take(repaging.add(chunk, HostBlocks(rows, None)))
    take(repaging.flush())
    assert wanted <= set(out)
    for index in wanted:
        check(kv, theirs, index, out[index])


@pytest.mark.parametrize("field", ["num_layers", "num_kv_heads", "head_dim"])
def test_what_cannot_be_converted_is_refused(field):
    other = {name: getattr(layout(4, "float32"), name) for name in ("num_layers", "num_kv_heads", "head_dim")}
    other[field] += 1
    with pytest.raises(LayoutMismatch, match=field):
        check_convertible(layout(4, "float32"), BlockLayout(page_size=8, dtype="bfloat16", **other))


KINDS = ["inproc", *HOST_TRANSPORTS, *(f"plane {transport}" for transport in HOST_TRANSPORTS)]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("mine", "theirs"),
    [
        (layout(4, "bfloat16"), layout(16, "bfloat16")),
        (layout(16, "float32"), layout(4, "bfloat16")),
        (layout(4, "bfloat16"), layout(6, "float32")),
        (layout(4, "bfloat16"), layout(8, "float8_e4m3fn")),
        (layout(8, "float8_e4m3fn"), layout(4, "float32")),
    ],
)
async def test_unlike_workers_hand_over(kind, mine, theirs):
    num_tokens = 70
    kv = prompt_kv(num_tokens, mine.dtype)
    async with open_pair(kind, mine, decode_layout=theirs) as pair:
        for name, early in (("ticket first", False), ("ticket last", True)):
            wanted = list(range(1, -(-num_tokens // theirs.page_size)))
            pair.sender.offer(name, 0, 30)
            if not early:
                pair.receiver.request(pair.address, pair.ticket(name, wanted))
                await until(lambda: pair.prefill.tickets)
                own = [landing.block_index for landing in pair.prefill.tickets[0].landing]
                assert own[0] == theirs.page_size // mine.page_size
            num_pages = -(-num_tokens // mine.page_size)
            for start in range(0, num_pages, 3):
                chunk = list(range(start, min(start + 3, num_pages)))
                pair.sender.send_blocks(name, 0, chunk, pages_of(kv, mine, chunk))
            pair.sender.finish(name, 0, first_token(name))
            if early:
                pair.receiver.request(pair.address, pair.ticket(name, wanted))
            await until(lambda name=name: (name, 0) in pair.decode.done)
            assert sorted(pair.decode.blocks[name, 0]) == wanted
            check_all(kv, theirs, pair.decode.blocks[name, 0])
        await pair.check_nothing_held()


def test_the_product_of_layouts_on_virtual_devices():
    """In a process of its own: the devices must be asked for before jax starts."""
    command = [sys.executable, "-m", "tests.kv_transfer.device_layouts"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout.split()[-1]) == 8 * 8


def test_rounding_is_to_nearest_even():
    mine, theirs = layout(1, "float32"), layout(1, "bfloat16")
    values = np.float32([1.00390625, 1.01171875, -1.00390625, 3.0e38, 1e-40, 0.0, np.inf, 1.0])
    rows = as_rows([np.broadcast_to(values, (1, *mine.shape)).copy()] * LAYERS, 1, mine)
    ((_, blocks, _),) = Repaging(mine, theirs).add([0], HostBlocks(rows, None))
    got = as_layers(blocks.rows, theirs)[0][0, 0, 0].astype(np.float32)
    np.testing.assert_array_equal(got[:3], np.float32([1.0, 1.015625, -1.0]))
    np.testing.assert_array_equal(got, values.astype(ml_dtypes.bfloat16).astype(np.float32))


@pytest.mark.parametrize("source", ["float32", "bfloat16"])
def test_float8_clips_what_it_cannot_hold_and_keeps_what_is_none(source):
    mine, theirs = layout(1, source), layout(1, "float8_e4m3fn")
    values = np.float32([448, 464, 1e30, -np.inf, np.nan, 0.0, 1.0625, 2.0**-10])
    rows = as_rows([np.broadcast_to(values, (1, *mine.shape)).astype(mine.numpy_dtype)] * LAYERS, 1, mine)
    ((_, blocks, _),) = Repaging(mine, theirs).add([0], HostBlocks(rows, None))
    got = as_layers(blocks.rows, theirs)[0][0, 0, 0].astype(np.float32)
    np.testing.assert_array_equal(got, np.float32([448, 448, 448, -448, np.nan, 0.0, 1.0, 0.0]))


UNITS = np.float32([[2, 0.5, 4, 0.25], [3, 5, 0.3, 0.7]])  # of two layers: K0, V0, K1, V1


def with_units(page_size: int, dtype: str) -> BlockLayout:
    return dataclasses.replace(layout(page_size, dtype), units=UNITS.tobytes())


@pytest.mark.parametrize(("source", "target"), [("float32", "float8_e4m3fn"), ("float8_e4m3fn", "bfloat16")])
def test_float8_is_in_units_of_its_head_and_what_is_not_float8_is_not(source, target):
    mine, theirs = with_units(4, source), layout(8, target)  # a receiver's units do not come over the wire
    rng = np.random.default_rng(0)
    values = [rng.standard_normal((8, 2 * HEADS, HEAD_DIM), np.float32).astype(mine.numpy_dtype) for _ in UNITS]
    rows = as_rows([layer.reshape(2, *mine.shape) for layer in values], 2, mine)
    ((_, blocks, _),) = Repaging(mine, theirs).add([0, 1], HostBlocks(rows, None))
    for got, layer, units in zip(as_layers(blocks.rows, theirs), values, UNITS, strict=True):
        wide = layer.astype(np.float32)
        expected = wide * (1 / units[:, None]) if source == "float32" else wide * units[:, None]
        np.testing.assert_array_equal(got[0], expected.astype(theirs.numpy_dtype))


def test_a_part_of_the_heads_has_their_units():
    part = with_units(4, "float32").part(1, 1)
    np.testing.assert_array_equal(part.layer_units, UNITS[:, 2:])
    assert layout(4, "float32").part(1, 1).layer_units is None


@pytest.mark.parametrize("kind", ["inproc", "plane tcp"])
async def test_units_reach_whoever_converts(kind):
    mine, theirs = with_units(4, "float32"), with_units(4, "float8_e4m3fn")
    values = [np.full((1, *mine.shape), 100, np.float32)] * LAYERS
    async with open_pair(kind, mine, decode_layout=theirs) as pair:
        pair.sender.offer("r", 0, 30)
        pair.receiver.request(pair.address, pair.ticket("r", [0]))
        pair.sender.send_blocks("r", 0, [0], values)
        pair.sender.finish("r", 0, first_token("r"))
        await until(lambda: ("r", 0) in pair.decode.done)
        (block,) = pair.decode.blocks["r", 0].values()
        for layer, units in zip(block, UNITS, strict=True):
            expected = (np.float32(100) * (1 / units)).astype(theirs.numpy_dtype)
            np.testing.assert_array_equal(layer[0, :, 0], expected)
