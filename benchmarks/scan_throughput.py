"""Speed and memory of the scans, beside everything else that computes them. `--help` lists the options; README.md says how to
read the table."""

import dataclasses
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import tyro
from implementations import COPY, OWN, PEER, REPLACED, for_tests_only
from machine import GpuRates, MultiplyAdds, describe
from problems import MAMBA, OPS, SHAPES, STAGES, Problem
from report import WIDE, print_group, print_targets, row_as_dict, save_plot
from rich.console import Console
from session import Case, Session
from targets import targets
from timing import Candidate, available_cores, quiet

from dass.checkpoint import write_json

COMPILED = "compiled"
ROOM = 36.0  # seconds; a default run that took longer would not end within a minute if it compiled something too
KERNEL_PEERS = ("mamba_ssm", "vmamba")  # fast enough to stand inside an unfused pipeline


@dataclass(frozen=True)
class Options:
    """Speed and memory of the scans. Without options: every DASS stage and a Mamba layer at batch 1, in under a minute."""

    op: tuple[Literal["selective_scan", "bidirectional_scan", "ss2d", "ss2d_projected"], ...] = ()
    """Operators; default: selective_scan."""
    shape: tuple[Literal["stage1", "stage2", "stage3", "stage4", "mamba", "tiny"], ...] = ()
    """Layers; default: all but tiny."""
    batch: tuple[int, ...] = ()
    """Examples a call; default: 1."""
    dtype: tuple[Literal["float32", "bfloat16", "float16", "float64"], ...] = ()
    """Of the large tensors; default: float32. On a CPU peers run in the first one only."""
    device: str = ""
    """Default: cuda where there is one, else cpu."""
    backend: tuple[str, ...] = ()
    """Our backends; default: all that can run here, but those made for tests (emulated, reference)."""
    peers: tuple[str, ...] | None = None
    """By name; default: all that are importable. Nothing after --peers: none."""
    passes: tuple[Literal["forward", "training"], ...] = ("forward", "training")
    """Training: forward and backward, through autograd."""
    threads: tuple[int, ...] = ()
    """CPU threads; several: each is timed. Default: all cores."""
    ragged: bool = False
    """Also lengths and maps that are multiples of nothing."""
    reverse: bool = False
    """Also all channels forwards, and all backwards (as shaped: half of each)."""
    channels_last: bool = False
    """Also maps whose channels are last in memory, as the model's convolutions leave them."""
    instruction_sets: bool = False
    """Also with AVX2 and with scalar code forced."""
    pages: bool = False
    """Also with memory kept between calls and with huge pages: what fresh outputs cost."""
    full: bool = False
    """Everything above, batch 1 and 8, float32 and bfloat16, and the compiled peer on every shape. Some 20 minutes."""
    compile: Literal["none", "one", "all"] = "one"
    """Shapes on which the compiled peer runs; compiling takes up to a minute each. One: the shortest, its forward only, at
    the end of a run that has taken less than 36 s."""
    warm: bool = False
    """Time every call as one of a loop over the same data, not from cold caches."""
    seconds: float = 2.0
    """Of timing, per group of rows (a shape and batch)."""
    limit: float = 3.0
    """Seconds; peers known to take longer for a call are skipped, others called only once."""
    quick: bool = False
    """One tiny shape, a fraction of a second: for tests."""
    json: Path | None = None
    """Write every figure here; after each group, so that an interrupted run leaves what it had."""
    plot: Path | None = None
    """Draw elements per second here (PNG, SVG or PDF by its name)."""

    def resolved(self) -> "Options":
        """With the defaults that depend on others filled in."""
        full, quick = self.full, self.quick
        return dataclasses.replace(
            self,
            op=self.op or (OPS if full else OPS[:1]),
            shape=("tiny",) if quick else self.shape or tuple(s.name for s in (*STAGES, MAMBA)),
            batch=self.batch or ((1, 8) if full else (1,)),
            dtype=self.dtype or (("float32", "bfloat16") if full else ("float32",)),
            device=self.device or ("cuda" if torch.cuda.is_available() else "cpu"),
            threads=self.threads or (available_cores(),),
            ragged=self.ragged or full,
            reverse=self.reverse or full,
            channels_last=self.channels_last or full,
            instruction_sets=self.instruction_sets or full,
            pages=self.pages or full,
            compile="none" if quick else "all" if full and self.compile == "one" else self.compile,
            seconds=0.3 if quick else max(self.seconds, 15.0) if full else self.seconds,
            limit=max(self.limit, 20.0) if full else self.limit,
        )


def groups(options: Options, session: Session) -> list[tuple[str, list[Case]]]:
    """What is timed together: everything about one shape at one batch size."""
    return [
        (f"{SHAPES[name].where}, batch {batch}", cases)
        for batch in options.batch
        for name in options.shape
        if (cases := _cases(options, session, name, batch))
    ]


def _cases(options: Options, session: Session, shape: str, batch: int) -> list[Case]:
    known = session.bench.known
    wanted = _wanted(options, session)
    pipelines = [n for n, i in known.items() if i.kind == REPLACED]
    problems = [Problem(op, SHAPES[shape], batch, dtype) for op in options.op for dtype in options.dtype]
    problems = [p for p in problems if not p.unsupported]
    on_gpu = session.bench.device.type == "cuda"
    trainings = [t == "training" for t in options.passes]
    cases = []

    def add(problem: Problem, names: Sequence[str], environment: str = "", threads: int = 0) -> None:
        for case in (Case(problem, n, t, environment, threads) for n in names for t in trainings):
            pointless = problem.unsupported or known[case.implementation].pointless(problem, case.training)
            if case not in cases and not pointless:
                cases.append(case)

    for problem in problems:
        plain = problem.dtype == options.dtype[0]
        add(problem, wanted + pipelines)
        if plain or on_gpu:
            add(problem, _peers(options, session, problem))
        if plain:
            add(problem, [COPY])
            if problem.op == "selective_scan":
                add(problem, [n for n in known if n.startswith("torch.")])
        for threads in options.threads[1:]:
            add(problem, wanted, threads=threads)
        if options.ragged:
            add(dataclasses.replace(problem, ragged=True), wanted)
        if options.channels_last:
            add(dataclasses.replace(problem, channels_last=True), wanted)
        if options.reverse:
            for reverse in ("none", "all"):
                add(dataclasses.replace(problem, reverse=reverse), wanted)
        if plain and not on_gpu and "dass_ops cpu" in wanted:
            if options.instruction_sets:
                for environment in ("avx2", "scalar"):
                    add(problem, ["dass_ops cpu"], environment)
            if options.pages and problem.op == "selective_scan":
                for environment in ("kept memory", "huge pages"):
                    add(problem, ["dass_ops cpu", "torch.exp"], environment)
    return cases


def _wanted(options: Options, session: Session) -> list[str]:
    """Our backends' rows."""
    ours = [n.removeprefix("dass_ops ") for n, i in session.bench.known.items() if i.kind == OWN]
    backends = options.backend or [b for b in ours if not for_tests_only(b, session.bench.device.type)]
    return [f"dass_ops {b}" for b in backends]


def _peers(options: Options, session: Session, problem: Problem) -> list[str]:
    known = [n for n, i in session.bench.known.items() if i.kind == PEER]
    if options.peers is not None:
        return [n for n in known if n in options.peers]
    if problem.op != "selective_scan":
        return [n for n in known if n in KERNEL_PEERS]
    return [n for n in known if options.compile == "all" or n != COMPILED]


def _compiled_group(options: Options, session: Session) -> tuple[str, list[Case]]:
    """The compiled peer beside ours, on the shortest shape."""
    shape = min((SHAPES[name] for name in options.shape), key=lambda s: (s.state, s.length))
    problem = Problem("selective_scan", shape, options.batch[0], options.dtype[0])
    names = [*_wanted(options, session), COMPILED, COPY]
    title = f"{shape.where}, batch {problem.batch}, beside the compiled peer"
    return title, [Case(problem, name) for name in names]


def run(options: Options, console: Console) -> dict:
    """Measures everything asked for; what is written to the JSON file."""
    begin = time.perf_counter()
    threads = options.threads[0]
    torch.set_num_threads(threads)
    session = Session(options.device, cold=not options.warm, threads=threads, limit=options.limit)
    on_gpu = session.bench.device.type == "cuda"
    rates, multiply_adds, notes = None, None, dict(session.bench.missing)
    if on_gpu:
        rates = GpuRates.of(options.device)
    else:
        try:
            multiply_adds = MultiplyAdds(threads)
        except RuntimeError as problem:
            notes["arithmetic floor"] = str(problem)
    for name in (*options.backend, *(options.peers or ())):
        if name not in {n.removeprefix("dass_ops ") for n in session.bench.known}:
            there = "; ".join(n.removeprefix("dass_ops ") for n in session.bench.known)
            why = session.bench.missing.get(name) or f"there is no such backend or peer. There are: {there}"
            raise SystemExit(f"{name} cannot be measured on {options.device}: {why}.")
    result = {
        "benchmark": "scan_throughput",
        "machine": describe(options.device),
        "options": {k: str(v) if isinstance(v, Path) else v for k, v in dataclasses.asdict(options).items()},
        "not_measured": notes,
        "groups": [],
        "targets": [],
        "finished": False,
    }
    waiting = groups(options, session)
    while waiting:
        name, cases = waiting.pop(0)
        start = time.perf_counter()
        with console.status(f"{name}: {len(cases)} rows"):
            peak = Candidate("multiply-adds", lambda: session.bench.clock.once(multiply_adds, quiet))
            rows = session.run(cases, options.seconds, [peak] if multiply_adds else [])
        rate = multiply_adds.count / peak.statistics().least if peak.samples else None
        found = [row_as_dict(row, rows, multiply_adds=rate, gpu=rates, on_gpu=on_gpu) for row in rows]
        group = {"name": name, "multiply_adds_per_second": rate, "rows": found, "seconds": time.perf_counter() - start}
        result["groups"].append(group)
        result["targets"] = targets([r for g in result["groups"] for r in g["rows"]])
        result["seconds"] = time.perf_counter() - begin  # imports not included
        print_group(console, group)
        if options.json:
            write_json(options.json, result)
        if not waiting and options.compile == "one" and options.peers is None and COMPILED not in name:
            if result["seconds"] < ROOM:
                waiting.append(_compiled_group(options, session))
            else:
                notes[COMPILED] = "not compiled, for want of time; --compile all"
    session.close()
    result["finished"] = True
    print_targets(console, result["targets"])
    for name, reason in notes.items():
        console.print(f"[dim]{name}: {reason}[/dim]")
    if options.json:
        write_json(options.json, result)
        console.print(f"Figures: {options.json}")
    if options.plot:
        save_plot(result, options.plot)
        console.print(f"Picture: {options.plot}")
    return result


def main() -> None:
    console = Console(highlight=False)
    if not console.is_terminal:
        console = Console(highlight=False, width=WIDE)  # a file has no width
    result = run(tyro.cli(Options).resolved(), console)
    rows = [r for g in result["groups"] for r in g["rows"]]
    bad = [r for r in rows if r["kind"] in (OWN, REPLACED) and r["status"] in ("rejected", "failed")]
    if bad:
        names = "; ".join(f"{r['implementation']} on {r['op']}, {r['shape']}: {r['reason']}" for r in bad[:5])
        raise SystemExit(f"{len(bad)} rows of this package are wrong. {names}")


if __name__ == "__main__":
    main()
