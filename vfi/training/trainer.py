"""The trainer of one run: every step from a batch to a checkpoint."""

from __future__ import annotations

import contextlib
import functools
import math
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple, NoReturn

import psutil
import torch
from accelerate.utils import gather_object
from torch import Tensor
from tqdm import tqdm

from shards.factories import call_factory
from vfi.checkpoint import store
from vfi.config.configs import KNOWN_STEPS, Config, ConfigError, accumulation
from vfi.data.bad_samples import BadSampleCounts, BadSampleMonitor
from vfi.data.batch import FrameBatch
from vfi.data.loader import TrainingLoader
from vfi.data.shared_memory import check_shared_memory, training_bytes
from vfi.distributed.collectives import check_agreement, on_main
from vfi.distributed.gradients import copies, update_ratios
from vfi.distributed.launcher_checks import start_accelerator
from vfi.distributed.select import sharding
from vfi.distributed.watchdog import Watchdog
from vfi.errors import Stopped
from vfi.model.hyper_connections import MixingRecord, mixing_report, recording, set_annealing
from vfi.runtime.logging import logger, show_messages
from vfi.runtime.numerics import set_numerics
from vfi.tracking.environment import METRICS
from vfi.tracking.tracker import Tracker
from vfi.training.auto_batch_size import find_batch_size
from vfi.training.cuda_graphs import enable_expandable_segments
from vfi.training.description import describe, log_start
from vfi.training.divergence import Part, Snapshots, TrainingError, go_back, raise_annealing, suspects
from vfi.training.gradient_monitor import PROCEED, Decision, async_copy_to_cpu
from vfi.training.losses import check_flow, training_losses
from vfi.training.optimizer import annealing
from vfi.training.perceptual_loss import load_perceptual_loss
from vfi.training.progress_bar import progress
from vfi.training.resume import resume_point
from vfi.training.run import Run
from vfi.training.schedule import Schedule
from vfi.training.state import Snapshot, read_snapshot
from vfi.training.step_profiler import StepProfiler
from vfi.training.throughput import Meter
from vfi.training.validation import Score, Validation

FlowTeacher = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, ...]]
"""img0, img1, timestep -> flow_t0, flow_t1 `[B, 2, H, W]` in pixels, and optionally their weights `[B, 2, H, W]`: what to
distil (Exp-2e) in place of flow stored in the shards."""
_FAULTS_SHOWN = 5  # bad samples printed to the screen for each row of metrics


class StepResult(NamedTuple):
    """The result of one optimizer step; tensors are on the device."""

    decision: Decision
    norm: Tensor
    """Norm of the whole gradient, before clipping."""
    norms: Tensor
    """[groups] gradient norm of each layer group."""
    ratios: Tensor
    """[groups] norm of the change / norm of the weights; zeros where it was not measured or no weight changed."""


class Trainer:
    """The trainer of one run: builds everything that a step needs from a Config, and trains."""

    def __init__(self, config: Config, flow_teacher: FlowTeacher | None = None) -> None:
        self.config, self.run, self.data = config, config.run, config.data
        if not self.data.data_path:
            raise ConfigError("--data_path is missing: give a shard folder (see `python -m shards.synthetic --help`)")
        self.folder = Path(self.run.output_dir) / self.run.exp_name
        self.start = resume_point(self.run, self.folder)
        if config.compute.cuda_graphs:
            enable_expandable_segments()
        self.accelerator = start_accelerator(config)
        show_messages(self.accelerator.is_main_process)
        self.strategy = sharding(self.accelerator)
        self.accumulation = self.accelerator.gradient_accumulation_steps
        device, rank, world = self.accelerator.device, self.accelerator.process_index, self.accelerator.num_processes
        set_numerics(config.compute.tf32, config.compute.deterministic)
        self.distils = config.optim.distill_weight > 0
        with self.accelerator.local_main_process_first():  # which may download weights
            self.perceptual = load_perceptual_loss(config.optim, device)
        named = config.optim.flow_teacher
        self.flow_teacher = call_factory(named, "--flow_teacher", device) if named else flow_teacher
        self.loader = TrainingLoader(
            self.data, self.run.seed, device, accumulation=self.accumulation, rank=rank, world=world,
            with_flow=self.distils and self.flow_teacher is None,
        )  # fmt: skip
        self.validation = Validation(self.data) if self.data.val_path else None
        self.watch = Watchdog(device, self.run.timeout_minutes * 60, signals=not self.run.dry_run)
        self._fit_batch()
        self._check_shared_memory()
        # far enough apart for the guard to notice, before the next snapshot, trouble that began before this one
        self.snapshots = Snapshots(max(KNOWN_STEPS, config.guard.guard_window // 4 + 1))
        self.raised_annealing = 0.0  # by the guard, for good
        self.can_keep_snapshots = config.guard.guard and config.guard.max_rollbacks > 0 and self.strategy.name == "none"
        self.score: Score | None = None
        self.live = self._build_run(self._read_resumed())
        self.tracker = Tracker(self.folder, self.live.step, self.accelerator.is_main_process)
        log_start(self.live, self.tracker, config.data.batch_size)
        self.tally, self.skipped = BadSampleCounts(), BadSampleMonitor(self.data.max_bad_sample_rate, self.loader.plan.samples)

    def _fit_batch(self) -> None:
        """Reduce the batch size and accumulate more batches where a GPU can't hold --batch_size."""
        smaller = find_batch_size(self.config, self.accelerator, self.strategy.name)
        if smaller is None:
            return
        self.config, self.data = smaller, smaller.data
        self.accumulation = accumulation(smaller, self.accelerator.num_processes)
        self.accelerator.gradient_accumulation_steps = self.accumulation
        self.loader.regroup(self.data.batch_size, self.accumulation)

    def _check_shared_memory(self) -> None:
        """Refuse to start where the loader processes would find no shared memory; no rank has any yet."""
        needed = training_bytes(self.data, self.loader.with_flow) + (self.validation.shared_bytes if self.validation else 0)
        ranks, advice = int(os.environ.get("LOCAL_WORLD_SIZE", "1")), "use --num_workers 0, or a smaller --batch_size or --crop"
        check_shared_memory(needed, ranks, advice)

    def _read_resumed(self) -> Snapshot | None:
        """Read the checkpoint that this run resumes from, if it does resume, and report damaged checkpoints."""
        check_agreement(self.accelerator, self.start.path)
        for line in self.start.notes:
            logger.info(line)
        if self.accelerator.is_main_process:
            store.remove_remains(self.folder)  # a run that was killed after its last save does not save again
        return read_snapshot(self.start.path) if self.start.is_resume and self.start.path else None

    def _build_run(self, snapshot: Snapshot | None, schedule: Schedule | None = None) -> Run:
        """Build the run from a state, or from its initial weights; after a roll-back with the schedule that it has."""
        return Run(self.config, self.accelerator, self.strategy, self.loader, self.start, snapshot, schedule)

    def fit(self) -> None:
        """Train to the last step; log, validate and save along the way."""
        describe(self.live, self.folder)
        meter = Meter(self.loader.plan.global_batch)
        self.live.train_mode()
        is_main = self.accelerator.is_main_process
        bar = progress(self.live.step, self.live.total, is_main)
        profiler = StepProfiler(self.folder / "profile", self.run.profile * is_main, self.accelerator.device)
        with contextlib.closing(self.tracker), self.watch, bar, profiler:
            self.catch_up()
            self.keep_snapshot()
            first = self.live.step
            while self.live.step < self.live.total:
                with profiler.step(self.live.step + 1):
                    self.train_step(meter, bar)
                if self.live.step == first + 1:
                    seconds = round(time.time() - psutil.Process().create_time(), 1)
                    self.tracker.log(self.live.step, "start", seconds=seconds)
                    logger.info(f"the first step ended {seconds} s after the start of the process")

    def catch_up(self) -> None:
        """Run the validation of the step that training resumes from, if the run was stopped before it."""
        due = self.validation is not None and (self.live.step % self.run.val_every == 0 or self.live.step >= self.live.total)
        missing = self.start.is_resume and due and not self.tracker.has(self.live.step, "val")
        if self.watch.agreement.any(missing, at_once=True) and not self.validate():
            self.end_early()

    def train_step(self, meter: Meter, bar: tqdm) -> None:
        """Take one optimizer step, then log, validate and save where that is due."""
        live = self.live
        if live.frozen and live.position.epoch >= self.config.optim.freeze_backbone:
            live.thaw()
        if self.config.optim.mhc_anneal:
            planned = annealing(live.step, live.total, self.config.optim)
            set_annealing(live.network, max(planned, live.least_annealing))  # never lowered: the weights adapted to it
        last = live.step + 1 == live.total
        due = (live.step + 1) % self.run.log_every == 0 or last
        watching: contextlib.AbstractContextManager[dict[str, MixingRecord]]
        watching = recording(live.network) if due else contextlib.nullcontext({})
        with watching as records:
            losses, parts = self.optimise(meter)
        result = self.optimizer_step(losses["loss"], measured=due)
        live.advance()
        if result.decision.action != "go":
            self.respond(result.decision, parts)
        if result.decision.action == "roll_back":
            meter.restart()
            bar.n = live.step
            bar.refresh()
            return
        meter.add(losses, result.decision.moves)
        bar.update()
        if due:
            mean = self.accelerator.reduce(meter.mean_losses(), reduction="mean")
            pool_free = live.recorder.pool_bytes_free if live.recorder else 0
            row = meter.read(mean, result.norm, pool_free)
            row |= {"lr": live.learning_rate(live.step - 1), "epoch": live.epoch}
            row |= self.by_group("grad", result.norms)
            row |= self.by_group("update", result.ratios) if self.strategy.measures_updates else {}
            row |= {f"mixing_{name}": value for name, value in mixing_report(records).items()}
            self.check_finite(row["loss"], row["grad_norm"])
            bar.set_postfix(loss=f"{row['loss']:.4f}", samples_s=f"{row['samples_per_s']:.1f}", refresh=False)
            self.tracker.log(live.step, "train", **row)
            self.report_faults()
        validating = self.validation is not None and (live.step % self.run.val_every == 0 or last)
        saving = live.step % self.run.save_every == 0 or last
        stopping = self.watch.stop(at_once=validating or saving)
        if validating or saving or stopping:
            with meter.paused():
                stopping = stopping or (validating and not self.validate())
                if saving or stopping:
                    self.save(losses["loss"], result.norm)
        self.keep_snapshot()
        if stopping:
            self.end_early()

    def validate(self) -> bool:
        """Validate the network on all processes and log the score; return False where a process was told to stop meanwhile."""
        live = self.live
        assert self.validation is not None
        with live.ema.in_place() if live.ema else contextlib.nullcontext():
            self.score = self.validation.run(
                live.network, self.accelerator, self.tracker, self.watch, live.step, self.strategy.forward_is_collective
            )
        live.train_mode()
        if self.score:
            logger.info(f"{self.score}{', EMA weights' if live.ema else ''}")
        return self.score is not None

    def end_early(self) -> NoReturn:
        """Report that a signal ended the run, whose last step is saved, and raise Stopped."""
        done = f"step {self.live.step} of {self.live.total}"
        text = f"stopped after {done} ({self.watch.reason}): --resume auto continues from there"
        self.tracker.log(self.live.step, "stop", why=[self.watch.reason])
        logger.info(text)
        raise Stopped(text)

    def optimise(self, meter: Meter) -> tuple[dict[str, Tensor], list[Part]]:
        """Accumulate the gradient of one step over `accumulation` batches.

        Returns the mean losses, still on the device, and each forward pass with its loss and sample keys.
        """
        live = self.live
        means: dict[str, Tensor] = {}
        parts: list[Part] = []
        for _ in range(self.accumulation):
            if live.upcoming is None:
                self.fetch(meter, live.step + 1)
            batch, live.upcoming = live.upcoming, None
            assert batch is not None
            self.tally.add(len(batch.keys), batch.faults)
            with self.strategy.accumulate():
                losses, live.next_losses = live.next_losses or self.forward(batch, live.step + 1), None
                self.watch.at(f"the backward pass of step {live.step + 1}")
                self.strategy.backward(losses["loss"])
            parts.append((losses["loss"].detach(), batch.keys))
            for name, loss in losses.items():
                means[name] = means.get(name, 0) + loss.detach() / self.accumulation
            of_this_step = len(parts) < self.accumulation
            if of_this_step or live.step + 1 < live.total:
                self.fetch(meter, live.step + 1 if of_this_step else live.step + 2)
        return means, parts

    def forward(self, batch: FrameBatch, step: int) -> dict[str, Tensor]:
        """Return the losses of a batch in step `step`."""
        self.watch.at(f"the forward pass of step {step}")
        prediction = self.live.model(batch.img0, batch.img1, batch.timestep, batch.imgt)
        return training_losses(prediction, batch.imgt, self.config.optim, self.flow_to_learn(batch), self.perceptual)

    def fetch(self, meter: Meter, step: int) -> None:
        """Fetch the next batch while the GPU is still busy with the previous one."""
        self.watch.at(f"the wait for data of step {step}")
        with meter.waiting(self.accelerator.device):
            self.live.upcoming = next(self.live.batches)

    def optimizer_step(self, loss: Tensor, measured: bool) -> StepResult:
        """Check the gradient and, if the guard allows it, update the weights; `measured`: also measure how much they change."""
        live = self.live
        self.watch.at(f"the update of step {live.step + 1}")
        for group in live.optimizer.param_groups:
            group["lr"] = live.learning_rate(live.step)
        norms = self.strategy.gradient_norms(live.groups)
        norm, ratios = torch.linalg.vector_norm(norms), torch.zeros_like(norms)
        longest = self.config.optim.clip_norm or math.inf
        decision = self.decide(loss, norms, norm, longest) if live.monitor else PROCEED
        if decision.action != "go":
            live.next_losses = None
        if decision.moves:
            before = copies(live.groups) if measured and self.strategy.measures_updates else None
            if live.next_losses:
                self.strategy.zero_grad()
            else:
                self.strategy.step(norm, min(longest, decision.clip_norm))
            if live.ema and not live.optimizer.step_was_skipped:
                live.ema.update()
            if before:
                ratios = update_ratios(live.groups, before)
        else:
            self.strategy.skip_step()
        return StepResult(decision, norm, norms, ratios)

    def decide(self, loss: Tensor, norms: Tensor, norm: Tensor, longest: float) -> Decision:
        """Return the guard's decision on this step, from the same numbers on all processes.

        Reading those numbers makes the program wait for the device, which then waits for the program. So, where possible, the
        optimizer step is tried and the next forward pass started before they are read: see `can_run_ahead`.
        """
        live = self.live
        assert live.monitor is not None
        scaler = self.accelerator.scaler
        seen = self.accelerator.reduce(torch.cat((loss.reshape(1), norms)), reduction="mean")
        if live.upcoming and self.can_run_ahead():
            wait = async_copy_to_cpu(seen)
            self.strategy.speculative_step(norm, longest, live.monitor.needs_review(seen))
            live.next_losses = self.forward(live.upcoming, live.step + 2)
            seen = wait()
        return live.monitor.decide(live.step + 1, seen, scaler.get_scale() if scaler else 1.0)

    def can_run_ahead(self) -> bool:
        """Return whether the next forward pass may start before the guard has seen the numbers of this step.

        It may where nothing else happens between the two steps or changes with the next one. An unusual step is undone on the
        device and that forward pass discarded: the run is bit-identical to one that waits.
        """
        this, run = self.live.step + 1, self.run
        due = (run.log_every, run.save_every, run.val_every, self.snapshots.every)
        special = this + 1 == self.live.total or any(step % every == 0 for every in due for step in (this, this + 1))
        changes = self.live.frozen or annealing(this, self.live.total, self.config.optim) > 0
        able = self.accumulation == 1 and self.strategy.can_try and _waits_for(self.accelerator.device)
        return able and not special and not changes

    def by_group(self, kind: str, values: Tensor) -> dict[str, float]:
        """Return one value per layer group as entries of a row of metrics."""
        return {f"{kind}_{name}": value for name, value in zip(self.live.groups, values.tolist(), strict=True)}

    def respond(self, decision: Decision, parts: list[Part]) -> None:
        """Carry out the guard's decision beyond the step itself, and log it; TrainingError where training can't continue."""
        assert self.live.monitor is not None
        step, samples = self.live.step, suspects(parts)
        numbers: dict[str, float] = {}
        if decision.action == "watch":
            numbers["clip_norm"] = decision.clip_norm
        if decision.building and self.config.model.mixing != "none":
            numbers["annealing"] = self.live.least_annealing = self.raised_annealing = raise_annealing(self.live.network)
        if decision.action == "roll_back":
            numbers = self.roll_back(decision) | {"from_step": step}
        self.tracker.log(self.live.step, decision.action, why=[decision.why], samples=samples, **numbers)
        if decision.action != "watch" or self.live.monitor.in_a_row == 1:
            given = "".join(f", {name} {value:.3g}" for name, value in numbers.items())
            logger.info(
                f"step {step}: {decision.action}{given}: {decision.why}; samples {', '.join(samples[:_FAULTS_SHOWN])} …"
            )
        if decision.action == "stop":
            self.give_up(decision.why, f"the run went back {self.live.monitor.roll_backs} times, as --max_rollbacks allows")

    def roll_back(self, decision: Decision) -> dict[str, float]:
        """Return to the last good state, with a lower learning rate from now on; return what has changed, for the log."""
        self.watch.at(f"going back from step {self.live.step}")
        former, snapshot = self.live.monitor, go_back(self.accelerator, self.folder, decision.began, self.snapshots)
        if snapshot is None:
            where = "in memory or as a checkpoint" if self.can_keep_snapshots else "as a checkpoint"
            self.give_up(decision.why, f"there is no good state from before step {decision.began} to go back to, {where}")
        self.accelerator.free_memory()
        schedule = self.live.schedule
        del self.live  # before there is another one in memory
        self.live, self.score = self._build_run(snapshot, schedule), None
        # what the schedule has raised is to fall again: other weights were learnt under it
        self.live.least_annealing = max(self.live.least_annealing, self.raised_annealing)
        set_annealing(self.live.network, self.live.least_annealing)
        assert self.live.monitor is not None
        assert former is not None
        self.live.monitor.resume_after(former)
        self.live.train_mode()
        self.keep_snapshot()
        numbers = {"roll_backs": self.live.monitor.roll_backs, "rate_factor": self.live.monitor.rate_factor}
        return numbers | {"from_memory": float(snapshot.path is None)}

    def give_up(self, why: str, more: str) -> NoReturn:
        """Raise TrainingError where the guard has no remedy left."""
        raise TrainingError(
            f"step {self.live.step}: {why}; {more}. What was done, and the samples concerned, are in {self.folder / METRICS}. "
            f"Try a lower --lr or a longer --warmup_steps"
        )

    def flow_to_learn(self, batch: FrameBatch) -> tuple[Tensor, ...] | None:
        """Return the external flow to distil into the flow stages: the callable's, or else the shards'; None without
        distillation.
        """
        if not self.distils:
            return None
        if self.flow_teacher is not None:
            with torch.no_grad():
                return check_flow(self.flow_teacher(batch.img0, batch.img1, batch.timestep), batch.img0)
        stored = batch.flow_t0, batch.flow_t1, batch.flow_weight
        return tuple(tensor for tensor in stored if tensor is not None)

    def check_finite(self, loss: float, norm: float) -> None:
        """Raise TrainingError when loss or gradient norm are non-finite, before such weights are saved.

        Both are the same on all processes, so all of them stop. With a guard such a step was not taken.
        """
        finite = math.isfinite(loss) and (math.isfinite(norm) or self.live.optimizer.step_was_skipped)  # by the loss scaler
        if self.live.monitor is None and not finite:
            raise TrainingError(
                f"the loss is {loss}, the norm of the gradient {norm} at step {self.live.step}; the last good checkpoint is "
                f"{store.latest(self.folder) or 'none'}. Try a lower --lr or a longer --warmup_steps"
            )

    def report_faults(self) -> None:
        """Report the samples that any process has skipped since the last row, and stop when there are too many."""
        fresh = self.skipped.add(gather_object([self.tally]))
        self.tally = BadSampleCounts()
        if not fresh:
            return
        named = [f"{fault}{f' ({n} times)' * (n > 1)}" for fault, n in fresh.items()]
        self.tracker.log(self.live.step, "fault", named=named, **self.skipped.numbers())
        logger.info(
            f"step {self.live.step}: skipped {fresh.total()} samples that can't be used, {self.skipped.rate:.2%} so far"
        )
        for name in named[:_FAULTS_SHOWN]:
            logger.info(f"  {name}")
        if len(named) > _FAULTS_SHOWN:
            logger.info(f"  … all {len(named)} are named in {self.folder / METRICS}")
        self.skipped.check(next(iter(fresh)))

    def save(self, loss: Tensor, norm: Tensor) -> None:
        """Write a checkpoint on the main process while the others wait."""
        # the loss is from before the step: a non-finite gradient shows only in the norm, which all processes share
        self.check_finite(self.accelerator.reduce(loss, reduction="mean").item(), norm.item())
        _, state, model, optimizer, ema, random = self.live.take_snapshot(self.score)
        write = functools.partial(store.save, keep_last=self.run.keep_last, keep_best=self.run.keep_best)
        with self.watch.on_main(f"the save of step {self.live.step}"):
            on_main(self.accelerator, lambda: write(self.folder, state, self.config, model, optimizer, ema=ema, random=random))

    def keep_snapshot(self) -> None:
        """Keep the state of this step in memory, where due: the cost of a roll-back does not depend on --save_every."""
        if not (self.live.monitor and self.can_keep_snapshots):
            return
        if self.snapshots.should_keep(self.live.step, self.live.monitor.first_doubtful_step()):
            self.watch.at(f"the copy in memory of step {self.live.step}")
            self.snapshots.keep(self.live.take_snapshot(self.score))


def _waits_for(device: torch.device) -> bool:
    """Return whether the device works asynchronously, until its numbers are read."""
    return device.type == "cuda"
