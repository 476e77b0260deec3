"""From clips to batches: the dataset that decodes, augments and computes features, and the splits of a run.

Everything random about an example is a function of `(seed, epoch, position)`, where position counts the examples of an
epoch over all processes. So a run may be resumed at any batch, with any number of workers, and sees the same bits.
"""

from __future__ import annotations

import dataclasses
import math
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np

from dass.audio import AudioError, LogMelConfig, audio_info
from dass.augment import AugmentConfig
from dass.batch import Batch
from dass.dataset import AudioDataset, BrokenFiles, BrokenFilesError, ClipSource
from dass.loader import Loader, build_loader, default_workers
from dass.manifest import Clip, LabelClass, Manifest, ManifestError, read_manifest
from dass.splits import split_by_fold, split_by_fraction, split_by_list, split_by_regex
from dass.synthetic import SyntheticConfig, SyntheticCorpus

__all__ = [
    "AudioDataset",
    "Batch",
    "BrokenFiles",
    "BrokenFilesError",
    "Clip",
    "ClipSource",
    "DataConfig",
    "LabelClass",
    "Loader",
    "Manifest",
    "ManifestError",
    "Splits",
    "build_loader",
    "default_workers",
    "feature_statistics",
    "open_splits",
    "read_manifest",
]


@dataclass(frozen=True)
class DataConfig:
    """Where clips come from, which of them are held out, and how they are read."""

    train: Path | None = None
    """Training clips: a folder with a sub-folder per class, a CSV (path,label;label), ESC-50's folder or CSV, or AST's
    JSON; none: the built-in synthetic corpus."""
    eval: Path | None = None
    """Held-out clips, in any of the same forms; none: a part of the training clips (see fold, holdout, ...)."""
    test: Path | None = None
    """Clips that the best model is tried on at the end, in any of the same forms; unlike the held-out ones they choose
    nothing. None: no test; the synthetic corpus has test clips of its own."""
    classes: Path | None = None
    """Class list (index,mid,display_name); none: beside a JSON, otherwise the labels found."""
    label_regex: str | None = None
    """For a folder of files whose names hold the label: expression whose first group is it, e.g. '^(\\d)_'."""
    group_regex: str | None = None
    """Expression whose first group in a clip's name is its speaker or recording; holdout_fraction keeps those whole."""
    exclude: str | None = None
    """Regular expression; clips in whose name it is found are left out of training and evaluation."""
    fold: str | int | None = None
    """Fold or split (a value of the CSV's column) that is held out."""
    holdout: str | None = None
    """Regular expression; clips in whose name it is found are held out, e.g. '_[0-4]\\.wav$' or '_(theo|lucas)_'."""
    holdout_list: Path | None = None
    """Text file with the names of the held-out clips, one a line."""
    holdout_fraction: float = 0.2
    """Share of each class held out where nothing else says what is [0 to 1]."""
    holdout_seed: int = 0
    """Seed of the choice that holdout_fraction makes."""
    clip_seconds: float | None = None
    """Length of an example: longer clips are cut, shorter ones padded [s]; none: what 95 % of the training clips fit
    into, at most 10.24."""
    sample_rate: int = 16000
    """Rate at which clips are heard [Hz]; the published models: 16000. Of slower recordings theirs spares empty bands."""
    mel_bins: int = 128
    """Mel bands of the front end; fewer of them tell less of a voice's pitch."""
    mean: float | None = None
    """Mean of the log-mel values; none: measured on the training clips (AudioSet: -4.2677393)."""
    std: float | None = None
    """Standard deviation of the log-mel values; none: measured on the training clips (AudioSet: 4.5689974)."""
    sampler: Literal["shuffle", "balanced"] = "shuffle"
    """Each clip once an epoch, or drawn with a weight that is the sum over its labels of 1/(clips with that label)."""
    epoch_clips: int | None = None
    """Clips of an epoch; none: as many as there are."""
    random_crop: bool = True
    """Take a random part of a longer training clip; otherwise its beginning (as evaluation does)."""
    features: Literal["workers", "device"] = "workers"
    """Where spectrograms are computed: by the loader's workers, or on the model's device for a whole batch."""
    waveforms: bool = False
    """Hand the augmented waveforms on with each batch, for teachers that hear waveforms."""
    workers: int | None = None
    """Processes that prepare batches; 0: none; none given: one less than there are cores, at most 8."""
    cache: Path | None = None
    """Folder for a cache of decoded clips and their features, about 115 kB for a second of audio; none: no cache."""
    check_files: bool = True
    """Open the header of every file before the first step."""
    max_broken: float = 0.01
    """Share of unreadable files from which the run stops [0 to 1]."""
    synthetic: SyntheticConfig = field(default_factory=SyntheticConfig)

    def __post_init__(self):
        if not 0 <= self.max_broken <= 1:
            raise ValueError(f"data.max_broken must lie between 0 and 1, got {self.max_broken}")
        if self.clip_seconds is not None and self.clip_seconds <= 0:
            raise ValueError(f"data.clip_seconds must be positive, got {self.clip_seconds}")
        if (self.mean is None) != (self.std is None):
            raise ValueError("data.mean and data.std are given together or not at all")
        chosen = [name for name in ("eval", "fold", "holdout", "holdout_list") if getattr(self, name) is not None]
        if len(chosen) > 1:
            raise ValueError(f"only one of data.{' and data.'.join(chosen)} can say what is held out")


@dataclass(frozen=True)
class Splits:
    """The data of a run: to learn from, to choose by, and, where there are any, to test the chosen model on."""

    train: AudioDataset
    held_out: AudioDataset
    test: AudioDataset | None
    classes: tuple[LabelClass, ...]
    front_end: LogMelConfig


def open_splits(
    config: DataConfig,
    augment: AugmentConfig | None = None,
    *,
    front_end: LogMelConfig | None = None,
    classes: tuple[LabelClass, ...] | None = None,
    hashes: bool = False,
) -> Splits:
    """Opens the data that `config` describes: reads the manifests, divides them, looks at every file's header.

    Args:
        config: what to open.
        augment: augmentation of the training clips.
        front_end: numbers of the spectrogram, when a pretrained model prescribes them; otherwise they are those that
            `config` gives, and what it leaves open is measured on the training clips. An explicit `clip_seconds` counts
            in either case.
        classes: classes and their order, when a pretrained model prescribes them.
        hashes: see `AudioDataset`.

    Raises `ManifestError` or `BrokenFilesError`, which say what is wrong and what to change.
    """
    if config.train is None:
        if config.eval is not None or config.test is not None:
            raise ManifestError("data.eval and data.test need data.train; without it all is of the synthetic corpus")
        parts = tuple(SyntheticCorpus(config.synthetic, split) for split in ("train", "eval", "test"))
        seconds = np.array([config.synthetic.seconds])
        broken = None
    else:
        parts = _read_parts(config, classes)
        broken = BrokenFiles(sum(map(len, parts)), config.max_broken)
        if config.check_files:
            parts, seconds = _usable(parts, broken)
        else:
            seconds = _lengths(parts[0], np.linspace(0, len(parts[0]) - 1, 500).astype(int))[0]
    if front_end is None:
        front_end = LogMelConfig(sample_rate=config.sample_rate, mel_bins=config.mel_bins)
        front_end = dataclasses.replace(front_end, frames=_frames(config, front_end, seconds))
        if config.mean is None:
            mean, std = feature_statistics(parts[0], front_end)
        else:
            mean, std = config.mean, config.std
        front_end = dataclasses.replace(front_end, mean=mean, std=std)
    elif config.clip_seconds is not None:
        front_end = dataclasses.replace(front_end, frames=_frames(config, front_end, seconds))
    options = dict(
        features=config.features,
        waveforms=config.waveforms,
        hashes=hashes,
        cache=config.cache,
        broken=broken,
    )
    train = AudioDataset(
        parts[0],
        front_end,
        augment=augment,
        sampler=config.sampler,
        epoch_clips=config.epoch_clips,
        random_crop=config.random_crop,
        **options,
    )
    others = [AudioDataset(part, front_end, **options) for part in parts[1:]]
    return Splits(train, others[0], others[1] if len(others) > 1 else None, train.classes, front_end)


def _read_parts(config: DataConfig, classes: tuple[LabelClass, ...] | None) -> tuple[Manifest, ...]:
    """Training, held-out and, where asked for, test clips."""
    options = dict(label_regex=config.label_regex, exclude=config.exclude, group_regex=config.group_regex)
    manifest = read_manifest(config.train, classes=classes or config.classes, **options)
    tests = () if config.test is None else (read_manifest(config.test, classes=manifest.classes, **options),)
    return *_divide(config, manifest, options), *tests


def _divide(config: DataConfig, manifest: Manifest, options: dict[str, str | None]) -> tuple[Manifest, Manifest]:
    """Training and held-out clips."""
    if config.eval is not None:
        return manifest, read_manifest(config.eval, classes=manifest.classes, **options)
    if config.fold is not None:
        return split_by_fold(manifest, config.fold)
    if config.holdout is not None:
        return split_by_regex(manifest, config.holdout)
    if config.holdout_list is not None:
        return split_by_list(manifest, config.holdout_list)
    return split_by_fraction(manifest, config.holdout_fraction, config.holdout_seed)


def _lengths(manifest: Manifest, indices: np.ndarray) -> tuple[np.ndarray, list[AudioError]]:
    """Lengths [s] from the headers (NaN where unreadable) and the errors met."""

    def length(index: int) -> float | AudioError:
        try:
            return audio_info(manifest[int(index)].path).seconds
        except AudioError as error:
            return error

    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(length, indices, chunksize=64))
    errors = [entry for entry in found if isinstance(entry, AudioError)]
    return np.array([math.nan if isinstance(entry, AudioError) else entry for entry in found]), errors


def _usable(parts: tuple[Manifest, ...], broken: BrokenFiles) -> tuple[tuple[Manifest, ...], np.ndarray]:
    """The parts without files whose header cannot be read, and the lengths of the training clips [s]."""
    looked = [_lengths(part, np.arange(len(part))) for part in parts]
    broken.add([error for _, errors in looked for error in errors])
    kept = tuple(
        part.subset(np.flatnonzero(~np.isnan(seconds))) if errors else part
        for part, (seconds, errors) in zip(parts, looked, strict=True)
    )
    return kept, looked[0][0]


def _frames(config: DataConfig, front_end: LogMelConfig, seconds: np.ndarray) -> int:
    """Frames of an example: what was asked for, otherwise what most training clips fit into, at most the published 1024."""
    front_end = dataclasses.replace(front_end, frames=LogMelConfig().frames)
    if config.clip_seconds is not None:
        return max(round(config.clip_seconds * 1000 / front_end.frame_shift), 1)
    longest = np.nanquantile(seconds, 0.95, method="higher") if np.isfinite(seconds).any() else math.inf
    if longest * front_end.sample_rate >= front_end.samples:
        return front_end.frames
    step = 8
    return math.ceil(front_end.frames_of(round(longest * front_end.sample_rate)) / step) * step


def feature_statistics(
    source: Manifest | ClipSource, front_end: LogMelConfig, *, clips: int = 300, seed: int = 0
) -> tuple[float, float]:
    """Mean and standard deviation of the log-mel values, without padding, over at most `clips` clips drawn by `seed`."""
    dataset = AudioDataset(source, front_end)
    chosen = np.random.default_rng(seed).permutation(len(dataset))[:clips]
    return dataset.statistics(np.sort(chosen))
