"""Schedules by hand-computed values, parameter groups, and the averages of the weights."""

import pytest
import torch
from torch import nn

from dass.optimization import (
    AverageConfig,
    OptimizerConfig,
    ParameterAverage,
    ScheduleConfig,
    build_optimizer,
    learning_rate_factor,
    set_learning_rate,
)


def test_multistep_is_the_papers():
    config = ScheduleConfig(warmup_steps=1000, milestones=(10, 15, 20), gamma=0.5)
    per_epoch = 1700

    def factor(epoch, step=0):
        return learning_rate_factor(config, epoch * per_epoch + step, per_epoch, 25)

    assert factor(0) == pytest.approx(1 / 1000) and factor(0, 499) == pytest.approx(0.5)
    assert factor(0, 999) == 1 and factor(9, per_epoch - 1) == 1
    assert [factor(epoch) for epoch in (10, 14, 15, 20, 24)] == [0.5, 0.5, 0.25, 0.125, 0.125]


def test_cosine_starts_at_the_peak_and_ends_at_the_final_factor():
    config = ScheduleConfig("cosine", warmup_steps=10, final_factor=0.1)
    factors = [learning_rate_factor(config, step, 10, 11) for step in range(110)]
    assert factors[9] == 1 and factors[10] == 1
    assert factors[60] == pytest.approx(0.1 + 0.9 * 0.5)
    assert factors[-1] == pytest.approx(0.1, abs=1e-3)
    assert all(a >= b for a, b in zip(factors[10:], factors[11:], strict=False))
    assert learning_rate_factor(ScheduleConfig("constant", warmup_steps=0), 5, 10, 1) == 1


class Small(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Linear(3, 4)
        self.A_logs = nn.Parameter(torch.zeros(4))
        self.head = nn.Linear(4, 2)


def test_groups_keep_decay_from_the_state_space_parameters_and_scale_the_head():
    model = Small()
    optimizer = build_optimizer(model, OptimizerConfig("adamw", 1e-3, head_factor=10, weight_decay=0.1))
    rate = set_learning_rate(optimizer, 0.5)
    assert isinstance(optimizer, torch.optim.AdamW) and rate in (5e-4, 5e-3)
    found = {
        id(parameter): (group["lr"], group["weight_decay"])
        for group in optimizer.param_groups
        for parameter in group["params"]
    }
    assert found[id(model.body.weight)] == (5e-4, 0.1)
    assert found[id(model.A_logs)] == (5e-4, 0.0)
    assert found[id(model.head.bias)] == (5e-3, 0.1)
    assert len(found) == len(list(model.parameters()))


def test_mean_and_moving_average():
    model = Small()
    mean, ema = ParameterAverage(), ParameterAverage()
    seen = []
    for value in (1.0, 4.0, 7.0):
        nn.init.constant_(model.A_logs, value)
        seen.append(value)
        mean.mean(model)
        ema.ema(model, 0.999)
    assert mean.count == 3 and torch.allclose(mean.values["A_logs"], torch.full((4,), 4.0))
    expected = seen[0]
    for count, value in enumerate(seen[1:], 1):
        decay = min(0.999, (1 + count) / (10 + count))
        expected = decay * expected + (1 - decay) * value
    assert torch.allclose(ema.values["A_logs"], torch.full((4,), expected))

    with mean.applied_to(model):
        assert torch.equal(model.A_logs, mean.values["A_logs"])
    assert torch.equal(model.A_logs, torch.full((4,), 7.0))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: AverageConfig(epochs=(3, 2)), "average.epochs"),
        (lambda: AverageConfig(ema=1.0), "average.ema"),
        (lambda: OptimizerConfig(clip_norm=0.0), "clip_norm"),
        (lambda: ScheduleConfig(warmup_steps=-1), "warmup_steps"),
    ],
)
def test_bad_options_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()
