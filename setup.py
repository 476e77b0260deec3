"""The extension modules of dass_ops and their sources. Metadata: pyproject.toml; operators: csrc/schema.cpp.

Built against the torch that is installed. The CUDA kernels are built where torch is a CUDA build and its nvcc is found.
Environment: DASS_OPS_CUDA=0 (leave them out) or 1 (build them, or fail), DASS_OPS_EMULATED=1 (build their emulation on the
host too, a test backend), TORCH_CUDA_ARCH_LIST, CUDA_HOME, MAX_JOBS.
"""

import glob
import os
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup

ROOT = Path(__file__).parent.resolve()
os.chdir(ROOT)

NO_COMPILER = (
    "dass_ops needs a C++17 compiler, and {compiler!r} was not found. On Debian or Ubuntu: apt-get install g++. "
    "Elsewhere, name yours: CXX=/path/to/c++ pip install -e ."
)


def find_cuda_home():
    """The toolkit's folder, or None. A wrapper named nvcc elsewhere on PATH is not taken for the toolkit."""
    candidates = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    nvcc = shutil.which("nvcc")
    if nvcc:
        candidates.append(str(Path(nvcc).resolve().parent.parent))
    for home in candidates:
        if home and Path(home, "bin", "nvcc").is_file() and Path(home, "include", "cuda_runtime.h").is_file():
            return home
    return None


def nvcc_version(cuda_home):
    """Such as "13.0"."""
    shown = subprocess.run([f"{cuda_home}/bin/nvcc", "--version"], capture_output=True, text=True, check=True).stdout
    return re.search(r"release (\d+\.\d+)", shown)[1]


def why_no_cuda(torch, cuda_home):
    if os.environ.get("DASS_OPS_CUDA") == "0":
        return "left out by DASS_OPS_CUDA=0"
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is a build without CUDA"
    if cuda_home is None:
        return "no CUDA toolkit with nvcc was found (set CUDA_HOME)"
    version = nvcc_version(cuda_home)
    if version.split(".")[0] != torch.version.cuda.split(".")[0]:
        return (
            f"nvcc in {cuda_home} is of CUDA {version}, torch of {torch.version.cuda} (set CUDA_HOME to one that fits)"
        )
    if not sources("csrc/cuda"):
        return "this source tree has no CUDA sources"
    return None


def sources(folder):
    return sorted(glob.glob(f"{folder}/*.cpp") + glob.glob(f"{folder}/*.cu"))


def cuda_architectures():
    """Real code for Ampere and Hopper, PTX for what comes after."""
    return os.environ.setdefault("TORCH_CUDA_ARCH_LIST", "8.0;9.0+PTX")


def extensions():
    try:
        import torch
    except ImportError as error:
        raise SystemExit(
            "dass_ops is compiled against the installed torch, and none was found. "
            "First: pip install torch torchaudio -c constraints.txt"
        ) from error
    compiler = os.environ.get("CXX", "c++").split()[0]
    if not shutil.which(compiler) and not shutil.which("g++"):
        raise SystemExit(NO_COMPILER.format(compiler=compiler))
    cuda_home = find_cuda_home()
    if cuda_home:
        os.environ["CUDA_HOME"] = cuda_home  # before cpp_extension is imported: it guesses from PATH
    from torch.utils.cpp_extension import BuildExtension, CppExtension, CUDAExtension

    common = ["-O3", "-std=c++17", "-fvisibility=hidden", "-Wall", "-Wno-unknown-pragmas"]
    common += os.environ.get("DASS_OPS_CXXFLAGS", "").split()
    link = os.environ.get("DASS_OPS_LDFLAGS", "").split()
    # at::parallel_for needs OpenMP at compile time. It is not linked: the runtime must be the one that torch has loaded.
    openmp = ["-fopenmp"] if torch.backends.openmp.is_available() else []
    # Sums are fused with products where the kernels say so and nowhere else: plans of work must agree to the bit.
    cpu = [*common, *openmp, "-ffp-contract=off"]
    headers = sorted(glob.glob("csrc/**/*.h", recursive=True) + glob.glob("csrc/**/*.cuh", recursive=True))
    include = [str(ROOT / "csrc")]
    modules = [
        CppExtension(
            "dass_ops._C",
            ["csrc/schema.cpp", "csrc/autograd.cpp", "csrc/plain_calls.cpp", *sources("csrc/cpu")],
            include_dirs=[*include],
            extra_compile_args={"cxx": cpu},
            extra_link_args=link,
            depends=headers,
        )
    ]
    emulated = bool(sources("csrc/emulation")) and os.environ.get("DASS_OPS_EMULATED") == "1"
    if emulated:
        modules.append(
            CppExtension(
                "dass_ops._emulated",
                sources("csrc/emulation"),
                include_dirs=[*include],
                extra_compile_args={"cxx": [*common]},
                extra_link_args=link,
                depends=headers,
            )
        )
    no_cuda = why_no_cuda(torch, cuda_home)
    if no_cuda and os.environ.get("DASS_OPS_CUDA") == "1":
        raise SystemExit(f"DASS_OPS_CUDA=1, but the CUDA part cannot be built: {no_cuda}.")
    architectures = ""
    if not no_cuda:
        architectures = cuda_architectures()
        modules.append(
            CUDAExtension(
                "dass_ops._cuda",
                sources("csrc/cuda"),
                include_dirs=[*include],
                extra_compile_args={
                    "cxx": [*common],
                    "nvcc": ["-O3", "-std=c++17", "--expt-relaxed-constexpr", "-lineinfo", "--threads=2"],
                },
                depends=headers,
            )
        )
    info = {
        "torch": torch.__version__,
        "cuda": "" if no_cuda else torch.version.cuda,
        "cuda_architectures": architectures,
        "no_cuda": no_cuda or "",
        "emulated": str(int(emulated)),
        "machine": platform.machine(),
        "flags": " ".join(common),
    }
    macros = [(f"DASS_OPS_{key.upper()}", f'"{value}"') for key, value in info.items()]
    try:
        from pybind11 import get_include
    except ImportError:  # built without isolation: torch brings the headers along

        def get_include():
            return str(Path(torch.__file__).parent / "include")

    modules.append(
        Extension(  # not torch's: it must load whatever torch is there
            "dass_ops._build_info",
            ["csrc/build_info.cpp"],
            include_dirs=[get_include()],
            define_macros=macros,
            extra_compile_args={"cxx": [*common]},
            language="c++",
        )
    )

    class Build(BuildExtension):
        """torch's builder, which says at the end what it built and, installed with -e, keeps the objects."""

        def finalize_options(self):
            super().finalize_options()
            if ROOT not in Path(self.build_temp).resolve().parents:  # -e: a folder that would be gone after the build
                self.build_temp = str(
                    ROOT / "build" / f"editable.{sys.implementation.cache_tag}-torch{torch.__version__}"
                )

        def run(self):
            super().run()
            lines = [
                f"dass_ops: built for torch {info['torch']}",
                f"  CPU   {info['machine']}, instruction sets chosen at run time (python -m dass_ops)",
                f"  CUDA  {architectures}" if not no_cuda else f"  CUDA  not built: {no_cuda}",
            ]
            print("\n".join(lines), file=sys.stderr, flush=True)
            try:  # pip shows a build's output only with -v; the terminal, where there is one, is told anyway
                Path("/dev/tty").write_text("\n" + "\n".join(lines) + "\n")
            except OSError:
                pass

    return modules, {"build_ext": Build.with_options(use_ninja=bool(shutil.which("ninja")), no_python_abi_suffix=False)}


building = {"build_ext", "bdist_wheel", "editable_wheel", "develop", "install", "build", "bdist_egg"} & set(sys.argv)
modules, commands = extensions() if building else ([], {})
setup(ext_modules=modules, cmdclass=commands)
