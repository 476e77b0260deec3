"""Checkpoints in every layout, found wherever they may lie, and named for what is wrong with them."""

import json
import re
import sys

import pytest
import torch

from dass import DASS, CheckpointError, DASSConfig
from dass.checkpoint import read_json, read_tensors, write_json, write_tensors

FRONT_END = {
    "sample_rate": 16000, "mel_bins": 128, "frame_shift": 10.0, "frames": 100, "mean": -6.6268077, "std": 5.358466,
}  # fmt: skip


@pytest.fixture
def model():
    torch.manual_seed(0)
    config = DASSConfig(
        depths=(1, 3, 2), dims=(8, 40, 24), num_classes=3, drop_path_rate=0.15,
        id2label={0: "dog", 1: "cat", 2: "Türglocke"},
    )  # fmt: skip
    return DASS(config, front_end=FRONT_END).eval()


FBANK = torch.randn(2, 20, 128, generator=torch.Generator().manual_seed(1))


def research(model, prefix="module.v."):
    """The tensors under the names of the research checkpoints."""
    tensors = {}
    for name, tensor in model.state_dict().items():
        for ours, theirs in (
            ("patch_embeddings.projection.4", "patch_embed.7"),
            ("patch_embeddings.projection.3", "patch_embed.5"),
            ("patch_embeddings.projection.1", "patch_embed.2"),
            ("patch_embeddings.projection.0", "patch_embed.0"),
            ("downsample.down", "downsample.1"),
            ("downsample.norm", "downsample.3"),
        ):
            name = name.replace(ours, theirs)
        name = re.sub(r"^(norm|head)\.", r"classifier.\1.", name)
        tensors[prefix + name] = tensor
    return tensors


def vmamba(model, classes=1000):
    """The same tensors as an ImageNet checkpoint: three colours whose sum is our first convolution."""
    tensors = research(model, prefix="")
    first = tensors["patch_embed.0.weight"]
    colours = torch.randn(first.shape[0], 2, 3, 3)
    tensors["patch_embed.0.weight"] = torch.cat([colours, first - colours.sum(1, keepdim=True)], 1)
    width = model.config.dims[-1]
    tensors["classifier.head.weight"], tensors["classifier.head.bias"] = (
        torch.randn(classes, width),
        torch.randn(classes),
    )
    # Some of these files hold the linear layers as 1x1 convolutions.
    return {k: v[:, :, None, None] if k.endswith(("proj.weight", "fc1.weight")) else v for k, v in tensors.items()}


def assert_same(loaded, model):
    ours, theirs = loaded.state_dict(), model.state_dict()
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert ours[name].dtype == torch.float32 and torch.equal(ours[name], tensor), name
    with torch.no_grad():
        assert torch.equal(loaded(FBANK), model(FBANK))


def test_round_trip_is_bitwise_and_keeps_everything(model, tmp_path):
    assert model.train().save_pretrained(tmp_path / "new" / "folder") == tmp_path / "new" / "folder"
    loaded = DASS.from_pretrained(tmp_path / "new" / "folder", backend="reference")
    assert loaded.config == model.config and loaded.front_end == FRONT_END and loaded.backend == "reference"
    assert not loaded.training and all(p.requires_grad and p.is_leaf for p in loaded.parameters())
    loaded.backend = None
    assert_same(loaded, model.eval())


def test_the_number_of_mel_bins_is_kept(tmp_path):
    DASS(DASSConfig(depths=(1,), dims=(8,), mel_bins=40)).save_pretrained(tmp_path)
    assert DASS.from_pretrained(tmp_path).config.mel_bins == 40


def test_what_is_saved_is_the_published_layout(model, tmp_path):
    model.save_pretrained(tmp_path)
    config = read_json(tmp_path / "config.json")
    assert config["model_type"] == "dass" and config["architectures"] == ["DASSForAudioClassification"]
    assert config["depths"] == [1, 3, 2] and config["dims"] == [8, 40, 24] and config["embed_dim"] == 8
    assert config["num_classes"] == 3 and config["num_mel_bins"] == 128 and config["drop_path_rate"] == 0.15
    assert config["max_length"] == 100 and config["patch_size"] == 4 and config["use_checkpoint"] is False
    assert config["id2label"] == {"0": "dog", "1": "cat", "2": "Türglocke"}
    assert config["label2id"] == {"dog": 0, "cat": 1, "Türglocke": 2}
    assert config["front_end"] == FRONT_END
    tensors = read_tensors(tmp_path / "model.safetensors")
    block = "dass.layers.1.blocks.2.op"
    assert tensors[f"{block}.x_proj.weight"].shape == (4 * (3 + 2), 40)
    assert tensors[f"{block}.dt_projs.weight"].shape == (4 * 40, 3)
    assert tensors[f"{block}.dt_projs_bias"].shape == (4, 40)
    assert tensors[f"{block}.A_logs"].shape == (160, 1) and tensors[f"{block}.Ds"].shape == (160,)
    assert tensors["head.weight"].shape == (3, 24) and tensors["dass.norm.bias"].shape == (24,)
    assert {name.split(".")[0] for name in tensors} == {"dass", "head"}


@pytest.mark.slow
def test_transformers_understands_the_configuration(model, tmp_path):
    transformers = pytest.importorskip("transformers")
    model.save_pretrained(tmp_path)
    config = transformers.PretrainedConfig.from_pretrained(tmp_path)
    assert config.num_labels == 3 and config.id2label[2] == "Türglocke" and config.label2id["cat"] == 1
    extractor = read_json(tmp_path / "preprocessor_config.json")
    assert transformers.ASTFeatureExtractor(**extractor).mean == FRONT_END["mean"]


@pytest.mark.parametrize("prefix", ["module.v.", "v.", "", "_orig_mod.module.v."])
def test_research_layout(model, tmp_path, prefix):
    torch.save(research(model, prefix), tmp_path / "DASS_small.pth")
    loaded = DASS.from_pretrained(tmp_path / "DASS_small.pth")
    assert_same(loaded, model)
    assert loaded.config.depths == (1, 3, 2) and loaded.config.dims == (8, 40, 24)
    assert loaded.config.id2label is None and loaded.front_end is None


@pytest.mark.parametrize("container", ["model", "state_dict", "model_state_dict"])
def test_tensors_among_a_training_programs_other_state(model, tmp_path, container):
    state = {"epoch": torch.tensor(3), container: research(model, "v."), "optimizer": {"lr": 0.1}}
    torch.save(state, tmp_path / "last.pt")
    assert_same(DASS.from_pretrained(tmp_path / "last.pt"), model)


def test_our_own_state_dict(model, tmp_path):
    torch.save(model.state_dict(), tmp_path / "state.pt")
    assert_same(DASS.from_pretrained(tmp_path / "state.pt"), model)


def test_half_precision_is_read_as_float32(model, tmp_path):
    model.to(torch.bfloat16).save_pretrained(tmp_path)
    assert read_tensors(tmp_path / "model.safetensors")["head.weight"].dtype == torch.bfloat16
    assert_same(DASS.from_pretrained(tmp_path), model.float())


def test_published_front_end_is_read_from_the_feature_extractor(model, tmp_path):
    model.save_pretrained(tmp_path)
    config = read_json(tmp_path / "config.json")
    del config["front_end"]
    write_json(tmp_path / "config.json", config)
    front_end = DASS.from_pretrained(tmp_path).front_end
    assert front_end == {k: v for k, v in FRONT_END.items() if k != "frame_shift"}
    extractor = read_json(tmp_path / "preprocessor_config.json")
    write_json(tmp_path / "preprocessor_config.json", extractor | {"do_normalize": False})
    assert DASS.from_pretrained(tmp_path).front_end == front_end | {"mean": 0.0, "std": 0.5}
    model.front_end = None
    model.save_pretrained(tmp_path / "without")
    assert DASS.from_pretrained(tmp_path / "without").front_end is None


def test_sizes_come_from_the_tensors_and_impossible_labels_are_left_out(model, tmp_path):
    model.save_pretrained(tmp_path)
    config = read_json(tmp_path / "config.json")
    write_json(tmp_path / "config.json", config | {"depths": [2, 2, 8, 2], "dims": [96, 192, 384, 768]})
    assert_same(DASS.from_pretrained(tmp_path), model)
    write_json(tmp_path / "config.json", config | {"id2label": {"0": "LABEL_0", "1": "LABEL_1"}})
    with pytest.warns(UserWarning, match="config.json names 2 classes, the head has 3"):
        assert DASS.from_pretrained(tmp_path).config.id2label is None


def test_imagenet_checkpoint_starts_an_audio_model(model, tmp_path):
    torch.save({"model": vmamba(model)}, tmp_path / "vssm.pth")
    loaded = DASS.from_pretrained(tmp_path / "vssm.pth", num_classes=7)
    assert loaded.config.num_classes == 7 and loaded.head.weight.shape == (7, 24)
    assert 0.01 < loaded.head.weight.std() < 0.03 and torch.all(loaded.head.bias == 0)
    assert DASS.from_pretrained(tmp_path / "vssm.pth").config.num_classes == 527
    for name, tensor in model.state_dict().items():
        if not name.startswith("head."):
            torch.testing.assert_close(loaded.state_dict()[name], tensor, rtol=1e-5, atol=1e-6)
    with torch.no_grad():
        torch.testing.assert_close(loaded.embed(FBANK), model.embed(FBANK), rtol=1e-4, atol=1e-5)


def test_new_heads(model, tmp_path):
    model.save_pretrained(tmp_path)
    other = DASS.from_pretrained(tmp_path, num_classes=4, drop_path_rate=0.3)
    assert other.head.weight.shape == (4, 24) and other.config.id2label is None
    assert other.config.drop_path_rate == 0.3 and other.layers[2].blocks[1].drop_path.rate == 0.3
    named = DASS.from_pretrained(tmp_path, new_head=True, id2label={0: "a", 1: "b", 2: "c"})
    assert named.config.labels == ("a", "b", "c") and not torch.equal(named.head.weight, model.head.weight)
    kept = DASS.from_pretrained(tmp_path, num_classes=3)
    assert torch.equal(kept.head.weight, model.head.weight) and kept.config.labels == model.config.labels
    backbone = {k: v for k, v in model.state_dict().items() if not k.startswith("head.")}
    torch.save(backbone, tmp_path / "backbone.pth")
    assert DASS.from_pretrained(tmp_path / "backbone.pth", num_classes=2).config.num_classes == 2
    with pytest.raises(CheckpointError, match="has no head.*Give num_classes"):
        DASS.from_pretrained(tmp_path / "backbone.pth")


def test_loading_draws_no_random_numbers(model, tmp_path):
    model.save_pretrained(tmp_path)
    before = torch.get_rng_state()
    DASS.from_pretrained(tmp_path)
    assert torch.equal(torch.get_rng_state(), before)


def test_folders(model, tmp_path):
    model.save_pretrained(tmp_path / "run" / "best")
    (tmp_path / "run" / "state").mkdir()
    torch.save({"step": 1}, tmp_path / "run" / "state" / "state.pt")
    assert_same(DASS.from_pretrained(str(tmp_path / "run")), model)
    torch.save(research(model), tmp_path / "a.pth")
    assert_same(DASS.from_pretrained(tmp_path), model)
    torch.save(research(model), tmp_path / "b.pth")
    with pytest.raises(CheckpointError, match=r"several checkpoints \(a.pth, b.pth\): name one"):
        DASS.from_pretrained(tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match="holds no checkpoint. Expected model.safetensors"):
        DASS.from_pretrained(tmp_path / "empty")
    model.save_pretrained(tmp_path / "empty" / "last")
    with pytest.raises(CheckpointError, match="There is .*last, a run's last state"):
        DASS.from_pretrained(tmp_path / "empty")
    for absent in (tmp_path / "absent.pth", "absent.pth", "some/absent.pth", "no-such-run"):
        with pytest.raises(FileNotFoundError, match="no checkpoint .*absent|no-such-run"):
            DASS.from_pretrained(absent)


def test_the_hub(model, tmp_path, monkeypatch):
    """`owner/name`, where no such path exists, is fetched: safetensors first, else the pickled file."""
    hub = pytest.importorskip("huggingface_hub")
    cache, calls = tmp_path / "cache", []

    def snapshot_download(repository, *, revision, allow_patterns):
        calls.append((repository, revision, allow_patterns))
        if repository == "someone/pickled" and "pytorch_model.bin" in allow_patterns:
            torch.save(research(model, "v."), cache / "pytorch_model.bin")
        if repository == "saurabhati/DASS_small_AudioSet_47.2":
            model.save_pretrained(cache)
        if repository == "someone/gone":
            raise OSError("Repository Not Found for url")
        cache.mkdir(exist_ok=True)
        return str(cache)

    monkeypatch.setattr(hub, "snapshot_download", snapshot_download)
    monkeypatch.chdir(tmp_path)
    assert_same(DASS.from_pretrained("someone/pickled"), model)
    loaded = DASS.from_pretrained("saurabhati/DASS_small_AudioSet_47.2", revision="main")
    assert_same(loaded, model)
    assert loaded.config.labels == ("dog", "cat", "Türglocke")
    assert calls[-1] == (
        "saurabhati/DASS_small_AudioSet_47.2", "main", ["model.safetensors", "config.json", "preprocessor_config.json"],
    )  # fmt: skip
    with pytest.raises(CheckpointError, match="'someone/gone'.*not be fetched from the hub: Repository Not Found"):
        DASS.from_pretrained("someone/gone")
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(CheckpointError, match="pip install huggingface_hub"):
        DASS.from_pretrained("someone/pickled")


def broken(model, tmp_path, change):
    tensors = research(model)
    change(tensors)
    torch.save(tensors, tmp_path / "broken.pth")
    with pytest.raises(CheckpointError) as caught:
        DASS.from_pretrained(tmp_path / "broken.pth")
    assert "broken.pth does not fit a DASS" in str(caught.value)
    return str(caught.value)


BLOCK = "module.v.layers.1.blocks.0"


def test_missing_tensors_are_named(model, tmp_path):
    message = broken(model, tmp_path, lambda t: [t.pop(f"{BLOCK}.op.Ds"), t.pop(f"{BLOCK}.mlp.fc1.bias")])
    assert "2 missing: layers.1.blocks.0.op.Ds, layers.1.blocks.0.mlp.fc1.bias" in message
    assert "unexpected" not in message and "misshapen" not in message


def test_unexpected_tensors_are_named_as_in_the_file(model, tmp_path):
    message = broken(model, tmp_path, lambda t: t.update({f"{BLOCK}.op.conv2d.bias": torch.ones(40)}))
    assert f"1 unexpected: {BLOCK}.op.conv2d.bias" in message and "missing" not in message


@pytest.mark.parametrize(
    ("name", "tensor", "told"),
    [
        ("mlp.fc1.weight", torch.ones(40, 160), r"(40, 160) for (160, 40)"),
        ("op.x_proj_weight", torch.ones(4, 40, 5), "(4, 40, 5) for (4, 5, 40)"),
        ("op.Ds", torch.ones(150), "(150,) for (160,)"),
        ("op.Ds", torch.ones(160, dtype=torch.int64), "(160,) torch.int64 for (160,)"),
    ],
)
def test_misshapen_tensors_are_named_with_both_shapes(model, tmp_path, name, tensor, told):
    message = broken(model, tmp_path, lambda t: t.update({f"{BLOCK}.{name}": tensor}))
    assert f"1 misshapen: {BLOCK}.{name} {told}" in message


def test_a_lost_block_or_stage_is_named(model, tmp_path):
    def lose(prefix):
        return lambda t: [t.pop(name) for name in list(t) if name.startswith(prefix)]

    assert "18 missing: layers.1.blocks.0.norm.weight" in broken(model, tmp_path, lose(BLOCK + "."))
    tensors = research(model)
    lose("module.v.layers.1.blocks")(tensors)
    torch.save(tensors, tmp_path / "broken.pth")
    with pytest.raises(CheckpointError, match="is incomplete: of 3 stages.*layers.1"):
        DASS.from_pretrained(tmp_path / "broken.pth")


def test_a_name_given_twice(model, tmp_path):
    write_tensors(tmp_path / "twice.safetensors", research(model) | research(model, "v."))
    with pytest.raises(CheckpointError, match=r"twice: as 'module\.v\..*' and as 'v\.|twice: as 'v\."):
        DASS.from_pretrained(tmp_path / "twice.safetensors")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            {"module.v.cls_token": torch.ones(1, 1, 768), "module.v.blocks.0.attn.qkv.bias": torch.ones(9)},
            r"not a DASS checkpoint: none of its 2 tensors \(module.v.cls_token, .*qkv.bias\)",
        ),
        ({"epoch": 3, "config": {"lr": 0.1}}, "holds no named tensors but a dict with epoch, config"),
        ({}, "an empty dict"),
        ([torch.ones(2)], "a list"),
        (torch.ones(2), "a Tensor"),
    ],
)
def test_foreign_files(tmp_path, content, message):
    torch.save(content, tmp_path / "other.pth")
    with pytest.raises(CheckpointError, match=f"other.pth .*{message}"):
        DASS.from_pretrained(tmp_path / "other.pth")


@pytest.mark.parametrize("name", ["model.safetensors", "DASS.pth"])
def test_truncated_files(model, tmp_path, name):
    if name == "DASS.pth":
        torch.save(research(model), tmp_path / name)
    else:
        model.save_pretrained(tmp_path)
    whole = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(whole[: len(whole) // 2])
    with pytest.raises(CheckpointError, match=f"{name} .* cannot be read as .* cut short"):
        DASS.from_pretrained(tmp_path)


class Execution:
    """A pickle that would run a command when loaded."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def test_nothing_in_a_file_is_executed(model, tmp_path):
    torch.save({"model": research(model), "config": Execution(tmp_path / "executed")}, tmp_path / "evil.pth")
    with pytest.raises(CheckpointError, match="evil.pth holds Python objects besides tensors.*open"):
        DASS.from_pretrained(tmp_path / "evil.pth")
    assert not (tmp_path / "executed").exists()


def test_a_broken_configuration_is_named(model, tmp_path):
    model.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"depths": [1]})[:-3])
    with pytest.raises(CheckpointError, match="config.json is not JSON"):
        DASS.from_pretrained(tmp_path)
