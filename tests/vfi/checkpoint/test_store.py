"""Checkpoints: whole or absent, verified, found and pruned, and clear about what is wrong."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import shutil
from pathlib import Path

import pytest
import torch

from vfi.checkpoint import store
from vfi.checkpoint.store import Found, SavedPosition, State
from vfi.config import presets
from vfi.data.sampler import Position
from vfi.errors import CheckpointError
from vfi.io.verified_folder import MANIFEST, write_folder

CONFIG = presets.tiny()
WEIGHTS = {"backbone.weight": torch.arange(6.0).view(2, 3)}
OPTIMIZER = {"state": {0: {"step": torch.tensor(1.0)}}, "param_groups": []}


def save(run: Path, step: int, **options) -> Path:
    """A checkpoint of a model with one parameter; fields of its state and options of `save` by name."""
    fields = {field.name for field in dataclasses.fields(State)}
    state = State(step, **{name: value for name, value in options.items() if name in fields})
    others = {name: value for name, value in options.items() if name not in fields}
    return store.save(run, state, CONFIG, WEIGHTS, OPTIMIZER, **others)


@pytest.fixture
def run(tmp_path) -> Path:
    """A run with checkpoints of steps 10 and 20."""
    for step in (10, 20):
        save(tmp_path / "run", step)
    return tmp_path / "run"


def steps(run: Path) -> list[int]:
    return [found.step for found in store.list_checkpoints(run)]


def rewrite(folder: Path, **contents: bytes) -> None:
    """Replace files of a checkpoint and list them in its manifest, as who means harm would."""
    files = {path.name: path.read_bytes() for path in folder.iterdir() if path.name != MANIFEST}
    write_folder(folder, (files | {name.replace("__", "."): content for name, content in contents.items()}).items())


def test_all_of_a_checkpoint_comes_back(tmp_path):
    guard = {"medians": [0.1, math.inf, 1 / 3], "known": True}
    state = State(
        12, 3, ((16, 2), (24, 5)), "abc", 31.25, 7, {"scale": 65536.0}, guard, {"torch": "2.15.0", "git": "0123abc+changes"}
    )
    random = [{"torch": "00ff"}, {"torch": "ff00"}]
    path = store.save(tmp_path / "run", state, CONFIG, WEIGHTS, OPTIMIZER, ema=WEIGHTS, random=random)
    assert path == tmp_path / "run" / "checkpoints" / "step_00000012"
    assert sorted(file.name for file in path.iterdir()) == [
        "config.json", "ema.safetensors", "manifest.json", "model.safetensors", "optimizer.pt", "random.json", "state.json",
    ]  # fmt: skip
    assert store.check(path) == []
    assert store.read_state(path) == state
    assert store.read_step(path) == 12
    assert store.read_state(path).position == SavedPosition(Position(3, ((16, 2), (24, 5))), "abc")
    assert store.read_random(path) == random
    assert store.read_config(path) == CONFIG


def test_a_checkpoint_is_usable_alone(run, tmp_path):
    """Its settings lie in it: it may be moved away from its run."""
    alone = tmp_path / "elsewhere" / "best"
    shutil.copytree(run / "checkpoints" / "step_00000010", alone)
    shutil.rmtree(run)
    assert store.check(alone) == []
    assert store.read_config(alone) == CONFIG
    assert store.read_step(alone) == 10


def test_without_a_position_none_comes_back(run):
    assert store.read_state(run / "checkpoints" / "step_00000010").position is None


# what is kept


def test_only_the_newest_are_kept(tmp_path):
    for step in (5, 10, 20, 100):
        save(tmp_path, step, keep_last=2)
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["step_00000020", "step_00000100"]


@pytest.mark.parametrize(("keep_best", "kept"), [(0, [5, 6]), (1, [2, 5, 6]), (2, [2, 5, 6]), (9, [1, 2, 4, 5, 6])])
def test_the_best_are_kept_beside_the_newest(tmp_path, keep_best, kept):
    """The highest PSNR, of equal ones the newest; a step without validation has none and is no candidate."""
    for step, psnr in ((1, 30.0), (2, 31.0), (3, None), (4, 29.5), (5, 28.0), (6, 30.0)):
        save(tmp_path, step, psnr=psnr, keep_last=2, keep_best=keep_best)
        assert store.latest(tmp_path).step == step
    assert steps(tmp_path) == kept


def test_the_best_is_never_lost_on_the_way(tmp_path):
    for step in range(1, 30):
        save(tmp_path, step, psnr=40.0 - abs(step - 7), keep_last=2)
        assert min(step, 7) in steps(tmp_path)
    assert steps(tmp_path) == [7, 28, 29]


def test_steps_that_a_run_left_behind_are_removed(tmp_path):
    """A run that goes on from step 10 is not at step 20: what lies there is of another past, and must not count as newest."""
    for step in (10, 20):
        save(tmp_path, step, keep_last=1, keep_best=0)
        save(tmp_path, 10, keep_last=1, keep_best=0)
        assert steps(tmp_path) == [10]
    (save(tmp_path, 20) / store.MODEL).write_bytes(b"damaged")
    save(tmp_path, 15, keep_last=1, keep_best=0)
    assert steps(tmp_path) == [15]


def test_a_damaged_one_does_not_keep_others_from_being_saved(tmp_path):
    (save(tmp_path, 10) / store.STATE).write_text("{")
    save(tmp_path, 20, psnr=30.0, keep_last=2)
    assert steps(tmp_path) == [10, 20]
    save(tmp_path, 30, keep_last=1)
    assert steps(tmp_path) == [20, 30]


def test_a_checkpoint_that_cannot_be_written_leaves_the_others(run, monkeypatch):
    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(CheckpointError, match=r"step_00000030 could not be written: No space left on device \(model\.safet"):
        save(run, 30, keep_last=1)
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["step_00000010", "step_00000020"]
    assert store.newest_whole(run) == (run / "checkpoints" / "step_00000020", [])


def test_names_that_are_no_checkpoints_are_not_seen(run):
    for name in ("step_", "step_x", "step_1x", ".step_00000030.new", "other", "step_²"):
        (run / "checkpoints" / name).mkdir()
    assert steps(run) == [10, 20]


# verification


def test_the_newest_damaged_one_is_named_and_the_one_before_is_used(run):
    newest = save(run, 30)
    assert store.newest_whole(run) == (newest, [])
    content = bytearray((newest / store.OPTIMIZER).read_bytes())
    content[len(content) // 2] ^= 1
    (newest / store.OPTIMIZER).write_bytes(content)
    path, (line,) = store.newest_whole(run)
    assert path == run / "checkpoints" / "step_00000020"
    assert line.startswith(f"DAMAGED and not used: {newest}: optimizer.pt is not what was written (its sha256 differs)")
    (path / store.MODEL).unlink()
    path, lines = store.newest_whole(run)
    assert path == run / "checkpoints" / "step_00000010"
    assert "step_00000030: optimizer.pt" in lines[0]
    assert "step_00000020: model.safetensors is missing" in lines[1]


def test_when_none_is_whole_all_are_named(run):
    for found in store.list_checkpoints(run):
        (found.path / store.STATE).write_text("{}")
    with pytest.raises(CheckpointError) as error:
        store.newest_whole(run)
    assert str(error.value).startswith(f"no checkpoint of {run} is whole: ")
    for step in (10, 20):
        assert f"step_000000{step}: state.json has 2 bytes instead of" in str(error.value)
    assert store.newest_whole(run / "none") == (None, [])


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.pt", "random.json", "config.json", "state.json"])
def test_a_manifest_lists_all_that_is_needed(run, name):
    path = run / "checkpoints" / "step_00000020"
    content = json.loads((path / MANIFEST).read_text())
    del content["files"][name]
    (path / MANIFEST).write_text(json.dumps(content))
    assert store.check(path) == [f"{name} is not in manifest.json"]


def test_ema_weights_that_came_later_are_not_trusted(run):
    path = run / "checkpoints" / "step_00000020"
    shutil.copy(path / store.MODEL, path / store.EMA)
    assert store.check(path) == ["ema.safetensors is not in manifest.json"]
    (path / "notes.txt").write_text("one's own notes are no damage")
    (path / store.EMA).unlink()
    assert store.check(path) == []


def test_one_checkpoint_named_for_a_start_must_be_whole(run):
    path = run / "checkpoints" / "step_00000020"
    assert store.find_whole(path) == (path, [])
    (path / store.MODEL).write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"00000020 is damaged: model.safetensors has 0 bytes.* beside it: step_00000010"):
        store.find_whole(path)
    other, (line,) = store.find_whole("run", run.parent)
    assert other.name == "step_00000010"
    assert "step_00000020: model.safetensors has 0 bytes" in line


def test_a_checkpoint_without_its_manifest_is_damaged(run):
    path = run / "checkpoints" / "step_00000020"
    (path / MANIFEST).unlink()
    assert store.check(path) == ["manifest.json is missing"]


# hostile and absurd content, listed in the manifest as if it had been written so


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"step": -1}, "it is of step -1"),
        ({"step": 21}, "it is of step 21"),
        ({"step": True}, "step is True, expected"),
        ({"step": "20"}, "step is '20', expected"),
        ({"step": 10**30}, "it is of step 1000"),
        ({"epoch": -1}, "epoch is -1"),
        ({"epoch": 10**30}, "epoch is 1000"),
        ({"epoch": "x"}, "epoch is 'x', expected"),
        ({"done": 5}, "done is 5, expected"),
        ({"done": [[1]]}, r"done\[0\] is \[1\], expected"),
        ({"done": [[0, 1]]}, "done is"),
        ({"done": [[1, 10**20]]}, "done is"),
        ({"psnr": math.nan}, "psnr is nan"),
        ({"psnr": "30"}, "psnr is '30'"),
        ({"ema_updates": -1}, "ema_updates is -1"),
        ({"scaler": []}, r"scaler is \[\], expected"),
        ({"scaler": {"scale": "x"}}, "scaler.scale is 'x'"),
        ({"guard": "x"}, "guard is 'x'"),
        ({"version": 3}, "version 3; this program reads version 2"),
        ({"version": "2"}, "version 2; this program"),
        ({"later": 1}, r"Unknown fields: \['later'\]"),
    ],
)
def test_absurd_states_are_refused(run, change, message):
    path = run / "checkpoints" / "step_00000020"
    content = json.loads((path / store.STATE).read_text()) | {"epoch": 0} | change
    rewrite(path, state__json=json.dumps(content).encode())
    with pytest.raises(CheckpointError, match=message):
        store.read_state(path)
    (wrong,) = store.check(path)
    assert "state.json" in wrong
    assert store.newest_whole(run)[0] == run / "checkpoints" / "step_00000010"


@pytest.mark.parametrize("content", [b"", b"[]", b"1", b"{", b"\xff", b"[" * 100_000, b'{"version": 2, "step": ' + b"9" * 5000])
def test_what_is_no_state_at_all_is_refused(run, content):
    path = run / "checkpoints" / "step_00000020"
    rewrite(path, state__json=content)
    with pytest.raises(CheckpointError, match=r"state\.json"):
        store.read_state(path)
    assert len(store.check(path)) == 1


@pytest.mark.parametrize("name", ["../../../secret", "/etc/passwd", "checkpoints/../x"])
def test_a_manifest_that_leads_out_of_the_checkpoint_is_refused(run, name):
    path = run / "checkpoints" / "step_00000020"
    content = json.loads((path / MANIFEST).read_text())
    content["files"][name] = {"bytes": 0, "sha256": ""}
    (path / MANIFEST).write_text(json.dumps(content))
    (wrong,) = store.check(path)
    assert f"names {name!r}, which is not the name of a file in this folder" in wrong


@pytest.mark.parametrize("content", [b"{}", b"\x80\x04", b"1"])
def test_random_states_are_a_list(run, content):
    path = run / "checkpoints" / "step_00000020"
    rewrite(path, random__json=content)
    with pytest.raises(CheckpointError, match=r"random\.json"):
        store.read_random(path)


def test_settings_that_cannot_be_read_are_named(run):
    path = run / "checkpoints" / "step_00000020"
    rewrite(path, config__json=b"\xff")
    with pytest.raises(CheckpointError):
        store.read_config(path)
    (path / store.CONFIG).unlink()
    with pytest.raises(CheckpointError, match=r"has no settings: .*config.json cannot be read"):
        store.read_config(path)


# where checkpoints are


def test_a_checkpoint_is_found_by_run_folder_name_and_file(run, monkeypatch):
    newest = run / "checkpoints" / "step_00000020"
    for path in (run, newest, newest / store.MODEL):
        assert store.find(path) == newest
    assert store.find("run", run.parent) == newest
    assert store.latest(run) == Found(newest, 20)
    with pytest.raises(CheckpointError, match=r"no run or checkpoint 'yours'; runs in .*: run"):
        store.find("yours", run.parent)
    (run.parent / "empty").mkdir()
    with pytest.raises(CheckpointError, match="empty exists but holds no checkpoint"):
        store.find("empty", run.parent)


def test_the_best_checkpoint_of_a_run_is_found(tmp_path, monkeypatch):
    for step, psnr in ((10, 30.0), (20, 31.5), (30, None), (40, 31.0)):
        save(tmp_path / "runs" / "run", step, psnr=psnr)
    save(tmp_path / "runs" / "unseen", 10)
    monkeypatch.chdir(tmp_path)
    expected = tmp_path / "runs" / "run" / "checkpoints" / "step_00000020"
    for name in ("run@best", "runs/run@best", tmp_path / "runs" / "run@best"):
        assert store.find(name).resolve() == expected
        found, lines = store.find_whole(name)
        assert (found.resolve(), lines) == (expected, [])
    assert store.find("run").name == "step_00000040"
    with pytest.raises(CheckpointError, match=r"no checkpoint of runs/unseen has a PSNR: train with --val_path"):
        store.find("unseen@best")
    with pytest.raises(CheckpointError, match=r"no run or checkpoint 'away@best'; runs in runs: run, unseen"):
        store.find("away@best")
    (expected / "state.json").write_text("{")  # a damaged one is passed over
    assert store.find("run@best").name == "step_00000040"
    (tmp_path / "runs" / "run" / "checkpoints" / "step_00000040" / "model.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointError, match="step_00000040 is damaged"):
        store.find_whole("run@best")


def test_newest_run_is_the_one_trained_last(tmp_path):
    with pytest.raises(CheckpointError, match="no trained run"):
        store.newest_run(tmp_path)
    for age, name in enumerate(("b", "c", "a")):
        os.utime(save(tmp_path / name, 1), (1000 - age, 1000 - age))
    (tmp_path / "unfinished" / "checkpoints").mkdir(parents=True)
    assert store.newest_run(tmp_path) == tmp_path / "b"
