"""Losses of knowledge distillation: small functions of logits, one value per clip.

Convention: every loss here takes student and teacher *logits* of shape (batch, classes) and returns (batch,) values in
float32 (float64 for float64 input), not their mean, so that clips can be weighted: one without teacher scores counts
differently. The mean over the batch is the caller's.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

LossName = Literal["kldiv", "bce", "l2", "cosine", "l2c"]
LabelMode = Literal["multi-label", "single-label"]


@dataclass(frozen=True)
class DistillConfig:
    """What the student learns from the teacher, beside the labels."""

    teacher: tuple[str, ...] = ()
    """Teachers, one or several: a folder or hub name of a transformers audio classifier, an original AST `.pth`, a DASS
    checkpoint or run folder, cached scores (`.safetensors`, `.npz`), `self` (a moving average of the student), or `train`
    (train a teacher first in the same run). None: labels only."""
    teacher_weights: tuple[float, ...] = ()
    """Weight of each teacher in the ensemble, in the order of `teacher`; made to sum to 1. None: equal weights."""
    loss: LossName = "kldiv"
    """Distillation loss on the logits; `kldiv` is the paper's."""
    weight: float = 0.5
    """Share w of the distillation loss, from 0 to 1: (1 - w) * labels + w * teacher."""
    temperature: float = 1.0
    """Divisor T of the logits of teacher and student; the loss is multiplied by T^2."""
    paper_temperature: bool = False
    """Divide the teacher's logits alone and leave out T^2, as the paper's research code does."""
    ema_decay: float = 0.999
    """Decay per step of the moving average that is the teacher `self`."""
    on_missing: Literal["error", "hard-label"] = "error"
    """When cached scores lack a clip: stop and name it, or train that clip on its labels alone."""
    class_map: str | None = None
    """Table of classes for a teacher whose classes differ: a CSV class,teacher_class of ids or names (of several teacher
    classes the largest score counts), or a built-in one (esc50-audioset). None: equal ids or names are matched."""

    def __post_init__(self) -> None:
        if not 0.0 <= self.weight <= 1.0:
            raise ValueError(f"distill.weight is {self.weight}; expected a share from 0 to 1")
        if not self.temperature > 0.0:
            raise ValueError(f"distill.temperature is {self.temperature}; expected a positive number")
        if not 0.0 <= self.ema_decay < 1.0:
            raise ValueError(f"distill.ema_decay is {self.ema_decay}; expected a number from 0 to below 1")
        if self.teacher_weights and len(self.teacher_weights) != len(self.teacher):
            raise ValueError(
                f"distill.teacher_weights has {len(self.teacher_weights)} entries for {len(self.teacher)} teachers; "
                "give one weight per teacher or none"
            )
        if any(weight < 0 for weight in self.teacher_weights) or (
            self.teacher_weights and sum(self.teacher_weights) <= 0
        ):
            raise ValueError(f"distill.teacher_weights is {self.teacher_weights}; expected weights >= 0 with a sum > 0")


def kldiv(student: Tensor, teacher: Tensor, temperature: float = 1.0, paper_temperature: bool = False) -> Tensor:
    """KL(teacher || student) between softmaxes over the classes, in nats, >= 0.

    student, teacher: (batch, classes) logits. Returns (batch,). Source: arXiv 2407.04082, section 3 (T = 1); the
    temperature and its factor T^2, which keeps the size of the gradient, are arXiv 1503.02531, section 2.
    """
    student, teacher, factor = _tempered(student, teacher, temperature, paper_temperature)
    log_student, log_teacher = student.log_softmax(-1), teacher.log_softmax(-1)
    return factor * F.kl_div(log_student, log_teacher, reduction="none", log_target=True).sum(-1)


def bce(student: Tensor, teacher: Tensor, temperature: float = 1.0, paper_temperature: bool = False) -> Tensor:
    """Binary cross-entropy against sigmoid(teacher / T), mean over the classes, in nats; least, not 0, at equality.

    student, teacher: (batch, classes) logits. Returns (batch,). The multi-label counterpart of `kldiv`.
    """
    student, teacher, factor = _tempered(student, teacher, temperature, paper_temperature)
    return factor * F.binary_cross_entropy_with_logits(student, teacher.sigmoid(), reduction="none").mean(-1)


def l2(student: Tensor, teacher: Tensor, temperature: float = 1.0, paper_temperature: bool = False) -> Tensor:
    """Mean squared difference of the logits over the classes, >= 0 (arXiv 1312.6184).

    student, teacher: (batch, classes) logits. Returns (batch,). With both sides divided by T and the factor T^2 the
    temperature cancels; with `paper_temperature` the student is drawn to teacher / T.
    """
    student, teacher, factor = _tempered(student, teacher, temperature, paper_temperature)
    return factor * (student - teacher).square().mean(-1)


def cosine(student: Tensor, teacher: Tensor, temperature: float = 1.0, paper_temperature: bool = False) -> Tensor:
    """1 - cosine of the angle between the logit vectors, from 0 (same direction) to 2.

    student, teacher: (batch, classes) logits. Returns (batch,). The angle does not depend on scale, so the temperature
    has no effect and there is no T^2.
    """
    return 1.0 - F.cosine_similarity(_at_least_float32(student), _at_least_float32(teacher), dim=-1)


def l2c(student: Tensor, teacher: Tensor, temperature: float = 1.0, paper_temperature: bool = False) -> Tensor:
    """`l2` + `cosine`: size and direction of the logits, >= 0. student, teacher: (batch, classes). Returns (batch,)."""
    return l2(student, teacher, temperature, paper_temperature) + cosine(student, teacher)


LOSSES = {"kldiv": kldiv, "bce": bce, "l2": l2, "cosine": cosine, "l2c": l2c}


def label_loss(logits: Tensor, target: Tensor, mode: LabelMode) -> Tensor:
    """Loss against the labels, in nats, >= 0 for hard labels.

    logits, target: (batch, classes), target in [0, 1]. `multi-label`: binary cross-entropy with logits, mean over the
    classes. `single-label`: cross-entropy over the softmax, target rows sum to 1 (mixed labels included). Returns (batch,).
    """
    logits = _at_least_float32(logits)
    if mode == "multi-label":
        return F.binary_cross_entropy_with_logits(logits, target, reduction="none").mean(-1)
    if mode == "single-label":
        return -(target * logits.log_softmax(-1)).sum(-1)
    raise ValueError(f"mode is {mode!r}; expected 'multi-label' or 'single-label'")


@dataclass(frozen=True)
class TeacherOutput:
    """What a teacher says of a batch, on the classes that it shares with the student.

    logits: (batch, matched); student_classes: (matched,) int64 columns of the student, None: all, in order;
    known: (batch,) bool, False where the teacher has no scores of a clip, None: all known.
    """

    logits: Tensor
    student_classes: Tensor | None = None
    known: Tensor | None = None


def distillation_losses(
    student: Tensor,  # (batch, classes) logits
    target: Tensor,  # (batch, classes) in [0, 1]
    teacher: TeacherOutput | None,
    config: DistillConfig,
    mode: LabelMode,
) -> dict[str, Tensor]:
    """The training loss and its parts: {"loss", "label_loss", "distill_loss"}, each (batch,).

    loss = (1 - w) * label_loss + w * distill_loss with w = config.weight, and label_loss alone where there is no teacher
    or it does not know the clip (`distill_loss` is then 0). Source: arXiv 2407.04082, section 3.
    """
    labels = label_loss(student, target, mode)
    if teacher is None:
        return {"loss": labels, "label_loss": labels}
    shared = student if teacher.student_classes is None else student.index_select(-1, teacher.student_classes)
    if shared.shape != teacher.logits.shape:
        raise ValueError(
            f"the teacher's logits have shape {tuple(teacher.logits.shape)}, the student's on the same classes "
            f"{tuple(shared.shape)}; expected equal shapes"
        )
    loss = LOSSES[config.loss](shared, teacher.logits, config.temperature, config.paper_temperature)
    weight = torch.full_like(labels, config.weight)
    if teacher.known is not None:
        # where, not a product: the logits of an unknown clip are placeholders and may give any value
        loss = torch.where(teacher.known, loss, torch.zeros_like(loss))
        weight = torch.where(teacher.known, weight, torch.zeros_like(weight))
    return {"loss": (1 - weight) * labels + weight * loss, "label_loss": labels, "distill_loss": loss}


def mix_scores(first: Tensor, second: Tensor, share: Tensor, loss: LossName, temperature: float = 1.0) -> Tensor:
    """Teacher logits of mixed clips from the cached logits of both: the *scores* are mixed, as mixup mixes labels.

    first, second: (batch, classes) logits of the clip and of its partner; share: (batch,) part of the first. For `kldiv`
    the scores are softmax(logits / T), for the other losses sigmoid(logits / T); the returned logits give the mixed
    scores under the same function and temperature. Returns (batch, classes) float32; rows with share 1 are unchanged.
    """
    share = share.float().clamp(0, 1)[:, None]
    whole, part = share.log(), (-share).log1p()
    whole_clip, first, second = first.float(), first.float() / temperature, second.float() / temperature
    if loss == "kldiv":
        mixed = torch.logaddexp(first.log_softmax(-1) + whole, second.log_softmax(-1) + part)
    else:
        on = torch.logaddexp(F.logsigmoid(first) + whole, F.logsigmoid(second) + part)
        off = torch.logaddexp(F.logsigmoid(-first) + whole, F.logsigmoid(-second) + part)
        mixed = on - off
    return torch.where(share == 1, whole_clip, mixed * temperature)


def _tempered(student: Tensor, teacher: Tensor, temperature: float, paper: bool) -> tuple[Tensor, Tensor, float]:
    """Logits after division by the temperature, and the factor of the loss."""
    student, teacher = _at_least_float32(student), _at_least_float32(teacher)
    if paper:
        return student, teacher / temperature, 1.0
    return student / temperature, teacher / temperature, temperature * temperature


def _at_least_float32(logits: Tensor) -> Tensor:
    return logits if logits.dtype == torch.float64 else logits.float()
