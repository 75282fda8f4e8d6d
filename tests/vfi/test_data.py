"""The loader: a plan that is exact, the same batches for any workers and ranks, and clear errors."""

from __future__ import annotations

import dataclasses
import itertools
import json
import shutil
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from shards.schema import ShardError, read_index
from vfi.augment import Change, FrameTooSmallError, apply_change, draw_change
from vfi.config import ConfigError, DataConfig
from vfi.data import ShardReader, TrainingLoader, decode_triplet, epoch_order, evaluation_batches, evenly_spaced, lanes

CPU = torch.device("cpu")


@given(
    shards=st.lists(st.integers(1, 9), min_size=1, max_size=30),
    seed=st.integers(0, 99),
    epoch=st.integers(0, 99),
    block=st.integers(1, 40),
)
def test_order_is_a_permutation(shards, seed, epoch, block):
    order = epoch_order(shards, seed, epoch, block)
    assert sorted(order) == list(range(sum(shards)))
    assert np.array_equal(order, epoch_order(shards, seed, epoch, block))


def test_order_depends_on_seed_and_epoch():
    orders = {tuple(epoch_order([10] * 5, seed, epoch, 2)) for seed, epoch in itertools.product(range(4), range(4))}
    assert len(orders) == 16


def test_order_needs_few_shards_at_a_time():
    order = epoch_order([10] * 12, 0, 0, 3)
    for block in order.reshape(4, 30):
        assert len(set(block // 10)) == 3


@given(samples=st.integers(1, 300), global_batch=st.integers(1, 40))
def test_lanes_use_each_sample_at_most_once(samples, global_batch):
    steps = lanes(np.arange(samples), global_batch)
    assert steps.shape == (samples // global_batch, global_batch)
    assert len(set(steps.flat)) == steps.size
    for lane in steps.T:  # a lane reads on: neighbouring samples at neighbouring steps
        assert np.all(np.diff(lane) == 1)


def config_for(folder, **changes) -> DataConfig:
    return dataclasses.replace(DataConfig(data_path=str(folder), batch_size=4, crop=64, num_workers=0), **changes)


def take(folder, count, start=0, rank=0, world=1, accumulation=1, **changes):
    loader = TrainingLoader(
        config_for(folder, **changes), 3, CPU, accumulation=accumulation, rank=rank, world=world
    )  # fmt: skip
    return list(itertools.islice(loader.batches(start), count))


def assert_same(one, other):
    assert one.keys == other.keys
    for name in ("img0", "imgt", "img1", "timestep"):
        assert torch.equal(getattr(one, name), getattr(other, name)), name


def joined(batches):
    tensors = {name: torch.cat([getattr(b, name) for b in batches]) for name in ("img0", "imgt", "img1", "timestep")}
    return batches[0]._replace(keys=tuple(key for batch in batches for key in batch.keys), **tensors)


@pytest.mark.parametrize("workers", [1, 2, 3, 7])
def test_batches_do_not_depend_on_the_workers(train_shards, workers):
    for one, other in zip(take(train_shards, 7), take(train_shards, 7, num_workers=workers), strict=True):
        assert_same(one, other)


def test_ranks_and_accumulation_share_the_same_global_batch(train_shards):
    whole = take(train_shards, 4, batch_size=4)
    by_rank = [take(train_shards, 4, batch_size=2, rank=rank, world=2) for rank in range(2)]
    accumulated = take(train_shards, 8, batch_size=2, accumulation=2)
    for step in range(4):
        assert_same(whole[step], joined([batches[step] for batches in by_rank]))
        assert_same(whole[step], joined(accumulated[2 * step : 2 * step + 2]))


def test_epochs_cover_every_sample(train_shards):
    """22 samples, batches of 4: five steps an epoch, each sample at most once; two samples are left out, others each time."""
    batches = take(train_shards, 10)
    for epoch in (batches[:5], batches[5:]):
        keys = Counter(key for batch in epoch for key in batch.keys)
        assert len(keys) == 20
        assert set(keys.values()) == {1}
    assert {batch.keys for batch in batches[:5]} != {batch.keys for batch in batches[5:]}


@pytest.mark.parametrize("start", [3, 5, 7])
def test_resume_in_the_middle(train_shards, start):
    for one, other in zip(take(train_shards, 9)[start:], take(train_shards, 9 - start, start=start), strict=True):
        assert_same(one, other)


def test_batch_is_float_in_range(train_shards):
    batch = take(train_shards, 1)[0]
    assert batch.img0.shape == (4, 3, 64, 64)
    assert batch.img0.dtype == torch.float32
    assert 0 <= batch.img0.min() < batch.img0.max() <= 1
    assert batch.timestep.tolist() == [0.5] * 4


@given(st.data())
def test_frames_and_time_change_together(data):
    """Undoing a change, step by step and backwards, gives the cropped frames and the timestep back."""
    rng = np.random.default_rng(data.draw(st.integers(0, 1000)))
    frames = list(rng.integers(0, 255, (3, 70, 90, 3), dtype=np.uint8))
    change = draw_change(rng, 70, 90, DataConfig(crop=64))
    changed, timestep = apply_change(change, frames, 0.25)
    if change.reverse_time:
        changed, timestep = changed[::-1], 1 - timestep
    assert timestep == 0.25
    for before, after in zip(frames, changed, strict=True):
        after = np.rot90(after, -change.quarter_turns)
        after = after[:, ::-1] if change.flip_horizontal else after
        after = after[::-1] if change.flip_vertical else after
        after = after[:, :, ::-1] if change.reverse_channels else after
        assert np.array_equal(before[change.top : change.top + 64, change.left : change.left + 64], after)


def test_every_change_happens_as_often_as_asked():
    rng = np.random.default_rng(0)
    draws = [draw_change(rng, 100, 120, DataConfig(crop=64)) for _ in range(2000)]
    for name in ("reverse_channels", "flip_vertical", "flip_horizontal", "reverse_time"):
        assert 0.45 < np.mean([getattr(draw, name) for draw in draws]) < 0.55, name
    assert {draw.quarter_turns for draw in draws} == {0, 1, 2, 3}
    assert {draw.top for draw in draws} == set(range(37))
    assert {draw.left for draw in draws} == set(range(57))


def test_no_augmentation_is_a_crop():
    config = DataConfig(crop=64, augment_prob=0, rotate=False)
    change = draw_change(np.random.default_rng(0), 64, 64, config)
    assert change == Change(0, 0, 64, False, False, False, 0, False)


def test_evaluation_is_every_sample_in_order(val_shards):
    index = read_index(val_shards)
    reader = ShardReader(val_shards, index)
    expected = [decode_triplet(reader.read(i), index) for i in range(5)]
    for workers in (0, 2):
        batches = list(evaluation_batches(val_shards, CPU, workers=workers))
        assert [batch.keys for batch in batches] == [(sample["__key__"],) for sample in expected]
        for batch, sample in zip(batches, expected, strict=True):
            frames = torch.stack([batch.img0, batch.imgt, batch.img1])[:, 0].permute(0, 2, 3, 1) * 255
            torch.testing.assert_close(frames, torch.tensor(np.stack(sample["frames"])).float())
    some = [batch.keys[0] for batch in evaluation_batches(val_shards, CPU, numbers=[3, 1], workers=2)]
    assert some == [expected[3]["__key__"], expected[1]["__key__"]]


def test_evenly_spaced():
    assert evenly_spaced(10, 3) == [0, 3, 6]
    assert evenly_spaced(4, 9) == evenly_spaced(4, None) == [0, 1, 2, 3]
    assert len(set(evenly_spaced(738, 48))) == 48


def test_small_frames_are_refused_before_training(train_shards):
    with pytest.raises(FrameTooSmallError, match=r"72x80.*--crop is 128.*take --crop 64"):
        TrainingLoader(config_for(train_shards, crop=128), 0, CPU, accumulation=1)
    with pytest.raises(FrameTooSmallError, match=r"40x90.*crop is 64x64"):
        draw_change(np.random.default_rng(0), 40, 90, DataConfig(crop=64))


def test_too_few_samples_for_a_batch(train_shards):
    with pytest.raises(ConfigError, match="22 samples, fewer than the global batch of 24"):
        TrainingLoader(config_for(train_shards, batch_size=12), 0, CPU, accumulation=2)


def test_damaged_shards_are_named(train_shards, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(train_shards, copy)
    first = copy / read_index(copy).shards[0].name
    first.write_bytes(first.read_bytes()[:5000])
    with pytest.raises(ShardError, match=r"shard-000000\.tar.*shards\.verify"):
        list(evaluation_batches(copy, CPU))
    first.unlink()
    with pytest.raises(ShardError, match=r"shard-000000\.tar cannot be read"):
        list(evaluation_batches(copy, CPU))


def test_samples_without_a_middle_frame_are_refused(train_shards, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(train_shards, copy)
    content = json.loads((copy / "index.json").read_text())
    (copy / "index.json").write_text(json.dumps(content | {"frames": 2}))
    with pytest.raises(ShardError, match="odd number"):
        TrainingLoader(config_for(copy), 0, CPU, accumulation=1)
