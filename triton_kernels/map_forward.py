"""The four-direction scan of a map, fused; equations (13) to (15) of SCAN.md.

A program owns a block of channels of one clip and walks the map twice, from the start and from the end: one launch does it
row by row, a second one column by column and adds. Step sizes exist in registers only: per chunk they are the product of the
block's dt_weight with the low-rank rows of x_dbl, number by number for low ranks and by tl.dot for others (plan.py).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .arguments import MapInputs, MapSizes, last_axis_contiguous, prepare_map, state_dtype
from .plan import Plan, device_size, dot_precision, index_type, map_plan, multiplied, on_device, placing, power_of_two
from .primitives import count, exp, inline, settled, softplus_and_sigmoid, unrolled
from .recurrence import state_forward
from .tiles import (
    COLUMN_TILE,
    LowRank,
    load_column,
    load_map,
    load_row,
    load_tile,
    places_of_chunk,
    steps_of_chunk,
    store_map,
)


@inline
def lifted(
    weight, bias, base, stride, step, exists, mask, RANK: tl.constexpr, RANK_PADDED: tl.constexpr, PRECISION: tl.constexpr,
    INDEX: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """dt of equation (13), (channels, steps), zero outside the mask, and d_dt / d_v. `base`: where the steps' low-rank rows
    begin, `stride` elements apart."""
    if RANK_PADDED == 0:
        v = bias
        for r in unrolled(RANK):
            v = v + weight[r] * load_row(base + tl.cast(stride, tl.int64) * r, step, exists, mask.shape[0], DTYPE)
    else:
        r = tl.arange(0, RANK_PADDED)[:, None]
        rows = load_tile(base, r, stride, step, (r < RANK) & exists[None, :], DTYPE, INDEX)
        v = settled(tl.dot(weight, rows, input_precision=PRECISION, out_dtype=DTYPE)) + bias
    dt, slope = softplus_and_sigmoid(v)
    return tl.where(mask, dt, 0.0), slope


@inline
def load_weight(inputs, first, row, row_exists, RANK: tl.constexpr, RANK_PADDED: tl.constexpr):
    """The block's (channels, rank) of dt_weight; where RANK_PADDED is 0, as RANK columns."""
    base = inputs.dt_weight + first * RANK
    if RANK_PADDED == 0:
        weight = ()
        for r in unrolled(RANK):
            weight = weight + (load_column(base + r, row * RANK, row_exists),)
    else:
        r = tl.arange(0, RANK_PADDED)[None, :]
        weight = tl.load(base + (row * RANK + r), mask=row_exists & (r < RANK), other=0.0)
    return weight


@inline
def decay(inputs, first, n, row, row_exists, N: tl.constexpr):
    """A of state n, (channels, 1); equation (14)."""
    return -exp(load_column(inputs.A_logs + first * N + n, row * N, row_exists))


@inline
def walk_map(
    inputs, low_rank, y, summed, boundary_states, batch, direction, block, row, row_exists, chunks, N: tl.constexpr,
    N_PADDED: tl.constexpr, RANK: tl.constexpr, RANK_PADDED: tl.constexpr, CHUNK: tl.constexpr, RAGGED: tl.constexpr,
    TILE: tl.constexpr, INDEX: tl.constexpr, ACCURATE: tl.constexpr, PRECISION: tl.constexpr, PLACING: tl.constexpr,
    HEIGHT: tl.constexpr, REVERSE: tl.constexpr, FIRST: tl.constexpr, LAST: tl.constexpr,
):  # fmt: skip
    """One direction of a block of channels, from its first chunk to its last."""
    DTYPE: tl.constexpr = inputs.Ds.dtype.element_ty
    batch, first_channel = tl.cast(batch, tl.int64), tl.cast(block, tl.int64) * row.shape[0]
    n_index = tl.arange(0, N_PADDED)[None, :]
    state_exists = row_exists & (n_index < N)
    index = tl.arange(0, TILE)[None, :]
    length = inputs.length
    first = direction * inputs.channels + first_channel  # row of (4, channels)
    sequence = batch * 4 * inputs.channels + first  # row of (batch, 4, channels)
    out_row = (batch * inputs.channels + first_channel) * length
    x_base = inputs.x.data + (batch * inputs.x.batch + first_channel * inputs.x.channel)
    rows_base = low_rank.data + (batch * low_rank.batch + REVERSE * low_rank.direction)
    weight = load_weight(inputs, first, row, row_exists, RANK, RANK_PADDED)
    bias = load_column(inputs.dt_bias + first, row, row_exists)
    D = load_column(inputs.Ds + first, row, row_exists)
    only_A = decay(inputs, first, 0, row, row_exists, N)  # read once where it is the only one
    h = tl.full((row.shape[0], N_PADDED), 0.0, DTYPE)
    for i in count(chunks):
        chunk = chunks - 1 - i if REVERSE else i
        start, step, exists = steps_of_chunk(chunk, length, CHUNK, RAGGED, TILE)
        begin, places, placed = places_of_chunk(
            start, step, exists, inputs.height, inputs.width, RAGGED, TILE, PLACING, HEIGHT, INDEX
        )
        mask = row_exists & exists[None, :]
        if boundary_states is not None:
            saved = boundary_states + (sequence * chunks + chunk) * N
            tl.store(saved + (row.to(INDEX) * chunks * N + n_index), h, mask=state_exists)
        dt, _ = lifted(
            weight,
            bias,
            rows_base + start,
            low_rank.row,
            step,
            exists,
            mask,
            RANK,
            RANK_PADDED,
            PRECISION,
            INDEX,
            DTYPE,
        )
        x = load_map(x_base + begin, row, inputs.x.channel, row_exists, places, placed, DTYPE, INDEX, TILE, PLACING)
        if PLACING == COLUMN_TILE:
            x = settled(x)
        out = D * x
        x = dt * x
        for n in range(N):
            A = only_A if N == 1 else decay(inputs, first, n, row, row_exists, N)
            B_row = rows_base + ((tl.cast(n, tl.int64) + RANK) * low_rank.row + start)
            B = load_row(B_row, step, exists, row.shape[0], DTYPE)
            C = load_row(B_row + tl.cast(low_rank.row, tl.int64) * N, step, exists, row.shape[0], DTYPE)
            h_n, h = state_forward(dt, x, A, B, h, n, n_index, index, TILE, REVERSE, ACCURATE)
            out += C * h_n
        here = out_row + begin
        if not FIRST:
            out += load_map(summed + here, row, length, row_exists, places, placed, DTYPE, INDEX, TILE, PLACING)
        store_map((y if LAST else summed) + here, row, length, row_exists, places, placed, out, INDEX, PLACING)


@inline
def program_of_map(channels, RAGGED: tl.constexpr, BLOCK: tl.constexpr):
    """Programs: (batch, block of channels). Returns both, the rows of the block, (rows, 1), and which exist."""
    block = tl.program_id(1)
    row = tl.arange(0, BLOCK)[:, None]
    row_exists = block * BLOCK + row < channels if RAGGED else tl.full(row.shape, True, tl.int1)
    return tl.program_id(0), block, row, row_exists


@triton.jit
def map_forward_kernel(
    inputs, low_rank, y, summed, boundary_states, first_direction, chunks, N: tl.constexpr, N_PADDED: tl.constexpr,
    RANK: tl.constexpr, RANK_PADDED: tl.constexpr, BLOCK: tl.constexpr, CHUNK: tl.constexpr, RAGGED: tl.constexpr,
    TILE: tl.constexpr, INDEX: tl.constexpr, ACCURATE: tl.constexpr, PRECISION: tl.constexpr, PLACING: tl.constexpr,
    HEIGHT: tl.constexpr, FIRST: tl.constexpr,
):  # fmt: skip
    """The directions: first_direction, and the same two on, which is its reverse."""
    batch, block, row, row_exists = program_of_map(inputs.channels, RAGGED, BLOCK)
    walk_map(
        inputs, low_rank, y, summed, boundary_states, batch, first_direction, block, row, row_exists, chunks, N,
        N_PADDED, RANK, RANK_PADDED, CHUNK, RAGGED, TILE, INDEX, ACCURATE, PRECISION, PLACING, HEIGHT, False, FIRST, False,
    )  # fmt: skip
    tl.debug_barrier()  # the second walk reads what other threads of the program wrote
    walk_map(
        inputs, low_rank, y, summed, boundary_states, batch, first_direction + 2, block, row, row_exists, chunks, N,
        N_PADDED, RANK, RANK_PADDED, CHUNK, RAGGED, TILE, INDEX, ACCURATE, PRECISION, PLACING, HEIGHT, True, False, not FIRST,
    )  # fmt: skip


def map_launches(x_dbl: Tensor, sizes: MapSizes, inputs: MapInputs, plan: Plan, *strides: int):
    """Whether by columns, the two directions of x_dbl, grid, the kernels' numbers and their constants, for the two launches
    of either pass. `strides`: of channels, in tensors beyond the inputs."""
    grid = (sizes.batch, -(-sizes.channels // plan.channels))
    io, wide = inputs.x.data.dtype, inputs.Ds.dtype
    rank_padded = 0 if multiplied(sizes.rank, io) else max(power_of_two(sizes.rank), 16)
    for columns in (False, True):
        low_rank = in_order(x_dbl, columns)
        offsets = (inputs.x.channel, sizes.length, rank_padded // plan.channels * low_rank.row, *strides)
        constants = {
            "N": sizes.state,
            "N_PADDED": power_of_two(sizes.state),
            "RANK": sizes.rank,
            "RANK_PADDED": rank_padded,
            "BLOCK": plan.channels,
            "CHUNK": plan.chunk,
            "RAGGED": plan.ragged(sizes.channels, sizes.length),
            "TILE": plan.tile,
            "INDEX": index_type(plan, sizes.length, *offsets),
            "ACCURATE": io == torch.float32,
            "PRECISION": dot_precision(wide),
            "FIRST": not columns,
            "num_warps": plan.warps,
            "num_stages": 1,  # what the products read is read once
        }
        numbers = (int(columns), plan.chunks(sizes.length))
        yield columns, low_rank, grid, numbers, constants | placing(columns, inputs.height, plan)


def in_order(x_dbl: Tensor, columns: bool) -> LowRank:
    """The two directions of x_dbl that go by rows (a view) or by columns (a copy: the rows of x_dbl are few, and every block
    of channels reads them), in the order of their steps."""
    rows = x_dbl[:, int(columns) :: 2]
    rows = last_axis_contiguous((rows.transpose(-1, -2) if columns else rows).flatten(-2))
    return LowRank(rows, *rows.stride()[:3])


def ss2d_forward(
    x: Tensor, x_dbl: Tensor, dt_weight: Tensor, dt_bias: Tensor, A_logs: Tensor, Ds: Tensor, *, chunk: int,
    out_dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """dass_ops::ss2d_forward of csrc/schema.cpp: y and boundary_states."""
    inputs, sizes = prepare_map(x, x_dbl, dt_weight, dt_bias, A_logs, Ds, chunk=chunk, out_dtype=out_dtype)
    batch, channels, length, state, rank = sizes
    wide = state_dtype(x.dtype)
    y = torch.empty(x.shape, dtype=out_dtype, device=x.device)
    saved_chunks = -(-length // chunk) if chunk else 0
    boundary_states = x.new_empty((batch, 4, channels, saved_chunks, state), dtype=wide)
    if sizes.empty:
        return y, boundary_states
    plan = map_plan(batch * channels, length, rank, x.dtype, chunk, device_size(x.device))
    summed = y if out_dtype == wide else torch.empty_like(y, dtype=wide)
    saved = boundary_states if chunk else None
    with on_device(x):
        for _, low_rank, grid, numbers, constants in map_launches(x_dbl, sizes, inputs, plan):
            map_forward_kernel[grid](inputs, low_rank, y, summed, saved, *numbers, **constants)
    return y, boundary_states
