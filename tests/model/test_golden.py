"""The published model's own outputs: what loads a published checkpoint rightly reproduces its logits."""

import importlib.util
import json

import numpy as np
import pytest
import torch

from dass import DASS

TOLERANCE = 2e-4
CASES = [("small", 128), ("small", 1000), ("medium", 64)]


@pytest.fixture(scope="module")
def golden(shared):
    """golden(size, frames): the checkpoint's tensors, the input and the logits."""
    spec = importlib.util.spec_from_file_location("golden_weights", shared("golden", "weights.py"))
    weights = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(weights)

    def load(size, frames):
        shapes = json.loads(shared("golden", f"dass_{size}.shapes.json").read_text())
        logits = np.load(shared("golden", f"dass_{size}_T{frames}.npz"))["logits"]
        tensors = {name: torch.from_numpy(value) for name, value in weights.fill(shapes, "A").items()}
        return tensors, torch.from_numpy(weights.golden_input(frames)), torch.from_numpy(logits)

    return load


def check(path, fbank, logits, **options):
    model = DASS.from_pretrained(path, **options)
    with torch.no_grad():
        torch.testing.assert_close(model(fbank), logits, rtol=0, atol=TOLERANCE)
    return model


@pytest.mark.parametrize(("size", "frames"), CASES)
def test_research_checkpoint(golden, tmp_path, size, frames):
    tensors, fbank, logits = golden(size, frames)
    torch.save({f"module.{name}": tensor for name, tensor in tensors.items()}, tmp_path / "DASS.pth")
    model = check(tmp_path / "DASS.pth", fbank, logits)
    assert model.config.depths == ((2, 2, 8, 2) if size == "small" else (2, 2, 20, 2))
    assert model.config.drop_path_rate == (0.2 if size == "small" else 0.3)


def test_reference_backend(golden, tmp_path):
    tensors, fbank, logits = golden("medium", 64)
    torch.save(tensors, tmp_path / "DASS.pth")
    check(tmp_path / "DASS.pth", fbank, logits, backend="reference")


def test_published_layout(golden, tmp_path):
    """The file that a conversion to the hub's layout makes, and the one we write, are the same but for shapes."""
    from dass.checkpoint import read_tensors, write_tensors

    tensors, fbank, logits = golden("small", 128)
    patch = {"0": "0", "2": "1", "5": "3", "7": "4"}
    hub = {}
    for name, tensor in tensors.items():
        name = name.removeprefix("v.")
        if name.startswith("patch_embed."):
            _, index, leaf = name.split(".")
            name = f"patch_embeddings.projection.{patch[index]}.{leaf}"
        name = name.replace("classifier.", "").replace("downsample.1.", "downsample.down.")
        name = name.replace("downsample.3.", "downsample.norm.").replace("_projs_weight", "_projs.weight")
        if "x_proj_weight" in name or "dt_projs.weight" in name:
            tensor = tensor.flatten(0, 1)
        name = name.replace("x_proj_weight", "x_proj.weight")
        hub[name if name.startswith("head.") else f"dass.{name}"] = tensor
    write_tensors(tmp_path / "hub" / "model.safetensors", hub)
    model = check(tmp_path / "hub", fbank, logits)
    written = read_tensors(model.save_pretrained(tmp_path / "ours") / "model.safetensors")
    assert set(written) == set(hub)
    for name, tensor in hub.items():
        assert written[name].dtype == torch.float32 and torch.equal(written[name], tensor), name
