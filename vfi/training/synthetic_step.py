"""A training step on random frames, to measure time and memory."""

from __future__ import annotations

import torch
from torch import Tensor

from vfi.config.configs import Config
from vfi.model.compile import checkpoint_activations, compile_modules
from vfi.model.interpolator import FrameInterpolator
from vfi.ops.triton.precompile import compiling_ahead
from vfi.training.cuda_graphs import GraphRecorder, capture_graphs
from vfi.training.losses import training_losses
from vfi.training.optimizer import build_optimizer
from vfi.training.perceptual_loss import random_perceptual_loss

PRECISIONS = {"no": torch.float32, "fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class TrainingStep:
    """Forward, loss, backward and AdamW of a new network: `step(step.make_frames())`. Frames are random, of the largest crop.

    `accumulating`: the gradient of earlier batches is in memory, too; `weights`: size of the weights in bytes.
    """

    def __init__(self, config: Config, device: torch.device, precision: torch.dtype, accumulating: bool = False) -> None:
        self.config, self.device, self.precision, self.accumulating = config, device, precision, accumulating
        self.model = FrameInterpolator(config.model, device).train()
        if config.compute.compile:
            compile_modules(self.model)
        if config.compute.checkpointing:
            checkpoint_activations(self.model)
        self.perceptual = random_perceptual_loss(config.optim, device) if config.optim.is_perceptual else None
        self.recorder: GraphRecorder | None = None
        self.optimizer = build_optimizer(self.model, config.optim, config.compute.cuda_graphs)
        self.weights = sum(parameter.nbytes for parameter in self.model.parameters())

    def make_frames(self) -> tuple[Tensor, ...]:
        """Return random img0, imgt, img1 `[B, 3, crop, crop]` in [0, 1) and timestep `[B]`."""
        batch, crop = self.config.data.batch_size, self.config.data.largest_crop
        frames = torch.rand(3, batch, 3, crop, crop, device=self.device)
        return (*frames, torch.rand(batch, device=self.device) * 0.8 + 0.1)

    def compile_ahead(self) -> None:
        """Compile the fused Triton kernels in parallel, where they are used, rather than one by one in the first step.

        No results of this step are kept, as its values are meaningless. It must not reach mamba-ssm's kernels, which are tuned
        by running them, nor run under --compile, which launches kernels by itself.
        """
        if self.config.compute.compile or not self.model.all_fused:
            return
        with compiling_ahead(self.device):
            self.loss(self.make_frames()).backward()
        self.optimizer.zero_grad(set_to_none=True)

    def __call__(self, frames: tuple[Tensor, ...]) -> None:
        if self.config.compute.cuda_graphs and self.recorder is None:
            self.recorder = capture_graphs(self.model)  # only after compiling ahead, during which no kernel may run
        self.loss(frames).backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=not self.accumulating)

    def loss(self, frames: tuple[Tensor, ...]) -> Tensor:
        """Return the training loss of a forward pass."""
        img0, imgt, img1, timestep = frames
        with torch.autocast(self.device.type, self.precision, enabled=self.precision != torch.float32):
            prediction = self.model(img0, img1, timestep, imgt)
            return training_losses(prediction, imgt, self.config.optim, perceptual=self.perceptual)["loss"]
