"""Figures of a cell from the scores of its clips: mAP, top-1, top-1 of the centred scores and retention, each with a
bootstrap interval.

The bootstrap draws whole clips with replacement. A draw is a row of counts, and average precision with counts as weights
is that of the drawn clips; so a thousand draws are one cumulative sum. Two cells share their draws, which makes the
interval of their ratio the paired one.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

Array = np.ndarray
DRAWS_AT_ONCE = 4_000_000  # counts (draws x clips) held at a time


@dataclass(frozen=True)
class Estimate:
    """A figure and the limits of its interval; all three NaN where it is undefined."""

    value: float
    low: float
    high: float

    def scaled(self, factor: float) -> Estimate:
        """In other units."""
        return Estimate(self.value * factor, self.low * factor, self.high * factor)


def draw_counts(clips: int, draws: int, seed: int) -> Array:
    """(draws, clips) int16: how often each clip is in each bootstrap sample."""
    random = np.random.default_rng(seed)
    return random.multinomial(clips, np.full(clips, 1 / clips), size=draws).astype(np.int16)


def mean_average_precision(scores: Array, target: Array, counts: Array) -> Array:
    """(draws,): mAP of the clips drawn, over the classes that have both a positive and a negative among them (without a
    negative every order is perfect); NaN where none has.

    scores (clips, classes) float; target (clips, classes) bool; counts (draws, clips), a row of ones for the clips
    themselves. Equal scores are one threshold, as in scikit-learn.
    """
    total, defined = np.zeros(len(counts)), np.zeros(len(counts))
    rows = max(DRAWS_AT_ONCE // max(len(scores), 1), 1)
    for column in np.flatnonzero(target.any(axis=0)):
        order = np.argsort(-scores[:, column], kind="stable")
        ordered, positive = scores[order, column], target[order, column]
        ends = np.flatnonzero(np.append(ordered[1:] != ordered[:-1], True))
        for first in range(0, len(counts), rows):
            weights = counts[first : first + rows, order].astype(np.float64)
            drawn = np.cumsum(weights, axis=1)[:, ends]
            found = np.cumsum(weights * positive, axis=1)[:, ends]
            positives = found[:, -1]
            precision = np.divide(found, drawn, out=np.zeros_like(found), where=drawn > 0)
            gained = np.diff(found, axis=1, prepend=0.0)
            area = (precision * gained).sum(axis=1)
            known = (positives > 0) & (positives < drawn[:, -1])
            total[first : first + rows][known] += area[known] / positives[known]
            defined[first : first + rows] += known
    return np.divide(total, defined, out=np.full(len(counts), np.nan), where=defined > 0)


def chance_precision(target: Array) -> float:
    """mAP that scores knowing nothing would have on average: over all orders of the clips, target (clips, classes) bool.

    Of N clips, P of them positive, a random order has an average precision of ((P - 1) (N - H) / (N - 1) + H) / N, with
    H = 1 + 1/2 + ... + 1/N (Bestgen, "Exact expected average precision of the random baseline", PBML 103, 2015). The mean
    is over the classes that count for `mean_average_precision`; NaN where none does.
    """
    clips, positives = len(target), target.sum(axis=0)
    positives = positives[(positives > 0) & (positives < clips)]
    if not len(positives):
        return math.nan
    harmonic = float(np.sum(1 / np.arange(1, clips + 1)))
    return float(np.mean(((positives - 1) * (clips - harmonic) / (clips - 1) + harmonic) / clips))


def top1_hits(scores: Array, target: Array) -> Array:
    """(clips,) bool: whether the highest score is that of one of the clip's labels."""
    return target[np.arange(len(scores)), scores.argmax(axis=1)]


def centred(scores: Array) -> Array:
    """Scores (clips, classes) less each class's mean over the clips: what a needle adds to what all inputs share.

    The longer an input, the more its scores are the haystack's own, which favour one class whatever the needle is; a
    head that averages over time makes the needle's part small but not less right.
    """
    return scores - scores.mean(axis=0, keepdims=True)


def interval(value: float, sample: Array, level: float = 0.95) -> Estimate:
    """The value with the percentile interval of its bootstrap sample."""
    sample = sample[np.isfinite(sample)]
    if not np.isfinite(value) or not len(sample):
        return Estimate(math.nan, math.nan, math.nan)
    low, high = np.quantile(sample, [(1 - level) / 2, (1 + level) / 2])
    return Estimate(float(value), float(low), float(high))


@dataclass(frozen=True)
class CellFigures:
    """What a cell comes to: `map` and `top1` in [0, 1], `retention` relative to the reference (1 = nothing lost).

    centred: `top1` of the centred scores; undefined for fewer than two clips.
    chance, retention_chance, top1_chance: what map, retention and top1 would be for scores that know nothing.
    """

    map: Estimate
    top1: Estimate
    centred: Estimate
    retention: Estimate
    chance: float
    retention_chance: float
    top1_chance: float


def cell_figures(
    scores: Array, target: Array, reference: Array | None, *, draws: int = 1000, seed: int = 0
) -> CellFigures:
    """Figures of a cell of clips with scores (clips, classes) and labels (clips, classes).

    reference: scores of the same clips by the same model at the shortest length; None leaves the retention undefined.
    """
    undefined = Estimate(math.nan, math.nan, math.nan)
    if not len(scores):
        return CellFigures(undefined, undefined, undefined, undefined, math.nan, math.nan, math.nan)
    target = target.astype(bool)
    counts = draw_counts(len(scores), draws, seed)
    itself = np.ones((1, len(scores)), np.int16)
    value, sample = (mean_average_precision(scores, target, rows) for rows in (itself, counts))
    shares = []
    for given in (scores, centred(scores)):
        hits = top1_hits(given, target).astype(np.float64)
        shares.append(interval(float(hits.mean()), counts @ hits / len(hits)))
    if len(scores) < 2:
        shares[1] = undefined
    retention, chance, retention_chance = undefined, chance_precision(target), math.nan
    if reference is not None:
        base, base_sample = (mean_average_precision(reference, target, rows) for rows in (itself, counts))
        with np.errstate(divide="ignore", invalid="ignore"):
            retention = interval(float(value[0] / base[0]), sample / base_sample)
            retention_chance = float(chance / base[0])
    # Every class is as likely to have the highest score.
    return CellFigures(
        interval(float(value[0]), sample), *shares, retention, chance, retention_chance, float(target.mean())
    )
