"""Needle in a haystack: models by name, positions of an AST beyond its length, windows."""

import copy
from dataclasses import asdict

import numpy as np
import pytest
import torch

from dass.niah_models import (
    LongAST,
    ModelError,
    ModelSpec,
    load_model,
    parse_spec,
    parse_specs,
    sinusoids,
    windowed,
)
from tests.model.niah_tones import (
    CPU,
    FRONT_END,
    NAMES,
)

# --- models -----------------------------------------------------------------------------------------------------------


def test_specifications_are_taken_apart(tmp_path):
    assert parse_spec("DASS=runs/a@windows") == ModelSpec("DASS", "runs/a", "windows")
    assert parse_spec("package.module:function") == ModelSpec("package.module:function", "package.module:function")
    assert parse_spec("runs/esc10@sinusoidal").name == "esc10@sinusoidal"
    with pytest.raises(ModelError, match="sinusoidle.*sinusoidal"):
        parse_spec("ast@sinusoidle")
    with pytest.raises(ModelError, match="no file or folder 'nothing'"):
        parse_specs(("nothing",))
    with pytest.raises(ModelError, match="two models"):
        parse_specs(("math:sin", "math:sin"))


@pytest.fixture
def small_ast(fresh_ast):
    return copy.deepcopy(fresh_ast)


@pytest.fixture(scope="module")
def fresh_ast():
    pytest.importorskip("transformers")
    from transformers import ASTConfig, ASTForAudioClassification

    torch.manual_seed(0)
    config = ASTConfig(
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        frequency_stride=16,
        time_stride=8,
        max_length=40,
        num_mel_bins=32,
        num_labels=3,
        id2label=dict(enumerate(NAMES)),
    )
    model = ASTForAudioClassification(config).eval().requires_grad_(False)
    torch.nn.init.normal_(model.audio_spectrogram_transformer.embeddings.position_embeddings)
    return model


@pytest.mark.parametrize("way", ["sinusoidal", "interpolated"])
def test_an_ast_is_itself_at_its_length_and_takes_any_other(small_ast, way):
    fbank = torch.randn(2, 40, 32)
    expected = small_ast(input_values=fbank).logits
    long = LongAST(small_ast, way)
    assert long(torch.randn(1, 200, 32)).shape == (1, 3)
    assert torch.equal(long(fbank), expected), "also after another length"
    assert long(torch.randn(1, 16, 32)).shape == (1, 3)
    with pytest.raises(ModelError, match="16 frames"):
        long(torch.randn(1, 15, 32))


def test_positions_beyond_the_trained_length(small_ast):
    long = LongAST(small_ast, "interpolated")
    rows, trained = 2, 4
    ramp = torch.arange(trained, dtype=torch.float32).repeat(rows)[None, :, None] + 10 * torch.arange(
        rows
    ).repeat_interleave(trained).view(1, -1, 1)
    long.learned = torch.cat([torch.full((1, 2, 16), -5.0), ramp.expand(1, -1, 16)], dim=1)
    found = long.positions(16 + 8 * 15)[0, :, 0]  # 16 columns
    assert found.shape == (2 + rows * 16,) and (found[:2] == -5).all(), "the two special tokens keep theirs"
    grid = found[2:].view(rows, 16)
    assert torch.allclose(grid[1] - grid[0], torch.full((16,), 10.0)), "frequency is left alone"
    assert (grid[0].diff() >= 0).all() and grid[0, 0] == 0 and grid[0, -1] == 3
    sines = LongAST(small_ast, "sinusoidal").positions(16 + 8 * 15)
    assert torch.equal(sines[0], sinusoids(2 + rows * 16, 16))
    table = sinusoids(50, 6)
    assert table[0].tolist() == [0, 1, 0, 1, 0, 1]
    assert table[7, 2].item() == pytest.approx(np.sin(7 / 10000 ** (2 / 6)), abs=1e-6)
    assert table[7, 3].item() == pytest.approx(np.cos(7 / 10000 ** (2 / 6)), abs=1e-6)


def test_windows_keep_the_highest_logit():
    seen = []

    def run(fbank):
        seen.append(tuple(fbank.shape))
        return fbank.sum(dim=(1, 2))[:, None]

    fbank = torch.zeros(1, 130, 32)
    fbank[0, 125] = 1
    assert windowed(run, FRONT_END)(fbank).item() == 32 and all(shape[1] == 40 for shape in seen)
    assert sum(shape[0] for shape in seen) == 6  # 0, 20, ..., 80, and 90 flush with the end
    short = torch.zeros(1, 10, 32)
    assert windowed(run, FRONT_END)(short).item() == pytest.approx(30 * 32 * FRONT_END.padding, rel=1e-4)


def test_dass_ast_and_functions_are_loaded(small_ast, tmp_path, monkeypatch):
    from dass.model import DASS, DASSConfig
    from dass.teacher_models import TransformersClassifier

    config = DASSConfig(depths=(1, 1), dims=(8, 16), num_classes=3, mel_bins=32, id2label=dict(enumerate(NAMES)))
    DASS(config, front_end=asdict(FRONT_END)).save_pretrained(tmp_path / "dass")
    TransformersClassifier(small_ast, FRONT_END).save_pretrained(tmp_path / "ast")
    (tmp_path / "mine.py").write_text(
        "import torch\ndef model(fbank): return fbank.mean(1)[:, :3]\n"
        "model.front_end = dict(frames=40, mel_bins=32)\nmodel.classes = ('low', 'middle', 'high')\n"
        "number = 3\n"
    )
    monkeypatch.chdir(tmp_path)
    specs = parse_specs(("dass", "ast", "ast@windows", "mine:model"))
    assert [spec.name for spec in specs] == ["dass", "ast@sinusoidal", "ast@interpolated", "ast@windows", "mine:model"]
    models = [load_model(spec, CPU, "reference" if spec.name == "dass" else None) for spec in specs]
    for model in models:
        with torch.inference_mode():
            assert model.run(torch.randn(1, 90, 32)).shape == (1, 3)
        assert model.front_end == FRONT_END
        assert [entry.name for entry in model.classes] == list(NAMES)
    assert models[0].identity == load_model(specs[0], CPU).identity != models[1].identity == models[2].identity
    for text, words in (("mine:absent", "absent"), ("mine:number", "is a int"), ("dass@sinusoidal", "has none")):
        with pytest.raises(ModelError, match=words):
            load_model(parse_spec(text), CPU)
