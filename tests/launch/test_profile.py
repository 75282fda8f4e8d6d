"""Test the measurement of GPU memory and its evaluation, with numbers in place of a GPU and on a real one."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import shutil
from pathlib import Path

import pytest
import torch

from launch import profile
from launch.memory.batch_size import choose_batch
from launch.memory.model import GIB, PROFILES, Point, add, read_profiles
from launch.profile import Gpu, Options, OwnProcess, main
from vfi.config import presets
from vfi.config.configs import Config, ConfigError
from vfi.errors import JobError
from vfi.training import cuda_graphs

A100 = Gpu("NVIDIA A100-SXM4-80GB", 79.2, True, {"torch": "2.11.0"})


@pytest.fixture
def out(tmp_path) -> Path:
    """Return the path of a copy of the project's profiles."""
    return Path(shutil.copy(PROFILES, tmp_path))


class FakeGpu:
    """A GPU with `capacity` GiB on which a step takes 0.5 GiB + 0.25 GiB per sample of 256x256; it records the requests."""

    def __init__(self, capacity: float, bent: float = 0.0) -> None:
        self.capacity, self.bent = capacity, bent
        self.asked: list[tuple[int, int, str]] = []

    def __call__(self, config: Config, precision: str) -> Point | None:
        batch, crop = config.data.batch_size, config.data.crop
        self.asked.append((crop, batch, precision))
        gib = 0.5 + 0.25 * batch * (crop / 256) ** 2 * (1 + self.bent * batch)
        return Point(batch, crop, int(gib * GIB), outside=GIB // 2) if gib <= self.capacity else None


def test_points_are_fitted_checked_and_chosen_by(out, capsys):
    gpu = FakeGpu(capacity=79.2)
    options = Options(preset="small", phase=2, crops=(384, 256), batches=(8, 2, 24), check_batches=(12,), out=out)
    entry = profile.profile(options, A100, gpu)
    assert gpu.asked == [(crop, batch, "bf16") for crop in (256, 384) for batch in (2, 8, 12, 24)]
    assert [point.batch for point in entry.points] == [2, 8, 24, 2, 8, 24]
    assert [point.batch for point in entry.held_out] == [12, 12]
    assert entry.fit.fixed / GIB == pytest.approx(0.5)
    assert entry.fit.per_pixel * 256**2 / GIB == pytest.approx(0.25)
    assert entry.fit.residual < 1e-6
    assert (entry.card, entry.memory_gib, entry.environment) == ("a100", 79.2, {"torch": "2.11.0"})
    assert entry.model == presets.override(presets.small(), phase=2).model
    printed = capsys.readouterr().out
    assert "largest error at the 2 points not fitted: 0.0%" in printed
    assert "largest batch at crop 256: 292 in 73.5 GiB of a100" in printed  # (78.2 * .94 - .5) / .25
    assert "note" not in printed
    add(entry, out)
    config = presets.override(presets.small(), phase=2, global_batch=2920)
    choice = choose_batch(config, "a100", 1, "bf16", memory_gib=79.2, profiles=read_profiles(out))
    assert (choice.basis, choice.device_batch) == ("fit", 292)


def test_above_a_batch_that_runs_out_of_memory_none_is_tried(out, capsys):
    gpu = FakeGpu(capacity=4)
    options = Options(crops=(256, 512), batches=(2, 8, 24, 100), check_batches=(12,), out=out)
    entry = profile.profile(options, A100, gpu)
    assert gpu.asked == [(256, 2, "bf16"), (256, 8, "bf16"), (256, 12, "bf16"), (256, 24, "bf16"),
                         (512, 2, "bf16"), (512, 8, "bf16")]  # fmt: skip
    assert [(point.crop, point.batch) for point in (*entry.points, *entry.held_out)] == [
        (256, 2), (256, 8), (512, 2), (256, 12)]  # fmt: skip
    assert "crop 256, batch 24: out of memory" in capsys.readouterr().out
    # two of the three have the same number of pixels: no formula
    assert entry.fit is None


def test_nothing_measured_is_an_error(out):
    with pytest.raises(JobError, match=r"ran out of memory at each of --crops \(256, 384, 512\) .* \(2, 8, 24\): use smaller"):
        profile.profile(Options(out=out), A100, FakeGpu(capacity=0.9))


def test_a_formula_that_does_not_hold_is_told_and_makes_the_choice_smaller(out, capsys):
    options = Options(crops=(256,), batches=(2, 8, 24), check_batches=(16,), out=out)
    entry = profile.profile(options, A100, FakeGpu(capacity=79.2, bent=0.03))
    worst = max(abs(error) for error in entry.fit.errors([*entry.points, *entry.held_out]))
    assert entry.fit.residual == worst > 0.05
    assert "the formula errs by more than 5%" in capsys.readouterr().out
    sure = dataclasses.replace(entry.fit, residual=0.0)
    assert entry.fit.largest_batch(256, 40 * GIB) < sure.largest_batch(256, 40 * GIB)


def test_another_process_on_the_gpu_is_noticed(out, capsys):
    def measure(config: Config, precision: str) -> Point:
        return Point(config.data.batch_size, config.data.crop, config.data.batch_size * GIB, outside=5 * GIB)

    profile.profile(Options(out=out, crops=(256,)), A100, measure)
    assert "5.0 GiB of this GPU are taken outside of torch" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("asked", "has_bf16", "expected"), [("auto", True, "bf16"), ("auto", False, "fp16"), ("fp32", False, "fp32")]
)
def test_precision_follows_the_gpu(out, asked, has_bf16, expected):
    fake = FakeGpu(capacity=79.2)
    entry = profile.profile(Options(precision=asked, out=out), dataclasses.replace(A100, has_bf16=has_bf16), fake)
    assert entry.precision == expected
    assert {precision for _, _, precision in fake.asked} == {expected}
    assert (entry.checkpointing, entry.compile) == (False, False)


def test_bf16_is_refused_where_the_gpu_has_none(out):
    with pytest.raises(JobError, match="has no bf16: use --precision fp16"):
        profile.profile(Options(precision="bf16", out=out), dataclasses.replace(A100, has_bf16=False), FakeGpu(80))


def test_settings_of_the_measured_step():
    config = profile.step_config(Options(preset="exp-3d", checkpointing=True), 384, 6)
    assert (config.data.crop, config.data.batch_size, config.data.largest_crop) == (384, 6, 384)  # no curriculum
    assert config.compute.checkpointing
    assert config.model == presets.get("Exp-3d").model


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (Options(batches=(2, 12)), JobError, r"--check_batches \[12\] are among --batches"),
        (Options(batches=()), JobError, "need at least one number"),
        (Options(crops=(100,)), ConfigError, "--crop is 100; it must be a multiple of 16"),
        (Options(batches=(0,)), ConfigError, "--batch_size is 0"),
        (Options(preset="huge"), ConfigError, "'huge' does not exist"),
        (Options(out=Path("nowhere.json")), ConfigError, "nowhere.json can't be read"),
    ],
    ids=str,
)
def test_refused_before_anything_is_measured(options, error, message):
    with pytest.raises(error, match=message):
        profile.check_options(options)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_without_a_gpu_nothing_is_measured(out, capsys):
    before = out.read_text()
    with pytest.raises(SystemExit) as ended:
        main(["--out", str(out)])
    assert ended.value.code == 2
    assert "error: no GPU here" in capsys.readouterr().err
    assert out.read_text() == before


@pytest.mark.parametrize("flags", [[], ["--cuda_graphs"]])
def test_memory_of_graphs_is_that_of_training(monkeypatch, out, flags):
    """As in training, segments are expandable, which must be set before the measuring process starts."""
    found = []
    monkeypatch.setattr(profile.torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(cuda_graphs.os, "environ", {})
    monkeypatch.setattr(profile, "OwnProcess", lambda: found.append(dict(os.environ)) or OwnProcess())
    monkeypatch.setattr(OwnProcess, "do", lambda *_: None)
    monkeypatch.setattr(profile, "profile", lambda *_: None)
    monkeypatch.setattr(profile, "add", lambda *_: None)
    main(["--out", str(out), *flags])
    assert found == [{"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"} if flags else {}]


def die() -> None:
    os._exit(9)


def refuse() -> None:
    raise ConfigError("no")


def run_out() -> None:
    return None


def test_a_process_measures_until_something_is_amiss():
    with contextlib.closing(OwnProcess()) as process:
        first, second = process.do(os.getpid), process.do(os.getpid)
        assert first == second != os.getpid()
        assert process.do(run_out) is None
        third = process.do(os.getpid)
        with pytest.raises(ConfigError, match="no"):
            process.do(refuse)
        fourth = process.do(os.getpid)
        assert len({first, third, fourth}) == 3
        with pytest.raises(JobError, match="the process that measured died"):
            process.do(die)


@pytest.mark.parametrize(
    ("error", "expected"),
    [(torch.OutOfMemoryError("full"), None), (RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"), None),
     (RuntimeError("shapes"), RuntimeError)],
    ids=str,
)  # fmt: skip
def test_only_a_lack_of_memory_is_a_finding(monkeypatch, error, expected):
    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(profile, "TrainingStep", fail)
    monkeypatch.setattr(profile, "set_numerics", lambda *_: None)
    if expected is None:
        assert profile.measure(presets.tiny(), "fp32") is None
    else:
        with pytest.raises(expected, match="shapes"):
            profile.measure(presets.tiny(), "fp32")


@pytest.mark.gpu
def test_prediction_is_within_5_percent_of_what_was_not_fitted(out):
    main(["--preset", "tiny", "--phase", "2", "--crops", "256", "384", "--check_batches", "5", "--out", str(out)])
    entry = read_profiles(out).measured[-1]
    assert len(entry.held_out) == 2
    assert max(map(abs, entry.fit.errors(entry.held_out))) < 0.05
    for point in entry.points:
        assert point.allocated <= min(point.reserved, point.reserved_first)
        assert point.outside > 0
    choice = choose_batch(profile.step_config(Options(preset="tiny", phase=2), 256, 24), entry.card, 1, entry.precision,
                          memory_gib=entry.memory_gib, profiles=read_profiles(out))  # fmt: skip
    assert choice.basis == "fit"


@pytest.mark.gpu
def test_out_of_memory_is_found_and_the_next_process_is_not_harmed():
    huge = profile.step_config(Options(preset="small", phase=2), 512, 20_000)
    with contextlib.closing(OwnProcess()) as process:
        assert process.do(profile.measure, huge, "fp32") is None
        assert process.do(profile.measure, profile.step_config(Options(preset="tiny"), 256, 2), "fp32").allocated > 0


@pytest.mark.gpu
def test_a_measurement_does_not_depend_on_those_before_it():
    small, large = (profile.step_config(Options(preset="tiny", phase=1), 256, batch) for batch in (2, 16))
    with contextlib.closing(OwnProcess()) as process:
        alone = process.do(profile.measure, small, "bf16")
        process.do(profile.measure, large, "bf16")
        after = process.do(profile.measure, small, "bf16")
    assert after.allocated == pytest.approx(alone.allocated, rel=0.005)
    assert after.reserved == pytest.approx(alone.reserved, rel=0.05)
