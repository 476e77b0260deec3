"""What is computed: the shapes, their inputs, and what each costs at least (elements, bytes, instructions).

One element is one update of one state: batch x channel x direction x step x state.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

FORWARD, TRAINING = "forward", "forward+backward"  # the two passes; training goes through autograd
# Multiples of nothing: the nearest prime below each length, and odd maps of about as many positions.
RAGGED = {8192: 8191, 2048: 2039, 512: 509, 128: 127, 64: 61}
RAGGED_MAPS = {8192: (31, 263), 2048: (15, 137), 512: (7, 73), 128: (3, 43), 64: (3, 19)}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}
RANDOM = 20240704  # seed of all inputs


@dataclass(frozen=True)
class Shape:
    """A layer. As a sequence: `channels` counts all directions; as a map: channels / 4 channels of height x width."""

    name: str
    channels: int
    length: int
    state: int
    directions: int  # consecutive equal shares of the channels, each with its own B and C; the second half is reversed
    height: int = 0
    rank: int = 0
    where: str = ""


STAGES = (  # DASS-small and DASS-medium share them; a clip of 10 s
    Shape("stage1", 384, 8192, 1, 4, 32, 6, "DASS stage 1"),
    Shape("stage2", 768, 2048, 1, 4, 16, 12, "DASS stage 2"),
    Shape("stage3", 1536, 512, 1, 4, 8, 24, "DASS stage 3"),
    Shape("stage4", 3072, 128, 1, 4, 4, 48, "DASS stage 4"),
)
MAMBA = Shape("mamba", 1536, 2048, 16, 1, where="a Mamba layer")
TINY = Shape("tiny", 16, 64, 1, 4, 4, 2, "for tests")
SHAPES = {s.name: s for s in (*STAGES, MAMBA, TINY)}

OPS = ("selective_scan", "bidirectional_scan", "ss2d", "ss2d_projected")


@dataclass(frozen=True)
class Problem:
    """One operator on one shape. `reverse`: "shape" (as the shape says), "none" or "all" of the channels. `channels_last`: a
    map (and its gradient) in the memory order that the model's convolutions leave."""

    op: str
    shape: Shape
    batch: int = 1
    dtype: str = "float32"
    ragged: bool = False
    reverse: str = "shape"
    channels_last: bool = False

    def __str__(self) -> str:
        named = [self.op, self.shape.name, f"batch {self.batch}", self.dtype]
        named += ["ragged"] * self.ragged + ["channels last"] * self.channels_last
        return ", ".join(named + [f"reverse {self.reverse}"] * (self.reverse != "shape"))

    @property
    def unsupported(self) -> str:
        """Why the operator has no such form; empty where it has."""
        if self.op.startswith("ss2d"):
            if not self.shape.height:
                return f"{self.shape.name} is a sequence, not a map"
            if self.reverse != "shape":
                return "a map has its four directions"
        elif self.channels_last:
            return "only a map has channels to be last"
        if self.op == "bidirectional_scan" and self.reverse != "shape":
            return "both directions are scanned"
        return ""

    @property
    def map_size(self) -> tuple[int, int]:
        """Height and width."""
        shape = self.shape
        return RAGGED_MAPS[shape.length] if self.ragged else (shape.height, shape.length // shape.height)

    @property
    def length(self) -> int:
        """Steps of one sequence."""
        if self.op.startswith("ss2d"):
            return math.prod(self.map_size)
        return RAGGED[self.shape.length] if self.ragged else self.shape.length

    @property
    def flags(self) -> tuple[bool, ...]:
        """Which of the equal shares of the channels are reversed."""
        if self.reverse != "shape":
            return (self.reverse == "all",) * self.shape.directions
        return tuple(2 * k >= self.shape.directions > 1 for k in range(self.shape.directions))

    @property
    def io(self) -> torch.dtype:
        return DTYPES[self.dtype]

    @property
    def elements(self) -> int:
        return self.batch * self.shape.channels * self.length * self.shape.state

    @property
    def inner_channels(self) -> int:
        """Channels of u, or of the map."""
        return self.shape.channels // {"selective_scan": 1, "bidirectional_scan": 2}.get(self.op, 4)

    def as_dict(self) -> dict[str, object]:
        return {
            "op": self.op,
            "shape": self.shape.name,
            "batch": self.batch,
            "channels": self.shape.channels,
            "length": self.length,
            "state": self.shape.state,
            "dtype": self.dtype,
            "ragged": self.ragged,
            "reverse": self.reverse,
            "channels_last": self.channels_last,
        }

    # -- inputs --------------------------------------------------------------------------------------------------------

    def inputs(self, device: str | torch.device) -> dict[str, Tensor]:
        """The operator's tensor arguments, by name, in the order of its signature. Step sizes as at initialisation:
        log-uniform in [1e-3, 0.1] after the softplus, and varying around that."""
        generator = torch.Generator().manual_seed(RANDOM)
        state = torch.float64 if self.io is torch.float64 else torch.float32

        def normal(*shape: int, scale: float = 1.0, dtype: torch.dtype = self.io) -> Tensor:
            return (scale * torch.randn(shape, generator=generator)).to(device, dtype)

        def step_bias(*shape: int) -> Tensor:
            step = torch.exp(torch.rand(shape, generator=generator) * math.log(100) + math.log(1e-3))
            return (step + torch.log(-torch.expm1(-step))).to(device, state)

        s, N, L, b = self.shape, self.shape.state, self.length, self.batch
        D = self.inner_channels
        rows = torch.arange(1, N + 1, dtype=state, device=device)
        if self.op == "selective_scan":
            return {
                "u": normal(b, D, L),
                "delta": normal(b, D, L, scale=0.5),
                "A": -rows.repeat(D, 1),
                "B": normal(b, s.directions, N, L),
                "C": normal(b, s.directions, N, L),
                "D": normal(D, dtype=state),
                "delta_bias": step_bias(D),
            }
        if self.op == "bidirectional_scan":
            return {
                "u": normal(b, D, L),
                "delta": normal(b, 2, D, L, scale=0.5),
                "A": -rows.repeat(2, D, 1),
                "B": normal(b, 2, N, L),
                "C": normal(b, 2, N, L),
                "D": normal(2, D, dtype=state),
                "delta_bias": step_bias(2, D),
            }
        (H, W), R = self.map_size, s.rank
        x = {"x": self._in_memory(normal(b, D, H, W))}
        if self.op == "ss2d":
            x["x_dbl"] = normal(b, 4, R + 2 * N, H, W)
        else:
            x["x_proj_weight"] = normal(4, R + 2 * N, D, scale=D**-0.5)
        return x | {
            "dt_weight": (normal(4, D, R, dtype=state) * 0.5 * R**-0.5),
            "dt_bias": step_bias(4, D),
            "A_logs": torch.log(rows).repeat(4 * D, 1),
            "Ds": normal(4 * D, dtype=state),
        }

    def d_out(self, device: str | torch.device) -> Tensor:
        """The gradient that arrives at the output."""
        shape: tuple[int, ...] = (self.batch, self.inner_channels, self.length)
        if self.op.startswith("ss2d"):
            shape = (*shape[:2], *self.map_size)
        generator = torch.Generator().manual_seed(RANDOM + 1)
        return self._in_memory(torch.randn(shape, generator=generator).to(device, self.io))

    def _in_memory(self, t: Tensor) -> Tensor:
        return t.contiguous(memory_format=torch.channels_last) if self.channels_last else t

    # -- what it costs at least ----------------------------------------------------------------------------------------

    def tensor_bytes(self, training: bool) -> int:
        """Of the tensors that the call must make: the output; in training also a gradient of every input."""
        return self._sequence + training * self._inputs

    def scan_bytes(self, training: bool) -> int:
        """Least traffic of the scan: each input read once and the output written; a backward reads the inputs and the
        gradient of the output, and writes the gradients of the inputs."""
        inputs = self._inputs
        if self.op == "ss2d_projected":
            inputs += self._low_rank - self._projection
        return inputs + self._sequence + training * (2 * inputs + self._sequence)

    def moved_bytes(self, training: bool) -> int:
        """Least traffic of the operator: that of the scan, and of the projection where it owns one: one product forward
        (x to x_dbl), two backward (the gradient of x, added to what the scan left there, and that of the weight)."""
        products = 0
        if self.op == "ss2d_projected":
            products = self._sequence + self._low_rank + training * (3 * self._sequence + 2 * self._low_rank)
        return self.scan_bytes(training) + products

    @property
    def _item(self) -> int:
        return torch.empty((), dtype=self.io).element_size()

    @property
    def _sequence(self) -> int:
        """Bytes of u, or x, or the output."""
        return self.batch * self.inner_channels * self.length * self._item

    @property
    def _low_rank(self) -> int:
        """Bytes of x_dbl."""
        return self.batch * 4 * (self.shape.rank + 2 * self.shape.state) * self.length * self._item

    @property
    def _projection(self) -> int:
        """Bytes of the projection's weight."""
        return 4 * (self.shape.rank + 2 * self.shape.state) * self.inner_channels * self._item

    @property
    def _inputs(self) -> int:
        s = self.shape
        if self.op.startswith("ss2d"):
            parameters = 4 * s.channels * (s.rank + 1 + s.state + 1)
            return self._sequence + parameters + (self._low_rank if self.op == "ss2d" else self._projection)
        directions = 2 if self.op == "bidirectional_scan" else s.directions
        delta = self._sequence * (2 if self.op == "bidirectional_scan" else 1)
        B_and_C = 2 * self.batch * directions * s.state * self.length * self._item
        return self._sequence + delta + B_and_C + 4 * s.channels * (s.state + 2)

    def state_bytes(self) -> int:
        """Of all the states, had they to be kept for the backward."""
        return self.elements * (8 if self.io is torch.float64 else 4)


def floor_seconds(problem: Problem, training: bool, *, bytes_per_second: float, multiply_adds: float | None) -> dict:
    """The least time that memory and arithmetic allow, by the counts below and the given rates (of the same run).

    Keys: `memory_s`, `arithmetic_s` (None where the rate is unknown), `floor_s`, the larger.
    """
    memory = problem.moved_bytes(training) / bytes_per_second
    arithmetic = None
    if multiply_adds:
        arithmetic = multiply_add_slots(problem, training) / multiply_adds
    return {"memory_s": memory, "arithmetic_s": arithmetic, "floor_s": max(memory, arithmetic or 0.0)}


def multiply_add_slots(problem: Problem, training: bool) -> float:
    """Slots of the multiply-add pipes that the arithmetic takes, counted in a hand-vectorised float32 inner loop: softplus,
    its derivative and exp by polynomials.

    Forward, per channel and step: 10.7 (softplus 6, by tables), and 7.8 per state. Backward: 22, and 16 per state. The
    low-rank step sizes of a map and the projection: one per product (three in training).
    """
    s = problem.shape
    steps = problem.batch * s.channels * problem.length
    slots = steps * (10.7 + 7.8 * s.state) + training * steps * (22 + 16 * s.state)
    if problem.op.startswith("ss2d"):
        products = steps * s.rank
        if problem.op == "ss2d_projected":
            products += steps * (s.rank + 2 * s.state)
        slots += products * (3 if training else 1)
    return slots


def gpu_floor_seconds(problem: Problem, training: bool, *, bytes_per_second: float, rates) -> dict:
    """The same for a GPU: the sum over kernels of the largest of memory, special functions and instruction issue.

    `rates`: machine.GpuRates, or None. Special functions per channel, direction and step: forward 1 + N, one more where
    the step sizes are made in the kernel; backward 3 + N. Issue slots are estimated for the fused map with N = 1 only, its
    low-rank product on tensor cores: 27 and 58. The projection is one product forward and two backward, taken as bound by
    memory. Keys: `memory_s`, `arithmetic_s` (special functions or issue, the larger), `floor_s`.
    """
    N = problem.shape.state
    fused = problem.op.startswith("ss2d")
    steps = problem.batch * problem.shape.channels * problem.length
    moved = [problem.scan_bytes(False)] + [problem.scan_bytes(True) - problem.scan_bytes(False)] * training
    products = problem.moved_bytes(training) - sum(moved)
    special = [1 + N + fused] + [3 + N] * training
    slots = ([27] + [58] * training) if fused and N == 1 else [0] * len(moved)
    memory = [m / bytes_per_second for m in moved]
    if rates is None:
        arithmetic = [0.0] * len(moved)
    else:
        arithmetic = [steps * max(f / rates.special, i / rates.issue) for f, i in zip(special, slots, strict=True)]
    floor = products / bytes_per_second + sum(map(max, memory, arithmetic))
    return {
        "memory_s": (products + sum(moved)) / bytes_per_second,
        "arithmetic_s": sum(arithmetic) if rates else None,
        "floor_s": floor,
    }
