"""Teachers of every kind, their classes matched, their scores cached, mixed and refused."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from dass.audio import LogMelConfig
from dass.batch import Batch
from dass.classes import ClassMapError, match_classes, read_class_table
from dass.data import open_splits
from dass.distill import DistillConfig, mix_scores
from dass.loader import build_loader
from dass.manifest import LabelClass
from dass.model import DASS, DASSConfig
from dass.run_log import read_metrics
from dass.teacher import Ensemble, build_ensemble, load_teacher
from dass.teacher_cache import CacheConfig, cache_scores
from dass.teacher_models import SpectrogramTeacher, TeacherError
from dass.teacher_scores import CachedTeacher, ScoresError, pack_scores, read_scores, write_scores
from dass.train import main
from dass.trainer import Trainer

from .tiny_run import tiny_config, write_tones


def classes(*names):
    return tuple(LabelClass(i, *(name if isinstance(name, tuple) else (name, name))) for i, name in enumerate(names))


def batch_of(fbank, **more):
    count = len(fbank)
    index = torch.arange(count)
    fields = {"mix_index": torch.full((count,), -1), "mix_lambda": torch.ones(count)}
    return Batch(target=torch.zeros(count, 1), index=index, fbank=fbank, **{**fields, **more})


# --- classes ----------------------------------------------------------------------------------------------------------


def test_classes_are_matched_by_id_then_name():
    student = classes(("/m/1", "Dog"), ("/m/2", "Cat"), ("/m/3", "Sea waves"), ("/m/4", "Owl"))
    teacher = classes(("/m/9", "sea_waves"), ("/m/1", "Cat"), ("/m/2", "Kitten"), ("/m/8", "Rain"))
    match = match_classes(student, teacher)
    assert match.student == (0, 1, 2) and match.teacher == ((1,), (2,), (0,))
    assert match.student_unmatched == ("Owl",) and match.teacher_unmatched == ("Rain",)
    text = match.report("T")
    assert (
        "3 classes matched" in text and "labels alone (1): Owl" in text and "unused teacher classes (1): Rain" in text
    )
    logits = torch.tensor([[10.0, 11, 12, 13]])
    assert match.select(logits).tolist() == [[11, 12, 10]]


def test_a_table_may_give_several_teacher_classes_and_the_largest_logit_counts():
    table = [("dog", "Bark"), ("dog", "Growling"), ("elephant", "Trumpet")]
    match = match_classes(classes("dog", "rain"), classes("Rain", "Growling", "Bark"), table)
    assert match.select(torch.tensor([[1.0, 5, 3], [1, 2, 4]])).tolist() == [[5, 1], [4, 1]]
    with pytest.raises(ClassMapError, match="no class 'Brk'.*did you mean 'Bark'"):
        match_classes(classes("dog"), classes("Bark"), [("dog", "Brk")])


def test_numbers_identify_nothing_unless_the_lists_are_equal():
    with pytest.raises(ClassMapError, match="--distill.class-map"):
        match_classes(classes("0", "1"), classes("LABEL_0", "1", "2"))
    assert match_classes(classes("0", "1"), classes("0", "1")).teacher == ((0,), (1,))


def test_the_built_in_table_of_esc50(shared):
    archive = np.load(shared("data", "esc10", "yamnet_scores.npz"))
    teacher = classes(*zip(archive["mids"].tolist(), archive["display_names"].tolist(), strict=True))
    table = read_class_table("esc50-audioset")
    assert len({own for own, _ in table}) == 47  # AudioSet has nothing like the other three
    names = classes(*sorted({own for own, _ in table}))
    match = match_classes(names, teacher, table)
    assert not match.student_unmatched
    dog = match.teacher[[entry.id for entry in names].index("dog")]
    assert {teacher[column].name for column in dog} == {"Dog", "Bark"}
    with pytest.raises(ClassMapError, match="did you mean 'esc50-audioset'"):
        read_class_table("esc50-audiost")


# --- neural teachers --------------------------------------------------------------------------------------------------


def original_ast_tensors(hidden=64, layers=2, classes=7, positions=12 * 101, prefix="module."):
    """Random tensors under the names of the original AST code."""
    generator = torch.Generator().manual_seed(0)
    shapes = {
        "v.cls_token": (1, 1, hidden),
        "v.dist_token": (1, 1, hidden),
        "v.pos_embed": (1, positions + 2, hidden),
        "v.patch_embed.proj.weight": (hidden, 1, 16, 16),
        "v.patch_embed.proj.bias": (hidden,),
        "v.norm.weight": (hidden,),
        "v.norm.bias": (hidden,),
        "v.head.weight": (10, hidden),
        "v.head_dist.bias": (10,),
        "mlp_head.0.weight": (hidden,),
        "mlp_head.0.bias": (hidden,),
        "mlp_head.1.weight": (classes, hidden),
        "mlp_head.1.bias": (classes,),
    }
    for layer in range(layers):
        for name, shape in {
            "norm1": (hidden,),
            "attn.qkv": (3 * hidden, hidden),
            "attn.proj": (hidden, hidden),
            "norm2": (hidden,),
            "mlp.fc1": (4 * hidden, hidden),
            "mlp.fc2": (hidden, 4 * hidden),
        }.items():
            shapes[f"v.blocks.{layer}.{name}.weight"] = shape
            shapes[f"v.blocks.{layer}.{name}.bias"] = shape[:1]
    return {prefix + name: 0.1 * torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def original_ast_forward(tensors, fbank, layers=2, stride=10):
    """What the original AST computes (arXiv 2104.01778, section 2), written with functions alone; one head of 64."""
    w = {name.removeprefix("module."): value for name, value in tensors.items()}

    def norm(x, name, eps=1e-6):
        return F.layer_norm(x, x.shape[-1:], w[f"{name}.weight"], w[f"{name}.bias"], eps)

    def linear(x, name):
        return F.linear(x, w[f"{name}.weight"], w[f"{name}.bias"])

    image = fbank[:, None].transpose(2, 3)  # (batch, 1, mel, frames)
    patches = F.conv2d(image, w["v.patch_embed.proj.weight"], w["v.patch_embed.proj.bias"], stride=stride)
    x = patches.flatten(2).transpose(1, 2)
    tokens = torch.cat([w["v.cls_token"], w["v.dist_token"]], 1).expand(len(x), -1, -1)
    x = torch.cat([tokens, x], 1) + w["v.pos_embed"]
    for layer in range(layers):
        block = f"v.blocks.{layer}"
        query, key, value = linear(norm(x, f"{block}.norm1"), f"{block}.attn.qkv").chunk(3, -1)
        attention = (query @ key.transpose(1, 2) / math.sqrt(query.shape[-1])).softmax(-1)
        x = x + linear(attention @ value, f"{block}.attn.proj")
        x = x + linear(F.gelu(linear(norm(x, f"{block}.norm2"), f"{block}.mlp.fc1")), f"{block}.mlp.fc2")
    x = norm(x, "v.norm")
    return linear(norm((x[:, 0] + x[:, 1]) / 2, "mlp_head.0"), "mlp_head.1")


@pytest.mark.parametrize(("positions", "frames"), [(12 * 101, 1024), (12 * 12, 128)])
def test_the_original_ast(tmp_path, positions, frames):
    pytest.importorskip("transformers")
    tensors = original_ast_tensors(positions=positions)
    torch.save(tensors, tmp_path / "audioset_10_10.pth")
    teacher = load_teacher(str(tmp_path / "audioset_10_10.pth"))
    names = classes(*"abcdefg")
    teacher.attach(LogMelConfig(), names)
    assert teacher.front_end.frames == frames and teacher.classes == names
    fbank = torch.randn(2, frames, 128)
    torch.testing.assert_close(
        teacher.logits(batch_of(fbank)), original_ast_forward(tensors, fbank), rtol=1e-4, atol=1e-5
    )


def test_names_of_both_generations_of_transformers():
    from dass.teacher_models import rename_original_ast

    tensors = {name.removeprefix("module."): value for name, value in original_ast_tensors().items()}
    older = rename_original_ast(tensors, newer=False)
    layer = "audio_spectrogram_transformer.encoder.layer.1."
    torch.testing.assert_close(
        older[layer + "attention.attention.key.weight"], tensors["v.blocks.1.attn.qkv.weight"][64:128]
    )
    assert layer + "attention.output.dense.bias" in older and layer + "intermediate.dense.weight" in older
    assert len(older) == len(rename_original_ast(tensors, newer=True))


class Recorder(torch.nn.Module):
    """A model that keeps what it was given and says the mean over mel bins and frames."""

    def forward(self, fbank):
        self.seen = fbank
        return fbank.mean((1, 2))[:, None].expand(-1, 2)


def test_spectrograms_are_renormalised_padded_and_heard_in_parts():
    own = LogMelConfig(mel_bins=16, frames=8, mean=-4.0, std=4.0)
    student = LogMelConfig(mel_bins=16, frames=6, mean=-6.0, std=2.0)
    model = Recorder()
    teacher = SpectrogramTeacher(model, classes("a", "b"), own, "T")
    teacher.attach(student, classes("a", "b"))
    raw = torch.randn(3, 6, 16) - 5
    teacher.logits(batch_of((raw + 6) / 4))
    torch.testing.assert_close(model.seen[:, :6], (raw + 4) / 8)
    torch.testing.assert_close(model.seen[:, 6:], torch.full((3, 2, 16), 0.5))  # a raw 0, as zero-padding gives

    long = torch.randn(2, 20, 16)
    said = teacher.logits(batch_of((long + 6) / 4))
    assert model.seen.shape == (2 * 3, 8, 16) and said.shape == (2, 2)
    with pytest.raises(TeacherError, match="mel_bins 16, the student's 64.*dass.teacher cache"):
        teacher.attach(LogMelConfig(mel_bins=64), classes("a"))


def test_transformers_classifiers_of_spectrograms_and_waveforms(tmp_path):
    transformers = pytest.importorskip("transformers")
    from dass.teacher_models import build_small_ast

    names = classes("dog", "cat", "owl")
    front_end = LogMelConfig(mel_bins=32, frames=48, mean=-3.0, std=2.0)
    torch.manual_seed(0)
    small = build_small_ast(names, front_end).eval()
    small.save_pretrained(tmp_path / "ast")
    teacher = load_teacher(str(tmp_path / "ast"))
    assert teacher.classes == names and teacher.front_end == front_end
    teacher.attach(front_end, names)
    fbank = torch.randn(2, 48, 32)
    torch.testing.assert_close(teacher.logits(batch_of(fbank)), small(fbank))

    config = transformers.Wav2Vec2Config(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, conv_dim=(8, 8),
        conv_stride=(5, 4), conv_kernel=(10, 4), num_conv_pos_embeddings=4, num_conv_pos_embedding_groups=2,
        num_labels=3, id2label={0: "dog", 1: "cat", 2: "owl"}, classifier_proj_size=8,
    )  # fmt: skip
    model = transformers.Wav2Vec2ForSequenceClassification(config).eval()
    model.save_pretrained(tmp_path / "wav2vec2")
    transformers.Wav2Vec2FeatureExtractor(sampling_rate=8000).save_pretrained(tmp_path / "wav2vec2")
    teacher = load_teacher(str(tmp_path / "wav2vec2"))
    assert teacher.hears == "waveforms" and teacher.classes == names
    teacher.attach(front_end, names)
    waveform = torch.randn(2, 4000)
    said = teacher.logits(batch_of(fbank, waveform=waveform, lengths=torch.tensor([4000, 3000])))
    assert said.shape == (2, 3) and torch.isfinite(said).all()


def test_a_dass_teacher_and_unknown_sources(tmp_path):
    front_end = LogMelConfig(mel_bins=16, frames=32)
    config = DASSConfig(depths=(1, 1), dims=(8, 16), num_classes=2, mel_bins=16, id2label={0: "dog", 1: "cat"})
    model = DASS(config, front_end=vars(front_end)).eval()
    model.save_pretrained(tmp_path / "dass")
    teacher = load_teacher(str(tmp_path / "dass"))
    teacher.attach(front_end, classes("dog", "cat"))
    fbank = torch.randn(2, 20, 16)
    torch.testing.assert_close(teacher.logits(batch_of(fbank)), model(fbank))
    with pytest.raises(TeacherError, match="'nothing/at/all': no such file or folder"):
        load_teacher("nothing/at/all")


def test_ensembles_weigh_their_members_class_by_class():
    config = DistillConfig(teacher=("a", "b"), teacher_weights=(3.0, 1.0))

    class Constant(Recorder):
        def __init__(self, *logits):
            super().__init__()
            self.values = torch.tensor(logits)

        def forward(self, fbank):
            return self.values.expand(len(fbank), -1)

    front_end = LogMelConfig(mel_bins=16, frames=8)
    first = SpectrogramTeacher(Constant(1.0, 2.0), classes("dog", "cat"), front_end, "A")
    second = SpectrogramTeacher(Constant(5.0, 7.0), classes("rain", "dog"), front_end, "B")
    ensemble = build_ensemble([first, second], config, classes("cat", "dog", "owl", "rain"), front_end)
    said = ensemble(batch_of(torch.zeros(2, 8, 16)), None)
    assert said.student_classes.tolist() == [0, 1, 3] and said.known is None
    torch.testing.assert_close(said.logits[0], torch.tensor([2.0, 0.75 * 1 + 0.25 * 7, 5.0]))
    assert "learnt from labels alone (2): owl, rain" in ensemble.report()


# --- cached scores ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tones(tmp_path_factory):
    return write_tones(tmp_path_factory.mktemp("data") / "tones", per_class=5)


@pytest.fixture(scope="module")
def dass(tones, tmp_path_factory):
    """A DASS with random weights on the tones' classes, in a folder."""
    folder = tmp_path_factory.mktemp("teacher")
    torch.manual_seed(1)
    config = tiny_config(tones)
    front_end = open_splits(config.data).front_end
    names = {0: "high", 1: "low", 2: "middle"}
    shape = DASSConfig(depths=(1, 1), dims=(8, 16), num_classes=3, mel_bins=16, id2label=names)
    model = DASS(shape, front_end=vars(front_end)).eval()
    torch.nn.init.normal_(model.head.weight, std=3.0)
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def cache(tones, dass, tmp_path_factory):
    out = tmp_path_factory.mktemp("cache") / "scores.safetensors"
    cache_scores(CacheConfig(str(dass), out, batch_size=4, device="cpu", data=tiny_config(tones).data))
    return out


def clean_batch(tones, training=False, **augment):
    config = tiny_config(tones, augment=augment)
    splits = open_splits(config.data, config.augment, hashes=True)
    return next(iter(build_loader(splits.train, batch_size=12, training=training, workers=0))), splits


def test_the_cache_says_what_the_teacher_says(tones, dass, cache):
    batch, splits = clean_batch(tones)
    teacher = load_teacher(str(dass))
    teacher.attach(splits.front_end, splits.classes)
    cached = load_teacher(str(cache))
    assert isinstance(cached, CachedTeacher) and cached.classes[0].name == "high"
    first, second = cached.pair(batch, splits.train, strict=True)
    torch.testing.assert_close(first, teacher.logits(batch), rtol=2e-3, atol=2e-3)  # stored in float16
    assert torch.equal(first, second)
    held_out = next(iter(build_loader(splits.held_out, batch_size=3, workers=0)))
    assert torch.isfinite(cached.pair(held_out, splits.held_out, strict=True)[0]).all()


def test_mixed_clips_get_mixed_scores(tones, cache):
    batch, splits = clean_batch(tones, training=True, mixup_rate=0.7, roll=2)
    mixed = batch.mix_index >= 0
    assert 0 < mixed.sum() < len(batch)
    cached = CachedTeacher(cache)
    ensemble = build_ensemble([cached], DistillConfig(teacher=("x",)), splits.classes, splits.front_end)
    said = ensemble(batch, splits.train)
    whole = {name: cached.scores.row(i) for i, name in enumerate(cached.scores.names)}
    first = torch.tensor(np.stack([whole[splits.train.name(i)] for i in batch.index.tolist()]))
    second = [whole[splits.train.name(j if j >= 0 else i)] for i, j in zip(batch.index, batch.mix_index, strict=True)]
    expected = mix_scores(first, torch.tensor(np.stack(second)), batch.mix_lambda, "kldiv")
    torch.testing.assert_close(said.logits, expected)
    assert torch.equal(said.logits[~mixed], first[~mixed])


def test_top_k_keeps_the_softmax_of_the_kept_classes():
    logits = 3 * np.random.default_rng(0).normal(size=(6, 40)).astype(np.float32)
    keys = [f"{number:032x}" for number in range(6)]
    header = {"classes": [{"id": str(i), "name": str(i)} for i in range(40)]}
    scores = pack_scores(keys, list("abcdef"), logits, header, top_k=5)
    assert scores.values.shape == (6, 5)
    for number in range(6):
        row = scores.row(number)
        kept = np.argsort(-logits[number])[:5]
        expected, found = (torch.from_numpy(x).double().softmax(-1) for x in (logits[number], row))
        torch.testing.assert_close(found[kept], expected[kept], rtol=1e-2, atol=1e-5)
        assert len(np.unique(np.delete(row, kept))) == 1


def test_missing_stale_and_reordered_entries_are_named(tones, cache, tmp_path):
    batch, splits = clean_batch(tones)
    name = splits.train.name(int(batch.index[0]))
    scores = read_scores(cache)
    number = scores.names.index(name)
    others = [i for i in range(len(scores.names)) if i != number]

    def without(numbers, names=None):
        arrays = {key: getattr(scores, key)[numbers] for key in ("keys", "values", "checks")}
        return replace(scores, **arrays, names=tuple((names or scores.names)[i] for i in numbers))

    def ask(changed, **options):
        write_scores(tmp_path / "changed.safetensors", changed)
        return CachedTeacher(tmp_path / "changed.safetensors").pair(batch, splits.train, **options)

    with pytest.raises(ScoresError, match=f"has no scores of '{name}'.*hard-label"):
        ask(without(others), strict=True)
    first, _ = ask(without(others), strict=False)
    assert first[0].isnan().all() and torch.isfinite(first[1:]).all()

    stale = without(list(range(len(scores.names))))
    stale.keys[number] = 7
    with pytest.raises(ScoresError, match=f"the audio of '{name}' has changed"):
        ask(stale, strict=True)

    reordered = replace(scores, values=np.roll(scores.values, 1, axis=0))
    with pytest.raises(ScoresError, match="reordered or damaged"):
        ask(reordered, strict=True)
    shuffled = np.random.default_rng(0).permutation(len(scores.names))
    torch.testing.assert_close(
        ask(without(shuffled), strict=True)[0], CachedTeacher(cache).pair(batch, splits.train, True)[0]
    )


def test_the_cache_command_goes_on_after_a_kill(tones, dass, cache, tmp_path, monkeypatch, capsys):
    out = tmp_path / "again.safetensors"
    config = CacheConfig(str(dass), out, batch_size=2, part=4, device="cpu", data=tiny_config(tones).data)
    from dass import teacher_cache

    original, calls = teacher_cache.write_scores, []

    def dies_at_the_third(path, scores):
        calls.append(path)
        if len(calls) == 3:
            raise KeyboardInterrupt
        original(path, scores)

    monkeypatch.setattr(teacher_cache, "write_scores", dies_at_the_third)
    with pytest.raises(KeyboardInterrupt):
        cache_scores(config)
    with pytest.raises(TeacherError, match="another command"):
        cache_scores(replace(config, top_k=2))
    monkeypatch.setattr(
        teacher_cache, "write_scores", lambda path, scores: (calls.append(path), original(path, scores))
    )
    del calls[:]
    cache_scores(config)
    assert [path.name for path in calls] == ["train-00002.safetensors", "held-out-00000.safetensors", out.name]
    whole, again = read_scores(cache), read_scores(out)
    assert whole.names == again.names and np.array_equal(whole.keys, again.keys)
    np.testing.assert_allclose(whole.values.astype(float), again.values.astype(float), atol=2e-3)
    assert not out.with_name(out.name + ".parts").exists()


def test_training_from_the_cache_with_a_missing_clip(tones, cache, tmp_path, capsys):
    scores = read_scores(cache)
    keep = [i for i, name in enumerate(scores.names) if name != "low/0.wav"]
    fewer = {key: getattr(scores, key)[keep] for key in ("keys", "values", "checks")}
    write_scores(tmp_path / "fewer.safetensors", replace(scores, **fewer, names=tuple(scores.names[i] for i in keep)))
    distill = {"teacher": (str(tmp_path / "fewer.safetensors"),)}
    everything = {"data": {"eval": tones}, "distill": distill}
    with pytest.raises(ScoresError, match="low/0.wav"):
        Trainer(tiny_config(tones, tmp_path / "strict", **everything)).fit()
    distill["on_missing"] = "hard-label"
    result = Trainer(tiny_config(tones, tmp_path / "run", **everything)).fit()
    assert all(r["distill_loss"] > 0 for r in read_metrics(result.folder / "metrics.jsonl") if r["event"] == "step")


def test_third_party_scores(shared, tmp_path):
    from .tiny_run import TrainConfig

    folder = shared("data", "esc10")
    teacher = load_teacher(str(folder / "yamnet_scores.npz"))
    assert len(teacher.classes) == 521 and teacher.classes[0] == LabelClass(0, "/m/09x0r", "Speech")
    config = tiny_config(folder, data={"clip_seconds": 1.0, "holdout_fraction": 0.3})
    assert isinstance(config, TrainConfig)
    splits = open_splits(config.data, config.augment)
    distill = DistillConfig(teacher=("x",), class_map="esc50-audioset", loss="bce")
    ensemble: Ensemble = build_ensemble([teacher], distill, splits.classes, splits.front_end)
    batch = next(iter(build_loader(splits.held_out, batch_size=8, workers=0)))
    said = ensemble(batch, splits.held_out)
    assert said.student_classes is None and said.known is None
    archive = np.load(folder / "yamnet_scores.npz")
    row = archive["files"].tolist().index(splits.held_out.name(0))
    rain = [entry.name for entry in splits.classes].index("rain")
    names = archive["display_names"].tolist()
    listed = [other for own, other in read_class_table("esc50-audioset") if own == "rain"]
    expected = max(float(archive["probs"][row, names.index(name)]) for name in listed)
    assert said.logits[0, rain].sigmoid().item() == pytest.approx(expected, abs=2e-6)

    np.savez(tmp_path / "bad.npz", files=archive["files"], probs=archive["probs"])
    with pytest.raises(ScoresError, match="lacks mids"):
        load_teacher(str(tmp_path / "bad.npz"))


def test_a_teacher_trained_first_is_kept(tones, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    from dass.config_files import config_to_toml

    config = tiny_config(tones, distill={"teacher": ("train",)}, teacher={"architecture": "dass", "epochs": 1})
    config = replace(config, model=replace(config.model, depths=None, dims=(8, 8, 16, 16)))
    (tmp_path / "run.toml").write_text(config_to_toml(config))
    assert main(["--config", "run.toml", "--train.epochs", "1"]) == 0
    (kept,) = (tmp_path / "runs" / "teachers").iterdir()
    trained = (kept / "best" / "model.safetensors").stat().st_mtime_ns
    assert (
        kept.name.startswith("tones-dass-") and json.loads((kept / "best" / "config.json").read_text())["dims"][0] == 32
    )
    assert main(["--config", "run.toml", "--train.epochs", "1"]) == 0
    assert (kept / "best" / "model.safetensors").stat().st_mtime_ns == trained
    assert {path.name for path in (tmp_path / "runs").iterdir()} == {"teachers", "run", "run-2"}
