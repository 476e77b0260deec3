"""Long inputs: what a pass without gradients holds, and that holding less changes nothing."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from dass import pieces
from dass.model import DASS, DASSConfig
from dass.niah_measure import measure

CONFIG = DASSConfig(depths=(1, 1), dims=(16, 32), num_classes=3, mel_bins=64)


@pytest.fixture
def model():
    torch.manual_seed(0)
    return DASS(CONFIG).eval()


@pytest.mark.parametrize("piece", [1, 100, 1 << 12])
def test_an_mlp_in_pieces_gives_the_same(model, monkeypatch, piece):
    fbank = torch.randn(2, 300, 64)
    with torch.inference_mode():
        expected = model(fbank)
        monkeypatch.setattr(pieces, "PIECE", piece)
        assert torch.allclose(model(fbank), expected, atol=1e-5)
        assert torch.allclose(model(fbank), model(fbank), atol=0), "the input of a pass is left alone"
    before = fbank.clone()
    with torch.no_grad():
        model(fbank)
    assert torch.equal(fbank, before)
    assert torch.allclose(model(fbank), expected, atol=1e-5), "with gradients: as a whole"
    assert model(fbank).requires_grad


@pytest.mark.skipif(
    not Path("/proc/self/clear_refs").exists(), reason="the peak of memory is measured under Linux only"
)
@pytest.mark.slow
def test_a_long_pass_holds_few_maps():
    """Each further minute costs less than seven maps of the first stage; with the MLP's inner ones it would be twelve."""
    model = DASS(replace(CONFIG, dims=(32, 32))).eval()
    memory = []
    with torch.inference_mode():
        for minutes in (5, 10, 20):
            fbank = torch.randn(1, minutes * 6000, 64)
            memory.append(measure(lambda fbank=fbank: model(fbank), torch.device("cpu")).memory)
    ten_minutes_of_map = 4 * 16 * (10 * 6000 // 4) * 32
    assert memory[2] - memory[1] < 7 * ten_minutes_of_map
