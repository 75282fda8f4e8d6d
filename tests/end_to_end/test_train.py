"""The training job as its users start it: resume, two ranks, dry run, and what it rejects."""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar import layout_pb2
from warm import ON_CPU, ROOT, TORCHRUN, TRAIN, Process, finish, start_ranks

from vfi import train
from vfi.checkpoint.store import latest, list_checkpoints, read_state
from vfi.config import command_line, presets
from vfi.data.sampler import Position
from vfi.training import trainer

FLAGS = ["--preset", "tiny", "--crop", "64", "--num_workers", "0", "--log_every", "1", "--warmup_steps", "2", "--lr", "2e-4"]
BY_TORCHRUN = ("--nproc_per_node", "2", "--master_port", "0", "--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0", "-m",
               "vfi.train")  # fmt: skip


def run_here(*flags: object) -> None:
    """Run the job in this process."""
    train.main([*FLAGS, *map(str, flags)])


def train_as_a_process(*flags: object) -> None:
    """Run the job in a process of its own."""
    finish([Process(TRAIN, *FLAGS, *flags)])


def launch(settings: tuple[object, ...], *flags: object, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run the job with `accelerate launch`, whose command line it reads."""
    command = [sys.executable, "-m", "accelerate.commands.launch", *settings, "-m", "vfi.train", *FLAGS, *flags]
    return subprocess.run(list(map(str, command)), cwd=ROOT, env=os.environ | ON_CPU | environment, stdout=subprocess.PIPE,
                          stderr=subprocess.STDOUT, text=True, timeout=300, check=False)  # fmt: skip


def weights(run: Path) -> dict[str, torch.Tensor]:
    return load_file(latest(run).path / "model.safetensors")


def rows(run: Path, event: str) -> list[dict]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if line["event"] == event]


def assert_alike(found: Path, expected: Path) -> None:
    """Assert the same weights up to rounding, which AdamW enlarges where a gradient is all but zero.

    For comparison, another order of the samples changes two weights of five by more than 1e-4.
    """
    theirs = weights(found)
    differences = torch.cat([(theirs[name] - tensor).abs().flatten() for name, tensor in weights(expected).items()])
    assert differences.max() < 1e-4
    assert (differences > 1e-5).float().mean() < 1e-3


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, train_shards, val_shards) -> Path:
    """A run of 8 steps, started as a process with one thread like the runs that are compared with it."""
    out = tmp_path_factory.mktemp("runs")
    train_as_a_process("--data_path", train_shards, "--val_path", val_shards, "--steps", 8, "--batch_size", 4, "--exp_name",
                       "whole", "--save_every", 4, "--val_every", 4, "--output_dir", out)  # fmt: skip
    return out / "whole"


def test_run_folder_holds_everything(undisturbed):
    assert sorted(path.name for path in undisturbed.iterdir()) == [
        "checkpoints", "config.json", "environment.json", "metrics.jsonl", "status.json", "tensorboard",
    ]  # fmt: skip
    assert [found.step for found in list_checkpoints(undisturbed)] == [4, 8]
    assert [row["step"] for row in rows(undisturbed, "train")] == list(range(1, 9))
    assert [row["step"] for row in rows(undisturbed, "val")] == [4, 8]
    assert {"loss", "grad_norm", "samples_per_s", "data_wait", "lr", "epoch"} <= set(rows(undisturbed, "train")[0])
    environment = json.loads((undisturbed / "environment.json").read_text())
    assert environment["packages"]["torch"] == torch.__version__.partition("+")[0]
    assert environment["choices"] == [
        "attention: sdpa (the fused kernels need a CUDA GPU and the device is cpu)",
        "pointwise: torch (the fused kernels need a CUDA GPU and the device is cpu)",
        "ssd: blocked (available on cpu; the fused kernels need a CUDA GPU and the device is cpu; mamba_ssm's kernels need a "
        "CUDA GPU and the device is cpu)",
        "loss: torch (the fused kernels need a CUDA GPU and the device is cpu)",
    ]


def test_logged_loss_is_the_mean_since_the_last_row(undisturbed, tmp_path, train_shards):
    train_as_a_process("--data_path", train_shards, "--steps", 8, "--batch_size", 4, "--output_dir", tmp_path, "--exp_name",
                       "rare", "--log_every", 3)  # fmt: skip
    every = [row["loss"] for row in rows(undisturbed, "train")]
    rare = rows(tmp_path / "rare", "train")
    assert [row["step"] for row in rare] == [3, 6, 8]
    means = [sum(every[first:last]) / (last - first) for first, last in ((0, 3), (3, 6), (6, 8))]
    assert [row["loss"] for row in rare] == pytest.approx(means, rel=1e-5)


def test_tensorboard_has_curves_and_pictures(undisturbed):
    board = EventAccumulator(str(undisturbed / "tensorboard"))
    board.Reload()
    tags = board.Tags()
    assert {"train/loss", "train/lr", "val/psnr"} <= set(tags["scalars"])
    assert [event.step for event in board.Scalars("val/psnr")] == [4, 8]
    assert tags["images"] == [f"val/{name}" for name in ("img0", "prediction", "truth", "img1", "error_x5")]
    picture = board.Images(tags["images"][0])[0]
    assert (picture.height, picture.width) == (72, 80)
    gains, models, averages = (
        [event.value for event in board.Scalars(f"val/{name}")] for name in ("gain", "psnr", "average_psnr")
    )
    assert gains == pytest.approx([model - average for model, average in zip(models, averages, strict=True)], abs=1e-4)
    layout = layout_pb2.Layout.FromString(board.Tensors("custom_scalars__config__")[0].tensor_proto.string_val[0])
    assert [chart.title for chart in layout.category[0].chart][:2] == ["PSNR", "gain over the frame average"]
    shown = {tag for chart in layout.category[0].chart for tag in chart.multiline.tag}
    assert shown <= set(tags["scalars"])


def test_stopped_run_goes_on_bit_for_bit(undisturbed, tmp_path, train_shards, val_shards):
    """Killed with SIGKILL after its first checkpoint and resumed: the same weights, the same rows."""
    flags = ["--data_path", train_shards, "--val_path", val_shards, "--steps", 8, "--batch_size", 4, "--exp_name", "killed",
             "--save_every", 4, "--val_every", 4, "--output_dir", tmp_path, "--resume", "auto"]  # fmt: skip
    run = tmp_path / "killed"
    process = Process(TRAIN, *FLAGS, *flags)
    deadline = time.monotonic() + 240
    while latest(run) is None and time.monotonic() < deadline:
        time.sleep(0.01)
    process.kill()
    assert latest(run).step < 8, "the run ended before it could be killed"
    (output,) = finish([Process(TRAIN, *FLAGS, *flags)])
    assert "resuming from the weights of" in output
    for name, tensor in weights(undisturbed).items():
        assert torch.equal(tensor, weights(run)[name]), name
    timeless = ("loss", "grad_norm", "lr", "epoch", "step", "psnr", "average_psnr")
    for event in ("train", "val"):
        one, other = ([{k: row[k] for k in timeless if k in row} for row in rows(r, event)] for r in (undisturbed, run))
        assert one == other


def seen_by(loader: trainer.TrainingLoader, position: Position, steps: int) -> list[str]:
    return [key for batch in itertools.islice(loader.batches(position), steps) for key in batch.keys]


@pytest.mark.slow
def test_two_processes_killed_within_an_epoch_go_on_as_one(tmp_path, train_shards, monkeypatch, capsys):
    """Also with another global batch: two ranks, and then the single one, see every sample of the epoch exactly once."""
    flags = ("--data_path", train_shards, "--remainder", "pad", "--save_every", 1, "--keep_last", 9, "--output_dir", tmp_path,
             "--exp_name", "killed", "--resume", "auto")  # fmt: skip
    run = tmp_path / "killed"
    ranks = start_ranks(2, TRAIN, *FLAGS, *flags, "--batch_size", 2, "--epochs", 50)
    deadline = time.monotonic() + 240
    while (latest(run) is None or latest(run).step < 3) and time.monotonic() < deadline:
        time.sleep(0.01)
    for process in ranks:
        process.kill()
    while latest(run).step % 6 not in (2, 3):  # of the six steps of an epoch
        shutil.rmtree(latest(run).path)
    epoch, ((global_batch, steps),) = read_state(latest(run).path).position.position
    assert (epoch, global_batch, steps) == (latest(run).step // 6, 4, latest(run).step % 6)

    config = command_line.from_command_line([*FLAGS, *map(str, flags), "--batch_size", "2"])
    loaders = [trainer.TrainingLoader(config.data, 0, torch.device("cpu"), accumulation=1, rank=r, world=2) for r in range(2)]
    before = [key for loader in loaders for key in seen_by(loader, Position(epoch), steps)]
    after: list[str] = []
    plain = trainer.Trainer.flow_to_learn

    def spy(trainer, batch):
        after.extend(batch.keys)
        return plain(trainer, batch)

    monkeypatch.setattr(trainer.Trainer, "flow_to_learn", spy)
    run_here(*flags, "--batch_size", 5, "--epochs", epoch + 1, "--schedule", "extend")
    rest = 22 - 4 * steps
    assert f"the global batch was 4 and is 5: what epoch {epoch} has not seen yet is planned again" in capsys.readouterr().out
    assert len(before) == 4 * steps
    assert len(set(before + after[:rest])) == 22
    assert len(after) == 5 * -(-rest // 5)  # the last step is filled up
    assert read_state(latest(run).path).position.position == Position(epoch + 1)
    assert latest(run).step == 6 * epoch + steps + -(-rest // 5)


def test_another_order_starts_the_epoch_anew(undisturbed, tmp_path, train_shards, capsys):
    run = tmp_path / "changed"
    shutil.copytree(undisturbed, run)
    run_here("--data_path", train_shards, "--steps", 9, "--batch_size", 4, "--output_dir", tmp_path, "--exp_name", "changed",
             "--resume", "auto", "--schedule", "extend", "--shuffle_shards", 1)  # fmt: skip
    assert "are not those of the checkpoint: epoch 1 starts again" in capsys.readouterr().out
    assert read_state(latest(run).path).position.position == Position(1, ((4, 1),))


@pytest.mark.slow
@pytest.mark.parametrize("accumulated", [False, True])
def test_two_processes_train_like_one(undisturbed, tmp_path, train_shards, val_shards, accumulated):
    size = 1 if accumulated else 2
    flags = ["--data_path", train_shards, "--val_path", val_shards, "--steps", 8, "--batch_size", size, "--exp_name", "two",
             "--global_batch", 4, "--val_every", 4, "--output_dir", tmp_path]  # fmt: skip
    if accumulated:
        output, _ = finish(start_ranks(2, TRAIN, *FLAGS, *flags))
    else:
        (output,) = finish([Process(TORCHRUN, *BY_TORCHRUN, *FLAGS, *flags)])
    assert f"2 processes on cpu, precision no, global batch 4 = {size} * 2 * {4 // size // 2} accumulated" in output
    assert_alike(tmp_path / "two", undisturbed)
    for one, other in zip(rows(undisturbed, "val"), rows(tmp_path / "two", "val"), strict=True):
        assert one["psnr"] == pytest.approx(other["psnr"], abs=1e-3)
        assert one["samples"] == other["samples"] == 5
    for one, other in zip(rows(undisturbed, "train"), rows(tmp_path / "two", "train"), strict=True):
        assert one["loss"] == pytest.approx(other["loss"], abs=1e-5)


def test_accumulation_is_one_large_batch(undisturbed, tmp_path, train_shards):
    train_as_a_process("--data_path", train_shards, "--steps", 8, "--batch_size", 1, "--global_batch", 4, "--output_dir",
                       tmp_path, "--exp_name", "a")  # fmt: skip
    assert_alike(tmp_path / "a", undisturbed)


@pytest.mark.parametrize("config", sorted((ROOT / "accelerate_configs").glob("*.yaml")), ids=lambda path: path.stem)
def test_accelerate_config_starts(config, tmp_path, train_shards):
    """Configs for a CPU train; those for GPUs are accepted by the launcher and fail only for lack of a GPU."""
    if config.stem != "cpu" and not torch.cuda.is_available():
        pytest.skip("needs a CUDA GPU; torch.cuda.is_available() is False")
    done = launch(("--config_file", config), "--data_path", train_shards, "--batch_size", 4, "--dry_run", "--output_dir",
                  tmp_path, CUDA_VISIBLE_DEVICES=os.environ.get("CUDA_VISIBLE_DEVICES", ""),
                  ACCELERATE_USE_CPU="true" if config.stem == "cpu" else "false")  # fmt: skip
    assert done.returncode == 0, done.stdout
    assert "dry run: training and saving work (without a --val_path)" in done.stdout


def test_launcher_that_starts_one_process_of_two_is_noticed(tmp_path, train_shards):
    done = launch(("--cpu", "--num_processes", 2), "--data_path", train_shards, "--batch_size", 4, "--dry_run", "--output_dir",
                  tmp_path)  # fmt: skip
    assert done.returncode != 0
    assert "error: accelerate launch was asked for several processes but started one" in done.stdout


def test_accelerate_launch_starts_two_processes_on_a_cpu(tmp_path, train_shards):
    done = launch(("--multi_gpu", "--num_processes", 2, "--main_process_port", 0), "--data_path", train_shards,
                  "--batch_size", 2, "--dry_run", "--output_dir", tmp_path)  # fmt: skip
    assert done.returncode == 0, done.stdout
    assert "2 processes on cpu" in done.stdout


def test_weights_of_another_run_are_a_start(undisturbed, tmp_path, train_shards, capsys):
    before = weights(undisturbed)
    run_here("--data_path", train_shards, "--steps", 1, "--lr_min", 0, "--lr", 0, "--batch_size", 4, "--output_dir", tmp_path,
             "--exp_name", "next", "--resume", undisturbed)  # fmt: skip
    for name, tensor in weights(tmp_path / "next").items():
        assert torch.equal(tensor, before[name]), name
    assert latest(tmp_path / "next").step == 1
    assert "starting from the weights of" in capsys.readouterr().out


def test_settings_that_keep_the_weights_may_differ_and_are_said(undisturbed, tmp_path, train_shards, capsys):
    run_here("--data_path", train_shards, "--steps", 1, "--batch_size", 4, "--output_dir", tmp_path, "--exp_name", "next",
             "--resume", undisturbed, "--window_size", 7)  # fmt: skip
    assert "settings of the model that differ from that run's: window_size: 7 here, 8 there" in capsys.readouterr().out


def test_dry_run_leaves_nothing(tmp_path, train_shards, val_shards, capsys):
    run_here("--data_path", train_shards, "--val_path", val_shards, "--batch_size", 4, "--dry_run", "--output_dir", tmp_path)
    printed = capsys.readouterr().out
    assert "step 3: PSNR" in printed
    assert "dry run: training, validation and saving work" in printed
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["tiny", "small", "base"])
def test_every_preset_trains(name, tmp_path, train_shards, val_shards):
    config = presets.get(name)
    data = dataclasses.replace(config.data, data_path=(str(train_shards),), val_path=str(val_shards), crop=64, batch_size=1,
                               num_workers=0, val_samples=1)  # fmt: skip
    run = dataclasses.replace(config.run, steps=1, output_dir=str(tmp_path), exp_name=name)
    train.train(dataclasses.replace(config, data=data, run=run))
    assert latest(tmp_path / name).step == 1
    assert len(rows(tmp_path / name, "val")) == 1


def refused(capsys, *flags: object) -> str:
    with pytest.raises(SystemExit) as error:
        run_here(*flags)
    assert error.value.code == 2
    printed = capsys.readouterr().err
    lines = printed.rstrip("\n").splitlines()
    assert lines[-1].startswith("error: ")
    assert "Traceback" not in printed
    return lines[-1]


def test_bad_input_is_one_clear_line(capsys, tmp_path, train_shards, undisturbed):
    at = ("--output_dir", tmp_path / "runs", "--batch_size", 4, "--steps", 1)
    assert "--data_path is missing" in refused(capsys, *at)
    assert "nowhere does not exist" in refused(capsys, "--data_path", tmp_path / "nowhere", *at)
    raw = tmp_path / "raw" / "clip"
    raw.mkdir(parents=True)
    (raw / "0000.png").touch()
    assert f"python -m shards.video --src {raw.parent}" in refused(capsys, "--data_path", raw.parent, *at)
    assert "72x80" in refused(capsys, "--data_path", train_shards, "--crop", 128, *at)
    assert "raw is not a shard folder" in refused(capsys, "--data_path", train_shards, "--val_path", raw.parent, *at)
    assert "no run or checkpoint 'gone'" in refused(capsys, "--data_path", train_shards, "--resume", "gone", *at)
    other = refused(capsys, "--data_path", train_shards, "--resume", undisturbed, "--backbone_mode", "mamba2_only", *at)
    assert "another architecture: " in other
    assert "unknown: backbone.stages.0.0.branches.attention" in other
    assert "Settings that differ: backbone_mode: mamba2_only here, hybrid there" in other
    assert not (tmp_path / "runs").exists()


def test_existing_run_is_not_overwritten(capsys, undisturbed, train_shards):
    before = (undisturbed / "metrics.jsonl").read_bytes()
    message = refused(capsys, "--data_path", train_shards, "--batch_size", 4, "--steps", 9, "--exp_name", "whole",
                      "--output_dir", undisturbed.parent)  # fmt: skip
    assert "already holds a run at step 8: resume it by --resume auto" in message
    assert (undisturbed / "metrics.jsonl").read_bytes() == before


def test_loss_that_is_no_number_ends_the_run(capsys, tmp_path, train_shards, monkeypatch):
    monkeypatch.setattr(trainer, "training_losses", lambda prediction, *_: {"loss": prediction.imgt.sum() * float("nan")})
    message = refused(capsys, "--data_path", train_shards, "--batch_size", 4, "--steps", 2, "--output_dir", tmp_path,
                      "--exp_name", "nan", "--no-guard")  # fmt: skip
    assert "the loss is nan, the norm of the gradient nan at step 1; the last good checkpoint is none" in message
    assert latest(tmp_path / "nan") is None
