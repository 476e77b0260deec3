"""Which implementation runs an operator: what exists, what can run here and why not, and how one is chosen."""

import enum
import importlib.util
import os
import warnings
from dataclasses import dataclass
from functools import cache

import torch

from . import loading
from .registration import ensure


class Backend(str, enum.Enum):
    """An implementation of the operators. `str(backend)` is the name that `backend=` and DASS_OPS_BACKEND take."""

    CPU = "cpu"  # C++, vectorised, threaded
    CUDA = "cuda"  # CUDA C++
    TRITON = "triton"  # Triton; on CPU tensors only interpreted (TRITON_INTERPRET=1)
    EMULATED = "emulated"  # the CUDA kernels run as host C++, for tests
    REFERENCE = "reference"  # plain PyTorch, one step at a time, for tests and where nothing else runs

    def __str__(self) -> str:
        return self.value


# Suffix of the operators' names, and the steps between two saved states. Chunk lengths belong to the kernels' design; the
# backward of a backend reads what its own forward saved.
SUFFIX = {Backend.CPU: "", Backend.CUDA: "", Backend.TRITON: "_triton", Backend.EMULATED: "_emulated"}
CHUNK = {Backend.CPU: 256, Backend.CUDA: 256, Backend.TRITON: 128, Backend.EMULATED: 256}
# The same where a channel has more than one state.
STATES_CHUNK = {**CHUNK, Backend.CPU: 64}
# Both, by device type, of the backends whose operators have no suffix.
NATIVE_CHUNKS = {str(b): (CHUNK[b], STATES_CHUNK[b]) for b, suffix in SUFFIX.items() if not suffix}
# The same for maps. The CUDA kernels find the states inside a map anew: one chunk, entered by zeros.
WHOLE_MAP = 1 << 40
MAP_CHUNK = {**CHUNK, Backend.CUDA: WHOLE_MAP, Backend.EMULATED: WHOLE_MAP}
NATIVE_MAP_CHUNKS = {str(b): MAP_CHUNK[b] for b, suffix in SUFFIX.items() if not suffix}

BUILD = "pip install -e . (or pip install --no-build-isolation .)"


@dataclass(frozen=True)
class Availability:
    """Whether a backend can run on a kind of device, and if not, why not and what would help."""

    available: bool
    reason: str = ""  # empty where available


def availability(backend: Backend, device: str) -> Availability:
    """Whether `backend` can run on tensors of the device type `device` ("cpu", "cuda", ...) in this process."""
    if backend is Backend.REFERENCE:
        return Availability(True)
    if backend in (Backend.CPU, Backend.EMULATED) and device != "cpu":
        return Availability(False, f"it runs on CPU tensors, these are on {device!r}")
    if backend is Backend.CPU:
        return Availability(not (problem := loading.problem("_C")), problem)
    if backend is Backend.EMULATED:
        return Availability(not (problem := loading.problem("_emulated")), problem)
    if backend is Backend.CUDA:
        if device != "cuda":
            return Availability(False, f"it runs on CUDA tensors, these are on {device!r}")
        return Availability(not (problem := loading.problem("_cuda")), problem)
    return _triton_availability(device)


def _triton_availability(device: str) -> Availability:
    if importlib.util.find_spec("triton") is None:
        return Availability(False, "triton is not installed (pip install triton)")
    spec = importlib.util.find_spec("dass_ops.triton_kernels")
    if spec is None or spec.origin is None:  # absent, or a folder without the package in it
        return Availability(False, f"dass_ops.triton_kernels is not installed ({BUILD})")
    if schema := loading.problem("_C"):
        return Availability(False, schema)  # the operators' schemas live there
    if device == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        return Availability(False, "Triton runs CPU tensors only interpreted (set TRITON_INTERPRET=1 before import)")
    return Availability(True)


def available_backends(device: str | torch.device | None = None) -> tuple[Backend, ...]:
    """The backends that can run here, on tensors of `device` (None: of any device that this machine has), fastest first.

    `python -m dass_ops` prints the same with the reasons of those that cannot.
    """
    if device is None:
        devices = ["cuda", "cpu"] if torch.cuda.is_available() else ["cpu"]
    else:
        devices = [torch.device(device).type]
    order = (Backend.CUDA, Backend.CPU, Backend.TRITON, Backend.EMULATED, Backend.REFERENCE)
    return tuple(b for b in order if any(availability(b, d).available for d in devices))


def default_backend(device: str | torch.device = "cpu") -> Backend:
    """The backend that runs tensors of `device` where none is named: DASS_OPS_BACKEND, else the fastest that can."""
    return _resolve(torch.device(device).type, os.environ.get("DASS_OPS_BACKEND") or None)


def resolve(device: str, backend: Backend | str | None) -> Backend:
    """The backend for tensors of the device type `device`, as asked for, its operators defined; ValueError or RuntimeError
    where it cannot be. torch.compile takes the answer as a constant."""
    found = _resolve(device, str(backend) if backend else os.environ.get("DASS_OPS_BACKEND") or None)
    if found is not Backend.REFERENCE:
        ensure(SUFFIX[found])
    return found


# What torch.compiler.assume_constant_result(resolve) sets; that function would import Dynamo, and Triton with it, here.
resolve._dynamo_marked_constant = True


@cache
def _resolve(device: str, name: str | None) -> Backend:
    if name is not None:
        try:
            backend = Backend(name)
        except ValueError:
            names = ", ".join(str(b) for b in Backend)
            raise ValueError(f"backend (or DASS_OPS_BACKEND) is {name!r}; expected one of {names}.") from None
        if not (state := availability(backend, device)).available:
            raise RuntimeError(
                f"The backend {name!r} cannot run: {state.reason}. "
                f"Here can: {', '.join(map(str, available_backends(device)))}."
            )
        return backend
    native = Backend.CUDA if device == "cuda" else Backend.CPU
    state = availability(native, device)
    if state.available:
        return native
    if device != "cpu" and availability(Backend.TRITON, device).available:
        return Backend.TRITON
    warnings.warn(
        f"dass_ops falls back to its slow PyTorch reference for {device!r} tensors (a Python loop over the length), because "
        f"{state.reason or 'no native kernels exist for this device'}. To build the kernels: {BUILD}. "
        "python -m dass_ops says more; backend='reference' silences this.",
        RuntimeWarning,
        stacklevel=4,
    )
    return Backend.REFERENCE
