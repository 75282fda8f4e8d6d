"""The guard's decisions on sequences of losses and norms, against medians worked out the long way."""

from __future__ import annotations

import json
import math
import random
import statistics

import pytest
import torch
from torch import nn

from vfi.config import presets
from vfi.config.configs import ConfigError, GuardConfig
from vfi.config.validation import validate
from vfi.distributed.gradients import copies, gradient_norms, group_of, layer_groups, update_ratios
from vfi.model.interpolator import FrameInterpolator
from vfi.training.gradient_monitor import PROCEED, GradientMonitor, async_copy_to_cpu

GROUPS = ("stem", "flow")


def guard(**settings: float) -> GradientMonitor:
    return GradientMonitor(GROUPS, GuardConfig(**settings))


def feed(
    watcher: GradientMonitor,
    steps: int,
    first: int = 1,
    loss: float = 0.1,
    norms: tuple[float, ...] = (1.0, 2.0),
    seed: int = 0,
):
    """So many steps, with a noise of 20 %; the verdicts."""
    draw = random.Random(seed)
    return [
        watcher.decide(first + i, torch.tensor([value * math.exp(draw.gauss(0, 0.2)) for value in (loss, *norms)]))
        for i in range(steps)
    ]


def decide(watcher: GradientMonitor, step: int, loss: float, *norms: float):
    return watcher.decide(step, torch.tensor([loss, *norms]))


def by_hand(norms: list[float], factor: float) -> tuple[float, float]:
    """Median of norms, and what is unusual, from sorted lists."""
    known = sorted(math.log(norm) for norm in norms if norm > 0)
    median = known[(len(known) - 1) // 2] if known else -math.inf
    if len(known) < 20:
        return math.exp(median), math.inf
    distances = sorted(abs(value - median) for value in known)
    spread = distances[(len(distances) - 1) // 2] / statistics.NormalDist().inv_cdf(0.75)
    return math.exp(median), max(factor * math.exp(median), math.exp(median + factor * spread))


@pytest.mark.parametrize("factor", [1.5, 5.0])
def test_limits_and_verdicts_are_those_of_plain_medians(factor):
    """Norms of two groups with spreads below and above the factor, the second frozen at first; never many unusual in a row."""
    draw, watcher = random.Random(3), guard(guard_factor=factor, guard_window=50)
    learnt: list[tuple[float, float]] = []
    found = []
    for step in range(1, 400):
        norms = [math.exp(draw.gauss(-1, 0.1)), math.exp(draw.gauss(2, 1.0)) if step > 100 else 0.0]
        if step % 37 == 0:
            norms[step % 2] *= 1000
        expected = [by_hand([row[i] for row in learnt[-50:]], factor) for i in range(2)]
        for got, wanted in zip(zip(*watcher.usual(), strict=True), expected, strict=True):
            assert got == pytest.approx(wanted, rel=1e-4)
        norms = torch.tensor(norms).tolist()  # as fp32 has them
        high = [norm > limit for norm, (_, limit) in zip(norms, expected, strict=True)]
        verdict = decide(watcher, step, 0.1, *norms)
        assert verdict.action == ("watch" if any(high) else "go")
        found.append(any(high))
        if any(high):
            assert [name for name in GROUPS if name in verdict.why] == [n for n, h in zip(GROUPS, high, strict=True) if h]
            assert verdict.clip_norm == pytest.approx(math.hypot(*(median for median, _ in expected)), rel=1e-4)
        else:
            learnt.append(tuple(norms))
    assert 5 < sum(found) < 60
    assert watcher.rate_factor == 1


def test_nothing_is_judged_before_enough_is_known():
    watcher = guard()
    assert feed(watcher, 19) == [PROCEED] * 19
    assert decide(watcher, 20, 0.1, 1e6, 1e6) == PROCEED


def test_one_unusual_step_is_clipped_and_three_in_a_row_raise_the_annealing():
    watcher = guard()
    feed(watcher, 60)
    verdicts = [decide(watcher, 61 + i, 0.1, 50.0, 2.0) for i in range(6)]
    assert [v.action for v in verdicts] == ["watch"] * 6
    assert [v.building for v in verdicts] == [False, False, True, False, False, True]
    assert all(v.clip_norm == pytest.approx(math.hypot(1, 2), rel=0.1) for v in verdicts)
    assert "stem 50 where" in verdicts[0].why
    assert "flow" not in verdicts[0].why
    assert decide(watcher, 67, 0.1, 1.0, 2.0) == PROCEED
    assert not decide(watcher, 68, 0.1, 50.0, 2.0).building


def test_a_new_level_of_the_norms_is_clipped_only_for_a_while():
    watcher = guard()
    feed(watcher, 100)
    actions = [v.action for v in feed(watcher, 200, 101, norms=(30.0, 2.0))]
    assert actions == ["watch"] * 11 + ["go"] * 189
    assert watcher.usual()[0][0] == pytest.approx(30, rel=0.1)
    assert decide(watcher, 301, 0.1, 500.0, 2.0).action == "watch"


def test_a_new_level_in_most_steps_is_learnt_too():
    """Not only where every step has it."""
    watcher = guard()
    feed(watcher, 100)
    actions = [decide(watcher, 101 + i, 0.1, 1.0 if i % 3 == 0 else 30.0, 2.0).action for i in range(100)]
    assert "watch" in actions[:20]
    assert set(actions[20:]) == {"go"}


def test_slow_growth_is_not_unusual():
    watcher = guard()
    assert {decide(watcher, i, 0.1, 1.01**i, 1.0).action for i in range(1, 1000)} == {"go"}


@pytest.mark.parametrize("numbers", [(math.nan, 1.0, 2.0), (math.inf, 1.0, 2.0), (0.1, math.inf, 2.0), (0.1, 1.0, math.nan)])
def test_what_is_no_number_is_skipped_and_not_learnt(numbers):
    watcher = guard()
    feed(watcher, 30)
    before = watcher.state_dict()
    verdict = watcher.decide(31, torch.tensor(numbers))
    assert verdict.action == "skip"
    assert not verdict.moves
    name, number = next((n, x) for n, x in zip(("loss", *GROUPS), numbers, strict=True) if not math.isfinite(x))
    assert verdict.why == f"{name} {number}"
    assert watcher.state_dict() == before | {"step": 31, "skips": [31]}


def test_a_step_is_skipped_from_the_very_first_on():
    assert decide(guard(), 1, math.nan, 1.0, 2.0).action == "skip"


def test_an_overflow_of_the_scaled_loss_is_the_scaler_s():
    watcher = guard()
    feed(watcher, 30)
    before = watcher.state_dict()
    verdicts = [watcher.decide(31 + i, torch.tensor([0.1, math.inf, 2.0]), scale=2.0 ** (9 - i)) for i in range(10)]
    assert [v.action for v in verdicts] == ["scale"] * 9 + ["skip"]  # at 1 nothing is left to try
    assert "scaled by 512" in verdicts[0].why
    assert watcher.decide(41, torch.tensor([math.nan, math.inf, 2.0]), scale=512.0).action == "skip"
    assert watcher.state_dict() == before | {"step": 41, "skips": [40, 41]}


@pytest.mark.parametrize("allowed", [0, 1, 3])
def test_more_skips_than_allowed_within_the_window_roll_back(allowed):
    watcher = guard(guard_skips=allowed, guard_window=50)
    feed(watcher, 60)
    actions = [decide(watcher, 61 + 10 * i, math.nan, 1.0, 2.0).action for i in range(allowed + 1)]
    assert actions == ["skip"] * allowed + ["roll_back"]


def test_rare_skips_never_roll_back():
    watcher = guard(guard_skips=3, guard_window=50)
    actions = [decide(watcher, i, math.nan if i % 17 == 0 else 0.1, 1.0, 2.0).action for i in range(1, 500)]
    assert set(actions) == {"go", "skip"}


@pytest.mark.parametrize("window", [40, 200])
def test_a_loss_that_stays_high_rolls_back_and_one_that_comes_down_does_not(window):
    """Of the last quarter of the window more than half are high."""
    watcher, most = guard(guard_window=window), window // 8
    feed(watcher, 100)
    assert {v.action for v in feed(watcher, most, 101, loss=0.5)} == {"go"}
    assert {v.action for v in feed(watcher, 60, 200)} == {"go"}
    actions = [v.action for v in feed(watcher, most + 1, 300, loss=0.5)]
    assert actions == ["go"] * most + ["roll_back"]


def test_norms_of_ruined_weights_are_not_learnt():
    """A layer that was blown up shows in norms and loss: no new level, but a roll-back once it is clear that it stays."""
    watcher = guard()
    feed(watcher, 100)
    actions = [v.action for v in feed(watcher, 26, 101, loss=5.0, norms=(1000.0, 2.0))]
    assert actions == ["watch"] * 25 + ["roll_back"]


def test_a_loss_that_falls_or_doubles_slowly_is_no_trouble():
    watcher = guard()
    assert {decide(watcher, i, 2 ** (-i / 100), 1.0, 2.0).action for i in range(1, 500)} == {"go"}
    assert {decide(watcher, i, 2 ** (i / 400) / 30, 1.0, 2.0).action for i in range(500, 1500)} == {"go"}


def test_after_as_many_roll_backs_as_allowed_it_stops_and_the_rate_falls_each_time():
    watcher = guard(guard_skips=0, max_rollbacks=2, guard_rate_factor=0.1)
    feed(watcher, 30)
    saved = watcher.state_dict()
    for number in (1, 2):
        assert decide(watcher, 40, math.nan, 1.0, 2.0).action == "roll_back"
        again = guard(guard_skips=0, max_rollbacks=2, guard_rate_factor=0.1)
        again.load_state_dict(saved)
        again.resume_after(watcher)
        watcher = again
        assert watcher.roll_backs == number
        assert watcher.rate_factor == pytest.approx(0.1**number)
    assert decide(watcher, 40, math.nan, 1.0, 2.0).action == "stop"


def test_trouble_began_before_the_first_high_loss_or_skip_that_counts():
    """With the step before: it made the weights that the loss shows."""
    watcher = guard(guard_window=40, guard_skips=2)
    feed(watcher, 100)
    decide(watcher, 101, math.nan, 1.0, 2.0)  # has no loss, and is not counted among those that do
    verdicts = [decide(watcher, 102 + i, 0.5 if i else 0.1, 1.0, 2.0) for i in range(7)]
    assert [(v.action, v.began) for v in verdicts] == [("go", 0)] * 6 + [("roll_back", 102)]
    watcher = guard(guard_window=40, guard_skips=2)
    feed(watcher, 100)
    verdicts = [decide(watcher, 101 + 15 * i, math.nan, 1.0, 2.0) for i in range(5)]  # the first is forgotten by then
    assert [(v.action, v.began) for v in verdicts[:2]] == [("skip", 0)] * 2
    assert (verdicts[2].action, verdicts[2].began) == ("roll_back", 100)
    assert (verdicts[4].action, verdicts[4].began) == ("roll_back", 130)


def test_trouble_from_before_anything_was_usual_began_then():
    watcher = guard(guard_window=40)
    feed(watcher, 13)
    verdicts = [decide(watcher, step, 0.5, 1.0, 2.0) for step in range(14, 31)]
    assert [verdict.action for verdict in verdicts] == ["go"] * 16 + ["roll_back"]  # 20 losses, and 10 that are judged by them
    assert verdicts[-1].began == 13


def test_before_anything_is_usual_a_loss_far_above_the_first_is_high():
    """At twice 25 times the first one; as soon as more than half of a quarter of the window are."""
    for factor, expected in ((49.0, []), (51.0, [("roll_back", 1)])):
        watcher = guard(guard_window=40)
        verdicts = [decide(watcher, step, 0.1 if step == 1 else factor * 0.1, 1.0, 2.0) for step in range(1, 8)]
        assert [(v.action, v.began) for v in verdicts if v.action != "go"] == expected
    # and the median of an explosion never becomes the usual loss
    watcher = guard(guard_window=40)
    decide(watcher, 1, 0.1, 1.0, 2.0)
    actions = [decide(watcher, step, 0.1 if step % 2 else 10.0, 1.0, 2.0).action for step in range(2, 200)]
    assert set(actions) == {"go"}  # five of ten, and a median of 10
    assert decide(watcher, 200, 10.0, 1.0, 2.0).action == "go"
    assert decide(watcher, 201, 10.0, 1.0, 2.0).action == "roll_back"


def test_what_is_in_doubt_is_all_to_which_trouble_may_yet_be_traced():
    """Against what the guard says later: whatever comes, a state that was good once is never one to go back from."""
    draw, found = random.Random(1), 0
    for _ in range(300):
        watcher, since, level = guard(guard_window=40, guard_skips=2), [], 1.0
        for step in range(1, 150):
            since.append(watcher.first_doubtful_step())
            level *= draw.choice([1.0] * 30 + [0.5, 3.0, 3.0])
            loss = math.nan if draw.random() < 0.03 else level * draw.lognormvariate(0, 0.3)
            verdict = decide(watcher, step, loss, 1.0, 2.0)
            if verdict.action == "roll_back":
                assert max(since) <= verdict.began, (since, verdict)
                found += verdict.began > 20
                break
    assert found > 50


def test_nothing_is_out_of_doubt_before_a_loss_can_be_judged_and_later_all_but_the_last_steps():
    watcher = guard(guard_window=40)
    assert watcher.first_doubtful_step() < 0
    feed(watcher, 29)
    assert watcher.first_doubtful_step() == 0
    feed(watcher, 1, 30)
    assert watcher.first_doubtful_step() == 30 - 10
    feed(watcher, 20, 31)
    decide(watcher, 51, math.nan, 1.0, 2.0)
    feed(watcher, 39, 52)
    assert watcher.first_doubtful_step() == 50  # for as long as the skip counts
    feed(watcher, 1, 91)
    assert watcher.first_doubtful_step() == 91 - 10


def test_doubts_are_what_is_not_judged_usual():
    """Beforehand and on the device: also at the limit itself, and of numbers that are none."""
    draw, watched = random.Random(0), guard(guard_skips=400)
    found: dict[str, int] = {}
    for step in range(400):
        seen = torch.tensor([1.0, draw.lognormvariate(0, 0.3), draw.lognormvariate(1, 0.3)])
        if step % 9 == 5:
            seen[1 + step % 2] = draw.choice([math.nan, math.inf, 1e3, watched.usual()[1][step % 2]])
        needs_review = watched.needs_review(seen)
        verdict = watched.decide(step, seen)
        found[verdict.action] = found.get(verdict.action, 0) + 1
        assert needs_review.item() == (verdict.action != "go"), (step, seen, verdict)
    assert found["go"] > 300
    assert min(found["skip"], found["watch"]) > 5


def test_goes_on_from_its_state_as_if_never_stopped():
    """Through a JSON file, at every kind of moment: filling, full, unusual steps, skips."""
    draw = random.Random(5)
    rows = [[draw.lognormvariate(0, 0.3) for _ in range(3)] for _ in range(300)]
    for step in (60, 61, 62, 90, 130, 131, 180):
        rows[step][1] = 1000.0
    rows[70][0] = rows[150][2] = math.nan
    whole, again = guard(guard_window=70), guard(guard_window=70)
    kinds = set()
    for step, row in enumerate(rows, start=1):
        fresh = guard(guard_window=70)
        fresh.load_state_dict(json.loads(json.dumps(again.state_dict(), allow_nan=False)))
        again = fresh
        verdict = whole.decide(step, torch.tensor(row))
        assert again.decide(step, torch.tensor(row)) == verdict
        assert again.state_dict() == whole.state_dict()
        kinds.add(verdict.action)
    assert kinds == {"go", "watch", "skip"}


def test_of_another_network_what_was_done_still_counts():
    watcher = guard(guard_skips=0)
    feed(watcher, 100)
    decide(watcher, 101, math.nan, 1.0, 2.0)
    other = GradientMonitor(("stem", "refine"), GuardConfig())
    other.load_state_dict(watcher.state_dict())
    other.resume_after(watcher)
    assert (other.roll_backs, other.rate_factor, other.losses) == (1, 0.5, watcher.losses)
    assert other.usual() == ([0.0, 0.0], [math.inf, math.inf])


@pytest.fixture(scope="module")
def network() -> FrameInterpolator:
    torch.manual_seed(0)
    config = presets.override(presets.get("tiny"), phase=2, teacher=True, mixing="mhc", width=2, head_dim=8, d_state=4)
    return FrameInterpolator(config.model, torch.device("cpu"))


def test_every_parameter_is_in_exactly_one_group(network):
    groups = layer_groups(network)
    assert sorted(groups) == ["down", "flow", "mixing", "refine", "stage0", "stage1", "stem", "teacher"]
    grouped = [id(parameter) for parameters in groups.values() for parameter in parameters]
    assert sorted(grouped) == sorted(id(parameter) for parameter in network.parameters())
    assert group_of("backbone.norms.1.weight") == "stage1"
    assert group_of("backbone.stages.0._checkpoint_wrapped_module.0.mixing1.coefficients.gates") == "mixing"


def test_norms_are_those_of_all_gradients_of_a_group_as_one_vector(network):
    groups = layer_groups(network)
    for number, parameter in enumerate(network.parameters()):
        parameter.grad = torch.randn_like(parameter) * 10.0 ** (number % 5) if number % 7 else None
    for parameter in groups["flow"]:
        parameter.grad = None
    for name, norm in zip(groups, gradient_norms(groups).tolist(), strict=True):
        vectors = [p.grad.double().flatten() for p in groups[name] if p.grad is not None]
        assert norm == pytest.approx(torch.cat(vectors).norm().item() if vectors else 0, rel=1e-6), name
    network.zero_grad()
    assert gradient_norms(groups).tolist() == [0] * len(groups)


@pytest.mark.parametrize("value", [math.inf, math.nan])
def test_one_bad_number_shows_in_its_group_alone(network, value):
    groups = layer_groups(network)
    for parameter in network.parameters():
        parameter.grad = torch.ones_like(parameter)
    groups["stage1"][3].grad.view(-1)[-1] = value
    assert [name for name, norm in zip(groups, gradient_norms(groups), strict=True) if not norm.isfinite()] == ["stage1"]
    network.zero_grad()


def test_half_precision_gradients_have_fp32_norms():
    """Their squares would overflow in fp16."""
    layer = nn.Linear(100, 100, bias=False).half()
    layer.weight.grad = torch.full_like(layer.weight, 1000.0)
    assert gradient_norms({"all": [layer.weight]}).tolist() == pytest.approx([1e5], rel=1e-4)


def test_update_ratio_is_the_change_by_the_size(network):
    groups = layer_groups(network)
    before = copies(groups)
    with torch.no_grad():
        for parameter in groups["stem"]:
            parameter.mul_(1.01)
    ratios = dict(zip(groups, update_ratios(groups, before).tolist(), strict=True))
    assert ratios.pop("stem") == pytest.approx(0.01, rel=1e-3)
    assert set(ratios.values()) == {0.0}
    with torch.no_grad():
        for parameter, old in zip(groups["stem"], before[list(groups).index("stem")], strict=True):
            parameter.copy_(old)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"guard_factor": 1.0}, "--guard_factor is 1.0; it must be finite and greater than 1"),
        ({"guard_factor": math.inf}, "--guard_factor is inf"),
        ({"guard_window": 39}, "--guard_window is 39; it must be at least 40"),
        ({"guard_skips": -1}, "--guard_skips is -1; it must not be negative"),
        ({"max_rollbacks": -1}, "--max_rollbacks is -1; it must not be negative"),
        ({"guard_rate_factor": 0.0}, "--guard_rate_factor is 0.0; it must be greater than 0"),
        ({"guard_rate_factor": 1.5}, "--guard_rate_factor is 1.5"),
        ({"guard": False, "guard_factor": 4.0}, "--guard_factor 4.0 has no effect without --guard"),
        ({"guard": False, "guard_rate_factor": 0.1}, "--guard_rate_factor 0.1 has no effect without --guard"),
        ({"max_rollbacks": 0, "guard_rate_factor": 0.1}, "--guard_rate_factor 0.1 has no effect without"),
    ],
)
def test_bad_settings_are_refused(settings, message):
    with pytest.raises(ConfigError, match=r"^--") as error:
        validate(presets.override(presets.get("tiny"), **settings))
    assert message in str(error.value)


def test_on_a_cpu_numbers_are_there_at_once():
    seen = torch.rand(3)
    assert async_copy_to_cpu(seen)() is seen


@pytest.mark.gpu
def test_on_a_gpu_numbers_arrive_before_the_work_that_follows_them_is_done():
    seen = torch.arange(3.0, device="cuda") + 1
    arrived = async_copy_to_cpu(seen)
    torch.cuda._sleep(2_000_000_000)  # clock cycles: a second
    done = torch.cuda.Event()
    done.record()
    assert arrived().tolist() == [1.0, 2.0, 3.0]
    assert not done.query()
    assert arrived().device.type == "cpu"
