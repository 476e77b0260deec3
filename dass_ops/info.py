"""What was compiled, and what can run here and why not."""

import warnings

import torch

from . import loading
from .backends import Backend, availability, default_backend


def build_info() -> dict[str, object]:
    """What this package was compiled for and what runs here.

    Keys: `torch` (built for), `torch_running`, `cuda`, `cuda_architectures`, `no_cuda` (why the CUDA part was not built),
    `emulated`, `machine`, `compiler`, `flags`, `cpu_instruction_set` (in use; empty where the CPU part cannot be loaded).
    """
    compiled = loading.compiled_info()
    names = ("torch", "cuda", "cuda_architectures", "no_cuda", "emulated", "machine", "compiler", "flags")
    info: dict[str, object] = {name: getattr(compiled, name, "") for name in names}
    info["torch_running"] = torch.__version__
    info["cpu_instruction_set"] = cpu_instruction_set()
    return info


def cpu_instruction_set() -> str:
    """The instruction set that the CPU kernels use ("avx512", "avx2" or "scalar"); DASS_OPS_CPU forces one."""
    if loading.problem("_C") or not hasattr(torch.ops.dass_ops, "cpu_instruction_set"):
        return ""
    return torch.ops.dass_ops.cpu_instruction_set()


def backend_table() -> list[tuple[Backend, str, bool, str]]:
    """(backend, device type, whether it can run, why not) for every backend on the devices that this machine has."""
    devices = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
    rows = []
    for backend in Backend:
        states = [(device, availability(backend, device)) for device in devices]
        best = next((s for s in states if s[1].available), states[-1 if backend is Backend.CUDA else 0])
        if backend is Backend.CUDA and not torch.cuda.is_available():
            reason = loading.problem("_cuda") or "no CUDA device is visible"
            rows.append((backend, "cuda", False, reason))
        else:
            rows.append((backend, best[0], best[1].available, best[1].reason))
    return rows


def choice(device: str) -> str:
    """In words: the backend that runs tensors of the device type `device` where none is named, and why not a faster one."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the fallback, which is said here
            chosen = default_backend(device)
    except (ValueError, RuntimeError) as error:  # DASS_OPS_BACKEND
        return str(error)
    native = Backend.CUDA if device == "cuda" else Backend.CPU
    if chosen is native:
        return str(chosen)
    return f"{chosen} ({availability(native, device).reason or 'DASS_OPS_BACKEND says so'})"
