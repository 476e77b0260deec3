"""The gradient of the selective scan; section 2 of SCAN.md.

A program owns the same block of channels as in the forward pass and walks the chunks the other way, carrying mu. It
recomputes the states of a chunk from the boundary state that the forward pass saved. Sums over the channels of a group, over
the clips and over constant B and C go to partial results that are added up in a fixed order afterwards; nothing is atomic.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .arguments import prepare_gradients, prepare_scan, state_dtype
from .forward import (
    launches,
    program_of_scan,
    projection_base,
    row_of_state,
    sequence_base,
    step_sizes,
)
from .plan import device_size, on_device, scan_plan
from .primitives import count, inline, sigmoid, total
from .recurrence import state_backward
from .tiles import load_column, load_tile, steps_of_chunk, store_row, store_tile


class Gradients(NamedTuple):
    """What the launches write, all contiguous; None where nothing is wanted. Partial: to be summed over the axes in
    brackets."""

    u: Tensor  # like u
    u_sum: Tensor  # like u, in the state dtype: what the directions before this one gave
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
    inputs, d_out, d_last_state, boundary_states, to, batch, direction, directions, block, blocks, first_channel,
    row, row_exists, chunks, N: tl.constexpr, N_PADDED: tl.constexpr, CHUNK: tl.constexpr, RAGGED: tl.constexpr,
    TILE: tl.constexpr, INDEX: tl.constexpr, SOFTPLUS: tl.constexpr, ACCURATE: tl.constexpr, SHARED: tl.constexpr,
    REVERSE: tl.constexpr, FIRST: tl.constexpr, LAST: tl.constexpr,
):  # fmt: skip
    """One direction of a block of channels, from its last chunk to its first."""
    DTYPE: tl.constexpr = inputs.A.dtype.element_ty
    n_index = tl.arange(0, N_PADDED)[None, :]
    state_exists = row_exists & (n_index < N)
    states = row * N + n_index
    index = tl.arange(0, TILE)[None, :]
    first = direction * inputs.channels + first_channel  # row of (directions, channels)
    sequence = batch * directions * inputs.channels + first  # row of (batch, directions, channels)
    u_row = (batch * inputs.channels + first_channel if SHARED else sequence) * inputs.length
    slab = ((batch * directions + direction) * blocks + block) * N
    u_base = sequence_base(inputs.u, batch, direction, first_channel)
    delta_base = sequence_base(inputs.delta, batch, direction, first_channel)
    g_base = sequence_base(d_out, batch, direction, first_channel)
    B_base = projection_base(inputs.B, batch, direction, first_channel)
    C_base = projection_base(inputs.C, batch, direction, first_channel)
    nothing = tl.full((row.shape[0], N_PADDED), 0.0, DTYPE)
    d_A, d_B_constant, d_C_constant = nothing, nothing, nothing
    d_D = tl.full(row.shape, 0.0, DTYPE)
    d_bias = tl.full(row.shape, 0.0, DTYPE)
    if d_last_state is not None:
        mu = tl.load(d_last_state + sequence * N + states, mask=state_exists, other=0.0)
    else:
        mu = nothing
    for i in count(chunks):
        chunk = i if REVERSE else chunks - 1 - i
        start, step, exists = steps_of_chunk(chunk, inputs.length, CHUNK, RAGGED, TILE)
        mask = row_exists & exists[None, :]
        dt, slope = step_sizes(inputs, delta_base + start, first, row, row_exists, step, mask, DTYPE, SOFTPLUS, INDEX)
        u = load_tile(u_base + start, row, inputs.u.channel, step, mask, DTYPE, INDEX)
        g = load_tile(g_base + start, row, d_out.channel, step, mask, DTYPE, INDEX)
        x = dt * u
        d_u = tl.full(x.shape, 0.0, DTYPE)
        y = d_u
        if inputs.D is not None:
            D = load_column(inputs.D + first, row, row_exists)
            y = D * u
        if inputs.z is not None:
            z_base = sequence_base(inputs.z, batch, direction, first_channel) + start
            z = load_tile(z_base, row, inputs.z.channel, step, mask, DTYPE, INDEX)
            gate = sigmoid(z)
            d_z = g * gate * (z * (1.0 - gate) + 1.0)  # times y, once y is known; equation (7)
            g = g * z * gate
        if inputs.D is not None:
            d_u = D * g
            d_D += total(g * u, 1)[:, None]
        d_x = tl.full(x.shape, 0.0, DTYPE)  # sum_n lam B
        d_dt = tl.full(x.shape, 0.0, DTYPE)
        for n in range(N):
            A = load_column(inputs.A + first * N + n, row * N, row_exists)
            B = row_of_state(inputs.B, B_base, n, first, row, row_exists, start, step, exists, N, DTYPE)
            C = row_of_state(inputs.C, C_base, n, first, row, row_exists, start, step, exists, N, DTYPE)
            saved = boundary_states + (sequence * chunks + chunk) * N + n
            h_in = load_column(saved, row.to(INDEX) * chunks * N, row_exists)
            h, lam, d_dt_n, d_A_n, mu = state_backward(
                dt, u, x, g, A, B, C, h_in, mu, n, n_index, index, TILE, REVERSE, ACCURATE
            )
            d_x += lam * B
            d_dt += d_dt_n
            d_A += tl.where(n_index == n, d_A_n, 0.0)
            d_B = lam * x
            d_C = g * h
            slab_row = (slab + n) * inputs.length + start
            if inputs.B.batch is None:
                d_B_constant += tl.where(n_index == n, total(d_B, 1)[:, None], 0.0)
            else:
                store_row(to.B + slab_row, step, exists, total(d_B, 0))
            if inputs.C.batch is None:
                d_C_constant += tl.where(n_index == n, total(d_C, 1)[:, None], 0.0)
            else:
                store_row(to.C + slab_row, step, exists, total(d_C, 0))
            if inputs.z is not None:
                y += C * h
        d_u += dt * d_x
        d_delta = tl.where(mask, d_dt * slope if SOFTPLUS else d_dt, 0.0)
        if inputs.delta_bias is not None:
            d_bias += total(d_delta, 1)[:, None]
        here = sequence * inputs.length + start
        if inputs.z is not None:
            store_tile(to.z + here, row, inputs.length, step, mask, d_z * y, INDEX)
        store_tile(to.delta + here, row, inputs.length, step, mask, d_delta, INDEX)
        if not FIRST:
            d_u += load_tile(to.u_sum + (u_row + start), row, inputs.length, step, mask, DTYPE, INDEX)
        store_tile((to.u if LAST else to.u_sum) + (u_row + start), row, inputs.length, step, mask, d_u, INDEX)
    tl.store(to.A + sequence * N + states, d_A, mask=state_exists)
    if inputs.B.batch is None:
        tl.store(to.B + sequence * N + states, d_B_constant, mask=state_exists)
    if inputs.C.batch is None:
        tl.store(to.C + sequence * N + states, d_C_constant, mask=state_exists)
    if inputs.D is not None:
        tl.store(to.D + sequence + row, d_D, mask=row_exists)
    if inputs.delta_bias is not None:
        tl.store(to.delta_bias + sequence + row, d_bias, mask=row_exists)
    if to.initial_state is not None:
        tl.store(to.initial_state + sequence * N + states, mu, mask=state_exists)


@triton.jit
def scan_backward_kernel(
    inputs, d_out, d_last_state, boundary_states, to, directions, first_direction, launched, unit, blocks_per_unit,
    blocks, chunks, N: tl.constexpr, N_PADDED: tl.constexpr, BLOCK: tl.constexpr, CHUNK: tl.constexpr,
    RAGGED: tl.constexpr, TILE: tl.constexpr, INDEX: tl.constexpr, SOFTPLUS: tl.constexpr, ACCURATE: tl.constexpr,
    SHARED: tl.constexpr, REVERSE: tl.constexpr, REVERSE_SECOND: tl.constexpr, FIRST: tl.constexpr,
    LAST: tl.constexpr,
):  # fmt: skip
    """Programs as those of scan_forward_kernel."""
    batch, direction, block, first_channel, row, row_exists = program_of_scan(
        first_direction, launched, unit, blocks_per_unit, blocks, RAGGED, BLOCK
    )
    PAIR: tl.constexpr = REVERSE_SECOND is not None
    walk_back(
        inputs, d_out, d_last_state, boundary_states, to, batch, direction, directions, block, blocks, first_channel,
        row, row_exists, chunks, N, N_PADDED, CHUNK, RAGGED, TILE, INDEX, SOFTPLUS, ACCURATE, SHARED, REVERSE, FIRST,
        LAST and not PAIR,
    )  # fmt: skip
    if PAIR:
        tl.debug_barrier()  # the second walk reads what other threads of the program wrote
        walk_back(
            inputs, d_out, d_last_state, boundary_states, to, batch, direction + 1, directions, block, blocks,
            first_channel, row, row_exists, chunks, N, N_PADDED, CHUNK, RAGGED, TILE, INDEX, SOFTPLUS, ACCURATE,
            SHARED, REVERSE_SECOND, False, LAST,
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
    plan = scan_plan(batch * directions * channels, sizes.unit, length, chunk, device_size(u.device))
    blocks = channels // sizes.unit * -(-sizes.unit // plan.channels)
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
        for grid, numbers, constants in launches(sizes, reverse, delta_softplus, inputs, plan, g.channel):
            scan_backward_kernel[grid](inputs, g, d_last, states, to, *numbers, **constants)

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
