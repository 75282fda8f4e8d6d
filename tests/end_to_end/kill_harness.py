"""Stress test of resuming: kills training with SIGKILL at random moments, resumes it, and compares it with an undisturbed run.

    python tests/end_to_end/kill_harness.py --times 100

Moments: while a run starts, within a step, a validation or a save, and before a random file operation of a save. After each
kill the newest checkpoint must be whole; at the end of a run its last checkpoint must hold the bits of an undisturbed run, and
metrics.jsonl each row once. A run that ends before it was killed often enough is followed by another one.

This process loads everything once and forks for each life of a run: it has one thread, and never computes anything itself.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import select
import signal
import statistics
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

os.environ |= {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true", "CUDA_VISIBLE_DEVICES": ""}

import numpy as np
import torch
import torch._dynamo  # this and the next are loaded late otherwise, again in every life
from accelerate.utils import extract_model_from_parallel
from safetensors.torch import load_file

from shards import synthetic
from vfi import train
from vfi.checkpoint import store
from vfi.training import trainer, validation

STEPS, SAVE_EVERY, VAL_EVERY = 12, 3, 4
FLAGS = ["--preset", "tiny", "--width", "2", "--head_dim", "8", "--crop", "64", "--num_workers", "0", "--log_every", "1",
         "--warmup_steps", "2", "--batch_size", "2", "--ema", "0.9", "--resume", "auto", "--steps", str(STEPS), "--save_every",
         str(SAVE_EVERY), "--val_every", str(VAL_EVERY)]  # fmt: skip
OPERATIONS = ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "shutil.rmtree")
KINDS = ("start", "step", "validation", "save", "operation")
_STEADY = ("loss", "grad_norm", "lr", "epoch", "psnr", "average_psnr", "samples")


class Moment(NamedTuple):
    """When to kill: so many seconds after (or at that file operation of) the count-th step, validation or save of a life."""

    kind: str
    count: int
    after: float


class Said(NamedTuple):
    """What a life tells this process."""

    kind: str
    what: str
    """begin, end, or the number of file operations until then."""
    at: float


def life(argv: list[str], log: Path, moment: Moment | None) -> tuple[int, list[Said]]:
    """Train in a process of its own until it ends or is killed -> its wait status, and what it told."""
    reading, writing = os.pipe()
    pid = os.fork()
    if not pid:
        os.close(reading)
        _live(argv, log, writing, moment)
    os.close(writing)
    said: list[Said] = []
    deadline = moment.after + time.monotonic() if moment and moment.kind == "start" else None
    with os.fdopen(reading, "rb", buffering=0) as pipe:
        while True:
            left = None if deadline is None else max(0.0, deadline - time.monotonic())
            if not select.select([pipe], [], [], left)[0]:
                os.kill(pid, signal.SIGKILL)
                break
            if not (line := pipe.readline()):
                break
            kind, what = line.decode().split()
            said.append(Said(kind, what, time.monotonic()))
            begun = sum(one.kind == kind and one.what == "begin" for one in said)
            if moment and deadline is None and what == "begin" and (kind, begun) == moment[:2]:
                deadline = time.monotonic() + moment.after
    return os.waitpid(pid, 0)[1], said


def _live(argv: list[str], log: Path, pipe: int, moment: Moment | None) -> None:
    """The forked process: tells of steps, validations and saves, and dies by itself at a file operation if it is to."""
    code = 1
    try:
        output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(output, 1)
        os.dup2(output, 2)
        random.seed()  # what the run does not seed itself is not to be the same by chance
        np.random.seed()
        torch.seed()
        saves, operations = 0, 0

        def tell(kind: str, what: object) -> None:
            os.write(pipe, f"{kind} {what}\n".encode())

        def count(event: str, _: object) -> None:
            nonlocal operations
            if event in OPERATIONS:
                operations += 1
                if moment and moment.kind == "operation" and (saves, operations) == (moment.count, round(moment.after)):
                    os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(count)

        def told(kind: str, function: Callable[..., Any]) -> Callable[..., Any]:
            def wrapped(*args: Any, **kwargs: Any) -> Any:
                nonlocal saves, operations
                saves, operations = saves + (kind == "save"), 0
                tell(kind, "begin")
                result = function(*args, **kwargs)
                tell("operation", operations) if kind == "save" else None
                tell(kind, "end")
                return result

            return wrapped

        trainer.Trainer.optimise = told("step", trainer.Trainer.optimise)
        validation.Validation.run = told("validation", validation.Validation.run)
        store.save = told("save", store.save)
        train.main(argv)
        code = 0
    except SystemExit as stop:
        code = int(stop.code or 0)
    except Exception:  # noqa: BLE001 (whatever it is, it goes into the log)
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        os._exit(code)


def pick(draw: random.Random, typical: dict[str, float]) -> Moment:
    """A random moment, soon enough that a life seldom reaches its end."""
    kind = draw.choice(KINDS)
    if kind == "operation":
        return Moment(kind, draw.randint(1, 2), draw.randint(1, round(typical[kind])))
    return Moment(kind, draw.randint(1, 2 * SAVE_EVERY if kind == "step" else 2), draw.uniform(0, typical[kind]))


def measure(said: list[Said], began: float) -> dict[str, float]:
    """How long each kind lasts (median, in seconds), and the number of file operations of a save."""
    typical = {"operation": min(float(one.what) for one in said if one.kind == "operation"), "start": said[0].at - began}
    for kind in ("step", "validation", "save"):
        times = [one.at for one in said if one.kind == kind]
        typical[kind] = statistics.median(end - begin for begin, end in zip(times[::2], times[1::2], strict=True))
    return typical


def run(times: int, seed: int, folder: Path) -> str:
    """Kill runs in `folder` so many times -> what was done; AssertionError where one is not as if nothing had happened."""
    draw, began = random.Random(seed), time.monotonic()
    extract_model_from_parallel(torch.nn.Identity())
    assert threading.active_count() == 1, "a fork would lose threads"
    for name, samples in (("train", 22), ("val", 5)):
        options = synthetic.Options(out=folder / name, samples=samples, size="72x80", split=name, samples_per_shard=8)
        synthetic.make(options)
    started = time.monotonic()
    flags = [*FLAGS, "--data_path", f"{folder}/train", "--val_path", f"{folder}/val", "--output_dir", str(folder)]
    status, said = life([*flags, "--exp_name", "undisturbed"], folder / "undisturbed.log", None)
    assert status == 0, (folder / "undisturbed.log").read_text()
    typical = measure(said, started)
    kills, lives, runs = dict.fromkeys(KINDS, 0), 0, 0
    while sum(kills.values()) < times:
        runs += 1
        name, done = f"killed_{runs}", False
        while not done:
            moment = pick(draw, typical) if sum(kills.values()) < times else None
            status, _ = life([*flags, "--exp_name", name], folder / f"{name}.log", moment)
            lives += 1
            log = (folder / f"{name}.log").read_text()
            assert status in (0, signal.SIGKILL), f"life {lives} ended with {status}:\n{log}"
            if not (done := status == 0):
                assert moment
                kills[moment.kind] += 1
                check_newest(folder / name)
        compare(folder / name, folder / "undisturbed")
    counts = ", ".join(f"{kind} {number}" for kind, number in kills.items())
    return f"{sum(kills.values())} kills ({counts}) in {runs} runs, {time.monotonic() - began:.0f} s: all as if undisturbed"


def check_newest(found: Path) -> None:
    """The newest checkpoint, if there is one yet, must be whole and loadable."""
    newest = store.latest(found)
    if newest:
        assert store.check(newest.path) == []
        assert contents(newest.path)


def compare(found: Path, expected: Path) -> None:
    """AssertionError unless a run ended as the other one: the same bits in its last checkpoint, the same rows, no remains."""
    ours, theirs = store.latest(found), store.latest(expected)
    assert ours
    assert theirs
    assert ours.step == theirs.step == STEPS
    one, other = contents(ours.path), contents(theirs.path)
    assert one.keys() == other.keys()
    for name in one:
        assert same(one[name], other[name]), f"{found}: {name} differs"
    assert rows(found) == rows(expected), f"{found}: other rows"
    assert [path.name for path in (found / "checkpoints").iterdir() if path.name.startswith(".")] == []


def contents(path: Path) -> dict[str, Any]:
    """Everything in a checkpoint, by file."""
    readers = {".safetensors": load_file, ".pt": lambda file: torch.load(file, weights_only=True),
               ".json": lambda file: json.loads(file.read_text())}  # fmt: skip
    files = {file.name: readers[file.suffix](file) for file in sorted(path.iterdir()) if file.name != "manifest.json"}
    files["config.json"]["run"].pop("exp_name")
    return files


def same(one: Any, other: Any) -> bool:
    """Equal to the last bit."""
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    return bool(one == other)


def rows(run_folder: Path) -> list[dict[str, Any]]:
    """What metrics.jsonl says of steps and validations, but for the times."""
    lines = [json.loads(line) for line in (run_folder / "metrics.jsonl").read_text().splitlines()]
    lines = [row for row in lines if row["event"] != "start"]  # one each time that the run is started
    steady = [{key: row[key] for key in ("step", "event", *_STEADY) if key in row} for row in lines]
    expected = [("train", step) for step in range(1, STEPS + 1)]
    expected += [("val", step) for step in range(VAL_EVERY, STEPS + 1, VAL_EVERY)]
    found = sorted((row["event"], row["step"]) for row in steady)
    assert found == expected, f"{run_folder}: a row is missing, or there twice"
    return steady


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--times", type=int, default=100, help="kills (default: 100)")
    parser.add_argument("--seed", type=int, default=0, help="of the moments (default: 0)")
    parser.add_argument("--folder", type=Path, help="keep everything there; default: a temporary folder")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        print(run(options.times, options.seed, options.folder or Path(temporary)))


if __name__ == "__main__":
    main()
