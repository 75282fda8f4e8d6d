"""Saved weights and optimizers: exact, clear about what does not fit, and unable to execute anything."""

from __future__ import annotations

import copy
import dataclasses
import json
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save as to_safetensors

from vfi.checkpoint import store, weights
from vfi.checkpoint.store import State
from vfi.config import presets
from vfi.config.configs import Config
from vfi.errors import CheckpointError
from vfi.io.dataclass_json import to_json
from vfi.io.verified_folder import MANIFEST, write_folder
from vfi.model.interpolator import FrameInterpolator
from vfi.training.ema import Ema
from vfi.training.optimizer import build_optimizer

CPU = torch.device("cpu")


def make_run(folder: Path, config: Config, steps: list[int], decay: float = 0.0):
    """A run that was trained a step before each of its checkpoints."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(to_json(config))
    torch.manual_seed(0)
    model = FrameInterpolator(config.model)
    ema = Ema(model, decay) if decay else None
    optimizer = build_optimizer(model, config.optim)
    for step in steps:
        model(*torch.rand(2, 1, 3, 64, 64), torch.tensor([0.5])).imgt.sum().backward()
        optimizer.step()
        if ema:
            ema.update()
        average = ema.weights() if ema else None
        store.save(folder, State(step), config, model.state_dict(), optimizer.state_dict(), ema=average)
    return model, optimizer, ema


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run of two steps, its model and its optimizer; not to be changed."""
    folder = tmp_path_factory.mktemp("runs") / "mine"
    return folder, *make_run(folder, presets.tiny(), [10, 20])[:2]


@pytest.fixture
def path(trained, tmp_path) -> Path:
    """A checkpoint that a test may damage."""
    newest = tmp_path / "run" / "checkpoints" / "step_00000020"
    shutil.copytree(store.latest(trained[0]).path, newest)
    return newest


def rewrite(folder: Path, **contents: bytes) -> None:
    """Replace files of a checkpoint and list them in its manifest, as who means harm would."""
    files = {path.name: path.read_bytes() for path in folder.iterdir() if path.name != MANIFEST}
    write_folder(folder, (files | {name.replace("__", "."): content for name, content in contents.items()}).items())


def test_weights_and_optimizer_come_back_exactly(trained):
    folder, model, optimizer = trained
    other = FrameInterpolator(presets.tiny().model)
    other_optimizer = build_optimizer(other, presets.tiny().optim)
    found = store.latest(folder)
    weights.load_weights(other, found.path)
    weights.load_optimizer(other_optimizer, weights.read_optimizer(found.path), found.path)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, other.state_dict()[name]), name
    for one, two in zip(optimizer.state.values(), other_optimizer.state.values(), strict=True):
        assert all(torch.equal(one[key], two[key]) for key in one)


def test_model_is_loaded_by_run_folder_checkpoint_and_file(trained, monkeypatch):
    folder, model, _ = trained
    newest = folder / "checkpoints" / "step_00000020"
    monkeypatch.chdir(folder.parent.parent)
    (Path("runs")).symlink_to(folder.parent)
    for path in ("mine", "runs/mine", newest, newest / "model.safetensors"):
        loaded, config = weights.load_model(path, CPU)
        assert config == presets.tiny()
        assert not loaded.training
        assert torch.equal(loaded.refine.head.weight, model.refine.head.weight)


def test_ema_weights_are_taken_where_there_are_some_and_said(tmp_path, messages):
    model, _, ema = make_run(tmp_path / "run", presets.tiny(), [1, 2], decay=0.9)
    newest = store.latest(tmp_path / "run").path
    name = "refine.head.weight"
    assert not torch.equal(ema.average[name], model.state_dict()[name])
    for path in (tmp_path / "run", newest):
        loaded, _ = weights.load_model(path, CPU)
        assert torch.equal(loaded.state_dict()[name], ema.average[name])
        assert messages.pop().startswith(
            f"{newest}: the EMA weights are taken; those without averaging are in model.safetensors"
        )
    for file, expected in ((store.EMA, ema.average), (store.MODEL, model.state_dict())):
        loaded, _ = weights.load_model(newest / file, CPU)
        assert torch.equal(loaded.state_dict()[name], expected[name])
    assert messages == []
    start = FrameInterpolator(presets.tiny().model)
    assert weights.load_parts(start, newest)[0] == "they are the EMA weights (ema.safetensors)"
    assert torch.equal(start.state_dict()[name], ema.average[name])


def test_settings_of_an_older_program_are_loaded_and_said(path, tmp_path, messages):
    """Its config.json lacks what came later: that has the defaults, under which its weights mean the same."""
    content = json.loads((path / store.CONFIG).read_text())
    del content["run"]["keep_best"], content["optim"]["ema"], content["model"]["mixing_coefficients"]
    rewrite(path, config__json=json.dumps(content).encode())
    _, config = weights.load_model(path, CPU)
    assert config == presets.tiny()
    assert messages == [
        f"{path / 'config.json'} is older than these settings, which have their defaults: keep_best, ema, mixing_coefficients"
    ]


def test_damage_is_refused_before_weights_are_used(path):
    content = bytearray((path / store.MODEL).read_bytes())
    content[-1] ^= 1  # of the last weight: it would load
    (path / store.MODEL).write_bytes(content)
    with pytest.raises(CheckpointError, match=r"step_00000020 is damaged: model\.safetensors is not what was written"):
        weights.load_model(path, CPU)


def test_other_architecture_names_the_keys(trained):
    path = store.latest(trained[0]).path
    wider = FrameInterpolator(dataclasses.replace(presets.tiny().model, width=16))
    before = wider.refine.head.bias.clone()
    with pytest.raises(CheckpointError, match=r"another architecture: .*of another shape: .*\[8, 3, 3, 3\] instead of \[16"):
        weights.load_weights(wider, path)
    assert torch.equal(wider.refine.head.bias, before)
    without = FrameInterpolator(dataclasses.replace(presets.tiny().model, backbone_mode="mamba2_only"))
    with pytest.raises(CheckpointError, match=r"unknown: .*attention\.qkv_gate"):
        weights.load_weights(without, path)


@pytest.mark.parametrize("name", [store.MODEL, store.OPTIMIZER])
@pytest.mark.parametrize("content", [b"\x00\x01 not what it was", b"", b"\xff" * 100, b"\x02\x00\x00\x00\x00\x00\x00\x00{}"])
def test_garbage_is_named(path, trained, name, content):
    """Also where a manifest lists it."""
    rewrite(path, **{name.replace(".", "__"): content})
    assert store.check(path) == []
    with pytest.raises(CheckpointError, match=name):
        weights.load_weights(trained[1], path) if name == store.MODEL else weights.read_optimizer(path)


def test_a_header_that_promises_too_much_is_refused(path, trained):
    header = json.dumps({"a": {"dtype": "F32", "shape": [1 << 40], "data_offsets": [0, 1 << 42]}}).encode()
    rewrite(path, model__safetensors=len(header).to_bytes(8, "little") + header + b"0000")
    with pytest.raises(CheckpointError, match=r"model\.safetensors cannot be read"):
        weights.load_weights(trained[1], path)
    rewrite(path, model__safetensors=to_safetensors({"a": torch.zeros(2)}))
    with pytest.raises(CheckpointError, match=r"another architecture: .*1 unknown: a"):
        weights.load_weights(trained[1], path)


def test_settings_of_the_optimizer_are_those_of_the_run_that_goes_on(tmp_path):
    layer = torch.nn.Linear(2, 2)
    old = torch.optim.AdamW([{"params": [layer.weight], "weight_decay": 1e-4}, {"params": [layer.bias], "weight_decay": 0.0}])
    layer(torch.ones(1, 2)).sum().backward()
    old.step()
    new = torch.optim.AdamW([{"params": [layer.weight], "weight_decay": 0.05}, {"params": [layer.bias], "weight_decay": 0.0}])
    weights.load_optimizer(new, copy.deepcopy(old.state_dict()), tmp_path)
    assert [group["weight_decay"] for group in new.param_groups] == [0.05, 0.0]
    assert torch.equal(new.state[layer.weight]["exp_avg"], old.state[layer.weight]["exp_avg"])
    with pytest.raises(CheckpointError, match="cannot be loaded"):
        weights.load_optimizer(torch.optim.AdamW([layer.weight]), old.state_dict(), tmp_path)


@pytest.mark.parametrize(
    "state",
    [
        [1, 2],
        {"state": {}},
        {"state": {}, "param_groups": "x"},
        {"state": {}, "param_groups": [{"params": [0]}]},
        {"state": {0: {"step": torch.tensor(1.0), "exp_avg": torch.zeros(3, 3)}}, "param_groups": [{"params": [0, 1]}]},
        {"state": {0: 5}, "param_groups": [{"params": [0, 1]}]},
        {"state": 5, "param_groups": [{"params": [0, 1]}]},
    ],
)
def test_what_is_no_state_of_this_optimizer_is_refused(tmp_path, state):
    torch.save(state, tmp_path / store.OPTIMIZER)
    optimizer = torch.optim.AdamW(torch.nn.Linear(2, 2).parameters())
    with pytest.raises(CheckpointError, match=r"optimizer\.pt cannot be loaded"):
        weights.load_optimizer(optimizer, weights.read_optimizer(tmp_path), tmp_path)


class Hostile:
    """Creates a file when it is unpickled."""

    def __reduce__(self):
        return (Path.touch, (Path("executed"),))


def test_loading_executes_nothing(path, trained, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    as_torch = tmp_path / "hostile.pt"
    torch.save({"state": Hostile(), "param_groups": []}, as_torch)
    torch.load(as_torch, weights_only=False)
    assert Path("executed").exists(), "this file is to be harmful where pickles are executed"
    Path("executed").unlink()
    for content in (pickle.dumps(Hostile(), protocol=2), as_torch.read_bytes()):
        rewrite(path, optimizer__pt=content, model__safetensors=content, random__json=content)
        assert store.check(path) == []
        with pytest.raises(CheckpointError, match=r"cannot be loaded: it holds .*; only tensors") as refused:
            weights.read_optimizer(path)
        assert "weights_only" not in str(refused.value)
        with pytest.raises(CheckpointError, match="cannot be read"):
            weights.load_weights(trained[1], path)
        with pytest.raises(CheckpointError, match="cannot be read"):
            store.read_random(path)
        with pytest.raises(CheckpointError):
            weights.load_model(path, CPU)
    assert not Path("executed").exists()
