"""What nvcc makes of the kernels, without a GPU: nothing spills to local memory."""

import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
sys.path.insert(0, str(ROOT / "csrc"))

import resource_report as report  # noqa: E402

# What DASS (one state) and Mamba (16 states, the general kernels) run.
KERNELS = {
    "scan": ("scan_forward_kernel", "scan_backward_kernel", "scan_adjoint_kernel", "carry_kernel", "sum_parts_kernel"),
    "ss2d": ("ss2d_forward_kernel", "ss2d_backward_kernel", "ss2d_summary_kernel", "ss2d_sum_slabs_kernel"),
}

PTXAS = """\
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function '_Z3oneIfEvv' for 'sm_90'
ptxas info    : Function properties for _Z3oneIfEvv
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 26 registers, used 1 barriers, 4096 bytes smem
ptxas info    : Compile time = 5.000 ms
ptxas info    : Compiling entry function '_Z3twoIfEvv' for 'sm_90'
ptxas info    : Function properties for _Z3twoIfEvv
    24 bytes stack frame, 20 bytes spill stores, 28 bytes spill loads
ptxas info    : Used 128 registers, used 0 barriers, 24 bytes cumulative stack size
"""
USAGE = """\
Fatbin elf code:
================
arch = sm_80
code version = [1,8]

Resource usage:
 Common:
  GLOBAL:0
 Function _Z3oneIfEvv:
  REG:40 STACK:0 SHARED:1024 LOCAL:0 CONSTANT[0]:928 TEXTURE:0 SURFACE:0 SAMPLER:0
 Function _Z3twoIfEvv:
  REG:96 STACK:8 SHARED:0 LOCAL:4 CONSTANT[0]:928 TEXTURE:0 SURFACE:0 SAMPLER:0
"""


def test_reports_are_read():
    one, two = report.parse_ptxas(PTXAS)
    assert (one.arch, one.registers, one.stack, one.shared) == ("sm_90", 26, 0, 4096)
    assert (two.arch, two.registers, two.stack, two.shared) == ("sm_90", 128, 24, 0)
    assert "one" in one.name and "SPILLS" in report.table([one, two]).splitlines()[2]
    one, two = report.parse_resource_usage(USAGE)
    assert (one.arch, one.registers, one.stack, one.shared) == ("sm_80", 40, 0, 1024)
    assert (two.registers, two.stack) == (96, 12)


def check(kernels, families):
    shown = report.table(kernels)
    print(shown)
    for family in families:
        for name in KERNELS[family]:
            assert any(name in k.name for k in kernels), f"no {name} in\n{shown}"
    spilling = [k for k in kernels if k.stack and not k.may_spill]
    assert not spilling, f"registers spill:\n{report.table(spilling)}"


def test_the_built_kernels_do_not_spill():
    libraries = sorted((ROOT / "dass_ops").glob("_cuda*.so"))
    if not libraries:
        pytest.skip("dass_ops._cuda was not built (nvcc and a CUDA build of torch are needed)")
    if report.cuobjdump() is None:
        pytest.skip("no cuobjdump: it comes with the CUDA toolkit and with Triton")
    check(report.built(libraries[0]), KERNELS)


@pytest.mark.slow
@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", list(KERNELS))
def test_nvcc_spills_nothing(family, dtype, arch, tmp_path):
    if report.cuda_home() is None:
        pytest.skip("no nvcc: set CUDA_HOME")
    check(report.compiled(ROOT / f"csrc/cuda/{family}_{dtype}.cu", arch, tmp_path), [family])
