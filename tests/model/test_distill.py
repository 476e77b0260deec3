"""Distillation losses against independent computations in NumPy and float64, and the rules of temperature and mixing."""

import numpy as np
import pytest
import torch

from dass.distill import (
    LOSSES,
    DistillConfig,
    TeacherOutput,
    bce,
    cosine,
    distillation_losses,
    kldiv,
    l2,
    l2c,
    label_loss,
    mix_scores,
)

BATCH, CLASSES = 5, 7


@pytest.fixture
def logits():
    generator = torch.Generator().manual_seed(3)
    return tuple(4 * torch.randn(BATCH, CLASSES, generator=generator) for _ in range(2))


def softmax(x):
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("paper", [False, True])
def test_losses_against_numpy(logits, temperature, paper):
    student, teacher = (x.double().numpy() for x in logits)
    s, t = (student, teacher / temperature) if paper else (student / temperature, teacher / temperature)
    square = 1.0 if paper else temperature**2
    p, q = softmax(t), softmax(s)
    expected = {
        "kldiv": square * (p * (np.log(p) - np.log(q))).sum(-1),
        "bce": square * -(sigmoid(t) * np.log(sigmoid(s)) + (1 - sigmoid(t)) * np.log(1 - sigmoid(s))).mean(-1),
        "l2": square * ((s - t) ** 2).mean(-1),
        "cosine": 1 - (s * t).sum(-1) / np.linalg.norm(s, axis=-1) / np.linalg.norm(t, axis=-1),
    }
    expected["l2c"] = expected["l2"] + expected["cosine"]
    for name, loss in LOSSES.items():
        value = loss(*logits, temperature, paper)
        assert value.shape == (BATCH,) and value.dtype == torch.float32
        np.testing.assert_allclose(value.numpy(), expected[name], rtol=2e-5, err_msg=name)


def test_temperature_squared_keeps_the_gradient_of_l2_and_its_size_for_kldiv(logits):
    """T^2 undoes the 1/T^2 of the gradient: exactly for l2; for kldiv in the limit of large T (1503.02531, eq. 4)."""
    student, teacher = (x.double() for x in logits)
    torch.testing.assert_close(l2(student, teacher, 7.0), l2(student, teacher, 1.0))
    student.requires_grad_()
    hot = 1000.0
    loss = kldiv(student.double(), teacher.double(), hot)
    (gradient,) = torch.autograd.grad(loss.sum(), student)
    difference = student - teacher
    limit = (difference - difference.mean(-1, keepdim=True)) / CLASSES
    torch.testing.assert_close(gradient.float(), limit.detach().float(), rtol=1e-2, atol=1e-2)


def test_least_where_student_equals_teacher(logits):
    _, teacher = logits
    for name, loss in LOSSES.items():
        student = teacher.clone().double().requires_grad_()
        (gradient,) = torch.autograd.grad(loss(student, teacher.double(), 2.0).sum(), student)
        assert gradient.abs().max() < 1e-6, name
    for loss in (kldiv, l2, cosine, l2c):
        assert loss(teacher, teacher).abs().max() < 1e-5
        assert loss(teacher + torch.randn_like(teacher), teacher).min() > 0


def test_label_losses(logits):
    student, _ = logits
    target = torch.rand(BATCH, CLASSES)
    x = student.double().numpy()
    y = target.double().numpy()
    expected = -(y * np.log(sigmoid(x)) + (1 - y) * np.log(1 - sigmoid(x))).mean(-1)
    np.testing.assert_allclose(label_loss(student, target, "multi-label"), expected, rtol=2e-5)
    target /= target.sum(-1, keepdim=True)
    expected = -(target.double().numpy() * np.log(softmax(x))).sum(-1)
    np.testing.assert_allclose(label_loss(student, target, "single-label"), expected, rtol=2e-5)
    with pytest.raises(ValueError, match="multi-label"):
        label_loss(student, target, "both")


def test_weighting_and_unknown_clips(logits):
    student, teacher = logits
    target = (torch.rand(BATCH, CLASSES) > 0.5).float()
    config = DistillConfig(weight=0.3)
    alone = distillation_losses(student, target, None, config, "multi-label")
    assert set(alone) == {"loss", "label_loss"} and torch.equal(alone["loss"], alone["label_loss"])

    known = torch.tensor([True, False, True, True, False])
    placeholder = torch.where(known[:, None], teacher, torch.nan)
    parts = distillation_losses(student, target, TeacherOutput(placeholder, known=known), config, "multi-label")
    mixed = 0.7 * parts["label_loss"] + 0.3 * kldiv(student, teacher)
    torch.testing.assert_close(parts["loss"], torch.where(known, mixed, parts["label_loss"]))


def test_teacher_on_some_of_the_classes(logits):
    student, teacher = logits
    columns = torch.tensor([4, 0, 2])
    target = torch.zeros(BATCH, CLASSES)
    config = DistillConfig(loss="l2")
    output = TeacherOutput(teacher[:, :3], student_classes=columns)
    parts = distillation_losses(student, target, output, config, "multi-label")
    expected = ((student[:, [4, 0, 2]] - teacher[:, :3]) ** 2).mean(-1)
    torch.testing.assert_close(parts["distill_loss"], expected)
    with pytest.raises(ValueError, match="shape"):
        distillation_losses(student, target, TeacherOutput(teacher[:, :2], columns), config, "multi-label")


@pytest.mark.parametrize("loss", ["kldiv", "bce"])
@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_mixed_scores_are_the_mean_of_the_scores(logits, loss, temperature):
    first, second = logits
    share = torch.tensor([1.0, 0.0, 0.5, 0.3, 0.99])
    mixed = mix_scores(first, second, share, loss, temperature)
    function = softmax if loss == "kldiv" else sigmoid
    a, b, m = (function(x.double().numpy() / temperature) for x in (first, second, mixed))
    w = share.double().numpy()[:, None]
    np.testing.assert_allclose(m, w * a + (1 - w) * b, rtol=1e-4, atol=1e-7)
    assert torch.equal(mixed[0], first[0])


@pytest.mark.parametrize("loss", [kldiv, bce, l2, cosine])
def test_gradients(logits, loss):
    student, teacher = logits
    student = student.double().requires_grad_()
    assert torch.autograd.gradcheck(lambda s: loss(s, teacher.double(), 2.0), student)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"weight": 1.5}, "distill.weight"),
        ({"temperature": 0.0}, "distill.temperature"),
        ({"teacher": ("a", "b"), "teacher_weights": (1.0,)}, "distill.teacher_weights"),
        ({"teacher": ("a",), "teacher_weights": (-1.0,)}, "distill.teacher_weights"),
    ],
)
def test_bad_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        DistillConfig(**options)
