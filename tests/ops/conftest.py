"""The backend fixture of the one suite: every operator test runs on every backend that can run here."""

import pytest
import torch

from dass_ops.backends import Backend, availability

NATIVE = [Backend.CPU, Backend.CUDA, Backend.TRITON, Backend.EMULATED]


def device_of(backend: Backend) -> str:
    if backend is Backend.CUDA or (backend is Backend.TRITON and torch.cuda.is_available()):
        return "cuda"
    return "cpu"


def interpreted(backend: Backend) -> bool:
    """Whether kernels run operation by operation in Python: shapes must be small."""
    return backend is Backend.TRITON and device_of(backend) == "cpu"


@pytest.fixture(params=NATIVE, ids=str)
def backend(request, poison) -> Backend:
    return require(request.param)


@pytest.fixture(params=[b for b in NATIVE if b is not Backend.CUDA], ids=str)
def backend_with_suffix(request, poison) -> Backend:
    """One backend for each family of registered operators; CPU and CUDA share theirs."""
    return require(request.param)


def require(backend: Backend) -> Backend:
    if backend is Backend.CUDA and not torch.cuda.is_available():
        pytest.skip("cuda: no CUDA device is visible")
    state = availability(backend, device_of(backend))
    if not state.available:
        pytest.skip(f"{backend}: {state.reason}")
    return backend
