"""The next forward pass starts before the guard has read a step's numbers, with the same result, bit for bit, as with waiting.

A CPU takes the place of a GPU here, with an optimizer that can also be told on the device whether a step counts.
"""

from __future__ import annotations

import functools
import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from vfi import train
from vfi.checkpoint.store import EMA, MODEL, list_checkpoints
from vfi.checkpoint.weights import read_optimizer
from vfi.training import optimizer, trainer
from vfi.training import run as run_state

pytestmark = pytest.mark.usefixtures("one_thread")
FLAGS = ["--preset", "tiny", "--width", "2", "--head_dim", "8", "--backbone_mode", "gated_attn_only", "--mixing", "mhc",
         "--mixing_streams", "2", "--sinkhorn_iterations", "3", "--crop", "64", "--num_workers", "0", "--batch_size", "2",
         "--log_every", "25", "--warmup_steps", "2", "--val_every", "1000", "--save_every", "15", "--keep_last", "9", "--lr",
         "1e-3", "--guard_window", "40", "--guard_factor", "10", "--steps", "45", "--ema", "0.9"]  # fmt: skip
NOT_A_NUMBER, LARGE, BLOWN_UP = (23, 24), (26, 27, 28), 32


def disturb(trainer: trainer.Trainer, step: int, broken: set[int]) -> None:
    """Change the gradient, or once the weights, of the steps above by more than any ordinary step on any processor."""
    if step in NOT_A_NUMBER:
        next(trainer.live.network.parameters()).grad.fill_(math.nan)
    if step in LARGE:
        for parameter in trainer.live.groups["stage1"]:
            parameter.grad.mul_(1e12)
    if step == BLOWN_UP and not broken:
        broken.add(step)
        with torch.no_grad():
            trainer.live.network.refine.head.weight.mul_(1e3)


@pytest.fixture
def trained(tmp_path, train_shards, monkeypatch):
    """trained(name, waits) -> run folder, and the number of forward passes."""

    def run(name: str, waits: bool, *flags: str) -> tuple[Path, int]:
        optimise, forward, passes, broken = trainer.Trainer.optimise, trainer.Trainer.forward, [], set[int]()

        def disturbed(trainer, meter):
            found = optimise(trainer, meter)
            disturb(trainer, trainer.live.step + 1, broken)
            return found

        def counted(trainer, batch, step):
            passes.append(step)
            return forward(trainer, batch, step)

        def fused(model, config, cuda_graphs):
            groups = optimizer.build_optimizer(model, config, cuda_graphs).param_groups
            return torch.optim.AdamW([group | {"fused": True} for group in groups], lr=config.lr)

        with monkeypatch.context() as patch:
            patch.setattr(trainer, "_waits_for", lambda device: not waits)
            patch.setattr(run_state, "build_optimizer", fused)
            patch.setattr(trainer.Trainer, "optimise", disturbed)
            patch.setattr(trainer.Trainer, "forward", counted)
            train.main([*FLAGS, *flags, "--data_path", str(train_shards), "--output_dir", str(tmp_path), "--exp_name", name])
        return tmp_path / name, len(passes)

    return run


@functools.cache
def events(run: Path) -> list[dict]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    timed = {"samples_per_s", "data_wait", "seconds", "memory_gib", "time"}
    return [{name: value for name, value in line.items() if name not in timed} for line in lines if line["event"] != "start"]


@pytest.mark.parametrize("flags", [(), ("--clip_norm", "0.01")], ids=["", "always clipped"])
def test_it_is_to_the_bit_as_with_waiting(trained, flags):
    (waiting, passes), (ahead, more) = trained("waiting", True, *flags), trained("ahead", False, *flags)
    assert {event["event"] for event in events(waiting)} >= {"train", "watch", "skip", "roll_back"}
    assert events(ahead) == events(waiting)
    assert more > passes  # discarded, after an unusual step
    checkpoints = list_checkpoints(waiting)
    assert [found.step for found in list_checkpoints(ahead)] == [found.step for found in checkpoints] == [15, 30, 45]
    for found in checkpoints:
        twin = ahead / "checkpoints" / found.path.name
        for file in (MODEL, EMA):
            expected, ours = load_file(found.path / file), load_file(twin / file)
            assert expected.keys() == ours.keys()
            assert all(torch.equal(ours[name], tensor) for name, tensor in expected.items())
        ours = read_optimizer(twin)["state"]
        for number, state in read_optimizer(found.path)["state"].items():
            assert all(torch.equal(ours[number][name], tensor) for name, tensor in state.items())


def test_without_anything_unusual_no_pass_is_lost(trained, monkeypatch):
    monkeypatch.setattr(f"{__name__}.disturb", lambda *_: None)
    assert trained("ahead", False)[1] == trained("waiting", True)[1] == 45
