"""What a run finds out about models on clips that it does not train on: the teacher, the best so far, the test at the end.

Held-out clips are for choosing: of all models of a run the best on them is kept. So their figure flatters, the more so the
fewer they are. Test clips are heard once, by the model that was chosen, after everything is decided.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from dass.batch import Batch
from dass.checkpoint import atomic_write, write_tensors
from dass.dataset import AudioDataset
from dass.distributed import barrier, rank, world_size
from dass.evaluation import Evaluation, evaluate, evaluate_teacher
from dass.loader import Loader, build_loader
from dass.run_folder import Progress
from dass.run_log import RunLog
from dass.run_parts import Parts
from dass.teacher import load_teacher

if TYPE_CHECKING:
    from dass.config import TrainConfig


class Validation:
    """The evaluations of one run; `progress` is told what is best."""

    def __init__(self, config: TrainConfig, parts: Parts, progress: Progress, folder: Path, log: RunLog):
        self.config, self.parts, self.progress, self.folder, self.log = config, parts, progress, folder, log

    def evaluate(self) -> Evaluation:
        """The model as it is, on the held-out clips; it is in evaluation mode afterwards."""
        parts = self.parts
        parts.model.eval()

        def forward(batch: Batch) -> Tensor:
            with parts.autocast():
                return parts.model(batch.fbank)

        batches = self._loader(parts.splits.held_out)
        return evaluate(forward, batches, parts.prepare, parts.splits.classes, self.config.train.labels)

    def examine_teacher(self) -> None:
        """What the teacher is worth on the held-out clips, so that a wrong one is seen before the training."""
        parts = self.parts
        with parts.autocast():
            logits, metrics = evaluate_teacher(
                lambda batch: parts.teacher(batch, parts.splits.held_out, training=False),
                self._loader(parts.splits.held_out),
                parts.prepare,
                parts.splits.classes,
            )
        if metrics is None:
            self.log.say("teacher on held-out clips: it knows none of them")
            return
        if rank() == 0:
            write_tensors(self.folder / "teacher_held_out.safetensors", {"logits": torch.from_numpy(logits)})
        figures = ", ".join(f"{name.replace('_', ' ')} {value:.4f}" for name, value in metrics.summary().items())
        self.log.say(f"teacher on {metrics.clips} held-out clips, {len(metrics.classes)} classes: {figures}")

    def keep_if_best(self, evaluation: Evaluation, about: dict[str, Any]) -> None:
        """Save the model as `best/` where it is better than any so far."""
        progress, metric = self.progress, self.config.train.metric
        figures = evaluation.summary()
        if metric not in figures:
            raise ValueError(
                f"train.metric is {metric!r}, which needs held-out clips with exactly one label each; take map or auc"
            )
        if not progress.best and evaluation.metrics.undefined:
            names = evaluation.metrics.undefined
            self.log.say(f"left out of the mAP, having no held-out positives: {', '.join(names[:10])} ({len(names)})")
        # Of models with the same figure, as small sets of clips give them, the one with the smaller loss.
        rank_of_new, rank_of_best = (
            (found[metric], -found["validation_loss"]) for found in (figures, progress.best or figures)
        )
        if progress.best and not rank_of_new > rank_of_best:
            progress.epochs_without_gain += 1
            return
        progress.epochs_without_gain = 0
        progress.best = {**about, **figures}
        if rank() == 0:
            self.parts.model.save_pretrained(self.folder / "best")
            evaluation.save(self.folder / "best" / "held_out.safetensors")
            atomic_write(self.folder / "per_class.csv", evaluation.metrics.to_csv())

    def test_best(self) -> None:
        """`best/`, read back from its folder, on the test clips, where there are any."""
        parts, clips = self.parts, self.parts.splits.test
        if clips is None:
            return
        barrier()  # until the first process has written best/
        model = load_teacher(str(self.folder))
        model.attach(parts.splits.front_end, parts.splits.classes)
        model.to(parts.device)

        def forward(batch: Batch) -> Tensor:
            with parts.autocast():
                return model.logits(batch)

        mode = self.config.train.labels
        evaluation = evaluate(forward, self._loader(clips), parts.prepare, parts.splits.classes, mode)
        figures = evaluation.summary()
        self.progress.test = {"loss": figures.pop("validation_loss"), **figures}
        self.log.record("test", self.progress.step, self.progress.test)
        text = ", ".join(f"{name.replace('_', ' ')} {value:.4f}" for name, value in self.progress.test.items())
        self.log.say(f"best model on {len(clips)} test clips: {text}")

    def _loader(self, clips: AudioDataset) -> Loader:
        train = self.config.train
        return build_loader(
            clips,
            batch_size=train.eval_batch_size or train.batch_size,
            seed=train.seed,
            rank=rank(),
            world_size=world_size(),
            workers=self.config.data.workers,
        )
