"""One state of a tile: what the scan and its map form have in common.

Tiles are (channels, steps), parameters (channels, 1) or, B and C, (1, steps); `carried` is (channels, states), what the walk
has at the tile's edge.
"""

import triton.language as tl

from .primitives import column, exp_near_zero, inline, scan_adjoint, scan_states, step_of, total, with_column


@inline
def state_forward(
    dt, x, A, B, carried, n, n_index, step, TILE: tl.constexpr, REVERSE: tl.constexpr, ACCURATE: tl.constexpr
):
    """h of equations (3), (4) with x = dt u, and the states carried on."""
    ENTRY: tl.constexpr = TILE - 1 if REVERSE else 0
    EXIT: tl.constexpr = 0 if REVERSE else TILE - 1
    a = exp_near_zero(dt * A, ACCURATE)
    h = scan_states(a, x * B + tl.where(step == ENTRY, a * column(carried, n_index, n), 0.0), REVERSE)
    return h, with_column(carried, n_index, n, step_of(h, step, EXIT))


@inline
def state_backward(
    dt, u, x, g, A, B, C, h_in, carried, n, n_index, step, TILE: tl.constexpr, REVERSE: tl.constexpr,
    ACCURATE: tl.constexpr,
):  # fmt: skip
    """h, lam, this state's part of d_dt, its d_A, and the mu carried on; equation (8). h_in (channels, 1) is the state that
    enters the tile, `carried` the mu that leave it."""
    # The forward walk enters the tile at ENTRY and leaves it at EXIT; the backward one goes the other way.
    ENTRY: tl.constexpr = TILE - 1 if REVERSE else 0
    EXIT: tl.constexpr = 0 if REVERSE else TILE - 1
    a = exp_near_zero(dt * A, ACCURATE)
    w = x * B
    h = scan_states(a, w + tl.where(step == ENTRY, a * h_in, 0.0), REVERSE)
    a_h = h - w  # a h_prev
    lam = scan_adjoint(C * g + tl.where(step == EXIT, column(carried, n_index, n), 0.0), a, not REVERSE)
    mu = with_column(carried, n_index, n, step_of(a * lam, step, ENTRY))
    return h, lam, lam * (A * a_h + B * u), total(lam * dt * a_h, 1)[:, None], mu
