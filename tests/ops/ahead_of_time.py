"""Compiles what the Triton operators would launch on a GPU that is not there:  python -m tests.ops.ahead_of_time 90

The operators run as they are, on CPU tensors of the shapes in question and with the interpreter off. Only the driver is a
stand-in, and a launch compiles instead of running. So what is compiled, with its types, alignments, constants and block
sizes, is what that GPU would run. Prints a line of JSON for each kernel; --keep FOLDER keeps its PTX and Triton GPU code.
"""

import argparse
import json
import os
import re
import subprocess
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

os.environ.pop("TRITON_INTERPRET", None)  # before Triton is imported, and the tests' conftest sets it for CPU tensors

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

import dass_ops
from dass_ops import backends
from dass_ops.triton_kernels import primitives

from . import test_bidirectional_scan, test_selective_scan, test_ss2d
from .cases import MapCase, ScanCase, map_inputs, run_map, run_scan, scan_inputs

# A sixteenth of those of an A100 and of an H100 or H200: a batch of 2 is cut up as one of 32 is there, and what the
# operators do around their kernels is a sixteenth of the work.
MULTIPROCESSORS = {80: 7, 90: 8}
STAGES = [(96, 32, 256, 6), (192, 16, 128, 12), (384, 8, 64, 24), (768, 4, 32, 48)]  # DASS: channels, map, rank
DTYPES = (torch.float32, torch.bfloat16)


class AbsentGPU:
    """What Triton and the kernels' plan ask of a driver before a launch."""

    def __init__(self, capability: int):
        self.target = GPUTarget("cuda", capability, 32)
        properties = {"multiprocessor_count": MULTIPROCESSORS[capability]}
        self.utils = SimpleNamespace(get_device_properties=lambda _: properties)

    def get_current_target(self):
        return self.target

    def get_current_device(self):
        return 0

    def get_current_stream(self, _):
        return 0


def models(stages=(1, 2, 3, 4)):
    """(label, state, call): the operators at the shapes of DASS and of Mamba, forward and backward."""
    for dtype in DTYPES:
        short = str(dtype).removeprefix("torch.")
        for stage in stages:
            channels, height, width, rank = STAGES[stage - 1]
            case = MapCase(batch=2, channels=channels, height=height, width=width, rank=rank)
            yield f"DASS stage {stage}, {short}", 1, _map(case, dtype)
        case = ScanCase(batch=2, channels=96, length=2048)
        inputs = test_bidirectional_scan.inputs_of(case, dtype)
        yield f"bidirectional, {short}", 1, _scan(case, dtype, dass_ops.bidirectional_scan, inputs)
        case = ScanCase(batch=1, channels=768, length=256, state=16, z=True)
        yield f"Mamba, {short}", 16, _scan(case, dtype)


def suite():
    """(label, state, call): what the suite runs in the interpreter."""
    for case in test_selective_scan.FORMS:
        yield f"scan {case}", case.state, _scan(case, torch.float32)
    for case in test_bidirectional_scan.CASES:
        inputs = test_bidirectional_scan.inputs_of(case, torch.float32)
        yield f"bidirectional {case}", case.state, _scan(case, torch.float32, dass_ops.bidirectional_scan, inputs)
    for case in test_ss2d.CASES:
        yield f"map {case}", case.state, _map(case, torch.float32)
    for dtype in (torch.float16, torch.float64):
        yield f"scan {dtype}", 4, _scan(ScanCase(state=4, z=True, B=2, initial_state=True, last_state=True), dtype)
        yield f"map {dtype}", 2, _map(MapCase(state=2, channels=6, rank=3), dtype)
    case = ScanCase(batch=1, channels=18, state=33, B=3, C=2)
    yield f"scan {case}", case.state, _scan(case, torch.float32)


def _map(case, dtype):
    return lambda: run_map(dass_ops.ss2d, map_inputs(case, dtype), "triton")


def _scan(case, dtype, function=dass_ops.selective_scan, inputs=None):
    options = {} if function is dass_ops.bidirectional_scan else {"reverse": case.reverse}

    def call():
        run_scan(function, case, inputs or scan_inputs(case, dtype), dtype, "triton", options=options)

    return call


def resources(cubin: bytes) -> dict[str, int]:
    """Registers, bytes of local memory (where spilled registers go) and of shared memory, from the code itself."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        Path(file.name).write_bytes(cubin)
        tool = triton.knobs.nvidia.cuobjdump.path
        text = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    found = {name: int(number) for name, number in re.findall(r"(REG|STACK|LOCAL|SHARED):(\d+)", text)}
    return {"registers": found["REG"], "spilled": found["STACK"] + found["LOCAL"], "static_shared": found["SHARED"]}


def compile_calls(capability: int, calls, keep: Path | None = None):
    """Runs the calls; yields a record for each kernel that they compile, once, or that the compiler rejects."""
    assert not primitives.INTERPRETED
    triton.runtime.driver.set_active(AbsentGPU(capability))
    backends.availability = lambda backend, device: backends.Availability(True)
    records, seen, run = [], set(), JITFunction.run
    label, state = "", 0

    def compile_only(self, *args, grid, warmup, **constants):
        start = time.perf_counter()
        record = {"case": label, "state": state, "kernel": self.fn.__name__, "grid": grid}
        try:
            kernel = run(self, *args, grid=grid, warmup=True, **constants)
        except Exception as error:
            while error.__cause__:
                error = error.__cause__
            records.append(record | {"error": f"{type(error).__name__}: {error}"})
            return
        if kernel.hash in seen:
            return
        seen.add(kernel.hash)
        record |= {
            "warps": kernel.metadata.num_warps,
            "shared": kernel.metadata.shared,
            **resources(kernel.asm["cubin"]),
        }
        record |= {name: constants[name] for name in ("BLOCK", "TILE", "PLACING") if name in constants}
        records.append(record | {"seconds": round(time.perf_counter() - start, 2)})
        for kind in ("ptx", "ttgir") if keep else ():
            (keep / f"{label}-{self.fn.__name__}-{len(seen)}.{kind}".replace(" ", "_")).write_text(kernel.asm[kind])

    JITFunction.run = compile_only
    try:
        for name, number, call in calls:
            label, state = name, number  # of the records
            call()
            yield from records
            records.clear()
    finally:
        JITFunction.run = run


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("capability", type=int, choices=MULTIPROCESSORS)
    parser.add_argument("--stages", type=int, nargs="*", default=[1, 2, 3, 4], help="of DASS")
    parser.add_argument("--suite", action="store_true", help="what the suite runs, instead of the shapes of models")
    parser.add_argument("--only", default="", help="cases whose label contains this")
    parser.add_argument("--keep", type=Path)
    options = parser.parse_args()
    if options.keep:
        options.keep.mkdir(parents=True, exist_ok=True)
    calls = suite() if options.suite else models(options.stages)
    for record in compile_calls(options.capability, (c for c in calls if options.only in c[0]), options.keep):
        print(json.dumps(record), flush=True)


if __name__ == "__main__":
    main()
