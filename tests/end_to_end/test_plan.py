"""Every line of docs/plan.md, run at tiny size on imitations of the published folders."""

from __future__ import annotations

import importlib
import re
import shlex
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from vgg_weights import random_weights
from warm import ROOT

from vfi import cli
from vfi.checkpoint.store import latest
from vfi.config import presets

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_thread")]
TINY = ["--width", "2", "--head_dim", "8", "--d_state", "8", "--crop", "64", "--batch_size", "2", "--num_workers", "0",
        "--steps", "2", "--log_every", "1", "--warmup_steps", "1", "--val_samples", "1"]  # fmt: skip
LAUNCH = "accelerate launch --config_file "


def commands() -> list[str]:
    """The lines of all blocks of the page, in their order."""
    blocks = re.findall(r"```bash\n(.*?)```", (ROOT / "docs" / "plan.md").read_text(), flags=re.DOTALL)
    return [line for block in blocks for line in block.splitlines()]


def write_images(folder: Path, names: Sequence[str], size: tuple[int, int] = (72, 88)) -> None:
    """A picture that moves by a pixel from one file to the next."""
    folder.mkdir(parents=True)
    picture = np.asarray(Image.fromarray(np.random.default_rng(len(folder.name)).integers(0, 255, (12, 32, 3), dtype=np.uint8))
                         .resize((size[1] + 80, size[0]), Image.Resampling.BICUBIC))  # fmt: skip
    for shift, name in enumerate(names):
        Image.fromarray(picture[:, shift : shift + size[1]]).save(folder / name, compress_level=1)


@pytest.fixture
def published(tmp_path, monkeypatch) -> Path:
    """Folders in the published layouts, and files of weights, in the working directory."""
    for kind, prefix, frames in (("septuplet", "sep", 7), ("triplet", "tri", 3)):
        root, clips = tmp_path / f"vimeo_{kind}", ["00001/0001", "00001/0002", "00001/0003", "00002/0001", "00002/0002"]
        for clip in clips:
            write_images(root / "sequences" / clip, [f"im{number}.png" for number in range(1, frames + 1)])
        (root / f"{prefix}_trainlist.txt").write_text("\n".join(clips[:4]) + "\n")
        (root / f"{prefix}_testlist.txt").write_text(clips[4] + "\n")
    for clip in ("002/occ008.320", "010/occ1.1"):
        write_images(tmp_path / "X4K1000FPS" / "train" / clip, [f"{number:04d}.png" for number in range(65)], (128, 128))
    torch.save(random_weights(), tmp_path / "vgg.pth")
    torch.save(importlib.import_module("torchvision.models.optical_flow").raft_large().state_dict(), tmp_path / "raft.pth")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(line: str) -> None:
    """Run a line of the page, smaller."""
    if line.startswith(LAUNCH):
        config, _, line = line.removeprefix(LAUNCH).partition(" ")
        assert (ROOT / config).is_file()
        line = line.replace("-m vfi.train", "vfi train")
    words = shlex.split(line, comments=True)
    if words[:2] == ["python", "-m"]:
        more = ["--weights", "raft.pth", "--iterations", "1", "--device", "cpu"] if words[2] == "shards.flow" else []
        assert importlib.import_module(words[2]).main([*words[3:], *more]) == 0
        return
    assert words[0] == "vfi"
    arguments = words[1:]
    if arguments[0] == "train":
        if "--epochs" in arguments:
            at = arguments.index("--epochs")
            del arguments[at : at + 2]
        curriculum = ["--curriculum_crops", "64", "80", "96"] if "--curriculum" in arguments or "Exp-3d" in arguments else []
        perceptual = ["--vgg_weights", "vgg.pth"] if "--vgg_weight" in arguments else []
        arguments += [*TINY, *curriculum, *perceptual]
    if arguments[0] == "benchmark":
        arguments += ["--device", "cpu", "--pictures", "0", "--no-motion", "--workers", "0"]
    cli.main(arguments)


def test_every_command_of_the_plan_runs(published, capsys):
    torch.manual_seed(0)
    for line in commands():
        run(line)
    printed = capsys.readouterr().out
    runs = published / "runs"
    for name in ("phase1", "phase2", "phase3", "phase1_vgg", "phase1_triplet"):
        checkpoint = latest(runs / name)
        assert checkpoint is not None
        assert checkpoint.step == 2
    started = [line for line in printed.splitlines() if line.startswith("starting from the weights of")]
    assert len(started) == 2 + 4 + 3
    gates = {line.split("  ")[0] for line in printed.splitlines() if "  PSNR of Exp-1c above that of Exp-1" in line}
    assert gates <= {"passed", "NOT passed"}
    assert gates


def test_the_page_has_every_experiment_and_only_those_that_exist():
    named = set(re.findall(r"--preset (\S+)", "\n".join(commands())))
    assert named - {"base"} == set(presets.ABLATIONS) - {"Exp-3a"}  # which is a benchmark
