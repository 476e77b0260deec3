"""Teachers of a run: found by what a source is, matched to the student's classes, and combined.

    python -m dass.teacher cache --teacher SOURCE --data PATH --out scores.safetensors    # scores once, for many runs

A source is a folder or hub name of a transformers audio classifier, an original AST `.pth`, a DASS checkpoint or run
folder, or cached scores (`.safetensors` of the command above, `.npz` of third parties).
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

import torch
from torch import Tensor, nn

from dass.audio import LogMelConfig
from dass.batch import Batch
from dass.checkpoint import read_json, read_state
from dass.classes import ClassMatch, match_classes, read_class_table
from dass.dataset import AudioDataset
from dass.distill import DistillConfig, TeacherOutput, mix_scores
from dass.manifest import LabelClass, read_class_list
from dass.optimization import ParameterAverage
from dass.teacher_models import (
    SpectrogramTeacher,
    TeacherError,
    classes_of,
    is_original_ast,
    load_original_ast,
    load_transformers,
)

SELF, TRAIN = "self", "train"


class Teacher(Protocol):
    """What a teacher is: logits over its own `classes`, from what of a batch it `hears`."""

    name: str
    classes: tuple[LabelClass, ...]
    hears: Literal["spectrograms", "waveforms", "hashes"]

    def attach(self, front_end: LogMelConfig, classes: tuple[LabelClass, ...]) -> None:
        """Make ready for the batches of a run, of this front end and these classes; before the first of them."""

    def to(self, device: torch.device) -> Teacher:
        """Move to a device; returns itself."""

    def logits(self, batch: Batch) -> Tensor:
        """(batch, classes)."""


class ScoresTeacher(Protocol):
    """A teacher whose logits were computed before: those of the clips as they are, still to be mixed."""

    name: str
    classes: tuple[LabelClass, ...]
    hears: Literal["spectrograms", "waveforms", "hashes"]

    def attach(self, front_end: LogMelConfig, classes: tuple[LabelClass, ...]) -> None:
        """As `Teacher.attach`."""

    def to(self, device: torch.device) -> ScoresTeacher:
        """As `Teacher.to`."""

    def pair(self, batch: Batch, clips: AudioDataset, strict: bool) -> tuple[Tensor, Tensor]:
        """(batch, classes) of each clip and of the one mixed into it; rows of NaN for unknown clips, unless `strict`."""


class SelfTeacher:
    """The student's own moving average (mean teacher, arXiv 1703.01780); `update` after each step."""

    name = SELF
    hears = "spectrograms"

    def __init__(self, model: nn.Module, classes: tuple[LabelClass, ...], decay: float):
        self.model = copy.deepcopy(model).eval().requires_grad_(False)
        self.classes, self.decay = classes, decay
        # The average works on the copy's own parameters, in place.
        self.average = ParameterAverage({name: value.data for name, value in self.model.named_parameters()})

    def to(self, device: torch.device) -> SelfTeacher:
        self.model.to(device)
        self.average.values = {name: value.data for name, value in self.model.named_parameters()}
        return self

    def attach(self, front_end: LogMelConfig, classes: tuple[LabelClass, ...]) -> None:
        """Nothing to do: front end and classes are the student's."""

    def update(self, model: nn.Module) -> None:
        """Take the student's weights after a step into the average."""
        self.average.ema(model, self.decay)

    def restore(self, values: dict[str, Tensor], count: int) -> None:
        """Put back the average of a resumed run."""
        for name, value in self.average.values.items():
            value.copy_(values[name])
        self.average.count = count

    @torch.no_grad()
    def logits(self, batch: Batch) -> Tensor:
        return self.model(batch.fbank)


@dataclass(frozen=True)
class Member:
    """A teacher in an ensemble: its classes matched to the student's and its weight."""

    teacher: Teacher | ScoresTeacher
    match: ClassMatch
    weight: float


class Ensemble:
    """One or several teachers as one: the weighted mean of their logits on the student's classes.

    Where a teacher lacks a class or does not know a clip, the others' weights are scaled up. A clip of which any class
    is left without a teacher is unknown, and classes that no teacher has are not distilled. config: the loss and its
    temperature, by which scores are mixed, and what to do about clips without scores.
    """

    def __init__(self, members: Sequence[Member], student_classes: int, config: DistillConfig):
        self.members, self.config = tuple(members), config
        covered = sorted({column for member in members for column in member.match.student})
        self.complete = len(covered) == student_classes
        self.columns = torch.tensor(covered)
        self.places = [torch.tensor([covered.index(column) for column in member.match.student]) for member in members]

    @property
    def name(self) -> str:
        return " + ".join(f"{member.weight:.3g} {member.teacher.name}" for member in self.members)

    def to(self, device: torch.device) -> Ensemble:
        for member in self.members:
            member.teacher.to(device)
        self.columns = self.columns.to(device)
        self.places = [place.to(device) for place in self.places]
        return self

    @torch.no_grad()
    def __call__(self, batch: Batch, clips: AudioDataset, training: bool = True) -> TeacherOutput:
        """What the teachers say of a batch of these clips, on the classes that any of them has.

        In training, clips without scores raise ScoresError if config.on_missing is `error`.
        """
        logits = [self._of(member, batch, clips, training) for member in self.members]
        columns = None if self.complete else self.columns
        total = logits[0].new_zeros(len(batch), len(self.columns))
        weights = torch.zeros_like(total)
        for member, place, value in zip(self.members, self.places, logits, strict=True):
            known = ~value.isnan()
            total[:, place] += member.weight * torch.where(known, value, 0.0)
            weights[:, place] += member.weight * known
        known = (weights > 0).all(1)
        mean = total / weights.clamp(min=torch.finfo(weights.dtype).tiny)
        return TeacherOutput(mean, columns, None if bool(known.all()) else known)

    def _of(self, member: Member, batch: Batch, clips: AudioDataset, training: bool) -> Tensor:
        """(batch, matched) float32 logits of one teacher."""
        if not hasattr(member.teacher, "pair"):
            return member.match.select(member.teacher.logits(batch).float())
        strict = training and self.config.on_missing == "error"
        first, second = (member.match.select(value) for value in member.teacher.pair(batch, clips, strict))
        return mix_scores(first, second, batch.mix_lambda, self.config.loss, self.config.temperature)

    def report(self) -> str:
        """What was matched, a line per teacher."""
        return "\n".join(member.match.report(member.teacher.name) for member in self.members)


def load_teacher(source: str) -> Teacher | ScoresTeacher:
    """The teacher that a source names, on the CPU, still to be attached.

    Raises TeacherError (or the error of the file's reader), which names the source and the way out.
    """
    path = Path(source).expanduser()
    if path.suffix in (".npz", ".safetensors") and path.is_file():
        from dass.teacher_scores import CachedTeacher, NamedScoresTeacher, holds_scores

        if path.suffix == ".npz":
            return NamedScoresTeacher(path)
        if holds_scores(path):
            return CachedTeacher(path)
    if path.is_file() and path.suffix in (".pth", ".pt", ".bin"):
        names = {name.removeprefix("module.") for name in read_state(path)}
        if is_original_ast(names):
            return load_original_ast(path)
    if path.is_dir() and (path / "config.json").is_file():
        return _load_dass(source) if "depths" in read_json(path / "config.json") else load_transformers(source)
    if path.is_dir() and (path / "best" / "config.json").is_file():
        return load_teacher(str(path / "best"))  # a run folder; its model need not be a DASS
    if path.exists():
        return _load_dass(source)
    if source.count("/") != 1:
        raise TeacherError(
            f"teacher {source!r}: no such file or folder; a hub name has the form owner/name, and '{SELF}' or '{TRAIN}' "
            "stand for the student's moving average and a teacher trained in the same run"
        )
    # A name on the hub: the published DASS are told from other classifiers by their name.
    return _load_dass(source) if "dass" in source.lower() else load_transformers(source)


def build_ensemble(
    teachers: Sequence[Teacher | ScoresTeacher],
    config: DistillConfig,
    classes: tuple[LabelClass, ...],
    front_end: LogMelConfig,
) -> Ensemble:
    """The teachers of a run as one, attached to its front end and matched to its classes."""
    table = read_class_table(config.class_map) if config.class_map is not None else None
    weights = config.teacher_weights or (1.0,) * len(teachers)
    members = []
    for teacher, weight in zip(teachers, weights, strict=True):
        teacher.attach(front_end, classes)
        match = match_classes(classes, teacher.classes, table)
        members.append(Member(teacher, match, weight / sum(weights)))
    return Ensemble(members, len(classes), config)


def _load_dass(source: str) -> SpectrogramTeacher:
    from dass.model import DASS

    model = DASS.from_pretrained(source)
    listed = [folder / "classes.csv" for folder in (Path(source), Path(source).parent)]
    listed = [file for file in listed if file.is_file()]
    classes = read_class_list(listed[0]) if listed else classes_of(dict(enumerate(model.config.labels)))
    front_end = LogMelConfig(**model.front_end) if model.front_end is not None else LogMelConfig()
    named = bool(listed) or model.config.id2label is not None
    return SpectrogramTeacher(model, classes, front_end, source, any_length=True, named=named)


def main(arguments: Sequence[str] | None = None) -> int:
    """`python -m dass.teacher`."""
    from dass.teacher_cache import main as cache

    commands: dict[str, Callable[[Sequence[str]], int]] = {"cache": cache}
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if not arguments or arguments[0] not in commands:
        print("usage: python -m dass.teacher cache ... (--help for its options)", file=sys.stderr)
        return 0 if arguments[:1] in (["--help"], ["-h"]) else 2
    return commands[arguments[0]](arguments[1:])


if __name__ == "__main__":
    sys.exit(main())
