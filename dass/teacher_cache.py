"""`python -m dass.teacher cache`: run a teacher once over all clips of a data set and keep what it says.

    python -m dass.teacher cache --teacher MIT/ast-finetuned-audioset-10-10-0.4593 --data.train train.json \
        --out ast.safetensors

The scores go into `OUT.parts/`, a file every `--part` clips, and are put together at the end; a killed command continues
after the last whole part.
"""

from __future__ import annotations

import math
import shutil
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from dass.checkpoint import read_json, write_json
from dass.config_files import config_to_mapping
from dass.data import AudioDataset, DataConfig, build_loader, open_splits
from dass.distributed import choose_device
from dass.teacher import load_teacher
from dass.teacher_models import TeacherError
from dass.teacher_scores import FORMAT, Scores, pack_scores, read_scores, write_scores


@dataclass(frozen=True)
class CacheConfig:
    """Run a teacher once over the training and held-out clips of a data set, as they are, and write its logits."""

    teacher: str
    """Folder or hub name of a transformers audio classifier, an original AST .pth, or a DASS checkpoint or run."""
    out: Path
    """File to write (.safetensors)."""
    top_k: int | None = None
    """Classes that are kept of each clip, those with the largest logits; none: all. 20 of 527 make 2 million clips 0.3 GB."""
    batch_size: int = 16
    """Clips that go through the teacher at once."""
    part: int = 4096
    """Clips between two saved parts."""
    device: str = "auto"
    """auto (the GPU where there is one), cpu, cuda or cuda:N."""
    precision: Literal["float32", "bf16"] = "float32"
    """Arithmetic of the teacher."""
    restart: bool = False
    """Begin anew, even where parts of an earlier command lie."""
    data: DataConfig = field(default_factory=DataConfig)

    def __post_init__(self) -> None:
        if self.out.suffix != ".safetensors":
            raise ValueError(f"out is {str(self.out)!r}; expected a name that ends with .safetensors")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k is {self.top_k}; expected at least 1 class, or none")


def main(arguments: Sequence[str]) -> int:
    """The command; exit status 0, or 1 after a message."""
    import tyro

    try:
        config = tyro.cli(CacheConfig, args=list(arguments), prog="python -m dass.teacher cache")
        cache_scores(config)
    except (OSError, RuntimeError, ValueError) as error:
        if not type(error).__module__.startswith("dass.") and not isinstance(error, ValueError):
            raise
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def cache_scores(config: CacheConfig) -> Scores:
    """Compute (or go on computing) the scores, write `config.out` and return what it holds."""
    teacher = load_teacher(config.teacher)
    if not hasattr(teacher, "logits"):
        raise TeacherError(f"teacher {config.teacher} holds scores already; the cache is made from a model")
    front_end = getattr(teacher, "front_end", None)
    splits = open_splits(
        replace(config.data, waveforms=teacher.hears == "waveforms", random_crop=False),
        front_end=front_end,
        hashes=True,
    )
    teacher.attach(splits.front_end, splits.classes)
    device = choose_device(config.device)
    teacher.to(device)
    header = {
        "format": FORMAT,
        "teacher": config.teacher,
        "classes": [{"id": entry.id, "name": entry.name} for entry in teacher.classes],
        "front_end": config_to_mapping(splits.front_end),
        "augmentation": "none: each clip from its beginning, cut or padded to the front end's frames",
        "top_k": config.top_k,
    }
    folder = config.out.with_name(config.out.name + ".parts")
    _open_parts(folder, {**header, "part": config.part, "data": config_to_mapping(config.data)}, config.restart)

    parts: list[Path] = []
    for name, dataset in (("train", splits.train), ("held-out", splits.held_out)):
        per_part = max(config.part // config.batch_size, 1)
        for number in range(math.ceil(len(dataset) / (per_part * config.batch_size))):
            path = folder / f"{name}-{number:05d}.safetensors"
            if not path.is_file():
                batches = _batches(dataset, config, number * per_part, per_part)
                write_scores(path, _score(teacher, batches, dataset, device, config, header))
            parts.append(path)
            done = min((number + 1) * per_part * config.batch_size, len(dataset))
            print(f"{name}: {done} of {len(dataset)} clips", flush=True)
    scores = _join([read_scores(path) for path in parts], header)
    write_scores(config.out, scores)
    shutil.rmtree(folder)
    print(f"{config.out}: {len(scores.keys)} clips, {len(teacher.classes)} classes", flush=True)
    return scores


def _open_parts(folder: Path, settings: dict[str, Any], restart: bool) -> None:
    """Make the folder of parts, or see that those in it are of this very command."""
    file = folder / "settings.json"
    settings = {key: value for key, value in settings.items() if key != "data"} | {"data": repr(settings["data"])}
    if file.is_file() and not restart:
        if read_json(file) != settings:
            raise TeacherError(f"{folder} holds parts of another command; remove it, or begin anew with --restart")
        return
    shutil.rmtree(folder, ignore_errors=True)
    write_json(file, settings)


def _batches(dataset: AudioDataset, config: CacheConfig, first: int, count: int) -> Iterator[Any]:
    loader = build_loader(
        dataset, batch_size=config.batch_size, start_batch=first, workers=config.data.workers, training=False
    )
    for number, batch in enumerate(loader):
        if number == count:
            return
        yield batch


@torch.no_grad()
def _score(teacher, batches, dataset: AudioDataset, device: torch.device, config: CacheConfig, header: dict) -> Scores:
    keys: list[str] = []
    names: list[str] = []
    logits: list[np.ndarray] = []
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=config.precision == "bf16")
    for batch in batches:
        keys += batch.audio_hashes
        names += [dataset.name(index) for index in batch.index.tolist()]
        with autocast:
            logits.append(teacher.logits(batch.to(device).with_features(dataset.log_mel)).float().cpu().numpy())
    rows = np.concatenate(logits) if logits else np.zeros((0, len(header["classes"])), np.float32)
    return pack_scores(keys, names, rows, header, config.top_k)


def _join(parts: list[Scores], header: dict[str, Any]) -> Scores:
    """All parts as one; of clips with the same audio the first is kept."""
    keys = np.concatenate([part.keys for part in parts])
    first = np.sort(np.unique(keys, axis=0, return_index=True)[1])
    names = [name for part in parts for name in part.names]

    def joined(name: str) -> np.ndarray | None:
        arrays = [getattr(part, name) for part in parts]
        return None if arrays[0] is None else np.concatenate(arrays)[first]

    return Scores(
        keys=keys[first],
        names=tuple(names[number] for number in first),
        values=joined("values"),
        columns=joined("columns"),
        rest=joined("rest"),
        checks=joined("checks"),
        header=header,
    )
