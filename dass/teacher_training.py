"""The teacher that a run trains for itself first: a small AST where transformers is installed, otherwise a wider DASS.

It is a run like any other, on labels alone, kept in a folder named by everything that decides it: a later run of the same
data and settings finds it there and trains none.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from torch import nn

from dass.audio import LogMelConfig
from dass.config_files import config_to_mapping
from dass.distill import DistillConfig
from dass.manifest import LabelClass
from dass.student import StudentConfig, build_student

if TYPE_CHECKING:
    from dass.config import TrainConfig
    from dass.trainer import RunResult

WIDER_DIMS = (32, 64, 128, 256)


@dataclass(frozen=True)
class TeacherTrainingConfig:
    """The teacher that is trained first where distill.teacher is `train`; what is not here is as for the student."""

    architecture: Literal["auto", "ast", "dass"] = "auto"
    """ast: a small AST (needs transformers); dass: a DASS wider than tiny; auto: ast where transformers is installed."""
    epochs: int = 10
    """Passes over the training clips."""
    learning_rate: float = 1e-3
    """Peak learning rate per step."""
    batch_size: int | None = None
    """Clips of a batch; none: the student's."""
    folder: Path = Path("runs/teachers")
    """Where trained teachers are kept for later runs, each in a folder of its own."""


def teacher_run(config: TrainConfig) -> tuple[TrainConfig, str]:
    """The configuration of the teacher's own run, and the architecture that `auto` stands for."""
    options = config.teacher
    architecture = options.architecture
    if architecture == "auto":
        architecture = "ast" if importlib.util.find_spec("transformers") is not None else "dass"
    train = replace(
        config.train, epochs=options.epochs, batch_size=options.batch_size or config.train.batch_size, accumulate=1
    )
    run = replace(
        config,
        distill=DistillConfig(),
        model=StudentConfig(size="tiny", dims=WIDER_DIMS, backend=config.model.backend),
        train=train,
        optimizer=replace(config.optimizer, learning_rate=options.learning_rate),
        average=type(config.average)(),
        log=replace(config.log, pictures=False, tensorboard=False, wandb=None),
    )
    # What only moves files or speeds things up is no part of the identity.
    decisive = {key: value for key, value in config_to_mapping(run).items() if key not in ("run", "log", "teacher")}
    decisive["data"] = {k: v for k, v in decisive["data"].items() if k not in ("workers", "cache")}
    text = json.dumps([architecture, decisive], sort_keys=True, default=str)
    identity = hashlib.blake2b(text.encode(), digest_size=5).hexdigest()
    data = "synthetic" if config.data.train is None else config.data.train.stem
    folder = options.folder / f"{data}-{architecture}-{identity}"
    return replace(run, run=replace(config.run, folder=folder, restart=False)), architecture


def train_teacher(config: TrainConfig) -> RunResult:
    """Train the teacher of a run, or find it trained (or go on with it where it was interrupted)."""
    from dass.trainer import Trainer

    run, architecture = teacher_run(config)
    return Trainer(run, build_model=_build_ast if architecture == "ast" else build_student).fit()


def _build_ast(config: StudentConfig, classes: Sequence[LabelClass], front_end: LogMelConfig) -> nn.Module:
    from dass.teacher_models import build_small_ast

    return build_small_ast(tuple(classes), front_end).train()
