"""The state-space operator of a DASS block: a map scanned along four paths, between two linear layers.

Published as "v05_noz" (VMamba, arXiv 2401.10166; DASS, arXiv 2407.04082): no gate, one state per channel, the inner
width equal to the outer. The four-direction scan and its projection are one operator, `dass_ops.ss2d_projected`.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dass.pieces import by_pieces, is_long
from dass_ops import Backend, ss2d_projected

DIRECTIONS = 4
STATE = 1  # N: states per channel
CHANNELS_PER_RANK = 16  # R = width / 16
DT_RANGE = (1e-3, 0.1)  # softplus(dt bias) at the start, log-uniform
DT_FLOOR = 1e-4


def dt_rank(channels: int) -> int:
    """R: the rank of the map from a channel vector to the step sizes."""
    return math.ceil(channels / CHANNELS_PER_RANK)


class SS2D(nn.Module):
    """(batch, height, width, channels) to the same: linear, depthwise 3x3, SiLU, scan, LayerNorm, linear.

    `backend`: which implementation runs the scan (None: the fastest that can); may be set later.
    """

    def __init__(self, channels: int, *, backend: Backend | str | None = None):
        super().__init__()
        self.channels, self.backend = channels, backend
        rank = dt_rank(channels)
        self.in_proj = nn.Linear(channels, channels, bias=False)
        self.conv2d = nn.Conv2d(channels, channels, 3, padding=1, groups=channels, bias=False)
        self.x_proj_weight = nn.Parameter(torch.empty(DIRECTIONS, rank + 2 * STATE, channels))  # dt rows, B, C
        self.dt_projs_weight = nn.Parameter(torch.empty(DIRECTIONS, channels, rank))
        self.dt_projs_bias = nn.Parameter(torch.empty(DIRECTIONS, channels))
        self.A_logs = nn.Parameter(torch.empty(DIRECTIONS * channels, STATE))
        self.Ds = nn.Parameter(torch.empty(DIRECTIONS * channels))
        self.out_norm = nn.LayerNorm(channels)
        self.out_proj = nn.Linear(channels, channels, bias=False)
        self.reset_scan_parameters()

    @torch.no_grad()
    def reset_scan_parameters(self) -> None:
        """The start that keeps a step size between 1e-3 and 0.1 (Mamba, arXiv 2312.00752, section 3.6)."""
        rank = self.dt_projs_weight.shape[-1]
        nn.init.uniform_(self.x_proj_weight, -(self.channels**-0.5), self.channels**-0.5)
        nn.init.uniform_(self.dt_projs_weight, -(rank**-0.5), rank**-0.5)
        low, high = (math.log(dt) for dt in DT_RANGE)
        dt = torch.empty_like(self.dt_projs_bias).uniform_(low, high).exp_().clamp_(min=DT_FLOOR)
        self.dt_projs_bias.copy_(dt + torch.log(-torch.expm1(-dt)))  # softplus of this is dt
        self.A_logs.copy_(torch.arange(1, STATE + 1, device=self.A_logs.device).log().expand_as(self.A_logs))
        self.Ds.fill_(1.0)

    def forward(self, x: Tensor, norm: nn.Module | None = None) -> Tensor:
        """`norm` is applied to x before everything else; x is left as it is."""
        long = is_long(self, x)

        def enter(part: Tensor) -> Tensor:
            return self.in_proj(part if norm is None else norm(part))

        def leave(part: Tensor) -> Tensor:
            return self.out_proj(self.out_norm(part))

        # One name for every map from here on: what is done with is freed.
        h = by_pieces(enter, x) if long else enter(x)
        h = self.conv2d(h.permute(0, 3, 1, 2))  # (batch, channels, height, width), in memory as it came: channels last
        h = F.silu(h, inplace=not torch.is_grad_enabled())
        h = ss2d_projected(
            h,
            self.x_proj_weight,
            self.dt_projs_weight,
            self.dt_projs_bias,
            self.A_logs,
            self.Ds,
            out_dtype=self.out_norm.weight.dtype,  # under autocast the sum of the directions is not rounded
            backend=self.backend,
        )
        h = h.permute(0, 2, 3, 1)
        return by_pieces(leave, h) if long else leave(h)

    def extra_repr(self) -> str:
        return f"channels={self.channels}, dt_rank={self.dt_projs_weight.shape[-1]}, backend={self.backend}"
