"""Test that any change to a shard folder after it was written is found and reported."""

from __future__ import annotations

import dataclasses
import io
import json
import shutil
import tarfile

import pytest
from published import PUBLISHED
from sources import panning, write_frames

from shards import synthetic, verify
from shards.schema import INDEX_NAME, VERSION, Index, ShardError, read_index, sha256_of, write_index


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("made") / "shards"
    synthetic.make(synthetic.Options(folder, samples=6, size="32x40", samples_per_shard=2))
    return folder


@pytest.fixture
def folder(made, tmp_path):
    return shutil.copytree(made, tmp_path / "shards")


def check(folder, capsys, *flags):
    """Return the exit code and the printed lines of the command."""
    code = verify.main([str(folder), *flags])
    return code, capsys.readouterr().out.splitlines()


def rewrite(folder, change):
    """Change the members of the second shard and update its index entry."""
    path = folder / "shard-000001.tar"
    with tarfile.open(path) as tar:
        members = {m.name: tar.extractfile(m).read() for m in tar}
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for name, data in change(members).items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    index = read_index(folder)
    entry = dataclasses.replace(index.shards[1], bytes=path.stat().st_size, sha256=sha256_of(path))
    write_index(folder, dataclasses.replace(index, shards=(index.shards[0], entry, index.shards[2])))


@pytest.mark.parametrize("workers", ["1", "2"])
def test_a_good_folder(folder, capsys, workers):
    code, lines = check(folder, capsys, "--workers", workers)
    assert code == 0
    assert len(lines) == 1
    assert "good; 6 samples in 3 shards" in lines[0]


def test_several_folders_at_once(folder, made, capsys):
    (folder / "shard-000002.tar").unlink()
    code, lines = check(made, capsys, str(folder))
    assert code == 1
    assert ["good" in line for line in lines] == [True, False, False]


def test_a_flipped_byte(folder, capsys):
    path = folder / "shard-000001.tar"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    code, lines = check(folder, capsys)
    assert code == 1
    assert any("shard-000001.tar: its sha256 differs" in line for line in lines)
    assert "problems" in lines[-1]


def test_missing_and_extra_shards(folder, capsys):
    (folder / "shard-000002.tar").rename(folder / "shard-000007.tar")
    code, lines = check(folder, capsys)
    assert code == 1
    assert any("shard-000002.tar: is in the index but not in the folder" in line for line in lines)
    assert any("shard-000007.tar: is in the folder but not in the index" in line for line in lines)


@pytest.mark.parametrize("keep", [0, 300, 5000, -1024])
def test_a_cut_off_tar(folder, capsys, keep):
    path = folder / "shard-000000.tar"
    path.write_bytes(path.read_bytes()[:keep])
    code, lines = check(folder, capsys)
    assert code == 1
    assert any("shard-000000.tar: has" in line and "the index says" in line for line in lines)


def test_a_key_that_is_there_twice(folder, capsys):
    rewrite(folder, lambda members: {n.replace("-000002.", "-000000."): data for n, data in members.items()})
    code, lines = check(folder, capsys)
    assert code == 1
    assert any("key synthetic-train-0-000000 is there 2 times" in line for line in lines)


def test_an_undecodable_frame_a_lost_member_and_a_wrong_size(folder, capsys):
    def change(members):
        names = list(members)
        meta = json.loads(members[names[0]]) | {"height": 33}
        members[names[0]] = json.dumps(meta).encode()
        members[names[2]] = b"junk"
        del members[next(name for name in names if name.endswith("-000003.im3.png"))]
        return members

    rewrite(folder, change)
    code, lines = check(folder, capsys)
    text = "\n".join(lines)
    assert code == 1
    assert "im2.png: it is not a png file" in text
    assert "im1.png is 32x40 pixels, its json says 33x40" in text
    assert "flow_t0.npy: it is float32 [32, 40, 2] instead of" in text
    assert "sample synthetic-train-0-000003: has the members" in text


def test_a_wrong_sample_count_and_wrong_sizes_in_the_index(folder, capsys):
    index = read_index(folder)
    entry = dataclasses.replace(index.shards[0], samples=3)
    write_index(folder, dataclasses.replace(index, shards=(entry, *index.shards[1:])))
    assert "holds 2 samples, its index says 3" in check(folder, capsys)[1][0]
    write_index(folder, dataclasses.replace(index, max_size=(64, 64)))
    assert "the index says (32, 40) to (64, 64)" in check(folder, capsys)[1][0]


def test_another_schema_version(folder, fails):
    path = folder / INDEX_NAME
    path.write_text(json.dumps(json.loads(path.read_text()) | {"version": VERSION + 1}))
    message = fails(verify.main, folder)
    assert f"version {VERSION + 1}" in message
    assert "make the shards again" in message


def test_a_damaged_or_foreign_index(folder, fails):
    (folder / INDEX_NAME).write_text("{")
    assert "damaged" in fails(verify.main, folder)
    (folder / INDEX_NAME).write_text('{"name": "something else"}')
    assert "not an index of" in fails(verify.main, folder)


def test_a_raw_data_set_gets_the_command_that_makes_shards(tmp_path, fails):
    write_frames(tmp_path / "raw" / "clip", panning(3))
    message = fails(verify.main, tmp_path / "raw")
    assert f"python -m shards.video --src {tmp_path / 'raw'} --out SHARDS" in message
    (tmp_path / "raw" / "sep_trainlist.txt").write_text("00001/0001\n")
    assert f"python -m shards.vimeo90k --src {tmp_path / 'raw'} --out SHARDS --kind septuplet" in fails(
        verify.main, tmp_path / "raw"
    )


@pytest.mark.parametrize(
    ("name", "command"),
    [
        ("ucf101", "shards.ucf101 --src {} --out SHARDS"),
        ("middlebury", "shards.middlebury --src {} --out SHARDS"),
        ("xiph", "shards.xiph --src {} --out SHARDS"),
        ("snu_film", "shards.snu_film --src {} --out SHARDS --split easy"),
        ("x_train", "shards.x4k1000fps --src {} --out SHARDS --split train"),
        ("x_test", "shards.x4k1000fps --src {} --out SHARDS --split test"),
    ],
)
def test_a_published_set_gets_a_command_that_works(tmp_path, capsys, name, command):
    raw = PUBLISHED[name].build(tmp_path / "raw")
    assert verify.main([str(raw)]) == 2
    message = capsys.readouterr().err
    assert message.strip().endswith(f"python -m {command.format(raw)}")
    arguments = message.split(f"{PUBLISHED[name].job.__name__} ")[1].replace("SHARDS", str(tmp_path / "out")).split()
    assert PUBLISHED[name].job.main(arguments) == 0
    assert verify.main([str(tmp_path / "out")]) == 0


def test_a_published_set_one_level_deeper_gets_its_command(tmp_path, fails):
    raw = PUBLISHED["ucf101"].build(tmp_path / "my sets" / "ucf101")
    assert fails(verify.main, raw.parent).endswith(f"python -m shards.ucf101 --src '{raw}' --out SHARDS")


def test_x_train_as_it_is_distributed_gets_its_command(tmp_path, fails):
    (tmp_path / "encoded_train" / "002").mkdir(parents=True)
    (tmp_path / "encoded_train" / "002" / "occ008.320.mp4").touch()
    assert "shards.x4k1000fps" in fails(verify.main, tmp_path)


def test_an_unfinished_job_a_missing_folder_and_no_folder(folder, tmp_path, fails):
    (folder / INDEX_NAME).unlink()
    assert "unfinished job" in fails(verify.main, folder)
    assert "does not exist" in fails(verify.main, tmp_path / "absent")
    assert "give one shard folder" in fails(verify.main)


def test_the_index_survives_a_round_trip(folder):
    index = read_index(folder)
    write_index(folder, index)
    assert read_index(folder) == index
    assert isinstance(index, Index)
    content = json.loads((folder / INDEX_NAME).read_text())
    assert content["samples"] == 6
    del content["codec"]
    (folder / INDEX_NAME).write_text(json.dumps(content))
    with pytest.raises(ShardError, match="lacks codec"):
        read_index(folder)
