"""Runs cases: checks each against the oracle, takes its memory, then times all of a group round robin.

A case may want another environment (another instruction set, another memory allocator): those run in processes of their own,
which are asked for one call at a time, so that they too take part in the rounds.
"""

import multiprocessing
import os
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import implementations
import torch
from implementations import OWN, PEER, REPLACED, YARDSTICK
from oracle import Expected, Mismatch, expect
from problems import TINY, Problem
from timing import Candidate, Clock, Sample, Statistics, peak_memory, quiet, round_robin, saved_for_backward

import dass_ops

QUICK = 0.25  # seconds; calls that take less are repeated: for their memory, after what only a first call allocates; or warm
STATE_COPIES = 16  # of all states, that a peer may hold at once
SHORT = 0.02  # seconds; cold calls that take less are preceded by one on other data, or cold code would count

# Environments by name. glibc's malloc: memory kept between calls, so that its pages are mapped once, or huge pages.
ENVIRONMENTS = {
    "": {},
    "avx512": {"DASS_OPS_CPU": "avx512"},
    "avx2": {"DASS_OPS_CPU": "avx2"},
    "scalar": {"DASS_OPS_CPU": "scalar"},
    "kept memory": {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(1 << 40), "MALLOC_TOP_PAD_": str(1 << 28)},
    "huge pages": {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"},
}


@dataclass(frozen=True)
class Case:
    """One row to be: a problem, who computes it, forward or forward+backward, in which environment, with how many threads."""

    problem: Problem
    implementation: str
    training: bool = False
    environment: str = ""
    threads: int = 0  # CPU; 0: the session's


@dataclass
class Row:
    """What is known of a case. `status`: measured, skipped (not tried), rejected (computed something else), failed (raised);
    the last three with a `reason`. Memory in bytes, None where unknown."""

    case: Case
    kind: str
    status: str = "measured"
    reason: str = ""
    error: float | None = None
    peak_bytes: int | None = None
    saved_bytes: int | None = None
    instruction_set: str = ""  # that our CPU kernels used
    first_seconds: float = 0.0
    statistics: Statistics | None = None


def memory() -> int:
    """Bytes of this machine's memory."""
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


class Bench:
    """Prepares and calls cases in this process."""

    def __init__(self, device: str, *, cold: bool, threads: int):
        self.device, self.threads = torch.device(device), threads
        self.clock = Clock(device, cold=cold)
        self.known, self.missing = implementations.registry(device)
        self._calls: dict[Case, tuple[Callable, Callable | None]] = {}
        self._inputs: dict[Problem, tuple[dict, torch.Tensor]] = {}
        self._copies: dict[Problem, dict[str, torch.Tensor]] = {}
        self._touched: set[tuple] = set()
        # glibc keeps freed blocks up to the largest it has seen freed (32 MB at most): the same in every process from here.
        torch.empty(31 << 20, dtype=torch.uint8)

    def inputs(self, problem: Problem) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        if problem not in self._inputs:
            self._inputs[problem] = problem.inputs(self.device), problem.d_out(self.device)
        return self._inputs[problem]

    def copies(self, problem: Problem) -> dict[str, torch.Tensor]:
        """The same inputs elsewhere in memory."""
        if problem not in self._copies:
            self._copies[problem] = {name: t.clone() for name, t in self.inputs(problem)[0].items()}
        return self._copies[problem]

    def prepare(self, case: Case, expected: Expected | None) -> Row:
        """The case's row, without its times; a call is kept where there is something to time."""
        implementation = self.known[case.implementation]
        row = Row(case, implementation.kind)
        if implementation.kind in (OWN, REPLACED) and self.device.type == "cpu":
            row.instruction_set = dass_ops.build_info()["cpu_instruction_set"]
        try:
            with self._threads(case):
                call = self._tried(case, implementation, expected, row)
                self._calls[case] = call, self._before(case, implementation, call, row.first_seconds)
        except Mismatch as problem:
            row.status, row.reason = "rejected", str(problem)
        except Exception as error:  # a peer may fail in any way; the others are still of interest
            row.status, row.reason = "failed", f"{type(error).__name__}: {str(error).strip().splitlines()[0][:200]}"
            if implementation.kind in (OWN, REPLACED):
                traceback.print_exc()
        return row

    def _before(self, case: Case, implementation, call: Callable, seconds: float) -> Callable | None:
        """What is called, untimed, before each call (see Clock)."""
        if self.device.type != "cpu":
            return None
        if not self.clock.cold:
            return call if seconds < QUICK else None
        if seconds >= SHORT:
            return None
        d_out = self.inputs(case.problem)[1]
        return implementation.bind(case.problem, self.copies(case.problem), d_out, case.training)

    def _tried(self, case: Case, implementation, expected: Expected | None, row: Row) -> Callable:
        problem, training = case.problem, case.training
        inputs, d_out = self.inputs(problem)
        if implementation.kind == YARDSTICK:
            call = implementation.bind(problem, inputs, d_out, training)
            start = time.perf_counter()
            call()
            row.first_seconds = time.perf_counter() - start
            return call
        self._touch(case, implementation)
        call = implementation.bind(problem, inputs, expected.masked(d_out), training)
        if implementation.compiles:
            call()

        def timed():  # the call alone: what surrounds it takes longer than a short one
            start = time.perf_counter()
            result = call()
            row.first_seconds = time.perf_counter() - start
            return result

        kept = partial(saved_for_backward, timed, inputs.values())
        (result, saved), row.peak_bytes = peak_memory(kept, self.device)
        if training and isinstance(result[0], torch.Tensor):  # other libraries' autograd is out of sight
            row.saved_bytes = saved
        row.error = expected.check(*result)
        del result
        call = implementation.bind(problem, inputs, d_out, training)
        if row.first_seconds < QUICK:
            row.peak_bytes = peak_memory(timed, self.device)[1]
        return call

    def _touch(self, case: Case, implementation) -> None:
        """Calls it once on a small problem: the pages of its code, and what libraries allocate once, are then in memory."""
        what = (implementation.name, case.problem.op, case.training, case.problem.dtype)
        if what in self._touched or implementation.compiles:
            return
        self._touched.add(what)
        small = Problem(case.problem.op, TINY, dtype=case.problem.dtype)
        implementation.bind(small, small.inputs(self.device), small.d_out(self.device), case.training)()

    def once(self, case: Case) -> Sample:
        with self._threads(case):
            sample = self.clock.once(*self._calls[case])
        if self.known[case.implementation].kind == PEER:
            quiet()  # it may have threads of its own
        return sample

    def once_and_quiet(self, case: Case) -> Sample:
        """`once`, leaving nothing behind that runs: for a process beside others."""
        sample = self.once(case)
        quiet()
        return sample

    @contextmanager
    def _threads(self, case: Case):
        wanted, usual = case.threads or self.threads, torch.get_num_threads()
        if wanted != usual:
            torch.set_num_threads(wanted)
        yield
        if wanted != usual:
            torch.set_num_threads(usual)

    def forget(self) -> None:
        """Frees the inputs and calls of a finished group."""
        self._calls.clear()
        self._inputs.clear()
        self._copies.clear()


class Worker:
    """A Bench in a process with another environment."""

    def __init__(self, environment: str, device: str, *, cold: bool, threads: int):
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        changed = ENVIRONMENTS[environment]
        before = {name: os.environ.get(name) for name in changed}
        os.environ.update(changed)  # inherited by the process that is about to start
        try:
            arguments = (theirs, device, cold, threads)
            self._process = context.Process(target=_serve, args=arguments, daemon=True)
            self._process.start()
        finally:
            for name, value in before.items():
                os.environ.pop(name) if value is None else os.environ.update({name: value})
        theirs.close()

    def _ask(self, method: str, *arguments: object):
        self._pipe.send((method, arguments))
        try:
            good, answer = self._pipe.recv()
        except EOFError:
            raise RuntimeError(f"the worker process ended (exit code {self._process.exitcode})") from None
        if not good:
            raise RuntimeError(answer)
        return answer

    def prepare(self, case: Case, expected: Expected | None) -> Row:
        return self._ask("prepare", case, expected)

    def once(self, case: Case) -> Sample:
        quiet()
        return self._ask("once_and_quiet", case)

    def forget(self) -> None:
        self._ask("forget")

    def close(self) -> None:
        self._pipe.close()
        self._process.join(10)


def _serve(pipe, device: str, cold: bool, threads: int) -> None:
    torch.set_num_threads(threads)
    bench = Bench(device, cold=cold, threads=threads)
    while True:
        try:
            method, arguments = pipe.recv()
        except EOFError:
            return
        try:
            pipe.send((True, getattr(bench, method)(*arguments)))
        except Exception as error:
            pipe.send((False, f"{type(error).__name__}: {error}"))


class Session:
    """Groups of cases on one device. `limit`: a case whose call is known to take longer (seconds) is skipped, and one whose
    first call turns out to is not called again: that call, from a cold start, is its only sample."""

    def __init__(self, device: str, *, cold: bool, threads: int, limit: float):
        self.device, self.cold, self.threads, self.limit = device, cold, threads, limit
        self.bench = Bench(device, cold=cold, threads=threads)
        self._workers: dict[str, Worker] = {}
        self._truths: dict[Problem, Expected] = {}

    def _runner(self, case: Case) -> Bench | Worker:
        if not case.environment:
            return self.bench
        if case.environment not in self._workers:
            options = {"cold": self.cold, "threads": self.threads}
            self._workers[case.environment] = Worker(case.environment, self.device, **options)
        return self._workers[case.environment]

    def run(self, cases: Sequence[Case], seconds: float, extra: Sequence[Candidate] = ()) -> list[Row]:
        """Prepares all cases, then times them (and the `extra` candidates) round robin for about `seconds`."""
        rows, timed = [], []
        for case in cases:
            runner = self._runner(case)
            try:
                row = self._skipped(case) or runner.prepare(case, self._truth(case, cases))
            except RuntimeError as error:  # of a worker process
                row = Row(case, self.bench.known[case.implementation].kind, "failed", str(error))
            rows.append(row)
            if row.status == "measured" and row.first_seconds > self.limit:
                row.statistics = Statistics.of([Sample(row.first_seconds)])
            elif row.status == "measured":
                timed.append((row, Candidate(case.implementation, lambda r=runner, c=case: r.once(c))))
        round_robin([candidate for _, candidate in timed] + list(extra), seconds)
        for row, candidate in timed:
            row.statistics = candidate.statistics()
        for runner in (self.bench, *self._workers.values()):
            runner.forget()
        self._truths.clear()
        return rows

    def _skipped(self, case: Case) -> Row | None:
        implementation = self.bench.known[case.implementation]
        seconds = implementation.estimate(case.problem, case.training)
        reason = case.problem.unsupported or implementation.refuses(case.problem, case.training)
        if not reason and seconds > self.limit:
            reason = f"about {seconds:.0f} s a call, over the limit of {self.limit:.0f} s"
        needed, there = STATE_COPIES * case.problem.state_bytes(), memory()
        if not reason and implementation.kind == PEER and str(self.device) == "cpu" and needed > there:
            reason = f"it may take {needed / 1e9:.0f} GB, and {there / 1e9:.0f} GB are there"
        return Row(case, implementation.kind, "skipped", reason) if reason else None

    def _truth(self, case: Case, cases: Sequence[Case]) -> Expected | None:
        """What the case must compute; with gradients where any case of its problem needs them."""
        if self.bench.known[case.implementation].kind == YARDSTICK:
            return None
        if case.problem not in self._truths:
            training = any(c.training for c in cases if c.problem == case.problem)
            inputs, d_out = self.bench.inputs(case.problem)
            self._truths[case.problem] = expect(case.problem, inputs, d_out if training else None)
        return self._truths[case.problem]

    def close(self) -> None:
        for worker in self._workers.values():
            worker.close()
