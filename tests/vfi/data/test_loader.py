"""The loader: the same batches for any workers and ranks, mixed folders, long samples, stored flow, and clear errors."""

from __future__ import annotations

import dataclasses
import io
import itertools
import json
import pickle
import shutil
import tarfile
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from shards.codecs import encode
from shards.schema import Index, ShardEntry, ShardError, read_index, sha256_of, write_index
from vfi.config.configs import ConfigError, DataConfig
from vfi.data import batch as batch_module
from vfi.data import loader
from vfi.data.augment import FrameTooSmallError, grow
from vfi.data.evaluation_loader import evaluation_batches, evenly_spaced
from vfi.data.loader import TrainingLoader
from vfi.data.sampler import START, Position
from vfi.data.shard_reader import ShardReader, decode_triplet
from vfi.data.triplet_sampling import Triplet

CPU = torch.device("cpu")


def config_for(folder, **changes) -> DataConfig:
    """Settings for small frames; a folder of None: --data_path is among the changes."""
    return dataclasses.replace(DataConfig(data_path=(str(folder),), batch_size=4, crop=64, num_workers=0), **changes)


def take(folder, count, start=0, rank=0, world=1, accumulation=1, with_flow=False, **changes):
    source = TrainingLoader(
        config_for(folder, **changes), 3, CPU, accumulation=accumulation, rank=rank, world=world, with_flow=with_flow
    )  # fmt: skip
    return list(itertools.islice(source.batches(source.plan.at_step(start)), count))


def assert_same(one, other):
    assert one.keys == other.keys
    for name in ("img0", "imgt", "img1", "timestep", "flow_t0", "flow_t1"):
        values = getattr(one, name), getattr(other, name)
        assert values == (None, None) or torch.equal(*values), name


def joined(batches):
    tensors = {name: torch.cat([getattr(b, name) for b in batches]) for name in ("img0", "imgt", "img1", "timestep")}
    return batches[0]._replace(keys=tuple(key for batch in batches for key in batch.keys), **tensors)


@pytest.mark.parametrize("workers", [1, 2, 3, 7])
def test_batches_do_not_depend_on_the_workers(train_shards, workers):
    for one, other in zip(take(train_shards, 7), take(train_shards, 7, num_workers=workers), strict=True):
        assert_same(one, other)


def test_what_is_made_ahead_is_not_written_over_what_is_copied(train_shards, monkeypatch):
    """Loader processes that are as far ahead as they may be, while the trainer still works on what it took."""
    plain = batch_module.to_device

    def slow(*arguments):
        time.sleep(0.03)
        return plain(*arguments)

    monkeypatch.setattr(loader, "to_device", slow)
    for one, other in zip(take(train_shards, 20), take(train_shards, 20, num_workers=2), strict=True):
        assert_same(one, other)


def test_shared_memory_comes_again(monkeypatch):
    """In a loader process, for parts of a stream, and not for frames of an evaluation, which end."""
    monkeypatch.setattr(batch_module, "get_worker_info", lambda: "a process")
    batch_module._pieces.cache_clear()
    pieces = [batch_module._to_be_sent((2, 3), True) for _ in range(13)]
    assert all(piece.is_shared() and piece.shape == (2, 3) for piece in pieces)
    addresses = [piece.data_ptr() for piece in pieces]
    assert len(set(addresses)) == 6
    assert addresses[6:] == addresses[:7]
    others = [batch_module._to_be_sent((2, 3), False) for _ in range(3)]
    assert len({piece.data_ptr() for piece in others} - set(addresses)) == 3
    batch_module._pieces.cache_clear()


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


def keys_of(folder, steps, start=START, world=1, **changes):
    """Keys that each rank gives in some steps, rank by rank, and the position after them."""
    found = []
    for rank in range(world):
        loader = TrainingLoader(config_for(folder, **changes), 3, CPU, accumulation=1, rank=rank, world=world)
        found += [key for batch in itertools.islice(loader.batches(start), steps) for key in batch.keys]
    for _ in range(steps):
        start = loader.plan.after(start)
    return found, start


@pytest.mark.parametrize("workers", [0, 2])
def test_an_epoch_goes_on_with_other_ranks_and_batches(train_shards, workers):
    """Two steps of two ranks, then one of three with larger batches, then one rank to the end: every sample once."""
    first, position = keys_of(train_shards, 2, world=2, batch_size=2)
    second, position = keys_of(train_shards, 1, position, world=3, batch_size=2, num_workers=workers)
    assert position == Position(0, ((4, 2), (6, 1)))
    third, position = keys_of(train_shards, 2, position, batch_size=4, num_workers=workers)
    assert position == Position(1)
    assert (len(first), len(second), len(third)) == (8, 6, 8)
    assert set(first + second + third) == set(keys_of(train_shards, 22, batch_size=1)[0])


def test_the_last_step_is_filled_up(train_shards):
    keys = keys_of(train_shards, 3, batch_size=8, remainder="pad")[0]
    counts = Counter(keys)
    assert len(counts) == 22
    assert sorted(counts.values()) == [1] * 20 + [2] * 2
    assert all(counts[key] == 2 for key in keys[22:])


@pytest.fixture(scope="module")
def other_shards(tmp_path_factory):
    """9 samples of 5 frames of another size and in another codec; frame n of sample s has the colour 20 s + 4 n."""
    return coloured(tmp_path_factory.mktemp("other") / "shards", samples=9, frames=5)


def coloured(folder, samples, frames, size=(96, 104)) -> Path:
    folder.mkdir()
    with tarfile.open(folder / "shard-000000.tar", "w") as tar:
        for sample, number in itertools.product(range(samples), range(frames)):
            image = np.full((*size, 3), 20 * sample + 4 * number, np.uint8)
            data = encode(image, "qoi")
            info = tarfile.TarInfo(f"coloured-{sample}.im{number + 1}.qoi")
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    tar_path = folder / "shard-000000.tar"
    entry = ShardEntry("shard-000000.tar", samples, tar_path.stat().st_size, sha256_of(tar_path))
    write_index(folder, Index("train", "qoi", frames, size, size, False, {}, {}, {}, (), (entry,)))
    return folder


def test_folders_are_mixed_by_their_ratio(train_shards, other_shards):
    """Two to one in every batch of six; the first folder once an epoch, the second in turn; other codec, frames and size."""
    folders = {"data_path": (str(train_shards), str(other_shards)), "mixed_ratio": "2:1", "batch_size": 6}
    batches = take(None, 10, **folders)
    assert [sum(key.startswith("coloured") for key in batch.keys) for batch in batches] == [2] * 10
    keys = [key for batch in batches for key in batch.keys]
    first = [key for key in keys if not key.startswith("coloured")]
    other = [key for key in keys if key.startswith("coloured")]
    assert len(set(first[:20])) == len(set(first[20:])) == 20  # 33 places an epoch: five steps, two samples left out
    assert Counter(other[:9]) == {f"coloured-{number}": 1 for number in range(9)}
    for one, again in zip(batches[3:], take(None, 7, start=3, num_workers=2, **folders), strict=True):
        assert_same(one, again)
    by_rank = [take(None, 4, rank=rank, world=2, **folders | {"batch_size": 3}) for rank in range(2)]
    for step in range(4):
        assert_same(batches[step], joined([part[step] for part in by_rank]))
    alone = take(train_shards, 5, batch_size=4)
    assert sorted(key for batch in alone for key in batch.keys) == sorted(set(first[:20]))


def test_the_same_sample_is_changed_anew_in_every_pass(other_shards):
    """In one epoch of the first folder, too: of a small folder that is passed through five times."""
    folders = {"data_path": (str(other_shards), str(other_shards)), "mixed_ratio": "1:5", "batch_size": 6}
    batches = take(None, 9, sequence=("random_time",), **folders)
    whole = joined(batches)
    seen = {(key, round(time, 3)) for key, time in zip(whole.keys, whole.timestep.tolist(), strict=True)}
    assert len(seen) > 2 * 9


@pytest.mark.parametrize("sequence", ["middle", "random_time", "random_gap"])
def test_frames_are_those_of_the_timestep(other_shards, sequence):
    """The colours say which frames they are; without augmentation they come in order."""
    batches = take(other_shards, 40, sequence=(sequence,), batch_size=1, augment_prob=0, remainder="pad")
    found = set()
    for batch in batches:
        first, middle, last = (frame.mul(255).round().unique() for frame in (batch.img0, batch.imgt, batch.img1))
        assert len(first) == len(middle) == len(last) == 1
        sample = int(batch.keys[0].rpartition("-")[2])
        numbers = [int(colour - 20 * sample) // 4 for colour in (first, middle, last)]
        assert batch.timestep.item() == pytest.approx((numbers[1] - numbers[0]) / (numbers[2] - numbers[0]))
        found.add(tuple(numbers))
    assert (
        found
        == {
            "middle": {(0, 2, 4)},
            "random_time": {(0, 1, 4), (0, 2, 4), (0, 3, 4)},
            "random_gap": {(0, 1, 2), (1, 2, 3), (2, 3, 4), (0, 2, 4)},
        }[sequence]
    )
    again = take(other_shards, 30, start=10, sequence=(sequence,), batch_size=1, augment_prob=0, remainder="pad", num_workers=1)
    for one, other in zip(batches[10:], again, strict=True):
        assert_same(one, other)


def test_only_the_frames_of_the_triplet_are_read(other_shards):
    reader = ShardReader(other_shards, read_index(other_shards), any_triplet=True)
    sample = reader.read(4, Triplet(1, 2, 3))
    assert {name for name in sample if "." in name} == {"im2.qoi", "im3.qoi", "im4.qoi"}


def test_stored_flow_goes_with_the_middle_frame_only(train_shards):
    with pytest.raises(ConfigError, match=r"--sequence random_time does not go with --distill_weight.*use --sequence middle"):
        TrainingLoader(config_for(train_shards, sequence=("random_time",)), 3, CPU, accumulation=1, with_flow=True)


def test_batch_is_float_in_range(train_shards):
    batch = take(train_shards, 1)[0]
    assert batch.img0.shape == (4, 3, 64, 64)
    assert batch.img0.dtype == torch.float32
    assert 0 <= batch.img0.min() < batch.img0.max() <= 1
    assert batch.timestep.tolist() == [0.5] * 4


# crops that the fixture's frames hold; three epochs of five steps with batches of four
CURRICULUM = {"curriculum": True, "curriculum_T": 3, "curriculum_crops": (32, 48, 64)}


@pytest.mark.parametrize("workers", [0, 2])
def test_crop_grows_with_the_epoch(train_shards, workers):
    batches = take(train_shards, 18, num_workers=workers, **CURRICULUM)
    assert [batch.imgt.shape for batch in batches] == [(4, 3, s, s) for s in [32] * 5 + [48] * 5 + [64] * 8]
    assert [batch.keys for batch in batches] == [batch.keys for batch in take(train_shards, 18)]
    for one, other in zip(batches[10:], take(train_shards, 8, start=10), strict=True):  # the last crop is that of config_for
        assert_same(one, other)


def test_crop_changes_between_steps_and_not_within(train_shards):
    batches = take(train_shards, 24, batch_size=2, accumulation=2, **CURRICULUM)
    whole = take(train_shards, 12, **CURRICULUM)
    for step in range(12):
        assert_same(whole[step], joined(batches[2 * step : 2 * step + 2]))


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("start", [3, 5, 7, 12])
def test_curriculum_resumes_in_the_middle(train_shards, start, workers):
    straight = take(train_shards, 14, with_flow=True, **CURRICULUM)[start:]
    resumed = take(train_shards, 14 - start, start=start, with_flow=True, num_workers=workers, **CURRICULUM)
    for one, other in zip(straight, resumed, strict=True):
        assert_same(one, other)


def warp(frame, flow):
    """Bilinear backward warp, `[B, 3, H, W]` by `[B, 2, H, W]` in pixels."""
    height, width = flow.shape[2:]
    y, x = torch.meshgrid(torch.arange(height) + 0.5, torch.arange(width) + 0.5, indexing="ij")
    grid = torch.stack([(x + flow[:, 0]) * 2 / width - 1, (y + flow[:, 1]) * 2 / height - 1], dim=-1)
    return F.grid_sample(frame, grid, "bilinear", "border", align_corners=False)


def test_flow_comes_with_the_frames_that_it_warps(train_shards):
    batches = take(train_shards, 10, with_flow=True)
    for batch, without in zip(batches, take(train_shards, 10), strict=True):
        assert (without.flow_t0, without.flow_t1) == (None, None)
        assert_same(batch._replace(flow_t0=None, flow_t1=None), without)
        assert batch.flow_t0.shape == batch.flow_t1.shape == (4, 2, 64, 64)
        assert batch.flow_t0.dtype == batch.flow_t1.dtype == torch.float32
    whole = joined([batch._replace(flow_t0=None, flow_t1=None) for batch in batches])
    for name, frame in (("flow_t0", whole.img0), ("flow_t1", whole.img1)):
        flow = torch.cat([getattr(batch, name) for batch in batches])
        images = warp(frame, flow), frame, warp(frame, flow.roll(1, 0))
        warped, still, wrong = (((image - whole.imgt) ** 2).mean(dim=(1, 2, 3)) for image in images)
        assert warped.mean() < still.mean() / 2
        assert (warped < still).float().mean() > 0.9  # a few see mostly what the others hide or what lies outside
        assert (warped < wrong).float().mean() > 0.9
    for one, other in zip(batches, take(train_shards, 10, with_flow=True, num_workers=2), strict=True):
        assert_same(one, other)


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
        assert all(batch.flow_t0 is batch.flow_t1 is None for batch in batches)
    some = [batch.keys[0] for batch in evaluation_batches(val_shards, CPU, numbers=[3, 1], workers=2)]
    assert some == [expected[3]["__key__"], expected[1]["__key__"]]


def test_evaluation_gives_flow_as_it_is_stored(val_shards):
    stored = members_of(val_shards)
    for batch in evaluation_batches(val_shards, CPU, workers=2, with_flow=True):
        for name in ("flow_t0", "flow_t1"):
            expected = np.load(io.BytesIO(stored[f"{batch.keys[0]}.{name}.npy"]), allow_pickle=False)
            assert np.array_equal(getattr(batch, name)[0].permute(1, 2, 0).numpy(), expected)


def test_only_needed_members_are_read(val_shards):
    index = read_index(val_shards)
    for with_flow, flows in ((False, set()), (True, {"flow_t0.npy", "flow_t1.npy"})):
        sample = ShardReader(val_shards, index, with_flow).read(2)
        assert {name for name in sample if "." in name} == {"im1.png", "im2.png", "im3.png"} | flows


def test_evenly_spaced():
    assert evenly_spaced(10, 3) == [0, 3, 6]
    assert evenly_spaced(4, 9) == evenly_spaced(4, None) == [0, 1, 2, 3]
    assert len(set(evenly_spaced(738, 48))) == 48


def test_small_frames_are_refused_before_training(train_shards):
    with pytest.raises(FrameTooSmallError, match=r"72x80.*--crop is 128.*use --crop 64"):
        TrainingLoader(config_for(train_shards, crop=128), 0, CPU, accumulation=1)
    with pytest.raises(FrameTooSmallError, match=r"72x80.*--curriculum_crops goes up to 96: use --curriculum_crops up to 64"):
        TrainingLoader(config_for(train_shards, curriculum=True, curriculum_crops=(48, 64, 96)), 0, CPU, accumulation=1)
    TrainingLoader(config_for(train_shards, **CURRICULUM | {"crop": 128}), 0, CPU, accumulation=1)  # has no --crop


@pytest.mark.parametrize("how", ["upscale", "reflect"])
def test_small_frames_hold_the_crop_when_asked_to(train_shards, how):
    """72x80 enlarged to 128x142 or continued to 128x128; crops that they hold are as they were."""
    changes = {"augment_prob": 0.0, "rotate": False, "small_frames": (how,)}
    (batch,) = take(train_shards, 1, crop=128, **changes)
    assert batch.img0.shape == (4, 3, 128, 128)
    reader = ShardReader(train_shards, read_index(train_shards))
    samples = [decode_triplet(reader.read(number), reader.index) for number in range(22)]
    frames = {sample["__key__"]: sample["frames"][0] for sample in samples}
    for image, key in zip(batch.img0, batch.keys, strict=True):
        grown = grow(frames[key], 128, how)
        pixels = (image * 255).round().byte().permute(1, 2, 0).numpy()
        assert any(np.array_equal(pixels, grown[:, left : left + 128]) for left in range(grown.shape[1] - 127))
    for one, other in zip(take(train_shards, 2, **changes), take(train_shards, 2, augment_prob=0.0, rotate=False), strict=True):
        assert_same(one, other)
    take(train_shards, 0, **CURRICULUM | {"curriculum_crops": (64, 96, 128), "small_frames": (how,)})
    with pytest.raises(ConfigError, match=f"--small_frames {how} does not go with --distill_weight"):
        take(train_shards, 0, crop=128, with_flow=True, **changes)


def test_small_frames_of_one_folder_of_two(train_shards, other_shards):
    folders = {"data_path": (str(train_shards), str(other_shards)), "mixed_ratio": "1:1", "crop": 96}
    batches = take(None, 4, **folders, small_frames=("upscale", "refuse"))
    assert all(batch.img0.shape[2:] == (96, 96) for batch in batches)
    with pytest.raises(FrameTooSmallError, match="72x80"):
        take(None, 0, **folders, small_frames=("refuse", "upscale"))


def test_too_few_samples_for_a_batch(train_shards):
    with pytest.raises(ConfigError, match=r"22 samples an epoch, fewer than the global batch of 24.*--remainder pad"):
        TrainingLoader(config_for(train_shards, batch_size=12), 0, CPU, accumulation=2)


def test_damaged_shards_are_named(train_shards, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(train_shards, copy)
    first = copy / read_index(copy).shards[0].name
    first.write_bytes(first.read_bytes()[:5000])
    with pytest.raises(ShardError, match=r"shard-000000\.tar.*shards\.verify"):
        list(evaluation_batches(copy, CPU))
    first.unlink()
    with pytest.raises(ShardError, match=r"shard-000000\.tar: cannot be read"):
        list(evaluation_batches(copy, CPU))


def test_samples_without_a_middle_frame_are_refused(train_shards, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(train_shards, copy)
    content = json.loads((copy / "index.json").read_text())
    (copy / "index.json").write_text(json.dumps(content | {"frames": 2}))
    with pytest.raises(ShardError, match="odd number"):
        TrainingLoader(config_for(copy), 0, CPU, accumulation=1)


def test_flow_that_is_not_there_is_asked_for(val_shards, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(val_shards, copy)
    content = json.loads((copy / "index.json").read_text())
    (copy / "index.json").write_text(json.dumps(content | {"has_flow": False}))
    message = r"--distill_weight needs flow.*copy has none.*python -m shards\.flow"
    with pytest.raises(ConfigError, match=message):
        TrainingLoader(config_for(copy), 0, CPU, accumulation=1, with_flow=True)
    with pytest.raises(ConfigError, match=message):
        next(evaluation_batches(copy, CPU, with_flow=True))
    assert len(list(evaluation_batches(copy, CPU))) == 5


def members_of(folder) -> dict[str, bytes]:
    """Name -> content of every member of a folder's only tar."""
    with tarfile.open(folder / "shard-000000.tar") as tar:
        return {member.name: tar.extractfile(member).read() for member in tar}


def npy(array) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


class Payload:
    """Writes a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


FLOW = np.zeros((72, 80, 2), np.float32)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "has no flow_t1.npy"),
        (npy(FLOW.astype(np.float64)), r"flow_t1.npy: it is float64 \[72, 80, 2\] instead of float32 \[72, 80, 2\]"),
        (npy(FLOW[:, :72]), r"flow_t1.npy: it is float32 \[72, 72, 2\] instead of float32 \[72, 80, 2\]"),
        (npy(FLOW.transpose(2, 0, 1)), r"flow_t1.npy: it is float32 \[2, 72, 80\]"),
        (npy(FLOW)[:-8], r"flow_t1.npy: it cannot be read"),
        (npy(FLOW).replace(b"}", b"("), r"flow_t1.npy: it cannot be read"),
        (b"", r"flow_t1.npy: it cannot be read"),
        (npy(FLOW + np.float32("nan")), r"flow_t1.npy: it has values that are not finite"),
    ],
)
def test_unusable_flow_is_named(val_shards, tmp_path, content, message):
    folder = with_member(val_shards, tmp_path / "copy", "flow_t1.npy", content)
    with pytest.raises(ShardError, match=rf"sample synthetic-val-2-000003:? {message}"):
        list(evaluation_batches(folder, CPU, with_flow=True))
    assert len(list(evaluation_batches(folder, CPU))) == 5


def test_flow_is_never_unpickled(val_shards, tmp_path):
    bait = tmp_path / "bait"
    contents = pickle.dumps(Payload(bait)), npy(np.array([Payload(bait)], dtype=object))
    for number, content in enumerate(contents):
        folder = with_member(val_shards, tmp_path / str(number), "flow_t1.npy", content)
        with pytest.raises(ShardError, match=r"sample synthetic-val-2-000003: flow_t1.npy: it (cannot be read|is object)"):
            list(evaluation_batches(folder, CPU, with_flow=True))
    assert not bait.exists()
    pickle.loads(contents[0])  # the bait is a good one
    assert bait.exists()


def with_member(folder, copy, member, content) -> Path:
    """A copy of a shard folder in which a member of its sample 3 has another content, or (None) is not there."""
    members = members_of(folder)
    shutil.copytree(folder, copy)
    with tarfile.open(copy / "shard-000000.tar", "w") as tar:
        for name, data in members.items():
            data = content if name == f"synthetic-val-2-000003.{member}" else data
            if data is not None:
                info = tarfile.TarInfo(name)
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    return copy
