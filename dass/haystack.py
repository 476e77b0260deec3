"""Haystacks: what a needle is hidden in, as an endless seeded waveform that is streamed and never held as a whole.

A haystack is a function of (seed, kind, clip): that of a longer input begins with that of a shorter one, and the position
and the level of the needle do not change it. Noise is the same bits on every machine (`dass.noise`); what is made of
recordings is the same choice of files and moments, decoded.
"""

from __future__ import annotations

import math
import os
import tempfile
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import IO, Protocol

import numpy as np

from dass.audio import AUDIO_SUFFIXES, AudioError, load_audio, stream_audio
from dass.noise import key_of, noise_blocks, random_below

Array = np.ndarray
BLOCK = 1 << 17  # samples
FADE = 160  # samples, 10 ms at 16 kHz: joins of recordings do not click
LONGEST_UTTERANCE = 30.0  # s of a file of speech that are heard in one go
UTTERANCES_KEPT = 64e6  # bytes of speech kept decoded for babble, whose talkers say the same again and again
TOO_QUIET = 1e-5  # RMS below which a recording cannot be brought to a level

MEAN_SPECTRUM, SILENCE = "mean-spectrum", "silence"
LEVELLED = ("white", "pink", "babble", "recording", "other-clips")
HAYSTACKS = (MEAN_SPECTRUM, SILENCE, *LEVELLED)
DESCRIPTIONS = {
    MEAN_SPECTRUM: "zeros after normalisation, the published protocol's: the mean spectrum of the training set",
    SILENCE: "digital silence: zeros before the front end, far below anything recorded",
    "white": "white noise",
    "pink": "pink noise, 1/f",
    "babble": "many talkers at once, from a folder of speech",
    "recording": "recordings from a folder of background sound, one after another",
    "other-clips": "clips of other classes from the evaluation set, one after another",
}


class HaystackError(ValueError):
    """A haystack that cannot be made; the message says what it needs."""


class Clips(Protocol):
    """The evaluation set as `other-clips` needs it; see `dass.data.ClipSource`."""

    def __len__(self) -> int: ...

    def labels(self, index: int) -> tuple[int, ...]: ...

    def read(self, index: int, *, sample_rate: int, start: float, duration: float, hashed: bool): ...


class Haystack:
    """A kind of background for one clip; `blocks(samples)` streams its beginning, as often as wanted.

    Args:
        kind: one of `HAYSTACKS`.
        seed, clip: decide its content, together with the kind.
        sample_rate: of what it gives [Hz].
        folder: sound files, for babble and recording.
        talkers: voices of babble.
        clips, labels: the evaluation set and the needle's classes, for other-clips.
    """

    def __init__(
        self,
        kind: str,
        *,
        seed: int = 0,
        clip: int = 0,
        sample_rate: int = 16000,
        folder: Path | None = None,
        talkers: int = 8,
        clips: Clips | None = None,
        labels: Sequence[int] = (),
    ):
        if kind not in HAYSTACKS:
            raise HaystackError(f"haystack must be one of {', '.join(HAYSTACKS)}, got {kind!r}")
        if kind in ("babble", "recording") and folder is None:
            raise HaystackError(f"the haystack {kind} needs a folder of sound files; give one with --{kind}")
        if kind == "other-clips" and clips is None:
            raise HaystackError("the haystack other-clips needs the clips of an evaluation set")
        if talkers < 1:
            raise HaystackError(f"babble needs at least one talker, got {talkers}")
        self.kind, self.seed, self.clip, self.sample_rate = kind, seed, clip, sample_rate
        self.key = key_of("haystack", seed, kind, clip)
        self.folder, self.talkers, self.clips, self.labels = folder, talkers, clips, tuple(labels)
        self._levels: dict[int, float] = {}
        self._spool: IO[bytes] | None = None  # what was made for the level, on disk, to be read again

    @property
    def levelled(self) -> bool:
        """Whether it has a level that an SNR can set; mean-spectrum and silence have none."""
        return self.kind in LEVELLED

    def blocks(self, samples: int) -> Iterator[Array]:
        """The first `samples` samples, float32, in blocks; at no particular level, see `level`."""
        if self.kind == MEAN_SPECTRUM:
            raise HaystackError("mean-spectrum is a spectrum, not a sound: it has no waveform")
        if self.kind == SILENCE:
            return (np.zeros(min(BLOCK, samples - start), np.float32) for start in range(0, samples, BLOCK))
        if self._spool is not None and samples <= self._spool.seek(0, os.SEEK_END) // 4:
            return self._spooled(samples)
        if self.kind in ("white", "pink"):
            return noise_blocks(self.kind, self.key, samples, block=BLOCK)
        return _first(samples, self._decoded())

    def level(self, samples: int) -> float:
        """Root mean square of the first `samples` samples; streamed once, then remembered."""
        if samples not in self._levels:
            spool = tempfile.TemporaryFile()  # slower to make than to read again
            blocks = _written(self.blocks(samples), spool)
            total = math.fsum(float(np.square(block, dtype=np.float64).sum()) for block in blocks)
            self._levels[samples] = math.sqrt(total / samples)
            self._spool = spool
        return self._levels[samples]

    def _decoded(self) -> Iterator[Array]:
        if self.kind == "babble":
            return self._babble()
        if self.kind == "recording":
            return _join(self._pick(sound_files(self.folder), self.key, self._recording))
        return _join(self._pick(self._others(), self.key, self._other))

    def _spooled(self, samples: int) -> Iterator[Array]:
        for first in range(0, samples, BLOCK):
            self._spool.seek(4 * first)
            yield np.frombuffer(self._spool.read(4 * min(BLOCK, samples - first)), np.float32).copy()

    def _pick(self, choices: Sequence, key: int, open_one: Callable[[object], Iterable[Array]]) -> Iterator:
        """One choice after another, each opened; what cannot be used is passed over, unless nothing can."""
        failures = 0
        for number in range(1 << 62):
            choice = choices[random_below(key, number, len(choices))]
            try:
                sound = open_one(choice)
            except AudioError as error:
                failures += 1
                if failures >= 20:
                    raise HaystackError(f"{self.kind}: 20 sounds in a row cannot be used, last {error}") from error
                continue
            failures = 0
            yield sound

    def _babble(self) -> Iterator[Array]:
        files = sound_files(self.folder)
        voices = [
            _of_size(_join(self._pick(files, key_of(self.key, "talker", talker), self._utterance)), BLOCK)
            for talker in range(self.talkers)
        ]
        for parts in zip(*voices, strict=True):
            yield np.sum(parts, axis=0, dtype=np.float32) * np.float32(self.talkers**-0.5)

    def _utterance(self, path: Path) -> list[Array]:
        return [_utterances.read(path, self.sample_rate)]

    def _recording(self, path: Path) -> Iterator[Array]:
        blocks = (block.numpy() for block in stream_audio(path, sample_rate=self.sample_rate))
        first = _long_enough(next(blocks), path)  # so that a broken file is noticed here
        return (block for part in ([first], blocks) for block in part)

    def _others(self) -> list[int]:
        own = set(self.labels)
        found = [index for index in range(len(self.clips)) if own.isdisjoint(self.clips.labels(index))]
        if not found:
            raise HaystackError("other-clips: no clip of the evaluation set is free of the needle's classes")
        return found

    def _other(self, index: int) -> list[Array]:
        waveform, _ = self.clips.read(
            index, sample_rate=self.sample_rate, start=0.0, duration=LONGEST_UTTERANCE, hashed=False
        )
        return [_unit(waveform.numpy(), f"clip {index}")]


class Utterances:
    """Decoded files of speech, the most recently used ones, `limit` bytes of them."""

    def __init__(self, limit: float):
        self.limit, self.size = limit, 0
        self.sounds: OrderedDict[tuple[Path, int], Array] = OrderedDict()

    def read(self, path: Path, sample_rate: int) -> Array:
        """(samples,) of unit power, not to be changed. Raises AudioError."""
        key = path, sample_rate
        sound = self.sounds.pop(key, None)
        if sound is None:
            sound = _unit(load_audio(path, sample_rate=sample_rate, duration=LONGEST_UTTERANCE).numpy(), path)
            self.size += sound.nbytes
        self.sounds[key] = sound
        while self.size > self.limit:
            self.size -= self.sounds.popitem(last=False)[1].nbytes
        return sound


_utterances = Utterances(UTTERANCES_KEPT)  # of this process: the haystacks of all needles draw on the same files


def sound_files(folder: Path | None) -> list[Path]:
    """The sound files under a folder, in an order that does not depend on the file system."""
    folder = Path(folder)
    found = [path for path in folder.rglob("*") if path.suffix.lower() in AUDIO_SUFFIXES and path.is_file()]
    if not found:
        raise HaystackError(f"{folder} holds no sound file ({', '.join(sorted(AUDIO_SUFFIXES))})")
    return sorted(found, key=lambda path: path.relative_to(folder).as_posix())


def _unit(waveform: Array, name: object) -> Array:
    level = math.sqrt(float(np.mean(np.square(_long_enough(waveform, name), dtype=np.float64))))
    if level < TOO_QUIET:
        raise AudioError(str(name), "is silent")
    return waveform / np.float32(level)


def _long_enough(waveform: Array, name: object) -> Array:
    if waveform.size < 4 * FADE:
        raise AudioError(str(name), f"is shorter than {4 * FADE} samples")
    return waveform


def _join(items: Iterable[Iterable[Array]]) -> Iterator[Array]:
    """Sounds end to end, each with raised-cosine ends, without holding more than a block of one."""
    ramp = (0.5 - 0.5 * np.cos(np.pi * (np.arange(FADE) + 0.5) / FADE)).astype(np.float32)
    for item in items:
        held, begun = np.zeros(0, np.float32), False
        for block in item:
            held = np.concatenate([held, block])
            if not begun and held.size >= 2 * FADE:
                held[:FADE] *= ramp
                begun = True
            if begun and held.size > FADE:
                yield held[:-FADE]
                held = held[-FADE:]
        if begun:  # what is shorter than its two fades is left out
            yield held * ramp[::-1]


def _of_size(blocks: Iterable[Array], size: int) -> Iterator[Array]:
    """The same stream in blocks of exactly `size` (what is left at the end is dropped)."""
    parts, count = [], 0
    for block in blocks:
        parts.append(block)
        count += block.size
        if count >= size:
            whole = np.concatenate(parts)
            last = count - count % size
            yield from whole[:last].reshape(-1, size)
            parts, count = [whole[last:]], count - last


def _written(blocks: Iterable[Array], file: IO[bytes]) -> Iterator[Array]:
    """The same stream, written to a file as it goes by."""
    for block in blocks:
        file.write(block.tobytes())
        yield block


def _first(samples: int, blocks: Iterable[Array]) -> Iterator[Array]:
    """The first `samples` samples of a stream."""
    for block in blocks:
        yield block[:samples]
        samples -= block.size
        if samples <= 0:
            return
