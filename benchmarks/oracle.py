"""What a candidate must compute, or it is not timed: the reference in float64, on the problem's own inputs.

The reference walks step by step, so only some channels of the first example are compared: their output, and every gradient
that follows from a gradient at the output which is zero elsewhere. That guards against candidates that compute something
else; the test suite is what proves our own.
"""

from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy
import torch
from implementations import project, scan_flags, unfused
from peers import flipped
from problems import Problem
from torch import Tensor

import dass_ops

CHANNELS = 16  # compared; of u or of the map
SEGMENT = 64  # steps that autograd sees at a time: its cost is quadratic in them
TOLERANCE = {"float64": 1e-9, "float32": 1e-3, "float16": 1e-2, "bfloat16": 4e-2}  # of the largest value of a tensor
BATCHED = ("u", "delta", "B", "C", "x", "x_dbl")  # inputs with an axis of examples


class Mismatch(Exception):
    """A candidate computes something else: names the tensor, its error and the tolerance."""


@dataclass
class Expected:
    """The truth about the first example: the output of some channels, and what gradients follow from it."""

    problem: Problem
    channels: Tensor  # indices into u's or the map's channels
    out: Tensor
    gradients: dict[str, Tensor] | None = field(default=None, repr=False)

    def masked(self, d_out: Tensor) -> Tensor:
        """`d_out` where the gradients above were taken, zero elsewhere."""
        masked = torch.zeros_like(d_out)
        index = self.channels.to(d_out.device)
        masked[0, index] = d_out[0, index]
        return masked

    def check(self, out: Tensor, gradients: tuple[Tensor, ...] | None = None) -> float:
        """The largest error of any tensor, relative to its largest value. Mismatch where that is too large."""
        out, gradients = _tensor(out), gradients and [_tensor(g) for g in gradients]
        pairs = {"the output": (out[0, self.channels.to(out.device)], self.out)}
        for (name, expected), found in zip(
            (self.gradients or {}).items(), gradients or (), strict=gradients is not None
        ):
            pairs[f"the gradient of {name}"] = (found[:1] if name in BATCHED else found, expected)
        allowed = TOLERANCE[self.problem.dtype]
        worst = 0.0
        for name, (found, expected) in pairs.items():
            if found.shape != expected.shape:
                raise Mismatch(f"{name} has shape {tuple(found.shape)}; expected {tuple(expected.shape)}")
            difference = (found.detach().cpu().double() - expected).abs().max().item()
            error = difference / max(expected.abs().max().item(), 1e-30)
            if not error <= allowed:  # NaN is not
                raise Mismatch(f"{name} is off by {error:.1e} of its largest value; allowed is {allowed:.0e}")
            worst = max(worst, error)
        return worst


def _tensor(found: object) -> Tensor:
    """Other libraries' arrays as tensors."""
    return found if isinstance(found, Tensor) else torch.from_numpy(numpy.array(found))


def expect(problem: Problem, inputs: dict[str, Tensor], d_out: Tensor | None = None) -> Expected:
    """The truth for `inputs`; with gradients where `d_out` is given."""
    channels = _channels(problem)
    leaves = {
        name: (t[:1] if name in BATCHED else t).detach().cpu().double().requires_grad_() for name, t in inputs.items()
    }
    with torch.set_grad_enabled(d_out is not None), _one_thread():  # its tensors are too small for more
        taken = _take(problem.op, leaves, channels)
        scan = flipped(_scan, scan_flags(problem))
        op = "ss2d" if problem.op == "ss2d_projected" else problem.op
        out = unfused(scan, op)(*taken.values())
        expected = Expected(problem, channels, out.detach()[0])
        if d_out is not None:
            d_taken = d_out[:1, channels.to(d_out.device)].cpu().double()
            gradients = torch.autograd.grad(out, list(leaves.values()), d_taken)
            expected.gradients = dict(zip(leaves, gradients, strict=True))
    return expected


@contextmanager
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _channels(problem: Problem) -> Tensor:
    """Equally many of each share of the channels that has its own direction, B and C."""
    shares = problem.shape.directions if problem.op == "selective_scan" else 1
    each = problem.inner_channels // shares
    generator = torch.Generator().manual_seed(0)
    picks = [torch.randperm(each, generator=generator)[: CHANNELS // shares].sort().values for _ in range(shares)]
    return torch.cat([k * each + pick for k, pick in enumerate(picks)])


def _take(op: str, leaves: dict[str, Tensor], channels: Tensor) -> dict[str, Tensor]:
    """The smaller problem that has these channels only. A projection mixes all channels, so it is done here."""
    if op == "ss2d_projected":
        weight, *parameters = [name for name in leaves if name != "x"]
        x_dbl = project(leaves["x"], leaves[weight])
        leaves = {"x": leaves["x"], "x_dbl": x_dbl} | {name: leaves[name] for name in parameters}
        op = "ss2d"
    axes = {
        "selective_scan": {"u": 1, "delta": 1, "A": 0, "D": 0, "delta_bias": 0},
        "bidirectional_scan": {"u": 1, "delta": 2, "A": 1, "D": 1, "delta_bias": 1},
        "ss2d": {"x": 1, "dt_weight": 1, "dt_bias": 1, "A_logs": 0, "Ds": 0},
    }[op]

    def pick(name: str, t: Tensor) -> Tensor:
        if name not in axes:
            return t
        if name in ("A_logs", "Ds"):  # the directions are part of the channels
            return t.unflatten(0, (4, -1))[:, channels].flatten(0, 1)
        return t.index_select(axes[name], channels)

    return {name: pick(name, t) for name, t in leaves.items()}


def _scan(u, delta, A, B, C, D, delta_bias):
    """The reference, in segments with the state handed on, so that autograd's share of each step stays small."""
    state, outs = None, []
    parts = zip(*(t.split(SEGMENT, -1) for t in (u, delta, B, C)), strict=True)
    for u_part, delta_part, B_part, C_part in parts:
        out, state = dass_ops.selective_scan(
            *(u_part, delta_part, A, B_part, C_part, D, None, delta_bias, True, True),
            initial_state=state,
            backend="reference",
        )
        outs.append(out)
    return torch.cat(outs, -1)
