"""The operators' tensors, checked and turned into what the kernels are told. Shapes and dtypes: csrc/schema.cpp.

Every error message about an argument is here, and so is every copy that a caller's layout costs: a tensor whose last axis
(for maps: the last two) is not contiguous is copied once. All other strides are free.
"""

from math import gcd
from typing import NamedTuple

import torch
from torch import Tensor

from .tiles import Map, Projection, Sequence

FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


class ScanInputs(NamedTuple):
    """What the kernels read in both passes; absent tensors are None."""

    u: Sequence
    delta: Sequence
    A: Tensor  # (directions, channels, state), as all below contiguous and of the state dtype
    B: Projection
    C: Projection
    D: Tensor | None  # (directions, channels)
    z: Sequence | None
    delta_bias: Tensor | None  # (directions, channels)
    initial_state: Tensor | None  # (batch, directions, channels, state)
    channels: int
    length: int


class ScanSizes(NamedTuple):
    batch: int
    directions: int
    channels: int
    length: int
    state: int
    shared: bool  # one u for several directions: outputs are summed
    unit: int  # consecutive channels that share their rows of B and of C

    @property
    def outputs(self) -> int:
        return 1 if self.shared else self.directions

    @property
    def empty(self) -> bool:
        return self.batch * self.channels * self.length == 0


def state_dtype(io: torch.dtype) -> torch.dtype:
    return torch.float64 if io == torch.float64 else torch.float32


def prepare_scan(
    u, delta, A, B, C, D, z, delta_bias, initial_state, *, reverse, chunk, out_dtype
) -> tuple[ScanInputs, ScanSizes]:
    """ValueError names the argument, what was given and what was expected."""
    _expect(delta.dim() == 4, "delta", delta, "(batch, directions, channels, length)")
    _expect(A.dim() == 3, "A", A, "(directions, channels, state)")
    batch, directions, channels, length = delta.shape
    state = A.shape[2]
    io, wide = u.dtype, state_dtype(u.dtype)
    _expect_io(io, "u")
    _expect_out(out_dtype, io)
    fits = u.dim() == 4 and u.shape[1] in (1, directions) and (u.shape[0], *u.shape[2:]) == (batch, channels, length)
    _expect(fits, "u", u, f"delta's shape {tuple(delta.shape)}, or that with 1 direction")
    _expect_like(delta, "delta", u)
    if not 1 <= len(reverse) == directions:
        raise ValueError(f"reverse has {len(reverse)} flags; expected one for each of the {directions} directions.")
    _expect_chunk(chunk)
    shared = u.shape[1] < directions
    if z is not None:
        if shared:
            raise ValueError(
                "z cannot gate outputs that are summed over directions; multiply the sum by silu(z) instead."
            )
        _expect_shape(z, "z", delta.shape, "(batch, directions, channels, length)")
        _expect_like(z, "z", u)
    B, B_channels = _projection(B, "B", u, delta, state)
    C, C_channels = _projection(C, "C", u, delta, state)
    sizes = ScanSizes(batch, directions, channels, length, state, shared, gcd(B_channels, C_channels))

    def parameter(t, name, shape, axes):
        return _parameter(t, name, shape, axes, wide, u.device)

    per_channel, states = (directions, channels), (batch, directions, channels, state)
    inputs = ScanInputs(
        sequence(u),
        sequence(delta),
        parameter(A, "A", (directions, channels, state), "(directions, channels, state)"),
        B,
        C,
        parameter(D, "D", per_channel, "(directions, channels)"),
        None if z is None else sequence(z),
        parameter(delta_bias, "delta_bias", per_channel, "(directions, channels)"),
        parameter(initial_state, "initial_state", states, "(batch, directions, channels, state)"),
        channels,
        length,
    )
    return inputs, sizes


def prepare_gradients(d_out, d_last_state, boundary_states, sizes: ScanSizes, chunk, like: Tensor):
    """The three arguments that only the backward has: d_out as a Sequence, the others contiguous."""
    if chunk == 0 and not sizes.empty:
        raise ValueError("chunk is 0: the forward saved no states, so there is no backward.")
    out = (sizes.batch, sizes.outputs, sizes.channels, sizes.length)
    _expect_shape(d_out, "d_out", out, "the shape of out")
    _expect_out(d_out.dtype, like.dtype, "d_out has dtype")
    _expect_device(d_out, "d_out", like.device)
    wide = state_dtype(like.dtype)
    states = (sizes.batch, sizes.directions, sizes.channels, sizes.state)
    chunks = -(-sizes.length // chunk) if chunk else 0
    saved = (*states[:3], chunks, sizes.state)
    return (
        sequence(d_out),
        _parameter(d_last_state, "d_last_state", states, "the shape of last_state", wide, like.device),
        _parameter(
            boundary_states, "boundary_states", saved, "(batch, directions, channels, chunks, state)", wide, like.device
        ),
    )


class MapInputs(NamedTuple):
    """What the kernels of the map form read in both passes."""

    x: Map
    dt_weight: Tensor  # (4, channels, rank), as all below contiguous and of the state dtype
    dt_bias: Tensor  # (4, channels)
    A_logs: Tensor  # (4 * channels, state)
    Ds: Tensor  # (4 * channels)
    channels: int
    height: int
    width: int
    length: int  # height * width


class MapSizes(NamedTuple):
    batch: int
    channels: int
    length: int
    state: int
    rank: int

    @property
    def empty(self) -> bool:
        return self.batch * self.channels * self.length == 0


def prepare_map(x, x_dbl, dt_weight, dt_bias, A_logs, Ds, *, chunk, out_dtype) -> tuple[MapInputs, MapSizes]:
    """ValueError names the argument, what was given and what was expected."""
    _expect(x.dim() == 4, "x", x, "(batch, channels, height, width)")
    _expect(dt_weight.dim() == 3, "dt_weight", dt_weight, "(4, channels, rank)")
    _expect(A_logs.dim() == 2, "A_logs", A_logs, "(4 * channels, state)")
    batch, channels, height, width = x.shape
    state, rank = A_logs.shape[1], dt_weight.shape[2]
    wide = state_dtype(x.dtype)
    _expect_io(x.dtype, "x")
    _expect_out(out_dtype, x.dtype)
    _expect_chunk(chunk)
    _expect_like(x_dbl, "x_dbl", x)
    rows = (batch, 4, rank + 2 * state, height, width)
    _expect_shape(x_dbl, "x_dbl", rows, "(batch, 4, rank + 2 * state, height, width)")

    def parameter(t, name, shape, axes):
        return _parameter(t, name, shape, axes, wide, x.device)

    inputs = MapInputs(
        _map(x),
        parameter(dt_weight, "dt_weight", (4, channels, rank), "(4, channels, rank)"),
        parameter(dt_bias, "dt_bias", (4, channels), "(4, channels)"),
        parameter(A_logs, "A_logs", (4 * channels, state), "(4 * channels, state)"),
        parameter(Ds, "Ds", (4 * channels,), "(4 * channels)"),
        channels,
        height,
        width,
        height * width,
    )
    return inputs, MapSizes(batch, channels, height * width, state, rank)


def prepare_map_gradients(d_y, boundary_states, sizes: MapSizes, chunk, x: Tensor) -> tuple[Map, Tensor]:
    if chunk == 0 and not sizes.empty:
        raise ValueError("chunk is 0: the forward saved no states, so there is no backward.")
    _expect_shape(d_y, "d_y", x.shape, "the shape of x")
    _expect_device(d_y, "d_y", x.device)
    chunks = -(-sizes.length // chunk) if chunk else 0
    saved = (sizes.batch, 4, sizes.channels, chunks, sizes.state)
    axes = "(batch, 4, channels, chunks, state)"
    return _map(d_y), _parameter(boundary_states, "boundary_states", saved, axes, state_dtype(x.dtype), x.device)


def _map(t: Tensor) -> Map:
    t = last_axis_contiguous(t.flatten(-2))
    return Map(t, t.stride(0), t.stride(1))


def sequence(t: Tensor) -> Sequence:
    """A direction axis of one is shared: its stride is 0."""
    t = last_axis_contiguous(t)
    return Sequence(t, t.stride(0), t.stride(1) if t.shape[1] > 1 else 0, t.stride(2))


def _projection(t: Tensor, name: str, u: Tensor, delta: Tensor, state: int) -> tuple[Projection, int]:
    """B or C, and how many consecutive channels read the same row (all of them where it is constant)."""
    batch, directions, channels, length = delta.shape
    wide = state_dtype(u.dtype)
    _expect_device(t, name, u.device)
    _expect(t.dim() == 5, name, t, "(batch, directions, groups, state, length) or (1, directions, channels, state, 1)")
    varies = t.dtype == u.dtype and t.shape[0] == batch and t.shape[4] == length
    constant = t.shape[0] == 1 and t.shape[4] == 1 and t.shape[2] == channels and t.dtype == wide
    if not varies and not constant:
        raise ValueError(
            f"{name} has shape {tuple(t.shape)} and dtype {t.dtype}; expected (batch, directions, groups, state, length) "
            f"with batch {batch}, length {length} and dtype {u.dtype}, or (1, directions, channels, state, 1) with dtype "
            f"{wide}."
        )
    fits = t.shape[1] == directions and t.shape[3] == state
    _expect(fits, name, t, f"{directions} directions on axis 1 and a state of {state} on axis 3")
    if not varies:  # where both forms fit, they mean the same
        return Projection(t.contiguous()), channels
    groups = t.shape[2]
    if groups == 0 or channels % groups:
        raise ValueError(f"{name} has {groups} groups on axis 2; expected a divisor of the {channels} channels.")
    t = last_axis_contiguous(t)
    group_channels = channels // groups
    return Projection(t, *t.stride()[:4], group_channels), group_channels


def last_axis_contiguous(t: Tensor) -> Tensor:
    return t if t.shape[-1] <= 1 or t.stride(-1) == 1 else t.contiguous()


def _parameter(t, name, shape, axes, dtype, device):
    if t is None:
        return None
    _expect_shape(t, name, shape, axes)
    if t.dtype != dtype:
        raise ValueError(
            f"{name} has dtype {t.dtype}; expected {dtype}. dass_ops.selective_scan converts; operators do not."
        )
    _expect_device(t, name, device)
    return t.contiguous()


def _expect(fits: bool, name: str, t: Tensor, expected: str) -> None:
    if not fits:
        raise ValueError(f"{name} has shape {tuple(t.shape)}; expected {expected}.")


def _expect_shape(t: Tensor, name: str, shape, axes: str) -> None:
    _expect(tuple(t.shape) == tuple(shape), name, t, f"{axes} = {tuple(shape)}")


def _expect_io(dtype: torch.dtype, name: str) -> None:
    if dtype not in FLOATS:
        raise ValueError(f"{name} has dtype {dtype}; expected float32, float64, bfloat16 or float16.")


def _expect_out(dtype: torch.dtype, io: torch.dtype, subject: str = "out_dtype is") -> None:
    if dtype not in (io, state_dtype(io)):
        raise ValueError(f"{subject} {dtype}; expected {io} or {state_dtype(io)}.")


def _expect_like(t: Tensor, name: str, u: Tensor) -> None:
    if t.dtype != u.dtype:
        raise ValueError(f"{name} has dtype {t.dtype}; expected {u.dtype}, that of u (or x).")
    _expect_device(t, name, u.device)


def _expect_device(t: Tensor, name: str, device: torch.device) -> None:
    if t.device != device:
        raise ValueError(f"{name} is on {t.device}; expected {device}, where u (or x) is.")


def _expect_chunk(chunk: int) -> None:
    if not 0 <= chunk <= 1024:
        raise ValueError(f"chunk is {chunk}; expected at most 1024 steps, or 0 to save no states.")
