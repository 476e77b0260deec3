"""Ten-second clips of spoken digits for the needle study: `{digit}_{speaker}_{split}{number}.wav`.

A model trained on digits of a second each has never met a digit in ten seconds of something else, and loses it there. In
these clips, as long as the published models' (1024 frames), a speaker says one digit one to six times, at random places,
in silence, white or pink noise (half in silence; SNR 10 to 30 dB over the spoken stretches). The words are the recordings
of the Free Spoken Digit Dataset; takes 0 to 4 go into held-out clips only, all others into training clips only.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

RATE = 8000  # Hz, that of the recordings
SAMPLES = 1023 * RATE // 100 + RATE // 40  # 1024 frames
HELD_OUT_TAKES = 5
TRAINING_CLIPS, HELD_OUT_CLIPS = 960, 300
MOST_WORDS = 6


def build_corpus(recordings: Path, folder: Path, seed: int = 0) -> Path:
    """Writes the clips to `folder` where they are not there; returns it. The same seed gives the same clips."""
    import soundfile

    if folder.is_dir():
        return folder
    words: dict[tuple[str, str, bool], list[Path]] = {}
    for path in sorted(recordings.glob("*.wav")):
        digit, speaker, take = path.stem.split("_")
        words.setdefault((digit, speaker, int(take) < HELD_OUT_TAKES), []).append(path)
    unfinished = folder.with_name(folder.name + ".part")
    unfinished.mkdir(parents=True, exist_ok=True)
    for held_out, name, count in ((False, "train", TRAINING_CLIPS), (True, "test", HELD_OUT_CLIPS)):
        voices = [key for key in words if key[2] == held_out]
        for number in range(count):
            random = np.random.default_rng([seed, held_out, number])
            voice = voices[number % len(voices)]
            takes = [words[voice][index] for index in random.integers(len(words[voice]), size=MOST_WORDS)]
            sound = clip([soundfile.read(path, dtype="float32")[0] for path in takes], random)
            target = unfinished / f"{voice[0]}_{voice[1]}_{name}{number:03d}.wav"
            soundfile.write(target, sound, RATE, subtype="PCM_16")
    unfinished.rename(folder)
    return folder


def clip(words: list[np.ndarray], random: np.random.Generator) -> np.ndarray:
    """(SAMPLES,) of one to all of the words, in their order, at random places that do not overlap, in noise or silence."""
    from dass.noise import noise_blocks

    words = words[: random.integers(len(words)) + 1]
    while sum(word.size for word in words) > SAMPLES:
        words = words[:-1]
    room = SAMPLES - sum(word.size for word in words)
    gaps = np.diff(np.sort(random.integers(room + 1, size=len(words))), prepend=0)
    sound, place = np.zeros(SAMPLES, np.float32), 0
    for gap, word in zip(gaps, words, strict=True):
        sound[place + gap : place + gap + word.size] = word
        place += gap + word.size
    colour, snr, key = random.choice(["", "", "white", "pink"]), random.uniform(10, 30), int(random.integers(2**62))
    if colour:
        level = np.sqrt(np.mean(np.square(np.concatenate(words), dtype=np.float64)))
        noise = np.concatenate(list(noise_blocks(colour, key, SAMPLES)))
        sound += noise * np.float32(level * 10 ** (-snr / 20))
    return sound * np.float32(min(1.0, 0.99 / np.abs(sound).max()))
