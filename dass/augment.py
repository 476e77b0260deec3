"""What is done to a training example: mixing of two waveforms, gain; on the spectrogram other vocal tracts and tempos, shift
in time, masks.

Everything random is drawn first, as plain numbers, from the example's own generator (`draw`); applying it is then a
function of those numbers, in a loader worker or on the GPU alike.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from dass.audio import LogMelConfig


@dataclass(frozen=True)
class AugmentConfig:
    """Augmentation of training clips; the defaults are the published recipe's (AST, arXiv 2104.01778)."""

    mixup_rate: float = 0.5
    """Share of the examples that are mixed with a second clip [0 to 1]."""
    mixup_alpha: float = 10.0
    """The first clip's share in a mixture is drawn from Beta(alpha, alpha); labels mix with the same share."""
    frequency_mask: int | None = None
    """Widest band that is masked [mel bins]; none: 3/8 of the bins, the published 48 of 128; 0: no mask."""
    time_mask: int | None = None
    """Longest stretch that is masked [frames]; none: 3/16 of the frames, the published 192 of 1024; 0: no mask."""
    roll: int = 0
    """Most frames by which a spectrogram is shifted in time, circularly, either way [frames]."""
    gain: float = 0.0
    """Most decibels by which a waveform is made louder or softer [dB]."""
    warp: float = 0.0
    """Most by which all frequencies are raised or lowered, as by a shorter or longer vocal tract [share]: with 0.15 their
    factor is between 1/1.15 and 1.15 (VTLP, Jaitly and Hinton, ICML 2013 workshop on deep learning for audio)."""
    stretch: float = 0.0
    """Most by which a sound is made longer or shorter, its pitch unchanged [share], as `warp`."""

    def __post_init__(self):
        if not 0 <= self.mixup_rate <= 1:
            raise ValueError(f"augment.mixup_rate must lie between 0 and 1, got {self.mixup_rate}")
        if self.mixup_alpha <= 0:
            raise ValueError(f"augment.mixup_alpha must be positive, got {self.mixup_alpha}")
        for name in ("frequency_mask", "time_mask", "roll", "gain", "warp", "stretch"):
            if (getattr(self, name) or 0) < 0:
                raise ValueError(f"augment.{name} must not be negative, got {getattr(self, name)}")


NO_AUGMENTATION = AugmentConfig(mixup_rate=0.0, frequency_mask=0, time_mask=0)


@dataclass(frozen=True)
class Draw:
    """The random choices of one example."""

    mix_index: int
    """Clip to mix with; -1: none."""
    mix_lambda: float
    """Share of the first clip in the mixture; 1 where none is mixed in."""
    gain: float
    """Factor on the waveform."""
    roll: int
    """Frames to shift by."""
    keep_mel: Tensor
    """(mel_bins,) bool, False where masked."""
    keep_time: Tensor
    """(frames,) bool, False where masked."""
    crop: tuple[float, float]
    """Where in a longer clip the example begins, from 0 to 1 of the room there is: first and second clip."""
    warp: float = 1.0
    """Factor on all frequencies."""
    stretch: float = 1.0
    """Factor on the duration."""


def no_draw(front_end: LogMelConfig) -> Draw:
    """The choices of an example that is left as it is."""
    everything = (
        torch.ones(front_end.mel_bins, dtype=torch.bool),
        torch.ones(front_end.frames, dtype=torch.bool),
    )
    return Draw(-1, 1.0, 1.0, 0, *everything, (0.0, 0.0))


def draw(config: AugmentConfig, front_end: LogMelConfig, clips: int, random: np.random.Generator) -> Draw:
    """Draws the choices of one example; always consumes the same numbers, whatever the configuration."""
    mixed = random.random() < config.mixup_rate
    partner = int(random.integers(clips))
    share = float(random.beta(config.mixup_alpha, config.mixup_alpha))
    gain = 10 ** (config.gain * random.uniform(-1, 1) / 20)
    roll = int(random.integers(-config.roll, config.roll, endpoint=True))
    crop = (float(random.random()), float(random.random()))
    keep_mel, keep_time = _masks(config, front_end, int(random.integers(2**63)))
    warp, stretch = ((1 + most) ** random.uniform(-1, 1) for most in (config.warp, config.stretch))
    mixing = (partner, share) if mixed else (-1, 1.0)
    return Draw(*mixing, gain, roll, keep_mel, keep_time, crop, warp, stretch)


def _masks(config: AugmentConfig, front_end: LogMelConfig, seed: int) -> tuple[Tensor, Tensor]:
    """One band and one stretch to mask (SpecAugment, arXiv 1904.08779), drawn by torchaudio."""
    from torchaudio.functional import mask_along_axis

    mel_bins, frames = front_end.mel_bins, front_end.frames
    widths = (
        3 * mel_bins // 8 if config.frequency_mask is None else min(config.frequency_mask, mel_bins),
        3 * frames // 16 if config.time_mask is None else min(config.time_mask, frames),
    )
    keep = []
    with torch.random.fork_rng(devices=[]):  # torchaudio draws from the global generator
        torch.default_generator.manual_seed(seed)
        for size, width in zip((mel_bins, frames), widths, strict=True):
            keep.append(mask_along_axis(torch.ones(size, 1), width, 0.0, 0)[:, 0] > 0)
    return keep[0], keep[1]


def mix_waveforms(first: Tensor, second: Tensor, share: float) -> Tensor:
    """`share` of the first waveform and the rest of the second, (samples,), each less its mean, the sum too.

    The shorter one is padded with zeros, so that no labelled sound is cut off.
    """
    samples = max(first.numel(), second.numel())
    mixture = torch.zeros(samples, dtype=first.dtype)
    mixture[: first.numel()] += share * (first - first.mean())
    mixture[: second.numel()] += (1 - share) * (second - second.mean())
    return mixture - mixture.mean()


def mix_targets(first: Tensor, second: Tensor, share: float) -> Tensor:
    """Targets of a mixture: `share` of the first clip's and the rest of the second's."""
    return share * first + (1 - share) * second


def warp_and_stretch(fbank: Tensor, warp: Tensor, stretch: Tensor, front_end: LogMelConfig) -> Tensor:
    """Multiplies the frequencies of log-mel spectrograms that are not yet normalised, and their durations.

    Values between frames and bands are interpolated linearly; outside the bands the outermost counts. Frames beyond the
    end are padding, 0. Rows whose two factors are 1 stay as they are, bit for bit.

    Args:
        fbank: `(batch, frames, mel_bins)`.  warp, stretch: `(batch,)` factors on frequency and duration.
    """
    if bool((warp == 1).all() & (stretch == 1).all()):
        return fbank
    batch, frames, mel_bins = fbank.shape
    bands = torch.arange(mel_bins, device=fbank.device)
    # Bands of Kaldi's filter bank are equally spaced in mel between 20 Hz and half the sample rate.
    low, high = (1127 * math.log1p(hertz / 700) for hertz in (20.0, front_end.sample_rate / 2))
    step = (high - low) / (mel_bins + 1)
    hertz = 700 * torch.expm1((low + step * (bands + 1)) / 1127)
    source = (1127 * torch.log1p(hertz / warp[:, None] / 700) - low) / step - 1
    source = torch.where(warp[:, None] == 1, bands.to(source.dtype), source)
    warped = _interpolate(fbank, source[:, None].expand(batch, frames, mel_bins), 2)
    # A frame of padding is 0 in every band and stays so; the time after the last frame counts as padding too.
    source = torch.arange(frames, device=fbank.device) / stretch[:, None]
    stretched = _interpolate(warped, source[:, :, None].expand(batch, frames, mel_bins), 1)
    return stretched.masked_fill((source > frames - 1)[:, :, None], 0.0)


def _interpolate(values: Tensor, source: Tensor, axis: int) -> Tensor:
    """`values` at fractional positions along an axis, linearly; positions outside are those of the ends."""
    last = values.shape[axis] - 1
    source = source.clamp(0, last)
    before = source.floor().long()
    share = (source - before).to(values.dtype)
    first, second = values.gather(axis, before), values.gather(axis, (before + 1).clamp(max=last))
    return torch.lerp(first, second, share)


def roll_and_mask(fbank: Tensor, roll: Tensor, keep_mel: Tensor, keep_time: Tensor) -> Tensor:
    """Shifts and masks log-mel spectrograms that are not yet normalised.

    Masked values become 0, as padding is: the published recipe masks before it normalises.

    Args:
        fbank: `(batch, frames, mel_bins)`.  roll: `(batch,)` int64 [frames], later for positive ones.
        keep_mel: `(batch, mel_bins)` bool.  keep_time: `(batch, frames)` bool.
    """
    frames = fbank.shape[1]
    source = (torch.arange(frames, device=fbank.device) - roll[:, None]) % frames
    fbank = torch.gather(fbank, 1, source[..., None].expand_as(fbank))
    return fbank.masked_fill(~(keep_mel[:, None, :] & keep_time[:, :, None]), 0.0)
