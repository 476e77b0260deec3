"""Two processes that talk over gloo against one: the same clips, losses, metrics and weights."""

import socket
from dataclasses import replace

import pytest
import torch
import torch.multiprocessing as multiprocessing

from dass.checkpoint import read_tensors
from dass.run_log import read_metrics
from dass.trainer import Trainer

from .tiny_run import tiny_config, write_tones


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _process(rank: int, config, port: int) -> None:
    import os

    # What torchrun sets.
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)
    )
    torch.set_num_threads(1)
    Trainer(config).fit()


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Folders of the same run by one process and by two. 17 clips: the last batches do not divide evenly."""
    folder = tmp_path_factory.mktemp("ddp")
    tones = write_tones(folder / "tones", per_class=7)
    # Without stochastic depth, whose draws are each process's own.
    config = tiny_config(
        tones,
        folder / "one",
        model={"drop_path": 0.0},
        train={"batch_size": 4, "accumulate": 2},
        average={"epochs": (1, 2), "ema": 0.9},
        distill={"teacher": ("self",)},
    )
    Trainer(config).fit()
    config = replace(config, run=replace(config.run, folder=folder / "two"))
    multiprocessing.start_processes(_process, (config, _free_port()), nprocs=2, start_method="fork")
    return folder / "one", folder / "two"


def test_losses_and_metrics(runs):
    one, two = (read_metrics(folder / "metrics.jsonl") for folder in runs)
    assert [record["event"] for record in one] == [record["event"] for record in two]
    for first, second in zip(one, two, strict=True):
        for key in ("loss", "label_loss", "distill_loss", "validation_loss", "map", "auc", "accuracy"):
            assert (key in first) == (key in second)
            if key in first:
                assert first[key] == pytest.approx(second[key], rel=1e-5, abs=1e-7), (key, first["step"])


def test_weights(runs):
    one, two = (read_tensors(folder / "last" / "model.safetensors") for folder in runs)
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, rtol=1e-3, atol=1e-5, msg=name)


def test_held_out_scores_are_gathered_in_order(runs):
    one, two = (read_tensors(folder / "best" / "held_out.safetensors") for folder in runs)
    assert torch.equal(one["target"], two["target"])
    torch.testing.assert_close(two["logits"], one["logits"], rtol=1e-3, atol=1e-5)


def test_only_the_main_process_writes(runs):
    names = [{path.relative_to(folder).as_posix() for path in folder.rglob("*")} for folder in runs]
    assert names[0] == names[1]
