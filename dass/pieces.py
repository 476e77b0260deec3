"""Maps of hours: where no gradient is wanted, work on single positions goes through them piece by piece.

What lies between two steps of such work is then never there as a whole, which decides how long an input may be: 2.5 hours
make a map of 2.8 GB in the first stage of DASS-small, and an MLP's inner one would be four times that.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

PIECE, GPU_PIECE = 1 << 20, 1 << 25  # values of a map in a piece; what has no more is not cut


def is_long(module: nn.Module, x: Tensor) -> bool:
    """Whether a module should go through a map (..., channels) in pieces."""
    return not (module.training or torch.is_grad_enabled() or torch.compiler.is_compiling()) and x.numel() > _values(x)


def pieces(x: Tensor) -> tuple[Tensor, ...]:
    """Views (positions, channels) of a contiguous map (..., channels); to change them is to change it."""
    return x.view(-1, x.shape[-1]).split(max(_values(x) // x.shape[-1], 1))


def by_pieces(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """`function` (positions, channels) -> (positions, other channels) of a whole map (..., channels)."""
    done, result = 0, None
    for part in pieces(x.contiguous()):
        found = function(part)
        if result is None:
            result = found.new_empty(x.numel() // x.shape[-1], found.shape[-1])
        result[done : done + len(found)] = found
        done += len(found)
    return result.view(*x.shape[:-1], -1)


def _values(x: Tensor) -> int:
    return PIECE if x.device.type == "cpu" else GPU_PIECE
