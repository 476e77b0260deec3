"""`Tagger`: a trained model behind one call, from a file or a waveform of any length to named classes with scores.

Long inputs are heard through overlapping windows and read from disk as a stream, so that memory does not grow with the
length of the file; `window=None` gives the model the whole input in one pass instead, which DASS allows at any length.
"""

from __future__ import annotations

import difflib
import fnmatch
import hashlib
import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn

from dass.audio import LogMel, LogMelConfig, load_audio, resample, stream_audio
from dass.timeline import Event, EventFinder, Segment, Summary, average_overlaps, cut_windows, samples_of

Audio = "str | Path | Tensor | np.ndarray"


@dataclass(frozen=True)
class Tag:
    """A class of the model: `label` (its name), `index` (its column), `score` in [0, 1]."""

    label: str
    index: int
    score: float


class Tagger:
    """Names what is to be heard in a recording.

    >>> tagger = Tagger("runs/demo")                        # a run, a checkpoint's folder or file, or a model
    >>> tagger.tag("dog.wav", topk=3)                       # [Tag(label='Dog', index=74, score=0.93), ...]
    >>> for segment in tagger.segments("night.flac", window=10, hop=5): ...
    >>> tagger.events("night.flac", threshold=0.5)          # [Event(index=74, start=65.0, end=80.0, ...), ...]

    Args:
        model: what `DASS.from_pretrained` takes, or a module `fbank (batch, frames, mel_bins) -> logits (batch, classes)`.
        device: e.g. "cpu", "cuda:1"; default: the GPU where there is one.
        backend: of the scan operator; default: the device's best.
        batch: windows that go through the model at once.
        scores: how logits become scores: "sigmoid" (each class for itself), "softmax" (exactly one class is right), or
            "model": as the run trained it (its config.toml), sigmoid where that is not known.
        labels, front_end: for a module that does not carry them as `config.id2label` and `front_end`.
    """

    def __init__(
        self,
        model: str | Path | nn.Module,
        *,
        device: str | torch.device | None = None,
        backend: str | None = None,
        batch: int = 8,
        scores: Literal["model", "sigmoid", "softmax"] = "model",
        labels: Sequence[str] | None = None,
        front_end: LogMelConfig | None = None,
    ):
        if batch < 1:
            raise ValueError(f"batch must be at least 1 window, got {batch}")
        if scores not in ("model", "sigmoid", "softmax"):
            raise ValueError(f"scores must be 'model', 'sigmoid' or 'softmax', got {scores!r}")
        if scores == "model":
            scores = "sigmoid" if isinstance(model, nn.Module) else trained_scores(model)
        if not isinstance(model, nn.Module):
            from dass.model import DASS

            model = DASS.from_pretrained(model)
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self.model = model.to(self.device).eval()
        if backend is not None:
            self.model.backend = backend
        self.batch, self.scores = batch, scores
        self.front_end = LogMel(front_end or front_end_of(model))
        self.labels = tuple(labels) if labels is not None else labels_of(model)

    @property
    def sample_rate(self) -> int:
        """Rate the model hears [Hz]."""
        return self.front_end.config.sample_rate

    @property
    def window(self) -> float:
        """Length the model was trained on [s], the default window; 10 where its front end leaves it open."""
        config = self.front_end.config
        return 10.0 if config.frames is None else config.frames * config.frame_shift / 1000

    def tag(
        self,
        audio: Audio,
        *,
        sample_rate: int | None = None,
        topk: int | None = 5,
        threshold: float = 0.0,
        pool: Literal["mean", "peak"] = "mean",
        window: float | None | Literal["model"] = "model",
        hop: float | None = None,
    ) -> list[Tag]:
        """The classes heard in a file or a waveform, highest score first.

        A longer input than `window` is scored window by window (see `segments`) and `pool`ed over time: the mean, or the
        peak. topk: most tags (None: all classes); threshold: lowest score given.
        """
        if pool not in ("mean", "peak"):
            raise ValueError(f"pool must be 'mean' or 'peak', got {pool!r}")
        summary = Summary(len(self.labels))
        for segment in self.segments(audio, sample_rate=sample_rate, window=window, hop=hop):
            summary.add(segment)
        return self.top(getattr(summary, pool), topk, threshold)

    def segments(
        self,
        audio: Audio,
        *,
        sample_rate: int | None = None,
        window: float | None | Literal["model"] = "model",
        hop: float | None = None,
    ) -> Iterator[Segment]:
        """Scores over time, one segment of `hop` seconds after another; each is the mean over the windows that cover it.

        Args:
            audio: a file, or a waveform `(samples,)` or `(channels, samples)` in [-1, 1].
            sample_rate: of a waveform [Hz]; default: the front end's.
            window: length heard at once [s]; "model": what the model was trained on; None: the whole input in one pass.
            hop: from one window to the next [s]; default: half a window.

        Raises `AudioError` for a file that cannot be read, ValueError for a model that returns NaN.
        """
        if window is None:
            yield self._whole(audio, sample_rate)
            return
        seconds = self.window if window == "model" else window
        size = samples_of(seconds, self.sample_rate, "window")
        step = size // 2 if hop is None else samples_of(hop, self.sample_rate, "hop")
        windows = cut_windows(self._blocks(audio, sample_rate), size, max(step, 1))
        yield from average_overlaps(self._scored(windows), max(step, 1), self.sample_rate)

    def events(self, audio: Audio, *, threshold: float = 0.5, merge_gap: float = 0.0, **options) -> list[Event]:
        """Runs of segments at or above `threshold`, in order of their start; `options` as for `segments`."""
        finder = EventFinder(len(self.labels), threshold, merge_gap)
        events = [event for segment in self.segments(audio, **options) for event in finder.add(segment)]
        return sorted(events + finder.finish(), key=lambda event: (event.start, event.index))

    def top(self, scores: np.ndarray, topk: int | None = 5, threshold: float = 0.0, among: Sequence[int] | None = None):
        """The `topk` highest of `scores` (classes,) as tags, at least `threshold`, `among` these classes only."""
        columns = range(len(self.labels)) if among is None else among
        order = sorted(columns, key=lambda index: (-scores[index], index))[:topk]
        return [Tag(self.labels[i], i, float(scores[i])) for i in order if scores[i] >= threshold]

    def find_classes(self, names: Sequence[str]) -> list[int]:
        """Columns of classes given by name (any case), index, or pattern ("*music*"). ValueError names the nearest."""
        lowered = [label.casefold() for label in self.labels]
        found: dict[int, None] = {}
        for name in names:
            wanted = name.strip().casefold()
            if wanted in lowered:
                matches = [index for index, label in enumerate(lowered) if label == wanted]
            elif wanted.isdigit() and int(wanted) < len(lowered):
                matches = [int(wanted)]
            else:
                matches = [index for index, label in enumerate(lowered) if fnmatch.fnmatchcase(label, wanted)]
            if not matches:
                near = difflib.get_close_matches(wanted, lowered, n=3, cutoff=0.5)
                shown = [self.labels[lowered.index(label)] for label in near] or self.labels[:8]
                hint = ", ".join(map(repr, shown)) + ("" if near or len(self.labels) <= 8 else ", ...")
                raise ValueError(f"the model has no class {name!r}; {'near it' if near else 'it has'}: {hint}")
            found.update(dict.fromkeys(matches))
        return list(found)

    def fingerprint(self) -> str:
        """Identity of the model: its tensors, labels and front end; equal fingerprints give equal scores."""
        digest = hashlib.blake2b(digest_size=12)
        for name, tensor in sorted(self.model.state_dict().items()):
            digest.update(name.encode())
            digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
        digest.update(repr((self.labels, self.front_end.config, self.scores)).encode())
        return digest.hexdigest()

    @torch.inference_mode()
    def score(self, waveforms: Tensor, front_end: LogMel | None = None) -> np.ndarray:
        """Scores (batch, classes) of waveforms (batch, samples) at the model's rate, one pass."""
        logits = self.model((front_end or self.front_end)(waveforms.to(self.device))).float()
        if logits.shape != (len(waveforms), len(self.labels)):
            raise ValueError(f"the model gave {tuple(logits.shape)} for {len(waveforms)} windows and {self.labels=}")
        if not torch.isfinite(logits).all():
            raise ValueError("the model's output is not finite; its weights may be damaged")
        scores = logits.sigmoid() if self.scores == "sigmoid" else logits.softmax(-1)
        return scores.cpu().numpy().astype(np.float64)

    def _blocks(self, audio: Audio, sample_rate: int | None) -> Iterable[Tensor]:
        if isinstance(audio, (str, Path)):
            return stream_audio(audio, sample_rate=self.sample_rate)
        return [self._mono(audio, sample_rate)]

    def _mono(self, audio: Tensor | np.ndarray, sample_rate: int | None) -> Tensor:
        waveform = torch.as_tensor(audio)
        if not waveform.is_floating_point():
            raise TypeError(f"a waveform must be floating point in [-1, 1], got {waveform.dtype}")
        if waveform.ndim not in (1, 2) or waveform.numel() == 0:
            raise ValueError(f"a waveform must be (samples,) or (channels, samples), got {tuple(waveform.shape)}")
        waveform = waveform.float() if waveform.ndim == 1 else waveform.float().mean(0)
        return resample(waveform, sample_rate or self.sample_rate, self.sample_rate)

    def _scored(self, windows: Iterable[tuple[int, Tensor]]) -> Iterator[tuple[int, int, np.ndarray]]:
        windows = iter(windows)
        while batch := list(itertools.islice(windows, self.batch)):
            # All windows of a stream are equally long: a shorter one is the only one.
            scores = self.score(torch.stack([samples for _, samples in batch]))
            for (start, samples), row in zip(batch, scores, strict=True):
                yield start, start + samples.numel(), row

    def _whole(self, audio: Audio, sample_rate: int | None) -> Segment:
        if isinstance(audio, (str, Path)):
            waveform = load_audio(audio, sample_rate=self.sample_rate)
        else:
            waveform = self._mono(audio, sample_rate)
        front_end, config = self.front_end, self.front_end.config
        if config.frames is not None and config.frames_of(waveform.numel()) > config.frames:
            front_end = LogMel(replace(config, frames=None))
        return Segment(0.0, waveform.numel() / self.sample_rate, self.score(waveform[None], front_end)[0])


def trained_scores(source: str | Path) -> Literal["sigmoid", "softmax"]:
    """Whether a run, or a checkpoint in its folder, was trained for one label a clip ("softmax") or several."""
    from dass.config_files import read_config_file

    folder = Path(source)
    for config in (folder / "config.toml", folder.parent / "config.toml", folder.parent.parent / "config.toml"):
        if folder.exists() and config.is_file():
            single = read_config_file(config).get("train", {}).get("labels") == "single-label"
            return "softmax" if single else "sigmoid"
    return "sigmoid"


def front_end_of(model: nn.Module) -> LogMelConfig:
    """The front end a model was trained with (`model.front_end`), the published one where it does not say."""
    kept = getattr(model, "front_end", None)
    return kept if isinstance(kept, LogMelConfig) else LogMelConfig(**dict(kept or {}))


def labels_of(model: nn.Module) -> tuple[str, ...]:
    """Class names of a model in order, from `config.labels` or `config.id2label`. ValueError where it has neither."""
    config = getattr(model, "config", None)
    if labels := getattr(config, "labels", None):
        return tuple(labels)
    names = {int(index): str(name) for index, name in dict(getattr(config, "id2label", None) or {}).items()}
    if sorted(names) != list(range(len(names))) or not names:
        raise ValueError("the model carries no class names (config.id2label); give labels=[...]")
    return tuple(names[index] for index in range(len(names)))
