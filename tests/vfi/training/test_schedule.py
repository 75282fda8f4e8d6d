"""The schedule of the learning rate after a resume, against the formulas of docs/training.md."""

from __future__ import annotations

import math

import pytest

from vfi.checkpoint.store import State
from vfi.config import presets
from vfi.config.configs import Config, ConfigError
from vfi.training.schedule import Schedule, changed_settings, refuse_shorter, resumed_schedule

SAVED = presets.override(presets.tiny(), steps=100, lr=1e-3, lr_min=2e-5, warmup_steps=10, resume="auto")


def formula(t: int, b: int, e: int, config: Config) -> float:
    """The rate of step t + 1 of a schedule from b to e, as the page has it."""
    peak, least, w = config.optim.lr, config.optim.lr_min, config.optim.warmup_steps
    if t - b < w:
        return peak * (t - b + 1) / w
    p = min(1, (t - b - w) / max(1, e - b - 1 - w))
    return least + (peak - least) * (1 + math.cos(math.pi * p)) / 2


def resume(step: int, config: Config, saved: Config = SAVED, former: Schedule = Schedule()) -> Schedule:  # noqa: B008
    assert config.run.steps
    assert saved.run.steps
    return resumed_schedule(State(step, schedule_start=former.start, schedule_end=former.end), config, config.run.steps, saved,
                            saved.run.steps)  # fmt: skip


def rates(schedule: Schedule, step: int, config: Config) -> list[float]:
    return [schedule.rate(t, config.run.steps, config.optim) for t in range(step, config.run.steps)]


@pytest.mark.parametrize("step", [3, 60, 100])
@pytest.mark.parametrize("steps", [200, 110])
@pytest.mark.parametrize("choice", ["extend", "restart", "keep"])
def test_each_choice_is_its_formula(step, steps, choice):
    config = presets.override(SAVED, steps=steps, schedule=choice)
    begin, end = {"extend": (0, steps), "restart": (step, steps), "keep": (0, 100)}[choice]
    expected = [formula(t, begin, end, config) for t in range(step, steps)]
    schedule = resume(step, config)
    assert rates(schedule, step, config) == pytest.approx(expected, rel=1e-12)
    # and so it stays, however often the same command resumes it
    assert resume(step + 5, config, config, schedule) == schedule
    without_flag = presets.override(config, schedule=None)
    assert resume(step + 5, without_flag, config, schedule) == schedule


def test_the_jump_that_nobody_asked_for_is_refused_with_its_size():
    config = presets.override(SAVED, steps=200)
    with pytest.raises(ConfigError) as refused:
        resume(100, config)
    text = str(refused.value)
    assert text.startswith("200 steps (were 100) would change the learning rate in the middle of the run")
    jump = formula(100, 0, 200, config)
    assert jump > 20 * SAVED.optim.lr_min
    assert f": {jump:.3g} in step 101)" in text
    assert f"restart (a new warm-up and decay from here to step 200: {formula(100, 100, 200, config):.3g})" in text
    assert "keep (the former schedule, then its last rate: 2e-05)" in text


@pytest.mark.parametrize(("name", "value"), [("lr", 5e-4), ("lr_min", 1e-5), ("warmup_steps", 20)])
def test_other_rates_need_a_word_too(name, value):
    config = presets.override(SAVED, **{name: value})
    with pytest.raises(ConfigError, match=rf"--{name} {value:g} \(was .* --schedule extend"):
        resume(50, config)
    with pytest.raises(ConfigError, match=f"--schedule keep leaves the rates as they are, and --{name} {value:g} "):
        resume(50, presets.override(config, schedule="keep"))
    restarted = resume(50, presets.override(config, schedule="restart"))
    assert rates(restarted, 50, config) == pytest.approx([formula(t, 50, 100, config) for t in range(50, 100)], rel=1e-12)
    extended = resume(50, presets.override(config, schedule="extend"))
    assert rates(extended, 50, config) == pytest.approx([formula(t, 0, 100, config) for t in range(50, 100)], rel=1e-12)


def test_choices_build_on_what_was_chosen_before():
    longer = presets.override(SAVED, steps=200, schedule="restart")
    again = presets.override(longer, steps=300, schedule="extend")
    assert resume(150, again, longer, Schedule(100)) == Schedule(100)
    kept = presets.override(again, schedule="keep")
    assert resume(150, kept, longer, Schedule(100)) == Schedule(100, 200)
    assert resume(250, presets.override(kept, steps=400), kept, Schedule(100, 200)) == Schedule(100, 200)
    assert resume(250, presets.override(kept, schedule="extend"), kept, Schedule(100, 200)) == Schedule(100)
    assert resume(250, presets.override(kept, schedule="restart"), kept, Schedule(100, 200)) == Schedule(250)


def test_a_run_that_has_nothing_left_is_asked_nothing():
    assert resume(100, presets.override(SAVED, lr=5e-4)) == Schedule()


def test_steps_and_epochs_of_the_same_length_are_no_change():
    config = presets.override(SAVED, steps=None, epochs=5)
    assert resumed_schedule(State(50), config, 100, SAVED, 100) == Schedule()


def test_fewer_than_done_is_refused():
    refuse_shorter(SAVED, SAVED, 100, 100, 3.0)
    with pytest.raises(ConfigError, match="--steps 50 is less than the 60 steps that are done"):
        refuse_shorter(presets.override(SAVED, steps=50), SAVED, 50, 60, 3.0)
    epochs = presets.override(SAVED, steps=None, epochs=2)
    with pytest.raises(ConfigError, match=r"--epochs 2 is less than the 2\.50 epochs that are done"):
        refuse_shorter(epochs, SAVED, 60, 60, 2.5)
    refuse_shorter(epochs, epochs, 60, 60, 2.5)  # another number of processes may end an epoch later


def test_changes_name_every_setting_but_resume():
    assert changed_settings(SAVED, presets.override(SAVED, resume="")) == []
    other = presets.override(SAVED, lr=1e-4, batch_size=3, width=4, guard_skips=9, tf32=True)
    assert sorted(changed_settings(other, SAVED)) == [
        "batch_size: 3 here, 8 there", "guard_skips: 9 here, 3 there", "lr: 0.0001 here, 0.001 there",
        "tf32: True here, False there", "width: 4 here, 8 there",
    ]  # fmt: skip
