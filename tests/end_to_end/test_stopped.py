"""Training stopped by a signal: what is saved, how it ends, and that nothing is lost."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from vfi import train
from vfi.checkpoint import store
from vfi.checkpoint.store import list_checkpoints
from vfi.errors import STOPPED
from vfi.training import trainer, validation

FLAGS = ["--preset", "tiny", "--crop", "64", "--num_workers", "0", "--log_every", "1", "--warmup_steps", "2", "--batch_size",
         "2", "--steps", "7", "--save_every", "4", "--val_every", "4", "--ema", "0.9", "--resume", "auto"]  # fmt: skip
STEADY = ("step", "event", "loss", "grad_norm", "lr", "epoch", "psnr", "samples")


def run_here(folder: Path, train_shards: Path, val_shards: Path) -> None:
    train.main([*FLAGS, "--data_path", str(train_shards), "--val_path", str(val_shards), "--output_dir", str(folder.parent),
                "--exp_name", folder.name])  # fmt: skip


def rows(run: Path, *events: str) -> list[dict]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{key: row[key] for key in STEADY if key in row} for row in lines if row["event"] in events]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, train_shards, val_shards, one_thread) -> Path:
    run = tmp_path_factory.mktemp("runs") / "whole"
    run_here(run, train_shards, val_shards)
    return run


def signal_in(monkeypatch: pytest.MonkeyPatch, place: object, name: str, call: int, number: signal.Signals) -> None:
    """Send a signal to this process in the given call of a function."""
    function, calls = getattr(place, name), 0

    def disturbed(*args: object, **kwargs: object) -> object:
        nonlocal calls
        calls += 1
        if calls == call:
            signal.raise_signal(number)
        return function(*args, **kwargs)

    monkeypatch.setattr(place, name, disturbed)


# where the signal arrives, and after which steps there are checkpoints and validations then
MOMENTS = {
    "in a step": (trainer, "training_losses", 3, signal.SIGTERM, [3], []),
    "in the step that is validated": (trainer, "training_losses", 4, signal.SIGINT, [4], []),
    "in a validation": (validation, "psnr", 3, signal.SIGUSR2, [4], []),
    "in a save": (store, "save", 1, signal.SIGTERM, [4, 5], [4]),
    "in the last validation": (validation, "psnr", 13, signal.SIGTERM, [4, 7], [4]),
}


@pytest.mark.parametrize("moment", MOMENTS)
def test_a_stopped_run_goes_on_bit_for_bit(moment, undisturbed, tmp_path, train_shards, val_shards, monkeypatch, capsys):
    place, name, call, number, saved, validated = MOMENTS[moment]
    run, handlers = tmp_path / "run", [signal.getsignal(each) for each in (signal.SIGTERM, signal.SIGUSR2, signal.SIGINT)]
    with monkeypatch.context() as patch:
        signal_in(patch, place, name, call, number)
        with pytest.raises(SystemExit) as stop:
            run_here(run, train_shards, val_shards)
    assert stop.value.code == STOPPED
    assert [found.step for found in list_checkpoints(run)] == saved
    assert [row["step"] for row in rows(run, "val")] == validated
    assert f"stopped after step {saved[-1]} of 7 ({number.name})" in capsys.readouterr().out
    assert [signal.getsignal(each) for each in (signal.SIGTERM, signal.SIGUSR2, signal.SIGINT)] == handlers

    run_here(run, train_shards, val_shards)
    assert rows(run, "train", "val") == rows(undisturbed, "train", "val")
    assert [row["step"] for row in rows(run, "stop")] == saved[-1:]
    for file in ("model", "ema"):
        expected = load_file(undisturbed / f"checkpoints/step_00000007/{file}.safetensors")
        for key, tensor in load_file(run / f"checkpoints/step_00000007/{file}.safetensors").items():
            assert torch.equal(tensor, expected[key]), key


def test_a_stopped_dry_run_leaves_nothing(tmp_path, train_shards, val_shards, monkeypatch):
    signal_in(monkeypatch, trainer, "training_losses", 2, signal.SIGINT)
    with pytest.raises(SystemExit) as stop:
        train.main([*FLAGS, "--data_path", str(train_shards), "--output_dir", str(tmp_path), "--dry_run"])
    assert stop.value.code == 130
    assert list(tmp_path.iterdir()) == []


def test_help_says_what_signals_do(capsys):
    with pytest.raises(SystemExit):
        train.main(["--help"])
    text = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert "SIGTERM, SIGUSR2 and Ctrl-C finish the step, save and end with exit code 75" in text
