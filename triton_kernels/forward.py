"""The selective scan; equations (1) to (6), (9) and (10) of SCAN.md.

A program owns a block of channels of one clip and walks the chunks of one direction, or of two whose outputs are summed. What
it carries from chunk to chunk is the state, (channels, state), in registers; inside a chunk the scan is associative.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .arguments import prepare_scan, state_dtype
from .plan import device_size, on_device, power_of_two, scan_plan
from .primitives import count, inline, sigmoid, softplus_and_sigmoid
from .recurrence import state_forward
from .tiles import load_row, load_tile, steps_of_chunk, store_tile


@inline
def shared_rows(projection, batch, direction, first_channel):
    """Where the rows of B or C begin that the channels of a block share; None where they are constant."""
    if projection.batch is None:
        return None
    else:
        group = first_channel // projection.group_channels
        return projection.data + batch * projection.batch + direction * projection.direction + group * projection.group


@inline
def row_of_state(projection, rows, n, parameter, channel_exists, position, exists, N: tl.constexpr, DTYPE: tl.constexpr):
    """B or C of state n: (1, steps), or (channels, 1) where it is constant."""
    if projection.batch is None:
        return tl.load(projection.data + parameter * N + n, mask=channel_exists, other=0.0)
    else:
        return load_row(rows + tl.cast(n, tl.int64) * projection.state, position, exists, DTYPE)


@inline
def step_sizes(
    inputs, batch, direction, channel, channel_exists, position, mask, DTYPE: tl.constexpr, SOFTPLUS: tl.constexpr
):
    """dt of equations (1), (2), zero outside the mask, and d_dt / d_v."""
    base = inputs.delta.data + batch * inputs.delta.batch + direction * inputs.delta.direction
    v = load_tile(base, channel * inputs.delta.channel, position, mask, DTYPE)
    if inputs.delta_bias is not None:
        v = v + tl.load(inputs.delta_bias + direction * inputs.channels + channel, mask=channel_exists, other=0.0)
    slope = v
    if SOFTPLUS:
        v, slope = softplus_and_sigmoid(v)
    return tl.where(mask, v, 0.0), slope


@inline
def walk(
    inputs, out, summed, last_state, boundary_states, batch, direction, directions, first_channel, channel, channel_exists,
    chunks, N: tl.constexpr, N_PADDED: tl.constexpr, CHUNK: tl.constexpr, TILE: tl.constexpr, SOFTPLUS: tl.constexpr,
    ACCURATE: tl.constexpr, SHARED: tl.constexpr, REVERSE: tl.constexpr, FIRST: tl.constexpr, LAST: tl.constexpr,
):  # fmt: skip
    """One direction of a block of channels, from its first chunk to its last."""
    DTYPE: tl.constexpr = inputs.A.dtype.element_ty
    n_index = tl.arange(0, N_PADDED)[None, :]
    state_exists = channel_exists & (n_index < N)
    step = tl.arange(0, TILE)[None, :]
    parameter = direction * inputs.channels + channel  # rows of (directions, channels)
    sequence = (batch * directions + direction) * inputs.channels + channel  # of (batch, directions, channels)
    u_base = inputs.u.data + batch * inputs.u.batch + direction * inputs.u.direction
    B_rows = shared_rows(inputs.B, batch, direction, first_channel)
    C_rows = shared_rows(inputs.C, batch, direction, first_channel)
    out_row = (batch * inputs.channels + channel if SHARED else sequence) * inputs.length
    if inputs.initial_state is not None:
        h = tl.load(inputs.initial_state + sequence * N + n_index, mask=state_exists, other=0.0)
    else:
        h = tl.full((channel.shape[0], N_PADDED), 0.0, DTYPE)
    for i in count(chunks):
        chunk = chunks - 1 - i if REVERSE else i
        position, exists = steps_of_chunk(chunk, inputs.length, CHUNK, TILE)
        mask = channel_exists & exists[None, :]
        if boundary_states is not None:
            tl.store(boundary_states + (sequence * chunks + chunk) * N + n_index, h, mask=state_exists)
        dt, _ = step_sizes(inputs, batch, direction, channel, channel_exists, position, mask, DTYPE, SOFTPLUS)
        u = load_tile(u_base, channel * inputs.u.channel, position, mask, DTYPE)
        x = dt * u
        if inputs.D is not None:
            y = u * tl.load(inputs.D + parameter, mask=channel_exists, other=0.0)
        else:
            y = tl.full(x.shape, 0.0, DTYPE)
        for n in range(N):
            A = tl.load(inputs.A + parameter * N + n, mask=channel_exists, other=0.0)
            B = row_of_state(inputs.B, B_rows, n, parameter, channel_exists, position, exists, N, DTYPE)
            C = row_of_state(inputs.C, C_rows, n, parameter, channel_exists, position, exists, N, DTYPE)
            h_n, h = state_forward(dt, x, A, B, h, n, n_index, step, TILE, REVERSE, ACCURATE)
            y += C * h_n
        if inputs.z is not None:
            base = inputs.z.data + batch * inputs.z.batch + direction * inputs.z.direction
            z = load_tile(base, channel * inputs.z.channel, position, mask, DTYPE)
            y = y * z * sigmoid(z)
        if not FIRST:
            y += load_tile(summed, out_row, position, mask, DTYPE)
        store_tile(out if LAST else summed, out_row, position, mask, y)
    tl.store(last_state + sequence * N + n_index, h, mask=state_exists)


@triton.jit
def scan_forward_kernel(
    inputs, out, summed, last_state, boundary_states, directions, first_direction, launched, unit, blocks_per_unit, blocks,
    chunks, N: tl.constexpr, N_PADDED: tl.constexpr, BLOCK: tl.constexpr, CHUNK: tl.constexpr, TILE: tl.constexpr,
    SOFTPLUS: tl.constexpr, ACCURATE: tl.constexpr, SHARED: tl.constexpr, REVERSE: tl.constexpr, REVERSE_SECOND: tl.constexpr,
    FIRST: tl.constexpr, LAST: tl.constexpr,
):  # fmt: skip
    """Programs: (batch, one direction of those launched, block of channels). REVERSE_SECOND is None, or the flag of the
    direction that follows in the same program and adds its output."""
    program = tl.program_id(0).to(tl.int64)
    block = program % blocks
    direction = first_direction + program // blocks % launched
    batch = program // blocks // launched
    first_channel = block // blocks_per_unit * unit
    within = block % blocks_per_unit * BLOCK + tl.arange(0, BLOCK)[:, None]
    channel = first_channel + within
    PAIR: tl.constexpr = REVERSE_SECOND is not None
    walk(
        inputs, out, summed, last_state, boundary_states, batch, direction, directions, first_channel, channel, within < unit,
        chunks, N, N_PADDED, CHUNK, TILE, SOFTPLUS, ACCURATE, SHARED, REVERSE, FIRST, LAST and not PAIR,
    )  # fmt: skip
    if PAIR:
        tl.debug_barrier()  # the second walk reads what other threads of the program wrote
        walk(
            inputs, out, summed, last_state, boundary_states, batch, direction + 1, directions, first_channel, channel,
            within < unit, chunks, N, N_PADDED, CHUNK, TILE, SOFTPLUS, ACCURATE, SHARED, REVERSE_SECOND, False, LAST,
        )  # fmt: skip


def launches(reverse: list[bool], shared: bool) -> list[tuple[int, int, bool, bool | None]]:
    """(first direction, directions side by side, its flag, flag of a second one in the same program): with a shared u, pairs
    one after the other; otherwise runs of equal flags."""
    if shared:
        return [(k, 1, reverse[k], (reverse[k + 1 :] or [None])[0]) for k in range(0, len(reverse), 2)]
    starts = [k for k in range(len(reverse)) if k == 0 or reverse[k] != reverse[k - 1]]
    return [(k, end - k, reverse[k], None) for k, end in zip(starts, [*starts[1:], len(reverse)], strict=True)]


def scan_forward(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, z: Tensor | None,
    delta_bias: Tensor | None, initial_state: Tensor | None, *, delta_softplus: bool, reverse: list[bool], chunk: int,
    out_dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """dass_ops::scan_forward of csrc/schema.cpp: out, last_state, boundary_states."""
    inputs, sizes = prepare_scan(
        u, delta, A, B, C, D, z, delta_bias, initial_state, reverse=reverse, chunk=chunk, out_dtype=out_dtype
    )
    batch, directions, channels, length, state = sizes[:5]
    wide = state_dtype(u.dtype)
    out = u.new_empty((batch, sizes.outputs, channels, length), dtype=out_dtype)
    last_state = u.new_empty((batch, directions, channels, state), dtype=wide)
    saved_chunks = -(-length // chunk) if chunk else 0
    boundary_states = u.new_empty((batch, directions, channels, saved_chunks, state), dtype=wide)
    if sizes.empty:
        last_state.zero_() if initial_state is None else last_state.copy_(initial_state)
        return out, last_state, boundary_states
    plan = scan_plan(batch * directions * channels, sizes.unit, length, chunk, u.itemsize, device_size(u.device))
    blocks_per_unit = -(-sizes.unit // plan.channels)
    blocks = channels // sizes.unit * blocks_per_unit
    runs = launches(reverse, sizes.shared)
    summed = out if out_dtype == wide or not sizes.shared else torch.empty_like(out, dtype=wide)
    with on_device(u):
        for first, side_by_side, flag, second in runs:
            scan_forward_kernel[(batch * side_by_side * blocks,)](
                inputs, out, summed, last_state, boundary_states if chunk else None, directions, first, side_by_side, sizes.unit,
                blocks_per_unit, blocks, -(-length // plan.chunk), N=state, N_PADDED=power_of_two(state), BLOCK=plan.channels,
                CHUNK=plan.chunk, TILE=plan.tile, SOFTPLUS=delta_softplus, ACCURATE=u.dtype == torch.float32,
                SHARED=sizes.shared, REVERSE=flag, REVERSE_SECOND=second, FIRST=not sizes.shared or first == 0,
                LAST=not sizes.shared or first + 2 >= directions, num_warps=plan.warps,
            )  # fmt: skip
    return out, last_state, boundary_states
