"""The gradient of the four-direction scan of a map; equation (16) of SCAN.md.

A program owns a block of channels as in the forward pass and walks each direction from its end with mu. It leaves d_v and, of
the B and C rows, the part of its channels; two products of matrices make the rest of d_x_dbl and d_dt_weight of d_v.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .arguments import prepare_map, prepare_map_gradients, state_dtype
from .map_forward import decay, lifted, load_weight, map_launches, program_of_map
from .plan import device_size, map_plan, on_device
from .primitives import count, inline, settled, total
from .recurrence import state_backward
from .tiles import (
    COLUMN_TILE,
    load_column,
    load_map,
    load_row,
    places_of_chunk,
    steps_of_chunk,
    store_map,
    store_row,
    store_tile,
)


class MapGradients(NamedTuple):
    """What the two launches write, all contiguous. Partial: to be summed over the axes in brackets."""

    x: Tensor
    x_sum: Tensor  # like x, in the state dtype: what the directions before this one gave
    A: Tensor  # ([batch], 4, channels, state), to be multiplied by A
    dt_bias: Tensor  # ([batch], 4, channels)
    Ds: Tensor  # ([batch], channels), the same for every direction
    v: Tensor  # (batch, 2, channels, length), of one launch, in the order of its steps
    B_and_C: Tensor  # (batch, 2, [blocks], 2 * state, length), likewise


@inline
def walk_map_back(
    inputs, low_rank, d_y, boundary_states, to, batch, direction, block, row, row_exists, chunks, N: tl.constexpr,
    N_PADDED: tl.constexpr, RANK: tl.constexpr, RANK_PADDED: tl.constexpr, CHUNK: tl.constexpr, RAGGED: tl.constexpr,
    TILE: tl.constexpr, INDEX: tl.constexpr, ACCURATE: tl.constexpr, PRECISION: tl.constexpr, PLACING: tl.constexpr,
    HEIGHT: tl.constexpr, REVERSE: tl.constexpr, FIRST: tl.constexpr, LAST: tl.constexpr,
):  # fmt: skip
    """One direction of a block of channels, from its last chunk to its first."""
    DTYPE: tl.constexpr = inputs.Ds.dtype.element_ty
    batch, first_channel = tl.cast(batch, tl.int64), tl.cast(block, tl.int64) * row.shape[0]
    n_index = tl.arange(0, N_PADDED)[None, :]
    state_exists = row_exists & (n_index < N)
    index = tl.arange(0, TILE)[None, :]
    length = inputs.length
    first = direction * inputs.channels + first_channel  # row of (4, channels)
    sequence = batch * 4 * inputs.channels + first  # row of (batch, 4, channels)
    x_row = (batch * inputs.channels + first_channel) * length
    v_row = ((batch * 2 + REVERSE) * inputs.channels + first_channel) * length
    slab = ((batch * 2 + REVERSE) * tl.num_programs(1) + block) * (2 * N)
    x_base = inputs.x.data + (batch * inputs.x.batch + first_channel * inputs.x.channel)
    g_base = d_y.data + (batch * d_y.batch + first_channel * d_y.channel)
    rows_base = low_rank.data + (batch * low_rank.batch + REVERSE * low_rank.direction)
    weight = load_weight(inputs, first, row, row_exists, RANK, RANK_PADDED)
    bias = load_column(inputs.dt_bias + first, row, row_exists)
    D = load_column(inputs.Ds + first, row, row_exists)
    only_A = decay(inputs, first, 0, row, row_exists, N)  # read once where it is the only one
    mu = tl.full((row.shape[0], N_PADDED), 0.0, DTYPE)
    d_A = mu
    d_bias = tl.full(row.shape, 0.0, DTYPE)
    d_D = d_bias
    for i in count(chunks):
        chunk = i if REVERSE else chunks - 1 - i
        start, step, exists = steps_of_chunk(chunk, length, CHUNK, RAGGED, TILE)
        begin, places, placed = places_of_chunk(
            start, step, exists, inputs.height, inputs.width, RAGGED, TILE, PLACING, HEIGHT, INDEX
        )
        mask = row_exists & exists[None, :]
        dt, slope = lifted(
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
        u = load_map(x_base + begin, row, inputs.x.channel, row_exists, places, placed, DTYPE, INDEX, TILE, PLACING)
        g = load_map(g_base + begin, row, d_y.channel, row_exists, places, placed, DTYPE, INDEX, TILE, PLACING)
        if PLACING == COLUMN_TILE:
            u, g = settled(u), settled(g)
        x = dt * u
        if FIRST:
            d_D += total(g * u, 1)[:, None]
        d_x = tl.full(x.shape, 0.0, DTYPE)  # sum_n lam B
        d_dt = tl.full(x.shape, 0.0, DTYPE)
        for n in range(N):
            A = only_A if N == 1 else decay(inputs, first, n, row, row_exists, N)
            B_row = rows_base + ((tl.cast(n, tl.int64) + RANK) * low_rank.row + start)
            B = load_row(B_row, step, exists, row.shape[0], DTYPE)
            C = load_row(B_row + tl.cast(low_rank.row, tl.int64) * N, step, exists, row.shape[0], DTYPE)
            saved = boundary_states + (sequence * chunks + chunk) * N + n
            h_in = load_column(saved, row.to(INDEX) * chunks * N, row_exists)
            h, lam, d_dt_n, d_A_n, mu = state_backward(
                dt, u, x, g, A, B, C, h_in, mu, n, n_index, index, TILE, REVERSE, ACCURATE
            )
            d_x += lam * B
            d_dt += d_dt_n
            d_A += tl.where(n_index == n, d_A_n, 0.0)
            d_B_row = to.B_and_C + ((slab + n) * length + start)
            store_row(d_B_row, step, exists, total(lam * x, 0))
            store_row(d_B_row + tl.cast(length, tl.int64) * N, step, exists, total(g * h, 0))
        d_v = tl.where(mask, d_dt * slope, 0.0)
        d_bias += total(d_v, 1)[:, None]
        store_tile(to.v + (v_row + start), row, length, step, mask, d_v, INDEX)
        d_x = D * g + dt * d_x
        here = x_row + begin
        if not FIRST:
            d_x += load_map(to.x_sum + here, row, length, row_exists, places, placed, DTYPE, INDEX, TILE, PLACING)
        store_map((to.x if LAST else to.x_sum) + here, row, length, row_exists, places, placed, d_x, INDEX, PLACING)
    tl.store(to.A + sequence * N + (row * N + n_index), d_A, mask=state_exists)
    tl.store(to.dt_bias + sequence + row, d_bias, mask=row_exists)
    if FIRST:
        tl.store(to.Ds + (batch * inputs.channels + first_channel) + row, d_D, mask=row_exists)


@triton.jit
def map_backward_kernel(
    inputs, low_rank, d_y, boundary_states, to, first_direction, chunks, N: tl.constexpr, N_PADDED: tl.constexpr,
    RANK: tl.constexpr, RANK_PADDED: tl.constexpr, BLOCK: tl.constexpr, CHUNK: tl.constexpr, RAGGED: tl.constexpr,
    TILE: tl.constexpr, INDEX: tl.constexpr, ACCURATE: tl.constexpr, PRECISION: tl.constexpr, PLACING: tl.constexpr,
    HEIGHT: tl.constexpr, FIRST: tl.constexpr,
):  # fmt: skip
    """Programs and directions as those of map_forward_kernel."""
    batch, block, row, row_exists = program_of_map(inputs.channels, RAGGED, BLOCK)
    walk_map_back(
        inputs, low_rank, d_y, boundary_states, to, batch, first_direction, block, row, row_exists, chunks, N,
        N_PADDED, RANK, RANK_PADDED, CHUNK, RAGGED, TILE, INDEX, ACCURATE, PRECISION, PLACING, HEIGHT, False, FIRST,
        False,
    )  # fmt: skip
    tl.debug_barrier()  # the second walk reads what other threads of the program wrote
    walk_map_back(
        inputs, low_rank, d_y, boundary_states, to, batch, first_direction + 2, block, row, row_exists,
        chunks, N, N_PADDED, RANK, RANK_PADDED, CHUNK, RAGGED, TILE, INDEX, ACCURATE, PRECISION, PLACING, HEIGHT, True, False,
        not FIRST,
    )  # fmt: skip


def ss2d_backward(
    d_y: Tensor, x: Tensor, x_dbl: Tensor, dt_weight: Tensor, dt_bias: Tensor, A_logs: Tensor, Ds: Tensor,
    boundary_states: Tensor, *, chunk: int,
) -> tuple[Tensor, ...]:  # fmt: skip
    """dass_ops::ss2d_backward of csrc/schema.cpp: the gradients of the six inputs."""
    given = (x, x_dbl, dt_weight, dt_bias, A_logs, Ds)
    inputs, sizes = prepare_map(*given, chunk=chunk, out_dtype=d_y.dtype)
    g, states = prepare_map_gradients(d_y, boundary_states, sizes, chunk, x)
    batch, channels, length, state, rank = sizes
    wide = state_dtype(x.dtype)
    if sizes.empty:
        return tuple(torch.zeros_like(t) for t in given)
    plan = map_plan(batch * channels, length, rank, x.dtype, chunk, device_size(x.device))
    blocks = -(-channels // plan.channels)

    def empty(*shape, dtype=wide):
        return x.new_empty(shape, dtype=dtype)

    d_x = empty(*x.shape, dtype=x.dtype)
    to = MapGradients(
        d_x,
        d_x if x.dtype == wide else empty(*x.shape),
        empty(batch, 4, channels, state),
        empty(batch, 4, channels),
        empty(batch, channels),
        empty(batch, 2, channels, length),
        empty(batch, 2, blocks, 2 * state, length),
    )
    d_x_dbl, d_dt_weight = empty(*x_dbl.shape, dtype=x.dtype), empty(4, channels, rank)
    with on_device(x):
        for columns, low_rank, grid, numbers, constants in map_launches(x_dbl, sizes, inputs, plan, g.channel):
            map_backward_kernel[grid](inputs, low_rank, g, states, to, *numbers, **constants)
            pair = slice(int(columns), None, 2)
            d_rows, d_dt_weight[pair] = _from_d_v(to, low_rank.data[:, :, :rank].to(wide), dt_weight[pair])
            d_x_dbl[:, pair] = _to_map(d_rows, inputs.height, inputs.width, columns)
    return (
        to.x,
        d_x_dbl,
        d_dt_weight,
        to.dt_bias.sum(0),
        -torch.exp(A_logs) * to.A.sum(0).view(A_logs.shape),
        to.Ds.sum(0).repeat(4),
    )


def _from_d_v(to: MapGradients, low_rank: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """d_x_dbl (batch, 2, rows, length) of a launch in the order of its steps, and d_dt_weight (2, channels, rank)."""
    with torch.autocast(low_rank.device.type, enabled=False):
        d_low_rank = torch.matmul(weight.transpose(-1, -2), to.v)
        d_weight = torch.matmul(to.v, low_rank.transpose(-1, -2)).sum(0)
    return torch.cat((d_low_rank, to.B_and_C.sum(2)), 2), d_weight


def _to_map(rows: Tensor, height: int, width: int, columns: bool) -> Tensor:
    """The last axis, in the order of steps, as (height, width)."""
    return rows.unflatten(-1, (width, height)).transpose(-1, -2) if columns else rows.unflatten(-1, (height, width))
