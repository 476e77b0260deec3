"""Block sizes: plain functions of shapes and of the device's size. What they choose changes speed, never what is computed;
the same shapes on the same kind of device get the same plan, so results repeat bit by bit."""

from contextlib import nullcontext
from functools import cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .primitives import INTERPRETED
from .tiles import ANY_COLUMNS, COLUMN_TILE, ROWS


class Plan(NamedTuple):
    """How a kernel is cut up."""

    channels: int  # of a program, a power of two
    chunk: int  # steps between two states that are carried
    tile: int  # steps of a tile: the power of two that holds a chunk
    warps: int

    def chunks(self, length: int) -> int:
        return -(-length // self.chunk)

    def ragged(self, channels: int, length: int) -> bool:
        """Whether some block of channels or some tile is not full."""
        return channels % self.channels != 0 or length % self.tile != 0 or self.chunk != self.tile


CHUNK = 128  # steps of a tile that a warp holds in its registers, four to a lane


def power_of_two(n: int) -> int:
    """The smallest power of two that is at least n."""
    return 1 << max(n - 1, 0).bit_length()


def scan_plan(
    sequences: int, unit: int, length: int, chunk: int, multiprocessors: int, least: int = 1, most: int = 8
) -> Plan:
    """For `sequences` = batch * directions * channels one-dimensional scans.

    Blocks of channels stay within a `unit` of consecutive channels that share B and C. They get smaller, down to `least`,
    where there would not be two programs for each multiprocessor. `chunk` 0: the kernels' own choice."""
    chunk = min(chunk or CHUNK, power_of_two(length))
    tile = max(power_of_two(chunk), 32)  # a step to a lane; with fewer, Triton 3.6 fails to compile the gradient
    channels = min(most, max(power_of_two(unit), least))
    while channels > least and sequences // channels < 2 * multiprocessors:
        channels //= 2
    warps = min(max(channels * tile // 256, 1), 16)  # 8 numbers of a tile to a thread
    return Plan(channels, chunk, tile, warps)


def multiplied(rank: int, io: torch.dtype) -> bool:
    """Whether a low-rank product is done number by number instead of by tl.dot, which pads the rank to a power of two from 16
    on, wants 16 channels, needs its result moved to another thread layout and, in float32, three products for one. Where
    the two cross was read off the compiled code; 16-bit rows cost a conversion for each channel that reads them."""
    return rank <= (12 if io.itemsize == 2 else 24)


def map_plan(sequences: int, length: int, rank: int, io: torch.dtype, chunk: int, multiprocessors: int) -> Plan:
    """For the map form with `sequences` = batch * channels and low-rank rows of dtype `io`."""
    least, most = (4, 8) if multiplied(rank, io) else (16, 16)
    return scan_plan(sequences, 16, length, chunk, multiprocessors, least, most)


def placing(columns: bool, height: int, plan: Plan) -> dict:
    """How map kernels place steps on the map (tiles.py), by name of the kernels' argument."""
    if not columns:
        place = ROWS
    elif height == power_of_two(height) <= plan.tile == plan.chunk:
        place = COLUMN_TILE
    else:
        place = ANY_COLUMNS
    return {"PLACING": place.value, "HEIGHT": height if place is COLUMN_TILE else 0}


def index_type(plan: Plan, extent: int, *strides: int):
    """The type for offsets inside a program: rows of a block at `strides`, and in each `extent` elements."""
    furthest = (plan.channels - 1) * max(strides, default=0) + extent + plan.tile
    return tl.int32 if furthest < 2**31 else tl.int64


def dot_precision(dtype: torch.dtype) -> str:
    """Products with the accuracy of float32 where the tensor cores would only have that of TF32."""
    nvidia = not INTERPRETED and triton.runtime.driver.active.get_current_target().backend == "cuda"
    return "tf32x3" if nvidia and dtype == torch.float32 else "ieee"


def device_size(device: torch.device) -> int:
    """Multiprocessors of the device; interpreted, where programs run one after the other, 1."""
    if INTERPRETED:
        return 1
    return _multiprocessors(device.index or 0)


@cache
def _multiprocessors(index: int) -> int:
    return triton.runtime.driver.active.utils.get_device_properties(index)["multiprocessor_count"]


def on_device(t: Tensor):
    """Triton launches on the current device: a context that makes it that of `t`."""
    if t.device.type == "cpu":
        return nullcontext()
    return torch.get_device_module(t.device).device(t.device)
