"""The sample plan: which samples each step sees, as a pure function of seed, epoch, sizes and global batch.

Each slot of a global batch is a *lane*, and `lane_bundle` neighbouring lanes make a bundle. The order of an epoch (shuffle.py)
is cut into one part a bundle, and a bundle walks along its part, a sample for each of its lanes a step. A rank
owns neighbouring lanes, a worker a part of its rank's. So

- every sample comes once an epoch, and all ranks make the same number of steps, whatever the number of shards;
- what a step sees depends on neither ranks nor workers, only on the global batch;
- a rank reads its own part of the shards, and a bundle has only a block of shards open, one after the other.

The remainder of samples / global batch: `drop` leaves it out this epoch (another one each epoch), `pad` fills the last step up
with the first samples of the epoch's order, which come a second time.

With several sets, the slots of the steps (step by step, lane by lane) are assigned to the sets by their ratio, and each set
has lanes and passes of its own. An epoch is one pass through the first set.

A `Position` says how much of an epoch was done with which global batch. With another global batch (other processes, other batch
size) the rest of the epoch is planned again: no sample comes twice, none is lost.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from vfi.data.shuffle import Mixture, PassOrder

_AT_ONCE = 64  # steps that are planned together


class Position(NamedTuple):
    """Progress of training: the epoch, and what of it is done, as a sequence of (global batch, steps)."""

    epoch: int = 0
    done: tuple[tuple[int, int], ...] = ()


START = Position()


class Samples(NamedTuple):
    """Origins of samples, as arrays of the same length."""

    sets: np.ndarray
    numbers: np.ndarray
    """Number of the sample in its set."""
    passes: np.ndarray
    """How many passes through its set came before."""


class Plan:
    """The samples of every step, the same on every rank. `sets`: the number of samples in each shard of each set."""

    def __init__(
        self,
        sets: Sequence[Sequence[int]],
        seed: int,
        global_batch: int,
        *,
        ratio: Sequence[int] = (1,),
        shuffle_shards: int = 8,
        lane_bundle: int = 8,
        remainder: str = "drop",
    ) -> None:
        self.shards = [np.array(shard_samples) for shard_samples in sets]
        self.seed, self.global_batch = seed, global_batch
        self.shuffle_shards, self.lane_bundle, self.pads = shuffle_shards, lane_bundle, remainder == "pad"
        self.mixture = Mixture([int(samples.sum()) for samples in self.shards], ratio)
        self.samples = self.mixture.places
        """Samples of an epoch, over all sets and with the remainder."""
        self.steps_per_epoch = self._steps(self.samples, global_batch)

    @property
    def order(self) -> str:
        """A short text, equal for plans between which a position carries over: they differ at most in the global batch."""
        settings = (self.seed, self.mixture.ratio.tolist(), self.shuffle_shards, self.lane_bundle, self.pads)
        return f"{zlib.crc32(repr((settings, [samples.tolist() for samples in self.shards])).encode()):08x}"

    def _steps(self, samples: int, global_batch: int) -> int:
        return math.ceil(samples / global_batch) if self.pads else samples // global_batch

    def steps_left(self, position: Position) -> int:
        """Return the number of steps from a position to the end of its epoch."""
        before, under_way = self._split(position)
        done = sum(global_batch * steps for global_batch, steps in before)
        return max(0, self._steps(self.samples - done, self.global_batch) - under_way)

    def _split(self, position: Position) -> tuple[tuple[tuple[int, int], ...], int]:
        """Return what was done of an epoch with other global batches, and the number of steps done with this one."""
        if position.done and position.done[-1][0] == self.global_batch:
            return position.done[:-1], position.done[-1][1]
        return position.done, 0

    def settled(self, position: Position) -> Position:
        """Return the position itself, or the start of the next epoch where this one has no step left."""
        return position if self.steps_left(position) else Position(position.epoch + 1)

    def after(self, position: Position) -> Position:
        """Return the position one step later."""
        epoch, done = self.settled(position)
        before, under_way = self._split(Position(epoch, done))
        return self.settled(Position(epoch, (*before, (self.global_batch, under_way + 1))))

    def at_step(self, step: int) -> Position:
        """Return the position after a number of steps of this plan from the start."""
        epoch, steps = divmod(step, self.steps_per_epoch)
        return Position(epoch, ((self.global_batch, steps),) if steps else ())

    def steps_until(self, position: Position, epochs: int) -> int:
        """Return the number of steps from a position to the end of `epochs` epochs; 0 when they are over."""
        if position.epoch >= epochs:
            return 0
        return self.steps_left(position) + (epochs - position.epoch - 1) * self.steps_per_epoch

    def epochs_at(self, position: Position) -> float:
        """Return the number of epochs up to a position, including the fraction of the current one."""
        done = sum(global_batch * steps for global_batch, steps in position.done)
        whole = done + self.steps_left(position) * self.global_batch
        return position.epoch + (done / whole if done else 0)

    def walk(self, position: Position, lanes: np.ndarray) -> Iterator[tuple[int, Samples]]:
        """Yield, without end, the epoch and the samples of these lanes for every step from a position on."""
        orders: dict[tuple[int, int], PassOrder] = {}
        while True:
            position = self.settled(position)
            segment, first = self._segment(position)
            for start in range(first, segment.steps, _AT_ONCE):
                steps = np.arange(start, min(start + _AT_ONCE, segment.steps))
                sets, passes, places = segment.places(steps, lanes)
                numbers, orders = self._numbers(sets, passes, places, orders)
                for row in range(len(steps)):
                    yield position.epoch, Samples(sets[row], numbers[row], passes[row])
            position = Position(position.epoch + 1)

    def _segment(self, position: Position) -> tuple[_Segment, int]:
        """Return the segment that a position lies in, and how many of its steps are done."""
        before, under_way = self._split(position)
        first, rests = 0, None
        for global_batch, steps in before:
            rests = _Segment(self, position.epoch, first, global_batch, rests).rests(steps)
            first += global_batch * steps
        return _Segment(self, position.epoch, first, self.global_batch, rests), under_way

    def _numbers(
        self, sets: np.ndarray, passes: np.ndarray, places: np.ndarray, known: dict[tuple[int, int], PassOrder]
    ) -> tuple[np.ndarray, dict[tuple[int, int], PassOrder]]:
        """Return the sample numbers at positions in the orders of passes; `known` keeps only those that were needed."""
        numbers, needed = np.empty_like(places), {}
        for which, number in np.unique(np.stack([sets.ravel(), passes.ravel()]), axis=1).T.tolist():
            order = known.get((which, number)) or PassOrder(self.shards[which], (self.seed, number, which), self.shuffle_shards)
            here = (sets == which) & (passes == number)
            numbers[here] = order.at(places[here])
            needed[which, number] = order
        return numbers, needed


class _Segment:
    """The steps of one global batch from a position in an epoch on: the position and pass that each batch slot reads.

    `rests` has for each set what earlier segments left of the pass that is under way; None: nothing was done in this epoch.
    """

    def __init__(self, plan: Plan, epoch: int, first: int, global_batch: int, rests: list[_Runs] | None) -> None:
        self.mixture, self.first, self.global_batch = plan.mixture, first, global_batch
        self.steps = plan._steps(plan.samples - first, global_batch)
        end = min(first + self.steps * global_batch, plan.samples)
        self.of_epoch = [epoch * count for count in self.mixture.per_epoch]  # what each set gave in former epochs
        self.deals = []
        for which, size in enumerate(self.mixture.sizes):
            given, until = (self.of_epoch[which] + int(self.mixture.count(which, np.array(p))) for p in (first, end))
            rest = _Runs.one(given % size, size) if rests is None else rests[which]
            cycle = self.mixture.period // math.gcd(self.mixture.period, global_batch)
            edges = self.mixture.count(which, first + np.arange(cycle + 1) * global_batch)
            self.deals.append(_Deal(np.diff(edges), plan.lane_bundle, given, until, size, rest))

    def places(self, steps: np.ndarray, lanes: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return set, pass and position in the order of that pass, each `[steps, lanes]`."""
        at = self.first + steps[:, None] * self.global_batch + lanes
        padded = at >= self.mixture.places
        sets = self.mixture.set_at(np.where(padded, at % self.mixture.places, at))
        passes, places = np.empty_like(at), np.empty_like(at)
        for which, deal in enumerate(self.deals):
            here = (sets == which) & ~padded
            step, place = np.broadcast_to(steps[:, None], at.shape)[here], at[here]
            lane = self.mixture.count(which, place) - self.mixture.count(which, self.first + step * self.global_batch)
            passes[here], places[here] = deal.places(step, lane)
            here = (sets == which) & padded
            index = self.of_epoch[which] + self.mixture.count(which, at[here] % self.mixture.places)
            passes[here], places[here] = np.divmod(index, self.mixture.sizes[which])
        return sets, passes, places

    def rests(self, steps: int) -> list[_Runs]:
        """Return what is left of each set's pass after `steps` of the steps."""
        here = self.first + steps * self.global_batch
        before = [self.mixture.count(which, np.array([self.first, here])) for which in range(len(self.deals))]
        return [deal.rest(int(np.diff(count)[0])) for deal, count in zip(self.deals, before, strict=True)]


class _Deal:
    """The samples that one set gives in a segment, assigned to its lanes, pass by pass.

    What a pass gives in the segment is the front of what is left of it, cut into neighbouring parts: one a bundle, as long as
    the bundle walks in that pass. How far a bundle has walked follows from the step alone, since the number of samples that
    the set gives in a step repeats.

    `in_step` `[cycle]`: how many it gives in each step, repeated; `given` and `until`: the set's running count at the segment's
    start and end; `size`: samples of a pass; `rest`: what is left of the pass at the start.
    """

    def __init__(self, in_step: np.ndarray, lane_bundle: int, given: int, until: int, size: int, rest: _Runs) -> None:
        self.lane_bundle, self.given, self.until, self.size, self.rest_at_start = lane_bundle, given, until, size, rest
        self.bundle_starts = np.arange(0, in_step.max(), lane_bundle)
        to_bundle = np.clip(in_step[:, None] - self.bundle_starts, 0, lane_bundle)
        self.before = np.concatenate([np.zeros((1, len(self.bundle_starts)), int), np.cumsum(to_bundle, axis=0)])
        self.totals = self.before.sum(axis=1)
        self.passes: dict[int, tuple[np.ndarray, np.ndarray, _Runs]] = {}

    def places(self, steps: np.ndarray, lanes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return passes, and positions in their orders, for steps of the segment and lanes of the set."""
        cycles, rest = np.divmod(steps, len(self.before) - 1)
        passes = (self.given + cycles * self.totals[-1] + self.totals[rest] + lanes) // self.size
        bundles = lanes // self.lane_bundle
        # in every step a set uses its first lanes, so a lane comes after all the earlier ones of its bundle
        walked = cycles * self.before[-1][bundles] + self.before[rest, bundles] + lanes % self.lane_bundle
        places = np.empty_like(walked)
        for number in np.unique(passes).tolist():
            first, sizes, left = self._pass(number)
            starts = np.cumsum(sizes) - sizes
            here = passes == number
            places[here] = left.at((starts - first)[bundles[here]] + walked[here])
        return passes, places

    def rest(self, count: int) -> _Runs:
        """Return what is left of the current pass once the set has given `count` samples of the segment."""
        first, sizes, left = self._pass((self.given + count) // self.size)
        ends = np.cumsum(sizes)
        begins = ends - sizes + self._walked(count) - first
        return left.part(np.append(begins, ends[-1]), np.append(ends, left.ends[-1]))

    def _pass(self, number: int) -> tuple[np.ndarray, np.ndarray, _Runs]:
        """Return what each bundle walked before a pass, what it walks in it, and the assigned positions in its order."""
        if number not in self.passes:
            begin, end = max(self.given, number * self.size), min(self.until, (number + 1) * self.size)
            first, last = self._walked(begin - self.given), self._walked(end - self.given)
            under_way = number == self.given // self.size
            self.passes[number] = first, last - first, self.rest_at_start if under_way else _Runs.one(0, self.size)
        return self.passes[number]

    def _walked(self, count: int) -> np.ndarray:
        """Return what each bundle has walked once the set has given `count` samples of the segment."""
        cycles, rest = divmod(count, int(self.totals[-1]))
        step = int(np.searchsorted(self.totals, rest, side="right")) - 1
        within = np.clip(rest - self.totals[step] - self.bundle_starts, 0, self.lane_bundle)
        return cycles * self.before[-1] + self.before[step] + within


class _Runs(NamedTuple):
    """An increasing list of numbers, stored as runs of consecutive ones: the first number of each, and its end in the list."""

    firsts: np.ndarray
    ends: np.ndarray

    @classmethod
    def one(cls, start: int, end: int) -> _Runs:
        """Return the run start … end - 1."""
        return cls(np.array([start]), np.array([end - start]))

    def at(self, places: np.ndarray) -> np.ndarray:
        """Return the numbers at these positions in the list."""
        run = np.searchsorted(self.ends, places, side="right")
        return self.firsts[run] + places - np.append(0, self.ends)[run]

    def part(self, begins: np.ndarray, ends: np.ndarray) -> _Runs:
        """Return the numbers at the positions of ranges that increase and don't overlap."""
        cuts = np.unique(np.concatenate([begins, ends, self.ends]))
        begins, ends = begins[ends > begins], ends[ends > begins]
        if not len(begins):
            return _Runs(np.zeros(0, int), np.zeros(0, int))
        ranges = np.searchsorted(begins, cuts[:-1], side="right") - 1
        inside = (ranges >= 0) & (cuts[:-1] < ends[ranges])
        return _Runs(self.at(cuts[:-1][inside]), np.cumsum(np.diff(cuts)[inside]))
