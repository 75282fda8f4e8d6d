"""Demonstration of the whole path, within minutes on a CPU: generated data -> training -> benchmark -> report -> a clip.

    vfi demo --out demo

The last step makes the clip once more with the shipped model, if the package came with one.

Every step is a command, which is printed as one would type it. A second call reuses finished shards and resumes the training.
The exit code is 1 if the trained model does not beat the average of the two frames by at least 3 dB.
"""

from __future__ import annotations

import dataclasses
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from shards.cli import parse_flags
from vfi.errors import JobError, clear_errors
from vfi.evaluation.results import ResultError, Results, read_results
from vfi.io.text_table import aligned
from vfi.shipped import SHIPPED, has_shipped_model

# What the demo generates and trains; all settings that are worth tuning are here.
SIZE = "96x96"
MAX_MOTION = "6"
TRAIN_SAMPLES, VAL_SAMPLES = 512, 64
TRAIN_SEED, VAL_SEED = 0, 1
STEPS = 300
TRAINING = ["--preset", "tiny", "--phase", "2", "--val_every", "100", "--val_samples", "32", "--save_every", "100"]
CLIP_SIZE, CLIP_FRAMES, CLIP_MOTION, CLIP_SEED = "192x256", 17, "48", 2  # 3 pixels from frame to frame, as in training
MIN_GAIN = 3.0
"""Gain over the frame average that the model must reach, in dB."""
EXP_NAME = "tiny"
SHIPPED_CLIP = f"clip_{SHIPPED}.mp4"


@dataclasses.dataclass(frozen=True)
class Options:
    """Options of `vfi demo`; each field is a command-line flag."""

    out: Path = Path("demo")
    """Folder for everything that the demo writes."""
    steps: int = STEPS
    """Optimizer steps of the training."""


@clear_errors(ResultError)
def main(argv: Sequence[str] | None = None) -> None:
    """Run every step, then print the results and their paths."""
    options = parse_flags(Options, "vfi demo", __doc__, argv)
    if options.steps < 1:
        raise JobError(f"--steps {options.steps} must be at least 1")
    if options.out.exists() and not options.out.is_dir():
        raise JobError(f"--out {options.out} is a file: give a folder")
    start = time.monotonic()
    for command in commands(options):
        _run(command)
    results = read_results(options.out / "results.json")
    print(f"\nDone in {time.monotonic() - start:.0f} s.\n\n{summary(options.out, results)}")
    if not _gain(results) >= MIN_GAIN:
        sys.exit(1)


def commands(options: Options) -> list[list[str]]:
    """Return module and arguments of every step, in order."""
    out = options.out
    train, val, clip = out / "shards" / "train", out / "shards" / "val", out / "shards" / "clip"
    run, results = out / "runs" / EXP_NAME, out / "results.json"
    shards = ["shards.synthetic", "--size", SIZE, "--max_motion", MAX_MOTION, "--no-flow", "--workers", "2"]
    # the clip is one long sample of held-out photographs: unpacked, it is a folder of frames
    long = ["shards.synthetic", "--size", CLIP_SIZE, "--max_motion", CLIP_MOTION, "--no-flow", "--frames", str(CLIP_FRAMES)]
    naming = ["--output_dir", str(out / "runs"), "--exp_name", EXP_NAME, "--resume", "auto", "--schedule", "extend"]
    steps: list[list[str | Path]] = [
        [*shards, "--samples", str(TRAIN_SAMPLES), "--seed", str(TRAIN_SEED), "--out", train],
        [*shards, "--samples", str(VAL_SAMPLES), "--seed", str(VAL_SEED), "--split", "val", "--out", val],
        ["vfi.train", *TRAINING, "--steps", str(options.steps), "--data_path", train, "--val_path", val, *naming],
        ["vfi.benchmark", "--model", run, "--data", val, "--out", results],
        ["vfi.report", results, "--out", out / "report"],
        [*long, "--samples", "1", "--seed", str(CLIP_SEED), "--split", "val", "--out", clip],
        ["tarfile", "-e", clip / "shard-000000.tar", out / "frames"],
        ["vfi.interpolate", out / "frames", "--model", run, "--out", out / "clip.mp4"],
    ]
    if has_shipped_model():
        steps.append(["vfi.interpolate", out / "frames", "--out", out / SHIPPED_CLIP])
    return [[str(part) for part in step] for step in steps]


def summary(out: Path, results: Results) -> str:
    """Return the table, the path of each result, and whether the model is good enough."""
    average, model = results.rows[0], results.models[0]
    rows = [(row.model, f"{row.psnr:.3f}", f"{row.ssim:.4f}") for row in (average, model)]
    lines = [aligned([("model", "PSNR dB", "SSIM"), *rows])]
    places = {
        "report": out / "report" / "report.html",
        "table": out / "report" / "report.md",
        "results": out / "results.json",
        "run": out / "runs" / EXP_NAME,
        "clip": out / "clip.mp4",
    }
    if has_shipped_model():
        places[SHIPPED] = out / SHIPPED_CLIP
    lines += ["", *(f"{name:<8} {path}" for name, path in places.items()), ""]
    gain = _gain(results)
    verdict = f"The model is {abs(gain):.2f} dB {'better' if gain > 0 else 'worse'} than the frame average on photographs"
    lines.append(f"{verdict} that it was not trained on.")
    if not gain >= MIN_GAIN:
        lines.append(f"That is less than the {MIN_GAIN:g} dB that this demo expects: something is wrong, or --steps is small.")
    return "\n".join(lines)


def _gain(results: Results) -> float:
    return results.models[0].psnr - results.rows[0].psnr


def as_typed(command: Sequence[str]) -> str:
    """Return a command as a user would type it."""
    module, *arguments = command
    program = module.split(".") if module.startswith("vfi.") else ["python", "-m", module]
    return shlex.join([*program, *arguments])


def _run(command: Sequence[str]) -> None:
    """Print and run one step, on the CPU for the same result everywhere; stop the demo if it fails."""
    print(f"\n$ {as_typed(command)}", flush=True)
    code = subprocess.run(
        [sys.executable, "-m", *command], env=os.environ | {"CUDA_VISIBLE_DEVICES": ""}, check=False
    ).returncode
    if code:
        raise JobError(f"the demo stops here: `{as_typed(command)}` ended with code {code}")


if __name__ == "__main__":
    main()
