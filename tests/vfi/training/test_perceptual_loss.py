"""The perceptual loss against a plain form in float64, on random weights, and in training."""

from __future__ import annotations

import json
import sys
import urllib.error
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from vgg_weights import BLOCKS, random_weights
from warm import TRAIN, finish, start_ranks

from vfi.config.configs import OptimConfig
from vfi.errors import JobError
from vfi.training import perceptual_loss
from vfi.training.losses import training_losses
from vfi.training.perceptual_loss import PerceptualLoss, load_perceptual_loss

CPU = torch.device("cpu")
BOTH = {"vgg_weight": 0.3, "style_weight": 2.0}
STAGE_WEIGHTS = (1 / 2.6, 1 / 4.8, 1 / 3.7, 1 / 5.6, 10 / 1.5)
MEAN, SPREAD = torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]], dtype=torch.float64).view(2, 3, 1, 1)
RUN = ["--preset", "tiny", "--width", "2", "--head_dim", "8", "--backbone_mode", "gated_attn_only", "--crop", "64",
       "--steps", "2", "--num_workers", "0", "--batch_size", "2", "--log_every", "1", "--warmup_steps", "2"]  # fmt: skip


@pytest.fixture(scope="module")
def file(tmp_path_factory) -> Path:
    """A file of random weights; not to be changed."""
    path = tmp_path_factory.mktemp("vgg") / "vgg19-dcbb9e9d.pth"
    torch.save(random_weights(), path)
    return path


def load(file: Path, **weights: float) -> PerceptualLoss:
    loss = load_perceptual_loss(OptimConfig(**weights, vgg_weights=str(file)), CPU)
    assert loss is not None
    return loss


def images(seed: int = 0, batch: int = 2, height: int = 48, width: int = 64) -> tuple[Tensor, Tensor]:
    """A prediction and a truth."""
    generator = torch.Generator().manual_seed(seed)
    prediction, truth = torch.rand(2, batch, 3, height, width, generator=generator)
    return prediction, truth


def plain_stages(image: Tensor) -> list[Tensor]:
    """The features after the second convolution of each block, in float64."""
    weights, stages, number = random_weights(), [], 0
    x = (image.double() - MEAN) / SPREAD
    for block in BLOCKS:
        for place in range(len(block)):
            kernel, bias = (weights[f"features.{number}.{kind}"].double() for kind in ("weight", "bias"))
            x = F.conv2d(x, kernel, bias, padding=1).clamp_min(0)
            number += 2
            if place == 1:
                stages.append(x)
        x = (x[:, :, ::2, ::2] + x[:, :, 1::2, ::2] + x[:, :, ::2, 1::2] + x[:, :, 1::2, 1::2]) / 4
        number += 1
    return stages


def plain_losses(prediction: Tensor, truth: Tensor) -> tuple[Tensor, Tensor]:
    """Content and style as their formulas state them, in float64."""
    unit = SPREAD.mean()
    content, style = torch.zeros((), dtype=torch.float64), torch.zeros((), dtype=torch.float64)
    for weight, x, y in zip(STAGE_WEIGHTS, plain_stages(prediction), plain_stages(truth), strict=True):
        content = content + weight * unit * (x - y).abs().mean()
        grams = [torch.einsum("bchw,bdhw->bcd", unit * f, unit * f) / f[0, 0].numel() for f in (x, y)]
        style = style + weight * (grams[0] - grams[1]).square().mean()
    return content, style


def test_losses_and_gradient_are_those_of_the_plain_form(file):
    prediction, truth = images()
    expected_at = prediction.double().requires_grad_()
    content, style = plain_losses(expected_at, truth)
    (expected,) = torch.autograd.grad(0.3 * content + 2.0 * style, expected_at)
    loss = load(file, **BOTH)
    # in fp32 some differences of features have another sign, and so has their gradient
    for dtype, exact, allowed in ((torch.float32, 2e-5, 1e-2), (torch.float64, 1e-12, 1e-12)):
        loss.layers.to(dtype)
        leaf = prediction.detach().clone().to(dtype).requires_grad_()
        found = loss(leaf, truth.to(dtype))
        torch.testing.assert_close(found.content.double(), content.detach(), rtol=exact, atol=0)
        torch.testing.assert_close(found.style.double(), style.detach(), rtol=exact, atol=0)
        torch.testing.assert_close(found.total, 0.3 * found.content + 2.0 * found.style)
        (7 * found.total).backward()
        assert leaf.grad is not None
        difference = (leaf.grad.double() / 7 - expected).norm() / expected.norm()
        print(f"{dtype}: content {content:.4f}, style {style:.4f}, gradient off by {difference:.1e}")
        assert difference < allowed
    assert expected.abs().max() > 1e-6


def test_each_term_alone(file):
    prediction, truth = images()
    both = load(file, **BOTH)(prediction, truth)
    content = load(file, vgg_weight=1.0)(prediction, truth)
    style = load(file, style_weight=1.0)(prediction, truth)
    assert (content.total, content.style) == (both.content, 0)
    assert (style.total, style.content) == (both.style, 0)
    assert load(file, **BOTH)(truth, truth).total == 0


def test_autocast_and_half_precision_do_not_reach_it(file):
    loss, (prediction, truth) = load(file, **BOTH), images()
    leaf = prediction.bfloat16().requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = loss(leaf, truth)
    outside = loss(leaf.detach().float(), truth)
    assert inside.total == outside.total
    inside.total.backward()
    assert leaf.grad is not None
    assert leaf.grad.dtype == torch.bfloat16


def test_neither_truth_nor_network_get_a_gradient_and_none_is_computed_for_nothing(file, monkeypatch):
    loss, (prediction, truth) = load(file, **BOTH), images()
    leaf, wanted = prediction.clone().requires_grad_(), truth.clone().requires_grad_()
    loss(leaf, wanted).total.backward()
    assert leaf.grad is not None
    assert wanted.grad is None
    assert not any(parameter.requires_grad for parameter in loss.layers.parameters())
    monkeypatch.setattr(torch.autograd, "grad", lambda *_: pytest.fail("nothing asks for a gradient"))
    assert not loss(prediction, truth).total.requires_grad
    with torch.no_grad():
        assert loss(leaf, truth).total > 0


class Predicted:
    """A prediction without flow."""

    stages, teacher = (), None

    def __init__(self, imgt: Tensor) -> None:
        self.imgt = imgt


def test_it_is_added_to_the_training_loss_and_its_terms_are_logged(file):
    prediction, truth = images(height=64)
    config = OptimConfig(**BOTH, vgg_weights=str(file))
    plain = training_losses(Predicted(prediction), truth, config)
    losses = training_losses(Predicted(prediction), truth, config, perceptual=load(file, **BOTH))
    assert list(losses) == ["loss", "image", "vgg", "style"]
    torch.testing.assert_close(losses["loss"], plain["loss"] + 0.3 * losses["vgg"] + 2.0 * losses["style"])
    only = training_losses(Predicted(prediction), truth, OptimConfig(vgg_weight=1.0), perceptual=load(file, vgg_weight=1.0))
    assert list(only) == ["loss", "image", "vgg"]


def test_without_it_nothing_is_loaded(monkeypatch):
    monkeypatch.setattr(perceptual_loss, "random_perceptual_loss", lambda *_: pytest.fail("loaded"))
    assert load_perceptual_loss(OptimConfig(), CPU) is None


def test_missing_torchvision_file_and_network(file, tmp_path, monkeypatch):
    with pytest.raises(JobError, match=r"away.pth is missing: it is published as https://download.pytorch.org/models/vgg19-"):
        load(tmp_path / "away.pth", vgg_weight=0.01)
    torch.save({"features.0.weight": torch.zeros(64, 3, 3, 3)}, tmp_path / "other.pth")
    with pytest.raises(JobError, match=r"other.pth is of something else: missing: features.0.bias, features.2.weight, "):
        load(tmp_path / "other.pth", vgg_weight=0.01)

    def refuse(*_, **__):
        raise urllib.error.URLError("no route to host")

    monkeypatch.setattr("torchvision.models.VGG19_Weights.get_state_dict", refuse)
    with pytest.raises(
        JobError, match=r"could not be downloaded \(.*no route.*\): fetch https://\S+ elsewhere and give the file"
    ):
        load_perceptual_loss(OptimConfig(vgg_weight=0.01), CPU)
    monkeypatch.setattr("torchvision.models.VGG19_Weights.get_state_dict", lambda *_, **__: random_weights())
    downloaded, given = load_perceptual_loss(OptimConfig(vgg_weight=1.0), CPU), load(file, vgg_weight=1.0)
    assert downloaded is not None
    assert downloaded(*images()).total == given(*images()).total
    monkeypatch.setitem(sys.modules, "torchvision.models", None)
    with pytest.raises(JobError, match=r"need torchvision: pip install -e '\.\[perceptual\]'"):
        load(file, vgg_weight=0.01)


def test_two_ranks_train_with_it_as_one_does(file, train_shards, tmp_path):
    """The terms are means over samples, so the mean over ranks is that over the global batch; nothing of VGG is saved."""
    flags = [
        *RUN,
        "--data_path",
        train_shards,
        "--vgg_weight",
        0.3,
        "--style_weight",
        0.5,
        "--vgg_weights",
        file,
        "--output_dir",
        tmp_path,
    ]
    finish(start_ranks(1, TRAIN, *flags, "--exp_name", "one", "--batch_size", 4))
    finish(start_ranks(2, TRAIN, *flags, "--exp_name", "two"))
    one, two = (
        [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()] for name in ("one", "two")
    )
    rows = [[row for row in run if row["event"] == "train"] for run in (one, two)]
    assert len(rows[0]) == 2
    for first, second in zip(*rows, strict=True):
        for name in ("loss", "vgg", "style", "image", "grad_norm"):
            assert second[name] == pytest.approx(first[name], rel=2e-4), name
        assert first["loss"] == pytest.approx(first["image"] + 0.3 * first["vgg"] + 0.5 * first["style"], rel=1e-4)
    size = next((tmp_path / "two" / "checkpoints").iterdir()).joinpath("model.safetensors").stat().st_size
    assert size < file.stat().st_size / 10


@pytest.mark.gpu
@pytest.mark.parametrize("autocast", [False, True])
def test_a_step_on_the_gpu_is_that_of_the_cpu(file, autocast):
    """TF32 rounds the factors of the convolutions, so that some differences of features have another sign."""
    prediction, truth = images(height=64)
    leaf, on_gpu = prediction.clone().requires_grad_(), prediction.cuda().requires_grad_()
    load(file, **BOTH)(leaf, truth).total.backward()
    loss = load_perceptual_loss(OptimConfig(**BOTH, vgg_weights=str(file)), torch.device("cuda"))
    assert loss is not None
    former = torch.backends.cudnn.allow_tf32
    with torch.autocast("cuda", torch.bfloat16, enabled=autocast):
        loss(on_gpu, truth.cuda()).total.backward()
    assert torch.backends.cudnn.allow_tf32 == former
    assert leaf.grad is not None
    assert on_gpu.grad is not None
    assert (on_gpu.grad.cpu() - leaf.grad).norm() < 3e-2 * leaf.grad.norm()
