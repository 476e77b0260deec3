"""Needle in a haystack for a DASS trained on real recordings and an AST of like size, trained alike.

    python benchmarks/needle_study.py train            # both models: same clips, same number of steps, labels only
    python benchmarks/needle_study.py grid             # 10 s and 60 s in every haystack; goes on where it was
    python benchmarks/needle_study.py minutes          # 10 min in every haystack
    python benchmarks/needle_study.py hour             # 1 h: DASS in every haystack, what AST would take
    python benchmarks/needle_study.py summary          # results/needle-CORPUS.json and a table
    python benchmarks/needle_study.py cost             # time and memory of DASS-small, carried on to 2.5 h, and of the AST

`--corpus`: `digits10` (the default), ten seconds in which a digit is said one to six times (see needle_corpus.py), as long
as the published models' clips; `digits`, spoken digits of a second, and `esc10`, environmental sounds of five, which show
what comes of a model that has never heard ten seconds. From `../shared/data` or `--data`. The report is
runs/needle-CORPUS/niah/report.html; those of `cost` are runs/needle-cost*/report.html.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import torch
from needle_corpus import build_corpus

from dass import niah
from dass.audio import LogMelConfig
from dass.config import TrainConfig, load_preset

DATA = Path(__file__).resolve().parents[2] / "shared" / "data"
RESULTS = Path(__file__).parent / "results"
HAYSTACKS = ("mean-spectrum", "silence", "white", "pink", "babble", "recording", "other-clips")
LONGEST_PASS = 30.0  # s; an AST's at 1 h takes 45 on two free cores, each of its cells hours: recorded as too slow
TOP1 = ("top1", "top1_low", "top1_high", "top1_chance", "centred")
KINDS = {  # what --models chooses among
    "dass": ("DASS-tiny",),
    "ast": ("AST-sinusoidal", "AST-interpolated"),
    "windows": ("DASS-tiny-windows",),
}
MANY, FEW = (("--audio-per-cell", "3600", "--fewest-needles", number) for number in ("30", "10"))
PHASES = {  # models, haystacks, options; at 10 s all 300 needles, at 60 s 60 of them, from 10 min on 30 or 10
    "grid": [(sum(KINDS.values(), ()), HAYSTACKS, ("--lengths", "10s", "60s", *MANY))],
    "minutes": [
        (KINDS["dass"], HAYSTACKS, ("--lengths", "10min", *MANY)),
        (KINDS["ast"][1:], HAYSTACKS, ("--lengths", "10min", *FEW)),
        (KINDS["ast"][:1], HAYSTACKS[:1], ("--lengths", "10min", *FEW)),
        (KINDS["windows"], HAYSTACKS, ("--lengths", "10min", *FEW)),
    ],
    "hour": [
        (KINDS["dass"], HAYSTACKS, ("--lengths", "1h", *FEW)),
        (KINDS["ast"], HAYSTACKS, ("--lengths", "1h", *FEW)),
    ],
}


def training(corpus: str, data: Path, folder: Path) -> TrainConfig:
    """Digits, of a second each or in ten seconds: takes 0 to 4 of every speaker are held out. ESC-10: two fifths of it.

    Ten seconds with a digit here and there teach a fresh model next to nothing: those runs start from words of a second.
    """
    config = load_preset("folder")
    config = replace(config, log=replace(config.log, tensorboard=False, pictures=False))
    if corpus == "esc10":
        chosen = replace(config.data, train=data / "esc10", clip_seconds=5.12, mel_bins=64, holdout_fraction=0.4)
        train = replace(config.train, epochs=120, batch_size=10)
    else:
        words = corpus == "digits"
        chosen = replace(
            config.data,
            train=data / "fsdd" / "recordings" if words else folder / "clips",
            holdout=r"_[0-4]\.wav$" if words else "_test",
            label_regex=r"^(\d)_",
            sample_rate=8000,
            mel_bins=32,
        )
        train = replace(config.train, eval_every=4)
        if not words:
            chosen = replace(chosen, clip_seconds=10.24)
            config = replace(config, augment=replace(config.augment, roll=512))
            train = replace(train, epochs=8, batch_size=16)
    return replace(config, data=replace(chosen, workers=0), train=train)


def train(corpus: str, data: Path, folder: Path, models: Sequence[str]) -> None:
    """Trains what is not trained yet, each continuing where it was stopped: same clips, same number of steps."""
    from dass.student import build_student
    from dass.teacher import load_teacher
    from dass.trainer import Trainer

    words = folder.parent / "needle-digits"
    if corpus == "digits10":
        train("digits", data, words, models)
        build_corpus(data / "fsdd" / "recordings", folder / "clips")
    config = training(corpus, data, folder)
    for name in models:
        own, build = replace(config, run=replace(config.run, folder=folder / name)), build_student
        if name == "ast":  # the transformer needs a smaller step, the only difference
            own, build = replace(own, optimizer=replace(own.optimizer, learning_rate=1e-3)), build_ast
        if corpus == "digits10":
            begun = words / name
            front_end = load_teacher(str(begun)).front_end
            own = replace(own, data=replace(own.data, mean=front_end.mean, std=front_end.std))
            if name == "ast":
                build = partial(longer_ast, begun)
            else:
                own = replace(own, model=replace(own.model, init=str(begun)))
        print(name, Trainer(own, build_model=build).fit().best)


def build_ast(_, classes, front_end):
    """An AST of about DASS-tiny's size."""
    from dass.teacher_models import build_small_ast

    return build_small_ast(classes, front_end, layers=5, intermediate=384, patch=16).train()


def longer_ast(run: Path, _, classes, front_end):
    """The AST of a run for longer input: the positions it has learnt stretched along time."""
    from dass.niah_models import LongAST
    from dass.teacher import load_teacher

    trained = load_teacher(str(run)).model
    model = build_ast(_, classes, front_end)
    tensors = trained.state_dict()
    name = next(name for name in tensors if name.endswith("position_embeddings"))
    tensors[name] = LongAST(trained.model, "interpolated").positions(front_end.frames)
    model.load_state_dict(tensors)
    return model


def run_cells(
    corpus: str, data: Path, folder: Path, models: Sequence[str], haystacks: Sequence[str], options: Sequence[str]
) -> int:
    """Some cells of the test in `folder`/niah: `models` by name, `options` as `python -m dass.niah` takes them."""
    sources = {
        "DASS-tiny": f"{folder / 'dass'}",
        "DASS-tiny-windows": f"{folder / 'dass'}@windows",
        "AST-sinusoidal": f"{folder / 'ast'}@sinusoidal",
        "AST-interpolated": f"{folder / 'ast'}@interpolated",
    }
    arguments = [f"{name}={sources[name]}" for name in models]
    if corpus != "digits10":  # of those ten seconds are the needle alone
        options = [part for option in options for part in (["needle", "10s"] if option == "10s" else [option])]
    arguments += ["--haystacks", *haystacks, "--positions", "0", "0.5", "1"]
    arguments += ["--babble", str(data / "fsdd")] * ("babble" in haystacks)
    arguments += ["--recording", str(data / ("fsdd" if corpus == "esc10" else "esc10"))] * ("recording" in haystacks)
    arguments += [*options, "--longest-pass", str(LONGEST_PASS), "--out", str(folder / "niah")]
    return niah.main(arguments)


def cost(out: Path, lengths: Sequence[str], models: Sequence[str]) -> int:
    """One needle in mean-spectrum, for "dass" DASS-small and for "ast" the AST and the DASS-tiny trained beside it.

    DASS-small has random weights, on which the cost does not depend.
    """
    from dass.model import DASS, DASSConfig
    from dass.synthetic import synthetic_classes

    fixed = ["--haystacks", "mean-spectrum", "--positions", "0.5", "--needles.clips", "1", "--bootstrap", "1"]
    trained = out / "needle-digits10"
    if "dass" in models:
        checkpoint = out / "needle-cost" / "dass-small"
        if not (checkpoint / "config.json").is_file():
            torch.manual_seed(0)
            names = {entry.index: entry.name for entry in synthetic_classes()}
            model = DASS(DASSConfig.small(len(names), id2label=names), front_end=asdict(LogMelConfig()))
            model.save_pretrained(checkpoint)
        arguments = [f"DASS-small={checkpoint}", "--lengths", *lengths, *fixed, "--out", str(out / "needle-cost")]
        if status := niah.main(arguments):
            return status
    if "ast" in models and all((trained / name / "best").is_dir() for name in ("dass", "ast")):
        pair = [f"DASS-tiny={trained / 'dass'}", f"AST={trained / 'ast'}@interpolated"]
        return niah.main([*pair, "--lengths", *lengths, *fixed, "--out", str(out / "needle-cost-digits10")])
    return 0


def summarise(folder: Path, corpus: str) -> Path:
    """Means over the positions of every model, haystack and length, as JSON in results/; prints a table.

    The times of cells depend on what else the machine did in the hours that they took: only those of `cost` are kept.
    """
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
        for key in (*("map", "chance", "retention", "retention_low", "retention_high", "retention_chance"), *TOP1):
            values = [line[key] for line in lines]
            row[key] = None if None in values else float(f"{sum(values) / len(values):.4g}")
        rows.append(row | {"peak_memory_mib": round(max(line["peak_memory"] for line in lines) / 2**20, 1)})
    environment = read_json(folder / "niah" / "environment.json")
    order = {name: number for number, name in enumerate(sum(KINDS.values(), ()))}
    rows.sort(key=lambda row: (order[row["model"]], HAYSTACKS.index(row["haystack"]), row["length"]))
    learnt: dict[str, dict] = {}
    for runs in [folder.parent / "needle-digits"] * (corpus == "digits10") + [folder]:  # in the order of their training
        for name in ("dass", "ast"):
            records = [json.loads(line) for line in (runs / name / "metrics.jsonl").read_text().splitlines()]
            final = next(record for record in reversed(records) if record["event"] == "final")
            learnt.setdefault(runs.name, {})[name] = {
                key: round(final[key], 4) for key in ("step", "epoch", "accuracy", "map")
            }
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
    """Markdown: mAP kept, top-1 and centred top-1, in %, of every model over the lengths, a line for each haystack."""
    from dass.niah_measure import describe_length

    lengths = [length for length in sorted({row["length"] for row in rows}) if length > 0]
    lines = ["| haystack | model | " + " | ".join(describe_length(length) for length in lengths) + " |"]
    lines.append("| --- | --- |" + " ---: |" * len(lengths))
    cells = {(row["haystack"], row["model"], row["length"]): row for row in rows}
    for haystack in HAYSTACKS:
        for model in dict.fromkeys(row["model"] for row in rows):
            texts = []
            for length in lengths:
                row = cells.get((haystack, model, length))
                kept = row.get("retention") if row else None
                figures = kept is not None and f"{100 * kept:.0f}, {100 * row['top1']:.0f}, {100 * row['centred']:.0f}"
                texts.append("" if row is None else figures or row["status"])
            if any(texts):
                lines.append(f"| {haystack} | {model} | " + " | ".join(texts) + " |")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("phase", choices=("train", "grid", "minutes", "hour", "summary", "cost"))
    parser.add_argument("--corpus", choices=("digits10", "digits", "esc10"), default="digits10")
    parser.add_argument("--data", type=Path, default=DATA, help="folder with fsdd/ and esc10/")
    parser.add_argument("--out", type=Path, default=Path("runs"))
    parser.add_argument("--models", nargs="+", choices=tuple(KINDS), default=tuple(KINDS), help="only these of them")
    parser.add_argument("--lengths", nargs="+", default=("10s", "60s", "10min"), help="of the input, for cost")
    options = parser.parse_args()
    try:
        return run(options, options.out / f"needle-{options.corpus}")
    except (OSError, ValueError) as error:  # what is wrong with the data, a folder or a model, in a line
        print(f"needle_study: {error}", file=sys.stderr)
        return 2


def run(options: argparse.Namespace, folder: Path) -> int:
    """One phase of the study in `folder`."""
    if options.phase == "cost":
        return cost(options.out, options.lengths, options.models)
    if options.phase == "summary":
        print(summarise(folder, options.corpus))
        return 0
    missing = [name for name in ("fsdd", "esc10") if not (options.data / name).is_dir()]
    if missing:
        raise FileNotFoundError(
            f"{options.data} holds no {' and no '.join(missing)}; --data names the folder that does"
        )
    if options.phase == "train":
        train(options.corpus, options.data, folder, [name for name in ("dass", "ast") if name in options.models])
        return 0
    for models, haystacks, arguments in PHASES[options.phase]:
        chosen = [name for name in models if any(name in KINDS[kind] for kind in options.models)]
        if chosen and (status := run_cells(options.corpus, options.data, folder, chosen, haystacks, arguments)):
            return status
    return 0


if __name__ == "__main__":
    sys.exit(main())
