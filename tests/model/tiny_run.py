"""A training run small enough for tests: sound files of three tones, a DASS of two blocks, 16 mel bins."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import soundfile

from dass.augment import AugmentConfig
from dass.config import TrainConfig
from dass.data import DataConfig
from dass.optimization import OptimizerConfig, ScheduleConfig
from dass.run_folder import RunConfig
from dass.run_log import LogConfig
from dass.student import StudentConfig
from dass.trainer import LoopConfig

TONES = {"low": 300.0, "middle": 900.0, "high": 2700.0}


def write_tones(folder: Path, per_class: int = 10, seed: int = 0) -> Path:
    """A folder per class with half-second tones in noise, at 8 kHz."""
    random = np.random.default_rng(seed)
    time = np.arange(4000) / 8000
    for name, frequency in TONES.items():
        (folder / name).mkdir(parents=True)
        for number in range(per_class):
            tone = np.sin(2 * np.pi * frequency * random.uniform(0.9, 1.1) * time) * random.uniform(0.1, 0.5)
            soundfile.write(folder / name / f"{number}.wav", tone + random.normal(0, 0.02, 4000), 8000)
    return folder


def tiny_config(clips: Path, folder: Path | None = None, **sections) -> TrainConfig:
    """A configuration for such files; `sections` are changes, e.g. train={"epochs": 3}."""
    config = TrainConfig(
        data=DataConfig(train=clips, mel_bins=16, mean=-6.0, std=3.0, workers=0),
        augment=AugmentConfig(roll=3, gain=3.0),
        model=StudentConfig(size="tiny", depths=(1, 1), dims=(8, 16), drop_path=0.2),
        train=LoopConfig(epochs=2, batch_size=8, precision="float32"),
        optimizer=OptimizerConfig(learning_rate=1e-2),
        schedule=ScheduleConfig("cosine", warmup_steps=2),
        run=RunConfig(folder=folder, device="cpu"),
        log=LogConfig(every=1, progress="off", tensorboard=False, pictures=False),
    )
    for name, changes in sections.items():
        config = replace(config, **{name: replace(getattr(config, name), **changes)})
    return config
