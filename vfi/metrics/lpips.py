"""Perceptual distance of two images: LPIPS v0.1 with AlexNet, 0 for equal images, larger for less similar ones.

    lpips = load_lpips(Path("alexnet-owt-7be5be79.pth"), device)
    lpips(prediction, truth)                             # [B, 3, H, W] in [0, 1] twice -> [B]

The network and the weights of its features are those of the authors' package `lpips` (Zhang et al., The Unreasonable
Effectiveness of Deep Features as a Perceptual Metric, arXiv 1801.03924). AlexNet's weights (233 MiB) come from a file that
torchvision publishes. Nothing is downloaded.
"""

from __future__ import annotations

import warnings
from pathlib import Path

import torch
from torch import Tensor, nn

from vfi.errors import JobError
from vfi.io.published_weights import read_published
from vfi.ops.precision import fp32_island

MIN_SIDE = 31
"""Minimum height and width in pixels: below it nothing is left for the second pooling."""

_NAME = "alexnet-owt-7be5be79.pth"
_ORIGIN = f"https://download.pytorch.org/models/{_NAME}"


class Lpips(nn.Module):
    """Distance of two images in the features of AlexNet's five stages, computed by `network`, an `lpips.LPIPS`."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, prediction: Tensor, truth: Tensor) -> Tensor:
        """Return the distance of `[B, 3, H, W]` in [0, 1] twice -> `[B]`, non-negative and symmetric.

        It is computed in fp32, also under autocast. On a GPU the convolutions run in TF32 if vfi.runtime.numerics allows it.
        Values are neither rounded nor clamped. Raises ValueError for other shapes and sides below MIN_SIDE.
        """
        if prediction.shape != truth.shape or prediction.ndim != 4 or prediction.shape[1] != 3:
            raise ValueError(f"expected two tensors [B, 3, H, W], got {tuple(prediction.shape)} and {tuple(truth.shape)}")
        H, W = truth.shape[2:]
        if min(H, W) < MIN_SIDE:
            raise ValueError(f"images are {H}×{W} (height × width); AlexNet's stages need sides of at least {MIN_SIDE}")
        return fp32_island(self.network, prediction.float(), truth.float(), normalize=True).flatten()


def load_lpips(path: Path, device: torch.device) -> Lpips:
    """Return LPIPS with AlexNet's published weights from `path`, the file or its folder, frozen, in eval mode on `device`.

    Raises JobError without the package lpips, and as `read_published` does.
    """
    try:
        import lpips
    except ImportError as error:
        raise JobError("LPIPS needs the packages lpips and torchvision: pip install -e '.[perceptual]'") from error
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # lpips 0.1.4 calls torchvision by an argument that is deprecated
        network = lpips.LPIPS(net="alex", pnet_rand=True, verbose=False)  # random: the weights are read below
    features = {f"features.{name.partition('.')[2]}": tensor for name, tensor in network.net.state_dict().items()}
    weights = read_published(path / _NAME if path.is_dir() else path, features, _ORIGIN)
    with torch.no_grad():
        for name, tensor in features.items():
            tensor.copy_(weights[name])
    return Lpips(network).requires_grad_(False).eval().to(device)
