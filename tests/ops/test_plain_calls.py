"""selective_scan and ss2d in one step (csrc/plain_calls.cpp) or in many (functional.py): which call goes where, same bits."""

import pytest
import torch

from dass_ops import functional, selective_scan, ss2d
from dass_ops.backends import Backend

from .cases import MapCase, ScanCase, map_inputs, run_map, run_scan, scan_inputs
from .conftest import require


@pytest.fixture(autouse=True)
def native(poison):
    require(Backend.CPU)


PLAIN = [
    ScanCase(),
    ScanCase(reverse=(False, False, True, True), B=4, C=4),
    ScanCase(reverse=(False, True), B="shared", C=2, state=3, z=True, initial_state=True, last_state=True),
    ScanCase(D=False, bias=False, reverse=True, layout="sliced"),
    ScanCase(batch=0),
]
CLOSER = [
    ScanCase(B="constant", state=2),
    ScanCase(B=1, reverse=(False, True)),
]


@pytest.mark.parametrize("case", PLAIN + CLOSER, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_plain_call_in_one_step_gives_the_same_bits(case, dtype, monkeypatch):
    took = []

    def record(*arguments):
        took.append(plain(*arguments))
        return took[-1]

    plain = functional._plain_scan
    inputs, options = scan_inputs(case, dtype), {"reverse": case.reverse}
    monkeypatch.setattr(functional, "_plain_scan", record)
    at_once = run_scan(selective_scan, case, inputs, dtype, "cpu", options=options)
    monkeypatch.setattr(functional, "_plain_scan", lambda *arguments: None)
    step_by_step = run_scan(selective_scan, case, inputs, dtype, "cpu", options=options)
    assert [t is not None for t in took] == [case in PLAIN]
    for name, t in at_once.items():
        assert t.dtype == step_by_step[name].dtype and torch.equal(t, step_by_step[name]), name


def test_mixed_dtypes_are_no_plain_call():
    inputs = scan_inputs(ScanCase(), torch.float32)
    mixed = selective_scan(**(inputs | {"delta": inputs["delta"].bfloat16()}), delta_softplus=True, backend="cpu")
    converted = inputs | {"delta": inputs["delta"].bfloat16().float()}
    assert torch.equal(mixed, selective_scan(**converted, delta_softplus=True, backend="cpu"))


@pytest.mark.parametrize("name", ["cpu", Backend.CPU, None])
def test_the_backend_by_name_or_by_default(name, monkeypatch):
    monkeypatch.delenv("DASS_OPS_BACKEND", raising=False)
    assert _plain(backend=name) is not None


def test_another_backend_is_no_plain_call(monkeypatch):
    assert _plain(backend="reference") is None
    monkeypatch.setenv("DASS_OPS_BACKEND", "reference")
    assert _plain() is None
    assert _plain(backend="cpu") is not None


@pytest.mark.parametrize("change", [
    {"reverse": 1}, {"delta_softplus": None}, {"u": None}, {"u": "u"}, {"A": torch.zeros(3)}, {"reverse": ()},
    {"D": torch.zeros(2)}, {"delta": torch.zeros(1, 2, 3)}, {"C": torch.zeros(1, 1, 1, 1)},
    {"z": torch.zeros(1, device="meta")},
], ids=lambda change: f"{next(iter(change))}={next(iter(change.values()))}"[:24])  # fmt: skip
def test_what_does_not_fit_is_no_plain_call(change):
    assert _plain() is not None
    assert _plain(**change) is None


def test_who_watches_operations_sees_them():
    from torch.fx.experimental.proxy_tensor import make_fx
    from torch.utils._python_dispatch import TorchDispatchMode

    seen = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
            seen.append(str(function))
            return function(*arguments, **(keywords or {}))

    inputs = scan_inputs(ScanCase(), torch.float32)
    with Watch():
        assert _plain() is None
        selective_scan(**inputs)
    assert "dass_ops.scan_forward.default" in seen
    traced = make_fx(lambda u: selective_scan(**(inputs | {"u": u})))(inputs["u"])
    assert "scan_forward" in traced.code
    assert torch.equal(traced(inputs["u"]), selective_scan(**inputs))


def test_transformed_and_subclassed_tensors_are_no_plain_call():
    class Named(torch.Tensor):
        pass

    inputs = scan_inputs(ScanCase(), torch.float32)
    u = inputs["u"]
    assert _plain(u=u.as_subclass(Named)) is None
    assert _plain(u=torch.nn.Parameter(u)) is not None
    seen = []
    torch.func.vmap(lambda u: (seen.append(_plain(**(inputs | {"u": u}))), u)[1])(torch.stack([u, u]))
    torch.func.grad(lambda u: (seen.append(_plain(**(inputs | {"u": u}))), u.sum())[1])(u)
    assert seen == [None, None]


def _plain(reverse=False, backend=None, delta_softplus=True, **changed):
    """What plain_scan answers to a plain call, but for what is changed."""
    inputs = changed if len(changed) > 1 else scan_inputs(ScanCase(), torch.float32) | changed
    names = "u delta A B C D z delta_bias initial_state".split()
    tensors = [inputs.get(name) for name in names]
    return functional._plain_scan(*tensors, delta_softplus, reverse, backend, functional.NATIVE_CHUNKS)


# -- ss2d --------------------------------------------------------------------------------------------------------------


MAPS = [
    MapCase(),
    MapCase(state=2, rank=3),
    MapCase(layout="channels_last"),
    MapCase(layout="expanded"),
    MapCase(batch=0),
]


@pytest.mark.parametrize("case", MAPS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_a_plain_map_in_one_step_gives_the_same_bits(case, dtype, monkeypatch):
    inputs = map_inputs(case, dtype)
    assert _plain_map(inputs) is not None
    at_once = run_map(ss2d, inputs, "cpu")
    monkeypatch.setattr(functional, "_plain_map", lambda *arguments: None)
    step_by_step = run_map(ss2d, inputs, "cpu")
    for name, t in at_once.items():
        assert t.dtype == step_by_step[name].dtype and torch.equal(t, step_by_step[name]), name


@pytest.mark.parametrize("change", [
    {"x": None}, {"x": torch.zeros(2, 4, 5)}, {"x_dbl": torch.zeros(2, 4, 4, 5, 6)}, {"dt_weight": torch.zeros(4, 3, 2)},
    {"dt_bias": torch.zeros(4, 4, dtype=torch.float64)}, {"A_logs": torch.zeros(16)}, {"Ds": "Ds"},
], ids=lambda change: f"{next(iter(change))}={next(iter(change.values()))}"[:24])  # fmt: skip
def test_what_does_not_fit_is_no_plain_map(change, monkeypatch):
    monkeypatch.delenv("DASS_OPS_BACKEND", raising=False)
    inputs = map_inputs(MapCase(), torch.float32)
    assert _plain_map(inputs) is not None
    assert _plain_map(inputs, backend="reference") is None
    assert _plain_map(inputs | change) is None


def _plain_map(inputs, backend="cpu"):
    names = "x x_dbl dt_weight dt_bias A_logs Ds".split()
    return functional._plain_map(*(inputs[name] for name in names), backend, functional.NATIVE_MAP_CHUNKS)
