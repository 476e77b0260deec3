"""Needle in a haystack: the grid, its resumption and failures, the folder of results."""

import json
import time
from dataclasses import replace

import numpy as np
import pytest
import torch

from dass.niah_data import NeedleSet
from dass.niah_grid import ERROR, OUT_OF_MEMORY, TOO_SLOW, Grid
from dass.niah_models import (
    ModelError,
    ModelSpec,
)
from dass.niah_report import write_report
from dass.niah_store import OK, Group, Store, StoreError
from tests.model.niah_tones import FIXED, PROTOCOL, Tones, hear, hear_beginning, model_of, run_grid, timeless

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
        if calls in (20, 41, 60):  # in the middle of a clip
            raise KeyboardInterrupt
        return hear(fbank)

    for _ in range(3):
        with pytest.raises(KeyboardInterrupt):
            run_grid(tmp_path / "parts", {"all": stopping, "beginning": hear_beginning})
    store = run_grid(tmp_path / "parts", {"all": stopping, "beginning": hear_beginning})
    assert timeless(store) == expected
    assert calls <= 6 + 6 * 3 * 2 * 2 + 3 * 3, "only the clips that were under way are done again"
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


def test_the_needle_alone_is_heard_once(tmp_path):
    heard = []

    def counted(fbank):
        heard.append(fbank.shape[1])
        return hear(fbank)

    store = run_grid(tmp_path, {"m": counted})
    assert [heard.count(frames) for frames in (40, 100, 200)] == [6, 6 * 3 * 2, 6 * 3 * 2]
    assert all(line["map"] > 0.999 and line["clips"] == 6 for line in store.lines.values())


def test_memory_that_truly_runs_out_is_recorded_and_the_process_lives(tmp_path):
    def hungry(fbank):
        torch.ones(fbank.shape[1], 500_000).sum()  # 2 MB a frame: 80, 200 and 400 MB
        return hear(fbank)

    protocol = replace(PROTOCOL, haystacks=("mean-spectrum",))
    store = run_grid(tmp_path, {"hungry": hungry, "all": hear}, protocol, clips=2, memory=300e6)
    status = {(line["model"], line["length"]): line for line in store.lines.values()}
    assert [status["hungry", length]["status"] for length in (0.0, 1.0, 2.0)] == [OK, OK, OUT_OF_MEMORY]
    assert "allocate" in status["hungry", 2.0]["error"] and "inferred" not in status["hungry", 2.0]
    assert status["hungry", 1.0]["peak_memory"] == pytest.approx(200e6, rel=0.2)
    assert all(status["all", length]["status"] == OK for length in (0.0, 1.0, 2.0))


def test_what_would_take_too_long_is_not_tried(tmp_path):
    def slow(fbank):
        time.sleep(0.001 * fbank.shape[1])
        return hear(fbank)

    protocol = replace(PROTOCOL, haystacks=("mean-spectrum",))
    run_grid(tmp_path, {"slow": slow}, replace(protocol, lengths=(0.0, 1.0)), clips=2)

    def never(fbank):
        raise AssertionError("must not be tried")

    # The times that decide were stored by the first start.
    store = run_grid(tmp_path, {"slow": never}, protocol, clips=2, longest_pass=0.15)
    found = {line["length"]: line for line in store.lines.values()}
    assert [found[length]["status"] for length in (0.0, 1.0, 2.0)] == [OK, OK, TOO_SLOW]
    assert found[2.0]["error"].startswith("not tried: a pass would take about 0.2")
    assert "too slow" in write_report(tmp_path).read_text()


def test_a_pass_that_no_shorter_one_promised_is_the_last_of_its_length(tmp_path):
    passes = []

    def suddenly_slow(fbank):
        passes.append(fbank.shape[1])
        time.sleep(0.3 * (fbank.shape[1] > 150))
        return hear(fbank)

    store = run_grid(tmp_path, {"m": suddenly_slow}, longest_pass=0.25)
    assert [passes.count(frames) for frames in (40, 100, 200)] == [6, 6 * 3 * 2, 3], "one needle, in one haystack"
    errors = {line["haystack"]: line["error"] for line in store.lines.values() if line["status"] == TOO_SLOW}
    assert errors["mean-spectrum"].startswith("a pass took 0.3")
    assert errors["white"] == "not tried: too slow at 2 s (mean-spectrum)"


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
    fewest = replace(PROTOCOL, audio_per_cell=4.0, fewest_needles=5)
    store = run_grid(tmp_path / "fewest", {"m": hear}, fewest)
    assert {line["length"]: line["clips"] for line in store.lines.values()} == {0.0: 6, 1.0: 5, 2.0: 5}


def test_a_cell_may_get_more_needles_later(tmp_path):
    """Only the new ones are heard, and all end as they would have at once; fewer asked for leave what is there."""
    heard = []

    def counting(fbank):
        heard.append(fbank.shape[1])
        return hear(fbank)

    def few(needles):
        return replace(PROTOCOL, audio_per_cell=1.0, fewest_needles=needles)

    run_grid(tmp_path, {"m": counting}, few(2))
    before = len(heard)
    store = run_grid(tmp_path, {"m": counting}, few(5))
    assert {line["length"]: line["clips"] for line in store.lines.values()} == {0.0: 6, 1.0: 5, 2.0: 5}
    assert len(heard) - before == 3 * 3 * 2 * 2, "three needles more, at three positions, in two haystacks and lengths"
    assert timeless(store) == timeless(run_grid(tmp_path / "at-once", {"m": hear}, few(5)))
    again = run_grid(tmp_path, {"m": counting}, few(3))
    assert timeless(again) == timeless(store) and len(heard) == before + 36


def test_lines_that_lack_a_figure_are_completed_without_a_pass(tmp_path):
    store = run_grid(tmp_path, {"m": hear})
    path = tmp_path / "results.jsonl"
    older = [json.loads(line) for line in path.read_text().splitlines()]
    path.write_text("".join(json.dumps({k: v for k, v in line.items() if k != "centred"}) + "\n" for line in older))

    def never(fbank):
        raise AssertionError("all is there")

    assert timeless(run_grid(tmp_path, {"m": never})) == timeless(store)


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
    assert Store(tmp_path, {**FIXED, "needles": "the same from elsewhere"}).lines
    assert not Store(tmp_path, {**FIXED, "positions": [0.0]}, restart=True).lines
    with pytest.raises(StoreError, match="holds no results"):
        Store(tmp_path / "empty")


def test_a_folder_of_sounds_matters_only_where_it_is_used(tmp_path):
    Store(tmp_path, {**FIXED, "babble": "1"})
    Store(tmp_path, FIXED)
    with pytest.raises(StoreError, match="babble was '1', is '2'"):
        Store(tmp_path, {**FIXED, "babble": "2"})
    assert Store(tmp_path, {**FIXED, "recording": "3"}).protocol == {**Store(tmp_path).protocol, "babble": "1"}


def test_groups_have_names_of_their_own():
    groups = [Group(m, s, h, snr) for m in ("a b", "a-b") for s in (1.0, 10.0) for h in ("x",) for snr in (None, 1.0)]
    assert len({group.id for group in groups}) == len(groups)
    assert all(set(group.id) <= set("abcdefghijklmnopqrstuvwxyz0123456789.+-BsdB") for group in groups)
