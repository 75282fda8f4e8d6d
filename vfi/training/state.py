"""The complete state of a training run: collect it, copy it in memory, read it from a checkpoint, restore it exactly.

    snapshot = Snapshot(None, state, strategy.weights(), strategy.optimizer_state(), averages, gather_random(accelerator))
    snapshot.copy_to_host()         # unaffected as the run continues
    read_snapshot(checkpoint)       # the same from disk, as written by vfi/checkpoint/store.py
    restore(accelerator, snapshot, strategy, ema, monitor)

To be called by all processes together. vfi/distributed/strategy.py defines how weights and optimizer are spread over them.
"""

from __future__ import annotations

import math
import random
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor
from torch.utils._pytree import tree_map_only

from vfi.checkpoint.store import EMA, RANDOM, STATE, State, read_random, read_state
from vfi.checkpoint.weights import read_optimizer, read_weights, refuse_differences
from vfi.distributed.strategy import DDPStrategy
from vfi.errors import CheckpointError
from vfi.runtime.logging import logger
from vfi.training.ema import Ema
from vfi.training.gradient_monitor import GradientMonitor


class Snapshot(NamedTuple):
    """The state of a run after a step, as a checkpoint holds it.

    Tensors are whole; where weights are sharded, only the main process has them.
    """

    path: Path | None
    """The checkpoint that it was read from; None: it exists in memory only."""
    state: State
    weights: dict[str, Tensor]
    optimizer: dict[str, Any]
    ema: dict[str, Tensor] | None
    random: list[Any]
    """State of the random generators, one entry per process."""

    @property
    def place(self) -> str:
        """The location of the snapshot, for messages."""
        return str(self.path or "memory")

    def copy_to_host(self) -> Snapshot:
        """Return a copy with separate tensors in host memory."""
        weights, optimizer, ema = tree_map_only(Tensor, _copy_to_host, (self.weights, self.optimizer, self.ema))
        return self._replace(weights=weights, optimizer=optimizer, ema=ema)


def read_snapshot(checkpoint: Path) -> Snapshot:
    """Read a checkpoint; CheckpointError names the file that is not usable."""
    ema = read_weights(checkpoint, EMA) if (checkpoint / EMA).is_file() else None
    state, weights, optimizer = read_state(checkpoint), read_weights(checkpoint), read_optimizer(checkpoint)
    return Snapshot(checkpoint, state, weights, optimizer, ema, read_random(checkpoint))


def _copy_to_host(tensor: Tensor) -> Tensor:
    """Return a copy in the same layout; from a GPU it is asynchronous, in the order of the GPU's work."""
    if not tensor.is_cuda:
        return tensor.detach().clone()
    copy = torch.empty_like(tensor, device="cpu", pin_memory=True)  # a copy into unpinned memory would be synchronous
    return copy.copy_(tensor.detach(), non_blocking=True)


def gather_random(accelerator: Accelerator) -> list[dict[str, Any]]:
    """Return the states of each process's random generators, by rank, as plain values."""
    states: list[dict[str, Any]] = gather_object([random_state(accelerator.device)])
    return states


def scaler_state(accelerator: Accelerator) -> dict[str, float]:
    """Return the state of the loss scaler; empty in precisions other than fp16, which have none."""
    return dict(accelerator.scaler.state_dict()) if accelerator.scaler is not None else {}


def restore(
    accelerator: Accelerator,
    snapshot: Snapshot,
    strategy: DDPStrategy,
    ema: Ema | None,
    monitor: GradientMonitor | None,
) -> None:
    """Restore everything but the weights and the position: optimizer, EMA, loss scale, guard, random generators.

    CheckpointError names what is not usable. The tensors of `snapshot` belong to the run from then on.
    """
    strategy.load_optimizer(snapshot.optimizer, snapshot.place)
    _restore_ema(ema, snapshot)
    _restore_scaler(accelerator.scaler, snapshot)
    _restore_guard(monitor, snapshot)
    _restore_random(accelerator, snapshot)


def _restore_ema(ema: Ema | None, snapshot: Snapshot) -> None:
    if ema is None or snapshot.ema is None:
        if snapshot.ema is not None:
            logger.info(f"--ema is 0: the EMA weights of {snapshot.place} end here")
        if ema is not None:
            logger.info(f"{snapshot.place} has no EMA weights: the average starts from its weights")
        return
    if snapshot.path is not None:
        refuse_differences(ema.weights(), snapshot.ema, snapshot.path, EMA)
    ema.load(snapshot.ema, snapshot.state.ema_updates)


def _restore_scaler(scaler: torch.amp.GradScaler | None, snapshot: Snapshot) -> None:
    saved = snapshot.state.scaler
    if scaler is None or not saved:
        if scaler is not None:
            logger.info(f"{snapshot.place} was not made in fp16: the loss scale starts from its default")
        return
    own = scaler.state_dict()
    if set(saved) != set(own) or not all(0 <= value < math.inf for value in saved.values()) or not saved["scale"] > 0:
        raise CheckpointError(f"{snapshot.place}/{STATE} has no usable loss scale: {saved}")
    scaler.load_state_dict(saved)


def _restore_guard(guard: GradientMonitor | None, snapshot: Snapshot) -> None:
    if guard is None or not snapshot.state.guard:  # a fresh guard learns within its window what is usual
        return
    try:
        guard.load_state_dict(snapshot.state.guard)
    except (KeyError, TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise CheckpointError(f"{snapshot.place}/{STATE} has no usable state of the guard: {error!r}") from error


def _restore_random(accelerator: Accelerator, snapshot: Snapshot) -> None:
    """Restore each process's random state; with another number of processes report that it can't be restored."""
    states = snapshot.random
    if len(states) != accelerator.num_processes:
        logger.info(
            f"{snapshot.place} has the random states of {len(states)} processes, now there are {accelerator.num_processes}: "
            f"they start from --seed (the order of samples and their augmentation don't depend on them)"
        )
        return
    try:
        set_random_state(states[accelerator.process_index], accelerator.device)
    except (KeyError, TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise CheckpointError(f"{snapshot.place}/{RANDOM} is not usable: {error!r}") from error


def random_state(device: torch.device) -> dict[str, Any]:
    """Return the states of torch's (CPU and `device`), Python's and numpy's generators, as values that JSON can hold."""
    kind, keys, *rest = np.random.get_state(legacy=True)
    states = {
        "torch": _hex(torch.get_rng_state()),
        "python": random.getstate(),
        "numpy": [kind, np.asarray(keys).tolist(), *rest],
    }
    return states | ({"cuda": _hex(torch.cuda.get_rng_state(device))} if device.type == "cuda" else {})


def set_random_state(state: dict[str, Any], device: torch.device) -> None:
    """Restore what `random_state` returned. On another kind of device, the device's generator is left as it is."""
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
