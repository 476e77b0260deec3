"""A model on held-out clips: every clip once, over all processes, and the metrics of exactly these."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from dass.batch import Batch
from dass.checkpoint import write_tensors
from dass.distill import LabelMode, TeacherOutput, label_loss
from dass.distributed import gather_rows
from dass.manifest import LabelClass
from dass.metrics import Metrics, compute_metrics


@dataclass(frozen=True)
class Evaluation:
    """Logits of held-out clips in the order of the data set, and what follows from them.

    logits, target: (clips, classes) float32; loss: mean label loss, on logits; metrics: over all classes.
    """

    logits: np.ndarray
    target: np.ndarray
    loss: float
    metrics: Metrics

    def summary(self) -> dict[str, float]:
        """`validation_loss` and the scalar metrics, by name."""
        return {"validation_loss": self.loss, **self.metrics.summary()}

    def text(self) -> str:
        """The summary for the reader, with four digits."""
        return ", ".join(f"{name.replace('_', ' ')} {value:.4f}" for name, value in self.summary().items())

    def save(self, path: Path) -> None:
        """Write logits and targets as safetensors."""
        write_tensors(path, {"logits": torch.from_numpy(self.logits), "target": torch.from_numpy(self.target)})


def evaluate(
    forward: Callable[[Batch], Tensor],
    batches: Iterable[Batch],
    prepare: Callable[[Batch], Batch],
    classes: Sequence[LabelClass],
    mode: LabelMode,
) -> Evaluation:
    """Run a model over this process's share of the held-out clips; the result is the same on every process.

    forward: batch -> logits (batch, classes); prepare: moves a batch to the device and computes its features.
    """
    logits, target = _collect(forward, batches, prepare, len(classes))
    return Evaluation(
        logits=logits.numpy(),
        target=target.numpy(),
        loss=label_loss(logits, target, mode).double().mean().item(),
        metrics=compute_metrics(logits.numpy(), target.numpy(), [(entry.id, entry.name) for entry in classes]),
    )


def evaluate_teacher(
    teacher: Callable[[Batch], TeacherOutput],
    batches: Iterable[Batch],
    prepare: Callable[[Batch], Batch],
    classes: Sequence[LabelClass],
) -> tuple[np.ndarray, Metrics | None]:
    """What a teacher says of the held-out clips: (clips, classes) logits on the student's columns, NaN where it says
    nothing; and the metrics on the clips and classes that it knows, None where there are none."""
    width = len(classes)
    logits, target = _collect(lambda batch: _on_columns(teacher(batch), width), batches, prepare, width)
    clips, columns = ~logits.isnan().all(1), ~logits.isnan().all(0)
    metrics = None
    if clips.any():
        known = [(entry.id, entry.name) for entry, covered in zip(classes, columns.tolist(), strict=True) if covered]
        metrics = compute_metrics(logits[clips][:, columns].numpy(), target[clips][:, columns].numpy(), known)
    return logits.numpy(), metrics


@torch.no_grad()
def _collect(
    values_of: Callable[[Batch], Tensor], batches: Iterable[Batch], prepare: Callable[[Batch], Batch], width: int
) -> tuple[Tensor, Tensor]:
    """Values and targets (clips, width), float32 on the CPU, of all processes' clips in the order of the data set."""
    rows: list[tuple[Tensor, Tensor, Tensor]] = []
    for batch in batches:
        batch = prepare(batch)
        rows.append((batch.index, values_of(batch).float(), batch.target))
    if not rows:  # a process may have nothing of a last, small batch; it takes part in the gathering all the same
        device = "cuda" if dist.is_initialized() and dist.get_backend() == "nccl" else "cpu"
        empty = torch.zeros(0, width, device=device)
        rows.append((torch.zeros(0, dtype=torch.int64, device=device), empty, empty))
    index, values, target = (gather_rows(torch.cat(row)) for row in zip(*rows, strict=True))
    # In the order of the data set, each clip once: the figures do not depend on the number of processes.
    order = torch.from_numpy(np.unique(index.cpu().numpy(), return_index=True)[1])
    return values.cpu()[order], target.cpu()[order]


def _on_columns(said: TeacherOutput, width: int) -> Tensor:
    """Teacher logits on the student's columns, NaN elsewhere and for clips that the teacher does not know."""
    logits = said.logits.float()
    if said.student_classes is not None:
        full = logits.new_full((len(logits), width), torch.nan)
        full[:, said.student_classes] = logits
        logits = full
    if said.known is not None:
        logits = logits.masked_fill(~said.known[:, None], torch.nan)
    return logits
