"""Skip, count and name samples that can't be used, and stop training when there are too many.

A worker meets a fault and notes it in its batch, the trainer adds up those of all ranks, and `BadSampleMonitor` compares the
sum with the rate that is allowed. Evaluation skips nothing: there a fault is the error that ends the job.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import NamedTuple, get_args

from shards.sample_rules import FaultKind
from shards.schema import ShardError

_JUDGED_FROM = 1000  # reads: fewer are judged as if they were this many, or one bad sample among the first would end a run


class BadSample(NamedTuple):
    """A skipped sample: its location, and why it can't be used."""

    kind: FaultKind
    where: str
    why: str

    def __str__(self) -> str:
        return f"{self.kind}: {self.where}: {self.why}"


class FaultError(ShardError):
    """Raised for a sample that can't be used."""

    fault: BadSample  # not there once the error comes out of a loader process: torch makes it again from its text

    def __init__(self, fault: BadSample | str) -> None:
        super().__init__(fault if isinstance(fault, str) else f"{fault.where}: {fault.why}")
        if isinstance(fault, BadSample):
            self.fault = fault


class FaultRateError(ShardError):
    """Raised when more samples were skipped than --max_bad_sample_rate allows."""


@dataclasses.dataclass
class BadSampleCounts:
    """Counts of samples read and skipped: by one rank since the last row of metrics, or by a whole run."""

    reads: int = 0
    faults: Counter[BadSample] = dataclasses.field(default_factory=Counter)

    def add(self, samples: int, faults: Sequence[BadSample]) -> None:
        """Add a batch: its samples, and the bad ones that were read before each of them."""
        self.reads += samples + len(faults)
        self.faults.update(faults)


class BadSampleMonitor:
    """The samples that all ranks have skipped since the start or resume of a run, compared with the allowed rate."""

    def __init__(self, max_rate: float, epoch: int = 0) -> None:
        """`epoch`: samples of an epoch; a part of the set is read at a time, and a broken shard is many of these."""
        self.max_rate, self.judged_from = max_rate, max(_JUDGED_FROM, epoch)
        self.reads, self.by_kind = 0, Counter[str]()

    def add(self, tallies: Iterable[BadSampleCounts]) -> Counter[BadSample]:
        """Add the counts of all ranks since the last call; return their bad samples, with the number of times each was met."""
        fresh = Counter[BadSample]()
        for tally in tallies:
            self.reads += tally.reads
            fresh.update(tally.faults)
        for found, count in fresh.items():
            self.by_kind[found.kind] += count
        return fresh

    def numbers(self) -> dict[str, float]:
        """Return the numbers for a row of metrics: reads, rate, and bad samples of every kind."""
        kinds: tuple[str, ...] = get_args(FaultKind)
        return {"reads": self.reads, "rate": self.rate} | {kind: self.by_kind[kind] for kind in kinds}

    @property
    def rate(self) -> float:
        """The number of bad samples / reads."""
        return self.by_kind.total() / max(self.reads, 1)

    def check(self, example: BadSample) -> None:
        """Raise FaultRateError, which shows `example`, when there are too many."""
        faults = self.by_kind.total()
        hopeless = faults > max(self.reads, _JUDGED_FROM) / 2
        if faults <= self.max_rate * max(self.reads, self.judged_from) and not hopeless:
            return
        kinds = ", ".join(f"{kind} {count}" for kind, count in self.by_kind.most_common())
        raise FaultRateError(
            f"{faults} of {self.reads} samples read could not be used ({kinds}), more than --max_bad_sample_rate "
            f"{self.max_rate} allows (it is judged as of {self.judged_from} reads). One of them: {example.where}: "
            f"{example.why}. Look with `python -m shards.verify`, repair the shards, or allow more"
        )
