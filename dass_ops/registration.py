"""Fake kernels for the operators, once, and the operators of the backends that live in Python.

C++ defines the schemas (csrc/schema.cpp), implements them for CPU and CUDA, and records them for autograd
(csrc/autograd.cpp). A backend that shares a device with another registers the same schemas under a suffixed name:
`dass_ops::scan_forward_triton`. On top of each family stands `ss2d_projected_forward`, which owns the projection x -> x_dbl,
so that the projection's gradient is added into d_x by the product itself instead of by a pass of its own.
"""

from functools import partial

import torch
from torch import Tensor, library

from . import loading

_library = library.Library("dass_ops", "FRAGMENT")
OPERATORS = ("scan_forward", "scan_backward", "ss2d_forward", "ss2d_backward")
PROJECTED = (
    "(Tensor x, Tensor x_proj_weight, Tensor dt_weight, Tensor dt_bias, Tensor A_logs, Tensor Ds, *, int chunk, "
    "ScalarType out_dtype) -> (Tensor y, Tensor x_dbl, Tensor boundary_states)"
)


def operator(name: str, suffix: str = ""):
    """The default overload of dass_ops::name+suffix."""
    return getattr(torch.ops.dass_ops, name + suffix).default


def state_dtype(io: torch.dtype) -> torch.dtype:
    """The dtype of states, parameters and accumulation for inputs of dtype `io`."""
    return torch.float64 if io == torch.float64 else torch.float32


def define_family(suffix: str, implementations: dict | None = None) -> None:
    """Defines the four operators with `suffix` from the C++ schemas, implements them in Python where given, and attaches
    fake kernels and `ss2d_projected_forward`."""
    if suffix:
        for name in OPERATORS:
            _, arguments = str(operator(name)._schema).split("(", 1)
            _library.define(f"{name}{suffix}({arguments}")
            if implementations:
                _library.impl(name + suffix, implementations[name], "CompositeExplicitAutograd")
    library.register_fake(f"dass_ops::scan_forward{suffix}", _fake_scan_forward, lib=_library)
    library.register_fake(f"dass_ops::scan_backward{suffix}", _fake_scan_backward, lib=_library)
    for name, fake in (("ss2d_forward", _fake_ss2d_forward), ("ss2d_backward", _fake_ss2d_backward)):
        library.register_fake(f"dass_ops::{name}{suffix}", partial(fake, suffix), lib=_library)
    _define_projected(suffix)


# -- fake kernels: shapes and dtypes of csrc/schema.cpp ----------------------------------------------------------------


def _chunks(length, chunk):
    return (length + chunk - 1) // chunk if chunk else 0


def _fake_scan_forward(
    u, delta, A, B, C, D, z, delta_bias, initial_state, *, delta_softplus, reverse, chunk, out_dtype
):
    batch, directions, channels, length = delta.shape
    states = u.new_empty((batch, directions, channels, A.shape[2]), dtype=state_dtype(u.dtype))
    boundary = states.new_empty((batch, directions, channels, _chunks(length, chunk), A.shape[2]))
    return u.new_empty(u.shape, dtype=out_dtype), states, boundary


def _fake_scan_backward(
    d_out, d_last_state, u, delta, A, B, C, D, z, delta_bias, initial_state, boundary_states, *,
    delta_softplus, reverse, chunk,
):  # fmt: skip
    state = state_dtype(u.dtype)

    def like(t, absent=state):
        return u.new_empty((0,), dtype=absent) if t is None else t.new_empty(t.shape)

    return (
        like(u), like(delta), like(A), like(B), like(C), like(D), like(z, u.dtype), like(delta_bias), like(initial_state),
    )  # fmt: skip


def _empty_map(suffix: str, x: Tensor, dtype: torch.dtype) -> Tensor:
    """A map of x's shape: the kernels of the CPU leave channels last where x has them last, all others the map contiguous."""
    last = x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
    keeps = last and not suffix and x.device.type == "cpu"
    return torch.empty_like(x, dtype=dtype, memory_format=torch.channels_last if keeps else torch.contiguous_format)


def _fake_ss2d_forward(suffix, x, x_dbl, dt_weight, dt_bias, A_logs, Ds, *, chunk, out_dtype):
    batch, channels, height, width = x.shape
    boundary = (batch, 4, channels, _chunks(height * width, chunk), A_logs.shape[1])
    return _empty_map(suffix, x, out_dtype), x.new_empty(boundary, dtype=state_dtype(x.dtype))


def _fake_ss2d_backward(suffix, d_y, x, x_dbl, dt_weight, dt_bias, A_logs, Ds, boundary_states, *, chunk):
    others = (t.new_empty(t.shape) for t in (x_dbl, dt_weight, dt_bias, A_logs, Ds))
    return _empty_map(suffix, x, x.dtype), *others


# -- ss2d with its projection ------------------------------------------------------------------------------------------


def _define_projected(suffix: str) -> None:
    name = f"ss2d_projected_forward{suffix}"

    def forward(x, x_proj_weight, dt_weight, dt_bias, A_logs, Ds, *, chunk, out_dtype):
        x_dbl = project(x, x_proj_weight)
        y, boundary_states = operator("ss2d_forward", suffix)(
            x, x_dbl, dt_weight, dt_bias, A_logs, Ds, chunk=chunk, out_dtype=out_dtype
        )
        return y, x_dbl, boundary_states

    def fake(x, x_proj_weight, dt_weight, dt_bias, A_logs, Ds, *, chunk, out_dtype):
        batch, _, height, width = x.shape
        x_dbl = x.new_empty((batch, 4, x_proj_weight.shape[1], height, width))
        y, boundary_states = _fake_ss2d_forward(
            suffix, x, x_dbl, dt_weight, dt_bias, A_logs, Ds, chunk=chunk, out_dtype=out_dtype
        )
        return y, x_dbl, boundary_states

    def setup_context(ctx, inputs, keyword_only_inputs, output):
        x, x_proj_weight, *parameters = inputs
        y, x_dbl, boundary_states = output
        ctx.mark_non_differentiable(x_dbl, boundary_states)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, x_proj_weight, x_dbl, *parameters, boundary_states)
        ctx.chunk = keyword_only_inputs["chunk"]
        ctx.out_dtype = y.dtype

    def backward(ctx, d_y, _x_dbl, _boundary_states):
        if d_y is None:
            return (None,) * 6
        x, x_proj_weight, x_dbl, *parameters, boundary_states = ctx.saved_tensors
        d_x, d_x_dbl, *d_parameters = operator("ss2d_backward", suffix)(
            d_y.to(ctx.out_dtype), x, x_dbl, *parameters, boundary_states, chunk=ctx.chunk
        )
        d_x, d_weight = project_backward(d_x, d_x_dbl, x, x_proj_weight)
        return d_x, d_weight, *d_parameters

    _library.define(name + PROJECTED)
    _library.impl(name, forward, "CompositeExplicitAutograd")
    library.register_fake(f"dass_ops::{name}", fake, lib=_library)
    library.register_autograd(f"dass_ops::{name}", backward, setup_context=setup_context, lib=_library)


def project(x: Tensor, x_proj_weight: Tensor) -> Tensor:
    """Equation (12): (batch, D, H, W) and (4, rows, D) to (batch, 4, rows, H, W), one product for the four directions."""
    batch, channels, height, width = x.shape
    weight = x_proj_weight.to(x.dtype).reshape(1, -1, channels).expand(batch, -1, -1)
    with torch.autocast(x.device.type, enabled=False):
        x_dbl = torch.bmm(weight, x.reshape(batch, channels, height * width))
    return x_dbl.view(batch, 4, x_proj_weight.shape[1], height, width)


def project_backward(d_x, d_x_dbl, x, x_proj_weight):
    """Adds W^T d_x_dbl to d_x in the product itself; returns d_x, laid out as it was, and the weight's gradient."""
    batch, channels, height, width = x.shape
    weight = x_proj_weight.to(x.dtype).reshape(1, -1, channels).expand(batch, -1, -1)
    rows = d_x_dbl.reshape(batch, weight.shape[1], height * width)
    with torch.autocast(x.device.type, enabled=False):
        if d_x.is_contiguous():
            d_x = torch.baddbmm(d_x.view(batch, channels, height * width), weight.transpose(1, 2), rows).view(x.shape)
        else:  # channels last
            positions = d_x.permute(0, 2, 3, 1).reshape(batch, height * width, channels)
            d_x = torch.baddbmm(positions, rows.transpose(1, 2), weight).view(batch, height, width, channels)
            d_x = d_x.permute(0, 3, 1, 2)
        products = torch.bmm(rows, x.reshape(batch, channels, height * width).transpose(1, 2))
    d_weight = products.sum(0, dtype=state_dtype(x.dtype)).to(x_proj_weight.dtype)
    return d_x, d_weight.view(x_proj_weight.shape)


_defined: set[str] = set()


def ensure(suffix: str) -> None:
    """Defines the family of `suffix` ("", "_emulated" or "_triton") on first use; its compiled part must be loadable."""
    if suffix in _defined:
        return
    if suffix == "_emulated":
        define_family(suffix)
        loading.load("_emulated")
    elif suffix == "_triton":
        from . import triton_kernels

        define_family(suffix, {name: getattr(triton_kernels, name) for name in OPERATORS})
    else:
        define_family(suffix)
    _defined.add(suffix)
