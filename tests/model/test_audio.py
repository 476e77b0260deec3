"""Decoding, resampling, streaming and the log-mel front end, each against an independent computation."""

import pickle

import numpy as np
import pytest
import soundfile
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchaudio.compliance import kaldi
from torchaudio.functional import resample as torchaudio_resample

from dass.audio import (
    AudioError,
    LogMel,
    LogMelConfig,
    audio_hash,
    audio_info,
    load_audio,
    resample,
    stream_audio,
)


def noise(samples, seed=0, offset=0.0):
    generator = torch.Generator().manual_seed(seed)
    return 0.1 * torch.randn(samples, generator=generator) + offset


def published(waveform, frames, mean, std, mel_bins=128):
    """The published front end, step by step, of one waveform at 16 kHz."""
    waveform = waveform - waveform.mean()
    fbank = kaldi.fbank(
        waveform[None],
        htk_compat=True,
        sample_frequency=16000,
        use_energy=False,
        window_type="hanning",
        num_mel_bins=mel_bins,
        dither=0.0,
        frame_shift=10,
    )
    if frames is not None:
        fbank = torch.nn.functional.pad(fbank, (0, 0, 0, frames - len(fbank)))[:frames]
    return (fbank - mean) / (2 * std)


@settings(deadline=None, max_examples=25)
@given(
    samples=st.integers(400, 40_000),
    frames=st.none() | st.integers(1, 300),
    mel_bins=st.sampled_from([64, 128]),
    offset=st.sampled_from([0.0, 0.3]),
)
def test_log_mel_is_the_published_front_end(samples, frames, mel_bins, offset):
    config = LogMelConfig(frames=frames, mel_bins=mel_bins)
    waveform = noise(samples, samples, offset)
    expected = published(waveform, frames, config.mean, config.std, mel_bins)
    torch.testing.assert_close(LogMel(config)(waveform), expected, rtol=0, atol=1e-5)


@settings(deadline=None, max_examples=15)
@given(
    lengths=st.lists(st.integers(1, 20_000), min_size=1, max_size=4),
    frames=st.none() | st.integers(1, 150),
    block=st.sampled_from([7, 50, 8192]),
)
def test_padded_batch_equals_one_by_one(lengths, frames, block):
    """Rows end to end in one call, long rows block by block, and padding: none of it shows."""
    log_mel = LogMel(LogMelConfig(frames=frames))
    waveforms = [noise(length, seed, 0.1) for seed, length in enumerate(lengths)]
    padded = torch.nn.utils.rnn.pad_sequence(waveforms, batch_first=True, padding_value=5.0)
    log_mel.block_frames = block
    together = log_mel(padded, lengths=torch.tensor(lengths))
    log_mel.block_frames = 8192
    for row, waveform in zip(together, waveforms, strict=True):
        alone = log_mel(waveform)
        torch.testing.assert_close(row[: len(alone)], alone, rtol=0, atol=1e-4)
        torch.testing.assert_close(row[len(alone) :], torch.full_like(row[len(alone) :], log_mel.config.padding))


@pytest.mark.parametrize("rate", [8000, 11025, 22050, 32000, 44100, 48000])
def test_log_mel_at_any_rate(rate):
    waveform = noise(rate // 2, rate)
    config = LogMelConfig(frames=60)
    expected = published(torchaudio_resample(waveform, rate, 16000), 60, config.mean, config.std)
    torch.testing.assert_close(LogMel(config)(waveform, sample_rate=rate), expected, rtol=0, atol=1e-5)


def test_log_mel_shapes_and_types():
    log_mel = LogMel(LogMelConfig(frames=50))
    stereo = torch.stack([noise(8000, 1), noise(8000, 2)])
    torch.testing.assert_close(log_mel(stereo[None])[0], log_mel(stereo.mean(0)))  # (batch, channels, samples)
    assert log_mel(stereo).shape == (2, 50, 128)  # (batch, samples)
    assert log_mel(stereo.double()).dtype == torch.float64
    assert log_mel(stereo.half()).dtype == torch.float32
    assert LogMel(LogMelConfig(frames=None))(noise(100)).shape == (1, 128)  # shorter than a window: one frame
    assert torch.isfinite(log_mel(torch.zeros(8000))).all()


def test_log_mel_padding_comes_before_normalisation():
    config = LogMelConfig(frames=100, mean=-6.0, std=4.0)
    out = LogMel(config)(noise(4000))
    torch.testing.assert_close(out[-1], torch.full((128,), 0.75))
    assert config.padding == 0.75


@pytest.mark.parametrize(
    ("waveform", "error", "match"),
    [
        (torch.zeros(8000, dtype=torch.int16), TypeError, "int16"),
        (torch.zeros(0), ValueError, "at least one sample"),
        (torch.zeros(1, 1, 1, 8000), ValueError, r"\(1, 1, 1, 8000\)"),
    ],
)
def test_log_mel_refuses(waveform, error, match):
    with pytest.raises(error, match=match):
        LogMel()(waveform)


@pytest.mark.parametrize("field", [{"mel_bins": 0}, {"frames": 0}, {"std": -1.0}, {"sample_rate": 0}])
def test_config_refuses(field):
    with pytest.raises(ValueError, match=next(iter(field))):
        LogMelConfig(**field)


@pytest.fixture
def write(tmp_path):
    def write(name, samples, rate=16000, **options):
        path = tmp_path / name
        soundfile.write(path, np.asarray(samples), rate, **options)
        return path

    return write


@pytest.mark.parametrize(("suffix", "tolerance"), [("wav", 2e-4), ("flac", 2e-4), ("ogg", 0.05), ("mp3", 0.05)])
def test_formats(write, suffix, tolerance):
    tone = 0.5 * torch.sin(torch.arange(32000) * 0.2)
    path = write(f"tone.{suffix}", tone)
    loaded = load_audio(path)
    assert loaded.dtype == torch.float32
    assert abs(len(loaded) - 32000) <= (0 if suffix in ("wav", "flac") else 2400)
    if suffix in ("wav", "flac"):
        torch.testing.assert_close(loaded, tone, rtol=0, atol=tolerance)
    middle = loaded[8000:24000].double()
    spectrum = torch.fft.rfft(middle * torch.hann_window(16000, dtype=torch.float64)).abs()
    assert abs(int(spectrum.argmax()) - 0.2 / (2 * torch.pi) * 16000) < 1.5
    assert abs(middle.square().mean().sqrt().item() - 0.5 / 2**0.5) < tolerance
    info = audio_info(path)
    assert (info.sample_rate, info.channels) == (16000, 1)
    assert abs(info.seconds - 2.0) < 0.15


def test_mixed_down_and_resampled(write):
    left, right = noise(22050, 1), noise(22050, 2)
    path = write("two.wav", torch.stack([left, right], 1), 44100, subtype="FLOAT")
    expected = torchaudio_resample((left + right) / 2, 44100, 16000)
    torch.testing.assert_close(load_audio(path), expected)
    assert audio_info(path).channels == 2


def test_parts_of_a_file(write):
    sound = noise(32000)
    path = write("a.wav", sound, subtype="FLOAT")
    torch.testing.assert_close(load_audio(path, start=0.5, duration=0.25), sound[8000:12000])
    torch.testing.assert_close(load_audio(path, start=1.5, duration=9.0), sound[24000:])
    with pytest.raises(AudioError, match=r"ends at 2\.00 s"):
        load_audio(path, start=2.5)
    part, whole = load_audio(path, sample_rate=8000, duration=0.5), load_audio(path, sample_rate=8000)
    torch.testing.assert_close(part, whole[:4000], rtol=0, atol=1e-6)  # also its last samples


@settings(deadline=None, max_examples=25)
@given(
    rate=st.sampled_from([8000, 11025, 16000, 22050, 32000, 44100, 48000, 44101, 12347]),
    samples=st.integers(1, 30_000),
    block=st.floats(0.003, 1.0),
)
def test_streaming_equals_loading(tmp_path_factory, rate, samples, block):
    path = tmp_path_factory.getbasetemp() / "stream.wav"
    soundfile.write(path, noise(samples, samples).numpy(), rate, subtype="FLOAT")
    blocks = list(stream_audio(path, block=block))
    assert all(len(part) for part in blocks)
    torch.testing.assert_close(torch.cat(blocks), load_audio(path), rtol=0, atol=1e-6)


def test_streaming_block_that_ends_with_the_file(write):
    path = write("even.wav", noise(16000))
    assert [len(part) for part in stream_audio(path, block=0.5)] == [8000, 8000]


@pytest.mark.parametrize("rate", [44101, 12347, 16001, 191999])
def test_odd_rates_keep_pitch_and_length(rate):
    """Coprime rates take the nearest small ratio instead of gigabytes of filter; nobody can hear the difference."""
    time = torch.arange(rate * 2) / rate
    out = resample(torch.sin(2 * torch.pi * 440 * time), rate, 16000)
    assert abs(len(out) - 32000) <= 0.0005 * 32000
    out = torch.nn.functional.pad(out, (0, 32))
    spectrum = torch.fft.rfft(out[:32000].double() * torch.hann_window(32000, dtype=torch.float64)).abs()
    assert spectrum.argmax() == 880


def test_resample_refuses():
    with pytest.raises(ValueError, match="positive"):
        resample(torch.zeros(10), 0, 16000)


def broken_files(folder):
    (folder / "empty.wav").touch()
    (folder / "text.wav").write_text("this is no sound")
    (folder / "folder.wav").mkdir()
    soundfile.write(folder / "none.wav", np.zeros(0), 16000)
    soundfile.write(folder / "nan.wav", np.array([0.0, np.nan]), 16000, subtype="FLOAT")
    return {
        "absent.wav": "no such file",
        "empty.wav": "empty",
        "text.wav": "cannot be decoded",
        "folder.wav": "not a file",
        "none.wav": "no samples",
        "nan.wav": "not finite",
    }


def test_unusable_files_are_named(tmp_path):
    for name, reason in broken_files(tmp_path).items():
        for use in (load_audio, lambda path: list(stream_audio(path))):
            with pytest.raises(AudioError, match=reason) as caught:
                use(tmp_path / name)
            assert name in str(caught.value)
            again = pickle.loads(pickle.dumps(caught.value))  # the way out of a loader worker
            assert (again.path, again.reason) == (caught.value.path, caught.value.reason)
        if name != "nan.wav":
            with pytest.raises(AudioError, match=reason):
                audio_info(tmp_path / name)


def test_hash_is_of_the_audio(write):
    sound = (noise(8000) * 32768).round() / 32768
    wav, flac = write("a.wav", sound), write("b.flac", sound)
    assert audio_hash(load_audio(wav)) == audio_hash(load_audio(flac)) == audio_hash(sound)
    changed = sound.clone()
    changed[100] += 1 / 32768
    assert audio_hash(changed) != audio_hash(sound) != audio_hash(sound[:-1])
