"""The needle-in-a-haystack test: its figures, models, grid, resumption, failures, and the report in a real browser."""

import copy
import csv
import json
import os
import shutil
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import average_precision_score

from dass import niah
from dass.audio import AudioError, LogMelConfig
from dass.manifest import LabelClass, ManifestError
from dass.niah_data import NeedleConfig, NeedleSet, open_needles, spread_over_classes
from dass.niah_grid import CRASHED, ERROR, OUT_OF_MEMORY, Grid, Protocol
from dass.niah_measure import Forecast, limited_memory, measure
from dass.niah_metrics import cell_figures, draw_counts, mean_average_precision
from dass.niah_models import (
    LongAST,
    ModelError,
    ModelSpec,
    NiahModel,
    is_out_of_memory,
    load_model,
    parse_spec,
    parse_specs,
    sinusoids,
    windowed,
)
from dass.niah_pictures import extrapolate
from dass.niah_report import write_report
from dass.niah_store import OK, Group, Store, StoreError

CPU = torch.device("cpu")
RATE = 16000
FRONT_END = LogMelConfig(frames=40, mel_bins=32)
NAMES = ("low", "middle", "high")
TONES = (300.0, 1200.0, 5000.0)


class Tones:
    """Clips of a pure tone, one of three, with a broken one where asked for."""

    classes = tuple(LabelClass(index, name, name) for index, name in enumerate(NAMES))

    def __init__(self, count=6, broken=()):
        self.count, self.broken = count, broken

    def __len__(self):
        return self.count

    def labels(self, index):
        return (index % 3,)

    def name(self, index):
        return f"tone-{index}"

    def file(self, index):
        return None

    def seconds(self, index):
        return 0.4

    def read(self, index, *, sample_rate, start, duration, hashed):
        if index in self.broken:
            raise AudioError(self.name(index), "is broken")
        time = torch.arange(int(0.41 * RATE)) / RATE
        return 0.3 * torch.sin(2 * torch.pi * (TONES[index % 3] + 10 * index) * time), ""


def hear(fbank):
    """Logits that follow the loudest band: finds every tone of this corpus wherever it is, in any haystack used here."""
    parts = fbank.split([11, 11, 10], dim=2)
    return torch.stack([part.amax(dim=(1, 2)) for part in parts], dim=1)


def hear_beginning(fbank):
    """Deaf after the first 40 frames."""
    return hear(fbank[:, :40])


def model_of(run, name="model", identity="weights-1"):
    return NiahModel(name, run, FRONT_END, Tones.classes, 0, identity, CPU)


PROTOCOL = Protocol(
    lengths=(0.0, 1.0, 2.0),
    positions=(0.0, 0.5, 1.0),
    haystacks=("mean-spectrum", "white"),
    snrs=(20.0,),
    placing="replace",
    seed=0,
    talkers=2,
    folders={},
    audio_per_cell=None,
    bootstrap=20,
)
FIXED = {"needles": "tones", "positions": [0.0, 0.5, 1.0]}


def run_grid(folder, models, protocol=PROTOCOL, clips=None, source=None, fixed=FIXED, **options):
    """Runs the grid of named functions; returns the store."""
    store = Store(folder, fixed)
    loaded = {name: run if isinstance(run, NiahModel) else model_of(run, name) for name, run in models.items()}
    specs = [ModelSpec(name, name) for name in models]
    needles = NeedleSet(source or Tones(), clips, 0, "tones")
    Grid(protocol, needles, specs, lambda spec: loaded[spec.name], store, **options).run()
    return Store(folder, fixed)


def timeless(store):
    """The lines without what depends on the clock or the machine."""
    clock = {"seconds", "seconds_worst", "peak_memory", "finished"}
    return {key: {k: v for k, v in line.items() if k not in clock} for key, line in store.lines.items()}


# --- figures ----------------------------------------------------------------------------------------------------------


@given(st.integers(2, 30), st.integers(1, 4), st.integers(0, 10**6))
@settings(deadline=None, max_examples=40)
def test_average_precision_is_that_of_scikit_learn_for_every_draw(clips, classes, seed):
    random = np.random.default_rng(seed)
    scores = random.integers(0, 6, (clips, classes)).astype(float)  # many ties
    target = random.random((clips, classes)) < 0.4
    counts = np.concatenate([np.ones((1, clips), np.int16), draw_counts(clips, 5, seed)])
    found = mean_average_precision(scores, target, counts)
    for row, value in zip(counts, found, strict=True):
        drawn = np.repeat(np.arange(clips), row)
        columns = [c for c in range(classes) if 0 < target[drawn, c].sum() < clips]
        expected = [average_precision_score(target[drawn, c], scores[drawn, c]) for c in columns]
        if columns:
            assert value == pytest.approx(np.mean(expected))
        else:
            assert np.isnan(value)


def test_figures_of_a_cell():
    random = np.random.default_rng(0)
    target = np.eye(4, dtype=bool)[np.arange(60) % 4]
    good = target + 0.3 * random.standard_normal(target.shape)
    bad = target + 2.0 * random.standard_normal(target.shape)
    figures = cell_figures(bad, target, good, draws=300)
    assert figures.map.low < figures.map.value < figures.map.high
    assert figures.retention.value == pytest.approx(figures.map.value / cell_figures(good, target, None).map.value)
    assert figures.retention.low < figures.retention.value < figures.retention.high < 1
    assert figures.top1.value == (bad.argmax(1) == np.arange(60) % 4).mean()
    same = cell_figures(good, target, good)
    assert (same.retention.value, same.retention.low, same.retention.high) == (1, 1, 1), "the draws are paired"
    assert np.isnan(cell_figures(good, target, None).retention.value)
    assert np.isnan(cell_figures(good[:0], target[:0], None).map.value)
    single = cell_figures(good[:1], target[:1], None)
    assert np.isnan(single.map.value) and single.top1.value in (0, 1), "one clip has no order"


def test_a_larger_set_has_a_narrower_interval():
    random = np.random.default_rng(1)
    widths = []
    for clips in (20, 200, 2000):
        target = np.eye(4, dtype=bool)[random.integers(0, 4, clips)]
        map_ = cell_figures(target + random.standard_normal(target.shape), target, None, draws=200).map
        widths.append(map_.high - map_.low)
    assert widths[0] > 2 * widths[1] > 4 * widths[2]


# --- needles ----------------------------------------------------------------------------------------------------------


@given(st.lists(st.lists(st.integers(0, 4), max_size=3, unique=True), max_size=40), st.integers(0, 3))
@settings(deadline=None)
def test_needles_are_spread_over_the_classes(labels, seed):
    labels = [tuple(entry) for entry in labels]
    order = spread_over_classes(labels, 5, seed)
    assert sorted(order) == [index for index, entry in enumerate(labels) if entry]
    present = {label for entry in labels for label in entry}
    assert {label for index in order[: len(present)] for label in labels[index]} == present
    assert order == spread_over_classes(labels, 5, seed)


def test_needles_come_from_any_set_the_trainer_reads(tmp_path):
    import soundfile

    (tmp_path / "audio").mkdir()
    rows = ["filename,fold,target,category"]
    for number in range(6):
        soundfile.write(tmp_path / "audio" / f"{number}.wav", np.full(1600, 0.1), 16000)
        rows.append(f"{number}.wav,{1 + number % 2},{number % 3},{NAMES[number % 3]}")
    (tmp_path / "meta").mkdir()
    (tmp_path / "meta" / "esc50.csv").write_text("\n".join(rows))
    needles = open_needles(NeedleConfig(set=tmp_path, fold="2"), None, 0)
    assert len(needles) == 3 and needles.target.sum() == 3
    assert needles.waveform(0, 16000, 800).shape == (800,)
    assert len(open_needles(NeedleConfig(set=tmp_path, holdout="^[01]", clips=1), None, 0)) == 1
    with pytest.raises(ManifestError, match="no fold '9'; it has 1, 2"):
        open_needles(NeedleConfig(set=tmp_path, fold="9"), None, 0)
    assert open_needles(NeedleConfig(clips=5), None, 0).origin == "the built-in synthetic corpus"
    changed = open_needles(NeedleConfig(set=tmp_path, fold="1"), None, 0)
    assert changed.identity() != needles.identity()


# --- models -----------------------------------------------------------------------------------------------------------


def test_specifications_are_taken_apart(tmp_path):
    assert parse_spec("DASS=runs/a@windows") == ModelSpec("DASS", "runs/a", "windows")
    assert parse_spec("package.module:function") == ModelSpec("package.module:function", "package.module:function")
    assert parse_spec("runs/esc10@sinusoidal").name == "esc10@sinusoidal"
    with pytest.raises(ModelError, match="sinusoidle.*sinusoidal"):
        parse_spec("ast@sinusoidle")
    with pytest.raises(ModelError, match="no file or folder 'nothing'"):
        parse_specs(("nothing",))
    with pytest.raises(ModelError, match="two models"):
        parse_specs(("math:sin", "math:sin"))


@pytest.fixture
def small_ast(fresh_ast):
    return copy.deepcopy(fresh_ast)


@pytest.fixture(scope="module")
def fresh_ast():
    pytest.importorskip("transformers")
    from transformers import ASTConfig, ASTForAudioClassification

    torch.manual_seed(0)
    config = ASTConfig(
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        frequency_stride=16,
        time_stride=8,
        max_length=40,
        num_mel_bins=32,
        num_labels=3,
        id2label=dict(enumerate(NAMES)),
    )
    model = ASTForAudioClassification(config).eval().requires_grad_(False)
    torch.nn.init.normal_(model.audio_spectrogram_transformer.embeddings.position_embeddings)
    return model


@pytest.mark.parametrize("way", ["sinusoidal", "interpolated"])
def test_an_ast_is_itself_at_its_length_and_takes_any_other(small_ast, way):
    fbank = torch.randn(2, 40, 32)
    expected = small_ast(input_values=fbank).logits
    long = LongAST(small_ast, way)
    assert long(torch.randn(1, 200, 32)).shape == (1, 3)
    assert torch.equal(long(fbank), expected), "also after another length"
    assert long(torch.randn(1, 16, 32)).shape == (1, 3)
    with pytest.raises(ModelError, match="16 frames"):
        long(torch.randn(1, 15, 32))


def test_positions_beyond_the_trained_length(small_ast):
    long = LongAST(small_ast, "interpolated")
    rows, trained = 2, 4
    ramp = torch.arange(trained, dtype=torch.float32).repeat(rows)[None, :, None] + 10 * torch.arange(
        rows
    ).repeat_interleave(trained).view(1, -1, 1)
    long.learned = torch.cat([torch.full((1, 2, 16), -5.0), ramp.expand(1, -1, 16)], dim=1)
    found = long.positions(16 + 8 * 15)[0, :, 0]  # 16 columns
    assert found.shape == (2 + rows * 16,) and (found[:2] == -5).all(), "the two special tokens keep theirs"
    grid = found[2:].view(rows, 16)
    assert torch.allclose(grid[1] - grid[0], torch.full((16,), 10.0)), "frequency is left alone"
    assert (grid[0].diff() >= 0).all() and grid[0, 0] == 0 and grid[0, -1] == 3
    sines = LongAST(small_ast, "sinusoidal").positions(16 + 8 * 15)
    assert torch.equal(sines[0], sinusoids(2 + rows * 16, 16))
    table = sinusoids(50, 6)
    assert table[0].tolist() == [0, 1, 0, 1, 0, 1]
    assert table[7, 2].item() == pytest.approx(np.sin(7 / 10000 ** (2 / 6)), abs=1e-6)
    assert table[7, 3].item() == pytest.approx(np.cos(7 / 10000 ** (2 / 6)), abs=1e-6)


def test_windows_keep_the_highest_logit():
    seen = []

    def run(fbank):
        seen.append(tuple(fbank.shape))
        return fbank.sum(dim=(1, 2))[:, None]

    fbank = torch.zeros(1, 130, 32)
    fbank[0, 125] = 1
    assert windowed(run, FRONT_END)(fbank).item() == 32 and all(shape[1] == 40 for shape in seen)
    assert sum(shape[0] for shape in seen) == 6  # 0, 20, ..., 80, and 90 flush with the end
    short = torch.zeros(1, 10, 32)
    assert windowed(run, FRONT_END)(short).item() == pytest.approx(30 * 32 * FRONT_END.padding, rel=1e-4)


def test_dass_ast_and_functions_are_loaded(small_ast, tmp_path, monkeypatch):
    from dass.model import DASS, DASSConfig
    from dass.teacher_models import TransformersClassifier

    config = DASSConfig(depths=(1, 1), dims=(8, 16), num_classes=3, mel_bins=32, id2label=dict(enumerate(NAMES)))
    DASS(config, front_end=asdict(FRONT_END)).save_pretrained(tmp_path / "dass")
    TransformersClassifier(small_ast, FRONT_END).save_pretrained(tmp_path / "ast")
    (tmp_path / "mine.py").write_text(
        "import torch\ndef model(fbank): return fbank.mean(1)[:, :3]\n"
        "model.front_end = dict(frames=40, mel_bins=32)\nmodel.classes = ('low', 'middle', 'high')\n"
        "number = 3\n"
    )
    monkeypatch.chdir(tmp_path)
    specs = parse_specs(("dass", "ast", "ast@windows", "mine:model"))
    assert [spec.name for spec in specs] == ["dass", "ast@sinusoidal", "ast@interpolated", "ast@windows", "mine:model"]
    models = [load_model(spec, CPU, "reference" if spec.name == "dass" else None) for spec in specs]
    for model in models:
        with torch.inference_mode():
            assert model.run(torch.randn(1, 90, 32)).shape == (1, 3)
        assert model.front_end == FRONT_END
        assert [entry.name for entry in model.classes] == list(NAMES)
    assert models[0].identity == load_model(specs[0], CPU).identity != models[1].identity == models[2].identity
    for text, words in (("mine:absent", "absent"), ("mine:number", "is a int"), ("dass@sinusoidal", "has none")):
        with pytest.raises(ModelError, match=words):
            load_model(parse_spec(text), CPU)


# --- time and memory --------------------------------------------------------------------------------------------------


@pytest.mark.skipif(
    not Path("/proc/self/clear_refs").exists(), reason="the peak of memory is measured under Linux only"
)
def test_the_peak_memory_of_a_pass_is_measured_and_limited():
    torch.ones(1000).sum()
    found = measure(lambda: (torch.ones(8_000_000) * 2).sum(), CPU)
    assert found.memory == pytest.approx(64e6, rel=0.2) and found.result == 16_000_000 and found.seconds > 0
    assert measure(lambda: torch.ones(10), CPU).memory < 4e6
    with limited_memory(50e6), pytest.raises(RuntimeError) as raised:
        torch.ones(40_000_000)
    assert is_out_of_memory(raised.value)
    assert torch.ones(40_000_000).sum() == 40_000_000, "the limit is gone"


def test_what_lack_of_memory_looks_like():
    assert is_out_of_memory(MemoryError()) and is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory"))
    assert not is_out_of_memory(ValueError("out of memory of what was said"))


def test_the_forecast_follows_the_growth_that_was_seen():
    forecast = Forecast()
    assert forecast.seconds("a", 100) is None
    forecast.add("a", 100, 1.0)
    assert forecast.seconds("a", 300) == pytest.approx(3.0) and forecast.seconds("b", 300) == pytest.approx(3.0)
    forecast.add("a", 200, 4.0)
    assert forecast.seconds("a", 400) == pytest.approx(16.0)
    assert forecast.seconds("a", 200) == 4.0
    forecast.add("b", 100, 2.0)
    forecast.add("b", 1000, 2.0)  # a fixed cost at the beginning does not promise that long inputs are free
    assert forecast.seconds("b", 10_000) == pytest.approx(20.0)
    assert extrapolate([(10, 1.0), (100, 10.0)], 1000) == pytest.approx(100)
    assert extrapolate([(10, 1.0)], 1000) is None


# --- the grid ---------------------------------------------------------------------------------------------------------


def test_a_model_that_hears_everything_loses_nothing_and_a_deaf_one_does(tmp_path):
    store = run_grid(tmp_path, {"all": hear, "beginning": hear_beginning})
    lines = list(store.lines.values())
    assert len(lines) == 2 * 3 * 2 * 3 and all(line["status"] == OK for line in lines)
    for line in lines:
        assert line["clips"] == 6 and line["classes"] == 3 and line["seconds"] > 0
        heard = line["model"] == "all" or line["length"] == 0 or line["position"] == 0
        assert (line["map"] > 0.999) == heard and (line["retention"] > 0.999) == heard, line
        assert line["frames"] == {0.0: 40, 1.0: 100, 2.0: 200}[line["length"]]
        if line["length"] == 0:
            assert line["retention_low"] == line["retention_high"] == 1
    assert timeless(store) == timeless(run_grid(tmp_path / "again", {"all": hear, "beginning": hear_beginning}))


@pytest.mark.parametrize("placing", ["replace", "overlay"])
def test_every_sounding_haystack_can_be_used(tmp_path, placing):
    import soundfile

    sounds = tmp_path / "sounds"
    sounds.mkdir()
    soundfile.write(sounds / "a.wav", 0.1 * np.random.default_rng(0).standard_normal(8000), 8000)
    protocol = replace(
        PROTOCOL,
        lengths=(1.0,),
        placing=placing,
        haystacks=("silence", "white", "pink", "babble", "recording", "other-clips"),
        snrs=(30.0, 40.0),
        folders={"babble": sounds, "recording": sounds},
    )
    store = run_grid(tmp_path / "out", {"all": hear}, protocol)
    assert len(store.lines) == (1 + 5 * 2) * 3
    for line in store.lines.values():
        assert line["status"] == OK and (line["haystack"] == "other-clips" or line["map"] > 0.9), line
    assert {line["snr"] for line in store.lines.values()} == {None, 30.0, 40.0}


def test_a_stopped_grid_goes_on_where_it_was_and_ends_the_same(tmp_path):
    expected = timeless(run_grid(tmp_path / "whole", {"all": hear, "beginning": hear_beginning}))
    calls = 0

    def stopping(fbank):
        nonlocal calls
        calls += 1
        if calls in (40, 61, 100):  # in the middle of a clip
            raise KeyboardInterrupt
        return hear(fbank)

    for _ in range(3):
        with pytest.raises(KeyboardInterrupt):
            run_grid(tmp_path / "parts", {"all": stopping, "beginning": hear_beginning})
    store = run_grid(tmp_path / "parts", {"all": stopping, "beginning": hear_beginning})
    assert timeless(store) == expected
    assert calls <= 6 * 6 * 3 + 3 * 3, "only the clips that were under way are done again"
    before = calls
    run_grid(tmp_path / "parts", {"all": stopping, "beginning": hear_beginning})
    assert calls == before, "nothing is left to do"


def test_failures_are_recorded_and_the_grid_goes_on(tmp_path):
    def no_memory(fbank):
        if fbank.shape[1] > 40:
            raise MemoryError("no more")
        return hear(fbank)

    def picky(fbank):
        if fbank.shape[1] == 100:
            raise RuntimeError("only even numbers of seconds")
        return hear(fbank)

    def broken(fbank):
        return hear(fbank) * torch.nan

    models = {"no_memory": no_memory, "picky": picky, "broken": broken, "wrong": lambda fbank: fbank, "all": hear}
    store = run_grid(tmp_path, models)
    status = {(line["model"], line["length"]): line for line in store.lines.values()}
    assert [status["no_memory", length]["status"] for length in (0.0, 1.0, 2.0)] == [OK, OUT_OF_MEMORY, OUT_OF_MEMORY]
    assert status["no_memory", 2.0]["inferred"] and "1 s" in status["no_memory", 2.0]["error"]
    assert [status["picky", length]["status"] for length in (0.0, 1.0, 2.0)] == [OK, ERROR, OK]
    assert "even numbers" in status["picky", 1.0]["error"]
    assert "not finite" in status["broken", 0.0]["error"] and "expected logits" in status["wrong", 0.0]["error"]
    assert all(status["all", length]["status"] == OK for length in (0.0, 1.0, 2.0))
    assert len(store.lines) == 5 * 3 * 2 * 3
    store.forget_failures()
    assert {line["model"] for line in store.lines.values()} == {"no_memory", "picky", "all"}
    page = write_report(tmp_path).read_text()
    assert "even numbers" in page


def test_a_model_that_cannot_be_loaded_is_a_result(tmp_path):
    store = Store(tmp_path, FIXED)

    def load(spec):
        if spec.name == "bad":
            raise ModelError("weights are missing")
        return model_of(hear, spec.name)

    specs = [ModelSpec("bad", "bad"), ModelSpec("good", "good")]
    Grid(PROTOCOL, NeedleSet(Tones(), None, 0, "tones"), specs, load, store).run()
    found = {line["model"]: line["status"] for line in store.lines.values()}
    assert found == {"bad": ERROR, "good": OK}


def test_lengths_added_later_change_what_retention_refers_to(tmp_path):
    def fading(fbank):
        good = hear(fbank)
        return good if fbank.shape[1] < 150 else -good

    long = replace(PROTOCOL, lengths=(2.0,))
    store = run_grid(tmp_path, {"m": fading}, long)
    assert {line["retention"] for line in store.lines.values()} == {1.0}
    store = run_grid(tmp_path, {"m": fading}, replace(PROTOCOL, lengths=(0.0,)))
    lines = [line for line in store.lines.values() if line["length"] == 2.0]
    assert len(lines) == 6
    assert all(line["retention_of"] == 0.0 and line["retention"] < 0.7 for line in lines)


def test_other_weights_under_the_same_name_are_done_anew(tmp_path):
    run_grid(tmp_path, {"m": model_of(lambda fbank: -hear(fbank), "m", "weights-1")})
    store = run_grid(tmp_path, {"m": model_of(hear, "m", "weights-2")})
    assert all(line["model_id"] == "weights-2" and line["map"] > 0.99 for line in store.lines.values())


def test_a_broken_clip_is_left_out_and_counted(tmp_path):
    store = run_grid(tmp_path, {"m": hear}, source=Tones(6, broken=(4,)))
    assert all((line["clips"], line["broken"]) == (5, 1) for line in store.lines.values())


def test_long_inputs_may_have_fewer_needles(tmp_path):
    store = run_grid(tmp_path, {"m": hear}, replace(PROTOCOL, audio_per_cell=4.0))
    assert {line["length"]: line["clips"] for line in store.lines.values()} == {0.0: 6, 1.0: 4, 2.0: 2}
    assert all(line["retention"] is not None for line in store.lines.values())


# --- the folder -------------------------------------------------------------------------------------------------------


def test_a_torn_last_line_is_forgotten_and_another_protocol_refused(tmp_path):
    store = run_grid(tmp_path, {"m": hear})
    path = tmp_path / "results.jsonl"
    text = path.read_bytes()
    path.write_bytes(text[:-20])
    torn = Store(tmp_path, FIXED)
    assert len(torn.lines) == len(store.lines) - 1 and path.read_bytes() == text[: text[:-1].rfind(b"\n") + 1]
    assert timeless(run_grid(tmp_path, {"m": hear})) == timeless(store)
    with pytest.raises(StoreError, match="positions was .* is .*--restart"):
        Store(tmp_path, {**FIXED, "positions": [0.0]})
    assert not Store(tmp_path, {**FIXED, "positions": [0.0]}, restart=True).lines
    with pytest.raises(StoreError, match="holds no results"):
        Store(tmp_path / "empty")


def test_groups_have_names_of_their_own():
    groups = [Group(m, s, h, snr) for m in ("a b", "a-b") for s in (1.0, 10.0) for h in ("x",) for snr in (None, 1.0)]
    assert len({group.id for group in groups}) == len(groups)
    assert all(set(group.id) <= set("abcdefghijklmnopqrstuvwxyz0123456789.+-BsdB") for group in groups)


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
        (["math:sin", "--report-only", "--out", "nowhere"], "holds no results"),
    ],
)
def test_what_cannot_be_done_is_said(arguments, words, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert niah.main([*arguments, "--no-isolate"]) == 2
    assert words in capsys.readouterr().err


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
        "heat-mine_niah-model.png",
        "retention.png",
    ]


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
    root = str(Path(niah.__file__).parent.parent)
    path = os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])])
    done = subprocess.run(
        command, cwd=tmp_path, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    status = {(line["model"], line["length"]): line for line in Store(tmp_path / "out").lines.values()}
    assert [status["deadly:bad", s]["status"] for s in (0.0, 1.0, 2.0, 3.0)] == [OK, OK, CRASHED, CRASHED]
    assert "SIGKILL" in status["deadly:bad", 2.0]["error"] and status["deadly:bad", 3.0]["inferred"]
    assert all(status["deadly:good", s]["status"] == OK for s in (0.0, 1.0, 2.0, 3.0))
    assert "report:" in done.stdout


# --- the report in a browser ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    folder = tmp_path_factory.mktemp("report")

    def forgetful(fbank):
        if fbank.shape[1] > 150:
            raise MemoryError("no more")
        return hear_beginning(fbank)

    run_grid(folder, {"hears <all>": hear, "forgetful": forgetful})
    return write_report(folder)


def browser():
    selenium = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")
    binary = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    driver = shutil.which("chromedriver")
    if binary is None or driver is None:
        pytest.skip("no chromium with chromedriver here (Debian: apt-get install chromium chromium-driver)")
    options = selenium.ChromeOptions()
    options.binary_location = binary
    for argument in (
        "--headless=new",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-dev-shm-usage",
        "--window-size=1400,2400",
    ):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    return selenium.Chrome(options=options, service=selenium.ChromeService(driver))


def test_the_page_works_in_a_browser_without_a_network(report):
    window = browser()
    try:
        window.get(report.as_uri())
        assert window.get_log("browser") == [], "no errors on the console"
        sizes = window.execute_script(
            "return [...document.images].map(image => [image.complete, image.naturalWidth, image.naturalHeight])"
        )
        assert len(sizes) == 4 and all(complete and width > 300 and height > 200 for complete, width, height in sizes)
        requests = [json.loads(entry["message"])["message"] for entry in window.get_log("performance")]
        urls = [r["params"]["request"]["url"] for r in requests if r["method"] == "Network.requestWillBeSent"]
        assert urls and all(url.startswith(("file:", "data:")) for url in urls)
        text = window.find_element("tag name", "body").text
        assert "hears <all>" in text and "out of memory" in text and "PyTorch" not in text.split("Machine")[0]
        rows = "return [...document.querySelectorAll('#cells tbody tr')].filter(r => !r.hidden).map(r => r.innerText)"
        assert len(window.execute_script(rows)) == 36
        window.find_element("id", "filter").send_keys("forgetful white")
        shown = window.execute_script(rows)
        assert len(shown) == 9 and all("forgetful" in row for row in shown)
        window.find_element("id", "filter").clear()
        window.find_element("css selector", "#cells th:nth-child(5)").click()
        column = "return [...document.querySelectorAll('#cells tbody tr')].map(r => Number(r.cells[4].dataset.v))"
        assert (np.diff(window.execute_script(column)) <= 0).all(), "sorted by position, down"
        if folder := os.environ.get("DASS_SCREENSHOTS"):
            window.save_screenshot(str(Path(folder) / "niah-report.png"))
    finally:
        window.quit()


def test_the_page_is_one_file_and_says_what_was_published(report):
    page = report.read_text()
    assert "http://" not in page and "https://" not in page and '<link rel="stylesheet"' not in page
    assert "hears &lt;all&gt;" in page and "<all>" not in page
    assert "model card" in page and "at most 12 %" in page
    assert page.count("data:image/png;base64,") == 4
