"""A batch that does not fit is halved before training starts: by one process, by two, and never silently."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from warm import TRAIN, finish, start_ranks

from vfi import train
from vfi.checkpoint.store import latest
from vfi.config import presets
from vfi.config.configs import ConfigError, accumulation
from vfi.runtime.memory import is_out_of_memory
from vfi.training import auto_batch_size
from vfi.training.auto_batch_size import with_smaller_batch
from vfi.training.synthetic_step import TrainingStep

FLAGS = ["--preset", "tiny", "--crop", "64", "--num_workers", "0", "--log_every", "1", "--warmup_steps", "2", "--lr", "2e-4",
         "--steps", "2"]  # fmt: skip


def weights(run: Path) -> dict[str, torch.Tensor]:
    return load_file(latest(run).path / "model.safetensors")


def rows(run: Path, event: str) -> list[dict]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if line["event"] == event]


@pytest.fixture
def full_above(monkeypatch):
    """Let the CPU be tried, and be full with more samples at once than given."""

    def set_limit(limit: int) -> list[int]:
        tried = []
        step = TrainingStep.__call__

        def limited(self: TrainingStep, frames: tuple[torch.Tensor, ...]) -> None:
            tried.append(len(frames[0]))
            if len(frames[0]) > limit:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB")
            step(self, frames)

        monkeypatch.setattr(TrainingStep, "__call__", limited)
        monkeypatch.setattr(auto_batch_size, "supports_oom_trial", lambda device: True)
        return tried

    return set_limit


@pytest.mark.parametrize(("batch", "smaller"), [(32, 16), (12, 6), (6, 3), (9, 3), (7, 1), (2, 1)])
def test_smaller_batch_divides_and_the_global_batch_stays(batch, smaller):
    config = presets.override(presets.small(), batch_size=batch, global_batch=batch * 4 * 3)
    found = with_smaller_batch(config, processes=4)
    assert (found.data.batch_size, found.data.global_batch) == (smaller, batch * 4 * 3)
    assert accumulation(found, 4) * smaller == accumulation(config, 4) * batch
    assert with_smaller_batch(presets.override(config, global_batch=None), 4).data.global_batch == batch * 4


def test_a_run_that_was_halved_is_the_run_with_the_smaller_batch(tmp_path, train_shards, full_above, capsys, one_thread):
    common = [*FLAGS, "--data_path", str(train_shards), "--output_dir", str(tmp_path)]
    train.main([*common, "--exp_name", "small", "--batch_size", "2", "--global_batch", "8"])
    train.main([*common, "--exp_name", "whole", "--batch_size", "8"])
    tried = full_above(2)
    train.main([*common, "--exp_name", "halved", "--batch_size", "8"])
    assert tried == [8, 4, 2, 2]  # two steps of what fits
    expected, found, whole = (weights(tmp_path / name) for name in ("small", "halved", "whole"))
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    # the same mathematics, but for rounding, which AdamW enlarges where a gradient is all but zero
    differences = torch.cat([(found[name] - tensor).abs().flatten() for name, tensor in whole.items()])
    assert (differences > 1e-4).float().mean() < 1e-3  # another order of samples moves 3 in 100 so far
    first, theirs = rows(tmp_path / "halved", "train")[0], rows(tmp_path / "whole", "train")[0]
    assert first["loss"] == pytest.approx(theirs["loss"], rel=1e-6)
    assert first["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-5)
    assert rows(tmp_path / "small", "batch") == rows(tmp_path / "whole", "batch") == []
    assert rows(tmp_path / "halved", "batch") == [
        {"step": 0, "event": "batch", "asked": 8, "batch_size": 2, "accumulation": 4}
    ]  # fmt: skip
    written = json.loads((tmp_path / "halved" / "config.json").read_text())["data"]
    assert (written["batch_size"], written["global_batch"]) == (2, 8)
    printed = capsys.readouterr().out
    assert "--batch_size 8 does not fit into the memory of a GPU at crop 64: this run takes 2 and accumulates 4" in printed
    assert "global batch 8 = 2 * 1 * 4 accumulated" in printed


def test_a_batch_that_fits_changes_nothing(tmp_path, train_shards, full_above, one_thread):
    common = [*FLAGS, "--data_path", str(train_shards), "--output_dir", str(tmp_path), "--batch_size", "4"]
    train.main([*common, "--exp_name", "untried"])
    assert full_above(4) == []
    train.main([*common, "--exp_name", "tried"])
    theirs = weights(tmp_path / "tried")
    assert all(torch.equal(theirs[name], tensor) for name, tensor in weights(tmp_path / "untried").items())
    assert rows(tmp_path / "tried", "batch") == []


def test_when_not_even_one_sample_fits_it_is_an_error(tmp_path, train_shards, full_above, monkeypatch, capsys):
    tried = full_above(0)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (3 * 2**30, 16 * 2**30))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "V100")
    with pytest.raises(SystemExit) as ended:
        train.main([*FLAGS, "--data_path", str(train_shards), "--output_dir", str(tmp_path), "--batch_size", "2"])
    assert ended.value.code == 2
    error = capsys.readouterr().err
    assert tried == [2, 1]
    assert "not even one sample fits into the memory of V100, 3.0 of 16.0 GiB of which are free, at crop 64" in error
    assert "--checkpointing" in error


def test_the_trial_takes_the_largest_crop_of_a_curriculum():
    config = presets.override(presets.tiny(), phase=3, curriculum=True, curriculum_crops=(64, 64, 96), batch_size=1)
    step = TrainingStep(config, torch.device("cpu"), torch.float32)
    assert step.make_frames()[0].shape == (1, 3, 96, 96)
    assert step.weights == 4 * sum(parameter.numel() for parameter in step.model.parameters())


@pytest.mark.parametrize("accumulating", [False, True])
def test_a_step_trains_and_keeps_the_gradient_only_where_it_accumulates(accumulating, one_thread):
    config = presets.override(presets.tiny(), batch_size=1)
    step = TrainingStep(config, torch.device("cpu"), torch.bfloat16, accumulating)
    before = [parameter.detach().clone() for parameter in step.model.parameters()]
    step(step.make_frames())
    after = list(step.model.parameters())
    assert not all(torch.equal(old, new) for old, new in zip(before, after, strict=True))
    assert all((parameter.grad is not None) == accumulating for parameter in after)
    assert len(step.optimizer.state) == len(after)


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (torch.OutOfMemoryError("anything"), True),
        (RuntimeError("CUDA error: out of memory"), True),
        (RuntimeError("Triton Error [CUDA]: out of memory"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), True),
        (RuntimeError("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED"), True),
        (RuntimeError("CUDA error: an illegal memory access was encountered"), False),
        (RuntimeError("shapes cannot be multiplied"), False),
    ],
    ids=str,
)
def test_what_out_of_memory_looks_like(error, expected):
    assert is_out_of_memory(error) is expected


def test_another_error_is_not_taken_for_it(tmp_path, train_shards, full_above, monkeypatch):
    full_above(8)

    def fail(self: TrainingStep, frames: object) -> None:
        raise RuntimeError("shapes cannot be multiplied")

    monkeypatch.setattr(TrainingStep, "__call__", fail)
    with pytest.raises(RuntimeError, match="shapes"):
        train.main([*FLAGS, "--data_path", str(train_shards), "--output_dir", str(tmp_path)])


def test_what_torch_says_it_can_not_do_repeatably_stays_a_clear_error(full_above, monkeypatch):
    def fail(*_: object) -> None:
        raise RuntimeError("foo_cuda does not have a deterministic implementation, but you set …")

    monkeypatch.setattr(auto_batch_size, "trial_step", fail)
    with pytest.raises(ConfigError, match="--deterministic is impossible"):
        auto_batch_size.fits(presets.tiny(), torch.device("cpu"), torch.float32, 1)


ONE_RANK_FULL = """
import os, sys, torch
from vfi import train
from vfi.training import auto_batch_size, synthetic_step
step = synthetic_step.TrainingStep.__call__
def limited(self, frames):
    if os.environ["RANK"] == "1" and len(frames[0]) > 1:
        raise torch.OutOfMemoryError("CUDA out of memory")
    step(self, frames)
synthetic_step.TrainingStep.__call__ = limited
auto_batch_size.supports_oom_trial = lambda device: True
train.main(sys.argv[1:])
"""


@pytest.mark.slow
def test_when_one_process_runs_out_of_memory_all_take_the_smaller_batch(tmp_path, train_shards):
    flags = [*FLAGS, "--data_path", train_shards, "--output_dir", tmp_path]
    finish(start_ranks(2, ONE_RANK_FULL, *flags, "--exp_name", "halved", "--batch_size", 4))
    finish(start_ranks(2, TRAIN, *flags, "--exp_name", "small", "--batch_size", 1, "--global_batch", 8))
    halved, small = tmp_path / "halved", tmp_path / "small"
    theirs = weights(small)
    assert all(torch.equal(theirs[name], tensor) for name, tensor in weights(halved).items())
    assert [(row["batch_size"], row["accumulation"]) for row in rows(halved, "batch")] == [(1, 4)]


@pytest.mark.gpu
def test_a_batch_beyond_the_gpu_is_halved_until_it_fits(tmp_path):
    """Real memory: held by another tensor, so that few samples are enough to fill it."""
    device = torch.device("cuda")
    config = presets.override(presets.tiny(), phase=2, crop=256)
    free, _ = torch.cuda.mem_get_info(device)
    held = torch.empty(int(free - 3 * 2**30), dtype=torch.uint8, device=device)
    batches = [1024 // 2**halvings for halvings in range(11)]
    results = [auto_batch_size.fits(presets.override(config, batch_size=batch), device, torch.float32, 1) for batch in batches]
    del held
    assert not results[0]
    assert results[-1]
    assert results == sorted(results)
