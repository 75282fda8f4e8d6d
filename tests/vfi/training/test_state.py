"""What comes back beside weights: random generators and the loss scale, exactly, and nothing that makes no sense."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from vfi.checkpoint.store import State, save
from vfi.config import presets
from vfi.errors import CheckpointError
from vfi.training.state import random_state, read_snapshot, restore, scaler_state, set_random_state


def draws(device: torch.device) -> list[float]:
    """Some numbers of every generator."""
    numbers = [random.random(), random.gauss(0, 1), *np.random.rand(3), np.random.randn(), *torch.rand(3).tolist()]
    return numbers + (torch.rand(3, device=device).tolist() if device.type == "cuda" else [])


@pytest.mark.parametrize("kind", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_random_generators_go_on_where_they_were(kind):
    """Through JSON; also from within a pair of normal numbers, of which Python and numpy keep the second one."""
    device = torch.device(kind)
    random.gauss(0, 1)
    np.random.randn()
    state = json.loads(json.dumps(random_state(device)))
    expected = draws(device)
    assert draws(device) != expected
    set_random_state(state, device)
    assert draws(device) == expected


def process(scaler: torch.amp.GradScaler | None) -> SimpleNamespace:
    """As much of a process as is asked of it: one of one, on the CPU."""
    return SimpleNamespace(scaler=scaler, num_processes=1, process_index=0, device=torch.device("cpu"))


def saved(folder: Path, scaler: dict[str, float]) -> Path:
    here = [random_state(torch.device("cpu"))]
    return save(folder, State(1, scaler=scaler), presets.tiny(), {"w": torch.zeros(1)}, {}, random=here)


def put_back(scaler: torch.amp.GradScaler | None, checkpoint: Path) -> None:
    """Restore a checkpoint in a process with this loss scale."""
    whole = SimpleNamespace(load_optimizer=lambda *_: None)
    restore(process(scaler), read_snapshot(checkpoint), whole, None, None)


def test_the_loss_scale_comes_back(tmp_path, messages):
    old, new = torch.amp.GradScaler("cpu", init_scale=2.0**9), torch.amp.GradScaler("cpu")
    old.scale(torch.ones(1))
    old.update(2.0**7)
    put_back(new, saved(tmp_path, scaler_state(process(old))))
    assert not messages
    assert scaler_state(process(new)) == scaler_state(process(old))
    assert new.scale(torch.ones(1)).item() == 2.0**7


def test_a_change_of_precision_is_said(tmp_path, messages):
    assert scaler_state(process(None)) == {}
    put_back(torch.amp.GradScaler("cpu"), saved(tmp_path, {}))
    (line,) = messages
    assert "was not made in fp16: the loss scale starts from its default" in line
    put_back(None, saved(tmp_path, {"scale": 2.0}))
    assert messages == [line]


@pytest.mark.parametrize(
    "change", [{"scale": 0.0}, {"scale": -1.0}, {"scale": math.inf}, {"more": 1.0}, {"_growth_tracker": -1}]
)
def test_an_absurd_loss_scale_is_refused(tmp_path, change):
    good = scaler_state(process(torch.amp.GradScaler("cpu")))
    with pytest.raises(CheckpointError, match=r"state\.json has no usable loss scale"):
        put_back(torch.amp.GradScaler("cpu"), saved(tmp_path, good | change))
