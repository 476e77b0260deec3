"""What is particular to the Triton kernels: that the compiler takes each of them without a GPU, the block plan, 64-bit
offsets, and what stands in for Triton in the interpreter.
"""

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

triton = pytest.importorskip("triton")
import triton.language as tl  # noqa: E402

from dass_ops import Backend, selective_scan, ss2d  # noqa: E402

primitives = pytest.importorskip("dass_ops.triton_kernels.primitives")
compose, compose_adjoint = primitives.compose, primitives.compose_adjoint
scan_adjoint, scan_states, rounded = primitives.scan_adjoint, primitives.scan_states, primitives.rounded

from .cases import MapCase, ScanCase, check_map, check_scan, map_inputs, scan_inputs  # noqa: E402
from .conftest import device_of, require  # noqa: E402

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def here() -> str:
    """The device type on which the kernels run here; skips where they cannot."""
    return device_of(require(Backend.TRITON))


# -- compiled ahead of time --------------------------------------------------------------------------------------------


def compiled(*arguments) -> list[dict]:
    """A record for each kernel, from a process in which the interpreter is off."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), *filter(None, [environment.get("PYTHONPATH")])])
    command = [sys.executable, "-m", "tests.ops.ahead_of_time", *map(str, arguments)]
    result = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT, timeout=1700)
    assert result.returncode == 0, result.stderr[-3000:]
    records = [json.loads(line) for line in result.stdout.splitlines() if line.startswith("{")]
    rejected = [f"{r['case']}, {r['kernel']}: {r['error'][-500:]}" for r in records if "error" in r]
    assert not rejected, "Triton's compiler rejects " + "; ".join(rejected)
    return records


SHARED_MEMORY = {80: 163 << 10, 90: 227 << 10}  # bytes that a program can have


def check_resources(records, capability):
    for record in records:
        assert 0 < record["registers"] <= 255, record
        assert record["shared"] <= SHARED_MEMORY[capability], record
        if record["state"] == 1:  # ptxas saves two registers on one architecture or the other in two walks
            assert record["spilled"] <= (8 if record["case"].startswith("bidirectional") else 0), record
    assert {r["kernel"] for r in records} == {
        "scan_forward_kernel", "scan_backward_kernel", "map_forward_kernel", "map_backward_kernel",
    }  # fmt: skip


@pytest.mark.timeout(1800)  # the compiler on a busy machine
@pytest.mark.parametrize("capability, stages", [(90, (1,))])
def test_the_models_shapes_compile_without_spills(here, capability, stages):
    """The first stage of DASS and Mamba, both dtypes; the other stages and architecture are the slow tests below."""
    check_resources(compiled(capability, "--stages", *stages), capability)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("capability, stages", [(80, (1, 2, 3, 4)), (90, (2, 3, 4))])
def test_the_other_shapes_compile_without_spills(here, capability, stages):
    check_resources(compiled(capability, "--stages", *stages), capability)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("capability", [80, 90])
def test_what_the_suite_interprets_also_compiles(here, capability):
    assert len(compiled(capability, "--suite")) > 60


# -- the two ways of a product, and blocks without masks ----------------------------------------------------------------

FULL = [  # blocks of channels and tiles that are all full
    MapCase(batch=1, channels=16, height=8, width=32, rank=3),
    MapCase(batch=1, channels=16, height=4, width=64, rank=25, state=2),
    MapCase(batch=1, channels=8, height=12, width=32, rank=12),
]


@pytest.mark.parametrize("case", [*FULL, MapCase(batch=1, channels=18, height=4, width=9, rank=28)], ids=str)
def test_maps(here, case):
    check_map(case, torch.float32, Backend.TRITON)
    check_map(case, torch.bfloat16, Backend.TRITON)


@pytest.mark.parametrize("state, reverse", [(1, True), (2, False)])
def test_full_tiles(here, state, reverse):
    case = ScanCase(batch=1, channels=8, length=256, state=state, reverse=reverse, z=True, last_state=True)
    check_scan(case, torch.float32, Backend.TRITON)


# -- the block plan ----------------------------------------------------------------------------------------------------


def test_plan_fills_the_device_and_stays_within_a_unit(here):
    from dass_ops.triton_kernels.plan import scan_plan

    for sequences, unit, length, chunk, size in [
        (64 * 1536, 1536, 2048, 128, 132), (1536, 1536, 2048, 128, 132), (96, 96, 8192, 128, 108), (3, 3, 7, 128, 132),
        (32 * 96, 1, 8192, 256, 132), (1 << 20, 48, 100, 0, 132), (5, 5, 1, 128, 1),
    ]:  # fmt: skip
        plan = scan_plan(sequences, unit, length, chunk, size)
        assert plan.channels & (plan.channels - 1) == 0 and plan.channels < 2 * unit
        assert plan.tile >= plan.chunk and plan.tile & (plan.tile - 1) == 0 and plan.tile >= 32
        assert plan.chunk <= (chunk or plan.chunk)
        assert (plan.chunks(length) - 1) * plan.chunk < length <= plan.chunks(length) * plan.chunk
        assert plan.channels == 1 or sequences // plan.channels >= 2 * size
        assert 1 <= plan.warps <= 16 and plan.channels * plan.tile >= 32 * plan.warps
    many, few = scan_plan(1 << 20, 1536, 2048, 128, 132), scan_plan(300, 1536, 2048, 128, 132)
    assert many.channels > few.channels == 1
    assert scan_plan(1 << 20, 1536, 2048, 128, 132) == many, "the same shapes, the same plan"


def test_plan_of_maps(here):
    from dass_ops.triton_kernels.plan import map_plan, multiplied

    for channels, height, width, rank in [(96, 32, 256, 6), (192, 16, 128, 12), (384, 8, 64, 24), (768, 4, 32, 48)]:
        for batch, dtype in ((1, torch.float32), (32, torch.float32), (32, torch.bfloat16)):
            plan = map_plan(batch * channels, height * width, rank, dtype, 128, 132)
            assert not plan.ragged(channels, height * width), "DASS needs no masks"
            assert plan.channels == 16 or multiplied(rank, dtype), "tl.dot wants 16 rows"
    assert map_plan(3, 35, 6, torch.float32, 128, 132).ragged(3, 35)
    assert map_plan(3, 100, 6, torch.float32, 100, 132).ragged(4, 200), (
        "a chunk that is no power of two does not fill its tile"
    )


def test_boundary_states_do_not_depend_on_the_device(here):
    """The backward reads the chunks that the forward saved: a chunk that is asked for is kept."""
    from dass_ops.triton_kernels.plan import map_plan, scan_plan

    for size in (1, 108, 132):
        assert scan_plan(4096, 64, 5000, 128, size).chunk == 128
        assert map_plan(4096, 5000, 6, torch.float32, 128, size).chunk == 128
        assert scan_plan(4096, 64, 40, 128, size).chunks(40) == 1


def test_indices_are_64_bit_where_32_do_not_reach(here):
    from dass_ops.triton_kernels.plan import index_type, scan_plan

    plan = scan_plan(4096, 64, 8192, 128, 1)
    assert index_type(plan, 8192, 8192) == tl.int32
    assert index_type(plan, 8192, 8192, (1 << 31) // (plan.channels - 1)) == tl.int64
    assert index_type(plan, (1 << 31) - 10, 0) == tl.int64


@pytest.mark.parametrize("state", [1, 2])
def test_offsets_beyond_2_to_the_31(here, state):
    """Channels 2^30 elements apart: the third begins where 32 bits end."""
    if here != "cpu":
        pytest.skip("memory that is reserved and not touched is the CPU's")
    case = ScanCase(batch=1, channels=4, length=6, state=state)
    inputs = scan_inputs(case, torch.bfloat16)
    expected = selective_scan(**inputs, delta_softplus=True, backend="triton")
    far = torch.empty(3 * (1 << 30) + 6, dtype=torch.bfloat16).as_strided((1, 4, 6), (0, 1 << 30, 1))
    far.copy_(inputs["u"])
    assert torch.equal(selective_scan(**inputs | {"u": far}, delta_softplus=True, backend="triton"), expected)


def test_map_offsets_beyond_2_to_the_31(here):
    if here != "cpu":
        pytest.skip("memory that is reserved and not touched is the CPU's")
    inputs = map_inputs(MapCase(batch=1, height=2, width=3), torch.bfloat16)
    expected = ss2d(**inputs, backend="triton")
    far = torch.empty(3 * (1 << 30) + 6, dtype=torch.bfloat16).as_strided((1, 4, 2, 3), (0, 1 << 30, 3, 1))
    far.copy_(inputs["x"])
    assert torch.equal(ss2d(**inputs | {"x": far}, backend="triton"), expected)


# -- what stands in for Triton in the interpreter ----------------------------------------------------------------------


@triton.jit
def scans_kernel(a_in, w_in, out, expected, REVERSE: tl.constexpr):
    place = tl.arange(0, 2)[:, None] * 8 + tl.arange(0, 8)[None, :]
    a, w = tl.load(a_in + place), tl.load(w_in + place)
    tl.store(out + place, scan_states(a, w, REVERSE))
    tl.store(out + 16 + place, scan_adjoint(w, a, REVERSE))
    _, h = tl.associative_scan((a, w), 1, compose, reverse=REVERSE)
    one = tl.full((2, 8), 1.0, tl.float32)
    _, lam, _ = tl.associative_scan((one, w, a), 1, compose_adjoint, reverse=REVERSE)
    tl.store(expected + place, h)
    tl.store(expected + 16 + place, lam)


@triton.jit
def rounding_kernel(x_in, out, DTYPE: tl.constexpr):
    place = tl.arange(0, 64)
    tl.store(out + place, rounded(tl.load(x_in + place), DTYPE))


def test_scans_are_those_of_associative_scan(here):
    if here != "cpu":
        pytest.skip("compiled, they are associative_scan")
    g = torch.Generator().manual_seed(0)
    a, w = torch.rand(2, 8, generator=g), torch.randn(2, 8, generator=g)
    for reverse in (False, True):
        out, expected = torch.empty(2, 2, 8), torch.empty(2, 2, 8)
        scans_kernel[(1,)](a, w, out, expected, REVERSE=reverse)
        torch.testing.assert_close(out, expected)
        h, mu = torch.zeros(2), torch.zeros(2)
        for l in reversed(range(8)) if reverse else range(8):  # the recurrences themselves
            h = a[:, l] * h + w[:, l]
            lam = mu + w[:, l]
            mu = a[:, l] * lam
            torch.testing.assert_close(out[0, :, l], h)
            torch.testing.assert_close(out[1, :, l], lam)


def test_results_are_rounded_to_nearest(here):
    x = torch.randn(64, generator=torch.Generator().manual_seed(0))
    x[:6] = torch.tensor(
        [1.0, 1 + 2**-8, 1 + 3 * 2**-8, -1 - 2**-8 - 2**-20, 0.0, 3e38]
    )  # ties and what lies beside them
    for dtype, name in ((torch.bfloat16, tl.bfloat16), (torch.float16, tl.float16)):
        out = torch.empty(64, dtype=dtype, device=here)
        rounding_kernel[(1,)](x.to(here), out, DTYPE=name)
        assert torch.equal(out.cpu(), x.to(dtype))


# -- rules -------------------------------------------------------------------------------------------------------------


def test_no_atomics_and_no_autotuning():
    """Two runs give the same bits, and the first run is not another one: read off the sources."""
    for path in Path(primitives.__file__).parent.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            name = node.attr if isinstance(node, ast.Attribute) else node.id if isinstance(node, ast.Name) else ""
            assert "atomic" not in name and name not in ("autotune", "heuristics"), (
                f"{path.name}:{node.lineno} uses {name}"
            )
