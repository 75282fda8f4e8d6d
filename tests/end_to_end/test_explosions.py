"""Explosions injected into running jobs, and the guard's stages that they reach: watch, clip, anneal, skip, roll back, stop.

Which steps are unusual must not depend on a processor's rounding. So the faults are far larger than any change in ordinary
training: a gradient grows by a factor of 1e12, a learning rate by 1e6, a layer by 1000. A norm counts as unusual here only at
10 times its median and 10 spreads of its logarithm above it, which no undisturbed step approaches. The losses have a floor, so
that only those of ruined weights are twice as high as the others.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import math
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from warm import finish, start_ranks

from vfi import train
from vfi.checkpoint.store import latest, list_checkpoints, read_state
from vfi.config import command_line
from vfi.data.sampler import START
from vfi.training import trainer
from vfi.training.divergence import Snapshots
from vfi.training.losses import training_losses
from vfi.training.optimizer import learning_rate
from vfi.training.state import read_snapshot

pytestmark = pytest.mark.usefixtures("one_thread")
FLAGS = ["--preset", "tiny", "--width", "2", "--head_dim", "8", "--backbone_mode", "gated_attn_only", "--crop", "64",
         "--num_workers", "0", "--batch_size", "2", "--log_every", "1", "--warmup_steps", "2", "--val_every", "1000",
         "--save_every", "10", "--keep_last", "99", "--lr", "1e-3"]  # fmt: skip
GUARDED = ["--guard_window", "40", "--guard_factor", "10"]
MIXED = ["--mixing", "mhc", "--mixing_streams", "2", "--sinkhorn_iterations", "3"]
UNSTABLE = [*MIXED, "--depths", "2", "2", "--steps", "150", "--warmup_steps", "100", "--lr_min", "0", "--guard_factor", "5"]
GOOD_RATE = 3e-3  # of 1e-3, 3e-3 and 1e-2 it ends with the lowest loss: 0.0316, 0.02905, 0.02907
FLOOR = 0.3  # of the loss, which is 0.02 to 0.1 without it
TOO_HIGH = 1e6  # times a good rate: one step moves every weight by hundreds
INF_ON_ONE = """
import os, sys
import torch
from vfi.config.command_line import from_command_line
from vfi.training import trainer
plain, calls = trainer.training_losses, 0
def losses(*arguments):
    global calls
    calls += 1
    found = plain(*arguments)
    hit = calls == int(os.environ["CALL"]) and os.environ["RANK"] == "1"
    return {name: loss * torch.inf for name, loss in found.items()} if hit else found
trainer.training_losses = losses
run = trainer.Trainer(from_command_line(sys.argv[2:]))
run.fit()
torch.save(run.live.network.state_dict(), sys.argv[1] + os.environ["RANK"])
torch.distributed.destroy_process_group()
"""  # of two processes, in the forward pass of the number CALL

Fault = Callable[[trainer.Trainer], None]


@pytest.fixture
def inject(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """inject(fault, steps …): call `fault(trainer)` after the backward pass of these steps, each time that they are run."""
    faults: dict[int, Fault] = {}
    plain = trainer.Trainer.optimise

    def optimise(trainer, meter):
        found = plain(trainer, meter)
        if fault := faults.get(trainer.live.step + 1):
            fault(trainer)
        return found

    monkeypatch.setattr(trainer.Trainer, "optimise", optimise)
    return lambda fault, *steps: faults.update(dict.fromkeys(steps, fault))


@pytest.fixture
def spoil(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """spoil(steps …, img0=nan): fill a frame of the batches of these steps, each time that they are run."""
    fills: dict[int, dict[str, float]] = {}
    plain = trainer.Trainer.forward

    def forward(trainer, batch, step):
        changed = {name: torch.full_like(getattr(batch, name), value) for name, value in fills.get(step, {}).items()}
        return plain(trainer, batch._replace(**changed), step)

    monkeypatch.setattr(trainer.Trainer, "forward", forward)
    return lambda *steps, **frames: fills.update(dict.fromkeys(steps, frames))


def blow_up_layer(trainer: trainer.Trainer) -> None:
    """Multiply the weights of the last layer by 1000, and add 10 to its output."""
    with torch.no_grad():
        trainer.live.network.refine.head.weight.mul_(1e3)
        trainer.live.network.refine.head.bias.add_(10)


def blow_up_gradient(trainer: trainer.Trainer) -> None:
    """Multiply the gradient of one stage by 1e12."""
    for parameter in trainer.live.groups["stage1"]:
        parameter.grad.mul_(1e12)


def step_up_rate(trainer: trainer.Trainer) -> None:
    """Raise the learning rate from now on, also after a roll-back."""
    optim = trainer.config.optim
    raised = dataclasses.replace(optim, lr=TOO_HIGH * optim.lr, lr_min=TOO_HIGH * optim.lr_min)
    trainer.config = trainer.live.config = dataclasses.replace(trainer.config, optim=raised)


def once(fault: Fault) -> Fault:
    """Inject the fault only the first time."""
    left = [fault]
    return lambda trainer: left.pop()(trainer) if left else None


def floored_losses(*arguments: object) -> dict[str, torch.Tensor]:
    """Return the losses of training, shifted away from 0, with the same gradient."""
    losses = training_losses(*arguments)
    return losses | {"loss": losses["loss"] + FLOOR}


@pytest.fixture
def run(tmp_path, train_shards, val_shards, monkeypatch):
    """run(name, flags …) -> the run's folder, which may already hold a run."""

    monkeypatch.setattr(trainer, "training_losses", floored_losses)

    def start(name: str, *flags: object, out: Path = tmp_path) -> Path:
        guarded = [] if "--no-guard" in flags else GUARDED
        train.main([*FLAGS, *guarded, "--data_path", str(train_shards), "--val_path", str(val_shards), "--output_dir", str(out),
                    "--exp_name", name, *map(str, flags)])  # fmt: skip
        return out / name

    return start


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, train_shards, val_shards) -> Path:
    """A run of 60 steps with the guard, all of them saved."""
    out = tmp_path_factory.mktemp("runs")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer, "training_losses", floored_losses)
        train.main([*FLAGS, *GUARDED, "--data_path", str(train_shards), "--val_path", str(val_shards), "--output_dir", str(out),
                    "--exp_name", "undisturbed", "--steps", "60", "--save_every", "1"])  # fmt: skip
    return out / "undisturbed"


def part_of(whole: Path, step: int, run: Path) -> str:
    """Copy a run as if it was killed after its checkpoint of `step` -> its name."""
    shutil.copytree(whole, run)
    for found in list_checkpoints(run):
        if found.step > step:
            shutil.rmtree(found.path)
    return run.name


def folder_of(run: Path, step: int | None) -> Path:
    """Return the checkpoint of a step, or else the newest one."""
    found = {checkpoint.step: checkpoint.path for checkpoint in list_checkpoints(run)}
    return found[step or max(found)]


def weights(run: Path, step: int | None = None) -> dict[str, torch.Tensor]:
    return load_file(folder_of(run, step) / "model.safetensors")


def optimizer(run: Path, step: int) -> dict[int, dict[str, torch.Tensor]]:
    return torch.load(folder_of(run, step) / "optimizer.pt", weights_only=True)["state"]


def assert_finite(run: Path) -> None:
    """Assert that no checkpoint of a run holds a non-finite weight."""
    for found in list_checkpoints(run):
        assert all(tensor.isfinite().all() for tensor in weights(run, found.step).values()), found.step


def assert_same_weights(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name


def rows(run: Path, event: str) -> list[dict]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if line["event"] == event]


def final_loss(run: Path) -> float:
    """Return the mean squared error of the validation at the end."""
    return 10 ** (-rows(run, "val")[-1]["psnr"] / 10)


def stopped(capsys, start: Callable[[], object]) -> str:
    """Return the one line of the error that ends the job."""
    with pytest.raises(SystemExit) as error:
        start()
    assert error.value.code == 2
    return capsys.readouterr().err.rstrip("\n").splitlines()[-1]


def test_nothing_unusual_is_bit_for_bit_as_without(undisturbed, run):
    without = run("without", "--steps", 60, "--no-guard")
    assert not any(rows(undisturbed, event) for event in ("watch", "skip", "roll_back"))
    assert_same_weights(weights(without), weights(undisturbed))


def test_norm_and_update_of_each_group_are_logged(undisturbed):
    row = rows(undisturbed, "train")[-1]
    groups = [name.removeprefix("grad_") for name in row if name.startswith("grad_") and name != "grad_norm"]
    assert sorted(groups) == ["down", "refine", "stage0", "stage1", "stem"]
    assert math.hypot(*(row[f"grad_{group}"] for group in groups)) == pytest.approx(row["grad_norm"], rel=1e-5)
    old, new = weights(undisturbed, 59), weights(undisturbed, 60)
    stem = [name for name in old if name.startswith("backbone.stem.")]
    both = [new[name] - old[name] for name in stem], [old[name] for name in stem]
    change, size = (torch.cat([tensor.double().flatten() for tensor in tensors]).norm().item() for tensors in both)
    assert row["update_stem"] == pytest.approx(change / size, rel=1e-4)


@pytest.mark.parametrize("frames", [{"imgt": math.nan}, {"img0": math.inf}], ids=["nan", "inf"])
def test_a_batch_that_is_not_finite_is_skipped_and_named(undisturbed, run, spoil, tmp_path, train_shards, frames):
    spoil(32, **frames)
    disturbed = run(part_of(undisturbed, 30, tmp_path / "nan"), "--steps", 60, "--save_every", 1, "--resume", "auto")
    (event,) = rows(disturbed, "skip")
    config = command_line.from_command_line([*FLAGS, "--data_path", str(train_shards)])
    loader = trainer.TrainingLoader(config.data, 0, torch.device("cpu"), accumulation=1)
    batch = next(itertools.islice(loader.batches(START), 31, None))
    assert event["step"] == 32
    assert event["samples"] == list(batch.keys)
    assert "loss nan" in event["why"][0]
    assert_same_weights(weights(disturbed, 32), weights(disturbed, 31))
    before, after = optimizer(disturbed, 31), optimizer(disturbed, 32)
    assert all(torch.equal(before[i][key], after[i][key]) for i in before for key in before[i])
    assert not torch.equal(weights(disturbed, 33)["refine.head.weight"], weights(disturbed, 32)["refine.head.weight"])
    train_rows = rows(disturbed, "train")
    assert [row["step"] for row in train_rows] == list(range(1, 61))
    assert [row["step"] for row in train_rows if row["loss"] is None] == [32]
    assert train_rows[31]["update_stem"] == 0
    assert_finite(disturbed)
    board = EventAccumulator(str(disturbed / "tensorboard"))
    board.Reload()
    assert {"skip/why/text_summary", "skip/samples/text_summary"} <= set(board.Tags()["tensors"])
    assert "train/update_stem" in board.Tags()["scalars"]


def test_without_the_guard_it_ends_the_run(undisturbed, run, spoil, tmp_path, capsys):
    spoil(32, imgt=math.nan)
    part_of(undisturbed, 30, tmp_path / "nan")
    message = stopped(capsys, lambda: run("nan", "--steps", 60, "--no-guard", "--resume", "auto"))
    assert "error: the loss is nan, the norm of the gradient " in message
    assert " at step 32; the last good checkpoint is " in message


def test_a_layer_that_is_blown_up_is_rolled_back_bit_for_bit(undisturbed, run, inject, tmp_path):
    """At an unchanged rate, and with a fault that does not recur, nothing of it is left."""
    inject(once(blow_up_layer), 43)
    disturbed = run(part_of(undisturbed, 40, tmp_path / "blown"), "--steps", 60, "--resume", "auto", "--guard_rate_factor", 1)
    (event,) = rows(disturbed, "roll_back")
    assert event["step"] == 40
    assert event["from_step"] == 43 + 6  # more than half of the last 10 losses are high, the first of them that of step 44
    assert "stays high" in event["why"][0]
    assert_same_weights(weights(disturbed), weights(undisturbed))
    assert rows(disturbed, "val")[-1]["psnr"] == rows(undisturbed, "val")[-1]["psnr"]
    undone = [row["step"] for row in rows(disturbed, "train")]
    assert undone == [*range(1, event["from_step"]), *range(41, 61)]  # rows of undone steps stay in the file
    assert read_state(latest(disturbed).path).guard["roll_backs"] == 1


def test_without_the_guard_it_is_lost(undisturbed, run, inject, tmp_path):
    inject(once(blow_up_layer), 43)
    disturbed = run(part_of(undisturbed, 40, tmp_path / "blown"), "--steps", 60, "--resume", "auto", "--no-guard")
    assert final_loss(disturbed) > 10 * final_loss(undisturbed)


def test_a_fault_that_comes_again_lowers_the_rate_and_then_stops(undisturbed, run, inject, tmp_path, capsys):
    """The first time the run rolls back, the second time, at half the rate, it ends; what was saved is good."""
    inject(blow_up_layer, 43)
    part_of(undisturbed, 40, tmp_path / "again")
    message = stopped(capsys, lambda: run("again", "--steps", 60, "--resume", "auto", "--max_rollbacks", 1))
    assert "the run went back 1 times, as --max_rollbacks allows" in message
    assert "Try a lower --lr" in message
    disturbed = tmp_path / "again"
    before, after = ({row["step"]: row["lr"] for row in part} for part in _around_41(rows(disturbed, "train")))
    assert all(after[step] == before[step] / 2 for step in after)
    assert [len(rows(disturbed, event)) for event in ("roll_back", "stop")] == [1, 1]
    assert_same_weights(weights(disturbed, 40), weights(undisturbed, 40))


def _around_41(lines: list[dict]) -> tuple[list[dict], list[dict]]:
    """Return the rows from step 41 on: those before and those after the roll-back."""
    second = [i for i, row in enumerate(lines) if row["step"] == 41][1]
    return [row for row in lines[:second] if row["step"] > 40], lines[second:]


def test_a_rate_that_steps_up_is_lowered_after_going_back(undisturbed, run, inject, tmp_path):
    """From step 43 on the rate is a million times too high: losses are high or non-finite, depending on the processor."""
    inject(once(step_up_rate), 43)
    disturbed = run(part_of(undisturbed, 40, tmp_path / "rate"), "--steps", 60, "--resume", "auto", "--guard_rate_factor",
                    1 / TOO_HIGH)  # fmt: skip
    (event,) = rows(disturbed, "roll_back")
    assert event["step"] == 40
    assert event["rate_factor"] == 1 / TOO_HIGH
    before, after = ({row["step"]: row["lr"] for row in part} for part in _around_41(rows(disturbed, "train")))
    usual = {row["step"]: row["lr"] for row in rows(undisturbed, "train")}
    assert all(before[step] == pytest.approx((TOO_HIGH if step > 42 else 1) * usual[step]) for step in before)
    assert [after[step] for step in range(41, 61)] == pytest.approx([usual[step] for step in range(41, 61)])
    assert_finite(disturbed)
    first = rows(undisturbed, "train")[0]["loss"]
    assert max(row["loss"] for row in rows(disturbed, "train")[-20:]) < 10 * first  # it trains, as at the usual rate


def test_without_the_guard_that_rate_ruins_the_weights(undisturbed, run, inject, tmp_path):
    inject(once(step_up_rate), 43)
    part_of(undisturbed, 40, tmp_path / "rate")
    with contextlib.suppress(SystemExit):  # on some processors losses become non-finite: the run ends there
        run("rate", "--steps", 60, "--resume", "auto", "--no-guard")
    losses = {row["step"]: row["loss"] for row in rows(tmp_path / "rate", "train")}
    first = losses[1]
    assert all(loss is None or loss > 100 * first for step, loss in losses.items() if step > 43)
    assert max(losses) > 43 or latest(tmp_path / "rate").step == 40


def test_checkpoints_of_ruined_weights_are_left_out_and_removed(undisturbed, run, inject, tmp_path):
    inject(once(blow_up_layer), 43)
    disturbed = run(part_of(undisturbed, 40, tmp_path / "saved"), "--steps", 60, "--resume", "auto", "--save_every", 2,
                    "--guard_rate_factor", 0.5)  # fmt: skip
    (event,) = rows(disturbed, "roll_back")
    assert event["step"] == 42
    assert event["rate_factor"] == 0.5
    for step in (44, 46, 48):  # of the second time; a step of AdamW moves a weight by little more than the rate
        found, expected = weights(disturbed, step), weights(undisturbed, step)
        assert max((found[name] - tensor).abs().max() for name, tensor in expected.items()) < 0.1
    # and what was done survives a resume
    again = run("saved", "--steps", 62, "--resume", "auto", "--schedule", "extend", "--save_every", 2)
    optim = command_line.from_command_line(FLAGS).optim
    assert [row["lr"] for row in rows(again, "train")[-2:]] == [learning_rate(step, 62, optim) / 2 for step in (60, 61)]
    assert read_state(latest(again).path).guard["roll_backs"] == 1


def test_where_there_is_nothing_to_go_back_to_it_stops(run, spoil, tmp_path, capsys):
    """The very first step fails: rolled back to the first weights, it would fail again."""
    spoil(1, imgt=math.nan)
    message = stopped(capsys, lambda: run("none", "--steps", 6, "--guard_skips", 0))
    assert "step 1: loss nan" in message
    assert "there is no good state from before step 0 to go back to, in memory or as a checkpoint" in message
    assert latest(tmp_path / "none") is None


def test_a_gradient_that_is_blown_up_is_clipped_and_its_group_named(undisturbed, run, inject, tmp_path):
    """Clipped to the hypotenuse of the groups' medians; AdamW's state shows the norm of the gradient that it received."""
    inject(blow_up_gradient, 33)
    disturbed = run(part_of(undisturbed, 30, tmp_path / "clipped"), "--steps", 60, "--resume", "auto", "--clip_norm", 0,
                    "--save_every", 1)  # fmt: skip
    (event,) = rows(disturbed, "watch")
    assert event["step"] == 33
    assert event["why"][0].startswith("stage1 ")
    assert "," not in event["why"][0]
    train_rows = rows(disturbed, "train")
    of_groups = ([row[f"grad_{group}"] for row in train_rows[:32]] for group in ("down", "refine", "stage0", "stage1", "stem"))
    assert event["clip_norm"] == pytest.approx(math.hypot(*(sorted(norms)[15] for norms in of_groups)), rel=1e-4)
    assert train_rows[32]["grad_norm"] > 1e6 * event["clip_norm"]
    before, after = optimizer(disturbed, 32), optimizer(disturbed, 33)
    taken = [(after[i]["exp_avg"].double() - 0.9 * before[i]["exp_avg"].double()) / (1 - 0.9) for i in after]
    assert torch.cat([gradient.flatten() for gradient in taken]).norm().item() == pytest.approx(event["clip_norm"], rel=1e-3)
    assert [row["step"] for row in train_rows] == list(range(1, 61))
    assert_finite(disturbed)


def test_an_explosion_that_builds_up_raises_the_annealing_for_good_and_resumes_exactly(run, inject, spoil, tmp_path):
    """At every third unusual step in a row the annealing moves a tenth of the way to 1. The saved state has a skipped step and
    a watched one; 38 = 28 + resume + 10, bit for bit.
    """
    inject(blow_up_gradient, 27, *range(29, 36))
    spoil(26, imgt=math.nan)
    flags = (*MIXED, "--steps", 38, "--save_every", 14)
    whole = run("whole", *flags)
    part_of(whole, 28, tmp_path / "again")
    again = run("again", *flags, "--resume", "auto")
    assert [row["step"] for row in rows(whole, "watch")] == [27, *range(29, 36)]
    raised = {row["step"]: row["annealing"] for row in rows(whole, "watch") if "annealing" in row}
    assert raised == {31: pytest.approx(0.1), 34: pytest.approx(0.19)}
    factors = [row["mixing_annealing"] for row in rows(whole, "train")]
    assert factors == pytest.approx([0.0] * 31 + [0.1] * 3 + [0.19] * 4)
    assert_finite(whole)
    assert rows(whole, "train")[-1]["loss"] < 10 * rows(whole, "train")[0]["loss"]  # training continues
    assert_same_weights(weights(again), weights(whole))
    assert read_state(latest(again).path).guard == read_state(latest(whole).path).guard


def test_all_stages_follow_one_another_in_one_run(run, inject, spoil, tmp_path, capsys):
    """Watched and clipped, annealed, skipped, rolled back with the annealing kept, and stopped when all of it recurs."""
    inject(blow_up_gradient, 23, 24, 25)
    spoil(27, imgt=math.nan)
    inject(blow_up_layer, 33)
    message = stopped(capsys, lambda: run("stages", *MIXED, "--steps", 60, "--max_rollbacks", 1))
    assert "the run went back 1 times, as --max_rollbacks allows" in message
    lines = [json.loads(line) for line in (tmp_path / "stages" / "metrics.jsonl").read_text().splitlines()]
    events = [(line["step"], line["event"]) for line in lines if line["event"] not in ("start", "train")]
    blown = [event for event in events if event[0] > 33 and event[1] == "watch"]  # the ruined layer's norms may be unusual, too
    assert [event for event in events if event not in blown] == [
        (23, "watch"), (24, "watch"), (25, "watch"), (27, "skip"), (30, "roll_back"), (39, "stop"),
    ]  # fmt: skip
    assert [line["annealing"] for line in lines if line["step"] < 30 and "annealing" in line] == [pytest.approx(0.1)]
    back = next(line for line in lines if line["event"] == "roll_back")
    assert (back["from_step"], back["roll_backs"], back["rate_factor"]) == (39, 1, 0.5)
    after = [line for line in lines[lines.index(back) :] if line["event"] == "train"]
    assert [line["step"] for line in after] == list(range(31, 39))
    raised = max(line["annealing"] for line in lines[: lines.index(back)] if "annealing" in line)
    assert min(line["mixing_annealing"] for line in after) > 0.99 * raised  # for good
    assert [found.step for found in list_checkpoints(tmp_path / "stages")] == [10, 20, 30]
    assert_finite(tmp_path / "stages")


IN_MEMORY = ("--save_every", 1000)  # only the last step is saved


def test_a_rate_far_too_high_from_the_first_step_on_is_survived_without_a_checkpoint(undisturbed, run, tmp_path):
    """The run rolls back to the first weights, in memory, and restarts at a suitable rate."""
    too_high = (*IN_MEMORY, "--steps", 60, "--lr", 1e-3 * TOO_HIGH, "--lr_min", 2e-5 * TOO_HIGH)
    high = run("high", *too_high, "--guard_rate_factor", 1 / TOO_HIGH)
    (event,) = rows(high, "roll_back")
    assert (event["step"], event["from_memory"], event["roll_backs"]) == (0, 1, 1)
    assert event["from_step"] <= 1 + 10  # of the window of 40: more than half of a quarter, and three skips
    lines, usual = rows(high, "train"), rows(undisturbed, "train")
    after = lines[-60:]
    assert [line["step"] for line in after] == list(range(1, 61))
    assert [line["lr"] for line in after] == pytest.approx([line["lr"] for line in usual])
    assert after[0]["loss"] == lines[0]["loss"] == usual[0]["loss"]
    assert max(line["loss"] for line in after) < 10 * usual[0]["loss"]
    assert_finite(high)
    assert [found.step for found in list_checkpoints(high)] == [60]
    with contextlib.suppress(SystemExit):  # on some processors losses become non-finite: the run ends there
        run("lost", *too_high, "--no-guard")
    lost = [line["loss"] for line in rows(tmp_path / "lost", "train")][1:]
    assert all(loss is None or loss > 100 * usual[0]["loss"] for loss in lost)


@pytest.mark.parametrize("save_every", [1000, 40])
def test_a_state_that_its_own_step_ruined_is_not_gone_back_to(undisturbed, run, inject, save_every):
    """The update of step 40 ruins the weights, which the loss of step 41 shows. That of step 40 is in memory and saved, too."""
    inject(once(blow_up_layer), 40)
    disturbed = run("ruined", "--steps", 60, "--save_every", save_every, "--guard_rate_factor", 1)
    (event,) = rows(disturbed, "roll_back")
    assert (event["step"], event["from_step"], event["from_memory"]) == (20, 46, 1)
    assert_same_weights(weights(disturbed), weights(undisturbed))


@pytest.fixture
def noisy(monkeypatch: pytest.MonkeyPatch) -> None:
    """The loss depends on the random numbers of torch, numpy and Python."""
    plain = trainer.training_losses

    def noisy_losses(*arguments):
        factor = 1 + 0.1 * torch.rand(()) + 0.1 * random.random() + 0.1 * float(np.random.rand())
        return {name: factor * loss for name, loss in plain(*arguments).items()}

    monkeypatch.setattr(trainer, "training_losses", noisy_losses)


def timeless(run: Path) -> list[dict]:
    """Return all rows of metrics, without the values that differ between any two runs."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    others = ("samples_per_s", "data_wait", "seconds", "from_memory")
    return [{name: value for name, value in line.items() if name not in others} for line in lines]


@pytest.mark.parametrize("kind", ["mixed, averaged and accumulated", "thawed since"])
def test_going_back_in_memory_is_to_the_bit_going_back_to_a_checkpoint(
    undisturbed, run, inject, spoil, noisy, tmp_path, monkeypatch, kind
):
    """Compared at the same step: weights, averages, optimizer, guard, random numbers, position in the data, all metrics."""
    flags = [*MIXED, "--ema", 0.9, "--batch_size", 1, "--global_batch", 2]
    if kind == "thawed since":  # with step 23; another optimizer
        flags = ["--phase", 2, "--freeze_backbone", 2, "--ema", 0.9, "--resume", undisturbed]
    spoil(12, img0=math.nan)  # is in the guard's state
    inject(once(blow_up_layer), 31)
    memory = run("memory", *flags, *IN_MEMORY, "--steps", 45)
    inject(once(blow_up_layer), 31)
    with monkeypatch.context() as patch:
        patch.setattr(Snapshots, "find_before", lambda *_: None)
        disk = run("disk", *flags, "--save_every", 20, "--steps", 45)
    for folder, from_memory in ((memory, 1), (disk, 0)):
        (event,) = rows(folder, "roll_back")
        assert (event["step"], event["from_step"], event.pop("from_memory")) == (20, 37, from_memory)
    assert timeless(memory) == timeless(disk)
    one, other = read_snapshot(folder_of(memory, 45)), read_snapshot(folder_of(disk, 45))
    assert one.state == other.state
    assert one.random == other.random
    for mine, theirs in ((one.weights, other.weights), (one.ema, other.ema)):
        assert mine.keys() == theirs.keys()
        assert_same_weights(mine, theirs)
    assert one.optimizer["param_groups"] == other.optimizer["param_groups"]
    assert one.optimizer["state"].keys() == other.optimizer["state"].keys()
    for number, state in one.optimizer["state"].items():
        assert_same_weights(state, other.optimizer["state"][number])


def test_processes_go_back_in_memory_together_and_stay_equal(tmp_path, train_shards):
    """With DDP: the loss of one rank is non-finite in step 23, and nothing has been saved."""
    flags = [*FLAGS, *GUARDED, *IN_MEMORY, "--data_path", train_shards, "--output_dir", tmp_path, "--exp_name", "two",
             "--steps", 25, "--guard_skips", 0, "--guard_rate_factor", 1]  # fmt: skip
    finish(start_ranks(2, INF_ON_ONE, tmp_path / "rank", *flags, CALL="23"))
    (event,) = rows(tmp_path / "two", "roll_back")
    assert (event["step"], event["from_step"], event["from_memory"]) == (20, 23, 1)
    assert [row["step"] for row in rows(tmp_path / "two", "train")] == [*range(1, 23), *range(21, 26)]
    twice = [[row["loss"] for row in rows(tmp_path / "two", "train") if row["step"] == step] for step in (21, 22)]
    assert all(first == again for first, again in twice)
    ranks = [torch.load(tmp_path / f"rank{rank}", weights_only=True) for rank in (0, 1)]
    assert_same_weights(ranks[1], ranks[0])
    assert_same_weights(weights(tmp_path / "two"), ranks[0])


def test_inf_on_one_process_is_skipped_by_both_which_stay_equal(tmp_path, train_shards):
    """With DDP; the samples that are named are those of the rank whose loss it was."""
    two = tmp_path / "two"
    flags = [*FLAGS, "--data_path", train_shards, "--output_dir", tmp_path, "--exp_name", "two", "--steps", 6,
             "--save_every", 1]  # fmt: skip
    finish(start_ranks(2, INF_ON_ONE, tmp_path / "rank", *flags, CALL="3"))
    (event,) = rows(two, "skip")
    config = command_line.from_command_line([*FLAGS, "--data_path", str(train_shards)])
    loader = trainer.TrainingLoader(config.data, 0, torch.device("cpu"), accumulation=1, rank=1, world=2)
    assert event["step"] == 3
    assert "loss inf" in event["why"][0]
    assert event["samples"] == list(next(itertools.islice(loader.batches(START), 2, None)).keys)
    ranks = [torch.load(tmp_path / f"rank{rank}", weights_only=True) for rank in (0, 1)]
    assert_same_weights(ranks[1], ranks[0])
    assert_same_weights(weights(two), ranks[0])
    assert_same_weights(weights(two, 3), weights(two, 2))
    assert not torch.equal(weights(two, 4)["refine.head.weight"], weights(two, 3)["refine.head.weight"])


@pytest.fixture
def brighter(run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make the truth a little brighter than the frames: a target that is learned within few steps. The loss has no floor."""
    monkeypatch.setattr(
        trainer, "training_losses", lambda prediction, imgt, *rest: training_losses(prediction, imgt + 0.05, *rest)
    )


def last_epoch(run: Path) -> float:
    """Return the mean loss of the last 11 steps, in which every sample occurs once."""
    return sum(row["loss"] for row in rows(run, "train")[-11:]) / 11


@pytest.mark.slow
def test_a_rate_30_times_too_high_is_survived_and_without_the_guard_diverges(run, brighter, tmp_path):
    """Training explodes by itself, on the way up to that rate. When, in which stages and how often depends on a processor's
    rounding; that it explodes, that the guard brings it back to training, and that the loss stays high without it, does not.
    """
    good = run("good", *UNSTABLE, "--lr", GOOD_RATE)
    high = run("high", *UNSTABLE, "--lr", 30 * GOOD_RATE, "--guard_rate_factor", 0.1)
    with contextlib.suppress(SystemExit):  # losses may become non-finite, which ends the run
        run("lost", *UNSTABLE[:-2], "--lr", 30 * GOOD_RATE, "--no-guard")
    first = rows(good, "train")[0]["loss"]
    assert last_epoch(good) < 0.5 * first  # there was something to learn
    assert last_epoch(high) < 0.75 * first
    assert_finite(high)
    went_back = len(rows(high, "roll_back"))
    assert 1 <= went_back == read_state(latest(high).path).guard["roll_backs"]
    rates, usual = ({row["step"]: row["lr"] for row in rows(name, "train")} for name in (high, good))  # the last of each step
    assert rates[149] == pytest.approx(30 * 0.1**went_back * usual[149])
    lost = [row["loss"] for row in rows(tmp_path / "lost", "train")][-11:]
    assert all(loss is None or loss > 2 * first for loss in lost)
