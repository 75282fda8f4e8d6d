"""Where a run starts: from its own checkpoint, from the weights of another model, or from scratch.

    point = resume_point(config.run, run_folder)
    snapshot = read_snapshot(point.path) if point.is_resume else None
    step = load_own_weights(network, snapshot, changed) if snapshot else load_initial_weights(network, point, config)
    saved = saved_position(plan, snapshot, step)
    position = starting_position(plan, saved)

vfi/training/state.py restores what else belongs to the state of a run.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from vfi.checkpoint import pretrained_folder, store, weights
from vfi.checkpoint.store import SavedPosition
from vfi.config.configs import UNTRAINED, Config, ConfigError, RunConfig
from vfi.data.sampler import Plan, Position
from vfi.errors import CheckpointError
from vfi.model.hyper_connections import annealing_factor
from vfi.model.interpolator import FrameInterpolator
from vfi.model.matvlm_init import init_mamba_from_attn, random_source
from vfi.runtime.logging import logger
from vfi.training.state import Snapshot


class ResumePoint(NamedTuple):
    """The verified checkpoint or model folder that a run starts from; without a path it starts from scratch."""

    path: Path | None = None
    is_resume: bool = False
    """Whether it is a checkpoint of this run, rather than the first weights of a new one."""
    notes: tuple[str, ...] = ()
    """What to tell the user, such as a line about each newer checkpoint that is damaged."""


def resume_point(run: RunConfig, folder: Path) -> ResumePoint:
    """Return where a run whose folder is `folder` starts; ConfigError rather than mix two runs in one folder."""
    auto, newest = run.resume == "auto", store.latest(folder)
    if newest and not auto:
        raise ConfigError(
            f"{folder} already holds a run at step {newest.step}: resume it by --resume auto, or give another --exp_name"
        )
    if newest:
        path, damaged = store.newest_whole(folder)
        return ResumePoint(path, True, tuple(damaged))
    first = run.start_from or ("" if auto else run.resume)
    if not first:
        if auto:
            return ResumePoint(notes=(f"no checkpoint in {folder}: starting from scratch",))
        return ResumePoint()
    if model := pretrained_folder.find(first, Path(run.output_dir)):
        return ResumePoint(model)
    path, damaged = store.find_whole(first, run.output_dir)
    return ResumePoint(path, notes=tuple(damaged))


def load_own_weights(network: FrameInterpolator, snapshot: Snapshot, changed: Sequence[str]) -> int:
    """Load the weights of a state of this run and return its step; CheckpointError where they don't fit.

    `changed`: a line about each setting that differs from that state's.
    """
    logger.info(f"resuming from the weights of {snapshot.place} (step {snapshot.state.step})")
    for line in changed:
        logger.info(f"differs from the checkpoint's settings: {line}")
    if snapshot.path is not None:
        try:
            weights.refuse_differences(network.state_dict(), snapshot.weights, snapshot.path)
        except CheckpointError as error:
            raise CheckpointError(f"{error}. Settings that differ: {', '.join(changed) or 'none'}") from error
    network.load_state_dict(snapshot.weights)
    return snapshot.state.step


def load_initial_weights(network: FrameInterpolator, point: ResumePoint, config: Config) -> int:
    """Load the first weights, if any are given, and return 0, the step that training starts at."""
    if point.path is None:
        return 0
    if pretrained_folder.is_model_folder(point.path):
        described = pretrained_folder.read_description(point.path)
        step, theirs = described.origin.step, Config(model=described.model)
    else:
        step, theirs = store.read_step(point.path), store.read_config(point.path)
    logger.info(f"starting from the weights of {point.path} (step {step}{_rank_among(point.path)})")
    different = _log_differences(config, theirs)
    try:
        for line in weights.load_parts(network, point.path):
            logger.info(line)
    except CheckpointError as error:
        raise CheckpointError(f"{error}. Settings that differ: {different}") from error
    if factor := annealing_factor(network):
        logger.info(f"the mixing's annealing factor starts at {factor:.3g}, under which these weights were trained")
    return 0


def _rank_among(checkpoint: Path) -> str:
    """Return what a checkpoint is among those of its run: the newest, the best, or both."""
    run_folder = checkpoint.parent.parent
    newest, best = store.latest(run_folder), store.best(run_folder)
    ranks = [name for name, found in (("newest", newest), ("best", best)) if found and found.path == checkpoint]
    other = best and best.path != checkpoint and f"; the best one is of step {best.step}: {run_folder.name}@best"
    return (f", the {' and '.join(ranks)} of its run" if ranks else "") + (other or "")


def _log_differences(config: Config, theirs: Config) -> str:
    """Return the model settings that differ from those of the loaded weights, or "none", and log them."""
    different = weights.compare_models(config, theirs)
    if different:
        logger.info(f"settings of the model that differ from that run's: {different}")
    return different or "none"


def init_from_attention(network: FrameInterpolator, config: Config) -> None:
    """Initialise the scan from the attention of --matvlm_donor (MaTVLM), and log what was copied.

    Raises ConfigError where that attention does not fit.
    """
    run = config.run
    if run.matvlm_donor == UNTRAINED:
        source, steps = random_source(config.model, run.seed + 1), 0
    else:
        path = store.find(run.matvlm_donor, run.output_dir)
        heads = config.model.head_dim, store.read_config(path).model.head_dim
        if heads[0] != heads[1]:  # it can't always be seen from the weights
            raise ConfigError(f"--head_dim is {heads[0]}, that of --matvlm_donor {path} is {heads[1]}: use the donor's")
        source, steps = weights.read_weights(path), store.read_step(path)
    try:
        logger.info(str(init_mamba_from_attn(network.backbone, source, run.matvlm_plan, steps)))
    except ValueError as error:
        raise ConfigError(f"--matvlm_donor {run.matvlm_donor}: {error}") from error


def saved_position(plan: Plan, snapshot: Snapshot | None, step: int) -> SavedPosition:
    """Return the data position of a resumed run; without a saved one, the position that `step` steps lead to."""
    saved = snapshot.state.position if snapshot else None
    return saved or SavedPosition(plan.at_step(step), plan.order)


def starting_position(plan: Plan, saved: SavedPosition) -> Position:
    """Return the data position to resume from, and log where it is not the one of an uninterrupted run."""
    epoch, done = saved.position
    if saved.order != plan.order:
        logger.info(
            f"the folders, or settings that the order of samples depends on (--seed, --mixed_ratio, --shuffle_shards, "
            f"--lane_bundle, --remainder), are not those of the checkpoint: epoch {epoch} starts again"
        )
        return Position(epoch)
    if done and done[-1][0] != plan.global_batch:
        logger.info(
            f"the global batch was {done[-1][0]} and is {plan.global_batch}: what epoch {epoch} has not seen yet is planned "
            f"again, {plan.steps_left(saved.position)} steps"
        )
    return plan.settled(saved.position)
