"""The trainer: one linear loop from data to a run folder; resumable at any step, on one process or several.

Everything random in step n of a run is a function of (seed, n, process): the order and augmentation of the data are the
loader's, and torch's generator is seeded anew for every step. So a state holds no generator, and a run that was killed
and continued computes the same bits as one that was not.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from dass import run_folder
from dass.batch import Batch
from dass.checkpoint import read_tensors
from dass.distill import LabelMode, distillation_losses
from dass.distributed import barrier, on_main_process, process_group, rank, sum_over_processes, world_size
from dass.loader import Loader, build_loader
from dass.optimization import learning_rate_factor, set_learning_rate
from dass.run_folder import Progress
from dass.run_log import RunLog
from dass.run_parts import BuildModel, build_parts
from dass.run_pictures import draw_pictures
from dass.signals import StopRequest, stop_on_signals
from dass.step_timer import StepTimer
from dass.student import build_student
from dass.validation import Validation

if TYPE_CHECKING:
    from dass.config import TrainConfig


@dataclass(frozen=True)
class LoopConfig:
    """The training loop."""

    seed: int = 0
    """Seed of weights, order, augmentation and stochastic depth."""
    epochs: int = 25
    """Passes over the training clips (or over data.epoch_clips of them)."""
    batch_size: int = 12
    """Clips of a batch over all processes."""
    accumulate: int = 1
    """Batches whose gradients make one optimiser step."""
    labels: LabelMode = "multi-label"
    """multi-label: classes are independent (binary cross-entropy); single-label: exactly one is right (cross-entropy)."""
    precision: Literal["auto", "float32", "bf16", "fp16"] = "auto"
    """Arithmetic of forward and backward; auto: bf16 on GPUs that have it, float32 elsewhere. fp16 scales the loss."""
    metric: Literal["map", "accuracy", "auc"] = "map"
    """Validation figure by which the best model is chosen."""
    eval_every: int = 1
    """Epochs between two validations; the last epoch is always validated."""
    eval_batch_size: int | None = None
    """Clips of a validation batch over all processes; none: batch_size."""
    patience: int | None = None
    """Stop after so many validations without a better one; none: never."""

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size", "accumulate", "eval_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"train.{name} is {getattr(self, name)}; expected at least 1")


@dataclass(frozen=True)
class RunResult:
    """What came out of a run: its folder, the validation figures of `best/` with their `epoch`, a held-out sound file, and
    the figures of `best/` on the test clips, empty where there are none."""

    folder: Path
    best: dict[str, Any]
    example: str
    test: dict[str, Any]


class TrainingStopped(Exception):
    """Interrupted by the user after the state was saved; the same command continues."""


class Trainer:
    """One training run.

    >>> result = Trainer(TrainConfig(...)).fit()
    >>> DASS.from_pretrained(result.folder)

    config: everything that decides the run. default_folder: where the run goes when `config.run.folder` is None.
    build_model: makes the model from (config.model, classes, front end); default: a DASS.
    """

    def __init__(
        self, config: TrainConfig, default_folder: Path = Path("runs/run"), build_model: BuildModel = build_student
    ):
        self.config, self.default_folder, self.build_model = config, default_folder, build_model

    def fit(self) -> RunResult:
        """Run to the end (or go on from where an earlier call was killed) and return the best figures.

        Raises what names the trouble: ConfigError, ManifestError, TeacherError, RunFolderError, NotFiniteError;
        TrainingStopped after Ctrl-C.
        """
        config = self.config
        with process_group(config.run.device) as device:
            folder, resume = on_main_process(lambda: run_folder.choose_folder(config, self.default_folder))
            if resume and run_folder.is_finished(folder):
                progress = run_folder.read_progress(run_folder.newest_state(folder))
                return RunResult(folder, progress.best, progress.example, progress.test)
            self._build(device)
            self._open_folder(folder, resume)
            total = self.steps_per_epoch * config.train.epochs
            try:
                # Each of several processes would stop at a step of its own, so there signals keep their meaning.
                with (
                    stop_on_signals(world_size() == 1) as stop,
                    self.log.progress("train", total, self.progress.step) as bar,
                ):
                    try:
                        while self.progress.epoch < config.train.epochs and not self._out_of_patience():
                            self._train_epoch(bar, stop)
                            self._close_epoch(stop)
                    except RuntimeError as error:
                        # A signal to the whole process group has ended the loader's workers too, of which torch tells in
                        # the middle of anything: the run goes on from the last saved state.
                        if not (stop and "DataLoader worker" in str(error)):
                            raise
                        raise TrainingStopped(f"stopped; the same command goes on with {self.folder}") from None
                self._finish()
            finally:
                self.log.close()
            return RunResult(folder, self.progress.best, self.progress.example, self.progress.test)

    def profile(self, steps: int = 30, warmup: int = 5) -> str:
        """Time `steps` training steps after `warmup` of them, writing nothing; a table of where the time goes."""
        with process_group(self.config.run.device) as device:
            self._build(device)
            timer = StepTimer(device, exact=True)
            done = 0
            while done < warmup + steps:
                batches = self._begin_epoch()
                while done < warmup + steps and self._step(batches, timer) is not None:
                    done += 1
                    if done == warmup:
                        timer.reset()
                self.progress.epoch, self.progress.batch = self.progress.epoch + 1, 0
            return timer.table(steps)

    # --- set-up -------------------------------------------------------------------------------------------

    def _build(self, device: torch.device) -> None:
        self.parts = build_parts(self.config, device, self.build_model)
        self.progress, self.folder = Progress(), None
        self.steps_per_epoch = -(-len(self._loader()) // self.config.train.accumulate)

    def _open_folder(self, folder: Path, resume: bool) -> None:
        """The run folder, checked; the state of an earlier run in it; the log."""
        config, parts, main = self.config, self.parts, rank() == 0
        self.folder = folder
        if main:
            size = run_folder.bytes_of_run(parts.model, len(parts.averages()), config.run.keep)
            run_folder.prepare_folder(folder, run_folder.with_folder(config, folder), resume, size)
            run_folder.write_classes(folder, parts.splits.classes)
        state = run_folder.newest_state(folder) if resume else None
        if state is not None:
            self.progress = run_folder.read_progress(state)
            parts.restore(read_tensors(state), self.progress.values)
        self.log = RunLog(folder, config.log, resumed_step=self.progress.step, main=main)
        if state is not None:
            self.log.say(f"continuing {folder} at step {self.progress.step}")
        self.log.say(self._description())
        self.validation = Validation(config, parts, self.progress, folder, self.log)
        if parts.teacher is not None:
            self.log.say(parts.teacher.report())
            if parts.self_teacher is None and state is None:
                self.validation.examine_teacher()
        self.last_save = time.monotonic()
        barrier()  # no process may train, and so replace the state, before all have read it

    def _description(self) -> str:
        splits, model, config = self.parts.splits, self.parts.model, self.config
        parameters = sum(parameter.numel() for parameter in model.parameters())
        front_end = splits.front_end
        return (
            f"{self.folder}: {len(splits.train)} training and {len(splits.held_out)} held-out clips, "
            f"{len(splits.classes)} classes, {front_end.frames} frames x {front_end.mel_bins} mel bins; "
            f"{type(model).__name__} with {parameters:,} parameters on {self.parts.device}"
            + (f" x {world_size()}" if world_size() > 1 else "")
            + f"; {config.train.epochs} epochs of {self.steps_per_epoch} steps"
        )

    # --- the loop -----------------------------------------------------------------------------------------------------

    def _train_epoch(self, bar: Any, stop: StopRequest) -> None:
        config, progress = self.config, self.progress
        timer = self.timer = StepTimer(self.parts.device)
        batches = self._begin_epoch()
        while (losses := self._step(batches, timer)) is not None:
            for name, value in losses.items():
                progress.window[name] = progress.window.get(name, 0.0) + value
            progress.window["count"] = progress.window.get("count", 0) + 1
            if progress.step % config.log.every == 0:
                self._record_window()
            shown = {"loss": losses["loss"], "clips/s": timer.figures()["clips_per_second"]}
            bar.advance(1, shown)
            if progress.batch < self.epoch_batches:  # after the last batch it is _close_epoch that saves and stops
                if stop or time.monotonic() - self.last_save >= config.run.checkpoint_seconds:
                    self._save_state()
                if stop:
                    raise TrainingStopped(
                        f"stopped at step {progress.step}; the same command goes on with {self.folder}"
                    )

    def _begin_epoch(self) -> Iterator[Batch]:
        loader = self._loader()
        self.epoch_batches = self.progress.batch + len(loader)
        self.parts.model.train()
        return iter(loader)

    def _step(self, batches: Iterator[Batch], timer: StepTimer) -> dict[str, float] | None:
        """One optimiser step on up to `accumulate` batches; its mean losses on this process, or None at the end."""
        config, parts, progress = self.config, self.parts, self.progress
        size = min(config.train.accumulate, self.epoch_batches - progress.batch)
        if size <= 0:
            return None
        # A function of the step, so that stochastic depth of a resumed run is that of an uninterrupted one.
        torch.manual_seed((config.train.seed * 1_000_003 + progress.step) * 4096 + rank())
        factor = learning_rate_factor(config.schedule, progress.step, self.steps_per_epoch, config.train.epochs)
        set_learning_rate(parts.optimizer, factor)
        sums: dict[str, Tensor] = {}
        for number in range(size):
            with timer.phase("data"):
                batch = next(batches)
            with timer.phase("features"):
                batch = parts.prepare(batch)
            with timer.phase("teacher"), parts.autocast():
                said = None if parts.teacher is None else parts.teacher(batch, parts.splits.train)
            # Gradients are exchanged between processes once a step, with the last batch.
            exchange = nullcontext() if world_size() == 1 or number == size - 1 else parts.parallel.no_sync()
            with exchange:
                with timer.phase("forward"), parts.autocast():
                    logits = parts.forward(batch.fbank)
                with timer.phase("forward"):
                    losses = distillation_losses(logits, batch.target, said, config.distill, config.train.labels)
                    means = {name: value.mean() for name, value in losses.items()}
                with timer.phase("backward"):
                    parts.scaler.scale(means["loss"] / size).backward()
            for name, value in means.items():
                sums[name] = sums.get(name, 0.0) + value.detach() / size
            timer.clips += len(batch) * world_size()
        with timer.phase("optimizer"):
            if config.optimizer.clip_norm is not None:
                parts.scaler.unscale_(parts.optimizer)
                nn.utils.clip_grad_norm_(parts.model.parameters(), config.optimizer.clip_norm)
            parts.scaler.step(parts.optimizer)
            parts.scaler.update()
            parts.optimizer.zero_grad(set_to_none=True)
            if parts.self_teacher is not None:
                parts.self_teacher.update(parts.model)
            if parts.ema is not None:
                parts.ema.ema(parts.model, config.average.ema)
            losses = {name: float(value) for name, value in sums.items()}
        if not math.isfinite(losses["loss"]):
            clips = parts.splits.train
            raise run_folder.bad_loss(self.folder or Path(), progress.step, losses, batch, clips)
        progress.step += 1
        progress.batch += size
        return losses

    def _close_epoch(self, stop: StopRequest) -> None:
        """Validate, record, save the models and the state; the state last, for it says that all this was done."""
        config, parts, progress = self.config, self.parts, self.progress
        progress.epoch, progress.batch = progress.epoch + 1, 0
        epoch = progress.epoch
        first, final = config.average.epochs or (0, 0)
        if parts.mean is not None and first <= epoch <= final:
            parts.mean.mean(parts.model)
        last = epoch == config.train.epochs
        if last or epoch % config.train.eval_every == 0:
            figures = self.timer.figures()
            with parts.ema.applied_to(parts.model) if parts.ema is not None else nullcontext():
                evaluation = self.validation.evaluate()
                self.validation.keep_if_best(evaluation, {"epoch": epoch})
                if rank() == 0:
                    parts.model.save_pretrained(self.folder / "last")
            speed = f"{figures['clips_per_second']:.0f} clips/s, {figures['data_share']:.0%} waiting for data"
            self.log.say(f"epoch {epoch}: {evaluation.text()} ({speed})")
            self.log.record("epoch", progress.step, {"epoch": epoch, **evaluation.summary(), **figures})
        self._save_state()
        if stop and not last:
            raise TrainingStopped(f"stopped after epoch {epoch}; the same command goes on with {self.folder}")

    def _finish(self) -> None:
        """The averaged model, the test, the last records, the pictures, and the mark that the run is finished."""
        parts, progress = self.parts, self.progress
        if parts.mean is not None and parts.mean.count:
            parts.mean.copy_to(parts.model)
            evaluation = self.validation.evaluate()
            about = {"epoch": progress.epoch, "averaged_epochs": parts.mean.count}
            self.validation.keep_if_best(evaluation, about)
            if rank() == 0:
                parts.model.save_pretrained(self.folder / "averaged")
            self.log.say(f"average of {parts.mean.count} epochs: {evaluation.text()}")
            self.log.record("average", progress.step, {**about, **evaluation.summary()})
        self.validation.test_best()
        self.log.record("final", progress.step, progress.best)
        if rank() == 0 and self.config.log.pictures:
            draw_pictures(self.folder, parts, self.config)
        progress.finished, progress.example = True, run_folder.example_file(parts.splits.held_out, self.folder)
        self._save_state()
        barrier()

    # --- parts of the loop --------------------------------------------------------------------------------

    def _loader(self) -> Loader:
        """What is left of the epoch."""
        train = self.config.train
        return build_loader(
            self.parts.splits.train,
            batch_size=train.batch_size,
            seed=train.seed,
            epoch=self.progress.epoch,
            start_batch=self.progress.batch,
            rank=rank(),
            world_size=world_size(),
            training=True,
            workers=self.config.data.workers,
        )

    def _out_of_patience(self) -> bool:
        patience = self.config.train.patience
        if patience is None or self.progress.epochs_without_gain < patience:
            return False
        self.log.say(f"stopped early: no better {self.config.train.metric} in {patience} validations")
        return True

    def _record_window(self) -> None:
        """The mean losses since the last record, over all processes."""
        window, progress = self.progress.window, self.progress
        names = sorted(window)
        sums = torch.tensor([window[name] for name in names], dtype=torch.float64, device=self.parts.device)
        total = dict(zip(names, sum_over_processes(sums).tolist(), strict=True))
        means = {name: value / total["count"] for name, value in total.items() if name != "count"}
        self.log.record("step", progress.step, {**means, "learning_rate": self.parts.optimizer.param_groups[0]["lr"]})
        progress.window = {}

    def _save_state(self) -> None:
        if rank() == 0:
            tensors, self.progress.values = self.parts.state()
            run_folder.save_state(self.folder, self.progress, tensors, self.config.run.keep)
        self.last_save = time.monotonic()
