"""How a needle-in-a-haystack test tells where it is, and the process that watches over the one that runs the models."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path

from dass.checkpoint import write_json
from dass.niah_grid import CRASHED, Protocol, Reporter
from dass.niah_measure import describe_length, describe_seconds
from dass.niah_models import ModelSpec
from dass.niah_store import CELL_KEYS, OK, Group, Store

ATTEMPT_VARIABLE = "DASS_NIAH_ATTEMPT"  # set for the process that runs the models: the file that says what it is at
SECONDS_TO_END = 10.0  # for a process that was asked to end: a pass of a long input does not hear it, and may be killed


class Progress(Reporter):
    """A bar over all cells with the time that the passes seen so far promise for the rest, and a line for each group."""

    def __init__(self, protocol: Protocol, specs: Sequence[ModelSpec], clips: int, store: Store, quiet: bool = False):
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
        from rich.progress import Progress as Bar

        self.quiet, self.protocol, self.clips = quiet, protocol, clips
        self.console = Console(highlight=False, soft_wrap=True)
        self.bar = Bar(
            TextColumn("{task.fields[what]}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("needles"),
            TimeElapsedColumn(),
            TextColumn("{task.fields[left]}"),
            console=self.console,
            transient=True,
            disable=quiet or not self.console.is_terminal,
        )
        self.specs, self.store = specs, store
        self.task = None
        self.left: float | None = None

    def __enter__(self) -> Progress:
        self.bar.start()
        self.task = self.bar.add_task("", total=None, what="", left="")
        return self

    def __exit__(self, *error) -> None:
        self.bar.stop()

    def begin(self, group: Group, clips: int) -> None:
        done = f"{group.model}  {describe_length(group.length)}  {group.haystack}"
        self.bar.reset(self.task, total=clips, what=done, left=self._remaining())

    def step(self, seconds_left: float | None) -> None:
        self.left = seconds_left
        self.bar.update(self.task, advance=1, left=self._remaining())

    def end(self, group: Group, lines: Sequence[dict]) -> None:
        if not self.quiet:
            self.console.print(
                group_line(group, lines, self.left if not self.console.is_terminal else None), markup=False
            )

    def _remaining(self) -> str:
        return "" if self.left is None else f"about {describe_seconds(self.left)} left in all"


def group_line(group: Group, lines: Sequence[dict], left: float | None = None) -> str:
    """What came out of a group, for the reader."""
    snr = "" if group.snr is None else f" {group.snr:g} dB"
    head = f"{group.model:<22} {describe_length(group.length):>7}  {group.haystack + snr:<20}"
    if lines[0]["status"] != OK:
        return f"{head} {lines[0]['status']}: {lines[0].get('error', '')}"
    maps = " ".join("  -  " if line["map"] is None else f"{line['map']:.3f}" for line in lines)
    first = lines[0]
    memory = "" if first["peak_memory"] is None else f", {first['peak_memory'] / 2**20:,.0f} MiB"
    text = f"{head} mAP {maps}  {first['seconds']:.3g} s{memory}"
    return text if left is None else f"{text}; about {describe_seconds(left)} left"


def folder_identity(folder: Path) -> str:
    """Changes when the sound files of a folder do: their names and sizes."""
    from dass.haystack import sound_files

    digest = hashlib.blake2b(digest_size=8)
    for path in sound_files(folder):
        digest.update(f"{path.relative_to(folder).as_posix()}\0{path.stat().st_size}\n".encode())
    return digest.hexdigest()


class AttemptFile:
    """Says in a file which cells are being tried, for `supervise`; None: none."""

    def __init__(self, path: Path):
        self.path = path

    def __call__(self, cells: dict | None) -> None:
        if cells is None:
            self.path.unlink(missing_ok=True)
        else:
            write_json(self.path, cells)


def supervise(arguments: Sequence[str], out: Path) -> int:
    """Runs the grid in a process of its own; where that is killed, records the cells it was at and starts another.

    Returns the exit status: 0 when the grid is done, otherwise that of a process that ended by itself. Raises
    KeyboardInterrupt where this process is asked to end (Ctrl-C, SIGTERM); the other one is ended before.
    """

    def stop(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    attempt = out / f".attempt-{os.getpid()}.json"
    environment = {**os.environ, ATTEMPT_VARIABLE: str(attempt)}
    # An option that empties the folder, or retries, must not do so again when the grid goes on.
    once = {"--restart", "--retry"}
    process = None
    main_thread = threading.current_thread() is threading.main_thread()  # no other may set what a signal does
    if main_thread:
        before = signal.signal(signal.SIGTERM, stop)  # its default would leave the other process running
    try:
        while True:
            start = time.monotonic()
            process = subprocess.Popen([sys.executable, "-m", "dass.niah", *arguments], env=environment)
            status = process.wait()
            if status == 0:
                return 0
            if status > 0 or not attempt.is_file():
                return status if status > 0 else 128 - status
            _record_death(out, json.loads(attempt.read_text(encoding="utf-8")), -status, time.monotonic() - start)
            attempt.unlink()
            arguments = [argument for argument in arguments if argument not in once]
    finally:
        if process is not None and process.poll() is None:
            process.send_signal(signal.SIGINT)
            try:
                process.wait(SECONDS_TO_END)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        if main_thread:
            signal.signal(signal.SIGTERM, before)
        attempt.unlink(missing_ok=True)


def _record_death(out: Path, attempt: dict, number: int, seconds: float) -> None:
    name = signal.Signals(number).name if number in signal.Signals.__members__.values() else str(number)
    likely = "; the system kills what takes too much memory" if number == signal.SIGKILL else ""
    store = Store(out)
    outcome = {
        "status": CRASHED,
        "model_id": attempt["model_id"],
        "error": f"the process was killed by {name} after {seconds:.0f} s{likely}",
        "finished": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }
    lines = store.add([dict(zip(CELL_KEYS, cell, strict=True)) | outcome for cell in attempt["cells"]])
    first = lines[0]
    print(
        f"{first['model']}  {describe_length(first['length'])}  {first['haystack']}: {first['error']}", file=sys.stderr
    )
