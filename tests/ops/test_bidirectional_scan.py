"""bidirectional_scan: both directions in one call, on every backend against the float64 oracle."""

import pytest
import torch

from dass_ops import bidirectional_scan, selective_scan

from .cases import STATE, ScanCase, check_scan
from .conftest import device_of


def inputs_of(case: ScanCase, dtype, seed=0):
    g = torch.Generator().manual_seed(seed)
    b, d, length, n = case.batch, case.channels, case.length, case.state
    state = STATE.get(dtype, torch.float32)

    def normal(*shape, scale=1.0):
        return scale * torch.randn(*shape, generator=g, dtype=torch.float64)

    def projection(form):
        if form == "constant":
            return normal(2, d, n).to(state)
        return normal(*((b, 2, n, length) if form == "shared" else (b, 2, form, n, length))).to(dtype)

    return {
        "u": normal(b, d, length).to(dtype),
        "delta": normal(b, 2, d, length, scale=0.5).to(dtype),
        "A": -torch.exp(normal(2, d, n, scale=0.5)).to(state),
        "B": projection(case.B),
        "C": projection(case.C),
        "D": normal(2, d).to(state) if case.D else None,
        "z": normal(b, d, length).to(dtype) if case.z else None,
        "delta_bias": (normal(2, d, scale=0.3) - 1).to(state),
        "initial_state": normal(b, 2, d, n).to(state) if case.initial_state else None,
    }


CASES = [
    ScanCase(),
    ScanCase(state=3, initial_state=True, last_state=True, B=2, C="constant", length=70),
    ScanCase(z=True, D=False, B="constant", C=4, state=2),
    ScanCase(length=0, initial_state=True),
    ScanCase(length=1, batch=1, channels=1),
    ScanCase(length=257, batch=1, channels=2),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_cases(case, backend):
    check_scan(case, torch.float32, backend, function=bidirectional_scan, inputs=inputs_of(case, torch.float32))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_dtypes(dtype, backend):
    case = ScanCase(state=2, z=True)
    check_scan(case, dtype, backend, function=bidirectional_scan, inputs=inputs_of(case, dtype))


def test_is_the_sum_of_the_two_directions(backend):
    case = ScanCase(state=2, length=40)
    given = {k: None if t is None else t.to(device_of(backend)) for k, t in inputs_of(case, torch.float32).items()}
    both = bidirectional_scan(**given, delta_softplus=True, backend=backend)
    total = 0
    for k in (0, 1):
        one = {name: given[name][:, k] for name in ("delta", "B", "C")}
        one |= {name: given[name][k] for name in ("A", "D", "delta_bias")}
        total = total + selective_scan(given["u"], **one, delta_softplus=True, reverse=k == 1, backend=backend)
    torch.testing.assert_close(both, total, rtol=1e-5, atol=1e-5)
