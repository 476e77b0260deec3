"""Tensors as the kernels see them, and how a tile of (rows, steps) is read and written.

A tile holds steps of one chunk in the order of positions, not of the walk: a reversed direction scans the same tile from the
other end. Where a tile begins is a 64-bit offset; inside it, offsets are of the type INDEX, 32-bit where they fit (plan.py).
"""

from typing import NamedTuple

import triton.language as tl

from .primitives import inline, rounded


class Sequence(NamedTuple):
    """(batch, directions, channels, length), length contiguous; strides in elements."""

    data: object
    batch: int
    direction: int
    channel: int


class Projection(NamedTuple):
    """B or C: (batch, directions, groups, state, length), length contiguous; strides in elements.

    Constant along batch and length: (directions, channels, state), contiguous, and every number None."""

    data: object
    batch: int | None = None
    direction: int | None = None
    group: int | None = None
    state: int | None = None
    group_channels: int | None = None  # channels that share a group


class Map(NamedTuple):
    """(batch, channels, height * width), the map contiguous."""

    data: object
    batch: int
    channel: int


class LowRank(NamedTuple):
    """Two directions of x_dbl in the order of their steps: (batch, 2, rank + 2 * state, length), length contiguous."""

    data: object
    batch: int
    direction: int
    row: int


@inline
def steps_of_chunk(chunk, length, CHUNK: tl.constexpr, RAGGED: tl.constexpr, TILE: tl.constexpr):
    """The first position of a chunk of a sequence, 64-bit, the steps from there, (steps,), and which of them exist: not
    RAGGED, where all do in every chunk, the compiler leaves out what masks cost.

    The hint about contiguity gives every dtype the thread layout that `turned` wants, one warp to a row; without it, 16-bit
    tiles are computed in two layouts."""
    start = tl.cast(chunk, tl.int64) * CHUNK
    step = tl.max_contiguous(tl.arange(0, TILE), max(TILE // 32, 1))
    if RAGGED:
        exists = (start + step < length) & (step < CHUNK)
    else:
        exists = tl.full(step.shape, True, tl.int1)
    return start, step, exists


@inline
def load_tile(base, row, stride, step, mask, DTYPE: tl.constexpr, INDEX: tl.constexpr):
    """(rows, steps) from `base` on, zero outside the mask; `row` is (rows, 1), `step` (steps,)."""
    return tl.load(base + (row * tl.cast(stride, INDEX) + step[None, :]), mask=mask, other=0.0).to(DTYPE)


@inline
def store_tile(base, row, stride, step, mask, value, INDEX: tl.constexpr):
    pointer = base + (row * tl.cast(stride, INDEX) + step[None, :])
    tl.store(pointer, rounded(value, pointer.dtype.element_ty), mask=mask)


@inline
def load_row(base, step, exists, BLOCK: tl.constexpr, DTYPE: tl.constexpr):
    """(1, steps) or, the same row for each of BLOCK channels, (channels, steps).

    A load of (1, steps) would force its thread layout on the tiles it meets. As a vector it takes theirs, but only where the
    program has more threads than the vector has steps (plan.py: from 16 channels on); else it goes through shared memory."""
    if BLOCK > 8:
        return tl.load(base + step, mask=exists, other=0.0).to(DTYPE)[None, :]
    else:
        shape: tl.constexpr = (BLOCK, step.shape[0])
        mask = tl.broadcast_to(exists[None, :], shape)
        return tl.load(base + tl.broadcast_to(step[None, :], shape), mask=mask, other=0.0).to(DTYPE)


@inline
def store_row(base, step, exists, value):
    """`value` is (steps,)."""
    pointer = base + step
    tl.store(pointer, rounded(value, pointer.dtype.element_ty), mask=exists)


@inline
def load_column(base, row, exists):
    """(rows, 1), one number per channel; `row` is (rows, 1)."""
    return tl.load(base + row, mask=exists, other=0.0)


# -- maps, walked row by row or column by column -----------------------------------------------------------------------
#
# Three ways to place the steps of a chunk on the map. ROWS: positions follow each other. COLUMN_TILE, where the height is a
# power of two and divides the chunk: whole columns, read as they lie in memory, (height, columns), and turned. ANY_COLUMNS:
# the position of each step is computed, and the reads are scattered.

ROWS: tl.constexpr = tl.constexpr(0)
COLUMN_TILE: tl.constexpr = tl.constexpr(1)
ANY_COLUMNS: tl.constexpr = tl.constexpr(2)


@inline
def places_of_chunk(
    start, step, exists, height, width, RAGGED: tl.constexpr, TILE: tl.constexpr, PLACING: tl.constexpr,
    HEIGHT: tl.constexpr, INDEX: tl.constexpr,
):  # fmt: skip
    """Where on the map the steps of a chunk lie: an offset, 64-bit, the places from there, and which of these exist, as they
    are read: (steps,), or (height, columns) for COLUMN_TILE. The first three arguments: of steps_of_chunk."""
    if PLACING == COLUMN_TILE:
        first = start // HEIGHT
        column = tl.arange(0, TILE // HEIGHT)[None, :]
        row = tl.arange(0, HEIGHT)[:, None]
        if RAGGED:
            placed = (row < height) & (first + column < width)
        else:
            placed = tl.full((HEIGHT, TILE // HEIGHT), True, tl.int1)
        return first, row * tl.cast(width, INDEX) + column, placed
    elif PLACING == ANY_COLUMNS:
        order = start.to(INDEX) + step
        return start * 0, order % height * width + order // height, exists
    else:
        return start, step, exists


@inline
def load_map(
    base, row, stride, row_exists, places, placed, DTYPE: tl.constexpr, INDEX: tl.constexpr, TILE: tl.constexpr,
    PLACING: tl.constexpr,
):  # fmt: skip
    """(rows, steps) of the maps from `base` on, zero where a step or a row does not exist; `row` is (rows, 1)."""
    if PLACING == COLUMN_TILE:
        offset = (row * tl.cast(stride, INDEX))[:, :, None] + places[None, :, :]
        tile = tl.load(base + offset, mask=row_exists[:, :, None] & placed[None, :, :], other=0.0).to(DTYPE)
        return tl.reshape(tl.permute(tile, (0, 2, 1)), (row.shape[0], TILE))
    else:
        return load_tile(base, row, stride, places, row_exists & placed[None, :], DTYPE, INDEX)


@inline
def store_map(base, row, stride, row_exists, places, placed, value, INDEX: tl.constexpr, PLACING: tl.constexpr):
    if PLACING == COLUMN_TILE:
        pointer = base + ((row * tl.cast(stride, INDEX))[:, :, None] + places[None, :, :])
        tile = tl.permute(tl.reshape(value, (value.shape[0], places.shape[1], places.shape[0])), (0, 2, 1))
        mask = row_exists[:, :, None] & placed[None, :, :]
        tl.store(pointer, rounded(tile, pointer.dtype.element_ty), mask=mask)
    else:
        store_tile(base, row, stride, places, row_exists & placed[None, :], value, INDEX)
