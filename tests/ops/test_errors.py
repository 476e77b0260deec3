"""Wrong arguments get an error that names the argument, what was given and what was expected."""

import pytest
import torch

from dass_ops import available_backends, bidirectional_scan, selective_scan, ss2d
from dass_ops.backends import Backend

from .cases import MapCase, ScanCase, map_inputs, scan_inputs

CHANGES = [
    ("u", lambda t: t[0], r"u has shape \(4, 33\); expected \(batch, channels, length\)"),
    ("u", lambda t: t.long(), "u has dtype torch.int64; expected float32"),
    ("delta", lambda t: t[..., :-1], r"delta has shape \(2, 4, 32\); expected u's shape"),
    ("A", lambda t: t[:-1], r"A has shape \(3, 1\)"),
    ("A", lambda t: t.to(torch.complex64), "A has dtype torch.complex64; complex"),
    ("A", lambda t: t.long(), "A has dtype torch.int64; expected a floating dtype"),
    ("B", lambda t: t[:, :, :5], r"B has shape \(2, 1, 5\); expected \(batch, state, length\)"),
    ("B", lambda t: t[:, None].expand(2, 3, 1, 33), "B has 3 groups; expected a divisor of the 4 channels"),
    ("C", lambda t: t[None, None], r"C has shape .* expected \(channels, state\), \(batch, state, length\) or"),
    ("D", lambda t: t[:2], r"D has shape \(2,\); expected \(channels,\)"),
    ("delta_bias", lambda t: 1.0, "delta_bias is float; expected a tensor"),
    ("delta", lambda t: t.to("meta"), "delta is on meta; expected cpu"),
]


@pytest.mark.parametrize("name, change, message", CHANGES)
def test_selective_scan(name, change, message):
    inputs = scan_inputs(ScanCase(), torch.float32)
    inputs[name] = change(inputs[name])
    with pytest.raises(ValueError, match=message):
        selective_scan(**inputs)


def test_options():
    inputs = scan_inputs(ScanCase(), torch.float32)
    with pytest.raises(ValueError, match="reverse has 3 flags; expected a divisor of the 4 channels"):
        selective_scan(**inputs, reverse=(True, False, True))
    with pytest.raises(ValueError, match="reverse is None; expected a bool, or one for each equal share"):
        selective_scan(**inputs, reverse=None)
    with pytest.raises(ValueError, match="B is NoneType; expected a tensor"):
        selective_scan(**(inputs | {"B": None}))
    with pytest.raises(ValueError, match="out_dtype is torch.float16; expected torch.float32"):
        selective_scan(**inputs, out_dtype=torch.float16)
    with pytest.raises(ValueError, match="backend .* is 'gpu'; expected one of cpu, cuda"):
        selective_scan(**inputs, backend="gpu")
    with pytest.raises(
        RuntimeError, match="The backend 'cuda' cannot run: it runs on CUDA tensors.*Here can: .*reference"
    ):
        selective_scan(**inputs, backend="cuda")


def test_bidirectional_scan():
    u = torch.zeros(1, 2, 3)
    with pytest.raises(ValueError, match=r"delta has shape \(1, 2, 3\); expected \(batch, 2, channels, length\)"):
        bidirectional_scan(u, u, torch.zeros(2, 2, 1), torch.zeros(1, 2, 1, 3), torch.zeros(1, 2, 1, 3))


@pytest.mark.parametrize(
    "name, change, message",
    [
        ("x_dbl", lambda t: t[:, :3], r"x_dbl has shape \(2, 3, 4, 5, 7\); expected \(batch, 4, rank \+ 2 \* state"),
        ("A_logs", lambda t: t[:5], r"A_logs has shape \(5, 1\); expected \(4 \* channels, state\) = \(16, 1\)"),
        ("x", lambda t: t[0], r"x has shape \(4, 5, 7\); expected \(batch, channels, height, width\)"),
    ],
)
def test_ss2d(name, change, message):
    inputs = map_inputs(MapCase(), torch.float32)
    inputs[name] = change(inputs[name])
    with pytest.raises(ValueError, match=message):
        ss2d(**inputs)


def test_raw_operators_check_too():
    """Whoever calls the operators directly is told as well, by the C++ checks."""
    if Backend.CPU not in available_backends("cpu"):
        pytest.skip("cpu: the native backend is not built")
    u = torch.zeros(1, 1, 2, 3)
    fine = dict(D=None, z=None, delta_bias=None, initial_state=None)
    options = dict(delta_softplus=False, reverse=[False], chunk=0, out_dtype=torch.float32)
    A, B = torch.zeros(1, 2, 1), torch.zeros(1, 1, 1, 1, 3)
    scan = torch.ops.dass_ops.scan_forward
    with pytest.raises(RuntimeError, match="delta has dtype Double; expected Float"):
        scan(u, u.double(), A, B, B, **fine, **options)
    with pytest.raises(RuntimeError, match="reverse has 1 flags; expected one for each of the 2 directions"):
        scan(u, u.expand(1, 2, 2, 3), A.expand(2, 2, 1), B, B, **fine, **options)
    with pytest.raises(RuntimeError, match="B has 3 groups on axis 2; expected a divisor of the 2 channels"):
        scan(u, u, A, B.expand(1, 1, 3, 1, 3), B, **fine, **options)
    with pytest.raises(RuntimeError, match="z cannot gate outputs that are summed"):
        B2 = B.expand(1, 2, 1, 1, 3)
        both = dict(options, reverse=[False, True])
        scan(u, u.expand(1, 2, 2, 3), A.expand(2, 2, 1), B2, B2, None, u, None, None, **both)
    with pytest.raises(RuntimeError, match="chunk is 0: the forward saved no states"):
        torch.ops.dass_ops.scan_backward(
            u, None, u, u, A, B, B, None, None, None, None, torch.zeros(1, 1, 2, 0, 1),
            delta_softplus=False, reverse=[False], chunk=0,
        )  # fmt: skip
