"""The pictures of a finished run, drawn from what lies in its folder and one batch of its training data."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch

from dass.checkpoint import read_tensors
from dass.distill import LabelMode
from dass.loader import build_loader
from dass.metrics import compute_metrics, confusion
from dass.plots import draw_class_bars, draw_confusion, draw_curves, draw_spectrograms, draw_teacher_scatter
from dass.run_parts import Parts

if TYPE_CHECKING:
    from dass.config import TrainConfig

SPECTROGRAMS = 12


def draw_pictures(folder: Path, parts: Parts, config: TrainConfig) -> list[Path]:
    """Loss and metric curves, per-class bars, the confusion of single-label clips, augmented spectrograms, and the
    student's scores over the teacher's; returns the files."""
    classes = parts.splits.classes
    held_out = read_tensors(folder / "best" / "held_out.safetensors")
    logits, target = held_out["logits"].numpy(), held_out["target"].numpy()
    metrics = compute_metrics(logits, target, [(entry.id, entry.name) for entry in classes])
    pictures = [draw_curves(folder), draw_class_bars(folder / "per_class.png", metrics)]
    if metrics.accuracy is not None:
        names = [entry.name for entry in classes]
        pictures.append(draw_confusion(folder / "confusion.png", confusion(logits, target), names))
    pictures.append(_draw_examples(folder / "spectrograms.png", parts, config))
    if (folder / "teacher_held_out.safetensors").is_file():
        teacher = read_tensors(folder / "teacher_held_out.safetensors")["logits"]
        path = folder / "teacher_student.png"
        mode = config.train.labels
        pictures.append(draw_teacher_scatter(path, _scores(held_out["logits"], mode), _scores(teacher, mode), target))
    return pictures


def _draw_examples(path: Path, parts: Parts, config: TrainConfig) -> Path:
    """Training examples as the model sees them, with their labels and shares."""
    loader = build_loader(parts.splits.train, batch_size=SPECTROGRAMS, seed=config.train.seed, training=True, workers=0)
    batch = parts.prepare(next(iter(loader)))
    titles = []
    for target in batch.target.cpu():
        present = target.nonzero()[:, 0].tolist()
        titles.append(", ".join(f"{parts.splits.classes[i].name} {target[i]:.2g}" for i in present[:3]))
    return draw_spectrograms(path, batch.fbank.float().cpu().numpy(), titles)


def _scores(logits: torch.Tensor, mode: LabelMode):
    """Logits (clips, classes) as probabilities; NaN stays NaN, in softmax outside the classes that it is over."""
    if mode == "multi-label":
        return logits.sigmoid().numpy()
    shares = logits.nan_to_num(nan=float("-inf")).softmax(-1)
    return shares.masked_fill(logits.isnan(), torch.nan).numpy()
