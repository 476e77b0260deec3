"""The folder of a run: which one, whether it can hold the run, and the state from which the run goes on.

    config.toml      resolved configuration        best/ last/ averaged/   models, each a `save_pretrained` folder
    metrics.jsonl    every figure                  state/step-*.safetensors   all that resuming needs, one file each
    classes.csv      index, id and name             per_class.csv, *.png   figures and pictures of best

A state is one safetensors file whose header holds the plain values as JSON, so that it appears whole or not at all.
"""

from __future__ import annotations

import csv
import errno
import io
import json
import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dass.batch import Batch
from dass.checkpoint import CheckpointError, atomic_write, write_json, write_tensors
from dass.config_files import ConfigError, config_to_toml, differing_keys, read_config_file, update_config
from dass.dataset import AudioDataset
from dass.distributed import rank
from dass.manifest import LabelClass

# What may differ between a run and its continuation: none of it changes a number of the run.
FREE_KEYS = ("run.", "log.", "data.workers", "data.cache")
SPARE_BYTES = 64 * 2**20  # pictures, logs and configuration


@dataclass(frozen=True)
class RunConfig:
    """Where a run lives and what it runs on; none of it changes a result."""

    folder: Path | None = None
    """Run folder; the same command continues an unfinished run in it. None: runs/NAME, or the next free number."""
    restart: bool = False
    """Begin anew, even where the folder holds a run."""
    checkpoint_seconds: float = 120.0
    """Longest time between two saved states [s]; one is saved after every epoch in any case."""
    keep: int = 1
    """Saved states that are kept, the newest ones."""
    device: str = "auto"
    """auto (the GPU where there is one), cpu, cuda or cuda:N."""
    threads: int | None = None
    """Threads of a process on the CPU; none: the cores that the loader's workers leave."""

    def __post_init__(self) -> None:
        if self.keep < 1:
            raise ValueError(f"run.keep is {self.keep}; expected at least 1 state")


class RunFolderError(RuntimeError):
    """A run folder that cannot be used: the message says why and the way out."""


class NotFiniteError(RuntimeError):
    """The loss became NaN or infinite; the message names the file with the batch's clips."""


@dataclass
class Progress:
    """Where a run stands, in plain values; part of its state."""

    step: int = 0
    """Optimiser steps done."""
    epoch: int = 0
    """Epochs done."""
    batch: int = 0
    """Batches of the current epoch done."""
    finished: bool = False
    example: str = ""
    """A held-out sound file to try the finished model on."""
    best: dict[str, Any] = field(default_factory=dict)
    """Figures of the best model so far, and its `epoch`."""
    test: dict[str, Any] = field(default_factory=dict)
    """Figures of the best model on the test clips, once it has heard them."""
    epochs_without_gain: int = 0
    window: dict[str, float] = field(default_factory=dict)
    """Sums of the losses since the last record, and their `count`."""
    values: dict[str, Any] = field(default_factory=dict)
    """Plain values of the run's parts (`run_parts.Parts.state`)."""


def choose_folder(config: Any, default: Path) -> tuple[Path, bool]:
    """The run's folder and whether it holds an unfinished run of this configuration, to be continued.

    A folder that was asked for (`run.folder`) must be empty or hold this very run. Where none was asked for, `default`
    is taken, or the next free number after it.
    """
    if config.run.folder is not None:
        folder = config.run.folder
        if config.run.restart or not holds_run(folder):
            return folder, False
        different = differing_from(folder, config)
        if different:
            raise RunFolderError(
                f"{folder} holds a run with another configuration ({', '.join(different[:6])}); continue it with the same "
                "options, choose another --run.folder, or begin anew with --run.restart"
            )
        return folder, True
    folder = default
    number = 1
    while holds_run(folder):
        if not config.run.restart and not differing_from(folder, config) and not is_finished(folder):
            return folder, True
        number += 1
        folder = default.with_name(f"{default.name}-{number}")
    return folder, False


def holds_run(folder: Path) -> bool:
    """Whether a run was begun in this folder."""
    return (folder / "config.toml").is_file()


def is_finished(folder: Path) -> bool:
    """Whether the run in this folder came to its end."""
    state = newest_state(folder)
    return state is not None and read_progress(state).finished


def differing_from(folder: Path, config: Any) -> list[str]:
    """Keys in which `config` differs from the run in the folder, of those that change the run's numbers."""
    try:
        stored = update_config(type(config)(), read_config_file(folder / "config.toml"), str(folder / "config.toml"))
    except ConfigError:
        return ["config.toml cannot be read"]
    return [key for key in differing_keys(stored, config) if not key.startswith(FREE_KEYS)]


def prepare_folder(folder: Path, config: Any, resume: bool, bytes_needed: int) -> None:
    """Make the folder, check that it takes what the run will write, and write `config.toml`.

    Raises RunFolderError when it cannot be written to or the disk is too full for the checkpoints.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not resume:
            for name in ("state", "best", "last", "averaged"):
                shutil.rmtree(folder / name, ignore_errors=True)
            (folder / "metrics.jsonl").unlink(missing_ok=True)
        atomic_write(folder / "config.toml", config_to_toml(config))
    except OSError as error:
        reason = "the disk is full" if error.errno == errno.ENOSPC else (error.strerror or str(error))
        raise RunFolderError(
            f"cannot write into the run folder {folder}: {reason}; choose another with --run.folder"
        ) from error
    free = shutil.disk_usage(folder).free
    if free < bytes_needed + SPARE_BYTES:
        raise RunFolderError(
            f"the disk of {folder} has {free / 2**20:.0f} MiB left; this run's checkpoints need about "
            f"{(bytes_needed + SPARE_BYTES) / 2**20:.0f} MiB; free some or choose another --run.folder"
        )


def write_classes(folder: Path, classes: Sequence[LabelClass]) -> None:
    """Write `classes.csv`, index,mid,display_name: ids as well as names, for those who take the model as a teacher."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["index", "mid", "display_name"])
    writer.writerows([entry.index, entry.id, entry.name] for entry in classes)
    atomic_write(folder / "classes.csv", text.getvalue())


def example_file(held_out: AudioDataset, folder: Path) -> str:
    """A sound file of the held-out clips; of clips that are in no file, one is written to `example.wav`."""
    if (path := held_out.source.file(0)) is not None:
        return str(path)
    import soundfile

    rate = held_out.front_end.sample_rate
    waveform, _ = held_out.source.read(0, sample_rate=rate, start=0.0, duration=10.0, hashed=False)
    path = folder / "example.wav"
    atomic_write(path, lambda temporary: soundfile.write(temporary, waveform.numpy(), rate))
    return str(path)


def bytes_of_run(model: nn.Module, averages: int, keep: int) -> int:
    """Bytes of a run's checkpoints at their most: states with optimiser and averages, and three models."""
    weights = sum(parameter.numel() * 4 for parameter in model.parameters())
    state = weights * (3 + averages)  # the weights and Adam's two moments
    return state * (keep + 1) + weights * 4


def save_state(folder: Path, progress: Progress, tensors: dict[str, Tensor], keep: int) -> None:
    """Write `state/step-N.safetensors` and remove all but the newest `keep` states."""
    path = folder / "state" / f"step-{progress.step:09d}.safetensors"
    try:
        write_tensors(path, tensors, {"progress": json.dumps(vars(progress))})
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise RunFolderError(
                f"the disk is full: the state at step {progress.step} could not be written to {path}; free some space and "
                "give the same command again: the run continues from the last state"
            ) from error
        raise
    for old in _states(folder)[:-keep]:
        old.unlink(missing_ok=True)


def bad_loss(folder: Path, step: int, losses: dict[str, float], batch: Batch, clips: AudioDataset) -> NotFiniteError:
    """Write `bad-batch-rankN.json` with the losses and the clips of a batch; the error that names it."""
    named = [
        {"clip": clips.name(index), "mixed_with": clips.name(other) if other >= 0 else None}
        for index, other in zip(batch.index.tolist(), batch.mix_index.tolist(), strict=True)
    ]
    path = folder / f"bad-batch-rank{rank()}.json"
    write_json(path, {"step": step, "losses": {name: repr(value) for name, value in losses.items()}, "clips": named})
    return NotFiniteError(
        f"the loss is {losses['loss']} at step {step}; the clips of the batch are in {path}. A lower "
        "--optimizer.learning-rate, --optimizer.clip-norm, or --train.precision bf16 instead of fp16 usually helps"
    )


def newest_state(folder: Path) -> Path | None:
    """The newest state of the run in this folder, if it has one."""
    states = _states(folder)
    return states[-1] if states else None


def read_progress(path: Path) -> Progress:
    """The plain values of a state file."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            return Progress(**json.loads(file.metadata()["progress"]))
    except (SafetensorError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"{path} is not a state of a run ({error}); remove it to continue from an older one"
        ) from error


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The state of an optimiser as named tensors, `optimizer.<parameter number>.<name>`."""
    return {
        f"optimizer.{number}.{name}": value
        for number, state in optimizer.state_dict()["state"].items()
        for name, value in state.items()
    }


def restore_optimizer(optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    """Put back what `optimizer_tensors` gave."""
    state: dict[int, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        if match := re.fullmatch(r"optimizer\.(\d+)\.(.+)", key):
            state.setdefault(int(match[1]), {})[match[2]] = value
    optimizer.load_state_dict({**optimizer.state_dict(), "state": state})


def named(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors under names that begin with `prefix.`."""
    return {f"{prefix}.{name}": tensor for name, tensor in tensors.items()}


def taken(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors named `prefix.*`, without the prefix."""
    start = prefix + "."
    return {name.removeprefix(start): tensor for name, tensor in tensors.items() if name.startswith(start)}


def _states(folder: Path) -> list[Path]:
    return sorted((folder / "state").glob("step-*.safetensors"))


def with_folder(config: Any, folder: Path) -> Any:
    """The configuration with the folder that was chosen."""
    return replace(config, run=replace(config.run, folder=folder))
