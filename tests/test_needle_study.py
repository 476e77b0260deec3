"""The needle study: the clips that it makes of spoken words, the AST that it trains, and what it says of wrong input."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture
def study(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import needle_corpus
    import needle_study

    monkeypatch.setattr(needle_corpus, "TRAINING_CLIPS", 24)
    monkeypatch.setattr(needle_corpus, "HELD_OUT_CLIPS", 12)
    return needle_study


@pytest.fixture
def recordings(tmp_path):
    """Two digits by two speakers, eight takes each: a constant that tells the take, so that it is found again."""
    import soundfile

    folder = tmp_path / "fsdd" / "recordings"
    folder.mkdir(parents=True)
    for digit in (3, 7):
        for speaker in ("ann", "bob"):
            for take in range(8):
                soundfile.write(folder / f"{digit}_{speaker}_{take}.wav", np.full(1000, (1 + take) / 10), 8000)
    return folder


def test_the_clips_are_as_long_as_1024_frames_and_share_no_take(study, recordings, tmp_path):
    import soundfile

    from dass.audio import LogMelConfig

    folder = study.build_corpus(recordings, tmp_path / "clips")
    takes = {"train": set(), "test": set()}
    for path in folder.iterdir():
        sound, rate = soundfile.read(path)
        assert LogMelConfig(sample_rate=rate).frames_of(sound.size) == 1024 and np.abs(sound).max() <= 1
        levels, counts = np.unique(np.round(sound * 10, 2), return_counts=True)
        if counts.max() > 60000:  # silence between the words
            takes[path.stem.split("_")[2].rstrip("0123456789")] |= set(levels[levels > 0].round().astype(int) - 1)
    assert takes["test"] <= {0, 1, 2, 3, 4} and takes["train"] <= {5, 6, 7} and all(takes.values())
    names = sorted(path.name for path in folder.iterdir())
    assert len(names) == 36 and {name[:5] for name in names} == {"3_ann", "3_bob", "7_ann", "7_bob"}
    again = study.build_corpus(recordings, tmp_path / "again")
    assert all((again / name).read_bytes() == (folder / name).read_bytes() for name in names)


def test_a_longer_ast_is_the_trained_one_with_stretched_positions(study, tmp_path):
    pytest.importorskip("transformers")
    from dass.audio import LogMelConfig
    from dass.manifest import LabelClass

    classes = tuple(LabelClass(index, str(index), str(index)) for index in range(3))
    short, long = (LogMelConfig(sample_rate=8000, mel_bins=32, frames=frames) for frames in (64, 256))
    torch.manual_seed(0)
    trained = study.build_ast(None, classes, short)
    trained.save_pretrained(tmp_path / "best")
    grown = study.longer_ast(tmp_path / "best", None, classes, long)
    before, after = trained.state_dict(), grown.state_dict()
    different = [name for name in before if not torch.equal(before[name], after[name])]
    assert len(different) == 1 and different[0].endswith("position_embeddings")
    assert before[different[0]].shape[1] == 2 + 2 * 4 and after[different[0]].shape[1] == 2 + 2 * 16
    assert grown(torch.randn(1, 256, 32)).shape == (1, 3) and grown.training


@pytest.mark.parametrize(
    "arguments, words",
    [(["train", "--data", "nowhere"], "no fsdd and no esc10"), (["summary", "--out", "nowhere"], "holds no results")],
)
def test_wrong_input_is_told_in_a_line(arguments, words, tmp_path):
    command = [sys.executable, str(BENCHMARKS / "needle_study.py"), *arguments]
    environment = {**os.environ, "PYTHONPATH": str(BENCHMARKS.parent)}
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120, env=environment)
    assert done.returncode == 2 and words in done.stderr and len(done.stderr.splitlines()) == 1
