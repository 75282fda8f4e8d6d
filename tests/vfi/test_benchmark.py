"""vfi benchmark: numbers compared with scikit-image and scipy on the frames in the tars, pictures, and every error."""

import hashlib
import json
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import ndimage
from skimage.metrics import peak_signal_noise_ratio

from shards import synthetic
from vfi.benchmark import main
from vfi.checkpoint import store, weights
from vfi.config import presets
from vfi.evaluation.results import read_results
from vfi.evaluation.sample_images import error_map
from vfi.io.dataclass_json import to_json
from vfi.metrics.motion import estimate
from vfi.model.interpolator import FrameInterpolator
from vfi.profiling import costs

pytestmark = pytest.mark.usefixtures("one_thread")

SAMPLES = 5


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("data") / "val"
    synthetic.make(synthetic.Options(out=folder, samples=SAMPLES, size="40x52", split="val", flow=False, samples_per_shard=3))
    return folder


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    """Two runs with random weights; the first has two checkpoints."""
    folder = tmp_path_factory.mktemp("work") / "runs"
    for name, steps in (("first", (3, 7)), ("second", (5,))):
        config = presets.tiny()
        for step in steps:
            torch.manual_seed(step)
            model = FrameInterpolator(config.model)
            with torch.no_grad():  # a fresh model may well be the frame average: make it differ
                for parameter in model.parameters():
                    parameter.add_(0.02 * torch.randn_like(parameter))
            store.save(folder / name, store.State(step), config, model.state_dict(), {}, keep_last=2)
        (folder / name / "config.json").write_text(to_json(config))
    return folder


def _run(*arguments: object) -> None:
    main([str(argument) for argument in (*arguments, "--device", "cpu", "--workers", 0)])


def _frames(data: Path) -> dict[str, list[np.ndarray]]:
    """Key -> frames in [0, 1], float64 [H, W, 3], read without any code of the project."""
    frames: dict[str, list[np.ndarray]] = {}
    for path in sorted(data.glob("*.tar")):
        with tarfile.open(path) as tar:
            for member in sorted(tar.getnames()):
                if member.endswith(".png"):
                    image = np.asarray(Image.open(tar.extractfile(member))) / 255
                    frames.setdefault(member.partition(".")[0], []).append(image)
    return frames


def _ssim(x: np.ndarray, y: np.ndarray) -> float:
    """The definition by scipy's Gaussian over all three axes, colours among them."""

    def mean(volume: np.ndarray) -> np.ndarray:
        return ndimage.gaussian_filter(volume, 1.5, mode="nearest", radius=5)

    mx, my = mean(x), mean(y)
    vx, vy, cov = mean(x * x) - mx**2, mean(y * y) - my**2, mean(x * y) - mx * my
    return float(((2 * mx * my + 1e-4) * (2 * cov + 9e-4) / ((mx**2 + my**2 + 1e-4) * (vx + vy + 9e-4))).mean())


def test_numbers_are_those_of_independent_code(data, runs, tmp_path, capsys) -> None:
    out = tmp_path / "new" / "results.json"
    _run("--model", runs / "first", runs / "second", "--data", data, "--out", out)
    results = read_results(out)
    frames = _frames(data)
    assert [row.model for row in results.rows] == ["frame average", "nearest frame", "first", "second"]
    models = [None, None, *(weights.load_model(runs / name, torch.device("cpu"))[0] for name in ("first", "second"))]
    for row, model in zip(results.rows, models, strict=True):
        assert [image.key for image in row.images] == list(frames)
        for image, (img0, truth, img1) in zip(row.images, frames.values(), strict=True):
            prediction = img0 if row.model == "nearest frame" else (img0 + img1) / 2
            if model is not None:
                inputs = [torch.from_numpy(i).float().permute(2, 0, 1)[None] for i in (img0, img1)]
                with torch.no_grad():
                    prediction = model(*inputs, torch.tensor([0.5])).imgt[0].permute(1, 2, 0).double().numpy().clip(0, 1)
            assert image.psnr == pytest.approx(peak_signal_noise_ratio(truth, prediction, data_range=1), abs=1e-3)
            assert image.ssim == pytest.approx(_ssim(prediction, truth), abs=1e-5)
        assert row.psnr == pytest.approx(np.mean([image.psnr for image in row.images]))
        assert row.ssim == pytest.approx(np.mean([image.ssim for image in row.images]))
    assert len({row.psnr for row in results.rows}) == 4
    printed = capsys.readouterr().out
    for row in results.rows:
        assert f"{row.psnr:.3f}" in printed


def test_fp32_is_fp32(data, runs, tmp_path, monkeypatch) -> None:
    """Also in adapters, whose convolutions cuDNN would compute in TF32 by default."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    _run("--model", runs / "first", "--data", data, "--out", tmp_path / "results.json", "--limit", 1)
    assert not torch.backends.cudnn.allow_tf32
    assert not torch.backends.cuda.matmul.allow_tf32


def test_what_results_say_about_model_and_data(data, runs, tmp_path) -> None:
    out = tmp_path / "results.json"
    _run("--model", runs / "first", "--data", data, "--out", out, "--limit", 2)
    results = read_results(out)
    (row,) = results.models
    assert (row.step, row.preset, row.phase) == (7, "tiny", 1)
    counted = costs.count(FrameInterpolator(presets.tiny().model).eval(), 1, (40, 52), torch.float32)
    assert row.macs == sum(counted.macs.values()) > 1e6
    assert [other.macs for other in results.rows[:2]] == [None, None]
    assert row.parameters == sum(p.numel() for p in FrameInterpolator(presets.tiny().model).parameters())
    assert (out.parent / row.run).resolve() == (runs / "first").resolve()
    assert results.index_sha256 == hashlib.sha256((data / "index.json").read_bytes()).hexdigest()
    assert (results.samples, results.available) == (2, SAMPLES)
    assert [image.key for image in row.images] == list(_frames(data))[:2]
    assert results.protocol["frame set"] == f"the first 2 of {SAMPLES} samples"
    assert results.protocol["codec"] == "png"
    assert results.environment["precision"] == "fp32"
    assert f"--limit 2 --device cpu --workers 0" in results.environment["command"]  # noqa: F541


def test_bf16_is_done_and_stated(data, runs, tmp_path) -> None:
    for precision in ("fp32", "bf16"):
        arguments = ("--model", runs / "first", "--data", data, "--limit", 2, "--precision", precision, "--pictures", 0)
        _run(*arguments, "--out", tmp_path / f"{precision}.json")
    full, half = (read_results(tmp_path / f"{precision}.json") for precision in ("fp32", "bf16"))
    assert half.environment["precision"] == "bf16 autocast"
    assert half.rows[0].psnr == full.rows[0].psnr
    assert half.models[0].psnr != full.models[0].psnr
    assert half.models[0].psnr == pytest.approx(full.models[0].psnr, abs=0.3)


def test_two_checkpoints_of_a_run_get_names_of_their_own(data, runs, tmp_path) -> None:
    old = runs / "first" / "checkpoints" / "step_00000003"
    out = tmp_path / "results.json"
    _run("--model", runs / "first", old / "model.safetensors", "--data", data, "--out", out, "--limit", 1)
    assert [row.model for row in read_results(out).models] == ["first@7", "first@3"]


def test_pictures_span_worst_to_best_and_are_the_frames(data, runs, tmp_path) -> None:
    out = tmp_path / "results.json"
    _run("--model", runs / "first", "--data", data, "--out", out, "--pictures", 3)
    results = read_results(out)
    gains = {a.key: b.psnr - a.psnr for a, b in zip(results.rows[0].images, results.models[0].images, strict=True)}
    by_gain = sorted(gains, key=gains.__getitem__)
    assert [picture.key for picture in results.pictures] == [by_gain[0], by_gain[2], by_gain[4]]
    assert [picture.rank for picture in results.pictures] == [1, 3, 5]
    frames = _frames(data)
    for picture in results.pictures:
        shown = {name: _png(tmp_path / getattr(picture, name)) for name in ("img0", "truth", "img1", "average")}
        for name, frame in zip(("img0", "truth", "img1"), frames[picture.key], strict=True):
            np.testing.assert_array_equal(shown[name], np.rint(frame * 255))
        np.testing.assert_allclose(shown["average"], (shown["img0"] + shown["img1"]) / 2, atol=0.51)
        prediction = _png(tmp_path / picture.predictions["first"])
        score = next(image.psnr for image in results.models[0].images if image.key == picture.key)
        assert peak_signal_noise_ratio(shown["truth"], prediction, data_range=255) == pytest.approx(score, abs=0.1)
        assert _png(tmp_path / picture.errors["first"]).any()
    assert len(list((tmp_path / "results_pictures").iterdir())) == 3 * 7

    _run("--model", runs / "first", "--data", data, "--out", out, "--pictures", 1)
    assert len(list((tmp_path / "results_pictures").iterdir())) == 7
    _run("--model", runs / "first", "--data", data, "--out", out, "--pictures", 0)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["results.json"]


def _png(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path)).astype(np.float64)


def test_error_map_goes_from_black_to_white() -> None:
    truth = torch.zeros(1, 3, 1, 4)
    prediction = torch.tensor([0.0, 0.05, 0.25, 0.9]).expand(1, 3, 1, 4)
    colours = error_map(prediction, truth)[0].astype(int)
    assert colours[0].sum() < 10
    assert np.array_equal(colours[2], colours[3])
    assert colours[2].sum() > 700
    assert colours[0].sum() < colours[1].sum() < colours[2].sum()
    np.testing.assert_array_equal(error_map(truth, prediction), error_map(prediction, truth))


def _refusal(capsys, *arguments: object) -> str:
    with pytest.raises(SystemExit) as stop:
        _run(*arguments)
    assert stop.value.code == 2
    message = capsys.readouterr().err.strip().splitlines()
    assert len(message) == 1, message
    assert message[0].startswith("error: ")
    return message[0]


def test_a_missing_model_lists_the_runs_beside_it(data, runs, tmp_path, capsys) -> None:
    message = _refusal(capsys, "--model", runs / "frist", "--data", data, "--out", tmp_path / "r.json")
    assert "frist" in message
    assert "first, second" in message


def test_unusable_arguments_are_refused_in_one_line(data, runs, tmp_path, capsys) -> None:
    model, out = ("--model", runs / "first"), ("--out", tmp_path / "r.json")
    assert "does not exist" in _refusal(capsys, *model, "--data", tmp_path / "none", *out)
    assert "not a shard folder" in _refusal(capsys, *model, "--data", runs, *out)
    assert "is a folder" in _refusal(capsys, *model, "--data", data, "--out", tmp_path)
    assert "must end in .json" in _refusal(capsys, *model, "--data", data, "--out", tmp_path / "results")
    assert "is not a folder" in _refusal(capsys, *model, "--data", data, "--out", data / "index.json" / "r.json")
    assert "--limit 0" in _refusal(capsys, *model, "--data", data, *out, "--limit", 0)
    assert "must not be negative" in _refusal(capsys, *model, "--data", data, *out, "--pictures", -1)
    assert "same model twice" in _refusal(capsys, *model, runs / "first", "--data", data, *out)
    assert not (tmp_path / "r.json").exists()
    foreign = tmp_path / "r_pictures"
    foreign.mkdir()
    (foreign / "thesis.txt").write_text("kept")
    assert "holds something else" in _refusal(capsys, *model, "--data", data, *out)
    assert (foreign / "thesis.txt").read_text() == "kept"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_missing_gpu_is_refused(data, runs, tmp_path, capsys) -> None:
    with pytest.raises(SystemExit):
        main(["--model", str(runs / "first"), "--data", str(data), "--out", str(tmp_path / "r.json"), "--device", "cuda"])
    assert "no CUDA GPU" in capsys.readouterr().err


def test_a_model_that_predicts_nan_gets_no_score(data, runs, tmp_path, capsys) -> None:
    config = presets.tiny()
    model = FrameInterpolator(config.model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(torch.nan)
    run = tmp_path / "runs" / "broken"
    store.save(run, store.State(1), config, model.state_dict(), {})
    (run / "config.json").write_text(to_json(config))
    message = _refusal(capsys, "--model", run, "--data", data, "--out", tmp_path / "r.json")
    assert "not finite" in message
    assert not (tmp_path / "r.json").exists()


def test_a_damaged_sample_is_named_also_by_loader_processes(data, runs, tmp_path, capsys) -> None:
    copy = tmp_path / "data"
    copy.mkdir()
    for path in data.iterdir():
        if path.is_file():
            (copy / path.name).write_bytes(path.read_bytes())
    tar = copy / "shard-000000.tar"
    content = bytearray(tar.read_bytes())
    with tarfile.open(tar) as opened:
        member = next(m for m in opened if m.name.endswith("im2.png"))
    content[member.offset_data : member.offset_data + 64] = bytes(64)
    tar.write_bytes(bytes(content))
    with pytest.raises(SystemExit):
        main(["--model", str(runs / "first"), "--data", str(copy), "--out", str(tmp_path / "r.json"), "--workers", "1"])
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    assert member.name.partition(".")[0] in lines[0]
    assert "Traceback" not in lines[0]
    assert not (tmp_path / "r.json").exists()


def test_results_hold_plain_json(data, runs, tmp_path) -> None:
    out = tmp_path / "results.json"
    _run("--model", runs / "second", "--data", data, "--out", out, "--limit", 1, "--pictures", 0)
    content = json.loads(out.read_text(), parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert content["schema"] == "vfi-results"
    assert content["version"] == 3


@pytest.mark.parametrize(("scale", "message"), [(0.5, "is of phase 1, without flow"), (0.3, "choose from 1.0, 0.5, 0.25")])
def test_scale_is_for_models_with_flow(tmp_path, runs, data, capsys, scale, message):
    with pytest.raises(SystemExit) as error:
        _run("--model", runs / "first", "--data", data, "--out", tmp_path / "results.json", "--scale", scale)
    assert error.value.code == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_scale_reaches_the_model(tmp_path, data):
    """The same weights with flow at half and at full size score differently, and the result says which it was."""
    config = presets.override(presets.tiny(), phase=2)
    torch.manual_seed(0)
    model = FrameInterpolator(config.model)
    torch.nn.init.normal_(model.flow.stages[0].head.weight, std=0.1)
    store.save(tmp_path / "runs" / "moving", store.State(1), config, model.state_dict(), {})
    (tmp_path / "runs" / "moving" / "config.json").write_text(to_json(config))
    found = {}
    for scale in (1, 0.5):
        out = tmp_path / f"{scale}.json"
        _run("--model", tmp_path / "runs" / "moving", "--data", data, "--out", out, "--scale", scale, "--pictures", 0)
        results = read_results(out)
        assert results.protocol["flow scale"] == str(float(scale))
        found[scale] = results.models[0].psnr
    assert abs(found[1] - found[0.5]) > 1e-3


def test_motion_is_estimated_and_what_moves_is_scored_apart(data, runs, tmp_path):
    out = tmp_path / "results.json"
    _run("--model", runs / "first", "--data", data, "--out", out, "--pictures", 0)
    results = read_results(out)
    frames = _frames(data)
    assert len(results.motion) == SAMPLES
    for number, (img0, truth, img1) in enumerate(frames.values()):
        first, last = (torch.from_numpy(image).float().permute(2, 0, 1)[None] for image in (img0, img1))
        motion = estimate(first, last)
        assert results.motion[number] == pytest.approx(motion.length, rel=1e-4)
        moving = motion.moving[0, 0].numpy()
        error = ((img0 + img1) / 2 - truth)[moving]
        expected = -10 * np.log10(np.mean(error**2)) if moving.any() else None
        assert results.rows[0].images[number].psnr_moving == (None if expected is None else pytest.approx(expected, abs=1e-3))
    known = [image.psnr_moving for image in results.rows[0].images if image.psnr_moving is not None]
    assert results.rows[0].psnr_moving == pytest.approx(np.mean(known))
    _run("--model", runs / "first", "--data", data, "--out", out, "--pictures", 0, "--no-motion")
    without = read_results(out)
    assert without.motion == ()
    assert {row.psnr_moving for row in without.rows} == {None}
    assert [row.psnr for row in without.rows] == [row.psnr for row in results.rows]


def test_lpips_is_measured_where_its_weights_are(data, runs, tmp_path, capsys):
    out = tmp_path / "results.json"
    flags = ("--model", runs / "first", "--data", data, "--out", out, "--pictures", 0, "--limit", 1)
    _run(*flags)
    assert read_results(out).protocol["LPIPS"] == "not measured: --lpips FILE names its weights"
    assert "alexnet-owt-7be5be79.pth" in _refusal(capsys, *flags, "--lpips", tmp_path)


COUNTING = """
from pathlib import Path
CALLS = Path({calls!r})
STOP = Path({stop!r})

def counted(device):
    def interpolate(img0, img1, timestep, scale):
        with CALLS.open("a") as file:
            file.write("x")
        if STOP.exists() and len(CALLS.read_text()) > 3:
            raise KeyboardInterrupt
        return img0 * 0.3 + img1 * 0.7
    return interpolate
"""


def test_a_benchmark_that_was_stopped_goes_on(data, runs, tmp_path, monkeypatch):
    calls, stop = tmp_path / "calls", tmp_path / "stop"
    (tmp_path / "counting_models.py").write_text(COUNTING.format(calls=str(calls), stop=str(stop)))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", [*sys.path])
    flags = ("--model", "counting_models:counted", runs / "first", "--data", data, "--pictures", 0)
    stop.touch()
    with pytest.raises(SystemExit) as stopped:
        _run(*flags, "--out", tmp_path / "r.json")
    assert stopped.value.code == 130
    assert (tmp_path / "r_unfinished").is_dir()
    assert not (tmp_path / "r.json").exists()
    stop.unlink()
    calls.unlink()
    _run(*flags, "--out", tmp_path / "r.json")
    assert len(calls.read_text()) == SAMPLES - 3
    assert not (tmp_path / "r_unfinished").exists()
    _run(*flags, "--out", tmp_path / "whole.json")
    again, whole = (read_results(tmp_path / name) for name in ("r.json", "whole.json"))
    assert (again.rows, again.motion) == (whole.rows, whole.motion)


def test_several_processes_find_what_one_finds(data, runs, tmp_path):
    flags = ["--model", runs / "first", "--data", data, "--pictures", 2, "--device", "cpu", "--workers", 0]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2])}
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m", "vfi.benchmark"]
    command = [str(part) for part in (*launch, *flags, "--out", tmp_path / "two.json")]
    ended = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120, check=False)
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.count("results:") == 1
    _run(*flags, "--out", tmp_path / "one.json")
    two, one = (read_results(tmp_path / name) for name in ("two.json", "one.json"))
    assert two.environment["processes"] == "2"
    assert (two.rows, two.motion) == (one.rows, one.motion)
    assert [picture.key for picture in two.pictures] == [picture.key for picture in one.pictures]
    assert not (tmp_path / "two_unfinished").exists()
