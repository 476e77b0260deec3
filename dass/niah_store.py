"""What a needle-in-a-haystack test leaves on disk, so that it can be stopped at any moment and gone on with.

    protocol.json    what every number depends on: needles, seed, positions, placing, haystack folders
    results.jsonl    a line for each cell when it is done; of two lines of one cell the later counts
    scores/          for each group of cells the logits, times and states of its clips, filled clip by clip
    environment.json the configuration and the machine of the last start

A group is a model, a length, a haystack and an SNR; its cells are its positions, which share the haystack.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dass.checkpoint import read_json, write_json

PENDING, DONE, BROKEN = 0, 1, 2  # states of a clip
OK = "ok"
CELL_KEYS = ("model", "haystack", "snr", "length", "position")


class StoreError(ValueError):
    """A results folder that does not go with what is asked; the message says what differs and the way out."""


@dataclass(frozen=True)
class Group:
    """Cells that differ in the position only: `length` [s], `snr` [dB] or None."""

    model: str
    length: float
    haystack: str
    snr: float | None

    @property
    def id(self) -> str:
        """A file name of its own."""
        text = f"{self.model} {self.haystack} {'' if self.snr is None else f'{self.snr:g}dB'} {self.length:g}s"
        slug = re.sub(r"[^A-Za-z0-9.+-]+", "-", text).strip("-")
        return f"{slug[:80]}-{hashlib.blake2b(text.encode(), digest_size=4).hexdigest()}"

    def cell(self, position: float) -> tuple:
        """The key of one of its cells, as in results.jsonl."""
        return (self.model, self.haystack, self.snr, self.length, position)


def cell_key(line: dict) -> tuple:
    """The key of the cell that a line of results.jsonl is about."""
    return tuple(line[key] for key in CELL_KEYS)


class GroupScores:
    """Logits (clips, positions, classes), cost (clips, positions, 2: seconds, bytes) and state (clips,) of a group.

    They are memory-mapped: what was put survives the process. A clip counts as done when all its logits are numbers, which
    also holds when the power went before everything had reached the disk. Where there are fewer clips than asked for they
    become more; where there are more, they stay.
    """

    def __init__(self, folder: Path, clips: int, positions: int, classes: int):
        folder.mkdir(parents=True, exist_ok=True)
        self.logits = _open_array(folder / "logits.npy", (clips, positions, classes), np.float32, np.nan)
        self.cost = _open_array(folder / "cost.npy", (clips, positions, 2), np.float64, np.nan)
        self.state = _open_array(folder / "state.npy", (clips,), np.int8, PENDING)
        self.state[(self.state == DONE) & ~np.isfinite(self.logits).all(axis=(1, 2))] = PENDING

    def put(self, clip: int, logits: np.ndarray, cost: np.ndarray) -> None:
        """Keeps a clip that is done: logits (positions, classes), all finite, and cost (positions, 2)."""
        self.logits[clip], self.cost[clip] = logits, cost
        self.state[clip] = DONE

    def mark_broken(self, clip: int) -> None:
        """The clip cannot be read."""
        self.state[clip] = BROKEN

    def flush(self) -> None:
        """Waits until everything is on the disk."""
        for array in (self.logits, self.cost, self.state):
            array.flush()

    @property
    def pending(self) -> list[int]:
        """Clips still to be done."""
        return np.flatnonzero(self.state == PENDING).tolist()

    @property
    def done(self) -> np.ndarray:
        """Clips that are done."""
        return np.flatnonzero(self.state == DONE)


@contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Within, no other process runs a test in this folder; StoreError where one already does. Ends with the process."""
    import fcntl

    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise StoreError(
                f"another process is running a test in {folder}: wait for it, or choose another --out"
            ) from None
        yield


class Store:
    """The folder of a test. `protocol` must be that of what is there already; StoreError names what differs."""

    def __init__(self, folder: Path, protocol: dict[str, Any] | None = None, restart: bool = False):
        self.folder = Path(folder)
        if restart:
            self._clear()
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / "protocol.json"
        if protocol is None:
            if not path.is_file():
                raise StoreError(f"{folder} holds no results of a needle-in-a-haystack test (no protocol.json)")
            self.protocol = read_json(path)
        else:
            self.protocol = json.loads(json.dumps(protocol))
            if path.is_file():
                stored = read_json(path)
                self._compare(stored)
                self.protocol = {**stored, **self.protocol}  # a folder of speech that is not needed this time
            write_json(path, self.protocol)
        self.lines = self._read_lines()

    def _compare(self, stored: dict[str, Any]) -> None:
        compared = sorted(
            ({*stored} & {*self.protocol}) - {"needles"}
        )  # only says where those of the identity are from
        different = [key for key in compared if stored[key] != self.protocol[key]]
        if different:
            changes = "; ".join(f"{key} was {stored[key]!r}, is {self.protocol[key]!r}" for key in different)
            raise StoreError(
                f"{self.folder} holds results of another protocol ({changes[:500]}): choose another --out, or --restart"
            )

    def _clear(self) -> None:
        import shutil

        if (self.folder / "protocol.json").is_file():  # nothing but a folder of ours is ever removed
            for name in ("results.jsonl", "protocol.json", "environment.json"):
                (self.folder / name).unlink(missing_ok=True)
            shutil.rmtree(self.folder / "scores", ignore_errors=True)

    def _read_lines(self) -> dict[tuple, dict]:
        path, lines = self.folder / "results.jsonl", {}
        if not path.is_file():
            return lines
        text = path.read_bytes()
        whole = text[: text.rfind(b"\n") + 1]
        if whole != text:  # a line that was being written when the power went
            with path.open("r+b") as file:
                file.truncate(len(whole))
        for line in whole.decode().splitlines():
            entry = json.loads(line)
            lines[cell_key(entry)] = entry
        return lines

    def add(self, lines: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        """Appends the lines of cells; returns them as they were written (NaN as None)."""
        lines = [{key: _plain(value) for key, value in line.items()} for line in lines]
        with (self.folder / "results.jsonl").open("a", encoding="utf-8") as file:
            file.write("".join(json.dumps(line, allow_nan=False) + "\n" for line in lines))
            file.flush()
            os.fsync(file.fileno())
        self.lines.update((cell_key(line), line) for line in lines)
        return lines

    def scores_folder(self, group: Group, identity: str) -> Path:
        """Where the scores of a group are kept; another place for a model of the same name but other weights."""
        return self.folder / "scores" / f"{group.id}-{hashlib.blake2b(identity.encode(), digest_size=4).hexdigest()}"

    def finished(self, group: Group, positions: tuple[float, ...], identity: str | None, clips: int) -> bool:
        """Whether every cell of a group has its line for these weights (None: for any) and so many clips, or failed."""
        lines = [self.lines.get(group.cell(position)) for position in positions]
        return all(
            line is not None
            and identity in (None, line["model_id"])
            and (line["status"] != OK or line["clips"] + line["broken"] >= clips)
            for line in lines
        )

    def forget_failures(self) -> None:
        """Lets cells that failed count as not done (their lines stay in the file until later ones replace them)."""
        self.lines = {key: line for key, line in self.lines.items() if line["status"] == OK}


def _open_array(path: Path, shape: tuple[int, ...], dtype: type, empty: float) -> np.ndarray:
    """The array in a file, with at least shape[0] rows; what is new is `empty`."""
    before = np.empty((0, *shape[1:]), dtype)
    if path.is_file():
        try:
            array = np.lib.format.open_memmap(path, mode="r+")
            if array.shape[1:] == shape[1:] and array.dtype == dtype:
                if len(array) >= shape[0]:
                    return array
                before = np.array(array)
        except ValueError:  # cut short while it was being made
            pass
    grown = path.with_name(f".{path.name}")
    array = np.lib.format.open_memmap(grown, mode="w+", dtype=dtype, shape=shape)
    array[: len(before)], array[len(before) :] = before, empty
    array.flush()
    os.replace(grown, path)  # the mapping follows the file
    return array


def _plain(value: Any) -> Any:
    if isinstance(value, (float, np.floating)):
        return float(value) if np.isfinite(value) else None
    return value.item() if isinstance(value, np.generic) else value
