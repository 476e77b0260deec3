"""Killed at any moment and continued, a run computes the bits of one that was not: every part of the state is restored."""

import multiprocessing
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from dass import run_folder
from dass.checkpoint import read_tensors
from dass.config_files import config_to_toml
from dass.run_log import CLOCK_KEYS, read_metrics
from dass.trainer import Trainer
from dass.validation import Validation

from .tiny_run import tiny_config, write_tones


class Killed(BaseException):
    """Stands for SIGKILL inside one process: nothing catches it."""


@pytest.fixture(scope="module")
def tones(tmp_path_factory):
    return write_tones(tmp_path_factory.mktemp("data") / "tones", per_class=6)


def everything_on(tones, folder, **sections):
    """Mixup, stochastic depth, accumulation, clipping, both averages, a teacher that is an average, balanced sampling, test
    clips."""
    defaults = {
        "data": {"sampler": "balanced", "test": tones},
        "train": {"epochs": 4, "accumulate": 2, "batch_size": 4},
        "optimizer": {"clip_norm": 1.0},
        "average": {"epochs": (2, 4), "ema": 0.9},
        "distill": {"teacher": ("self",)},
        "run": {"checkpoint_seconds": 0.0, "keep": 2},
        "log": {"every": 3},
    }
    return tiny_config(tones, folder, **{**defaults, **sections})


def outcome(folder):
    """The records without what depends on the clock, and every tensor of the last state."""
    records = [
        {key: value for key, value in record.items() if key not in CLOCK_KEYS}
        for record in read_metrics(folder / "metrics.jsonl")
    ]
    tensors = {}
    for path in (run_folder.newest_state(folder), folder / "best" / "model.safetensors"):
        tensors |= {f"{path.parent.name}/{name}": value for name, value in read_tensors(path).items()}
    return records, tensors


def assert_same(folder, reference):
    records, tensors = outcome(folder)
    assert records == reference[0]
    assert tensors.keys() == reference[1].keys()
    for name, value in reference[1].items():
        assert torch.equal(tensors[name], value), name


@pytest.fixture(scope="module")
def uninterrupted(tones, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "whole"
    Trainer(everything_on(tones, folder)).fit()
    return outcome(folder)


def killed_at(config, owner, method, count):
    """Run until the `count`-th call of a method of Trainer or one of its parts, and die before it."""
    original, calls = getattr(owner, method), []

    def wrapped(*arguments):
        calls.append(1)
        if len(calls) == count:
            raise Killed
        return original(*arguments)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        patch.setattr(owner, method, wrapped)
        Trainer(config).fit()


def test_killed_in_every_part_of_the_loop_it_ends_with_the_same_bits(tones, tmp_path, uninterrupted):
    config = everything_on(tones, tmp_path / "run")
    for owner, method, count in (
        (Trainer, "_save_state", 1),
        (Trainer, "_step", 3),
        (Validation, "evaluate", 1),
        (Trainer, "_record_window", 1),
        (Validation, "keep_if_best", 1),
        (Trainer, "_save_state", 3),
        (Trainer, "_finish", 1),
        (Validation, "test_best", 1),
        (Trainer, "_save_state", 1),  # the last one: all is recorded, and will be once more
    ):
        killed_at(config, owner, method, count)
    result = Trainer(config).fit()
    assert_same(tmp_path / "run", uninterrupted)
    assert len(list((result.folder / "state").iterdir())) == 2  # run.keep


def test_workers_and_logging_do_not_change_the_bits(tones, tmp_path, uninterrupted):
    config = everything_on(tones, tmp_path / "run", data={"sampler": "balanced", "test": tones, "workers": 2})
    Trainer(config).fit()
    assert_same(tmp_path / "run", uninterrupted)


def test_a_torn_metrics_file_is_mended(tones, tmp_path, uninterrupted):
    config = everything_on(tones, tmp_path / "run")
    killed_at(config, Trainer, "_step", 5)
    with (tmp_path / "run" / "metrics.jsonl").open("a") as file:
        file.write('{"event": "step", "step": 4, "lo')
    Trainer(config).fit()
    assert_same(tmp_path / "run", uninterrupted)


def test_a_broken_state_is_named(tones, tmp_path):
    config = everything_on(tones, tmp_path / "run")
    killed_at(config, Trainer, "_step", 3)
    state = run_folder.newest_state(tmp_path / "run")
    state.write_bytes(state.read_bytes()[:100])
    with pytest.raises(ValueError, match=f"{state.name} is not a state of a run"):
        Trainer(config).fit()


def _train(config):
    torch.set_num_threads(1)
    Trainer(config).fit()


def test_killed_ten_times_at_random_moments(tones, tmp_path, uninterrupted):
    """SIGKILL, at moments drawn by a seed, to processes forked from this one, which therefore start at once."""
    config = everything_on(tones, tmp_path / "run")
    context, draw, kills = multiprocessing.get_context("fork"), random.Random(5), 0
    longest = 0.1
    while kills < 10:
        process = context.Process(target=_train, args=(config,))
        process.start()
        process.join(draw.uniform(0.0, longest))
        if process.exitcode is None:
            os.kill(process.pid, signal.SIGKILL)
            kills += 1
            longest *= 1.15  # so that on a slow machine, too, some of the processes get somewhere
        process.join()
        if process.exitcode == 0:
            break
    assert kills == 10
    _train(config)
    assert_same(tmp_path / "run", uninterrupted)


@pytest.mark.slow
def test_the_command_killed_and_given_again(tones, tmp_path):
    """The same with the real command line, in fresh processes."""
    file = tmp_path / "run.toml"
    file.write_text(config_to_toml(everything_on(tones, None, train={"epochs": 8, "batch_size": 4})))
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1"}

    def command(name):
        return [sys.executable, "-m", "dass.train", "--config", str(file), "--run.folder", str(tmp_path / name)]

    subprocess.run(command("whole"), env=environment, check=True, capture_output=True)
    draw = random.Random(7)
    for _ in range(10):
        process = subprocess.Popen(command("killed"), env=environment, stdout=subprocess.DEVNULL)
        metrics = tmp_path / "killed" / "metrics.jsonl"
        size = metrics.stat().st_size if metrics.exists() else 0
        deadline = time.monotonic() + 60  # until it has got somewhere, and then some
        while time.monotonic() < deadline and process.poll() is None:
            if metrics.exists() and metrics.stat().st_size > size:
                break
            time.sleep(0.01)
        time.sleep(draw.uniform(0.0, 0.3))
        process.kill()
        process.wait()
    subprocess.run(command("killed"), env=environment, check=True, capture_output=True)
    assert_same(tmp_path / "killed", outcome(tmp_path / "whole"))
