"""What only a GPU can show: streams, graphs, devices, asynchrony, compilation. The suite's other tests run there as well."""

import threading

import pytest
import torch

from dass_ops import selective_scan, ss2d, ss2d_projected
from dass_ops.backends import Backend, availability

from .cases import MapCase, ScanCase, map_inputs, scan_inputs

CASE = ScanCase(channels=16, length=700, state=4, z=True, B=2, C=2)
MAP = MapCase(channels=24, height=13, width=21, rank=6)


@pytest.fixture(autouse=True)
def cuda():
    if not torch.cuda.is_available():
        pytest.skip("cuda: no CUDA device is visible")
    if not (state := availability(Backend.CUDA, "cuda")).available:
        pytest.skip(f"cuda: {state.reason}")


def leaves(inputs, device="cuda"):
    return {k: None if t is None else t.to(device).requires_grad_() for k, t in inputs.items()}


def both(scan, maps):
    """Results and gradients of a scan and a map, with the cotangents that sum their squares."""
    out = selective_scan(**scan, delta_softplus=True, reverse=(False, True), backend="cuda")
    y = ss2d(**maps, backend="cuda")
    wanted = [t for t in (*scan.values(), *maps.values()) if t is not None]
    gradients = torch.autograd.grad(out.square().sum() + y.square().sum(), wanted)
    return [out.detach(), y.detach(), *gradients]


def on(device="cuda", dtype=torch.float32):
    return leaves(scan_inputs(CASE, dtype), device), leaves(map_inputs(MAP, dtype), device)


def assert_same_bits(one, other):
    for a, b in zip(one, other, strict=True):
        assert torch.equal(a.to(b.device), b)


def test_side_stream():
    """Work on another stream waits for what that stream waits for, and for nothing else."""
    inputs = on()
    expected = both(*inputs)
    stream = torch.cuda.Stream()
    slow = torch.randn(2048, 2048, device="cuda")
    with torch.cuda.stream(stream):
        for _ in range(20):  # so that wrong order would show
            slow = slow @ slow / 45

        def late(t):  # t, but not before the products
            return None if t is None else (t + 0 * slow[0, 0]).detach().requires_grad_()

        found = both(*({k: late(t) for k, t in i.items()} for i in inputs))
    stream.synchronize()
    assert_same_bits(found, expected)


def test_threads_with_streams_of_their_own():
    inputs = on()
    expected = both(*inputs)
    found = {}

    def work(index):
        with torch.cuda.stream(torch.cuda.Stream()):
            for _ in range(5):
                found[index] = both(*on())
            torch.cuda.current_stream().synchronize()

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert sorted(found) == [0, 1, 2, 3]
    for each in found.values():
        assert_same_bits(each, expected)


@pytest.mark.parametrize("length", [700, 20_000])  # the second: in segments, with scratch memory
def test_graph(length):
    """Forward and backward are captured; replays read new inputs from the same memory."""
    case = ScanCase(batch=1, channels=4, length=length, state=2)
    scan, maps = leaves(scan_inputs(case, torch.float32)), leaves(map_inputs(MAP, torch.float32))
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            both(scan, maps)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = both(scan, maps)
    with torch.no_grad():
        scan["u"].copy_(torch.randn_like(scan["u"]))
        maps["x"].copy_(torch.randn_like(maps["x"]))
    graph.replay()
    torch.cuda.synchronize()
    assert_same_bits([t.clone() for t in captured], both(scan, maps))


def test_every_device():
    if torch.cuda.device_count() < 2:
        pytest.skip("one CUDA device only")
    expected = both(*on("cuda:0"))
    for index in range(1, torch.cuda.device_count()):
        with torch.cuda.device(0):  # the tensors' device counts, not the current one
            found = both(*on(f"cuda:{index}"))
        assert all(t.device.index == index for t in found)
        if torch.cuda.get_device_name(index) == torch.cuda.get_device_name(0):
            assert_same_bits(found, expected)


def test_mixed_devices_are_refused():
    inputs = scan_inputs(CASE, torch.float32)
    inputs["u"] = inputs["u"].cuda()
    with pytest.raises(ValueError, match="delta is on cpu; expected cuda"):
        selective_scan(**inputs, delta_softplus=True)


def test_the_host_does_not_wait():
    inputs = on()
    both(*inputs)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        both(*inputs)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    event = torch.cuda.Event()
    slow = torch.randn(4096, 4096, device="cuda")
    for _ in range(30):
        slow = slow @ slow / 64
    both(*inputs)
    event.record()
    assert not event.query()  # the products are still running, and everything was launched
    torch.cuda.synchronize()


def test_compile():
    inputs = map_inputs(MAP, torch.float32, projected=True)

    def function(**maps):
        return ss2d_projected(**maps, backend="cuda").square().sum()

    compiled = torch.compile(function, fullgraph=True)
    one, other = leaves(inputs), leaves(inputs)
    expected = torch.autograd.grad(function(**one), list(one.values()))
    for a, b in zip(torch.autograd.grad(compiled(**other), list(other.values())), expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_too_many_states_are_refused():
    inputs = leaves(scan_inputs(ScanCase(batch=1, channels=1, length=2, state=100_000), torch.float32))
    with pytest.raises(RuntimeError, match="state size 100000 is more than the shared memory"):
        selective_scan(**inputs, delta_softplus=True, backend="cuda")


def test_offsets_beyond_32_bits():
    """4 x 384 x 1.5 million positions: more elements than 32 bits count. The last channels, beside the same scan alone."""
    batch, channels, length = 4, 384, 1_500_000
    free, _ = torch.cuda.mem_get_info()
    if free < 40 << 30:
        pytest.skip("needs 40 GB of GPU memory")
    g = torch.Generator("cuda").manual_seed(0)
    u = torch.randn(batch, channels, length, generator=g, device="cuda", dtype=torch.bfloat16)
    delta = torch.rand(batch, channels, length, generator=g, device="cuda", dtype=torch.bfloat16)
    A = -torch.rand(channels, 1, generator=g, device="cuda")
    B, C = (torch.randn(batch, 1, length, generator=g, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    assert u.numel() > 2**31
    out = selective_scan(u, delta, A, B, C, backend="cuda")
    last = slice(-1, None)
    alone = selective_scan(
        u[last, -8:].contiguous(), delta[last, -8:].contiguous(), A[-8:], B[last], C[last], backend="cuda"
    )
    torch.testing.assert_close(out[last, -8:].float(), alone.float(), rtol=2e-2, atol=2e-2)
