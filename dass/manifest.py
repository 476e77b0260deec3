"""What there is to learn from: clips, their labels and classes, read from the usual layouts.

Four forms are told apart by what they hold: a folder with one sub-folder per class (or, with a regular expression, the
label in the file name), a CSV file, the layout of ESC-50, and the JSON of AST's AudioSet recipe.
"""

from __future__ import annotations

import csv
import difflib
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from dass.audio import AUDIO_SUFFIXES


class ManifestError(ValueError):
    """A list of clips that cannot be used; the message names the file, the entry and what was expected."""


@dataclass(frozen=True)
class LabelClass:
    """A class: its column in targets and logits, its identity (for AudioSet the mid) and what people call it."""

    index: int
    id: str
    name: str


@dataclass(frozen=True)
class Clip:
    """A recording: where it lies, its class indices (ascending), and its name in the manifest, unique there."""

    path: Path
    labels: tuple[int, ...]
    key: str
    fold: str = ""
    """Fold or split the manifest puts it in, if it says so."""
    group: str = ""
    """Recording or speaker it stems from, if known: a random split never separates a group."""


class _Strings(Sequence[str]):
    """A tuple of strings in two buffers: 2 million paths as objects would be copied into every loader worker."""

    def __init__(self, strings: Iterable[str]):
        parts = [text.encode("utf-8", "surrogateescape") for text in strings]
        self._ends = np.cumsum([0, *map(len, parts)], dtype=np.int64)
        self._bytes = b"".join(parts)

    def __len__(self) -> int:
        return len(self._ends) - 1

    def __getitem__(self, index):
        return self._bytes[self._ends[index] : self._ends[index + 1]].decode("utf-8", "surrogateescape")


class Manifest(Sequence[Clip]):
    """Clips and classes; a sequence of `Clip`, stored by column so that millions fit and workers share them.

    Args:
        clips: any iterable of `Clip`.
        classes: all classes, in the order of their indices 0, 1, ...
        source: what messages call the manifest.
    """

    def __init__(self, clips: Iterable[Clip], classes: Iterable[LabelClass], source: str = "manifest"):
        clips = list(clips)
        self.classes = tuple(classes)
        self.source = source
        if [entry.index for entry in self.classes] != list(range(len(self.classes))):
            raise ManifestError(f"{source}: class indices must be 0, 1, 2, ... in this order")
        self._paths = _Strings(str(clip.path) for clip in clips)
        self._keys = _Strings(clip.key for clip in clips)
        self._folds = _Strings(clip.fold for clip in clips)
        self._groups = _Strings(clip.group for clip in clips)
        self.label_ends = np.cumsum([0, *(len(clip.labels) for clip in clips)], dtype=np.int64)
        self.label_values = np.array([label for clip in clips for label in clip.labels], dtype=np.int32)
        if self.label_values.size and not 0 <= self.label_values.min() <= self.label_values.max() < len(
            self.classes
        ):
            raise ManifestError(f"{source}: labels must be class indices below {len(self.classes)}")

    @property
    def clips(self) -> Sequence[Clip]:
        return self

    def __len__(self) -> int:
        return len(self._paths)

    def __getitem__(self, index: int) -> Clip:
        if not -len(self) <= index < len(self):
            raise IndexError(f"clip {index} of a manifest of {len(self)} clips")
        index %= len(self)
        return Clip(
            Path(self._paths[index]),
            self.labels(index),
            self._keys[index],
            self._folds[index],
            self._groups[index],
        )

    def labels(self, index: int) -> tuple[int, ...]:
        """Class indices of a clip, ascending."""
        return tuple(self.label_values[self.label_ends[index] : self.label_ends[index + 1]].tolist())

    def label_counts(self) -> np.ndarray:
        """(classes,) int64: clips per class."""
        return np.bincount(self.label_values, minlength=len(self.classes))

    @property
    def has_folds(self) -> bool:
        return any(self._folds)

    def subset(self, indices: Iterable[int], source: str | None = None) -> Manifest:
        """The clips at `indices`, in that order, with the same classes."""
        return Manifest((self[int(index)] for index in indices), self.classes, source or self.source)

    def __repr__(self) -> str:
        return f"Manifest({self.source}: {len(self)} clips, {len(self.classes)} classes)"


def read_class_list(path: str | Path) -> tuple[LabelClass, ...]:
    """Reads `class_labels_indices.csv` of AudioSet: columns `index,mid,display_name`."""
    rows = _read_csv(Path(path))
    _require_columns(rows, ("index", "mid", "display_name"), path)
    classes = [LabelClass(int(row["index"]), row["mid"], row["display_name"]) for row in rows]
    classes.sort(key=lambda entry: entry.index)
    if [entry.index for entry in classes] != list(range(len(classes))):
        raise ManifestError(f"{path}: the column 'index' must hold 0 to {len(classes) - 1}, each once")
    return tuple(classes)


def read_manifest(
    path: str | Path,
    *,
    classes: str | Path | Sequence[LabelClass] | None = None,
    label_regex: str | None = None,
    exclude: str | None = None,
    group_regex: str | None = None,
) -> Manifest:
    """Reads a list of clips.

    Args:
        path: one of
            - a folder with one sub-folder per class (any depth below; folders that begin with "_" or "." are left out);
            - a folder and `label_regex`: the expression's first group in each file's name is its label, for instance
              `^(\\d)_` for `7_theo_3.wav`;
            - a folder in ESC-50's layout (`meta/esc50.csv`, `audio/`), or its CSV: `filename,fold,target,category`;
            - a CSV with the columns `path` and `label` (labels separated by ";"), and optionally `fold` and `group`;
              or FSD50K's `fname,labels,mids,split`; relative paths count from the CSV's folder;
            - AST's JSON, `{"data": [{"wav": path, "labels": "/m/09x0r,/m/05zppz"}]}`.
        classes: the classes and their order: those of another manifest, or a file `index,mid,display_name` (for the
            JSON form found beside it as `class_labels_indices.csv`); otherwise they are the labels found, sorted.
        exclude: regular expression; clips whose name it finds are left out.
        group_regex: regular expression whose first group is a clip's group (speaker, recording).

    Returns: a `Manifest`. Raises `ManifestError`, which says what was found and what was expected.
    """
    path = Path(path)
    if not path.exists():
        raise ManifestError(f"{path}: no such file or folder of training clips")
    if classes is not None and isinstance(classes, (str, Path)):
        classes = read_class_list(classes)
    if path.is_dir():
        meta = sorted(path.glob("meta/*.csv")) if (path / "audio").is_dir() else []
        entries = _read_csv_form(meta[0]) if meta and not label_regex else _read_folder(path, label_regex)
    elif path.suffix.lower() == ".csv":
        entries = _read_csv_form(path)
    elif path.suffix.lower() == ".json":
        entries = _read_json(path)
        if classes is None:
            found = [folder / "class_labels_indices.csv" for folder in (path.parent, path.parent.parent)]
            found = [file for file in found if file.is_file()]
            if not found:
                raise ManifestError(
                    f"{path}: needs the list of classes; put class_labels_indices.csv beside it or name it with "
                    "--data.classes"
                )
            classes = read_class_list(found[0])
    else:
        raise ManifestError(f"{path}: expected a folder, a .csv or a .json file")
    if exclude:
        entries = [entry for entry in entries if not compile_regex(exclude, "exclude").search(entry.key)]
    if group_regex:
        entries = [
            replace(entry, group=_first_group(group_regex, "group_regex", entry.key)) for entry in entries
        ]
    if not entries:
        raise ManifestError(f"{path}: holds no clips" + (f" that {exclude!r} leaves in" if exclude else ""))
    return _number(entries, classes, str(path))


# --- the forms: each gives entries whose labels are still (id, name, sort key) ----------------------------------------


@dataclass(frozen=True)
class _Entry:
    path: Path
    key: str
    labels: tuple[tuple[str, str, int], ...]  # id, name, order
    fold: str = ""
    group: str = ""


def _read_folder(folder: Path, label_regex: str | None) -> list[_Entry]:
    entries = []
    for path in _audio_files(folder):
        key = path.relative_to(folder).as_posix()
        if label_regex:
            label = _first_group(label_regex, "label_regex", path.name)
        elif path.parent == folder:
            continue
        else:
            label = key.split("/", 1)[0]
        entries.append(_Entry(path, key, ((label, label, 0),)))
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
    return entries


def _audio_files(folder: Path) -> Iterator[Path]:
    for path in sorted(folder.iterdir()):
        if path.name.startswith("."):
            continue
        if path.is_dir():
            if not path.name.startswith("_"):  # Speech Commands' _background_noise_
                yield from _audio_files(path)
        elif path.suffix.lower() in AUDIO_SUFFIXES:
            yield path


def _read_csv(path: Path) -> list[dict[str, str]]:
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            return [row for row in csv.DictReader(file, skipinitialspace=True) if any(row.values())]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise ManifestError(f"{path}: cannot be read as CSV ({error})") from None


def _require_columns(rows: list[dict[str, str]], columns: Sequence[str], path) -> None:
    found = list(rows[0]) if rows else []
    missing = [column for column in columns if column not in found]
    if missing:
        raise ManifestError(
            f"{path}: lacks the column(s) {', '.join(missing)}; found {', '.join(map(str, found))}"
        )


def _read_csv_form(path: Path) -> list[_Entry]:
    rows = _read_csv(path)
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
        labels = [label.strip() for label in row[label_column].split(";") if label.strip()]
        entries.append(
            _Entry(
                path.parent / row[file_column],
                row[file_column],
                tuple((label, label, 0) for label in labels),
                row.get("fold") or row.get("split") or "",
                row.get("group") or "",
            )
        )
    return entries


def _read_esc50(path: Path, rows: list[dict[str, str]]) -> list[_Entry]:
    folder = next((f for f in (path.parent.parent / "audio", path.parent / "audio") if f.is_dir()), None)
    if folder is None:
        raise ManifestError(
            f"{path}: ESC-50's clips are expected in {path.parent.parent / 'audio'}, which is absent"
        )
    return [
        _Entry(
            folder / row["filename"],
            row["filename"],
            ((row["category"], row["category"].replace("_", " "), int(row["target"])),),
            row["fold"],
            row.get("src_file") or "",
        )
        for row in rows
    ]


def _read_fsd50k(path: Path, rows: list[dict[str, str]]) -> list[_Entry]:
    part = "FSD50K.eval_audio" if path.stem == "eval" else "FSD50K.dev_audio"
    folder = path.parent.parent / part
    if not folder.is_dir():
        raise ManifestError(f"{path}: FSD50K's clips are expected in {folder}, which is absent")
    entries = []
    for row in rows:
        names = [name.replace("_and_", " and ").replace("_", " ") for name in row["labels"].split(",")]
        labels = tuple((mid, name, 0) for mid, name in zip(row["mids"].split(","), names, strict=True))
        entries.append(
            _Entry(folder / f"{row['fname']}.wav", f"{row['fname']}.wav", labels, row.get("split") or "")
        )
    return entries


def _read_json(path: Path) -> list[_Entry]:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))["data"]
        return [
            _Entry(
                path.parent / item["wav"],
                item["wav"],
                tuple(
                    (label.strip(), label.strip(), 0) for label in item["labels"].split(",") if label.strip()
                ),
            )
            for item in data
        ]
    except (OSError, json.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
        raise ManifestError(
            f'{path}: expected {{"data": [{{"wav": path, "labels": "/m/...,/m/..."}}, ...]}}; {type(error).__name__}: '
            f"{error}"
        ) from None


def _number(entries: list[_Entry], classes: Sequence[LabelClass] | None, source: str) -> Manifest:
    """Gives every label its class index."""
    if classes is None:
        found = {label_id: (order, label_id, name) for e in entries for label_id, name, order in e.labels}
        classes = [
            LabelClass(i, label_id, name) for i, (_, label_id, name) in enumerate(sorted(found.values()))
        ]
    if not classes:
        raise ManifestError(f"{source}: not one clip has a label")
    index_of = {entry.name: entry.index for entry in classes} | {entry.id: entry.index for entry in classes}
    clips = []
    for entry in entries:
        for label_id, _, _ in entry.labels:
            if label_id not in index_of:
                near = difflib.get_close_matches(label_id, index_of, n=1)
                raise ManifestError(
                    f"{source}: the label {label_id!r} of {entry.key} is none of the {len(classes)} classes"
                    + (f"; the nearest is {near[0]!r}" if near else "")
                )
        labels = tuple(sorted({index_of[label_id] for label_id, _, _ in entry.labels}))
        clips.append(Clip(entry.path, labels, entry.key, entry.fold, entry.group))
    return Manifest(clips, classes, source)


def compile_regex(pattern: str, option: str) -> re.Pattern[str]:
    """`re.compile` whose error names the option."""
    try:
        return re.compile(pattern)
    except re.error as error:
        raise ManifestError(f"{option}: {pattern!r} is not a regular expression ({error})") from None


def _first_group(pattern: str, option: str, text: str) -> str:
    compiled = compile_regex(pattern, option)
    if compiled.groups < 1:
        raise ManifestError(f"{option}: {pattern!r} needs a group in parentheses for what it is to find")
    match = compiled.search(text)
    if match is None or not match.group(1):
        raise ManifestError(
            f"{option}: {pattern!r} finds nothing in {text!r}; --data.exclude leaves files out"
        )
    return match.group(1)
