"""Scores of an unfinished benchmark, stored as they are computed, so that no sample is measured twice.

    with ScoreCache(folder, settings, rank, world) as cache:
        for number in cache.missing(samples):           # this rank's share of the pending samples
            cache.add(number, scores)                   # any JSON value; written to disk at once
        found = cache.finish(samples)                   # rank 0: the scores of all samples by number; other ranks: None

Each rank writes a file of its own in `folder` and reads those of all ranks: a stopped benchmark resumes with any number of
ranks and gives the same numbers, since JSON keeps every bit of a float. Scores of other settings are discarded.
"""

from __future__ import annotations

import datetime
import hashlib
import json
import shutil
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

import torch

from vfi.errors import JobError
from vfi.io.dataclass_json import write_text
from vfi.runtime.logging import logger

_SETTINGS = "settings.json"
_LONGEST = datetime.timedelta(days=7)  # longest wait of a rank for the slowest one


class ScoreCache:
    """The scores of one benchmark; `settings` is everything that they depend on, as a JSON value."""

    def __init__(self, folder: Path, settings: dict[str, Any], rank: int, world: int) -> None:
        self.folder, self.rank, self.world = folder, rank, world
        self.settings = json.dumps(settings, indent=1, sort_keys=True, ensure_ascii=False) + "\n"
        self.file: IO[str] | None = None

    def __enter__(self) -> Self:
        if self.world > 1:
            torch.distributed.init_process_group("gloo", rank=self.rank, world_size=self.world, timeout=_LONGEST)
        if self.rank == 0:
            self._prepare()
        self._wait()
        self.done = self._read()
        self._wait()  # no rank may add scores before all have read the same files
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self.file:
            self.file.close()
        if self.world > 1:
            torch.distributed.destroy_process_group()

    def missing(self, samples: int) -> list[int]:
        """Return the numbers of the samples that this rank has to measure, ascending."""
        return [number for number in range(samples) if number not in self.done][self.rank :: self.world]

    def add(self, number: int, scores: Any) -> None:
        """Store the scores of a sample, also on disk."""
        if self.file is None:
            self.file = (self.folder / self._name(self.rank)).open("a", encoding="utf-8")
        self.file.write(json.dumps({"number": number, "scores": scores}, ensure_ascii=False) + "\n")
        self.file.flush()
        self.done[number] = scores

    def finish(self, samples: int) -> list[Any] | None:
        """Wait for all ranks -> the scores of all samples in their order on rank 0, and None on the others."""
        self._wait()
        if self.rank:
            return None
        if self.world > 1:
            self.done = self._read()
        return [self.done[number] for number in range(samples)]

    def forget(self) -> None:
        """Delete the stored scores once the results are written."""
        shutil.rmtree(self.folder)

    def _prepare(self) -> None:
        found = self.folder / _SETTINGS
        if self.folder.exists() and not found.is_file() and any(self.folder.iterdir()):
            raise JobError(
                f"{self.folder} is where unfinished scores go, but holds something else: move it or take another --out"
            )
        digest = hashlib.sha256(self.settings.encode()).hexdigest()
        if found.is_file() and hashlib.sha256(found.read_bytes()).hexdigest() != digest:
            logger.info(
                f"{self.folder} holds unfinished scores of other settings: they are not taken, everything is measured again"
            )
            shutil.rmtree(self.folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        write_text(found, self.settings)

    def _read(self) -> dict[int, Any]:
        """Read the scores of all files; a truncated last line is dropped."""
        done: dict[int, Any] = {}
        for file in sorted(self.folder.glob("scores_*.jsonl")):
            lines = file.read_text(encoding="utf-8").splitlines(keepends=True)
            whole = [line for line in lines if line.endswith("\n")]
            done |= {row["number"]: row["scores"] for row in map(json.loads, whole)}
            if self.rank == 0 and len(whole) < len(lines):  # otherwise the next line would be appended to it
                write_text(file, "".join(whole))
        return done

    def _name(self, rank: int) -> str:
        return f"scores_{rank:04d}.jsonl"

    def _wait(self) -> None:
        if self.world > 1:
            torch.distributed.barrier()
