"""Which class of a teacher is which class of the student: matched by id, by name, or by a table; with a report."""

from __future__ import annotations

import csv
import re
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

import torch
from torch import Tensor

from dass.config_files import suggestion
from dass.manifest import LabelClass

# Fillers of classes without a name, as transformers and our own models number them: they identify nothing.
_NUMBERED = re.compile(r"(label_)?\d+", re.IGNORECASE)


class ClassMapError(ValueError):
    """Classes that cannot be matched: the message names them and the way out."""


@dataclass(frozen=True)
class ClassMatch:
    """Classes that a teacher shares with the student.

    student: (matched,) columns of the student; teacher: for each, the columns of the teacher that stand for it (where
    there are several, the largest logit counts). The rest are the names without a counterpart.
    """

    student: tuple[int, ...]
    teacher: tuple[tuple[int, ...], ...]
    student_unmatched: tuple[str, ...]
    teacher_unmatched: tuple[str, ...]

    def select(self, logits: Tensor) -> Tensor:
        """Teacher logits (batch, teacher classes) -> (batch, matched), in the order of `student`."""
        widest = max(len(columns) for columns in self.teacher)
        # Repeating a column leaves the maximum as it is, so that all rows get one length.
        index = torch.tensor([[*c, *[c[0]] * (widest - len(c))] for c in self.teacher], device=logits.device)
        return logits[:, index].amax(-1)

    def report(self, teacher: str) -> str:
        """One paragraph on what was matched and what has no counterpart."""
        text = f"teacher {teacher}: {len(self.student)} classes matched"
        if self.student_unmatched:
            text += f"; learnt from labels alone ({len(self.student_unmatched)}): {_some(self.student_unmatched)}"
        if self.teacher_unmatched:
            text += f"; unused teacher classes ({len(self.teacher_unmatched)}): {_some(self.teacher_unmatched)}"
        return text


def match_classes(
    student: Sequence[LabelClass],
    teacher: Sequence[LabelClass],
    table: Sequence[tuple[str, str]] | None = None,
) -> ClassMatch:
    """Match each student class with teacher classes.

    table: pairs (student class, teacher class) of ids or names; the classes in it are matched by it alone, the others
    by equal id, else by equal name (case and punctuation apart) where it is unique. Bare numbers identify a class only
    where the whole lists are the same. Raises ClassMapError when nothing matches or the table names a class that the
    teacher does not have.
    """
    if not table and [entry.id for entry in student] == [entry.id for entry in teacher]:
        columns = tuple(range(len(student)))
        return ClassMatch(columns, tuple((column,) for column in columns), (), ())
    student_index, teacher_index = _lookup(student), _lookup(teacher)
    pairs: dict[int, list[int]] = {}
    for own, other in table or ():
        column = _find(own, student_index)
        if column is None:
            continue  # a table may cover more classes than this data has
        target = _find(other, teacher_index)
        if target is not None:
            pairs.setdefault(column, []).append(target)
        elif not any(_find(o, teacher_index) is not None for s, o in table or () if s == own):
            raise ClassMapError(
                f"class map: the teacher has no class {other!r} (for {own!r})" + suggestion(other, teacher_index)
            )
    for entry in student:
        if entry.index not in pairs:
            target = _find(entry.id, teacher_index)
            target = _find(entry.name, teacher_index) if target is None else target
            if target is not None:
                pairs[entry.index] = [target]
    if not pairs:
        raise ClassMapError(
            f"none of the {len(student)} classes ({_some([e.name for e in student])}) is one of the teacher's "
            f"{len(teacher)} ({_some([e.name for e in teacher])}) by id or name; give a table with --distill.class-map"
        )
    used = {column for columns in pairs.values() for column in columns}
    order = tuple(sorted(pairs))
    return ClassMatch(
        student=order,
        teacher=tuple(tuple(dict.fromkeys(pairs[column])) for column in order),
        student_unmatched=tuple(entry.name for entry in student if entry.index not in pairs),
        teacher_unmatched=tuple(entry.name for entry in teacher if entry.index not in used),
    )


def read_class_table(source: str | Path) -> list[tuple[str, str]]:
    """Pairs (class, teacher class) of a CSV with these two columns, or of a built-in table such as `esc50-audioset`."""
    path = Path(source)
    if path.is_file():
        text = path.read_text(encoding="utf-8-sig")
    else:
        tables = {
            entry.name.removesuffix(".csv"): entry
            for entry in (resources.files("dass") / "presets").iterdir()
            if entry.name.endswith(".csv")
        }
        if str(source) not in tables:
            raise ClassMapError(f"distill.class_map: no file {str(source)!r}" + suggestion(str(source), tables))
        text = tables[str(source)].read_text(encoding="utf-8")
    rows = list(csv.DictReader(text.splitlines(), skipinitialspace=True))
    if not rows or not {"class", "teacher_class"} <= set(rows[0]):
        raise ClassMapError(f"{source}: expected a CSV with the columns class,teacher_class")
    return [(row["class"].strip(), row["teacher_class"].strip()) for row in rows]


def _lookup(classes: Sequence[LabelClass]) -> dict[str, int]:
    """Column by id and by name; ids win, and a name that several classes bear finds none of them."""
    by_name: dict[str, int] = {}
    ambiguous = set()
    for entry in classes:
        name = _simplified(entry.name)
        if name in by_name:
            ambiguous.add(name)
        by_name[name] = entry.index
    found = {name: column for name, column in by_name.items() if name not in ambiguous}
    found.update({entry.id: entry.index for entry in classes})
    return {name: column for name, column in found.items() if not _NUMBERED.fullmatch(name)}


def _find(label: str, lookup: dict[str, int]) -> int | None:
    column = lookup.get(label)
    return lookup.get(_simplified(label)) if column is None else column


def _simplified(name: str) -> str:
    return " ".join(re.findall(r"[^\W_]+", name.lower()))


def _some(names: Sequence[str], most: int = 8) -> str:
    shown = ", ".join(names[:most])
    return shown if len(names) <= most else f"{shown}, and {len(names) - most} more"
