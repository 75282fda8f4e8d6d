"""Training from phase to phase: chain, frozen backbone, teachers of the flow, curriculum and annealing, in the training job."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from warm import TRAIN, finish, start_ranks

from shards.flow import main as make_flow
from shards.schema import read_index
from vfi import train
from vfi.checkpoint.store import latest
from vfi.checkpoint.weights import load_model
from vfi.config import command_line, presets
from vfi.config.configs import Config, DataConfig
from vfi.training import trainer as trainer_module

pytestmark = pytest.mark.usefixtures("one_thread")
FLAGS = ["--preset", "tiny", "--width", "2", "--head_dim", "8", "--crop", "64", "--num_workers", "0", "--log_every", "1",
         "--warmup_steps", "2", "--batch_size", "4", "--lr", "2e-4"]  # fmt: skip
STEPS_PER_EPOCH = 22 // 4  # of the shards at this batch size
TOTAL = STEPS_PER_EPOCH + 2
FROZEN = ["--phase", 2, "--freeze_backbone", 1, "--steps", TOTAL, "--save_every", 1, "--keep_last", 9]


def run(out: Path, name: str, *flags: object) -> Path:
    """Train in this process and return the run folder."""
    train.main([*FLAGS, "--output_dir", str(out), "--exp_name", name, *map(str, flags)])
    return out / name


def refused(capsys, *flags: object) -> str:
    with pytest.raises(SystemExit) as error:
        train.main([*FLAGS, *map(str, flags)])
    assert error.value.code == 2
    return capsys.readouterr().err.rstrip("\n").splitlines()[-1]


def weights(run_folder: Path) -> dict[str, torch.Tensor]:
    return load_file(latest(run_folder).path / "model.safetensors")


def rows(run_folder: Path, event: str = "train") -> list[dict]:
    lines = [json.loads(line) for line in (run_folder / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if line["event"] == event]


@pytest.fixture(scope="module")
def first(tmp_path_factory, train_shards) -> Path:
    """A phase-1 run of two steps."""
    return run(tmp_path_factory.mktemp("runs"), "first", "--data_path", train_shards, "--steps", 2)


def test_chain_of_three_phases(first, tmp_path, train_shards, val_shards, capsys):
    """Each phase starts from the one before, reports which weights it loaded, and keeps them bit for bit at a rate of 0."""
    still = ("--data_path", train_shards, "--val_path", val_shards, "--steps", 1, "--lr", 0, "--lr_min", 0)
    second = run(tmp_path, "second", *still, "--phase", 2, "--resume", first)
    printed = capsys.readouterr().out
    assert "loaded: backbone (0.03 M), refine (0.06 M)" in printed
    assert "new: flow (0.09 M)" in printed
    assert "left: " not in printed
    assert "settings of the model that differ from that run's: phase: 2 here, 1 there" in printed
    old, new = weights(first), weights(second)
    assert all(torch.equal(new[name], tensor) for name, tensor in old.items())
    assert {name.partition(".")[0] for name in new.keys() - old.keys()} == {"flow"}
    model, _ = load_model(first, torch.device("cpu"))
    moved, config = load_model(second, torch.device("cpu"))
    assert config.model.phase == 2
    img0, img1 = torch.rand(2, 1, 3, 64, 64)
    time = torch.tensor([0.5])
    torch.testing.assert_close(moved(img0, img1, time).imgt, model(img0, img1, time).imgt, rtol=0, atol=1e-4)

    third = run(tmp_path, "third", *still, "--phase", 3, "--resume", second)
    printed = capsys.readouterr().out
    assert "loaded: backbone (0.03 M), flow (0.09 M), refine (0.06 M)" in printed
    assert "new: " not in printed
    assert all(torch.equal(weights(third)[name], tensor) for name, tensor in new.items())

    back = run(tmp_path, "back", *still, "--resume", second)
    assert "left: flow (0.09 M)" in capsys.readouterr().out
    assert weights(back).keys() == old.keys()


def test_chain_refuses_another_architecture(first, tmp_path, train_shards, capsys):
    message = refused(capsys, "--data_path", train_shards, "--steps", 1, "--phase", 2, "--resume", first, "--use_ecab",
                      "--gate", "elementwise", "--output_dir", tmp_path)  # fmt: skip
    assert "is of another architecture" in message
    assert "backbone.stages.0.0.branches.attention.qkv_gate.weight" in message
    assert "flow" not in message.partition("Settings that differ")[0]


@pytest.fixture(scope="module")
def thawed(tmp_path_factory, first, train_shards) -> Path:
    """A phase-2 run with one frozen epoch and two further steps, saved after each step; not to be changed."""
    return run(tmp_path_factory.mktemp("runs"), "thawed", *FROZEN, "--data_path", train_shards, "--resume", first)


def saved(run_folder: Path, step: int) -> Path:
    """Return the checkpoint of that step."""
    return run_folder / "checkpoints" / f"step_{step:08d}"


def test_frozen_backbone_does_not_move_until_it_thaws(first, thawed):
    """One frozen epoch: the backbone's weights stay the same bit for bit and have no optimizer state, and then train."""
    before = weights(first)
    after, later = (load_file(saved(thawed, STEPS_PER_EPOCH + n) / "model.safetensors") for n in (0, 1))
    backbone = [name for name in before if name.startswith("backbone.")]
    assert all(torch.equal(after[name], before[name]) for name in backbone)
    assert any(not torch.equal(after[name], before[name]) for name in before if name.startswith("refine."))
    state = torch.load(saved(thawed, STEPS_PER_EPOCH) / "optimizer.pt", weights_only=True)["state"]
    assert len(state) == len(after) - len(backbone)
    moved = [name for name in backbone if not torch.equal(later[name], before[name])]
    assert len(moved) > 0.9 * len(backbone)


def test_frozen_means_no_gradient_and_norms_in_eval(first, tmp_path, train_shards):
    config = command_line.from_command_line([*FLAGS, "--data_path", str(train_shards), "--phase", "2", "--freeze_backbone", "1",
                                        "--steps", "9", "--resume", str(first), "--output_dir", str(tmp_path)])  # fmt: skip
    trainer = trainer_module.Trainer(config)
    trainer.live.train_mode()
    assert not trainer.live.network.backbone.training
    assert trainer.live.network.refine.training
    assert not any(parameter.requires_grad for parameter in trainer.live.network.backbone.parameters())
    trainer.live.thaw()
    trainer.live.train_mode()
    assert trainer.live.network.backbone.training
    assert all(parameter.requires_grad for parameter in trainer.live.network.parameters())


@pytest.mark.parametrize("stopped_at", [STEPS_PER_EPOCH - 1, STEPS_PER_EPOCH, STEPS_PER_EPOCH + 1])
def test_resume_around_the_thaw_is_exact(thawed, tmp_path, train_shards, stopped_at):
    """A run that stopped before, at or after the thaw and is resumed ends with the weights of an undisturbed one."""
    again = tmp_path / "again"
    (again / "checkpoints").mkdir(parents=True)
    (again / "config.json").write_bytes((thawed / "config.json").read_bytes())
    saved(again, stopped_at).symlink_to(saved(thawed, stopped_at))
    run(tmp_path, "again", *FROZEN, "--data_path", train_shards, "--resume", "auto")
    assert [row["step"] for row in rows(again)] == list(range(stopped_at + 1, TOTAL + 1))
    for name, tensor in weights(thawed).items():
        assert torch.equal(weights(again)[name], tensor), name


def test_frozen_epochs_end_with_another_global_batch_too(first, tmp_path, train_shards):
    """Four of five steps with four samples, then the six samples that are left of the epoch in pairs: three more are frozen."""
    flags = ("--data_path", train_shards, "--phase", 2, "--freeze_backbone", 1, "--save_every", 1, "--keep_last", 9)
    folder = run(tmp_path, "frozen", *flags, "--steps", 4, "--resume", first)
    run(tmp_path, "frozen", *flags, "--steps", 8, "--batch_size", 2, "--resume", "auto", "--schedule", "extend")
    before = {name: tensor for name, tensor in weights(first).items() if name.startswith("backbone.")}
    for step in range(4, 9):
        after = load_file(saved(folder, step) / "model.safetensors")
        still = all(torch.equal(after[name], tensor) for name, tensor in before.items())
        assert still == (step <= 7), step


def test_frozen_backbone_must_be_trained(capsys, tmp_path, train_shards):
    message = refused(
        capsys, "--data_path", train_shards, "--phase", 2, "--freeze_backbone", 1, "--steps", 1, "--output_dir", tmp_path
    )
    assert "--freeze_backbone 1 would keep a backbone as it is that was never trained: add --resume" in message


def test_teacher_trains_and_validation_shows_flow(tmp_path, train_shards, val_shards):
    folder = run(tmp_path, "taught", "--data_path", train_shards, "--val_path", val_shards, "--phase", 2, "--teacher",
                 "--steps", 3)  # fmt: skip
    assert {"loss", "image", "merge", "teacher_image", "teacher"} <= set(rows(folder)[0])
    row = rows(folder)[-1]
    total = row["image"] + 0.5 * row["merge"] + row["teacher_image"] + 0.01 * row["teacher"]
    assert row["loss"] == pytest.approx(total, rel=1e-5)
    board = EventAccumulator(str(folder / "tensorboard"))
    board.Reload()
    flows = [tag for tag in board.Tags()["images"] if tag.startswith("val_flow")]
    assert flows == ["val_flow/flow_t0", "val_flow/flow_t1", "val_flow/mask"]
    picture = board.Images(flows[0])[0]
    assert (picture.height, picture.width) == (72, 80)


def test_distillation_from_the_shards_and_from_a_callable(tmp_path, train_shards):
    """Stored flow and a callable that gives the same flow train the same weights; another flow does not."""
    assert read_index(train_shards).has_flow
    flags = ["--data_path", train_shards, "--phase", 2, "--distill_weight", 0.1, "--steps", 2]
    stored = run(tmp_path, "stored", *flags)
    assert rows(stored)[0]["distill"] > 0

    def settings(name: str) -> Config:
        return command_line.from_command_line([*FLAGS, *map(str, flags), "--output_dir", str(tmp_path), "--exp_name", name])

    config = settings("called")
    loader = trainer_module.TrainingLoader(config.data, config.run.seed, torch.device("cpu"), accumulation=1, with_flow=True)
    known = {batch.img0.sum().item(): (batch.flow_t0, batch.flow_t1) for batch, _ in zip(loader.batches(), range(2))}  # noqa: B905
    train.train(config, lambda img0, _img1, _timestep: known[img0.sum().item()])
    train.train(settings("other"), lambda img0, _img1, _timestep: (torch.zeros_like(img0[:, :2]),) * 2)
    assert same(stored, tmp_path / "called")
    assert not same(stored, tmp_path / "other")
    with pytest.raises(train.ConfigError, match="no effect"):
        train.train(dataclasses.replace(config, optim=dataclasses.replace(config.optim, distill_weight=0.0)), lambda *_: None)


TEACHER = """
import torch
def make(device):
    return lambda img0, img1, timestep: tuple(torch.full_like(img0[:, :2], value) for value in (1.0, -1.0))
def with_weights(device):
    def teach(img0, img1, timestep):
        flow_t0, flow_t1 = make(device)(img0, img1, timestep)
        return flow_t0, flow_t1, torch.ones_like(flow_t0)
    return teach
def shifted(device):
    return lambda frame0, frame1: torch.ones_like(frame0[:, :2])
"""


def test_a_teacher_is_named_on_the_command_line(tmp_path, train_shards_without_flow, monkeypatch, capsys):
    """20 steps of the preset Exp-2e, small, on shards without flow; a weight of 1 everywhere changes nothing."""
    (tmp_path / "teacher_of_mine.py").write_text(TEACHER)
    monkeypatch.chdir(tmp_path)
    flags = ["--preset", "Exp-2e", "--data_path", train_shards_without_flow, "--batch_size", 2, "--freeze_backbone", 0]
    one = run(tmp_path, "one", *flags, "--steps", 20, "--flow_teacher", "teacher_of_mine:make")
    found = rows(one)
    assert found[-1]["step"] == 20
    assert 0 < found[-1]["distill"] < found[0]["distill"]
    two = run(tmp_path, "two", *flags, "--steps", 2, "--flow_teacher", "teacher_of_mine:with_weights")
    for first, second in zip(found[:2], rows(two), strict=True):
        assert second["distill"] == first["distill"]
    capsys.readouterr()
    message = refused(capsys, *flags, "--steps", 1, "--flow_teacher", "teacher_of_mine:absent", "--output_dir", tmp_path)
    assert "--flow_teacher teacher_of_mine:absent: " in message
    assert "has no function absent" in message


def test_flow_of_a_teacher_is_distilled_from_the_shards(tmp_path, train_shards_without_flow, monkeypatch):
    (tmp_path / "teacher_of_mine.py").write_text(TEACHER)
    monkeypatch.chdir(tmp_path)
    source, out = ["--shards", str(train_shards_without_flow)], tmp_path / "with_flow"
    assert make_flow([*source, "--out", str(out), "--model", "teacher_of_mine:shifted", "--device", "cpu"]) == 0
    flags = ["--data_path", out, "--phase", 2, "--distill_weight", 0.1, "--steps", 2, "--batch_size", 2]
    assert rows(run(tmp_path, "stored", *flags))[0]["distill"] == 0
    batch = next(trainer_module.TrainingLoader(
        DataConfig(data_path=(str(out),), batch_size=2, crop=64, num_workers=0), 0, torch.device("cpu"), accumulation=1,
        with_flow=True,
    ).batches())  # fmt: skip
    assert batch.flow_t0.abs().unique().tolist() == [1.0]
    # a flow of (1, 1) there and back does not cancel: 8 > 0.01 * 4 + 0.5, so it counts nowhere
    assert batch.flow_weight.shape == (2, 2, 64, 64)
    assert batch.flow_weight.unique().tolist() == [0.0]


def same(one: Path, other: Path) -> bool:
    return all(torch.equal(weights(other)[name], tensor) for name, tensor in weights(one).items())


def test_shards_without_flow_cannot_be_distilled(capsys, tmp_path, train_shards_without_flow):
    message = refused(capsys, "--data_path", train_shards_without_flow, "--phase", 2, "--distill_weight", 0.1, "--steps", 1,
                      "--output_dir", tmp_path)  # fmt: skip
    assert "--distill_weight" in message


def test_annealing_rises_over_the_last_steps_and_is_saved(tmp_path, train_shards):
    folder = run(tmp_path, "annealed", "--data_path", train_shards, "--use_mhc", "--mhc_anneal", 0.5, "--steps", 4,
                 "--save_every", 1, "--keep_last", 9)  # fmt: skip
    seen = []
    for step in range(1, 5):
        found = load_file(saved(folder, step) / "model.safetensors")
        values = {tensor.item() for name, tensor in found.items() if name.endswith("annealing")}
        assert len(values) == 1
        seen.append(values.pop())
    assert seen == [0.0, 0.0, 0.5, 1.0]
    logged = rows(folder)
    assert [row["mixing_annealing"] for row in logged] == seen
    assert logged[-1]["mixing_gain"] == 1.0
    assert 0 < logged[0]["mixing_column_error"] < 1e-2
    assert all(row["mixing_row_error"] < 1e-5 for row in logged)


def test_annealing_does_not_fall_back_in_the_next_phase(tmp_path, train_shards, capsys):
    """Weights trained with an annealing factor continue with it, as the start reports; a new schedule only raises it."""
    first = run(tmp_path, "one", "--data_path", train_shards, "--use_mhc", "--mhc_anneal", 0.5, "--steps", 4)
    flags = ["--data_path", train_shards, "--use_mhc", "--phase", 2, "--steps", 2, "--resume", first]
    capsys.readouterr()
    for name, more in (("plain", []), ("scheduled", ["--mhc_anneal", 0.5])):
        second = run(tmp_path, name, *flags, *more)
        assert "annealing factor starts at 1" in capsys.readouterr().out
        assert {row["mixing_annealing"] for row in rows(second)} == {1.0}


def test_gradient_that_is_no_number_is_never_saved(tmp_path, train_shards, monkeypatch, capsys):
    """The loss is finite, its gradient is not: the weights of this step are lost, those of the last checkpoint are kept."""
    plain: Callable = trainer_module.training_losses

    def broken(prediction, imgt, *rest):
        losses = plain(prediction, imgt, *rest)
        hurt = (prediction.residual * 0).abs().sqrt().sum()  # 0, with an infinite slope times 0
        return losses | {"loss": losses["loss"] + hurt}

    monkeypatch.setattr(trainer_module, "training_losses", broken)
    message = refused(capsys, "--data_path", train_shards, "--steps", 1, "--log_every", 5, "--output_dir", tmp_path,
                      "--exp_name", "nan", "--no-guard")  # fmt: skip
    assert "the norm of the gradient nan at step 1" in message
    assert latest(tmp_path / "nan") is None


def test_auto_says_that_it_starts_from_scratch(tmp_path, train_shards, capsys):
    folder = run(tmp_path, "new", "--data_path", train_shards, "--steps", 1, "--resume", "auto")
    assert f"no checkpoint in {folder}: starting from scratch" in capsys.readouterr().out


def test_curriculum_trains_on_growing_crops(tmp_path, train_shards, monkeypatch):
    sizes = []
    plain: Callable = trainer_module.training_losses

    def spy(prediction, imgt, *rest):
        sizes.append(imgt.shape[-1])
        return plain(prediction, imgt, *rest)

    monkeypatch.setattr(trainer_module, "training_losses", spy)
    run(tmp_path, "grown", "--data_path", train_shards, "--phase", 3, "--curriculum", "--curriculum_crops", 64, 64, 64,
        "--curriculum_T", 3, "--steps", 2)  # fmt: skip
    assert sizes == [64, 64]


LIKE_ATTENTION = ["--expand", 1, "--ssd_groups", "per_head", "--d_state", 16, "--head_dim", 16]


def test_scan_starts_from_attention(tmp_path, train_shards, capsys):
    """A run with attention initialises the scan with its W_V, W_K, W_Q; the control arm gets random ones; both report it."""
    still = ["--data_path", train_shards, "--steps", 1, "--lr", 0, "--lr_min", 0, "--width", 8]
    donor = weights(run(tmp_path, "donor", *still, "--backbone_mode", "gated_attn_only", "--head_dim", 16))
    capsys.readouterr()
    receiver = [*still, "--backbone_mode", "mamba2_only", *LIKE_ATTENTION, "--matvlm_plan", "B", "--matvlm_donor"]
    copied = weights(run(tmp_path, "copied", *receiver, tmp_path / "donor"))
    printed = capsys.readouterr().out
    assert "WARNING: the donor was trained for 1 steps" in printed
    place, dim = "backbone.stages.0.0.branches", 64
    q, k, v, _ = donor[f"{place}.attention.qkv_gate.weight"].split((dim, dim, dim, dim // 16))
    _, x, B, C, _ = copied[f"{place}.ss2d.in_proj.weight"].split((dim, dim, dim, dim, dim // 16))
    assert torch.equal(x, v)
    assert torch.equal(B, k)
    assert torch.equal(C, q)
    control = weights(run(tmp_path, "control", *receiver, "untrained"))
    assert "WARNING: the donor was trained for 0 steps" in capsys.readouterr().out
    assert not torch.equal(control[f"{place}.ss2d.in_proj.weight"], copied[f"{place}.ss2d.in_proj.weight"])


def test_scan_of_another_layout_is_refused(tmp_path, train_shards, capsys):
    message = refused(capsys, "--data_path", train_shards, "--steps", 1, "--output_dir", tmp_path, "--matvlm_plan", "B",
                      "--matvlm_donor", "untrained")  # fmt: skip
    assert "plan B needs --expand 1 --ssd_groups per_head" in message


@pytest.mark.parametrize("name", presets.ABLATIONS)
def test_every_ablation_trains_a_step(name, tmp_path, train_shards, train_shards_without_flow, first):
    """The training job runs a step of each, as small as possible."""
    small = presets.get(name)
    model = presets.override(small, width=2, depths=(1, 1), d_state=16, head_dim=8)
    folders = [str(train_shards)] + [str(train_shards_without_flow)] * (model.data.mixed_ratio is not None)
    config = presets.override(model, data_path=tuple(folders), crop=64, batch_size=2, num_workers=0, steps=1,
                              curriculum=False, output_dir=str(tmp_path), exp_name="run",
                              resume=str(first) if small.optim.freeze_backbone else "")  # fmt: skip
    train.train(config)
    assert latest(tmp_path / "run").step == 1
    assert rows(tmp_path / "run")[0]["grad_norm"] > 0


@pytest.mark.slow
def test_two_processes_thaw_like_one(first, thawed, tmp_path, train_shards):
    """The thawed backbone's gradients are averaged over the ranks, too."""
    flags = [*FLAGS, *FROZEN, "--data_path", train_shards, "--resume", first, "--output_dir", tmp_path, "--exp_name", "two"]
    finish(start_ranks(2, TRAIN, *flags, "--batch_size", 2))
    theirs = weights(tmp_path / "two")
    differences = torch.cat([(theirs[name] - tensor).abs().flatten() for name, tensor in weights(thawed).items()])
    assert differences.max() < 1e-4  # rounding, which AdamW enlarges where a gradient is all but zero
    assert (differences > 1e-5).float().mean() < 1e-3


WATCHED = """
import sys
import torch
from vfi import train
from vfi.model.backbone import HybridBackbone
forward = HybridBackbone.forward
def watched(self, frames):
    features = forward(self, frames)
    if torch.is_grad_enabled():
        print(f"features are {features[-1].dtype} and the backbone trains: {features[-1].requires_grad}", flush=True)
    return features
HybridBackbone.forward = watched
train.main(sys.argv[1:])
"""


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_autocast_outlives_the_thaw(first, tmp_path, train_shards, processes):
    flags = [*FROZEN, "--data_path", train_shards, "--resume", first, "--output_dir", tmp_path, "--exp_name", "bf16",
             "--batch_size", 4 // processes]  # fmt: skip
    started = start_ranks(processes, WATCHED, *FLAGS, *flags, ACCELERATE_MIXED_PRECISION="bf16")
    printed = "\n".join(finish(started))
    lines = [line for line in printed.splitlines() if line.startswith("features are")]
    expected = ["False"] * STEPS_PER_EPOCH + ["True"] * 2
    for train_state in ("False", "True"):
        line = f"features are torch.bfloat16 and the backbone trains: {train_state}"
        assert lines.count(line) == processes * expected.count(train_state)
    assert len(lines) == processes * len(expected)
