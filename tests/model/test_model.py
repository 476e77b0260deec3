"""The network: sizes, any length, its definition, training, autocast, compilation and export."""

import copy
import math
import subprocess
import sys

import pytest
import torch
from torch.nn import functional as F

from dass import DASS, DASSConfig
from dass.blocks import StochasticDepth
from dass.ss2d import SS2D
from dass_ops import reference


def small_model(seed=0, num_classes=5, **changes):
    """A model of two short stages, with every parameter moved away from its initial value."""
    torch.manual_seed(seed)
    fields = {"depths": (1, 2), "dims": (16, 40), "mel_bins": 24, "drop_path_rate": 0.0, **changes}
    config = DASSConfig(num_classes=num_classes, **fields)
    model = DASS(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def spectrogram(batch=2, frames=21, mel_bins=24, seed=1, dtype=torch.float32):
    return torch.randn(batch, frames, mel_bins, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize(
    ("size", "classes", "count"),
    [
        ("small", 527, 29_884_463),
        ("medium", 527, 48_648_239),
        ("tiny", 10, 853_042),
    ],
)
def test_parameter_counts_are_the_published_ones(size, classes, count):
    model = DASS(DASSConfig.of_size(size, classes))
    assert sum(p.numel() for p in model.parameters()) == count


def channel_first(model, fbank):
    """The published network, written a second time: maps (batch, channels, height, width), 1x1 convolutions."""
    p = dict(model.named_parameters())

    def norm(x, name):
        y = (x - x.mean(1, keepdim=True)) / torch.sqrt(x.var(1, keepdim=True, unbiased=False) + 1e-5)
        return y * p[f"{name}.weight"][:, None, None] + p[f"{name}.bias"][:, None, None]

    def conv(x, name, stride=1, groups=1):
        weight = p[f"{name}.weight"]
        weight = weight if weight.ndim == 4 else weight[:, :, None, None]
        return F.conv2d(x, weight, p.get(f"{name}.bias"), stride, weight.shape[-1] // 2, groups=groups)

    x = fbank.transpose(1, 2)[:, None]
    x = F.gelu(norm(conv(x, "patch_embeddings.projection.0", 2), "patch_embeddings.projection.1"))
    x = norm(conv(x, "patch_embeddings.projection.3", 2), "patch_embeddings.projection.4")
    for i, depth in enumerate(model.config.depths):
        for name in (f"layers.{i}.blocks.{j}" for j in range(depth)):
            y = conv(norm(x, f"{name}.norm"), f"{name}.op.in_proj")
            y = F.silu(conv(y, f"{name}.op.conv2d", groups=y.shape[1]))
            x_dbl = torch.einsum("kcd,bdhw->bkchw", p[f"{name}.op.x_proj_weight"], y)
            scan = [p[f"{name}.op.{leaf}"] for leaf in ("dt_projs_weight", "dt_projs_bias", "A_logs", "Ds")]
            y = norm(reference.ss2d(y, x_dbl, *scan), f"{name}.op.out_norm")
            x = x + conv(y, f"{name}.op.out_proj")
            x = x + conv(F.gelu(conv(norm(x, f"{name}.norm2"), f"{name}.mlp.fc1")), f"{name}.mlp.fc2")
        if i + 1 < len(model.config.depths):
            x = norm(conv(x, f"layers.{i}.downsample.down", 2), f"layers.{i}.downsample.norm")
    return F.linear(norm(x, "norm").mean((2, 3)), p["head.weight"], p["head.bias"])


@pytest.mark.parametrize("frames", [1, 2, 21])
def test_it_computes_the_published_network(frames):
    model = small_model().double()
    fbank = spectrogram(frames=frames, dtype=torch.float64)
    torch.testing.assert_close(model(fbank), channel_first(model, fbank), rtol=1e-9, atol=1e-11)


def test_gradients_are_those_of_the_published_network():
    model = small_model().double()
    fbank, seed = spectrogram(dtype=torch.float64), torch.randn(2, 5, dtype=torch.float64)
    names, parameters = zip(*model.named_parameters(), strict=True)
    ours = torch.autograd.grad(model(fbank), parameters, seed)
    expected = torch.autograd.grad(channel_first(model, fbank), parameters, seed)
    for name, a, b in zip(names, ours, expected, strict=True):
        assert a.abs().max() > 0, name
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-10, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("frames", [1, 2, 3, 7, 8, 9, 33, 100])
def test_any_number_of_frames(frames):
    model = DASS(DASSConfig.tiny(num_classes=3))
    logits = model(spectrogram(frames=frames, mel_bins=128))
    assert logits.shape == (2, 3) and torch.isfinite(logits).all()


def test_examples_do_not_see_each_other():
    model, fbank = small_model(), spectrogram(batch=3)
    torch.testing.assert_close(model(fbank)[1:2], model(fbank[1:2]), rtol=1e-5, atol=1e-6)
    assert model(fbank[:0]).shape == (0, 5)


def test_strides_and_dtype_of_the_input_do_not_matter():
    model, fbank = small_model(), spectrogram()
    assert torch.equal(model(fbank.transpose(1, 2).contiguous().transpose(1, 2)), model(fbank))
    assert torch.equal(model(fbank.double()), model(fbank))


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((21, 24), r"\(21, 24\); expected \(batch, frames, 24 mel bins\).*unsqueeze\(0\)"),
        ((2, 24, 21), r"looks transposed"),
        ((2, 21, 128), r"expected \(batch, frames, 24 mel bins\)"),
        ((2, 0, 24), r"1 frame or more"),
    ],
)
def test_a_wrong_input_is_told_what_is_expected(shape, message):
    with pytest.raises(ValueError, match=message):
        small_model()(torch.zeros(shape))


def test_an_integer_input_is_refused():
    with pytest.raises(TypeError, match="int64"):
        small_model()(torch.zeros(1, 4, 24, dtype=torch.int64))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"depths": (1, 2, 3)}, "one positive number a stage"),
        ({"depths": (1, 0)}, "one positive number a stage"),
        ({"dims": (15, 40)}, "dims starts with 15; expected an even"),
        ({"num_classes": 0}, "num_classes is 0"),
        ({"mel_bins": 0}, "mel_bins is 0"),
        ({"drop_path_rate": 1.0}, "drop_path_rate is 1.0"),
        ({"id2label": {0: "a", 2: "b"}, "num_classes": 2}, "indices 0 to 2; expected one for each of the 2 classes"),
    ],
)
def test_a_wrong_configuration_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        DASSConfig(**{"depths": (1, 1), "dims": (16, 40)} | changes)


def test_sizes_by_name_and_labels():
    assert DASSConfig.of_size("medium") == DASSConfig.medium() and DASSConfig() == DASSConfig.small()
    with pytest.raises(ValueError, match="'smal'.*tiny, small, medium.*Did you mean 'small'"):
        DASSConfig.of_size("smal")
    config = DASSConfig.tiny(2, id2label={"1": "dog", "0": "cat"})
    assert config.labels == ("cat", "dog") and DASSConfig.tiny(2).labels == ("class 0", "class 1")


def test_initial_values():
    torch.manual_seed(0)
    model = DASS(DASSConfig.small(num_classes=300))
    op: SS2D = model.layers[3].blocks[0].op
    dt = F.softplus(op.dt_projs_bias)
    assert dt.min() >= 1e-3 * 0.999 and dt.max() <= 0.1 * 1.001
    share = (dt.log() - math.log(1e-3)) / math.log(100)  # uniform on [0, 1] where dt is log-uniform
    assert abs(share.mean() - 0.5) < 0.03 and abs(share.std() - 12**-0.5) < 0.02
    assert op.dt_projs_weight.abs().max() <= 48**-0.5 and op.dt_projs_weight.std() > 0.5 * 48**-0.5
    assert torch.all(op.A_logs == 0) and torch.all(op.Ds == 1)
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear):
            assert abs(module.weight.std() - 0.02) < 1e-3 and module.weight.abs().max() <= 2, name
            assert module.bias is None or torch.all(module.bias == 0), name
        if isinstance(module, torch.nn.LayerNorm):
            assert module.eps == 1e-5 and torch.all(module.weight == 1) and torch.all(module.bias == 0), name


def test_stochastic_depth():
    drop = StochasticDepth(0.25).train()
    torch.manual_seed(0)
    y = drop(torch.ones(4000, 3, 2, 1))
    values = y.flatten(1)
    assert torch.all(values == values[:, :1])  # a whole example at a time
    assert set(values[:, 0].tolist()) == {0.0, torch.tensor(1 / 0.75).item()}
    assert abs(y.mean() - 1) < 0.03
    assert torch.all(drop.eval()(torch.ones(50, 2)) == 1)
    rates = [m.rate for m in DASS(DASSConfig.tiny(drop_path_rate=0.2)).modules() if isinstance(m, StochasticDepth)]
    assert rates == pytest.approx([0.0, 0.05, 0.1, 0.15, 0.2])


def loss_and_gradients(model, fbank, seed=3):
    torch.manual_seed(seed)
    model.zero_grad()
    loss = model(fbank).square().sum()
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters()}


def test_gradient_checkpointing_gives_the_same_bits_from_less_memory():
    model = small_model(drop_path_rate=0.5).train()
    fbank, saved = spectrogram(batch=4), {}

    def run(checkpointing):
        model.set_gradient_checkpointing(checkpointing)
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: (sizes.append(t.numel()), t)[1], lambda t: t):
            torch.manual_seed(3)
            model(fbank)
        saved[checkpointing] = sum(sizes)
        return loss_and_gradients(model, fbank)

    (loss, gradients), (loss_again, gradients_again) = run(False), run(True)
    assert torch.equal(loss, loss_again)
    for name, gradient in gradients.items():
        assert torch.equal(gradient, gradients_again[name]), name
    assert saved[True] < saved[False] / 3


def test_training_is_repeatable_and_copies_train_alike():
    model, fbank = small_model(drop_path_rate=0.3).train(), spectrogram(batch=4)
    loss, gradients = loss_and_gradients(model, fbank)
    for other in (model, copy.deepcopy(model)):
        again, gradients_again = loss_and_gradients(other, fbank)
        assert torch.equal(loss, again)
        assert all(torch.equal(g, gradients_again[name]) for name, g in gradients.items())


def test_it_learns():
    """A few steps on one batch bring its loss down to a small part: every sign and scale in training is right."""
    torch.manual_seed(0)
    model = DASS(DASSConfig(depths=(1, 1), dims=(16, 32), mel_bins=24, num_classes=4)).train()
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    fbank, target = spectrogram(batch=8), F.one_hot(torch.arange(8) % 4, 4).float()
    losses = []
    for _ in range(40):
        loss = F.binary_cross_entropy_with_logits(model(fbank), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.2 * losses[0], losses


def test_bfloat16_autocast():
    model, fbank = small_model(drop_path_rate=0.2).train(), spectrogram(frames=40)
    expected, exact = loss_and_gradients(model, fbank)
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(fbank)
        assert logits.dtype == torch.float32  # the head is not rounded
        loss, gradients = loss_and_gradients(model, fbank)
    torch.testing.assert_close(loss, expected, rtol=0.05, atol=0)
    for name, gradient in gradients.items():
        assert gradient.dtype == torch.float32
        error = (gradient - exact[name]).norm() / exact[name].norm()
        assert error < 0.1, (name, error)


def test_bfloat16_parameters():
    model, fbank = small_model(), spectrogram(frames=40)
    expected = model(fbank)
    logits = model.to(torch.bfloat16)(fbank)
    assert logits.dtype == torch.bfloat16
    assert (logits - expected).norm() / expected.norm() < 0.05


def test_the_backend_is_passed_to_the_operator():
    model, fbank = DASS(DASSConfig.tiny(2), backend="reference"), spectrogram(mel_bins=128)
    assert model.backend == "reference" and model(fbank).shape == (2, 2)
    model.backend = "nonsense"
    with pytest.raises(ValueError, match="nonsense"):
        model(fbank)


def test_compile_without_graph_breaks():
    model, fbank = small_model(drop_path_rate=0.2).eval(), spectrogram()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(fbank), model(fbank))
    torch._dynamo.reset()


@pytest.mark.slow
def test_compile_with_inductor_trains_on_any_length():
    model = small_model(depths=(1, 1)).train()
    compiled = torch.compile(model, fullgraph=True, dynamic=True)
    for frames in (21, 34):
        fbank = spectrogram(frames=frames)
        expected, gradients = loss_and_gradients(model, fbank)
        model.zero_grad()
        loss = compiled(fbank).square().sum()
        loss.backward()
        torch.testing.assert_close(loss, expected, rtol=1e-4, atol=0)
        for name, parameter in model.named_parameters():
            torch.testing.assert_close(parameter.grad, gradients[name], rtol=1e-3, atol=1e-4)
    torch._dynamo.reset()


def test_export_with_any_number_of_frames_and_examples(tmp_path):
    model = small_model()
    sizes = {0: torch.export.Dim("batch"), 1: torch.export.Dim("frames", min=9)}
    with torch.no_grad():
        program = torch.export.export(model, (spectrogram(),), dynamic_shapes={"fbank": sizes})
    torch.export.save(program, tmp_path / "model.pt2")
    exported = torch.export.load(tmp_path / "model.pt2").module()
    for batch, frames in ((2, 21), (3, 600)):
        fbank = spectrogram(batch, frames)
        torch.testing.assert_close(exported(fbank), model(fbank), rtol=1e-5, atol=1e-6)


def test_import_is_light_and_every_name_is_there():
    program = (
        "import sys, dass; assert 'torch' not in sys.modules, 'torch'; assert 'DASS' in dir(dass)\n"
        "from dass import DASS, DASSConfig\n"
        "assert not {'sklearn', 'matplotlib', 'transformers', 'triton', 'huggingface_hub'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
    import dass

    for name in dass.__all__:
        assert getattr(dass, name).__name__ == name
    with pytest.raises(AttributeError, match="DASSS"):
        dass.DASSS  # noqa: B018
