"""The emulated suite under AddressSanitizer and UndefinedBehaviorSanitizer.

    python csrc/emulation/sanitize.py [pytest arguments]

Compiles the emulation (with GCC, some minutes on two cores) into build/sanitized, beside copies of the rest of dass_ops and
of the tests, and runs them there. The package must have been built before.
"""

import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
FOLDER = ROOT / "build" / "sanitized"
FLAGS = ["-O1", "-g", "-std=c++17", "-fPIC", "-fvisibility=hidden", "-fno-omit-frame-pointer", "-Wno-unknown-pragmas"]
SANITIZE = ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"]
JOBS = int(os.environ.get("MAX_JOBS", len(os.sched_getaffinity(0))))


def compile_emulation(target: Path) -> None:
    from torch.utils.cpp_extension import include_paths, library_paths

    compiler = os.environ.get("CXX", "g++").split()
    include = [f"-I{p}" for p in (ROOT / "csrc", *include_paths())]
    objects = FOLDER / "objects"
    objects.mkdir(parents=True, exist_ok=True)
    sources = sorted((ROOT / "csrc" / "emulation").glob("*.cpp"))
    newest = max(p.stat().st_mtime for p in (ROOT / "csrc").rglob("*") if p.suffix in (".h", ".cuh"))

    def compile_one(source: Path) -> Path:
        made = objects / f"{source.stem}.o"
        if not made.exists() or made.stat().st_mtime < max(newest, source.stat().st_mtime):
            command = [*compiler, *FLAGS, *SANITIZE, *include, "-c", str(source), "-o", str(made)]
            subprocess.run(command, check=True)
        return made

    with ThreadPoolExecutor(JOBS) as pool:
        made = [str(o) for o in pool.map(compile_one, sources)]
    libraries = [f"-L{p}" for p in library_paths()] + ["-lc10", "-ltorch", "-ltorch_cpu"]
    subprocess.run([*compiler, "-shared", *SANITIZE, *made, *libraries, "-o", str(target)], check=True)


def lay_out() -> Path:
    """The package and its tests in build/sanitized; where the sanitized extension belongs."""
    built = next((ROOT / "dass_ops").glob("_C*.so"), None)
    if built is None:
        raise SystemExit("dass_ops is not built: pip install -e .")
    for folder in ("dass_ops", "tests"):
        shutil.rmtree(FOLDER / folder, ignore_errors=True)
    ignored = shutil.ignore_patterns("_emulated*.so", "_cuda*.so", "__pycache__", "triton_kernels")
    shutil.copytree(ROOT / "dass_ops", FOLDER / "dass_ops", ignore=ignored)
    shutil.copytree(ROOT / "triton_kernels", FOLDER / "dass_ops" / "triton_kernels")
    shutil.copytree(ROOT / "tests" / "ops", FOLDER / "tests" / "ops")
    for name in ("tests/__init__.py", "tests/conftest.py", "pyproject.toml"):
        shutil.copy(ROOT / name, FOLDER / name)
    if not (FOLDER / "csrc").exists():
        (FOLDER / "csrc").symlink_to(ROOT / "csrc", target_is_directory=True)
    return FOLDER / "dass_ops" / built.name.replace("_C", "_emulated", 1)


def library_of(name: str) -> str:
    """The path of the compiler's own library of that name."""
    command = [*os.environ.get("CXX", "g++").split(), f"-print-file-name=lib{name}.so"]
    found = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    return str(Path(found).resolve())


def main(arguments: list[str]) -> int:
    FOLDER.mkdir(parents=True, exist_ok=True)
    compile_emulation(lay_out())
    # libstdc++ too: AddressSanitizer looks for __cxa_throw before Python has loaded that, and aborts at the first throw.
    libraries = [library_of(name) for name in ("asan", "ubsan", "stdc++")]
    environment = os.environ | {
        "LD_PRELOAD": " ".join(libraries),
        # Python and torch are not built for these; leaks are none of our business here.
        "ASAN_OPTIONS": "detect_leaks=0:alloc_dealloc_mismatch=0:detect_odr_violation=0",
        "UBSAN_OPTIONS": "print_stacktrace=1",
        "PYTHONPATH": str(FOLDER),
        "OMP_NUM_THREADS": "1",
    }
    chosen = arguments or [
        "tests/ops",
        "-k",
        "emulated and not compile and not model_and_larger",
        "-m",
        "not slow",
        "-q",
    ]
    # capture=sys leaves the sanitizers' reports, which end the process, on the terminal.
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "--capture=sys", *chosen]
    return subprocess.run(command, cwd=FOLDER, env=environment).returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
