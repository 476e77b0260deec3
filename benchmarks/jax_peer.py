"""JAX's scans, compiled, on the same inputs: `lax.associative_scan` and `lax.scan`.

CPU only, on all cores (JAX has no setting for its threads). Imported only where jax is installed.
"""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import torch
from problems import Problem


def bind(
    problem: Problem, inputs: dict[str, torch.Tensor], d_out: torch.Tensor | None, training: bool, how: str
) -> Callable:
    """A call without arguments, (out, gradients or None) as JAX arrays. `how`: "associative" or "loop"."""
    arrays = tuple(jnp.asarray(t.numpy()) for t in inputs.values())
    scan = _compiled(problem.flags, how, training)
    if not training:
        return lambda: (jax.block_until_ready(scan(*arrays)), None)
    cotangent = jnp.asarray(d_out.numpy())
    return lambda: jax.block_until_ready(scan(cotangent, *arrays))


_functions: dict = {}


def _compiled(flags: Sequence[bool], how: str, training: bool) -> Callable:
    key = (tuple(flags), how, training)
    if key not in _functions:

        def scan(*arrays):
            return _scan(*arrays, flags=key[0], how=how)

        def with_gradients(cotangent, *arrays):
            out, pullback = jax.vjp(scan, *arrays)
            return out, pullback(cotangent)

        _functions[key] = jax.jit(with_gradients if training else scan)
    return _functions[key]


def _scan(u, delta, A, B, C, D, delta_bias, *, flags, how):
    def turn(t):
        shares = jnp.split(t, len(flags), axis=1) if len(flags) > 1 else [t]
        return jnp.concatenate([s[..., ::-1] if r else s for s, r in zip(shares, flags, strict=True)], 1)

    skip = D[:, None] * u
    u, delta, B, C = map(turn, (u, delta, B, C))
    share = u.shape[1] // B.shape[1]
    dt = jax.nn.softplus(delta + delta_bias[:, None])
    B, C = (jnp.repeat(t, share, axis=1) for t in (B, C))  # (batch, channels, state, length)
    a = jnp.exp(dt[:, :, None] * A[:, :, None])
    w = (dt * u)[:, :, None] * B
    if how == "associative":
        _, h = jax.lax.associative_scan(lambda f, g: (g[0] * f[0], g[0] * f[1] + g[1]), (a, w), axis=3)
        y = (h * C).sum(2)
    else:

        def step(h, at):
            h = at[0] * h + at[1]
            return h, (h * at[2]).sum(2)

        first = tuple(jnp.moveaxis(t, 3, 0) for t in (a, w, C))
        y = jnp.moveaxis(jax.lax.scan(step, jnp.zeros_like(a[..., 0]), first)[1], 0, 2)
    return turn(y) + skip
