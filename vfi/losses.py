"""How far is a prediction from the truth, for training? L1 between Laplacian pyramids, and distances between flows."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from vfi.config.configs import OptimConfig
from vfi.ops.fused import takes_fused
from vfi.ops.precision import fp32_island

LEVELS = 5
_TEACHER_MARGIN = 0.01  # the teacher is followed where it is better by more than this (mean over colours); RIFE's value


class FlowStage(Protocol):
    """What one flow stage says: vfi.model.interpolator.Stage."""

    @property
    def flow(self) -> Tensor: ...
    @property
    def merge(self) -> Tensor: ...


class Predicted(Protocol):
    """What the losses read of a vfi.model.interpolator.Prediction."""

    @property
    def imgt(self) -> Tensor: ...
    @property
    def stages(self) -> Sequence[FlowStage]: ...
    @property
    def teacher(self) -> FlowStage | None: ...


def training_losses(
    prediction: Predicted, imgt: Tensor, config: OptimConfig, flow: tuple[Tensor, Tensor] | None = None
) -> dict[str, Tensor]:
    """The losses by name; `loss` is their weighted sum, the others are what they are before the weight.

    Args:
        prediction: of the model in training, with what its flow stages say.
        imgt: `[B, 3, H, W]`, the truth.
        flow: flow_t0 and flow_t1 `[B, 2, H, W]` to be learnt from (Exp-2e), in pixels.
    """
    teachers = [prediction.teacher] if prediction.teacher else []
    images = [prediction.imgt, *(stage.merge for stage in (*prediction.stages, *teachers))]
    of_each = laplacian_loss(torch.stack(images), imgt, config.loss_backend)  # all at once: it is dozens of small kernels
    losses = {"image": of_each[0]}
    total = losses["image"]
    if prediction.stages:
        losses["merge"] = of_each[1 : len(prediction.stages) + 1].sum()
        total = total + config.merge_weight * losses["merge"]
    if prediction.teacher is not None:
        losses["teacher_image"] = of_each[-1]
        losses["teacher"] = teacher_loss(prediction.stages, prediction.teacher, imgt)
        total = total + losses["teacher_image"] + config.teacher_weight * losses["teacher"]
    if flow is not None:
        target = torch.cat(flow, dim=1)
        losses["distill"] = len(prediction.stages) * end_point_error(_flows(prediction.stages), target).mean()
        total = total + config.distill_weight * losses["distill"]
    return {"loss": total} | losses


def teacher_loss(stages: Sequence[FlowStage], teacher: FlowStage, imgt: Tensor) -> Tensor:
    """Mean distance to the teacher's flow, in pixels, where the teacher's merge is clearly the better one (RIFE); the sum over
    the stages.
    """
    own = (torch.stack([stage.merge.detach() for stage in stages]) - imgt).abs().mean(2)
    of_teacher = (teacher.merge.detach() - imgt).abs().mean(1)
    better = (own > of_teacher + _TEACHER_MARGIN).unsqueeze(2)
    return len(stages) * (end_point_error(_flows(stages), teacher.flow.detach()) * better).mean()


def end_point_error(flow: Tensor, target: Tensor) -> Tensor:
    """`[..., B, 4, H, W]` (flow_t0, flow_t1) and `[B, 4, H, W]` -> `[..., B, 2, H, W]`: the length of each vector's difference
    in pixels, fp32.
    """
    difference = (flow.float() - target.float()).unflatten(-3, (2, 2))
    # the length has no gradient at zero
    return (difference.square().sum(-3) + 1e-6).sqrt()


def _flows(stages: Sequence[FlowStage]) -> Tensor:
    return torch.stack([stage.flow for stage in stages])


def laplacian_loss(prediction: Tensor, truth: Tensor, backend: str = "auto") -> Tensor:
    """Sum over five levels, and the coarse image left below them, of the mean absolute difference of the Laplacian pyramids.

    `[B, C, H, W]` twice, sides from 64 up -> `[]`; of N predictions `[N, B, C, H, W]` -> `[N]`. Source: the loss of EMA-VFI and
    VFIMamba (5 levels, 5x5 binomial filter, plain sum), which leaves the coarse image out: then nothing holds the mean colour.
    The pyramid is linear, so one pyramid of the difference does for two. `backend`: --loss_backend; float64 takes torch.
    """
    fused, _ = choose_loss(backend, truth.device)
    return fp32_island(_laplacian_loss, prediction, truth, fused)


@functools.cache
def choose_loss(backend: str, device: torch.device) -> tuple[bool, str]:
    """Is the pyramid made by kernels (vfi/ops/pyramid_kernels.py), and a line that says why."""
    return takes_fused("loss", backend, device)


def _laplacian_loss(prediction: Tensor, truth: Tensor, fused: bool = False) -> Tensor:
    if min(truth.shape[2:]) < 2 ** (LEVELS + 1):
        raise ValueError(f"images are {list(truth.shape[2:])}; {LEVELS} levels need sides of at least {2 ** (LEVELS + 1)}")
    several, difference = prediction.shape[:-4], prediction - truth
    if fused and difference.dtype == torch.float32:
        from vfi.ops.pyramid_kernels import pyramid_sizes

        return pyramid_sizes(difference.reshape(-1, *truth.shape), LEVELS).reshape(several)

    def size(band: Tensor) -> Tensor:
        return band.abs().reshape(*several, -1).mean(-1)

    current = difference.reshape(-1, *truth.shape[1:])
    sizes = []
    for _ in range(LEVELS):
        coarse = _shrunk(current)
        sizes.append(size(current - _expanded(coarse, current.shape)))
        current = coarse
    return torch.stack([*sizes, size(current)]).sum(0)


@functools.cache  # made anew they would be copied to the GPU, which waits for that, dozens of times a step
def _filters(channels: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """The 5x5 binomial filter for each channel, and what it does to zeros with a pixel in every second place of every second
    row, times four: one 3x3 filter of these pixels for each of the four places.
    """
    with torch.inference_mode(False):
        taps = torch.tensor([1, 4, 6, 4, 1], dtype=dtype, device=device) / 16
        between = torch.tensor([[1, 6, 1], [0, 4, 4]], dtype=dtype, device=device) / 8
        places = torch.einsum("ai,bj->abij", between, between).reshape(4, 1, 3, 3)
        return torch.outer(taps, taps).expand(channels, 1, 5, 5).contiguous(), places.repeat(channels, 1, 1, 1)


def _shrunk(x: Tensor) -> Tensor:
    """Half the size, rounded up: filtered, with edges reflected, then every second pixel."""
    channels = x.shape[1]
    return F.conv2d(_padded(x, (2, 2, 2, 2), "reflect"), _filters(channels, x.dtype, x.device)[0], stride=2, groups=channels)


def _expanded(coarse: Tensor, shape: torch.Size) -> Tensor:
    """Twice the size: zeros in between, then the filter with four times its weight, edges reflected there."""
    channels, (odd_h, odd_w) = coarse.shape[1], (side % 2 for side in shape[2:])
    # the edge lies on a pixel, or one place beyond it
    x = _padded(coarse, (1, odd_w, 1, odd_h), "reflect")
    x = _padded(x, (0, 1 - odd_w, 0, 1 - odd_h), "replicate")
    x = F.pixel_shuffle(F.conv2d(x, _filters(channels, x.dtype, x.device)[1], groups=channels), 2)
    return x[:, :, : shape[2], : shape[3]]


def _padded(x: Tensor, sides: tuple[int, int, int, int], mode: str) -> Tensor:
    """`F.pad(x, sides, mode)` for reflect and replicate, whose backward passes are not deterministic on a GPU."""
    if not torch.are_deterministic_algorithms_enabled():
        return F.pad(x, sides, mode)
    skipped = int(mode == "reflect")  # the edge itself is not repeated
    for axis, before, after in ((2, *sides[2:]), (3, *sides[:2])):
        end = x.shape[axis] - skipped
        x = torch.cat((x.narrow(axis, skipped, before).flip(axis), x, x.narrow(axis, end - after, after).flip(axis)), dim=axis)
    return x
