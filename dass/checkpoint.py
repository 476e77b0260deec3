"""Files that are whole or not there: atomic writes; tensors and JSON, with errors that name the file.

A file is written beside its destination under another name and renamed over it, so that a reader, or a run
resumed after it was killed, sees the old content or the new one and never a part.
"""

import json
import os
import secrets
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

LFS_POINTER = b"version https://git-lfs"


class CheckpointError(ValueError):
    """A checkpoint that cannot be read or does not fit: names the file, what is wrong and the way out."""


def atomic_write(path: str | Path, content: bytes | str | Callable[[Path], object]) -> Path:
    """Writes a file so that it appears whole, under its name, or not at all.

    `content`: the bytes, or text (written as UTF-8), or a function that writes the file whose path it is
    given; that path has the suffix of `path`, for writers that choose a format by it (`figure.savefig`).
    Missing folders are made. Returns `path`. Whatever the writer raises is passed on, after the temporary
    file is removed; an earlier `path` is then left as it was.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.stem}.{os.getpid()}-{secrets.token_hex(4)}.tmp{path.suffix}")
    try:
        if callable(content):
            content(temporary)
        else:
            temporary.write_bytes(content.encode() if isinstance(content, str) else content)
        _flush(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    _flush(path.parent)  # the rename itself
    return path


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_json(path: str | Path, value: object) -> Path:
    """Writes `value` as indented JSON, atomically. ValueError for NaN and infinities: JSON has none."""
    return atomic_write(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def read_json(path: str | Path) -> Any:
    """The value in a JSON file. CheckpointError, naming the file, where it is not JSON; FileNotFoundError."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{path} is not JSON ({error}). Restore the file or write it anew.") from error


def write_tensors(path: str | Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> Path:
    """Writes named tensors as safetensors, atomically; bitwise what `read_tensors` gives back, on the CPU.

    `metadata`: further strings for the file's header. Tensors may be on any device, of any strides and
    dtype, and share memory.
    """
    from safetensors.torch import save_file

    packed = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    seen: set[int] = set()
    for name, tensor in packed.items():  # safetensors refuses tensors that share memory
        if tensor.untyped_storage().data_ptr() in seen:
            packed[name] = tensor.clone()
        seen.add(tensor.untyped_storage().data_ptr())
    header = {"format": "pt", **(metadata or {})}  # transformers refuses files without a framework's name
    return atomic_write(path, lambda temporary: save_file(packed, temporary, metadata=header))


def read_tensors(path: str | Path) -> dict[str, Tensor]:
    """The named tensors of a safetensors file, on the CPU. CheckpointError where it is none or cut short."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    path = _existing(path)
    try:
        return load_file(path)
    except (SafetensorError, ValueError, KeyError, TypeError) as error:
        raise _unreadable(path, "a safetensors file", error) from error


def write_state(path: str | Path, state: object) -> Path:
    """Writes nested dicts, lists, numbers, strings and tensors with `torch.save`, atomically."""
    return atomic_write(path, lambda temporary: torch.save(state, temporary))


def read_state(path: str | Path) -> Any:
    """What `torch.save` wrote, on the CPU, as data: nothing in the file is executed (`weights_only=True`).

    CheckpointError where the file is cut short, is something else, or holds objects other than plain data.
    """
    path = _existing(path)
    with path.open("rb") as file:  # what the system forbids is raised here, as it is
        try:
            return torch.load(file, map_location="cpu", weights_only=True)
        except Exception as error:  # damaged bytes make the unpickler raise nearly anything
            raise _unreadable(path, "a PyTorch checkpoint of tensors and plain values", error) from error


def _existing(path: str | Path) -> Path:
    path = Path(path)
    if path.is_dir():
        raise FileNotFoundError(f"{path} is a folder, not a file.")
    if not path.is_file():
        raise FileNotFoundError(f"There is no file {path}.")
    return path


def _unreadable(path: Path, expected: str, error: Exception) -> CheckpointError:
    size = path.stat().st_size
    with path.open("rb") as file:
        head = file.read(64)
    if head.startswith(LFS_POINTER):
        return CheckpointError(
            f"{path} is a Git LFS pointer of {size} bytes, not {expected}. Fetch the content with `git lfs pull`."
        )
    if "weights_only" in str(error) and "GLOBAL" in str(error):
        what = next((line.strip() for line in str(error).splitlines() if "GLOBAL" in line), str(error))
        return CheckpointError(
            f"{path} holds Python objects besides tensors and is not executed ({what}). "
            "If you trust its source, load it with torch.load(..., weights_only=False) and save the tensors."
        )
    reason = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
    return CheckpointError(
        f"{path} ({size:,} bytes) cannot be read as {expected}: {reason}. "
        "It may be cut short or of another kind; fetch or write it again."
    )
