"""Everything that needs a GPU, in one command: build, tests, memory and race checks, benchmarks; one JSON.

    make gpu PYTHON=python3                        # all stages: ten minutes at most on an H200 with 16 cores
    python benchmarks/gpu.py --stage build cuda    # some of them; the other stages' results stay in the JSON
    python benchmarks/gpu.py --list

Works offline, in the environment of the Python that runs it. Every stage is a process of its own with a limit, and its
results are in the file before the next one starts. A stage that cannot run says why. Peers are built from sources in
build/peers (benchmarks/build_peers.py says which), missing packages are taken from wheels in build/wheels.
"""

import argparse
import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
FOLDER = ROOT / "build" / "gpu"  # logs, records, the benchmarks' own JSON
PEERS, WHEELS = ROOT / "build" / "peers", ROOT / "build" / "wheels"
NEEDED = {"pytest": "pytest", "hypothesis": "hypothesis", "tyro": "tyro", "rich": "rich", "soundfile": "soundfile"}
# Small cases of every kernel, for the sanitizers.
SMALL = "cuda and (test_forms or test_empty or test_layouts or test_cases or (test_dtypes and not float64))"
SMALL_RACES = "cuda and (test_forms or (test_cases and not height))"


@dataclass
class Outcome:
    """`status`: ok, failed, stopped (at its limit) or skipped, the last with a reason; `details` is what it found out."""

    status: str
    reason: str = ""
    details: dict = field(default_factory=dict)


@dataclass(frozen=True)
class Stage:
    """`limit`: seconds that it may take. `needs_gpu`: is skipped without one."""

    name: str
    what: str
    limit: float
    run: Callable[["Run"], Outcome]
    needs_gpu: bool = True


@dataclass
class Run:
    """What a stage knows: the GPU's architecture ("9.0"), "" where there is no GPU, and how long it may take."""

    architecture: str
    limit: float = 0.0
    name: str = ""

    def command(self, command: Sequence[str | Path], **environment: str) -> tuple[str, int]:
        """Runs it, with a log, for as long as the stage may take; ("ok" | "failed" | "stopped", exit code)."""
        log = FOLDER / f"{self.name}.log"
        paths = [str(PEERS / "modules"), str(ROOT), str(HERE), os.environ.get("PYTHONPATH", "")]
        known = os.environ | {"PYTHONPATH": os.pathsep.join(p for p in paths if p)} | environment
        known = {k: v for k, v in known.items() if not k.startswith("PYTEST_")}  # a run of its own, also below another
        begin = time.monotonic()
        with log.open("a") as file:
            file.write(f"$ {' '.join(map(str, command))}\n")
            file.flush()
            process = subprocess.Popen(
                [str(c) for c in command],
                cwd=ROOT,
                env=known,
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            try:
                code = process.wait(max(self.limit, 1))
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
                return "stopped", -9
            finally:
                self.limit -= time.monotonic() - begin
        return ("ok" if code == 0 else "failed"), code

    def log_end(self, lines: int = 12) -> str:
        log = FOLDER / f"{self.name}.log"
        return "\n".join(log.read_text(errors="replace").splitlines()[-lines:]) if log.exists() else ""


# -- stages ------------------------------------------------------------------------------------------------------------


def build(run: Run) -> Outcome:
    """Compiles the package in its folder, CUDA kernels for this GPU's architecture only; installs packages from wheels."""
    missing = [package for module, package in NEEDED.items() if importlib.util.find_spec(module) is None]
    if missing and WHEELS.is_dir():
        install = ["-m", "pip", "install", "--no-index", "--find-links", WHEELS, *missing]
        run.command([sys.executable, *install], PIP_BREAK_SYSTEM_PACKAGES="1")
    link = ROOT / "dass_ops" / "triton_kernels"  # what an installation would map
    if not link.exists():
        link.symlink_to(Path("..") / "triton_kernels", target_is_directory=True)
    cores = str(len(os.sched_getaffinity(0)))
    chosen = {"DASS_OPS_CUDA": "1", "TORCH_CUDA_ARCH_LIST": run.architecture, "MAX_JOBS": cores}
    status, _ = run.command([sys.executable, "setup.py", "build_ext", "--inplace"], **chosen)
    details = {"missing_packages": missing}
    if status == "ok":
        report = subprocess.run(
            [sys.executable, ROOT / "csrc/resource_report.py", "--built", *(ROOT / "dass_ops").glob("_cuda*.so")],
            capture_output=True, text=True,
        )  # fmt: skip
        details["resources"] = report.stdout.splitlines() or report.stderr.splitlines()[-3:]
    return Outcome(status, "" if status == "ok" else run.log_end(), details)


def self_check(run: Run) -> Outcome:
    status, _ = run.command([sys.executable, "-m", "dass_ops"])
    return Outcome(status, details={"shown": run.log_end(20).splitlines()})


def tests(expression: str, *files: str, workers: int = 4, prefix: Sequence[str | Path] = (), **environment: str):
    """A stage of tests: their outcomes one by one."""

    def stage(run: Run) -> Outcome:
        record = FOLDER / f"{run.name}.jsonl"
        record.unlink(missing_ok=True)
        many = ["-n", str(workers)] if workers and importlib.util.find_spec("xdist") else []
        options = ["-q", "-p", "no:cacheprovider", "-p", "record_outcomes", "-o", "addopts=", *many, "-k", expression]
        command = [*prefix, sys.executable, "-m", "pytest", *options, *(files or ["tests/ops"])]
        status, code = run.command(command, DASS_RECORD=str(record), **environment)
        lines = record.read_text().splitlines() if record.exists() else []
        found = [json.loads(line) for line in lines]
        counts = {o: sum(t["outcome"] == o for t in found) for o in ("passed", "failed", "skipped")}
        details = {"counts": counts, "tests": found}
        if status == "ok" and not counts["passed"]:
            status = "failed"
        return Outcome(status, "" if status == "ok" else run.log_end(), details)

    return stage


def sanitizer(tool: str, expression: str):
    def stage(run: Run) -> Outcome:
        places = [Path(os.environ.get("CUDA_HOME", "/usr/local/cuda")) / "bin", *map(Path, os.get_exec_path())]
        program = next((p / "compute-sanitizer" for p in places if (p / "compute-sanitizer").is_file()), None)
        if program is None:
            return Outcome("skipped", "compute-sanitizer is not on PATH, nor in CUDA_HOME")
        known = subprocess.run([program, "--help"], capture_output=True, text=True).stdout
        only_ours = (
            ["--kernel-regex", "kns=dass"] if "--kernel-regex " in known else []
        )  # torch's kernels are not watched
        prefix = [program, "--tool", tool, "--error-exitcode", "86", *only_ours]
        inner = tests(expression, workers=0, prefix=prefix, PYTORCH_NO_CUDA_MEMORY_CACHING="1")
        outcome = inner(run)
        log = (FOLDER / f"{run.name}.log").read_text(errors="replace")
        outcome.details["summary"] = [line for line in log.splitlines() if " SUMMARY: " in line]
        return outcome

    return stage


def build_peers(run: Run) -> Outcome:
    sources = [*sorted(PEERS.glob("mamba_ssm-*.tar.gz"))[-1:], *(p for p in (PEERS / "VMamba",) if p.is_dir())]
    sources += [Path(p) for p in os.environ.get("DASS_PEERS", "").split(os.pathsep) if p]
    if not sources:
        return Outcome("skipped", "no sources in build/peers or DASS_PEERS; benchmarks/build_peers.py says which")
    jobs = str(len(os.sched_getaffinity(0)))
    status, _ = run.command(
        [sys.executable, HERE / "build_peers.py", *sources], TORCH_CUDA_ARCH_LIST=run.architecture, MAX_JOBS=jobs
    )
    return Outcome(status, "" if status == "ok" else run.log_end(), {"sources": [s.name for s in sources]})


def benchmark(script: str, *options: str):
    def stage(run: Run) -> Outcome:
        target = FOLDER / f"{run.name}.json"
        target.unlink(missing_ok=True)
        status, _ = run.command([sys.executable, HERE / script, "--device", "cuda", *options, "--json", target])
        result = json.loads(target.read_text()) if target.exists() else {}
        return Outcome(status, "" if status == "ok" else run.log_end(), {"result": result})

    return stage


SCANS = "--op ss2d_projected --batch 32 --shape stage1 stage2 stage3 stage4 --seconds 1 --compile none".split()
MAMBA = "--op selective_scan --batch 8 --shape mamba --dtype bfloat16 float32 --seconds 2 --compile none".split()
BATCH_1 = "--op ss2d_projected selective_scan --batch 1 --dtype bfloat16 --seconds 1 --compile none --peers".split()
MODEL = "--batch 32 --dtype bfloat16 --seconds 4 --limit 5".split()
STAGES = (
    Stage("build", "the package, CUDA kernels for this GPU", 150, build),
    Stage("self-check", "python -m dass_ops", 60, self_check),
    Stage("cuda", "the suite on CUDA", 90, tests("cuda", workers=6)),
    Stage("triton", "the suite on Triton", 90, tests("triton", workers=12)),
    Stage("memcheck", "small cases under compute-sanitizer memcheck", 60, sanitizer("memcheck", SMALL)),
    Stage("racecheck", "small cases under compute-sanitizer racecheck", 60, sanitizer("racecheck", SMALL_RACES)),
    Stage("peers", "mamba_ssm's and VMamba's scans from their sources", 150, build_peers),
    Stage("scans-bfloat16", "DASS stages at batch 32 beside the unfused pipelines",
          60, benchmark("scan_throughput.py", *SCANS, "--dtype", "bfloat16")),
    Stage("scans-float32", "the same in float32",
          60, benchmark("scan_throughput.py", *SCANS, "--dtype", "float32")),
    Stage("mamba", "selective_scan at Mamba's shape beside mamba_ssm",
          40, benchmark("scan_throughput.py", *MAMBA)),
    Stage("batch-1", "one clip", 40, benchmark("scan_throughput.py", *BATCH_1)),
    Stage("model", "DASS-small, training and eval, batch 32",
          90, benchmark("model_throughput.py", *MODEL)),
)  # fmt: skip


# -- the run -----------------------------------------------------------------------------------------------------------


def architecture() -> tuple[str, str]:
    """The GPU's, such as "9.0", and its name; or "" and why there is none."""
    try:
        import torch
    except ImportError:
        return "", f"{sys.executable} has no torch"
    if not torch.cuda.is_available():
        return "", f"no CUDA device is visible to torch {torch.__version__}"
    return ".".join(map(str, torch.cuda.get_device_capability())), torch.cuda.get_device_name()


def describe() -> dict:
    def shown(*command: str) -> str:
        try:
            return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=20).stdout.strip()
        except (OSError, subprocess.TimeoutExpired):
            return ""

    def version(package: str) -> str:
        try:
            if package == "torch" and "torch" in sys.modules:
                return sys.modules["torch"].__version__  # says for which CUDA
            return metadata.version(package)
        except metadata.PackageNotFoundError:
            return ""

    arch, gpu = architecture()
    changed = shown("git", "status", "--porcelain", "-uno")
    return {
        "gpu": gpu if arch else "",
        "no_gpu": "" if arch else gpu,
        "architecture": arch,
        "driver": shown("nvidia-smi", "--query-gpu=driver_version,memory.total,clocks.max.sm", "--format=csv,noheader"),
        "nvcc": (shown("nvcc", "--version").splitlines() or [""])[-1],
        "python": sys.version.split()[0],
        "cores": len(os.sched_getaffinity(0)),
        "versions": {name: version(name) for name in ("torch", "triton", "numpy", "mamba_ssm", "dass")},
        "commit": os.environ.get("DASS_COMMIT") or shown("git", "rev-parse", "HEAD") + ("+changes" if changed else ""),
        "started": time.strftime("%Y-%m-%dT%H:%M:%S"),
    }


def write(path: Path, result: dict) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".new")
    temporary.write_text(json.dumps(result, indent=1))
    temporary.replace(path)


def main(arguments: Sequence[str] | None = None, stages: Sequence[Stage] = STAGES) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stage", nargs="+", choices=[s.name for s in stages], help="only these; default: all")
    parser.add_argument("--json", type=Path, default=FOLDER / "gpu.json")
    parser.add_argument("--minutes", type=float, default=10.0, help="for everything; stages beyond are skipped")
    parser.add_argument("--list", action="store_true", help="show the stages and their limits")
    options = parser.parse_args(arguments)
    if options.list:
        for stage in stages:
            print(f"{stage.name:<15} {stage.limit:>4.0f} s  {stage.what}")
        return 0
    end = time.monotonic() + 60 * options.minutes
    FOLDER.mkdir(parents=True, exist_ok=True)
    machine = describe()
    result = {"stages": {}}
    if options.stage and options.json.exists():
        result = json.loads(options.json.read_text())
    result |= {"machine": machine, "finished": False}
    for stage in stages:
        if options.stage and stage.name not in options.stage:
            continue
        begin, left = time.monotonic(), end - time.monotonic()
        if stage.needs_gpu and not machine["architecture"]:
            outcome = Outcome("skipped", machine["no_gpu"])
        elif left < 5:
            outcome = Outcome(
                "skipped", f"the {options.minutes:g} minutes are over; run it alone: --stage {stage.name}"
            )
        else:
            (FOLDER / f"{stage.name}.log").unlink(missing_ok=True)
            outcome = stage.run(Run(machine["architecture"], min(stage.limit, left), stage.name))
        seconds = time.monotonic() - begin
        result["stages"][stage.name] = {
            "what": stage.what, "status": outcome.status, "reason": outcome.reason, "seconds": round(seconds, 1),
            "commit": machine["commit"], **outcome.details,
        }  # fmt: skip
        write(options.json, result)
        counts = ", ".join(f"{n} {o}" for o, n in outcome.details.get("counts", {}).items())
        print(f"{stage.name:<15} {outcome.status:<8} {seconds:6.1f} s  {counts or outcome.reason}", flush=True)
        for target in outcome.details.get("result", {}).get("targets", ()):
            reached = "reached" if target["reached"] else "MISSED"
            name = f"{target['name']}: {target['where']}"
            print(f"    {reached:<8} {target['value']:7.2f} (target {target['target']:g})  {name}")
    result["finished"] = True
    write(options.json, result)
    print(f"Everything: {options.json}")
    return 1 if any(s["status"] in ("failed", "stopped") for s in result["stages"].values()) else 0


if __name__ == "__main__":
    sys.exit(main())
