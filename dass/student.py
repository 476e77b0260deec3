"""The model that is trained: a DASS of a size, new or from a checkpoint, for the classes and front end of the data."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Literal

from dass.audio import LogMelConfig
from dass.manifest import LabelClass
from dass_ops import Backend

if TYPE_CHECKING:
    from dass.model import DASS


@dataclass(frozen=True)
class StudentConfig:
    """The model that is trained."""

    size: Literal["tiny", "small", "medium"] = "small"
    """Size of a new model; a checkpoint decides it itself."""
    depths: tuple[int, ...] | None = None
    """Blocks in each stage; none: those of the size."""
    dims: tuple[int, ...] | None = None
    """Channels of each stage; none: those of the size."""
    init: str | None = None
    """Checkpoint to start from: a file, a folder, a run, a hub name, or a VMamba ImageNet checkpoint (the paper's
    start); none: random weights."""
    new_head: bool = False
    """Replace the checkpoint's classifier by a new one, even where the number of classes is the same."""
    drop_path: float | None = None
    """Stochastic depth of the last block, a probability; none: the size's (tiny 0, small 0.2, medium 0.3)."""
    gradient_checkpointing: bool = False
    """Compute the blocks again in backward: less memory, about a third more time."""
    compile: bool = False
    """Run the model through torch.compile: slow first steps, faster ones afterwards."""
    backend: str | None = None
    """Implementation of the scan (cpu, cuda, triton, emulated, reference); none: the device's fastest."""

    def __post_init__(self):
        names = [backend.value for backend in Backend]
        if self.backend is not None and self.backend not in names:
            raise ValueError(f"model.backend is {self.backend!r}; expected one of {', '.join(names)}")


def prescribed_front_end(config: StudentConfig) -> LogMelConfig | None:
    """The front end that the checkpoint to start from was trained with, if there is one and it says."""
    if config.init is None:
        return None
    from dass.pretrained import read_checkpoint

    front_end = read_checkpoint(config.init).front_end
    return None if front_end is None else LogMelConfig(**front_end)


def build_student(config: StudentConfig, classes: Sequence[LabelClass], front_end: LogMelConfig) -> DASS:
    """A DASS for these classes, in training mode on the CPU; random weights come from torch's global generator."""
    from dass.model import DASS, DASSConfig

    id2label = {entry.index: entry.name for entry in classes}
    if config.init is not None:
        model = DASS.from_pretrained(
            config.init,
            num_classes=len(classes),
            id2label=id2label,
            new_head=config.new_head,
            drop_path_rate=config.drop_path,
            backend=config.backend,
        )
        model.front_end = asdict(front_end)
    else:
        changes = {"depths": config.depths, "dims": config.dims, "drop_path_rate": config.drop_path}
        architecture = DASSConfig.of_size(
            config.size,
            len(classes),
            mel_bins=front_end.mel_bins,
            id2label=id2label,
            **{name: value for name, value in changes.items() if value is not None},
        )
        model = DASS(architecture, front_end=asdict(front_end), backend=config.backend)
    model.set_gradient_checkpointing(config.gradient_checkpointing)
    return model.train()
