"""Windows, segments, events and pictures against their definitions."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dass.tag_output import clock
from dass.timeline import EventFinder, Picture, Segment, Summary, average_overlaps, cut_windows


@given(st.lists(st.integers(0, 40), max_size=12), st.integers(1, 30), st.data())
@settings(deadline=None)
def test_windows_cover_the_stream_whatever_the_blocks(sizes, window, data):
    hop = data.draw(st.integers(1, window))
    stream = torch.arange(sum(sizes), dtype=torch.float32)
    windows = list(cut_windows(stream.split(sizes) if sizes else [], window, hop))
    total = stream.numel()
    if total < window:
        assert [(start, piece.tolist()) for start, piece in windows] == ([(0, stream.tolist())] if total else [])
        return
    starts = list(range(0, total - window + 1, hop))
    if starts[-1] + window < total:
        starts.append(total - window)  # flush with the end
    assert [start for start, _ in windows] == starts
    for start, piece in windows:
        assert torch.equal(piece, stream[start : start + window])


@given(st.integers(1, 60), st.integers(1, 20), st.data())
@settings(deadline=None)
def test_segments_are_means_over_the_windows_around_their_middle(total, window, data):
    hop = data.draw(st.integers(1, window))
    windows = [
        (start, start + piece.numel(), np.array([float(number)]))
        for number, (start, piece) in enumerate(cut_windows([torch.zeros(total)], window, hop))
    ]
    segments = list(average_overlaps(windows, hop, 1))
    assert segments[0].start == 0 and segments[-1].end == total
    assert [s.end for s in segments[:-1]] == [s.start for s in segments[1:]]
    for number, segment in enumerate(segments):
        assert segment.start == number * hop
        middle = (number + 0.5) * hop if (number + 0.5) * hop <= total else (segment.start + segment.end) / 2
        inside = [scores for start, end, scores in windows if start <= middle <= end]
        assert np.allclose(segment.scores, np.mean(inside, axis=0))


def test_a_hop_longer_than_the_window_is_refused():
    with pytest.raises(ValueError, match="hop"):
        list(cut_windows([torch.zeros(100)], 10, 11))


@given(st.lists(st.sampled_from([0.0, 0.4, 0.6, 0.9]), min_size=1, max_size=40), st.integers(0, 3))
@settings(deadline=None)
def test_events_are_the_runs_above_the_threshold(scores, gap):
    finder = EventFinder(1, 0.5, merge_gap=float(gap))
    events = []
    for second, score in enumerate(scores):
        events += finder.add(Segment(second, second + 1, np.array([score])))
    events += finder.finish()
    runs = []
    for second in (s for s, score in enumerate(scores) if score >= 0.5):
        if runs and second - runs[-1][1] <= gap:
            runs[-1][1] = second + 1
        else:
            runs.append([second, second + 1])
    assert [[event.start, event.end] for event in events] == runs
    for event in events:
        inside = [score for score in scores[int(event.start) : int(event.end)] if score >= 0.5]
        assert event.score == max(inside) and event.mean == pytest.approx(np.mean(inside))


def test_the_picture_stays_small_and_keeps_every_peak():
    picture = Picture(columns=8)
    for second in range(1000):
        picture.add(Segment(second, second + 1, np.array([1.0 if second == 777 else 0.1])))
        assert len(picture.values) <= 16
    scores, edges = picture.scores(), picture.edges
    assert len(edges) == scores.shape[1] + 1 and edges[0] == 0 and edges[-1] == 1000
    peak = int(scores[0].argmax())
    assert edges[peak] <= 777 < edges[peak + 1] and scores[0, peak] == 1.0
    assert (np.delete(scores[0], peak) == np.float32(0.1)).all()


def test_the_mean_is_over_time_not_over_segments():
    summary = Summary(1)
    summary.add(Segment(0, 3, np.array([1.0])))
    summary.add(Segment(3, 4, np.array([0.0])))
    assert summary.mean[0] == 0.75 and summary.peak[0] == 1.0 and summary.seconds == 4


def test_the_clock_reads_like_one():
    assert [clock(value) for value in (0, 59.96, 61.5, 3599, 3723)] == ["0:00", "1:00", "1:01.5", "59:59", "1:02:03"]
