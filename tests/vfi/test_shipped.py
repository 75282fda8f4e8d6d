"""The shipped model is used where no model is named, says what it is, and never replaces one that is named."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from made_videos import new_run
from PIL import Image
from safetensors.torch import load_file

from launch import preflight
from vfi import FrameInterpolator, benchmark, interpolate, shipped
from vfi.checkpoint import pretrained_folder
from vfi.config import command_line, presets
from vfi.config.configs import ConfigError
from vfi.errors import CheckpointError
from vfi.evaluation.results import read_results
from vfi.model.interpolator import FrameInterpolator as Network
from vfi.shipped import FILES, SUMS
from vfi.training import trainer as trainer_module
from vfi.video.app_session import Session

pytestmark = pytest.mark.usefixtures("one_thread")

STEP = 7


def write_sums(folder: Path) -> None:
    lines = [f"{hashlib.sha256((folder / name).read_bytes()).hexdigest()}  {name}\n" for name in FILES]
    (folder / SUMS).write_text("".join(lines))


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """A small network in fp16 in place of the shipped one; not to be changed."""
    folder = tmp_path_factory.mktemp("made") / "small"
    folder.mkdir()
    torch.manual_seed(0)
    network = Network(presets.override(presets.tiny(), phase=2).model)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.01 * torch.randn_like(parameter))
    origin = pretrained_folder.Origin("p2", "small", STEP, True, ("own photographs", "a", "b", "c", "d"), "apache-2.0")
    pretrained_folder.write_model(folder, network, origin, "fp16")
    (folder / "README.md").write_text("the card")
    write_sums(folder)
    return folder


@pytest.fixture
def folder(made, tmp_path, monkeypatch) -> Path:
    """The folder of the shipped model, which a test may damage; ./runs has a run, and two images are a.png and b.png."""
    place = Path(shutil.copytree(made, tmp_path / "package" / "small"))
    monkeypatch.setattr(shipped, "FOLDER", place)
    new_run(tmp_path / "runs" / "mine", noise=0.005, step=4)
    for seed, name in enumerate(("a.png", "b.png")):
        Image.fromarray(np.random.default_rng(seed).integers(0, 256, (40, 48, 3), np.uint8)).save(tmp_path / name)
    monkeypatch.chdir(tmp_path)
    return place


def call(*arguments: object) -> None:
    interpolate.main(["a.png", "b.png", "-o", "mid.png", "--device", "cpu", *map(str, arguments)])


def refused(capsys, *arguments: object) -> str:
    """The only line that a refusal prints; nothing was written."""
    with pytest.raises(SystemExit) as stop:
        call(*arguments)
    assert stop.value.code == 2
    assert not Path("mid.png").exists()
    captured = capsys.readouterr()
    assert captured.out == ""
    (line,) = captured.err.splitlines()
    return line


def image(path: str) -> torch.Tensor:
    return torch.from_numpy(np.asarray(Image.open(path)) / 255).float().permute(2, 0, 1)[None]


def expected(folder: Path) -> torch.Tensor:
    """What the network makes of the two images with these weights in fp32."""
    network = Network(presets.override(presets.tiny(), phase=2).model).eval()
    network.load_state_dict({name: tensor.float() for name, tensor in load_file(folder / "model.safetensors").items()})
    with torch.no_grad():
        return network(image("a.png"), image("b.png"), torch.tensor([0.5])).imgt.clamp(0, 1)


@pytest.mark.parametrize("arguments", [(), ("--model", "shipped")])
def test_interpolate_takes_it_although_there_is_a_run(folder, capsys, arguments) -> None:
    call(*arguments)
    captured = capsys.readouterr()
    assert f"by shipped-small at step {STEP} (cpu, fp32)" in captured.out
    (line,) = captured.err.splitlines()
    size = (folder / "model.safetensors").stat().st_size / 1e6
    parameters = sum(tensor.numel() for tensor in load_file(folder / "model.safetensors").values()) / 1e6
    assert line == (
        f"note: the shipped model is used: small, phase 2 ({parameters:.1f} M parameters, {size:.1f} MB), licence apache-2.0, "
        "trained on own photographs, a, b, 2 more; to use a model of yours, name it, such as runs/NAME"
    )
    np.testing.assert_allclose(image("mid.png"), expected(folder), atol=0.501 / 255)


def test_a_run_that_is_named_is_taken(folder, capsys) -> None:
    call("--model", "runs/mine")
    captured = capsys.readouterr()
    assert "by mine at step 4" in captured.out
    assert "shipped" not in captured.err


def test_a_program_gets_it_without_a_name(folder) -> None:
    """Half precision is how weights are stored, not how they are computed with."""
    model = FrameInterpolator.from_pretrained(device="cpu")
    assert {tensor.dtype for tensor in load_file(folder / "model.safetensors").values()} == {torch.float16}
    assert {parameter.dtype for parameter in model.network.parameters()} == {torch.float32}
    torch.testing.assert_close(model(image("a.png"), image("b.png")), expected(folder), rtol=0, atol=1e-6)


@pytest.mark.gpu
@pytest.mark.parametrize(("precision", "allowed"), [("fp32", 1e-3), ("bf16", 0.05)])
def test_a_gpu_computes_in_the_precision_that_is_asked_for(folder, precision, allowed) -> None:
    model = FrameInterpolator.from_pretrained(device="cuda", precision=precision)
    assert {parameter.dtype for parameter in model.network.parameters()} == {torch.float32}
    assert precision in repr(model)
    torch.testing.assert_close(model(image("a.png"), image("b.png")), expected(folder), rtol=0, atol=allowed)


def test_the_page_takes_it(folder, tmp_path) -> None:
    assert Session(None, "cpu", "fp32", tmp_path / "page").about == f"shipped-small, step {STEP} · cpu, fp32"


def test_a_benchmark_takes_it_by_name(folder, val_shards, tmp_path) -> None:
    flags = ["--data", val_shards, "--out", tmp_path / "r.json", "--limit", 1, "--pictures", 0, "--workers", 0, "--no-motion"]
    benchmark.main(["--model", "shipped", "runs/mine", *map(str, flags), "--device", "cpu"])
    assert [(row.model, row.step) for row in read_results(tmp_path / "r.json").models] == [("shipped-small", STEP), ("mine", 4)]


@pytest.mark.parametrize("flag", ["--start_from", "--resume"])
def test_training_starts_from_it(folder, train_shards, tmp_path, flag, capsys) -> None:
    words = ["--preset", "tiny", "--phase", 2, "--data_path", train_shards, "--num_workers", 0, "--crop", 64, "--steps", 1]
    trainer = trainer_module.Trainer(command_line.from_command_line([*map(str, words), flag, "shipped"]))
    weights = load_file(folder / "model.safetensors")
    for name, tensor in trainer.live.network.state_dict().items():
        assert tensor.dtype == torch.float32
        assert torch.equal(tensor, weights[name].float())
    assert f"starting from the weights of {folder} (step {STEP})" in capsys.readouterr().out


def test_a_submission_may_start_from_it(folder, train_shards) -> None:
    words = ["--preset", "tiny", "--data_path", str(train_shards), "--start_from", "shipped"]
    config = command_line.from_command_line(words)
    preflight.check(config, processes=1)
    shutil.rmtree(folder)
    with pytest.raises(ConfigError, match=f"no run or checkpoint 'shipped' to start from: looked at {folder}"):
        preflight.check(config, processes=1)


def test_it_has_no_revisions(folder) -> None:
    with pytest.raises(CheckpointError, match="revision 'v1' is for a model on the hub"):
        FrameInterpolator.from_pretrained(revision="v1")


# what is wrong with it


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def rewrite(folder: Path, **changes: object) -> None:
    """Another config.json, with checksums that fit."""
    content = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps(content))
    write_sums(folder)


AGAIN = "Install the project again (in a checkout: git checkout -- "
DAMAGE: dict[str, tuple[Callable[[Path], object], list[str]]] = {
    "not in the package": (shutil.rmtree, ["has no shipped model", "Install a wheel or a checkout", "--model runs/NAME"]),
    "a changed bit": (
        lambda f: flip_a_bit(f / "model.safetensors"),
        ["is damaged: model.safetensors is not what was shipped (its sha256 differs)", AGAIN],
    ),
    "a changed setting": (
        lambda f: (f / "config.json").write_text("{}"),
        ["is damaged: config.json is not what was shipped", AGAIN],
    ),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), ["is damaged: model.safetensors is missing", AGAIN]),
    "two files missing": (
        lambda f: [(f / name).unlink() for name in ("model.safetensors", "README.md")],
        ["is damaged: README.md is missing, model.safetensors is missing"],
    ),
    "no checksums": (lambda f: (f / SUMS).unlink(), [f"is damaged: {SUMS} cannot be read", AGAIN]),
    "checksums of nothing": (
        lambda f: (f / SUMS).write_text(""),
        [f"{SUMS} does not list README.md, {SUMS} does not list config.json, {SUMS} does not list model.safetensors"],
    ),
    "checksums of bytes": (lambda f: (f / SUMS).write_bytes(b"\xff\xfe"), [f"{SUMS} cannot be read", AGAIN]),
    "a later schema": (
        lambda f: rewrite(f, version=2, written_by="vfi-training-stack 9.1"),
        ["is of schema version 2, written by vfi-training-stack 9.1", "install the version of the project that wrote it"],
    ),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_one_line_says_what_is_wrong_and_what_to_do(folder, capsys, case) -> None:
    damage, parts = DAMAGE[case]
    damage(folder)
    line = refused(capsys)
    assert line.startswith("error: ")
    assert str(folder) in line
    for part in parts:
        assert part in line
    with pytest.raises(CheckpointError) as raised:
        FrameInterpolator.from_pretrained()
    assert str(raised.value) in line


@pytest.mark.parametrize("model", ["runs/mien", "mien", "package", "a.png", "org/none/x"])
def test_a_name_that_leads_nowhere_is_an_error_and_not_the_shipped_model(folder, capsys, model) -> None:
    line = refused(capsys, "--model", model)
    assert line.startswith("error: ")
    assert model in line
    assert "shipped" not in line


def test_a_damaged_run_is_an_error_and_not_the_shipped_model(folder, capsys, tmp_path) -> None:
    flip_a_bit(tmp_path / "runs/mine/checkpoints/step_00000004/model.safetensors")
    line = refused(capsys, "--model", "runs/mine")
    assert "step_00000004 is damaged: model.safetensors" in line
    assert "shipped" not in line


def test_a_run_is_fine_without_it(folder, capsys) -> None:
    shutil.rmtree(folder)
    call("--model", "runs/mine")
    assert "by mine at step 4" in capsys.readouterr().out


def test_the_word_is_taken_for_nothing_else(folder, tmp_path) -> None:
    """A run of that name has a path."""
    (tmp_path / "runs" / "mine").rename(tmp_path / "runs" / "shipped")
    assert "step 4" in repr(FrameInterpolator.from_pretrained("runs/shipped"))
    assert f"step {STEP}" in repr(FrameInterpolator.from_pretrained("shipped"))
