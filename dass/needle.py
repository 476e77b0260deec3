"""A needle in a haystack: a short clip placed in a background of any length, exact to the frame.

The published protocol puts the spectrogram of the clip in place of that many frames of the haystack's ("replace"). So the
model sees the very frames of the clip alone, and elsewhere those of the haystack alone. With "overlay" the background
goes on underneath: the waveforms are added, and only the frames that the sum touches are computed anew.

The needle begins at frame round(position * frames); one that would run past the end sits flush with it.
`python -m dass.needle` writes one as a sound file, to listen to.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from dass.audio import AudioError, LogMel, LogMelConfig, load_audio
from dass.haystack import MEAN_SPECTRUM, Haystack, HaystackError

Placing = Literal["replace", "overlay"]
FRAMES_AT_ONCE = 8192


def start_frame(frames: int, needle_frames: int, position: float) -> int:
    """First frame of the needle: round(position * frames), or flush with the end where it would run past it."""
    if needle_frames < 1 or frames < needle_frames:
        raise ValueError(f"the haystack's {frames} frames must hold the needle's {needle_frames}")
    if not 0.0 <= position <= 1.0:
        raise ValueError(f"position must be from 0 (the beginning) to 1 (the end), got {position}")
    return min(math.floor(position * frames + 0.5), frames - needle_frames)


def frames_for(seconds: float, config: LogMelConfig, needle_frames: int) -> int:
    """Frames of an input of `seconds`; at least the needle's, which for the published 1024 makes up "10 s"."""
    return max(round(seconds * 1000 / config.frame_shift), needle_frames)


def spectrogram_blocks(
    log_mel: LogMel, blocks: Iterable[np.ndarray], at_once: int = FRAMES_AT_ONCE
) -> Iterator[Tensor]:
    """Normalised frames (n, mel_bins) of a streamed waveform, those of the whole: a frame over a seam is not lost.

    Differs from one pass over the whole only in the removal of the waveform's mean, which every frame repeats for itself.
    """
    config = log_mel.config
    unpadded = LogMel(replace(config, frames=None))
    held, wanted = torch.zeros(0), (at_once - 1) * config.shift + config.window
    for block in blocks:
        held = torch.cat([held, torch.from_numpy(block)])
        while held.numel() >= wanted:
            yield unpadded(held[:wanted])
            held = held[at_once * config.shift :]
    if held.numel() >= config.window:
        yield unpadded(held)


class Scene:
    """One needle in one haystack of one length; `move` puts it at one position after another.

    The haystack's waveform is streamed: at first for its level (where an SNR is asked for), then through the front end.
    What is held is the spectrogram that the model is to see, and around each position a needle's length of waveform. Of a
    haystack that is no longer than the needle that replaces it nothing is made.

    Args:
        needle: (samples,) at the front end's rate.
        haystack: what it is hidden in.
        frames: of the whole, the needle's included.
        log_mel: the front end; its `frames` is the length of the needle (None: what the needle fills).
        snr: 20 log10 of needle RMS over haystack RMS [dB]; None for a haystack without a level.
        placing: "replace" the haystack's frames, or "overlay" the needle on its waveform.
        positions: where `move` may put it, needed in advance to overlay; any for replace.
    """

    def __init__(
        self,
        needle: Tensor,
        haystack: Haystack,
        frames: int,
        log_mel: LogMel,
        *,
        snr: float | None = None,
        placing: Placing = "replace",
        positions: Sequence[float] = (),
    ):
        config = log_mel.config
        if needle.ndim != 1 or needle.numel() == 0:
            raise ValueError(f"the needle must be a waveform (samples,), got {tuple(needle.shape)}")
        if haystack.sample_rate != config.sample_rate:
            raise ValueError(f"the haystack is at {haystack.sample_rate} Hz, the front end at {config.sample_rate} Hz")
        if placing not in ("replace", "overlay"):
            raise ValueError(f"placing must be 'replace' or 'overlay', got {placing!r}")
        if haystack.kind == MEAN_SPECTRUM and placing == "overlay":
            raise HaystackError("mean-spectrum has no waveform that a needle could be laid on; use placing='replace'")
        if haystack.levelled != (snr is not None):
            raise ValueError(
                f"the haystack {haystack.kind} {'needs' if haystack.levelled else 'has no'} SNR, got {snr}"
            )
        self.config, self.haystack, self.snr, self.placing = config, haystack, snr, placing
        self.frames = frames
        self.needle_frames = config.frames or config.frames_of(needle.numel())
        start_frame(frames, self.needle_frames, 0.0)  # does it fit?
        self.needle = needle.float()[: (self.needle_frames - 1) * config.shift + config.window]
        self.samples = (frames - 1) * config.shift + config.window
        # A needle as long as the whole hides the haystack wherever it is put.
        self._hides_all = placing == "replace" and frames == self.needle_frames
        self.gain = 1.0 if self._hides_all else self._gain()
        self._log_mel = LogMel(replace(config, frames=self.needle_frames))
        self._alone = LogMel(replace(config, frames=None))
        self._needle_fbank = self._log_mel(self.needle)
        self._spans = {self.start(position): np.zeros(0, np.float32) for position in positions}
        self._fbank = torch.zeros(frames, config.mel_bins)
        if haystack.kind != MEAN_SPECTRUM and not self._hides_all:
            done = 0
            for part in spectrogram_blocks(self._alone, self._keep_spans(self.haystack_blocks())):
                self._fbank[done : done + len(part)] = part
                done += len(part)
            assert done == frames, f"{done} frames streamed, {frames} expected"
        self._hidden: tuple[int, Tensor] | None = None  # where the needle lies, and the haystack's frames beneath it

    def _gain(self) -> float:
        if self.snr is None:
            return 1.0
        level = math.sqrt(float(self.needle.double().square().mean()))
        background = self.haystack.level(self.samples)
        if background == 0:
            raise HaystackError(f"the haystack {self.haystack.kind} is silent here: no SNR can be set")
        return level / background * 10 ** (-self.snr / 20)

    def start(self, position: float) -> int:
        """First frame of the needle at a position."""
        return start_frame(self.frames, self.needle_frames, position)

    def haystack_blocks(self) -> Iterator[np.ndarray]:
        """The haystack's waveform at its level, in blocks; HaystackError for mean-spectrum, which has none."""
        return (block * np.float32(self.gain) for block in self.haystack.blocks(self.samples))

    def waveform_blocks(self, position: float) -> Iterator[np.ndarray]:
        """The waveform with the needle at a position, in blocks."""
        first = self.start(position) * self.config.shift
        needle, done = self.needle.numpy(), 0
        for block in self.haystack_blocks():
            low, high = max(first, done), min(first + needle.size, done + block.size)
            if low < high:
                if self.placing == "replace":
                    block[low - done : high - done] = 0
                block[low - done : high - done] += needle[low - first : high - first]
            yield block
            done += block.size

    def move(self, position: float) -> Tensor:
        """The spectrogram (frames, mel_bins) with the needle at a position: a view that the next `move` changes."""
        self.remove()
        if self.placing == "replace":
            first, patch = self.start(position), self._needle_fbank
        else:
            first, patch = self._overlaid(self.start(position))
        self._hidden = first, self._fbank[first : first + len(patch)].clone()
        self._fbank[first : first + len(patch)] = patch
        return self._fbank

    def remove(self) -> Tensor:
        """The spectrogram of the haystack alone."""
        if self._hidden is not None:
            first, below = self._hidden
            self._fbank[first : first + len(below)] = below
            self._hidden = None
        return self._fbank

    def touched(self, start: int) -> tuple[int, int]:
        """First frame, and the one after the last, that an overlaid needle beginning at frame `start` reaches into."""
        shift, window = self.config.shift, self.config.window
        first = max(start - (window - 1) // shift, 0)
        return first, min(start + math.ceil(self.needle.numel() / shift), self.frames)

    def _overlaid(self, start: int) -> tuple[int, Tensor]:
        if start not in self._spans:
            raise ValueError("to overlay, every position must be given when the scene is made")
        first, _ = self.touched(start)
        offset = (start - first) * self.config.shift
        mixture = torch.from_numpy(self._spans[start].copy())
        mixture[offset : offset + self.needle.numel()] += self.needle
        return first, self._alone(mixture)

    def _keep_spans(self, blocks: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
        """Passes blocks on; for overlaying, copies what lies around each position."""
        done = 0
        for block in blocks:
            if self.placing == "overlay":
                for start in self._spans:
                    first, last = self.touched(start)
                    low = first * self.config.shift - done
                    high = (last - 1) * self.config.shift + self.config.window - done
                    piece = block[max(low, 0) : max(high, 0)]
                    if piece.size:
                        self._spans[start] = np.concatenate([self._spans[start], piece])
            yield block
            done += block.size


@dataclass(frozen=True)
class ListenConfig:
    """Writes a needle in a haystack as a sound file, to listen to."""

    clip: Path
    """The needle: a sound file."""
    out: Path
    """The file to write (.wav or .flac)."""
    haystack: Literal["silence", "white", "pink", "babble", "recording"] = "pink"
    """What it is hidden in."""
    seconds: float = 60.0
    """Length of the whole [s]."""
    position: float = 0.5
    """Where the needle begins [0: beginning, 1: flush with the end]."""
    snr: float = 10.0
    """Needle RMS over haystack RMS [dB]."""
    placing: Placing = "replace"
    """Cut the haystack out where the needle is, or let it go on underneath."""
    seed: int = 0
    """Seed of the haystack."""
    babble: Path | None = None
    """Folder of speech for babble."""
    recording: Path | None = None
    """Folder of background sound for recording."""


def write_scene(config: ListenConfig) -> str:
    """Writes the file; returns what to say about it. ValueError, OSError or AudioError where it cannot be done."""
    import soundfile

    if config.out.suffix.lower() not in (".wav", ".flac"):
        raise ValueError(f"--out must end in .wav or .flac, got {config.out}")
    config.out.parent.mkdir(parents=True, exist_ok=True)
    front_end = LogMelConfig(frames=None)
    haystack = Haystack(
        config.haystack,
        seed=config.seed,
        sample_rate=front_end.sample_rate,
        folder=config.babble if config.haystack == "babble" else config.recording,
    )
    scene = Scene(
        load_audio(config.clip, sample_rate=front_end.sample_rate),
        haystack,
        round(config.seconds * 1000 / front_end.frame_shift),
        LogMel(front_end),
        snr=config.snr if haystack.levelled else None,
        placing=config.placing,
        positions=(config.position,),
    )
    peak = max(float(np.abs(block).max()) for block in scene.waveform_blocks(config.position))
    scale = min(1.0, 0.99 / max(peak, 1e-9))
    with soundfile.SoundFile(config.out, "w", front_end.sample_rate, 1) as file:
        for block in scene.waveform_blocks(config.position):
            file.write(block * scale)
    second = scene.start(config.position) * front_end.frame_shift / 1000
    quieter = "" if scale == 1 else f", turned down by {-20 * math.log10(scale):.1f} dB so as not to clip"
    return f"{config.out}: {config.clip.name} from {second:.2f} s on in {config.haystack}{quieter}"


def main() -> int:
    import tyro

    try:
        print(write_scene(tyro.cli(ListenConfig, prog="python -m dass.needle")))
    except (HaystackError, AudioError, ValueError, OSError) as error:
        print(f"dass.needle: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
