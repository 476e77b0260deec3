"""Needle in a haystack: the command line."""

import csv
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dass import niah
from dass.niah_grid import CRASHED
from dass.niah_store import OK, Store, alone_in

# --- the command line -------------------------------------------------------------------------------------------------


def test_lengths_are_read_as_people_write_them():
    assert [niah.parse_length(text) for text in ("needle", "90", "90s", "1.5min", "2.5h")] == [0, 90, 90, 90, 9000]
    for text in ("", "ten", "-1s", "0", "5d"):
        with pytest.raises(niah.UsageError, match="10s, 10min"):
            niah.parse_length(text)


def test_options_count_more_than_the_preset():
    config = niah.parse(["m:f", "--preset", "paper", "--positions", "0", "1", "--needles.clips", "7"])
    assert config.positions == (0.0, 1.0) and config.needles.clips == 7
    assert config.lengths[-1] == "2.5h" and config.haystacks == ("mean-spectrum", "white") and config.snrs == (10.0,)
    assert niah.parse(["m:f", "--preset", "paper", "--babble", "."]).haystacks[-1] == "babble"


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["math:sin", "--haystacks", "babble"], "--babble FOLDER"),
        (["math:sin", "--lengths", "5d"], "10s, 10min"),
        (["math:sin", "--preset", "slow"], "paper, quick"),
        (["math:sin", "--positions", "2"], "from 0 to 1"),
        (["math:sin", "--placing", "overlay"], "mean-spectrum"),
        (["nowhere"], "no file or folder"),
        (["/no/such/folder"], "no file or folder"),
        (["runs/nowhere"], "no file or folder"),
        (["math:sine"], "cannot be imported"),
        (["runs"], "runs"),
        (["math:sin", "--report-only", "--out", "nowhere"], "holds no results"),
    ],
)
def test_what_cannot_be_done_is_said(arguments, words, capsys, tmp_path, monkeypatch):
    (tmp_path / "runs").mkdir()
    monkeypatch.chdir(tmp_path)
    assert niah.main([*arguments, "--no-isolate"]) == 2
    said = capsys.readouterr()
    assert words in said.err and "report:" not in said.out


def test_two_tests_do_not_run_in_one_folder(tmp_path, capsys):
    with alone_in(tmp_path):
        assert niah.main(["math:sin", "--out", str(tmp_path), "--no-isolate"]) == 2
    assert "another process" in capsys.readouterr().err
    with alone_in(tmp_path):
        pass


def test_the_command_leaves_a_report(tmp_path, monkeypatch, capsys):
    (tmp_path / "mine_niah.py").write_text(
        "def model(fbank): return fbank.amax(1)[:, :12]\nmodel.front_end = dict(frames=60, mel_bins=32)\n"
    )
    monkeypatch.chdir(tmp_path)
    arguments = ["mine_niah:model", "--lengths", "needle", "2s", "--positions", "0", "1", "--haystacks", "pink"]
    assert niah.main([*arguments, "--needles.clips", "3", "--out", "out", "--no-isolate"]) == 0
    printed = capsys.readouterr().out
    assert "report: out/report.html" in printed and printed.count("mAP") == 2
    rows = list(csv.DictReader(Path("out/results.csv").open()))
    assert len(rows) == 4 and {row["haystack"] for row in rows} == {"pink"} and all(float(row["map"]) for row in rows)
    environment = json.loads(Path("out/environment.json").read_text())
    assert environment["configuration"]["positions"] == [0.0, 1.0] and environment["machine"]["PyTorch"]
    assert sorted(path.name for path in Path("out/pictures").iterdir()) == [
        "cost.png",
        "decisions.png",
        "heat-mine_niah-model.png",
        "retention.png",
    ]


def environment():
    """Of a process that is to find this checkout."""
    root = str(Path(niah.__file__).parent.parent)
    return {**os.environ, "PYTHONPATH": os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])])}


@pytest.mark.slow
def test_a_test_that_is_asked_to_end_leaves_no_process_and_goes_on(tmp_path):
    (tmp_path / "slowly.py").write_text(
        "import os, pathlib, time\n"
        "def model(fbank):\n"
        "    pathlib.Path('pid').write_text(str(os.getpid()))\n"
        "    time.sleep(60 if pathlib.Path('sleep').exists() else 0)\n"
        "    return fbank.amax(1)[:, :12]\n"
        "model.front_end = dict(frames=60, mel_bins=32)\n"
    )
    (tmp_path / "sleep").touch()
    command = [sys.executable, "-m", "dass.niah", "slowly:model", "--lengths", "needle", "--positions", "0.5"]
    command += ["--haystacks", "mean-spectrum", "--needles.clips", "2", "--out", "out"]
    process = subprocess.Popen(command, cwd=tmp_path, env=environment(), stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    while not (tmp_path / "pid").exists() or not (tmp_path / "pid").read_text():
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.1)
    process.terminate()
    assert process.wait(60) == 130 and "goes on where it was" in process.stderr.read()
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "pid").read_text()), 0)
    assert not list((tmp_path / "out").glob(".attempt*"))
    (tmp_path / "sleep").unlink()
    assert subprocess.run(command, cwd=tmp_path, env=environment(), timeout=120).returncode == 0
    assert [line["status"] for line in Store(tmp_path / "out").lines.values()] == [OK]


@pytest.mark.slow
def test_a_model_that_is_killed_is_recorded_and_the_grid_goes_on(tmp_path):
    """As the system does it to a process that takes too much memory."""
    (tmp_path / "deadly.py").write_text(
        "import os, signal\n"
        "def bad(fbank):\n"
        "    if fbank.shape[1] > 150: os.kill(os.getpid(), signal.SIGKILL)\n"
        "    return fbank.amax(1)[:, :12]\n"
        "def good(fbank): return fbank.amax(1)[:, :12]\n"
        "bad.front_end = good.front_end = dict(frames=60, mel_bins=32)\n"
    )
    command = [sys.executable, "-m", "dass.niah", "deadly:bad", "deadly:good", "--lengths", "needle", "1s", "2s", "3s"]
    command += ["--positions", "0.5", "--haystacks", "mean-spectrum", "--needles.clips", "2", "--out", "out"]
    done = subprocess.run(command, cwd=tmp_path, env=environment(), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    status = {(line["model"], line["length"]): line for line in Store(tmp_path / "out").lines.values()}
    assert [status["deadly:bad", s]["status"] for s in (0.0, 1.0, 2.0, 3.0)] == [OK, OK, CRASHED, CRASHED]
    assert "SIGKILL" in status["deadly:bad", 2.0]["error"] and status["deadly:bad", 3.0]["inferred"]
    assert all(status["deadly:good", s]["status"] == OK for s in (0.0, 1.0, 2.0, 3.0))
    assert "report:" in done.stdout
