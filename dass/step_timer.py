"""Where a step's time goes: seconds by phase, and the table of `--profile`."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch


class StepTimer:
    """Sums of the seconds spent in named phases.

    With `exact` the device is waited for at the end of each phase, so that asynchronous work is counted where it was
    started; without, only `phase("data")` is meaningful on a GPU, and nothing is slowed down.
    """

    def __init__(self, device: torch.device, exact: bool = False):
        self.device, self.exact = device, exact
        self.seconds: dict[str, float] = {}
        self.clips = 0
        self._start = time.perf_counter()

    def reset(self) -> None:
        """Begin anew."""
        self.seconds.clear()
        self.clips = 0
        self._start = time.perf_counter()

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Count what happens within under `name`."""
        start = time.perf_counter()
        try:
            yield
        finally:
            if self.exact and self.device.type == "cuda":
                torch.cuda.synchronize(self.device)
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start

    @property
    def elapsed(self) -> float:
        """Seconds since the start or the last reset."""
        return time.perf_counter() - self._start

    def figures(self) -> dict[str, float]:
        """`clips_per_second`, and `data_share`: the part of the time that training waited for the loader, 0 to 1."""
        elapsed = max(self.elapsed, 1e-9)
        return {"clips_per_second": self.clips / elapsed, "data_share": self.seconds.get("data", 0.0) / elapsed}

    def table(self, steps: int) -> str:
        """Milliseconds per step and share of each phase, most first."""
        elapsed = self.elapsed
        rest = elapsed - sum(self.seconds.values())
        rows = sorted([*self.seconds.items(), ("other", rest)], key=lambda row: -row[1])
        lines = [f"{'phase':<14}{'ms/step':>10}{'share':>9}"]
        lines += [f"{name:<14}{1000 * value / steps:>10.2f}{value / elapsed:>9.1%}" for name, value in rows]
        lines.append(f"{'step':<14}{1000 * elapsed / steps:>10.2f}{1:>9.0%}   {self.clips / elapsed:.1f} clips/s")
        return "\n".join(lines)
