"""Files are written whole or not at all, and unreadable ones are named."""

import json
import os
from random import Random

import pytest
import torch

from dass.checkpoint import (
    CheckpointError,
    atomic_write,
    read_json,
    read_state,
    read_tensors,
    write_json,
    write_state,
    write_tensors,
)


def files(folder):
    return sorted(p.name for p in folder.iterdir())


def test_atomic_write_takes_bytes_text_and_functions(tmp_path):
    assert atomic_write(tmp_path / "new" / "a.bin", b"\x00\x01").read_bytes() == b"\x00\x01"
    assert atomic_write(tmp_path / "b.txt", "grün").read_text(encoding="utf-8") == "grün"
    seen = []
    atomic_write(tmp_path / "c.png", lambda path: (seen.append(path), path.write_bytes(b"picture")))
    assert (tmp_path / "c.png").read_bytes() == b"picture"
    assert seen[0].suffix == ".png" and seen[0].parent == tmp_path and seen[0].name != "c.png"
    assert files(tmp_path) == ["b.txt", "c.png", "new"]


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path):
    atomic_write(tmp_path / "a", b"old")

    def fails(path):
        path.write_bytes(b"half of the n")
        raise RuntimeError("disk full")

    with pytest.raises(RuntimeError, match="disk full"):
        atomic_write(tmp_path / "a", fails)
    assert (tmp_path / "a").read_bytes() == b"old"
    assert files(tmp_path) == ["a"]


def test_a_killed_write_leaves_the_old_file(tmp_path):
    """A process that dies in the middle of a write leaves the old content, whole."""
    atomic_write(tmp_path / "a", b"old")
    child = os.fork()
    if child == 0:
        atomic_write(tmp_path / "a", lambda path: (path.write_bytes(b"half"), os._exit(9)))
        os._exit(0)
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == 9
    assert (tmp_path / "a").read_bytes() == b"old"


def test_permissions_follow_the_umask(tmp_path):
    mask = os.umask(0o022)
    try:
        path = atomic_write(tmp_path / "a", b"")
    finally:
        os.umask(mask)
    assert path.stat().st_mode & 0o777 == 0o644


def test_json_round_trip_and_errors(tmp_path):
    value = {"id2label": {"0": "Türglocke"}, "mean": -4.2677393, "frames": None}
    write_json(tmp_path / "a.json", value)
    assert read_json(tmp_path / "a.json") == value
    assert json.loads((tmp_path / "a.json").read_text()) == value
    with pytest.raises(ValueError):
        write_json(tmp_path / "a.json", {"loss": float("nan")})
    assert read_json(tmp_path / "a.json") == value
    (tmp_path / "b.json").write_text('{"a": ')
    with pytest.raises(CheckpointError, match="b.json is not JSON"):
        read_json(tmp_path / "b.json")


def test_tensors_round_trip_bitwise_whatever_their_memory(tmp_path):
    base = torch.randn(4, 6)
    tensors = {
        "float32": base,
        "shared": base,
        "part": base[1:],
        "transposed": base.t(),
        "expanded": base[:1].expand(3, 6),
        "bfloat16": base.to(torch.bfloat16),
        "int64": torch.arange(5),
        "empty": torch.empty(0, 3),
    }
    back = read_tensors(write_tensors(tmp_path / "t.safetensors", tensors))
    assert set(back) == set(tensors)
    for name, tensor in tensors.items():
        assert back[name].dtype == tensor.dtype and torch.equal(back[name], tensor), name


def test_state_round_trip(tmp_path):
    model = torch.nn.Linear(3, 2)
    optimizer = torch.optim.Adam(model.parameters())
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    state = {"optimizer": optimizer.state_dict(), "step": 7, "random": torch.get_rng_state()}
    back = read_state(write_state(tmp_path / "state.pt", state))
    assert back["step"] == 7 and torch.equal(back["random"], state["random"])
    assert torch.equal(back["optimizer"]["state"][0]["exp_avg"], state["optimizer"]["state"][0]["exp_avg"])


class Custom:
    """Something that only executing a pickle could bring back."""


@pytest.mark.parametrize("keep", [0, 7, 100, -20])
def test_truncated_files_are_named(tmp_path, keep):
    for name, write, read in (
        ("t.safetensors", lambda p: write_tensors(p, {"a": torch.ones(50)}), read_tensors),
        ("s.pt", lambda p: write_state(p, {"a": torch.ones(50)}), read_state),
    ):
        path = write(tmp_path / name)
        path.write_bytes(path.read_bytes()[:keep])
        with pytest.raises(CheckpointError, match=rf"{name} \([\d,]+ bytes\) cannot be read as .*cut short"):
            read(path)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("zipped", [True, False])
def test_damaged_files_are_named(tmp_path, zipped):
    """Whatever bytes are wrong: a CheckpointError or, where they are numbers, other numbers; nothing else."""
    random = Random(0)
    torch.save({"a": torch.ones(20), "b": {"c": [1, "two"]}}, tmp_path / "s.pt", _use_new_zipfile_serialization=zipped)
    whole = (tmp_path / "s.pt").read_bytes()
    unreadable = 0
    for _ in range(60):
        damaged = bytearray(whole[: random.choice([len(whole), random.randrange(len(whole))])])
        for _ in range(random.randrange(8) if damaged else 0):
            damaged[random.randrange(len(damaged))] = random.randrange(256)
        (tmp_path / "s.pt").write_bytes(damaged)
        try:
            read_state(tmp_path / "s.pt")
        except CheckpointError:
            unreadable += 1
    assert unreadable > 20


def test_foreign_files_are_named(tmp_path):
    pointer = tmp_path / "model.safetensors"
    pointer.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 119537800\n")
    with pytest.raises(CheckpointError, match="safetensors is a Git LFS pointer of 72 bytes.*git lfs pull"):
        read_tensors(pointer)
    torch.save({"model": Custom()}, tmp_path / "objects.pth")
    with pytest.raises(CheckpointError, match=r"objects.pth holds Python objects.*Custom.*weights_only=F"):
        read_state(tmp_path / "objects.pth")
    with pytest.raises(FileNotFoundError, match=r"no file .*nothing.pt"):
        read_state(tmp_path / "nothing.pt")
    with pytest.raises(FileNotFoundError, match="is a folder"):
        read_tensors(tmp_path)
