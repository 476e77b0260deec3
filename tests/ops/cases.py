"""Inputs, tolerances and the comparison of the operator suite.

Inputs are drawn in float64 and rounded to the dtype under test; the oracle gets the rounded values in float64. So an error is
one of arithmetic or of rounding the result, never of the inputs.
"""

from dataclasses import dataclass, replace

import torch

from dass_ops import bidirectional_scan, selective_scan, ss2d, ss2d_projected

from .conftest import device_of

STATE = {torch.float64: torch.float64}  # otherwise float32

# Largest error over largest value of a tensor. Results in the I/O dtype carry its rounding, the others only arithmetic.
IO_TOLERANCE = {torch.float64: 1e-11, torch.float32: 1e-5, torch.float16: 1.5e-3, torch.bfloat16: 1e-2}
STATE_TOLERANCE = {torch.float64: 1e-11, torch.float32: 1e-5, torch.float16: 1e-4, torch.bfloat16: 1e-4}


@dataclass(frozen=True)
class ScanCase:
    """One call of selective_scan. B and C: "shared" (batch, N, L), a number of groups, or "constant"."""

    batch: int = 2
    channels: int = 4
    length: int = 33
    state: int = 1
    B: str | int = "shared"
    C: str | int = "shared"
    reverse: bool | tuple[bool, ...] = False
    D: bool = True
    z: bool = False
    bias: bool = True
    softplus: bool = True
    initial_state: bool = False
    last_state: bool = False
    out_dtype: torch.dtype | None = None
    layout: str = "contiguous"  # of u, delta, z: "contiguous", "channels_last", "expanded", "sliced"

    def __str__(self):
        default = ScanCase()
        return "-".join(f"{k}={v}" for k, v in vars(self).items() if v != getattr(default, k)) or "default"


def scan_inputs(case: ScanCase, dtype: torch.dtype, seed: int = 0) -> dict[str, torch.Tensor | None]:
    g = torch.Generator().manual_seed(seed)
    b, d, length, n = case.batch, case.channels, case.length, case.state
    state = STATE.get(dtype, torch.float32)

    def normal(*shape, scale=1.0):
        return scale * torch.randn(*shape, generator=g, dtype=torch.float64)

    def projection(form):
        if form == "constant":
            return normal(d, n).to(state)
        return normal(*((b, n, length) if form == "shared" else (b, form, n, length))).to(dtype)

    def sequence(scale=1.0, shift=0.0):
        t = (normal(b, d, length, scale=scale) + shift).to(dtype)
        return lay_out(t, case.layout)

    return {
        "u": sequence(),
        # Positive step sizes without softplus: a negative step with negative A is a growing state.
        "delta": sequence(scale=0.5) if case.softplus else lay_out(sequence(0.2).abs(), case.layout),
        "A": -torch.exp(normal(d, n, scale=0.5)).to(state),
        "B": projection(case.B),
        "C": projection(case.C),
        "D": normal(d).to(state) if case.D else None,
        "z": sequence() if case.z else None,
        "delta_bias": (normal(d, scale=0.3) - (1 if case.softplus else -0.5)).to(state) if case.bias else None,
        "initial_state": normal(b, d, n).to(state) if case.initial_state else None,
    }


def lay_out(t: torch.Tensor, layout: str) -> torch.Tensor:
    """The same values (expanded: those of the first clip) in another memory layout."""
    if layout == "channels_last":
        return t.transpose(1, -1).contiguous().transpose(1, -1)
    if layout == "expanded":
        return t[:1].expand_as(t) if t.shape[0] else t
    if layout == "sliced":
        wide = torch.full((*t.shape[:-1], t.shape[-1] + 3), float("nan"), dtype=t.dtype)
        wide[..., 2 : 2 + t.shape[-1]] = t
        return wide[..., 2 : 2 + t.shape[-1]]
    return t.contiguous()


def run_scan(function, case, inputs, dtype, backend, device="cpu", options=None):
    """Results and gradients by name, for fixed random cotangents of every result."""
    leaves = {}
    for name, t in inputs.items():
        if t is None:
            leaves[name] = None
            continue
        moved = t.detach().to(device, torch.float64 if dtype is None and t.is_floating_point() else t.dtype)
        leaves[name] = moved.requires_grad_()
    results = function(
        **leaves, delta_softplus=case.softplus, return_last_state=True, backend=backend, **(options or {})
    )
    return differentiate(dict(zip(("out", "last_state"), results, strict=True)), leaves, with_last=case.last_state)


def differentiate(results, leaves, with_last=True):
    g = torch.Generator().manual_seed(99)
    names = [n for n in results if with_last or n != "last_state"]
    cotangents = {}
    for name, r in results.items():
        cotangents[name] = torch.randn(r.shape, generator=g, dtype=torch.float64).to(torch.bfloat16)
    wanted = {n: t for n, t in leaves.items() if t is not None}
    gradients = torch.autograd.grad(
        [results[n] for n in names],
        list(wanted.values()),
        [cotangents[n].to(results[n]) for n in names],
        allow_unused=True,
    )
    found = {n: r.detach() for n, r in results.items()}
    for (name, leaf), gradient in zip(wanted.items(), gradients, strict=True):
        found[f"d_{name}"] = torch.zeros_like(leaf) if gradient is None else gradient
    return found


def check_scan(case: ScanCase, dtype, backend, seed=0, function=selective_scan, inputs=None):
    """Compares every result and gradient of `backend` with the float64 oracle."""
    inputs = scan_inputs(case, dtype, seed) if inputs is None else inputs
    options = {} if function is bidirectional_scan else {"reverse": case.reverse}
    expected = run_scan(function, case, inputs, None, "reference", options=options)
    options = dict(options, out_dtype=case.out_dtype)
    got = run_scan(function, case, inputs, dtype, backend, device_of(backend), options)
    assert got["out"].dtype == (case.out_dtype or dtype)
    assert got["last_state"].dtype == STATE.get(dtype, torch.float32)
    compare(got, expected, dtype, str(case))


def compare(got, expected, dtype, label=""):
    wrong = []
    for name, e in expected.items():
        g = got[name].cpu()
        assert g.shape == e.shape, f"{name}: shape {tuple(g.shape)}, expected {tuple(e.shape)}"
        if e.numel() == 0:
            continue
        tolerance = (IO_TOLERANCE if g.dtype == dtype else STATE_TOLERANCE)[dtype]
        error = float((g.double() - e).abs().max() / e.abs().max().clamp(min=1e-30))
        if not error <= tolerance:  # NaN fails
            wrong.append(f"{name}: relative error {error:.2e} > {tolerance:.0e}")
    assert not wrong, f"{label}: " + "; ".join(wrong)


@dataclass(frozen=True)
class MapCase:
    """One call of ss2d."""

    batch: int = 2
    channels: int = 4
    height: int = 5
    width: int = 7
    state: int = 1
    rank: int = 2
    out_dtype: torch.dtype | None = None
    layout: str = "contiguous"

    def __str__(self):
        default = MapCase()
        return "-".join(f"{k}={v}" for k, v in vars(self).items() if v != getattr(default, k)) or "default"

    def replace(self, **changes):
        return replace(self, **changes)


def map_inputs(case: MapCase, dtype: torch.dtype, seed: int = 0, projected: bool = False) -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    b, d, h, w, n, r = case.batch, case.channels, case.height, case.width, case.state, case.rank
    state = STATE.get(dtype, torch.float32)

    def normal(*shape, scale=1.0):
        return scale * torch.randn(*shape, generator=g, dtype=torch.float64)

    rows = r + 2 * n
    second = (
        {"x_proj_weight": normal(4, rows, d, scale=max(d, 1) ** -0.5).to(dtype)}
        if projected
        else {"x_dbl": lay_out(normal(b, 4, rows, h, w).to(dtype), case.layout)}
    )
    return {
        "x": lay_out(normal(b, d, h, w).to(dtype), case.layout),
        **second,
        "dt_weight": normal(4, d, r, scale=max(r, 1) ** -0.5).to(state),
        "dt_bias": (normal(4, d, scale=0.5) - 2).to(state),
        "A_logs": normal(4 * d, n, scale=0.4).to(state),
        "Ds": normal(4 * d).to(state),
    }


def run_map(function, inputs, backend, device="cpu", **options):
    leaves = {n: t.detach().to(device).requires_grad_() for n, t in inputs.items()}
    return differentiate({"y": function(**leaves, backend=backend, **options)}, leaves)


def check_map(case: MapCase, dtype, backend, seed=0, function=ss2d):
    inputs = map_inputs(case, dtype, seed, projected=function is ss2d_projected)
    expected = run_map(function, {n: t.double() for n, t in inputs.items()}, "reference")
    got = run_map(function, inputs, backend, device_of(backend), out_dtype=case.out_dtype)
    assert got["y"].dtype == (case.out_dtype or dtype)
    compare(got, expected, dtype, str(case))
