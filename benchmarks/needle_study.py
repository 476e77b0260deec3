"""Needle in a haystack for a DASS trained on real recordings and an AST of like size, trained alike.

    python benchmarks/needle_study.py train            # both models: same clips, same number of steps, labels only
    python benchmarks/needle_study.py grid             # 10 s and 60 s in every haystack; goes on where it was
    python benchmarks/needle_study.py minutes          # 10 min: DASS in every haystack, AST in two
    python benchmarks/needle_study.py hour             # 1 h: DASS in every haystack, what AST would take
    python benchmarks/needle_study.py summary          # results/needle-CORPUS.json and a table
    python benchmarks/needle_study.py cost             # time and memory of DASS-small, carried on to 2.5 h

`--corpus fsdd` (spoken digits, the default) or `esc10` (environmental sounds), from `../shared/data` or `--data`. The report
is runs/needle-CORPUS/niah/report.html; that of `cost` is runs/needle-cost/report.html.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict, replace
from pathlib import Path

import torch

from dass import niah
from dass.audio import LogMelConfig
from dass.config import TrainConfig, load_preset

DATA = Path(__file__).resolve().parents[2] / "shared" / "data"
RESULTS = Path(__file__).parent / "results"
HAYSTACKS = ("mean-spectrum", "silence", "white", "pink", "babble", "recording", "other-clips")
LONGEST_PASS = 60.0  # s; an AST's at 1 h is expected to take more, and is recorded as too slow
NEEDLES = ("--audio-per-cell", "1800", "--fewest-needles", "5")  # 180 at 10 s, 30 at 60 s, 5 from 10 min on
DASS, AST = ("DASS-tiny", "DASS-tiny-windows"), ("AST-sinusoidal", "AST-interpolated")
PHASES = {
    "grid": [((*DASS, *AST), ("--lengths", "needle", "10s", "60s", "--haystacks", *HAYSTACKS))],
    "minutes": [
        (DASS, ("--lengths", "10min", "--haystacks", *HAYSTACKS)),
        (AST, ("--lengths", "10min", "--haystacks", "mean-spectrum", "white")),
    ],
    "hour": [
        (DASS[:1], ("--lengths", "1h", "--haystacks", *HAYSTACKS)),
        (AST, ("--lengths", "1h", "--haystacks", "mean-spectrum", "white")),
    ],
}


def training(corpus: str, data: Path) -> TrainConfig:
    """Spoken digits: takes 0 to 4 of every speaker are held out. ESC-10: two fifths of the recordings."""
    config = load_preset("folder")
    config = replace(config, log=replace(config.log, tensorboard=False))
    if corpus == "fsdd":
        chosen = replace(
            config.data,
            train=data / "fsdd" / "recordings",
            label_regex=r"^(\d)_",
            holdout=r"_[0-4]\.wav$",
            mel_bins=64,
            workers=0,
        )
        return replace(config, data=chosen)
    chosen = replace(config.data, train=data / "esc10", clip_seconds=5.12, mel_bins=64, holdout_fraction=0.4, workers=0)
    return replace(config, data=chosen, train=replace(config.train, epochs=120, batch_size=10))


def build_ast(_, classes, front_end):
    """An AST of about DASS-tiny's size, with the patches of 16 x 16 that do not overlap."""
    from transformers import ASTConfig, ASTForAudioClassification

    from dass.teacher_models import TransformersClassifier

    config = ASTConfig(
        hidden_size=128,
        num_hidden_layers=5,
        num_attention_heads=4,
        intermediate_size=384,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        patch_size=16,
        frequency_stride=16,
        time_stride=16,
        max_length=front_end.frames,
        num_mel_bins=front_end.mel_bins,
        num_labels=len(classes),
        id2label={entry.index: entry.id for entry in classes},
        label2id={entry.id: entry.index for entry in classes},
    )
    model = ASTForAudioClassification(config)
    for name, module in model.named_modules():
        # The library's 0.02 suits a width of 768; this narrow one would hardly learn from it.
        if isinstance(module, (torch.nn.Linear, torch.nn.Conv2d)) and "classifier" not in name:
            torch.nn.init.trunc_normal_(module.weight, std=module.weight[0].numel() ** -0.5)
    return TransformersClassifier(model, front_end).train()


def train(corpus: str, data: Path, folder: Path) -> None:
    """Trains what is not trained yet; each continues where it was stopped."""
    from dass.trainer import Trainer

    config = training(corpus, data)
    print(Trainer(replace(config, run=replace(config.run, folder=folder / "dass"))).fit().best)
    # The transformer needs a smaller step, the only difference.
    config = replace(
        config,
        run=replace(config.run, folder=folder / "ast"),
        optimizer=replace(config.optimizer, learning_rate=1e-3),
        log=replace(config.log, pictures=False),
    )
    print(Trainer(config, build_model=build_ast).fit().best)


def run_cells(corpus: str, data: Path, folder: Path, models: tuple[str, ...], *options: str) -> int:
    """Some cells of the test in `folder`/niah: `models` by name, the rest as `python -m dass.niah` takes it."""
    sources = {
        "DASS-tiny": f"{folder / 'dass'}",
        "DASS-tiny-windows": f"{folder / 'dass'}@windows",
        "AST-sinusoidal": f"{folder / 'ast'}@sinusoidal",
        "AST-interpolated": f"{folder / 'ast'}@interpolated",
    }
    held_out = ["--needles.set", str(data / "fsdd" / "recordings"), "--needles.label-regex", r"^(\d)_"]
    held_out += ["--needles.holdout", r"_[0-4]\.wav$"]
    background = data / ("esc10" if corpus == "fsdd" else "fsdd")
    arguments = [f"{name}={sources[name]}" for name in models]
    arguments += ["--positions", "0", "0.5", "1", "--babble", str(data / "fsdd"), "--recording", str(background)]
    arguments += held_out if corpus == "fsdd" else []
    return niah.main(
        [*arguments, *options, *NEEDLES, "--longest-pass", str(LONGEST_PASS), "--out", str(folder / "niah")]
    )


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
    arguments = [f"DASS-small={checkpoint}", "--lengths", *lengths]
    arguments += ["--haystacks", "mean-spectrum", "--positions", "0.5"]
    return niah.main([*arguments, "--needles.clips", "1", "--bootstrap", "1", "--out", str(folder)])


def summarise(folder: Path, corpus: str) -> Path:
    """Means over the positions of every model, haystack and length, as JSON in results/; prints a table."""
    from dass.checkpoint import read_json, write_json
    from dass.niah_store import OK, Store

    groups: dict[tuple, list[dict]] = {}
    for line in Store(folder / "niah").lines.values():
        groups.setdefault((line["model"], line["haystack"], line["snr"], line["length"]), []).append(line)
    rows = []
    for (model, haystack, snr, length), lines in groups.items():
        first = lines[0]
        row = {"model": model, "haystack": haystack, "snr": snr, "length": length, "status": first["status"]}
        if first["status"] != OK:
            rows.append(row | {"error": first["error"]})
            continue
        row |= {"needles": first["clips"], "parameters": first["parameters"]}
        for key in ("map", "chance", "retention", "retention_low", "retention_high", "top1", "seconds"):
            values = [line[key] for line in lines]
            row[key] = None if None in values else float(f"{sum(values) / len(values):.4g}")
        rows.append(row | {"peak_memory_mib": round(max(line["peak_memory"] for line in lines) / 2**20, 1)})
    environment = read_json(folder / "niah" / "environment.json")
    learnt = {}
    for name in ("dass", "ast"):
        records = [json.loads(line) for line in (folder / name / "metrics.jsonl").read_text().splitlines()]
        final = next(record for record in reversed(records) if record["event"] == "final")
        learnt[name] = {key: round(final[key], 4) for key in ("step", "epoch", "accuracy", "map")}
    path = RESULTS / f"needle-{corpus}.json"
    write_json(
        path, {"machine": environment["machine"], "trained": learnt, "cells": rows, "cost": costs(folder.parent)}
    )
    print(table(rows))
    return path


def costs(out: Path) -> list[dict]:
    """Seconds and MiB of a pass of DASS-small in every folder of `cost`, measured alone on the machine."""
    from dass.checkpoint import read_json
    from dass.niah_store import OK, Store

    found = []
    for folder in sorted(out.glob("needle-cost*")):
        configuration = read_json(folder / "environment.json")["configuration"]
        for line in Store(folder).lines.values():
            if line["status"] == OK:
                cost = {"seconds": round(line["seconds"], 3), "peak_memory_mib": round(line["peak_memory"] / 2**20)}
                keys = {"model": line["model"], "precision": configuration["precision"], "length": line["length"]}
                found.append(keys | cost)
    return found


def table(rows: list[dict]) -> str:
    """Markdown: mAP kept, in %, of every model over the lengths, a line for each haystack."""
    from dass.niah_measure import describe_length

    lengths = [length for length in sorted({row["length"] for row in rows}) if length > 0]
    lines = ["| haystack | model | " + " | ".join(describe_length(length) for length in lengths) + " |"]
    lines.append("| --- | --- |" + " ---: |" * len(lengths))
    best = max(row.get("map") or 0.0 for row in rows)
    chance = {row["length"]: row["chance"] / best for row in rows if row.get("chance") is not None}
    cells = {(row["haystack"], row["model"], row["length"]): row for row in rows}
    for haystack in HAYSTACKS:
        for model in dict.fromkeys(row["model"] for row in rows):
            texts = []
            for length in lengths:
                row = cells.get((haystack, model, length))
                kept = row.get("retention") if row else None
                texts.append("" if row is None else row["status"] if kept is None else f"{100 * kept:.0f}")
            lines.append(f"| {haystack} | {model} | " + " | ".join(texts) + " |")
    lines.append("| by chance | | " + " | ".join(f"{100 * chance.get(length, 0):.0f}" for length in lengths) + " |")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("phase", choices=("train", "grid", "minutes", "hour", "summary", "cost"))
    parser.add_argument("--corpus", choices=("fsdd", "esc10"), default="fsdd")
    parser.add_argument("--data", type=Path, default=DATA, help="folder with fsdd/ and esc10/")
    parser.add_argument("--out", type=Path, default=Path("runs"))
    parser.add_argument("--lengths", nargs="+", help="lengths of the input, for cost")
    options = parser.parse_args()
    folder = options.out / f"needle-{options.corpus}"
    if options.phase == "train":
        train(options.corpus, options.data, folder)
        return 0
    if options.phase == "cost":
        return cost(options.out / "needle-cost", tuple(options.lengths or ("10s", "60s", "10min")))
    if options.phase == "summary":
        print(summarise(folder, options.corpus))
        return 0
    for models, arguments in PHASES[options.phase]:
        if status := run_cells(options.corpus, options.data, folder, models, *arguments):
            return status
    return 0


if __name__ == "__main__":
    sys.exit(main())
