"""Random weights of VGG-19 in the layout of torchvision's file."""

from __future__ import annotations

import torch
from torch import Tensor

# channels of the convolutions between two poolings
BLOCKS = ((64, 64), (128, 128), (256, 256, 256, 256), (512, 512, 512, 512), (512, 512))


def random_weights() -> dict[str, Tensor]:
    """Weights that keep the signal's size, under the names of torchvision's file, and some that are not used."""
    generator = torch.Generator().manual_seed(0)
    weights, number, inputs = {}, 0, 3
    for block in BLOCKS:
        for outputs in block:
            spread = (2 / (9 * inputs)) ** 0.5
            weights[f"features.{number}.weight"] = torch.randn(outputs, inputs, 3, 3, generator=generator) * spread
            weights[f"features.{number}.bias"] = 0.1 * torch.randn(outputs, generator=generator)
            number, inputs = number + 2, outputs  # a ReLU follows
        number += 1  # and after the block a pooling
    return weights | {"classifier.0.weight": torch.zeros(4, 4)}
