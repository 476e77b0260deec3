"""Everything that can stand in a row of the table: our backends, the peers, the pipelines that a fused operator replaces, and
elementary operations as yardsticks.

An implementation binds a problem's inputs to a call without arguments that returns (out, gradients or None).
"""

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial

import peers
import torch
from problems import Problem
from torch import Tensor

import dass_ops

Call = Callable[[], tuple]
OWN, REPLACED, PEER, YARDSTICK = "own", "replaced", "peer", "yardstick"


@dataclass(frozen=True)
class Implementation:
    """`kind`: OWN (this package's operator), REPLACED (what one operator of ours replaces, on our scan), PEER, YARDSTICK.
    `refuses(problem, training)`: why it cannot run, or "". `estimate(problem, training)`: seconds of a call where those are
    known to be many, else 0. `pointless(problem, training)`: nobody would want that row. `compiles`: the first call does
    more than it would later."""

    name: str
    kind: str
    bind: Callable[[Problem, dict[str, Tensor], Tensor | None, bool], Call]
    refuses: Callable[[Problem, bool], str] = lambda problem, training: ""
    estimate: Callable[[Problem, bool], float] = lambda problem, training: 0.0
    pointless: Callable[[Problem, bool], bool] = lambda problem, training: False
    compiles: bool = False


def of_torch(function: Callable[[Problem], Callable[..., Tensor]]):
    """The `bind` of a function of the operator's tensors; gradients of all of them through autograd."""

    def bind(problem: Problem, inputs: dict[str, Tensor], d_out: Tensor | None, training: bool) -> Call:
        run = function(problem)
        if not training:

            def forward():
                with torch.no_grad():
                    return run(*inputs.values()), None

            return forward
        leaves = [t.detach().requires_grad_() for t in inputs.values()]

        def forward_and_backward():
            out = run(*leaves)
            return out, torch.autograd.grad(out, leaves, d_out)

        return forward_and_backward

    return bind


# -- our own -----------------------------------------------------------------------------------------------------------


def own(backend: str) -> Implementation:
    def function(problem: Problem):
        if problem.op == "selective_scan":
            return own_scan(backend, problem.flags)
        if problem.op == "bidirectional_scan":
            return lambda u, delta, A, B, C, D, bias: dass_ops.bidirectional_scan(
                u, delta, A, B, C, D, None, bias, True, backend=backend
            )
        return partial(getattr(dass_ops, problem.op), backend=backend)

    return Implementation(f"dass_ops {backend}", OWN, of_torch(function))


def own_scan(backend: str, flags: tuple[bool, ...]) -> peers.Scan:
    return lambda u, delta, A, B, C, D, bias: dass_ops.selective_scan(
        u, delta, A, B, C, D, None, bias, True, reverse=flags, backend=backend
    )


# -- what a fused operator replaces ------------------------------------------------------------------------------------


def unfused(scan: peers.Scan, op: str) -> Callable[..., Tensor]:
    """The operator by a selective scan of one sequence per channel and direction, and what must then surround it. `scan`
    takes channels whose second half is reversed."""
    around = {"bidirectional_scan": _bidirectional, "ss2d": _ss2d, "ss2d_projected": _ss2d_projected}
    return scan if op == "selective_scan" else partial(around[op], scan)


def _bidirectional(scan, u, delta, A, B, C, D, bias):
    both = torch.cat([u, u], 1)
    out = scan(both, delta.flatten(1, 2), A.flatten(0, 1), B, C, D.flatten(), bias.flatten())
    return out.unflatten(1, (2, -1)).sum(1)


def _ss2d(scan, x, x_dbl, dt_weight, dt_bias, A_logs, Ds):
    """Cross scan, low-rank product, scan, cross merge."""
    height, width = x.shape[2:]
    rank, state = dt_weight.shape[2], A_logs.shape[1]
    x_all = cross_scan(x.unsqueeze(1).expand(-1, 4, -1, -1, -1))
    low, B, C = cross_scan(x_dbl).split([rank, state, state], 2)
    delta = torch.matmul(dt_weight.to(low.dtype), low)
    y = scan(x_all.flatten(1, 2), delta.flatten(1, 2), -torch.exp(A_logs), B, C, Ds, dt_bias.flatten())
    y = y.unflatten(1, (4, -1))
    rows = (y[:, 0] + y[:, 2]).unflatten(-1, (height, width))
    return rows + (y[:, 1] + y[:, 3]).unflatten(-1, (width, height)).transpose(-1, -2)


def _ss2d_projected(scan, x, x_proj_weight, dt_weight, dt_bias, A_logs, Ds):
    return _ss2d(scan, x, project(x, x_proj_weight), dt_weight, dt_bias, A_logs, Ds)


def project(x: Tensor, x_proj_weight: Tensor) -> Tensor:
    """One product for the four directions, in map order: it reads four times less than one after the cross scan."""
    x_dbl = torch.matmul(x_proj_weight.flatten(0, 1), x.flatten(2))
    return x_dbl.unflatten(1, (4, -1)).unflatten(-1, x.shape[2:])


def cross_scan(maps: Tensor) -> Tensor:
    """(batch, 4, rows, height, width) to (batch, 4, rows, length): directions 0 and 2 by rows, 1 and 3 by columns. Walking
    2 and 3 backwards is left to the scan."""
    columns = maps.transpose(-1, -2)
    return torch.stack([(columns if k % 2 else maps)[:, k].flatten(-2) for k in range(4)], 1)


def replaced(scan_name: str, scan: Callable[[Problem], peers.Scan], *, compiled: bool = False) -> Implementation:
    """The unfused pipeline around `scan`, for operators that have one; compiled: by torch.compile, which makes one kernel of
    what stands before the scan and one of what stands after it."""

    def pointless(problem: Problem, training: bool) -> bool:
        return problem.op == "selective_scan"  # it is the scan itself

    def function(problem: Problem):
        run = unfused(scan(problem), problem.op)
        return torch.compile(run, fullgraph=True, dynamic=False) if compiled else run

    name = f"unfused{' compiled' * compiled} {scan_name}"
    return Implementation(name, REPLACED, of_torch(cache(function)), pointless=pointless, compiles=compiled)


def scan_flags(problem: Problem) -> tuple[bool, ...]:
    """Directions of the plain scan inside a problem's unfused form."""
    return {"bidirectional_scan": (False, True), "selective_scan": problem.flags}.get(
        problem.op, (False, False, True, True)
    )


# -- peers and yardsticks ----------------------------------------------------------------------------------------------


def of_peer(peer: peers.Peer) -> Implementation:
    """A peer's scan; for other operators with the pipeline of _bidirectional and _ss2d around it."""

    def function(problem: Problem):
        return unfused(peers.load(peer, problem, scan_flags(problem)), problem.op)

    return Implementation(peer.name, PEER, of_torch(function), peer.refuses, peer.estimate, compiles=peer.compiles)


def of_jax(name: str, how: str) -> Implementation:
    def bind(problem, inputs, d_out, training):
        import jax_peer

        return jax_peer.bind(problem, inputs, d_out, training, how)

    def refuses(problem: Problem, training: bool) -> str:
        return "" if problem.op == "selective_scan" and problem.dtype == "float32" else "only selective_scan in float32"

    def pointless(problem: Problem, training: bool) -> bool:
        return how == "loop" and problem.shape.state == 1  # the associative one is faster

    return Implementation(name, PEER, bind, refuses, pointless=pointless, compiles=True)


def _copy(problem: Problem, inputs, d_out, training: bool) -> Call:
    """Moves as many bytes as the operator must at least."""
    source = torch.zeros(
        problem.moved_bytes(training) // 2, dtype=torch.uint8, device=next(iter(inputs.values())).device
    )
    target = torch.zeros_like(source)
    return lambda: (target.copy_(source), None)


def _elementwise(function: Callable[..., Tensor], arity: int, fresh: bool):
    def bind(problem: Problem, inputs, d_out, training: bool) -> Call:
        first = next(iter(inputs.values()))
        arguments = [first] * arity
        if fresh:
            return lambda: (function(*arguments), None)
        target = torch.zeros_like(first)
        return lambda: (function(*arguments, out=target), None)

    return bind


def _training(problem: Problem, training: bool) -> bool:
    return training


COPY = "copy"
YARDSTICKS = (
    Implementation(COPY, YARDSTICK, _copy),
    Implementation("torch.exp", YARDSTICK, _elementwise(torch.exp, 1, True), pointless=_training),
    Implementation("torch.exp, out=", YARDSTICK, _elementwise(torch.exp, 1, False), pointless=_training),
    Implementation("torch.add", YARDSTICK, _elementwise(torch.add, 2, True), pointless=_training),
    Implementation("torch.add, out=", YARDSTICK, _elementwise(torch.add, 2, False), pointless=_training),
)


def for_tests_only(backend: str, device: str) -> bool:
    """Backends that are slow by design, timed only where named: Triton's kernels are interpreted on a CPU."""
    return backend in ("emulated", "reference") or (backend == "triton" and device == "cpu")


def registry(device: str | torch.device) -> tuple[dict[str, Implementation], dict[str, str]]:
    """All implementations that exist on this device, by name; and the peers that do not, with the reason."""
    kind = torch.device(device).type
    backends = [str(b) for b in dass_ops.available_backends(device)]
    found = [own(b) for b in backends]
    fast = [b for b in backends if not for_tests_only(b, kind)]
    for compiled in (False, True) if kind == "cuda" else (False,):
        found += [replaced(b, lambda p, b=b: own_scan(b, scan_flags(p)), compiled=compiled) for b in fast]
    missing = {}
    for peer in peers.PEERS:
        if reason := peer.unavailable(kind):
            missing[peer.name] = reason
        else:
            found.append(of_peer(peer))
    if kind == "cpu" and importlib.util.find_spec("jax") is not None:
        found += [of_jax("jax associative", "associative"), of_jax("jax loop", "loop")]
    else:
        missing["jax"] = "jax is not installed" if kind == "cpu" else "compared on a CPU only"
    found += YARDSTICKS
    return {i.name: i for i in found}, missing
