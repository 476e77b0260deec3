"""Small recordings and manifests for the tests of the input pipeline."""

import zlib

import numpy as np
import pytest
import soundfile

from dass.manifest import Clip, LabelClass, Manifest


def write_sound(path, seconds=0.3, rate=16000, seed=None, channels=1):
    path.parent.mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng(zlib.crc32(path.name.encode()) if seed is None else seed)
    soundfile.write(path, 0.1 * random.standard_normal((int(seconds * rate), channels)), rate)
    return path


@pytest.fixture
def folder(tmp_path):
    """Three classes of eight recordings of different length, rate and format."""
    for label in ("cat", "dog", "owl"):
        for take in range(8):
            suffix, rate = [("wav", 16000), ("flac", 22050), ("wav", 8000)][take % 3]
            write_sound(tmp_path / "set" / label / f"{label}-{take}.{suffix}", 0.2 + 0.07 * take, rate)
    return tmp_path / "set"


def manifest_of(clips):
    classes = [LabelClass(i, f"c{i}", f"c{i}") for i in range(4)]
    return Manifest([Clip(f"/x/{key}", labels, key, "", group) for key, labels, group in clips], classes)
