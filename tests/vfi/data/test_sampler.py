"""The plan: every sample once, equal steps, the same for any ranks and workers, well mixed, few open shards; positions."""

from __future__ import annotations

import itertools
import time
import tracemalloc
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vfi.data.sampler import START, Plan, Position
from vfi.data.shuffle import Mixture, PassOrder, interleaved


def order_of(shards, seed=0, number=0, shuffle_shards=8) -> np.ndarray:
    """A whole pass."""
    return PassOrder(np.array(shards), (seed, number, 0), shuffle_shards).at(np.arange(sum(shards)))


@given(
    shards=st.lists(st.integers(1, 9), min_size=1, max_size=30),
    seed=st.integers(0, 99),
    number=st.integers(0, 99),
    block=st.integers(1, 40),
)
def test_order_is_a_permutation_and_any_part_of_it_is_the_same(shards, seed, number, block):
    whole = order_of(shards, seed, number, block)
    assert sorted(whole) == list(range(sum(shards)))
    places = np.random.default_rng(seed).integers(sum(shards), size=(3, 5))
    order = PassOrder(np.array(shards), (seed, number, 0), block)
    for row in places:
        assert np.array_equal(order.at(row), whole[row])
    assert np.array_equal(order.at(places), whole[places])


def test_order_depends_on_seed_and_pass_and_set():
    keys = itertools.product(range(4), range(4), range(3))
    orders = {tuple(PassOrder(np.array([10] * 5), key, 2).at(np.arange(50))) for key in keys}
    assert len(orders) == 48


def test_order_of_a_seed_is_what_it_always_was():
    """A literal, since a run that goes on under a newer version has to go on with the same samples."""
    assert order_of([5, 3, 4], 7, 2, 2).tolist() == [9, 7, 11, 5, 10, 8, 6, 2, 0, 3, 4, 1]


def test_order_needs_few_shards_at_a_time():
    order = order_of([10] * 12, shuffle_shards=3)
    for block in order.reshape(4, 30):
        assert len(set(block // 10)) == 3


def steps_of(plan, start=START, count=None, lanes=None) -> list[np.ndarray]:
    """(set, pass, number) of each lane, `[lanes, 3]`, of some steps, by default the rest of the epoch."""
    lanes = np.arange(plan.global_batch) if lanes is None else lanes
    count = plan.steps_left(start) if count is None else count
    rows = itertools.islice(plan.walk(start, lanes), count)
    return [np.stack([samples.sets, samples.passes, samples.numbers], axis=1) for _, samples in rows]


def numbers_of(steps) -> list[int]:
    return [int(number) for step in steps for number in step[:, 2]]


folders = st.builds(
    lambda shards, largest, seed: np.random.default_rng(seed).integers(1, largest, shards, endpoint=True).tolist(),
    st.integers(1, 200),
    st.integers(1, 60),
    st.integers(0, 99),
)
plans = st.fixed_dictionaries(
    {
        "shards": folders,
        "ranks": st.integers(1, 64),
        "workers": st.integers(0, 8),
        "batch_size": st.integers(1, 8),
        "accumulation": st.integers(1, 3),
        "seed": st.integers(0, 99),
        "epoch": st.integers(0, 9),
        "shuffle_shards": st.integers(1, 9),
        "lane_bundle": st.integers(1, 20),
        "remainder": st.sampled_from(["drop", "pad"]),
    }
)


@settings(max_examples=150)
@given(plans)
def test_every_sample_once_in_equal_steps_for_any_ranks_and_workers(case):
    """Each rank's each worker on its own, put together: what one process without workers sees, whatever the shards."""
    ranks, batch_size, accumulation = case["ranks"], case["batch_size"], case["accumulation"]
    options = {name: case[name] for name in ("shuffle_shards", "lane_bundle", "remainder")}
    share = batch_size * accumulation
    plan, samples = Plan([case["shards"]], case["seed"], ranks * share, **options), sum(case["shards"])
    full, rest = divmod(samples, ranks * share)
    assert plan.steps_per_epoch == full + (case["remainder"] == "pad" and rest > 0)
    whole = numbers_of(steps_of(plan, Position(case["epoch"])))
    if case["remainder"] == "drop":
        assert len(set(whole)) == len(whole) == samples - rest
    else:
        assert sorted(whole[:samples]) == list(range(samples))
        first = order_of(case["shards"], case["seed"], case["epoch"], case["shuffle_shards"])  # what pads starts the order
        assert whole[samples:] == first[np.arange(len(whole) - samples) % samples].tolist()
    if not plan.steps_per_epoch:
        return
    whole = np.array(whole).reshape(-1, ranks, accumulation, batch_size)
    for rank in {0, ranks // 2, ranks - 1}:
        lanes = np.arange(rank * share, (rank + 1) * share).reshape(accumulation, batch_size)
        workers = min(case["workers"], batch_size) or 1
        parts = [
            np.array(numbers_of(steps_of(plan, Position(case["epoch"]), lanes=part.ravel()))).reshape(-1, *part.shape)
            for part in np.array_split(lanes, workers, axis=1)
        ]
        assert {len(part) for part in parts} == {plan.steps_per_epoch}
        assert np.array_equal(np.concatenate(parts, axis=2), whole[:, rank])


def spread(plan, shards) -> tuple[float, float]:
    """Mean number of shards in a global batch, and what it would be if each sample were drawn from all of them."""
    of_sample = np.repeat(np.arange(len(shards)), shards)
    found = np.mean([len(set(of_sample[step[:, 2]])) for step in steps_of(plan)])
    return float(found), len(shards) * (1 - (1 - 1 / len(shards)) ** plan.global_batch)


@pytest.mark.parametrize("lane_bundle", [1, 8, 32])
def test_a_global_batch_is_mixed_from_many_shards(lane_bundle):
    """About as many as if each sample were drawn from all shards; the last line's plan has its samples in the files' order."""
    shards = [64] * 200
    found, expected = spread(Plan([shards], 0, 256, lane_bundle=lane_bundle), shards)
    assert found > 0.8 * min(expected, 8 * 256 / lane_bundle)
    assert spread(Plan([[64] * 200], 0, 256, lane_bundle=256, shuffle_shards=1), shards)[0] < 10  # a plan that does not mix


def test_neighbours_part_and_epochs_differ():
    """Samples that lie together are far apart in time, and when a sample comes says nothing about the next epoch."""
    shards = list(np.random.default_rng(0).integers(32, 96, 200))
    plan = Plan([shards], 0, 128)
    when = np.full((8, sum(shards)), np.nan)
    for epoch in range(8):
        for step, samples in enumerate(steps_of(plan, Position(epoch))):
            when[epoch, samples[:, 2]] = step
    apart = np.abs(np.diff(when[0]))
    assert np.nanmean(apart == 0) < 3 / plan.steps_per_epoch  # of two drawn at random it would be one in so many
    correlations = [
        np.corrcoef(one[~np.isnan(one + other)], other[~np.isnan(one + other)])[0, 1]
        for one, other in itertools.combinations(when, 2)
    ]
    # samples move in blocks, so the noise is that of a few dozen draws and not of thousands
    assert np.abs(correlations).max() < 0.35
    assert abs(np.mean(correlations)) < 0.1
    left_out = np.isnan(when)
    assert left_out.sum(axis=1).tolist() == [sum(shards) % 128] * 8
    assert left_out.sum(axis=0).max() < 5  # not the same ones every time


def test_a_bundle_reads_on_through_few_shards():
    """A rank never has more shards open than its bundles' blocks have, and reads no more than its part of all of them."""
    shards, ranks = [32] * 256, 8
    of_sample = np.repeat(np.arange(256), shards)
    plan = Plan([shards], 3, 16 * ranks, lane_bundle=8, shuffle_shards=4)
    read = [of_sample[np.stack(steps_of(plan, lanes=np.arange(16 * r, 16 * r + 16)))[:, :, 2]] for r in range(ranks)]
    for steps in read:
        assert len(np.unique(steps)) <= 256 // ranks + 2 * 3  # its part, and what it shares with its neighbours
        for first in range(len(steps) - 4):
            assert len(np.unique(steps[first : first + 4])) <= 2 * 2 * 4
    assert sum(len(np.unique(steps)) for steps in read) < 1.2 * 256


def test_a_large_job(capsys):
    """512 ranks with 8 workers each, 4,096 shards of random sizes, a million samples: what it costs and who reads what."""
    ranks, batch_size, workers = 512, 32, 8
    rng = np.random.default_rng(0)
    shards = rng.integers(128, 384, 4096, endpoint=True)
    plan = Plan([shards], 0, ranks * batch_size)
    whole = np.stack([step[:, 2] for step in steps_of(plan)])
    assert len(np.unique(whole)) == whole.size > shards.sum() - ranks * batch_size
    sizes = rng.integers(100_000, 500_000, shards.sum())
    by_rank = sizes[whole].reshape(-1, ranks, batch_size).sum(axis=(0, 2))
    assert by_rank.max() < 1.05 * by_rank.mean()
    shard = np.repeat(np.arange(4096), shards)[whole].reshape(-1, ranks, batch_size)
    by_node = sum(len(np.unique(shard[:, first : first + 8])) for first in range(0, ranks, 8)) / 4096
    assert by_node < 1.25  # how often a shard is fetched when eight ranks share a cache
    share = batch_size // workers
    of_worker = [len(np.unique(shard[:, rank, :share])) for rank in range(0, ranks, 16)]
    assert max(of_worker) <= 2 * 8  # two blocks of shards at most
    tracemalloc.start()
    began = time.perf_counter()
    lanes = 100 * batch_size + np.arange(share)
    mine = np.stack([step[:, 2] for step in steps_of(plan, lanes=lanes)])
    seconds, megabytes = time.perf_counter() - began, tracemalloc.get_traced_memory()[1] / 1e6
    tracemalloc.stop()
    assert np.array_equal(mine, whole[:, lanes])
    assert megabytes < 20  # the whole order would take 8 MB, and as much again for every array on the way
    with capsys.disabled():
        print(
            f"\n{ranks} ranks: a worker plans {mine.size} samples in {1000 * seconds:.0f} ms and {megabytes:.1f} MB; "
            f"a rank reads up to {by_rank.max() / by_rank.mean():.3f} of the mean bytes; "
            f"a worker reads {np.mean(of_worker):.1f} shards, and each shard is fetched {by_node:.2f} times by nodes of eight"
        )


def test_a_worker_plans_its_own_part_only():
    """A hundred million samples in 400,000 shards: the first step of a worker needs megabytes, not gigabytes."""
    tracemalloc.start()
    plan = Plan([np.full(400_000, 256)], 0, 16384)
    ((_, samples),) = itertools.islice(plan.walk(START, np.arange(4000, 4004)), 1)
    peak = tracemalloc.get_traced_memory()[1] / 1e6
    tracemalloc.stop()
    assert len(set(samples.numbers.tolist())) == 4
    assert peak < 60  # a few numbers a shard; the whole order would take 820


batches = st.lists(st.tuples(st.integers(1, 40), st.integers(1, 6)), min_size=1, max_size=6)


@settings(max_examples=150)
@given(
    sets=st.lists(st.lists(st.integers(1, 9), min_size=1, max_size=30), min_size=1, max_size=3),
    ratio=st.tuples(*[st.integers(1, 5)] * 3),
    batches=batches,
    options=st.fixed_dictionaries(
        {
            "shuffle_shards": st.integers(1, 9),
            "lane_bundle": st.integers(1, 9),
            "remainder": st.sampled_from(["drop", "pad"]),
        }
    ),
)
def test_any_global_batches_one_after_the_other_see_no_sample_twice(sets, ratio, batches, options):
    """(global batch, steps) of a run that stops and goes on: sets in turn as the ratio says, each pass without repeats."""
    ratio = ratio[: len(sets)]
    position, seen = START, Counter()
    for global_batch, steps in batches:
        plan = Plan(sets, 5, global_batch, ratio=ratio, **options)
        if not plan.steps_per_epoch:
            continue
        for step in steps_of(plan, position, steps):
            position = plan.settled(position)
            done = sum(size * count for size, count in position.done)
            real = step[: plan.samples - done].tolist()  # without what pads the last step
            assert [sample[0] for sample in real] == plan.mixture.set_at(done + np.arange(len(real))).tolist()
            seen.update(map(tuple, real))
            position = plan.after(position)
    assert not seen or max(seen.values()) == 1


@settings(max_examples=100)
@given(
    shards=st.lists(st.integers(1, 9), min_size=1, max_size=40),
    batches=batches,
    last=st.integers(1, 40),
    epoch=st.integers(0, 3),
    lane_bundle=st.integers(1, 9),
)
def test_the_rest_of_an_epoch_is_all_that_was_not_seen(shards, batches, last, epoch, lane_bundle):
    position, seen = Position(epoch), []
    for global_batch, steps in [*batches, (last, None)]:
        plan = Plan([shards], 1, global_batch, lane_bundle=lane_bundle, remainder="pad")
        if plan.settled(position).epoch > epoch:
            break
        left = plan.steps_left(position)
        for step in steps_of(plan, position, left if steps is None else min(left, steps)):
            seen += numbers_of([step])
            position = plan.after(position)
    assert sorted(seen[: sum(shards)]) == list(range(sum(shards)))
    assert len(seen) < sum(shards) + max(last, *(size for size, _ in batches))


def test_a_position_counts_steps_and_epochs():
    plan = Plan([[22]], 0, 4)
    position = START
    for step in range(12):
        assert plan.at_step(step) == position
        assert plan.epochs_at(position) == pytest.approx(step / 5)
        assert plan.steps_until(position, 3) == 15 - step
        position = plan.after(position)
    assert position == Position(2, ((4, 2),))
    smaller = Plan([[22]], 0, 3)
    assert smaller.steps_left(position) == (22 - 8) // 3
    assert smaller.steps_until(position, 3) == 4
    assert smaller.steps_until(position, 5) == 4 + 2 * 7
    assert smaller.after(position) == Position(2, ((4, 2), (3, 1)))
    assert smaller.epochs_at(smaller.after(position)) == pytest.approx(2 + 11 / 20)
    assert smaller.settled(Position(2, ((4, 5),))) == Position(3)  # two samples are left, too few for a step
    assert Plan([[22]], 0, 3, remainder="pad").steps_left(Position(2, ((4, 5),))) == 1
    assert smaller.steps_until(Position(3), 3) == 0


def test_a_position_belongs_to_an_order():
    plain = Plan([[9, 9]], 0, 4)
    assert Plan([[9, 9]], 0, 6).order == plain.order
    others = [Plan([[9, 9]], 1, 4), Plan([[9, 9]], 0, 4, remainder="pad"), Plan([[9, 9]], 0, 4, lane_bundle=2),
              Plan([[9, 9]], 0, 4, shuffle_shards=1), Plan([[10, 8]], 0, 4), Plan([[9], [9]], 0, 4, ratio=(1, 1))]  # fmt: skip
    assert len({plan.order for plan in [plain, *others]}) == 7


@pytest.mark.parametrize(("ratio", "global_batch"), [((2, 1), 6), ((2, 1), 16), ((3, 5), 7), ((7, 2, 1), 32), ((1, 1, 1), 1)])
def test_the_ratio_holds_in_every_window(ratio, global_batch):
    """Of any 200 neighbours in the order of training, each set has its part but for two; over epochs' ends, too."""
    plan = Plan([[40] * 20, [30] * 5, [25] * 3][: len(ratio)], 0, global_batch, ratio=ratio)
    sets = np.concatenate([step[:, 0] for step in steps_of(plan, count=3 * plan.steps_per_epoch)])
    for which, part in enumerate(ratio):
        counts = np.convolve(sets == which, np.ones(200, int), mode="valid")
        assert np.abs(counts - 200 * part / sum(ratio)).max() <= 2.5


def test_an_epoch_of_a_mixture_is_the_first_set_once():
    """The second set continues where it stopped, in passes of its own that are shuffled again."""
    plan = Plan([[10, 10, 10, 10], [7, 6]], 0, 6, ratio=(2, 1))
    assert (plan.samples, plan.steps_per_epoch) == (60, 10)
    epochs = [np.concatenate(steps_of(plan, Position(epoch))) for epoch in range(3)]
    for number, epoch in enumerate(epochs):
        first = epoch[epoch[:, 0] == 0]
        assert sorted(first[:, 2]) == list(range(40))
        assert set(first[:, 1]) == {number}
    second = np.concatenate([epoch[epoch[:, 0] == 1] for epoch in epochs])
    assert second[:, 1].tolist() == [i // 13 for i in range(60)]
    passes = [second[second[:, 1] == number, 2].tolist() for number in range(4)]
    assert all(sorted(numbers) == list(range(13)) for numbers in passes)
    assert len(set(map(tuple, passes))) == 4


@given(st.lists(st.integers(1, 9), min_size=1, max_size=4))
def test_no_set_is_behind_by_more_than_one(ratio):
    pattern = interleaved(np.array(ratio))
    given = np.cumsum(pattern == np.arange(len(ratio))[:, None], axis=1)
    parts = np.outer(ratio, np.arange(1, len(pattern) + 1)) / sum(ratio)
    assert np.abs(given - parts).max() <= 1
    assert given[:, -1].tolist() == ratio
    mixture = Mixture([100] * len(ratio), ratio)
    places = np.arange(40)
    for which in range(len(ratio)):
        counts = np.cumsum(mixture.set_at(places) == which)
        assert np.array_equal(mixture.count(which, places + 1), counts)
