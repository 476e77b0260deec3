"""Pictures of a run, drawn from its records and scores; each function writes one PNG and returns its path."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from dass.checkpoint import atomic_write
from dass.metrics import Metrics
from dass.run_log import read_metrics

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def draw_curves(folder: Path) -> Path:
    """`curves.png` from `metrics.jsonl`: training and validation loss, and the validation metrics, over the steps."""
    records = read_metrics(folder / "metrics.jsonl")
    steps = [record for record in records if record["event"] == "step"]
    epochs = [record for record in records if record["event"] == "epoch"]
    figure = _figure(11, 4)
    left, right = figure.subplots(1, 2)
    for key, label in (("loss", "training"), ("label_loss", "training, labels"), ("distill_loss", "training, teacher")):
        _line(left, steps, key, label, linewidth=1, alpha=0.8)
    _line(left, epochs, "validation_loss", "validation, labels", marker="o")
    left.set(xlabel="step", ylabel="loss [nats]", title="loss", yscale="log")
    for key, label in (("map", "mAP"), ("accuracy", "accuracy"), ("auc", "AUC")):
        _line(right, epochs, key, label, marker="o")
    right.set(xlabel="step", title="validation", ylim=(0, 1.02))
    for axis in (left, right):
        axis.grid(alpha=0.3)
        if axis.lines:
            axis.legend()
    return _save(figure, folder / "curves.png")


def draw_class_bars(path: Path, metrics: Metrics, most: int = 60) -> Path:
    """Average precision of each class as bars, best first; of more than `most` classes the best and worst halves."""
    rows = sorted(
        (row for row in metrics.classes if row.average_precision is not None),
        key=lambda row: -row.average_precision,
    )
    title = f"average precision per class (mAP {metrics.map:.3f})"
    if len(rows) > most:
        title += f", best and worst {most // 2} of {len(rows)}"
        rows = rows[: most // 2] + rows[-(most // 2) :]
    figure = _figure(7, 1.2 + 0.22 * max(len(rows), 4))
    axis = figure.subplots()
    axis.barh([f"{row.name} ({row.positives})" for row in rows], [row.average_precision for row in rows])
    axis.axvline(metrics.map, color="black", linestyle=":", linewidth=1)
    axis.invert_yaxis()
    axis.margins(y=0.01)
    axis.set(xlim=(0, 1), title=title)
    axis.tick_params(axis="y", labelsize=7)
    return _save(figure, path)


def draw_confusion(path: Path, counts: np.ndarray, names: Sequence[str]) -> Path:
    """Confusion counts (classes, classes), rows = labels, as a map with its numbers."""
    size = max(4.0, 0.45 * len(names) + 2)
    figure = _figure(size, size)
    axis = figure.subplots()
    share = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    axis.imshow(share, cmap="Blues", vmin=0, vmax=1)
    if len(names) <= 40:
        for row, column in zip(*np.nonzero(counts), strict=True):
            color = "white" if share[row, column] > 0.5 else "black"
            axis.text(column, row, counts[row, column], ha="center", va="center", color=color, fontsize=8)
    axis.set_xticks(range(len(names)), names, rotation=90, fontsize=8)
    axis.set_yticks(range(len(names)), names, fontsize=8)
    axis.set(xlabel="predicted", ylabel="label", title="confusion [clips]")
    return _save(figure, path)


def draw_spectrograms(path: Path, spectrograms: np.ndarray, titles: Sequence[str]) -> Path:
    """A grid of (count, frames, mel bins) normalised log-mel spectrograms as the model sees them, augmented."""
    columns = min(4, len(spectrograms))
    rows = -(-len(spectrograms) // columns)
    figure = _figure(3.2 * columns, 2.2 * rows)
    axes = np.atleast_1d(figure.subplots(rows, columns, squeeze=False)).ravel()
    low, high = np.percentile(spectrograms, [1, 99.5])
    for axis in axes:
        axis.axis("off")
    for axis, spectrogram, title in zip(axes, spectrograms, titles, strict=False):
        axis.imshow(spectrogram.T, origin="lower", aspect="auto", vmin=low, vmax=high, cmap="magma")
        axis.set_title(title, fontsize=7)
    return _save(figure, path)


def draw_teacher_scatter(path: Path, student: np.ndarray, teacher: np.ndarray, target: np.ndarray) -> Path:
    """Student's score over the teacher's, one dot per clip and class, both (clips, classes) in [0, 1]; labels apart."""
    figure = _figure(5, 5)
    axis = figure.subplots()
    known = np.isfinite(teacher)
    positive = target >= 0.5
    for chosen, label, color in ((~positive, "not labelled", "tab:gray"), (positive, "labelled", "tab:red")):
        chosen = np.flatnonzero((chosen & known).ravel())
        if len(chosen) > 20_000:  # evenly thinned: more dots only darken the picture
            chosen = chosen[:: len(chosen) // 20_000]
        axis.scatter(teacher.ravel()[chosen], student.ravel()[chosen], s=4, alpha=0.4, label=label, color=color)
    correlation = np.corrcoef(teacher[known], student[known])[0, 1] if known.sum() > 1 else np.nan
    axis.plot([0, 1], [0, 1], color="black", linestyle=":", linewidth=1)
    axis.set(xlabel="teacher", ylabel="student", title=f"scores on validation clips (r = {correlation:.3f})")
    axis.legend()
    return _save(figure, path)


def _line(axis: Any, records: list[dict], key: str, label: str, **style: Any) -> None:
    points = [(record["step"], record[key]) for record in records if record.get(key) is not None]
    if points:
        axis.plot(*zip(*points, strict=True), label=label, **style)


def _figure(width: float, height: float) -> Figure:
    from matplotlib.figure import Figure  # not pyplot: no global state, no display

    return Figure(figsize=(width, height), layout="constrained")


def _save(figure: Figure, path: Path) -> Path:
    return atomic_write(path, lambda temporary: figure.savefig(temporary, dpi=110))
