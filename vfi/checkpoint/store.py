"""The checkpoints of a run: save, find, verify and prune. weights.py loads them into a model.

    runs/NAME/checkpoints/step_00001000/
        model.safetensors     weights; loading them executes nothing
        ema.safetensors       their exponential moving average, with --ema
        optimizer.pt          state of AdamW, read with weights_only
        random.json           state of the random generators, one entry per process
        config.json           settings of the run, so that the folder is usable alone
        state.json            step, position in the data, PSNR of this step's validation, loss scale, guard, versions
        manifest.json         size and sha256 of each of these

A checkpoint is written under a temporary name and renamed (vfi/io/verified_folder.py): one that has its name is complete, and
its manifest shows whether it still is. The learning rate is a function of the step, and the order of samples and their
augmentation of the position.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import math
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import safetensors.torch
import torch
from torch import Tensor

from vfi.config.configs import Config, ConfigError
from vfi.data.sampler import Position
from vfi.errors import CheckpointError
from vfi.io.dataclass_json import RecordError, config_from_json, from_object, to_json
from vfi.io.verified_folder import (
    MANIFEST,
    FolderWriteError,
    ManifestError,
    problems,
    read_manifest,
    remove_folder,
    sweep,
    write_folder,
)

MODEL, EMA, OPTIMIZER, RANDOM = "model.safetensors", "ema.safetensors", "optimizer.pt", "random.json"
STATE, CONFIG = "state.json", "config.json"
VERSION = 2
_NEEDED = (MODEL, OPTIMIZER, RANDOM, STATE, CONFIG)
_NAME = re.compile(r"step_(\d+)")
_BEST = "@best"
_LARGEST = 1 << 40  # far above any real count


class Found(NamedTuple):
    """A checkpoint folder and its step."""

    path: Path
    step: int


class SavedPosition(NamedTuple):
    """The position of a run in the data (see vfi/data/sampler.py)."""

    position: Position
    order: str
    """Identifies the order of samples for which the position is valid."""


@dataclasses.dataclass(frozen=True)
class State:
    """The content of state.json."""

    step: int
    """The step after which it was written."""
    epoch: int | None = None
    done: tuple[tuple[int, int], ...] = ()
    order: str = ""
    psnr: float | None = None
    """PSNR of the validation of this very step, in dB."""
    ema_updates: int = 0
    scaler: dict[str, float] = dataclasses.field(default_factory=dict)
    """State of the loss scaler, in fp16."""
    guard: dict[str, Any] = dataclasses.field(default_factory=dict)
    versions: dict[str, str] = dataclasses.field(default_factory=dict)
    schedule_start: int = 0
    schedule_end: int | None = None
    """The schedule of the learning rate (see vfi/training/schedule.py)."""
    version: int = VERSION

    @property
    def position(self) -> SavedPosition | None:
        """The position in the data, or None where it is unknown."""
        return None if self.epoch is None else SavedPosition(Position(self.epoch, self.done), self.order)


def save(
    run_folder: Path,
    state: State,
    config: Config,
    weights: dict[str, Tensor],
    optimizer: dict[str, Any],
    *,
    ema: dict[str, Tensor] | None = None,
    random: Sequence[dict[str, Any]] = (),
    keep_last: int = 3,
    keep_best: int = 1,
) -> Path:
    """Write the checkpoint of `state.step`, then remove superfluous ones.

    Kept are the newest `keep_last` and the `keep_best` of highest PSNR; those of later steps, left by a run that resumed from
    an earlier one, are removed. CheckpointError where it can't be written; then all others are still there.
    """
    path = _folder(run_folder, state.step)

    def files() -> Iterator[tuple[str, bytes | memoryview]]:
        yield MODEL, _safetensors(weights)
        if ema is not None:
            yield EMA, _safetensors(ema)
        pickled = io.BytesIO()  # when torch writes to a file itself, its errors don't give the system's reason
        torch.save(optimizer, pickled)
        yield OPTIMIZER, pickled.getbuffer()
        yield RANDOM, json.dumps(list(random)).encode()
        yield CONFIG, to_json(config).encode()
        yield STATE, to_json(state).encode()

    try:
        write_folder(path, files())
        for old in _superfluous(list_checkpoints(run_folder), state.step, keep_last, keep_best):
            remove_folder(old.path)
    except (FolderWriteError, OSError) as error:
        raise CheckpointError(str(error)) from error
    return path


def remove_remains(run_folder: Path) -> None:
    """Remove what processes that were killed while they saved left of checkpoints; no other process may be saving."""
    sweep(_folder(run_folder, 0))


def _folder(run_folder: Path, step: int) -> Path:
    return run_folder / "checkpoints" / f"step_{step:08d}"


def _safetensors(tensors: dict[str, Tensor]) -> bytes:
    return safetensors.torch.save({name: tensor.detach().contiguous() for name, tensor in tensors.items()})


def _superfluous(found: Sequence[Found], step: int, keep_last: int, keep_best: int) -> list[Found]:
    """Return the checkpoints to remove once that of `step` is written; of equally good ones the newest are kept."""
    own = [checkpoint for checkpoint in found if checkpoint.step <= step]
    scores = {checkpoint: _score(checkpoint.path) for checkpoint in own}
    scored = sorted((c for c in own if scores[c] is not None), key=lambda c: (scores[c], c.step), reverse=True)
    kept = {*own[-keep_last:], *scored[:keep_best]}
    return [checkpoint for checkpoint in found if checkpoint not in kept]


def _score(checkpoint: Path) -> float | None:
    try:
        return read_state(checkpoint).psnr
    except CheckpointError:  # damaged: it is removed when it is old
        return None


def list_checkpoints(run_folder: Path) -> list[Found]:
    """Return all checkpoints of a run, oldest first: complete when they were written, but not verified."""
    matches = ((path, _NAME.fullmatch(path.name)) for path in run_folder.glob("checkpoints/step_*"))
    return sorted((Found(path, int(match[1])) for path, match in matches if match), key=lambda checkpoint: checkpoint.step)


def latest(run_folder: Path) -> Found | None:
    """Return the newest checkpoint of a run, or None."""
    found = list_checkpoints(run_folder)
    return found[-1] if found else None


def check(checkpoint: Path, names: Sequence[str] | None = None) -> list[str]:
    """Read everything (or the files `names`) again and return what is wrong with which file; empty for an intact checkpoint."""
    try:
        listed = read_manifest(checkpoint).files
    except ManifestError as error:
        return [str(error)]
    wrong = [f"{name} is not in {MANIFEST}" for name in _NEEDED if name not in listed]
    if EMA not in listed and (checkpoint / EMA).exists():
        wrong.append(f"{EMA} is not in {MANIFEST}")
    wrong += problems(checkpoint, names)
    try:
        read_state(checkpoint)
    except CheckpointError as error:
        wrong += [] if wrong else [str(error)]
    return wrong


def newest_whole(run_folder: Path) -> tuple[Path | None, list[str]]:
    """Return the newest intact checkpoint, and a line on each newer one that is damaged.

    CheckpointError when there are checkpoints, but none is intact.
    """
    damaged: list[str] = []
    for checkpoint in reversed(list_checkpoints(run_folder)):
        wrong = check(checkpoint.path)
        if not wrong:
            return checkpoint.path, [f"DAMAGED and not used: {line}; the one before is" for line in damaged]
        damaged.append(f"{checkpoint.path}: {', '.join(wrong)}")
    if damaged:
        raise CheckpointError(
            f"no checkpoint of {run_folder} is whole: {'; '.join(damaged)}. Start again under another --exp_name, or remove "
            f"{run_folder / 'checkpoints'}"
        )
    return None, []


def find(path: str | Path, output_dir: str | Path = "runs") -> Path:
    """Return the checkpoint folder that `path` means: a checkpoint folder, a file in one, a run folder, or a run's name.

    Of a run that is the newest checkpoint, or with `@best` after its name the one with the highest PSNR.
    """
    if best := _find_best(str(path), Path(output_dir)):
        return best
    candidates = [Path(path), Path(output_dir) / path]
    for candidate in candidates:
        if candidate.is_file() and candidate.name in (MODEL, EMA):
            return candidate.parent
        if (candidate / MODEL).is_file():
            return candidate
        newest = latest(candidate)
        if newest is not None:
            return newest.path
    runs = sorted(folder.parent.name for folder in Path(output_dir).glob("*/checkpoints"))
    exists = [str(candidate) for candidate in candidates if candidate.exists()]
    problem = f"{exists[0]} exists but holds no checkpoint" if exists else f"no run or checkpoint {str(path)!r}"
    raise CheckpointError(f"{problem}; runs in {output_dir}: {', '.join(runs) or 'none'}")


def best(run_folder: Path) -> Found | None:
    """Return the checkpoint of a run with the highest PSNR; None where no readable one has been validated."""
    scored: list[tuple[float, Found]] = []
    for checkpoint in list_checkpoints(run_folder):
        with contextlib.suppress(CheckpointError):  # of a damaged one, whose PSNR is not known
            if (psnr := read_state(checkpoint.path).psnr) is not None:
                scored.append((psnr, checkpoint))
    return max(scored, key=lambda pair: pair[0])[1] if scored else None


def _find_best(name: str, output_dir: Path) -> Path | None:
    """Return the checkpoint that RUN@best means, None for other names; CheckpointError for a run without a PSNR."""
    if not name.endswith(_BEST) or Path(name).exists():
        return None
    for run_folder in (Path(name.removesuffix(_BEST)), output_dir / name.removesuffix(_BEST)):
        if found := best(run_folder):
            return found.path
        if latest(run_folder):
            raise CheckpointError(
                f"no checkpoint of {run_folder} has a PSNR: train with --val_path, and --val_every and --save_every that meet"
            )
    return None


def find_whole(path: str | Path, output_dir: str | Path = "runs") -> tuple[Path, list[str]]:
    """Return as `find`, but verified: a run's newest intact checkpoint, with lines on damaged ones.

    A single checkpoint, and the best one of a run, is that one, or CheckpointError where it is damaged.
    """
    for run_folder in (Path(path), Path(output_dir) / path):
        if not (run_folder / MODEL).is_file():
            newest, lines = newest_whole(run_folder)
            if newest is not None:
                return newest, lines
    checkpoint = find(path, output_dir)
    refuse_damage(checkpoint)
    return checkpoint, []


def refuse_damage(checkpoint: Path, names: Sequence[str] | None = None) -> None:
    """Raise CheckpointError when a checkpoint (or its files `names`) is not what was written."""
    if wrong := check(checkpoint, names):
        others = [found.path.name for found in list_checkpoints(checkpoint.parent.parent) if found.path != checkpoint]
        raise CheckpointError(
            f"{checkpoint} is damaged: {', '.join(wrong)}; other checkpoints beside it: {', '.join(others) or 'none'}"
        )


def newest_run(output_dir: str | Path = "runs") -> Path:
    """Return the run whose newest checkpoint was written last; CheckpointError where there is none."""
    found = {folder.parent: latest(folder.parent) for folder in Path(output_dir).glob("*/checkpoints")}
    written = {run: checkpoint.path.stat().st_mtime for run, checkpoint in found.items() if checkpoint}
    if not written:
        raise CheckpointError(f"no trained run in {output_dir}: give one by --model, or train one (`vfi train --help`)")
    return max(written, key=lambda run: written[run])


def read_config(checkpoint: Path) -> Config:
    """Return the settings under which a checkpoint was made; settings that it is too old to have are logged."""
    path = checkpoint / CONFIG
    try:
        return config_from_json(path.read_text(), str(path))
    except OSError as error:
        raise CheckpointError(f"{checkpoint} has no settings: {path} cannot be read ({error.strerror})") from error
    except (ConfigError, UnicodeDecodeError) as error:
        raise CheckpointError(str(error)) from error


def read_step(checkpoint: Path) -> int:
    """Return the step after which a checkpoint was written."""
    return read_state(checkpoint).step


def read_random(checkpoint: Path) -> list[Any]:
    """Return the states of the random generators, one entry per process (see vfi/training/state.py)."""
    content = _read_json(checkpoint / RANDOM)
    if not isinstance(content, list):
        raise CheckpointError(f"{checkpoint / RANDOM} is not usable: it is not a list")
    return content


def read_state(checkpoint: Path) -> State:
    """Read and check state.json; CheckpointError names what is not usable in it."""
    path = checkpoint / STATE
    content = _read_json(path)
    version = content.get("version") if isinstance(content, dict) else None
    if version != VERSION:
        raise CheckpointError(f"{path} has version {version}; this program reads version {VERSION}")
    try:
        state: State = from_object(State, content, str(path), [])
    except RecordError as error:
        raise CheckpointError(str(error)) from error
    if wrong := _absurd(state, checkpoint.name):
        raise CheckpointError(f"{path} is not usable: {wrong}")
    return state


def _absurd(state: State, name: str) -> str:
    """Return what can't be true of a checkpoint in a folder of this name; empty when everything can."""
    named = _NAME.fullmatch(name)
    if named and int(named[1]) != state.step:
        return f"it is of step {state.step}"
    counts = {"step": (state.step,), "epoch": (state.epoch or 0,), "ema_updates": (state.ema_updates,)}
    counts |= {"schedule_start": (state.schedule_start,), "schedule_end": (state.schedule_end or 0,)}
    for field, values in (counts | {"done": [count - 1 for pair in state.done for count in pair]}).items():
        if not all(0 <= value < _LARGEST for value in values):
            return f"{field} is {getattr(state, field)}"
    if state.psnr is not None and not math.isfinite(state.psnr):
        return f"psnr is {state.psnr}"
    return ""


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
