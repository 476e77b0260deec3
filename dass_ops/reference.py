"""The oracle: the scans of SCAN.md in plain PyTorch, one step at a time, in any floating dtype, differentiable by autograd.

Every backend is tested against these functions in float64. They take the operators' own layout (csrc/schema.cpp), they are
written to be checked by eye, and they are slow: a Python loop over the length.
"""

import torch
from torch import Tensor
from torch.nn.functional import softplus

SS2D_REVERSE = (False, False, True, True)  # directions 2 and 3 are 0 and 1 walked from the end


def scan(
    u: Tensor,  # (batch, K | 1, D, L)
    delta: Tensor,  # (batch, K, D, L)
    A: Tensor,  # (K, D, N)
    B: Tensor,  # (batch, K, G, N, L) | (1, K, D, N, 1)
    C: Tensor,  # as B, with a G of its own
    D: Tensor | None = None,  # (K, D)
    z: Tensor | None = None,  # (batch, K, D, L)
    delta_bias: Tensor | None = None,  # (K, D)
    initial_state: Tensor | None = None,  # (batch, K, D, N)
    *,
    delta_softplus: bool = False,
    reverse: tuple[bool, ...] = (False,),
) -> tuple[Tensor, Tensor]:  # out like u, last_state (batch, K, D, N)
    """Equations (1) to (6) of SCAN.md. All tensors of one dtype, in which everything is computed."""
    batch, directions, channels, length = delta.shape
    state = A.shape[-1]
    u_all = u.expand(delta.shape)
    dt = delta if delta_bias is None else delta + delta_bias[None, :, :, None]
    if delta_softplus:
        dt = softplus(dt)
    h = delta.new_zeros(batch, directions, channels, state) if initial_state is None else initial_state
    to_channels = [M.repeat_interleave(channels // M.shape[2], dim=2) for M in (B, C)]
    B_all, C_all = (M.expand(batch, directions, channels, state, length) for M in to_channels)
    # Step s of a reversed direction stands at position L-1-s: turned around here, and y turned back below.
    u_s, dt_s, B_s, C_s = (_turn(t, reverse) for t in (u_all, dt, B_all, C_all))
    steps = []
    for s in range(length):
        a = torch.exp(dt_s[..., s, None] * A)
        h = a * h + (dt_s[..., s] * u_s[..., s])[..., None] * B_s[..., s]
        steps.append((C_s[..., s] * h).sum(-1))
    y = torch.stack(steps, -1) if steps else dt_s * u_s  # empty, and still part of the graph
    y = _turn(y, reverse)
    if D is not None:
        y = y + D[None, :, :, None] * u_all
    if u.shape[1] < directions:
        y = y.sum(1, keepdim=True)
    if z is not None:
        y = y * torch.nn.functional.silu(z)
    return y, h


def _turn(t: Tensor, reverse: tuple[bool, ...]) -> Tensor:
    """Turns around the last axis of the directions (axis 1) that are reversed."""
    if not any(reverse):
        return t
    return torch.stack([t[:, k].flip(-1) if r else t[:, k] for k, r in enumerate(reverse)], 1)


def ss2d(
    x: Tensor,  # (batch, D, H, W)
    x_dbl: Tensor,  # (batch, 4, R + 2N, H, W)
    dt_weight: Tensor,  # (4, D, R)
    dt_bias: Tensor,  # (4, D)
    A_logs: Tensor,  # (4D, N)
    Ds: Tensor,  # (4D)
) -> Tensor:  # y (batch, D, H, W)
    """Equations (12) to (15) of SCAN.md: the map as four sequences, scanned, put back and summed."""
    batch, channels, height, width = x.shape
    state, rank = A_logs.shape[1], dt_weight.shape[2]
    rows = _sequences(x.unsqueeze(1).expand(-1, 4, -1, -1, -1))  # (batch, 4, D, L), orders 0 and 1, not yet reversed
    low_rank, B, C = _sequences(x_dbl).split([rank, state, state], 2)
    delta = torch.einsum("kdr,bkrl->bkdl", dt_weight, low_rank)
    y, _ = scan(
        rows,
        delta,
        -torch.exp(A_logs).view(4, channels, state),
        B.unsqueeze(2),
        C.unsqueeze(2),
        Ds.view(4, channels),
        delta_bias=dt_bias,
        delta_softplus=True,
        reverse=SS2D_REVERSE,
    )
    by_rows = (y[:, 0] + y[:, 2]).unflatten(-1, (height, width))
    by_columns = (y[:, 1] + y[:, 3]).unflatten(-1, (width, height)).transpose(-1, -2)
    return by_rows + by_columns


def _sequences(maps: Tensor) -> Tensor:
    """(batch, 4, rows, H, W) to (batch, 4, rows, H*W): directions 0 and 2 row by row, 1 and 3 column by column."""
    by_rows = maps.flatten(-2)
    by_columns = maps.transpose(-1, -2).flatten(-2)
    return torch.stack([by_rows[:, 0], by_columns[:, 1], by_rows[:, 2], by_columns[:, 3]], 1)
