"""Tagging: the Tagger, the command line with a saved model, resumption, constant memory."""

import csv
import io
import json
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from hypothesis import given
from hypothesis import strategies as st

from dass import tag
from dass.audio import AudioError
from dass.model import DASS, DASSConfig
from dass.tagger import Tagger
from tests.model.bands import BANDS, FRONT_END, RATE, Bands, silence, tone

# --- the Tagger -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def long_file(tmp_path_factory):
    """30 s: a low tone from 10 s to 14 s, a high one from 20 s to 26 s."""
    path = tmp_path_factory.mktemp("long") / "long.wav"
    parts = [silence(10), tone(150, 4), silence(6), tone(6000, 6), silence(4)]
    soundfile.write(path, np.concatenate(parts), RATE)
    return path


def test_events_lie_where_the_sounds_are(long_file):
    tagger = Tagger(Bands())
    events = [event for event in tagger.events(long_file, window=1, hop=0.5) if event.score > 0.9]
    found = {BANDS[event.index]: (event.start, event.end) for event in events}
    assert len(events) == 2
    assert found["low"] == pytest.approx((10, 14), abs=0.5)
    assert found["high"] == pytest.approx((20, 26), abs=0.5)


def test_a_file_and_its_samples_are_tagged_alike(long_file):
    tagger = Tagger(Bands(), batch=3)
    samples, _ = soundfile.read(long_file, dtype="float32")
    from_file = list(tagger.segments(long_file, window=2, hop=0.7))
    from_array = list(Tagger(Bands(), batch=64).segments(samples, window=2, hop=0.7))
    assert [(s.start, s.end) for s in from_file] == [(s.start, s.end) for s in from_array]
    for one, other in zip(from_file, from_array, strict=True):
        np.testing.assert_allclose(one.scores, other.scores, atol=1e-6)


def test_pooling_topk_and_threshold():
    tagger = Tagger(Bands())
    audio = np.concatenate([tone(6000, 1), silence(9)])
    peak = tagger.tag(audio, pool="peak", window=1, hop=1)
    mean = tagger.tag(audio, pool="mean", window=1, hop=1)
    assert peak[0].label == mean[0].label == "high"
    assert peak[0].score > 0.99 and 0.05 < mean[0].score < 0.2
    assert [tag.label for tag in tagger.tag(audio, pool="peak", window=1, topk=1)] == ["high"]
    assert all(tag.score >= 0.9 for tag in tagger.tag(audio, pool="peak", window=1, topk=None, threshold=0.9))
    assert len(tagger.tag(audio, topk=None)) == 3


def test_one_pass_over_the_whole_input_takes_every_frame():
    seen = []

    class Spy(Bands):
        def forward(self, fbank):
            seen.append(tuple(fbank.shape))
            return super().forward(fbank)

    tagger = Tagger(Spy())
    (segment,) = tagger.segments(np.concatenate([silence(20), tone(6000, 1)]), window=None)
    assert seen == [(1, 2098, 128)] and segment.end == 21 and segment.scores[2] > 0.9
    assert tagger.front_end.config == FRONT_END


def test_classes_by_name_index_and_pattern():
    tagger = Tagger(Bands())
    assert tagger.find_classes(["HIGH", "0"]) == [2, 0]
    assert tagger.find_classes(["*i*"]) == [1, 2]
    with pytest.raises(ValueError, match="'middel'.*'middle'"):
        tagger.find_classes(["middel"])


def test_bad_input_is_named(tmp_path):
    tagger = Tagger(Bands())
    with pytest.raises(AudioError, match="absent.wav"):
        tagger.tag(tmp_path / "absent.wav")
    with pytest.raises(TypeError, match="int16"):
        tagger.tag(np.zeros(100, dtype=np.int16))
    with pytest.raises(ValueError, match="not finite"):
        broken = Bands()
        broken.forward = lambda fbank: torch.full((len(fbank), 3), torch.nan)
        Tagger(broken).tag(silence(1))
    with pytest.raises(ValueError, match="labels"):
        Tagger(torch.nn.Identity())


# --- the command line -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    torch.manual_seed(0)
    config = DASSConfig(depths=(1, 1), dims=(8, 16), num_classes=3, id2label=dict(enumerate(BANDS)))
    model = DASS(config, front_end=vars(replace(FRONT_END, frames=64)))
    return model.save_pretrained(tmp_path_factory.mktemp("model"))


def command(capsys, *arguments):
    status = tag.main([str(argument) for argument in (*arguments, "--backend", "reference")])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_one_line_a_file_and_the_same_as_json_and_csv(checkpoint, tmp_path, capsys):
    files = [tmp_path / "a.wav", tmp_path / "b.flac"]
    soundfile.write(files[0], tone(300, 0.4), 44100)
    soundfile.write(files[1], np.stack([tone(900, 0.3), silence(0.3)], 1), 8000)
    status, out, _ = command(capsys, *files, "--model", checkpoint, "--topk", "2")
    lines = out.splitlines()
    assert status == 0 and len(lines) == 2
    assert all(line.startswith(str(file)) for line, file in zip(lines, files, strict=True))
    records = [json.loads(line) for line in command(capsys, *files, "--model", checkpoint, "--json")[1].splitlines()]
    assert [record["file"] for record in records] == [str(file) for file in files]
    assert records[0]["seconds"] == pytest.approx(6400 / 44100, abs=1e-3)
    model = Tagger(checkpoint, backend="reference")
    expected = model.tag(files[0], topk=3)
    assert [entry["label"] for entry in records[0]["tags"]] == [found.label for found in expected]
    for entry, found in zip(records[0]["tags"], expected, strict=True):
        assert entry["score"] == pytest.approx(found.score, abs=1e-4)
    rows = list(csv.DictReader(io.StringIO(command(capsys, *files, "--model", checkpoint, "--csv")[1])))
    assert len(rows) == 6 and rows[0]["label"] == records[0]["tags"][0]["label"]
    assert not (tmp_path / "tags").exists()


@pytest.mark.parametrize("labels, total", [("single-label", 1.0), ("multi-label", None)])
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_scores_are_what_the_run_was_trained_for(labels, total, checkpoint, tmp_path):
    shutil.copytree(checkpoint, tmp_path / "run" / "best")
    (tmp_path / "run" / "config.toml").write_text(f'[train]\nlabels = "{labels}"\n')
    for source in (tmp_path / "run", tmp_path / "run" / "best"):
        tags = Tagger(source, backend="reference").tag(tone(300, 0.3), topk=None)
        assert (sum(tag.score for tag in tags) == pytest.approx(1.0)) == (total is not None)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_a_long_file_leaves_picture_events_labels_and_record(checkpoint, long_file, tmp_path, capsys):
    out = tmp_path / "out"
    arguments = [long_file, "-m", checkpoint, "--window", "2", "--hop", "1", "--out", out, "--save-scores"]
    status, printed, _ = command(capsys, *arguments, "--threshold", "0.01", "--classes", "low", "high")
    assert status == 0 and printed.count("\n") == 1
    record = json.loads((out / "long.wav.json").read_text())
    assert record["seconds"] == 30 and [tag["label"] for tag in record["tags"]] != []
    assert {event["label"] for event in record["events"]} == {"low", "high"}
    assert all(event["start"] == 0 and event["end"] == 30 for event in record["events"])
    rows = list(csv.DictReader((out / "long.wav.events.csv").open()))
    assert [row["label"] for row in rows] == [event["label"] for event in record["events"]]
    first = (out / "long.wav.audacity.txt").read_text().splitlines()[0].split("\t")
    assert (float(first[0]), float(first[1])) == (0.0, 30.0) and first[2].split()[0] in ("low", "high")
    scores = list(csv.DictReader((out / "long.wav.scores.csv").open()))
    assert len(scores) == 30 and list(scores[0]) == ["start", "end", "low", "high"]
    from PIL import Image

    picture = Image.open(out / "long.wav.timeline.png")
    assert picture.width > 800 and len(picture.convert("RGB").getcolors(1 << 24)) > 20
    assert not list(out.glob(".*.tmp*"))


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_a_folder_is_resumed_and_a_broken_file_reported(checkpoint, tmp_path, capsys):
    folder, out = tmp_path / "in", tmp_path / "out"
    (folder / "deep").mkdir(parents=True)
    for name in ("one.wav", "deep/two.wav"):
        soundfile.write(folder / name, tone(500, 0.3), RATE)
    (folder / "broken.wav").write_bytes(b"RIFF....")
    (folder / "notes.txt").write_text("not audio")
    status, printed, errors = command(capsys, folder, "-m", checkpoint, "--out", out)
    assert status == 1 and len(printed.splitlines()) == 2 and "broken.wav" in errors
    assert [row["file"] for row in csv.DictReader((out / "errors.csv").open())] == [str(folder / "broken.wav")]
    assert {row["file"] for row in csv.DictReader((out / "tags.csv").open())} == {
        str(folder / "one.wav"),
        str(folder / "deep/two.wav"),
    }
    stamp = (out / "one.wav.json").stat().st_mtime_ns
    soundfile.write(folder / "broken.wav", tone(500, 0.3), RATE)  # mended
    (out / "deep/two.wav.json").unlink()  # as if the run had been killed there
    status, again, _ = command(capsys, folder, "-m", checkpoint, "--out", out)
    assert status == 0 and len(again.splitlines()) == 3
    assert set(printed.splitlines()) <= set(again.splitlines())
    assert (out / "one.wav.json").stat().st_mtime_ns == stamp, "done before, must not be done again"
    assert (out / "errors.csv").read_text() == "file,error\n"
    command(capsys, folder, "-m", checkpoint, "--out", out, "--topk", "1")
    assert (out / "one.wav.json").stat().st_mtime_ns != stamp, "other options, must be done again"


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_pictures_are_for_long_files(checkpoint, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, seconds in (("short", 1.2), ("long", 1.4)):  # the model's window is 0.64 s
        soundfile.write(f"{name}.wav", tone(300, seconds), RATE)
        _, _, errors = command(capsys, f"{name}.wav", "-m", checkpoint)
        assert Path("tags").exists() == (name == "long") == ("timeline: tags/long.wav.timeline.png" in errors)
    command(capsys, "short.wav", "-m", checkpoint, "--hop", "0.5")
    assert Path("tags/short.wav.json").is_file()


@given(st.lists(st.integers(0, 1000), max_size=30), st.integers(1, 5))
def test_ranks_share_every_file_once_and_evenly(sizes, world):
    jobs = [tag.Job(number, number, size, True) for number, size in enumerate(sizes)]
    parts = [tag.share(jobs, rank, world) for rank in range(world)]
    assert sorted(job.path for part in parts for job in part) == list(range(len(jobs)))
    assert all([job.path for job in part] == sorted(job.path for job in part) for part in parts)
    loads = [sum(job.size + 1 for job in part) for part in parts]
    assert max(loads) - min(loads) <= max(sizes, default=0) + 1


@pytest.fixture
def tones(tmp_path):
    folder = tmp_path / "in"
    folder.mkdir()
    for number in range(5):
        soundfile.write(folder / f"{number}.wav", tone(200 + 300 * number, 0.2), RATE)
    return folder


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_ranks_together_do_the_whole_folder(checkpoint, tones, tmp_path, monkeypatch, capsys):
    printed, out = [], tmp_path / "out"
    monkeypatch.setenv("WORLD_SIZE", "3")
    for rank in range(3):
        monkeypatch.setenv("RANK", str(rank))
        status, lines, _ = command(capsys, tones, "-m", checkpoint, "--out", out)
        assert status == 0
        printed.append(lines.splitlines())
    assert sorted(map(len, printed)) == [1, 2, 2]
    assert len(list(csv.DictReader((out / "tags.csv").open()))) == 15


@pytest.mark.slow
def test_torchrun_shares_a_folder(checkpoint, tones, tmp_path):
    out = tmp_path / "out"
    arguments = ["--standalone", "--nproc-per-node", "2", "-m", "dass.tag", tones, "-m", checkpoint, "--out", out]
    command = [sys.executable, "-W", "ignore", "-m", "torch.distributed.run", *map(str, arguments)]
    done = subprocess.run([*command, "--backend", "reference"], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == 5, "every file once"
    assert re.findall(r"(\d) files, 0 unreadable", done.stderr) in (["2", "3"], ["3", "2"]), "each rank its part"
    assert len(list(csv.DictReader((out / "tags.csv").open()))) == 15


@pytest.mark.slow
def test_workers_give_the_same_lines_in_the_same_order(checkpoint, tones, tmp_path):
    arguments = [sys.executable, "-W", "ignore", "-m", "dass.tag", tones, "-m", checkpoint, "--backend", "reference"]
    printed = [
        subprocess.run(
            [*map(str, arguments), "--workers", workers, "--out", str(tmp_path / workers)],
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for workers in ("1", "2")
    ]
    assert printed[0] == printed[1] and printed[0].count("\n") == 5


def test_what_cannot_be_done_is_said(checkpoint, tmp_path, capsys):
    soundfile.write(tmp_path / "a.wav", tone(300, 0.2), RATE)
    for arguments, words in (
        ([tmp_path / "a.wav", "-m", checkpoint, "--classes", "hihg"], "'hihg'.*'high'"),
        ([tmp_path / "a.wav", "-m", checkpoint, "--hop", "20"], "--hop"),
        ([tmp_path / "a.wav", "-m", tmp_path / "nothing"], "nothing"),
        ([checkpoint, "-m", checkpoint], "no sound file"),
        ([tmp_path / "a.wav", "-m", checkpoint, "--topk", "0"], "--topk must be at least 1"),
    ):
        status, _, errors = command(capsys, *arguments)
        assert status == 2
        assert re.search(words, errors), errors


@pytest.mark.slow
def test_memory_does_not_grow_with_the_file(tmp_path):
    """Two hours of audio in a fresh process: beyond start-up, less than a tenth of what holding it would take."""
    path = tmp_path / "hours.wav"
    with soundfile.SoundFile(path, "w", RATE, 1) as file:
        minute = (0.1 * np.random.default_rng(0).standard_normal(60 * RATE)).astype(np.float32)
        for _ in range(120):
            file.write(minute)
    program = (
        "import resource, sys; sys.path.insert(0, '.')\n"
        "from tests.model.bands import Bands; from dass.tagger import Tagger\n"
        "tagger = Tagger(Bands())\n"
        "def peak(seconds):\n"
        "    for segment in tagger.segments(sys.argv[1], window=10, hop=10):\n"
        "        if segment.end >= seconds: break\n"
        "    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "short = peak(300); print(short, peak(7200))"
    )
    done = subprocess.run([sys.executable, "-c", program, path], capture_output=True, text=True, check=True)
    short, whole = map(int, done.stdout.split())
    assert whole - short < 7200 * RATE * 4 / 1024 / 10
