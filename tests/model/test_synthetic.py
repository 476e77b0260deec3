"""The built-in corpus: pure, labelled as it sounds, and with classes that are what their names say."""

import dataclasses
import functools
import itertools

import numpy as np
import pytest
import soundfile
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dass.synthetic import EVENTS, RATE, SyntheticConfig, SyntheticCorpus, synthetic_classes, write_examples

MAKE = {event.make.__name__: event.make for event in EVENTS}


@settings(deadline=None, max_examples=20)
@given(index=st.integers(0, 19_999), seed=st.integers(0, 2**40), split=st.sampled_from(["train", "eval"]))
def test_a_clip_is_a_function_of_its_number(index, seed, split):
    config = SyntheticConfig(seed=seed, eval_clips=20_000)
    clip = SyntheticCorpus(config, split).load(index)
    assert torch.equal(clip, SyntheticCorpus(config, split).load(index))
    assert clip.shape == (round(config.seconds * RATE),)
    assert clip.dtype == torch.float32
    assert torch.isfinite(clip).all()
    assert 10 ** (-18.01 / 20) <= clip.abs().max() <= 1
    labels = SyntheticCorpus(config, split).labels(index)
    assert labels == tuple(sorted(set(labels)))
    assert 1 <= len(labels) <= config.max_events


def test_splits_seeds_and_numbers_differ():
    clips = [
        SyntheticCorpus(SyntheticConfig(seed=seed), split).load(index)
        for seed in (0, 1)
        for split in ("train", "eval")
        for index in (0, 1)
    ]
    for i, first in enumerate(clips):
        assert not any(torch.allclose(first, second) for second in clips[:i])


def test_classes_are_even_and_numerous():
    corpus = SyntheticCorpus()
    assert len(synthetic_classes()) >= 10
    assert [entry.index for entry in corpus.classes] == list(range(len(EVENTS)))
    found = [corpus.labels(index) for index in range(1500)]
    counts = np.bincount([label for labels in found for label in labels], minlength=len(EVENTS))
    assert counts.min() > 0.7 * counts.mean()
    assert abs(np.mean([len(labels) for labels in found]) - 2) < 0.1


def test_labels_are_the_events_that_sound(monkeypatch):
    made = []

    def spy(event):
        @functools.wraps(event.make)
        def make(samples, random):
            made.append(event.make.__name__)
            return event.make(samples, random)

        return dataclasses.replace(event, make=make)

    monkeypatch.setattr("dass.synthetic.EVENTS", tuple(map(spy, EVENTS)))
    corpus = SyntheticCorpus()
    for index in range(20):
        made.clear()
        corpus.load(index)
        assert sorted(made) == sorted(corpus.classes[label].id for label in corpus.labels(index))


def spectrogram(sound, window=512):
    frames = torch.from_numpy(np.ascontiguousarray(sound)).unfold(0, window, window // 2)
    return torch.fft.rfft(frames * torch.hann_window(window)).abs().numpy()  # (frames, bins)


def sounds(name, count=8, seconds=1.2):
    return [MAKE[name](int(seconds * RATE), np.random.default_rng([7, i])) for i in range(count)]


def peak_pitch(sound, below=2600):
    """Frequency [Hz] of the strongest partial over time, for tones whose lowest partial is the strongest."""
    spectrum = spectrogram(sound)[:, : below * 512 // RATE]
    return spectrum.argmax(1) * RATE / 512


@pytest.mark.parametrize("name", list(MAKE))
def test_every_event_is_a_plain_waveform(name):
    for seconds in (0.3, 1.5):
        for sound in sounds(name, 4, seconds):
            assert sound.dtype == np.float32
            assert sound.shape == (int(seconds * RATE),)
            assert np.isfinite(sound).all()
            assert np.abs(sound).max() > 0.05


def test_sweeps_go_where_they_say():
    for name, sign in (("sweep_up", 1), ("sweep_down", -1)):
        for sound in sounds(name):
            spectrum = spectrogram(sound)[2:-2]
            centre = (spectrum * np.arange(257)).sum(1) / spectrum.sum(1)
            assert sign * np.log2(centre[-1] / centre[0]) > 0.8
            assert np.mean(sign * np.diff(centre) > 0) > 0.7


def test_siren_goes_both_ways_and_a_trill_jumps():
    for sound in sounds("siren"):
        steps = np.diff(peak_pitch(sound))
        assert (steps > 0).sum() > 5
        assert (steps < 0).sum() > 5
    for sound in sounds("trill"):
        spectrum = spectrogram(sound, 1024).max(0)  # two pitches, 4 to 7 semitones apart, above 2 kHz
        found = np.flatnonzero(spectrum > 0.4 * spectrum.max()) * RATE / 1024
        assert found.min() > 2000
        assert 1.15 < found.max() / found.min() < 1.6


def test_beeps_stop_and_go_on_one_pitch():
    for sound in sounds("beeps"):
        level = np.abs(sound[: len(sound) // 160 * 160]).reshape(-1, 160).max(1)
        assert 0.35 < np.mean(level < 0.01 * level.max()) < 0.65
        assert 3 <= np.sum((level[1:] > 0) & (level[:-1] == 0)) + 1 <= 9


def test_buzz_is_harmonic_and_bell_is_not():
    def distance_from_harmonics(sound):
        spectrum = np.abs(np.fft.rfft(sound * np.hanning(len(sound))))
        peaks = [
            i for i in range(2, len(spectrum) - 1)
            if spectrum[i] > 0.05 * spectrum.max() and spectrum[i] >= spectrum[i - 2 : i + 3].max()
        ]  # fmt: skip
        ratios = np.array(peaks[1:]) / peaks[0]
        return np.abs(ratios - ratios.round()).max()

    assert all(distance_from_harmonics(sound) < 0.06 for sound in sounds("buzz"))
    assert all(distance_from_harmonics(sound) > 0.2 for sound in sounds("bell"))


@pytest.mark.parametrize("name", ["bell", "burst"])
def test_struck_sounds_die_away(name):
    for sound in sounds(name):
        energy = np.square(sound).reshape(4, -1).sum(1)
        assert energy[0] > 4 * energy[3]
        assert np.square(sound[:800]).mean() > np.square(sound).mean()  # and start at once


def onsets(sound, smooth):
    """Moments [s] at which the level, smoothed over `smooth` seconds, passes a third of its maximum."""
    level = np.convolve(np.abs(sound), np.ones(int(smooth * RATE)), "same")
    loud = level > level.max() / 3
    return np.flatnonzero(loud[1:] & ~loud[:-1]) / RATE


def test_clicks_are_even_and_the_ball_quickens():
    for sound in sounds("clicks"):
        gaps = np.diff(onsets(sound, 0.005))
        assert len(gaps) >= 8
        assert gaps.std() < 0.1 * gaps.mean()
    for sound in sounds("bouncing"):
        gaps = np.diff(onsets(sound, 0.03))[:4]
        assert len(gaps) >= 3
        assert (np.diff(gaps) < 0).all(), gaps


def test_chuffing_swells():
    for sound in sounds("chuffing"):
        level = np.square(sound[: len(sound) // 320 * 320]).reshape(-1, 320).mean(1)
        assert np.quantile(level, 0.9) > 20 * np.quantile(level, 0.1)


def test_warble_trembles():
    for sound in sounds("warble"):
        pitch = peak_pitch(sound, 1300)
        assert 0.04 < np.log2(pitch[2:-2]).std() < 0.6


def test_level_above_the_floor():
    """An event at 60 dB is the clip; one at -60 dB is not to be found in it."""
    loud = SyntheticCorpus(SyntheticConfig(max_events=1, snr_low=60, snr_high=60))
    soft = SyntheticCorpus(SyntheticConfig(max_events=1, snr_low=-60, snr_high=-60))

    def contrast(clip):
        energy = clip.square().view(-1, 1600).mean(1)
        return (energy.max() / energy.min()).item()

    assert all(contrast(loud.load(i)) > 1e4 for i in range(8))
    assert all(contrast(soft.load(i)) < 10 for i in range(8))


def test_examples_can_be_heard(tmp_path):
    written = write_examples(tmp_path / "new" / "folder")
    assert {path.stem for path in written} >= set(MAKE)
    assert len(written) == len(EVENTS) + 5
    for path in written:
        sound, rate = soundfile.read(path)
        assert rate == RATE
        assert 0.01 < np.abs(sound).max() <= 1


@pytest.mark.parametrize(
    "field", [{"max_events": 0}, {"max_events": 99}, {"seconds": 1.0}, {"snr_low": 99.0}, {"train_clips": 0}]
)
def test_config_refuses(field):
    with pytest.raises(ValueError, match=f"synthetic.{next(iter(field))}"):
        SyntheticConfig(**field)


def test_the_splits_share_no_clip():
    train, held_out, test = (SyntheticCorpus(split=split) for split in ("train", "eval", "test"))
    assert (len(train), len(held_out), len(test)) == (20_000, 400, 400)
    sounds = [corpus.load(index) for corpus in (train, held_out, test) for index in range(3)]
    for first, second in itertools.combinations(sounds, 2):
        assert abs(np.corrcoef(first, second)[0, 1]) < 0.2


def test_corpus_refuses():
    with pytest.raises(ValueError, match="split"):
        SyntheticCorpus(split="dev")
    with pytest.raises(IndexError, match="20000"):
        SyntheticCorpus().load(20_000)
    with pytest.raises(ValueError, match="16000 Hz"):
        SyntheticCorpus().load(0, sample_rate=8000)
