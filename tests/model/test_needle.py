"""Needles and haystacks: exact placement, exact level, the same bits for the same seed, nothing held as a whole."""

import hashlib
import subprocess
import sys
import tracemalloc
from dataclasses import replace

import numpy as np
import pytest
import soundfile
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dass import noise
from dass.audio import LogMel, LogMelConfig
from dass.haystack import HAYSTACKS, LEVELLED, MEAN_SPECTRUM, Haystack, HaystackError, Utterances
from dass.needle import ListenConfig, Scene, frames_for, spectrogram_blocks, start_frame, write_scene
from dass.synthetic import SyntheticConfig, SyntheticCorpus

RATE = 16000
FRONT_END = LogMelConfig(frames=60)
LOG_MEL = LogMel(FRONT_END)
SHIFT, WINDOW = FRONT_END.shift, FRONT_END.window


def whole(blocks):
    return np.concatenate(list(blocks))


def digest(array):
    return hashlib.blake2b(np.ascontiguousarray(array).astype("<f8").tobytes(), digest_size=8).hexdigest()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Sounds of several rates and lengths, one of them broken."""
    folder = tmp_path_factory.mktemp("sounds")
    random = np.random.default_rng(5)
    for number, (rate, seconds) in enumerate([(8000, 0.9), (16000, 2.0), (44100, 0.3), (16000, 11.0)]):
        envelope = np.repeat(random.uniform(0.01, 0.3, 20), int(rate * seconds / 20))
        soundfile.write(folder / f"{number}.wav", envelope * random.standard_normal(envelope.size), rate)
    (folder / "broken.wav").write_bytes(b"RIFF")
    return folder


@pytest.fixture(scope="module")
def corpus():
    return SyntheticCorpus(SyntheticConfig(eval_clips=30), "eval")


def make(kind, folder=None, corpus=None, **options):
    options.setdefault("clip", 3)
    labels = corpus.labels(options["clip"]) if corpus is not None else ()
    return Haystack(kind, folder=folder, clips=corpus, labels=labels, **options)


def needle(seconds=0.5, seed=0):
    return torch.from_numpy(0.1 * np.random.default_rng(seed).standard_normal(int(seconds * RATE)).astype(np.float32))


# --- noise ------------------------------------------------------------------------------------------------------------


def test_noise_is_the_same_on_every_machine():
    """Sums of whole numbers and dyadic fractions: these digests hold whatever the processor or library."""
    key = noise.key_of("haystack", 0, "white", 0)
    assert noise.random_words(7, 5, 3).tolist() == noise.random_words(7, 0, 8)[5:].tolist()
    assert digest(noise.white_noise(key, 1000, 5000)) == "5c9abc257548ed4f"
    assert digest(noise.pink_noise(key, 1000, 5000)) == "a63cf0a75c41a89a"
    for values in (noise.white_noise(key, 0, 5000), noise.pink_noise(key, 0, 5000)):
        assert (values * 2**17 == np.round(values * 2**17)).all(), "a dyadic fraction, so nothing was rounded"
        assert np.abs(values).max() * 2**17 < 2**52


@given(st.integers(0, 2**63), st.integers(0, 10**13), st.integers(1, 3000), st.data())
@settings(deadline=None, max_examples=30)
def test_noise_may_be_had_from_any_sample(key, first, count, data):
    skipped = data.draw(st.integers(0, count - 1))
    for make_noise in (noise.white_noise, noise.pink_noise):
        assert (make_noise(key, first, count)[skipped:] == make_noise(key, first + skipped, count - skipped)).all()


@pytest.mark.parametrize("colour, slope", [("white", 0.0), ("pink", -1.0)])
def test_noise_has_its_colour_and_unit_power(colour, slope):
    from scipy.signal import welch

    sound = whole(noise.noise_blocks(colour, 1, 60 * RATE))
    assert sound.dtype == np.float32 and np.sqrt(np.mean(sound.astype(np.float64) ** 2)) == pytest.approx(1, abs=0.02)
    assert abs(sound.mean()) < 0.05
    frequency, power = welch(sound, RATE, nperseg=1 << 13)
    edges = 40 * 2.0 ** np.arange(0, 7.5, 0.5)
    bands = [power[(frequency >= a) & (frequency < b)].mean() for a, b in zip(edges, edges[1:], strict=False)]
    levels = 10 * np.log10(bands) - 10 * slope * np.log10(np.sqrt(edges[1:] * edges[:-1]))
    assert levels.max() - levels.min() < 1.5


# --- haystacks --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [kind for kind in HAYSTACKS if kind != MEAN_SPECTRUM])
def test_a_haystack_is_decided_by_its_seed_and_a_longer_one_begins_with_the_shorter(kind, folder, corpus):
    long = whole(make(kind, folder, corpus).blocks(5 * RATE))
    assert long.dtype == np.float32 and long.size == 5 * RATE
    assert np.array_equal(long, whole(make(kind, folder, corpus).blocks(5 * RATE)))
    assert np.array_equal(long[: 2 * RATE + 7], whole(make(kind, folder, corpus).blocks(2 * RATE + 7)))
    if kind != "silence":
        assert not np.array_equal(long, whole(make(kind, folder, corpus, seed=1).blocks(5 * RATE)))
        assert not np.array_equal(long, whole(make(kind, folder, corpus, clip=4).blocks(5 * RATE)))
        assert np.isfinite(long).all() and np.abs(long).max() > 0


def test_another_process_makes_the_same_haystack():
    program = (
        "import numpy as np, hashlib; from dass.haystack import Haystack\n"
        "sound = np.concatenate(list(Haystack('pink', seed=9, clip=2).blocks(50000)))\n"
        "print(hashlib.sha256(sound.tobytes()).hexdigest())"
    )
    here = hashlib.sha256(whole(Haystack("pink", seed=9, clip=2).blocks(50000)).tobytes()).hexdigest()
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == here


@pytest.mark.parametrize("kind", LEVELLED)
def test_what_was_made_for_the_level_is_the_same_when_read_again(kind, folder, corpus):
    haystack = make(kind, folder, corpus)
    expected = whole(haystack.blocks(4 * RATE))
    level = haystack.level(3 * RATE)
    assert level == pytest.approx(np.sqrt(np.mean(expected[: 3 * RATE].astype(np.float64) ** 2)))
    for samples in (2 * RATE, 3 * RATE, 4 * RATE):  # from the file, and beyond it
        assert np.array_equal(whole(haystack.blocks(samples)), expected[:samples])


def test_recordings_are_streamed_and_their_joins_do_not_click(tmp_path):
    for number, level in enumerate((0.5, -0.5)):
        soundfile.write(tmp_path / f"{number}.wav", np.full(RATE, level), RATE)
    sound = whole(make("recording", tmp_path).blocks(20 * RATE))
    assert np.abs(np.diff(sound)).max() < 0.02 and np.abs(sound).max() == pytest.approx(0.5)


def test_other_clips_share_no_class_with_the_needle(corpus):
    haystack = make("other-clips", corpus=corpus)
    own = set(corpus.labels(3))
    others = haystack._others()
    assert others and all(own.isdisjoint(corpus.labels(index)) for index in others)
    assert set(others) == {i for i in range(len(corpus)) if own.isdisjoint(corpus.labels(i))}


def test_utterances_are_kept_up_to_a_size(folder):
    kept = Utterances(limit=4 * 4 * RATE)
    first = kept.read(folder / "0.wav", RATE)  # 0.9 s
    assert kept.read(folder / "0.wav", RATE) is first
    kept.read(folder / "1.wav", RATE)  # 2 s
    assert kept.read(folder / "0.wav", RATE) is first
    kept.read(folder / "3.wav", RATE)  # 11 s: more than all that may be kept
    assert kept.size == sum(sound.nbytes for sound in kept.sounds.values()) <= 4 * 4 * RATE
    assert np.array_equal(kept.read(folder / "0.wav", RATE), first)


def test_babble_has_the_power_of_its_talkers(folder):
    assert make("babble", folder, talkers=4).level(20 * RATE) == pytest.approx(1, abs=0.2)


def test_what_a_haystack_needs_is_said(tmp_path, folder):
    for options, words in (
        (dict(kind="blue"), "mean-spectrum"),
        (dict(kind="babble"), "--babble"),
        (dict(kind="recording"), "--recording"),
        (dict(kind="other-clips"), "evaluation set"),
    ):
        with pytest.raises(HaystackError, match=words):
            Haystack(**options)
    with pytest.raises(HaystackError, match="no sound file"):
        list(Haystack("babble", folder=tmp_path).blocks(10))
    with pytest.raises(HaystackError, match="no waveform"):
        Haystack(MEAN_SPECTRUM).blocks(10)
    soundfile.write(tmp_path / "quiet.wav", np.zeros(RATE), RATE)
    with pytest.raises(HaystackError, match="is silent"):
        list(Haystack("babble", folder=tmp_path).blocks(10))


# --- placement --------------------------------------------------------------------------------------------------------


@given(st.integers(1, 10**6), st.data())
def test_positions_are_monotone_and_the_last_ones_flush(frames, data):
    length = data.draw(st.integers(1, frames))
    positions = sorted(data.draw(st.lists(st.floats(0, 1), min_size=1, max_size=20)))
    starts = [start_frame(frames, length, position) for position in positions]
    assert starts == sorted(starts)
    assert start_frame(frames, length, 0.0) == 0
    assert start_frame(frames, length, 1.0) == frames - length
    for position, start in zip(positions, starts, strict=True):
        assert start == frames - length or abs(start - position * frames) <= 0.5


def test_a_needle_that_does_not_fit_or_a_position_outside_is_refused():
    for arguments in ((10, 11, 0.5), (10, 0, 0.5), (10, 5, -0.1), (10, 5, 1.1)):
        with pytest.raises(ValueError):
            start_frame(*arguments)


def test_ten_seconds_are_the_published_1024_frames():
    published = LogMelConfig()
    assert [frames_for(seconds, published, 1024) for seconds in (10, 50, 9000)] == [1024, 5000, 900_000]
    assert frames_for(10, FRONT_END, 60) == 1000


@pytest.mark.parametrize("kind", HAYSTACKS)
@pytest.mark.parametrize("placing", ["replace", "overlay"])
def test_the_haystack_with_the_needle_removed_is_the_haystack(kind, placing, folder, corpus):
    if kind == MEAN_SPECTRUM and placing == "overlay":
        with pytest.raises(HaystackError, match="no waveform"):
            Scene(needle(), make(kind), 300, LOG_MEL, placing=placing)
        return
    positions = (0.0, 0.37, 0.81, 1.0)
    haystack = make(kind, folder, corpus)
    scene = Scene(
        needle(), haystack, 300, LOG_MEL, snr=5.0 if haystack.levelled else None, placing=placing, positions=positions
    )
    alone = scene.remove().clone()
    assert alone.shape == (300, 128) and torch.isfinite(alone).all()
    for position in positions:
        start = scene.start(position)
        fbank = scene.move(position)
        first, last = scene.touched(start) if placing == "overlay" else (start, start + 60)
        assert torch.equal(fbank[:first], alone[:first]) and torch.equal(fbank[last:], alone[last:])
        if placing == "replace":
            assert torch.equal(fbank[start : start + 60], LOG_MEL(needle()))
        else:
            assert all(not torch.equal(fbank[row], alone[row]) for row in range(first + 1, last - 1))
    assert torch.equal(scene.remove(), alone)
    if kind == MEAN_SPECTRUM:
        assert (alone == 0).all()


@pytest.mark.parametrize("placing", ["replace", "overlay"])
@pytest.mark.parametrize("position", [0.0, 0.5, 0.93, 1.0])
def test_the_spectrogram_is_that_of_the_waveform(placing, position):
    """Frame by frame: the needle's first sample is that of its first frame, nothing is off by one."""
    clip = needle(0.615)  # as long as 60 frames reach
    assert clip.numel() >= LOG_MEL.config.samples
    scene = Scene(clip, make("pink"), 400, LOG_MEL, snr=0.0, placing=placing, positions=(position,))
    waveform = torch.from_numpy(whole(scene.waveform_blocks(position)))
    expected = LogMel(replace(FRONT_END, frames=None))(waveform)
    start = scene.start(position)
    inside = torch.zeros(400, dtype=torch.bool)
    inside[:] = True
    if placing == "replace":  # frames over the edges of the needle see both sounds only in the waveform
        inside[max(start - 2, 0) : start] = False
        inside[start + 60 : start + 63] = False
    difference = (scene.move(position) - expected).abs().amax(1)
    assert difference[inside].max() < 2e-4


@given(snr=st.floats(-30, 40), seed=st.integers(0, 5), kind=st.sampled_from(LEVELLED))
@settings(deadline=None, max_examples=20)
def test_the_snr_is_as_asked(snr, seed, kind, folder, corpus):
    clip = needle(0.5, seed)
    scene = Scene(
        clip, make(kind, folder, corpus, seed=seed), 250, LOG_MEL, snr=snr, placing="overlay", positions=(0.3,)
    )
    background = whole(scene.haystack_blocks()).astype(np.float64)
    measured = 20 * np.log10(np.sqrt(np.mean(clip.double().numpy() ** 2)) / np.sqrt(np.mean(background**2)))
    assert measured == pytest.approx(snr, abs=0.01)
    mixture = whole(scene.waveform_blocks(0.3)).astype(np.float64)
    first = scene.start(0.3) * SHIFT
    mixture[first : first + clip.numel()] -= clip.numpy()
    scale = max(np.abs(background).max(), clip.abs().max().item())
    assert np.abs(mixture - background).max() < 1e-6 * scale


def test_the_level_does_not_depend_on_the_position_and_nothing_on_the_seconds_before():
    scene = Scene(needle(), make("white"), 200, LOG_MEL, snr=3.0)
    first = scene.move(0.2).clone()
    scene.move(0.9)
    assert torch.equal(scene.move(0.2), first)
    again = Scene(needle(), make("white"), 200, LOG_MEL, snr=3.0)
    again.move(0.9)
    assert torch.equal(again.move(0.2), first)


@given(st.lists(st.integers(1, 5000), min_size=1, max_size=12), st.integers(1, 40))
@settings(deadline=None, max_examples=25)
def test_a_streamed_spectrogram_is_that_of_the_whole(sizes, at_once):
    sound = 0.1 * np.random.default_rng(sum(sizes)).standard_normal(sum(sizes) + WINDOW).astype(np.float32)
    blocks = np.split(sound, np.cumsum(sizes)[:-1])
    streamed = torch.cat(list(spectrogram_blocks(LOG_MEL, blocks, at_once)))
    expected = LogMel(replace(FRONT_END, frames=None))(torch.from_numpy(sound))
    assert streamed.shape == expected.shape
    difference = (streamed - expected).abs()  # of logs: large only where a mel band is nearly empty
    assert difference.max() < 1e-2 and difference.mean() < 1e-5


def test_a_short_clip_is_the_needle_that_the_front_end_makes_of_it():
    short = needle(0.2)
    scene = Scene(short, make(MEAN_SPECTRUM), 100, LOG_MEL)
    assert torch.equal(scene.move(0.1)[10:70], LOG_MEL(short))
    assert scene.needle_frames == 60
    free = Scene(short, make(MEAN_SPECTRUM), 100, LogMel(replace(FRONT_END, frames=None)))
    assert free.needle_frames == FRONT_END.frames_of(short.numel())


def test_wrong_scenes_are_refused(folder):
    with pytest.raises(ValueError, match="needs an SNR|needs SNR"):
        Scene(needle(), make("white"), 200, LOG_MEL)
    with pytest.raises(ValueError, match="has no SNR"):
        Scene(needle(), make("silence"), 200, LOG_MEL, snr=1.0)
    with pytest.raises(ValueError, match="60"):
        Scene(needle(), make("silence"), 59, LOG_MEL)
    with pytest.raises(ValueError, match="every position"):
        Scene(needle(), make("white"), 200, LOG_MEL, snr=1.0, placing="overlay", positions=(0.5,)).move(0.1)


@pytest.mark.parametrize("kind", LEVELLED)
def test_a_haystack_is_never_held_as_a_whole(kind, folder, corpus, monkeypatch):
    """What numpy allocates at most does not grow with the length (160 s more are 10 MB)."""
    monkeypatch.setattr("dass.haystack.BLOCK", 1 << 13)
    peaks = []
    for seconds in (20, 180):
        haystack = make(kind, folder, corpus)
        tracemalloc.start()
        for _ in haystack.blocks(seconds * RATE):
            pass
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < peaks[0] + 6_000_000


def test_the_front_end_sees_one_block_at_a_time():
    longest = 0

    class Spy(LogMel):
        def forward(self, waveform, *arguments):
            nonlocal longest
            longest = max(longest, waveform.numel())
            return torch.zeros(self.config.frames_of(waveform.numel()), 1)

    import dass.needle

    blocks = (np.zeros(1 << 17, np.float32) for _ in range(200))
    original, dass.needle.LogMel = dass.needle.LogMel, Spy
    try:
        frames = sum(len(part) for part in spectrogram_blocks(LOG_MEL, blocks))
    finally:
        dass.needle.LogMel = original
    assert frames == FRONT_END.frames_of(200 << 17)
    assert longest == (dass.needle.FRAMES_AT_ONCE - 1) * SHIFT + WINDOW


def test_a_scene_to_listen_to(tmp_path, capsys):
    soundfile.write(tmp_path / "clip.wav", needle(1.0).numpy(), RATE)
    message = write_scene(
        ListenConfig(clip=tmp_path / "clip.wav", out=tmp_path / "scene.wav", seconds=4, position=0.5, snr=20)
    )
    sound, rate = soundfile.read(tmp_path / "scene.wav")
    assert rate == RATE and sound.size == 399 * SHIFT + WINDOW and "2.00 s" in message
    levels = [np.sqrt(np.mean(part**2)) for part in (sound[:RATE], sound[2 * RATE : 3 * RATE])]
    assert 20 * np.log10(levels[1] / levels[0]) == pytest.approx(20, abs=1.5)
    into = ListenConfig(clip=tmp_path / "clip.wav", out=tmp_path / "new" / "scene.flac", seconds=2)
    assert "scene.flac" in write_scene(into) and into.out.is_file(), "its folder is made"
    with pytest.raises(ValueError, match="must end in .wav or .flac, got .*scene.txt"):
        write_scene(replace(into, out=tmp_path / "scene.txt"))
