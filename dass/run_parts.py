"""The parts of a training run, built from its configuration: data, model, teachers, optimiser, averages; and their state.

The state of a run is the tensors of these parts and the plain values of `run_folder.Progress`; there is nothing else.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from dass import run_folder
from dass.audio import LogMel
from dass.batch import Batch
from dass.data import Splits, default_workers, open_splits
from dass.distributed import world_size
from dass.optimization import ParameterAverage, build_optimizer
from dass.student import prescribed_front_end
from dass.teacher import SELF, Ensemble, SelfTeacher, build_ensemble, load_teacher

if TYPE_CHECKING:
    from dass.config import TrainConfig

BuildModel = Callable[..., nn.Module]  # (student options, classes, front end) -> model


@dataclass
class Parts:
    """What a run works with.

    `model` holds the weights; `parallel` is it or its DistributedDataParallel; `forward` is what training calls.
    """

    device: torch.device
    splits: Splits
    model: nn.Module
    parallel: nn.Module
    forward: Callable[[Tensor], Tensor]
    log_mel: LogMel
    teacher: Ensemble | None
    self_teacher: SelfTeacher | None
    optimizer: torch.optim.Optimizer
    ema: ParameterAverage | None
    mean: ParameterAverage | None
    autocast: Callable[[], Any]
    scaler: torch.amp.GradScaler

    def prepare(self, batch: Batch) -> Batch:
        """The batch on the device, with its features."""
        return batch.to(self.device).with_features(self.log_mel)

    def averages(self) -> dict[str, ParameterAverage]:
        """The averages of the weights that are kept, by name."""
        teacher = None if self.self_teacher is None else self.self_teacher.average
        averages = {"ema": self.ema, "mean": self.mean, "self_teacher": teacher}
        return {name: average for name, average in averages.items() if average is not None}

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """All tensors by name, and the plain values that go with them."""
        tensors = run_folder.named("model", self.model.state_dict()) | run_folder.optimizer_tensors(self.optimizer)
        for name, average in self.averages().items():
            tensors |= run_folder.named(name, average.values)
        counts = {name: average.count for name, average in self.averages().items()}
        return tensors, {"scaler": self.scaler.state_dict(), "average_counts": counts}

    def restore(self, tensors: dict[str, Tensor], values: dict[str, Any]) -> None:
        """Put back what `state` gave."""
        self.model.load_state_dict(run_folder.taken("model", tensors))
        run_folder.restore_optimizer(self.optimizer, tensors)
        if self.scaler.is_enabled():
            self.scaler.load_state_dict(values["scaler"])
        for name, average in self.averages().items():
            stored = {key: value.to(self.device) for key, value in run_folder.taken(name, tensors).items()}
            for key, value in average.values.items():
                value.copy_(stored[key])  # in place: the values of the teacher `self` are its model's parameters
            average.values = average.values or stored
            average.count = values["average_counts"][name]


def _spare_threads(config: TrainConfig, device: torch.device) -> int:
    """Torch's choice, on a CPU less the cores that the loader's workers need: threads that wait for each other lose far more
    than one core when a worker takes it from them (the demonstration, two cores: 123 clips/s against 76)."""
    threads = torch.get_num_threads()
    if device.type != "cpu":
        return threads
    workers = default_workers() if config.data.workers is None else config.data.workers
    return min(threads, max(1, len(os.sched_getaffinity(0)) - workers))


def build_parts(config: TrainConfig, device: torch.device, build_model: BuildModel) -> Parts:
    """Open the data, load the teachers, make the model with the weights that `config.train.seed` gives."""
    torch.set_num_threads(config.run.threads or _spare_threads(config, device))
    teachers = [load_teacher(source) for source in config.distill.teacher if source != SELF]
    data = config.data
    if any(teacher.hears == "waveforms" for teacher in teachers):
        data = replace(data, waveforms=True)
    splits = open_splits(
        data,
        config.augment,
        front_end=prescribed_front_end(config.model),
        hashes=any(teacher.hears == "hashes" for teacher in teachers),
    )
    torch.manual_seed(config.train.seed)
    model = build_model(config.model, splits.classes, splits.front_end).to(device)

    self_teacher = None
    if SELF in config.distill.teacher:
        self_teacher = SelfTeacher(model, splits.classes, config.distill.ema_decay)
        teachers.insert(config.distill.teacher.index(SELF), self_teacher)
    teacher = None
    if teachers:
        teacher = build_ensemble(teachers, config.distill, splits.classes, splits.front_end).to(device)

    precision = config.train.precision
    if precision == "auto":
        precision = "bf16" if device.type == "cuda" and torch.cuda.is_bf16_supported() else "float32"
    dtype = {"float32": None, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    parallel = model
    if world_size() > 1:
        device_ids = [device] if device.type == "cuda" else None
        parallel = nn.parallel.DistributedDataParallel(model, device_ids=device_ids)
    return Parts(
        device=device,
        splits=splits,
        model=model,
        parallel=parallel,
        forward=torch.compile(parallel) if config.model.compile else parallel,
        log_mel=LogMel(splits.front_end).to(device),
        teacher=teacher,
        self_teacher=self_teacher,
        optimizer=build_optimizer(model, config.optimizer),
        ema=ParameterAverage() if config.average.ema is not None else None,
        mean=ParameterAverage() if config.average.epochs is not None else None,
        autocast=nullcontext if dtype is None else lambda: torch.autocast(device.type, dtype),
        scaler=torch.amp.GradScaler(device.type, enabled=dtype is torch.float16),
    )
