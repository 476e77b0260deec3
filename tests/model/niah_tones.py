"""Clips of pure tones, models that hear them and a small grid, for the tests of the needle in a haystack."""

import torch

from dass.audio import AudioError, LogMelConfig
from dass.manifest import LabelClass
from dass.niah_data import NeedleSet
from dass.niah_grid import Grid, Protocol
from dass.niah_models import (
    ModelSpec,
    NiahModel,
)
from dass.niah_store import Store

CPU = torch.device("cpu")
RATE = 16000
FRONT_END = LogMelConfig(frames=40, mel_bins=32)
NAMES = ("low", "middle", "high")
TONES = (300.0, 1200.0, 5000.0)


class Tones:
    """Clips of a pure tone, one of three, with a broken one where asked for."""

    classes = tuple(LabelClass(index, name, name) for index, name in enumerate(NAMES))

    def __init__(self, count=6, broken=()):
        self.count, self.broken = count, broken

    def __len__(self):
        return self.count

    def labels(self, index):
        return (index % 3,)

    def name(self, index):
        return f"tone-{index}"

    def file(self, index):
        return None

    def seconds(self, index):
        return 0.4

    def read(self, index, *, sample_rate, start, duration, hashed):
        if index in self.broken:
            raise AudioError(self.name(index), "is broken")
        time = torch.arange(int(0.41 * RATE)) / RATE
        return 0.3 * torch.sin(2 * torch.pi * (TONES[index % 3] + 10 * index) * time), ""


def hear(fbank):
    """Logits that follow the loudest band: finds every tone of this corpus wherever it is, in any haystack used here."""
    parts = fbank.split([11, 11, 10], dim=2)
    return torch.stack([part.amax(dim=(1, 2)) for part in parts], dim=1)


def hear_beginning(fbank):
    """Deaf after the first 40 frames."""
    return hear(fbank[:, :40])


def model_of(run, name="model", identity="weights-1"):
    return NiahModel(name, run, FRONT_END, Tones.classes, 0, identity, CPU)


PROTOCOL = Protocol(
    lengths=(0.0, 1.0, 2.0),
    positions=(0.0, 0.5, 1.0),
    haystacks=("mean-spectrum", "white"),
    snrs=(20.0,),
    placing="replace",
    seed=0,
    talkers=2,
    folders={},
    audio_per_cell=None,
    fewest_needles=1,
    bootstrap=20,
)
FIXED = {"needles": "tones", "positions": [0.0, 0.5, 1.0]}


def run_grid(folder, models, protocol=PROTOCOL, clips=None, source=None, fixed=FIXED, **options):
    """Runs the grid of named functions; returns the store."""
    store = Store(folder, fixed)
    loaded = {name: run if isinstance(run, NiahModel) else model_of(run, name) for name, run in models.items()}
    specs = [ModelSpec(name, name) for name in models]
    needles = NeedleSet(source or Tones(), clips, 0, "tones")
    Grid(protocol, needles, specs, lambda spec: loaded[spec.name], store, **options).run()
    return Store(folder, fixed)


def timeless(store):
    """The lines without what depends on the clock or the machine."""
    clock = {"seconds", "seconds_worst", "peak_memory", "finished"}
    return {key: {k: v for k, v in line.items() if k not in clock} for key, line in store.lines.items()}
