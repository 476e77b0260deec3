"""Needle in a haystack: figures of a cell, choice of the needles, time and memory of a pass, forecasts."""

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import average_precision_score

from dass.manifest import ManifestError
from dass.niah_data import NeedleConfig, open_needles, spread_over_classes
from dass.niah_measure import Forecast, limited_memory, measure
from dass.niah_metrics import cell_figures, chance_precision, draw_counts, mean_average_precision
from dass.niah_models import (
    is_out_of_memory,
)
from dass.niah_pictures import extrapolate
from tests.model.niah_tones import CPU, NAMES

# --- figures ----------------------------------------------------------------------------------------------------------


@given(st.integers(2, 30), st.integers(1, 4), st.integers(0, 10**6))
@settings(deadline=None, max_examples=40)
def test_average_precision_is_that_of_scikit_learn_for_every_draw(clips, classes, seed):
    random = np.random.default_rng(seed)
    scores = random.integers(0, 6, (clips, classes)).astype(float)  # many ties
    target = random.random((clips, classes)) < 0.4
    counts = np.concatenate([np.ones((1, clips), np.int16), draw_counts(clips, 5, seed)])
    found = mean_average_precision(scores, target, counts)
    for row, value in zip(counts, found, strict=True):
        drawn = np.repeat(np.arange(clips), row)
        columns = [c for c in range(classes) if 0 < target[drawn, c].sum() < clips]
        expected = [average_precision_score(target[drawn, c], scores[drawn, c]) for c in columns]
        if columns:
            assert value == pytest.approx(np.mean(expected))
        else:
            assert np.isnan(value)


def test_figures_of_a_cell():
    random = np.random.default_rng(0)
    target = np.eye(4, dtype=bool)[np.arange(60) % 4]
    good = target + 0.3 * random.standard_normal(target.shape)
    bad = target + 2.0 * random.standard_normal(target.shape)
    figures = cell_figures(bad, target, good, draws=300)
    assert figures.map.low < figures.map.value < figures.map.high
    assert figures.retention.value == pytest.approx(figures.map.value / cell_figures(good, target, None).map.value)
    assert figures.retention.low < figures.retention.value < figures.retention.high < 1
    assert figures.top1.value == (bad.argmax(1) == np.arange(60) % 4).mean()
    biased = cell_figures(good + np.array([0, 0, 9, 0]), target, good)
    assert biased.top1.value == 0.25 and biased.centred.value == cell_figures(good, target, None).centred.value > 0.9
    assert biased.retention.value == 1, "the order does not see what is the same for all"
    assert figures.top1_chance == 0.25, "of four classes, each clip having one"
    same = cell_figures(good, target, good)
    assert (same.retention.value, same.retention.low, same.retention.high) == (1, 1, 1), "the draws are paired"
    assert np.isnan(cell_figures(good, target, None).retention.value)
    assert np.isnan(cell_figures(good[:0], target[:0], None).map.value)
    single = cell_figures(good[:1], target[:1], None)
    assert np.isnan(single.map.value) and single.top1.value in (0, 1), "one clip has no order"
    assert np.isnan(single.centred.value)


@given(st.integers(2, 5), st.data())
@settings(deadline=None, max_examples=20)
def test_chance_is_the_mean_over_all_orders(clips, data):
    target = np.array([[data.draw(st.booleans()) for _ in range(2)] for _ in range(clips)])
    orders = np.array(list(itertools.permutations(range(clips))), dtype=float)
    one = np.ones((1, clips), np.int16)
    found = [
        [mean_average_precision(order[:, None], target[:, [column]], one)[0] for order in orders]
        for column in range(2)
        if 0 < target[:, column].sum() < clips
    ]
    expected = np.mean(found) if found else np.nan
    assert chance_precision(target) == pytest.approx(expected, nan_ok=True)


def test_chance_grows_as_the_needles_become_fewer():
    target = np.eye(10, dtype=bool)
    assert chance_precision(target) == pytest.approx(np.mean(1 / np.arange(1, 11)))
    assert chance_precision(np.tile(target, (30, 1))) == pytest.approx(0.12, abs=0.01)
    scores = np.random.default_rng(0).random((10, 10))
    figures = cell_figures(scores, target, target.astype(float))
    assert figures.chance == figures.retention_chance == chance_precision(target)


def test_a_larger_set_has_a_narrower_interval():
    random = np.random.default_rng(1)
    widths = []
    for clips in (20, 200, 2000):
        target = np.eye(4, dtype=bool)[random.integers(0, 4, clips)]
        map_ = cell_figures(target + random.standard_normal(target.shape), target, None, draws=200).map
        widths.append(map_.high - map_.low)
    assert widths[0] > 2 * widths[1] > 4 * widths[2]


# --- needles ----------------------------------------------------------------------------------------------------------


@given(st.lists(st.lists(st.integers(0, 4), max_size=3, unique=True), max_size=40), st.integers(0, 3))
@settings(deadline=None)
def test_needles_are_spread_over_the_classes(labels, seed):
    labels = [tuple(entry) for entry in labels]
    order = spread_over_classes(labels, 5, seed)
    assert sorted(order) == [index for index, entry in enumerate(labels) if entry]
    present = {label for entry in labels for label in entry}
    assert {label for index in order[: len(present)] for label in labels[index]} == present
    assert order == spread_over_classes(labels, 5, seed)


def test_needles_come_from_any_set_the_trainer_reads(tmp_path):
    import soundfile

    (tmp_path / "audio").mkdir()
    rows = ["filename,fold,target,category"]
    for number in range(6):
        soundfile.write(tmp_path / "audio" / f"{number}.wav", np.full(1600, 0.1), 16000)
        rows.append(f"{number}.wav,{1 + number % 2},{number % 3},{NAMES[number % 3]}")
    (tmp_path / "meta").mkdir()
    (tmp_path / "meta" / "esc50.csv").write_text("\n".join(rows))
    needles = open_needles(NeedleConfig(set=tmp_path, fold="2"), None, 0)
    assert len(needles) == 3 and needles.target.sum() == 3
    assert needles.waveform(0, 16000, 800).shape == (800,)
    assert len(open_needles(NeedleConfig(set=tmp_path, holdout="^[01]", clips=1), None, 0)) == 1
    with pytest.raises(ManifestError, match="no fold '9'; it has 1, 2"):
        open_needles(NeedleConfig(set=tmp_path, fold="9"), None, 0)
    assert open_needles(NeedleConfig(clips=5), None, 0).origin == "the built-in synthetic corpus"
    changed = open_needles(NeedleConfig(set=tmp_path, fold="1"), None, 0)
    assert changed.identity() != needles.identity()


# --- time and memory --------------------------------------------------------------------------------------------------


@pytest.mark.skipif(
    not Path("/proc/self/clear_refs").exists(), reason="the peak of memory is measured under Linux only"
)
def test_the_peak_memory_of_a_pass_is_measured_and_limited():
    torch.ones(1000).sum()
    found = measure(lambda: (torch.ones(8_000_000) * 2).sum(), CPU)
    assert found.memory == pytest.approx(64e6, rel=0.2) and found.result == 16_000_000 and found.seconds > 0
    assert measure(lambda: torch.ones(10), CPU).memory < 4e6
    with limited_memory(50e6), pytest.raises(RuntimeError) as raised:
        torch.ones(40_000_000)
    assert is_out_of_memory(raised.value)
    assert torch.ones(40_000_000).sum() == 40_000_000, "the limit is gone"


def test_what_lack_of_memory_looks_like():
    assert is_out_of_memory(MemoryError()) and is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory"))
    assert not is_out_of_memory(ValueError("out of memory of what was said"))


def test_the_forecast_follows_the_growth_that_was_seen():
    forecast = Forecast()
    assert forecast.seconds("a", 100) is None
    forecast.add("a", 100, 1.0)
    assert forecast.seconds("a", 300) == pytest.approx(3.0) and forecast.seconds("b", 300) == pytest.approx(3.0)
    forecast.add("a", 200, 4.0)
    assert forecast.seconds("a", 400) == pytest.approx(16.0)
    assert forecast.seconds("a", 200) == 4.0
    forecast.add("b", 100, 2.0)
    forecast.add("b", 1000, 2.0)  # a fixed cost at the beginning does not promise that long inputs are free
    assert forecast.seconds("b", 10_000) == pytest.approx(20.0)
    assert extrapolate([(10, 1.0), (100, 10.0)], 1000) == pytest.approx(100)
    assert extrapolate([(10, 1.0)], 1000) is None
