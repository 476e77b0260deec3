"""What a run says and records: plain lines, a bar on a terminal, metrics.jsonl, TensorBoard, and W&B where installed."""

import json
import sys
import types

import pytest

from dass.run_log import LogConfig, RunLog, read_metrics


def test_lines_and_records(tmp_path, capsys):
    log = RunLog(tmp_path, LogConfig(progress="lines", tensorboard=False))
    with log.progress("train", 3) as bar:
        for step in (1, 2, 3):
            log.record("step", step, {"loss": 1.0 / step, "rate": float("inf")})
            bar.advance(1, {"loss": 1.0 / step})
    log.say("done")
    log.close()
    assert capsys.readouterr().out.splitlines() == ["train 3/3  loss 0.3333", "done"]
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert lines[1] == {"event": "step", "step": 2, "loss": 0.5, "rate": None}


def test_a_bar_on_a_terminal(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "120")
    log = RunLog(None, LogConfig(progress="bar"))
    with log.progress("train", 4, completed=1) as bar:
        bar.advance(1, {"loss": 0.25})
        log.say("epoch [1]: a line beside the bar")
    out = capsys.readouterr().out
    assert "2/4" in out and "loss 0.25" in out and "epoch [1]: a line beside the bar" in out


def test_only_the_main_process_speaks(tmp_path, capsys):
    log = RunLog(tmp_path, LogConfig(progress="lines"), main=False)
    with log.progress("train", 1) as bar:
        bar.advance(1, {"loss": 1.0})
    log.say("nothing")
    log.record("step", 1, {"loss": 1.0})
    log.close()
    assert capsys.readouterr().out == "" and not list(tmp_path.iterdir())


def test_a_resumed_log_forgets_what_will_be_made_again(tmp_path):
    log = RunLog(tmp_path, LogConfig(progress="off", tensorboard=False))
    for step in range(1, 6):
        log.record("step", step, {"loss": 1.0})
    log.record("final", 3, {})
    log.close()
    RunLog(tmp_path, LogConfig(progress="off", tensorboard=False), resumed_step=3).close()
    assert [record["step"] for record in read_metrics(tmp_path / "metrics.jsonl")] == [1, 2, 3]
    RunLog(tmp_path, LogConfig(progress="off", tensorboard=False)).close()
    assert read_metrics(tmp_path / "metrics.jsonl") == []


def test_tensorboard(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    log = RunLog(tmp_path, LogConfig(progress="off"))
    log.record("epoch", 7, {"map": 0.5, "name": "text is left out"})
    log.close()
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert events.Tags()["scalars"] == ["epoch/map"]
    assert [(event.step, event.value) for event in events.Scalars("epoch/map")] == [(7, 0.5)]


def test_wandb(tmp_path, monkeypatch):
    """Against a stand-in for the package: one run, continued under the same id by a resumed log."""
    begun, logged = [], []

    class Run:
        def log(self, numbers, step):
            logged.append((step, numbers))

        def finish(self):
            begun[-1]["finished"] = True

    def init(**options):
        begun.append(options)
        return Run()

    fake = types.SimpleNamespace(init=init, util=types.SimpleNamespace(generate_id=lambda: f"id{len(begun)}"))
    monkeypatch.setitem(sys.modules, "wandb", fake)
    config = LogConfig(progress="off", tensorboard=False, wandb="project")
    for resumed in (0, 2):
        log = RunLog(tmp_path, config, resumed_step=resumed)
        log.record("step", resumed + 1, {"loss": 0.5})
        log.close()
    assert [options["id"] for options in begun] == ["id0", "id0"] and begun[0]["project"] == "project"
    assert all(options["finished"] for options in begun)
    assert logged == [(1, {"step/loss": 0.5}), (3, {"step/loss": 0.5})]

    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ModuleNotFoundError, match="pip install wandb"):
        RunLog(tmp_path, config)
