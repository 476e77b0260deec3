"""The needles: clips with labels out of any evaluation set that the trainer reads, in a fixed order that shares them
evenly among the classes."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from torch import Tensor

from dass.dataset import ClipSource, FileClips
from dass.manifest import LabelClass, Manifest, ManifestError, read_manifest
from dass.noise import key_of, random_words


@dataclass(frozen=True)
class NeedleConfig:
    """Where the needles come from."""

    set: Path | None = None
    """Evaluation clips, in any form that dass.train reads (folder per class, CSV, ESC-50's layout, AST's JSON); none:
    the held-out clips of the first model's run, or else the built-in synthetic corpus."""
    fold: str | None = None
    """Only this fold or split of the set."""
    holdout: str | None = None
    """Only clips in whose name this regular expression is found."""
    label_regex: str | None = None
    """For a folder of files whose names hold the label: expression whose first group is it."""
    class_list: Path | None = None
    """Class list (index,mid,display_name) of the set."""
    class_map: str | None = None
    """CSV class,teacher_class, or a built-in table, where the model's classes are named otherwise than the set's."""
    clips: int | None = None
    """At most this many needles, shared evenly among the classes [clips]; none: every clip."""


class NeedleSet:
    """Needles in a fixed order: a longer choice begins with a shorter one.

    source: the clips; chosen: their indices; target: (chosen, classes) bool.
    """

    def __init__(self, source: ClipSource, clips: int | None, seed: int, origin: str):
        self.source, self.origin = source, origin
        self.classes: tuple[LabelClass, ...] = source.classes
        labels = [source.labels(index) for index in range(len(source))]
        self.chosen = spread_over_classes(labels, len(self.classes), seed)[:clips]
        if not self.chosen:
            raise ManifestError(f"{origin}: holds no labelled clip, so nothing that could be a needle")
        self.target = np.zeros((len(self.chosen), len(self.classes)), dtype=bool)
        for row, index in enumerate(self.chosen):
            self.target[row, list(labels[index])] = True

    def __len__(self) -> int:
        return len(self.chosen)

    def waveform(self, row: int, sample_rate: int, samples: int | None) -> Tensor:
        """(samples,) of the needle in a row, at most `samples` of it. Raises AudioError."""
        seconds = 3600.0 if samples is None else samples / sample_rate
        waveform, _ = self.source.read(
            self.chosen[row], sample_rate=sample_rate, start=0.0, duration=seconds, hashed=False
        )
        return waveform

    def name(self, row: int) -> str:
        """What messages call a needle."""
        return self.source.name(self.chosen[row])

    def identity(self) -> str:
        """Changes when the needles, their order or their labels do."""
        digest = hashlib.blake2b(digest_size=10)
        for row in range(len(self)):
            digest.update(f"{self.name(row)}\0{np.flatnonzero(self.target[row]).tolist()}\n".encode())
        digest.update("\0".join(f"{entry.id}\0{entry.name}" for entry in self.classes).encode())
        return digest.hexdigest()


def spread_over_classes(labels: list[tuple[int, ...]], classes: int, seed: int) -> list[int]:
    """Every labelled clip once: the classes take turns, each with its next clip in a seeded order."""
    shuffled = np.argsort(random_words(key_of("needles", seed), 0, max(len(labels), 1)), kind="stable")
    waiting: list[list[int]] = [[] for _ in range(classes)]
    for index in shuffled[::-1]:
        if index < len(labels):
            for label in labels[index]:
                waiting[label].append(int(index))
    order: dict[int, None] = {}
    while any(waiting):
        for own in waiting:
            while own and own[-1] in order:
                own.pop()
            if own:
                order[own.pop()] = None
    return list(order)


def open_needles(config: NeedleConfig, run: Path | None, seed: int) -> NeedleSet:
    """The needles that a configuration means; `run`: the folder of the first model's run, if it is one.

    Raises ManifestError or ConfigError, which say what is wrong.
    """
    if config.set is not None:
        manifest = read_manifest(config.set, classes=config.class_list, label_regex=config.label_regex)
        source: ClipSource = FileClips(_selected(manifest, config))
        return NeedleSet(source, config.clips, seed, str(config.set))
    if run is None:
        from dass.synthetic import SyntheticCorpus

        return NeedleSet(SyntheticCorpus(split="eval"), config.clips, seed, "the built-in synthetic corpus")
    from dass.audio import LogMelConfig
    from dass.config import load_config
    from dass.data import open_splits

    data = load_config(run / "config.toml").data
    # A front end is given only so that none is measured: the needles are waveforms.
    splits = open_splits(data, front_end=LogMelConfig(mel_bins=data.mel_bins))
    return NeedleSet(splits.held_out.source, config.clips, seed, f"held-out clips of {run}")


def _selected(manifest: Manifest, config: NeedleConfig) -> Manifest:
    """The clips of the fold and of the names that are wanted."""
    from dass.manifest import compile_regex

    wanted = np.ones(len(manifest), dtype=bool)
    if config.fold is not None:
        folds = sorted({clip.fold for clip in manifest} - {""})
        if config.fold not in folds:
            raise ManifestError(f"{manifest.source}: has no fold {config.fold!r}; it has {', '.join(folds) or 'none'}")
        wanted &= [clip.fold == config.fold for clip in manifest]
    if config.holdout is not None:
        pattern = compile_regex(config.holdout, "holdout")
        wanted &= [bool(pattern.search(clip.key)) for clip in manifest]
    if not wanted.any():
        raise ManifestError(f"{manifest.source}: fold and holdout leave none of its {len(manifest)} clips")
    return manifest if wanted.all() else manifest.subset(np.flatnonzero(wanted))
