"""Other people's ways to compute a selective scan, made to fit one signature.

Every peer is a function (u, delta, A, B, C, D, delta_bias) -> out with softplus applied to delta, u (batch, channels,
length), B and C (batch, groups, state, length). Most cannot walk backwards: reversed groups are flipped before and after,
as their users have to.
"""

import importlib
import importlib.util
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache

import torch
from problems import Problem
from torch import Tensor
from torch.nn.functional import softplus

Scan = Callable[..., Tensor]


@dataclass(frozen=True)
class Peer:
    """`load(problem, reversed shares)` returns the scan; `refuses(problem, training)` says why not to run it, or "";
    `estimate(problem, training)` gives the seconds of a call where those are many. `walks_back`: the scan heeds the
    reversed shares itself."""

    name: str
    module: str  # what must be importable; empty: torch only
    devices: tuple[str, ...]
    load: Callable[[Problem, tuple[bool, ...]], Scan]
    refuses: Callable[[Problem, bool], str] = lambda problem, training: ""
    estimate: Callable[[Problem, bool], float] = lambda problem, training: 0.0
    walks_back: bool = False
    compiles: bool = False  # in its first call

    def unavailable(self, device: str) -> str:
        """Why it cannot run on this device type; empty where it can."""
        if device not in self.devices:
            return f"runs on {' and '.join(self.devices)} only"
        if self.module and importlib.util.find_spec(self.module) is None:
            return f"{self.module} is not installed"
        return ""


def flipped(scan: Scan, reverse: Sequence[bool]) -> Scan:
    """`scan`, for channels of which the reversed shares are turned around before and back after."""
    if not any(reverse):
        return scan

    def both_ways(u, delta, A, B, C, D, delta_bias):
        u, delta, B, C = (turn(t, reverse) for t in (u, delta, B, C))
        return turn(scan(u, delta, A, B, C, D, delta_bias), reverse)

    return both_ways


def turn(t: Tensor, reverse: Sequence[bool]) -> Tensor:
    """Turns around the last axis of the reversed shares of axis 1 (where it has one group, of everything)."""
    if all(reverse):
        return t.flip(-1)
    shares = t.unflatten(1, (len(reverse), -1))
    return torch.stack([shares[:, k].flip(-1) if r else shares[:, k] for k, r in enumerate(reverse)], 1).flatten(1, 2)


# -- plain PyTorch -----------------------------------------------------------------------------------------------------


def plain_loop(u, delta, A, B, C, D, delta_bias):
    """What a reference implementation does: the decay and input of all steps, then a loop, the outputs stacked."""
    a, w, C = _decay_and_input(u, delta, A, B, C, delta_bias)  # (batch, channels, length, state)
    h = torch.zeros_like(a[:, :, 0])
    steps = []
    for step in range(u.shape[-1]):
        h = a[:, :, step] * h + w[:, :, step]
        steps.append((h * C[:, :, step]).sum(-1))
    return torch.stack(steps, -1) + D[:, None] * u


def _plain_seconds(problem: Problem, training: bool) -> float:
    """Its backward is quadratic in the length: the gradient of every slice is a tensor of the whole size."""
    return 1.7e-9 * problem.length * problem.elements if training else 0.0


def _decay_and_input(u, delta, A, B, C, delta_bias):
    """a = exp(dt A), w = dt B u and C for every channel, each (batch, channels, length, state)."""
    dt = softplus(delta + delta_bias[:, None])
    share = u.shape[1] // B.shape[1]
    B, C = (t.transpose(-1, -2).repeat_interleave(share, 1) for t in (B, C))
    return torch.exp(dt[..., None] * A[:, None]), (dt * u)[..., None] * B, C


class HoistedRecurrence(torch.autograd.Function):
    """h[l] = a[l] h[l-1] + w[l] along axis 0, one fused multiply-add a step, in w's memory; its adjoint the same."""

    @staticmethod
    def forward(ctx, a, w):
        steps, decay = w.unbind(0), a.unbind(0)
        for step in range(1, len(steps)):
            steps[step].addcmul_(decay[step], steps[step - 1])
        ctx.mark_dirty(w)
        ctx.save_for_backward(a, w)
        return w

    @staticmethod
    def backward(ctx, d_h):
        a, h = ctx.saved_tensors
        d_w = d_h.clone()
        steps, decay = d_w.unbind(0), a.unbind(0)
        for step in range(len(steps) - 2, -1, -1):
            steps[step].addcmul_(decay[step + 1], steps[step + 1])
        d_a = torch.zeros_like(a)
        torch.mul(d_w[1:], h[:-1], out=d_a[1:])
        return d_a, d_w


def hoisted_loop(u, delta, A, B, C, D, delta_bias):
    """What a careful user writes: time first in memory, all but the recurrence outside the loop, and that in place."""
    u_first, delta_first = (t.permute(2, 0, 1).contiguous() for t in (u, delta))  # (length, batch, channels)
    dt = softplus(delta_first + delta_bias)
    share = u.shape[1] // B.shape[1]
    if A.shape[1] == 1:
        B, C = (t.permute(3, 0, 1, 2).repeat_interleave(share, 2).squeeze(-1) for t in (B, C))
        h = HoistedRecurrence.apply(torch.exp(dt * A[:, 0]), dt * u_first * B)
        out = torch.addcmul(D * u_first, h, C)
    else:
        B, C = (t.permute(3, 0, 1, 2) for t in (B, C))  # (length, batch, groups, state)
        a = torch.exp(dt[..., None] * A).unflatten(2, (-1, share))
        w = (dt * u_first).unflatten(2, (-1, share))[..., None] * B[:, :, :, None]
        h = HoistedRecurrence.apply(a, w)
        out = torch.matmul(h, C[..., None]).squeeze(-1).flatten(2, 3) + D * u_first
    return out.permute(1, 2, 0).to(u.dtype)


# -- compiled PyTorch --------------------------------------------------------------------------------------------------


def _compiled(problem: Problem, flags: tuple[bool, ...]) -> Scan:
    """torch.compile of the whole scan over torch's associative_scan; the reversed groups through its `reverse` option."""
    from torch._higher_order_ops.associative_scan import associative_scan

    def combine(first, second):
        return second[0] * first[0], second[0] * first[1] + second[1]

    def walk(a, w, reverse):
        mode = "pointwise" if a.is_cuda else "generic"
        return associative_scan(combine, (a, w), dim=2, reverse=reverse, combine_mode=mode)[1]

    def scan(u, delta, A, B, C, D, delta_bias):
        dt = softplus(delta + delta_bias[:, None])
        groups = B.shape[1]
        grouped = (u.shape[0], groups, -1, u.shape[2])
        if A.shape[1] == 1:
            a = torch.exp(dt * A).view(grouped)
            w = (dt * u).view(grouped) * B
            a, w, C = a.flatten(1, 2), w.flatten(1, 2), C.expand(*a.shape).flatten(1, 2)
        else:
            a = torch.exp(dt[..., None] * A[:, None])
            spread = [t.transpose(-1, -2).repeat_interleave(u.shape[1] // groups, 1) for t in (B, C)]
            w, C = (dt * u)[..., None] * spread[0], spread[1]
        split = u.shape[1] * flags.count(False) // len(flags)  # the reversed shares come last
        halves = [(a[:, :split], w[:, :split], False), (a[:, split:], w[:, split:], True)]
        h = torch.cat([walk(*half) for half in halves if half[0].shape[1]], 1)
        y = h * C if A.shape[1] == 1 else (h * C).sum(-1)
        return (y + D[:, None] * u).to(u.dtype)

    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 256)
    inductor = importlib.import_module("torch._inductor.config")
    inductor.compile_threads = 1  # one kernel a graph: starting a pool of compilers takes longer
    inductor.cpp.vec_isa_ok = True  # what the processor says it has, without a trial compilation of each
    return torch.compile(scan, fullgraph=True, dynamic=False)


# -- packages ----------------------------------------------------------------------------------------------------------


def _by_recurrence(recurrence: Callable[[Tensor, Tensor], Tensor]) -> Scan:
    """A scan from `recurrence(a, w)`, both (batch, length, channels, state): h of the same shape."""

    def scan(u, delta, A, B, C, D, delta_bias):
        dt = softplus(delta + delta_bias[:, None]).transpose(1, 2)  # (batch, length, channels)
        share = u.shape[1] // B.shape[1]
        a = torch.exp(dt[..., None] * A)
        spread = [t.permute(0, 3, 1, 2).repeat_interleave(share, 2) for t in (B, C)]
        h = recurrence(a, (dt * u.transpose(1, 2))[..., None] * spread[0])
        return ((h * spread[1]).sum(-1).transpose(1, 2) + D[:, None] * u).to(u.dtype)

    return scan


def _mambapy(problem: Problem, flags: tuple[bool, ...]) -> Scan:
    return _by_recurrence(importlib.import_module("mambapy.pscan").pscan)


def _mambapy_seconds(problem: Problem, training: bool) -> float:
    """About, on two cores, where it is long enough to matter."""
    return (9e-8 if training else 2.5e-8) * problem.elements


def _fla(problem: Problem, flags: tuple[bool, ...]) -> Scan:
    """flash-linear-attention has no selective scan; its HGRN kernel is the same recurrence, one state a channel."""
    chunk_hgrn = importlib.import_module("fla.ops.hgrn").chunk_hgrn

    def recurrence(a, w):
        return chunk_hgrn(w.flatten(2).contiguous(), torch.log(a).flatten(2).contiguous())[0].view_as(w)

    return _by_recurrence(recurrence)


def _accelerated_scan(problem: Problem, flags: tuple[bool, ...]) -> Scan:
    """(batch, channels, length), length a power of two from 32 up: padded with steps that change nothing."""
    warp = importlib.import_module("accelerated_scan.warp")

    def recurrence(a, w):
        length = a.shape[1]
        missing = max(32, 2 ** math.ceil(math.log2(length))) - length
        a, w = (t.permute(0, 2, 3, 1).flatten(1, 2) for t in (a, w))
        a = torch.nn.functional.pad(a, (0, missing), value=1.0).contiguous()
        w = torch.nn.functional.pad(w, (0, missing)).contiguous()
        h = warp.scan(a, w)[..., :length]
        return h.unflatten(1, (-1, problem.shape.state)).permute(0, 3, 1, 2)

    return _by_recurrence(recurrence)


def _mamba_ssm(problem: Problem, flags: tuple[bool, ...]) -> Scan:
    """Its compiled module, which build_peers.py builds without the rest of the package."""
    kernels = importlib.import_module("selective_scan_cuda")

    class Mamba(torch.autograd.Function):
        @staticmethod
        def forward(ctx, u, delta, A, B, C, D, bias):
            out, x, *_ = kernels.fwd(u, delta, A, B, C, D, None, bias, True)
            ctx.save_for_backward(u, delta, A, B, C, D, bias, x)
            return out

        @staticmethod
        def backward(ctx, d_out):
            u, delta, A, B, C, D, bias, x = ctx.saved_tensors
            d_out = d_out.contiguous()
            return tuple(kernels.bwd(u, delta, A, B, C, D, None, bias, d_out, x, None, None, True, False)[:7])

    return Mamba.apply


def _vmamba(problem: Problem, flags: tuple[bool, ...]) -> Scan:
    kernels = importlib.import_module("selective_scan_cuda_oflex")

    class VMamba(torch.autograd.Function):
        @staticmethod
        def forward(ctx, u, delta, A, B, C, D, bias):
            out, x, *_ = kernels.fwd(u, delta, A, B, C, D, bias, True, 1, False)
            ctx.save_for_backward(u, delta, A, B, C, D, bias, x)
            return out

        @staticmethod
        def backward(ctx, d_out):
            u, delta, A, B, C, D, bias, x = ctx.saved_tensors
            return tuple(kernels.bwd(u, delta, A, B, C, D, bias, d_out.contiguous(), x, True, 1)[:7])

    return VMamba.apply


def _only_float32(problem: Problem, training: bool) -> str:
    return "" if problem.dtype == "float32" else "float32 only"


PEERS = (
    Peer("plain loop", "", ("cpu", "cuda"), lambda problem, flags: plain_loop, estimate=_plain_seconds),
    Peer("hoisted loop", "", ("cpu", "cuda"), lambda problem, flags: hoisted_loop, _only_float32),
    Peer("mambapy", "mambapy", ("cpu", "cuda"), _mambapy, estimate=_mambapy_seconds),
    Peer("compiled", "", ("cpu", "cuda"), _compiled, _only_float32, walks_back=True, compiles=True),
    Peer("mamba_ssm", "selective_scan_cuda", ("cuda",), _mamba_ssm),
    Peer("vmamba", "selective_scan_cuda_oflex", ("cuda",), _vmamba),
    Peer("fla", "fla", ("cuda",), _fla),
    Peer("accelerated_scan", "accelerated_scan", ("cuda",), _accelerated_scan, _only_float32),
)


@cache
def load(peer: Peer, problem: Problem, flags: tuple[bool, ...]) -> Scan:
    """The peer's scan of one sequence per channel, for channels of which the shares in `flags` are reversed."""
    scan = peer.load(problem, flags)
    return scan if peer.walks_back else flipped(scan, flags)
