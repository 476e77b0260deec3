"""Registers, shared memory and spills of the CUDA kernels: as nvcc reports them, or as they stand in a built extension.

    python csrc/resource_report.py                            # compiles float32 and bfloat16 for sm_80 and sm_90: minutes
    python csrc/resource_report.py --arch sm_90 --dtype float32 --family scan
    python csrc/resource_report.py --built dass_ops/_cuda*.so # reads what was built: seconds

No GPU is needed. Ends with exit code 1 where a kernel spills registers or keeps anything else in local memory; float64, which
is there for accuracy and not for speed, may. Shared memory is that known to the compiler: the kernels' own is asked for at
launch, by plans that depend on the shapes.
"""

import argparse
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent
FAMILIES = ("scan", "ss2d")
DTYPES = ("float32", "bfloat16", "float16", "float64")


@dataclass(frozen=True)
class Kernel:
    """One kernel for one architecture; memory in bytes. `stack`: local memory of a thread, spills included."""

    name: str
    arch: str
    registers: int
    stack: int
    shared: int

    @property
    def may_spill(self) -> bool:
        return "double" in self.name


def cuda_home() -> Path | None:
    """The CUDA toolkit, or None: the places where setup.py looks."""
    found = shutil.which("nvcc")
    places = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    for place in (*places, found and Path(found).resolve().parent.parent):
        if place and Path(place, "bin", "nvcc").is_file() and Path(place, "include", "cuda_runtime.h").is_file():
            return Path(place)
    return None


def cuobjdump() -> Path | None:
    """The toolkit's, or the one that Triton's package carries."""
    triton = importlib.util.find_spec("triton")
    folders = [Path(triton.origin).parent / "backends/nvidia/bin"] if triton and triton.origin else []
    if home := cuda_home():
        folders.insert(0, home / "bin")
    found = next((f / "cuobjdump" for f in folders if (f / "cuobjdump").is_file()), shutil.which("cuobjdump"))
    return Path(found) if found else None


def compiled(source: Path, arch: str, folder: Path) -> list[Kernel]:
    """Compiles a source of csrc/cuda for `arch` ("sm_90") and reads ptxas' report."""
    home, torch = cuda_home(), importlib.util.find_spec("torch")
    if home is None or torch is None or torch.origin is None:
        raise SystemExit("nvcc (set CUDA_HOME) and torch, for its headers, are needed.")
    command = [
        str(home / "bin/nvcc"),
        "-O3",
        "-std=c++17",
        "--expt-relaxed-constexpr",
        f"-arch={arch}",
        "-Xptxas",
        "-v",
    ]
    include = [f"-I{ROOT / 'csrc'}", f"-I{Path(torch.origin).parent / 'include'}"]
    target = folder / f"{source.stem}.{arch}.cubin"
    done = subprocess.run(
        [*command, *include, "-cubin", str(source), "-o", str(target)], capture_output=True, text=True
    )
    if done.returncode:
        raise SystemExit(f"{source.name} for {arch}:\n{done.stdout}{done.stderr}")
    return parse_ptxas(done.stdout + done.stderr)


def parse_ptxas(text: str) -> list[Kernel]:
    """Kernels in the report of `nvcc -Xptxas -v`."""
    pattern = re.compile(
        r"Compiling entry function '(?P<name>\w+)' for '(?P<arch>sm_\w+)'.*?(?P<stack>\d+) bytes stack frame"
        r".*?Used (?P<registers>\d+) registers(?P<rest>[^\n]*)",
        re.DOTALL,
    )
    found = []
    for m in pattern.finditer(text):
        shared = re.search(r"(\d+)(?:\+\d+)? bytes smem", m["rest"])
        found.append((m["name"], m["arch"], int(m["registers"]), int(m["stack"]), int(shared[1]) if shared else 0))
    return _named(found)


def built(library: Path) -> list[Kernel]:
    """Kernels of a built extension, for all its architectures."""
    tool = cuobjdump()
    if tool is None:
        raise SystemExit("cuobjdump is needed: it comes with the CUDA toolkit and with Triton.")
    done = subprocess.run(
        [str(tool), "--dump-resource-usage", str(library)], capture_output=True, text=True, check=True
    )
    return parse_resource_usage(done.stdout)


def parse_resource_usage(text: str) -> list[Kernel]:
    """Kernels in the output of `cuobjdump --dump-resource-usage`."""
    found, arch = [], ""
    for line in text.splitlines():
        if m := re.search(r"arch = (sm_\w+)", line):
            arch = m[1]
        elif m := re.search(r"Function (\w+):", line):
            name = m[1]
        elif m := re.search(r"REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", line):
            registers, stack, shared, local = map(int, m.groups())
            found.append((name, arch, registers, stack + local, shared))
    return _named(found)


def _named(found: list[tuple]) -> list[Kernel]:
    names = [f[0] for f in found]
    if names and shutil.which("c++filt"):
        text = subprocess.run(["c++filt"], input="\n".join(names), capture_output=True, text=True, check=True).stdout
        names = [re.sub(r"^void |dass::|c10::|\(.*", "", n) for n in text.splitlines()]
    return [Kernel(name, *rest) for name, (_, *rest) in zip(names, found, strict=True)]


def table(kernels: list[Kernel]) -> str:
    width = max((len(k.name) for k in kernels), default=0)
    rows = [f"{'kernel':<{width}}  arch   registers  local  shared"]
    for k in sorted(kernels, key=lambda k: (k.name, k.arch)):
        note = "" if not k.stack else "  (float64 may)" if k.may_spill else "  SPILLS"
        rows.append(f"{k.name:<{width}}  {k.arch:<6} {k.registers:>9} {k.stack:>6} {k.shared:>7}{note}")
    return "\n".join(rows)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", nargs="+", default=["sm_80", "sm_90"])
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=["float32", "bfloat16"])
    parser.add_argument("--family", nargs="+", choices=FAMILIES, default=FAMILIES)
    parser.add_argument("--built", type=Path, help="read this extension; compile nothing")
    options = parser.parse_args()
    if options.built:
        kernels = built(options.built)
    else:
        sources = [ROOT / f"csrc/cuda/{family}_{dtype}.cu" for family in options.family for dtype in options.dtype]
        with tempfile.TemporaryDirectory() as folder:
            kernels = [k for arch in options.arch for s in sources for k in compiled(s, arch, Path(folder))]
    print(table(kernels))
    return 1 if any(k.stack and not k.may_spill for k in kernels) else 0


if __name__ == "__main__":
    sys.exit(main())
