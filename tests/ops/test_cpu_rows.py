"""Rows on a CPU: what depends on their length, place in memory and number, and must not show in the result."""

import pytest
import torch

from dass_ops import selective_scan
from dass_ops.backends import Backend

from .conftest import require


@pytest.fixture(autouse=True)
def native(poison):
    require(Backend.CPU)


def inputs_of(
    channels: int, length: int, dtype: torch.dtype, state: int = 1, offset: int = 0
) -> dict[str, torch.Tensor]:
    """Of four directions; the sequences begin `offset` elements into their memory."""
    g = torch.Generator().manual_seed(length)

    def normal(*shape, dtype=torch.float32):
        count = torch.Size(shape).numel()
        return torch.randn(count + offset, generator=g).to(dtype)[offset:].view(shape)

    return {
        "u": normal(1, channels, length, dtype=dtype), "delta": normal(1, channels, length, dtype=dtype),
        "A": -normal(channels, state).abs(), "B": normal(1, 4, state, length, dtype=dtype),
        "C": normal(1, 4, state, length, dtype=dtype), "D": normal(channels), "delta_bias": normal(channels),
    }  # fmt: skip


# Outputs of a megabyte and more go past the caches; these have rows of one stretch and of many, aligned and not.
LARGE = [(8, 33001), (132, 2047), (520, 511), (516, 512), (2100, 127), (2052, 128), (4100, 64), (4400, 61), (3000, 200)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("channels, length", LARGE, ids=str)
@pytest.mark.parametrize("offset", [0, 3])
def test_large_outputs_are_those_of_small_ones(channels, length, dtype, offset):
    if dtype != torch.float32:
        channels *= 2
    reverse = (False, True, True, False)
    inputs = inputs_of(channels, length, dtype, offset=offset)
    together = selective_scan(**inputs, delta_softplus=True, reverse=reverse)
    share = channels // 4
    most = max(1, (1 << 17) // length)
    for k in range(4):
        for begin in range(k * share, (k + 1) * share, most):
            of = slice(begin, min(begin + most, (k + 1) * share))
            part = {name: t[:, of] if name in ("u", "delta") else t[:, k : k + 1] if name in "BC" else t[of]
                    for name, t in inputs.items()}  # fmt: skip
            alone = selective_scan(**part, delta_softplus=True, reverse=reverse[k])
            assert torch.equal(together[:, of], alone), (k, begin)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("length", [3, 64, 65, 127, 129, 511, 513, 1025, 9000])
def test_rows_anywhere_in_memory_give_the_same_bits(length, dtype):
    inputs = inputs_of(8, length, dtype)
    expected = selective_scan(**inputs, delta_softplus=True, reverse=(False, True))
    for offset in (1, 5, 16):
        moved = {}
        for name, t in inputs.items():
            memory = torch.empty(t.numel() + offset, dtype=t.dtype)
            moved[name] = memory[offset:].view(t.shape).copy_(t)
        assert torch.equal(selective_scan(**moved, delta_softplus=True, reverse=(False, True)), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("length", [61, 128, 700, 9000])
def test_rows_of_16_bits_are_those_of_float32_rounded(length, dtype):
    inputs = inputs_of(16, length, dtype)
    wide = {name: t.float() for name, t in inputs.items()}
    expected = selective_scan(**wide, delta_softplus=True, reverse=(False, True))
    assert torch.equal(selective_scan(**inputs, delta_softplus=True, reverse=(False, True)), expected.to(dtype))
    assert torch.equal(
        selective_scan(**inputs, delta_softplus=True, reverse=(False, True), out_dtype=torch.float32), expected
    )


def test_not_a_number_stays_one_in_bfloat16():
    inputs = inputs_of(4, 300, torch.bfloat16)
    inputs["D"][1] = torch.tensor(0x7FFFFFFF, dtype=torch.int32).view(torch.float32)  # all ones: rounding would carry
    inputs["D"][2] = torch.tensor(-1, dtype=torch.int32).view(torch.float32)
    out = selective_scan(**inputs, delta_softplus=True)
    assert out[0, 1:3].isnan().all() and out[0, [0, 3]].isfinite().all()
