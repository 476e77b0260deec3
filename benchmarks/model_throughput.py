"""Speed of the whole model on 10-s clips: with each scan, with none, and where its time goes. `--help` lists the options;
README.md says how to read the tables."""

import dataclasses
import time
from collections import defaultdict
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import torch
import tyro
from implementations import project
from machine import describe
from model_scans import LOOP, NOTHING, PROJECTION, quadratic_seconds, scanning_with, scans
from report import WIDE
from rich.console import Console
from rich.table import Table
from timing import Candidate, Clock, Sample, Statistics, available_cores, peak_memory, round_robin
from torch import Tensor, nn

import dass_ops
from dass.checkpoint import write_json
from dass.model import DASS, DASSConfig

FRAMES = 1024  # of 10 ms: a 10-s clip
ALLOWED = 2e-3  # largest difference of logits between scans, of their largest value, float32


@dataclass(frozen=True)
class Options:
    """Speed of the whole model. Without options: DASS-small, one clip, float32, eval and training."""

    size: Literal["tiny", "small", "medium"] = "small"
    """Of the model."""
    batch: tuple[int, ...] = ()
    """Clips a call; default: 1."""
    dtype: tuple[Literal["float32", "bfloat16"], ...] = ()
    """bfloat16: under autocast. Default: float32."""
    passes: tuple[Literal["eval", "training"], ...] = ("eval", "training")
    """Training: forward, loss, backward and an Adam step."""
    scan: tuple[str, ...] = ()
    """Scans by name; default: all that exist here and take less than the limit."""
    frames: int = FRAMES
    """Of a clip, 10 ms each."""
    device: str = ""
    """Default: cuda where there is one, else cpu."""
    threads: int = 0
    """CPU threads; default: all cores."""
    seconds: float = 10.0
    """Of timing, per group of rows (a batch size, dtype and pass)."""
    limit: float = 20.0
    """Seconds; scans whose first call takes longer are called only once."""
    full: bool = False
    """Batch 1 and 8, float32 and bfloat16."""
    quick: bool = False
    """The tiny model, a short clip, a fraction of a second: for tests."""
    json: Path | None = None
    """Write every figure here."""

    def resolved(self) -> "Options":
        quick = self.quick
        return dataclasses.replace(
            self,
            size="tiny" if quick else self.size,
            frames=64 if quick else self.frames,
            seconds=0.3 if quick else self.seconds,
            batch=self.batch or ((1, 8) if self.full else (1,)),
            dtype=self.dtype or (("float32", "bfloat16") if self.full else ("float32",)),
            device=self.device or ("cuda" if torch.cuda.is_available() else "cpu"),
            threads=self.threads or available_cores(),
        )


# -- measuring ---------------------------------------------------------------------------------------------------------


class Bench:
    """One model, called with any scan, in eval or training."""

    def __init__(self, options: Options):
        self.options, self.device = options, torch.device(options.device)
        torch.set_num_threads(options.threads)
        torch.manual_seed(0)
        self.config = DASSConfig.of_size(options.size)
        self.model = DASS(self.config).to(self.device)
        self.scans = scans(self.device)
        # A step so small that the weights stay what they are, whatever the scan did to the gradients.
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=1e-12, betas=(0.95, 0.999), fused=True)
        self.clock = Clock(self.device, cold=False)

    def call(self, scan: str, batch: int, dtype: str, training: bool) -> Callable[[], Tensor]:
        """A call without arguments that returns the logits."""
        fbank = torch.randn(batch, self.options.frames, self.config.mel_bins, device=self.device)
        target = (torch.rand(batch, self.config.num_classes, device=self.device) < 0.01).float()
        half = torch.autocast(self.device.type, torch.bfloat16) if dtype == "bfloat16" else nullcontext()

        def evaluate() -> Tensor:
            self.model.eval()
            with scanning_with(self.scans[scan]), torch.inference_mode(), half:
                return self.model(fbank)

        def train() -> Tensor:
            self.model.train()
            with scanning_with(self.scans[scan]):
                with half:
                    logits = self.model(fbank)
                nn.functional.binary_cross_entropy_with_logits(logits.float(), target).backward()
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
            return logits.detach()

        return train if training else evaluate

    def agree(self, scan: str) -> str:
        """Why the model with this scan is another model; empty where it is the same. Against a loop in plain PyTorch."""
        torch.manual_seed(1)
        state = torch.get_rng_state()
        logits = []
        for name in (scan, LOOP):
            torch.set_rng_state(state)
            logits.append(self.call(name, 1, "float32", False)())
        error = ((logits[0] - logits[1]).abs().max() / logits[1].abs().max()).item()
        return "" if error <= ALLOWED else f"its logits are off by {error:.1e} of the largest; allowed is {ALLOWED:.0e}"

    def measure(self, batch: int, dtype: str, training: bool, wrong: dict[str, str]) -> list[dict]:
        """The rows of one batch size, dtype and pass, timed round robin."""
        rows, timed = [], []
        for scan in self.options.scan or self.scans:
            row = {"scan": scan, "batch": batch, "dtype": dtype, "pass": "training" if training else "eval"}
            rows.append(row)
            row |= {"status": "rejected" if scan in wrong else "measured", "reason": wrong.get(scan, "")}
            seconds = quadratic_seconds(self.config, batch, self.options.frames)
            if training and scan == "dass_ops reference" and seconds > self.options.limit:
                row |= {"status": "skipped", "reason": f"about {seconds:.0f} s a step, over the limit"}
            if row["status"] != "measured":
                continue
            call = self.call(scan, batch, dtype, training)
            start = time.perf_counter()
            call()
            first = time.perf_counter() - start
            if first > self.options.limit:
                row |= {"seconds": Statistics.of([Sample(first)]).as_dict(), "peak_bytes": None}
                continue
            row["peak_bytes"] = peak_memory(call, self.device)[1]
            timed.append((row, Candidate(scan, partial(self.clock.once, call))))
        round_robin([candidate for _, candidate in timed], self.options.seconds)
        for row, candidate in timed:
            row["seconds"] = candidate.statistics().as_dict()
        for row in rows:
            if "seconds" in row:
                row["clips_per_second"] = batch / row["seconds"]["median"]
        return rows

    # -- where the time goes -------------------------------------------------------------------------------------------

    def split(self, batch: int, dtype: str) -> dict[str, float]:
        """Seconds of one eval call by kind of module, medians over calls; `other` is what no module accounts for: additions,
        activations without a module, Python."""
        stamps: dict[str, float] = defaultdict(float)
        ours = partial(_split_scan, stamps, self._stamp)
        handles = []
        for name, module in self.model.named_modules():
            if kind := kind_of(name, module):
                handles += self._watch(module, kind, stamps)
        self.scans[SPLIT] = ours
        call = self.call(SPLIT, batch, dtype, False)
        measured, begin = [], time.perf_counter()
        try:
            while len(measured) < 3 or time.perf_counter() - begin < self.options.seconds / 2 and len(measured) < 50:
                stamps.clear()
                start = self._stamp()
                call()
                total = self._stamp() - start
                measured.append({**stamps, "other": total - sum(stamps.values())})
        finally:
            del self.scans[SPLIT]
            for handle in handles:
                handle.remove()
        middle = sorted(measured, key=lambda s: sum(s.values()))[len(measured) // 2]
        return dict(sorted(middle.items(), key=lambda pair: -pair[1]))

    def _stamp(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def _watch(self, module: nn.Module, kind: str, stamps: dict[str, float]) -> list:
        def before(*_):
            stamps[kind] -= self._stamp()

        def after(*_):
            stamps[kind] += self._stamp()

        return [module.register_forward_pre_hook(before), module.register_forward_hook(after)]

    def operators(self, batch: int, dtype: str, training: bool) -> dict[str, float]:
        """Seconds of one call by torch operator, without those it calls; the largest."""
        call = self.call(next(iter(self.scans)), batch, dtype, training)
        call()
        activities = [torch.profiler.ProfilerActivity.CPU]
        on_gpu = self.device.type == "cuda"
        if on_gpu:
            activities.append(torch.profiler.ProfilerActivity.CUDA)
        with torch.profiler.profile(activities=activities, acc_events=True) as profile:
            for _ in range(3):
                call()
        own = {
            e.key: (e.self_device_time_total if on_gpu else e.self_cpu_time_total) / 3e6 for e in profile.key_averages()
        }
        return dict(sorted(own.items(), key=lambda pair: -pair[1])[:12])


SPLIT = "split"
KINDS = {  # by the module's name inside its block, else by its class
    "in_proj": "in and out projections",
    "out_proj": "in and out projections",
    "conv2d": "depthwise convolutions",
    "fc1": "MLP",
    "fc2": "MLP",
    "act": "MLP",
}


def kind_of(name: str, module: nn.Module) -> str:
    """What a module without children counts as; empty for those that only hold others."""
    if any(module.children()):
        return ""
    if kind := KINDS.get(name.rpartition(".")[2]):
        return kind
    if isinstance(module, nn.Conv2d):
        return "patch embedding and downsampling"
    return "norms" if isinstance(module, nn.LayerNorm) else ""


def _split_scan(stamps, stamp, x, weight, *parameters, out_dtype=None, **_):
    """The operator in its two parts, each timed."""
    times = [stamp()]
    x_dbl = project(x, weight.to(x.dtype))
    times.append(stamp())
    y = dass_ops.ss2d(x, x_dbl, *parameters, out_dtype=out_dtype)
    times.append(stamp())
    stamps["scan's projection"] += times[1] - times[0]
    stamps["scan"] += times[2] - times[1]
    return y


# -- the run -----------------------------------------------------------------------------------------------------------


def run(options: Options, console: Console) -> dict:
    """Measures everything asked for; what is written to the JSON file."""
    bench = Bench(options)
    for name in options.scan:
        if name not in bench.scans:
            raise SystemExit(f"There is no scan {name!r} on {options.device}. There are: {', '.join(bench.scans)}.")
    wrong = {s: why for s in bench.scans if s not in (NOTHING, PROJECTION, LOOP) and (why := bench.agree(s))}
    result = {
        "benchmark": "model_throughput",
        "machine": describe(options.device),
        "options": {k: str(v) if isinstance(v, Path) else v for k, v in dataclasses.asdict(options).items()},
        "parameters": sum(p.numel() for p in bench.model.parameters()),
        "rows": [],
        "splits": [],
        "operators": [],
        "targets": [],
        "finished": False,
    }
    for dtype in options.dtype:
        for batch in options.batch:
            for name in options.passes:
                with console.status(f"DASS-{options.size}, {name}, batch {batch}, {dtype}"):
                    rows = bench.measure(batch, dtype, name == "training", wrong)
                    operators = bench.operators(batch, dtype, name == "training")
                    split = bench.split(batch, dtype) if name == "eval" else None
                result["rows"] += rows
                result["operators"].append({"pass": name, "batch": batch, "dtype": dtype, "seconds": operators})
                print_rows(console, f"DASS-{options.size}, {name}, batch {batch}, {dtype}", rows)
                if split:
                    result["splits"].append({"batch": batch, "dtype": dtype, "seconds": split})
                    print_shares(console, "Where the time of eval goes, by module", split)
                print_shares(console, f"Where the time of {name} goes, by operator", operators)
                result["targets"] = targets(result["rows"])
                if options.json:
                    write_json(options.json, result)
    result["finished"] = True
    for t in result["targets"]:
        met = "[green]met[/green]" if t["reached"] else "[red]not met[/red]"
        bound = f"{'at most' if t['at_most'] else 'at least'} {t['target']}"
        console.print(f"{t['name']}, {t['where']}: {t['value']:.3f} ({bound}): {met}")
    if options.json:
        write_json(options.json, result)
        console.print(f"Figures: {options.json}")
    return result


def targets(rows: list[dict]) -> list[dict]:
    """The promises on the whole model, where the rows bear on them: on a CPU, one clip in eval against the model without a
    scan; on a GPU, training at batch 32 against the fastest unfused pipeline. Values are ratios of times."""
    timed = {(r["pass"], r["batch"], r["dtype"], r["scan"]): r["seconds"]["median"] for r in rows if "seconds" in r}
    found = []

    def promise(name: str, key: tuple, other: float, target: float, at_most: bool) -> None:
        value = timed[key] / other if at_most else other / timed[key]
        reached = value <= target if at_most else value >= target
        where = f"{key[0]}, batch {key[1]}, {key[2]}"
        found.append(
            {"name": name, "where": where, "value": value, "target": target, "at_most": at_most, "reached": reached}
        )

    cpu = ("eval", 1, "float32", "dass_ops cpu")
    without = {PROJECTION: "without ss2d", NOTHING: "without ss2d and its projection"}
    for scan, what in without.items():
        if cpu in timed and (none := timed.get((*cpu[:3], scan))):
            promise(f"time over that {what}", cpu, none, 1.1, True)
    for dtype in ("float32", "bfloat16"):
        gpu = ("training", 32, dtype, "dass_ops cuda")
        pipelines = [v for k, v in timed.items() if k[:3] == gpu[:3] and k[3].startswith("unfused")]
        if gpu in timed and pipelines:
            promise("clips per second over the unfused pipeline's", gpu, min(pipelines), 2.0, False)
    return found


def print_rows(console: Console, title: str, rows: list[dict]) -> None:
    table = Table(title=title, title_justify="left", title_style="bold", header_style="dim")
    for column in ("scan", "ms", "p10-p90", "n", "clips/s", "over no scan", "peak MB"):
        table.add_column(column, justify="left" if column == "scan" else "right", no_wrap=True)
    measured = sorted((r for r in rows if "seconds" in r), key=lambda r: r["seconds"]["median"])
    none = next((r["seconds"]["median"] for r in measured if r["scan"] == NOTHING), None)
    for r in measured:
        s = r["seconds"]
        table.add_row(
            r["scan"],
            f"{s['median'] * 1e3:.4g}",
            f"{s['p10'] * 1e3:.4g}-{s['p90'] * 1e3:.4g}",
            str(s["count"]),
            f"{r['clips_per_second']:.3g}",
            f"{s['median'] / none:.2f}x" if none else "-",
            f"{r['peak_bytes'] / 1e6:.0f}" if r["peak_bytes"] else "-",
            style="bold green" if r["scan"].startswith("dass_ops") else "",
        )
    console.print(table)
    for r in rows:
        if r["status"] != "measured":
            console.print(f"  {r['scan']}: {r['status']}: {r['reason']}", style="dim")


def print_shares(console: Console, title: str, seconds: dict[str, float]) -> None:
    table = Table(title=title, title_justify="left", title_style="bold", header_style="dim")
    for column in ("", "ms", "share"):
        table.add_column(column, justify="right" if column else "left")
    whole = sum(seconds.values())
    for name, value in seconds.items():
        table.add_row(name, f"{value * 1e3:.3g}", f"{value / whole:.0%}")
    console.print(table)


def main() -> None:
    console = Console(highlight=False)
    if not console.is_terminal:
        console = Console(highlight=False, width=WIDE)  # a file has no width
    result = run(tyro.cli(Options).resolved(), console)
    bad = [r for r in result["rows"] if r["status"] == "rejected" and r["scan"].startswith(("dass_ops", "unfused"))]
    if bad:
        raise SystemExit(f"{bad[0]['scan']}: {bad[0]['reason']}.")


if __name__ == "__main__":
    main()
