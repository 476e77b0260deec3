"""The configuration of a run: every part's frozen dataclass gathered in one, and the presets."""

from __future__ import annotations

from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path

from dass.augment import AugmentConfig
from dass.config_files import (
    ConfigError,
    config_to_toml,
    parse_config_text,
    read_config_file,
    suggestion,
    update_config,
)
from dass.data import DataConfig
from dass.distill import DistillConfig
from dass.optimization import AverageConfig, OptimizerConfig, ScheduleConfig
from dass.run_folder import RunConfig
from dass.run_log import LogConfig
from dass.student import StudentConfig
from dass.teacher_training import TeacherTrainingConfig
from dass.trainer import LoopConfig


@dataclass(frozen=True)
class TrainConfig:
    """Everything that decides a training run. The defaults are the paper's recipe on AudioSet's balanced part."""

    data: DataConfig = field(default_factory=DataConfig)
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    model: StudentConfig = field(default_factory=StudentConfig)
    distill: DistillConfig = field(default_factory=DistillConfig)
    teacher: TeacherTrainingConfig = field(default_factory=TeacherTrainingConfig)
    train: LoopConfig = field(default_factory=LoopConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    average: AverageConfig = field(default_factory=AverageConfig)
    run: RunConfig = field(default_factory=RunConfig)
    log: LogConfig = field(default_factory=LogConfig)

    def __post_init__(self) -> None:
        if self.distill.teacher and self.distill.weight == 0:
            raise ConfigError("distill.teacher is given, but distill.weight is 0: the teacher would not be heard")


def load_config(path: str | Path, base: TrainConfig | None = None) -> TrainConfig:
    """The configuration of a TOML or YAML file, on top of `base` (default: the defaults). Raises ConfigError."""
    return update_config(base or TrainConfig(), read_config_file(path), str(path))


def save_config(config: TrainConfig, path: str | Path) -> None:
    """Write a configuration as TOML with its documentation, atomically."""
    from dass.checkpoint import atomic_write

    atomic_write(path, config_to_toml(config))


def preset_names() -> list[str]:
    """The presets that come with the package."""
    files = (resources.files("dass") / "presets").iterdir()
    return sorted(entry.name.removesuffix(".toml") for entry in files if entry.name.endswith(".toml"))


def load_preset(name: str) -> TrainConfig:
    """The configuration of a preset, on top of the defaults. Raises ConfigError with the nearest name."""
    if name not in preset_names():
        raise ConfigError(f"unknown preset {name!r}" + suggestion(name, preset_names()))
    text = (resources.files("dass") / "presets" / f"{name}.toml").read_text(encoding="utf-8")
    return update_config(TrainConfig(), parse_config_text(text, f"preset {name}"), f"preset {name}")
