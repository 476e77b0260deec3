"""Augmentation: what is drawn, and what is done with it, against plain loops and the recipe's statistics."""

import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dass.audio import LogMel, LogMelConfig
from dass.augment import (
    NO_AUGMENTATION,
    AugmentConfig,
    draw,
    mix_targets,
    mix_waveforms,
    no_draw,
    roll_and_mask,
    warp_and_stretch,
)

FRONT_END = LogMelConfig()


def draws(config, count=300, front_end=FRONT_END, clips=50):
    return [draw(config, front_end, clips, np.random.default_rng([9, i])) for i in range(count)]


def test_the_defaults_are_the_published_recipe():
    config = AugmentConfig()
    found = draws(config, 600)
    mixed = [d for d in found if d.mix_index >= 0]
    assert abs(len(mixed) / 600 - 0.5) < 0.08
    shares = np.array([d.mix_lambda for d in mixed])
    # Beta(10, 10): mean 1/2, variance 1/84
    assert abs(shares.mean() - 0.5) < 0.03
    assert abs(shares.std() - 84**-0.5) < 0.02
    assert {d.mix_index for d in mixed} == set(range(50))
    assert all(d.mix_lambda == 1.0 for d in found if d.mix_index < 0)
    bands = np.array([(~d.keep_mel).sum().item() for d in found])
    stretches = np.array([(~d.keep_time).sum().item() for d in found])
    # widths are uniform below 48 of 128 bins and 192 of 1024 frames
    assert bands.max() in (45, 46, 47)
    assert abs(bands.mean() - 23.5) < 2.5
    assert 180 <= stretches.max() < 192
    assert abs(stretches.mean() - 95.5) < 10
    assert all(d.gain == 1.0 and d.roll == 0 for d in found)


def test_masks_are_one_stretch_anywhere():
    found = draws(AugmentConfig())
    seen = torch.zeros(1024)
    for d in found:
        assert (d.keep_time[1:] != d.keep_time[:-1]).sum() <= 2
        seen += ~d.keep_time
    assert seen[512] > 0
    assert seen[20] > 0


def test_masks_scale_with_the_spectrogram():
    front_end = LogMelConfig(frames=100, mel_bins=64)
    found = draws(AugmentConfig(), front_end=front_end)
    assert max((~d.keep_mel).sum() for d in found) == 23  # below 3/8 of 64
    assert max((~d.keep_time).sum() for d in found) == 17  # below 3/16 of 100


def test_nothing_is_drawn_where_nothing_is_asked_for():
    for d in [*draws(NO_AUGMENTATION, 30), no_draw(FRONT_END)]:
        assert d.mix_index == -1
        assert d.mix_lambda == d.gain == 1.0
        assert d.roll == 0
        assert d.keep_mel.all()
        assert d.keep_time.all()


def test_options_do_not_shift_each_other():
    """Switching one augmentation on leaves the others' choices as they were."""
    plain = draws(AugmentConfig(), 20)
    more = draws(AugmentConfig(roll=10, gain=6.0), 20)
    for a, b in zip(plain, more, strict=True):
        assert (a.mix_index, a.mix_lambda) == (b.mix_index, b.mix_lambda)
    rolls, gains = [d.roll for d in more], [d.gain for d in more]
    assert min(rolls) < 0 < max(rolls)
    assert max(map(abs, rolls)) <= 10
    assert 10 ** (-6 / 20) <= min(gains) < 1 < max(gains) <= 10 ** (6 / 20)
    changed = draws(AugmentConfig(warp=0.2, stretch=0.5), 20)
    for a, b in zip(plain, changed, strict=True):
        assert (a.mix_index, a.gain, a.crop) == (b.mix_index, b.gain, b.crop)
        assert torch.equal(a.keep_time, b.keep_time)
    for most, factors in ((0.2, [d.warp for d in changed]), (0.5, [d.stretch for d in changed])):
        assert 1 / (1 + most) <= min(factors) < 1 < max(factors) <= 1 + most


def test_drawing_leaves_the_global_generator_alone():
    before = torch.get_rng_state()
    first = draws(AugmentConfig(), 3)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(123)
    for a, b in zip(first, draws(AugmentConfig(), 3), strict=True):
        assert torch.equal(a.keep_time, b.keep_time)
        assert a.crop == b.crop


@settings(deadline=None, max_examples=30)
@given(st.integers(1, 50), st.integers(1, 50), st.floats(0, 1), st.integers(0, 5))
def test_mixture(n, m, share, seed):
    generator = torch.Generator().manual_seed(seed)
    first, second = torch.randn(n, generator=generator) + 2, torch.randn(m, generator=generator) - 1
    expected = torch.zeros(max(n, m), dtype=torch.float64)
    for i in range(max(n, m)):
        if i < n:
            expected[i] += share * (first[i].double() - first.double().mean())
        if i < m:
            expected[i] += (1 - share) * (second[i].double() - second.double().mean())
    expected -= expected.mean()
    mixture = mix_waveforms(first, second, share)
    torch.testing.assert_close(mixture.double(), expected, rtol=0, atol=1e-5)


def test_targets_mix_with_the_same_share():
    target = mix_targets(torch.tensor([1.0, 1.0, 0.0]), torch.tensor([0.0, 1.0, 1.0]), 0.75)
    torch.testing.assert_close(target, torch.tensor([0.75, 1.0, 0.25]))


@settings(deadline=None, max_examples=20)
@given(st.data())
def test_roll_and_mask_against_loops(data):
    batch, frames, mel_bins = data.draw(st.tuples(*[st.integers(1, 6)] * 3))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
    fbank = torch.randn(batch, frames, mel_bins, generator=generator)
    roll = torch.randint(-8, 9, (batch,), generator=generator)
    keep_mel = torch.rand(batch, mel_bins, generator=generator) > 0.3
    keep_time = torch.rand(batch, frames, generator=generator) > 0.3
    out = roll_and_mask(fbank, roll, keep_mel, keep_time)
    for b in range(batch):
        rolled = torch.roll(fbank[b], int(roll[b]), 0)
        for t in range(frames):
            for f in range(mel_bins):
                expected = rolled[t, f] if keep_time[b, t] and keep_mel[b, f] else 0.0
                assert out[b, t, f] == expected


def _peak(fbank):
    """Frequency [Hz] of the strongest band in the middle, and the first and last frame with sound."""
    loud = (fbank.max(1).values > fbank.max() - 5).nonzero()[:, 0]
    band = fbank[(loud[0] + loud[-1]) // 2].argmax().item()
    low, high = 1127 * np.log1p(20 / 700), 1127 * np.log1p(8000 / 700)
    return 700 * np.expm1((low + (band + 1) * (high - low) / 129) / 1127), loud[0].item(), loud[-1].item()


@pytest.mark.parametrize("warp", [0.8, 1.0, 1.25])
@pytest.mark.parametrize("stretch", [0.7, 1.0, 1.4])
def test_a_tone_becomes_higher_and_longer(warp, stretch):
    """A tone of 1500 Hz from 0.2 to 0.5 s, changed in the spectrogram, is where the tone so changed would be."""
    front_end = LogMelConfig(frames=100)
    time = torch.arange(16000) / 16000
    tone = torch.sin(2 * torch.pi * 1500 * time) * ((time > 0.2) & (time < 0.5)) + 1e-4 * torch.randn(16000)
    fbank = LogMel(front_end).filter_bank(tone)[None].expand(2, -1, -1)
    factors = torch.tensor([[warp, 1.0], [stretch, 1.0]])
    changed, same = warp_and_stretch(fbank, *factors, front_end)
    assert torch.equal(same, fbank[1])
    hertz, first, last = _peak(changed)
    assert hertz == pytest.approx(1500 * warp, rel=0.02)
    assert first == pytest.approx(19 * stretch, abs=2)
    assert last == pytest.approx(49.5 * stretch, abs=2)


def test_padding_stays_padding():
    front_end = LogMelConfig(frames=60, mel_bins=32)
    fbank = LogMel(front_end).filter_bank(torch.randn(4000) * 0.1)[None]  # 23 frames
    assert (fbank[0, 23:] == 0).all()
    assert (fbank[0, :23] != 0).all()
    for stretch in (0.5, 1.0, 1.5):
        changed = warp_and_stretch(fbank, torch.tensor([1.1]), torch.tensor([stretch]), front_end)[0]
        ends = 22 * stretch
        assert (changed[: int(ends)] != 0).all()
        assert (changed[int(23 * stretch) + 1 :] == 0).all()


@pytest.mark.parametrize(
    "field",
    [{"mixup_rate": 1.5}, {"mixup_alpha": 0.0}, {"time_mask": -1}, {"roll": -1}, {"gain": -0.1}, {"warp": -0.1}],
)
def test_config_refuses(field):
    with pytest.raises(ValueError, match=f"augment.{next(iter(field))}"):
        AugmentConfig(**field)
    assert dataclasses.replace(AugmentConfig(), **{next(iter(field)): 1})
