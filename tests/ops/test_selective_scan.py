"""selective_scan on every backend against the float64 oracle: results and every gradient."""

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dass_ops import selective_scan

from .cases import ScanCase, check_scan, run_scan, scan_inputs
from .conftest import device_of, interpreted

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
BOTH = (False, True)

FORMS = [
    ScanCase(),
    ScanCase(reverse=True),
    ScanCase(B="constant", C="constant", state=2),
    ScanCase(B=2, C="constant", state=3, reverse=True, z=True),
    ScanCase(B="constant", C=4, state=2, z=True, initial_state=True, last_state=True),
    ScanCase(B=2, C=1, state=16, initial_state=True, last_state=True, reverse=True),
    ScanCase(reverse=(False, False, True, True), B=4, C=4),
    ScanCase(reverse=(True, False), B="shared", C=1, state=2, z=True, last_state=True, initial_state=True),
    ScanCase(softplus=False, bias=False, D=False),
    ScanCase(softplus=False, bias=True, D=False, reverse=True, state=5, last_state=True),
    ScanCase(channels=3, state=7, z=True, D=False),
    ScanCase(channels=1, batch=1, length=2),
]


@pytest.mark.parametrize("case", FORMS, ids=str)
def test_forms(case, backend):
    check_scan(case, torch.float32, backend)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("state", [1, 4])
def test_dtypes(dtype, state, backend):
    case = ScanCase(state=state, z=state > 1, initial_state=True, last_state=True, B="constant" if state > 1 else 2)
    skip_unsupported(dtype, backend)
    check_scan(case, dtype, backend)
    check_scan(
        dataclasses.replace(case, reverse=True, out_dtype=torch.float32 if dtype.itemsize == 2 else None),
        dtype,
        backend,
    )


def skip_unsupported(dtype, backend):
    if dtype == torch.float64 and str(backend) in NO_FLOAT64:
        pytest.skip(f"{backend} has no float64: {NO_FLOAT64[str(backend)]}")


NO_FLOAT64: dict[str, str] = {}


@pytest.mark.parametrize("reverse", BOTH)
@pytest.mark.parametrize("length", [0, 1, 2, 15, 16, 17, 31, 32, 33, 63, 64, 65, 255, 256, 257, 1000])
def test_lengths(length, reverse, backend):
    if interpreted(backend) and length not in (0, 1, 31, 32, 33, 257):
        pytest.skip("interpreted: a choice of lengths")
    case = ScanCase(batch=1, channels=3, length=length, reverse=reverse, initial_state=True, last_state=True)
    check_scan(case, torch.float32, backend)


@pytest.mark.parametrize("length", [33, 300])
@pytest.mark.parametrize("state", [2, 3, 8, 16, 17, 33])
def test_states(state, length, backend):
    if interpreted(backend) and (length > 33 or state in (3, 17)):
        pytest.skip("interpreted: a choice of states")
    case = ScanCase(batch=1, channels=18, length=length, state=state, reverse=state % 2 == 1, B=3, C=2)
    check_scan(case, torch.float32, backend)


@pytest.mark.parametrize("channels", [1, 7, 16, 17, 40, 64, 67])
def test_channels(channels, backend):
    if interpreted(backend) and channels not in (7, 40):
        pytest.skip("interpreted: a choice of channels")
    check_scan(ScanCase(batch=1, channels=channels, length=70), torch.float32, backend)


@pytest.mark.parametrize("layout", ["channels_last", "expanded", "sliced"])
@pytest.mark.parametrize("state", [1, 4])
def test_layouts(layout, state, backend):
    check_scan(ScanCase(layout=layout, state=state, z=True, length=40), torch.float32, backend)


def test_expanded_projections(backend):
    case = ScanCase(state=4, B=2, C=2, length=20)
    inputs = scan_inputs(case, torch.float32)
    inputs["B"] = inputs["B"][:1, :1].expand(2, 2, 4, 20)
    inputs["C"] = inputs["C"].transpose(-1, -2).contiguous().transpose(-1, -2)
    check_scan(case, torch.float32, backend, inputs=inputs)


@pytest.mark.parametrize("case", [ScanCase(batch=0), ScanCase(length=0, initial_state=True, last_state=True)], ids=str)
def test_empty(case, backend):
    check_scan(case, torch.float32, backend)


def test_mixed_dtypes_are_promoted(backend):
    inputs = scan_inputs(ScanCase(), torch.bfloat16)
    mixed = dict(inputs, delta=inputs["delta"].float(), A=inputs["A"].double(), D=inputs["D"].bfloat16())
    device = device_of(backend)
    mixed = {k: None if t is None else t.to(device) for k, t in mixed.items()}
    out = selective_scan(**mixed, delta_softplus=True, backend=backend)
    assert out.dtype == torch.bfloat16
    widened = {k: None if t is None else t.float() for k, t in mixed.items()}
    assert torch.equal(out, selective_scan(**widened, delta_softplus=True, backend=backend).bfloat16())


@pytest.mark.parametrize("reverse", BOTH)
def test_slowly_decaying_state(reverse, backend):
    """Factors near 1 add up over thousands of steps: an error in `a` is multiplied by 1/(1-a)."""
    length = 300 if interpreted(backend) else 4096
    case = ScanCase(batch=1, channels=4, length=length, softplus=True, reverse=reverse)
    inputs = scan_inputs(case, torch.float32)
    inputs["delta_bias"] = torch.full((4,), -8.0)  # step sizes around 3e-4
    inputs["u"] = inputs["u"].abs()  # no cancellation: the state integrates
    inputs["B"] = inputs["B"].abs()
    check_scan(case, torch.float32, backend, inputs=inputs)


def test_extreme_steps(backend):
    """Step sizes from 1e-38 to 100: softplus and exp over their whole range, forgetting everything at once included."""
    case = ScanCase(batch=1, channels=2, length=64)
    inputs = scan_inputs(case, torch.float32)
    inputs["delta"] = torch.linspace(-90, 100, 64).expand(1, 2, 64).contiguous()
    inputs["delta_bias"] = torch.zeros(2)
    check_scan(case, torch.float32, backend, inputs=inputs)


@pytest.mark.parametrize("state", [1, 4])
def test_backward_is_bitwise_repeatable(state, backend):
    case = ScanCase(state=state, length=300 if not interpreted(backend) else 40, channels=20, B=2, C=2, z=True)
    inputs = scan_inputs(case, torch.float32)
    first, second = (
        run_scan(selective_scan, case, inputs, torch.float32, backend, device_of(backend)) for _ in range(2)
    )
    for name, t in first.items():
        assert torch.equal(t, second[name]), name


def test_no_gradient_wanted_gives_the_same_result(backend):
    inputs = scan_inputs(ScanCase(initial_state=True), torch.float32)
    inputs = {k: None if t is None else t.to(device_of(backend)) for k, t in inputs.items()}
    plain = selective_scan(**inputs, delta_softplus=True, backend=backend)
    inputs["u"] = inputs["u"].requires_grad_()
    assert torch.equal(plain, selective_scan(**inputs, delta_softplus=True, backend=backend).detach())


def test_a_sequence_in_two_pieces(backend):
    """The last state of a piece is the initial state of the next, in both directions."""
    case = ScanCase(state=3, length=50)
    inputs = {k: None if t is None else t.to(device_of(backend)) for k, t in scan_inputs(case, torch.float32).items()}
    for reverse in BOTH:
        whole = selective_scan(**inputs, delta_softplus=True, reverse=reverse, backend=backend)
        pieces, state = [], None
        for part in (slice(0, 21), slice(21, 50))[:: -1 if reverse else 1]:
            cut = {k: t[..., part] if k in ("u", "delta", "B", "C") else t for k, t in inputs.items()}
            cut["initial_state"] = state
            y, state = selective_scan(
                **cut, delta_softplus=True, return_last_state=True, reverse=reverse, backend=backend
            )
            pieces.append(y)
        torch.testing.assert_close(torch.cat(pieces[:: -1 if reverse else 1], -1), whole, rtol=1e-5, atol=1e-5)


@st.composite
def scan_cases(draw):
    directions = draw(st.sampled_from([1, 1, 2, 4]))
    channels = directions * draw(st.integers(1, 6))
    flags = tuple(draw(st.booleans()) for _ in range(directions))
    forms = ["shared", "constant", 1, directions, channels]
    return ScanCase(
        batch=draw(st.integers(0, 3)),
        channels=channels,
        length=draw(st.integers(0, 80)),
        state=draw(st.sampled_from([1, 1, 2, 3, 5, 16])),
        B=draw(st.sampled_from(forms)),
        C=draw(st.sampled_from(forms)),
        reverse=flags if directions > 1 else flags[0],
        D=draw(st.booleans()),
        z=draw(st.booleans()),
        bias=draw(st.booleans()),
        softplus=draw(st.booleans()),
        initial_state=draw(st.booleans()),
        last_state=draw(st.booleans()),
        layout=draw(st.sampled_from(["contiguous", "channels_last", "expanded", "sliced"])),
    )


def test_drawn_cases(backend):
    @settings(max_examples=4 if interpreted(backend) else 60, deadline=None, derandomize=True)
    @given(case=scan_cases(), seed=st.integers(0, 1000), dtype=st.sampled_from([torch.float32, torch.bfloat16]))
    def check(case, seed, dtype):
        check_scan(case, dtype, backend, seed)

    check()
