"""Tensors as the kernels see them, and how a tile of (rows, steps) is read and written.

A tile holds steps of one chunk in the order of positions, not of the walk: a reversed direction scans the same tile from the
other end. Offsets into tensors are 64-bit: they are built from 64-bit indices.
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
def steps_of_chunk(chunk, length, CHUNK: tl.constexpr, TILE: tl.constexpr):
    """Positions of the steps of a chunk of a sequence, (steps,), 64-bit, and which of them exist."""
    step = tl.arange(0, TILE)
    position = tl.cast(chunk, tl.int64) * CHUNK + step
    exists = position < length
    if CHUNK != TILE:
        exists = exists & (step < CHUNK)
    return position, exists


@inline
def load_tile(base, rows, position, mask, DTYPE: tl.constexpr):
    """(rows, steps) at base + rows + position, zero outside the mask; `rows` is (rows, 1), `position` (steps,)."""
    return tl.load(base + rows + position[None, :], mask=mask, other=0.0).to(DTYPE)


@inline
def store_tile(base, rows, position, mask, value):
    pointer = base + rows + position[None, :]
    tl.store(pointer, rounded(value, pointer.dtype.element_ty), mask=mask)


@inline
def load_row(base, position, exists, DTYPE: tl.constexpr):
    """(1, steps). Read as a vector: a load of (1, steps) would force its thread layout on the tiles it meets."""
    return tl.load(base + position, mask=exists, other=0.0).to(DTYPE)[None, :]


@inline
def store_row(base, position, exists, value):
    """`value` is (steps,)."""
    pointer = base + position
    tl.store(pointer, rounded(value, pointer.dtype.element_ty), mask=exists)


# -- maps, walked row by row or column by column -----------------------------------------------------------------------
#
# Three ways to place the steps of a chunk on the map. ROWS: positions follow each other. COLUMN_TILE, where the height is a
# power of two and divides the chunk: whole columns, read as they lie in memory, (height, columns), and turned. ANY_COLUMNS: the
# position of each step is computed, and the reads are scattered.

ROWS: tl.constexpr = tl.constexpr(0)
COLUMN_TILE: tl.constexpr = tl.constexpr(1)
ANY_COLUMNS: tl.constexpr = tl.constexpr(2)


@inline
def places_of_chunk(
    chunk, order, exists, height, width, CHUNK: tl.constexpr, TILE: tl.constexpr, PLACING: tl.constexpr, HEIGHT: tl.constexpr,
    INDEX: tl.constexpr,
):  # fmt: skip
    """Where on the map the steps of a chunk lie, 64-bit, and which of these places exist, as they are read: (steps,), or
    (height, columns) for COLUMN_TILE. `order` and `exists`: of steps_of_chunk. INDEX: an integer type for height * width."""
    if PLACING == COLUMN_TILE:
        column = tl.cast(chunk, tl.int64) * (CHUNK // HEIGHT) + tl.arange(0, TILE // HEIGHT)[None, :]
        row = tl.arange(0, HEIGHT)[:, None].to(tl.int64)
        return row * width + column, (row < height) & (column < width)
    elif PLACING == ANY_COLUMNS:
        step = order.to(INDEX)
        return (step % height).to(tl.int64) * width + step // height, exists
    else:
        return order, exists


@inline
def load_map(base, rows, rows_exist, places, placed, DTYPE: tl.constexpr, TILE: tl.constexpr, PLACING: tl.constexpr):
    """(rows, steps) of the maps at base + rows, zero where a step or a row does not exist; `rows` is (rows, 1)."""
    if PLACING == COLUMN_TILE:
        pointer = base + rows[:, :, None] + places[None, :, :]
        tile = tl.load(pointer, mask=rows_exist[:, :, None] & placed[None, :, :], other=0.0).to(DTYPE)
        return tl.reshape(tl.permute(tile, (0, 2, 1)), (rows.shape[0], TILE))
    else:
        return load_tile(base, rows, places, rows_exist & placed[None, :], DTYPE)


@inline
def store_map(base, rows, rows_exist, places, placed, value, PLACING: tl.constexpr):
    if PLACING == COLUMN_TILE:
        pointer = base + rows[:, :, None] + places[None, :, :]
        tile = tl.permute(tl.reshape(value, (value.shape[0], places.shape[1], places.shape[0])), (0, 2, 1))
        tl.store(pointer, rounded(tile, pointer.dtype.element_ty), mask=rows_exist[:, :, None] & placed[None, :, :])
    else:
        store_tile(base, rows, places, rows_exist & placed[None, :], value)
