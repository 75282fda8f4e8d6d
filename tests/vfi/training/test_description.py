"""What is said about an unusual length of a run."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from vfi.config.configs import Config, OptimConfig
from vfi.training.description import _remarks


@pytest.mark.parametrize(
    ("step", "optim", "words"),
    [
        (0, {"warmup_steps": 9}, ()),
        (
            0,
            {"warmup_steps": 10},
            ("--warmup_steps 10 is not less than the 10 steps of the run: the learning rate never reaches",),
        ),
        (0, {"warmup_steps": 0, "freeze_backbone": 2}, ()),
        (
            0,
            {"warmup_steps": 0, "freeze_backbone": 3},
            ("--freeze_backbone 3 is not less than the run, 3 epochs: the backbone",),
        ),
        (0, {"warmup_steps": 99, "freeze_backbone": 9}, ("--warmup_steps 99", "--freeze_backbone 9")),
        (
            10,
            {"warmup_steps": 99},
            ("finished: step 10 of 10 is saved; to train on, give more --steps or --epochs, and --schedule",),
        ),
    ],
)
def test_remarks(step, optim, words):
    plan = SimpleNamespace(steps_per_epoch=4)
    run = SimpleNamespace(config=Config(optim=OptimConfig(**optim)), step=step, total=10, loader=SimpleNamespace(plan=plan))
    found = _remarks(run)
    assert len(found) == len(words)
    assert all(line.startswith(word) for line, word in zip(found, words, strict=True))
