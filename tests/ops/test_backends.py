"""How a backend is chosen, forced, refused and reported."""

import os
import subprocess
import sys

import pytest
import torch

import dass_ops
from dass_ops import Backend, available_backends, build_info, default_backend

from .cases import ScanCase, scan_inputs


def python(code, **environment):
    return subprocess.run(
        [sys.executable, *code], capture_output=True, text=True, env={**os.environ, **environment}, timeout=300
    )


def needs_cpu():
    if Backend.CPU not in available_backends("cpu"):
        pytest.skip("cpu: the native backend is not built")


def test_defaults():
    needs_cpu()
    assert default_backend("cpu") is Backend.CPU
    assert available_backends("cpu")[0] is Backend.CPU
    assert available_backends("cpu")[-1] is Backend.REFERENCE
    info = build_info()
    assert info["torch"] == torch.__version__
    assert info["cpu_instruction_set"] in ("avx512", "avx2", "scalar")


def test_importing_starts_nothing():
    code = "import sys, torch, dass_ops; assert 'triton' not in sys.modules; assert not torch.cuda.is_initialized()"
    result = python(["-c", code])
    assert result.returncode == 0, result.stderr


def test_environment_forces_a_backend():
    code = "import dass_ops; print(dass_ops.default_backend('cpu'))"
    assert python(["-c", code], DASS_OPS_BACKEND="reference").stdout.strip() == "reference"
    wrong = python(["-c", code], DASS_OPS_BACKEND="fast")
    assert wrong.returncode and "DASS_OPS_BACKEND) is 'fast'; expected one of cpu, cuda" in wrong.stderr


def test_a_slow_fallback_is_announced_once(monkeypatch):
    from dass_ops import backends, functional, loading

    monkeypatch.setattr(loading, "problem", lambda module: f"dass_ops.{module} was not built")
    monkeypatch.setattr(functional, "_plain_scan", lambda *arguments: None)
    monkeypatch.delenv("DASS_OPS_BACKEND", raising=False)
    backends._resolve.cache_clear()
    inputs = scan_inputs(ScanCase(length=3), torch.float32)
    try:
        with pytest.warns(RuntimeWarning, match="slow PyTorch reference.*_C was not built.*pip install") as caught:
            first = dass_ops.selective_scan(**inputs)
            second = dass_ops.selective_scan(**inputs)
        assert len(caught) == 1
        assert torch.equal(first, second)
        with pytest.raises(RuntimeError, match="'cpu' cannot run: dass_ops._C was not built. Here can: reference"):
            dass_ops.selective_scan(**inputs, backend="cpu")
    finally:
        backends._resolve.cache_clear()


@pytest.mark.parametrize("device", ["cuda", "xpu"])
def test_triton_is_chosen_where_there_are_no_kernels_for_the_device(monkeypatch, device):
    """A GPU without the CUDA part, and one of another vendor: no device is needed to choose."""
    needs_cpu()
    pytest.importorskip("triton")
    from dass_ops import backends, info, loading

    problem = loading.problem
    monkeypatch.setattr(loading, "problem", lambda module: "it was not built" if module == "_cuda" else problem(module))
    monkeypatch.delenv("DASS_OPS_BACKEND", raising=False)
    backends._resolve.cache_clear()
    try:
        assert default_backend(device) is Backend.TRITON
        assert available_backends(device) == (Backend.TRITON, Backend.REFERENCE)
        reason = "it was not built" if device == "cuda" else "it runs on CPU tensors, these are on 'xpu'"
        assert info.choice(device) == f"triton ({reason})"
        monkeypatch.setenv("DASS_OPS_BACKEND", "reference")
        assert info.choice(device).startswith("reference (")
        monkeypatch.setattr(loading, "problem", lambda module: "nothing was built")
        monkeypatch.setenv("DASS_OPS_BACKEND", "triton")
        assert "'triton' cannot run: nothing was built" in info.choice("cuda")
    finally:
        backends._resolve.cache_clear()


def test_without_triton_a_gpu_gets_the_reference_and_is_told(monkeypatch):
    from dass_ops import backends

    monkeypatch.setattr(backends.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(backends.loading, "problem", lambda module: f"{module} was not built")
    monkeypatch.delenv("DASS_OPS_BACKEND", raising=False)
    backends._resolve.cache_clear()
    try:
        with pytest.warns(RuntimeWarning, match="slow PyTorch reference for 'cuda' tensors.*_cuda was not built"):
            assert default_backend("cuda") is Backend.REFERENCE
        assert "triton is not installed" in backends.availability(Backend.TRITON, "cuda").reason
    finally:
        backends._resolve.cache_clear()


def test_the_command_checks_itself():
    result = python(["-m", "dass_ops"])
    assert result.returncode == 0, result.stdout + result.stderr
    assert f"cpu tensors  run on: {default_backend('cpu')}" in result.stdout
    lines = {line.split()[0]: line for line in result.stdout.splitlines() if line.startswith("  ")}
    assert "relative error" in lines["reference"]
    assert set(lines) >= {str(b) for b in Backend}
    for backend in Backend:
        assert " ok " in lines[str(backend)] or "cannot run:" in lines[str(backend)]


def test_a_build_for_another_torch_is_refused(monkeypatch):
    needs_cpu()
    from dass_ops import loading

    monkeypatch.setattr(torch, "__version__", "9.9.9")
    problem = loading.problem.__wrapped__("_C")
    assert "compiled for torch 2." in problem and "this is torch 9.9.9" in problem and "rebuild" in problem
