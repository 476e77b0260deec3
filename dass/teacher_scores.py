"""Cached teacher scores: one file of logits for all clips, keyed by what a clip sounds like, never by its row.

A file is safetensors with a JSON header (`dass_scores`: teacher, classes, front end, augmentation) and, for n clips:

    keys    (n, 16) uint8     hash of the clip's audio          checks  (n,) int64   CRC of key and scores
    logits  (n, classes)      or, keeping only the top k:       values, columns (n, k) and rest (n,) float32
    names   uint8 text, one name a line, for messages

`rest` is the one logit given to every class beyond the top k, so that the softmax over the kept ones is unchanged.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dass.audio import LogMelConfig
from dass.batch import Batch
from dass.checkpoint import read_tensors, write_tensors
from dass.dataset import AudioDataset
from dass.manifest import LabelClass

HEADER = "dass_scores"
FORMAT = 1
SMALLEST = 1e-6  # probabilities of third parties are kept this far from 0 and 1, where logits are infinite


class ScoresError(ValueError):
    """Cached scores that cannot be used; the message names the file, the clip and the way out."""


@dataclass(frozen=True)
class Scores:
    """Teacher logits of many clips: `rows` (n, classes) float32, or top k with `columns` and `rest`."""

    keys: np.ndarray  # (n, 16) uint8
    names: tuple[str, ...]
    values: np.ndarray  # (n, classes or k) float16 or float32
    columns: np.ndarray | None  # (n, k) int32
    rest: np.ndarray | None  # (n,) float32
    checks: np.ndarray  # (n,) int64
    header: dict[str, Any]

    @property
    def classes(self) -> tuple[LabelClass, ...]:
        """The teacher's classes."""
        return tuple(LabelClass(i, entry["id"], entry["name"]) for i, entry in enumerate(self.header["classes"]))

    def row(self, number: int) -> np.ndarray:
        """(classes,) float32 logits of a row, which is checked first. Raises ScoresError where it is not as written."""
        if row_check(self, number) != self.checks[number]:
            raise ScoresError(
                f"the scores of {self.names[number]!r} are not those that were written for it: the file was reordered or "
                "damaged; make it anew with python -m dass.teacher cache"
            )
        values = self.values[number].astype(np.float32)
        if self.columns is None:
            return values
        full = np.full(len(self.header["classes"]), self.rest[number], dtype=np.float32)
        full[self.columns[number]] = values
        return full


def row_check(scores: Scores, number: int) -> int:
    """CRC over a row's key and everything that is stored for it."""
    parts = [scores.keys[number], scores.values[number]]
    if scores.columns is not None:
        parts += [scores.columns[number], scores.rest[number : number + 1]]
    check = 0
    for part in parts:
        check = zlib.crc32(np.ascontiguousarray(part).tobytes(), check)
    return check


def pack_scores(
    keys: Sequence[str], names: Sequence[str], logits: np.ndarray, header: dict[str, Any], top_k: int | None
) -> Scores:
    """Scores of (n, classes) float32 logits in the stored form: float16, all classes or the `top_k` largest."""
    digests = np.array([list(bytes.fromhex(key)) for key in keys], dtype=np.uint8).reshape(len(keys), 16)
    columns = rest = None
    values = logits.astype(np.float16)
    if top_k is not None and top_k < logits.shape[1]:
        columns = np.argsort(-logits, axis=1, kind="stable")[:, :top_k].astype(np.int32)
        values = np.take_along_axis(logits, columns, 1).astype(np.float16)
        others = np.exp(logits.astype(np.float64)).sum(1) - np.exp(np.take_along_axis(logits, columns, 1)).sum(1)
        rest = np.log(np.maximum(others, 1e-30) / (logits.shape[1] - top_k)).astype(np.float32)
    unchecked = Scores(digests, tuple(names), values, columns, rest, np.zeros(len(keys), np.int64), header)
    checks = np.array([row_check(unchecked, number) for number in range(len(keys))], dtype=np.int64)
    return Scores(digests, tuple(names), values, columns, rest, checks, header)


def write_scores(path: Path, scores: Scores) -> None:
    """Write a scores file, atomically."""
    text = "\n".join(name.replace("\n", " ") for name in scores.names).encode("utf-8", "surrogateescape")
    arrays = {"keys": scores.keys, "checks": scores.checks, "names": np.frombuffer(text, dtype=np.uint8).copy()}
    if scores.columns is None:
        arrays["logits"] = scores.values
    else:
        arrays |= {"values": scores.values, "columns": scores.columns, "rest": scores.rest}
    tensors = {name: torch.from_numpy(np.ascontiguousarray(array)) for name, array in arrays.items()}
    write_tensors(path, tensors, {HEADER: json.dumps(scores.header, ensure_ascii=False)})


def read_header(path: Path) -> dict[str, Any] | None:
    """The JSON header of a scores file, None where the file is none."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            text = (file.metadata() or {}).get(HEADER)
    except (SafetensorError, OSError):
        return None
    return None if text is None else json.loads(text)


def holds_scores(path: Path) -> bool:
    """Whether a safetensors file holds cached scores (and not a model)."""
    return read_header(path) is not None


def read_scores(path: Path) -> Scores:
    """The scores in a file. Raises ScoresError where it holds none or another version's."""
    header = read_header(path)
    if header is None or header.get("format") != FORMAT:
        raise ScoresError(
            f"{path}: holds no teacher scores of format {FORMAT}; make it with python -m dass.teacher cache"
        )
    arrays = {name: tensor.numpy() for name, tensor in read_tensors(path).items()}
    text = arrays["names"].tobytes().decode("utf-8", "surrogateescape")
    names = tuple(text.split("\n")) if len(arrays["keys"]) else ()
    top = "columns" in arrays
    return Scores(
        keys=arrays["keys"],
        names=names,
        values=arrays["values"] if top else arrays["logits"],
        columns=arrays.get("columns"),
        rest=arrays.get("rest"),
        checks=arrays["checks"],
        header=header,
    )


class CachedTeacher:
    """A teacher that looks its scores up, by the hash of each clip's audio.

    The scores are of the clips as they are: of the augmentations only mixup reaches them.
    """

    hears = "hashes"

    def __init__(self, path: Path):
        self.name, self.scores = str(path), read_scores(path)
        self.classes = self.scores.classes
        order = np.lexsort(self.scores.keys.T[::-1])
        self._order = order
        self._leading = self.scores.keys[order][:, :8].copy().view(">u8")[:, 0].astype(np.uint64)

    def attach(self, front_end: LogMelConfig, classes: tuple[LabelClass, ...]) -> None:
        """Nothing to do: scores do not depend on the student's spectrogram."""

    def to(self, device: torch.device) -> CachedTeacher:
        """Scores stay on the CPU; what is looked up goes where the batch is."""
        return self

    def pair(self, batch: Batch, clips: AudioDataset, strict: bool) -> tuple[Tensor, Tensor]:
        """(batch, classes) logits of each clip and of the one mixed into it (where none is: of the clip itself).

        Clips without scores: ScoresError, which names them, when `strict`; otherwise rows of NaN.
        """
        first = self._rows(batch.audio_hashes, batch.index, clips, strict)
        second = first
        if any(batch.mix_hashes):
            second = self._rows(batch.mix_hashes, batch.mix_index, clips, strict)
            second = torch.where((batch.mix_index < 0).cpu()[:, None], first, second)
        return first.to(batch.target.device), second.to(batch.target.device)

    def _rows(self, hashes: Sequence[str], index: Tensor, clips: AudioDataset, strict: bool) -> Tensor:
        rows = np.full((len(hashes), len(self.classes)), np.nan, dtype=np.float32)
        for place, (audio_hash, clip) in enumerate(zip(hashes, index.tolist(), strict=True)):
            if clip < 0:
                continue
            number = self._find(bytes.fromhex(audio_hash))
            if number is not None:
                rows[place] = self.scores.row(number)
            elif strict:
                raise ScoresError(self._missing(clips.name(clip)))
        return torch.from_numpy(rows)

    def _find(self, digest: bytes) -> int | None:
        leading = np.frombuffer(digest[:8], dtype=">u8").astype(np.uint64)[0]
        place = int(np.searchsorted(self._leading, leading))
        while place < len(self._leading) and self._leading[place] == leading:
            if self.scores.keys[self._order[place]].tobytes() == digest:
                return int(self._order[place])
            place += 1
        return None

    def _missing(self, name: str) -> str:
        remedy = "make them anew with python -m dass.teacher cache, or set --distill.on-missing hard-label"
        if name in self.scores.names:
            return f"{self.name}: the audio of {name!r} has changed since its scores were made; {remedy}"
        return f"{self.name}: has no scores of {name!r}; {remedy}"


class NamedScoresTeacher:
    """Third-party scores in an `.npz` with `files` (n,), `mids` (c,), `probs` (n, c) and, optionally, `display_names`.

    Looked up by file name (the last part of the path), which must be unique in it.
    """

    hears = "spectrograms"  # of a batch it needs no more than which clips it holds

    def __init__(self, path: Path):
        self.name = str(path)
        with np.load(path, allow_pickle=False) as archive:
            lacking = [name for name in ("files", "mids", "probs") if name not in archive]
            if lacking:
                raise ScoresError(f"{path}: lacks {', '.join(lacking)}; expected files (n,), mids (c,), probs (n, c)")
            files, mids, probabilities = archive["files"], archive["mids"], archive["probs"].astype(np.float32)
            names = archive["display_names"] if "display_names" in archive else mids
        if probabilities.shape != (len(files), len(mids)) or len(names) != len(mids):
            raise ScoresError(
                f"{path}: probs has shape {probabilities.shape} for {len(files)} files and {len(mids)} mids"
            )
        if not ((probabilities >= 0) & (probabilities <= 1)).all():
            raise ScoresError(f"{path}: probs must lie between 0 and 1")
        self.classes = tuple(
            LabelClass(i, str(mid), str(name)) for i, (mid, name) in enumerate(zip(mids, names, strict=True))
        )
        self.rows = {Path(str(file)).name: number for number, file in enumerate(files)}
        if len(self.rows) != len(files):
            raise ScoresError(f"{path}: several of its files have the same name")
        probabilities = probabilities.clip(SMALLEST, 1 - SMALLEST)
        self.logits = np.log(probabilities) - np.log1p(-probabilities)

    def attach(self, front_end: LogMelConfig, classes: tuple[LabelClass, ...]) -> None:
        """Nothing to do: scores do not depend on the student's spectrogram."""

    def to(self, device: torch.device) -> NamedScoresTeacher:
        """Scores stay on the CPU; what is looked up goes where the batch is."""
        return self

    def pair(self, batch: Batch, clips: AudioDataset, strict: bool) -> tuple[Tensor, Tensor]:
        """As `CachedTeacher.pair`."""
        first = self._rows(batch.index, clips, strict)
        mixed = (batch.mix_index >= 0).cpu()
        second = (
            torch.where(mixed[:, None], self._rows(batch.mix_index, clips, strict), first) if mixed.any() else first
        )
        return first.to(batch.target.device), second.to(batch.target.device)

    def _rows(self, index: Tensor, clips: AudioDataset, strict: bool) -> Tensor:
        rows = np.full((len(index), len(self.classes)), np.nan, dtype=np.float32)
        for place, clip in enumerate(index.tolist()):
            if clip < 0:
                continue
            name = clips.name(clip)
            number = self.rows.get(Path(name).name)
            if number is not None:
                rows[place] = self.logits[number]
            elif strict:
                raise ScoresError(
                    f"{self.name}: has no scores of {name!r}; set --distill.on-missing hard-label to go on"
                )
        return torch.from_numpy(rows)
