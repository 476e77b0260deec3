"""selective_scan in the cases that mamba_ssm publishes for its selective_scan_fn, with that package's tolerances.

Facts from state-spaces/mamba, tests/ops/test_selective_scan.py: its shapes (batch 2, 4 channels, 8 states), options, ranges
of the inputs, and tolerances, for real A. The truth is our oracle in float64, which is stricter than theirs.
"""

import pytest
import torch

from dass_ops import selective_scan_fn

from .conftest import device_of, interpreted

RELATIVE = {torch.float32: 6e-4, torch.bfloat16: 3e-2, torch.float16: 3e-3}
ABSOLUTE = {torch.float32: 2e-3, torch.bfloat16: 5e-2, torch.float16: 5e-3}
WEIGHTS = 1e-3  # tolerance, relative and absolute, of the gradients of parameters
# How many times the tolerance of the outputs a gradient may have: (relative, absolute).
LOOSER = {"u": (2, 2), "delta": (5, 10), "z": (1, 1), "B": (1, 1), "C": (1, 1)}


def case_inputs(dtype, length, *, groups, varies, D, z, bias, batch=2, channels=4, state=8):
    g = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(*shape, generator=g)

    def uniform(*shape):
        return torch.rand(*shape, generator=g)

    def projection():
        if not varies:
            return normal(channels, state)
        return normal(*((batch, state, length) if groups == 1 else (batch, groups, state, length))).to(dtype)

    return {
        "u": normal(batch, channels, length).to(dtype),
        "delta": (0.5 * uniform(batch, channels, length)).to(dtype),
        "A": -0.5 * uniform(channels, state),
        "B": projection(),
        "C": projection(),
        "D": normal(channels) if D else None,
        "z": normal(batch, channels, length).to(dtype) if z else None,
        "delta_bias": 0.5 * uniform(channels) if bias else None,
    }


def run(inputs, softplus, d_out, backend, **options):
    leaves = {k: None if t is None else t.clone().requires_grad_() for k, t in inputs.items()}
    out, last_state = selective_scan_fn(
        *leaves.values(), delta_softplus=softplus, return_last_state=True, backend=backend, **options
    )
    wanted = {k: t for k, t in leaves.items() if t is not None}
    gradients = torch.autograd.grad(out, list(wanted.values()), d_out.to(out))
    return out.detach(), last_state.detach(), dict(zip(wanted, gradients, strict=True))


OPTIONS = [
    {"groups": 1, "varies": True, "D": True, "z": True, "bias": True, "softplus": True},
    {"groups": 2, "varies": True, "D": True, "z": True, "bias": True, "softplus": True},
    {"groups": 1, "varies": True, "D": False, "z": False, "bias": False, "softplus": False},
    {"groups": 1, "varies": False, "D": True, "z": False, "bias": True, "softplus": True},
]


@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: "-".join(f"{k}={v}" for k, v in o.items()))
@pytest.mark.parametrize("length", [128, 256, 512, 1024, 2048, 4096])
@pytest.mark.parametrize("dtype", list(RELATIVE), ids=str)
def test_published_cases(dtype, length, options, backend):
    if interpreted(backend) and (length > 128 or dtype == torch.float16):
        pytest.skip("interpreted: a choice of lengths and dtypes")
    if device_of(backend) == "cpu" and length not in (128, 512):
        pytest.skip("the oracle is a loop: a choice of lengths")
    options = dict(options)
    softplus = options.pop("softplus")
    inputs = {
        k: None if t is None else t.to(device_of(backend)) for k, t in case_inputs(dtype, length, **options).items()
    }
    d_out = torch.randn(inputs["u"].shape, generator=torch.Generator().manual_seed(1)).to(inputs["u"])
    got = run(inputs, softplus, d_out, backend)
    expected = run(
        {k: None if t is None else t.cpu().double() for k, t in inputs.items()},
        softplus,
        d_out.cpu().double(),
        "reference",
    )
    relative, absolute = RELATIVE[dtype], ABSOLUTE[dtype]

    def close(name, g, e, relative, absolute):
        torch.testing.assert_close(g.cpu().double(), e, rtol=relative, atol=absolute, msg=lambda m: f"{name}: {m}")

    assert got[0].dtype == dtype and got[1].dtype == torch.float32
    close("out", got[0], expected[0], relative, absolute)
    close("last state", got[1], expected[1], relative, absolute)
    for name, e in expected[2].items():
        if name in LOOSER and inputs[name].dim() > 2:
            close(
                f"d_{name}", got[2][name], e, *(f * t for f, t in zip(LOOSER[name], (relative, absolute), strict=True))
            )
        else:
            close(
                f"d_{name}", got[2][name], e, max(WEIGHTS, relative if inputs.get("z") is not None else 0), 5 * WEIGHTS
            )
