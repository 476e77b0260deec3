"""PEP 517 hooks: setuptools' own, run with the torch that is installed where the package will be used.

pip builds in an isolated environment. Compiling against a torch downloaded into that environment would give an extension
for another torch than the one it is loaded into. So the site-packages of the surrounding environment, which pip hides
from the build, are appended to `sys.path`: setuptools, ninja and pybind11 come from the isolated environment, torch from
the real one.
"""

import site
import sys
import sysconfig
from importlib.util import find_spec
from pathlib import Path

import setuptools
from setuptools import build_meta

if int(setuptools.__version__.split(".")[0]) < 77:  # only without build isolation: pyproject.toml asks for it otherwise
    raise SystemExit(
        f"dass is built with setuptools 77 or later, and this environment has {setuptools.__version__}. "
        "Either: pip install 'setuptools>=77,<82' (torch bounds it), "
        "or build with isolation: pip install -e . (without --no-build-isolation)"
    )


def _outer_site_packages():
    """Where the surrounding environment keeps its packages, with those of the system where it shows them."""
    paths = [sysconfig.get_paths()]
    configuration = Path(sys.prefix, "pyvenv.cfg")
    if configuration.exists() and "include-system-site-packages = true" in configuration.read_text().lower():
        base = {"base": sys.base_prefix, "platbase": sys.base_exec_prefix}
        paths.append(sysconfig.get_paths(vars=base))
    return dict.fromkeys(p[key] for p in paths for key in ("purelib", "platlib"))


for _folder in _outer_site_packages():
    if _folder not in sys.path:
        site.addsitedir(_folder)  # appends, and follows .pth files as the interpreter would

build_wheel = build_meta.build_wheel
build_sdist = build_meta.build_sdist
build_editable = build_meta.build_editable
prepare_metadata_for_build_wheel = build_meta.prepare_metadata_for_build_wheel
prepare_metadata_for_build_editable = build_meta.prepare_metadata_for_build_editable
get_requires_for_build_sdist = build_meta.get_requires_for_build_sdist


def get_requires_for_build_wheel(config_settings=None):
    """Nothing beyond pyproject.toml, except torch itself where the environment has none."""
    return [] if find_spec("torch") else ["torch>=2.11", "numpy"]


get_requires_for_build_editable = get_requires_for_build_wheel
