"""Batches that are the same however they are made."""

import numpy as np
import pytest
import soundfile
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dass.audio import LogMel, LogMelConfig, audio_hash, load_audio
from dass.augment import AugmentConfig, mix_waveforms
from dass.batch import Batch
from dass.data import (
    AudioDataset,
    BrokenFiles,
    BrokenFilesError,
    DataConfig,
    ManifestError,
    build_loader,
    open_splits,
    read_manifest,
)
from dass.loader import epoch_order
from dass.synthetic import SyntheticConfig, SyntheticCorpus
from tests.model.recordings import folder, manifest_of, write_sound

__all__ = ["folder"]  # a fixture

FRONT_END = LogMelConfig(frames=48, mel_bins=32)


def tensors_of(batch):
    names = ("target", "index", "mix_index", "mix_lambda", "fbank", "waveform", "lengths")
    return {name: getattr(batch, name) for name in names if getattr(batch, name) is not None}


def assert_same(first: Batch, second: Batch):
    """Bitwise."""
    assert tensors_of(first).keys() == tensors_of(second).keys()
    for name, tensor in tensors_of(first).items():
        assert torch.equal(tensor, tensors_of(second)[name]), name
    assert first.audio_hashes == second.audio_hashes


# --- the order of an epoch -------------------------------------------------------------------------------------------


class Numbers(SyntheticCorpus):
    """A corpus of any size whose clips cost nothing."""

    def __init__(self, clips):
        super().__init__(SyntheticConfig(train_clips=clips))

    def read(self, index, *, sample_rate, start, duration, hashed):
        return torch.linspace(-1, 1, 400) * (index + 1) / 100, f"hash-{index}" if hashed else ""


def dataset_of(clips, **options):
    return AudioDataset(Numbers(clips), LogMelConfig(frames=1, mel_bins=16), **options)


@settings(deadline=None, max_examples=25)
@given(
    clips=st.integers(1, 40),
    per_process=st.integers(1, 5),
    world_size=st.integers(1, 4),
    training=st.booleans(),
    epoch_clips=st.none() | st.integers(1, 90),
    epoch=st.integers(0, 3),
)
def test_processes_share_an_epoch(clips, per_process, world_size, training, epoch_clips, epoch):
    """Any number of processes makes the examples of one process, each batch divided among them."""
    dataset = dataset_of(clips, epoch_clips=epoch_clips, augment=AugmentConfig())
    options = dict(batch_size=per_process * world_size, seed=3, epoch=epoch, training=training, workers=0)
    alone = list(build_loader(dataset, **options))
    parts = [list(build_loader(dataset, rank=r, world_size=world_size, **options)) for r in range(world_size)]
    for number, batch in enumerate(alone):
        shares = [part[number] for part in parts if number < len(part)]
        for rank, share in enumerate(shares):
            for name, tensor in tensors_of(share).items():
                assert torch.equal(tensor, tensors_of(batch)[name][rank::world_size]), name
        assert sum(map(len, shares)) == len(batch)
    indices = torch.cat([batch.index for batch in alone]).tolist()
    if not training:
        assert indices == list(range(clips))
        assert len(build_loader(dataset, **options)) == len(alone)
        return
    size = epoch_clips or clips
    assert all(len(batch) == options["batch_size"] for batch in alone)
    assert len(alone) == -(-size // options["batch_size"])
    for start in range(0, size - clips + 1, clips):  # each round of the clips is a permutation
        assert sorted(indices[start : start + clips]) == list(range(clips))
    if size < clips:
        assert len(set(indices[:size])) == size


@settings(deadline=None, max_examples=25)
@given(clips=st.integers(1, 30), batch=st.integers(1, 7), start=st.integers(0, 40), training=st.booleans())
def test_resuming_at_any_batch(clips, batch, start, training):
    dataset = dataset_of(clips, augment=AugmentConfig())
    options = dict(batch_size=batch, seed=1, epoch=2, training=training, workers=0)
    whole = list(build_loader(dataset, **options))
    rest = build_loader(dataset, start_batch=start, **options)
    assert len(rest) == max(len(whole) - start, 0)
    resumed = list(rest)
    assert len(resumed) == len(whole[start:])
    for first, second in zip(whole[start:], resumed, strict=True):
        assert_same(first, second)


def test_epochs_and_seeds_differ():
    dataset = dataset_of(50)
    orders = [tuple(epoch_order(dataset, seed, epoch, True)) for seed in (0, 1) for epoch in (0, 1)]
    assert len(set(orders)) == 4


def test_balanced_sampler():
    """Weight of a clip = sum over its labels of 1/(clips with that label)."""
    clips = [("a", (0,), ""), ("b", (0,), ""), ("c", (0, 1), ""), ("d", (2,), ""), ("e", (), "")]
    dataset = AudioDataset(manifest_of(clips), FRONT_END, sampler="balanced", epoch_clips=20_000)
    expected = np.array([1 / 3, 1 / 3, 1 / 3 + 1, 1, 0])
    np.testing.assert_allclose(dataset.balanced_weights(), expected / expected.sum())
    drawn = np.bincount(epoch_order(dataset, 0, 0, True), minlength=5) / 20_000
    np.testing.assert_allclose(drawn, expected / expected.sum(), atol=0.015)
    with pytest.raises(ManifestError, match="labels"):
        AudioDataset(manifest_of([("a", (), "")]), FRONT_END).balanced_weights()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 3, "world_size": 2}, "multiple of world_size = 2, got 3"),
        ({"batch_size": 0}, "got 0"),
        ({"batch_size": 2, "world_size": 2, "rank": 2}, "rank"),
        ({"batch_size": 2, "epoch": -1}, "epoch"),
    ],
)
def test_loader_refuses(options, message):
    with pytest.raises(ValueError, match=message):
        build_loader(dataset_of(4), **options)


# --- batches of real files -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("features", ["workers", "device"])
@pytest.mark.parametrize("training", [False, True])
def test_workers_do_not_show(folder, features, training):
    dataset = AudioDataset(
        read_manifest(folder),
        FRONT_END,
        augment=AugmentConfig(roll=5, gain=3.0),
        random_crop=True,
        features=features,
        hashes=True,
    )
    options = dict(batch_size=5, seed=4, epoch=1, training=training)
    torch.set_num_threads(2)  # a sum over two threads rounds differently, here as in the trainer
    alone = list(build_loader(dataset, workers=0, **options))
    state = torch.get_rng_state()
    for first, second in zip(alone, build_loader(dataset, workers=2, **options), strict=True):
        assert_same(first, second)
    assert torch.equal(torch.get_rng_state(), state)
    if training:
        assert max(batch.mix_index.max() for batch in alone) >= 0


def test_an_evaluation_batch_is_the_front_end_of_the_files(folder):
    manifest = read_manifest(folder)
    dataset = AudioDataset(manifest, FRONT_END, augment=AugmentConfig(), random_crop=True)
    log_mel = LogMel(FRONT_END)
    for batch in build_loader(dataset, batch_size=7, workers=0):
        for row, index in enumerate(batch.index.tolist()):
            waveform = load_audio(manifest[index].path)[: FRONT_END.samples]
            torch.testing.assert_close(batch.fbank[row], log_mel(waveform), rtol=0, atol=1e-4)
            assert batch.target[row].nonzero().flatten().tolist() == list(manifest[index].labels)
        assert (batch.mix_index == -1).all()
        assert (batch.mix_lambda == 1).all()


def test_a_training_batch_is_the_recipe(folder):
    """Every example, computed again by hand: two waveforms mixed, one filter bank, one band and one stretch masked."""
    manifest = read_manifest(folder)
    dataset = AudioDataset(manifest, FRONT_END, augment=AugmentConfig(mixup_rate=1.0), waveforms=True)
    (batch,) = build_loader(dataset, batch_size=24, training=True, workers=0)
    log_mel = LogMel(FRONT_END)
    for row in range(24):
        first, second = batch.index[row].item(), batch.mix_index[row].item()
        share = batch.mix_lambda[row].item()
        sounds = [load_audio(manifest[i].path)[: FRONT_END.samples] for i in (first, second)]
        mixture = mix_waveforms(*sounds, share)
        torch.testing.assert_close(batch.waveform[row, : batch.lengths[row]], mixture)
        expected = log_mel(mixture)
        masked = (batch.fbank[row] == FRONT_END.padding) & (expected != FRONT_END.padding)
        torch.testing.assert_close(batch.fbank[row][~masked], expected[~masked], rtol=0, atol=1e-4)
        rows, columns = masked.all(1), masked[: FRONT_END.frames_of(len(mixture))].all(0)
        assert (masked == (rows[:, None] | columns) & (expected != FRONT_END.padding)).all()
        target = share * dataset.target(first) + (1 - share) * dataset.target(second)
        torch.testing.assert_close(batch.target[row], target)


def test_features_on_the_device_equal_those_of_the_workers(folder):
    manifest = read_manifest(folder)
    augment = AugmentConfig(roll=5, gain=3.0)
    options = dict(batch_size=6, training=True, workers=0)
    made = [
        [b.with_features(LogMel(FRONT_END)) for b in build_loader(dataset, **options)]
        for dataset in (
            AudioDataset(manifest, FRONT_END, augment=augment, features=features, waveforms=True)
            for features in ("workers", "device")
        )
    ]
    for first, second in zip(*made, strict=True):
        torch.testing.assert_close(first.fbank, second.fbank, rtol=0, atol=1e-5)
        assert torch.equal(first.waveform, second.waveform)
        assert first.to("cpu").fbank.shape == (6, 48, 32)


def test_long_clips_are_cropped_at_random_in_training_only(tmp_path):
    ramp = np.repeat(np.arange(1, 11), 1600) * np.sin(np.arange(16000) * 0.7) / 11  # louder and louder
    soundfile.write(write_sound(tmp_path / "a" / "ramp.wav"), ramp, 16000)
    front_end = LogMelConfig(frames=8, mel_bins=32)
    dataset = AudioDataset(read_manifest(tmp_path), front_end, random_crop=True, epoch_clips=40)
    levels = torch.cat([b.fbank.amax((1, 2)) for b in build_loader(dataset, batch_size=8, training=True, workers=0)])
    assert levels.unique().numel() > 20
    (batch,) = build_loader(dataset, batch_size=1, workers=0)
    assert batch.fbank.amax() <= levels.min()  # evaluation takes the beginning


def test_hashes_are_of_the_decoded_file(folder):
    manifest = read_manifest(folder)
    dataset = AudioDataset(manifest, FRONT_END, augment=AugmentConfig(mixup_rate=1.0), hashes=True)
    expected = [
        audio_hash(load_audio(clip.path, sample_rate=soundfile.info(clip.path).samplerate)) for clip in manifest
    ]
    assert len(set(expected)) == len(expected)
    (batch,) = build_loader(dataset, batch_size=24, training=True, workers=0)
    assert batch.audio_hashes == tuple(expected[i] for i in batch.index)
    assert batch.mix_hashes == tuple(expected[i] for i in batch.mix_index)
    assert dataset.audio_hash(3) == expected[3]


# --- broken files ----------------------------------------------------------------------------------------------------


def spoil(folder, count):
    spoilt = sorted(folder.glob("cat/*"))[:count]
    for path in spoilt:
        path.write_bytes(b"RIFF nonsense")
    return spoilt


def test_broken_files_are_skipped_named_and_counted(folder, caplog):
    spoilt = spoil(folder, 2)
    dataset = AudioDataset(read_manifest(folder), FRONT_END, augment=AugmentConfig(), broken=BrokenFiles(24, 0.1))
    found = torch.cat([batch.index for batch in build_loader(dataset, batch_size=2, workers=0)])
    assert found.tolist() == list(range(2, 24))
    for workers in (0, 2):
        batches = list(build_loader(dataset, batch_size=4, training=True, workers=workers))
        assert all(len(batch) == 4 for batch in batches)
        assert not {0, 1} & {i for b in batches for i in (*b.index.tolist(), *b.mix_index.tolist())}
    assert len(dataset.broken) == 2
    assert set(dataset.broken.reasons) == {str(path) for path in spoilt}
    messages = [record.message for record in caplog.records if "cat-" in record.message]
    assert len(messages) == 2  # once each
    assert "cat-0.wav: cannot be decoded" in messages[0]


@pytest.mark.parametrize("workers", [0, 1])
def test_too_many_broken_files_stop_the_run(folder, workers):
    spoil(folder, 2)
    dataset = AudioDataset(read_manifest(folder), FRONT_END, broken=BrokenFiles(24, 0.05))
    with pytest.raises(BrokenFilesError, match=r"2 of 24 files.*5\.0%.*--data.max-broken(.|\n)*cat-0.wav: cannot be"):
        list(build_loader(dataset, batch_size=4, workers=workers))


def test_headers_are_looked_at_before_the_first_step(folder):
    spoil(folder, 1)
    with pytest.raises(BrokenFilesError, match="1 of 24"):
        open_splits(DataConfig(train=folder))
    splits = open_splits(DataConfig(train=folder, max_broken=0.1))
    assert len(splits.train) + len(splits.held_out) == 23
    assert splits.train.broken is splits.held_out.broken
    assert len(splits.train.broken) == 1


def test_a_folder_of_broken_files(folder):
    for path in folder.rglob("*.*"):
        path.write_bytes(b"")
    dataset = AudioDataset(read_manifest(folder), FRONT_END, broken=BrokenFiles(24, 1.0))
    with pytest.raises(BrokenFilesError, match="in a row"):
        list(build_loader(dataset, batch_size=4, training=True, workers=0))
    assert list(build_loader(dataset, batch_size=4, workers=0)) == []


# --- the cache of features -------------------------------------------------------------------------------------------


def test_cache_changes_nothing_but_time(folder, tmp_path, monkeypatch):
    manifest = read_manifest(folder)
    cache = tmp_path / "cache"

    def batches(front_end=FRONT_END, **options):
        dataset = AudioDataset(manifest, front_end, augment=AugmentConfig(mixup_rate=0.3), hashes=True, **options)
        return list(build_loader(dataset, batch_size=6, training=True, workers=0, epoch=1)) + list(
            build_loader(dataset, batch_size=6, workers=0)
        )

    plain = batches()
    for _ in range(2):
        for first, second in zip(plain, batches(cache=cache), strict=True):
            assert_same(first, second)
    entries = sorted(cache.rglob("*.safetensors"))
    assert len(entries) == 24
    assert len(list(cache.rglob("*"))) == 24 + len({entry.parent for entry in entries})  # nothing half-written
    batches(LogMelConfig(frames=50, mel_bins=32), cache=cache)  # another front end: other entries
    assert len(list(cache.rglob("*.safetensors"))) == 48
    entries[0].write_bytes(b"torn")
    for first, second in zip(plain, batches(cache=cache), strict=True):
        assert_same(first, second)
    assert entries[0].read_bytes() != b"torn"
    # Read from the cache, nothing is decoded; a changed file is.
    for name in ("load_native", "load_audio"):
        monkeypatch.setattr(f"dass.dataset.{name}", lambda *args, **kwargs: pytest.fail("decoded"))
    dataset = AudioDataset(manifest, FRONT_END, augment=AugmentConfig(), cache=cache)
    list(build_loader(dataset, batch_size=6, workers=0))
    list(build_loader(dataset, batch_size=6, workers=0, training=True))
    write_sound(manifest[0].path, seed=5)
    with pytest.raises(pytest.fail.Exception):
        list(build_loader(dataset, batch_size=6, workers=0))
