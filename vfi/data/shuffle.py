"""The order of a pass through a set, and the interleaving of several sets.

Shards are shuffled, and so are the samples of every few neighbouring shards among each other: well mixed, and a reader that
follows the order needs only that many shards at a time. Each such block draws from a generator of its own, so that a
worker computes the blocks that it reads and no other: what it costs does not grow with the number of samples.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np


class PassOrder:
    """The sample numbers 0 … N-1 of a set, in the order of one pass through it.

    `key` is (seed, pass, set), each from 0; `shuffle_shards` shards make a block, the samples of which are mixed.
    """

    def __init__(self, shard_samples: np.ndarray, key: tuple[int, int, int], shuffle_shards: int) -> None:
        self.key, self.shuffle_shards = key, shuffle_shards
        shards = np.random.default_rng(key).permutation(len(shard_samples))
        self.sizes = shard_samples[shards]
        self.firsts = (np.cumsum(shard_samples) - shard_samples)[shards]  # number of the first sample of each shard
        self.block_starts = (np.cumsum(self.sizes) - self.sizes)[::shuffle_shards]
        self._blocks: dict[int, np.ndarray] = {}

    def at(self, places: np.ndarray) -> np.ndarray:
        """Return the sample numbers at these positions of the order, in any shape; keeps their blocks for the next call."""
        blocks = np.searchsorted(self.block_starts, places, side="right") - 1
        needed, which = np.unique(blocks, return_inverse=True)
        self._blocks = {b: self._blocks[b] if b in self._blocks else self._block(b) for b in needed.tolist()}
        samples = [self._blocks[b] for b in needed.tolist()]
        starts = np.cumsum([0, *map(len, samples)])
        return np.concatenate(samples)[starts[which.reshape(places.shape)] + places - self.block_starts[blocks]]

    def _block(self, number: int) -> np.ndarray:
        shards = slice(number * self.shuffle_shards, (number + 1) * self.shuffle_shards)
        samples = [np.arange(first, first + size) for first, size in zip(self.firsts[shards], self.sizes[shards], strict=True)]
        return np.random.default_rng((*self.key, 1 + number)).permutation(np.concatenate(samples))


class Mixture:
    """The set that each position of an epoch is taken from: a pattern of the ratio, repeated from the epoch's start on.

    An epoch has as many places as one pass through the first set takes. The other sets continue in the next epoch where they
    stopped: they have passes of their own. One set alone is a mixture, too.
    """

    def __init__(self, sizes: Sequence[int], ratio: Sequence[int]) -> None:
        self.sizes = sizes
        self.ratio = np.array(ratio) // math.gcd(*ratio)
        self.period = int(self.ratio.sum())
        self.pattern = interleaved(self.ratio)
        which = self.pattern == np.arange(len(sizes))[:, None]
        self._before = np.concatenate([np.zeros((len(sizes), 1), int), np.cumsum(which, axis=1)], axis=1)
        rounds, rest = divmod(sizes[0], int(self.ratio[0]))
        self.places = rounds * self.period + int(np.searchsorted(self._before[0], rest))
        self.per_epoch = [int(self.count(which, np.array(self.places))) for which in range(len(sizes))]

    def set_at(self, places: np.ndarray) -> np.ndarray:
        """Return the set of each position."""
        return self.pattern[places % self.period]

    def count(self, which: int, places: np.ndarray) -> np.ndarray:
        """Return the number of samples that a set has given before each position."""
        rounds, rest = np.divmod(places, self.period)
        return rounds * self.ratio[which] + self._before[which, rest]


def interleaved(ratio: np.ndarray) -> np.ndarray:
    """Return the sets of `sum(ratio)` positions: each position goes to the set that is furthest behind its share."""
    given = np.zeros(len(ratio), int)
    pattern = []
    for place in range(1, ratio.sum() + 1):
        which = int(np.argmax(ratio * place - given * ratio.sum()))
        given[which] += 1
        pattern.append(which)
    return np.array(pattern)
