"""Tones, and a model whose answers to them are known, for the tests of tagging."""

from types import SimpleNamespace

import numpy as np
import torch

from dass.audio import LogMelConfig

RATE = 16000
FRONT_END = LogMelConfig(frames=100)
BANDS = ("low", "middle", "high")


class Bands(torch.nn.Module):
    """Logits that follow the energy in three parts of the spectrum: a model whose answers are known."""

    front_end = FRONT_END
    config = SimpleNamespace(id2label=dict(enumerate(BANDS)))

    def forward(self, fbank):
        parts = torch.stack([part.amax(dim=(1, 2)) for part in fbank.split([43, 43, 42], dim=2)], dim=1)
        return 40 * (parts - 0.6)  # a tone is above, silence below


def tone(frequency: float, seconds: float, level: float = 0.5) -> np.ndarray:
    time = np.arange(int(seconds * RATE)) / RATE
    return (level * np.sin(2 * np.pi * frequency * time)).astype(np.float32)


def silence(seconds: float) -> np.ndarray:
    return np.zeros(int(seconds * RATE), dtype=np.float32)
