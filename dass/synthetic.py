"""The built-in corpus: seeded, multi-label, made on the fly, with classes whose definition a reader can hear.

A clip is one to three events of different classes, each at a moment and level of its own, overlapping as it happens,
over a coloured noise floor. Clip `i` of a split is a pure function of `(seed, split, i)`: nothing is stored.

    python -m dass.synthetic --out sounds     # one wav file per class, and five mixtures, to listen to
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from dass.audio import audio_hash
from dass.manifest import LabelClass

RATE = 16000  # Hz; the corpus is made at the front end's own rate
CORPUS_STREAM = 3  # first word of every seed here; the loader's own are 1 and 2
SPLIT_STREAMS = {"train": 1, "eval": 2, "test": 4}  # third word; 3 is that of the examples to listen to

Array = np.ndarray
Random = np.random.Generator


@dataclass(frozen=True)
class SyntheticConfig:
    """Size and difficulty of the built-in corpus of synthetic sound events."""

    train_clips: int = 20_000
    """Different training clips."""
    eval_clips: int = 400
    """Different held-out clips, by which the best model is chosen."""
    test_clips: int = 400
    """Different clips for the figure at the end, which nothing is chosen by."""
    seconds: float = 2.0
    """Length of a clip [s]."""
    max_events: int = 3
    """Most events in a clip; every clip has at least one [events]."""
    snr_low: float = 12.0
    """Lowest level of an event above the noise floor, root mean square [dB]."""
    snr_high: float = 30.0
    """Highest level of an event above the noise floor, root mean square [dB]."""
    seed: int = 0
    """Seed of the corpus; another seed is another corpus of the same classes."""

    def __post_init__(self):
        if not 1 <= self.max_events <= len(EVENTS):
            raise ValueError(f"synthetic.max_events must be 1 to {len(EVENTS)} (the classes), got {self.max_events}")
        if self.seconds < 1.5:
            raise ValueError(f"synthetic.seconds must be at least 1.5, the longest event, got {self.seconds}")
        if self.snr_low > self.snr_high:
            raise ValueError(f"synthetic.snr_low ({self.snr_low}) must not exceed synthetic.snr_high ({self.snr_high})")
        for name in ("train_clips", "eval_clips", "test_clips"):
            if getattr(self, name) < 1:
                raise ValueError(f"synthetic.{name} must be at least 1, got {getattr(self, name)}")


# --- building blocks: every one returns float32 of the length asked for ---------------------------------------------


def _log_uniform(random: Random, low: float, high: float) -> float:
    return float(np.exp(random.uniform(np.log(low), np.log(high))))


def _time(samples: int) -> Array:
    return np.arange(samples, dtype=np.float32) / np.float32(RATE)


def _tone(frequency: Array | float, samples: int, random: Random, partials: Sequence[float] = (1.0,)) -> Array:
    """Sines at 1, 2, 3, ... times a frequency [Hz] that may vary, with the strengths `partials`; none above 7.5 kHz.

    The phase is summed in float64, so that a long tone keeps its pitch.
    """
    steps = np.broadcast_to(np.asarray(frequency, dtype=np.float64) / RATE, (samples,))
    cycles = ((np.cumsum(steps) + random.random()) % 1.0).astype(np.float32)
    highest = np.max(frequency)
    out = np.zeros(samples, dtype=np.float32)
    for number, strength in enumerate(partials, start=1):
        if strength and number * highest < 7500:
            out += np.float32(strength) * np.sin(np.float32(2 * np.pi * number) * cycles)
    return out


def _root_mean_square(sound: Array) -> float:
    return float(np.sqrt(np.mean(np.square(sound)) + 1e-12))


def _noise(samples: int, random: Random, shape: Callable[[Array], Array]) -> Array:
    """Gaussian noise of root mean square 1 whose amplitude spectrum is like `shape(frequency [Hz])`."""
    size = 1 << (max(samples, 2) - 1).bit_length()
    frequency = np.fft.rfftfreq(size, 1 / RATE).astype(np.float32)
    white = random.standard_normal((2, frequency.size), dtype=np.float32)
    spectrum = (white[0] + 1j * white[1]) * shape(frequency)
    noise = np.fft.irfft(spectrum, size)[:samples].astype(np.float32)
    return noise / np.float32(_root_mean_square(noise))


def _band(low: float, high: float) -> Callable[[Array], Array]:
    return lambda frequency: ((frequency >= low) & (frequency <= high)).astype(np.float32)


def _fade(sound: Array, seconds: float = 0.01) -> Array:
    """Raised-cosine ends, so that a cut-off tone does not sound (and look) like a click."""
    ramp = min(int(seconds * RATE), sound.size // 2)
    if ramp:
        window = 0.5 - 0.5 * np.cos(np.pi * (np.arange(ramp, dtype=np.float32) + 0.5) / ramp)
        sound[:ramp] *= window
        sound[-ramp:] *= window[::-1]
    return sound


def _place(onsets: list[float], sound: Array, samples: int, levels: Array | None = None) -> Array:
    """Copies of a short sound at the given moments [s]."""
    out = np.zeros(samples, dtype=np.float32)
    for number, onset in enumerate(onsets):
        start = int(onset * RATE)
        part = sound[: max(samples - start, 0)]
        out[start : start + part.size] += part if levels is None else part * levels[number]
    return out


def _knock(frequency: float, decay: float, random: Random, noise: float) -> Array:
    """A damped tone with some noise in its attack: clicks and thuds."""
    samples = max(int(6 * decay * RATE), 8)
    envelope = np.exp(-_time(samples) / np.float32(decay))
    tone = _tone(frequency, samples, random)
    return ((1 - noise) * tone + noise * random.standard_normal(samples, dtype=np.float32)) * envelope


# --- the events -----------------------------------------------------------------------------------------------------


def sweep_up(samples: int, random: Random) -> Array:
    """A motor that revs up: a low, rough tone with many overtones that rises by about two octaves."""
    pitch = _log_uniform(random, 80, 160) * 2.0 ** (random.uniform(1.5, 2.3) * np.linspace(0, 1, samples))
    return _fade(_tone(pitch, samples, random, [k**-0.5 for k in range(1, 11)]))


def sweep_down(samples: int, random: Random) -> Array:
    """A slide whistle that falls: a high, pure tone that sinks by about two octaves."""
    pitch = _log_uniform(random, 2800, 4800) * 2.0 ** (-random.uniform(1.5, 2.3) * np.linspace(0, 1, samples))
    return _fade(_tone(pitch, samples, random, [1, 0.25]))


def siren(samples: int, random: Random) -> Array:
    """A wail: a tone that goes up and down by about an octave, two to four times a second."""
    centre, rate = _log_uniform(random, 600, 1100), random.uniform(2.0, 4.0)
    octaves = random.uniform(0.4, 0.6) * np.sin(2 * np.pi * (rate * _time(samples) + random.random()))
    return _fade(_tone(centre * 2.0**octaves, samples, random, [1, 0.6, 0.4]))


def trill(samples: int, random: Random) -> Array:
    """A bird: a high pure tone that jumps between two pitches 10 to 16 times a second."""
    low, rate = _log_uniform(random, 2200, 3600), random.uniform(10, 16)
    upper = (_time(samples) * np.float32(rate)).astype(np.int64) % 2
    return _fade(_tone(low * 2.0 ** (upper * random.uniform(4, 7) / 12), samples, random))


def beeps(samples: int, random: Random) -> Array:
    """An alarm clock: a hollow tone of one pitch, switched on and off three to six times a second."""
    rate = random.uniform(3, 6)
    beep = _fade(_tone(_log_uniform(random, 700, 1100), int(0.5 * RATE / rate), random, [1, 0, 0.6, 0, 0.4]))
    return _place([k / rate for k in range(int(np.ceil(samples / RATE * rate)))], beep, samples)


def buzz(samples: int, random: Random) -> Array:
    """A steady low tone with a dozen overtones, like an organ reed."""
    return _fade(_tone(_log_uniform(random, 120, 300), samples, random, [k**-0.5 for k in range(1, 14)]), 0.03)


def bell(samples: int, random: Random) -> Array:
    """A struck bell: inharmonic partials that start at once and ring out, the higher the sooner."""
    pitch, ring = _log_uniform(random, 350, 800), random.uniform(0.3, 0.6)
    time = _time(samples)
    partials = [
        _tone(pitch * ratio, samples, random) * np.exp(-time * np.float32(ratio**0.5 / ring))
        for ratio in (1.0, 1.51, 2.0, 2.76, 5.4, 8.9)
    ]
    return np.sum(partials, axis=0, dtype=np.float32)


def clicks(samples: int, random: Random) -> Array:
    """A train of sharp clicks at an even pace, 10 to 18 a second."""
    rate = random.uniform(10, 18)
    click = _knock(_log_uniform(random, 2000, 5000), 0.0015, random, 0.5)
    return _place([k / rate for k in range(int(samples / RATE * rate))], click, samples)


def bouncing(samples: int, random: Random) -> Array:
    """A dropped ball: dull thuds that follow faster and faster and grow softer."""
    interval, shrink = random.uniform(0.2, 0.3), random.uniform(0.76, 0.84)
    thud = _knock(_log_uniform(random, 180, 420), 0.016, random, 0.1)
    onsets, onset = [], 0.0
    while onset < samples / RATE and interval > 0.015:
        onsets.append(onset)
        onset, interval = onset + interval, interval * shrink
    return _place(onsets, thud, samples, levels=np.float32(0.88) ** np.arange(len(onsets)))


def burst(samples: int, random: Random) -> Array:
    """A crash: one burst of bright noise that starts at once and dies away within a second."""
    noise = _noise(samples, random, _band(_log_uniform(random, 800, 1600), 7900))
    return noise * np.exp(-_time(samples) / np.float32(random.uniform(0.2, 0.35)))


def chuffing(samples: int, random: Random) -> Array:
    """Amplitude-modulated noise: dull, swelling and fading four to nine times a second, like a steam engine."""
    noise = _noise(samples, random, _band(_log_uniform(random, 150, 300), _log_uniform(random, 1500, 3000)))
    beat = np.sin(np.pi * (random.uniform(4, 9) * _time(samples) + np.float32(random.random())))
    return _fade(noise * (beat * beat) ** np.float32(1.5))


def warble(samples: int, random: Random) -> Array:
    """Frequency-modulated noise: a tone whose pitch trembles at random, a hoarse voice."""
    wander = _noise(samples, random, _band(8, 45))
    wander *= np.float32(random.uniform(0.14, 0.22))
    pitch = _log_uniform(random, 400, 900) * 2.0**wander
    return _fade(_tone(pitch, samples, random, [1, 0.8, 0.6, 0.5]))


@dataclass(frozen=True)
class Event:
    """A class of the corpus: how it is made and the range of its length [s]."""

    make: Callable[[int, Random], Array]
    shortest: float
    longest: float


EVENTS: tuple[Event, ...] = (
    Event(sweep_up, 0.8, 1.5),
    Event(sweep_down, 0.8, 1.5),
    Event(siren, 0.9, 1.5),
    Event(trill, 0.8, 1.5),
    Event(beeps, 0.9, 1.5),
    Event(buzz, 0.8, 1.5),
    Event(bell, 1.0, 1.5),
    Event(clicks, 0.8, 1.5),
    Event(bouncing, 1.0, 1.5),
    Event(burst, 0.8, 1.2),
    Event(chuffing, 0.9, 1.5),
    Event(warble, 0.8, 1.5),
)


def synthetic_classes() -> tuple[LabelClass, ...]:
    """The classes of the corpus, in the order of their indices."""
    names = [event.make.__name__ for event in EVENTS]
    return tuple(LabelClass(index, name, name.replace("_", " ")) for index, name in enumerate(names))


class SyntheticCorpus:
    """`split` of the built-in corpus, behind the interface of `dass.dataset.ClipSource`.

    >>> corpus = SyntheticCorpus(SyntheticConfig(), "train")
    >>> corpus.load(3)                # (samples,) float32 in [-1, 1] at 16 kHz, the same every time
    >>> corpus.labels(3)              # class indices, ascending
    """

    sample_rate = RATE

    def __init__(self, config: SyntheticConfig | None = None, split: Literal["train", "eval", "test"] = "train"):
        if split not in SPLIT_STREAMS:
            raise ValueError(f"split must be one of {', '.join(SPLIT_STREAMS)}, got {split!r}")
        self.config = config or SyntheticConfig()
        self.split = split
        self.classes = synthetic_classes()
        self.samples = round(self.config.seconds * RATE)

    def __len__(self) -> int:
        return getattr(self.config, f"{self.split}_clips")

    def __repr__(self) -> str:
        return f"SyntheticCorpus({self.split}, {len(self)} clips of {self.config.seconds} s, seed {self.config.seed})"

    def _begin(self, index: int) -> tuple[Random, Array]:
        if not 0 <= index < len(self):
            raise IndexError(f"clip {index} of a corpus of {len(self)} clips")
        random = np.random.default_rng([CORPUS_STREAM, self.config.seed, SPLIT_STREAMS[self.split], index])
        count = int(random.integers(1, self.config.max_events + 1))
        return random, random.choice(len(EVENTS), size=count, replace=False)

    def labels(self, index: int) -> tuple[int, ...]:
        """Class indices of the clip, ascending; cheap: no sound is made."""
        return tuple(sorted(int(label) for label in self._begin(index)[1]))

    def name(self, index: int) -> str:
        """What messages call the clip."""
        return f"synthetic-{self.split}-{self.config.seed}-{index}"

    def seconds(self, index: int) -> float:
        """Length of the clip [s]."""
        return self.samples / RATE

    def file(self, index: int) -> None:
        """The clips are not kept in files."""

    def read(self, index: int, *, sample_rate: int, start: float, duration: float, hashed: bool):
        """See `dass.dataset.ClipSource`."""
        identity = audio_hash(self.load(index)) if hashed else ""
        return self.load(index, sample_rate=sample_rate, start=start, duration=duration), identity

    def load(self, index: int, *, sample_rate: int = RATE, start: float = 0.0, duration: float | None = None):
        """The clip as (samples,) float32 in [-1, 1]; `start` and `duration` [s] cut a part out of it."""
        if sample_rate != RATE:
            raise ValueError(f"the synthetic corpus is made at {RATE} Hz; the front end asked for {sample_rate} Hz")
        random, labels = self._begin(index)
        slope = random.uniform(0.0, 0.8)  # of the noise floor's amplitude spectrum: white to nearly brown
        mixture = _noise(self.samples, random, lambda frequency: np.maximum(frequency, 40.0) ** np.float32(-slope))
        for label in labels:
            event = EVENTS[label]
            length = int(random.uniform(event.shortest, event.longest) * RATE)
            sound = event.make(length, random)
            level = 10 ** (random.uniform(self.config.snr_low, self.config.snr_high) / 20)
            onset = int(random.integers(0, self.samples - length + 1))
            mixture[onset : onset + length] += sound * np.float32(level / _root_mean_square(sound))
        peak = 10 ** (random.uniform(-18, -1) / 20)
        mixture *= np.float32(peak) / np.abs(mixture).max()
        first = round(start * RATE)
        last = None if duration is None else first + round(duration * RATE)
        return torch.from_numpy(np.ascontiguousarray(mixture[first:last]))


def write_examples(folder: Path, seed: int = 0) -> list[Path]:
    """Writes one wav file per class (the event alone) and five mixtures named by their labels; returns the paths."""
    import soundfile

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for index, event in enumerate(EVENTS):
        random = np.random.default_rng([CORPUS_STREAM, seed, 3, index])
        sound = event.make(int(event.longest * RATE), random)
        written.append(folder / f"{event.make.__name__}.wav")
        soundfile.write(written[-1], 0.5 * sound / np.abs(sound).max(), RATE)
    corpus = SyntheticCorpus(SyntheticConfig(seed=seed), "eval")
    for index in range(5):
        names = "+".join(corpus.classes[label].id for label in corpus.labels(index))
        written.append(folder / f"mixture-{index}-{names}.wav")
        soundfile.write(written[-1], corpus.load(index).numpy(), RATE)
    return written


@dataclass(frozen=True)
class ExamplesConfig:
    """Writes one wav file per class of the built-in corpus, and five mixtures, to listen to."""

    out: Path
    """Folder for the files; made where it is absent."""
    seed: int = 0
    """Seed of the sounds."""


def main() -> None:
    import tyro

    config = tyro.cli(ExamplesConfig)
    try:
        written = write_examples(config.out, config.seed)
    except OSError as error:
        raise SystemExit(f"--out {config.out} cannot be written: {error.strerror}; name another folder") from error
    for path in written:
        event = next((event for event in EVENTS if event.make.__name__ == path.stem), None)
        print(f"{path}: {event.make.__doc__ if event else 'a clip of the corpus'}")


if __name__ == "__main__":
    main()
