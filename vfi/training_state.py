"""What of a training run, beside its step and weights, has to come back, and from which process?

Every process takes part in each of these calls. How weights and optimizer are spread over processes is sharding.py's.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object
from torch import Tensor

from vfi.checkpoint import EMA, RANDOM, STATE, CheckpointError, read_random, read_state
from vfi.ema import Ema
from vfi.guard import Guard
from vfi.sharding import Whole
from vfi.weights import read_weights, refuse_differences


def gather_random(accelerator: Accelerator) -> list[dict[str, Any]]:
    """State of the random generators of each process, by rank, as plain values."""
    states: list[dict[str, Any]] = gather_object([random_state(accelerator.device)])
    return states


def scaler_state(accelerator: Accelerator) -> dict[str, float]:
    """State of the loss scale; empty where there is none, in other precisions than fp16."""
    return dict(accelerator.scaler.state_dict()) if accelerator.scaler is not None else {}


def restore(
    accelerator: Accelerator,
    checkpoint: Path,
    shards: Whole,
    ema: Ema | None,
    guard: Guard | None,
    say: Callable[[str], None],
) -> None:
    """Put back all but the weights (weights.py) and the position: optimizer, EMA, loss scale, guard, random generators."""
    state = read_state(checkpoint)
    shards.load_optimizer(checkpoint)
    _restore_ema(ema, checkpoint, state.ema_updates, say)
    _restore_scaler(accelerator.scaler, checkpoint, state.scaler, say)
    _restore_guard(guard, checkpoint, state.guard)
    _restore_random(accelerator, checkpoint, say)


def _restore_ema(ema: Ema | None, checkpoint: Path, updates: int, say: Callable[[str], None]) -> None:
    saved = (checkpoint / EMA).is_file()
    if ema is None or not saved:
        if saved:
            say(f"--ema is 0: the EMA weights of {checkpoint} end here")
        if ema is not None:
            say(f"{checkpoint} has no EMA weights: the average starts from its weights")
        return
    average = read_weights(checkpoint, EMA)
    refuse_differences(ema.weights(), average, checkpoint, EMA)
    ema.load(average, updates)


def _restore_scaler(
    scaler: torch.amp.GradScaler | None, checkpoint: Path, saved: dict[str, float], say: Callable[[str], None]
) -> None:
    if scaler is None or not saved:
        if scaler is not None:
            say(f"{checkpoint} was not made in fp16: the loss scale starts anew")
        return
    own = scaler.state_dict()
    if set(saved) != set(own) or not all(0 <= value < math.inf for value in saved.values()) or not saved["scale"] > 0:
        raise CheckpointError(f"{checkpoint / STATE} has no usable loss scale: {saved}")
    scaler.load_state_dict(saved)


def _restore_guard(guard: Guard | None, checkpoint: Path, saved: dict[str, Any]) -> None:
    if guard is None or not saved:  # one that starts anew learns within its window what is usual
        return
    try:
        guard.load_state_dict(saved)
    except (KeyError, TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise CheckpointError(f"{checkpoint / STATE} has no usable state of the guard: {error!r}") from error


def _restore_random(accelerator: Accelerator, checkpoint: Path, say: Callable[[str], None]) -> None:
    """Give each process the random state that it had; other numbers of processes can't have theirs, and that is said."""
    states = read_random(checkpoint)
    if len(states) != accelerator.num_processes:
        say(
            f"{checkpoint} has the random states of {len(states)} processes, now there are {accelerator.num_processes}: they "
            f"start from --seed (the order of samples and their augmentation don't depend on them)"
        )
        return
    try:
        set_random_state(states[accelerator.process_index], accelerator.device)
    except (KeyError, TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise CheckpointError(f"{checkpoint / RANDOM} is not usable: {error!r}") from error


def random_state(device: torch.device) -> dict[str, Any]:
    """The generators of torch on the CPU and on `device`, of Python and of numpy, as values that JSON can hold."""
    kind, keys, *rest = np.random.get_state(legacy=True)
    states = {
        "torch": _hex(torch.get_rng_state()),
        "python": random.getstate(),
        "numpy": [kind, np.asarray(keys).tolist(), *rest],
    }
    return states | ({"cuda": _hex(torch.cuda.get_rng_state(device))} if device.type == "cuda" else {})


def set_random_state(state: dict[str, Any], device: torch.device) -> None:
    """Put back what `random_state` gave. Another kind of device than before has no state to take."""
    version, keys, gauss = state["python"]
    random.setstate((version, tuple(keys), gauss))
    np.random.set_state(tuple(state["numpy"]))
    torch.set_rng_state(_bytes(state["torch"]))
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(_bytes(state["cuda"]), device)


def _hex(state: Tensor) -> str:
    return state.numpy().tobytes().hex()


def _bytes(text: str) -> Tensor:
    return torch.tensor(list(bytes.fromhex(text)), dtype=torch.uint8)


def on_main(accelerator: Accelerator, act: Callable[[], object]) -> None:
    """Let the main process act while the others wait; its CheckpointError is one of all processes."""
    problem: list[str | None] = [None]
    if accelerator.is_main_process:
        try:
            act()
        except CheckpointError as error:
            problem = [str(error)]
    broadcast_object_list(problem)
    if problem[0] is not None:
        raise CheckpointError(problem[0])


def check_agreement(accelerator: Accelerator, chosen: Path | None) -> None:
    """CheckpointError when the processes don't go on from the same checkpoint: one of them could not read what others could."""
    names: Sequence[str] = gather_object([str(chosen and chosen.name)])
    if len(set(names)) > 1:
        each = ", ".join(f"process {rank}: {name}" for rank, name in enumerate(names))
        raise CheckpointError(f"the processes see other checkpoints ({each}): do all of them read the same folder?")
