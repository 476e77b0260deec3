"""Measuring: one call at a time, from cold caches or warm ones, round robin over everything that is to be compared.

A machine's speed drifts by tens of percent within minutes. So candidates are never timed one after the other: each round
calls each of them once, and medians of the same rounds are compared.
"""

import ctypes
import gc
import os
import resource
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch

SLOW = 1.0  # seconds; a candidate whose call takes longer is content with a single sample
WARMING = 0.005  # seconds; before a warm call


@dataclass(frozen=True)
class Sample:
    """One timed call. `page_faults`: pages that the kernel had to map meanwhile (CPU only)."""

    seconds: float
    page_faults: int = 0


@dataclass(frozen=True)
class Statistics:
    """Of the samples of one candidate; times in seconds."""

    median: float
    p10: float
    p90: float
    least: float
    count: int
    page_faults: int  # median

    @classmethod
    def of(cls, samples: Sequence[Sample]) -> "Statistics":
        seconds = sorted(s.seconds for s in samples)
        last = len(seconds) - 1
        return cls(
            median=statistics.median(seconds),
            p10=seconds[round(0.1 * last)],
            p90=seconds[round(0.9 * last)],
            least=seconds[0],
            count=len(seconds),
            page_faults=int(statistics.median(s.page_faults for s in samples)),
        )

    def as_dict(self) -> dict[str, float]:
        return asdict(self)


class Clock:
    """Times single calls on one device.

    `cold`: before each call the caches are filled with something else: on a CPU by reading twice the last level's size,
    which leaves nothing to be written back during the call; on a GPU by writing, which also keeps the queue busy while the
    host issues the call, so that short kernels are timed and not their launch.

    `before` (CPU) is called just before the clock starts. Cold caches have lost the code as well: a call that does the same
    on other data brings it back, as the layers of a model do for each other. Warm: the same call, which leaves its data too,
    again and again for WARMING seconds, so that the timed one is one of a loop's.
    """

    def __init__(self, device: str | torch.device, *, cold: bool = True):
        self.device = torch.device(device)
        self.cold = cold
        size = 1 << 28 if self.device.type == "cuda" else 2 * last_level_cache()
        self._filler = torch.zeros(size // 4, dtype=torch.float32, device=self.device) if cold else None

    def once(self, call: Callable[[], object], before: Callable[[], object] | None = None) -> Sample:
        """Calls once. What the call returns is freed after the clock has stopped."""
        if self.device.type == "cuda":
            return self._once_cuda(call)
        if self.cold:
            self._filler.sum()
        if before is not None:
            self._prepare(before)
        faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        start = time.perf_counter()
        result = call()
        seconds = time.perf_counter() - start
        faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - faults
        del result
        return Sample(seconds, faults)

    def _prepare(self, before: Callable[[], object]) -> None:
        end = time.perf_counter() + (0 if self.cold else WARMING)
        before()
        while time.perf_counter() < end:
            before()

    def _once_cuda(self, call: Callable[[], object]) -> Sample:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize(self.device)
        if self.cold:
            for _ in range(4):
                self._filler.zero_()
        start.record()
        result = call()
        end.record()
        end.synchronize()
        del result
        return Sample(start.elapsed_time(end) / 1e3)


def quiet(longest: float = 0.1) -> None:
    """Waits until this process's threads sleep, `longest` seconds at most.

    After a call OpenMP's threads wait for the next at full speed, for about 10 ms. Another process, or another library's pool
    of threads in this one, meanwhile has one core less.
    """
    end = time.perf_counter() + longest
    while time.perf_counter() < end:
        busy = time.process_time()
        time.sleep(0.002)
        if time.process_time() - busy < 0.0005:
            return


@dataclass
class Candidate:
    """Something to be timed: `once` makes one timed call."""

    name: str
    once: Callable[[], Sample]
    samples: list[Sample] = field(default_factory=list)

    def statistics(self) -> Statistics:
        return Statistics.of(self.samples)


def round_robin(
    candidates: Sequence[Candidate],
    seconds: float,
    *,
    least: int = 3,
    most: int = 300,
    now: Callable[[], float] = time.perf_counter,
) -> None:
    """Fills the candidates' `samples`, in rounds, for about `seconds` in all (of the clock `now`).

    Every candidate has an equal share of the time. One whose calls are long is left out of rounds, evenly over the whole
    time, where it is ahead of its share; but each gets `least` samples, or one where a call takes longer than SLOW seconds,
    and none more than `most`.
    """
    share = seconds / max(1, len(candidates))
    spent = [0.0] * len(candidates)
    begin = now()

    def call(i: int) -> None:
        start = now()
        candidates[i].samples.append(candidates[i].once())
        spent[i] += now() - start

    def enough(i: int) -> bool:
        samples = candidates[i].samples
        return len(samples) >= least or (bool(samples) and samples[-1].seconds > SLOW)

    def due(i: int) -> bool:
        elapsed = (now() - begin) / seconds
        if elapsed >= 1:
            return not enough(i)
        return spent[i] <= share * elapsed and len(candidates[i].samples) < most

    with _no_garbage_collection():
        for i in range(len(candidates)):
            call(i)
        while True:
            turns = len(spent)
            for i in range(len(candidates)):
                if due(i):
                    call(i)
                    turns -= 1
            if turns < len(spent):
                continue
            waiting = [i for i in range(len(candidates)) if len(candidates[i].samples) < most]
            if now() - begin >= seconds or not waiting:
                break
            call(min(waiting, key=lambda i: spent[i]))  # all are ahead of their share: the time is not used up


@contextmanager
def _no_garbage_collection():
    enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


# -- memory ------------------------------------------------------------------------------------------------------------


def peak_memory(call: Callable[[], object], device: str | torch.device) -> tuple[object, int | None]:
    """Calls once; what it returned, and by how many bytes the memory in use grew at most during the call.

    CUDA: of torch's allocator. CPU: resident memory of the whole process, whoever allocated it, so kernels' own buffers
    and other libraries' memory count; free memory is handed back to the system first, so that its reuse counts too. None
    where the system does not tell (not Linux). Exact to about 0.3 MB.
    """
    device = torch.device(device)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        result = call()
        torch.cuda.synchronize(device)
        return result, torch.cuda.max_memory_allocated(device) - before
    gc.collect()
    try:
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark of the resident set
        before = _status("VmRSS")
    except (OSError, AttributeError):
        return call(), None
    result = call()
    return result, max(0, _status("VmHWM") - before)


def _status(name: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name + ":"):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {name}")


def saved_for_backward(call: Callable[[], object], inputs: Iterable[torch.Tensor]) -> tuple[object, int]:
    """Calls once; what it returned, and how many bytes autograd kept between forward and backward, beyond the inputs.

    Memory that several saved tensors share counts once.
    """
    known = {t.untyped_storage().data_ptr() for t in inputs}
    saved: dict[int, int] = {}

    def pack(t: torch.Tensor) -> torch.Tensor:
        storage = t.untyped_storage()
        if storage.data_ptr() not in known:
            saved[storage.data_ptr()] = storage.nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        result = call()
    return result, sum(saved.values())


def last_level_cache() -> int:
    """Bytes of the largest cache of the first core; 64 MiB where the system does not say."""
    sizes = []
    for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        text = path.read_text().strip()
        scale = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}.get(text[-1:], 1)
        sizes.append(int(text.rstrip("KMG")) * scale)
    return min(max(sizes, default=64 << 20), 512 << 20)


def available_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
