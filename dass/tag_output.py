"""What tagging a long file leaves on disk: events as CSV, Audacity labels and JSON, scores, and a timeline picture.

Everything is written while the file is still being heard, in constant memory, under temporary names; `close` puts it in
place, the JSON record last. A record that is there therefore stands for a file that is done.
"""

from __future__ import annotations

import csv
import json
import math
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from dass.checkpoint import atomic_write
from dass.tagger import Tag
from dass.timeline import Event, Picture, Segment

RECORD = ".json"
EVENTS = ".events.csv"
AUDACITY = ".audacity.txt"
SCORES = ".scores.csv"
TIMELINE = ".timeline.png"


class FileReport:
    """Writes the outputs of one file, `base` plus a suffix each; used as a context, it cleans up after an error.

    >>> with FileReport(Path("tags/night.flac"), labels, "night.flac", settings) as report:
    ...     report.event(event); report.segment(segment); report.close(tags, seconds)
    """

    def __init__(self, base: Path, labels: Sequence[str], name: str, settings: dict, columns: Sequence[int] | None):
        self.base, self.labels, self.name, self.settings = Path(base), labels, name, settings
        self.count = 0
        self.base.parent.mkdir(parents=True, exist_ok=True)
        self.files = {}
        for suffix in (RECORD, EVENTS, AUDACITY, *([SCORES] if columns is not None else [])):
            self.files[suffix] = self._temporary(suffix).open("w", encoding="utf-8", newline="")
        self.events_csv = csv.writer(self.files[EVENTS], lineterminator="\n")
        self.events_csv.writerow(["start", "end", "label", "score", "mean"])
        head = json.dumps({"file": name, "settings": settings}, ensure_ascii=False)
        self.files[RECORD].write(head[:-1] + ', "events": [')
        self.columns = columns
        if columns is not None:
            self.scores_csv = csv.writer(self.files[SCORES], lineterminator="\n")
            self.scores_csv.writerow(["start", "end", *(labels[index] for index in columns)])

    def __enter__(self) -> FileReport:
        return self

    def __exit__(self, *error) -> None:
        for suffix, file in self.files.items():
            file.close()
            self._temporary(suffix).unlink(missing_ok=True)

    def _temporary(self, suffix: str) -> Path:
        return self.base.with_name(f".{self.base.name}{suffix}.{os.getpid()}.tmp")

    def path(self, suffix: str) -> Path:
        """Where the output of this suffix lies in the end."""
        return self.base.with_name(self.base.name + suffix)

    def event(self, event: Event) -> None:
        """Adds an event; they come in the order in which they end."""
        label = self.labels[event.index]
        self.events_csv.writerow(
            [f"{event.start:.3f}", f"{event.end:.3f}", label, f"{event.score:.4f}", f"{event.mean:.4f}"]
        )
        # Audacity reads "start <tab> end <tab> text"; a tab in the text would end it.
        text = label.replace("\t", " ")
        self.files[AUDACITY].write(f"{event.start:.6f}\t{event.end:.6f}\t{text} {event.score:.2f}\n")
        entry = {
            "start": round(event.start, 3),
            "end": round(event.end, 3),
            "label": label,
            "score": round(event.score, 4),
            "mean": round(event.mean, 4),
        }
        self.files[RECORD].write(("," if self.count else "") + "\n" + json.dumps(entry, ensure_ascii=False))
        self.count += 1

    def segment(self, segment: Segment) -> None:
        """Adds a row of scores, where they were asked for."""
        if self.columns is not None:
            scores = (f"{segment.scores[index]:.4f}" for index in self.columns)
            self.scores_csv.writerow([f"{segment.start:.3f}", f"{segment.end:.3f}", *scores])

    def close(self, tags: Sequence[Tag], seconds: float, peaks: np.ndarray) -> None:
        """Finishes every file and puts it in place, the record last."""
        entries = [
            {"label": tag.label, "score": round(tag.score, 4), "peak": round(float(peaks[tag.index]), 4)}
            for tag in tags
        ]
        tail = json.dumps({"seconds": round(seconds, 3), "tags": entries}, ensure_ascii=False)
        self.files[RECORD].write("\n], " + tail[1:] + "\n")
        for suffix in (*(suffix for suffix in self.files if suffix != RECORD), RECORD):
            file = self.files[suffix]
            file.flush()
            os.fsync(file.fileno())
            file.close()
            os.replace(self._temporary(suffix), self.path(suffix))


def draw_timeline(
    path: Path, picture: Picture, labels: Sequence[str], rows: Sequence[int], threshold: float, title: str
) -> Path:
    """A PNG of the classes `rows` over time: one strip each, darker where the score is higher."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, MultipleLocator

    scores, edges = picture.scores()[list(rows)], np.asarray(picture.edges)
    figure = Figure(figsize=(12, 1.6 + 0.32 * len(rows)), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    rows_at = np.arange(len(rows) + 1)
    mesh = axes.pcolormesh(edges, rows_at, scores, vmin=0.0, vmax=1.0, cmap="Blues", rasterized=True)
    for row in range(1, len(rows)):
        axes.axhline(row, color="silver", linewidth=1.0)
    axes.set_yticks(rows_at[:-1] + 0.5, [_shorten(labels[index]) for index in rows])
    axes.invert_yaxis()
    axes.set_xlim(edges[0], edges[-1])
    axes.xaxis.set_major_locator(MultipleLocator(_tick_step(edges[-1])))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda seconds, _: clock(seconds)))
    axes.set_xlabel("time [h:min:s]" if edges[-1] >= 3600 else "time [min:s]")
    axes.set_title(title, loc="left", fontsize=10)
    bar = figure.colorbar(mesh, ax=axes, label="score", pad=0.01, fraction=0.03, aspect=max(8, 2 * len(rows)))
    bar.ax.axhline(threshold, color="tab:red", linewidth=1.5)
    return atomic_write(path, lambda temporary: figure.savefig(temporary))


def _tick_step(seconds: float, most: int = 12) -> float:
    """A round number of seconds, minutes or hours that puts at most `most` ticks on an axis."""
    steps = (0.1, 0.2, 0.5, 1, 2, 5, 10, 15, 30, 60, 120, 300, 600, 900, 1800, 3600, 7200, 10800, 21600, 43200)
    return next((step for step in steps if seconds <= step * most), 86400.0 * math.ceil(seconds / 86400 / most))


def clock(seconds: float) -> str:
    """1:02:03 for hours, 2:03 below; tenths where the seconds are not whole."""
    whole, tenth = divmod(round(seconds * 10), 10)
    minutes, rest = divmod(whole, 60)
    hours, minutes = divmod(minutes, 60)
    text = f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
    return f"{text}.{tenth}" if tenth else text


def _shorten(label: str, length: int = 36) -> str:
    return label if len(label) <= length else label[: length - 1] + "…"


def read_record(base: Path, settings: dict) -> dict | None:
    """The record of a file that was tagged before with the same settings, or None."""
    path = Path(base).with_name(Path(base).name + RECORD)
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return None
    same = isinstance(record, dict) and record.get("settings") == json.loads(json.dumps(settings))
    return record if same else None
