"""The emulation of CUDA on the host finds the mistakes it is there for, and the kernels hold in it under every plan.

What the emulation can and cannot see: csrc/README.md.
"""

import ctypes
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from dass_ops import bidirectional_scan, selective_scan, ss2d
from dass_ops.backends import Backend

from .cases import MapCase, ScanCase, check_map, check_scan, map_inputs, run_map, run_scan, scan_inputs
from .conftest import require

ROOT = Path(__file__).parent.parent.parent
ORDERS = ("forward", "reverse")


@pytest.fixture
def emulated(poison) -> Backend:
    return require(Backend.EMULATED)


@pytest.fixture(params=ORDERS)
def order(request, monkeypatch) -> str:
    """Of the fibers that stand for threads."""
    monkeypatch.setenv("DASS_OPS_EMULATION_ORDER", request.param)
    return request.param


# -- the emulation itself ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run_kernel(tmp_path_factory):
    """run_kernel(name, threads, shared floats) -> (output, "" or what went wrong), for a kernel of emulation_kernels.cpp."""
    compiler = os.environ.get("CXX", shutil.which("c++") or shutil.which("g++") or "")
    if not compiler:
        pytest.skip("no C++ compiler")
    library = tmp_path_factory.mktemp("emulation") / "kernels.so"
    sources = [Path(__file__).parent / "emulation_kernels.cpp", ROOT / "csrc/emulation/cuda_emulation.cpp"]
    flags = ["-O1", "-std=c++17", "-fPIC", "-shared", "-fvisibility=hidden", f"-I{ROOT / 'csrc'}"]
    subprocess.run([*compiler.split(), *flags, *map(str, sources), "-o", str(library)], check=True)
    function = ctypes.CDLL(str(library)).run
    function.restype = ctypes.c_char_p
    function.argtypes = [ctypes.c_char_p, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_size_t]

    def run(name, threads=96, shared=96):
        given, out = torch.arange(128, dtype=torch.float32), torch.full((128,), float("nan"))
        problem = function(name.encode(), given.data_ptr(), out.data_ptr(), threads, 4 * shared)
        return out, problem.decode()

    return run


def test_a_right_kernel_computes(run_kernel, order):
    out, problem = run_kernel("block_scan")
    assert not problem
    assert torch.equal(out[:96], torch.arange(96.0).cumsum(0)) and out[96:].isnan().all()


def test_shuffles(run_kernel, order):
    out, problem = run_kernel("shuffles", threads=32)
    assert not problem
    lanes = torch.arange(32)
    expected = [(lanes + 1).clamp(max=31), (lanes - 1).clamp(min=0), lanes ^ 5, lanes // 8 * 8 + 3]
    assert torch.equal(out.reshape(4, 32), torch.stack(expected).float())


@pytest.mark.parametrize("name", ["neighbour_of_next_warp", "neighbour_in_warp", "buffer_reused"])
def test_a_missing_barrier_shows_in_one_of_the_orders(run_kernel, name, monkeypatch):
    results = {}
    for which in ("", " without a barrier"):
        for order in ORDERS:
            monkeypatch.setenv("DASS_OPS_EMULATION_ORDER", order)
            out, problem = run_kernel(name + which)
            assert not problem
            results[which, order] = out[:96]
    right = results["", "forward"]
    assert not right.isnan().any() and torch.equal(right, results["", "reverse"])
    assert not all(torch.equal(right, results[" without a barrier", order]) for order in ORDERS)


def test_shared_memory_that_nobody_wrote_is_nan(run_kernel, order):
    out, _ = run_kernel("reads_what_nobody_wrote", shared=97)
    assert out[:96].isnan().all()


@pytest.mark.parametrize(
    "name, message",
    [
        (
            "shuffle_of_half_a_warp",
            "divergent warp in block (0, 0, 0): thread 0 at __shfl_xor_sync, thread 16 at the end",
        ),
        ("barrier_of_one_warp", "divergent block in block (0, 0, 0): thread 0 at __syncthreads, thread 32 at the end"),
        ("throws", "thread 5 gave up"),
    ],
)
def test_threads_that_part_are_an_error(run_kernel, name, message):
    out, problem = run_kernel(name)
    assert message in problem
    assert run_kernel("block_scan")[1] == ""  # and the next launch is whole again


def test_address_sanitizer_sees_shared_memory(tmp_path):
    compiler = shutil.which("g++")
    found = (
        compiler and subprocess.run([compiler, "-print-file-name=libasan.so"], capture_output=True, text=True).stdout
    )
    if not found or not Path(found.strip()).is_absolute():
        pytest.skip("no g++ with AddressSanitizer")
    library = tmp_path / "kernels.so"
    sources = [Path(__file__).parent / "emulation_kernels.cpp", ROOT / "csrc/emulation/cuda_emulation.cpp"]
    flags = ["-O1", "-std=c++17", "-fPIC", "-shared", "-fsanitize=address", f"-I{ROOT / 'csrc'}"]
    subprocess.run([compiler, *flags, *map(str, sources), "-o", str(library)], check=True)
    code = f"""
import ctypes
run = ctypes.CDLL({str(library)!r}).run
run.restype = ctypes.c_char_p
run.argtypes = [ctypes.c_char_p, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_size_t]
memory = [(ctypes.c_float * 128)(), (ctypes.c_float * 128)()]
for name in (b"block_scan", b"writes_out_of_bounds"):
    assert run(name, *(ctypes.addressof(m) for m in memory), 96, 4 * 96) == b""
    print("came through:", name)
"""
    environment = os.environ | {"LD_PRELOAD": str(Path(found.strip()).resolve()), "ASAN_OPTIONS": "detect_leaks=0"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.stdout == "came through: b'block_scan'\n"
    assert done.returncode != 0 and "AddressSanitizer: heap-buffer-overflow" in done.stderr
    assert "writes_out_of_bounds" in done.stderr  # the stack of the fiber


def test_impossible_launches_are_refused(run_kernel):
    assert "expected whole warps" in run_kernel("block_scan", threads=33)[1]
    assert "1024 threads at most" in run_kernel("block_scan", threads=1056)[1]
    assert "shared memory" in run_kernel("block_scan", shared=64 << 10)[1]


# -- the kernels, in both orders, under every plan ---------------------------------------------------------------------

SCANS = [
    ScanCase(length=70, state=3, z=True, initial_state=True, last_state=True, B=2, C="constant"),
    ScanCase(length=300, channels=18, state=2, reverse=(True, False), B="constant", C=2),
    ScanCase(batch=1, channels=2, length=2400, state=2, z=True, initial_state=True, last_state=True),
    ScanCase(batch=1, channels=2, length=5000, reverse=True, initial_state=True, last_state=True),
    ScanCase(batch=1, channels=4, length=2600, reverse=(True, False), last_state=True, C="constant"),
]
MAPS = [
    MapCase(),
    MapCase(batch=1, channels=17, height=9, width=33, rank=9),
    MapCase(batch=1, channels=3, height=4, width=70, state=2, rank=12),
    MapCase(batch=1, channels=5, height=16, width=45, rank=2),
]
# Of shared memory per block: an H100's, one that leaves room for small tiles, one for slices of the rows of x_dbl only.
SHARED = (227 << 10, 48 << 10, 24 << 10)


@pytest.mark.parametrize("case", SCANS, ids=str)
def test_scans_are_right_in_both_orders_and_the_same(case, emulated, monkeypatch):
    inputs = scan_inputs(case, torch.float32)
    found = []
    for order in ORDERS:
        monkeypatch.setenv("DASS_OPS_EMULATION_ORDER", order)
        check_scan(case, torch.float32, emulated, inputs=inputs)
        found.append(run_scan(selective_scan, case, inputs, torch.float32, emulated, options={"reverse": case.reverse}))
    assert_same_bits(*found)


@pytest.mark.parametrize("few", [False, True], ids=["walks all directions", "one direction a block"])
@pytest.mark.parametrize("shared", SHARED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", MAPS, ids=str)
def test_maps_are_right_in_both_orders_and_the_same(case, dtype, shared, few, emulated, monkeypatch):
    monkeypatch.setenv("DASS_OPS_EMULATION_SHARED", str(shared))
    monkeypatch.setenv("DASS_OPS_EMULATION_FEW_BLOCKS", "1000" if few else "1")
    inputs, found = map_inputs(case, dtype), []
    for order in ORDERS:
        monkeypatch.setenv("DASS_OPS_EMULATION_ORDER", order)
        check_map(case, dtype, emulated)
        found.append(run_map(ss2d, inputs, emulated))
    assert_same_bits(*found)


def assert_same_bits(one, other):
    for name, t in one.items():
        assert torch.equal(t, other[name]), name


def test_bidirectional_scan_in_segments(emulated):
    from .test_bidirectional_scan import inputs_of

    case = ScanCase(batch=1, channels=2, length=2500, initial_state=True, last_state=True)
    check_scan(case, torch.float32, emulated, function=bidirectional_scan, inputs=inputs_of(case, torch.float32))
    check_scan(case, torch.bfloat16, emulated, function=bidirectional_scan, inputs=inputs_of(case, torch.bfloat16))


def test_several_channels_to_a_warp(emulated):
    """Enough sequences that a block of the backward handles several rounds of channels."""
    check_scan(ScanCase(batch=1, channels=4 * 4096 + 20, length=3, z=True), torch.float32, emulated)


def test_several_sets_of_channels_to_a_block(emulated):
    """Enough clips that a block of ss2d takes all channels: rounds in the forward, sets in the backward."""
    check_map(MapCase(batch=266, channels=37, height=2, width=3), torch.float32, emulated)
    check_map(MapCase(batch=70, channels=37, height=2, width=3), torch.bfloat16, emulated)


WHERE_MAPS_END = [
    MapCase(batch=1, channels=4, height=32, width=256, rank=6),  # the stages of a ten-second clip
    MapCase(batch=1, channels=5, height=40, width=100, rank=6),  # held whole, few channels at a time
    MapCase(batch=1, channels=16, height=16, width=128, rank=12),
    MapCase(batch=1, channels=16, height=8, width=64, rank=24),
    MapCase(batch=1, channels=17, height=4, width=32, rank=48),
    MapCase(batch=1, channels=2, height=8, width=700, rank=6),  # long: tiles as high as the map
    MapCase(batch=1, channels=2, height=700, width=8, rank=6),  # tall: tiles as wide as the map
    MapCase(batch=1, channels=2, height=90, width=75, rank=6),  # both: lines are cut
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", WHERE_MAPS_END, ids=str)
def test_maps_of_the_model_and_larger(case, dtype, emulated, monkeypatch):
    monkeypatch.setenv("DASS_OPS_EMULATION_FEW_BLOCKS", "1")  # as with a larger batch
    check_map(case, dtype, emulated)


def test_many_ranks_and_states_come_in_slices(emulated, monkeypatch):
    monkeypatch.setenv("DASS_OPS_EMULATION_SHARED", str(64 << 10))
    check_map(MapCase(batch=1, channels=3, height=5, width=9, rank=70, state=40), torch.float32, emulated)
    check_map(MapCase(batch=1, channels=3, height=5, width=9, rank=70, state=40), torch.float16, emulated)
    check_scan(ScanCase(batch=1, channels=9, length=40, state=600, B=3, C=3), torch.float32, emulated)


def test_what_does_not_fit_is_an_error(emulated, monkeypatch):
    monkeypatch.setenv("DASS_OPS_EMULATION_SHARED", "2000")
    with pytest.raises(RuntimeError, match="rank 2 and the state size 1 are more than the shared memory"):
        check_map(MapCase(), torch.float32, emulated)
    with pytest.raises(RuntimeError, match="state size 300 is more than the shared memory"):
        check_scan(ScanCase(state=300), torch.float32, emulated)
