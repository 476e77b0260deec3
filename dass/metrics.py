"""Figures of merit of a tagger, from scores and labels of a whole evaluation set. scikit-learn computes them.

A class without positives has no average precision, and one without negatives no AUC: such classes are left out of the
means and named, never counted as 0 or 1.
"""

from __future__ import annotations

import csv
import io
import math
import warnings
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np


@dataclass(frozen=True)
class ClassMetrics:
    """Figures of one class: `average_precision` and `auc` in [0, 1] or None where undefined, `positives` clips."""

    index: int
    id: str
    name: str
    positives: int
    average_precision: float | None
    auc: float | None


@dataclass(frozen=True)
class Metrics:
    """Means over the defined classes: `map` and `auc` in [0, 1], `d_prime` = sqrt(2) * Phi^-1(mean AUC), `accuracy` in
    [0, 1] (None unless every clip has exactly one label); `undefined`: names of the classes left out of the mean AP."""

    map: float
    auc: float
    d_prime: float
    accuracy: float | None
    clips: int
    classes: tuple[ClassMetrics, ...]
    undefined: tuple[str, ...]

    def summary(self) -> dict[str, float]:
        """The scalar figures by name, for logs and metrics.jsonl; accuracy only where it is defined."""
        figures = {"map": self.map, "auc": self.auc, "d_prime": self.d_prime}
        return figures if self.accuracy is None else {**figures, "accuracy": self.accuracy}

    def to_csv(self) -> str:
        """Per-class table: index,id,name,positives,average_precision,auc; undefined figures are empty cells."""
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(["index", "id", "name", "positives", "average_precision", "auc"])
        for entry in self.classes:
            figures = ("" if value is None else f"{value:.6f}" for value in (entry.average_precision, entry.auc))
            writer.writerow([entry.index, entry.id, entry.name, entry.positives, *figures])
        return text.getvalue()


def d_prime(auc: float) -> float:
    """Separation of two unit-variance normals with this AUC: sqrt(2) * Phi^-1(auc); infinite at 0 and 1."""
    if math.isnan(auc):
        return math.nan
    if not 0.0 < auc < 1.0:
        return math.copysign(math.inf, auc - 0.5)
    return math.sqrt(2.0) * NormalDist().inv_cdf(auc)


def compute_metrics(
    scores: np.ndarray,
    target: np.ndarray,
    classes: list[tuple[str, str]] | None = None,
) -> Metrics:
    """Metrics of a set of clips.

    scores: (clips, classes) float, any increasing function of the probability (logits do); target: (clips, classes),
    a label counts as positive from 0.5 up; classes: (id, name) per column. Raises ValueError on wrong shapes and on
    scores that are not finite.
    """
    from sklearn.metrics import average_precision_score, roc_auc_score

    scores, target = np.asarray(scores, dtype=np.float64), np.asarray(target)
    if scores.ndim != 2 or scores.shape != target.shape:
        raise ValueError(f"scores have shape {scores.shape} and target {target.shape}; expected equal (clips, classes)")
    if not np.isfinite(scores).all():
        bad = int((~np.isfinite(scores).all(axis=1)).sum())
        raise ValueError(f"scores of {bad} of {len(scores)} clips are not finite; the model has diverged")
    names = classes or [(str(index), str(index)) for index in range(scores.shape[1])]
    if len(names) != scores.shape[1]:
        raise ValueError(f"classes has {len(names)} entries for {scores.shape[1]} columns of scores")

    positive = target >= 0.5
    rows = []
    for index, (identifier, name) in enumerate(names):
        count = int(positive[:, index].sum())
        precision = auc = None
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            if count > 0:
                precision = float(average_precision_score(positive[:, index], scores[:, index]))
            if 0 < count < len(scores):
                auc = float(roc_auc_score(positive[:, index], scores[:, index]))
        rows.append(ClassMetrics(index, identifier, name, count, precision, auc))

    precisions = [row.average_precision for row in rows if row.average_precision is not None]
    aucs = [row.auc for row in rows if row.auc is not None]
    mean_auc = float(np.mean(aucs)) if aucs else math.nan
    accuracy = None
    if len(scores) and (positive.sum(axis=1) == 1).all():
        accuracy = float((scores.argmax(axis=1) == positive.argmax(axis=1)).mean())
    return Metrics(
        map=float(np.mean(precisions)) if precisions else math.nan,
        auc=mean_auc,
        d_prime=d_prime(mean_auc),
        accuracy=accuracy,
        clips=len(scores),
        classes=tuple(rows),
        undefined=tuple(row.name for row in rows if row.average_precision is None),
    )


def confusion(scores: np.ndarray, target: np.ndarray) -> np.ndarray:
    """Confusion counts (classes, classes) of single-label clips: row = label, column = class of the largest score."""
    from sklearn.metrics import confusion_matrix

    classes = range(np.shape(scores)[1])
    return confusion_matrix(np.argmax(target, axis=1), np.argmax(scores, axis=1), labels=list(classes))
