"""Builds peers' CUDA scans from their sources, for this GPU only and without their packages' other parts.

    python benchmarks/build_peers.py build/peers/mamba_ssm-2.3.2.post1.tar.gz [/path/to/VMamba]

Sources: mamba_ssm's own distribution (pip download --no-binary :all: --no-deps --no-build-isolation mamba-ssm), or a
folder that has it unpacked; VMamba's repository, or its kernels/selective_scan. The modules land in build/peers/modules, to
be put on PYTHONPATH.
"""

import sys
import tarfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "build" / "peers"
MODULES = FOLDER / "modules"
# As the packages build them.
FLAGS = ["-O3", "-std=c++17", "--expt-relaxed-constexpr", "--expt-extended-lambda", "--use_fast_math", "-lineinfo"]
FLAGS += [f"-U__CUDA_NO_{kind}__" for kind in ("HALF_OPERATORS", "HALF_CONVERSIONS", "BFLOAT16_OPERATORS")]
FLAGS += [f"-U__CUDA_NO_{kind}__" for kind in ("BFLOAT16_CONVERSIONS", "BFLOAT162_OPERATORS", "BFLOAT162_CONVERSIONS")]
# Of VMamba's: rows per thread block, of which its kernels are compiled for 1 only.
ROWS = ["-DN_ROWS=1"]


def unpacked(source: Path) -> Path:
    if source.is_dir():
        return source
    target = FOLDER / source.name.removesuffix(".gz").removesuffix(".tar")
    if not target.is_dir():
        with tarfile.open(source) as archive:
            archive.extraction_filter = getattr(tarfile, "data_filter", None)  # Python 3.11.4 and later
            archive.extractall(FOLDER)
    return target


def plan(source: Path) -> tuple[str, list[Path], list[Path]]:
    """(module, sources, include folders) of a peer's sources."""
    folder = unpacked(source)
    if (mamba := folder / "csrc" / "selective_scan" / "selective_scan.cpp").is_file():
        return (
            "selective_scan_cuda",
            sorted(mamba.parent.glob("*.cpp")) + sorted(mamba.parent.glob("*.cu")),
            [mamba.parent],
        )
    for inner in (folder, folder / "kernels" / "selective_scan"):
        kernels = inner / "csrc" / "selective_scan"
        if oflex := sorted((kernels / "cusoflex").glob("*.c*")):
            sources = [f for f in oflex if f.suffix in (".cpp", ".cu")]
            return "selective_scan_cuda_oflex", sources, [kernels, kernels / "cusoflex"]
    raise SystemExit(f"{source} has neither mamba_ssm's nor VMamba's selective scan.")


def build(source: Path) -> str:
    from torch.utils.cpp_extension import load

    module, sources, include = plan(source)
    work = FOLDER / module
    work.mkdir(parents=True, exist_ok=True)
    load(
        module,
        [str(s) for s in sources],
        extra_include_paths=[str(i) for i in include],
        extra_cflags=["-O3", "-std=c++17"],
        extra_cuda_cflags=FLAGS + (ROWS if "oflex" in module else []),
        build_directory=str(work),
        is_python_module=False,
    )
    MODULES.mkdir(exist_ok=True)
    built = next(work.glob(f"{module}*.so"))
    target = MODULES / built.name
    target.unlink(missing_ok=True)
    target.hardlink_to(built)
    return module


if __name__ == "__main__":
    if len(sys.argv) < 2:
        raise SystemExit(__doc__)
    for argument in sys.argv[1:]:
        print("built", build(Path(argument)))
