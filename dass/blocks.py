"""The parts of a DASS: patch embedding, block, stage.

Every map between the parts is (batch, height, width, channels), channels last in memory: LayerNorm and the linear
layers (the published 1x1 convolutions) then work on contiguous rows, and the 3x3 convolutions read the same memory
through a permuted view. Height is frequency, width is time. Module names are those of the published checkpoints.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from dass.pieces import is_long, pieces
from dass.ss2d import SS2D
from dass_ops import Backend

MLP_RATIO = 4


class MapConv(nn.Conv2d):
    """A 3x3 convolution of stride 2 on (batch, height, width, channels): ceil(height / 2), ceil(width / 2)."""

    def __init__(self, channels: int, out_channels: int):
        super().__init__(channels, out_channels, kernel_size=3, stride=2, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


class SpectrogramConv(nn.Conv2d):
    """The first convolution: (batch, frames, mel bins) to (batch, mel bins / 2, frames / 2, channels)."""

    def __init__(self, channels: int):
        super().__init__(1, channels, kernel_size=3, stride=2, padding=1)

    def forward(self, fbank: Tensor) -> Tensor:
        # One channel fits any memory format; the weight's strides say that the result is to be channels last.
        weight = self.weight.reshape(-1, 3, 3, 1).permute(0, 3, 1, 2)
        x = fbank.transpose(1, 2).unsqueeze(1).contiguous()
        return F.conv2d(x, weight, self.bias, self.stride, self.padding).permute(0, 2, 3, 1)


class StreamNorm(nn.LayerNorm):
    """LayerNorm that begins a residual stream: its output has the parameters' dtype, also under autocast."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).to(self.weight.dtype)


class PatchEmbeddings(nn.Module):
    """(batch, frames, mel bins) to a map of a quarter of each: (batch, mel bins / 4, frames / 4, channels)."""

    def __init__(self, channels: int):
        super().__init__()
        self.projection = nn.Sequential(
            SpectrogramConv(channels // 2),
            nn.LayerNorm(channels // 2),
            nn.GELU(),
            MapConv(channels // 2, channels),
            StreamNorm(channels),
        )

    def forward(self, fbank: Tensor) -> Tensor:
        return self.projection(fbank)


class Downsample(nn.Module):
    """(batch, height, width, channels) to (batch, height / 2, width / 2, out channels), rounded up."""

    def __init__(self, channels: int, out_channels: int):
        super().__init__()
        self.down = MapConv(channels, out_channels)
        self.norm = StreamNorm(out_channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.down(x))


class Mlp(nn.Module):
    """Linear, GELU, linear at every position; four times the width in between."""

    def __init__(self, channels: int):
        super().__init__()
        self.fc1 = nn.Linear(channels, MLP_RATIO * channels)
        self.act = nn.GELU()
        self.fc2 = nn.Linear(MLP_RATIO * channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.act(self.fc1(x)))


class StochasticDepth(nn.Module):
    """While training, drops a branch for an example with probability `rate`, else scales it by 1 / (1 - rate).

    Huang et al., arXiv 1603.09382. Example = entry of the first axis.
    """

    def __init__(self, rate: float):
        super().__init__()
        self.rate = rate

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.rate == 0.0:
            return x
        keep = 1.0 - self.rate
        mask = x.new_empty(x.shape[0], *[1] * (x.ndim - 1)).bernoulli_(keep)
        return x * (mask / keep)

    def extra_repr(self) -> str:
        return f"rate={self.rate:.3g}"


class Block(nn.Module):
    """x + scan(norm(x)), then x + mlp(norm(x)); each branch under stochastic depth.

    `own`: x is nobody else's, and may be overwritten where no gradient is wanted.
    """

    def __init__(self, channels: int, *, drop_path: float = 0.0, backend: Backend | str | None = None):
        super().__init__()
        self.norm = nn.LayerNorm(channels)
        self.op = SS2D(channels, backend=backend)
        self.drop_path = StochasticDepth(drop_path)
        self.norm2 = nn.LayerNorm(channels)
        self.mlp = Mlp(channels)

    def forward(self, x: Tensor, own: bool = False) -> Tensor:
        if not is_long(self, x):
            x = x + self.drop_path(self.op(x, self.norm))
            return x + self.drop_path(self.mlp(self.norm2(x)))
        branch = self.op(x, self.norm)
        x = x.add_(branch) if own else x + branch
        for part in pieces(x):
            part += self.mlp(self.norm2(part))
        return x


class Stage(nn.Module):
    """Blocks of one width, then the way to the next stage (`downsample`; Identity after the last).

    Where no gradient is wanted, a long input may be overwritten.
    `gradient_checkpointing`: keep only the blocks' inputs for backward and compute the rest again.
    """

    def __init__(
        self,
        channels: int,
        drop_paths: list[float],  # one a block
        next_channels: int | None,
        *,
        backend: Backend | str | None = None,
    ):
        super().__init__()
        self.blocks = nn.ModuleList(Block(channels, drop_path=rate, backend=backend) for rate in drop_paths)
        self.downsample = Downsample(channels, next_channels) if next_channels else nn.Identity()
        self.gradient_checkpointing = False

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            if self.gradient_checkpointing and torch.is_grad_enabled():
                x = checkpoint(block, x, use_reentrant=False)
            else:
                x = block(x, own=True)
        return self.downsample(x)
