"""Feature pyramid of the two frames: plain convolutions at strides 1, 2 and 4, LGS blocks at strides 8 and 16.

    frames [2B, 3, H, W], frame 0 of all pairs first  ->  levels 0 … 4: [2B, F * 2^l, H / 2^l, W / 2^l]

Features do not depend on the timestep: one pass serves any number of in-between frames. Source: the pyramid of EMA-VFI and
VFIMamba; the LGS (local-global synergy) block runs an interleaved scan and gated window attention in parallel.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from vfi.config.configs import ModelConfig
from vfi.model.channel_attention import fusion_block
from vfi.model.hyper_connections import residual_mixing, stage_ends
from vfi.model.layers import ConvPReLU, LayerNorm, scaled_conv
from vfi.model.ss2d import ss2d
from vfi.model.window_attention import GatedWindowAttention

LEVELS = 5
STRIDE = 2 ** (LEVELS - 1)  # height and width of the frames must be multiples of this


class LGSBlock(nn.Module):
    """Transform [2B, H, W, C] -> the same shape: x + branches(norm x), then x + fusion(norm x).

    With --mixing, input and output are streams [2B, H, W, n, C], and hyper-connections replace both sums. `index` is the
    position of the block in its stage: odd blocks shift their windows.
    """

    def __init__(self, dim: int, config: ModelConfig, index: int, device: torch.device) -> None:
        super().__init__()
        branches = {
            "ss2d": lambda: ss2d(dim, config, device),
            "attention": lambda: GatedWindowAttention(dim, config, bool(index % 2), device),
        }
        names = {
            "hybrid": ("ss2d", "attention"),
            "mamba2_only": ("ss2d",),
            "gated_attn_only": ("attention",),
        }[config.backbone_mode]
        self.norm1 = LayerNorm(dim)
        self.branches = nn.ModuleDict({name: branches[name]() for name in names})
        self.norm2 = LayerNorm(dim)
        self.fusion = fusion_block(dim, config.use_ecab)
        self.mixing1 = residual_mixing(dim, len(names), 2 * index, config)
        self.mixing2 = residual_mixing(dim, 1, 2 * index + 1, config)

    def forward(self, x: Tensor) -> Tensor:
        return self.mixing2(self.mixing1(x, self._local_and_global), self._fused)

    def _local_and_global(self, x: Tensor) -> Iterator[Tensor]:
        # autocast leaves layer norms in fp32, but the branches take half precision: cast once here instead of in every branch
        normed = self.norm1(x).to(x.dtype)
        for branch in self.branches.values():
            yield branch(normed)

    def _fused(self, x: Tensor) -> Iterator[Tensor]:
        yield self.fusion(self.norm2(x).to(x.dtype))


class HybridBackbone(nn.Module):
    """Compute the feature maps of all levels from the frames, finest level first."""

    def __init__(self, config: ModelConfig, device: torch.device) -> None:
        super().__init__()
        widths = level_widths(config)
        self.stem = nn.ModuleList(
            nn.Sequential(ConvPReLU(c_in, c_out, stride=1 if c_in == 3 else 2), ConvPReLU(c_out, c_out))
            for c_in, c_out in zip((3, *widths[:2]), widths[:3], strict=True)
        )
        self.down = nn.ModuleList(scaled_conv(widths[level - 1], widths[level], 3, stride=2) for level in (3, 4))
        self.stages = nn.ModuleList(
            nn.Sequential(*(LGSBlock(widths[level], config, i, device) for i in range(depth)))
            for level, depth in zip((3, 4), config.depths, strict=True)
        )
        self.open_streams, self.close_streams = stage_ends(config)
        self.norms = nn.ModuleList(LayerNorm(widths[level]) for level in (3, 4))

    def forward(self, frames: Tensor) -> list[Tensor]:
        features = []
        x = frames
        for stage in self.stem:
            x = stage(x)
            features.append(x)
        for down, stage, norm in zip(self.down, self.stages, self.norms, strict=True):
            x = self.close_streams(stage(self.open_streams(down(x).permute(0, 2, 3, 1))))
            features.append(norm(x).to(x.dtype).permute(0, 3, 1, 2))
            x = x.permute(0, 3, 1, 2)
        return features


def of_each_frame(t: Tensor) -> tuple[Tensor, Tensor]:
    """Split [2B, …] into the parts of frame 0 and of frame 1 of all pairs, [B, …] each.

    `chunk(2)` is avoided: when 2B is traced as a symbol, the size of its result is not known to be B.
    """
    pairs = t.shape[0] // 2
    frame0, frame1 = t.split([pairs, pairs])
    return frame0, frame1


def level_widths(config: ModelConfig) -> list[int]:
    """Return the number of channels at each level."""
    return [config.width * 2**level for level in range(LEVELS)]
