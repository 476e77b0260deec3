"""Cross-validation: one run per fold, and the mean and standard deviation of the best figures."""

from __future__ import annotations

import math
import statistics
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dass.checkpoint import write_json
from dass.config_files import ConfigError
from dass.distributed import is_main_process, say
from dass.manifest import read_manifest
from dass.run_folder import RunFolderError

if TYPE_CHECKING:
    from dass.config import TrainConfig

ALL_FOLDS = "all"


def train_folds(config: TrainConfig, default_folder: Path) -> dict[str, Any]:
    """Hold out each fold in turn, in `fold-NAME/` of the run folder; writes and returns `folds.json`.

    The same command goes on where it was killed: finished folds are not trained again.
    """
    from dass.trainer import Trainer

    data = config.data
    if data.train is None:
        raise ConfigError("data.fold is 'all', but there is no data.train; the synthetic corpus has no folds")
    manifest = read_manifest(data.train, classes=data.classes, exclude=data.exclude)
    folds = sorted({clip.fold for clip in manifest} - {""})
    if len(folds) < 2:
        raise ConfigError(f"data.fold is 'all', but {data.train} has the folds {folds}; expected two or more")
    folder = config.run.folder or default_folder
    if folder.exists() and not folder.is_dir():
        raise RunFolderError(f"the run folder {folder} is a file; choose another --run.folder")
    results = {}
    for fold in folds:
        run = replace(config.run, folder=folder / f"fold-{fold}")
        say(f"fold {fold} of {', '.join(folds)}")
        results[fold] = Trainer(replace(config, data=replace(data, fold=fold), run=run)).fit().best
    summary = {"folds": results, "mean": {}, "standard_deviation": {}}
    for name in results[folds[0]]:
        values = [results[fold][name] for fold in folds]
        if name != "epoch" and all(map(math.isfinite, values)):  # d' is infinite where a fold is solved
            summary["mean"][name] = statistics.fmean(values)
            summary["standard_deviation"][name] = statistics.stdev(values)
    for best in results.values():
        best.update({name: None for name, value in best.items() if not math.isfinite(value)})
    if is_main_process():
        write_json(folder / "folds.json", summary)
    for name, mean in summary["mean"].items():
        say(f"{name.replace('_', ' ')}: {mean:.4f} +- {summary['standard_deviation'][name]:.4f}")
    return summary
