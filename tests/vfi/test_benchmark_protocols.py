"""vfi benchmark --protocol: the published folder and shards of it give the same numbers; other data is rejected."""

from __future__ import annotations

import dataclasses
import re
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from skimage import data
from skimage.metrics import peak_signal_noise_ratio

from shards import ucf101, x4k1000fps
from vfi.benchmark import main
from vfi.checkpoint import store
from vfi.config import presets
from vfi.evaluation import task
from vfi.evaluation.results import read_results
from vfi.io.dataclass_json import to_json
from vfi.model.interpolator import FrameInterpolator
from vfi.report import report

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """A run with random weights, of a model with flow."""
    run = tmp_path_factory.mktemp("runs") / "random"
    config = presets.override(presets.tiny(), phase=2)
    torch.manual_seed(0)
    network = FrameInterpolator(config.model)
    torch.nn.init.normal_(network.flow.stages[0].head.weight, std=0.1)
    store.save(run, store.State(1), config, network.state_dict(), {})
    (run / "config.json").write_text(to_json(config))
    return run


def photograph(x: int, height: int = 40, width: int = 56) -> np.ndarray:
    return data.astronaut()[80 : 80 + height, 150 + x : 150 + x + width]


@pytest.fixture(scope="module")
def published(tmp_path_factory) -> Path:
    """Three samples in the layout of UCF101, smaller than published."""
    root = tmp_path_factory.mktemp("published") / "ucf101"
    for sample in range(3):
        (root / str(sample + 1)).mkdir(parents=True)
        for number, name in enumerate(ucf101.FRAMES):
            Image.fromarray(photograph(40 * sample + (2 + sample) * number)).save(root / str(sample + 1) / name)
    return root


def run(*arguments: object) -> None:
    main([str(argument) for argument in (*arguments, "--device", "cpu", "--workers", 1, "--pictures", 2)])


def refused(capsys, *arguments: object) -> str:
    with pytest.raises(SystemExit) as error:
        run(*arguments)
    assert error.value.code == 2
    return capsys.readouterr().err.strip()


UCF = ("--protocol", "ucf101", "--allow_partial")


def test_folder_and_shards_give_the_same_numbers(model, published, tmp_path):
    shards = tmp_path / "shards"
    ucf101.make(ucf101.Options(src=published, out=shards, samples_per_shard=2))
    found = []
    for location in (published, shards):
        run("--model", model, "--data", location, "--out", tmp_path / "r.json", *UCF)
        found.append(read_results(tmp_path / "r.json"))
    assert found[0].rows == found[1].rows
    assert found[0].index_sha256 == found[1].index_sha256
    average = found[0].rows[0]
    for sample, image in enumerate(average.images):
        frames = [photograph(40 * sample + (2 + sample) * number).astype(np.float64) for number in range(3)]
        mean = np.round((frames[0] + frames[2]) / 2 / 255 * 255)  # halves go to the even number, as they do in floats there
        truth = frames[1]
        assert image.psnr == pytest.approx(peak_signal_noise_ratio(truth, mean, data_range=255), abs=0.02)
        assert image.ie == pytest.approx(np.abs(mean - truth).mean(), abs=0.05)
    facts = found[0].protocol
    assert (facts["protocol"], facts["profile"], facts["TTA"]) == ("ucf101", "vfimamba", "none")
    assert facts["frame set"] == "all samples; NOT COMPARABLE: 3 of 379 samples, frames of 40x56 instead of 256x256"
    assert facts["rounding"] == "to 8 bits, before PSNR and SSIM"
    assert len(found[0].pictures) == 2


def test_profile_and_tta_change_the_numbers_and_are_said(model, published, tmp_path):
    found = {}
    for name, flags in {"usual": (), "amt": ("--profile", "amt"), "turned": ("--tta",)}.items():
        run("--model", model, "--data", published, "--out", tmp_path / f"{name}.json", *UCF, *flags)
        results = read_results(tmp_path / f"{name}.json")
        found[name] = results.models[0].psnr
        assert results.protocol["profile"] == ("amt" if name == "amt" else "vfimamba")
        assert (results.protocol["TTA"] == "none") == (name != "turned")
    assert len(set(found.values())) == 3


def test_several_frames_of_a_sample_are_images_of_their_own(model, tmp_path):
    """X-TEST: seven truths between frames 0 and 32, at a quarter of the size for flow."""
    clip = tmp_path / "X4K" / "test" / "Type1" / "TEST01"
    clip.mkdir(parents=True)
    for number in range(33):
        Image.fromarray(photograph(number, 64, 96)).save(clip / f"{number:04d}.png")
    for profile in ("vfimamba", "ema"):
        run("--model", model, "--data", tmp_path / "X4K", "--out", tmp_path / f"{profile}.json", "--protocol", "xtest_4k",
            "--profile", profile, "--allow_partial")  # fmt: skip
    found = {profile: read_results(tmp_path / f"{profile}.json") for profile in ("vfimamba", "ema")}
    keys = [image.key for image in found["ema"].models[0].images]
    assert keys == [f"{keys[0].partition('@')[0]}@{truth}" for truth in range(1, 8)]
    middle = {profile: results.models[0].images[3] for profile, results in found.items()}
    assert middle["ema"] == middle["vfimamba"]  # the first step of bisecting
    assert found["ema"].models[0].images[0] != found["vfimamba"].models[0].images[0]
    assert found["ema"].protocol["flow scale"] == "0.25"
    shards = tmp_path / "shards"
    x4k1000fps.make(x4k1000fps.Options(src=tmp_path / "X4K", out=shards, split="test"))
    run("--model", model, "--data", shards, "--out", tmp_path / "s.json", "--protocol", "xtest_4k", "--allow_partial")
    assert read_results(tmp_path / "s.json").rows == found["vfimamba"].rows


def test_what_is_not_the_published_set_is_refused(model, published, tmp_path, capsys):
    out = tmp_path / "r.json"
    flags = ("--model", model, "--out", out, "--protocol")
    assert "has 3 samples of UCF101, the published set has 379" in refused(capsys, *flags, "ucf101", "--data", published)
    assert "--protocol ucf102 does not exist: choose from vimeo90k" in refused(capsys, *flags, "ucf102", "--data", published)
    assert "its profile fixes the scale" in refused(capsys, *flags, *UCF[1:], "--data", published, "--scale", 0.5)
    for codec, arguments, words in (
        (
            "jpeg",
            (*flags, *UCF[1:]),
            "holds jpeg frames, not the published pixels: make png shards by `python -m shards.ucf101",
        ),
        ("copy", (*flags, "snu_film_hard"), "holds shards of shards.ucf101, not of SNU-FILM hard: make them by"),
    ):
        shards = tmp_path / codec
        ucf101.make(ucf101.Options(src=published, out=shards, codec=codec))
        assert words in refused(capsys, *arguments, "--data", shards)
    (published / "2" / "frame_02.png").rename(tmp_path / "away.png")
    assert "2/frame_02.png" in refused(capsys, *flags, *UCF[1:], "--data", published)
    (tmp_path / "away.png").rename(published / "2" / "frame_02.png")
    assert not out.exists()


def test_a_size_that_was_not_published_is_refused_unless_allowed(model, tmp_path, capsys, monkeypatch):
    for sample in range(2):
        folder = tmp_path / "set" / str(sample)
        folder.mkdir(parents=True)
        for name in ucf101.FRAMES:
            Image.fromarray(photograph(sample)).save(folder / name)
    small = dataclasses.replace(task.PROTOCOLS["ucf101"], count=2)
    monkeypatch.setitem(task.PROTOCOLS, "ucf101", small)
    flags = ("--model", model, "--data", tmp_path / "set", "--out", tmp_path / "r.json", "--protocol", "ucf101")
    assert "sample 0 is 40x56, the frames of UCF101 are 256x256" in refused(capsys, *flags)
    run(*flags, "--allow_partial")
    results = read_results(tmp_path / "r.json")
    assert results.protocol["frame set"] == "all samples; NOT COMPARABLE: frames of 40x56 instead of 256x256"
    Image.fromarray(photograph(0)[:-2]).save(tmp_path / "set" / "1" / "frame_00.png")
    assert "sample 1 has frames of different sizes: [(38, 56), (40, 56)]" in refused(capsys, *flags, "--allow_partial")


def test_odd_files_of_a_published_folder_are_one_line(model, published, tmp_path, capsys):
    flags = ("--model", model, "--out", tmp_path / "r.json", *UCF, "--data")
    shutil.copytree(published, tmp_path / "doubled" / "ucf101")
    path = tmp_path / "doubled" / "ucf101" / "1" / "frame_00.png"
    place = f"{tmp_path}/doubled holds the set one level deeper: give {tmp_path}/doubled/ucf101"
    assert refused(capsys, *flags, tmp_path / "doubled") == f"error: {place}"
    image = Image.open(path).convert("RGBA")
    image.putpixel((3, 3), (9, 9, 9, 0))
    image.save(path)
    assert f"{path} has transparent pixels" in refused(capsys, *flags, path.parents[1])
    for name in ucf101.FRAMES:
        Image.fromarray(photograph(0, height=31)).save(path.with_name(name))
    assert "sample 1 is 31x56: each side must be at least 32" in refused(capsys, *flags, path.parents[1])


ADAPTERS = """
def later(device):
    def interpolate(img0, img1, timestep, scale):
        assert (timestep, scale) == (0.5, None)
        return img0 * 0.25 + img1 * 0.75
    interpolate.parameters = 7
    return interpolate

def bytes_of(device):
    return lambda img0, img1, timestep, scale: (img0 * 255).byte()

def nothing(device):
    return None
"""


def test_a_model_of_another_repository_is_measured_in_the_same_way(model, published, tmp_path, monkeypatch, capsys):
    (tmp_path / "other_models.py").write_text(ADAPTERS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", [*sys.path])
    flags = ("--data", published, "--out", tmp_path / "r.json", *UCF)
    run("--model", "other_models:later", model, *flags)
    results = read_results(tmp_path / "r.json")
    row = results.models[0]
    assert (row.model, row.path, row.parameters, row.run, row.step) == ("other_models:later",) * 2 + (7, None, None)
    frames = [photograph(2 * number).astype(np.float64) for number in range(3)]
    expected = np.round(frames[0] * 0.25 + frames[2] * 0.75)
    assert row.images[0].psnr == pytest.approx(peak_signal_noise_ratio(frames[1], expected, data_range=255), abs=0.02)
    report([tmp_path / "r.json"], tmp_path / "report")
    text, page = ((tmp_path / "report" / name).read_text() for name in ("report.md", "report.html"))
    assert re.search(r"\| other\\_models:later \| .*\| 7 \|", text)
    assert re.search(r"\| EMA-VFI \| 35.48 \| 0.9701 \|.*TTA", text)
    assert re.search(r">EMA-VFI</td>.*35.48</td>.*0.9701</td>.*TTA</td>", page)
    assert "ucf101, profile vfimamba" in text
    for name, words in {
        "other_models:bytes_of": "gave [1, 3, 40, 56] torch.uint8 for frames [1, 3, 40, 56]: expected floats of the same shape",
        "other_models:nothing": "nothing(device) gave NoneType, expected a function",
        "other_models:missing": "has no function missing",
        "no_such_module:f": "No module named 'no_such_module'; start the job in the module's folder",
    }.items():
        assert words in refused(capsys, "--model", name, *flags)


def test_all_protocols_that_are_found_are_measured_and_the_others_named(model, published, tmp_path, capsys):
    root = tmp_path / "sets"
    (root / "a").mkdir(parents=True)
    (root / "a" / "ucf").symlink_to(published)
    clip = root / "X4K" / "test" / "Type1" / "TEST01"
    clip.mkdir(parents=True)
    for number in range(33):
        Image.fromarray(photograph(number, 64, 96)).save(clip / f"{number:04d}.png")
    broken = root / "middlebury" / "other-gt-interp" / "Beanbags"
    broken.mkdir(parents=True)
    Image.fromarray(photograph(0)).save(broken / "frame10i11.png")
    flags = ("--model", model, "--protocol", "all", "--data_root", root, "--out", tmp_path / "results", "--allow_partial")
    with pytest.raises(SystemExit) as ended:
        run(*flags, "--no-motion")
    assert ended.value.code == 1  # Middlebury is there and lacks files
    printed = capsys.readouterr().out
    found = ["ucf101", "xtest_2k", "xtest_4k", "xtest_l_2k", "xtest_l_4k"]
    assert sorted(path.stem for path in (tmp_path / "results").glob("*.json")) == found
    for name in found:
        assert f"{name}: {tmp_path / 'results' / name}.json" in printed
        assert read_results(tmp_path / "results" / f"{name}.json").protocol["protocol"] == name
    assert "middlebury: NOT MEASURED: " in printed
    assert "other-data" in printed
    for name in ("vimeo90k", "snu_film_hard", "xiph_4k"):
        assert f"{name}: not there" in printed
    several, one = (read_results(tmp_path / "results" / f"{name}.json") for name in ("xtest_4k", "xtest_l_4k"))
    assert all(row.psnr_of_changes is not None for row in several.rows)
    assert {row.psnr_of_changes for row in one.rows} == {None}
    shutil.rmtree(broken.parent)
    run(*flags, "--no-motion", "--profile", "rife")
    assert "xtest_4k: no profile rife" in capsys.readouterr().out
    assert "take --data_root" in refused(capsys, *flags[:4], "--out", tmp_path / "x").replace("takes", "take")
    assert "hold none of vimeo90k" in refused(capsys, *flags[:5], tmp_path / "results", "--out", tmp_path / "x")
    assert "give a folder" in refused(capsys, *flags[:6], "--out", tmp_path / "x.json")
    assert "is for --protocol all" in refused(capsys, "--model", model, "--data_root", root, "--out", tmp_path / "x.json")
    assert "--data is missing" in refused(capsys, "--model", model, "--out", tmp_path / "x.json")
