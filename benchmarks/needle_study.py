"""Needle in a haystack for a DASS trained on real recordings and an AST of like size, trained alike.

    python benchmarks/needle_study.py train            # both models: same clips, same number of steps, labels only
    python benchmarks/needle_study.py grid             # 10 s, 60 s, 10 min in every haystack; goes on where it was
    python benchmarks/needle_study.py hour             # the 1-h cells, fewer needles
    python benchmarks/needle_study.py cost             # time and memory of DASS-small, carried on to 2.5 h

`--corpus fsdd` (spoken digits, the default) or `esc10` (environmental sounds), from `../shared/data` or `--data`. The report
is runs/needle-CORPUS/niah/report.html; that of `cost` is runs/needle-cost/report.html.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import asdict, replace
from pathlib import Path

import torch

from dass import niah
from dass.audio import LogMelConfig
from dass.config import TrainConfig, load_preset

DATA = Path(__file__).resolve().parents[2] / "shared" / "data"
HAYSTACKS = ("mean-spectrum", "silence", "white", "pink", "babble", "recording", "other-clips")


def training(corpus: str, data: Path) -> TrainConfig:
    """Spoken digits: takes 0 to 4 of every speaker are held out. ESC-10: two fifths of the recordings."""
    config = load_preset("folder")
    if corpus == "fsdd":
        chosen = replace(
            config.data, train=data / "fsdd" / "recordings", label_regex=r"^(\d)_", holdout=r"_[0-4]\.wav$", workers=0
        )
        return replace(config, data=chosen)
    chosen = replace(config.data, train=data / "esc10", clip_seconds=5.12, mel_bins=64, holdout_fraction=0.4, workers=0)
    return replace(config, data=chosen, train=replace(config.train, epochs=120, batch_size=10))


def train(corpus: str, data: Path, folder: Path) -> None:
    """Trains what is not trained yet; each continues where it was stopped."""
    from dass.teacher_models import build_small_ast
    from dass.trainer import Trainer

    config = training(corpus, data)
    config = replace(config, log=replace(config.log, tensorboard=False))
    print(Trainer(replace(config, run=replace(config.run, folder=folder / "dass"))).fit().best)
    # The transformer needs a smaller step, the only difference.
    config = replace(
        config,
        run=replace(config.run, folder=folder / "ast"),
        optimizer=replace(config.optimizer, learning_rate=1e-3),
        log=replace(config.log, pictures=False),
    )

    def build(_, classes, front_end):
        model = build_small_ast(tuple(classes), front_end)
        for name, module in model.named_modules():
            # The library's 0.02 suits a width of 768; this narrow one would hardly learn from it.
            if isinstance(module, (torch.nn.Linear, torch.nn.Conv2d)) and "classifier" not in name:
                torch.nn.init.trunc_normal_(module.weight, std=module.weight[0].numel() ** -0.5)
        return model.train()

    print(Trainer(config, build_model=build).fit().best)


def grid(corpus: str, data: Path, folder: Path, lengths: tuple[str, ...], audio: float, positions: int) -> int:
    """The test itself, in `folder`/niah; `audio` [s] of input a cell at most."""
    models = (
        f"DASS-tiny={folder / 'dass'}",
        f"DASS-tiny-windows={folder / 'dass'}@windows",
        f"AST-sinusoidal={folder / 'ast'}@sinusoidal",
        f"AST-interpolated={folder / 'ast'}@interpolated",
    )
    background = data / ("esc10" if corpus == "fsdd" else "fsdd")
    spread = {1: ("0.5",), 3: ("0", "0.5", "1"), 5: ("0", "0.25", "0.5", "0.75", "1")}[positions]
    arguments = [*models, "--lengths", *lengths, "--haystacks", *HAYSTACKS, "--positions", *spread]
    arguments += ["--babble", str(data / "fsdd"), "--recording", str(background)]
    return niah.main([*arguments, "--audio-per-cell", str(audio), "--out", str(folder / "niah")])


def cost(folder: Path, lengths: tuple[str, ...]) -> int:
    """DASS-small with random weights: what a pass costs does not depend on them."""
    from dass.model import DASS, DASSConfig
    from dass.synthetic import synthetic_classes

    checkpoint = folder / "dass-small"
    if not (checkpoint / "config.json").is_file():
        torch.manual_seed(0)
        names = {entry.index: entry.name for entry in synthetic_classes()}
        model = DASS(DASSConfig.small(len(names), id2label=names), front_end=asdict(LogMelConfig()))
        model.save_pretrained(checkpoint)
    arguments = [
        f"DASS-small={checkpoint}",
        "--lengths",
        *lengths,
        "--haystacks",
        "mean-spectrum",
        "--positions",
        "0.5",
    ]
    return niah.main([*arguments, "--needles.clips", "1", "--bootstrap", "1", "--out", str(folder)])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("phase", choices=("train", "grid", "hour", "cost"))
    parser.add_argument("--corpus", choices=("fsdd", "esc10"), default="fsdd")
    parser.add_argument("--data", type=Path, default=DATA, help="folder with fsdd/ and esc10/")
    parser.add_argument("--out", type=Path, default=Path("runs"))
    parser.add_argument("--lengths", nargs="+", help="lengths of the input")
    parser.add_argument("--audio", type=float, help="seconds of input per cell at most, which bounds the needles")
    options = parser.parse_args()
    folder = options.out / f"needle-{options.corpus}"
    if options.phase == "train":
        train(options.corpus, options.data, folder)
        return 0
    if options.phase == "cost":
        return cost(options.out / "needle-cost", tuple(options.lengths or ("10s", "60s", "10min")))
    if options.phase == "grid":
        lengths = tuple(options.lengths or ("needle", "10s", "60s", "10min"))
        return grid(options.corpus, options.data, folder, lengths, options.audio or 3600.0, 3)
    return grid(options.corpus, options.data, folder, tuple(options.lengths or ("1h",)), options.audio or 3600.0, 3)


if __name__ == "__main__":
    sys.exit(main())
