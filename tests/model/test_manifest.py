"""Lists of clips in every form, and how they are divided."""

import json
import shutil

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dass.data import ManifestError, read_manifest
from dass.manifest import Clip, LabelClass
from dass.splits import split_by_fold, split_by_fraction, split_by_list, split_by_regex
from tests.model.recordings import folder, manifest_of, write_sound

__all__ = ["folder"]  # a fixture


# --- the forms of manifests ------------------------------------------------------------------------------------------


def test_folder_per_class(folder):
    write_sound(folder / "_background_noise_" / "hum.wav")
    write_sound(folder / "cat" / "deeper" / "_0.wav")
    (folder / "cat" / "notes.txt").write_text("no sound")
    manifest = read_manifest(folder)
    assert manifest.classes == tuple(LabelClass(i, name, name) for i, name in enumerate(("cat", "dog", "owl")))
    assert manifest.label_counts().tolist() == [9, 8, 8]
    clip = next(clip for clip in manifest.clips if clip.key == "owl/owl-3.wav")
    assert clip == Clip(folder / "owl" / "owl-3.wav", (2,), "owl/owl-3.wav")


def test_flat_folder_with_the_label_in_the_name(tmp_path):
    for digit in range(3):
        for speaker in ("theo", "lucas"):
            write_sound(tmp_path / f"{digit}_{speaker}_0.wav")
    with pytest.raises(ManifestError, match=r"6 sound files and no such sub-folder.*--data.label-regex"):
        read_manifest(tmp_path)
    manifest = read_manifest(tmp_path, label_regex=r"^(\d)_", group_regex=r"_(\w+)_")
    assert [entry.id for entry in manifest.classes] == ["0", "1", "2"]
    assert {(clip.labels[0], clip.group) for clip in manifest} == {(d, s) for d in range(3) for s in ("theo", "lucas")}
    assert len(read_manifest(tmp_path, label_regex=r"^(\d)_", exclude="theo")) == 3
    for pattern, message in (
        (r"^(\d)-", "finds nothing in"),
        (r"^\d_", "group in parentheses"),
        ("(", "regular exp"),
    ):
        with pytest.raises(ManifestError, match=message):
            read_manifest(tmp_path, label_regex=pattern)


def test_csv(tmp_path):
    (tmp_path / "list.csv").write_text("path,label,fold\nb.wav,rain; wind,1\nsub/a.wav,rain,2\n/abs/c.wav,,2\n")
    manifest = read_manifest(tmp_path / "list.csv")
    assert [entry.id for entry in manifest.classes] == ["rain", "wind"]
    assert [clip.labels for clip in manifest] == [(0, 1), (0,), ()]
    assert [str(clip.path) for clip in manifest] == [
        str(tmp_path / "b.wav"),
        str(tmp_path / "sub/a.wav"),
        "/abs/c.wav",
    ]
    assert manifest.has_folds
    training, held_out = split_by_fold(manifest, 1)
    assert [clip.key for clip in held_out] == ["b.wav"]
    assert len(training) == 2


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a.wav,dog\nb.wav,cat\n", r"columns path,label .*found a\.wav, dog"),
        ("path,label\n", "no clips"),
        ("path,label\na.wav\n", "line 2"),
        ("path,label\na.wav,\n", "not one clip has a label"),
    ],
)
def test_csv_that_is_none(tmp_path, text, message):
    (tmp_path / "list.csv").write_text(text)
    with pytest.raises(ManifestError, match=message):
        read_manifest(tmp_path / "list.csv")


def test_esc50_layout(tmp_path):
    (tmp_path / "meta").mkdir()
    (tmp_path / "audio").mkdir()
    (tmp_path / "meta" / "esc50.csv").write_text(
        "filename,fold,target,category,esc10,src_file,take\n"
        "1-A.wav,1,20,crying_baby,True,77,A\n1-B.wav,1,20,crying_baby,True,77,B\n2-A.wav,2,0,dog,True,5,A\n"
    )
    for source in (tmp_path, tmp_path / "meta" / "esc50.csv"):
        manifest = read_manifest(source)
        assert manifest.classes == (LabelClass(0, "dog", "dog"), LabelClass(1, "crying_baby", "crying baby"))
        expected = Clip(tmp_path / "audio" / "1-B.wav", (1,), "1-B.wav", "1", "77")
        assert manifest[1] == expected
    with pytest.raises(ManifestError, match="no fold 5; it has 1, 2"):
        split_by_fold(manifest, 5)


def write_audioset(tmp_path, labels=("/m/1,/m/0", "/m/2")):
    (tmp_path / "class_labels_indices.csv").write_text(
        'index,mid,display_name\n0,/m/0,"Speech, male"\n1,/m/1,Music\n2,/m/2,Dog\n'
    )
    data = [{"wav": f"{i}.wav", "labels": entry} for i, entry in enumerate(labels)]
    (tmp_path / "train.json").write_text(json.dumps({"data": data}))
    return tmp_path / "train.json"


def test_audioset_json(tmp_path):
    manifest = read_manifest(write_audioset(tmp_path))
    assert manifest.classes[0] == LabelClass(0, "/m/0", "Speech, male")
    assert [clip.labels for clip in manifest] == [(0, 1), (2,)]
    assert manifest[0].path == tmp_path / "0.wav"
    shutil.move(tmp_path / "class_labels_indices.csv", tmp_path / "moved.csv")
    with pytest.raises(ManifestError, match="--data.classes"):
        read_manifest(tmp_path / "train.json")
    assert len(read_manifest(tmp_path / "train.json", classes=tmp_path / "moved.csv").classes) == 3


@pytest.mark.parametrize("text", ["[]", "{", '{"data": [{"wav": "a.wav"}]}', '{"data": [3]}'])
def test_json_that_is_none(tmp_path, text):
    write_audioset(tmp_path).write_text(text)
    with pytest.raises(ManifestError, match='expected {"data"'):
        read_manifest(tmp_path / "train.json")


def test_fsd50k(tmp_path):
    truth = tmp_path / "FSD50K.ground_truth"
    truth.mkdir()
    (tmp_path / "FSD50K.dev_audio").mkdir()
    (truth / "dev.csv").write_text('fname,labels,mids,split\n7,"Purr,Cat","/m/p,/m/c",train\n8,Cat,/m/c,val\n')
    manifest = read_manifest(truth / "dev.csv")
    assert [(entry.id, entry.name) for entry in manifest.classes] == [("/m/c", "Cat"), ("/m/p", "Purr")]
    assert manifest[0] == Clip(tmp_path / "FSD50K.dev_audio" / "7.wav", (0, 1), "7.wav", "train")
    assert len(split_by_fold(manifest, "val")[1]) == 1


def test_unknown_label_names_the_nearest(folder):
    other = folder.parent / "other"
    write_sound(other / "dogg" / "a.wav")
    with pytest.raises(ManifestError, match=r"'dogg' of dogg/a\.wav.*nearest is 'dog'"):
        read_manifest(other, classes=read_manifest(folder).classes)


def test_nothing_there(tmp_path):
    with pytest.raises(ManifestError, match="no such file"):
        read_manifest(tmp_path / "absent")
    with pytest.raises(ManifestError, match="found none"):
        read_manifest(tmp_path)
    (tmp_path / "list.txt").touch()
    with pytest.raises(ManifestError, match=r"\.csv or a \.json"):
        read_manifest(tmp_path / "list.txt")


# --- splits ----------------------------------------------------------------------------------------------------------


@settings(deadline=None)
@given(
    entries=st.lists(st.tuples(st.integers(0, 3), st.integers(0, 12)), min_size=8, max_size=60),
    fraction=st.floats(0.05, 0.5),
    seed=st.integers(0, 5),
)
def test_fraction_keeps_groups_whole_and_ignores_order(entries, fraction, seed):
    clips = [(f"{i}.wav", (label,), f"{label}-{group}") for i, (label, group) in enumerate(entries)]
    if all(len({g for _, (c,), g in clips if c == label}) < 2 for label in range(4)):
        return
    training, held_out = split_by_fraction(manifest_of(clips), fraction, seed)
    assert {clip.key for clip in training} | {clip.key for clip in held_out} == {key for key, *_ in clips}
    assert len(training) + len(held_out) == len(clips)
    assert not {clip.group for clip in training} & {clip.group for clip in held_out}
    again = split_by_fraction(manifest_of(clips[::-1]), fraction, seed)[1]
    assert {clip.key for clip in again} == {clip.key for clip in held_out}
    for label in range(4):  # every class with two groups is on both sides
        if len({g for _, (c,), g in clips if c == label}) > 1:
            assert training.label_counts()[label]
            assert held_out.label_counts()[label]


def test_fraction_is_about_what_was_asked_for():
    clips = [(f"{i}.wav", (i % 4,), "") for i in range(400)]
    for seed in range(3):
        held_out = split_by_fraction(manifest_of(clips), 0.2, seed)[1]
        assert held_out.label_counts().tolist() == [20] * 4


def test_regex_and_list(folder, tmp_path):
    manifest = read_manifest(folder)
    training, held_out = split_by_regex(manifest, r"-[0-4]\.")
    assert (len(training), len(held_out)) == (9, 15)
    (tmp_path / "list.txt").write_text("cat/cat-0.wav\n\ndog/dog-1.flac\n")
    assert [clip.key for clip in split_by_list(manifest, tmp_path / "list.txt")[1]] == [
        "cat/cat-0.wav",
        "dog/dog-1.flac",
    ]
    (tmp_path / "list.txt").write_text("cat/cat-99.wav\n")
    with pytest.raises(ManifestError, match=r"cat/cat-99\.wav"):
        split_by_list(manifest, tmp_path / "list.txt")
    for pattern in ("nothing", "."):
        with pytest.raises(ManifestError, match="leaves no"):
            split_by_regex(manifest, pattern)
