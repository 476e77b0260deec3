"""The selective scan; equations (1) to (6), (9) and (10) of SCAN.md.

A program owns a block of channels of one clip and walks the chunks of one direction, or of two whose outputs are summed.
What it carries from chunk to chunk is the state, (channels, state), in registers; inside a chunk the scan is associative.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .arguments import ScanInputs, ScanSizes, prepare_scan, state_dtype
from .plan import Plan, device_size, index_type, on_device, power_of_two, scan_plan
from .primitives import count, inline, sigmoid, softplus_and_sigmoid
from .recurrence import state_forward
from .tiles import load_column, load_row, load_tile, steps_of_chunk, store_tile


@inline
def sequence_base(sequence, batch, direction, first_channel):
    """Where the channels of a block begin in a Sequence."""
    return sequence.data + (batch * sequence.batch + direction * sequence.direction + first_channel * sequence.channel)


@inline
def projection_base(projection, batch, direction, first_channel):
    """Where the rows of B or C begin that the channels of a block share; where they are constant, all of them."""
    if projection.batch is None:
        return projection.data
    else:
        group = first_channel // projection.group_channels
        return projection.data + (
            batch * projection.batch + direction * projection.direction + group * projection.group
        )


@inline
def row_of_state(
    projection, base, n, first, row, row_exists, start, step, exists, N: tl.constexpr, DTYPE: tl.constexpr
):
    """B or C of state n: (1, steps), or (channels, 1) where it is constant."""
    if projection.batch is None:
        return load_column(projection.data + first * N + n, row * N, row_exists)
    else:
        return load_row(base + (tl.cast(n, tl.int64) * projection.state + start), step, exists, row.shape[0], DTYPE)


@inline
def step_sizes(
    inputs, base, first, row, row_exists, step, mask, DTYPE: tl.constexpr, SOFTPLUS: tl.constexpr, INDEX: tl.constexpr
):
    """dt of equations (1), (2), zero outside the mask, and d_dt / d_v."""
    v = load_tile(base, row, inputs.delta.channel, step, mask, DTYPE, INDEX)
    if inputs.delta_bias is not None:
        v = v + load_column(inputs.delta_bias + first, row, row_exists)
    slope = v
    if SOFTPLUS:
        v, slope = softplus_and_sigmoid(v)
    return tl.where(mask, v, 0.0), slope


@inline
def walk(
    inputs, out, summed, last_state, boundary_states, batch, direction, directions, first_channel, row, row_exists,
    chunks, N: tl.constexpr, N_PADDED: tl.constexpr, CHUNK: tl.constexpr, RAGGED: tl.constexpr, TILE: tl.constexpr,
    INDEX: tl.constexpr, SOFTPLUS: tl.constexpr, ACCURATE: tl.constexpr, SHARED: tl.constexpr, REVERSE: tl.constexpr,
    FIRST: tl.constexpr, LAST: tl.constexpr,
):  # fmt: skip
    """One direction of a block of channels, from its first chunk to its last."""
    DTYPE: tl.constexpr = inputs.A.dtype.element_ty
    n_index = tl.arange(0, N_PADDED)[None, :]
    state_exists = row_exists & (n_index < N)
    index = tl.arange(0, TILE)[None, :]
    first = direction * inputs.channels + first_channel  # row of (directions, channels)
    sequence = batch * directions * inputs.channels + first  # row of (batch, directions, channels)
    out_row = (batch * inputs.channels + first_channel if SHARED else sequence) * inputs.length
    u_base = sequence_base(inputs.u, batch, direction, first_channel)
    delta_base = sequence_base(inputs.delta, batch, direction, first_channel)
    B_base = projection_base(inputs.B, batch, direction, first_channel)
    C_base = projection_base(inputs.C, batch, direction, first_channel)
    if inputs.initial_state is not None:
        h = tl.load(inputs.initial_state + sequence * N + (row * N + n_index), mask=state_exists, other=0.0)
    else:
        h = tl.full((row.shape[0], N_PADDED), 0.0, DTYPE)
    for i in count(chunks):
        chunk = chunks - 1 - i if REVERSE else i
        start, step, exists = steps_of_chunk(chunk, inputs.length, CHUNK, RAGGED, TILE)
        mask = row_exists & exists[None, :]
        if boundary_states is not None:
            saved = boundary_states + (sequence * chunks + chunk) * N
            tl.store(saved + (row.to(INDEX) * chunks * N + n_index), h, mask=state_exists)
        dt, _ = step_sizes(inputs, delta_base + start, first, row, row_exists, step, mask, DTYPE, SOFTPLUS, INDEX)
        u = load_tile(u_base + start, row, inputs.u.channel, step, mask, DTYPE, INDEX)
        x = dt * u
        if inputs.D is not None:
            y = u * load_column(inputs.D + first, row, row_exists)
        else:
            y = tl.full(x.shape, 0.0, DTYPE)
        for n in range(N):
            A = load_column(inputs.A + first * N + n, row * N, row_exists)
            B = row_of_state(inputs.B, B_base, n, first, row, row_exists, start, step, exists, N, DTYPE)
            C = row_of_state(inputs.C, C_base, n, first, row, row_exists, start, step, exists, N, DTYPE)
            h_n, h = state_forward(dt, x, A, B, h, n, n_index, index, TILE, REVERSE, ACCURATE)
            y += C * h_n
        if inputs.z is not None:
            z_base = sequence_base(inputs.z, batch, direction, first_channel) + start
            z = load_tile(z_base, row, inputs.z.channel, step, mask, DTYPE, INDEX)
            y = y * z * sigmoid(z)
        if not FIRST:
            y += load_tile(summed + (out_row + start), row, inputs.length, step, mask, DTYPE, INDEX)
        store_tile((out if LAST else summed) + (out_row + start), row, inputs.length, step, mask, y, INDEX)
    tl.store(last_state + sequence * N + (row * N + n_index), h, mask=state_exists)


@inline
def program_of_scan(
    first_direction, launched, unit, blocks_per_unit, blocks, RAGGED: tl.constexpr, BLOCK: tl.constexpr
):
    """Programs: (batch, one direction of those launched, block of channels). Blocks stay within a unit of channels that share
    B and C. Returns batch, direction, block and first channel, 64-bit, the rows of the block, (rows, 1), and which exist."""
    program = tl.program_id(0).to(tl.int64)
    block = program % blocks
    direction = first_direction + program // blocks % launched
    batch = program // blocks // launched
    within = block % blocks_per_unit * BLOCK
    row = tl.arange(0, BLOCK)[:, None]
    row_exists = within + row < unit if RAGGED else tl.full(row.shape, True, tl.int1)
    return batch, direction, block, block // blocks_per_unit * unit + within, row, row_exists


@triton.jit
def scan_forward_kernel(
    inputs, out, summed, last_state, boundary_states, directions, first_direction, launched, unit, blocks_per_unit,
    blocks, chunks, N: tl.constexpr, N_PADDED: tl.constexpr, BLOCK: tl.constexpr, CHUNK: tl.constexpr,
    RAGGED: tl.constexpr, TILE: tl.constexpr, INDEX: tl.constexpr, SOFTPLUS: tl.constexpr, ACCURATE: tl.constexpr,
    SHARED: tl.constexpr, REVERSE: tl.constexpr, REVERSE_SECOND: tl.constexpr, FIRST: tl.constexpr,
    LAST: tl.constexpr,
):  # fmt: skip
    """REVERSE_SECOND: None, or the flag of the direction that follows in the same program and adds its output."""
    batch, direction, _, first_channel, row, row_exists = program_of_scan(
        first_direction, launched, unit, blocks_per_unit, blocks, RAGGED, BLOCK
    )
    PAIR: tl.constexpr = REVERSE_SECOND is not None
    walk(
        inputs, out, summed, last_state, boundary_states, batch, direction, directions, first_channel, row, row_exists,
        chunks, N, N_PADDED, CHUNK, RAGGED, TILE, INDEX, SOFTPLUS, ACCURATE, SHARED, REVERSE, FIRST, LAST and not PAIR,
    )  # fmt: skip
    if PAIR:
        tl.debug_barrier()  # the second walk reads what other threads of the program wrote
        walk(
            inputs, out, summed, last_state, boundary_states, batch, direction + 1, directions, first_channel, row,
            row_exists, chunks, N, N_PADDED, CHUNK, RAGGED, TILE, INDEX, SOFTPLUS, ACCURATE, SHARED, REVERSE_SECOND,
            False, LAST,
        )  # fmt: skip


def launches(sizes: ScanSizes, reverse: list[bool], softplus: bool, inputs: ScanInputs, plan: Plan, *strides: int):
    """Grid, the kernels' numbers and their constants, for each launch of either pass.

    Directions that share u follow each other in pairs, two to a program; the others run side by side, those of equal flags in
    one launch. `strides`: of channels, in tensors beyond the inputs."""
    if inputs.z is not None:
        strides += (inputs.z.channel,)
    blocks_per_unit = -(-sizes.unit // plan.channels)
    blocks = sizes.channels // sizes.unit * blocks_per_unit
    constants = {
        "N": sizes.state,
        "N_PADDED": power_of_two(sizes.state),
        "BLOCK": plan.channels,
        "CHUNK": plan.chunk,
        "RAGGED": plan.ragged(sizes.unit, sizes.length),
        "TILE": plan.tile,
        "INDEX": index_type(plan, sizes.length, sizes.length, inputs.u.channel, inputs.delta.channel, *strides),
        "SOFTPLUS": softplus,
        "ACCURATE": inputs.A.dtype == inputs.u.data.dtype == torch.float32,
        "SHARED": sizes.shared,
        "num_warps": plan.warps,
    }
    for first, side_by_side, flag, second in runs(reverse, sizes.shared):
        grid = (sizes.batch * side_by_side * blocks,)
        chunks = plan.chunks(sizes.length)
        numbers = (sizes.directions, first, side_by_side, sizes.unit, blocks_per_unit, blocks, chunks)
        order = {
            "REVERSE": flag,
            "REVERSE_SECOND": second,
            "FIRST": not sizes.shared or first == 0,
            "LAST": not sizes.shared or first + 2 >= sizes.directions,
        }
        yield grid, numbers, constants | order


def runs(reverse: list[bool], shared: bool) -> list[tuple[int, int, bool, bool | None]]:
    """(first direction, directions side by side, their flag, flag of a second one in the same program)."""
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
    plan = scan_plan(batch * directions * channels, sizes.unit, length, chunk, device_size(u.device))
    summed = out if out_dtype == wide or not sizes.shared else torch.empty_like(out, dtype=wide)
    saved = boundary_states if chunk else None
    with on_device(u):
        for grid, numbers, constants in launches(sizes, reverse, delta_softplus, inputs, plan):
            scan_forward_kernel[grid](inputs, out, summed, last_state, saved, *numbers, **constants)
    return out, last_state, boundary_states
