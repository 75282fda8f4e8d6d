"""Recorded passes: the predictions and gradients of the plain network, for every batch, in any order that training has."""

from __future__ import annotations

import copy
import itertools
import json
import math
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from vfi import train
from vfi.config import configs, presets
from vfi.model.interpolator import FrameInterpolator
from vfi.training import cuda_graphs, trainer
from vfi.training.cuda_graphs import GraphRecorder, capture_graphs, enable_expandable_segments
from vfi.training.losses import training_losses

CUDA = torch.device("cuda")


@pytest.fixture(autouse=True)
def same_convolutions(monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", False)


def frames(seed: int, size: int = 128, batch: int = 2) -> list[torch.Tensor]:
    """img0, img1, timestep, imgt."""
    generator = torch.Generator().manual_seed(seed)
    img0, img1, imgt = torch.rand(3, batch, 3, size, size, generator=generator)
    return [tensor.to(CUDA) for tensor in (img0, img1, torch.rand(batch, generator=generator), imgt)]


def networks(phase: int) -> tuple[FrameInterpolator, FrameInterpolator]:
    """A network whose every weight counts, and a copy that is recorded."""
    plain = FrameInterpolator(presets.override(presets.tiny(), phase=phase, teacher=phase == 2).model, CUDA).train()
    with torch.no_grad():
        for parameter in plain.parameters():
            parameter.add_(0.002 * torch.randn_like(parameter))
    other = copy.deepcopy(plain)
    capture_graphs(other)
    return plain, other


def loss(network: FrameInterpolator, batch: list[torch.Tensor], half: bool = False) -> torch.Tensor:
    with torch.autocast("cuda", torch.bfloat16, enabled=half):
        prediction = network(*batch)
    return training_losses(prediction, batch[3], configs.OptimConfig())["loss"]


def difference(one: FrameInterpolator, other: FrameInterpolator) -> float:
    """Of gradients, relative. Two plain networks differ, too: atomic additions, as in a warp's gradient, have no order."""
    gradients = [torch.cat([parameter.grad.flatten() for parameter in network.parameters()]) for network in (one, other)]
    return ((gradients[0] - gradients[1]).norm() / gradients[1].norm()).item()


@pytest.mark.gpu
@pytest.mark.parametrize("half", [True, False], ids=["bf16", "fp32"])
@pytest.mark.parametrize(("phase", "most"), [(1, 1e-5), (2, 1e-4)])
def test_it_learns_the_same(phase, most, half):
    """Steps on changing weights, then another size, and back."""
    plain, recorded = networks(phase)
    optimizer = torch.optim.SGD(plain.parameters(), lr=0.03)
    for seed, size in enumerate((128, 128, 128, 64, 64, 128)):
        batch = frames(seed, size)
        losses = [loss(network, batch, half) for network in (plain, recorded)]
        assert losses[0].item() == losses[1].item()
        for one in losses:
            one.backward()
        assert difference(recorded, plain) < most * (40 if half else 1)
        optimizer.step()
        recorded.load_state_dict(plain.state_dict())  # in place
        for network in (plain, recorded):
            network.zero_grad()


@pytest.mark.gpu
def test_gradients_add_up_and_wait():
    plain, recorded = networks(1)
    for seed in range(2):
        for network in (plain, recorded):
            loss(network, frames(seed)).backward()
    assert difference(recorded, plain) < 1e-5
    begun = loss(recorded, frames(2))  # of the next step, before this one is taken
    assert difference(recorded, plain) < 1e-5
    plain.zero_grad()
    recorded.zero_grad()
    begun.backward()
    loss(plain, frames(2)).backward()
    assert difference(recorded, plain) < 1e-5


@pytest.mark.gpu
def test_what_is_frozen_gets_no_gradient_and_may_thaw():
    plain, recorded = networks(1)
    for frozen in (True, False):
        for network in (plain, recorded):
            network.backbone.requires_grad_(not frozen)
            loss(network, frames(0)).backward()
        for own, other in zip(recorded.parameters(), plain.parameters(), strict=True):
            assert (own.grad is None) == (other.grad is None)
            assert own.grad is None or torch.allclose(own.grad, other.grad, rtol=1e-3, atol=1e-6)


@pytest.mark.gpu
def test_a_pass_that_another_one_overwrote_has_no_gradient():
    _, recorded = networks(1)
    first, _ = loss(recorded, frames(0)), loss(recorded, frames(1))
    with pytest.raises(RuntimeError, match="its backward pass before the next one"):
        first.backward()


@pytest.mark.gpu
def test_validation_is_not_recorded():
    plain, recorded = networks(2)
    batch = frames(0)[:3]
    with torch.no_grad():
        assert torch.equal(recorded(*batch).imgt, plain(*batch).imgt)
    recorded.eval()
    assert recorded(*batch).stages == ()
    assert isinstance(recorded.forward, GraphRecorder)
    assert recorded.forward.passes is None


RUN = ["--preset", "tiny", "--width", "2", "--head_dim", "16", "--depths", "1", "1", "--num_workers", "0", "--batch_size", "4",
       "--log_every", "1", "--warmup_steps", "2", "--save_every", "3", "--val_every", "100", "--lr", "1e-3", "--steps", "12",
       "--guard_window", "40", "--guard_skips", "0"]  # fmt: skip


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("flags", "bad"),
    [
        (["--crop", "64", "--ema", "0.9"], None),
        (["--crop", "64"], 8),
        (["--crop", "64", "--ema", "0.9", "--save_every", "100"], 8),
        (["--crop", "64", "--batch_size", "2", "--global_batch", "4"], None),
        (["--crop", "64", "--phase", "2", "--freeze_backbone", "1", "--resume", "first"], None),
    ],
    ids=["ahead", "rolls_back", "rolls_back_in_memory", "accumulates", "thaws"],
)
def test_a_run_is_the_same(flags, bad, tmp_path, train_shards, val_shards, monkeypatch):
    """Also where forward passes begin ahead of the guard, another network takes the place of the first, and weights thaw."""

    def run(name: str, *more: str) -> list[dict[str, Any]]:
        places = ["--data_path", str(train_shards), "--val_path", str(val_shards), "--output_dir", str(tmp_path)]
        with monkeypatch.context() as patched:
            patched.setattr(trainer, "training_losses", failing(trainer.training_losses, bad))
            train.main([*RUN, *places, "--exp_name", name, *more])
        return [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]

    if "first" in flags:
        run("first", "--crop", "64")
    plain, recorded = run("plain", *flags), run("recorded", *flags, "--cuda_graphs")
    assert [(row["event"], row["step"]) for row in recorded] == [(row["event"], row["step"]) for row in plain]
    assert ("roll_back" in [row["event"] for row in plain]) == (bad is not None)
    losses = [[row["loss"] for row in rows if row["event"] == "train"] for rows in (plain, recorded)]
    assert losses[1] == pytest.approx(losses[0], rel=1e-3)


def failing(plain: Callable[..., dict[str, torch.Tensor]], bad: int | None) -> Callable[..., dict[str, torch.Tensor]]:
    """Losses that are no numbers in the call of this number."""
    calls = itertools.count(1)

    def losses(*arguments: Any) -> dict[str, torch.Tensor]:
        factor = math.nan if next(calls) == bad else 1
        return {name: loss * factor for name, loss in plain(*arguments).items()}

    return losses


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["--compile"], "--compile"),
        (["--checkpointing", "--mixing", "mhc"], "--checkpointing and --mixing mhc"),
    ],
)
def test_what_can_not_be_recorded_is_refused(flags, named, tmp_path, train_shards, capsys):
    assert refusal(tmp_path, train_shards, capsys, *flags) == (
        f"error: --cuda_graphs can't capture a network with {named}: remove one of them"
    )


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA GPU here")
def test_it_is_for_a_gpu(tmp_path, train_shards, capsys):
    line = refusal(tmp_path, train_shards, capsys, "--width", "2", "--head_dim", "8", "--crop", "64", "--num_workers", "0")
    assert line == "error: --cuda_graphs is for a CUDA GPU, and this trains on cpu: leave it out"


@pytest.mark.parametrize("said", [{}, {"PYTORCH_ALLOC_CONF": "backend:native"}, {"PYTORCH_CUDA_ALLOC_CONF": ""}])
def test_what_the_environment_says_of_memory_stays(monkeypatch, said):
    monkeypatch.setattr(cuda_graphs.os, "environ", dict(said))
    enable_expandable_segments()
    assert cuda_graphs.os.environ == (said or {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"})


@pytest.mark.gpu
def test_segments_grow():
    """In a new process: it counts before the first tensor."""
    told = """
import torch
from vfi.training.cuda_graphs import enable_expandable_segments
enable_expandable_segments()
torch.zeros(1, device="cuda")
print([segment["is_expandable"] for segment in torch.cuda.memory_snapshot()])
"""
    environment = {name: value for name, value in os.environ.items() if "ALLOC_CONF" not in name}
    done = subprocess.run([sys.executable, "-c", told], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[True]"


def refusal(folder: Path, shards: Path, capsys: pytest.CaptureFixture[str], *flags: str) -> str:
    start = ["--preset", "tiny", "--data_path", str(shards), "--output_dir", str(folder), "--exp_name", "run", "--cuda_graphs"]
    with pytest.raises(SystemExit) as stopped:
        train.main([*start, *flags])
    assert stopped.value.code == 2
    return capsys.readouterr().err.strip().splitlines()[-1]
