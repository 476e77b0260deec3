"""What there is to learn from: clips, their labels and classes, read from the usual layouts.

Four forms are told apart by what they hold: a folder with one sub-folder per class (or, with a regular expression, the
label in the file name), a CSV file, the layout of ESC-50, and the JSON of AST's AudioSet recipe.
"""

from __future__ import annotations

import difflib
from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from dass.manifest_forms import (
    Listing,
    ManifestError,
    compile_regex,
    first_group,
    read_csv,
    read_folder,
    read_json,
    read_rows,
)


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

    def __init__(self, parts: list[bytes]):
        self._ends = np.cumsum([0, *map(len, parts)], dtype=np.int64)
        self._bytes = b"".join(parts)

    @classmethod
    def of(cls, strings: Iterable[str]) -> _Strings:
        return cls([text.encode("utf-8", "surrogateescape") for text in strings])

    def take(self, indices: Iterable[int]) -> _Strings:
        ends, content = self._ends, self._bytes
        return _Strings([content[ends[index] : ends[index + 1]] for index in indices])

    def __len__(self) -> int:
        return len(self._ends) - 1

    def __getitem__(self, index):
        return self._bytes[self._ends[index] : self._ends[index + 1]].decode("utf-8", "surrogateescape")

    def __bool__(self) -> bool:
        """Whether any of the strings holds anything."""
        return bool(self._bytes)


class Manifest(Sequence[Clip]):
    """Clips and classes; a sequence of `Clip`, stored by column so that millions fit and workers share them.

    Args:
        clips: any iterable of `Clip`.
        classes: all classes, in the order of their indices 0, 1, ...
        source: what messages call the manifest.
    """

    def __init__(self, clips: Iterable[Clip], classes: Iterable[LabelClass], source: str = "manifest"):
        clips = list(clips)
        self._set(
            tuple(classes),
            source,
            [
                _Strings.of(column)
                for column in zip(*((str(c.path), c.key, c.fold, c.group) for c in clips), strict=True)
            ]
            or [_Strings([])] * 4,
            np.cumsum([0, *(len(clip.labels) for clip in clips)], dtype=np.int64),
            np.array([label for clip in clips for label in clip.labels], dtype=np.int32),
        )

    def _set(self, classes, source, columns, label_ends, label_values) -> Manifest:
        """The columns are path, key, fold and group; clip i's labels are label_values[label_ends[i] : label_ends[i + 1]]."""
        self.classes, self.source = classes, source
        self._columns, self.label_ends, self.label_values = columns, label_ends, label_values
        if [entry.index for entry in classes] != list(range(len(classes))):
            raise ManifestError(f"{source}: class indices must be 0, 1, 2, ... in this order")
        if label_values.size and not 0 <= label_values.min() <= label_values.max() < len(classes):
            raise ManifestError(f"{source}: labels must be class indices below {len(classes)}")
        return self

    @property
    def clips(self) -> Sequence[Clip]:
        return self

    def __len__(self) -> int:
        return len(self.label_ends) - 1

    def __getitem__(self, index: int) -> Clip:
        if not -len(self) <= index < len(self):
            raise IndexError(f"clip {index} of a manifest of {len(self)} clips")
        index %= len(self)
        path, key, fold, group = (column[index] for column in self._columns)
        return Clip(Path(path), self.labels(index), key, fold, group)

    def labels(self, index: int) -> tuple[int, ...]:
        """Class indices of a clip, ascending."""
        return tuple(self.label_values[self.label_ends[index] : self.label_ends[index + 1]].tolist())

    def label_counts(self) -> np.ndarray:
        """(classes,) int64: clips per class."""
        return np.bincount(self.label_values, minlength=len(self.classes))

    @property
    def has_folds(self) -> bool:
        return bool(self._columns[2])

    def subset(self, indices: Iterable[int], source: str | None = None) -> Manifest:
        """The clips at `indices`, in that order, with the same classes."""
        indices = np.asarray(list(indices), dtype=np.int64)
        starts, sizes = self.label_ends[indices], np.diff(self.label_ends)[indices]
        ends = np.concatenate([[0], np.cumsum(sizes)])
        values = self.label_values[np.repeat(starts - ends[:-1], sizes) + np.arange(ends[-1])]
        columns = [column.take(indices.tolist()) for column in self._columns]
        return Manifest.__new__(Manifest)._set(self.classes, source or self.source, columns, ends, values)

    def __repr__(self) -> str:
        return f"Manifest({self.source}: {len(self)} clips, {len(self.classes)} classes)"


def read_class_list(path: str | Path) -> tuple[LabelClass, ...]:
    """Reads `class_labels_indices.csv` of AudioSet: columns `index,mid,display_name`."""
    rows = read_rows(Path(path))
    missing = {"index", "mid", "display_name"} - set(rows[0] if rows else ())
    if missing:
        raise ManifestError(f"{path}: lacks the column(s) {', '.join(sorted(missing))} of a class list")
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
        listing = read_csv(meta[0]) if meta and not label_regex else read_folder(path, label_regex)
    elif path.suffix.lower() == ".csv":
        listing = read_csv(path)
    elif path.suffix.lower() == ".json":
        listing = read_json(path)
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
    entries = listing.entries
    if exclude:
        pattern = compile_regex(exclude, "exclude")
        entries = [entry for entry in entries if not pattern.search(entry.key)]
    if group_regex:
        entries = [e._replace(group=first_group(group_regex, "group_regex", e.key)) for e in entries]
    if not entries:
        raise ManifestError(f"{path}: holds no clips" + (f" that {exclude!r} leaves in" if exclude else ""))
    return _number(listing._replace(entries=entries), classes, str(path))


def _number(listing: Listing, classes: Sequence[LabelClass] | None, source: str) -> Manifest:
    """Gives every label its class index."""
    entries = listing.entries
    if classes is None:
        found = sorted({label for e in entries for label in e.labels}, key=lambda i: (listing.order.get(i, 0), i))
        classes = [LabelClass(index, label, listing.names.get(label, label)) for index, label in enumerate(found)]
    if not classes:
        raise ManifestError(f"{source}: not one clip has a label")
    index_of = {entry.name: entry.index for entry in classes} | {entry.id: entry.index for entry in classes}
    ends, values = [0], array("i")
    for entry in entries:
        try:
            values.extend(sorted({index_of[label] for label in entry.labels}))
        except KeyError as error:
            label = error.args[0]
            near = difflib.get_close_matches(label, index_of, n=1)
            raise ManifestError(
                f"{source}: the label {label!r} of {entry.key} is none of the {len(classes)} classes"
                + (f"; the nearest is {near[0]!r}" if near else "")
            ) from None
        ends.append(len(values))
    columns = [_Strings.of(e[column] for e in entries) for column in (0, 1, 3, 4)]  # path, key, fold, group
    labels = np.frombuffer(values, dtype=np.int32) if values else np.zeros(0, dtype=np.int32)
    return Manifest.__new__(Manifest)._set(tuple(classes), source, columns, np.array(ends, dtype=np.int64), labels)
