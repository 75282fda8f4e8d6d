"""Perceptual distance to the true frame in the features of VGG-19, as FILM trains with it: a content and a style term.

    perceptual = load_perceptual_loss(config.optim, device)          # None where both weights are 0
    found = perceptual(prediction, truth)                            # [B, 3, H, W] in [0, 1] twice
    (loss + found.total).backward()

FILM (Reda et al., arXiv 2202.04901; google-research/frame-interpolation) compares the features after conv1_2, conv2_2,
conv3_2, conv4_2 and conv5_2, with average in place of maximum pooling: their mean absolute difference (content, Chen and
Koltun, arXiv 1707.09405), and the mean squared difference of their Gram matrices (style, Gatys et al., arXiv 1508.06576). Its
weights of the stages are used here. Its VGG-19 takes images in 0..255, torchvision's is trained on images of mean 0 and spread
1; so where FILM divides by 255, features are multiplied by that spread: they then have the units of images in [0, 1].
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vfi.config.configs import OptimConfig
from vfi.errors import JobError
from vfi.io.published_weights import read_published
from vfi.runtime.numerics import tf32_convolutions

WEIGHTS_URL = "https://download.pytorch.org/models/vgg19-dcbb9e9d.pth"
_STAGES = {3: 1 / 2.6, 8: 1 / 4.8, 13: 1 / 3.7, 22: 1 / 5.6, 31: 10 / 1.5}
"""Number of the ReLU after a stage's convolution, among the layers of torchvision's VGG-19 -> weight of the stage."""
_MEAN, _SPREAD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of the images that torchvision trained it on
_UNIT = sum(_SPREAD) / 3


class PerceptualLosses(NamedTuple):
    """The terms of the loss, each the mean over a batch; only `total` has a gradient."""

    total: Tensor
    """The weighted sum of both terms."""
    content: Tensor
    style: Tensor


class PerceptualLoss:
    """Perceptual distance with the given weights of its terms; `layers` are the first 32 of VGG-19, frozen.

    Everything is computed in fp32, also under autocast; on a GPU the convolutions round their factors to 10 bits (TF32). The
    gradient is computed together with the loss, so no features are in memory during the backward pass of the network.
    """

    def __init__(self, layers: nn.Sequential, content_weight: float, style_weight: float) -> None:
        self.layers, self.content_weight, self.style_weight = layers, content_weight, style_weight

    def __call__(self, prediction: Tensor, truth: Tensor) -> PerceptualLosses:
        """Return the losses of `[B, 3, H, W]` in [0, 1] twice, with a gradient for `prediction`. H and W: multiples of 16."""
        wants_gradient = torch.is_grad_enabled() and prediction.requires_grad
        return PerceptualLosses(*_LossAndGradient.apply(prediction, truth, self, wants_gradient))

    def compute(self, prediction: Tensor, truth: Tensor) -> PerceptualLosses:
        """Return the losses from the features of both images; `truth` gets no gradient."""
        with torch.no_grad():
            expected = list(self._features(truth))
        content, style = prediction.new_zeros(()), prediction.new_zeros(())
        for weight, found, wanted in zip(_STAGES.values(), self._features(prediction), expected, strict=True):
            if self.content_weight:
                content = content + weight * _UNIT * (found - wanted).abs().mean()
            if self.style_weight:
                style = style + weight * F.mse_loss(_gram(found), _gram(wanted))
        return PerceptualLosses(self.content_weight * content + self.style_weight * style, content, style)

    def _features(self, image: Tensor) -> Iterator[Tensor]:
        """Yield the features of each stage, `[B, C, h, w]`."""
        mean, spread = (image.new_tensor(values).view(3, 1, 1) for values in (_MEAN, _SPREAD))
        x = ((image - mean) / spread).contiguous(memory_format=torch.channels_last)
        for number, layer in enumerate(self.layers):
            x = layer(x)
            if number in _STAGES:
                yield x


class _LossAndGradient(torch.autograd.Function):
    """The losses, and in the same pass the gradient of their weighted sum."""

    @staticmethod
    def forward(ctx: Any, prediction: Tensor, truth: Tensor, loss: PerceptualLoss, wants_gradient: bool) -> tuple[Tensor, ...]:
        dtype = torch.promote_types(prediction.dtype, torch.float32)
        leaf = prediction.detach().to(dtype).requires_grad_(wants_gradient)
        with (
            torch.autocast(prediction.device.type, enabled=False),
            tf32_convolutions(),
            torch.set_grad_enabled(wants_gradient),
        ):
            losses = loss.compute(leaf, truth.detach().to(dtype))
            if wants_gradient:
                (gradient,) = torch.autograd.grad(losses.total, leaf)
                ctx.save_for_backward(gradient.to(prediction.dtype))
        found = tuple(term.detach() for term in losses)
        ctx.mark_non_differentiable(*found[1:])
        return found

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * gradients[0].to(gradient.dtype), None, None, None


def load_perceptual_loss(config: OptimConfig, device: torch.device) -> PerceptualLoss | None:
    """Return the perceptual loss of a run with the weights of --vgg_weights, or torchvision's; None if --vgg_weight and
    --style_weight are 0.

    torchvision downloads its weights (548 MiB) once, into the folder of torch.hub. JobError where they, or torchvision, can't
    be had.
    """
    if not config.is_perceptual:
        return None
    loss = random_perceptual_loss(config, device)
    expected = {f"features.{name}": tensor for name, tensor in loss.layers.state_dict().items()}
    weights = read_published(Path(config.vgg_weights), expected, WEIGHTS_URL) if config.vgg_weights else _download()
    loss.layers.load_state_dict({name.removeprefix("features."): weights[name] for name in expected})
    return loss


def random_perceptual_loss(config: OptimConfig, device: torch.device) -> PerceptualLoss:
    """Return the perceptual loss of a run with random weights in VGG-19, to measure time and memory."""
    layers = _new_layers().requires_grad_(False).eval().to(device).to(memory_format=torch.channels_last)
    return PerceptualLoss(layers, config.vgg_weight, config.style_weight)


def _new_layers() -> nn.Sequential:
    """Return the layers of VGG-19 up to conv5_2, with random weights and average pooling. JobError without torchvision."""
    try:
        from torchvision.models import vgg19
    except ImportError as error:
        raise JobError("--vgg_weight and --style_weight need torchvision: pip install -e '.[perceptual]'") from error
    with torch.device("meta"):
        layers = vgg19().features[: max(_STAGES) + 1]
    layers.to_empty(device="cpu")
    for layer in layers:
        if isinstance(layer, nn.Conv2d):
            layer.reset_parameters()
    return nn.Sequential(*(nn.AvgPool2d(2) if isinstance(layer, nn.MaxPool2d) else layer for layer in layers))


def _download() -> dict[str, Tensor]:
    """Return torchvision's weights, from the folder of torch.hub or fetched into it."""
    from torchvision.models import VGG19_Weights

    try:
        weights: dict[str, Tensor] = VGG19_Weights.IMAGENET1K_V1.get_state_dict(check_hash=True)
    except (OSError, RuntimeError) as error:  # no network, no room; another hash
        raise JobError(
            f"the weights of VGG-19 could not be downloaded ({error}): fetch {WEIGHTS_URL} elsewhere and give the file by "
            f"--vgg_weights"
        ) from error
    return weights


def _gram(features: Tensor) -> Tensor:
    """Return the Gram matrices `[B, C, C]` of features `[B, C, h, w]`: the mean over positions of the products of channels."""
    flat = (features * _UNIT).flatten(2)
    return flat @ flat.transpose(1, 2) / flat.shape[2]
