"""Time and peak memory of one pass of a model, a limit that turns a lack of memory into an error, and honest forecasts."""

from __future__ import annotations

import ctypes
import gc
import math
import platform
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

BEYOND = 5  # times a length that is the only one seen, farther than which no time is promised
STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


@dataclass(frozen=True)
class Measured:
    """What a call gave, its `seconds`, and the `memory` it took at its peak beyond what was there before [bytes]."""

    result: torch.Tensor
    seconds: float
    memory: float


def measure(call: Callable[[], torch.Tensor], device: torch.device) -> Measured:
    """Runs `call` once. The memory is NaN where the system does not tell (a CPU other than under Linux)."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        start = time.perf_counter()
        result = call()
        torch.cuda.synchronize(device)
        return Measured(result, time.perf_counter() - start, torch.cuda.max_memory_allocated(device) - before)
    _trim()
    measurable = _reset_peak()
    before = _status("VmRSS")
    start = time.perf_counter()
    result = call()
    seconds = time.perf_counter() - start
    return Measured(result, seconds, max(_status("VmHWM") - before, 0.0) if measurable else math.nan)


def release_memory() -> None:
    """Frees what nothing refers to any more: after a model, after a failure. Costs about a tenth of a second."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    _trim()


def _trim() -> None:
    """Gives freed memory back to the system, so that a measurement does not count it as there before."""
    try:
        ctypes.CDLL(None).malloc_trim(0)
    except (OSError, AttributeError):  # a C library other than glibc keeps less back
        pass


@contextmanager
def limited_memory(bytes_more: float | None) -> Iterator[None]:
    """Lets this process allocate at most so many bytes more; what goes beyond raises instead of bringing the machine
    down (Linux would otherwise kill the process). None: no limit."""
    if bytes_more is None or platform.system() != "Linux":
        yield
        return
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
    wanted = int(_status("VmData") + bytes_more)
    resource.setrlimit(resource.RLIMIT_DATA, (wanted if hard == resource.RLIM_INFINITY else min(wanted, hard), hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, (soft, hard))


def available_memory() -> float | None:
    """Bytes that could be allocated now without swapping; None where the system does not tell."""
    available = None
    if match := re.search(r"MemAvailable:\s+(\d+) kB", _read(Path("/proc/meminfo"))):
        available = int(match[1]) * 1024.0
    group = Path("/sys/fs/cgroup")  # a container's own limit, if it has one
    limit, used = _read(group / "memory.max").strip(), _read(group / "memory.current").strip()
    if limit.isdigit() and used.isdigit():
        room = float(int(limit) - int(used))
        available = room if available is None else min(available, room)
    return available


def describe_machine(device: torch.device) -> dict[str, str]:
    """The machine and the software, for the report."""
    processor = re.search(r"model name\s*:\s*(.+)", _read(Path("/proc/cpuinfo")))
    memory = re.search(r"MemTotal:\s+(\d+) kB", _read(Path("/proc/meminfo")))
    facts = {
        "processor": processor[1] if processor else platform.processor() or platform.machine(),
        "cores used": str(torch.get_num_threads()),
        "memory": f"{int(memory[1]) / 1048576:.1f} GiB" if memory else "unknown",
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU",
        "system": f"{platform.system()} {platform.release()}",
        "Python": platform.python_version(),
        "PyTorch": torch.__version__,
        "commit": _commit(),
    }
    from dass_ops import default_backend

    return {**facts, "scan backend": str(getattr(default_backend(device), "value", default_backend(device)))}


class Forecast:
    """How long what is left will take: time per pass as a power of the length, fitted for each model to what was seen.

    One length seen: time in proportion to it, but not for much longer ones, of which a short one tells nothing. Several:
    the exponent between 1 and 2 that fits best the last two.
    """

    def __init__(self) -> None:
        self.seen: dict[str, dict[int, list[float]]] = {}

    def add(self, model: str, frames: int, seconds: float) -> None:
        """A pass that was measured."""
        self.seen.setdefault(model, {}).setdefault(frames, []).append(seconds)

    def knows(self, model: str, below: int) -> bool:
        """Whether a pass of this model of fewer frames was seen."""
        return any(frames < below for frames in self.seen.get(model, ()))

    def seconds(self, model: str, frames: int) -> float | None:
        """Expected time of a pass; None as long as nothing is known of any model that would tell."""
        lengths = self.seen.get(model)
        if not lengths:
            known = [value for other in self.seen if (value := self.seconds(other, frames)) is not None]
            return float(np.mean(known)) if known else None
        typical = {length: float(np.median(times)) for length, times in lengths.items()}
        if frames in typical:
            return typical[frames]
        if len(typical) == 1 and frames > BEYOND * min(typical):
            return None
        near = sorted(typical, key=lambda length: abs(math.log(length / frames)))[:2]
        exponent = 1.0
        if len(near) == 2 and min(typical[near[0]], typical[near[1]]) > 0:
            exponent = math.log(typical[near[1]] / typical[near[0]]) / math.log(near[1] / near[0])
        return typical[near[0]] * (frames / near[0]) ** min(max(exponent, 1.0), 2.0)


def describe_seconds(seconds: float) -> str:
    """0.12 s, 45 s, 4.3 min, 12 min, 3.4 h."""
    if seconds < 90:
        return f"{seconds:.2g} s" if seconds < 10 else f"{seconds:.0f} s"
    if seconds < 600:
        return f"{seconds / 60:.1f} min"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def describe_length(seconds: float) -> str:
    """Length of an input: needle, 50 s, 10 min, 2.5 h."""
    if seconds == 0:
        return "needle"
    for unit, size in (("h", 3600), ("min", 60)):
        if seconds >= size and (seconds / size) % 0.5 == 0:
            return f"{seconds / size:g} {unit}"
    return f"{seconds:g} s"


def _commit() -> str:
    import subprocess

    try:
        folder = Path(__file__).parent
        done = subprocess.run(
            ["git", "rev-parse", "--short=12", "HEAD"], cwd=folder, capture_output=True, text=True, timeout=10
        )
    except (OSError, subprocess.TimeoutExpired):
        return "unknown"
    return done.stdout.strip() or "unknown"


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def _reset_peak() -> bool:
    try:
        CLEAR.write_text("5")  # sets the peak of the resident memory to what is resident now (proc(5))
    except OSError:
        return False
    return _status("VmHWM") > 0


def _status(key: str) -> float:
    match = re.search(rf"^{key}:\s+(\d+) kB", _read(STATUS), re.MULTILINE)
    return int(match[1]) * 1024.0 if match else 0.0
