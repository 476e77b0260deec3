"""The usual layouts of labelled recordings, each read into entries whose labels are still names."""

from __future__ import annotations

import csv
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from dass.audio import AUDIO_SUFFIXES


class ManifestError(ValueError):
    """A list of clips that cannot be used; the message names the file, the entry and what was expected."""


class Entry(NamedTuple):
    """A clip as a file lists it: its labels are still names."""

    path: str
    key: str
    labels: tuple[str, ...]
    """Identity of each label."""
    fold: str = ""
    group: str = ""


class Listing(NamedTuple):
    """What a file or folder lists. names: what people call a label, where that differs from its identity; order: of the
    classes, where it is not the alphabet's."""

    entries: list[Entry]
    names: dict[str, str] = {}
    order: dict[str, int] = {}


def read_folder(folder: Path, label_regex: str | None) -> Listing:
    """One sub-folder per class, or labels in the file names."""
    entries = []
    for path in _audio_files(folder):
        key = path.relative_to(folder).as_posix()
        if label_regex:
            label = first_group(label_regex, "label_regex", path.name)
        elif path.parent == folder:
            continue
        else:
            label = key.split("/", 1)[0]
        entries.append(Entry(str(path), key, (label,)))
    if not entries:
        flat = sum(1 for file in folder.iterdir() if file.suffix.lower() in AUDIO_SUFFIXES)
        raise ManifestError(
            f"{folder}: expected one sub-folder of sound files ({' '.join(sorted(AUDIO_SUFFIXES))}) per class; found "
            + (
                f"{flat} sound files and no such sub-folder. If the label stands in the file names, say where with "
                "--data.label-regex, for instance '^(\\d)_' for 7_theo_3.wav"
                if flat
                else "none"
            )
        )
    return Listing(entries)


def _audio_files(folder: Path) -> Iterator[Path]:
    for path in sorted(folder.iterdir()):
        if path.name.startswith("."):
            continue
        if path.is_dir():
            if not path.name.startswith("_"):  # Speech Commands' _background_noise_
                yield from _audio_files(path)
        elif path.suffix.lower() in AUDIO_SUFFIXES:
            yield path


def read_rows(path: Path) -> list[dict[str, str]]:
    """The rows of a CSV file by column name, empty ones left out."""
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            return [row for row in csv.DictReader(file, skipinitialspace=True) if any(row.values())]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise ManifestError(f"{path}: cannot be read as CSV ({error})") from None


def read_csv(path: Path) -> Listing:
    """A CSV of one of three kinds, told apart by its columns."""
    rows = read_rows(path)
    if not rows:
        raise ManifestError(f"{path}: holds no clips")
    columns = set(rows[0])
    if {"filename", "fold", "target", "category"} <= columns:
        return _read_esc50(path, rows)
    if {"fname", "labels", "mids"} <= columns:
        return _read_fsd50k(path, rows)
    file_column = next((name for name in ("path", "file", "filename", "wav") if name in columns), None)
    label_column = next((name for name in ("label", "labels") if name in columns), None)
    if file_column is None or label_column is None:
        raise ManifestError(
            f"{path}: expected a first line with the columns path,label (labels separated by ';') or ESC-50's "
            f"filename,fold,target,category; found {', '.join(map(str, rows[0]))}"
        )
    entries = []
    for number, row in enumerate(rows, start=2):
        if not row[file_column] or row[label_column] is None:
            raise ManifestError(f"{path}, line {number}: expected a path and a label, got {dict(row)}")
        labels = tuple(label.strip() for label in row[label_column].split(";") if label.strip())
        fold = row.get("fold") or row.get("split") or ""
        entries.append(
            Entry(
                os.path.join(path.parent, row[file_column]),
                row[file_column],
                labels,
                fold,
                row.get("group") or "",
            )
        )
    return Listing(entries)


def _read_esc50(path: Path, rows: list[dict[str, str]]) -> Listing:
    folder = next((f for f in (path.parent.parent / "audio", path.parent / "audio") if f.is_dir()), None)
    if folder is None:
        raise ManifestError(f"{path}: ESC-50's clips are expected in {path.parent.parent / 'audio'}, which is absent")
    entries = [
        Entry(
            os.path.join(folder, row["filename"]),
            row["filename"],
            (row["category"],),
            row["fold"],
            row.get("src_file") or "",
        )
        for row in rows
    ]
    names = {row["category"]: row["category"].replace("_", " ") for row in rows}
    return Listing(entries, names, {row["category"]: int(row["target"]) for row in rows})


def _read_fsd50k(path: Path, rows: list[dict[str, str]]) -> Listing:
    folder = path.parent.parent / ("FSD50K.eval_audio" if path.stem == "eval" else "FSD50K.dev_audio")
    if not folder.is_dir():
        raise ManifestError(f"{path}: FSD50K's clips are expected in {folder}, which is absent")
    entries, names = [], {}
    for row in rows:
        mids = tuple(row["mids"].split(","))
        for mid, name in zip(mids, row["labels"].split(","), strict=True):
            names[mid] = name.replace("_and_", " and ").replace("_", " ")
        file = f"{row['fname']}.wav"
        entries.append(Entry(os.path.join(folder, file), file, mids, row.get("split") or ""))
    return Listing(entries, names)


def read_json(path: Path) -> Listing:
    """AST's `{"data": [{"wav": path, "labels": "/m/09x0r,/m/05zppz"}]}`."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))["data"]
        entries = []
        for item in data:
            labels = tuple(label.strip() for label in item["labels"].split(",") if label.strip())
            entries.append(Entry(os.path.join(path.parent, item["wav"]), item["wav"], labels))
    except (OSError, json.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
        raise ManifestError(
            f'{path}: expected {{"data": [{{"wav": path, "labels": "/m/...,/m/..."}}, ...]}}; '
            f"{type(error).__name__}: {error}"
        ) from None
    return Listing(entries)


def compile_regex(pattern: str, option: str) -> re.Pattern[str]:
    """`re.compile` whose error names the option."""
    try:
        return re.compile(pattern)
    except re.error as error:
        raise ManifestError(f"{option}: {pattern!r} is not a regular expression ({error})") from None


def first_group(pattern: str, option: str, text: str) -> str:
    """What the first group of an expression finds in a text; nothing is an error that names the option."""
    compiled = compile_regex(pattern, option)
    if compiled.groups < 1:
        raise ManifestError(f"{option}: {pattern!r} needs a group in parentheses for what it is to find")
    match = compiled.search(text)
    if match is None or not match.group(1):
        raise ManifestError(f"{option}: {pattern!r} finds nothing in {text!r}; --data.exclude leaves files out")
    return match.group(1)
