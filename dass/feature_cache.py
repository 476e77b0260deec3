"""An optional cache on disk of decoded, resampled clips and their log-mel features.

An entry is keyed by what the file holds and by the front end's settings, never by its name or date: an edited file or
another setting is another entry, a renamed or copied file the same. Entries are written whole or not at all; an
unreadable one counts as absent.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Literal

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from dass.audio import AudioError, LogMelConfig
from dass.checkpoint import atomic_write

LAYOUT = 1  # raised whenever what an entry holds changes


class FeatureCache:
    """Clips before augmentation and normalisation, under `folder`; about 115 kB for a second of audio."""

    def __init__(self, folder: str | Path, front_end: LogMelConfig):
        self.folder = Path(folder)
        self.front_end = front_end
        numbers = (front_end.sample_rate, front_end.mel_bins, front_end.frame_shift, front_end.frames)
        self._settings = f"{LAYOUT} {numbers}\0".encode()

    def path(self, file: Path) -> Path:
        """Where the entry of a sound file lies, whether it exists or not."""
        try:
            content = file.read_bytes()
        except OSError as error:
            raise AudioError(file, f"cannot be opened ({error})") from None
        key = hashlib.blake2b(self._settings + content, digest_size=16).hexdigest()
        return self.folder / key[:2] / f"{key}.safetensors"

    def get(self, entry: Path, kind: Literal["waveform", "fbank"]) -> tuple[Tensor, str] | None:
        """`(what was put, audio hash)`, or None where there is no readable entry; only that kind is read from disk."""
        if not entry.is_file():
            return None
        try:
            with safe_open(entry, framework="pt") as file:
                return file.get_tensor(kind), file.metadata()["audio_hash"]
        except (SafetensorError, OSError, KeyError, TypeError):
            return None

    def put(self, entry: Path, *, waveform: Tensor, fbank: Tensor, audio_hash: str) -> None:
        """Writes an entry; several processes may write the same one.

        waveform: `(samples,)` float32 at the front end's rate, cut to its frames. fbank: `(frames, mel_bins)` log-mel of
        it, without padding.
        """
        tensors = {"waveform": waveform.contiguous(), "fbank": fbank.contiguous()}
        atomic_write(entry, save(tensors, {"audio_hash": audio_hash}))
