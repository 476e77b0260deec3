"""One process or several: the few collective operations of training, each a plain function of local values.

`torchrun` starts the processes and sets RANK, WORLD_SIZE and LOCAL_RANK; without it there is one process and every
function here is the identity.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

Value = TypeVar("Value")


def rank() -> int:
    """Number of this process, 0 to world_size() - 1."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def is_main_process() -> bool:
    """Whether this is process 0, also outside a process group."""
    return int(os.environ.get("RANK", "0")) == 0


def say(text: str) -> None:
    """A line for the reader, from process 0 alone."""
    if is_main_process():
        print(text, flush=True)


def world_size() -> int:
    """How many processes train together."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def choose_device(wanted: str) -> torch.device:
    """The device of this process: `auto` takes the GPU of its local rank where there is one. ValueError if absent."""
    local = int(os.environ.get("LOCAL_RANK", "0"))
    if wanted == "auto":
        return (
            torch.device("cuda", local % torch.cuda.device_count())
            if torch.cuda.is_available()
            else torch.device("cpu")
        )
    try:
        device = torch.device(wanted)
    except RuntimeError as error:
        raise ValueError(f"run.device is {wanted!r}; expected auto, cpu, cuda or cuda:0, ...") from error
    if device.type == "cuda":
        if not torch.cuda.is_available():
            raise ValueError(f"run.device is {wanted!r}, but this torch sees no GPU; take auto or cpu")
        if device.index is None:
            device = torch.device("cuda", local)
    return device


@contextmanager
def process_group(device_name: str) -> Iterator[torch.device]:
    """The device of this process, within the process group that torchrun asked for, if it did."""
    device = choose_device(device_name)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    started = False
    if "WORLD_SIZE" in os.environ and int(os.environ["WORLD_SIZE"]) > 1 and not dist.is_initialized():
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
        started = True
    try:
        yield device
    finally:
        if started:
            dist.destroy_process_group()


def on_main_process(decide: Callable[[], Value]) -> Value:
    """What `decide` returns on process 0, on every process; what it raises there is raised on each."""
    if world_size() == 1:
        return decide()
    outcome: list[Any] = [None, None]
    if rank() == 0:
        try:
            outcome[0] = decide()
        except Exception as error:
            outcome[1] = error
    dist.broadcast_object_list(outcome)
    if outcome[1] is not None:
        raise outcome[1]
    return outcome[0]


def barrier() -> None:
    """Wait for the other processes."""
    if world_size() > 1:
        dist.barrier()


def sum_over_processes(value: Tensor) -> Tensor:
    """Sum of a tensor over the processes; the same on each."""
    if world_size() > 1:
        dist.all_reduce(value)
    return value


def gather_rows(rows: Tensor) -> Tensor:
    """The rows (n, ...) of all processes, which may have different n, one process after the other; on each process."""
    if world_size() == 1:
        return rows
    counts = torch.zeros(world_size(), dtype=torch.int64, device=rows.device)
    counts[rank()] = len(rows)
    dist.all_reduce(counts)
    longest = int(counts.max())
    padded = rows.new_zeros((longest, *rows.shape[1:]))
    padded[: len(rows)] = rows
    parts = [torch.empty_like(padded) for _ in range(world_size())]
    dist.all_gather(parts, padded)
    return torch.cat([part[:count] for part, count in zip(parts, counts.tolist(), strict=True)])
