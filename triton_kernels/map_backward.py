"""The gradient of the four-direction scan of a map; equation (16) of SCAN.md.

A program owns a block of channels as in the forward pass and walks each direction from its end with mu. It leaves d_v and, of the
B and C rows, the part of its channels; two products of matrices then make the rest of d_x_dbl and d_dt_weight of d_v.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .arguments import prepare_map, prepare_map_gradients, state_dtype
from .map_forward import in_order, lifted, load_weight
from .plan import device_size, dot_precision, map_plan, on_device, placing, power_of_two
from .primitives import count, inline, total
from .recurrence import state_backward
from .tiles import load_map, load_row, load_tile, places_of_chunk, steps_of_chunk, store_map, store_row, store_tile


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
    inputs, low_rank, d_y, boundary_states, to, batch, direction, block, blocks, channel, channel_exists, chunks,
    N: tl.constexpr, N_PADDED: tl.constexpr, RANK: tl.constexpr, RANK_PADDED: tl.constexpr, CHUNK: tl.constexpr,
    TILE: tl.constexpr, ACCURATE: tl.constexpr, PRECISION: tl.constexpr, PLACING: tl.constexpr, HEIGHT: tl.constexpr,
    INDEX: tl.constexpr, REVERSE: tl.constexpr, FIRST: tl.constexpr, LAST: tl.constexpr,
):  # fmt: skip
    """One direction of a block of channels, from its last chunk to its first."""
    DTYPE: tl.constexpr = inputs.Ds.dtype.element_ty
    n_index = tl.arange(0, N_PADDED)[None, :]
    state_exists = channel_exists & (n_index < N)
    step = tl.arange(0, TILE)[None, :]
    parameter = direction * inputs.channels + channel
    sequence = (batch * 4 + direction) * inputs.channels + channel
    length = tl.cast(inputs.height, tl.int64) * inputs.width
    x_row = (batch * inputs.channels + channel) * length
    v_row = ((batch * 2 + REVERSE) * inputs.channels + channel) * length
    slab = to.B_and_C + ((batch * 2 + REVERSE) * blocks + block) * (2 * N) * length
    x_base = inputs.x.data + batch * inputs.x.batch
    g_base = d_y.data + batch * d_y.batch
    first_row = low_rank.data + batch * low_rank.batch + REVERSE * low_rank.direction
    rank = tl.arange(0, RANK_PADDED)[:, None].to(tl.int64)
    weight = load_weight(inputs, parameter, channel_exists, RANK, RANK_PADDED)
    bias = tl.load(inputs.dt_bias + parameter, mask=channel_exists, other=0.0)
    D = tl.load(inputs.Ds + parameter, mask=channel_exists, other=0.0)
    mu = tl.full((channel.shape[0], N_PADDED), 0.0, DTYPE)
    d_A = mu
    d_bias = tl.full(channel.shape, 0.0, DTYPE)
    d_D = d_bias
    for i in count(chunks):
        chunk = i if REVERSE else chunks - 1 - i
        order, exists = steps_of_chunk(chunk, length, CHUNK, TILE)
        places, placed = places_of_chunk(
            chunk, order, exists, inputs.height, inputs.width, CHUNK, TILE, PLACING, HEIGHT, INDEX
        )
        mask = channel_exists & exists[None, :]
        rows = load_tile(first_row, rank * low_rank.row, order, (rank < RANK) & exists[None, :], DTYPE)
        dt, slope = lifted(weight, rows, bias, mask, PRECISION, DTYPE)
        u = load_map(x_base, channel * inputs.x.channel, channel_exists, places, placed, DTYPE, TILE, PLACING)
        g = load_map(g_base, channel * d_y.channel, channel_exists, places, placed, DTYPE, TILE, PLACING)
        x = dt * u
        if FIRST:
            d_D += total(g * u, 1)[:, None]
        d_x = tl.full(x.shape, 0.0, DTYPE)  # sum_n lam B
        d_dt = tl.full(x.shape, 0.0, DTYPE)
        for n in range(N):
            A = -tl.exp(tl.load(inputs.A_logs + parameter * N + n, mask=channel_exists, other=0.0))
            B_row = first_row + (tl.cast(n, tl.int64) + RANK) * low_rank.row
            B = load_row(B_row, order, exists, DTYPE)
            C = load_row(B_row + N * low_rank.row, order, exists, DTYPE)
            h_in = tl.load(boundary_states + (sequence * chunks + chunk) * N + n, mask=channel_exists, other=0.0)
            h, lam, d_dt_n, d_A_n, mu = state_backward(
                dt, u, x, g, A, B, C, h_in, mu, n, n_index, step, TILE, REVERSE, ACCURATE
            )
            d_x += lam * B
            d_dt += d_dt_n
            d_A += tl.where(n_index == n, d_A_n, 0.0)
            d_B_row = slab + tl.cast(n, tl.int64) * length
            store_row(d_B_row, order, exists, total(lam * x, 0))
            store_row(d_B_row + N * length, order, exists, total(g * h, 0))
        d_v = tl.where(mask, d_dt * slope, 0.0)
        d_bias += total(d_v, 1)[:, None]
        store_tile(to.v, v_row, order, mask, d_v)
        d_x = D * g + dt * d_x
        if not FIRST:
            d_x += load_map(to.x_sum, x_row, channel_exists, places, placed, DTYPE, TILE, PLACING)
        store_map(to.x if LAST else to.x_sum, x_row, channel_exists, places, placed, d_x, PLACING)
    tl.store(to.A + sequence * N + n_index, d_A, mask=state_exists)
    tl.store(to.dt_bias + sequence, d_bias, mask=channel_exists)
    if FIRST:
        tl.store(to.Ds + batch * inputs.channels + channel, d_D, mask=channel_exists)


@triton.jit
def map_backward_kernel(
    inputs, low_rank, d_y, boundary_states, to, first_direction, blocks, chunks, N: tl.constexpr, N_PADDED: tl.constexpr,
    RANK: tl.constexpr, RANK_PADDED: tl.constexpr, BLOCK: tl.constexpr, CHUNK: tl.constexpr, TILE: tl.constexpr,
    ACCURATE: tl.constexpr, PRECISION: tl.constexpr, PLACING: tl.constexpr, HEIGHT: tl.constexpr, INDEX: tl.constexpr,
    FIRST: tl.constexpr,
):  # fmt: skip
    """Programs and directions as those of map_forward_kernel."""
    program = tl.program_id(0).to(tl.int64)
    batch = program // blocks
    block = program % blocks
    channel = block * BLOCK + tl.arange(0, BLOCK)[:, None]
    exists = channel < inputs.channels
    walk_map_back(
        inputs, low_rank, d_y, boundary_states, to, batch, first_direction, block, blocks, channel, exists, chunks, N,
        N_PADDED, RANK, RANK_PADDED, CHUNK, TILE, ACCURATE, PRECISION, PLACING, HEIGHT, INDEX, False, FIRST, False,
    )  # fmt: skip
    tl.debug_barrier()  # the second walk reads what other threads of the program wrote
    walk_map_back(
        inputs, low_rank, d_y, boundary_states, to, batch, first_direction + 2, block, blocks, channel, exists, chunks, N,
        N_PADDED, RANK, RANK_PADDED, CHUNK, TILE, ACCURATE, PRECISION, PLACING, HEIGHT, INDEX, True, False, not FIRST,
    )  # fmt: skip


def ss2d_backward(
    d_y: Tensor, x: Tensor, x_dbl: Tensor, dt_weight: Tensor, dt_bias: Tensor, A_logs: Tensor, Ds: Tensor,
    boundary_states: Tensor, *, chunk: int,
) -> tuple[Tensor, ...]:  # fmt: skip
    """dass_ops::ss2d_backward of csrc/schema.cpp: the gradients of the six inputs."""
    given = (x, x_dbl, dt_weight, dt_bias, A_logs, Ds)
    inputs, sizes = prepare_map(*given, chunk=chunk, out_dtype=d_y.dtype)
    g, states = prepare_map_gradients(d_y, boundary_states, sizes, chunk, x)
    batch, channels, length, state, rank = sizes[:5]
    wide = state_dtype(x.dtype)
    if sizes.empty:
        return tuple(torch.zeros_like(t) for t in given)
    plan = map_plan(batch * channels, length, chunk, x.itemsize, device_size(x.device))
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
        for columns in (False, True):
            low_rank = in_order(x_dbl, columns)
            map_backward_kernel[(batch * blocks,)](
                inputs, low_rank, g, states, to, int(columns), blocks, -(-length // plan.chunk), N=state,
                N_PADDED=power_of_two(state), RANK=rank, RANK_PADDED=max(power_of_two(rank), 16), BLOCK=plan.channels,
                CHUNK=plan.chunk, TILE=plan.tile, ACCURATE=x.dtype == torch.float32, PRECISION=dot_precision(wide),
                FIRST=not columns, num_warps=plan.warps, num_stages=1, **placing(columns, inputs.height, length, plan),
            )  # fmt: skip
            of_launch = slice(int(columns), None, 2)
            d_rows, d_dt_weight[of_launch] = _from_d_v(to, low_rank.data[:, :, :rank].to(wide), dt_weight[of_launch])
            to_map = (inputs.width, inputs.height) if columns else (inputs.height, inputs.width)
            d_rows = d_rows.unflatten(-1, to_map)
            d_x_dbl[:, of_launch] = d_rows.transpose(-1, -2) if columns else d_rows
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
