"""Loads the compiled parts and, where one cannot be loaded, says in a sentence why.

Nothing here raises at import: a package without its kernels still has the reference, and the function that needs a kernel
repeats the sentence.
"""

import importlib
from functools import cache
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

import torch

FOLDER = Path(__file__).parent


def _find(module: str) -> Path | None:
    return next((path for suffix in EXTENSION_SUFFIXES if (path := FOLDER / f"{module}{suffix}").exists()), None)


@cache
def compiled_info():
    """The module dass_ops._build_info, or None where nothing was compiled."""
    if _find("_build_info") is None:
        return None
    return importlib.import_module("dass_ops._build_info")


@cache
def problem(module: str) -> str:
    """Loads dass_ops.`module` (_C, _emulated or _cuda) once; an empty string, or why that cannot be."""
    info = compiled_info()
    path = _find(module)
    if path is None:
        reason = getattr(info, "no_cuda", "") if module == "_cuda" else ""
        return f"dass_ops.{module} was not built" + (f" ({reason})" if reason else "")
    if info is not None and info.torch != torch.__version__:
        return (
            f"dass_ops was compiled for torch {info.torch} and this is torch {torch.__version__} "
            "(rebuild it: pip install --force-reinstall --no-deps .)"
        )
    if module != "_C" and (schema := problem("_C")):
        return schema  # the schema lives there
    if module == "_emulated":
        return ""  # loaded once its operators are defined: registration.py
    try:
        load(module)
    except OSError as error:
        return f"dass_ops.{module} could not be loaded ({error})"
    return ""


def load(module: str) -> None:
    """Loads dass_ops.`module`, which registers its operators; OSError where the loader refuses."""
    torch.ops.load_library(str(_find(module)))


def plain(name: str):
    """A function of csrc/plain_calls.cpp; where the extension cannot be loaded, one that has no answer."""
    return (lambda *arguments: None) if problem("_C") else getattr(importlib.import_module("dass_ops._C"), name)
