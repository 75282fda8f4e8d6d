"""The state of a training run: what a step changes, what a checkpoint holds and what a roll-back rebuilds.

run = Run(config, accelerator, strategy, loader, start, snapshot, schedule)
run.train_mode()
loss = run.model(img0, img1, timestep, imgt)…
run.advance()
snapshot = run.take_snapshot(score)
"""

from __future__ import annotations

import math

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch import nn

from vfi.checkpoint import store
from vfi.checkpoint.store import State
from vfi.config.configs import Config, ConfigError
from vfi.data.batch import FrameBatch
from vfi.data.loader import TrainingLoader
from vfi.data.sampler import Position
from vfi.distributed.gradients import layer_groups
from vfi.distributed.strategy import DDPStrategy
from vfi.model.compile import checkpoint_activations, compile_modules
from vfi.model.hyper_connections import annealing_factor
from vfi.model.interpolator import FrameInterpolator
from vfi.ops.loss.laplacian import choose_loss
from vfi.runtime.logging import logger
from vfi.tracking.environment import versions
from vfi.training.cuda_graphs import GraphRecorder, capture_graphs
from vfi.training.ema import Ema
from vfi.training.gradient_monitor import GradientMonitor
from vfi.training.optimizer import build_optimizer, carry_over, freeze
from vfi.training.resume import (
    ResumePoint,
    init_from_attention,
    load_initial_weights,
    load_own_weights,
    saved_position,
    starting_position,
)
from vfi.training.schedule import Schedule, changed_settings, refuse_shorter, resumed_schedule, total_steps
from vfi.training.state import Snapshot, gather_random, restore, scaler_state
from vfi.training.validation import Score


class Run:
    """Network, optimizer, data position and everything else that belongs to the state of a run.

    Built from `snapshot`, from the weights of `start`, or from scratch, by all processes together. `schedule`: that of this
    run already, which then resumes with the settings that it has had. ConfigError where the settings don't fit what is loaded
    or where they train.
    """

    def __init__(
        self,
        config: Config,
        accelerator: Accelerator,
        strategy: DDPStrategy,
        loader: TrainingLoader,
        start: ResumePoint,
        snapshot: Snapshot | None,
        schedule: Schedule | None = None,
    ) -> None:
        self.config, self.accelerator, self.strategy, self.loader = config, accelerator, strategy, loader
        set_seed(config.run.seed)
        self.network = FrameInterpolator(config.model, accelerator.device)
        self.choices = [*self.network.choices(), choose_loss(config.optim.loss_backend, accelerator.device)[1]]
        """A line about each backend that was selected."""
        saved_config = store.read_config(snapshot.path) if snapshot and snapshot.path and schedule is None else config
        self.changed = changed_settings(config, saved_config)
        """A line about each setting that differs from the checkpoint's."""
        if snapshot:
            self.step = load_own_weights(self.network, snapshot, self.changed)
        else:
            self.step = load_initial_weights(self.network, start, config)
        self.least_annealing = annealing_factor(self.network)  # read once: each read waits for the device
        if config.run.matvlm_plan != "off" and snapshot is None:
            init_from_attention(self.network, config)
        saved = saved_position(loader.plan, snapshot, self.step)
        # the checkpoint of the last frozen step still has a frozen backbone: it is unfrozen in the step after it
        self.frozen = config.optim.freeze_backbone > 0 and saved.position <= Position(config.optim.freeze_backbone)
        self.position = starting_position(loader.plan, saved)
        self.batches = loader.batches(self.position)
        self.upcoming: FrameBatch | None = None
        """A batch that was fetched ahead."""
        self.next_losses: dict[str, torch.Tensor] | None = None
        """Losses of `upcoming`, where its forward pass was started ahead."""
        self.total = total_steps(config, loader.plan, self.step, self.position)
        self.schedule = schedule or Schedule()
        if snapshot and schedule is None:
            refuse_shorter(config, saved_config, self.total, self.step, self.epoch)
            saved_total = total_steps(saved_config, loader.plan, self.step, self.position)
            self.schedule = resumed_schedule(snapshot.state, config, self.total, saved_config, saved_total)
        if self.frozen and start.path is None:
            raise ConfigError(
                f"--freeze_backbone {config.optim.freeze_backbone} would keep a backbone as it is that was never trained: "
                f"add --resume with the run of an earlier phase"
            )
        if self.frozen:
            freeze(self.network.backbone)
        self.parameters = sum(parameter.numel() for parameter in self.network.parameters())
        if config.compute.compile:
            compile_modules(self.network)
        if config.compute.checkpointing:
            checkpoint_activations(self.network)
        self.recorder = self._capture() if config.compute.cuda_graphs else None
        strategy.configure(config, self.frozen)
        self.model, self.optimizer = strategy.prepare(self.network, self._build_optimizer)
        self.ema = Ema(self.network, config.optim.ema) if config.optim.ema else None
        self.groups = layer_groups(self.network)
        self.monitor = GradientMonitor(self.groups, config.guard) if config.guard.guard else None
        if snapshot is not None:
            restore(accelerator, snapshot, strategy, self.ema, self.monitor)

    def _build_optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        return build_optimizer(model, self.config.optim, self.config.compute.cuda_graphs)

    def _capture(self) -> GraphRecorder:
        """Capture the network's passes as CUDA graphs; ConfigError where that is not possible."""
        device = self.accelerator.device.type
        if device != "cuda":
            raise ConfigError(f"--cuda_graphs is for a CUDA GPU, and this trains on {device}: leave it out")
        if self.strategy.name != "none":
            raise ConfigError(f"--cuda_graphs needs weights that stay where they are, and {self.strategy.name} moves them")
        return capture_graphs(self.network)

    def train_mode(self) -> None:
        """Switch to training mode, except for a frozen backbone."""
        self.model.train()
        if self.frozen:
            self.network.backbone.eval()

    def thaw(self) -> None:
        """Unfreeze the backbone: build a new optimizer that keeps the old one's state of the other parameters."""
        logger.info(f"step {self.step}: the backbone trains from now on")
        self.frozen = False
        old = self.optimizer.optimizer
        freeze(self.network.backbone, frozen=False)
        optimizer = self._build_optimizer(self.network)
        carry_over(old, optimizer)
        self.model, self.optimizer = self.strategy.rebuild_optimizer(self.network, optimizer)

    def advance(self) -> None:
        """Count a step, and move the position in the data past its samples."""
        self.step += 1
        self.position = self.loader.plan.after(self.position)

    @property
    def epoch(self) -> float:
        """The number of epochs seen so far."""
        return self.loader.plan.epochs_at(self.position)

    def learning_rate(self, step: int) -> float:
        """Return the learning rate of a step."""
        return self.schedule.rate(step, self.total, self.config.optim) * (self.monitor.rate_factor if self.monitor else 1)

    def take_snapshot(self, score: Score | None) -> Snapshot:
        """Return everything that the run needs to resume from here; its tensors are the ones being trained, not copies.

        `score`: that of the latest validation, which counts if it is of this step.
        """
        (epoch, done), order = self.position, self.loader.plan.order
        model, optimizer = self.strategy.weights(), self.strategy.optimizer_state()
        ema, updates = (self.strategy.gathered(self.ema.weights()), self.ema.updates) if self.ema else (None, 0)
        psnr = score.psnr if score and score.step == self.step and math.isfinite(score.psnr) else None
        guard = self.monitor.state_dict() if self.monitor else {}
        scaler = scaler_state(self.accelerator)
        state = State(self.step, epoch, done, order, psnr, updates, scaler, guard, versions(), *self.schedule)
        return Snapshot(None, state, model, optimizer, ema, gather_random(self.accelerator))
