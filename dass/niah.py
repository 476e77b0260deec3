"""Audio needle in a haystack: how long may an input be before a model loses a short event in it, and where in the input?

    python -m dass.niah runs/demo --preset quick
    python -m dass.niah DASS=runs/esc10 AST=runs/ast@sinusoidal AST2=runs/ast@interpolated --lengths 10s 60s 10min 1h

A grid of lengths, positions, haystacks, SNRs and models (arXiv 2407.04082), which may be stopped at any moment and goes on
where it was; at its end a report stands in the output folder: one HTML page, CSV and pictures.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import tyro

from dass.haystack import HAYSTACKS, MEAN_SPECTRUM
from dass.needle import Placing
from dass.niah_data import NeedleConfig

SECONDS = {"": 1.0, "s": 1.0, "min": 60.0, "h": 3600.0}
DEMO = Path("runs/demo")


class UsageError(ValueError):
    """Something on the command line that cannot be done; the message says what can."""


@dataclass(frozen=True)
class NiahConfig:
    """Tests how long an input may be before a model loses a short event in it, and where in the input."""

    models: tyro.conf.Positional[tuple[str, ...]] = ()
    """[NAME=]SOURCE[@WAY]: a run or checkpoint of DASS, an AST (WAY: sinusoidal or interpolated positions; neither:
    both), module:function; @windows: heard in windows instead. None given: runs/demo and, but for --preset quick, the
    teacher of that run."""
    needles: NeedleConfig = field(default_factory=NeedleConfig)
    lengths: tuple[str, ...] = ("needle", "10s", "60s", "10min")
    """Lengths of the whole input: 10s, 10min, 2.5h, ... or `needle`, the needle alone."""
    positions: tuple[float, ...] = (0.0, 0.25, 0.5, 0.75, 1.0)
    """Where the needle begins [0: at the beginning, 1: flush with the end]."""
    haystacks: tuple[
        Literal["mean-spectrum", "silence", "white", "pink", "babble", "recording", "other-clips"], ...
    ] = (
        "mean-spectrum",
        "silence",
        "white",
        "pink",
        "other-clips",
    )
    """What the needle is hidden in; babble and recording need their folder."""
    snrs: tuple[float, ...] = (10.0,)
    """Needle RMS over haystack RMS [dB]; mean-spectrum and silence have none."""
    babble: Path | None = None
    """Folder of speech for babble."""
    recording: Path | None = None
    """Folder of background sound for recording."""
    talkers: int = 8
    """Voices of babble."""
    placing: Placing = "replace"
    """Put the needle's frames in place of the haystack's (published), or let the haystack go on underneath."""
    seed: int = 0
    """Seed of the haystacks and of the order of the needles."""
    audio_per_cell: float | None = None
    """Fewer needles at long lengths: as many as make up this much input for a cell [s]; none: all."""
    fewest_needles: int = 10
    """At least so many needles, however long the input (if there are so many)."""
    bootstrap: int = 1000
    """Draws of the bootstrap behind the 95 % intervals."""
    out: Path = Path("runs/niah")
    """Folder of the results; a grid that is there goes on."""
    preset: str | None = None
    """paper: the published protocol; quick: three minutes on two cores with what `make demo` leaves."""
    restart: bool = False
    """Throw away what is in the folder."""
    retry: bool = False
    """Try cells again that failed, ran out of memory or were too slow."""
    report_only: bool = False
    """Write the report of what is in the folder, and do nothing else."""
    isolate: bool = True
    """Run the models in a process of their own, so that one that is killed is recorded and the grid goes on."""
    memory: float | None = None
    """Memory that a model may take on a CPU [GiB]; none: nine tenths of what is free at the start."""
    longest_pass: float | None = None
    """A pass that the times at shorter lengths promise to take longer is not tried but recorded as too slow [s], and where
    one does take longer no other needle of its cell is tried; none: every pass is tried."""
    device: str | None = None
    """cpu, cuda or cuda:N; default: the GPU where there is one."""
    precision: Literal["float32", "bf16"] = "float32"
    """Arithmetic of the models."""
    backend: str | None = None
    """Backend of DASS's scan operator; default: the device's best."""
    attention: Literal["sdpa", "eager"] = "sdpa"
    """Attention of transformers: in memory proportional to the length, or (published) to its square."""

    def check(self) -> None:
        """Raises UsageError, which says what can be done instead, for values that do not go together."""
        for name in ("lengths", "positions", "haystacks", "snrs"):
            if not getattr(self, name):
                raise UsageError(f"--{name} needs at least one value")
        for text in self.lengths:
            parse_length(text)
        for position in self.positions:
            if not 0 <= position <= 1:
                raise UsageError(f"--positions must be from 0 to 1, got {position}")
        for kind in ("babble", "recording"):
            if kind in self.haystacks and getattr(self, kind) is None:
                raise UsageError(f"the haystack {kind} needs a folder of sound files: --{kind} FOLDER")
        if self.placing == "overlay" and MEAN_SPECTRUM in self.haystacks:
            raise UsageError(
                "mean-spectrum is no sound that a needle could be laid on: leave it out or --placing replace"
            )
        if self.audio_per_cell is not None and self.audio_per_cell <= 0:
            raise UsageError(f"--audio-per-cell must be positive, got {self.audio_per_cell}")
        if self.fewest_needles < 1:
            raise UsageError(f"--fewest-needles must be at least 1, got {self.fewest_needles}")
        if self.longest_pass is not None and self.longest_pass <= 0:
            raise UsageError(f"--longest-pass must be positive, got {self.longest_pass}")
        if self.bootstrap < 1:
            raise UsageError(f"--bootstrap must be at least 1, got {self.bootstrap}")


PRESETS = {
    "paper": dict(
        lengths=("10s", "50s", "100s", "150s", "200s", "250s", "500s", "1000s", "1h", "2.5h"),
        positions=(0.0, 0.25, 0.5, 0.75, 1.0),
        haystacks=("mean-spectrum", "white"),
        snrs=(10.0,),
        out=Path("runs/niah-paper"),
    ),
    "quick": dict(
        lengths=("needle", "10s", "30s", "60s"),
        positions=(0.0, 0.5, 1.0),
        haystacks=("mean-spectrum", "silence", "white", "pink", "other-clips"),
        snrs=(10.0,),
        audio_per_cell=240.0,
        fewest_needles=6,
        needles=NeedleConfig(clips=16),
        out=Path("runs/niah-quick"),
    ),
}


def parse_length(text: str) -> float:
    """Seconds of "90", "90s", "1.5min" or "2.5h"; 0 for "needle"."""
    if text == "needle":
        return 0.0
    match = re.fullmatch(r"(\d+\.?\d*|\.\d+)\s*(s|min|h|)", text.strip())
    if not match or float(match[1]) <= 0:
        raise UsageError(f"a length is written 10s, 10min, 2.5h or `needle`, got {text!r}")
    return float(match[1]) * SECONDS[match[2]]


def parse(arguments: Sequence[str] | None = None) -> NiahConfig:
    """The configuration of a command line: its options on top of those of --preset. Exits on unknown options."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    finder = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    finder.add_argument("--preset")
    preset = finder.parse_known_args(arguments)[0].preset
    if preset is not None and preset not in PRESETS:
        raise UsageError(f"unknown preset {preset!r}; there are {', '.join(PRESETS)}")
    base = replace(NiahConfig(), **PRESETS.get(preset, {}))
    config = tyro.cli(NiahConfig, args=arguments, default=base, prog="python -m dass.niah", description=__doc__)
    if preset == "paper" and config.babble is not None and "babble" not in config.haystacks:
        config = replace(config, haystacks=(*config.haystacks, "babble"))
    config.check()
    return config


def default_models(preset: str | None = None) -> tuple[str, ...]:
    """What `make demo` leaves: the DASS, and the teacher that was trained for it if that is an AST."""
    if not (DEMO / "config.toml").is_file():
        raise UsageError(
            f"no model given, and there is no {DEMO}, which `make demo` would make; name a run or checkpoint"
        )
    from dass.config import load_config
    from dass.niah_models import is_ast_folder
    from dass.teacher_training import teacher_run

    if preset == "quick":  # an AST alone would take longer than the minutes that are promised
        return (f"DASS={DEMO}",)
    teacher = teacher_run(load_config(DEMO / "config.toml"))[0].run.folder
    return (f"DASS={DEMO}", f"AST={teacher}") if is_ast_folder(teacher) else (f"DASS={DEMO}",)


def run_grid(config: NiahConfig, attempt_file: Path | None = None, quiet: bool = False) -> None:
    """Runs the cells of a grid that are not done yet, in this process."""
    import torch

    from dass.checkpoint import write_json
    from dass.config_files import config_to_mapping
    from dass.niah_data import open_needles
    from dass.niah_grid import Grid, Protocol
    from dass.niah_measure import available_memory, describe_machine
    from dass.niah_models import load_model, parse_specs
    from dass.niah_progress import AttemptFile, Progress, folder_identity
    from dass.niah_store import Store

    specs = parse_specs(config.models or default_models(config.preset))
    device = torch.device(config.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    first = Path(specs[0].source)
    needles = open_needles(config.needles, first if (first / "config.toml").is_file() else None, config.seed)
    lengths = tuple(sorted({parse_length(text) for text in config.lengths}))
    protocol = Protocol(
        lengths=lengths,
        positions=tuple(config.positions),
        haystacks=tuple(kind for kind in HAYSTACKS if kind in config.haystacks),
        snrs=tuple(config.snrs),
        placing=config.placing,
        seed=config.seed,
        talkers=config.talkers,
        folders={"babble": config.babble, "recording": config.recording},
        audio_per_cell=config.audio_per_cell,
        fewest_needles=config.fewest_needles,
        bootstrap=config.bootstrap,
    )
    # What may differ between two starts of one test: more models, lengths, haystacks, SNRs and needles only add.
    fixed = {
        "needles": needles.origin,
        "needles_identity": needles.identity(),
        "positions": list(protocol.positions),
        "placing": protocol.placing,
        "seed": protocol.seed,
        "talkers": protocol.talkers,
        "bootstrap": protocol.bootstrap,
        "precision": config.precision,
    }
    fixed |= {
        kind: folder_identity(getattr(config, kind)) for kind in ("babble", "recording") if kind in config.haystacks
    }
    store = Store(config.out, fixed, config.restart)
    if config.retry:
        store.forget_failures()
    write_json(
        config.out / "environment.json",
        {"configuration": config_to_mapping(config), "machine": describe_machine(device), "needles": len(needles)},
    )
    memory = config.memory * 2**30 if config.memory is not None else available_memory()
    with Progress(protocol, specs, len(needles), store, quiet) as progress:
        Grid(
            protocol,
            needles,
            specs,
            lambda spec: load_model(spec, device, config.backend, config.attention),
            store,
            class_map=config.needles.class_map,
            memory=memory if memory is None or config.memory is not None else 0.9 * memory,
            longest_pass=config.longest_pass,
            autocast=torch.bfloat16 if config.precision == "bf16" else None,
            reporter=progress,
            attempt=AttemptFile(attempt_file) if attempt_file else lambda cells: None,
        ).run()


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    from dass.audio import AudioError
    from dass.checkpoint import CheckpointError
    from dass.classes import ClassMapError
    from dass.config_files import ConfigError
    from dass.haystack import HaystackError
    from dass.manifest import ManifestError
    from dass.niah_models import ModelError
    from dass.niah_progress import ATTEMPT_VARIABLE, supervise
    from dass.niah_report import write_report
    from dass.niah_store import StoreError, alone_in
    from dass.teacher_models import TeacherError

    known = (UsageError, AudioError, CheckpointError, ClassMapError, ConfigError, HaystackError, ManifestError)
    known += (ModelError, StoreError, TeacherError, FileNotFoundError)
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    try:
        config = parse(arguments)
        worker = os.environ.get(ATTEMPT_VARIABLE)
        if not config.report_only:
            if config.isolate and worker is None:
                status = supervise(arguments, config.out)
                if status != 0:
                    return status
            else:
                with alone_in(config.out):
                    run_grid(config, Path(worker) if worker else None)
        if worker is None:
            print(f"report: {write_report(config.out)}")
    except known as error:
        print(f"dass.niah: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"\nstopped; the same command goes on where it was ({config.out})", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
