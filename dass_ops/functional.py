"""The public functions: they check and shape what they are given, apply the dtype contract and call an operator.

Dtype contract. u, delta, z and the B and C that vary along the sequence (x and x_dbl of ss2d) share one I/O dtype: float32,
bfloat16, float16 or float64; where they differ, they are promoted to the widest. Everything else (A, D, biases, constant B
and C, states, ss2d's parameters) is converted to the state dtype: float32, or float64 where the I/O dtype is float64.
Arithmetic and accumulation are done in the state dtype. The output has u's dtype, or `out_dtype`: that of u or the state
dtype. Autocast changes none of this: inputs arrive in whatever dtype the surrounding layers produced and stay in it.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from . import loading, reference
from .backends import CHUNK, MAP_CHUNK, NATIVE_CHUNKS, NATIVE_MAP_CHUNKS, STATES_CHUNK, SUFFIX, Backend, resolve
from .registration import operator, project, state_dtype

# (out, last_state), or y of ss2d, in one step, by csrc/plain_calls.cpp; None where the functions below have to look closer.
_plain_scan, _plain_map = loading.plain("plain_scan"), loading.plain("plain_map")

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def selective_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    return_last_state: bool = False,
    *,
    initial_state: Tensor | None = None,
    reverse: bool | Sequence[bool] = False,
    out_dtype: torch.dtype | None = None,
    backend: Backend | str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """The selective scan of Mamba (arXiv 2312.00752), equations (1) to (6) of SCAN.md; differentiable in every tensor.

    Positionally the same as mamba_ssm's `selective_scan_fn`, for real A; the gradient through the last state, which that one
    drops, is included.

    Args:
        u: input, (batch, channels, length).
        delta: step sizes, (batch, channels, length).
        A: (channels, state), negative for a decaying state.
        B, C: (batch, state, length); or (batch, groups, state, length), where groups divides channels and consecutive
            channels share a group; or constant, (channels, state). B and C choose independently.
        D: skip weight, (channels,).
        z: gate, (batch, channels, length): the output is multiplied by silu(z).
        delta_bias: (channels,), added to delta.
        delta_softplus: apply softplus to delta (after the bias).
        return_last_state: also return the state after the last step, (batch, channels, state), in the state dtype.
        initial_state: state before the first step, (batch, channels, state); zeros if absent.
        reverse: walk from the last position to the first; the initial state then enters at the end and the last state is
            that at position 0. A sequence of K booleans gives each of K equal shares of the channels its own direction.
        out_dtype: u.dtype (default) or the state dtype.
        backend: a Backend or its name; default: DASS_OPS_BACKEND, else the fastest that can run.

    Returns:
        (batch, channels, length) in `out_dtype`, or that and the last state.

    Raises:
        ValueError: a shape, dtype or device that does not fit; RuntimeError: a backend that cannot run here.
    """
    if out_dtype is None and not torch.compiler.is_compiling():
        plain = _plain_scan(
            u, delta, A, B, C, D, z, delta_bias, initial_state, delta_softplus, reverse, backend, NATIVE_CHUNKS
        )
        if plain is not None:
            return plain if return_last_state else plain[0]
    flags = _flags(reverse)
    _expect_axes(u, "u", 3, "(batch, channels, length)")
    batch, channels, length = u.shape
    _expect_shape(delta, "delta", (batch, channels, length), "u's shape")
    _expect_axes(A, "A", 2, "(channels, state)")
    _expect_shape(A, "A", (channels, A.shape[1]), "(channels, state)")
    state = A.shape[1]
    directions = len(flags)
    if directions == 0 or channels % directions:
        raise ValueError(f"reverse has {directions} flags; expected a divisor of the {channels} channels.")

    split = (
        directions,
        channels // directions,
    )  # of the channels; views by their whole shape are the cheapest there are

    _expect_optional(D, "D", (channels,), "(channels,)")
    _expect_optional(z, "z", (batch, channels, length), "u's shape")
    _expect_optional(delta_bias, "delta_bias", (channels,), "(channels,)")
    _expect_optional(initial_state, "initial_state", (batch, channels, state), "(batch, channels, state)")
    out, last_state = _scan(
        u.view(batch, *split, length),
        delta.view(batch, *split, length),
        A.view(*split, state),
        _spread(B, "B", batch, directions, channels, state, length),
        _spread(C, "C", batch, directions, channels, state, length),
        None if D is None else D.view(split),
        None if z is None else z.view(batch, *split, length),
        None if delta_bias is None else delta_bias.view(split),
        None if initial_state is None else initial_state.view(batch, *split, state),
        delta_softplus=delta_softplus,
        reverse=flags,
        constant={name for name, t in (("B", B), ("C", C)) if t.dim() == 2},
        out_dtype=out_dtype,
        backend=backend,
    )
    out = out.flatten(1, 2)
    return (out, last_state.flatten(1, 2)) if return_last_state else out


selective_scan_fn = selective_scan


def bidirectional_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    return_last_state: bool = False,
    *,
    initial_state: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    backend: Backend | str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Both directions of one sequence in one call, summed; equation (10) of SCAN.md. u is neither copied nor flipped.

    As `selective_scan`, with an axis of two directions (0: from the first position, 1: from the last) in every argument but
    u and z:

    Args:
        u, z: (batch, channels, length); z gates the sum.
        delta: (batch, 2, channels, length).
        A: (2, channels, state).
        B, C: (batch, 2, state, length), (batch, 2, groups, state, length), or constant, (2, channels, state).
        D, delta_bias: (2, channels).
        initial_state: (batch, 2, channels, state).

    Returns:
        (batch, channels, length), or that and the last states (batch, 2, channels, state).

    Raises:
        ValueError, RuntimeError: as `selective_scan`.
    """
    _expect_axes(u, "u", 3, "(batch, channels, length)")
    batch, channels, length = u.shape
    _expect_shape(delta, "delta", (batch, 2, channels, length), "(batch, 2, channels, length)")
    _expect_axes(A, "A", 3, "(2, channels, state)")
    state = A.shape[2]
    _expect_shape(A, "A", (2, channels, state), "(2, channels, state)")
    _expect_optional(D, "D", (2, channels), "(2, channels)")
    _expect_optional(z, "z", (batch, channels, length), "u's shape")
    _expect_optional(delta_bias, "delta_bias", (2, channels), "(2, channels)")
    _expect_optional(initial_state, "initial_state", (batch, 2, channels, state), "(batch, 2, channels, state)")
    final = out_dtype or u.dtype
    out, last_state = _scan(
        u.unsqueeze(1),
        delta,
        A,
        _per_direction(B, "B", batch, channels, state, length),
        _per_direction(C, "C", batch, channels, state, length),
        D,
        None,
        delta_bias,
        initial_state,
        delta_softplus=delta_softplus,
        reverse=(False, True),
        constant={name for name, t in (("B", B), ("C", C)) if t.dim() == 3},
        out_dtype=out_dtype if z is None else state_dtype(u.dtype),
        backend=backend,
    )
    out = out.squeeze(1)
    if z is not None:
        out = (out * torch.nn.functional.silu(z.to(out.dtype))).to(final)
    return (out, last_state) if return_last_state else out


def ss2d(
    x: Tensor,
    x_dbl: Tensor,
    dt_weight: Tensor,
    dt_bias: Tensor,
    A_logs: Tensor,
    Ds: Tensor,
    *,
    out_dtype: torch.dtype | None = None,
    backend: Backend | str | None = None,
) -> Tensor:
    """The four-direction scan of a map (VMamba's SS2D, arXiv 2401.10166), fused; equations (13) to (15) of SCAN.md.

    Directions: 0 row by row, 1 column by column, 2 and 3 the same from the end. Nothing is permuted or expanded in memory,
    and the step sizes exist in registers only.

    Args:
        x: (batch, channels, height, width).
        x_dbl: (batch, 4, rank + 2 * state, height, width): per direction, at each position of the map, the low-rank step
            size, B and C.
        dt_weight: (4, channels, rank), lifts the low-rank step size to the channels.
        dt_bias: (4, channels).
        A_logs: (4 * channels, state); A = -exp(A_logs).
        Ds: (4 * channels,), skip weights.
        out_dtype: x.dtype (default) or the state dtype.
        backend: as for `selective_scan`.

    Returns:
        The sum over the directions, (batch, channels, height, width).

    Raises:
        ValueError: a shape, dtype or device that does not fit; RuntimeError: a backend that cannot run here.
    """
    if out_dtype is None and not torch.compiler.is_compiling():
        plain = _plain_map(x, x_dbl, dt_weight, dt_bias, A_logs, Ds, backend, NATIVE_MAP_CHUNKS)
        if plain is not None:
            return plain
    rank, state, parameters = _ss2d_parameters(x, dt_weight, dt_bias, A_logs, Ds)
    batch, _, height, width = x.shape
    _expect_shape(
        x_dbl, "x_dbl", (batch, 4, rank + 2 * state, height, width), "(batch, 4, rank + 2 * state, height, width)"
    )
    io = _io_dtype(x=x, x_dbl=x_dbl)
    x_io, x_dbl = x.to(io), x_dbl.to(io)
    parameters = [p.to(state_dtype(io)) for p in parameters]
    out_dtype = _out_dtype(out_dtype, x.dtype, io)
    backend = resolve(x.device.type, backend)
    if backend is Backend.REFERENCE:
        return _reference_ss2d(x_io, x_dbl, parameters, out_dtype)
    chunk = _chunk(MAP_CHUNK[backend], x_io, x_dbl, *parameters)
    y, _ = operator("ss2d_forward", SUFFIX[backend])(
        x_io, x_dbl, *parameters, chunk=chunk, out_dtype=_kernel_out(out_dtype, io)
    )
    return y.to(out_dtype)


def ss2d_projected(
    x: Tensor,
    x_proj_weight: Tensor,
    dt_weight: Tensor,
    dt_bias: Tensor,
    A_logs: Tensor,
    Ds: Tensor,
    *,
    out_dtype: torch.dtype | None = None,
    backend: Backend | str | None = None,
) -> Tensor:
    """`ss2d` with the projection that makes x_dbl from x; equations (12) to (15) of SCAN.md.

    One product serves the four directions, and its gradient is accumulated into that of x inside the operator. The
    projection is computed in x's dtype.

    Args:
        x_proj_weight: (4, rank + 2 * state, channels).
        Everything else, the result and the errors: as `ss2d`.
    """
    rank, state, parameters = _ss2d_parameters(x, dt_weight, dt_bias, A_logs, Ds)
    _expect_shape(x_proj_weight, "x_proj_weight", (4, rank + 2 * state, x.shape[1]), "(4, rank + 2 * state, channels)")
    io = _io_dtype(x=x)
    parameters = [p.to(state_dtype(io)) for p in parameters]
    out_dtype = _out_dtype(out_dtype, x.dtype, io)
    backend = resolve(x.device.type, backend)
    if backend is Backend.REFERENCE:
        return _reference_ss2d(x, project(x, x_proj_weight), parameters, out_dtype)
    chunk = _chunk(MAP_CHUNK[backend], x, x_proj_weight, *parameters)
    y, _, _ = operator("ss2d_projected_forward", SUFFIX[backend])(
        x, x_proj_weight, *parameters, chunk=chunk, out_dtype=_kernel_out(out_dtype, io)
    )
    return y.to(out_dtype)


# -- behind the public functions ---------------------------------------------------------------------------------------


def _scan(
    u, delta, A, B, C, D, z, delta_bias, initial_state, *, delta_softplus, reverse, constant, out_dtype, backend
) -> tuple[Tensor, Tensor]:
    """The operator with tensors in its own layout (csrc/schema.cpp): dtype contract, backend, call. `constant` names those of
    B and C that do not vary along the sequence."""
    varying = {"u": u, "delta": delta, "z": z, "B": B, "C": C}
    io = _io_dtype(**{name: t for name, t in varying.items() if t is not None and name not in constant})
    state = state_dtype(io)
    u_io, delta, z = _to(u, io), _to(delta, io), _to(z, io)
    B = _to(_real(B, "B"), state if "B" in constant else io)
    C = _to(_real(C, "C"), state if "C" in constant else io)
    A, D = _to(_real(A, "A"), state), _to(_real(D, "D"), state)
    delta_bias = _to(_real(delta_bias, "delta_bias"), state)
    initial_state = _to(_real(initial_state, "initial_state"), state)
    out_dtype = _out_dtype(out_dtype, u.dtype, io)
    backend = resolve(u.device.type, backend)
    inputs = (u_io, delta, A, B, C, D, z, delta_bias, initial_state)
    if backend is Backend.REFERENCE:
        with torch.autocast(u.device.type, enabled=False):
            inputs = (None if t is None else t.to(state) for t in inputs)
            out, last_state = reference.scan(*inputs, delta_softplus=delta_softplus, reverse=reverse)
            return out.to(out_dtype), last_state
    out, last_state, _ = operator("scan_forward", SUFFIX[backend])(
        *inputs,
        delta_softplus=delta_softplus,
        reverse=list(reverse),
        chunk=_chunk(_scan_chunk(backend, A), *inputs),
        out_dtype=_kernel_out(out_dtype, io),
    )
    return _to(out, out_dtype), last_state


def _reference_ss2d(x, x_dbl, parameters, out_dtype):
    with torch.autocast(x.device.type, enabled=False):
        state = state_dtype(x.dtype)
        return reference.ss2d(x.to(state), x_dbl.to(state), *parameters).to(out_dtype)


def _scan_chunk(backend: Backend, A: Tensor) -> int:
    return (STATES_CHUNK if A.dim() > 0 and A.shape[-1] > 1 else CHUNK)[backend]


def _chunk(chunk: int, *inputs: Tensor | None) -> int:
    """Steps between the states that a backward needs; 0 where none will follow."""
    needed = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in inputs)
    return chunk if needed else 0


def _flags(reverse: bool | Sequence[bool]) -> tuple[bool, ...]:
    if isinstance(reverse, bool):
        return (reverse,)
    try:
        return tuple(bool(r) for r in reverse)
    except TypeError:
        raise ValueError(
            f"reverse is {reverse!r}; expected a bool, or one for each equal share of the channels."
        ) from None


def _spread(t: Tensor, name, batch, directions, channels, state, length) -> Tensor:
    """B or C of selective_scan in the operator's layout."""
    per_direction = channels // directions
    _expect_tensor(t, name)
    if t.dim() == 2:
        _expect_shape(t, name, (channels, state), "(channels, state)")
        return t.reshape(1, directions, per_direction, state, 1)
    if t.dim() == 3:
        _expect_shape(t, name, (batch, state, length), "(batch, state, length)")
        return t[:, None, None].expand(-1, directions, -1, -1, -1)
    _expect_axes(t, name, 4, "(channels, state), (batch, state, length) or (batch, groups, state, length)")
    groups = t.shape[1]
    _expect_shape(t, name, (batch, groups, state, length), "(batch, groups, state, length)")
    if groups == 0 or channels % groups:
        raise ValueError(f"{name} has {groups} groups; expected a divisor of the {channels} channels.")
    if groups % directions == 0:
        return t.view(batch, directions, groups // directions, state, length)
    if directions % groups == 0:
        return t.repeat_interleave(directions // groups, 1).unsqueeze(2)
    raise ValueError(f"{name} has {groups} groups and reverse {directions} flags; expected one to divide the other.")


def _per_direction(t: Tensor, name, batch, channels, state, length) -> Tensor:
    """B or C of bidirectional_scan in the operator's layout."""
    _expect_tensor(t, name)
    if t.dim() == 3:
        _expect_shape(t, name, (2, channels, state), "(2, channels, state)")
        return t.reshape(1, 2, channels, state, 1)
    if t.dim() == 4:
        _expect_shape(t, name, (batch, 2, state, length), "(batch, 2, state, length)")
        return t.unsqueeze(2)
    axes = "(2, channels, state), (batch, 2, state, length) or (batch, 2, groups, state, length)"
    _expect_axes(t, name, 5, axes)
    groups = t.shape[2]
    _expect_shape(t, name, (batch, 2, groups, state, length), "(batch, 2, groups, state, length)")
    if groups == 0 or channels % groups:
        raise ValueError(f"{name} has {groups} groups; expected a divisor of the {channels} channels.")
    return t


def _ss2d_parameters(x, dt_weight, dt_bias, A_logs, Ds):
    _expect_axes(x, "x", 4, "(batch, channels, height, width)")
    channels = x.shape[1]
    _expect_axes(dt_weight, "dt_weight", 3, "(4, channels, rank)")
    rank = dt_weight.shape[2]
    _expect_shape(dt_weight, "dt_weight", (4, channels, rank), "(4, channels, rank)")
    _expect_shape(dt_bias, "dt_bias", (4, channels), "(4, channels)")
    _expect_axes(A_logs, "A_logs", 2, "(4 * channels, state)")
    state = A_logs.shape[1]
    _expect_shape(A_logs, "A_logs", (4 * channels, state), "(4 * channels, state)")
    _expect_shape(Ds, "Ds", (4 * channels,), "(4 * channels,)")
    for name, t in (("dt_weight", dt_weight), ("dt_bias", dt_bias), ("A_logs", A_logs), ("Ds", Ds)):
        _real(t, name)
    return rank, state, (dt_weight, dt_bias, A_logs, Ds)


def _io_dtype(**tensors: Tensor) -> torch.dtype:
    first_name, first = next(iter(tensors.items()))
    io, device = first.dtype, first.device
    for name, t in tensors.items():
        if t.dtype not in FLOATS:
            hint = " Complex A, B and C are not supported." if t.is_complex() else " Convert it with .to()."
            raise ValueError(f"{name} has dtype {t.dtype}; expected float32, bfloat16, float16 or float64.{hint}")
        if t.device != device:
            raise ValueError(f"{name} is on {t.device}; expected {device}, where {first_name} is.")
        if t.dtype != io:
            io = torch.promote_types(io, t.dtype)
    return io


def _out_dtype(asked: torch.dtype | None, given: torch.dtype, io: torch.dtype) -> torch.dtype:
    if asked is None or asked in (given, io, state_dtype(io)):
        return asked or given
    allowed = dict.fromkeys((given, io, state_dtype(io)))
    raise ValueError(f"out_dtype is {asked}; expected {' or '.join(map(str, allowed))}.")


def _kernel_out(out_dtype: torch.dtype, io: torch.dtype) -> torch.dtype:
    """Kernels write io or the state dtype; a narrower u that was promoted gets its dtype back afterwards."""
    return out_dtype if out_dtype in (io, state_dtype(io)) else io


def _to(t: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return t if t is None or t.dtype == dtype else t.to(dtype)


def _real(t: Tensor | None, name: str) -> Tensor | None:
    if t is None or t.is_floating_point():
        return t
    if t.is_complex():
        raise ValueError(f"{name} has dtype {t.dtype}; complex state spaces are not supported. Use a real {name}.")
    raise ValueError(f"{name} has dtype {t.dtype}; expected a floating dtype. Convert it with .float().")


def _expect_tensor(t: Tensor, name: str) -> None:
    if not isinstance(t, Tensor):
        raise ValueError(f"{name} is {type(t).__name__}; expected a tensor.")


def _expect_axes(t: Tensor, name: str, axes: int, meaning: str) -> None:
    if not isinstance(t, Tensor):
        raise ValueError(f"{name} is {type(t).__name__}; expected a tensor {meaning}.")
    if t.dim() != axes:
        raise ValueError(f"{name} has shape {tuple(t.shape)}; expected {meaning}.")


def _expect_shape(t: Tensor, name: str, shape: tuple, meaning: str) -> None:
    if not isinstance(t, Tensor):
        raise ValueError(f"{name} is {type(t).__name__}; expected a tensor {meaning} = {shape}.")
    if t.shape != shape:
        raise ValueError(f"{name} has shape {tuple(t.shape)}; expected {meaning} = {tuple(shape)}.")


def _expect_optional(t: Tensor | None, name: str, shape: tuple, meaning: str) -> None:
    if t is not None:
        _expect_shape(t, name, shape, meaning)
