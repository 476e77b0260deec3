"""What only the CPU kernels promise: elementary functions over all floats, every instruction set, threads, memory."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import library

from dass_ops import bidirectional_scan, selective_scan, ss2d, ss2d_projected
from dass_ops.backends import CHUNK, Backend

from .cases import MapCase, ScanCase, check_map, check_scan, compare, map_inputs, run_map, run_scan, scan_inputs
from .conftest import require

ROOT = Path(__file__).parents[2]
SMALLEST_NORMAL = torch.finfo(torch.float32).tiny


@pytest.fixture
def backend(poison) -> Backend:
    return require(Backend.CPU)


def all_magnitudes() -> torch.Tensor:
    """About a million floats, evenly over all bit patterns: both signs, denormal numbers, infinities and NaN."""
    bits = torch.cat([torch.arange(-(2**31), 2**31, 4099), torch.tensor([0, 0x7F800000, -0x800000, 0x7FC00000])])
    everywhere = bits.to(torch.int32).view(torch.float32)
    return torch.cat([everywhere, torch.linspace(-110, 110, 400_001), torch.linspace(-1, 1, 100_003)])


def largest_error(got: torch.Tensor, expected: torch.Tensor, scale=1.0) -> float:
    """Relative to the expected value where that is a normal float, absolute (in units of the smallest one) below."""
    error = (got.double() - expected).abs() / expected.abs().clamp(min=SMALLEST_NORMAL) / scale
    return float(error[expected.isfinite() & (expected.abs() <= torch.finfo(torch.float32).max)].max())


def elementary(x: torch.Tensor, function: str) -> torch.Tensor:
    return torch.ops.dass_ops.cpu_elementary(x, function)


def check_elementary() -> None:
    x = all_magnitudes()
    x = x[~x.isnan()]
    wide = x.double()
    # exp as a decay factor: the error of the product in its argument counts in proportion to it.
    decays = x.abs() < 1e30
    for name in ("exp", "decay"):
        assert largest_error(elementary(x, name)[decays], wide.exp()[decays], 1 + wide[decays].abs()) < 2.5e-7
    assert largest_error(elementary(x, "softplus"), torch.nn.functional.softplus(wide, threshold=800)) < 3e-7
    assert largest_error(elementary(x, "sigmoid"), wide.sigmoid()) < 4e-7
    assert largest_error(elementary(x, "slope"), wide.sigmoid()) < 5e-7
    assert largest_error(elementary(x, "near_slope"), wide.sigmoid()) < 5e-7
    near_one = torch.linspace(-1e-3, 0, 10_001)  # where an error is multiplied by 1 / (1 - a)
    for name in ("exp", "decay"):
        assert elementary(torch.zeros(1), name).item() == 1.0
        assert largest_error(elementary(near_one, name), near_one.double().exp()) < 7e-8
    ends = torch.tensor([-torch.inf, torch.inf])
    assert elementary(ends, "exp").tolist() == elementary(ends, "decay").tolist() == [0.0, torch.inf]
    assert elementary(ends, "softplus").tolist() == [0.0, torch.inf]
    assert elementary(ends, "sigmoid").tolist() == elementary(ends, "slope").tolist() == [0.0, 1.0]
    x = all_magnitudes()
    for name in ("bfloat16", "float16"):
        rounded = x.to(getattr(torch, name)).float()
        torch.testing.assert_close(elementary(x, name), rounded, rtol=0, atol=0, equal_nan=True)
    nan = torch.full((3,), torch.nan)
    for name in ("exp", "decay", "softplus", "sigmoid", "slope", "near_slope"):
        assert elementary(nan, name).isnan().all(), name


def test_elementary_functions(backend):
    check_elementary()


# Each goes another way through the kernels: along rows, in lanes, with ends and halves of blocks of every vector width.
SCANS = [
    ScanCase(batch=1, channels=5, length=700, reverse=True, z=True, last_state=True, initial_state=True),
    ScanCase(batch=1, channels=8, length=129, B=2, C=4, reverse=(True, False), softplus=False),
    ScanCase(batch=1, channels=3, length=300, state=3, B="constant", C="constant", reverse=True),
    ScanCase(batch=2, channels=19, length=333, state=16, z=True, initial_state=True, last_state=True),
    ScanCase(batch=1, channels=34, length=257, state=5, B=2, C=1, reverse=(False, True), softplus=False),
    ScanCase(batch=1, channels=32, length=192, state=8, reverse=(True, False), last_state=True),
]
# The last octet of steps whole or not, one chunk or several, heights above and below a vector, ranks above and below what is
# multiplied together.
MAPS = [
    MapCase(batch=1, channels=21, height=19, width=33, rank=6),
    MapCase(batch=2, channels=16, height=8, width=40, rank=9),
    MapCase(batch=1, channels=3, height=7, width=23, rank=2, state=3),
    MapCase(batch=1, channels=17, height=2, width=3, rank=1),
    MapCase(batch=1, channels=16, height=32, width=9, rank=15),
    MapCase(batch=3, channels=33, height=3, width=86, rank=21),
]


def check_instruction_set(name: str) -> None:
    """In a process of its own: the kernels are chosen once."""
    assert torch.ops.dass_ops.cpu_instruction_set() == name
    check_elementary()
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for case in SCANS:
            check_scan(case, dtype, Backend.CPU)
        for case in MAPS:
            check_map(case, dtype, Backend.CPU)


def in_process(code: str, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"} | environment,
        capture_output=True,
        text=True,
    )


@pytest.mark.parametrize("name", ["avx512", "avx2", "scalar"])
def test_instruction_sets(name, backend):
    call = f"from tests.ops import test_cpu; test_cpu.check_instruction_set({name!r})"
    done = in_process(call, DASS_OPS_CPU=name)
    if "expected one of the instruction sets that run here" in done.stderr:
        pytest.skip(f"this processor has no {name}")
    assert done.returncode == 0, done.stderr[-3000:]


def test_unknown_instruction_set(backend):
    done = in_process("import torch, dass_ops; torch.ops.dass_ops.cpu_instruction_set()", DASS_OPS_CPU="sse9")
    assert done.returncode != 0
    for part in ("DASS_OPS_CPU is 'sse9'", "scalar", "Unset it"):
        assert part in done.stderr


def with_threads(threads: int, run):
    torch.set_num_threads(threads)  # the suite's fixture puts it back
    return run()


@pytest.mark.parametrize("case", SCANS, ids=str)
def test_scans_do_not_depend_on_threads(case, backend):
    inputs = scan_inputs(case, torch.float32)
    options = {"reverse": case.reverse}
    runs = [
        with_threads(n, lambda: run_scan(selective_scan, case, inputs, torch.float32, backend, options=options))
        for n in (1, 2, 3, 2)
    ]
    same(runs)


def test_summed_directions_do_not_depend_on_threads(backend):
    from .test_bidirectional_scan import inputs_of

    for case in (ScanCase(batch=1, channels=5, length=600), ScanCase(batch=1, channels=18, length=300, state=4)):
        for dtype in (torch.float32, torch.bfloat16):
            inputs = inputs_of(case, dtype)
            runs = [
                with_threads(n, lambda i=inputs, d=dtype, c=case: run_scan(bidirectional_scan, c, i, d, backend))
                for n in (1, 2, 2)
            ]
            same(runs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("length", [127, 250, 509, 1008, 1021])
def test_gradients_past_the_caches(length, dtype, backend):
    """Gradients of many rows are not kept in the caches, wherever the rows begin: the same bits as of a few of those rows."""
    case = ScanCase(batch=1, channels=2**19 // length + 3, length=length)
    inputs = {k: t for k, t in scan_inputs(case, dtype).items() if t is not None}
    d_out = torch.randn(1, case.channels, length, generator=torch.Generator().manual_seed(5)).to(dtype)

    def gradients(begin, end):
        rows = {
            k: t if k in "BC" else t[begin:end] if t.shape[0] == case.channels else t[:, begin:end]
            for k, t in inputs.items()
        }
        leaves = {k: t.clone().requires_grad_() for k, t in rows.items()}
        for reverse in (False, True):
            out = selective_scan(**leaves, delta_softplus=True, reverse=reverse, backend=backend)
            yield from torch.autograd.grad(out, [leaves["u"], leaves["delta"]], d_out[:, begin:end])

    everything = list(gradients(0, case.channels))
    for begin, end in ((0, 3), (case.channels - 4, case.channels)):
        for many, few in zip(everything, gradients(begin, end), strict=True):
            assert torch.equal(many[:, begin:end], few)


LONG = [
    ScanCase(batch=1, channels=1, length=40_000),
    ScanCase(batch=1, channels=3, length=33_333, state=2, reverse=True, z=True, initial_state=True, last_state=True),
    ScanCase(batch=1, channels=2, length=33_000, reverse=(True, False), B="constant", C="constant", last_state=True),
]


def on_threads(function, case, inputs, options=None) -> list[dict[str, torch.Tensor]]:
    return [
        with_threads(n, lambda: run_scan(function, case, inputs, torch.float32, Backend.CPU, options=options))
        for n in (1, 2, 3, 5)
    ]


@pytest.mark.parametrize("case", LONG, ids=str)
def test_few_long_rows(case, backend):
    """With more threads than rows, a row is worked on in pieces: the same bits, and what float64 says."""
    inputs = scan_inputs(case, torch.float32)
    options = {"reverse": case.reverse}
    runs = on_threads(selective_scan, case, inputs, options)
    same(runs)
    wide = {k: None if t is None else t.double() for k, t in inputs.items()}
    expected = run_scan(selective_scan, case, wide, torch.float64, backend, options=options)
    compare(runs[0], expected, torch.float32)


@pytest.mark.parametrize("length", [2 * 16384, 40_000])
def test_few_long_rows_with_summed_directions(length, backend):
    from .test_bidirectional_scan import inputs_of

    case = ScanCase(batch=1, channels=1, length=length, z=False, initial_state=True, last_state=True)
    inputs = inputs_of(case, torch.float32)
    runs = on_threads(bidirectional_scan, case, inputs)
    same(runs)
    wide = {k: None if t is None else t.double() for k, t in inputs.items()}
    compare(runs[0], run_scan(bidirectional_scan, case, wide, torch.float64, backend), torch.float32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_summed_directions_in_lanes(dtype, backend):
    """Enough channels to fill vectors with them in every instruction set."""
    from .test_bidirectional_scan import inputs_of

    case = ScanCase(batch=1, channels=21, length=150, state=5, initial_state=True, last_state=True)
    check_scan(case, dtype, backend, function=bidirectional_scan, inputs=inputs_of(case, dtype))


@pytest.mark.parametrize("length", [128, 150])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_large_step_sizes_in_lanes(dtype, length, backend):
    """Some of them beyond the range of the tables that most come from: the tile is then computed again."""
    case = ScanCase(batch=1, channels=19, length=length, state=5, last_state=True)
    inputs = scan_inputs(case, dtype)
    inputs["delta"][:, ::3, 70::9] = 21.0
    check_scan(case, dtype, backend, inputs=inputs)


@pytest.mark.parametrize("reverse", [False, True])
def test_large_outputs_in_lanes(reverse, backend):
    """They go past the caches: the same bits as when they do not."""
    inputs = scan_inputs(ScanCase(batch=1, channels=272, length=1024, state=4), torch.float32)
    options = {"delta_softplus": True, "reverse": reverse, "backend": backend}
    with torch.no_grad():
        whole = selective_scan(**inputs, **options)
        for first in (0, 256):
            part = {
                k: t[:, first : first + 16] if k in ("u", "delta") else t for k, t in inputs.items() if t is not None
            }
            part |= {k: inputs[k][first : first + 16] for k in ("A", "D", "delta_bias")}
            assert torch.equal(whole[:, first : first + 16], selective_scan(**part, **options))


@pytest.mark.parametrize("case", [*MAPS, MapCase(batch=1, channels=70, height=16, width=24)], ids=str)
def test_maps_do_not_depend_on_threads(case, backend):
    """Few blocks of channels: each direction is a task of its own as soon as there are threads for it."""
    inputs = map_inputs(case, torch.float32)
    same([with_threads(n, lambda: run_map(ss2d, inputs, backend)) for n in (1, 2, 6, 6)])


@pytest.mark.parametrize("state", [1, 2])
def test_step_sizes_far_from_zero(state, backend):
    """Softplus is computed otherwise for |v| beyond 15.25, an octet of steps at a time; here near and far ones take turns."""
    case = MapCase(batch=1, channels=18, height=6, width=43, rank=3, state=state)
    inputs = map_inputs(case, torch.float32)
    inputs["x_dbl"] = inputs["x_dbl"].clone()
    inputs["x_dbl"][:, :, 0, ::2, 5:25] *= 12
    inputs["dt_bias"][:, ::5] -= 15
    wide = run_map(ss2d, {k: t.double() for k, t in inputs.items()}, "reference")
    compare(run_map(ss2d, inputs, backend), wide, torch.float32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("width", [512, 511])
def test_large_maps_past_the_caches(dtype, width, backend):
    """y of more than 2^14 elements and d_x of 2^18 are stored past the caches where their rows are aligned: the same bits."""
    inputs = map_inputs(MapCase(batch=2, channels=32, height=9, width=width), dtype)
    cotangent = torch.randn(inputs["x"].shape, generator=torch.Generator().manual_seed(1)).to(dtype)

    def run(of):
        x = inputs["x"][of].clone().requires_grad_()
        y = ss2d(**(inputs | {"x": x, "x_dbl": inputs["x_dbl"][of].clone()}), backend=backend)
        return y.detach(), torch.autograd.grad(y, x, cotangent[of])[0]

    for b in range(2):
        for alone, together in zip(run(slice(b, b + 1)), run(slice(0, 2)), strict=True):
            assert torch.equal(alone[0], together[b])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("function", [ss2d, ss2d_projected])
def test_layout_of_maps(dtype, function, backend):
    """Channels last in, channels last out, forward and backward, and the same numbers."""
    case = MapCase(batch=2, channels=19, height=6, width=11, rank=3)
    inputs = map_inputs(case, dtype, projected=function is ss2d_projected)
    expected = run_map(function, inputs, backend)
    inputs["x"] = inputs["x"].to(memory_format=torch.channels_last)
    got = run_map(function, inputs, backend)
    for name, t in got.items():
        if name in ("y", "d_x"):
            assert t.is_contiguous(memory_format=torch.channels_last) and expected[name].is_contiguous(), name
        if function is ss2d:
            assert torch.equal(t, expected[name]), name
        else:  # products add up in another order
            torch.testing.assert_close(t, expected[name], rtol=2e-2 if dtype == torch.bfloat16 else 1e-4, atol=1e-2)


def test_fake_kernels_know_the_layout(backend):
    inputs = map_inputs(MapCase(), torch.float32)
    inputs["x"] = inputs["x"].to(memory_format=torch.channels_last)
    leaves = [t.requires_grad_() for t in inputs.values()]
    options = {"chunk": CHUNK[backend], "out_dtype": torch.float32}
    tests = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    library.opcheck(torch.ops.dass_ops.ss2d_forward.default, leaves, options, test_utils=tests)


def same(runs) -> None:
    for other in runs[1:]:
        for name, t in runs[0].items():
            assert torch.equal(t, other[name]), name


@pytest.mark.parametrize("state", [1, 16])
def test_memory_kept_for_the_backward(state, backend):
    """At most 1/64 of all states, beside the inputs themselves."""
    channels, length = 32, 4096
    inputs = {
        k: None if t is None else t.requires_grad_()
        for k, t in scan_inputs(ScanCase(batch=1, channels=channels, length=length, state=state), torch.float32).items()
    }
    assert kept(lambda: selective_scan(**inputs, delta_softplus=True, backend=backend), inputs) * 64 <= (
        4 * channels * length * state
    )
    case = MapCase(batch=1, channels=channels, height=32, width=128, state=state)
    maps = {k: t.requires_grad_() for k, t in map_inputs(case, torch.float32).items()}
    assert kept(lambda: ss2d(**maps, backend=backend), maps) * 64 <= 4 * 4 * channels * length * state


def kept(call, inputs) -> int:
    """Bytes that autograd saves and that belong to no input."""
    known = {t.untyped_storage().data_ptr() for t in inputs.values() if t is not None}
    saved = {}

    def pack(t):
        if t.untyped_storage().data_ptr() not in known:
            saved[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        result = call()
    assert result.grad_fn is not None
    return sum(saved.values())


def test_boundary_states_are_what_the_backward_reads(backend):
    """Every CHUNK-th state, as the operators' schema says, so that other kernels could take over from here."""
    length, chunk = 1000, CHUNK[Backend.CPU]
    inputs = scan_inputs(ScanCase(batch=1, channels=2, length=length, D=False, bias=False), torch.float32)
    u, delta, A, B, C = (inputs[k] for k in ("u", "delta", "A", "B", "C"))
    for reverse in (False, True):
        _, _, states = torch.ops.dass_ops.scan_forward(
            u[:, None], delta[:, None], A[None], B[:, None, None], C[:, None, None], None, None, None, None,
            delta_softplus=True, reverse=[reverse], chunk=chunk, out_dtype=torch.float32,
        )  # fmt: skip
        assert states.shape == (1, 1, 2, 4, 1)
        for j in range(4):
            before = slice((j + 1) * chunk, length) if reverse else slice(0, j * chunk)
            parts = {k: inputs[k][..., before] for k in ("u", "delta", "B", "C")}
            _, state = selective_scan(
                **parts, A=A, delta_softplus=True, return_last_state=True, reverse=reverse, backend="reference"
            )
            torch.testing.assert_close(states[:, 0, :, j], state, rtol=1e-5, atol=1e-5)


def available_gigabytes() -> float:
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return 0.0
    return next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable")) / 2**20


@pytest.mark.slow
def test_more_than_two_to_the_31_elements():
    """Offsets are 64 bits wide: the last of eight long channels equals the same channel on its own."""
    backend = require(Backend.CPU)
    if available_gigabytes() < 14:
        pytest.skip(f"needs 14 GB of free memory, there are {available_gigabytes():.0f}")
    torch.set_num_threads(2)  # so that the channel on its own is worked on in pieces; the suite's fixture puts it back
    channels, pattern, times = 8, 2**16 + 17, 4100
    length = pattern * times
    assert channels * length > 2**31
    g = torch.Generator().manual_seed(0)

    def drawn(*shape):
        return torch.randn(*shape, generator=g).bfloat16()

    u = drawn(1, channels, pattern).repeat(1, 1, times)
    delta, B, C = (drawn(1, 1, pattern).repeat(1, 1, times) for _ in range(3))
    A, D = -torch.rand(channels, 1, generator=g) - 0.5, torch.randn(channels, generator=g)
    bias = torch.full((channels,), -2.0)
    with torch.no_grad():
        for reverse in (False, True):
            out = selective_scan(
                u, delta.expand(1, channels, length), A, B, C, D, None, bias, True, reverse=reverse, backend=backend
            )
            alone = selective_scan(
                u[:, -1:], delta, A[-1:], B, C, D[-1:], None, bias[-1:], True, reverse=reverse, backend=backend
            )
            assert torch.equal(out[:, -1:], alone)
            # Where the walk ends, against the oracle: a few thousand steps back the beginning is forgotten.
            end = slice(0, 4000) if reverse else slice(length - 4000, length)
            expected = selective_scan(
                u[:, -1:, end].double(), delta[..., end].double(), A[-1:].double(), B[..., end].double(),
                C[..., end].double(), D[-1:].double(), None, bias[-1:].double(), True,
                reverse=reverse, backend="reference",
            )  # fmt: skip
            near = slice(0, 2000) if reverse else slice(2000, 4000)
            torch.testing.assert_close(alone[..., end][..., near].double(), expected[..., near], rtol=2e-2, atol=2e-2)
            del out, alone


@pytest.mark.slow
@pytest.mark.parametrize("reverse", [False, True])
def test_gradients_of_more_than_two_to_the_31_elements(reverse):
    """One tensor serves as u, delta and the gradient of out, or memory would not do."""
    backend = require(Backend.CPU)
    if available_gigabytes() < 16:
        pytest.skip(f"needs 16 GB of free memory, there are {available_gigabytes():.0f}")
    torch.set_num_threads(2)
    channels, pattern, times = 1024, 2**16 + 17, 33
    length = pattern * times
    assert channels * length > 2**31
    g = torch.Generator().manual_seed(0)
    big = torch.randn(1, channels, pattern, generator=g).bfloat16().repeat(1, 1, times)
    B, C = (torch.randn(1, 1, pattern, generator=g).bfloat16().repeat(1, 1, times) for _ in range(2))
    A, D = -torch.rand(channels, 1, generator=g) - 0.5, torch.randn(channels, generator=g)
    bias = torch.full((channels,), -2.0)

    def gradients(rows, end=slice(None), dtype=None, backend=backend):
        """Of u and delta for some channels and steps."""
        x, b, c = (t[..., end].to(dtype or t.dtype) for t in (big[:, rows], B, C))
        a, d, shift = (t.to(dtype or t.dtype) for t in (A[rows], D[rows], bias[rows]))
        u, delta = x.detach().requires_grad_(), x.detach().requires_grad_()
        out = selective_scan(u, delta, a, b, c, d, None, shift, True, reverse=reverse, backend=backend)
        edge = torch.autograd.graph.get_gradient_edge(out)
        del out  # large, and not needed
        return torch.autograd.grad(edge, (u, delta), x)

    whole = [t[:, -1:].clone() for t in gradients(slice(None))]
    alone = gradients(slice(-1, None))
    assert all(map(torch.equal, whole, alone))
    # A stretch from within, against the oracle: what lies some thousand steps away on either side is forgotten.
    middle = slice(length // 2, length // 2 + 6000)
    expected = gradients(slice(-1, None), middle, torch.float64, Backend.REFERENCE)
    for got, want in zip(alone, expected, strict=True):
        near = want[..., 2000:4000]
        torch.testing.assert_close(got[..., middle][..., 2000:4000].double(), near, rtol=2e-2, atol=2e-2)


@pytest.mark.slow
def test_map_of_more_than_two_to_the_31_elements():
    """The last 16 channels of a map equal the same channels on their own."""
    backend = require(Backend.CPU)
    if available_gigabytes() < 12:
        pytest.skip(f"needs 12 GB of free memory, there are {available_gigabytes():.0f}")
    torch.set_num_threads(2)
    some, times, side = 16, 257, 724
    channels = some * times
    assert channels * side * side > 2**31
    inputs = map_inputs(MapCase(batch=1, channels=some, height=side, width=side, rank=2), torch.bfloat16)
    x, few = inputs["x"], {k: t for k, t in inputs.items() if k not in ("x", "x_dbl")}
    g = torch.Generator().manual_seed(1)
    many = {
        "dt_weight": torch.randn(4, channels, 2, generator=g),
        "dt_bias": torch.rand(4, channels, generator=g) - 2.5,
        "A_logs": torch.rand(4 * channels, 1, generator=g),
        "Ds": torch.randn(4 * channels, generator=g),
    }
    for name, t in few.items():  # the last channels' parameters are those of the small map
        of_directions = many[name].view(4, channels, *many[name].shape[1 if name in ("A_logs", "Ds") else 2 :])
        of_directions[:, -some:] = t.view(4, some, *of_directions.shape[2:])
    with torch.no_grad():
        alone = ss2d(x, inputs["x_dbl"], **few, backend=backend)
        y = ss2d(x.repeat(1, times, 1, 1), inputs["x_dbl"], **many, backend=backend)
    assert torch.equal(y[:, -some:], alone)
