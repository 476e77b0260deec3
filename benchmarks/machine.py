"""What a benchmark ran on: processor, GPU, versions, commit; and the rates that bound it, measured in the same run."""

import ctypes
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import torch
from timing import available_cores, last_level_cache

HERE = Path(__file__).resolve().parent
PEERS = ("mamba_ssm", "mambapy", "flash-linear-attention", "accelerated-scan", "jax", "selective_scan")


def describe(device: str | torch.device) -> dict[str, object]:
    """Machine, versions and commit, for the JSON of every benchmark."""
    device = torch.device(device)
    import dass_ops

    described = {
        "processor": _processor(),
        "cores": available_cores(),
        "threads": torch.get_num_threads(),
        "last_level_cache_bytes": last_level_cache(),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "dass_ops": _plain(dass_ops.build_info()),
        "backends": [str(b) for b in dass_ops.available_backends(device)],
        "peers": {name: version for name in PEERS if (version := _version(name))},
        "commit": _commit(),
        "command": " ".join([Path(sys.executable).name, *sys.argv]),
        "environment": {k: v for k, v in os.environ.items() if k.startswith(("DASS_OPS_", "OMP_", "MALLOC_"))},
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        described["gpu"] = properties.name
        described["gpu_memory_bytes"] = properties.total_memory
        described["gpu_multiprocessors"] = properties.multi_processor_count
        described["cuda"] = torch.version.cuda
    return described


def _plain(value: object) -> object:
    """`value` with only what JSON knows."""
    if isinstance(value, dict):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    return value if value is None or isinstance(value, (bool, int, float, str)) else str(value)


def _processor() -> str:
    """The processor's name, and its most telling instruction sets."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    fields = dict(reversed([tuple(p.strip() for p in line.split(":", 1)) for line in lines if ":" in line]))
    flags = set(fields.get("flags", "").split())
    sets = [name for name in ("avx2", "fma", "avx512f", "avx512_bf16", "amx_bf16") if name in flags]
    return f"{fields.get('model name', platform.machine())} ({', '.join(sets) or 'no vector extensions listed'})"


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return ""


def _commit() -> str:
    """The checkout's commit, with "+changes" where files differ from it; empty outside a checkout."""

    def git(*arguments: str) -> str:
        return subprocess.run(["git", "-C", HERE, *arguments], capture_output=True, text=True, check=True).stdout

    try:
        return git("rev-parse", "HEAD").strip() + ("+changes" if git("status", "--porcelain", "-uno") else "")
    except (OSError, subprocess.CalledProcessError):
        return ""


# -- rates -------------------------------------------------------------------------------------------------------------


class MultiplyAdds:
    """Runs float32 multiply-adds at the processor's full rate (fma_peak.c): timed among the candidates, it is the arithmetic
    floor of a CPU under the very conditions of the run. RuntimeError where it cannot be built."""

    STEPS = (
        4_000_000  # a thread; some 13 ms, beside which the time does not count that torch's threads still wait for work
    )

    def __init__(self, threads: int):
        self.threads = threads
        compiler = shutil.which(os.environ.get("CC", "cc")) or shutil.which("gcc")
        if compiler is None:
            raise RuntimeError("no C compiler to build fma_peak.c with")
        with tempfile.TemporaryDirectory() as folder:
            library = Path(folder) / "fma_peak.so"
            flags = ["-O3", "-march=native", "-ffp-contract=fast", "-shared", "-fPIC", "-pthread"]
            command = [compiler, *flags, str(HERE / "fma_peak.c"), "-o", str(library)]
            built = subprocess.run(command, capture_output=True, text=True)
            if built.returncode:
                raise RuntimeError(f"fma_peak.c does not compile: {built.stderr.strip()[-200:]}")
            self._function = ctypes.CDLL(str(library)).multiply_adds
        self._function.restype, self._function.argtypes = ctypes.c_double, [ctypes.c_int, ctypes.c_long]
        self.count = self()

    def __call__(self) -> float:
        return self._function(self.threads, self.STEPS)


@dataclass(frozen=True)
class GpuRates:
    """What a GPU does at best, a second, by its clock and number of multiprocessors (kernel guides: 128 lanes of float32
    arithmetic, 16 of special functions a multiprocessor). Memory has no entry: a copy is timed among the candidates."""

    multiply_adds: float
    special: float  # exp2, log2, reciprocal
    issue: float  # instructions times lanes

    @classmethod
    def of(cls, device: str | torch.device) -> "GpuRates | None":
        properties = torch.cuda.get_device_properties(device)
        clock = getattr(properties, "clock_rate", 0) * 1e3  # kHz
        if not clock:
            return None  # this torch does not tell
        lanes = properties.multi_processor_count * clock
        return cls(multiply_adds=128 * lanes, special=16 * lanes, issue=128 * lanes)
