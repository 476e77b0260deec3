"""The operators as PyTorch sees them: opcheck, gradcheck, torch.compile, torch.export, autocast."""

import pytest
import torch
from torch import library

from dass_ops import bidirectional_scan, selective_scan, ss2d, ss2d_projected
from dass_ops.backends import CHUNK, SUFFIX, Backend, resolve
from dass_ops.registration import operator

from .cases import MapCase, ScanCase, map_inputs, scan_inputs
from .conftest import device_of, interpreted

CHECKS = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")


def leaves(inputs, backend, dtype=None):
    device = device_of(backend)
    return {
        k: None if t is None else t.detach().to(device, dtype or t.dtype).requires_grad_() for k, t in inputs.items()
    }


@pytest.mark.parametrize("z", [False, True])
def test_opcheck_scan(backend_with_suffix, z):
    backend = resolve("cpu", backend_with_suffix)
    case = ScanCase(state=2, length=9, z=z, initial_state=z)
    t = leaves(scan_inputs(case, torch.float32), backend)

    def split(tensor, axis):
        return None if tensor is None else tensor.detach().unflatten(axis, (1, 4)).requires_grad_()

    arguments = (
        split(t["u"], 1), split(t["delta"], 1), split(t["A"], 0),
        t["B"].detach()[:, None, None].contiguous().requires_grad_(),
        t["C"].detach()[:, None, None].contiguous().requires_grad_(),
        split(t["D"], 0), split(t["z"], 1), split(t["delta_bias"], 0), split(t["initial_state"], 1),
    )  # fmt: skip
    options = {"delta_softplus": True, "reverse": [z], "chunk": CHUNK[backend], "out_dtype": torch.float32}
    library.opcheck(operator("scan_forward", SUFFIX[backend]), arguments, options, test_utils=CHECKS)


@pytest.mark.parametrize("projected", [False, True])
def test_opcheck_ss2d(backend_with_suffix, projected):
    backend = resolve("cpu", backend_with_suffix)
    inputs = leaves(map_inputs(MapCase(height=3, width=4), torch.float32, projected=projected), backend)
    options = {"chunk": CHUNK[backend], "out_dtype": torch.float32}
    name = "ss2d_projected_forward" if projected else "ss2d_forward"
    library.opcheck(operator(name, SUFFIX[backend]), tuple(inputs.values()), options, test_utils=CHECKS)


@pytest.mark.parametrize("function", [selective_scan, bidirectional_scan])
def test_gradcheck_scan(function):
    case = ScanCase(state=2, length=5, batch=1, channels=2, z=True, initial_state=True)
    if function is selective_scan:
        inputs = scan_inputs(case, torch.float64)
        inputs["C"] = torch.randn(2, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    else:
        from .test_bidirectional_scan import inputs_of

        inputs = inputs_of(case, torch.float64)
    names = list(inputs)

    def call(*tensors):
        return function(
            **dict(zip(names, tensors, strict=True)), delta_softplus=True, return_last_state=True, backend="cpu"
        )

    assert torch.autograd.gradcheck(call, tuple(leaves(inputs, Backend.CPU).values()), fast_mode=False)


@pytest.mark.parametrize("function", [ss2d, ss2d_projected])
def test_gradcheck_ss2d(function):
    inputs = map_inputs(
        MapCase(batch=1, channels=2, height=2, width=3), torch.float64, projected=function is ss2d_projected
    )

    def call(*tensors):
        return function(*tensors, backend="cpu")

    assert torch.autograd.gradcheck(call, tuple(leaves(inputs, Backend.CPU).values()))


@pytest.mark.parametrize("compiler", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compile_without_graph_breaks(compiler, backend):
    if compiler == "inductor" and interpreted(backend):
        pytest.skip("interpreted backends run Python inside the operator; aot_eager covers them")
    scan, maps = scan_inputs(ScanCase(state=2), torch.float32), map_inputs(MapCase(), torch.float32, projected=True)

    def both(s, m):
        out = selective_scan(**s, delta_softplus=True, reverse=(True, False), backend=backend)
        return out.sum() + ss2d_projected(**m, backend=backend).square().sum()

    def gradients(function):
        s, m = leaves(scan, backend), leaves(maps, backend)
        wanted = [t for t in (*s.values(), *m.values()) if t is not None]
        return torch.autograd.grad(function(s, m), wanted)

    compiled = torch.compile(both, fullgraph=True, backend=compiler)
    for expected, got in zip(gradients(both), gradients(compiled), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


def test_compile_with_dynamic_length():
    def function(u, delta, A, B, C):
        return selective_scan(u, delta, A, B, C, delta_softplus=True, backend="cpu")

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager", dynamic=True)
    for length in (5, 9, 300):
        inputs = scan_inputs(ScanCase(length=length, D=False, bias=False), torch.float32)
        arguments = [inputs[k] for k in ("u", "delta", "A", "B", "C")]
        torch.testing.assert_close(compiled(*arguments), function(*arguments))


def test_export():
    class Module(torch.nn.Module):
        def forward(self, x, weight, dt_weight, dt_bias, A_logs, Ds):
            return ss2d_projected(x, weight, dt_weight, dt_bias, A_logs, Ds, backend="cpu")

    arguments = tuple(map_inputs(MapCase(), torch.float32, projected=True).values())
    program = torch.export.export(Module(), arguments)
    torch.testing.assert_close(program.module()(*arguments), Module()(*arguments))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_autocast_changes_nothing(dtype, backend):
    device = device_of(backend)
    scan = leaves(scan_inputs(ScanCase(state=2), dtype), backend)
    maps = leaves(map_inputs(MapCase(), dtype, projected=True), backend)

    def run():
        return (
            selective_scan(**scan, delta_softplus=True, backend=backend),
            ss2d_projected(**maps, backend=backend),
        )

    plain = run()
    with torch.autocast(device, torch.bfloat16):
        cast = run()
    for a, b in zip(plain, cast, strict=True):
        assert a.dtype == b.dtype == dtype
        assert torch.equal(a, b)


def test_unused_results_and_inputs():
    """Backward accepts a missing gradient of either result and inputs that need none."""
    inputs = scan_inputs(ScanCase(initial_state=True), torch.float32)
    inputs["u"].requires_grad_()
    out, last = selective_scan(**inputs, delta_softplus=True, return_last_state=True, backend="cpu")
    (from_last,) = torch.autograd.grad(last.sum(), inputs["u"], retain_graph=True)
    (from_out,) = torch.autograd.grad(out.sum(), inputs["u"], retain_graph=True)
    (from_both,) = torch.autograd.grad(out.sum() + last.sum(), inputs["u"])
    torch.testing.assert_close(from_last + from_out, from_both)
    assert from_last.abs().max() > 0


@pytest.mark.parametrize("call", [selective_scan, ss2d], ids=lambda f: f.__name__)
def test_a_second_derivative_is_an_error(call, backend):
    inputs = map_inputs(MapCase(), torch.float32) if call is ss2d else scan_inputs(ScanCase(length=5), torch.float32)
    inputs = leaves(inputs, backend)
    first = next(iter(inputs.values()))
    (gradient,) = torch.autograd.grad(call(**inputs, backend=backend).square().sum(), first, create_graph=True)
    with pytest.raises(RuntimeError, match="cannot be differentiated again.*backend='reference'"):
        torch.autograd.grad(gradient.sum(), first)
