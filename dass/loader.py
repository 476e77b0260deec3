"""The order of an epoch, its division over processes, and the loader that walks it from any batch on.

Batches are numbered over the epoch and hold `batch_size` examples *over all processes*; process `rank` of `world_size`
makes every `world_size`-th example of each. So the examples of a step do not depend on the number of processes.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch.utils.data import DataLoader

from dass.batch import Batch

if TYPE_CHECKING:
    from dass.data import AudioDataset

# First word of every seed: numpy pads seeds with zeros, so streams differ by what leads, not by what follows.
ORDER_STREAM, EXAMPLE_STREAM = 1, 2


def epoch_order(dataset: AudioDataset, seed: int, epoch: int, training: bool) -> np.ndarray:
    """(positions,) int64: the clip at each position of an epoch.

    Evaluation: every clip once, in order. Training: `dataset.epoch_clips` positions, of a permutation (begun anew where
    it ends) or drawn with `balanced_weights`.
    """
    clips = len(dataset)
    if not training:
        return np.arange(clips)
    size = dataset.epoch_clips or clips
    random = np.random.default_rng([ORDER_STREAM, seed, epoch])
    if dataset.sampler == "balanced":
        return random.choice(clips, size=size, p=dataset.balanced_weights())
    rounds = [random.permutation(clips) for _ in range(-(-size // clips))]
    return np.concatenate(rounds)[:size]


def example_random(seed: int, epoch: int, position: int) -> np.random.Generator:
    """The generator from which everything random about one example is drawn."""
    return np.random.default_rng([EXAMPLE_STREAM, seed, epoch, position])


def default_workers() -> int:
    """One less than the cores this process may use, at most 8."""
    return min(len(os.sched_getaffinity(0)) - 1, 8)


class _BatchPlan:
    """(positions, clips) of each batch of one process, in order; the sampler of the torch loader."""

    def __init__(self, order: np.ndarray, batch_size: int, start: int, rank: int, world_size: int, training: bool):
        self.order, self.batch_size, self.start, self.rank, self.world_size = (
            order,
            batch_size,
            start,
            rank,
            world_size,
        )
        self.whole = training  # a last training batch is filled up from the beginning of the order
        self.batches = -(-len(order) // batch_size)

    def __len__(self) -> int:
        return max(self.batches - self.start, 0)

    def __iter__(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        for number in range(self.start, self.batches):
            positions = np.arange(number * self.batch_size, (number + 1) * self.batch_size)
            if not self.whole:
                positions = positions[positions < len(self.order)]
            positions = positions[self.rank :: self.world_size]
            if len(positions):
                yield positions, self.order[positions % len(self.order)]


class _Batches(torch.utils.data.Dataset):
    """What runs in the workers: a plan's entry becomes a batch."""

    def __init__(self, dataset: AudioDataset, seed: int, epoch: int, training: bool):
        self.dataset, self.seed, self.epoch, self.training = dataset, seed, epoch, training

    def __getitem__(self, entry: tuple[np.ndarray, np.ndarray]) -> Batch:
        positions, indices = entry
        return self.dataset.make_batch(positions, indices, seed=self.seed, epoch=self.epoch, training=self.training)


class Loader:
    """Batches of one epoch; made by `build_loader`. `len()` counts those that are still to come."""

    def __init__(self, dataset: AudioDataset, plan: _BatchPlan, seed: int, epoch: int, training: bool, workers: int):
        self.dataset, self.plan, self.workers = dataset, plan, workers
        self.seed, self.epoch, self.training = seed, epoch, training

    def __len__(self) -> int:
        return len(self.plan)

    def __iter__(self) -> Iterator[Batch]:
        loader = DataLoader(
            _Batches(self.dataset, self.seed, self.epoch, self.training),
            batch_size=None,
            sampler=self.plan,
            num_workers=self.workers,
            prefetch_factor=4 if self.workers else None,
            pin_memory=torch.cuda.is_available(),
            generator=torch.Generator().manual_seed(0),  # its own: the trainer's random state must not move
        )
        for batch in loader:
            self.dataset.broken.add(batch.broken)
            if len(batch):
                yield batch


def build_loader(
    dataset: AudioDataset,
    *,
    batch_size: int,
    seed: int = 0,
    epoch: int = 0,
    start_batch: int = 0,
    rank: int = 0,
    world_size: int = 1,
    training: bool = False,
    workers: int | None = None,
) -> Loader:
    """The batches of one epoch.

    Args:
        batch_size: examples of a step over all processes; each of them makes `batch_size / world_size`.
        seed, epoch: with an example's position in the epoch they decide everything random about it.
        start_batch: first batch to make, for resuming: the batches equal those of an uninterrupted epoch bitwise.
        rank, world_size: this process and how many there are.
        training: shuffle or draw, augment, fill the last batch up. Otherwise every clip once, in order, as it is; the
            last batch is smaller, and absent for a process that has nothing of it.
        workers: processes that prepare batches; None: `default_workers()`. The batches do not depend on it.

    Returns: a `Loader` of `Batch`. Iterating raises `BrokenFilesError` when too many files cannot be read.
    """
    if batch_size < 1 or batch_size % world_size:
        raise ValueError(
            f"batch_size is the examples of a step over all processes; it must be a positive multiple of world_size = "
            f"{world_size}, got {batch_size}"
        )
    if not 0 <= rank < world_size:
        raise ValueError(f"rank must lie between 0 and world_size - 1 = {world_size - 1}, got {rank}")
    for name, value in (("seed", seed), ("epoch", epoch), ("start_batch", start_batch)):
        if value < 0:
            raise ValueError(f"{name} must not be negative, got {value}")
    order = epoch_order(dataset, seed, epoch, training)
    plan = _BatchPlan(order, batch_size, start_batch, rank, world_size, training)
    workers = default_workers() if workers is None else workers
    return Loader(dataset, plan, seed, epoch, training, workers)
