"""Flow stored beside samples: its direction and weights, the copy of the rest, resuming, and RAFT."""

from __future__ import annotations

import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torchvision.models import optical_flow

from shards import flow
from shards.codecs import decode_flow
from shards.schema import ShardError, read_index
from shards.verify import verify

TEACHER = """
import torch
def make(device):
    def estimate(frame0, frame1):
        assert frame0.device == device and frame0.dtype == torch.float32
        difference = (frame0 - frame1).mean(1, keepdim=True)
        return torch.cat((4 * difference, frame0[:, :1] - 0.5), dim=1)
    return estimate
def wrong(device):
    return lambda frame0, frame1: frame0
def nan(device):
    return lambda frame0, frame1: frame0[:, :2] * torch.nan
nothing = None
"""


@pytest.fixture
def teacher(tmp_path, monkeypatch) -> str:
    """A module with factories, in the working directory."""
    (tmp_path / "flow_of_mine.py").write_text(TEACHER)
    monkeypatch.chdir(tmp_path)
    return "flow_of_mine:make"


def run(shards: Path, out: Path, *flags: object) -> int:
    return flow.main(["--shards", str(shards), "--out", str(out), "--device", "cpu", *map(str, flags)])


def members(folder: Path) -> dict[str, bytes]:
    """The content of every member of every tar."""
    found = {}
    for entry in read_index(folder).shards:
        with tarfile.open(folder / entry.name) as tar:
            for member in tar:
                file = tar.extractfile(member)
                assert file is not None
                found[member.name] = file.read()
    return found


def test_a_shift_is_found_with_its_direction_and_counts_where_both_ways_agree():
    """Brute force: for each pixel the flow back at the place that its flow leads to, by hand."""
    rng = np.random.default_rng(0)
    there, back = (torch.from_numpy(rng.normal(0, 2, (2, 2, 12, 15)).astype(np.float32)) for _ in range(2))
    there[:, :, 3:9, 4:11] = torch.tensor([2.5, -1.25]).view(1, 2, 1, 1)
    back[:, :, 1:9, 5:14] = torch.tensor([-2.5, 1.3]).view(1, 2, 1, 1)
    flows = iter((there, back))
    found = flow.weighted_flow(lambda *_: next(flows), torch.zeros(2, 3, 12, 15), torch.zeros(2, 3, 12, 15))
    assert torch.equal(found[:, :2], there)
    for sample in range(2):
        for row in range(12):
            for column in range(15):
                forth = there[sample, :, row, column].double().numpy()
                x, y = column + forth[0], row + forth[1]
                expected = 0.0
                if 0 <= x <= 14 and 0 <= y <= 11:
                    left, top = min(int(x), 13), min(int(y), 10)
                    a, b = x - left, y - top
                    corners = back[sample, :, top : top + 2, left : left + 2].double().numpy()
                    weights = np.array([[(1 - a) * (1 - b), a * (1 - b)], [(1 - a) * b, a * b]])
                    returned = (corners * weights).sum((1, 2))
                    limit = 0.01 * (forth @ forth + returned @ returned) + 0.5
                    expected = float((forth + returned) @ (forth + returned) <= limit)
                assert found[sample, 2, row, column] == expected, (sample, row, column)
    assert 0.05 < found[:, 2].mean() < 0.9


def test_the_folder_is_a_copy_with_flow(train_shards_without_flow, teacher, tmp_path, capsys):
    assert run(train_shards_without_flow, tmp_path / "out", "--model", teacher, "--batch_size", 3) == 0
    assert "4 samples of 3 frames" in capsys.readouterr().out
    assert verify(tmp_path / "out") == []
    before, after = read_index(train_shards_without_flow), read_index(tmp_path / "out")
    assert after.has_flow
    assert not before.has_flow
    assert (after.split, after.codec, after.clips, after.samples) == (before.split, before.codec, before.clips, before.samples)
    assert after.source["shards"] == before.source
    old, new = members(train_shards_without_flow), members(tmp_path / "out")
    assert {name: new[name] for name in old} == old
    assert {name.partition(".")[2] for name in set(new) - set(old)} == {"flow_t0.npy", "flow_t1.npy"}

    from shards.codecs import decode

    estimate = flow.call_factory(teacher, "model", torch.device("cpu"))
    for key in {name.partition(".")[0] for name in old}:
        im1, im2, im3 = (
            torch.from_numpy(decode(old[f"{key}.im{n}.png"], "png")).permute(2, 0, 1)[None] / 255 for n in (1, 2, 3)
        )
        for name, other in (("flow_t0", im1), ("flow_t1", im3)):
            stored = decode_flow(new[f"{key}.{name}.npy"], *im1.shape[2:])
            assert torch.equal(torch.from_numpy(stored.copy()).permute(2, 0, 1)[None, :2], estimate(im2, other))
            assert torch.equal(torch.from_numpy(stored.copy()).permute(2, 0, 1)[None], flow.weighted_flow(estimate, im2, other))


def test_a_stopped_job_resumes_and_another_one_is_refused(train_shards, teacher, tmp_path, capsys):
    out = tmp_path / "out"
    assert run(train_shards, out, "--model", teacher) == 0
    whole = {path.name: path.read_bytes() for path in out.glob("*.tar")}
    (out / "index.json").unlink()
    (out / sorted(whole)[-1]).unlink()
    kept = (out / sorted(whole)[0]).stat().st_mtime_ns
    assert run(train_shards, out, "--model", teacher) == 0
    assert {path.name: path.read_bytes() for path in out.glob("*.tar")} == whole
    assert (out / sorted(whole)[0]).stat().st_mtime_ns == kept
    assert run(train_shards, out, "--model", teacher) == 0
    assert "is complete already" in capsys.readouterr().err
    (tmp_path / "other_flow.py").write_text(TEACHER)
    assert run(train_shards, out, "--model", "other_flow:make") == 2
    assert "holds shards of another job" in capsys.readouterr().err


@pytest.mark.parametrize("size", [(136, 144), (72, 83)])
def test_raft_is_that_of_torchvision(tmp_path, size):
    """Sizes that it does not take are continued at the edges."""
    torch.manual_seed(0)
    network = optical_flow.raft_small().eval()
    torch.save(network.state_dict(), tmp_path / "raft.pth")
    options = flow.Options(tmp_path, tmp_path, "raft_small", tmp_path / "raft.pth", iterations=2)
    frames = torch.rand(2, 1, 3, *size)
    with torch.inference_mode():
        found = flow._load(options, torch.device("cpu"))(*frames)
        down, across = (max(128, -(-side // 8) * 8) - side for side in size)
        top, left = down // 2, across // 2
        padded = [F.pad(frame, (left, across - left, top, down - top), mode="replicate") * 2 - 1 for frame in frames]
        expected = network(*padded, num_flow_updates=2)[-1][:, :, top : top + size[0], left : left + size[1]]
    torch.testing.assert_close(found, expected)
    assert found.shape == (1, 2, *size)


def test_raft_from_a_file_writes_a_folder(train_shards_without_flow, tmp_path):
    torch.save(optical_flow.raft_small().state_dict(), tmp_path / "raft.pth")
    flags = ("--model", "raft_small", "--weights", tmp_path / "raft.pth", "--iterations", 1)
    assert run(train_shards_without_flow, tmp_path / "out", *flags) == 0
    assert verify(tmp_path / "out") == []


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--model", "raft"], "unknown model 'raft': choose raft_large, raft_small, or MODULE:FACTORY"),
        (["--batch_size", "0"], "batch_size 0 is too small"),
        (["--model", "flow_of_mine:absent"], "has no function absent"),
        (["--model", "flow_of_mine:nothing"], "has no function nothing"),
        (["--model", "not_there:make"], "No module named 'not_there'; start the job in the module's folder"),
        (
            ["--model", "flow_of_mine:wrong"],
            "the model gave (4, 3, 72, 80) for frames (4, 3, 72, 80); expected a tensor (4, 2,",
        ),
        (["--model", "flow_of_mine:nan"], "flow with values that are not finite"),
        (["--model", "flow_of_mine:make", "--weights", "raft.pth"], "flow_of_mine:make loads its own"),
        (["--model", "raft_small", "--weights", "absent.pth"], "absent.pth: [Errno 2] No such file"),
        (["--model", "raft_small", "--weights", "flow_of_mine.py"], "the weights of raft_small can't be used: flow_of_mine.py"),
    ],
)
@pytest.mark.usefixtures("teacher")
def test_mistakes_are_one_line_and_nothing_is_finished(train_shards_without_flow, tmp_path, capsys, flags, message):
    assert run(train_shards_without_flow, tmp_path / "out", *flags) == 2
    printed = capsys.readouterr().err
    assert message in printed
    assert printed.count("\n") == 1
    assert not (tmp_path / "out" / "index.json").exists()


def test_the_source_is_not_overwritten(train_shards_without_flow, teacher, capsys):
    assert run(train_shards_without_flow, train_shards_without_flow, "--model", teacher) == 2
    assert "is the source: give another folder" in capsys.readouterr().err


def test_samples_without_a_middle_frame_are_refused(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(flow, "read_index", lambda _: type("Index", (), {"frames": 4})())
    with pytest.raises(ShardError, match="has 4 frames a sample: flow needs an odd number"):
        flow.make(flow.Options(tmp_path, tmp_path / "out"))
