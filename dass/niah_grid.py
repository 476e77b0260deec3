"""The grid: every model on every length, haystack, SNR and position, cell by cell, whatever happens on the way.

The positions of a needle share one haystack, so they are run together: for each clip the haystack is made once and the
needle moved through it. A model's short inputs come first; where it runs out of memory, the longer ones are not tried,
nor those that its shorter ones promise to take longer than is allowed.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from datetime import datetime, timezone

import numpy as np
import torch

from dass.audio import AudioError, LogMel, LogMelConfig
from dass.classes import ClassMatch, match_classes, read_class_table
from dass.haystack import LEVELLED, Haystack
from dass.needle import Placing, Scene, frames_for
from dass.niah_data import NeedleSet
from dass.niah_measure import Forecast, describe_seconds, limited_memory, measure, release_memory
from dass.niah_metrics import cell_figures
from dass.niah_models import ModelSpec, NiahModel, is_out_of_memory
from dass.niah_store import BROKEN, DONE, OK, Group, GroupScores, Store

OUT_OF_MEMORY, ERROR, CRASHED, TOO_SLOW = "out of memory", "error", "crashed", "too slow"
PUBLISHED_FRAMES = 1024  # of a needle for a model that names no trained length
NOT_LOADED = ""  # identity of a model that could not be loaded
FIGURES = ("map", "top1", "centred", "retention")  # each with its interval in a line
NEEDLE_ALONE = 0.0  # a length: the needle without any haystack


@dataclass(frozen=True)
class Protocol:
    """What is done in every cell. Times in seconds, levels in dB."""

    lengths: tuple[float, ...]
    positions: tuple[float, ...]
    haystacks: tuple[str, ...]
    snrs: tuple[float, ...]
    placing: Placing
    seed: int
    talkers: int
    folders: dict[str, object]
    audio_per_cell: float | None
    fewest_needles: int
    bootstrap: int

    def clips(self, length: float, available: int) -> int:
        """Needles of a cell of this length."""
        if self.audio_per_cell is None or length <= 0:
            return available
        return min(available, max(self.fewest_needles, int(self.audio_per_cell / length)))


class Reporter:
    """Where the grid tells how it goes; this one keeps silent."""

    def begin(self, group: Group, clips: int) -> None:
        """A group begins."""

    def step(self, seconds_left: float | None) -> None:
        """A clip of it is done; what is left of the whole grid takes about so long."""

    def end(self, group: Group, lines: Sequence[dict]) -> None:
        """Its cells are done."""


class Grid:
    """Runs the cells that are not done yet.

    load: makes a model ready; memory: bytes that the process may take beyond what it has (None: no limit);
    longest_pass: seconds that a pass may be expected to take (None: any);
    attempt: called with the cells about to be tried and with None afterwards, for a supervisor of this process.
    """

    def __init__(
        self,
        protocol: Protocol,
        needles: NeedleSet,
        specs: Sequence[ModelSpec],
        load: Callable[[ModelSpec], NiahModel],
        store: Store,
        *,
        class_map: str | None = None,
        memory: float | None = None,
        longest_pass: float | None = None,
        autocast: torch.dtype | None = None,
        reporter: Reporter | None = None,
        attempt: Callable[[dict | None], None] = lambda cells: None,
    ):
        self.protocol, self.needles, self.specs, self.load, self.store = protocol, needles, specs, load, store
        self.table = read_class_table(class_map) if class_map is not None else None
        self.memory, self.longest_pass, self.autocast = memory, longest_pass, autocast
        self.reporter, self.attempt = reporter or Reporter(), attempt
        self.forecast = Forecast()
        for line in store.lines.values():  # what an earlier start saw
            if line["status"] == OK and line["seconds"]:
                self.forecast.add(line["model"], line["frames"], line["seconds"])

    def groups(self, model: str) -> list[Group]:
        """A model's groups in the order in which they are run."""
        return [
            Group(model, length, haystack, snr)
            for length in sorted(self.protocol.lengths)
            for haystack in self.protocol.haystacks
            for snr in (self.protocol.snrs if haystack in LEVELLED else (None,))
        ]

    def run(self) -> None:
        """Runs everything that is not done. Raises what is wrong with the only model where that cannot be loaded."""
        for number, spec in enumerate(self.specs):
            later = [other.name for other in self.specs[number + 1 :]]
            groups = self.groups(spec.name)
            cells = [group.cell(position) for group in groups for position in self.protocol.positions]
            if all(self._died_loading(cell) for cell in cells):
                continue
            self.attempt({"model_id": NOT_LOADED, "cells": cells})
            try:
                model = self.load(spec)
            except Exception as error:  # one model's failure is a result of the test, not its end
                if len(self.specs) == 1 and isinstance(error, ValueError):
                    raise  # a wrong name, with nothing else to go on with
                self._fail(groups, NOT_LOADED, *_described(error))
                continue
            finally:
                self.attempt(None)
            self._run_model(model, later)
            if model.parameters:
                del model
                release_memory()

    def _run_model(self, model: NiahModel, later: Sequence[str]) -> None:
        match = self._match(model)
        positions, groups = self.protocol.positions, self.groups(model.name)
        for number, group in enumerate(groups):
            if self.store.finished(group, positions, model.identity, self._clips(group)):
                continue
            if shorter := self._gave_up_at(group, model.identity):
                why = f"not tried: {shorter['status']} at {shorter['length']:g} s ({shorter['haystack']})"
                self._fail([group], model.identity, shorter["status"], why, model)
                continue
            if (seconds := self._too_long(group, model)) is not None:
                why = f"not tried: a pass would take about {describe_seconds(seconds)}, by the times at shorter lengths"
                self._fail([group], model.identity, TOO_SLOW, why, model)
                continue
            self.attempt({"model_id": model.identity, "cells": [group.cell(p) for p in positions]})
            left = [(model.name, other) for other in groups[number + 1 :]]
            left += [(name, other) for name in later for other in self.groups(name)]
            self._run_group(group, model, match, left)
            self.attempt(None)
        self._refresh_retention(model, match)

    def _refresh_retention(self, model: NiahModel, match: ClassMatch) -> None:
        """New lines for cells whose retention refers to another than the shortest length, where one was added later, for
        those of whose needles not all had been heard at the shortest length, and for lines that lack a figure."""
        shortest = self._shortest(model.name)
        stale = {
            Group(model.name, line["length"], line["haystack"], line["snr"])
            for line in self.store.lines.values()
            if (line["model"], line["model_id"], line["status"]) == (model.name, model.identity, OK)
            and (line["retention_of"] != shortest or line["retention"] is None or not line.keys() >= {*FIGURES})
        }
        for group in sorted(stale, key=lambda group: group.id):
            self._finish(group, model, match, self._scores(group, model, match))

    def _shortest(self, model: str) -> float:
        lengths = [line["length"] for line in self.store.lines.values() if line["model"] == model]
        return min([*self.protocol.lengths, *lengths])

    def _scores(self, group: Group, model: NiahModel, match: ClassMatch) -> GroupScores:
        folder = self.store.scores_folder(group, model.identity)
        return GroupScores(folder, self._clips(group), len(self.protocol.positions), len(match.student))

    def _clips(self, group: Group) -> int:
        return self.protocol.clips(group.length, len(self.needles))

    def _has_scores(self, group: Group, model: NiahModel) -> bool:
        return (self.store.scores_folder(group, model.identity) / "state.npy").is_file()

    def _died_loading(self, cell: tuple) -> bool:
        line = self.store.lines.get(cell)
        return line is not None and (line["model_id"], line["status"]) == (NOT_LOADED, CRASHED)

    def _match(self, model: NiahModel) -> ClassMatch:
        own = self.needles.classes
        return match_classes(own, model.classes or own, self.table)

    def _gave_up_at(self, group: Group, identity: str) -> dict | None:
        """The line of a cell, not longer than this one, in which the model ran out of memory, died or took too long."""
        for line in self.store.lines.values():
            if (line["model"], line["model_id"]) == (group.model, identity) and not line.get("inferred"):
                if line["status"] in (OUT_OF_MEMORY, CRASHED, TOO_SLOW) and line["length"] <= group.length:
                    return line
        return None

    def _too_long(self, group: Group, model: NiahModel) -> float | None:
        """The seconds that a pass is expected to take, where that is more than is allowed."""
        frames = self._frames(group, model.front_end)
        if self.longest_pass is None or not self.forecast.knows(model.name, below=frames):
            return None
        seconds = self.forecast.seconds(model.name, frames)
        return seconds if seconds is not None and seconds > self.longest_pass else None

    def _run_group(self, group: Group, model: NiahModel, match: ClassMatch, left: list[tuple[str, Group]]) -> None:
        scores = self._scores(group, model, match)
        self.reporter.begin(group, self._clips(group))
        self._take_over(group, model, match, scores)
        pending = [clip for clip in scores.pending if clip < self._clips(group)]
        for done, clip in enumerate(pending):
            if len(scores.done) and (seconds := scores.cost[scores.done, :, 0].min()) > (self.longest_pass or math.inf):
                why = f"a pass took {describe_seconds(seconds)}"
                return self._fail([group], model.identity, TOO_SLOW, why, model)
            start = time.perf_counter()
            try:
                with limited_memory(self.memory if model.device.type == "cpu" else None), torch.inference_mode():
                    scores.put(clip, *self._run_clip(group, model, match, clip))
            except AudioError:
                scores.mark_broken(clip)
            except Exception as error:
                status, why = _described(error)
                self._fail([group], model.identity, status, why, model)
                if status == OUT_OF_MEMORY:
                    del error  # its traceback holds what the model had made so far
                    release_memory()
                return
            frames = self._frames(group, model.front_end)
            self.forecast.add(model.name, frames, (time.perf_counter() - start) / len(self.protocol.positions))
            self.reporter.step(self._seconds_left(group, model, len(pending) - done - 1, left))
        self.reporter.end(group, self._finish(group, model, match, scores))

    def _take_over(self, group: Group, model: NiahModel, match: ClassMatch, scores: GroupScores) -> None:
        """Where the needle leaves nothing of the haystack, what was found in another haystack is the same."""
        needle = needle_front_end(model.front_end).frames
        if self.protocol.placing != "replace" or self._frames(group, model.front_end) > needle:
            return
        for other in self.groups(model.name):
            if other.length == group.length and other != group and self._has_scores(other, model):
                found = self._scores(other, model, match)
                for clip in set(found.done.tolist()) & set(scores.pending):
                    scores.put(clip, found.logits[clip], found.cost[clip])

    def _run_clip(self, group: Group, model: NiahModel, match: ClassMatch, clip: int) -> tuple[np.ndarray, np.ndarray]:
        """Logits (positions, matched classes) and cost (positions, 2) of a clip."""
        scene = self._scene(group, model.front_end, clip)
        logits, cost, starts = [], [], []
        for position in self.protocol.positions:
            starts.append(scene.start(position))
            if starts[-1] in starts[:-1]:  # the same input, as always where the needle is all there is
                twin = starts.index(starts[-1])
                logits.append(logits[twin])
                cost.append(cost[twin])
                continue
            fbank = scene.move(position)[None].to(model.device)
            with torch.autocast(model.device.type, self.autocast) if self.autocast else nullcontext():
                measured = measure(lambda fbank=fbank: model.run(fbank), model.device)
            result = measured.result
            expected = len(model.classes or self.needles.classes)
            if tuple(result.shape) != (1, expected):
                raise ValueError(f"gave {tuple(result.shape)}, expected logits (1, {expected})")
            if not torch.isfinite(result).all():
                raise ValueError("gave logits that are not finite")
            logits.append(match.select(result.float())[0].cpu().numpy())
            cost.append((measured.seconds, measured.memory))
        return np.stack(logits), np.array(cost)

    def _scene(self, group: Group, front_end: LogMelConfig, clip: int) -> Scene:
        needle_end = needle_front_end(front_end)
        haystack = Haystack(
            group.haystack,
            seed=self.protocol.seed,
            clip=clip,
            sample_rate=front_end.sample_rate,
            folder=self.protocol.folders.get(group.haystack),
            talkers=self.protocol.talkers,
            clips=self.needles.source,
            labels=np.flatnonzero(self.needles.target[clip]).tolist(),
        )
        return Scene(
            self.needles.waveform(clip, front_end.sample_rate, needle_end.samples),
            haystack,
            self._frames(group, front_end),
            LogMel(needle_end),
            snr=group.snr,
            placing=self.protocol.placing,
            positions=self.protocol.positions,
        )

    def _frames(self, group: Group, front_end: LogMelConfig) -> int:
        needle = needle_front_end(front_end)
        return needle.frames if group.length == NEEDLE_ALONE else frames_for(group.length, needle, needle.frames)

    def _finish(self, group: Group, model: NiahModel, match: ClassMatch, scores: GroupScores) -> list[dict]:
        """Writes the lines of a group whose clips are all done."""
        rows, lines = scores.done, []
        target = self.needles.target[rows][:, list(match.student)]
        reference_length = self._shortest(model.name)
        reference = self._reference(replace(group, length=reference_length), model, match, rows)
        for number, position in enumerate(self.protocol.positions):
            figures = cell_figures(
                scores.logits[rows, number],
                target,
                None if reference is None else reference[:, number],
                draws=self.protocol.bootstrap,
                seed=self.protocol.seed,
            )
            seconds, memory = scores.cost[rows, number].T
            line = self._line(group, position, model.identity, OK, model)
            for name in FIGURES:
                estimate = getattr(figures, name)
                line |= {name: estimate.value, f"{name}_low": estimate.low, f"{name}_high": estimate.high}
            line |= {
                "chance": figures.chance,
                "retention_chance": figures.retention_chance,
                "top1_chance": figures.top1_chance,
                "retention_of": reference_length,
                "clips": len(rows),
                "broken": int((scores.state == BROKEN).sum()),
                "classes": int(target.any(axis=0).sum()),
                "seconds": float(np.median(seconds)) if len(rows) else math.nan,
                "seconds_worst": float(seconds.max()) if len(rows) else math.nan,
                "peak_memory": float(memory.max()) if len(rows) else math.nan,
            }
            lines.append(line)
        scores.flush()
        return self.store.add(lines)

    def _reference(self, group: Group, model: NiahModel, match: ClassMatch, rows: np.ndarray) -> np.ndarray | None:
        """Logits (rows, positions, classes) of the same clips at the shortest length, if they are all there."""
        if not self._has_scores(group, model):
            return None
        scores = self._scores(group, model, match)
        if not len(rows) or rows.max() >= len(scores.state) or (scores.state[rows] != DONE).any():
            return None
        return scores.logits[rows]

    def _fail(
        self,
        groups: Sequence[Group],
        identity: str,
        status: str,
        why: str,
        model: NiahModel | None = None,
    ) -> None:
        for group in groups:
            extra = {"error": why, **({"inferred": True} if why.startswith("not tried") else {})}
            cells = [self._line(group, p, identity, status, model) | extra for p in self.protocol.positions]
            self.reporter.end(group, self.store.add(cells))

    def _line(self, group: Group, position: float, identity: str, status: str, model: NiahModel | None) -> dict:
        line = {
            "model": group.model,
            "haystack": group.haystack,
            "snr": group.snr,
            "length": group.length,
            "position": position,
            "status": status,
            "model_id": identity,
        }
        if model is not None:
            frames = self._frames(group, model.front_end)
            line |= {
                "frames": frames,
                "input_seconds": frames * model.front_end.frame_shift / 1000,
                "parameters": model.parameters,
            }
        return line | {"finished": datetime.now(timezone.utc).isoformat(timespec="seconds")}

    def _seconds_left(
        self, group: Group, model: NiahModel, clips_left: int, left: list[tuple[str, Group]]
    ) -> float | None:
        """What is left of the grid: this group's clips and every other group, at the times seen so far; None: unknown."""
        passes = len(self.protocol.positions)
        total = clips_left * passes * self.forecast.seconds(model.name, self._frames(group, model.front_end))
        for name, other in left:
            # Of a model that comes later the weights are not known yet: lines of its name count.
            identity = model.identity if name == model.name else None
            if self.store.finished(other, self.protocol.positions, identity, self._clips(other)):
                continue
            expected = self.forecast.seconds(name, self._frames(other, model.front_end))
            if expected is None:
                return None
            if self.longest_pass is None or expected <= self.longest_pass:
                total += expected * passes * self._clips(other)
        return total


def needle_front_end(front_end: LogMelConfig) -> LogMelConfig:
    """The front end with a length for the needle: the trained one, the published one where it names none."""
    return front_end if front_end.frames is not None else replace(front_end, frames=PUBLISHED_FRAMES)


def _described(error: BaseException) -> tuple[str, str]:
    text = " ".join(str(error).split())[:400]
    return (OUT_OF_MEMORY if is_out_of_memory(error) else ERROR), f"{type(error).__name__}: {text}"
