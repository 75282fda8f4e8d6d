"""What becomes of a sample that can't be used? It is skipped, counted by kind and named, and too many of them end training.

A worker meets a fault and notes it in its batch, the trainer adds up those of all ranks, and `BadSampleMonitor` compares the
sum with the rate that is allowed. Evaluation skips nothing: there a fault is the error that ends the job.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Literal, NamedTuple, get_args

from shards.schema import ShardError

FaultKind = Literal["shard", "duplicate", "member", "image", "size", "flow"]
"""shard: a tar that is missing or not what its index says; duplicate: a key that was there before; member: a file that is
missing or too large; image: not to be decoded; size: frames of another size; flow: not of the frame's size, or not finite."""
_JUDGED_FROM = 1000  # reads: fewer are judged as if they were so many, or one bad sample among the first would end a run
_LONGEST_TEXT = 300


class BadSample(NamedTuple):
    """One sample that was skipped: where it lies and why it can't be used."""

    kind: FaultKind
    where: str
    why: str


class FaultError(ShardError):
    """A sample can't be used, and why."""

    fault: BadSample  # not there once the error comes out of a loader process: torch makes it again from its text

    def __init__(self, fault: BadSample | str) -> None:
        super().__init__(fault if isinstance(fault, str) else f"{fault.where}: {fault.why}")
        if isinstance(fault, BadSample):
            self.fault = fault


class FaultRateError(ShardError):
    """More samples were skipped than --max_fault_rate allows."""


def printable(text: str) -> str:
    """On one line, without control characters, and not too long."""
    text = text if text.isprintable() else text.encode("unicode_escape", "surrogatepass").decode()
    return text if len(text) <= _LONGEST_TEXT else text[: _LONGEST_TEXT - 1] + "…"


@dataclasses.dataclass
class BadSampleCounts:
    """What was read and what was skipped: by one rank since the last row of metrics, or by a whole run."""

    reads: int = 0
    faults: Counter[BadSample] = dataclasses.field(default_factory=Counter)

    def add(self, samples: int, faults: Sequence[BadSample]) -> None:
        """One batch: the samples in it, and what was read in vain before each of them could be used."""
        self.reads += samples + len(faults)
        self.faults.update(faults)


class BadSampleMonitor:
    """What a run has skipped since it was started or resumed, on all ranks, against what it may skip."""

    def __init__(self, max_rate: float, epoch: int = 0) -> None:
        """`epoch`: samples of an epoch; a part of the set is read at a time, and a broken shard is many of these."""
        self.max_rate, self.judged_from = max_rate, max(_JUDGED_FROM, epoch)
        self.reads, self.by_kind = 0, Counter[str]()

    def add(self, tallies: Iterable[BadSampleCounts]) -> Counter[BadSample]:
        """The faults of all ranks since the last call, with how often each was met."""
        fresh = Counter[BadSample]()
        for tally in tallies:
            self.reads += tally.reads
            fresh.update(tally.faults)
        for found, count in fresh.items():
            self.by_kind[found.kind] += count
        return fresh

    def numbers(self) -> dict[str, float]:
        """One row of metrics: reads, rate, and faults of every kind."""
        kinds: tuple[str, ...] = get_args(FaultKind)
        return {"reads": self.reads, "rate": self.rate} | {kind: self.by_kind[kind] for kind in kinds}

    @property
    def rate(self) -> float:
        """Faults / reads."""
        return self.by_kind.total() / max(self.reads, 1)

    def check(self, example: BadSample) -> None:
        """FaultRateError when there are too many; `example` is shown."""
        faults = self.by_kind.total()
        hopeless = faults > max(self.reads, _JUDGED_FROM) / 2
        if faults <= self.max_rate * max(self.reads, self.judged_from) and not hopeless:
            return
        kinds = ", ".join(f"{kind} {count}" for kind, count in self.by_kind.most_common())
        raise FaultRateError(
            f"{faults} of {self.reads} samples read could not be used ({kinds}), more than --max_fault_rate {self.max_rate} "
            f"allows (it is judged as of {self.judged_from} reads). One of them: {example.where}: {example.why}. "
            f"Look with `python -m shards.verify`, repair the shards, or allow more"
        )
