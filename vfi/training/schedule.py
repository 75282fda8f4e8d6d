"""The schedule of the learning rate over a run, and what becomes of it when settings change at resume.

    total = total_steps(config, plan, step, position)
    schedule = resumed_schedule(state, config, total, saved_config, saved_total)
    rate = schedule.rate(step, total, config.optim)

The formula is in optimizer.py; docs/training.md defines what extend, restart and keep make of it.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

from vfi.checkpoint.store import State
from vfi.config.configs import Config, ConfigError, OptimConfig
from vfi.data.sampler import Plan, Position
from vfi.runtime.logging import logger
from vfi.training.optimizer import learning_rate

DEFAULT_EPOCHS = {1: 300, 2: 200, 3: 100}  # by phase
_RATES = ("lr", "lr_min", "warmup_steps")


class Schedule(NamedTuple):
    """The steps of a run from the beginning of the warm-up to the end of the decay."""

    start: int = 0
    """The step that the warm-up begins after."""
    end: int | None = None
    """The step that the decay ends with; None: the last step of the run, however many it has."""

    def rate(self, step: int, total: int, optim: OptimConfig) -> float:
        """Return the learning rate of step 0 … total-1 of a run of `total` steps; lr_min from `end` on."""
        return learning_rate(max(0, step - self.start), (self.end or total) - self.start, optim)


def total_steps(config: Config, plan: Plan, step: int, position: Position) -> int:
    """Return the steps of the whole run, of which `step` lie before `position`."""
    return config.run.steps or step + plan.steps_until(position, _epochs(config))


def _epochs(config: Config) -> int:
    return config.run.epochs or DEFAULT_EPOCHS[config.model.phase]


def changed_settings(config: Config, saved: Config) -> list[str]:
    """Return a line about each setting that differs from a checkpoint's, but for --resume, by which alone a run resumes."""
    return [
        f"{name}: {value} here, {_settings(saved)[name]} there"
        for name, value in _settings(config).items()
        if value != _settings(saved)[name] and name != "resume"
    ]


def _settings(config: Config) -> dict[str, object]:
    """Return all settings by name; a name is unique in the tree."""
    return {name: value for group in dataclasses.asdict(config).values() for name, value in group.items()}


def refuse_shorter(config: Config, saved: Config, total: int, step: int, epoch: float) -> None:
    """Raise ConfigError where a resumed run is to have fewer steps, or by another --epochs fewer epochs, than are done."""
    if total < step:
        raise ConfigError(f"--steps {total} is less than the {step} steps that are done: give more, or another --exp_name")
    changed = (config.run.steps, config.run.epochs) != (saved.run.steps, saved.run.epochs)
    if changed and config.run.steps is None and _epochs(config) < epoch:
        raise ConfigError(
            f"--epochs {_epochs(config)} is less than the {epoch:.2f} epochs that are done: give more, or another --exp_name"
        )


def resumed_schedule(state: State, config: Config, total: int, saved: Config, saved_total: int) -> Schedule:
    """Return the schedule with which a run of `total` steps resumes from `state`, as --schedule says.

    `saved`: the settings of that checkpoint, by which the run would have `saved_total` steps. ConfigError where settings would
    change the rates to come and --schedule is missing.
    """
    former, step, choice = Schedule(state.schedule_start, state.schedule_end), state.step, config.run.schedule
    rates = [name for name in _RATES if getattr(config.optim, name) != getattr(saved.optim, name)]
    is_longer = former.end is None and total != saved_total
    if step >= total or not (rates or is_longer or choice not in (None, saved.run.schedule)):
        return former
    choices = {
        "extend": (former._replace(end=None), total, config.optim),
        "restart": (Schedule(step), total, config.optim),
        "keep": (former._replace(end=former.end or saved_total), saved_total, saved.optim),
    }
    then = {name: f"{schedule.rate(step, steps, optim):.3g}" for name, (schedule, steps, optim) in choices.items()}
    given = [f"--{name} {getattr(config.optim, name):g} (was {getattr(saved.optim, name):g})" for name in rates]
    given += [f"{total} steps (were {saved_total})"] * is_longer
    if choice is None:
        raise ConfigError(
            f"{' and '.join(given)} would change the learning rate in the middle of the run: say how by --schedule extend (as "
            f"if these settings had held from the start: {then['extend']} in step {step + 1}), restart (a new warm-up and "
            f"decay from here to step {total}: {then['restart']}) or keep (the former schedule, then its last rate: "
            f"{then['keep']})"
        )
    if choice == "keep" and rates:
        raise ConfigError(
            f"--schedule keep leaves the rates as they are, and {' and '.join(given)} was given: take the former value, or "
            f"--schedule extend or restart"
        )
    logger.info(f"--schedule {choice}: the learning rate of step {step + 1} is {then[choice]}, and was to be {then['keep']}")
    return choices[choice][0]
