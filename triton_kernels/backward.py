"""The gradient of the selective scan; section 2 of SCAN.md.

A program owns the same block of channels as in the forward pass and walks the chunks the other way, carrying mu. It recomputes
the states of a chunk from the boundary state that the forward pass saved. Sums over the channels of a group, over the clips and
over constant B and C go to partial results that are added up in a fixed order afterwards; nothing is added atomically.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .arguments import prepare_gradients, prepare_scan, state_dtype
from .plan import device_size, on_device, power_of_two, scan_plan
from .primitives import count, inline, sigmoid, total
from .forward import launches, row_of_state, shared_rows, step_sizes
from .recurrence import state_backward
from .tiles import load_tile, steps_of_chunk, store_row, store_tile


class Gradients(NamedTuple):
    """What a launch writes, all contiguous; None where nothing is wanted. Partial: to be summed over the axes in brackets."""

    u: Tensor  # like u
    u_sum: Tensor  # like u, in the state dtype: what the directions before this launch gave
    delta: Tensor
    z: Tensor | None
    A: Tensor  # ([batch], directions, channels, state)
    B: Tensor  # (batch, directions, [blocks], state, length); where constant, like A
    C: Tensor
    D: Tensor | None  # ([batch], directions, channels)
    delta_bias: Tensor | None  # ([batch], directions, channels)
    initial_state: Tensor | None


@inline
def walk_back(
    inputs, d_out, d_last_state, boundary_states, to, batch, direction, directions, block, blocks, first_channel, channel,
    channel_exists, chunks, N: tl.constexpr, N_PADDED: tl.constexpr, CHUNK: tl.constexpr, TILE: tl.constexpr,
    SOFTPLUS: tl.constexpr, ACCURATE: tl.constexpr, SHARED: tl.constexpr, REVERSE: tl.constexpr, FIRST: tl.constexpr,
    LAST: tl.constexpr,
):  # fmt: skip
    """One direction of a block of channels, from its last chunk to its first."""
    DTYPE: tl.constexpr = inputs.A.dtype.element_ty
    n_index = tl.arange(0, N_PADDED)[None, :]
    state_exists = channel_exists & (n_index < N)
    step = tl.arange(0, TILE)[None, :]
    parameter = direction * inputs.channels + channel
    sequence = (batch * directions + direction) * inputs.channels + channel
    u_base = inputs.u.data + batch * inputs.u.batch + direction * inputs.u.direction
    g_base = d_out.data + batch * d_out.batch + direction * d_out.direction
    B_rows = shared_rows(inputs.B, batch, direction, first_channel)
    C_rows = shared_rows(inputs.C, batch, direction, first_channel)
    slab = ((batch * directions + direction) * blocks + block) * N
    u_row = (batch * inputs.channels + channel if SHARED else sequence) * inputs.length
    nothing = tl.full((channel.shape[0], N_PADDED), 0.0, DTYPE)
    d_A, d_B_constant, d_C_constant = nothing, nothing, nothing
    d_D = tl.full(channel.shape, 0.0, DTYPE)
    d_bias = tl.full(channel.shape, 0.0, DTYPE)
    if d_last_state is not None:
        mu = tl.load(d_last_state + sequence * N + n_index, mask=state_exists, other=0.0)
    else:
        mu = nothing
    for i in count(chunks):
        chunk = i if REVERSE else chunks - 1 - i
        position, exists = steps_of_chunk(chunk, inputs.length, CHUNK, TILE)
        mask = channel_exists & exists[None, :]
        dt, slope = step_sizes(inputs, batch, direction, channel, channel_exists, position, mask, DTYPE, SOFTPLUS)
        u = load_tile(u_base, channel * inputs.u.channel, position, mask, DTYPE)
        g = load_tile(g_base, channel * d_out.channel, position, mask, DTYPE)
        x = dt * u
        D_u = tl.full(x.shape, 0.0, DTYPE)
        D_g = D_u
        if inputs.D is not None:
            D = tl.load(inputs.D + parameter, mask=channel_exists, other=0.0)
            D_u = D * u
        if inputs.z is not None:
            z_base = inputs.z.data + batch * inputs.z.batch + direction * inputs.z.direction
            z = load_tile(z_base, channel * inputs.z.channel, position, mask, DTYPE)
            gate = sigmoid(z)
            d_z = g * gate * (z * (1.0 - gate) + 1.0)  # times y, once y is known; equation (7)
            g = g * z * gate
            y = D_u
        if inputs.D is not None:
            D_g = D * g
            d_D += total(g * u, 1)[:, None]
        d_x = tl.full(x.shape, 0.0, DTYPE)  # sum_n lam B
        d_dt = tl.full(x.shape, 0.0, DTYPE)
        for n in range(N):
            A = tl.load(inputs.A + parameter * N + n, mask=channel_exists, other=0.0)
            B = row_of_state(inputs.B, B_rows, n, parameter, channel_exists, position, exists, N, DTYPE)
            C = row_of_state(inputs.C, C_rows, n, parameter, channel_exists, position, exists, N, DTYPE)
            h_in = tl.load(boundary_states + (sequence * chunks + chunk) * N + n, mask=channel_exists, other=0.0)
            h, lam, d_dt_n, d_A_n, mu = state_backward(
                dt, u, x, g, A, B, C, h_in, mu, n, n_index, step, TILE, REVERSE, ACCURATE
            )
            d_x += lam * B
            d_dt += d_dt_n
            d_A += tl.where(n_index == n, d_A_n, 0.0)
            d_B = lam * x
            d_C = g * h
            if inputs.B.batch is None:
                d_B_constant += tl.where(n_index == n, total(d_B, 1)[:, None], 0.0)
            else:
                store_row(to.B + (slab + n) * inputs.length, position, exists, total(d_B, 0))
            if inputs.C.batch is None:
                d_C_constant += tl.where(n_index == n, total(d_C, 1)[:, None], 0.0)
            else:
                store_row(to.C + (slab + n) * inputs.length, position, exists, total(d_C, 0))
            if inputs.z is not None:
                y += C * h
        d_u = D_g + dt * d_x
        d_delta = tl.where(mask, d_dt * slope if SOFTPLUS else d_dt, 0.0)
        if inputs.delta_bias is not None:
            d_bias += total(d_delta, 1)[:, None]
        if inputs.z is not None:
            store_tile(to.z, sequence * inputs.length, position, mask, d_z * y)
        store_tile(to.delta, sequence * inputs.length, position, mask, d_delta)
        if not FIRST:
            d_u += load_tile(to.u_sum, u_row, position, mask, DTYPE)
        store_tile(to.u if LAST else to.u_sum, u_row, position, mask, d_u)
    tl.store(to.A + sequence * N + n_index, d_A, mask=state_exists)
    if inputs.B.batch is None:
        tl.store(to.B + sequence * N + n_index, d_B_constant, mask=state_exists)
    if inputs.C.batch is None:
        tl.store(to.C + sequence * N + n_index, d_C_constant, mask=state_exists)
    if inputs.D is not None:
        tl.store(to.D + sequence, d_D, mask=channel_exists)
    if inputs.delta_bias is not None:
        tl.store(to.delta_bias + sequence, d_bias, mask=channel_exists)
    if to.initial_state is not None:
        tl.store(to.initial_state + sequence * N + n_index, mu, mask=state_exists)


@triton.jit
def scan_backward_kernel(
    inputs, d_out, d_last_state, boundary_states, to, directions, first_direction, launched, unit, blocks_per_unit, blocks,
    chunks, N: tl.constexpr, N_PADDED: tl.constexpr, BLOCK: tl.constexpr, CHUNK: tl.constexpr, TILE: tl.constexpr,
    SOFTPLUS: tl.constexpr, ACCURATE: tl.constexpr, SHARED: tl.constexpr, REVERSE: tl.constexpr, REVERSE_SECOND: tl.constexpr,
    FIRST: tl.constexpr, LAST: tl.constexpr,
):  # fmt: skip
    """Programs as those of scan_forward_kernel."""
    program = tl.program_id(0).to(tl.int64)
    block = program % blocks
    direction = first_direction + program // blocks % launched
    batch = program // blocks // launched
    first_channel = block // blocks_per_unit * unit
    within = block % blocks_per_unit * BLOCK + tl.arange(0, BLOCK)[:, None]
    channel = first_channel + within
    PAIR: tl.constexpr = REVERSE_SECOND is not None
    walk_back(
        inputs, d_out, d_last_state, boundary_states, to, batch, direction, directions, block, blocks, first_channel, channel,
        within < unit, chunks, N, N_PADDED, CHUNK, TILE, SOFTPLUS, ACCURATE, SHARED, REVERSE, FIRST, LAST and not PAIR,
    )  # fmt: skip
    if PAIR:
        tl.debug_barrier()  # the second walk reads what other threads of the program wrote
        walk_back(
            inputs, d_out, d_last_state, boundary_states, to, batch, direction + 1, directions, block, blocks, first_channel,
            channel, within < unit, chunks, N, N_PADDED, CHUNK, TILE, SOFTPLUS, ACCURATE, SHARED, REVERSE_SECOND, False, LAST,
        )  # fmt: skip


def scan_backward(
    d_out: Tensor, d_last_state: Tensor | None, u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None,
    z: Tensor | None, delta_bias: Tensor | None, initial_state: Tensor | None, boundary_states: Tensor, *,
    delta_softplus: bool, reverse: list[bool], chunk: int,
) -> tuple[Tensor, ...]:  # fmt: skip
    """dass_ops::scan_backward of csrc/schema.cpp: the gradients of the nine inputs, empty tensors for absent ones."""
    inputs, sizes = prepare_scan(
        u, delta, A, B, C, D, z, delta_bias, initial_state, reverse=reverse, chunk=chunk, out_dtype=d_out.dtype
    )
    g, d_last, states = prepare_gradients(d_out, d_last_state, boundary_states, sizes, chunk, u)
    batch, directions, channels, length, state = sizes[:5]
    wide = state_dtype(u.dtype)
    if sizes.empty:
        return _gradients_of_nothing(d_last_state, u, delta, A, B, C, D, z, delta_bias, initial_state)
    plan = scan_plan(batch * directions * channels, sizes.unit, length, chunk, u.itemsize, device_size(u.device))
    blocks_per_unit = -(-sizes.unit // plan.channels)
    blocks = channels // sizes.unit * blocks_per_unit
    sequences = (batch, directions, channels)

    def empty(*shape, dtype=wide):
        return u.new_empty(shape, dtype=dtype)

    def rows(projection):
        constant = projection.batch is None
        return empty(*sequences, state) if constant else empty(batch, directions, blocks, state, length)

    d_u = empty(*u.shape, dtype=u.dtype)
    to = Gradients(
        d_u,
        d_u if u.dtype == wide or not sizes.shared else empty(*u.shape),
        empty(*delta.shape, dtype=u.dtype),
        None if z is None else empty(*delta.shape, dtype=u.dtype),
        empty(*sequences, state),
        rows(inputs.B),
        rows(inputs.C),
        None if D is None else empty(*sequences),
        None if delta_bias is None else empty(*sequences),
        None if initial_state is None else empty(*sequences, state),
    )
    with on_device(u):
        for first, side_by_side, flag, second in launches(reverse, sizes.shared):
            scan_backward_kernel[(batch * side_by_side * blocks,)](
                inputs, g, d_last, states, to, directions, first, side_by_side, sizes.unit, blocks_per_unit, blocks,
                -(-length // plan.chunk), N=state, N_PADDED=power_of_two(state), BLOCK=plan.channels, CHUNK=plan.chunk,
                TILE=plan.tile, SOFTPLUS=delta_softplus, ACCURATE=u.dtype == torch.float32, SHARED=sizes.shared, REVERSE=flag,
                REVERSE_SECOND=second, FIRST=not sizes.shared or first == 0, LAST=not sizes.shared or first + 2 >= directions,
                num_warps=plan.warps,
            )  # fmt: skip

    def projection_gradient(partial, projection, like):
        if projection.batch is None:
            return partial.sum(0).view(like.shape)
        groups = like.shape[2]  # blocks stay within a group
        return partial.view(batch, directions, groups, blocks // groups, state, length).sum(3).to(like.dtype)

    absent = u.new_empty(0), empty(0)
    return (
        to.u,
        to.delta,
        to.A.sum(0),
        projection_gradient(to.B, inputs.B, B),
        projection_gradient(to.C, inputs.C, C),
        absent[1] if D is None else to.D.sum(0),
        absent[0] if z is None else to.z,
        absent[1] if delta_bias is None else to.delta_bias.sum(0),
        absent[1] if initial_state is None else to.initial_state,
    )


def _gradients_of_nothing(d_last_state, *inputs):
    """No step was taken: the last state is the initial one."""
    u, *_, initial_state = inputs
    gradients = [u.new_empty(0) if t is None else torch.zeros_like(t) for t in inputs]
    for i in (5, 7, 8):  # D, delta_bias, initial_state: of the state dtype, also where they are absent
        if inputs[i] is None:
            gradients[i] = gradients[i].to(state_dtype(u.dtype))
    if initial_state is not None and d_last_state is not None:
        gradients[8] = d_last_state.clone()
    return tuple(gradients)
