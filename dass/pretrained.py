"""Checkpoints in the wild: three layouts of the same tensors, read by one set of rules and written in one of them.

1. research .pth       module.v.layers.0.blocks.0.op.x_proj_weight    module.v.classifier.head.weight
2. Hugging Face        dass.layers.0.blocks.0.op.x_proj.weight        head.weight
3. VMamba (ImageNet)   layers.0.blocks.0.op.x_proj_weight             classifier.head.weight, under "model"

Between them tensors differ by reshapes, and in layout 3 by the three input channels of the first convolution.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from operator import mul
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from dass.checkpoint import CheckpointError, read_json, read_state, read_tensors, write_json, write_tensors

if TYPE_CHECKING:
    from dass.model import DASSConfig

TENSORS = "model.safetensors"
PICKLED = "pytorch_model.bin"
CONFIG = "config.json"
PREPROCESSOR = "preprocessor_config.json"
SUFFIXES = (".safetensors", ".pth", ".pt", ".bin")
CONTAINERS = ("model", "state_dict", "model_state_dict")  # where training programs put the tensors
WRAPPERS = re.compile(r"^((module|_orig_mod)\.)*((v|dass)\.)?")  # DataParallel, torch.compile; the model in them
PUBLISHED_PATCH = {"0": "0", "2": "1", "5": "3", "7": "4"}
RENAMES = (  # layouts 1 and 3, then 2, to the names of `DASS`
    (re.compile(r"^patch_embed\.([0257])\."), lambda m: f"patch_embeddings.projection.{PUBLISHED_PATCH[m[1]]}."),
    (re.compile(r"^classifier\."), ""),
    (re.compile(r"\.downsample\.1\."), ".downsample.down."),
    (re.compile(r"\.downsample\.3\."), ".downsample.norm."),
    (re.compile(r"\.(x_proj|dt_projs)\.weight$"), r".\1_weight"),
)
BLOCK = re.compile(r"^layers\.(\d+)\.blocks\.(\d+)\.")
FIRST_CONV = "patch_embeddings.projection.0.weight"
AUDIOSET_CLASSES = 527
SHOWN = 8  # names in a message


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint as it lies in a file: tensors under the names of `DASS`, and what its folder says of it."""

    path: Path
    tensors: dict[str, Tensor]
    given_names: dict[str, str]  # ours -> the file's
    config: dict[str, Any] = field(default_factory=dict)  # config.json, or empty
    front_end: dict[str, Any] | None = None

    @property
    def of_images(self) -> bool:
        """Whether this is a VMamba for pictures: the first convolution reads three colours."""
        weight = self.tensors.get(FIRST_CONV)
        return weight is not None and weight.ndim == 4 and weight.shape[1] == 3


def our_name(name: str) -> str:
    """The name in `DASS` of a tensor of any of the layouts."""
    name = WRAPPERS.sub("", name, count=1)
    for pattern, replacement in RENAMES:
        name = pattern.sub(replacement, name)
    return name


def published_name(name: str) -> str:
    """The name in layout 2 of a parameter of `DASS`."""
    name = re.sub(r"\.(x_proj|dt_projs)_weight$", r".\1.weight", name)
    return name if name.startswith("head.") else f"dass.{name}"


def read_checkpoint(source: str | Path, *, revision: str | None = None) -> Checkpoint:
    """Finds and reads a checkpoint: a file, a folder, a run folder, or a name on the hub (`DASS.from_pretrained`)."""
    path = locate(source, revision)
    state = read_tensors(path) if path.suffix == ".safetensors" else read_state(path)
    tensors: dict[str, Tensor] = {}
    given: dict[str, str] = {}
    for name, tensor in _find_tensors(state, path).items():
        ours = our_name(name)
        if ours in tensors:
            raise CheckpointError(f"{path} holds {ours} twice: as {given[ours]!r} and as {name!r}.")
        tensors[ours], given[ours] = tensor, name
    if not any(BLOCK.match(name) for name in tensors):
        raise CheckpointError(
            f"{path} is not a DASS checkpoint: none of its {len(tensors)} tensors ({_some(given.values())}) belongs to "
            "a block (layers.0.blocks.0...). Expected a folder of save_pretrained, a published DASS, or a VMamba "
            "ImageNet checkpoint."
        )
    config = read_json(path.parent / CONFIG) if (path.parent / CONFIG).is_file() else {}
    front_end = config.get("front_end")
    if front_end is None and (path.parent / PREPROCESSOR).is_file():
        front_end = _published_front_end(read_json(path.parent / PREPROCESSOR))
    return Checkpoint(path, tensors, given, config, front_end)


def locate(source: str | Path, revision: str | None = None) -> Path:
    """The file with the tensors of a checkpoint named by a file, a folder, a run folder or a name on the hub."""
    path = Path(source).expanduser()
    if path.is_dir():
        return _in_folder(path)
    if path.exists():
        return path
    if isinstance(source, str) and re.fullmatch(r"[\w.-]+/[\w.-]+", source) and path.suffix not in SUFFIXES:
        return _in_folder(_download(source, revision))
    raise FileNotFoundError(
        f"There is no checkpoint {str(source)!r}: no such file or folder, nor a name on the hub (owner/name)."
    )


def _in_folder(folder: Path) -> Path:
    for candidate in (folder / TENSORS, folder / PICKLED, folder / "best" / TENSORS):
        if candidate.is_file():
            return candidate
    files = sorted(p for p in folder.iterdir() if p.suffix in SUFFIXES and not p.name.startswith("."))
    if len(files) == 1:
        return files[0]
    found = f"several checkpoints ({_some(p.name for p in files)}): name one" if files else "no checkpoint"
    last = f" There is {folder / 'last'}, a run's last state." if (folder / "last" / TENSORS).is_file() else ""
    raise CheckpointError(
        f"{folder} holds {found}. Expected {TENSORS}, a run's best/{TENSORS}, or a single file "
        f"of {', '.join(SUFFIXES)}.{last}"
    )


def _download(repository: str, revision: str | None) -> Path:
    try:
        from huggingface_hub import snapshot_download
    except ImportError as error:
        raise CheckpointError(
            f"There is no file or folder {repository!r}, and to fetch it from the hub huggingface_hub is needed: "
            "pip install huggingface_hub."
        ) from error
    try:
        folder = Path(snapshot_download(repository, revision=revision, allow_patterns=[TENSORS, CONFIG, PREPROCESSOR]))
        if not (folder / TENSORS).is_file():
            snapshot_download(repository, revision=revision, allow_patterns=[PICKLED])
    except Exception as error:  # the hub's own errors, the network's, the disk's: all mean that it did not come
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise CheckpointError(
            f"There is no file or folder {repository!r}, and it could not be fetched from the hub: {reason}"
        ) from error
    return folder


def _find_tensors(state: object, path: Path) -> dict[str, Tensor]:
    """The named tensors in what a file holds: itself, or the part of it that training programs keep them in."""
    if isinstance(state, Mapping):
        for part in [state[key] for key in CONTAINERS if key in state] + [state]:
            if isinstance(part, Mapping):
                tensors = {str(k): v for k, v in part.items() if isinstance(v, Tensor)}
                if tensors:
                    return tensors
        kind = f"a dict with {_some(map(str, state))}" if state else "an empty dict"
    else:
        kind = f"a {type(state).__name__}"
    raise CheckpointError(f"{path} holds no named tensors but {kind}. Expected a model's state dict.")


def _published_front_end(preprocessor: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of `LogMelConfig` from the published feature extractor's; its frame shift is always 10 ms."""
    names = {
        "sample_rate": "sampling_rate",
        "mel_bins": "num_mel_bins",
        "frames": "max_length",
        "mean": "mean",
        "std": "std",
    }
    front_end = {ours: preprocessor[theirs] for ours, theirs in names.items() if theirs in preprocessor}
    if not preprocessor.get("do_normalize", True):
        front_end |= {"mean": 0.0, "std": 0.5}  # (x - mean) / (2 std) then changes nothing
    return front_end


def interpret(
    checkpoint: Checkpoint,
    *,
    num_classes: int | None,
    id2label: Mapping[int, str] | None,
    new_head: bool,
    drop_path_rate: float | None,
) -> tuple[DASSConfig, dict[str, Tensor]]:
    """The configuration that the tensors speak of, and the tensors with what an audio model needs changed."""
    from dass.model import SIZES, DASSConfig, initialise_linear

    tensors, given = dict(checkpoint.tensors), checkpoint.config
    depths, dims = _depths_and_dims(checkpoint)
    if checkpoint.of_images:
        tensors[FIRST_CONV] = tensors[FIRST_CONV].sum(1, keepdim=True)
        num_classes, new_head = num_classes or AUDIOSET_CLASSES, True
    stored = tensors["head.weight"].shape[0] if "head.weight" in tensors else None
    num_classes = num_classes or stored
    if num_classes is None:
        raise CheckpointError(f"{checkpoint.path} has no head (head.weight). Give num_classes for a new one.")
    new_head = new_head or num_classes != stored
    if new_head:
        tensors["head.weight"], tensors["head.bias"] = torch.empty(num_classes, dims[-1]), torch.empty(num_classes)
        initialise_linear(tensors["head.weight"], tensors["head.bias"])
    elif id2label is None and (id2label := given.get("id2label")) and len(id2label) != num_classes:
        warnings.warn(
            f"{checkpoint.path.parent / CONFIG} names {len(id2label)} classes, the head has {num_classes}: "
            "the names are left out.",
            stacklevel=3,
        )
        id2label = None
    presets = {(depths, dims): rate for depths, dims, rate in SIZES.values()}
    if drop_path_rate is None:
        drop_path_rate = given.get("drop_path_rate", presets.get((depths, dims), DASSConfig.drop_path_rate))
    config = DASSConfig(
        depths=depths,
        dims=dims,
        num_classes=num_classes,
        mel_bins=given.get("num_mel_bins", DASSConfig.mel_bins),
        drop_path_rate=drop_path_rate,
        id2label=id2label or None,
    )
    return config, tensors


def _depths_and_dims(checkpoint: Checkpoint) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The number and the width of each stage's blocks; gaps in the numbering are found by `fit`."""
    depths: dict[int, int] = {}
    dims: dict[int, int] = {}
    for name, tensor in checkpoint.tensors.items():
        if match := BLOCK.match(name):
            stage, block = int(match[1]), int(match[2])
            depths[stage] = max(depths.get(stage, 0), block + 1)
            if name.endswith(("norm.weight", "norm2.weight")):
                dims[stage] = tensor.numel()
    stages = range(max(depths) + 1)
    if lost := [stage for stage in stages if stage not in depths or stage not in dims]:
        raise CheckpointError(
            f"{checkpoint.path} is incomplete: of {len(stages)} stages, no norm of a block is there in "
            f"{', '.join(f'layers.{stage}' for stage in lost)}."
        )
    return tuple(depths[stage] for stage in stages), tuple(dims[stage] for stage in stages)


def fit(checkpoint: Checkpoint, tensors: Mapping[str, Tensor], expected: Mapping[str, torch.Size]) -> dict[str, Tensor]:
    """The tensors as float32 in the expected shapes; CheckpointError names all that do not fit."""
    missing = [name for name in expected if name not in tensors]
    unexpected = [checkpoint.given_names[name] for name in tensors if name not in expected]
    misshapen = []
    fitted: dict[str, Tensor] = {}
    for name, shape in expected.items():
        if (tensor := tensors.get(name)) is None:
            continue
        if not tensor.is_floating_point() or not _same_but_for_reshape(tensor.shape, shape):
            given = f"{checkpoint.given_names.get(name, name)} {tuple(tensor.shape)}"
            kind = "" if tensor.is_floating_point() else f" {tensor.dtype}"
            misshapen.append(f"{given}{kind} for {tuple(shape)}")
        else:
            fitted[name] = tensor.to(torch.float32).reshape(shape).contiguous()
    problems = [
        f"{len(names)} {what}: {_some(names)}"
        for what, names in (("missing", missing), ("unexpected", unexpected), ("misshapen", misshapen))
        if names
    ]
    if problems:
        raise CheckpointError(
            f"{checkpoint.path} does not fit a DASS. {'; '.join(problems)}. "
            "The file may be cut short, altered, or another model's."
        )
    return fitted


def _same_but_for_reshape(given: Sequence[int], expected: Sequence[int]) -> bool:
    """Whether one shape comes from the other by merging neighbouring axes: (4, 8, 96) and (32, 96), not (96, 32)."""
    a, b = (set(accumulate((n for n in shape if n != 1), mul, initial=1)) for shape in (given, expected))
    return max(a) == max(b) and (a <= b or b <= a)


def _some(names) -> str:
    names = list(names)
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more


def write_checkpoint(
    folder: str | Path, tensors: Mapping[str, Tensor], config: DASSConfig, front_end: Mapping[str, Any] | None
) -> Path:
    """Writes a checkpoint in layout 2, each file atomically: `DASS.save_pretrained`."""
    folder = Path(folder)
    if front_end is not None:
        write_json(folder / PREPROCESSOR, published_preprocessor(front_end))
    write_json(folder / CONFIG, published_config(config, front_end))
    write_tensors(folder / TENSORS, {published_name(name): _published_shape(name, t) for name, t in tensors.items()})
    return folder


def _published_shape(name: str, tensor: Tensor) -> Tensor:
    return tensor.flatten(0, 1) if name.endswith(("x_proj_weight", "dt_projs_weight")) else tensor


def published_config(config: DASSConfig, front_end: Mapping[str, Any] | None) -> dict[str, Any]:
    """The published model class's config.json, and our front end's numbers as one entry more."""
    labels = config.labels
    described = {
        "architectures": ["DASSForAudioClassification"],
        "model_type": "dass",
        "patch_size": 4,
        "embed_dim": config.dims[0],
        "depths": list(config.depths),
        "dims": list(config.dims),
        "drop_path_rate": config.drop_path_rate,
        "num_classes": config.num_classes,
        "num_mel_bins": config.mel_bins,
        "max_length": (front_end or {}).get("frames") or 1024,
        "use_checkpoint": False,
        "id2label": {str(index): label for index, label in enumerate(labels)},
        "label2id": {label: index for index, label in enumerate(labels)},
    }
    return described if front_end is None else described | {"front_end": dict(front_end)}


def published_preprocessor(front_end: Mapping[str, Any]) -> dict[str, Any]:
    """The published feature extractor's preprocessor_config.json, for the same numbers."""
    return {
        "feature_extractor_type": "DASSFeatureExtractor",
        "feature_size": 1,
        "sampling_rate": front_end["sample_rate"],
        "num_mel_bins": front_end["mel_bins"],
        "max_length": front_end.get("frames") or 1024,
        "mean": front_end["mean"],
        "std": front_end["std"],
        "do_normalize": True,
        "padding_value": 0.0,
        "padding_side": "right",
        "return_attention_mask": False,
    }
