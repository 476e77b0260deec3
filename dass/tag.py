"""`python -m dass.tag FILE... --model RUN`: what is to be heard in sound files, one line a file.

A file of more than two of the model's windows also gets a timeline picture, its events (CSV, Audacity labels) and a JSON
record, under `--out`. A folder is gone through file by file, in parallel and, after an interruption, from where it stopped;
under `torchrun` the ranks share it.
"""

from __future__ import annotations

import csv
import json
import os
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from dass.audio import AUDIO_SUFFIXES, AudioError, audio_info

DEFAULT_OUT = Path("tags")


class UsageError(ValueError):
    """Something on the command line that cannot be done; the message says what can."""


@dataclass(frozen=True)
class TagConfig:
    """Names what is to be heard in sound files: the top classes with their scores, one line a file."""

    files: tyro.conf.Positional[tuple[Path, ...]]
    """Sound files (wav, flac, ogg, mp3, ...; any rate), or folders of them."""
    model: Annotated[str, tyro.conf.arg(aliases=["-m"])]
    """A run folder, a checkpoint folder or file, or a repository of the model hub."""
    topk: int = 5
    """Classes given per file [classes]."""
    threshold: float = 0.5
    """Score from which a stretch of time is an event of a class [0 to 1]."""
    classes: tuple[str, ...] = ()
    """Only these classes: names, indices or patterns such as "*music*"; none given: all."""
    window: float | None = None
    """Audio the model hears at once [s]; default: what it was trained on; 0: every file whole, in one pass."""
    hop: float | None = None
    """From one window to the next [s]; default: half a window."""
    merge_gap: float = 0.0
    """Events of one class with at most this much time between them are one [s]."""
    pool: Literal["mean", "peak"] = "mean"
    """Score of a class in a long file: its mean over time, or its peak."""
    scores: Literal["model", "sigmoid", "softmax"] = "model"
    """From the model's output to scores: as the run was trained, each class for itself, or exactly one class is right."""
    json: bool = False
    """Print one JSON object a line instead."""
    csv: bool = False
    """Print CSV instead: file,rank,label,score,peak."""
    out: Path | None = None
    """Folder for pictures, events and records; default: "tags", written for long files and for folders only."""
    save_scores: bool = False
    """Also save the scores of every segment of time as CSV."""
    again: bool = False
    """Tag files anew even where their record is there already."""
    workers: int = 0
    """Processes that share the files; 0: one per core for 16 files of a folder or more on a CPU, otherwise one."""
    batch: int = 8
    """Windows that go through the model at once."""
    device: str | None = None
    """cpu, cuda or cuda:N; default: the GPU where there is one."""
    backend: str | None = None
    """Backend of the scan operator (see `python -m dass_ops`); default: the device's best."""

    def check(self) -> None:
        """Raises UsageError, which says what can be done instead, for values that cannot be used."""
        if not self.files:
            raise UsageError("no files given; name sound files or folders of them")
        if self.json and self.csv:
            raise UsageError("--json and --csv exclude one another")
        if self.topk < 1:
            raise UsageError(f"--topk must be at least 1, got {self.topk}")
        if not 0 <= self.threshold <= 1:
            raise UsageError(f"--threshold must be from 0 to 1, got {self.threshold}")
        if self.window is not None and self.window < 0:
            raise UsageError(f"--window must be positive, or 0 for whole files, got {self.window}")
        if self.workers < 0:
            raise UsageError(f"--workers must be 0 or more, got {self.workers}")


@dataclass(frozen=True)
class Job:
    """A file to tag: its `path`, the `base` of its outputs and whether they are written even for a short file."""

    path: Path
    base: Path
    size: int
    keep: bool


def find_jobs(config: TagConfig) -> list[Job]:
    """The files that the command line means, folders searched in depth; UsageError where there are none."""
    out = config.out or DEFAULT_OUT
    folders = [path for path in config.files if path.is_dir()]
    names = Counter(path.name for path in config.files if not path.is_dir())
    jobs = []
    for path in config.files:
        if path.is_dir():
            found = sorted(p for p in path.rglob("*") if p.suffix.lower() in AUDIO_SUFFIXES and p.is_file())
            if not found:
                raise UsageError(f"{path} holds no sound file ({', '.join(sorted(AUDIO_SUFFIXES))})")
            root = out / path.resolve().name if len(folders) > 1 else out
            jobs += [Job(p, root / p.relative_to(path), p.stat().st_size, True) for p in found]
        else:
            # Two files of one name keep apart by the folders they come from.
            name = path.name if names[path.name] == 1 else str(path.resolve()).lstrip("/")
            size = path.stat().st_size if path.is_file() else 0
            jobs.append(Job(path, out / name, size, config.out is not None))
    return jobs


def share(jobs: Sequence[Job], rank: int, world: int) -> list[Job]:
    """This rank's part, in order: the longest files first, each to whoever has least. The same on every rank."""
    load, mine = [0] * world, []
    for number in sorted(range(len(jobs)), key=lambda number: (-jobs[number].size, number)):
        lightest = load.index(min(load))
        load[lightest] += jobs[number].size + 1
        if lightest == rank:
            mine.append(number)
    return [jobs[number] for number in sorted(mine)]


class FileTagger:
    """Tags one file after another as a configuration says and writes what belongs to each."""

    def __init__(self, config: TagConfig, device: str | None = None):
        from dass.tagger import Tagger

        self.config = config
        self.tagger = Tagger(
            config.model,
            device=device or config.device,
            backend=config.backend,
            batch=config.batch,
            scores=config.scores,
        )
        tagger = self.tagger
        try:
            self.columns = tagger.find_classes(config.classes) if config.classes else list(range(len(tagger.labels)))
        except ValueError as error:
            raise UsageError(f"--classes: {error}") from None
        self.window = (tagger.window if config.window is None else config.window) or None
        self.hop = config.hop if config.hop is not None or self.window is None else self.window / 2
        if self.window is not None and not 0 < self.hop <= self.window:
            raise UsageError(f"--hop must be positive and at most the window of {self.window} s, got {self.hop}")
        # A little more than the window is no long file, unless windows were asked for.
        self.long = (self.window or 0.0) * (2 if config.window is None and config.hop is None else 1)
        self.settings = {
            "model": config.model,
            "fingerprint": tagger.fingerprint(),
            "window": self.window,
            "hop": self.hop,
            "topk": config.topk,
            "threshold": config.threshold,
            "merge_gap": config.merge_gap,
            "pool": config.pool,
            "classes": [tagger.labels[index] for index in self.columns] if config.classes else "all",
            "save_scores": config.save_scores,
        }

    def __call__(self, job: Job, progress: Callable[[float], None] = lambda fraction: None) -> dict:
        """The record of a file: {"file", "seconds", "tags"}, or {"file", "error"} for one that cannot be read."""
        from dass.checkpoint import write_json
        from dass.tag_output import RECORD, read_record

        try:
            seconds = audio_info(job.path).seconds
            write = job.keep or (self.window is not None and seconds > self.long)
            stat = job.path.stat()
            settings = {**self.settings, "audio": [stat.st_size, stat.st_mtime_ns]}
            if write and not self.config.again:
                record = read_record(job.base, settings)
                if record is not None and "error" not in record:
                    return _brief({**record, "file": str(job.path)})
            return self._tag(job, settings, seconds, write, progress)
        except AudioError as error:
            record = {"file": str(job.path), "error": error.reason}
            if job.keep:
                write_json(job.base.with_name(job.base.name + RECORD), record)
            return record

    def _tag(self, job: Job, settings: dict, seconds: float, write: bool, progress: Callable[[float], None]) -> dict:
        from contextlib import nullcontext

        from dass.tag_output import TIMELINE, FileReport, draw_timeline
        from dass.timeline import EventFinder, Picture, Summary

        tagger, config = self.tagger, self.config
        summary, picture = Summary(len(tagger.labels)), Picture()
        finder = EventFinder(len(tagger.labels), config.threshold, config.merge_gap)
        wanted = set(self.columns)
        saved = self.columns if config.save_scores else None
        report = FileReport(job.base, tagger.labels, str(job.path), settings, saved) if write else None
        with report or nullcontext():
            for segment in tagger.segments(job.path, window=self.window, hop=self.hop):
                summary.add(segment)
                if report:
                    picture.add(segment)
                    report.segment(segment)
                    for event in finder.add(segment):
                        if event.index in wanted:
                            report.event(event)
                progress(min(segment.end / seconds, 1.0))
            tags = tagger.top(getattr(summary, config.pool), config.topk, among=self.columns)
            if report:
                for event in finder.finish():
                    if event.index in wanted:
                        report.event(event)
                shown = [tag.index for tag in tagger.top(summary.peak, max(config.topk, 8), among=self.columns)]
                draw_timeline(
                    report.path(TIMELINE), picture, tagger.labels, shown, config.threshold, title=job.path.name
                )
                report.close(tags, summary.seconds, summary.peak)
        return {
            "file": str(job.path),
            "seconds": round(summary.seconds, 3),
            "tags": [
                {"label": tag.label, "score": round(tag.score, 4), "peak": round(float(summary.peak[tag.index]), 4)}
                for tag in tags
            ],
            **({"timeline": str(report.path(TIMELINE))} if report else {}),
        }


def _brief(record: dict) -> dict:
    return {key: record[key] for key in ("file", "seconds", "tags")}


def format_line(record: dict, width: int = 0) -> str:
    """`file  Dog 0.93, Bark 0.88, ...`; the file padded to `width`."""
    if "error" in record:
        return f"{record['file']:<{width}}  cannot be read: {record['error']}"
    tags = ", ".join(f"{tag['label']} {tag['score']:.2f}" for tag in record["tags"])
    return f"{record['file']:<{width}}  {tags}"


def csv_rows(record: dict) -> Iterator[list]:
    """Rows file,rank,label,score,peak of one file."""
    for rank, tag in enumerate(record.get("tags", []), 1):
        yield [record["file"], rank, tag["label"], tag["score"], tag["peak"]]


def summarise(out: Path) -> None:
    """`tags.csv` and `errors.csv` of every record under `out`. Ranks that end together take turns: the last sees all."""
    import fcntl
    import io

    from dass.checkpoint import atomic_write
    from dass.tag_output import RECORD

    out.mkdir(parents=True, exist_ok=True)
    with (out / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        tags, errors = io.StringIO(), io.StringIO()
        tag_rows, error_rows = csv.writer(tags, lineterminator="\n"), csv.writer(errors, lineterminator="\n")
        tag_rows.writerow(["file", "rank", "label", "score", "peak"])
        error_rows.writerow(["file", "error"])
        for path in sorted(out.rglob(f"*{RECORD}")):
            if path.name.startswith("."):  # being written by another rank
                continue
            record = json.loads(path.read_text(encoding="utf-8"))
            if "error" in record:
                error_rows.writerow([record["file"], record["error"]])
            else:
                tag_rows.writerows(csv_rows(record))
        atomic_write(out / "tags.csv", tags.getvalue())
        atomic_write(out / "errors.csv", errors.getvalue())


_worker: FileTagger | None = None  # of this process, where it is one of several workers


def _start_worker(config: TagConfig, device: str | None, threads: int) -> None:
    global _worker
    import torch

    torch.set_num_threads(threads)
    _worker = FileTagger(config, device)


def _work(job: Job) -> dict:
    return _worker(job)


def tag_all(config: TagConfig, jobs: Sequence[Job], device: str | None, quiet: bool) -> Iterator[dict]:
    """The records of `jobs`, in order, with a progress bar on stderr unless `quiet`."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    cores = len(os.sched_getaffinity(0))
    workers = config.workers
    if workers == 0:
        import torch

        on_cpu = (device or config.device or ("cuda" if torch.cuda.is_available() else "cpu")).startswith("cpu")
        # The ranks of torchrun are processes that share the cores already.
        alone = int(os.environ.get("LOCAL_WORLD_SIZE", 1)) == 1
        workers = cores if on_cpu and alone and sum(job.keep for job in jobs) >= 16 else 1
    workers = min(workers, len(jobs))
    bar = Progress(
        TextColumn("{task.fields[file]}"),
        BarColumn(),
        TextColumn("{task.percentage:3.0f} %"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=Console(stderr=True),
        transient=True,
        disable=quiet or not sys.stderr.isatty(),
        redirect_stdout=sys.stdout.isatty(),
    )
    total = sum(job.size for job in jobs)
    with bar:
        task, done = bar.add_task("", total=total, file=""), 0
        if workers > 1:
            import multiprocessing
            from concurrent.futures import ProcessPoolExecutor

            threads = max(cores // workers, 1)
            context = multiprocessing.get_context("spawn")
            with ProcessPoolExecutor(workers, context, _start_worker, (config, device, threads)) as pool:
                for job, record in zip(jobs, pool.map(_work, jobs), strict=True):
                    done += job.size
                    bar.update(task, completed=done, file=job.path.name)
                    yield record
            return
        tagger = FileTagger(config, device)
        for job in jobs:
            bar.update(task, file=job.path.name)
            before = done
            yield tagger(job, lambda part, job=job, before=before: bar.update(task, completed=before + part * job.size))
            done += job.size
            bar.update(task, completed=done)


def run(config: TagConfig) -> int:
    """Tags everything the configuration names; 0, or 1 where a file could not be read."""
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    device = config.device
    if device is None and "LOCAL_RANK" in os.environ:
        import torch

        device = f"cuda:{os.environ['LOCAL_RANK']}" if torch.cuda.is_available() else None
    jobs = share(find_jobs(config), rank, world)
    width = min(max((len(str(job.path)) for job in jobs), default=0), 60)
    failed, timelines = 0, []
    writer = csv.writer(sys.stdout, lineterminator="\n")
    if config.csv and rank == 0:
        writer.writerow(["file", "rank", "label", "score", "peak"])
    for record in tag_all(config, jobs, device, quiet=rank > 0) if jobs else ():
        failed += "error" in record
        timelines += [record["timeline"]] if "timeline" in record else []
        if config.json:
            print(json.dumps(record, ensure_ascii=False), flush=True)
        elif config.csv and "error" not in record:
            writer.writerows(csv_rows(record))
            sys.stdout.flush()
        else:
            print(format_line(record, width), file=sys.stderr if "error" in record else sys.stdout, flush=True)
    out = config.out or DEFAULT_OUT
    if any(job.keep for job in jobs):
        summarise(out)
        print(f"{len(jobs)} files, {failed} unreadable; records and {out / 'tags.csv'} are in {out}", file=sys.stderr)
    elif timelines:
        print("\n".join(f"timeline: {path}" for path in timelines), file=sys.stderr)
    return 1 if failed else 0


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    from dass.audio import AudioError
    from dass.checkpoint import CheckpointError

    try:
        config = tyro.cli(TagConfig, prog="python -m dass.tag", args=arguments)
        config.check()
        return run(config)
    except (UsageError, CheckpointError, AudioError, FileNotFoundError) as error:
        print(f"dass.tag: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
