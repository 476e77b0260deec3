"""Pictures of a needle-in-a-haystack test: heat maps, retention curves with the published points, cost over length."""

from __future__ import annotations

import io
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from dass.haystack import MEAN_SPECTRUM
from dass.niah_grid import CRASHED, ERROR, OUT_OF_MEMORY, TOO_SLOW
from dass.niah_measure import describe_length, describe_seconds
from dass.niah_store import OK

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

LONGEST = 9000.0  # s, the published 2.5 hours, to which cost is extrapolated
FARTHEST = 150.0  # how many times the longest measured length a trend is carried on to
FAILED = {OUT_OF_MEMORY: "no\nmemory", ERROR: "error", CRASHED: "killed", TOO_SLOW: "too\nslow"}
COLORS = ("#1f6fb2", "#d1495b", "#2e9e6b", "#8e6bbf", "#e0902f", "#4f5d75", "#00a6a6", "#9c6644", "#c2569b", "#7a7a00")


@dataclass(frozen=True)
class PublishedPoint:
    """A retention that was published for AudioSet and mean-spectrum haystacks: `seconds`, `percent`, its source."""

    model: str
    seconds: float
    percent: float
    source: str
    at_most: bool = False


PUBLISHED = (
    PublishedPoint("DASS-small", 10.0, 100.0, "47.2 mAP; arXiv 2407.04082"),
    PublishedPoint("DASS-small", 50.0, 96.0, "45.5 mAP; model card"),
    PublishedPoint("DASS-small", 3600.0, 100 * 28 / 47.2, "about 28 mAP; arXiv 2407.04082"),
    PublishedPoint("DASS-small", 9000.0, 62.0, "62 %; model card"),
    PublishedPoint("DASS-small", 9000.0, 50.0, "approximately half; README of the research code"),
    PublishedPoint("AST", 10.0, 100.0, "45.9 mAP; arXiv 2104.01778"),
    PublishedPoint("AST", 50.0, 12.0, "below 5 mAP, under 12 %; model card", at_most=True),
)


@dataclass(frozen=True)
class Panel:
    """A haystack at an SNR: one panel of a picture."""

    haystack: str
    snr: float | None

    @property
    def title(self) -> str:
        """For the reader."""
        return self.haystack if self.snr is None else f"{self.haystack}, {self.snr:g} dB"


def panels_of(lines: Iterable[dict]) -> list[Panel]:
    """The panels that results need, in the order of the haystacks."""
    from dass.haystack import HAYSTACKS

    found = {Panel(line["haystack"], line["snr"]) for line in lines}
    return sorted(found, key=lambda panel: (HAYSTACKS.index(panel.haystack), -(panel.snr or 0)))


def draw_heat_maps(model: str, lines: Sequence[dict]) -> Figure:
    """mAP of a model over length (across) and position (down), a panel for each haystack; failures named. Below each mAP
    stands the top-1, which is no colour."""
    own = [line for line in lines if line["model"] == model]
    panels = panels_of(own)
    lengths = sorted({line["length"] for line in own})
    positions = sorted({line["position"] for line in own})
    best = max((line["map"] for line in own if line["status"] == OK and line["map"] is not None), default=1.0)
    figure, axes = _panels(len(panels), 1.5 + 0.62 * len(lengths), 1.25 + 0.46 * len(positions))
    cells = {(line["haystack"], line["snr"], line["length"], line["position"]): line for line in own}
    for axis, panel in zip(axes, panels, strict=False):
        grid = np.full((len(positions), len(lengths)), np.nan)
        for row, position in enumerate(positions):
            for column, length in enumerate(lengths):
                line = cells.get((panel.haystack, panel.snr, length, position))
                if line is not None and line["status"] == OK and line["map"] is not None:
                    grid[row, column] = line["map"]
                    dark = line["map"] > 0.6 * best
                    text, color = f"{100 * line['map']:.0f}\n({100 * line['top1']:.0f})", "white" if dark else "black"
                else:
                    text, color = ("" if line is None else FAILED.get(line["status"], "-")), "#a02020"
                axis.text(column, row, text, ha="center", va="center", fontsize=7.5, color=color)
        axis.set_facecolor("#e6e6e6")
        image = axis.imshow(grid, vmin=0, vmax=max(best, 1e-6), cmap="Blues", aspect="auto")
        axis.set_xticks(range(len(lengths)), [describe_length(length) for length in lengths], rotation=45, fontsize=8)
        axis.set_yticks(range(len(positions)), [f"{position:g}" for position in positions], fontsize=8)
        axis.set_title(panel.title, fontsize=9)
    _label(axes, "length of the input", "position of the needle")
    figure.suptitle(f"{model}: mAP [%] (and top-1)", fontsize=11, x=0.01, ha="left")
    figure.colorbar(image, ax=list(axes), label="mAP", fraction=0.03, pad=0.01)
    return figure


def draw_retention(lines: Sequence[dict]) -> Figure:
    """Retention over length, mean over the positions, a panel for each haystack and a line for each model."""
    return _draw_curves(lines, "retention", "mAP kept [% of the shortest input]", published=True)


def draw_decisions(lines: Sequence[dict]) -> Figure:
    """Top-1 over length, as `draw_retention`: mAP ranks the inputs, this asks what is decided for each. Dotted: top-1 of
    the centred scores."""
    return _draw_curves(lines, "top1", "top-1: the needle's score is the highest [%]", beside="centred")


def _draw_curves(
    lines: Sequence[dict], key: str, label: str, published: bool = False, beside: str | None = None
) -> Figure:
    """beside: another figure of each model, a dotted line in its colour."""
    models, panels = models_of(lines), panels_of(lines)
    figure, axes = _panels(len(panels), 3.7, 3.1, share=True)
    longest = max((line.get("input_seconds") or line["length"] for line in lines), default=1.0)
    for axis, panel in zip(axes, panels, strict=False):
        failed: list[str] = []
        for number, model in enumerate(models):
            color, points = COLORS[number % len(COLORS)], curve_points(lines, model, panel, key)
            if points:
                seconds, value, low, high = np.array(points).T
                axis.plot(seconds, value, color=color, marker="o", markersize=4, label=model)
                axis.fill_between(seconds, low, high, color=color, alpha=0.15, linewidth=0)
            if beside and (points := curve_points(lines, model, panel, beside)):
                axis.plot(*np.array(points).T[:2], color=color, linestyle=":", marker=".", markersize=4)
            for line in failures(lines, model, panel)[:1]:
                x = line["input_seconds"]
                axis.plot(x, 2, marker="X", color=color, markersize=8, clip_on=False)
                # To the left, where there is room, and each model at a height of its own.
                offset = (-7, 2 + 9 * len(failed))
                axis.annotate(
                    line["status"], (x, 2), offset, textcoords="offset points", fontsize=7, color=color, ha="right"
                )
                failed.append(model)
        if chance := chance_points(lines, panel, f"{key}_chance"):
            axis.plot(*np.array(chance).T, color="grey", linestyle="--", linewidth=1, label="scores that know nothing")
        shows_published = published and panel.haystack == MEAN_SPECTRUM
        if shows_published:
            _draw_published(axis)
        axis.axhline(100, color="grey", linewidth=0.7, linestyle=":")
        axis.set(xscale="log", ylim=(0, 115), title=panel.title)
        axis.tick_params(axis="y", labelsize=8)
        axis.title.set_fontsize(9)
        shown = sorted({line["input_seconds"] for line in lines if line.get("input_seconds")})
        last = max(longest, LONGEST) if shows_published else longest
        axis.set_xlim((shown[0] if shown else 1.0) * 0.8, last * 1.3)
        _time_axis(axis)
        axis.grid(alpha=0.25)
    _label(axes, "length of the input", label)
    handles = {label: handle for axis in axes for handle, label in zip(*axis.get_legend_handles_labels(), strict=True)}
    if beside:
        from matplotlib.lines import Line2D

        handles["dotted: after each class's mean score is subtracted"] = Line2D([], [], color="grey", linestyle=":")
    figure.legend(
        handles.values(), handles.keys(), loc="outside lower center", ncols=min(len(handles), 4) or 1, fontsize=8
    )
    return figure


def draw_cost(lines: Sequence[dict]) -> Figure:
    """Seconds and peak memory of a pass over the length, with each model's trend carried on to 2.5 hours."""
    from matplotlib.lines import Line2D

    figure, axes = _panels(2, 5.6, 3.8)
    models, carried_on = models_of(lines), False
    for axis, key, scale in ((axes[0], "seconds", 1.0), (axes[1], "peak_memory", 2.0**-30)):
        ends: list[tuple[float, str, str]] = []
        for number, model in enumerate(models):
            color, points = COLORS[number % len(COLORS)], cost_points(lines, model, key)
            if not points:
                continue
            seconds, value = np.array(points).T
            axis.plot(seconds, value * scale, "o-", color=color, markersize=4, label=model)
            last = value[-1]
            if seconds[-1] < LONGEST:
                if (last := extrapolate(points, LONGEST)) is None:
                    continue
                axis.plot([seconds[-1], LONGEST], [value[-1] * scale, last * scale], ":", color=color)
                axis.plot(LONGEST, last * scale, "o", color=color, markerfacecolor="white")
                carried_on = True
            text = describe_seconds(last) if key == "seconds" else f"{last * scale:.3g} GiB"
            ends.append((last * scale, text, color))
        title = "time of a pass" if key == "seconds" else "peak memory beyond model and input [GiB]"
        axis.set(xscale="log", yscale="log", xlabel="length of the input", title=title)
        axis.margins(y=0.1)
        axis.title.set_fontsize(9)
        _time_axis(axis)
        if key == "seconds":
            axis.yaxis.set_major_formatter(lambda value, _: describe_seconds(value))
        else:
            axis.yaxis.set_major_formatter("{x:g}")
        axis.tick_params(axis="y", labelsize=8)
        axis.grid(alpha=0.25)
        _write_ends(axis, ends)
    shown = dict(zip(*reversed(axes[0].get_legend_handles_labels()), strict=True))
    if carried_on:
        shown["expected at 2.5 h: the trend of the last two lengths"] = Line2D(
            [], [], color="grey", linestyle=":", marker="o", markerfacecolor="white"
        )
    figure.legend(shown.values(), shown.keys(), loc="outside lower center", ncols=min(len(shown), 3), fontsize=8)
    return figure


def _write_ends(axis: Axes, ends: Sequence[tuple[float, str, str]]) -> None:
    """Texts (value, text, colour) beside the right edge at their values, moved apart where they would overlap."""
    low, high = np.log(axis.get_ylim())
    height = -math.inf
    for value, text, color in sorted(ends):
        height = max((math.log(value) - low) / (high - low), height + 0.055)
        axis.text(1.02, height, text, transform=axis.transAxes, color=color, fontsize=8, va="center")


def models_of(lines: Iterable[dict]) -> list[str]:
    """Models in the order of their first line."""
    return list(dict.fromkeys(line["model"] for line in lines))


def curve_points(lines: Iterable[dict], model: str, panel: Panel, key: str) -> list[tuple[float, float, float, float]]:
    """(input seconds, value, low, high) [%] of "retention" or "top1" for each length, means over the positions."""
    by_length: dict[float, list[dict]] = {}
    for line in lines:
        mine = (line["model"], line["haystack"], line["snr"]) == (model, panel.haystack, panel.snr)
        if mine and line["status"] == OK and line.get(key) is not None:
            by_length.setdefault(line["input_seconds"], []).append(line)
    return [
        (
            seconds,
            *(100 * float(np.mean([line[name] for line in found])) for name in (key, f"{key}_low", f"{key}_high")),
        )
        for seconds, found in sorted(by_length.items())
    ]


def chance_points(lines: Iterable[dict], panel: Panel, key: str) -> list[tuple[float, float]]:
    """(input seconds, what scores that know nothing reach [%]), means over models and positions."""
    by_length: dict[float, list[float]] = {}
    for line in lines:
        mine = (line["haystack"], line["snr"]) == (panel.haystack, panel.snr)
        if mine and line["status"] == OK and line.get(key) is not None:
            by_length.setdefault(line["input_seconds"], []).append(100 * line[key])
    return [(seconds, float(np.mean(found))) for seconds, found in sorted(by_length.items())]


def failures(lines: Iterable[dict], model: str, panel: Panel) -> list[dict]:
    """Lines of cells that failed, shortest first, as far as their length is known."""
    found = [
        line
        for line in lines
        if (line["model"], line["haystack"], line["snr"]) == (model, panel.haystack, panel.snr) and line["status"] != OK
    ]
    return sorted(
        ({**line, "input_seconds": line.get("input_seconds") or line["length"] or 1.0} for line in found),
        key=lambda line: line["input_seconds"],
    )


def cost_points(lines: Iterable[dict], model: str, key: str) -> list[tuple[float, float]]:
    """(input seconds, cost) for each length: the median over haystacks and positions of time, the largest memory."""
    by_length: dict[float, list[float]] = {}
    for line in lines:
        if line["model"] == model and line["status"] == OK and line[key]:
            by_length.setdefault(line["input_seconds"], []).append(line[key])
    best = np.median if key == "seconds" else np.max
    return [(seconds, float(best(found))) for seconds, found in sorted(by_length.items())]


def extrapolate(points: Sequence[tuple[float, float]], seconds: float) -> float | None:
    """Cost at a length beyond the last: the power law through the last two points, its exponent held within 1 and 2.

    None where there are not two lengths, the longer at least 1.5 times the shorter, or where `seconds` is more than
    FARTHEST times the longer: too far away for a trend to mean anything.
    """
    if len(points) < 2 or points[-1][0] < max(1.5 * points[-2][0], seconds / FARTHEST):
        return None
    (x0, y0), (x1, y1) = points[-2:]
    exponent = min(max(math.log(y1 / y0) / math.log(x1 / x0), 1.0), 2.0)
    return y1 * (seconds / x1) ** exponent


def to_png(figure: Figure) -> bytes:
    """The picture as a PNG file."""
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=110)
    return file.getvalue()


def _draw_published(axis: Axes) -> None:
    for model, marker in (("DASS-small", "D"), ("AST", "v")):
        points = [point for point in PUBLISHED if point.model == model]
        axis.plot(
            [point.seconds for point in points],
            [point.percent for point in points],
            linestyle="none",
            marker=marker,
            markerfacecolor="none",
            color="black",
            label=f"published: {model} on AudioSet, of its 10 s",
        )
        for point in points:
            if point.at_most:
                axis.annotate(
                    "at most", (point.seconds, point.percent), (6, -3), textcoords="offset points", fontsize=7
                )


def _panels(count: int, width: float, height: float, share: bool = False) -> tuple[Figure, np.ndarray]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    across = max(1, min(count, int(15 // width)))
    down = -(-count // across)
    figure = Figure(figsize=(max(width * across, 4.5), height * down + 0.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(down, across, squeeze=False, sharey=share).ravel()
    for spare in axes[count:]:
        spare.remove()
    return figure, axes[:count]


def _label(axes: Iterable[Axes], below: str, beside: str) -> None:
    """Names the axes once for each column and row of panels."""
    axes = list(axes)
    lowest = {axis.get_subplotspec().colspan.start: axis for axis in axes}  # the last one of a column
    for axis in axes:
        if axis is lowest[axis.get_subplotspec().colspan.start]:
            axis.set_xlabel(below, fontsize=8)
        if axis.get_subplotspec().is_first_col():
            axis.set_ylabel(beside, fontsize=8)


def _time_axis(axis: Axes) -> None:
    """Ticks at round times on a logarithmic axis."""
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    low, high = axis.get_xlim()
    times = [t for t in (1, 2, 5, 10, 20, 60, 120, 300, 600, 1200, 3600, 9000, 18000, 36000) if low <= t <= high]
    if len(times) > 8:
        times = [t for t in times if t in (1, 10, 60, 600, 3600, 9000, 36000)]
    axis.xaxis.set_major_locator(FixedLocator(times))
    axis.xaxis.set_minor_locator(NullLocator())
    axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: describe_length(value)))
    axis.tick_params(axis="x", labelsize=8, rotation=30)
