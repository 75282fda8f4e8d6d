"""Faults put into running jobs, and what the guard makes of them: it recovers where the same job without it is lost."""

from __future__ import annotations

import contextlib
import itertools
import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from warm import finish, start_ranks

from vfi import presets, train
from vfi.checkpoint import latest, list_checkpoints, read_state
from vfi.data.plan import START

pytestmark = pytest.mark.usefixtures("one_thread")
FLAGS = ["--preset", "tiny", "--width", "2", "--head_dim", "8", "--backbone_mode", "gated_attn_only", "--crop", "64",
         "--num_workers", "0", "--batch_size", "2", "--log_every", "1", "--warmup_steps", "2", "--val_every", "1000",
         "--save_every", "10", "--keep_last", "9", "--lr", "1e-3"]  # fmt: skip
GUARDED = ["--guard_window", "40"]
UNSTABLE = ["--mixing", "mhc", "--mixing_streams", "2", "--sinkhorn_iterations", "3", "--depths", "2", "2", "--steps", "150",
            "--warmup_steps", "100", "--lr_min", "0"]  # fmt: skip
GOOD_RATE = 3e-3  # of 1e-3, 3e-3 and 1e-2 it ends with the lowest loss: 0.0316, 0.02905, 0.02907
INF_ON_ONE = """
import os, sys
import torch
from vfi import presets, train
plain, calls = train.training_losses, 0
def losses(*arguments):
    global calls
    calls += 1
    found = plain(*arguments)
    return {name: loss * torch.inf for name, loss in found.items()} if calls == 3 and os.environ["RANK"] == "1" else found
train.training_losses = losses
trainer = train.Trainer(presets.from_command_line(sys.argv[2:]))
trainer.fit()
torch.save(trainer.network.state_dict(), sys.argv[1] + os.environ["RANK"])
torch.distributed.destroy_process_group()
"""  # of two processes, in the third step

Fault = Callable[[train.Trainer], None]


@pytest.fixture
def at(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """at(fault, steps …): `fault(trainer)` after the backward pass of these steps, each time that they come by."""
    faults: dict[int, Fault] = {}
    plain = train.Trainer.optimise

    def optimise(trainer, meter):
        losses, parts = plain(trainer, meter)
        fault = faults.get(trainer.step + 1)
        if fault is not_a_number:
            parts = [(loss * math.nan, keys) for loss, keys in parts]
            losses = {name: loss * math.nan for name, loss in losses.items()}
        if fault:
            fault(trainer)
        return losses, parts

    monkeypatch.setattr(train.Trainer, "optimise", optimise)
    return lambda fault, *steps: faults.update(dict.fromkeys(steps, fault))


def not_a_number(trainer: train.Trainer) -> None:
    """As after a batch whose loss is no number."""
    for parameter in trainer.network.parameters():
        if parameter.grad is not None:
            parameter.grad.fill_(math.nan)


def weights_blown_up(trainer: train.Trainer) -> None:
    """The last layer times 1000."""
    with torch.no_grad():
        trainer.network.refine.head.weight.mul_(1e3)
        trainer.network.refine.head.bias.add_(1)


def gradient_blown_up(trainer: train.Trainer) -> None:
    """That of one stage times 1000."""
    for parameter in trainer.groups["stage1"]:
        parameter.grad.mul_(1e3)


def once(fault: Fault) -> Fault:
    """Only the first time."""
    left = [fault]
    return lambda trainer: left.pop()(trainer) if left else None


@pytest.fixture
def run(tmp_path, train_shards, val_shards):
    """run(name, flags …) -> the run's folder, in which a run may be there already."""

    def start(name: str, *flags: object, out: Path = tmp_path) -> Path:
        guarded = [] if "--no-guard" in flags else GUARDED
        train.main([*FLAGS, *guarded, "--data_path", str(train_shards), "--val_path", str(val_shards), "--output_dir", str(out),
                    "--exp_name", name, *map(str, flags)])  # fmt: skip
        return out / name

    return start


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, train_shards, val_shards) -> Path:
    """60 steps, with the guard."""
    out = tmp_path_factory.mktemp("runs")
    train.main([*FLAGS, *GUARDED, "--data_path", str(train_shards), "--val_path", str(val_shards), "--output_dir", str(out),
                "--exp_name", "undisturbed", "--steps", "60"])  # fmt: skip
    return out / "undisturbed"


def part_of(whole: Path, step: int, run: Path) -> str:
    """A copy of a run that was killed after its checkpoint of `step` -> its name."""
    shutil.copytree(whole, run)
    for found in list_checkpoints(run):
        if found.step > step:
            shutil.rmtree(found.path)
    return run.name


def weights(run: Path, step: int | None = None) -> dict[str, torch.Tensor]:
    found = {checkpoint.step: checkpoint.path for checkpoint in list_checkpoints(run)}
    return load_file(found[step or max(found)] / "model.safetensors")


def assert_same_weights(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name


def rows(run: Path, event: str) -> list[dict]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if line["event"] == event]


def final_loss(run: Path) -> float:
    """Mean square error of the validation at the end."""
    return 10 ** (-rows(run, "val")[-1]["psnr"] / 10)


def stopped(capsys, start: Callable[[], object]) -> str:
    """The one line of an error that ends the job."""
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
    old, new = weights(undisturbed, 50), weights(undisturbed, 60)
    stem = [name for name in old if name.startswith("backbone.stem.")]
    both = [new[name] - old[name] for name in stem], [old[name] for name in stem]
    change, size = (torch.cat([tensor.flatten() for tensor in tensors]).norm() for tensors in both)
    steps = [row["update_stem"] for row in rows(undisturbed, "train")[50:60]]
    assert max(steps) < change / size < sum(steps)  # ten steps that don't all go the same way


def test_a_batch_that_is_no_number_is_skipped_and_named(undisturbed, run, at, tmp_path, train_shards):
    at(not_a_number, 32)
    disturbed = run(part_of(undisturbed, 30, tmp_path / "nan"), "--steps", 60, "--save_every", 1, "--keep_last", 99,
                    "--resume", "auto")  # fmt: skip
    (event,) = rows(disturbed, "skip")
    config = presets.from_command_line([*FLAGS, "--data_path", str(train_shards)])
    loader = train.TrainingLoader(config.data, 0, torch.device("cpu"), accumulation=1)
    batch = next(itertools.islice(loader.batches(START), 31, None))
    assert event["step"] == 32
    assert event["samples"] == list(batch.keys)
    assert "loss nan" in event["why"][0]
    assert_same_weights(weights(disturbed, 32), weights(disturbed, 31))
    states = [torch.load(disturbed / f"checkpoints/step_000000{n}/optimizer.pt", weights_only=True)["state"] for n in (31, 32)]
    assert all(torch.equal(states[0][i][key], states[1][i][key]) for i in states[0] for key in states[0][i])
    assert not torch.equal(weights(disturbed, 33)["refine.head.weight"], weights(disturbed, 32)["refine.head.weight"])
    train_rows = rows(disturbed, "train")
    assert [row["step"] for row in train_rows] == list(range(1, 61))
    assert train_rows[31]["loss"] is None
    assert train_rows[31]["update_stem"] == 0
    assert final_loss(disturbed) == pytest.approx(final_loss(undisturbed), rel=0.01)
    board = EventAccumulator(str(disturbed / "tensorboard"))
    board.Reload()
    assert {"skip/why/text_summary", "skip/samples/text_summary"} <= set(board.Tags()["tensors"])
    assert "train/update_stem" in board.Tags()["scalars"]


def test_without_the_guard_it_ends_the_run(undisturbed, run, at, tmp_path, capsys):
    at(not_a_number, 32)
    part_of(undisturbed, 30, tmp_path / "nan")
    message = stopped(capsys, lambda: run("nan", "--steps", 60, "--no-guard", "--resume", "auto"))
    assert "the loss is nan, the norm of the gradient nan at step 32" in message


def test_a_layer_that_is_blown_up_is_rolled_back_bit_for_bit(undisturbed, run, at, tmp_path):
    """At an unchanged rate, and with a fault that does not come again, nothing of it is left."""
    at(once(weights_blown_up), 43)
    disturbed = run(part_of(undisturbed, 40, tmp_path / "blown"), "--steps", 60, "--resume", "auto", "--guard_rate_factor", 1)
    (event,) = rows(disturbed, "roll_back")
    assert event["step"] == 40
    assert 43 + 5 < event["from_step"] <= 43 + 10
    assert "stays high" in event["why"][0]
    assert_same_weights(weights(disturbed), weights(undisturbed))
    assert rows(disturbed, "val")[-1]["psnr"] == rows(undisturbed, "val")[-1]["psnr"]
    undone = [row["step"] for row in rows(disturbed, "train")]
    assert undone == [*range(1, event["from_step"]), *range(41, 61)]  # what was undone is still there to be read
    assert read_state(latest(disturbed).path).guard["roll_backs"] == 1


def test_without_the_guard_it_is_lost(undisturbed, run, at, tmp_path):
    at(once(weights_blown_up), 43)
    disturbed = run(part_of(undisturbed, 40, tmp_path / "blown"), "--steps", 60, "--resume", "auto", "--no-guard")
    assert final_loss(disturbed) > 10 * final_loss(undisturbed)


def test_a_fault_that_comes_again_lowers_the_rate_and_then_stops(undisturbed, run, at, tmp_path, capsys):
    """The first time it goes back, the second time, with the rate at a half, it ends; what was saved is good."""
    at(weights_blown_up, 43)
    part_of(undisturbed, 40, tmp_path / "again")
    message = stopped(capsys, lambda: run("again", "--steps", 60, "--resume", "auto", "--guard_roll_backs", 1))
    assert "the run went back 1 times, as --guard_roll_backs allows" in message
    assert "Try a lower --lr" in message
    disturbed = tmp_path / "again"
    before, after = ({row["step"]: row["lr"] for row in part} for part in _around_41(rows(disturbed, "train")))
    assert all(after[step] == before[step] / 2 for step in after)
    assert [len(rows(disturbed, event)) for event in ("roll_back", "stop")] == [1, 1]
    assert_same_weights(weights(disturbed, 40), weights(undisturbed, 40))


def _around_41(lines: list[dict]) -> tuple[list[dict], list[dict]]:
    """Rows from step 41 on: those before and those after the run went back."""
    second = [i for i, row in enumerate(lines) if row["step"] == 41][1]
    return [row for row in lines[:second] if row["step"] > 40], lines[second:]


def test_checkpoints_of_ruined_weights_are_left_out_and_removed(undisturbed, run, at, tmp_path):
    at(once(weights_blown_up), 43)
    disturbed = run(part_of(undisturbed, 40, tmp_path / "saved"), "--steps", 60, "--resume", "auto", "--save_every", 2,
                    "--guard_rate_factor", 0.5)  # fmt: skip
    (event,) = rows(disturbed, "roll_back")
    assert event["step"] == 42
    assert event["rate_factor"] == 0.5
    assert final_loss(disturbed) == pytest.approx(final_loss(undisturbed), rel=0.01)
    # and what was done survives a resume
    again = run("saved", "--steps", 62, "--resume", "auto", "--save_every", 2)
    optim = presets.from_command_line(FLAGS).optim
    assert [row["lr"] for row in rows(again, "train")[-2:]] == [train.learning_rate(step, 62, optim) / 2 for step in (60, 61)]
    assert read_state(latest(again).path).guard["roll_backs"] == 1


def test_where_there_is_nothing_to_go_back_to_it_stops(run, at, tmp_path, capsys):
    at(not_a_number, 3)
    message = stopped(capsys, lambda: run("none", "--steps", 6, "--guard_skips", 0))
    assert "step 3: loss nan" in message
    assert "has no good checkpoint from before step 3 to go back to" in message
    assert latest(tmp_path / "none") is None


def test_a_gradient_that_is_blown_up_is_clipped_and_its_group_named(undisturbed, run, at, tmp_path):
    at(gradient_blown_up, 33)
    disturbed = run(part_of(undisturbed, 30, tmp_path / "clipped"), "--steps", 60, "--resume", "auto", "--clip_norm", 0)
    (event,) = rows(disturbed, "watch")
    assert event["step"] == 33
    assert event["why"][0].startswith("stage1 ")
    assert "," not in event["why"][0]
    usual = sorted(row["grad_norm"] for row in rows(undisturbed, "train")[:32])[16]
    assert event["clip_norm"] == pytest.approx(usual, rel=0.3)
    assert final_loss(disturbed) == pytest.approx(final_loss(undisturbed), rel=0.01)


def test_an_explosion_that_builds_up_raises_the_annealing_for_good_and_resumes_exactly(run, at, tmp_path):
    """With a skipped step and a watched one in the state that is saved; 34 = 28 + resume + 6, bit for bit."""
    at(gradient_blown_up, 27, 29, 30, 31, 32, 33)
    at(not_a_number, 26)
    flags = ("--mixing", "mhc", "--mixing_streams", 2, "--steps", 34, "--save_every", 14)
    whole = run("whole", *flags)
    part_of(whole, 28, tmp_path / "again")
    again = run("again", *flags, "--resume", "auto")
    assert [row["step"] for row in rows(whole, "watch")] == [27, 29, 30, 31, 32, 33]
    raised = {row["step"]: row["annealing"] for row in rows(whole, "watch") if "annealing" in row}
    assert raised == {31: pytest.approx(0.1)}
    factors = [row["mixing_annealing"] for row in rows(whole, "train")]
    assert factors == pytest.approx([0.0] * 31 + [0.1] * 3)
    assert_same_weights(weights(again), weights(whole))
    assert read_state(latest(again).path).guard == read_state(latest(whole).path).guard


def test_inf_on_one_process_is_skipped_by_both_which_stay_equal(tmp_path, train_shards):
    """By DDP; the samples that are named are those of the process whose loss it was."""
    two = tmp_path / "two"
    flags = [*FLAGS, "--data_path", train_shards, "--output_dir", tmp_path, "--exp_name", "two", "--steps", 6,
             "--save_every", 1]  # fmt: skip
    finish(start_ranks(2, INF_ON_ONE, tmp_path / "rank", *flags))
    (event,) = rows(two, "skip")
    config = presets.from_command_line([*FLAGS, "--data_path", str(train_shards)])
    loader = train.TrainingLoader(config.data, 0, torch.device("cpu"), accumulation=1, rank=1, world=2)
    assert event["step"] == 3
    assert "loss inf" in event["why"][0]
    assert event["samples"] == list(next(itertools.islice(loader.batches(START), 2, None)).keys)
    ranks = [torch.load(tmp_path / f"rank{rank}", weights_only=True) for rank in (0, 1)]
    assert_same_weights(ranks[1], ranks[0])
    assert_same_weights(weights(two), ranks[0])
    assert_same_weights(weights(two, 3), weights(two, 2))
    assert not torch.equal(weights(two, 4)["refine.head.weight"], weights(two, 3)["refine.head.weight"])


@pytest.fixture
def brighter(monkeypatch: pytest.MonkeyPatch) -> None:
    """The truth is a little brighter than the frames: something to learn within few steps."""
    plain = train.training_losses
    monkeypatch.setattr(train, "training_losses", lambda prediction, imgt, *rest: plain(prediction, imgt + 0.05, *rest))


def last_epoch(run: Path) -> float:
    """Mean loss of the last 11 steps, in which every sample comes once."""
    return sum(row["loss"] for row in rows(run, "train")[-11:]) / 11


@pytest.mark.slow
def test_a_rate_30_times_too_high_ends_as_the_good_one_does_and_without_the_guard_diverges(run, brighter, tmp_path):
    """It explodes by itself, on the way up to that rate. What is compared is the loss in training over the last epoch."""
    good = run("good", *UNSTABLE, "--lr", GOOD_RATE)
    high = run("high", *UNSTABLE, "--lr", 30 * GOOD_RATE, "--guard_rate_factor", 0.1)
    with contextlib.suppress(SystemExit):  # it may come to losses that are no numbers, and end there
        run("lost", *UNSTABLE, "--lr", 30 * GOOD_RATE, "--no-guard")
    assert last_epoch(good) < 0.5 * rows(good, "train")[0]["loss"]  # there was something to learn
    assert not rows(good, "roll_back")
    assert last_epoch(high) == pytest.approx(last_epoch(good), rel=0.01)
    assert any("annealing" in row for row in rows(high, "watch"))
    assert rows(high, "train")[-1]["mixing_annealing"] > 0  # raised for good, also where the run went back since
    went_back = len(rows(high, "roll_back"))
    assert 1 <= went_back == read_state(latest(high).path).guard["roll_backs"]
    rates, usual = ({row["step"]: row["lr"] for row in rows(name, "train")} for name in (high, good))  # the last of each step
    assert rates[149] == pytest.approx(30 * 0.1**went_back * usual[149])
    assert last_epoch(tmp_path / "lost") > 100 * last_epoch(good)
