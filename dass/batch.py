"""A batch of examples as the trainer and the evaluator get it."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from dass.audio import AudioError, LogMel
from dass.augment import roll_and_mask, warp_and_stretch


@dataclass(frozen=True)
class Batch:
    """Examples of one step. All tensors share the first axis, `batch`.

    With `DataConfig.features == "device"` the waveform is there and `fbank` is None until `with_features` is called;
    calling it is right in either case.
    """

    target: Tensor
    """(batch, classes) float32: 1 for a label, its share in a mixture."""
    index: Tensor
    """(batch,) int64: clip of the dataset; after a broken file, the clip that took its place."""
    mix_index: Tensor
    """(batch,) int64: clip that was mixed in, -1 for none."""
    mix_lambda: Tensor
    """(batch,) float32: share of the first clip, 1 where none was mixed in."""
    fbank: Tensor | None = None
    """(batch, frames, mel_bins) float32, augmented and normalised."""
    waveform: Tensor | None = None
    """(batch, samples) float32, mixed, without mean, zero-padded to the longest; only where asked for (`waveforms`
    or features on the device)."""
    lengths: Tensor | None = None
    """(batch,) int64: samples of each waveform."""
    warp: Tensor | None = None
    """(batch,) float32: factor on all frequencies, still to be applied."""
    stretch: Tensor | None = None
    """(batch,) float32: factor on the duration, still to be applied."""
    roll: Tensor | None = None
    """(batch,) int64: frames to shift by, still to be applied."""
    keep_mel: Tensor | None = None
    """(batch, mel_bins) bool: mask over frequency, still to be applied."""
    keep_time: Tensor | None = None
    """(batch, frames) bool: mask over time, still to be applied."""
    audio_hashes: tuple[str, ...] = ()
    """Identity of each clip's audio, where the dataset was asked for it (`hashes=True`)."""
    mix_hashes: tuple[str, ...] = ()
    """Identity of each mixed-in clip's audio, "" for none."""
    broken: tuple[AudioError, ...] = ()
    """Files that could not be read while this batch was made."""

    def __len__(self) -> int:
        return len(self.index)

    def _map(self, function) -> Batch:
        tensors = {f.name: getattr(self, f.name) for f in fields(self)}
        return replace(self, **{name: function(t) for name, t in tensors.items() if isinstance(t, Tensor)})

    def to(self, device: torch.device | str, non_blocking: bool = True) -> Batch:
        """The batch on another device."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> Batch:
        """The batch in page-locked memory, from which a GPU copies without waiting."""
        return self._map(Tensor.pin_memory)

    def with_features(self, log_mel: LogMel) -> Batch:
        """The batch with `fbank`, computed where the waveforms are, unless the loader has done it."""
        if self.fbank is not None:
            return self
        return replace(self, fbank=log_mel.filter_bank(self.waveform, lengths=self.lengths)).augmented(log_mel)

    def augmented(self, log_mel: LogMel) -> Batch:
        """The batch with its raw spectrograms changed by what is still to be applied, and normalised."""
        fbank = warp_and_stretch(self.fbank, self.warp, self.stretch, log_mel.config)
        fbank = log_mel.normalise(roll_and_mask(fbank, self.roll, self.keep_mel, self.keep_time))
        return replace(self, fbank=fbank, warp=None, stretch=None, roll=None, keep_mel=None, keep_time=None)
