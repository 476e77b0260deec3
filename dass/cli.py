"""The command line of training: options from the configuration's dataclasses, on top of a preset or a file.

    python -m dass.train                                     # the preset `demo`
    python -m dass.train --data.train FOLDER                 # the preset `folder`
    python -m dass.train --preset audioset-balanced --data.train train.json --distill.teacher MIT/ast-...
    python -m dass.train --config run.toml --optimizer.learning-rate 3e-5

What is on the command line counts most, then the file of --config, then the preset, then the defaults.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated

import tyro

from dass.config import TrainConfig, load_config, load_preset, preset_names
from dass.config_files import ConfigError


@dataclass(frozen=True)
class TrainCommand:
    """Train a DASS, distilling it from a teacher: with no options on a built-in synthetic corpus, a demonstration of about
    three minutes. Every option has the name that it has in configuration files; units stand in brackets."""

    preset: str | None = None
    """Recipe to start from (see below for their names), or `none` for the plain defaults. Without it: `folder` where
    --data.train is given, otherwise `demo`."""
    config: Path | None = None
    """TOML or YAML file with any part of the configuration, on top of the preset (on the plain defaults if there is
    none)."""
    print_config: bool = False
    """Print the resolved configuration as TOML, and do nothing else."""
    profile: bool = False
    """Time 30 training steps, print where the time goes, and do nothing else."""
    backend: str | None = None
    """Short for --model.backend: the implementation of the scan (cpu, cuda, triton, reference)."""
    settings: Annotated[TrainConfig, tyro.conf.arg(name="")] = field(default_factory=TrainConfig)


@dataclass(frozen=True)
class ParsedCommand:
    """A command line resolved: the configuration, the name of its recipe, and what was asked for instead of training."""

    config: TrainConfig
    recipe: str
    print_config: bool
    profile: bool


def parse(arguments: Sequence[str] | None = None) -> ParsedCommand:
    """Resolve a command line. Exits with tyro's message on unknown or malformed options, with ours on a bad file."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    try:
        base, recipe = _base(arguments)
        command = tyro.cli(
            TrainCommand,
            args=arguments,
            default=TrainCommand(settings=base),
            prog="python -m dass.train",
            description=f"{TrainCommand.__doc__}\n\nPresets: {', '.join(preset_names())}. Shown are the defaults of: "
            f"{recipe}.",
        )
        settings = command.settings
        if command.backend is not None:
            settings = replace(settings, model=replace(settings.model, backend=command.backend))
    except (ConfigError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    return ParsedCommand(settings, recipe, command.print_config, command.profile)


def _base(arguments: list[str]) -> tuple[TrainConfig, str]:
    """The configuration that the options change, from --preset and --config; and what to call it."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--preset")
    parser.add_argument("--config")
    parser.add_argument("--data.train", "--data-train", dest="data")
    known, _ = parser.parse_known_args(arguments)
    preset = known.preset
    if preset is None:
        preset = "none" if known.config is not None else "folder" if known.data is not None else "demo"
    base = TrainConfig() if preset.lower() == "none" else load_preset(preset)
    if known.config is None:
        return base, preset
    return load_config(known.config, base), Path(known.config).stem
