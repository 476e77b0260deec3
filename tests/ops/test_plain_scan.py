"""selective_scan in one step (csrc/plain_scan.cpp) and step by step (functional.py): which call goes where, the same bits."""

import pytest
import torch

from dass_ops import functional, selective_scan
from dass_ops.backends import Backend

from .cases import ScanCase, run_scan, scan_inputs
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
    monkeypatch.setattr(functional, "_plain_scan", lambda *arguments: [])
    step_by_step = run_scan(selective_scan, case, inputs, dtype, "cpu", options=options)
    assert [bool(t) for t in took] == [case in PLAIN]
    for name, t in at_once.items():
        assert t.dtype == step_by_step[name].dtype and torch.equal(t, step_by_step[name]), name


def test_mixed_dtypes_are_no_plain_call():
    inputs = scan_inputs(ScanCase(), torch.float32)
    mixed = selective_scan(**(inputs | {"delta": inputs["delta"].bfloat16()}), delta_softplus=True, backend="cpu")
    converted = inputs | {"delta": inputs["delta"].bfloat16().float()}
    assert torch.equal(mixed, selective_scan(**converted, delta_softplus=True, backend="cpu"))
