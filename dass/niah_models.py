"""The models that a needle-in-a-haystack test takes, behind one call: spectrogram of any length in, logits out.

A specification is `[NAME=]SOURCE[@WAY]`. SOURCE: a DASS checkpoint or run folder, an AST (a transformers folder, a hub
name or an original `.pth`), or `module:function`. WAY, for what was not made for long input:

    sinusoidal    AST: beyond the trained length, sinusoids in place of the learned positions (the published baseline)
    interpolated  AST: beyond it, the learned positions stretched linearly along time
    windows       any model: hears the input in windows of the trained length, and each class's highest logit counts
"""

from __future__ import annotations

import hashlib
import importlib
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dass.audio import LogMelConfig
from dass.manifest import LabelClass

WAYS = ("sinusoidal", "interpolated", "windows")
HUB_NAME = re.compile(r"^[\w.-]+/[\w.-]+$")
IMPORTED = re.compile(r"^[A-Za-z_][\w.]*:[A-Za-z_][\w.]*$")


class ModelError(ValueError):
    """A model that cannot be used; the message names it and what is wrong."""


@dataclass(frozen=True)
class ModelSpec:
    """`[NAME=]SOURCE[@WAY]`, taken apart; `way` is "" where none is given."""

    name: str
    source: str
    way: str = ""


@dataclass
class NiahModel:
    """A model ready to be tested.

    run: (1, frames, mel_bins) on `device` -> logits (1, classes); front_end: its `frames` is the trained length;
    classes: None where it does not say (those of the evaluation set, then); identity: changes when the weights do.
    """

    name: str
    run: Callable[[Tensor], Tensor]
    front_end: LogMelConfig
    classes: tuple[LabelClass, ...] | None
    parameters: int
    identity: str
    device: torch.device


def parse_spec(text: str) -> ModelSpec:
    """Takes a specification apart. ModelError for an unknown way."""
    named = re.match(r"^([\w.+-]+)=(.+)$", text)
    name, source = named.groups() if named else ("", text)
    way = ""
    if "@" in source and not Path(source).exists():
        source, way = source.rsplit("@", 1)
        if way not in WAYS:
            raise ModelError(f"model {text!r}: after '@' stands {way!r}; expected one of {', '.join(WAYS)}")
    if not name:
        name = source if IMPORTED.match(source) else Path(source).name or source
        name += f"@{way}" if way else ""
    return ModelSpec(name, source, way)


def parse_specs(texts: tuple[str, ...]) -> list[ModelSpec]:
    """Every model's specification; an AST without a way stands for both. ModelError for two of one name."""
    specs = []
    for text in texts:
        spec = parse_spec(text)
        if not (IMPORTED.match(spec.source) or Path(spec.source).exists() or _may_be_on_the_hub(spec.source)):
            raise ModelError(f"model {text!r}: there is no file or folder {spec.source!r}, nor is it module:function")
        if spec.way == "" and is_ast_folder(Path(spec.source)):
            specs += [ModelSpec(f"{spec.name}@{way}", spec.source, way) for way in ("sinusoidal", "interpolated")]
        else:
            specs.append(spec)
    for number, spec in enumerate(specs):
        if spec.name in [other.name for other in specs[:number]]:
            raise ModelError(f"two models are called {spec.name!r}; tell them apart with NAME=SOURCE")
    return specs


def _may_be_on_the_hub(source: str) -> bool:
    """Whether it is written as owner/name, and the owner is not a folder here."""
    return HUB_NAME.match(source) is not None and not Path(source).parent.is_dir()


def load_model(spec: ModelSpec, device: torch.device, backend: str | None = None, attention: str = "sdpa") -> NiahModel:
    """Loads a model. Raises ModelError, or the error of the file's reader, naming what is wrong.

    backend: of DASS's scan operator; attention: of transformers ("sdpa" needs memory in proportion to the length,
    "eager", which the published baseline used, to its square).
    """
    if IMPORTED.match(spec.source) and not Path(spec.source).exists():
        model = _imported(spec, device)
    else:
        model = _from_files(spec, device, backend, attention)
    if spec.way == "windows":
        if model.front_end.frames is None:
            raise ModelError(f"model {spec.name}: @windows needs a trained length, and its front end names none")
        model.run = windowed(model.run, model.front_end)
    return model


def windowed(run: Callable[[Tensor], Tensor], front_end: LogMelConfig, at_once: int = 8) -> Callable[[Tensor], Tensor]:
    """`run` on half-overlapping windows of `front_end.frames` (the last flush with the end), highest logits kept."""
    length = front_end.frames

    def hear(fbank: Tensor) -> Tensor:
        frames = fbank.shape[1]
        if frames <= length:
            return run(F.pad(fbank, (0, 0, 0, length - frames), value=front_end.padding))
        starts = [*range(0, frames - length, max(length // 2, 1)), frames - length]
        best = None
        for first in range(0, len(starts), at_once):
            windows = torch.cat([fbank[:, start : start + length] for start in starts[first : first + at_once]])
            highest = run(windows).amax(0, keepdim=True)
            best = highest if best is None else torch.maximum(best, highest)
        return best

    return hear


class LongAST(nn.Module):
    """A transformers AST for spectrograms (batch, frames, mel_bins) of any length from one patch up.

    At the trained length it is the model as it is. At another the positions of its patches are made anew, as `way` says.
    """

    def __init__(self, model: nn.Module, way: str):
        super().__init__()
        if way not in ("sinusoidal", "interpolated"):
            raise ModelError(f"an AST's positions are 'sinusoidal' or 'interpolated' beyond its length, got {way!r}")
        self.model, self.way = model, way
        self.embeddings = model.audio_spectrogram_transformer.embeddings
        self.learned = self.embeddings.position_embeddings.detach().clone()

    def forward(self, fbank: Tensor) -> Tensor:
        config = self.model.config
        if fbank.shape[1] < config.patch_size:
            raise ModelError(f"an AST needs at least {config.patch_size} frames, one patch; got {fbank.shape[1]}")
        positions = self.positions(fbank.shape[1]).to(fbank.device, self.learned.dtype)
        self.embeddings.position_embeddings = nn.Parameter(positions, requires_grad=False)
        return self.model(input_values=fbank).logits

    def positions(self, frames: int) -> Tensor:
        """(1, 2 + frequency patches x time patches, hidden): positions for an input of this many frames."""
        config = self.model.config
        rows = (config.num_mel_bins - config.patch_size) // config.frequency_stride + 1
        trained = (config.max_length - config.patch_size) // config.time_stride + 1
        columns = (frames - config.patch_size) // config.time_stride + 1
        if columns == trained:
            return self.learned
        if self.way == "sinusoidal":
            return sinusoids(2 + rows * columns, config.hidden_size)[None]
        special, patches = self.learned[:, :2], self.learned[:, 2:]
        grid = patches.reshape(1, rows, trained, -1).permute(0, 3, 1, 2)  # the patches are numbered frequency by time
        grid = F.interpolate(grid.float(), size=(rows, columns), mode="bilinear", align_corners=False)
        return torch.cat([special, grid.permute(0, 2, 3, 1).flatten(1, 2).to(special.dtype)], dim=1)


def sinusoids(count: int, width: int) -> Tensor:
    """(count, width): sines at even and cosines at odd columns, of position / 10000^(2 i / width) (arXiv 1706.03762)."""
    position = torch.arange(count, dtype=torch.float64)[:, None]
    rate = 10000.0 ** (-torch.arange(0, width, 2, dtype=torch.float64) / width)
    table = torch.zeros(count, width, dtype=torch.float64)
    table[:, 0::2] = torch.sin(position * rate)
    table[:, 1::2] = torch.cos(position * rate[: width // 2])
    return table.float()


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out, on the device or here."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    text = str(error).lower()
    signs = ("can't allocate memory", "cannot allocate memory", "out of memory", "bad_alloc", "bad allocation")
    return isinstance(error, (RuntimeError, OSError)) and any(sign in text for sign in signs)


def is_ast_folder(path: Path) -> bool:
    """Whether a folder (of a model or a run) holds a transformers AST."""
    from dass.checkpoint import read_json

    folders = [folder for folder in (path, path / "best") if (folder / "config.json").is_file()]
    if not folders:
        return False
    return read_json(folders[0] / "config.json").get("model_type") == "audio-spectrogram-transformer"


def _from_files(spec: ModelSpec, device: torch.device, backend: str | None, attention: str) -> NiahModel:
    from dass.teacher import load_teacher
    from dass.teacher_models import SpectrogramTeacher, TransformersClassifier

    teacher = load_teacher(spec.source)
    if not isinstance(teacher, SpectrogramTeacher):
        raise ModelError(
            f"model {spec.name}: {spec.source} does not take spectrograms, so no haystack can be given to it"
        )
    module = teacher.model
    identity = fingerprint(module)
    if isinstance(module, TransformersClassifier):  # load_teacher gives an AST, its spectrogram classifier
        module.model.set_attn_implementation(attention)
        module = LongAST(module.model, spec.way) if spec.way != "windows" else module
    elif spec.way in ("sinusoidal", "interpolated"):
        raise ModelError(f"model {spec.name}: @{spec.way} is for an AST, which has positions; {spec.source} has none")
    elif backend is not None:
        module.backend = backend
    module.to(device).eval().requires_grad_(False)
    count = sum(parameter.numel() for parameter in module.parameters())
    return NiahModel(
        spec.name, module, teacher.front_end, teacher.classes if teacher.named else None, count, identity, device
    )


def _imported(spec: ModelSpec, device: torch.device) -> NiahModel:
    """`module:function`; its attributes `front_end` and `classes` (names) are taken where it has them."""
    module_name, attribute = spec.source.split(":")
    if "" not in sys.path:
        sys.path.insert(0, "")  # as `python -m` does: a module in the current folder is found
    try:
        found: object = importlib.import_module(module_name)
        for part in attribute.split("."):
            found = getattr(found, part)
    except (ImportError, AttributeError) as error:
        raise ModelError(f"model {spec.name}: {spec.source} cannot be imported: {error}") from error
    if not callable(found):
        raise ModelError(f"model {spec.name}: {spec.source} is a {type(found).__name__}; expected a function")
    if isinstance(found, nn.Module):
        found.to(device).eval()
    front_end = getattr(found, "front_end", None) or LogMelConfig()
    front_end = front_end if isinstance(front_end, LogMelConfig) else LogMelConfig(**front_end)
    names = getattr(found, "classes", None)
    classes = None if names is None else tuple(LabelClass(i, str(name), str(name)) for i, name in enumerate(names))
    parameters = sum(p.numel() for p in found.parameters()) if isinstance(found, nn.Module) else 0
    identity = fingerprint(found) if isinstance(found, nn.Module) else spec.source
    return NiahModel(spec.name, found, front_end, classes, parameters, identity, device)


def fingerprint(module: nn.Module) -> str:
    """Identity of a module's tensors."""
    digest = hashlib.blake2b(digest_size=10)
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
