"""The data of a run: what is held out, the measured front end, real recordings."""

import pytest
import torch

from dass.audio import LogMel, LogMelConfig, load_audio
from dass.augment import AugmentConfig
from dass.data import (
    DataConfig,
    ManifestError,
    build_loader,
    feature_statistics,
    open_splits,
    read_manifest,
)
from dass.synthetic import SyntheticConfig
from tests.model.recordings import folder, write_sound

__all__ = ["folder"]  # a fixture
FRONT_END = LogMelConfig(frames=48, mel_bins=32)


def test_the_default_is_the_synthetic_corpus():
    splits = open_splits(DataConfig(synthetic=SyntheticConfig(train_clips=200, eval_clips=10)), AugmentConfig())
    assert (len(splits.train), len(splits.held_out)) == (200, 10)
    assert splits.front_end.frames == 200
    (batch,) = build_loader(splits.held_out, batch_size=10, workers=0)
    assert batch.fbank.shape == (10, 200, 128)
    # normalised: mean 0, standard deviation 1/2, by construction
    assert abs(batch.fbank.mean()) < 0.15
    assert abs(batch.fbank.std() - 0.5) < 0.1


def test_front_end_is_measured_where_it_is_not_given(folder):
    splits = open_splits(DataConfig(train=folder, holdout=r"-[0-1]\.", mel_bins=32))
    assert (len(splits.train), len(splits.held_out)) == (18, 6)
    values = torch.cat([LogMel(LogMelConfig(frames=None, mel_bins=32)).filter_bank(load_audio(c.path)) for c in
                        splits.train.source.manifest]).double()  # fmt: skip
    assert splits.front_end.mean == pytest.approx(values.mean().item(), abs=1e-4)
    assert splits.front_end.std == pytest.approx(values.std().item(), abs=1e-3)
    assert 0.69 <= splits.front_end.frames * 0.01 <= 0.8  # the longest clip is 0.69 s
    given = open_splits(DataConfig(train=folder, mean=-4.0, std=4.0, clip_seconds=0.5), AugmentConfig())
    assert given.front_end == LogMelConfig(frames=50, mean=-4.0, std=4.0)
    pretrained = LogMelConfig(frames=77)
    assert open_splits(DataConfig(train=folder), front_end=pretrained).front_end == pretrained


def test_long_recordings_do_not_make_long_examples(tmp_path):
    write_sound(tmp_path / "a" / "1.wav", 12, 8000)
    write_sound(tmp_path / "a" / "2.wav", 12, 8000)
    assert open_splits(DataConfig(train=tmp_path)).front_end.frames == 1024


def test_clips_are_heard_at_the_rate_asked_for(folder):
    splits = open_splits(DataConfig(train=folder, sample_rate=8000, mel_bins=24))
    assert (splits.front_end.sample_rate, splits.front_end.mel_bins) == (8000, 24)
    assert 0.69 <= splits.front_end.frames * 0.01 <= 0.8  # seconds do not change with the rate
    (batch,) = build_loader(splits.held_out, batch_size=99, workers=0)
    log_mel = LogMel(splits.front_end)
    for index, fbank in zip(batch.index.tolist(), batch.fbank, strict=True):
        expected = log_mel(load_audio(splits.held_out.source.file(index), sample_rate=8000))
        torch.testing.assert_close(fbank, expected, rtol=0, atol=1e-4)
    with pytest.raises(ValueError, match="8000 Hz"):
        open_splits(DataConfig(sample_rate=8000))


def test_test_clips_have_the_classes_of_the_training_clips(folder, tmp_path):
    write_sound(tmp_path / "more" / "owl" / "x.wav")
    splits = open_splits(DataConfig(train=folder, test=tmp_path / "more"))
    assert (len(splits.test), splits.test.target(0).tolist()) == (1, [0, 0, 1])
    assert open_splits(DataConfig(train=folder)).test is None
    assert len(open_splits(DataConfig(synthetic=SyntheticConfig(test_clips=7))).test) == 7
    with pytest.raises(ManifestError, match=r"data\.test need data\.train"):
        open_splits(DataConfig(test=tmp_path / "more"))


def test_separate_evaluation_clips(folder, tmp_path):
    write_sound(tmp_path / "more" / "owl" / "x.wav")
    splits = open_splits(DataConfig(train=folder, eval=tmp_path / "more"))
    assert len(splits.train) == 24
    assert splits.held_out.target(0).tolist() == [0, 0, 1]


@pytest.mark.parametrize(
    ("options", "held_out"),
    [
        ({"fold": "val"}, ["dog/dog-0.wav", "owl/owl-1.flac"]),
        ({"holdout": "owl-[12]"}, ["owl/owl-1.flac", "owl/owl-2.wav"]),
        ({"holdout_list": "list.txt"}, ["cat/cat-3.wav", "dog/dog-0.wav"]),
    ],
)
def test_ways_to_hold_clips_out(folder, options, held_out):
    clips = list(read_manifest(folder))
    rows = [f"{c.key},{c.key[:3]},{'val' if c.key in ('dog/dog-0.wav', 'owl/owl-1.flac') else 'train'}" for c in clips]
    (folder / "clips.csv").write_text("path,label,split\n" + "\n".join(rows) + "\n")
    (folder / "list.txt").write_text("cat/cat-3.wav\ndog/dog-0.wav\n")
    if "holdout_list" in options:
        options = {"holdout_list": folder / "list.txt"}
    splits = open_splits(DataConfig(train=folder / "clips.csv", **options))
    assert [splits.held_out.name(i) for i in range(len(splits.held_out))] == held_out
    assert len(splits.train) == 22


def test_options_of_the_command_line():
    import tyro

    def parse(*arguments):
        return tyro.cli(DataConfig, args=arguments)

    assert parse() == DataConfig()
    assert parse("--fold", "2").fold in (2, "2")
    config = parse("--train", "a/b", "--label-regex", r"^(\d)_", "--sampler", "balanced", "--synthetic.max-events", "2")
    assert (str(config.train), config.label_regex, config.sampler) == ("a/b", r"^(\d)_", "balanced")
    assert config.synthetic.max_events == 2


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"max_broken": 2.0}, "max_broken"),
        ({"clip_seconds": 0.0}, "clip_seconds"),
        ({"mean": 1.0}, "mean and data.std"),
        ({"fold": 1, "holdout": "x"}, "only one of data.fold and data.holdout"),
    ],
)
def test_config_refuses(fields, message):
    with pytest.raises(ValueError, match=message):
        DataConfig(**fields)


# --- real recordings -------------------------------------------------------------------------------------------------


def test_esc10_as_it_is(shared):
    splits = open_splits(DataConfig(train=shared("data", "esc10"), clip_seconds=1.0))
    assert len(splits.classes) == 10
    assert len(splits.train) + len(splits.held_out) == 83
    groups = [{clip.group for clip in part.source.manifest} for part in (splits.train, splits.held_out)]
    assert not groups[0] & groups[1]  # no recording on both sides
    (batch,) = build_loader(splits.held_out, batch_size=64, workers=0)
    assert set(batch.target.sum(1).tolist()) == {1.0}
    assert len(batch) == len(splits.held_out)


def test_spoken_digits(shared):
    config = DataConfig(
        train=shared("data", "fsdd", "recordings"),
        label_regex=r"^(\d)_",
        holdout=r"_[0-4]\.wav$",
        mean=-8.0,
        std=4.6,
    )
    splits = open_splits(config)
    assert (len(splits.train), len(splits.held_out)) == (900, 300)
    assert [entry.name for entry in splits.classes] == list("0123456789")
    batch = next(iter(build_loader(splits.held_out, batch_size=8, workers=0)))
    assert batch.fbank.shape == (8, splits.front_end.frames, 128)
    assert batch.target.argmax(1).tolist() == [int(splits.held_out.name(i)[0]) for i in batch.index]


def test_statistics_of_a_long_set_are_of_a_sample(folder):
    manifest = read_manifest(folder)
    first = feature_statistics(manifest, FRONT_END, clips=5)
    assert first == feature_statistics(manifest, FRONT_END, clips=5)
    assert first != feature_statistics(manifest, FRONT_END, clips=24)
