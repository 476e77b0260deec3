"""The dataset: clips decoded, mixed and turned into masked, normalised spectrograms, a batch at a time."""

from __future__ import annotations

import contextlib
import logging
import math
from array import array
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, Protocol

import numpy as np
import torch
from torch import Tensor

from dass.audio import (
    RESAMPLING_MARGIN,
    AudioError,
    LogMel,
    LogMelConfig,
    audio_hash,
    audio_info,
    load_audio,
    load_native,
    resample,
)
from dass.augment import (
    NO_AUGMENTATION,
    AugmentConfig,
    Draw,
    draw,
    mix_targets,
    mix_waveforms,
    no_draw,
)
from dass.batch import Batch
from dass.feature_cache import FeatureCache
from dass.loader import example_random
from dass.manifest import LabelClass, Manifest, ManifestError

log = logging.getLogger("dass.data")
REPLACEMENTS = 100  # clips tried in place of an unreadable one before giving up


class BrokenFilesError(RuntimeError):
    """More files cannot be read than `DataConfig.max_broken` allows; the message names the first of them."""


class BrokenFiles:
    """Tally of the files of a run that cannot be read: reports each once, stops the run when they are too many."""

    def __init__(self, clips: int, limit: float = 0.01):
        self.clips, self.limit = clips, limit
        self.reasons: dict[str, str] = {}

    def __len__(self) -> int:
        return len(self.reasons)

    def add(self, errors: tuple[AudioError, ...] | list[AudioError]) -> None:
        for error in errors:
            if error.path not in self.reasons:
                self.reasons[error.path] = error.reason
                log.warning("skipped broken file %d of %d clips: %s", len(self), self.clips, error)
        if errors and len(self) > self.limit * self.clips:
            first = "\n  ".join(f"{path}: {reason}" for path, reason in list(self.reasons.items())[:5])
            raise BrokenFilesError(
                f"{len(self)} of {self.clips} files cannot be read, more than the {self.limit:.1%} that "
                f"--data.max-broken allows:\n  {first}" + ("\n  ..." if len(self) > 5 else "")
            )


class ClipSource(Protocol):
    """What a dataset is made from: `FileClips` of a manifest, or a `SyntheticCorpus`."""

    classes: tuple[LabelClass, ...]

    def __len__(self) -> int: ...

    def labels(self, index: int) -> tuple[int, ...]:
        """Class indices of a clip."""

    def name(self, index: int) -> str:
        """What messages call a clip."""

    def file(self, index: int) -> Path | None:
        """The file a clip is kept in, if any."""

    def seconds(self, index: int) -> float:
        """Length of a clip [s]."""

    def read(self, index: int, *, sample_rate: int, start: float, duration: float, hashed: bool) -> tuple[Tensor, str]:
        """`(samples,)` float32 of a part of a clip, and the hash of the whole clip's audio ("" if not asked for)."""


class FileClips:
    """The recordings of a manifest."""

    def __init__(self, manifest: Manifest):
        self.manifest = manifest
        self.classes = manifest.classes
        self.labels = manifest.labels

    def __len__(self) -> int:
        return len(self.manifest)

    def name(self, index: int) -> str:
        return self.manifest[index].key

    def file(self, index: int) -> Path:
        return self.manifest[index].path

    def seconds(self, index: int) -> float:
        return audio_info(self.file(index)).seconds

    def read(self, index: int, *, sample_rate: int, start: float, duration: float, hashed: bool) -> tuple[Tensor, str]:
        path = self.file(index)
        if not hashed:
            return load_audio(path, sample_rate=sample_rate, start=start, duration=duration), ""
        whole, rate = load_native(path)
        first = round(start * rate)
        part = whole[first : first + math.ceil((duration + RESAMPLING_MARGIN) * rate)]
        return resample(part, rate, sample_rate)[: max(round(duration * sample_rate), 1)], audio_hash(whole)


class AudioDataset:
    """Clips as augmented, normalised spectrograms with targets.

    Args:
        source: a `Manifest` or a `SyntheticCorpus`.
        front_end: numbers of the spectrogram; `frames` must be given.
        augment: augmentation of training batches; evaluation has none.
        sampler: "shuffle" or "balanced", see `DataConfig`.
        epoch_clips: examples of a training epoch; None: as many as there are clips.
        random_crop: take a random part of longer clips in training.
        features: "workers" or "device", see `DataConfig`.
        waveforms: hand the augmented waveforms on with each batch, for teachers that hear those.
        hashes: give each example's audio hash (for cached teacher scores); costs decoding of whole files.
        cache: folder of a `FeatureCache`, or None.
        broken: tally of unreadable files, shared by the datasets of a run.
    """

    def __init__(
        self,
        source: Manifest | ClipSource,
        front_end: LogMelConfig,
        *,
        augment: AugmentConfig | None = None,
        sampler: Literal["shuffle", "balanced"] = "shuffle",
        epoch_clips: int | None = None,
        random_crop: bool = False,
        features: Literal["workers", "device"] = "workers",
        waveforms: bool = False,
        hashes: bool = False,
        cache: str | Path | None = None,
        broken: BrokenFiles | None = None,
    ):
        if front_end.frames is None:
            raise ValueError("a dataset's front end needs a number of frames, got frames=None")
        if sampler not in ("shuffle", "balanced"):
            raise ValueError(f"sampler must be 'shuffle' or 'balanced', got {sampler!r}")
        if len(source) == 0:
            raise ManifestError("a dataset needs at least one clip, got none")
        self.source: ClipSource = FileClips(source) if isinstance(source, Manifest) else source
        self.front_end, self.log_mel = front_end, LogMel(front_end)
        self.augment = augment or NO_AUGMENTATION
        self.sampler, self.epoch_clips, self.random_crop = sampler, epoch_clips, random_crop
        self.features, self.hashes = features, hashes
        self.waveforms = waveforms or features == "device"
        self.cache = None if cache is None else FeatureCache(cache, front_end)
        self.broken = BrokenFiles(len(self.source)) if broken is None else broken
        self._weights: np.ndarray | None = None

    @property
    def classes(self) -> tuple[LabelClass, ...]:
        return self.source.classes

    def __len__(self) -> int:
        return len(self.source)

    def name(self, index: int) -> str:
        """What messages call a clip."""
        return self.source.name(index)

    def target(self, index: int) -> Tensor:
        """(classes,) float32: 1 at the clip's labels."""
        target = torch.zeros(len(self.classes))
        target[list(self.source.labels(index))] = 1.0
        return target

    def audio_hash(self, index: int) -> str:
        """Identity of a clip's audio: `audio_hash` of the decoded samples at the file's own rate."""
        return self._read(index, 0.0, hashed=True)[1]

    def balanced_weights(self) -> np.ndarray:
        """(clips,) float64 that sums to 1: weight of a clip ~ sum over its labels of 1/(clips with that label)."""
        if self._weights is None:
            labels, sizes = array("i"), np.zeros(len(self), dtype=np.int64)
            for index in range(len(self)):
                entry = self.source.labels(index)
                labels.extend(entry)
                sizes[index] = len(entry)
            values = np.frombuffer(labels, dtype=np.int32)
            if values.size == 0:
                raise ManifestError("the balanced sampler needs labels; not one clip has any")
            shares = 1.0 / np.bincount(values)[values]
            weights = np.bincount(np.repeat(np.arange(len(self)), sizes), weights=shares, minlength=len(self))
            self._weights = weights / weights.sum()
        return self._weights

    def statistics(self, indices: np.ndarray) -> tuple[float, float]:
        """Mean and standard deviation of the log-mel values of clips, padding left out; unreadable clips are too."""
        count, total, squares = 0, 0.0, 0.0
        with _one_thread():
            for index in indices.tolist():
                try:
                    waveform, _ = self._read(index, 0.0, hashed=False)
                except AudioError:
                    continue
                frames = min(self.front_end.frames_of(waveform.numel()), self.front_end.frames)
                values = self.log_mel.filter_bank(waveform)[:frames].double()
                count += values.numel()
                total += values.sum().item()
                squares += values.square().sum().item()
        if count == 0:
            raise BrokenFilesError(f"none of {len(indices)} clips can be read")
        mean = total / count
        return mean, max(squares / count - mean**2, 1e-12) ** 0.5

    # --- making a batch; runs in the loader's workers -----------------------------------------------------------------

    def make_batch(self, positions: np.ndarray, indices: np.ndarray, *, seed: int, epoch: int, training: bool) -> Batch:
        """The examples at `positions` of an epoch, made from the clips `indices`; see `build_loader`.

        An unreadable clip is replaced in training by one drawn from the example's generator, and left out in evaluation.
        """
        broken: list[AudioError] = []
        still = no_draw(self.front_end)
        examples = []
        with _one_thread():
            for position, index in zip(positions.tolist(), indices.tolist(), strict=True):
                random = example_random(seed, epoch, position)
                choices = draw(self.augment, self.front_end, len(self), random) if training else still
                example = self._example(index, choices, random, training, broken)
                if example is not None:
                    examples.append(example)
            return self._collate(examples, tuple(broken))

    def _example(
        self, index: int, choices: Draw, random: np.random.Generator, training: bool, broken: list[AudioError]
    ) -> _Example | None:
        crops = choices.crop if training and self.random_crop else (None, None)
        alone = choices.mix_index < 0 and choices.gain == 1.0 and not self.waveforms
        kind = "fbank" if alone else "waveform"

        def usable(clip: int, crop: float | None):
            return self._usable(clip, random, training, broken, lambda clip: self._recall(clip, crop, kind))

        read = usable(index, crops[0])
        if read is None:
            return None
        index, (content, identity) = read
        target = self.target(index)
        if alone:
            return _Example(choices, index, -1, target, identity, "", fbank=content)
        mix_index, mix_identity = -1, ""
        if choices.mix_index >= 0:
            mix_index, (second, mix_identity) = usable(choices.mix_index, crops[1])
            content = mix_waveforms(content, second, choices.mix_lambda)
            target = mix_targets(target, self.target(mix_index), choices.mix_lambda)
        else:
            content = content - content.mean()
        content = content * choices.gain
        fbank = self.log_mel.filter_bank(content) if self.features == "workers" else None
        return _Example(choices, index, mix_index, target, identity, mix_identity, waveform=content, fbank=fbank)

    def _usable(self, index, random, training, broken, read):
        """`(clip, what was read)` of `index` or, in training, of a clip drawn in its place."""
        for _ in range(REPLACEMENTS):
            try:
                return index, read(index)
            except AudioError as error:
                broken.append(error)
                if not training:
                    return None
                index = int(random.integers(len(self)))
        raise BrokenFilesError(f"{REPLACEMENTS} clips in a row cannot be read, the last: {broken[-1]}")

    def _start(self, index: int, crop: float | None) -> float:
        """Where in the clip the example begins [s]."""
        if crop is None:
            return 0.0
        return crop * max(self.source.seconds(index) - self.front_end.samples / self.front_end.sample_rate, 0.0)

    def _read(self, index: int, start: float, hashed: bool) -> tuple[Tensor, str]:
        rate = self.front_end.sample_rate
        return self.source.read(
            index, sample_rate=rate, start=start, duration=self.front_end.samples / rate, hashed=hashed
        )

    def _recall(self, index: int, crop: float | None, kind: Literal["waveform", "fbank"]) -> tuple[Tensor, str]:
        """A clip by itself and its audio hash, from the cache where there is one.

        The kinds: `(samples,)` waveform; `(frames, mel_bins)` log-mel, padded, not normalised.
        """
        start, file = self._start(index, crop), self.source.file(index)
        if self.cache is None or file is None or start > 0:
            waveform, identity = self._read(index, start, hashed=self.hashes)
            return (waveform if kind == "waveform" else self.log_mel.filter_bank(waveform)), identity
        entry = self.cache.path(file)
        found = self.cache.get(entry, kind)
        if found is None:
            waveform, identity = self._read(index, 0.0, hashed=True)
            frames = min(self.front_end.frames_of(waveform.numel()), self.front_end.frames)
            fbank = self.log_mel.filter_bank(waveform)[:frames]
            self.cache.put(entry, waveform=waveform, fbank=fbank, audio_hash=identity)
            found = (waveform if kind == "waveform" else fbank), identity
        content, identity = found
        if kind == "fbank":
            content = torch.nn.functional.pad(content, (0, 0, 0, self.front_end.frames - len(content)))
        return content, identity

    def _collate(self, examples: list[_Example], broken: tuple[AudioError, ...]) -> Batch:
        if not examples:
            empty = torch.zeros(0, dtype=torch.int64)
            return Batch(torch.zeros(0, len(self.classes)), empty, empty, torch.zeros(0), broken=broken)
        choices = [example.choices for example in examples]
        batch = Batch(
            target=torch.stack([example.target for example in examples]),
            index=torch.tensor([example.index for example in examples]),
            mix_index=torch.tensor([example.mix_index for example in examples]),
            mix_lambda=torch.tensor([draw.mix_lambda for draw in choices]),
            audio_hashes=tuple(example.audio_hash for example in examples) if self.hashes else (),
            mix_hashes=tuple(example.mix_hash for example in examples) if self.hashes else (),
            warp=torch.tensor([draw.warp for draw in choices]),
            stretch=torch.tensor([draw.stretch for draw in choices]),
            roll=torch.tensor([draw.roll for draw in choices]),
            keep_mel=torch.stack([draw.keep_mel for draw in choices]),
            keep_time=torch.stack([draw.keep_time for draw in choices]),
            broken=broken,
        )
        if self.waveforms:
            sounds = [example.waveform for example in examples]
            lengths = torch.tensor([sound.numel() for sound in sounds])
            padded = torch.nn.utils.rnn.pad_sequence(sounds, batch_first=True)
            batch = replace(batch, waveform=padded, lengths=lengths)
        if self.features == "device":
            return batch
        return replace(batch, fbank=torch.stack([example.fbank for example in examples])).augmented(self.log_mel)


@dataclass
class _Example:
    choices: Draw
    index: int
    mix_index: int
    target: Tensor  # (classes,)
    audio_hash: str
    mix_hash: str
    waveform: Tensor | None = None  # (samples,), mixed, without mean
    fbank: Tensor | None = None  # (frames, mel_bins), padded, neither masked nor normalised


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    """Sums split over threads round differently; a batch must not depend on where it is made."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
