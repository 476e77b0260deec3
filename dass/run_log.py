"""What a run says and records: progress on the terminal, `metrics.jsonl`, and TensorBoard or W&B where wanted.

`metrics.jsonl` holds one JSON object a line, {"event": one of EVENTS, "step": ..., figures}. It is the record from which
curves are drawn; nothing in it depends on the clock but the keys in CLOCK_KEYS, so that the files of an interrupted and of
an uninterrupted run are equal without them.
"""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from dass.checkpoint import atomic_write

CLOCK_KEYS = ("seconds", "clips_per_second", "data_share")
EVENTS = ("step", "epoch", "average", "test", "final")
AT_THE_END = EVENTS[2:]  # recorded after the last state but one: who resumes from that one makes them again


@dataclass(frozen=True)
class LogConfig:
    """What a run writes while it runs."""

    every: int = 50
    """Optimiser steps between two records of the training loss [steps]."""
    progress: Literal["auto", "bar", "lines", "off"] = "auto"
    """Progress as a bar, as plain lines, or not at all; auto: a bar on a terminal, lines otherwise."""
    tensorboard: bool = True
    """Also write TensorBoard events into the run folder, where the package tensorboard is installed."""
    wandb: str | None = None
    """Weights & Biases project to log to (needs the package wandb); none: do not."""
    pictures: bool = True
    """Draw curves, per-class bars, augmented spectrograms and the teacher's scatter into the run folder."""

    def __post_init__(self) -> None:
        if self.every < 1:
            raise ValueError(f"log.every is {self.every}; expected at least 1 step")


class RunLog:
    """Progress and records of one run; on ranks other than 0 every method does nothing.

    folder: where metrics.jsonl lies, None: nothing is written. `step` restored by a resumed run: later records are
    taken out of the file, for they will be made again.
    """

    def __init__(self, folder: Path | None, config: LogConfig, *, resumed_step: int = 0, main: bool = True):
        self.folder, self.config, self.main = folder, config, main
        self._bar = None
        self._lines = config.progress == "lines" or (config.progress == "auto" and not sys.stdout.isatty())
        self._quiet = config.progress == "off" or not main
        self._writers: list[Callable[[dict[str, float], int], None]] = []
        self._closers: list[Callable[[], None]] = []
        if folder is None or not main:
            return
        path = folder / "metrics.jsonl"
        kept = [line for line in read_metrics(path) if line["step"] <= resumed_step and line["event"] not in AT_THE_END]
        atomic_write(path, "".join(json.dumps(line) + "\n" for line in (kept if resumed_step else [])))
        self._file = path.open("a", encoding="utf-8")
        self._open_writers(resumed_step)

    def say(self, text: str) -> None:
        """One line for the reader."""
        if self._quiet:
            return
        if self._bar is not None:
            self._bar.console.print(text, markup=False, highlight=False, soft_wrap=True)
        else:
            print(text, flush=True)

    def record(self, event: str, step: int, figures: dict[str, Any]) -> None:
        """Append one line to metrics.jsonl and pass its numbers to TensorBoard and W&B; NaN and inf become null."""
        if self.folder is None or not self.main:
            return
        figures = {key: _finite(value) for key, value in figures.items()}
        self._file.write(json.dumps({"event": event, "step": step, **figures}, allow_nan=False) + "\n")
        self._file.flush()
        numbers = {f"{event}/{key}": value for key, value in figures.items() if isinstance(value, (int, float))}
        for write in self._writers:
            write(numbers, step)

    @contextmanager
    def progress(self, description: str, total: int, completed: int = 0) -> Iterator[Progress]:
        """Progress over `total` steps, of which `completed` are done; yields an object with `advance`."""
        if self._quiet:
            yield Progress(None, None, total, completed)
        elif self._lines:
            yield Progress(self, None, total, completed, description)
        else:
            from rich import progress as rich_progress

            columns = (
                rich_progress.TextColumn("{task.description}"),
                rich_progress.BarColumn(),
                rich_progress.MofNCompleteColumn(),
                rich_progress.TimeElapsedColumn(),
                rich_progress.TimeRemainingColumn(),
                rich_progress.TextColumn("{task.fields[figures]}"),
            )
            with rich_progress.Progress(*columns) as bar:
                task = bar.add_task(description, total=total, completed=completed, figures="")
                self._bar = bar
                try:
                    yield Progress(self, task, total, completed, description)
                finally:
                    self._bar = None

    def close(self) -> None:
        """Close the files; the log says nothing afterwards."""
        if self.main and self.folder is not None:
            self._file.close()
        for close in self._closers:
            close()
        self._writers.clear()
        self._closers.clear()

    def _open_writers(self, resumed_step: int) -> None:
        if self.config.tensorboard:
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError:  # an optional extra: without it metrics.jsonl and the pictures say the same
                pass
            else:
                board = SummaryWriter(str(self.folder / "tensorboard"), purge_step=resumed_step + 1)

                def to_board(numbers: dict[str, float], step: int) -> None:
                    for key, value in numbers.items():
                        board.add_scalar(key, value, step)
                    board.flush()

                self._writers.append(to_board)
                self._closers.append(board.close)
        if self.config.wandb is not None:
            try:
                import wandb
            except ImportError as error:
                raise ModuleNotFoundError(
                    "log.wandb is set but the package wandb is missing: pip install wandb, or leave log.wandb out"
                ) from error
            identity = self.folder / "wandb.id"  # so that a resumed run goes on in the same W&B run
            if not identity.is_file():
                atomic_write(identity, wandb.util.generate_id())
            run = wandb.init(
                project=self.config.wandb,
                dir=str(self.folder),
                name=self.folder.name,
                id=identity.read_text(),
                resume="allow",
            )
            self._writers.append(lambda numbers, step: run.log(numbers, step=step))
            self._closers.append(run.finish)


class Progress:
    """A bar, or a line every few seconds; `advance` shows the latest figures."""

    def __init__(self, log: RunLog | None, task: Any, total: int, completed: int, description: str = ""):
        self.log, self.task, self.total, self.completed = log, task, total, completed
        self.description = description
        self._last = time.monotonic()

    def advance(self, steps: int, figures: dict[str, float]) -> None:
        """`steps` more are done; figures: shown with four digits."""
        self.completed += steps
        if self.log is None:
            return
        if self.task is not None:
            self.log._bar.update(self.task, advance=steps, figures=_shown(figures))
        elif self.completed >= self.total or time.monotonic() - self._last > 10:
            self._last = time.monotonic()
            self.log.say(f"{self.description} {self.completed}/{self.total}  {_shown(figures)}")


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The records of a metrics.jsonl; none where there is no file. A last line cut off by a kill is left out."""
    records = []
    if path.is_file():
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                records.append(json.loads(line))
            except ValueError:
                break
    return records


def _shown(figures: dict[str, float]) -> str:
    return "  ".join(f"{key} {value:.4g}" for key, value in figures.items())


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value
