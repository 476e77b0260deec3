"""DASS: from a log-mel spectrogram of any length to the logits of its classes (arXiv 2407.04082).

model = DASS(DASSConfig.small(num_classes=527))
model = DASS.from_pretrained("run/")            # or a checkpoint file, or a name on the Hugging Face hub
logits = model(fbank)                           # (batch, frames, mel bins) -> (batch, classes)
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dass.blocks import PatchEmbeddings, Stage
from dass_ops import Backend

# depths, widths, stochastic depth. small and medium are the published models: 29,884,463 and 48,648,239
# parameters with 527 classes; tiny is for tests, demonstrations and small data.
SIZES: dict[str, tuple[tuple[int, ...], tuple[int, ...], float]] = {
    "tiny": ((1, 1, 2, 1), (24, 48, 96, 192), 0.0),
    "small": ((2, 2, 8, 2), (96, 192, 384, 768), 0.2),
    "medium": ((2, 2, 20, 2), (96, 192, 384, 768), 0.3),
}


@dataclass(frozen=True)
class DASSConfig:
    """The architecture and the classes of a model. The defaults are DASS-small on AudioSet."""

    depths: tuple[int, ...] = SIZES["small"][0]
    """Blocks in each stage."""
    dims: tuple[int, ...] = SIZES["small"][1]
    """Channels of each stage; the first one even."""
    num_classes: int = 527
    """Classes, one logit each."""
    mel_bins: int = 128
    """Mel bins of the input."""
    drop_path_rate: float = SIZES["small"][2]
    """Stochastic depth of the last block while training, probability; rises linearly from 0 at the first."""
    id2label: Mapping[int, str] | None = None
    """The name of each class, by its index from 0; None where they are not known."""

    def __post_init__(self):
        object.__setattr__(self, "depths", tuple(int(n) for n in self.depths))
        object.__setattr__(self, "dims", tuple(int(n) for n in self.dims))
        if not self.depths or len(self.depths) != len(self.dims) or min(self.depths + self.dims) < 1:
            raise ValueError(
                f"depths is {self.depths} and dims is {self.dims}; expected one positive number a stage in each."
            )
        if self.dims[0] % 2:
            raise ValueError(f"dims starts with {self.dims[0]}; expected an even number (half of it is used).")
        for name in ("num_classes", "mel_bins"):
            if (value := getattr(self, name)) < 1:
                raise ValueError(f"{name} is {value}; expected 1 or more.")
        if not 0.0 <= self.drop_path_rate < 1.0:
            raise ValueError(f"drop_path_rate is {self.drop_path_rate}; expected a number from 0 to below 1.")
        if self.id2label is not None:
            names = {int(index): str(label) for index, label in self.id2label.items()}
            if sorted(names) != list(range(self.num_classes)):
                raise ValueError(
                    f"id2label has {len(names)} entries with indices "
                    f"{min(names, default='-')} to {max(names, default='-')}; "
                    f"expected one for each of the {self.num_classes} classes, 0 to {self.num_classes - 1}."
                )
            object.__setattr__(self, "id2label", dict(sorted(names.items())))

    @classmethod
    def of_size(cls, size: str, num_classes: int = 527, **changes: Any) -> DASSConfig:
        """The configuration named "tiny", "small" or "medium"; `changes` are further fields."""
        if size not in SIZES:
            near = difflib.get_close_matches(size, SIZES, 1)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            raise ValueError(f"size is {size!r}; expected one of {', '.join(SIZES)}.{hint}")
        depths, dims, drop_path_rate = SIZES[size]
        preset = {"depths": depths, "dims": dims, "drop_path_rate": drop_path_rate}
        return cls(num_classes=num_classes, **{**preset, **changes})

    @classmethod
    def tiny(cls, num_classes: int = 527, **changes: Any) -> DASSConfig:
        """For tests, demonstrations and small data: 5 blocks, 0.85 million parameters (10 classes)."""
        return cls.of_size("tiny", num_classes, **changes)

    @classmethod
    def small(cls, num_classes: int = 527, **changes: Any) -> DASSConfig:
        """DASS-small: 14 blocks, 30 million parameters."""
        return cls.of_size("small", num_classes, **changes)

    @classmethod
    def medium(cls, num_classes: int = 527, **changes: Any) -> DASSConfig:
        """DASS-medium: 26 blocks, 49 million parameters."""
        return cls.of_size("medium", num_classes, **changes)

    @property
    def labels(self) -> tuple[str, ...]:
        """The class names in order; "class 0", "class 1", ... where they are not known."""
        if self.id2label is None:
            return tuple(f"class {index}" for index in range(self.num_classes))
        return tuple(self.id2label.values())


class DASS(nn.Module):
    """The Distilled Audio State-Space model.

    `front_end`: the numbers of the front end that makes its input (`LogMelConfig` as a dict), kept with the
    checkpoint; None where they are not known. `backend`: which implementation runs the scans (None: the fastest
    that can); also an attribute. Gradient checkpointing: `set_gradient_checkpointing`.
    """

    def __init__(
        self,
        config: DASSConfig | None = None,
        *,
        front_end: Mapping[str, Any] | None = None,
        backend: Backend | str | None = None,
    ):
        super().__init__()
        self.config = config = config or DASSConfig()
        self.front_end = dict(front_end) if front_end is not None else None
        blocks = sum(config.depths)
        rates = [config.drop_path_rate * index / max(1, blocks - 1) for index in range(blocks)]
        self.patch_embeddings = PatchEmbeddings(config.dims[0])
        self.layers = nn.ModuleList()
        for stage, (depth, channels) in enumerate(zip(config.depths, config.dims, strict=True)):
            first = sum(config.depths[:stage])
            following = config.dims[stage + 1] if stage + 1 < len(config.dims) else None
            self.layers.append(Stage(channels, rates[first : first + depth], following, backend=backend))
        self.norm = nn.LayerNorm(config.dims[-1])
        self.head = nn.Linear(config.dims[-1], config.num_classes)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                initialise_linear(module.weight, module.bias)

    def forward(self, fbank: Tensor) -> Tensor:
        """Logits, (batch, classes), of normalised log-mel spectrograms, (batch, frames, mel bins), frames >= 1.

        One logit a class: their sigmoids are the scores of a multi-label model. Computed in the parameters'
        dtype, or under autocast; the head always in the parameters' dtype. ValueError for another shape.
        """
        pooled = self.embed(fbank)
        device = pooled.device.type
        if torch.is_autocast_enabled(device):
            with torch.autocast(device, enabled=False):  # logits in bfloat16 would tie and cost accuracy
                return self.head(pooled)
        return self.head(pooled)

    def embed(self, fbank: Tensor) -> Tensor:
        """What the head sees, (batch, last width): the mean over the map of the normalised last stage."""
        self._check(fbank)
        x = self.patch_embeddings(fbank.to(self.head.weight.dtype))
        for stage in self.layers:
            x = stage(x)
        return self.norm(x).mean((1, 2)).to(self.head.weight.dtype)

    def _check(self, fbank: Tensor) -> None:
        mel_bins = self.config.mel_bins
        if fbank.ndim != 3 or fbank.shape[2] != mel_bins or fbank.shape[1] < 1:
            hint = ""
            if fbank.ndim == 2 and fbank.shape[1] == mel_bins:
                hint = " For a single spectrogram: fbank.unsqueeze(0)."
            elif fbank.ndim == 3 and fbank.shape[1] == mel_bins:
                hint = " It looks transposed: fbank.transpose(1, 2)."
            raise ValueError(
                f"fbank has shape {tuple(fbank.shape)}; expected (batch, frames, {mel_bins} mel bins) "
                f"with 1 frame or more.{hint}"
            )
        if not fbank.is_floating_point():
            raise TypeError(f"fbank is {fbank.dtype}; expected a floating-point log-mel spectrogram.")

    @property
    def backend(self) -> Backend | str | None:
        """Which implementation runs the scans; None: the fastest that can run on the input's device."""
        return self.layers[0].blocks[0].op.backend

    @backend.setter
    def backend(self, backend: Backend | str | None) -> None:
        for stage in self.layers:
            for block in stage.blocks:
                block.op.backend = backend

    def set_gradient_checkpointing(self, enabled: bool = True) -> None:
        """While gradients are recorded, keep only the blocks' inputs and compute their insides again in backward.

        The same gradients, less memory, about a third more time.
        """
        for stage in self.layers:
            stage.gradient_checkpointing = enabled

    @classmethod
    def from_pretrained(
        cls,
        source: str | Path,
        *,
        num_classes: int | None = None,
        id2label: Mapping[int, str] | None = None,
        new_head: bool = False,
        drop_path_rate: float | None = None,
        revision: str | None = None,
        backend: Backend | str | None = None,
    ) -> DASS:
        """A model from a checkpoint, in evaluation mode, float32, on the CPU.

        `source`: a file (.safetensors, .pth, .pt, .bin), a folder that holds one, a run folder (its `best/`), or
        `owner/name` on the Hugging Face hub (at `revision`; needs huggingface_hub). Read are what `save_pretrained`
        wrote, the published Hugging Face and research checkpoints, and VMamba's ImageNet checkpoints, which start
        an audio model: their first convolution is summed over the colours, their head is replaced. Size and number
        of classes are found from the tensors.

        `num_classes`, where it differs from the file's, or `new_head`: a new, untrained head, for training on
        other classes; an ImageNet checkpoint always gets one (of 527 classes if not told). `id2label`,
        `drop_path_rate`: instead of the file's.

        CheckpointError (a ValueError) names what is missing, unexpected or misshapen, or why nothing can be read.
        """
        from dass import pretrained

        checkpoint = pretrained.read_checkpoint(source, revision=revision)
        config, tensors = pretrained.interpret(
            checkpoint,
            num_classes=num_classes,
            id2label=id2label,
            new_head=new_head,
            drop_path_rate=drop_path_rate,
        )
        with torch.random.fork_rng(devices=[]):  # initial values that are replaced do not count as drawn
            model = cls(config, front_end=checkpoint.front_end, backend=backend)
        tensors = pretrained.fit(checkpoint, tensors, {k: v.shape for k, v in model.state_dict().items()})
        model.load_state_dict(tensors, assign=True)
        return model.eval()

    def save_pretrained(self, folder: str | Path) -> Path:
        """Writes `model.safetensors`, `config.json` and, where `front_end` is known, `preprocessor_config.json`.

        The layout is that of the published models on the Hugging Face hub, so that their model class reads it too.
        Each file is replaced whole. Returns the folder.
        """
        from dass import pretrained

        return pretrained.write_checkpoint(folder, self.state_dict(), self.config, self.front_end)


def initialise_linear(weight: Tensor, bias: Tensor | None) -> None:
    """Normal weights of standard deviation 0.02, cut at +-2, and zero biases."""
    nn.init.trunc_normal_(weight, std=0.02)
    if bias is not None:
        nn.init.zeros_(bias)
