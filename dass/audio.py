"""From a sound file to the model's input: decoding, mono, resampling, and the log-mel front end.

Waveforms are float32 in [-1, 1], mono, `(samples,)`. The front end is the published one: mean removed, Kaldi filter
bank, cut or zero-padded to a number of frames, and only then normalised (so padding is not zero afterwards).
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

AUDIO_SUFFIXES = frozenset(".wav .flac .ogg .oga .opus .mp3 .aif .aiff .au .caf .w64".split())
RESAMPLING_MARGIN = 0.01  # s read beyond a part's end, so that its last samples are not those of a file that ends there
WINDOW_MS = 25.0  # Kaldi's frame length, which the published front end leaves at its default


class AudioError(Exception):
    """A sound file that cannot be used: `path` and `reason`."""

    def __init__(self, path: str | Path, reason: str):
        super().__init__(str(path), reason)  # both as args, so that the error survives the way out of a worker
        self.path, self.reason = str(path), reason

    def __str__(self) -> str:
        return f"{self.path}: {self.reason}"


@dataclass(frozen=True)
class AudioInfo:
    """What a file's header says: sample rate [Hz], channels, samples per channel."""

    sample_rate: int
    channels: int
    samples: int

    @property
    def seconds(self) -> float:
        return self.samples / self.sample_rate


def _open(path: str | Path):
    import soundfile

    path = Path(path)
    if not path.is_file():
        raise AudioError(path, "no such file" if not path.exists() else "not a file")
    try:
        return soundfile.SoundFile(path)
    except soundfile.LibsndfileError as error:
        if path.stat().st_size == 0:
            reason = "the file is empty"
        else:
            reason = f"cannot be decoded ({error.error_string}); wav, flac, ogg and mp3 are read"
        raise AudioError(path, reason) from None
    except OSError as error:
        raise AudioError(path, f"cannot be opened ({error})") from None


def audio_info(path: str | Path) -> AudioInfo:
    """Reads the header only. Raises `AudioError` for a file that cannot be opened or holds no sample."""
    with _open(path) as file:
        if file.frames < 1:
            raise AudioError(path, "holds no samples")
        return AudioInfo(file.samplerate, file.channels, file.frames)


def _mono(block: np.ndarray, path: str | Path) -> Tensor:
    waveform = torch.from_numpy(block if block.shape[1] == 1 else block.mean(axis=1, keepdims=True))[:, 0].contiguous()
    if not torch.isfinite(waveform).all():
        raise AudioError(path, "holds samples that are not finite numbers")
    return waveform


def _read(file, frames: int, path: str | Path) -> np.ndarray:
    import soundfile

    try:
        return file.read(frames, dtype="float32", always_2d=True)
    except soundfile.LibsndfileError as error:
        raise AudioError(path, f"breaks off while decoding ({error.error_string})") from None


def load_native(path: str | Path, *, start: float = 0.0, duration: float | None = None) -> tuple[Tensor, int]:
    """Decodes a file, or `duration` seconds of it from `start` [s], at its own rate.

    Returns `((samples,) float32 mono, sample rate [Hz])`. Raises `AudioError`.
    """
    with _open(path) as file:
        rate = file.samplerate
        first = round(start * rate)
        if first:
            if first >= file.frames:
                raise AudioError(path, f"ends at {file.frames / rate:.2f} s, before the start asked for, {start:.2f} s")
            file.seek(first)
        block = _read(file, -1 if duration is None else max(math.ceil(duration * rate), 1), path)
    if len(block) == 0:
        raise AudioError(path, "holds no samples")
    return _mono(block, path), rate


def load_audio(
    path: str | Path, *, sample_rate: int = 16000, start: float = 0.0, duration: float | None = None
) -> Tensor:
    """Decodes a file (wav, flac, ogg, mp3, ...) to `(samples,)` float32, mixed down and resampled to `sample_rate` [Hz].

    `start` and `duration` [s] read a part; a file that ends earlier gives what there is. Raises `AudioError`, which
    names the file and what is wrong with it.
    """
    if duration is None:
        return resample(*load_native(path, start=start), sample_rate)
    waveform, rate = load_native(path, start=start, duration=duration + RESAMPLING_MARGIN)
    return resample(waveform, rate, sample_rate)[: max(round(duration * sample_rate), 1)]


def _ratio(rate_in: int, rate_out: int) -> tuple[int, int]:
    """The two rates as a ratio of small numbers; exact for the usual rates.

    The filter of `torchaudio.functional.resample` has (in x out) taps after reduction, gigabytes for coprime rates such
    as 44101 -> 16000. Those get the nearest ratio of small numbers: pitch and time are off by less than 0.05 %.
    """
    ratio = Fraction(rate_in, rate_out)
    bound = 1000
    while ratio.numerator * ratio.denominator > 1_000_000 and bound > 1:
        ratio = Fraction(rate_in, rate_out).limit_denominator(bound)
        bound = bound // 2
    return ratio.numerator, ratio.denominator


def resample(waveform: Tensor, rate_in: int, rate_out: int) -> Tensor:
    """Resamples `(..., samples)` from `rate_in` to `rate_out` [Hz] (torchaudio's windowed sinc)."""
    if rate_in <= 0 or rate_out <= 0:
        raise ValueError(f"sample rates must be positive, got {rate_in} and {rate_out} Hz")
    if rate_in == rate_out:
        return waveform
    from torchaudio.functional import resample as torchaudio_resample

    return torchaudio_resample(waveform, *_ratio(rate_in, rate_out))


def stream_audio(path: str | Path, *, sample_rate: int = 16000, block: float = 10.0) -> Iterator[Tensor]:
    """Decodes a file of any length in constant memory.

    Yields `(samples,)` float32 mono blocks of about `block` seconds at `sample_rate` [Hz] (the last one shorter); put
    together they equal `load_audio(path)`, without seams where resampled blocks meet. Raises `AudioError`.
    """
    with _open(path) as file:
        step_in, step_out = _ratio(file.samplerate, sample_rate)
        if step_in == step_out:
            margin = 0
        else:  # groups of step_in samples on either side that the sinc filter (6 zero crossings) of a group can reach
            margin = math.ceil(math.ceil(6 * step_in / (0.99 * min(step_in, step_out))) / step_in) + 1
        groups = max(round(block * file.samplerate / step_in), 1)
        pending = torch.zeros(0)
        context = 0  # groups at the front of `pending` that have been given out and serve as context
        ended = given = False
        while not ended:
            wanted = (context + groups + margin) * step_in - pending.numel()
            read = _read(file, wanted, path)
            ended = len(read) < wanted
            pending = torch.cat([pending, _mono(read, path)])
            if pending.numel() == 0:
                if given:  # the file ended with the block before
                    return
                raise AudioError(path, "holds no samples")
            given = True
            converted = resample(pending, step_in, step_out)
            last = converted.numel() if ended else (context + groups) * step_out
            if last > context * step_out:
                yield converted[context * step_out : last].clone()
            done = context + groups
            keep = max(done - margin, 0)
            pending, context = pending[keep * step_in :], done - keep


def audio_hash(waveform: Tensor) -> str:
    """Identity of a waveform `(samples,)`: 128 bits of BLAKE2b over its samples as 16-bit integers, in hexadecimal.

    To be compared across machines it must be taken of the decoded samples before any resampling, whose last bits
    differ between processors (`dass.data.AudioDataset` does so).
    """
    samples = (waveform.detach().cpu().to(torch.float64) * 32768).round().clamp(-32768, 32767).to(torch.int16)
    return hashlib.blake2b(samples.numpy().astype("<i2").tobytes(), digest_size=16).hexdigest()


@dataclass(frozen=True)
class LogMelConfig:
    """The front end's numbers; the defaults are those of the published AudioSet models."""

    sample_rate: int = 16000
    """Rate of the waveform the filter bank sees [Hz]."""
    mel_bins: int = 128
    """Mel bands."""
    frame_shift: float = 10.0
    """Time between frames [ms]."""
    frames: int | None = 1024
    """Frames of the output, cut or zero-padded [frames]; none: as many as the waveform gives."""
    mean: float = -4.2677393
    """Mean of the training set's log-mel values [natural log of energy]."""
    std: float = 4.5689974
    """Standard deviation of the training set's log-mel values; values are divided by twice it."""

    def __post_init__(self):
        for name in ("sample_rate", "mel_bins", "frame_shift", "std"):
            if getattr(self, name) <= 0:
                raise ValueError(f"front end: {name} must be positive, got {getattr(self, name)}")
        if self.frames is not None and self.frames < 1:
            raise ValueError(f"front end: frames must be at least 1, or none, got {self.frames}")

    @property
    def shift(self) -> int:
        """Samples between frames."""
        return int(self.sample_rate * self.frame_shift * 0.001)

    @property
    def window(self) -> int:
        """Samples of a frame."""
        return int(self.sample_rate * WINDOW_MS * 0.001)

    @property
    def samples(self) -> int | None:
        """Samples that `frames` frames are made of; further ones are cut off."""
        return None if self.frames is None else (self.frames - 1) * self.shift + self.window

    def frames_of(self, samples: int) -> int:
        """Frames that `samples` samples fill; what is shorter than a window counts as one."""
        return 1 + max(samples - self.window, 0) // self.shift

    @property
    def padding(self) -> float:
        """What a frame of padding is after normalisation."""
        return (0.0 - self.mean) / (2.0 * self.std)


class LogMel(nn.Module):
    """The published front end: waveform -> normalised log-mel spectrogram.

    Equals `torchaudio.compliance.kaldi.fbank(htk_compat=True, use_energy=False, window_type="hanning", dither=0)` of the
    waveform less its mean, cut or zero-padded to `config.frames`, then `(fbank - mean) / (2 std)` (Gong et al.,
    arXiv 2104.01778). Runs on the waveform's device; long waveforms take little more memory than their output.
    """

    block_frames = 8192

    def __init__(self, config: LogMelConfig | None = None):
        super().__init__()
        self.config = config or LogMelConfig()

    def forward(self, waveform: Tensor, sample_rate: int | None = None, lengths: Tensor | None = None) -> Tensor:
        """Spectrogram of one waveform or a batch.

        Args:
            waveform: `(samples,)`, `(batch, samples)` or `(batch, channels, samples)` (mixed down), floating point.
            sample_rate: of the waveform [Hz]; resampled where it is not the front end's own, which is the default.
            lengths: `(batch,)` samples of each waveform at the front end's rate, where they are padded to be one tensor.

        Returns: `(frames, mel_bins)` or `(batch, frames, mel_bins)`, in the waveform's dtype (float32 from half types).
        """
        return self.normalise(self.filter_bank(waveform, sample_rate, lengths))

    def normalise(self, fbank: Tensor) -> Tensor:
        """`(fbank - mean) / (2 std)`."""
        return (fbank - self.config.mean) / (2.0 * self.config.std)

    def filter_bank(self, waveform: Tensor, sample_rate: int | None = None, lengths: Tensor | None = None) -> Tensor:
        """As `forward`, before normalisation: natural log of mel energies, padding 0."""
        config = self.config
        if not waveform.is_floating_point():
            raise TypeError(f"waveform must be floating point in [-1, 1], got {waveform.dtype}; divide integers first")
        if waveform.ndim not in (1, 2, 3) or waveform.shape[-1] == 0:
            raise ValueError(
                "waveform must be (samples,), (batch, samples) or (batch, channels, samples) with at least one sample, "
                f"got {tuple(waveform.shape)}"
            )
        if waveform.dtype in (torch.float16, torch.bfloat16):
            waveform = waveform.float()
        single = waveform.ndim == 1
        waveform = waveform[None] if single else waveform
        waveform = waveform.mean(1) if waveform.ndim == 3 else waveform
        if sample_rate is not None and sample_rate != config.sample_rate:
            if lengths is not None:
                raise ValueError(f"lengths go with waveforms at {config.sample_rate} Hz, got sample_rate={sample_rate}")
            waveform = resample(waveform, sample_rate, config.sample_rate)
        if lengths is None:
            waveform = waveform - waveform.mean(-1, keepdim=True)
            counts = None
        else:
            inside = torch.arange(waveform.shape[-1], device=waveform.device) < lengths[:, None]
            mean = torch.where(inside, waveform, 0).sum(-1, keepdim=True) / lengths[:, None]
            waveform = torch.where(inside, waveform - mean, 0)
            counts = 1 + (lengths - config.window).clamp(min=0) // config.shift
        fbank = self._frames(waveform)
        frames = fbank.shape[1] if config.frames is None else config.frames
        fbank = nn.functional.pad(fbank, (0, 0, 0, frames - fbank.shape[1]))
        if counts is not None:
            fbank = torch.where((torch.arange(frames, device=fbank.device) < counts[:, None])[..., None], fbank, 0)
        return fbank[0] if single else fbank

    def _frames(self, waveform: Tensor) -> Tensor:
        """Kaldi filter bank of each row: (batch, samples) -> (batch, at most config.frames, mel_bins)."""
        config = self.config
        frames = config.frames_of(waveform.shape[-1])
        frames = frames if config.frames is None else min(frames, config.frames)
        # Rows of a whole number of shifts, laid end to end, are one signal to Kaldi; frames over a seam are left out.
        steps = frames + math.ceil(config.window / config.shift) - 1
        samples = min((frames - 1) * config.shift + config.window, waveform.shape[-1])
        rows = nn.functional.pad(waveform[:, :samples], (0, steps * config.shift - samples))
        batch = rows.shape[0]
        if batch * steps <= self.block_frames or batch == 1:
            return self._kaldi(rows.reshape(-1), batch * steps)[: batch * steps].view(batch, steps, -1)[:, :frames]
        return torch.cat([self._kaldi(row, steps)[None, :frames] for row in rows])

    def _kaldi(self, signal: Tensor, count: int) -> Tensor:
        """At least `count` frames of a signal of `count` shifts (zeros follow), block by block."""
        from torchaudio.compliance.kaldi import fbank

        config = self.config
        signal = nn.functional.pad(signal, (0, config.window))
        parts = []
        for first in range(0, count, self.block_frames):
            last = min(first + self.block_frames, count)
            parts.append(
                fbank(
                    signal[None, first * config.shift : (last - 1) * config.shift + config.window],
                    htk_compat=True,
                    sample_frequency=float(config.sample_rate),
                    use_energy=False,
                    window_type="hanning",
                    num_mel_bins=config.mel_bins,
                    dither=0.0,
                    frame_shift=config.frame_shift,
                )
            )
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def extra_repr(self) -> str:
        return str(self.config)
