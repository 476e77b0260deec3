"""Whole runs on small sound files: what they leave behind, what they learn, and how they fail."""

import json
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from dass import run_folder
from dass.config_files import config_to_toml
from dass.data import build_loader, open_splits
from dass.distill import label_loss
from dass.model import DASS
from dass.run_folder import NotFiniteError, RunFolderError
from dass.run_log import read_metrics
from dass.train import main
from dass.trainer import Trainer, TrainingStopped

from .tiny_run import tiny_config, write_tones


@pytest.fixture(scope="module")
def tones(tmp_path_factory):
    return write_tones(tmp_path_factory.mktemp("data") / "tones")


def test_a_run_learns_and_leaves_everything(tones, tmp_path, capsys):
    config = tiny_config(tones, tmp_path / "run", train={"epochs": 6}, log={"pictures": True, "progress": "lines"})
    result = Trainer(config).fit()
    assert result.best["accuracy"] >= 0.8 and result.best["map"] > 0.85
    left = {path.relative_to(result.folder).as_posix() for path in result.folder.rglob("*")}
    expected = {"config.toml", "metrics.jsonl", "classes.csv", "per_class.csv", "curves.png", "per_class.png"}
    expected |= {"confusion.png", "spectrograms.png", "best/model.safetensors", "last/model.safetensors"}
    assert expected <= left and not any(".tmp" in name for name in left)

    records = read_metrics(result.folder / "metrics.jsonl")
    losses = [record["loss"] for record in records if record["event"] == "step"]
    assert len(losses) == 6 * 3 and np.mean(losses[-4:]) < 0.9 * np.mean(losses[:4])
    epochs = [record for record in records if record["event"] == "epoch"]
    best = max(epochs, key=lambda record: (record["map"], -record["validation_loss"]))
    for key, value in result.best.items():
        assert best[key] == (value if np.isfinite(value) else None)

    model = DASS.from_pretrained(result.folder)
    assert model.config.id2label == {0: "high", 1: "low", 2: "middle"}
    assert model.front_end["mel_bins"] == 16
    assert "epoch 6" in capsys.readouterr().out
    assert Path(result.example).suffix == ".wav"


def test_distillation_from_a_run_and_the_scatter(tones, tmp_path):
    teacher = Trainer(tiny_config(tones, tmp_path / "teacher", train={"epochs": 3})).fit()
    config = tiny_config(
        tones,
        tmp_path / "student",
        distill={"teacher": (str(teacher.folder), "self"), "teacher_weights": (3.0, 1.0)},
        train={"accumulate": 2},
        optimizer={"clip_norm": 1.0},
        average={"epochs": (1, 2), "ema": 0.9},
        log={"pictures": True},
    )
    result = Trainer(config).fit()
    records = read_metrics(result.folder / "metrics.jsonl")
    steps = [record for record in records if record["event"] == "step"]
    assert len(steps) == 2 * 2 and all(record["distill_loss"] > 0 for record in steps)
    for record in steps:
        assert record["loss"] == pytest.approx(0.5 * record["label_loss"] + 0.5 * record["distill_loss"], rel=1e-5)
    assert [record["event"] for record in records[-2:]] == ["average", "final"]
    assert (result.folder / "averaged" / "model.safetensors").is_file()

    alone = replace(config, distill=replace(config.distill, teacher=(str(teacher.folder),), teacher_weights=()))
    alone = replace(alone, run=replace(alone.run, folder=tmp_path / "alone"))
    assert (Trainer(alone).fit().folder / "teacher_student.png").is_file()


def test_the_command_finds_a_finished_run_and_refuses_another_one(tones, tmp_path, capsys):
    (tmp_path / "run.toml").write_text(config_to_toml(tiny_config(tones)))
    command = ["--config", str(tmp_path / "run.toml"), "--run.folder", str(tmp_path / "run")]
    assert main(command) == 0
    out = capsys.readouterr().out
    assert f"python -m dass.tag {tones}" in out and f"--model {tmp_path / 'run'}" in out
    before = (tmp_path / "run" / "metrics.jsonl").read_bytes()
    assert main(command) == 0  # finished: says so, trains nothing
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == before
    assert main([*command, "--train.epochs", "3"]) == 1
    assert "another configuration (train.epochs)" in capsys.readouterr().err
    assert main([*command, "--train.epochs", "1", "--run.restart"]) == 0


def test_default_folders_are_numbered(tones, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = tiny_config(tones, train={"epochs": 1})
    folders = [Trainer(config, Path("runs/tones")).fit().folder for _ in range(2)]
    assert folders == [Path("runs/tones"), Path("runs/tones-2")]


def test_a_nan_stops_and_names_the_clips(tones, tmp_path):
    config = tiny_config(tones, tmp_path / "run", optimizer={"learning_rate": 1e30, "name": "adamw"})
    with pytest.raises(NotFiniteError, match="bad-batch-rank0.json"):
        Trainer(config).fit()
    saved = json.loads((tmp_path / "run" / "bad-batch-rank0.json").read_text())
    assert len(saved["clips"]) == 8 and (tones / saved["clips"][0]["clip"]).is_file()


def test_an_unusable_folder_or_a_full_disk_is_told_before_the_first_step(tones, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    with pytest.raises(RunFolderError, match="--run.folder"):
        Trainer(tiny_config(tones, tmp_path / "file" / "run")).fit()
    monkeypatch.setattr("dass.run_folder.shutil.disk_usage", lambda path: os.statvfs_result and _Usage())
    with pytest.raises(RunFolderError, match="has 1 MiB left"):
        Trainer(tiny_config(tones, tmp_path / "run")).fit()


class _Usage:
    free = 2**20


def test_the_best_model_is_tried_on_test_clips(tones, tmp_path, capsys):
    write_tones(tmp_path / "others", per_class=5, seed=1)
    config = tiny_config(
        tones,
        tmp_path / "run",
        data={"test": tmp_path / "others"},
        train={"epochs": 3},
        average={"epochs": (1, 3)},
        log={"progress": "lines"},
    )
    result = Trainer(config).fit()
    assert f"best model on 15 test clips: loss {result.test['loss']:.4f}" in capsys.readouterr().out
    (record,) = [record for record in read_metrics(result.folder / "metrics.jsonl") if record["event"] == "test"]
    assert record["loss"] == result.test["loss"]

    model, clips = DASS.from_pretrained(result.folder).eval(), open_splits(config.data).test
    (batch,) = build_loader(clips, batch_size=15, workers=0)
    with torch.no_grad():
        expected = label_loss(model(batch.fbank), batch.target, "multi-label").mean()
    assert result.test["loss"] == pytest.approx(expected.item(), rel=1e-5)
    assert Trainer(config).fit().test == result.test  # a finished run is read


def test_early_stopping(tones, tmp_path):
    config = tiny_config(tones, tmp_path / "run", train={"epochs": 9, "patience": 1}, optimizer={"learning_rate": 1e-9})
    Trainer(config).fit()
    epochs = [r for r in read_metrics(tmp_path / "run" / "metrics.jsonl") if r["event"] == "epoch"]
    assert len(epochs) < 9


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_single_label_mode_and_mixed_precision(tones, tmp_path, precision):
    """The losses are those of float32, but for rounding; the scaler of fp16 takes every step."""
    settings = {"labels": "single-label", "metric": "accuracy"}
    changes = {"model": {"gradient_checkpointing": True, "drop_path": 0.0}, "optimizer": {"learning_rate": 1e-3}}
    losses = []
    for name in ("float32", precision):
        config = tiny_config(tones, tmp_path / name, train={**settings, "precision": name}, **changes)
        assert "accuracy" in Trainer(config).fit().best
        losses.append([r["loss"] for r in read_metrics(tmp_path / name / "metrics.jsonl") if r["event"] == "step"])
    assert losses[0][-1] < losses[0][0]
    np.testing.assert_allclose(losses[1], losses[0], rtol=0.02)
    assert losses[1] != losses[0]


@pytest.mark.slow
@pytest.mark.parametrize("way", ["torchrun", "compile"])
def test_two_processes_and_a_compiled_model_give_the_losses_of_one(tones, tmp_path, way):
    """As a user starts them, from the command line."""
    config = tiny_config(tones, model={"drop_path": 0.0})
    (tmp_path / "run.toml").write_text(config_to_toml(config))
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1"}
    launch = ["torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m"] if way == "torchrun" else []
    option = ["--model.compile"] if way == "compile" else []
    losses = []
    for name, before, after in (("plain", [], []), (way, launch, option)):
        command = [sys.executable, "-m", *before, "dass.train", "--config", "run.toml", "--run.folder", name, *after]
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=1200)
        assert done.returncode == 0, done.stderr
        records = read_metrics(tmp_path / name / "metrics.jsonl")
        losses.append([record.get("loss", record.get("validation_loss")) for record in records])
    np.testing.assert_allclose(losses[1], losses[0], rtol=1e-4)


def test_profile_says_where_the_time_goes_and_writes_nothing(tones, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    table = Trainer(tiny_config(tones)).profile(steps=4, warmup=1)
    for part in ("data", "forward", "backward", "optimizer", "clips/s"):
        assert part in table
    assert not list(tmp_path.iterdir())


def test_folds(tmp_path, capsys):
    from dass.folds import train_folds

    write_tones(tmp_path / "audio", per_class=6)
    lines = ["path,label,fold"]
    lines += [f"audio/{name}/{i}.wav,{name},{i % 2 + 1}" for name in ("low", "middle", "high") for i in range(6)]
    (tmp_path / "clips.csv").write_text("\n".join(lines))
    config = tiny_config(tmp_path / "clips.csv", tmp_path / "runs", data={"fold": "all"}, train={"epochs": 1})
    summary = train_folds(config, tmp_path / "unused")
    values = [summary["folds"][fold]["accuracy"] for fold in ("1", "2")]
    assert summary["mean"]["accuracy"] == pytest.approx(np.mean(values))
    assert summary["standard_deviation"]["accuracy"] == pytest.approx(np.std(values, ddof=1))
    assert json.loads((tmp_path / "runs" / "folds.json").read_text()) == summary


def test_initialisation_from_another_model_keeps_its_front_end(tones, tmp_path):
    first = Trainer(tiny_config(tones, tmp_path / "first")).fit()
    config = tiny_config(
        tones,
        tmp_path / "second",
        data={"mean": None, "std": None},
        model={"init": str(first.folder), "new_head": True},
        optimizer={"learning_rate": 1e-8, "head_factor": 10.0},
    )
    second = Trainer(config).fit()
    old, new = (DASS.from_pretrained(folder).state_dict() for folder in (first.folder, second.folder))
    torch.testing.assert_close(new["norm.weight"], old["norm.weight"])
    assert not torch.allclose(new["head.weight"], old["head.weight"])
    assert DASS.from_pretrained(second.folder).front_end["mean"] == -6.0


def test_a_signal_stops_after_the_step_and_the_run_goes_on(tones, tmp_path):
    config = tiny_config(tones, tmp_path / "run", train={"epochs": 3})
    trainer, before = Trainer(config), signal.getsignal(signal.SIGINT)
    step = trainer._step

    def interrupt(batches, timer):
        if trainer.progress.step == 4:
            os.kill(os.getpid(), signal.SIGINT)
        return step(batches, timer)

    trainer._step = interrupt
    with pytest.raises(TrainingStopped, match="stopped at step 5"):
        trainer.fit()
    assert signal.getsignal(signal.SIGINT) is before
    Trainer(config).fit()
    steps = [r["step"] for r in read_metrics(tmp_path / "run" / "metrics.jsonl") if r["event"] == "step"]
    assert steps == list(range(1, 10))


@pytest.mark.parametrize("moment", ["_step", "_save_state"])
def test_ctrl_c_ends_the_workers_too_and_still_the_end_is_orderly(tones, tmp_path, moment):
    config = tiny_config(tones, tmp_path / "run", train={"epochs": 3}, run={"checkpoint_seconds": 0.0})
    trainer = Trainer(config)
    method = getattr(trainer, moment)

    def interrupt(*arguments):
        if trainer.progress.step == (4 if moment == "_step" else 5):
            os.kill(os.getpid(), signal.SIGTERM)
            raise RuntimeError("DataLoader worker (pid 1) is killed by signal: Terminated.")
        return method(*arguments)

    setattr(trainer, moment, interrupt)
    with pytest.raises(TrainingStopped, match="the same command goes on"):
        trainer.fit()
    assert run_folder.read_progress(run_folder.newest_state(tmp_path / "run")).step == 4


@pytest.mark.slow
def test_the_command_with_no_arguments_reaches_its_aim(tmp_path):
    """The demonstration, with as many threads as it likes: mAP at least 0.90 on clips that chose nothing, and the printed
    command works."""
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    environment.pop("OMP_NUM_THREADS", None)
    command = [sys.executable, "-m", "dass.train"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=1500)
    assert done.returncode == 0, done.stderr
    test, final = read_metrics(tmp_path / "runs/demo/metrics.jsonl")[-2:]
    assert (test["event"], final["event"]) == ("test", "final")
    assert test["map"] >= 0.90
    tag = done.stdout.splitlines()[-1].split()
    tagged = subprocess.run([sys.executable, *tag[1:]], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert tagged.returncode == 0 and "example.wav" in tagged.stdout
