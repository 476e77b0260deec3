"""Does distillation help? The same student with and without a teacher, several seeds, the same clips and steps.

    python benchmarks/distillation.py                       # ESC-10 with the cached scores of YAMNet, 5 seeds
    python benchmarks/distillation.py --corpus synthetic    # the built-in corpus with the demonstration's teacher

The loss, its weight and temperature are the presets' unless options say otherwise: nothing is chosen by what is reported.
Every seed is a pair: both arms get the same split, weights, order and augmentation. Figures are of the last epoch's weights
(their moving average), not of the best epoch, so that nothing is chosen by the clips it is measured on. A killed benchmark
continues; finished runs are found in --runs.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from dataclasses import replace
from pathlib import Path

import torch
from machine import describe

from dass.checkpoint import write_json
from dass.config import TrainConfig, load_preset
from dass.run_log import read_metrics
from dass.train import with_trained_teacher
from dass.trainer import Trainer

ESC10 = Path(__file__).resolve().parents[2] / "shared" / "data" / "esc10"
FIGURES = ("accuracy", "map", "validation_loss", "loss")


def esc10_config(data: Path, scores: Path, epochs: int) -> TrainConfig:
    """DASS-tiny on ESC-10: 10 classes, five-second clips, recordings (not clips) divided between training and held out."""
    config = load_preset("folder")
    return replace(
        config,
        data=replace(config.data, train=data, clip_seconds=5.12, mel_bins=40, holdout_fraction=0.4, workers=0),
        train=replace(config.train, epochs=epochs, batch_size=10, eval_every=epochs),
        optimizer=replace(config.optimizer, learning_rate=1e-3, head_factor=10.0),
        schedule=replace(config.schedule, warmup_steps=20),
        distill=replace(config.distill, teacher=(str(scores),), class_map="esc50-audioset"),
    )


def synthetic_config(epochs: int) -> TrainConfig:
    """The demonstration's student on 1,000 clips, where labels alone leave something to be learnt; its teacher has learnt
    from 8,000."""
    demo = with_trained_teacher(load_preset("demo"))
    few = replace(demo.data, epoch_clips=None, workers=0, synthetic=replace(demo.data.synthetic, train_clips=1000))
    return replace(demo, data=few, train=replace(demo.train, epochs=epochs, eval_every=epochs))


def run_arm(config: TrainConfig, folder: Path, seed: int, distilled: bool) -> dict[str, float]:
    """The last epoch's figures of one run, on test clips where there are any; a finished run is read, not repeated."""
    distill = config.distill if distilled else replace(config.distill, teacher=(), class_map=None)
    run = replace(
        config,
        data=replace(config.data, holdout_seed=seed),
        train=replace(config.train, seed=seed),
        distill=distill,
        run=replace(config.run, folder=folder / f"{'distilled' if distilled else 'labels'}-{seed}"),
        log=replace(config.log, tensorboard=False, progress="off"),
    )
    Trainer(run).fit()
    records = {record["event"]: record for record in read_metrics(run.run.folder / "metrics.jsonl")}  # the last of each
    last = records.get("test", records["epoch"])
    return {name: last[name] for name in FIGURES if name in last}


def summary(rows: list[dict[str, float]]) -> dict[str, dict[str, float | None]]:
    """Mean and standard deviation (over seeds, n - 1; None of one seed) of each figure."""
    return {
        name: {
            "mean": statistics.fmean(row[name] for row in rows),
            "standard_deviation": statistics.stdev(row[name] for row in rows) if len(rows) > 1 else None,
        }
        for name in rows[0]
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corpus", choices=("esc10", "synthetic"), default="esc10")
    parser.add_argument("--data", type=Path, default=ESC10, help="ESC-50's layout (default: %(default)s)")
    parser.add_argument("--scores", type=Path, help="teacher's scores (default: yamnet_scores.npz in --data)")
    parser.add_argument("--seeds", type=int, default=5, help="number of pairs (default: %(default)s)")
    parser.add_argument(
        "--first-seed",
        type=int,
        default=0,
        help="the first pair; others than those reported are for trying (default: 0)",
    )
    parser.add_argument("--epochs", type=int, help="epochs of a run (default: 40 on esc10, 5 on synthetic)")
    parser.add_argument("--loss", default="kldiv", help="distillation loss (default: %(default)s)")
    parser.add_argument(
        "--weight",
        type=float,
        help="share of the distillation loss (default: 0.5, the paper's; the preset's on synthetic)",
    )
    parser.add_argument("--temperature", type=float, default=1.0, help="temperature (default: %(default)s)")
    parser.add_argument("--runs", type=Path, default=Path("runs/benchmark-distillation"), help="folder of the runs")
    parser.add_argument("--threads", type=int, help="threads (default: torch's)")
    parser.add_argument("--json", type=Path, help="file for the figures")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    if options.corpus == "esc10":
        scores = options.scores or options.data / "yamnet_scores.npz"
        if not scores.is_file():
            print(f"no {scores}: name the clips with --data and the teacher's scores with --scores", file=sys.stderr)
            return 1
        config = esc10_config(options.data, scores, options.epochs or 40)
    else:
        config = synthetic_config(options.epochs or 5)
    weight = config.distill.weight if options.weight is None else options.weight
    distill = replace(config.distill, loss=options.loss, weight=weight, temperature=options.temperature)
    config = replace(config, distill=distill)

    arms: dict[str, list[dict[str, float]]] = {"labels alone": [], "distilled": []}
    folder = (
        options.runs / f"{options.corpus}-{options.loss}-w{weight:g}-t{options.temperature:g}-e{config.train.epochs}"
    )
    for seed in range(options.first_seed, options.first_seed + options.seeds):
        for arm, rows in arms.items():
            rows.append(run_arm(config, folder, seed, distilled=arm == "distilled"))
            print(f"seed {seed}, {arm}: " + ", ".join(f"{k} {v:.4f}" for k, v in rows[-1].items()), flush=True)

    pairs = list(zip(arms["distilled"], arms["labels alone"], strict=True))
    gain = [{name: with_kd[name] - without[name] for name in with_kd} for with_kd, without in pairs]
    table = {**{arm: summary(rows) for arm, rows in arms.items()}, "difference": summary(gain)}
    names = list(gain[0])
    print(f"\n{options.corpus}, {options.seeds} seeds, {config.train.epochs} epochs, {options.loss}, w = {weight:g}")
    print(f"{'':<14}" + "".join(f"{name.replace('_', ' '):>22}" for name in names))
    for arm, figures in table.items():
        cells = (
            f"{found['mean']:.4f}"
            + ("" if found["standard_deviation"] is None else f" +- {found['standard_deviation']:.4f}")
            for found in (figures[name] for name in names)
        )
        print(f"{arm:<14}" + "".join(f"{cell:>22}" for cell in cells))
    if options.json:
        about = {
            "corpus": options.corpus,
            "epochs": config.train.epochs,
            "loss": options.loss,
            "weight": weight,
            "temperature": options.temperature,
            "seeds": list(range(options.first_seed, options.first_seed + options.seeds)),
        }
        write_json(options.json, {"machine": describe("cpu"), **about, "runs": arms, "summary": table})
    return 0


if __name__ == "__main__":
    sys.exit(main())
