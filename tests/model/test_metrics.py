"""Metrics against worked examples, classes without positives, and the CSV."""

import math

import numpy as np
import pytest

from dass.metrics import compute_metrics, confusion, d_prime


def test_a_worked_example():
    # Class 0: ranks of the positives 1 and 3 -> AP = (1/1 + 2/3) / 2; AUC = 3 of 4 pairs. Class 1: perfect.
    scores = np.array([[4.0, 1], [3, 2], [2, -1], [1, -3]])
    target = np.array([[1.0, 1], [0, 1], [1, 0], [0, 0]])
    metrics = compute_metrics(scores, target, [("/m/0", "speech"), ("/m/1", "music")])
    first, second = metrics.classes
    assert first.average_precision == pytest.approx(5 / 6) and first.auc == pytest.approx(0.75)
    assert second.average_precision == 1 and second.auc == 1
    assert metrics.map == pytest.approx((5 / 6 + 1) / 2) and metrics.auc == pytest.approx(0.875)
    assert metrics.d_prime == pytest.approx(math.sqrt(2) * 1.1503493803760079)
    assert metrics.accuracy is None and metrics.undefined == ()
    assert metrics.to_csv().splitlines()[1:] == [
        "0,/m/0,speech,2,0.833333,0.750000",
        "1,/m/1,music,2,1.000000,1.000000",
    ]


def test_classes_without_positives_are_left_out_and_named():
    scores = np.random.default_rng(0).normal(size=(6, 3))
    target = np.zeros((6, 3))
    target[:3, 0] = 1
    target[:, 2] = 1  # no negatives: an AP, but no AUC
    metrics = compute_metrics(scores, target, [("a", "dog"), ("b", "cat"), ("c", "rain")])
    assert metrics.undefined == ("cat",)
    assert metrics.classes[1].average_precision is None and metrics.classes[2].auc is None
    assert metrics.map == pytest.approx((metrics.classes[0].average_precision + 1.0) / 2)
    assert metrics.auc == pytest.approx(metrics.classes[0].auc)
    assert metrics.to_csv().splitlines()[2] == "1,b,cat,0,,"


def test_accuracy_and_confusion_of_single_labels():
    scores = np.array([[2.0, 1, 0], [0, 3, 1], [0, 1, 2], [5, 1, 2]])
    target = np.eye(3)[[0, 1, 2, 2]]
    metrics = compute_metrics(scores, target)
    assert metrics.accuracy == 0.75 and metrics.summary()["accuracy"] == 0.75
    assert confusion(scores, target).tolist() == [[1, 0, 0], [0, 1, 0], [1, 0, 1]]


def test_d_prime_is_the_distance_of_the_normals():
    rng = np.random.default_rng(1)
    negative, positive = rng.normal(0, 1, 200_000), rng.normal(1.5, 1, 200_000)
    auc = (rng.permutation(positive) > rng.permutation(negative)).mean()
    assert d_prime(auc) == pytest.approx(1.5, abs=0.02)
    assert d_prime(0.5) == 0 and d_prime(1.0) == math.inf and math.isnan(d_prime(math.nan))


@pytest.mark.parametrize(
    ("scores", "target", "message"),
    [
        (np.zeros((3, 2)), np.zeros((3, 3)), "shape"),
        (np.full((3, 2), np.nan), np.zeros((3, 2)), "3 of 3 clips are not finite"),
    ],
)
def test_unusable_input_is_refused(scores, target, message):
    with pytest.raises(ValueError, match=message):
        compute_metrics(scores, target)
    with pytest.raises(ValueError, match="classes has 1"):
        compute_metrics(np.zeros((3, 2)), np.zeros((3, 2)), [("a", "a")])
