"""Optimiser, learning-rate schedule and averages of the weights.

The learning rate is a function of the step alone, so that there is no scheduler whose state could be lost or doubled. A
step here is an optimiser step (after accumulation), counted from 0 over the whole run.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

# State-space parameters whose size is their meaning (log decay rates, skip gains): decay would pull them to a constant.
WITHOUT_WEIGHT_DECAY = ("A_logs", "Ds")


@dataclass(frozen=True)
class OptimizerConfig:
    """How a gradient becomes a step."""

    name: Literal["adam", "adamw"] = "adam"
    """Optimiser: `adam` (weight decay as an L2 term, the paper's) or `adamw` (decoupled decay)."""
    learning_rate: float = 1e-4
    """Peak learning rate per step."""
    head_factor: float = 1.0
    """Learning rate of the classifier relative to the rest; above 1 when fine-tuning with a new head."""
    betas: tuple[float, float] = (0.95, 0.999)
    """Decay of the first and second moment per step."""
    weight_decay: float = 5e-7
    """Weight decay per step; never applied to the state-space parameters A_logs and Ds."""
    clip_norm: float | None = None
    """Largest global norm of the gradient before a step. None: no clipping."""

    def __post_init__(self) -> None:
        if self.learning_rate <= 0 or self.head_factor <= 0:
            raise ValueError("optimizer.learning_rate and optimizer.head_factor must be positive")
        if self.clip_norm is not None and self.clip_norm <= 0:
            raise ValueError(f"optimizer.clip_norm is {self.clip_norm}; expected a positive number or none")


@dataclass(frozen=True)
class ScheduleConfig:
    """Learning rate over the run, as a factor of the peak."""

    name: Literal["multistep", "cosine", "constant"] = "multistep"
    """After the warm-up: steps down at epochs, half a cosine to the end of the run, or nothing."""
    warmup_steps: int = 1000
    """Optimiser steps over which the rate rises linearly from 0."""
    milestones: tuple[int, ...] = (10, 15, 20)
    """multistep: numbers of completed epochs after which the rate is multiplied by `gamma`."""
    gamma: float = 0.5
    """multistep: factor at each milestone."""
    final_factor: float = 0.0
    """cosine: factor reached at the end of the run."""

    def __post_init__(self) -> None:
        if self.warmup_steps < 0:
            raise ValueError(f"schedule.warmup_steps is {self.warmup_steps}; expected 0 or more")


@dataclass(frozen=True)
class AverageConfig:
    """Averages of the weights, kept beside the weights that are trained."""

    epochs: tuple[int, int] | None = None
    """First and last epoch (from 1) whose final weights are averaged; the average is evaluated and saved at the end of
    the run. The paper: 6 25. None: no average over epochs."""
    ema: float | None = None
    """Decay per step of a moving average of the weights; it is what is evaluated and saved. None: none."""

    def __post_init__(self) -> None:
        if self.epochs is not None and not 1 <= self.epochs[0] <= self.epochs[1]:
            raise ValueError(f"average.epochs is {self.epochs}; expected first and last epoch, counted from 1")
        if self.ema is not None and not 0.0 < self.ema < 1.0:
            raise ValueError(f"average.ema is {self.ema}; expected a decay between 0 and 1, or none")


def learning_rate_factor(config: ScheduleConfig, step: int, steps_per_epoch: int, epochs: int) -> float:
    """Factor in [0, 1] on the peak learning rate at optimiser step `step` (from 0)."""
    warmup = min(1.0, (step + 1) / config.warmup_steps) if config.warmup_steps else 1.0
    if config.name == "multistep":
        completed = step // max(1, steps_per_epoch)
        return warmup * config.gamma ** sum(completed >= milestone for milestone in config.milestones)
    if config.name == "cosine":
        # The cosine starts where the warm-up ends, so that the peak is reached and the end is the end of the run.
        length = max(1, steps_per_epoch * epochs - config.warmup_steps)
        done = min(1.0, max(0.0, (step - config.warmup_steps) / length))
        return warmup * (config.final_factor + (1 - config.final_factor) * 0.5 * (1 + math.cos(math.pi * done)))
    return warmup


def build_optimizer(model: nn.Module, config: OptimizerConfig) -> torch.optim.Optimizer:
    """The optimiser of a model. Each parameter group carries `peak`, its peak learning rate."""
    groups: dict[tuple[bool, bool], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            decays = name.rsplit(".", 1)[-1] not in WITHOUT_WEIGHT_DECAY
            is_head = "head" in name.split(".") or "classifier" in name.split(".")
            groups.setdefault((decays, is_head), []).append(parameter)
    settings = []
    for (decays, is_head), parameters in groups.items():
        peak = config.learning_rate * (config.head_factor if is_head else 1.0)
        decay = config.weight_decay if decays else 0.0
        settings.append({"params": parameters, "lr": peak, "peak": peak, "weight_decay": decay})
    kind = torch.optim.AdamW if config.name == "adamw" else torch.optim.Adam
    return kind(settings, betas=config.betas)


def set_learning_rate(optimizer: torch.optim.Optimizer, factor: float) -> float:
    """Set every group to `factor` of its peak; returns the rate of the first group."""
    for group in optimizer.param_groups:
        group["lr"] = group["peak"] * factor
    return optimizer.param_groups[0]["lr"]


class ParameterAverage:
    """A running average of a model's parameters, in float32 (float64 for float64 parameters).

    `ema(model, decay)` and `mean(model)` update it; `values` (name -> tensor) and `count` are its whole state.
    """

    def __init__(self, values: dict[str, Tensor] | None = None, count: int = 0):
        self.values = values or {}
        self.count = count

    @torch.no_grad()
    def ema(self, model: nn.Module, decay: float) -> None:
        """Moving average; while young it forgets faster, so that it is not dominated by the initial weights."""
        decay = min(decay, (1 + self.count) / (10 + self.count))
        self._update(model, 1 - decay)

    @torch.no_grad()
    def mean(self, model: nn.Module) -> None:
        """Uniform mean of all weights given so far."""
        self._update(model, 1 / (self.count + 1))

    @contextmanager
    def applied_to(self, model: nn.Module) -> Iterator[nn.Module]:
        """The model with the averaged weights, within a `with` block; its own weights come back afterwards."""
        own = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
        self.copy_to(model)
        try:
            yield model
        finally:
            with torch.no_grad():
                for name, parameter in model.named_parameters():
                    parameter.copy_(own[name])

    @torch.no_grad()
    def copy_to(self, model: nn.Module) -> None:
        """Overwrite the model's parameters by the average (nothing where there is none yet)."""
        for name, parameter in model.named_parameters():
            if name in self.values:
                parameter.copy_(self.values[name])

    def _update(self, model: nn.Module, share: float) -> None:
        self.count += 1
        for name, parameter in model.named_parameters():
            value = parameter.detach()
            value = value if value.dtype == torch.float64 else value.float()
            if name not in self.values:
                self.values[name] = value.clone()
            else:
                self.values[name].lerp_(value, share)
