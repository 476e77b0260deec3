"""`python -m dass.train`: train a DASS; with no arguments a whole demonstration on built-in data (see dass/cli.py)."""

from __future__ import annotations

import logging
import shlex
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from dass.cli import ParsedCommand, parse
from dass.config import TrainConfig
from dass.config_files import ConfigError, config_to_toml
from dass.distributed import say

if TYPE_CHECKING:
    from dass.trainer import RunResult


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status: 0 done, 1 the run could not go on (the message says why), 2 bad options, 130 interrupted."""
    logging.basicConfig(format="%(message)s")
    command = parse(arguments)
    if command.print_config:
        print(config_to_toml(command.config), end="")
        return 0
    from dass.trainer import TrainingStopped

    try:
        run(command)
    except TrainingStopped as stopped:
        print(stopped, file=sys.stderr)
        return 130
    except (ConfigError, OSError, RuntimeError, ValueError, ModuleNotFoundError) as error:
        # Errors of ours say what to do; others are shown whole.
        if not type(error).__module__.startswith("dass."):
            raise
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def run(command: ParsedCommand) -> None:
    """What the command asks for: a profile, one run, or one run per fold."""
    from dass.folds import ALL_FOLDS, train_folds
    from dass.trainer import Trainer

    start = time.monotonic()
    config = with_trained_teacher(command.config)
    default = Path("runs") / _name(command)
    if command.profile:
        say(Trainer(config).profile())
    elif config.data.fold == ALL_FOLDS:
        train_folds(config, default)
    else:
        result = Trainer(config, default).fit()
        say(_closing(result, time.monotonic() - start))


def with_trained_teacher(config: TrainConfig) -> TrainConfig:
    """The configuration with the teacher `train` replaced by the folder of one, trained now if there is none yet."""
    from dass.teacher import TRAIN
    from dass.teacher_training import teacher_run, train_teacher

    if TRAIN not in config.distill.teacher:
        return config
    folder = teacher_run(config)[0].run.folder
    say(f"teacher: {folder}")
    result = train_teacher(config)
    figures = result.test or result.best
    say("teacher: " + ", ".join(f"{name.replace('_', ' ')} {value:.4g}" for name, value in figures.items()))
    sources = tuple(str(folder) if source == TRAIN else source for source in config.distill.teacher)
    return replace(config, distill=replace(config.distill, teacher=sources))


def _name(command: ParsedCommand) -> str:
    """Name of the run's folder: that of the recipe, or of the data where the recipe is the general one."""
    data = command.config.data.train
    return command.recipe if data is None or command.recipe not in ("folder", "none") else data.resolve().stem


def _closing(result: RunResult, seconds: float) -> str:
    best, test = (
        ", ".join(f"{name.replace('_', ' ')} {value:.4g}" for name, value in figures.items())
        for figures in (result.best, result.test)
    )
    return (
        f"best model, on held-out clips: {best}\n"
        + (f"and on test clips, which chose nothing: {test}\n" if test else "")
        + f"{seconds:.0f} s; everything is in {result.folder}\n"
        f"tag a file with it:\n  python -m dass.tag {shlex.quote(result.example)} --model {result.folder}"
    )


if __name__ == "__main__":
    sys.exit(main())
