"""ss2d and ss2d_projected on every backend against the float64 oracle: results and every gradient."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dass_ops import ss2d, ss2d_projected

from .cases import MapCase, check_map, map_inputs, run_map
from .conftest import device_of, interpreted

CASES = [
    MapCase(),
    MapCase(height=1, width=7),
    MapCase(height=6, width=1),
    MapCase(height=1, width=1, batch=1, channels=1),
    MapCase(state=2, rank=3),
    MapCase(state=4, rank=1, channels=3),
    MapCase(batch=1, channels=17, height=9, width=33, rank=6),
    MapCase(batch=1, channels=6, height=32, width=10, rank=6),
    MapCase(batch=1, channels=3, height=4, width=70, rank=12),
    MapCase(layout="channels_last", channels=5),
    MapCase(layout="sliced"),
    MapCase(layout="expanded"),
]


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("function", [ss2d, ss2d_projected])
def test_cases(case, function, backend):
    if interpreted(backend) and function is ss2d_projected and case is not CASES[0]:
        pytest.skip("interpreted: the projection is the same for every backend")
    check_map(case, torch.float32, backend, function=function)


@pytest.mark.parametrize("case", [MapCase(batch=0), MapCase(height=0), MapCase(width=0)], ids=str)
def test_empty(case, backend):
    check_map(case, torch.float32, backend)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("state", [1, 2])
def test_dtypes(dtype, state, backend):
    case = MapCase(channels=6, state=state, rank=3)
    check_map(case, dtype, backend)
    if dtype.itemsize == 2:
        check_map(case.replace(out_dtype=torch.float32), dtype, backend)


@pytest.mark.parametrize(
    "case",
    [
        MapCase(batch=1, channels=40, height=37, width=53, rank=6),
        MapCase(batch=2, channels=96, height=8, width=64, rank=6),
        MapCase(batch=1, channels=48, height=4, width=32, rank=48),
        MapCase(batch=3, channels=20, height=16, width=24, rank=12, state=3),
    ],
    ids=str,
)
def test_larger_maps(case, backend):
    if interpreted(backend):
        pytest.skip("interpreted: too slow for larger maps")
    check_map(case, torch.float32, backend)
    check_map(case, torch.bfloat16, backend)


def test_backward_is_bitwise_repeatable(backend):
    case = (
        MapCase(batch=1, channels=8, height=5, width=9)
        if interpreted(backend)
        else MapCase(channels=40, height=33, width=29)
    )
    inputs = map_inputs(case, torch.float32)
    first, second = (run_map(ss2d, inputs, backend, device_of(backend)) for _ in range(2))
    for name, t in first.items():
        assert torch.equal(t, second[name]), name


def test_projected_is_projection_then_scan(backend):
    inputs = {k: t.to(device_of(backend)) for k, t in map_inputs(MapCase(), torch.float32, projected=True).items()}
    x, weight, *parameters = inputs.values()
    x_dbl = torch.einsum("kcd,bdhw->bkchw", weight, x)
    y = ss2d(x, x_dbl, *parameters, backend=backend)
    torch.testing.assert_close(ss2d_projected(x, weight, *parameters, backend=backend), y, rtol=1e-5, atol=1e-5)


map_cases = st.builds(
    MapCase,
    batch=st.integers(0, 2),
    channels=st.integers(1, 20),
    height=st.integers(1, 12),
    width=st.integers(1, 20),
    state=st.sampled_from([1, 1, 2, 3]),
    rank=st.integers(1, 7),
    layout=st.sampled_from(["contiguous", "channels_last", "expanded", "sliced"]),
)


def test_drawn_cases(backend):
    @settings(max_examples=3 if interpreted(backend) else 40, deadline=None, derandomize=True)
    @given(case=map_cases, seed=st.integers(0, 1000), dtype=st.sampled_from([torch.float32, torch.bfloat16]))
    def check(case, seed, dtype):
        check_map(case, dtype, backend, seed)

    check()
