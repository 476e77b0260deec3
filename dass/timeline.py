"""Scores over time in constant memory: cutting a stream into windows, averaging what overlaps, finding events.

Times are kept in samples (whole numbers) until they are given out in seconds, so that no rounding accumulates over hours.
A segment is one hop long; its score is the mean over all windows that contain its middle.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

Array = np.ndarray


@dataclass(frozen=True)
class Segment:
    """A stretch of the file, `start` to `end` [s], and its `scores` (classes,) in [0, 1]."""

    start: float
    end: float
    scores: Array


@dataclass(frozen=True)
class Event:
    """Class `index` scores at least the threshold from `start` to `end` [s]; `score` is its peak, `mean` its mean there."""

    index: int
    start: float
    end: float
    score: float
    mean: float


def cut_windows(blocks: Iterable[Tensor], window: int, hop: int) -> Iterator[tuple[int, Tensor]]:
    """Windows of `window` samples every `hop` samples out of a stream of blocks of any sizes: `(start, (samples,))`.

    The last window sits flush at the end where a whole number of hops does not reach it; a stream shorter than one window
    is given as it is. At most `window + hop` samples and one block are held. ValueError unless 1 <= hop <= window.
    """
    if not 1 <= hop <= window:
        raise ValueError(
            f"hop must be from 1 sample to the window's {window}, got {hop}: a longer one would leave gaps"
        )
    held, base, start = torch.zeros(0), 0, 0  # `held` begins at sample `base` of the stream; the next window at `start`
    for block in blocks:
        held = torch.cat([held, block])
        while base + held.numel() >= start + window:
            yield start, held[start - base : start - base + window]
            # The window just given stays: the stream may end here, and the flush one reaches back into it.
            held, base, start = held[start - base :], start, start + hop
    total = base + held.numel()
    if start == 0:
        if total:
            yield 0, held
    elif total > start - hop + window:
        yield total - window, held[total - window - base :]


def average_overlaps(windows: Iterable[tuple[int, int, Array]], hop: int, rate: int) -> Iterator[Segment]:
    """Segments, in order, of scored windows `(start sample, end sample, (classes,))` that come in order of their start.

    A last segment too short to contain the middle of its hop is joined to the one before.
    """
    covering: deque[tuple[int, int, Array]] = deque()
    number, last_end, waiting = 0, 0, None

    def segment(middle: float, end: int) -> Segment | None:
        inside = [scores for first, last, scores in covering if first <= middle <= last]
        if not inside:
            return None
        return Segment(number * hop / rate, end / rate, np.mean(inside, axis=0))

    for start, end, scores in windows:
        # A segment is complete once no window to come can contain its middle.
        while (number + 0.5) * hop < start:
            complete = segment((number + 0.5) * hop, (number + 1) * hop)
            if waiting is not None:
                yield waiting
            waiting, number = complete, number + 1
            while covering and covering[0][1] < (number + 0.5) * hop:
                covering.popleft()
        covering.append((start, end, scores))
        last_end = max(last_end, end)
    while number * hop < last_end:
        end = min((number + 1) * hop, last_end)
        complete = segment((number + 0.5) * hop, end)
        if complete is None and waiting is None:  # the whole stream is shorter than half a hop
            complete = segment((number * hop + end) / 2, end)
        if complete is None:
            waiting = Segment(waiting.start, end / rate, waiting.scores)
        else:
            if waiting is not None:
                yield waiting
            waiting = complete
        number += 1
    if waiting is not None:
        yield waiting


class EventFinder:
    """Turns segments, one after another, into events: maximal runs of a class at or above the threshold.

    Runs of one class with a gap of at most `merge_gap` [s] between them are one event. Memory: a few numbers per class.
    """

    def __init__(self, classes: int, threshold: float, merge_gap: float = 0.0):
        self.threshold, self.merge_gap = threshold, merge_gap
        self.start = np.full(classes, np.nan)  # of the run under way; not a number where there is none
        self.end, self.peak = np.zeros(classes), np.zeros(classes)
        self.total, self.length = np.zeros(classes), np.zeros(classes)  # score * seconds, seconds above the threshold

    def add(self, segment: Segment) -> list[Event]:
        """The events that can no longer go on, in order of class."""
        over = ~np.isnan(self.start) & (segment.start - self.end > self.merge_gap + 1e-9)
        events = self._close(over)
        active = segment.scores >= self.threshold
        fresh = active & np.isnan(self.start)
        self.start[fresh] = segment.start
        self.peak[fresh] = self.total[fresh] = self.length[fresh] = 0.0
        seconds = segment.end - segment.start
        self.end[active] = segment.end
        self.peak[active] = np.maximum(self.peak, segment.scores)[active]
        self.total[active] += (segment.scores * seconds)[active]
        self.length[active] += seconds
        return events

    def finish(self) -> list[Event]:
        """The events that last to the end of the stream."""
        return self._close(~np.isnan(self.start))

    def _close(self, which: Array) -> list[Event]:
        events = []
        for index in np.flatnonzero(which):
            mean = self.total[index] / self.length[index] if self.length[index] > 0 else self.peak[index]
            events.append(
                Event(
                    int(index), float(self.start[index]), float(self.end[index]), float(self.peak[index]), float(mean)
                )
            )
        self.start[which] = np.nan
        return events


class Picture:
    """Scores of every class over time at a resolution that halves when needed: between `columns` and twice as many.

    Each column holds the largest score within it, so that a short event in a file of hours stays visible.
    """

    def __init__(self, columns: int = 1000):
        self.columns, self.per_column, self.count = columns, 1, 0
        self.values: list[Array] = []
        self.edges: list[float] = [0.0]  # [s]; edges[i] to edges[i + 1] is column i

    def add(self, segment: Segment) -> None:
        """Takes the next segment."""
        scores = segment.scores.astype(np.float32)
        if self.count % self.per_column == 0:
            self.values.append(scores)
            self.edges.append(segment.end)
        else:
            self.values[-1] = np.maximum(self.values[-1], scores)
            self.edges[-1] = segment.end
        self.count += 1
        if len(self.values) == 2 * self.columns and self.count % self.per_column == 0:
            self.values = [np.maximum(a, b) for a, b in zip(self.values[::2], self.values[1::2], strict=True)]
            self.edges = self.edges[::2]
            self.per_column *= 2

    def scores(self) -> Array:
        """(classes, columns) float32."""
        return np.stack(self.values, axis=1)


class Summary:
    """Mean over time and peak of every class's scores, and the seconds they cover."""

    def __init__(self, classes: int):
        self.total, self.peak, self.seconds = np.zeros(classes), np.zeros(classes), 0.0

    def add(self, segment: Segment) -> None:
        """Takes the next segment."""
        self.total += segment.scores * (segment.end - segment.start)
        self.seconds += segment.end - segment.start
        self.peak = np.maximum(self.peak, segment.scores)

    @property
    def mean(self) -> Array:
        """(classes,) mean score over time."""
        return self.total / self.seconds if self.seconds > 0 else self.total


def samples_of(seconds: float, rate: int, name: str) -> int:
    """Whole number of samples in `seconds`; ValueError, naming the option, unless that is at least one."""
    if not (math.isfinite(seconds) and seconds > 0):
        raise ValueError(f"{name} must be a positive number of seconds, got {seconds}")
    return max(round(seconds * rate), 1)
