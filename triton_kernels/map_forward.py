"""The four-direction scan of a map, fused; equations (13) to (15) of SCAN.md.

A program owns a block of channels of one clip and walks the map twice, from the start and from the end: one launch does it row
by row, a second one column by column and adds. Step sizes exist in registers only: per chunk they are the product of the
block's dt_weight with the low-rank rows of x_dbl.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .arguments import last_axis_contiguous, prepare_map, state_dtype
from .plan import device_size, dot_precision, map_plan, on_device, placing, power_of_two
from .primitives import count, inline, softplus_and_sigmoid
from .recurrence import state_forward
from .tiles import LowRank, load_map, load_row, load_tile, places_of_chunk, steps_of_chunk, store_map


@inline
def lifted(weight, low_rank, bias, mask, PRECISION: tl.constexpr, DTYPE: tl.constexpr):
    """dt of equation (13), (channels, steps), zero outside the mask, and d_dt / d_v."""
    v = tl.dot(weight, low_rank, input_precision=PRECISION, out_dtype=DTYPE) + bias
    dt, slope = softplus_and_sigmoid(v)
    return tl.where(mask, dt, 0.0), slope


@inline
def load_weight(inputs, parameter, channel_exists, RANK: tl.constexpr, RANK_PADDED: tl.constexpr):
    """The block's (channels, rank) of dt_weight."""
    rank = tl.arange(0, RANK_PADDED)[None, :]
    return tl.load(inputs.dt_weight + parameter * RANK + rank, mask=channel_exists & (rank < RANK), other=0.0)


@inline
def walk_map(
    inputs, low_rank, y, summed, boundary_states, batch, direction, channel, channel_exists, chunks, N: tl.constexpr,
    N_PADDED: tl.constexpr, RANK: tl.constexpr, RANK_PADDED: tl.constexpr, CHUNK: tl.constexpr, TILE: tl.constexpr,
    ACCURATE: tl.constexpr, PRECISION: tl.constexpr, PLACING: tl.constexpr, HEIGHT: tl.constexpr, INDEX: tl.constexpr,
    REVERSE: tl.constexpr, FIRST: tl.constexpr, LAST: tl.constexpr,
):  # fmt: skip
    """One direction of a block of channels, from its first chunk to its last."""
    DTYPE: tl.constexpr = inputs.Ds.dtype.element_ty
    n_index = tl.arange(0, N_PADDED)[None, :]
    state_exists = channel_exists & (n_index < N)
    step = tl.arange(0, TILE)[None, :]
    parameter = direction * inputs.channels + channel
    sequence = (batch * 4 + direction) * inputs.channels + channel
    length = tl.cast(inputs.height, tl.int64) * inputs.width
    out_row = (batch * inputs.channels + channel) * length
    x_base = inputs.x.data + batch * inputs.x.batch
    first_row = low_rank.data + batch * low_rank.batch + REVERSE * low_rank.direction
    rank = tl.arange(0, RANK_PADDED)[:, None].to(tl.int64)
    weight = load_weight(inputs, parameter, channel_exists, RANK, RANK_PADDED)
    bias = tl.load(inputs.dt_bias + parameter, mask=channel_exists, other=0.0)
    D = tl.load(inputs.Ds + parameter, mask=channel_exists, other=0.0)
    h = tl.full((channel.shape[0], N_PADDED), 0.0, DTYPE)
    for i in count(chunks):
        chunk = chunks - 1 - i if REVERSE else i
        order, exists = steps_of_chunk(chunk, length, CHUNK, TILE)
        places, placed = places_of_chunk(
            chunk, order, exists, inputs.height, inputs.width, CHUNK, TILE, PLACING, HEIGHT, INDEX
        )
        mask = channel_exists & exists[None, :]
        if boundary_states is not None:
            tl.store(boundary_states + (sequence * chunks + chunk) * N + n_index, h, mask=state_exists)
        rows = load_tile(first_row, rank * low_rank.row, order, (rank < RANK) & exists[None, :], DTYPE)
        dt, _ = lifted(weight, rows, bias, mask, PRECISION, DTYPE)
        x = load_map(x_base, channel * inputs.x.channel, channel_exists, places, placed, DTYPE, TILE, PLACING)
        out = D * x
        x = dt * x
        for n in range(N):
            A = -tl.exp(tl.load(inputs.A_logs + parameter * N + n, mask=channel_exists, other=0.0))
            B_row = first_row + (tl.cast(n, tl.int64) + RANK) * low_rank.row
            B = load_row(B_row, order, exists, DTYPE)
            C = load_row(B_row + N * low_rank.row, order, exists, DTYPE)
            h_n, h = state_forward(dt, x, A, B, h, n, n_index, step, TILE, REVERSE, ACCURATE)
            out += C * h_n
        if not FIRST:
            out += load_map(summed, out_row, channel_exists, places, placed, DTYPE, TILE, PLACING)
        store_map(y if LAST else summed, out_row, channel_exists, places, placed, out, PLACING)


@triton.jit
def map_forward_kernel(
    inputs, low_rank, y, summed, boundary_states, first_direction, blocks, chunks, N: tl.constexpr, N_PADDED: tl.constexpr,
    RANK: tl.constexpr, RANK_PADDED: tl.constexpr, BLOCK: tl.constexpr, CHUNK: tl.constexpr, TILE: tl.constexpr,
    ACCURATE: tl.constexpr, PRECISION: tl.constexpr, PLACING: tl.constexpr, HEIGHT: tl.constexpr, INDEX: tl.constexpr,
    FIRST: tl.constexpr,
):  # fmt: skip
    """Programs: (batch, block of channels). The directions: first_direction, and the same two on, which is its reverse."""
    program = tl.program_id(0).to(tl.int64)
    batch = program // blocks
    channel = program % blocks * BLOCK + tl.arange(0, BLOCK)[:, None]
    exists = channel < inputs.channels
    walk_map(
        inputs, low_rank, y, summed, boundary_states, batch, first_direction, channel, exists, chunks, N, N_PADDED, RANK,
        RANK_PADDED, CHUNK, TILE, ACCURATE, PRECISION, PLACING, HEIGHT, INDEX, False, FIRST, False,
    )  # fmt: skip
    tl.debug_barrier()  # the second walk reads what other threads of the program wrote
    walk_map(
        inputs, low_rank, y, summed, boundary_states, batch, first_direction + 2, channel, exists, chunks, N, N_PADDED, RANK,
        RANK_PADDED, CHUNK, TILE, ACCURATE, PRECISION, PLACING, HEIGHT, INDEX, True, False, not FIRST,
    )  # fmt: skip


def in_order(x_dbl: Tensor, columns: bool) -> LowRank:
    """The two directions of x_dbl that go by rows (a view) or by columns (a copy: the rows of x_dbl are few, and every block of
    channels reads them), in the order of their steps."""
    rows = x_dbl[:, int(columns) :: 2]
    rows = last_axis_contiguous((rows.transpose(-1, -2) if columns else rows).flatten(-2))
    return LowRank(rows, *rows.stride()[:3])


def ss2d_forward(
    x: Tensor, x_dbl: Tensor, dt_weight: Tensor, dt_bias: Tensor, A_logs: Tensor, Ds: Tensor, *, chunk: int,
    out_dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """dass_ops::ss2d_forward of csrc/schema.cpp: y and boundary_states."""
    inputs, sizes = prepare_map(x, x_dbl, dt_weight, dt_bias, A_logs, Ds, chunk=chunk, out_dtype=out_dtype)
    batch, channels, length, state, rank = sizes[:5]
    wide = state_dtype(x.dtype)
    y = torch.empty(x.shape, dtype=out_dtype, device=x.device)
    saved_chunks = -(-length // chunk) if chunk else 0
    boundary_states = x.new_empty((batch, 4, channels, saved_chunks, state), dtype=wide)
    if sizes.empty:
        return y, boundary_states
    plan = map_plan(batch * channels, length, chunk, x.itemsize, device_size(x.device))
    blocks = -(-channels // plan.channels)
    summed = y if out_dtype == wide else torch.empty_like(y, dtype=wide)
    with on_device(x):
        for columns in (False, True):
            map_forward_kernel[(batch * blocks,)](
                inputs, in_order(x_dbl, columns), y, summed, boundary_states if chunk else None, int(columns), blocks,
                -(-length // plan.chunk), N=state, N_PADDED=power_of_two(state), RANK=rank,
                RANK_PADDED=max(power_of_two(rank), 16), BLOCK=plan.channels, CHUNK=plan.chunk, TILE=plan.tile,
                ACCURATE=x.dtype == torch.float32, PRECISION=dot_precision(wide), FIRST=not columns, num_warps=plan.warps,
                num_stages=1, **placing(columns, inputs.height, length, plan),
            )  # fmt: skip
    return y, boundary_states
