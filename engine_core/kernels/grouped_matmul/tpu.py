"""Grouped matmul as a Pallas kernel for TPU.

What bounds it is reading weights, so each matrix of a group that has rows is read from HBM exactly once, and there is
always a read in flight while the MXU works.

Grid `(column tiles, panels)`: a panel is a run of consecutive rows, whatever groups they belong to. The pipeline of
`pallas_call` moves panels of `x` and of the result. Matrices come by explicit DMAs into a ring of two slots, in the
order in which they are needed: (column tile, group). When a group's last row is done its slot is free, and the read of
the next but one starts: the next is in flight by then, across borders of panels and of column tiles alike. A group
that straddles panels keeps its slot.

The rows of a group within a panel start anywhere. They are computed in tiles that start at a multiple of the packed
sublanes, and stored under a mask, which leaves the neighbours' rows in the same tile as they were. Tiles come in a few
heights: the MXU needs as long to take a matrix in as to push 128 rows through it, so lower ones pay only where it is
small (v5e).

Nothing is prepared outside but the running sum of the group sizes: which groups have rows is found on the scalar core
at the start of the kernel, while the first matrices are on their way.

VMEM: `2 * G * K * tile_n` weights, `2 * panel * K` rows, `2 * panel * tile_n` results, and the scales.
"""

from __future__ import annotations

import functools
import itertools
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

SLOTS = 2
ROW_ALIGN = 16  # sublanes of a packed bfloat16 tile; enough for f32 too
_CHUNK = 256  # columns of one product: the width of the MXU (two passes where it is 128)
_STRAIGHT_ELEMENTS = 4 << 20  # of a matrix multiplied by straight code; a larger one by a loop, to compile fast
_DEPTH = 4096  # of one product: more columns of x at once would be copied for want of registers
_VMEM_SLACK = 4 << 20


@dataclass(frozen=True, kw_only=True, slots=True)
class Tiles:
    """Static sizes of the kernel.

    Attributes:
        panel: rows of `x` in VMEM at a time, a multiple of `ROW_ALIGN` and at least the highest row tile.
        columns: of a matrix in VMEM at a time; divides N, and is a multiple of 128 or N itself.
        rows: heights of the row tiles, ascending multiples of `ROW_ALIGN`.
    """

    panel: int
    columns: int
    rows: tuple[int, ...]


def grouped_matmul(
    x: jax.Array,
    weights: jax.Array,
    scales: jax.Array | None,
    group_sizes: jax.Array,
    first: jax.Array | int,
    out_dtype: jax.typing.DTypeLike,
    *,
    tiles: Tiles,
    interpret: pltpu.InterpretParams | bool,
) -> jax.Array:
    """See `api.grouped_matmul`; x is bf16, weights are bf16, int8 or fp8."""
    num_rows, depth = x.shape
    num_groups = group_sizes.shape[0]
    _, num_products, _, width = weights.shape
    grid = (width // tiles.columns, pl.cdiv(num_rows, tiles.panel))

    def panel_of(p: jax.Array, ends: jax.Ref) -> jax.Array:
        last = lax.max(ends[num_groups - 1] - 1, 0) // tiles.panel
        return lax.min(p, last)  # panels without rows are neither read nor written

    in_specs = [
        pl.BlockSpec((tiles.panel, depth), lambda n, p, ends, _: (panel_of(p, ends), 0)),
        pl.BlockSpec(memory_space=pl.ANY),
    ]
    operands = [x, weights]
    if scales is not None:
        block = (num_groups, num_products, tiles.columns)
        in_specs.append(pl.BlockSpec(block, lambda n, p, *_: (0, 0, n)))
        operands.append(scales)
    ring = (SLOTS, num_products, depth, tiles.columns)
    call = pl.pallas_call(
        functools.partial(_kernel, tiles=tiles, scaled=scales is not None),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=grid,
            in_specs=in_specs,
            out_specs=pl.BlockSpec((tiles.panel, tiles.columns), lambda n, p, ends, _: (panel_of(p, ends), n)),
            scratch_shapes=[
                pltpu.VMEM(ring, weights.dtype),
                pltpu.SemaphoreType.DMA((SLOTS,)),
                pltpu.SMEM((num_groups,), jnp.int32),
                pltpu.SMEM((num_groups,), jnp.int32),
                pltpu.SMEM((2,), jnp.int32),
            ],
        ),
        out_shape=jax.ShapeDtypeStruct((num_rows, width), out_dtype),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("arbitrary", "arbitrary"),
            vmem_limit_bytes=vmem_bytes(tiles, weights, scales, x.dtype.itemsize, jnp.dtype(out_dtype).itemsize),
            disable_bounds_checks=True,
        ),
        cost_estimate=pl.CostEstimate(
            flops=2 * num_rows * depth * width * num_products,
            bytes_accessed=weights.nbytes * num_groups // len(weights) + x.size * 2 * grid[0] + num_rows * width * 2,
            transcendentals=num_rows * width * (num_products - 1),
        ),
        interpret=interpret,
        name="grouped_matmul",
    )
    ends = jnp.cumsum(group_sizes, dtype=jnp.int32)
    result: jax.Array = call(ends, jnp.asarray(first, jnp.int32).reshape(1), *operands)
    return result


def vmem_bytes(tiles: Tiles, weights: jax.Array, scales: jax.Array | None, x_itemsize: int, out_itemsize: int) -> int:
    """What the kernel needs of VMEM, with room for the compiler's own."""
    _, num_products, depth, _ = weights.shape
    ring = SLOTS * num_products * depth * tiles.columns * weights.dtype.itemsize
    rows = 2 * tiles.panel * (depth * x_itemsize + tiles.columns * out_itemsize)
    factors = 0 if scales is None else 2 * len(scales) * 8 * tiles.columns * 4  # padded to eight sublanes at the worst
    work = 3 * num_products * max(tiles.rows) * tiles.columns * 4
    return ring + rows + factors + work + _VMEM_SLACK


@dataclass(frozen=True, kw_only=True, slots=True)
class _Matrices:
    """The matrices of groups that have rows, in the order of use; *number* counts tiles of them in that order.

    Attributes:
        ends: [E] i32 SMEM, row behind the last of each group.
        first: [1] i32 SMEM, number of the first group's matrices in `source`.
        source: [W, G, K, N] HBM.
        ring: [SLOTS, G, K, columns] VMEM.
        arrivals: [SLOTS] DMA semaphores.
        hit: [E] i32 SMEM, the groups that have rows, in order.
        starts: [E] i32 SMEM, the first row of each of these.
        state: [2] i32 SMEM: how many these are; index in `hit` of the group to go on with in the next panel.
    """

    ends: jax.Ref
    first: jax.Ref
    source: jax.Ref
    ring: jax.Ref
    arrivals: jax.Ref
    hit: jax.Ref
    starts: jax.Ref
    state: jax.Ref

    def read(self, number: jax.Array, group: jax.Array, column_tile: jax.Array) -> Any:
        """The read of a tile into its slot, to start or to wait for."""
        slot, columns = lax.rem(number, SLOTS), self.ring.shape[3]
        place = self.first[0] + group
        matrix = self.source.at[place]
        if columns < self.source.shape[3]:
            start = pl.multiple_of(column_tile * columns, columns)
            matrix = self.source.at[place, :, :, pl.ds(start, columns)]
        return pltpu.make_async_copy(matrix, self.ring.at[slot], self.arrivals.at[slot])

    def fetch(self, number: jax.Array) -> None:
        """Start a read by number, where there is a tile of that number."""
        count = self.state[0]

        @pl.when(number < count * pl.num_programs(0))
        def _() -> None:
            self.read(number, self.hit[lax.rem(number, count)], lax.div(number, count)).start()

    def begin(self) -> None:
        """Find the groups that have rows, and start the first reads on the way."""

        def find(group: jax.Array, carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
            count, start = carry
            end = self.ends[group]
            has_rows = end > start

            @pl.when(has_rows)
            def _() -> None:
                self.hit[count] = group
                self.starts[count] = start

            @pl.when(has_rows & (count < SLOTS))
            def _() -> None:
                self.read(count, group, jnp.int32(0)).start()

            return count + has_rows.astype(jnp.int32), end

        count, _ = lax.fori_loop(0, self.ends.shape[0], find, (jnp.int32(0), jnp.int32(0)))
        self.state[0] = count
        for number in range(1, SLOTS):  # with fewer groups than slots, the other first reads are of later columns

            @pl.when((count > 0) & (count <= number))
            def _(number: int = number) -> None:
                self.fetch(jnp.int32(number))


def _kernel(*refs: jax.Ref, tiles: Tiles, scaled: bool) -> None:
    """One grid step; see the module's docstring."""
    ends, first, x, weights, *rest = refs  # x: [panel, K] VMEM; for the others see `_Matrices`
    scales = rest.pop(0) if scaled else None  # [E, G, columns] f32 VMEM
    out, ring, arrivals, hit, starts, state = rest  # out: [panel, columns] VMEM
    source = {"ends": ends, "first": first, "source": weights}
    matrices = _Matrices(**source, ring=ring, arrivals=arrivals, hit=hit, starts=starts, state=state)
    column_tile, panel = pl.program_id(0), pl.program_id(1)
    pl.when((column_tile == 0) & (panel == 0))(matrices.begin)

    @pl.when(panel == 0)
    def restart() -> None:
        state[1] = 0

    first_row, count = panel * tiles.panel, state[0]
    last_row = first_row + tiles.panel

    def here(index: jax.Array) -> jax.Array:
        """Whether there is a group at this index of `hit`, and it has rows in this panel."""
        start = starts[lax.min(index, ends.shape[0] - 1)]
        found: jax.Array = (index < count) & (start < last_row)
        return found

    def work(carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        index, _ = carry
        group = hit[index]
        start, end = starts[index], ends[group]
        number = column_tile * count + index

        @pl.when(start >= first_row)  # otherwise the panel before has waited
        def wait() -> None:
            matrices.read(number, group, column_tile).wait()

        low, high = lax.max(start - first_row, 0), lax.min(end - first_row, tiles.panel)
        scale = None if scales is None else scales.at[group]
        _multiply(x, ring.at[lax.rem(number, SLOTS)], scale, out, low, high, tiles)
        done = end <= last_row

        @pl.when(done)
        def fetch() -> None:
            matrices.fetch(number + SLOTS)

        index = index + done.astype(jnp.int32)
        return index, done & here(index)

    index = state[1]
    state[1], _ = lax.while_loop(lambda carry: carry[1], work, (index, here(index)))


def _multiply(
    x: jax.Ref,
    matrix: jax.Ref,
    scale: jax.Ref | None,
    out: jax.Ref,
    low: jax.Array,
    high: jax.Array,
    tiles: Tiles,
) -> None:
    """Rows [low, high) of a panel times one group's matrices, in tiles of rows."""
    first = lax.div(low, ROW_ALIGN) * ROW_ALIGN
    *lower, tallest = tiles.rows
    tall = lax.div(high - first + tallest - 1 - (lower[-1] if lower else 0), tallest)

    def tile_at(start: jax.Array, height: int) -> None:
        aligned = pl.multiple_of(lax.min(start, tiles.panel - height), ROW_ALIGN)
        _multiply_tile(x, matrix, scale, out, aligned, low, high, height)

    def step(index: jax.Array, _: None) -> None:
        tile_at(first + index * tallest, tallest)

    lax.fori_loop(0, tall, step, None)
    rest = high - first - tall * tallest
    for below, height in itertools.pairwise((0, *lower)):

        @pl.when((rest > below) & (rest <= height))
        def _(height: int = height) -> None:
            tile_at(first + tall * tallest, height)


def _multiply_tile(
    x: jax.Ref,  # [panel, K]
    matrix: jax.Ref,  # [G, K, columns]
    scale: jax.Ref | None,  # [G, columns]
    out: jax.Ref,  # [panel, columns]
    start: jax.Array,
    low: jax.Array,
    high: jax.Array,
    height: int,
) -> None:
    """Rows [start, start + height), of which those in [low, high) are stored."""
    rows = pl.ds(start, height)
    place = start + lax.broadcasted_iota(jnp.int32, (height, 1), 0)
    mine = (place >= low) & (place < high)

    def multiply(columns: slice | pl.Slice) -> None:
        products = []
        for index in range(matrix.shape[0]):
            product = jnp.zeros((), jnp.float32)
            for start in range(0, matrix.shape[1], _DEPTH):
                part = slice(start, min(start + _DEPTH, matrix.shape[1]))
                right = matrix[index, part, columns].astype(x.dtype)
                product += jnp.dot(x[rows, part], right, preferred_element_type=jnp.float32)
            products.append(product if scale is None else product * scale[index : index + 1, columns])
        result = products[0] if len(products) == 1 else jax.nn.silu(products[0]) * products[1]
        kept = out[rows, columns].astype(jnp.float32)
        out[rows, columns] = jnp.where(mine, result, kept).astype(out.dtype)

    width = out.shape[1]
    straight = max(_CHUNK, _STRAIGHT_ELEMENTS // (matrix.shape[0] * matrix.shape[1]) // _CHUNK * _CHUNK)
    if width <= straight or width % straight:
        for column in range(0, width, _CHUNK):
            multiply(slice(column, min(column + _CHUNK, width)))
        return

    def some(index: jax.Array, _: None) -> None:
        for column in range(0, straight, _CHUNK):
            multiply(pl.ds(pl.multiple_of(index * straight + column, _CHUNK), _CHUNK))

    lax.fori_loop(0, width // straight, some, None)
