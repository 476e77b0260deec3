"""Neural teachers: AST and other transformers classifiers, the original AST `.pth`, and DASS; one interface.

Every teacher here maps a batch to logits over its own classes. Spectrogram teachers are given the student's augmented
spectrogram, renormalised and padded to what they were trained on; waveform teachers the augmented waveform (spectrogram
masks do not reach them).
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dass.audio import LogMelConfig, resample
from dass.checkpoint import read_state
from dass.manifest import LabelClass

if TYPE_CHECKING:
    from dass.data import Batch

AST_HEAD_WIDTH = 64  # every published AST has hidden size / 64 attention heads
AST_MEL_BINS = 128
AST_STATISTICS = {527: (-4.2677393, 4.5689974), 50: (-6.6268077, 5.358466), 35: (-6.845978, 5.5654526)}
AST_LAYOUTS = [(stride, frames) for stride in (10, 16, 12, 14, 8) for frames in (1024, 512, 256, 128, 1056, 998)]


class TeacherError(ValueError):
    """A teacher that cannot be used: the message names it, what is wrong and the way out."""


class SpectrogramTeacher:
    """A frozen classifier of spectrograms.

    model: (batch, frames, mel bins) -> logits (batch, classes); front_end: what it was trained on; its `frames` is the
    one length it takes, or any will do with `any_length`. `named` is False for numbered classes of a file without names.
    """

    hears = "spectrograms"

    def __init__(
        self,
        model: nn.Module,
        classes: tuple[LabelClass, ...],
        front_end: LogMelConfig,
        name: str,
        *,
        any_length: bool = False,
        named: bool = True,
    ):
        self.model = model.eval().requires_grad_(False)
        self.classes, self.front_end, self.name, self.named = classes, front_end, name, named
        self.frames = None if any_length else front_end.frames
        self.scale, self.shift = 1.0, 0.0

    def attach(self, front_end: LogMelConfig, classes: tuple[LabelClass, ...]) -> None:
        """Make ready for batches of this front end; a file without class names takes these, if their number is its."""
        for key in ("sample_rate", "mel_bins", "frame_shift"):
            own, other = getattr(self.front_end, key), getattr(front_end, key)
            if own != other:
                raise TeacherError(
                    f"teacher {self.name}: its front end has {key} {own}, the student's {other}; give the student the "
                    "same, or compute the teacher's scores first with python -m dass.teacher cache"
                )
        self.scale = front_end.std / self.front_end.std
        self.shift = (front_end.mean - self.front_end.mean) / (2 * self.front_end.std)
        if not self.named and len(classes) == len(self.classes):
            self.classes = classes

    def to(self, device: torch.device) -> SpectrogramTeacher:
        self.model.to(device)
        return self

    @torch.no_grad()
    def logits(self, batch: Batch) -> Tensor:
        """(batch, classes) logits; longer input than the teacher takes is heard in parts and averaged."""
        fbank = batch.fbank if self.scale == 1 and self.shift == 0 else batch.fbank * self.scale + self.shift
        frames = fbank.shape[1]
        if self.frames is None or frames == self.frames:
            return self.model(fbank)
        parts = -(-frames // self.frames)
        # Padding is silence of the teacher's own front end, as if the waveform had been zero-padded by it.
        fbank = F.pad(fbank, (0, 0, 0, parts * self.frames - frames), value=self.front_end.padding)
        fbank = fbank.reshape(len(fbank) * parts, self.frames, -1)
        return self.model(fbank).unflatten(0, (-1, parts)).mean(1)


class WaveformTeacher:
    """A frozen transformers classifier with its own feature extractor, given the augmented waveforms."""

    hears = "waveforms"

    def __init__(self, model: nn.Module, extractor: Any, classes: tuple[LabelClass, ...], name: str):
        self.model = model.eval().requires_grad_(False)
        self.extractor, self.classes, self.name = extractor, classes, name
        self.sample_rate = extractor.sampling_rate
        self.device = torch.device("cpu")

    def attach(self, front_end: LogMelConfig, classes: tuple[LabelClass, ...]) -> None:
        """Make ready for batches of this front end."""
        self.sample_rate = front_end.sample_rate

    def to(self, device: torch.device) -> WaveformTeacher:
        self.model.to(device)
        self.device = device
        return self

    @torch.no_grad()
    def logits(self, batch: Batch) -> Tensor:
        """(batch, classes) logits of the waveforms, each at its own length."""
        rate = self.extractor.sampling_rate
        waveforms = []
        for waveform, length in zip(batch.waveform.float(), batch.lengths.tolist(), strict=True):
            waveforms.append(resample(waveform[:length], self.sample_rate, rate).cpu().numpy())
        features = self.extractor(waveforms, sampling_rate=rate, return_tensors="pt", padding=True)
        return self.model(**{key: value.to(self.device) for key, value in features.items()}).logits


class TransformersClassifier(nn.Module):
    """A transformers spectrogram classifier as a plain module: (batch, frames, mel bins) -> logits (batch, classes)."""

    def __init__(self, model: nn.Module, front_end: LogMelConfig):
        super().__init__()
        self.model, self.front_end = model, front_end

    def forward(self, fbank: Tensor) -> Tensor:
        return self.model(input_values=fbank).logits

    def save_pretrained(self, folder: str | Path) -> None:
        """A transformers folder: weights, config.json, and preprocessor_config.json with the front end's numbers."""
        from transformers import ASTFeatureExtractor

        with _quiet_transformers():
            self.model.save_pretrained(folder)
        front_end = self.front_end
        ASTFeatureExtractor(
            sampling_rate=front_end.sample_rate,
            num_mel_bins=front_end.mel_bins,
            max_length=front_end.frames,
            mean=front_end.mean,
            std=front_end.std,
        ).save_pretrained(folder)


def build_small_ast(
    classes: tuple[LabelClass, ...],
    front_end: LogMelConfig,
    *,
    layers: int = 3,
    intermediate: int = 256,
    patch: int | None = None,
) -> TransformersClassifier:
    """A small AST of width 128 with random weights, for training where there is none: 0.4 million parameters.

    patch: side of its patches, which do not overlap; None: 8 where that makes at most 1024 of them, otherwise 16.
    """
    from transformers import ASTConfig, ASTForAudioClassification

    if patch is None:
        patch = 8 if front_end.mel_bins * front_end.frames <= 1024 * 8**2 else 16
    config = ASTConfig(
        hidden_size=128,
        num_hidden_layers=layers,
        num_attention_heads=4,
        intermediate_size=intermediate,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        initializer_range=0.05,  # the usual 0.02 suits a width of 768; at 128 almost nothing would pass the first layers
        patch_size=patch,
        frequency_stride=patch,
        time_stride=patch,
        max_length=front_end.frames,
        num_mel_bins=front_end.mel_bins,
        num_labels=len(classes),
        id2label={entry.index: entry.id for entry in classes},
        label2id={entry.id: entry.index for entry in classes},
    )
    return TransformersClassifier(ASTForAudioClassification(config), front_end)


def load_transformers(source: str) -> SpectrogramTeacher | WaveformTeacher:
    """Any AutoModelForAudioClassification from a folder or the hub. Raises TeacherError where it cannot be loaded."""
    _require_transformers(source)
    from transformers import AutoFeatureExtractor, AutoModelForAudioClassification

    try:
        with _quiet_transformers():
            model = AutoModelForAudioClassification.from_pretrained(source)
        extractor = AutoFeatureExtractor.from_pretrained(source)
    except (OSError, ValueError, KeyError) as error:
        reason = str(error).strip().splitlines()[0]
        raise TeacherError(f"teacher {source}: transformers cannot load it as an audio classifier: {reason}") from error
    classes = classes_of(model.config.id2label)
    if model.config.model_type != "audio-spectrogram-transformer":
        return WaveformTeacher(model, extractor, classes, source)
    front_end = LogMelConfig(
        sample_rate=extractor.sampling_rate,
        mel_bins=extractor.num_mel_bins,
        frames=model.config.max_length,
        mean=extractor.mean,
        std=extractor.std,
    )
    return SpectrogramTeacher(TransformersClassifier(model, front_end), classes, front_end, source)


def load_original_ast(path: Path) -> SpectrogramTeacher:
    """A `.pth` of the original AST code (arXiv 2104.01778), its sizes found from the tensors.

    The file holds neither class names nor the front end's mean and deviation: those are the published ones of the data
    set with this number of classes (Speech Commands 35, ESC-50 50), otherwise AudioSet's.
    """
    _require_transformers(str(path))
    from transformers import ASTConfig, ASTForAudioClassification

    tensors = {re.sub(r"^module\.", "", name): value for name, value in read_state(path).items()}
    if not is_original_ast(tensors):
        raise TeacherError(f"teacher {path}: holds no original AST (no tensor v.pos_embed or mlp_head.1.weight)")
    hidden = tensors["v.cls_token"].shape[-1]
    layers = 1 + max(int(name.split(".")[2]) for name in tensors if name.startswith("v.blocks."))
    patch = tensors["v.patch_embed.proj.weight"].shape[-1]
    count = len(tensors["mlp_head.1.bias"])
    mean, std = AST_STATISTICS.get(count, AST_STATISTICS[527])
    stride, frames = _ast_layout(tensors["v.pos_embed"].shape[1] - 2, patch, path)
    front_end = LogMelConfig(mel_bins=AST_MEL_BINS, frames=frames, mean=mean, std=std)
    config = ASTConfig(
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=hidden // AST_HEAD_WIDTH,
        intermediate_size=len(tensors["v.blocks.0.mlp.fc1.bias"]),
        layer_norm_eps=1e-6,
        patch_size=patch,
        frequency_stride=stride,
        time_stride=stride,
        max_length=frames,
        num_mel_bins=AST_MEL_BINS,
        num_labels=count,
    )
    model = ASTForAudioClassification(config)
    newer = any(".layers.0." in name for name in model.state_dict())
    report = model.load_state_dict(rename_original_ast(tensors, newer), strict=False)
    if report.missing_keys or report.unexpected_keys:
        raise TeacherError(
            f"teacher {path}: the AST lacks {report.missing_keys[:4]} and has unexpected {report.unexpected_keys[:4]}"
        )
    classes = classes_of({index: str(index) for index in range(count)})
    return SpectrogramTeacher(TransformersClassifier(model, front_end), classes, front_end, str(path), named=False)


def is_original_ast(names: Any) -> bool:
    """Whether tensor names are those of the original AST code (a leading `module.` taken off)."""
    return {"v.pos_embed", "v.cls_token", "mlp_head.1.weight"} <= set(names)


def rename_original_ast(tensors: dict[str, Tensor], newer: bool) -> dict[str, Tensor]:
    """Original AST tensors under the names of transformers' ASTForAudioClassification.

    newer: the names of transformers 5 (`layers.0.attention.q_proj`), else those of 4 (`encoder.layer.0...query`).
    """
    body = "audio_spectrogram_transformer."
    fixed = {
        "v.cls_token": body + "embeddings.cls_token",
        "v.dist_token": body + "embeddings.distillation_token",
        "v.pos_embed": body + "embeddings.position_embeddings",
        "v.patch_embed.proj.": body + "embeddings.patch_embeddings.projection.",
        "v.norm.": body + "layernorm.",
        "mlp_head.0.": "classifier.layernorm.",
        "mlp_head.1.": "classifier.dense.",
    }
    layer = body + ("layers." if newer else "encoder.layer.")
    attention = "attention." if newer else "attention.attention."
    query, key, value = ("q_proj", "k_proj", "v_proj") if newer else ("query", "key", "value")
    inner = {
        "norm1.": "layernorm_before.",
        "norm2.": "layernorm_after.",
        "attn.proj.": "attention.o_proj." if newer else "attention.output.dense.",
        "mlp.fc1.": "mlp.fc1." if newer else "intermediate.dense.",
        "mlp.fc2.": "mlp.fc2." if newer else "output.dense.",
    }
    renamed = {}
    for name, tensor in tensors.items():
        block = re.match(r"v\.blocks\.(\d+)\.(.+)", name)
        if block is None:
            # v.head and v.head_dist are the image classifier that the AST was initialised from.
            for old, new in fixed.items():
                if name == old or (old.endswith(".") and name.startswith(old)):
                    renamed[new + name[len(old) :]] = tensor
            continue
        number, rest = block.groups()
        if rest.startswith("attn.qkv."):
            kind = rest.removeprefix("attn.qkv.")
            for part, piece in zip((query, key, value), tensor.chunk(3), strict=True):
                renamed[f"{layer}{number}.{attention}{part}.{kind}"] = piece
            continue
        for old, new in inner.items():
            if rest.startswith(old):
                renamed[f"{layer}{number}.{new}{rest[len(old) :]}"] = tensor
    return renamed


def classes_of(id2label: dict[Any, str]) -> tuple[LabelClass, ...]:
    """Classes of a transformers configuration, where one string is both id and name."""
    ordered = sorted((int(index), str(label)) for index, label in id2label.items())
    return tuple(LabelClass(index, label, label) for index, label in ordered)


def _ast_layout(positions: int, patch: int, path: Path) -> tuple[int, int]:
    """Stride and frames of an AST with this number of patches; the usual ones first, then any length at stride 10."""
    for stride, frames in AST_LAYOUTS:
        if ((AST_MEL_BINS - patch) // stride + 1) * ((frames - patch) // stride + 1) == positions:
            return stride, frames
    rows = (AST_MEL_BINS - patch) // 10 + 1
    if positions % rows == 0:
        return 10, (positions // rows - 1) * 10 + patch
    raise TeacherError(
        f"teacher {path}: an AST with {positions} patches of {AST_MEL_BINS} mel bins is of no known layout"
    )


@contextmanager
def _quiet_transformers() -> Iterator[None]:
    """Without transformers' bars, which would run across ours."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.enable_progress_bar()


def _require_transformers(source: str) -> None:
    try:
        import transformers  # noqa: F401
    except ImportError as error:
        raise TeacherError(f"teacher {source} needs the package transformers: pip install 'dass[teachers]'") from error
