"""Detect gradients that would ruin the weights, by layer group, and decide how to respond, in stages.

    groups = layer_groups(network)                          # each parameter is in exactly one group
    seen = torch.stack([loss, *gradient_norms(groups)])     # the same numbers on all processes
    decision = monitor.decide(step, seen)                   # before the optimizer updates the weights

| decision  | when                                               | the step                                                  |
| --------- | -------------------------------------------------- | --------------------------------------------------------- |
| go        | nothing is unusual                                 | is taken as it is                                         |
| watch     | the norm of a group is far above its median        | has its gradient clipped to the usual norm; every third   |
|           |                                                    | one in a row raises the mixing's annealing factor         |
| scale     | gradient non-finite, loss finite and scaled (fp16) | is left to the scaler, which tries a smaller scale        |
| skip      | loss or gradient is non-finite                     | leaves weights and optimizer as they are; the data        |
|           |                                                    | advances                                                  |
| roll_back | too many skips, or the loss is high and stays high | restores weights, optimizer and data position of the last |
|           |                                                    | good state before the trouble; the learning rate is       |
|           |                                                    | lowered                                                   |
| stop      | a roll_back more than is allowed                   | ends the run                                              |

A norm is compared with the median and the spread of its logarithm over the latest usual steps: norms are skewed, and grow by
factors when a network starts to learn. When most of the latest steps are unusual and the loss is not high, the norms have
reached a new level, which is the usual one from then on, so that a healthy run is not clipped for ever. The loss "stays high"
when it is above twice its median in more than half of the last quarter of the window; many a run comes down by itself before
that. No loss above 25 times the run's first one counts as usual, so that a run that explodes before there is a median is
caught, too.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from vfi.config.configs import KNOWN_STEPS, GuardConfig

Action = Literal["go", "watch", "scale", "skip", "roll_back", "stop"]
_LATEST = 20  # steps; unusual norms in more than half of them are a new level
_HIGH = 2.0  # a loss above this multiple of the usual one is high
_USUAL_AT_MOST = 25.0  # times the first loss: the batches of a run don't differ by that much for long
_BUILDING = 3  # unusual steps in a row: more than a single bad batch
_SPREAD = 1.4826  # standard deviation / median absolute deviation of a normal distribution


class Decision(NamedTuple):
    """The decision on a step."""

    action: Action
    why: str = ""
    clip_norm: float = math.inf
    """Largest norm that the whole gradient may have."""
    building: bool = False
    """Whether the annealing factor of the residual mixing is to rise."""
    began: int = 0
    """For roll_back and stop: the first step whose weights may be ruined; the loss of the step after it was bad."""

    @property
    def moves(self) -> bool:
        """Whether the optimizer may update the weights."""
        return self.action in ("go", "watch")


PROCEED = Decision("go")


class GradientMonitor:
    """The statistics of a run's losses and gradient norms, and the responses so far; identical on all processes."""

    def __init__(self, groups: Iterable[str], config: GuardConfig) -> None:
        self.config, self.names, self.patience = config, tuple(groups), config.guard_window // 4
        self.window = torch.zeros(len(self.names), config.guard_window, dtype=torch.float64)
        """Norms of usual steps, a column per step, used as a ring buffer; 0 means unknown: a frozen group has no gradient."""
        self.columns = 0
        """Number of columns written so far."""
        self.latest: list[tuple[list[float], bool]] = []
        """Norms of the latest steps, oldest first, and whether they were unusual."""
        self.first_loss = math.inf
        """The run's first loss; inf while it is unknown."""
        self.losses: list[tuple[int, float]] = []
        """Steps and losses of the last guard_window steps that had one, oldest first."""
        self.in_a_row = 0
        """Number of consecutive unusual steps up to the last one."""
        self.step = 0
        """The last step that was judged."""
        self.skips: list[int] = []
        """Steps skipped among the last guard_window."""
        self.roll_backs = 0
        self.known: tuple[list[float], list[float]] | None = None
        """The result of `usual` for the step that is about to be judged."""
        self.rate_factor = 1.0
        """Factor on the learning rate from now on."""

    def needs_review(self, seen: Tensor) -> Tensor:
        """Return a [] fp32 tensor on the device, without waiting for it: 1 where `seen` is unusual, 0 where it is usual.

        At 0, `decide` returns go, or has the run go back because of its losses. At 1 it does not return go, or not without a
        look at earlier steps.
        """
        _, limit = self.known = self.usual()
        most = torch.tensor([math.inf, *limit], dtype=torch.float64)
        if seen.is_cuda:  # a copy from unpinned memory would wait for the device
            most = most.pin_memory()
        usual = seen.isfinite() & (seen.double() <= most.to(seen.device, non_blocking=True))
        return 1 - usual.all().float()

    def decide(self, step: int, seen: Tensor, scale: float = 1.0) -> Decision:
        """Return the verdict on a step.

        `seen` `[1 + groups]`: the loss and the gradient norms, the same on all processes. `scale`: the factor on the loss in
        the backward pass, by which the gradient has been divided again.
        """
        median, limit = self.known or self.usual()  # before the numbers are read, which waits for the device
        self.known = None
        loss, *norms = seen.tolist()
        self.step = step
        self.skips = [skipped for skipped in self.skips if skipped > step - self.config.guard_window]
        numbers = zip(("loss", *self.names), (loss, *norms), strict=True)
        if broken := [f"{name} {value}" for name, value in numbers if not math.isfinite(value)]:
            if scale > 1 and math.isfinite(loss):
                return Decision("scale", f"{', '.join(broken)} with the loss scaled by {scale:g}")
            return self._skip(", ".join(broken))
        self.losses = [*self.losses[1 - self.config.guard_window :], (step, loss)]
        if not 0 < self.first_loss < math.inf:
            self.first_loss = loss
        high = [i for i, norm in enumerate(norms) if norm > limit[i]]
        self.latest = [*self.latest[1 - _LATEST :], (norms, bool(high))]
        self.in_a_row = self.in_a_row + 1 if high else 0
        if len(self._high_losses(self.patience)) > self.patience // 2:
            why = f"the loss is {loss:.3g} and stays high, where {self._usual_loss():.3g} was usual"
            return self._roll_back(why, self._first_high())
        if not high:
            self._learn(norms)
            return PROCEED
        why = ", ".join(f"{self.names[i]} {norms[i]:.3g} where {median[i]:.3g} is usual" for i in high)
        if sum(unusual for _, unusual in self.latest) > _LATEST // 2 >= len(self._high_losses(_LATEST)):
            self._learn_anew(norms for norms, _ in self.latest)
            self.latest = [(norms, False) for norms, _ in self.latest]
            why += "; it stays so, and the loss is as usual: this is the usual level from now on"
        return Decision("watch", why, math.hypot(*median), building=self.in_a_row % _BUILDING == 0)

    def usual(self) -> tuple[list[float], list[float]]:
        """Return the median of each norm, and the limit it must not exceed; 0 and inf where too few steps are known."""
        known = torch.where(self.window > 0, self.window, torch.nan).log()
        median = known.nanmedian(dim=1, keepdim=True).values
        spread = _SPREAD * (known - median).abs().nanmedian(dim=1, keepdim=True).values
        factor = self.config.guard_factor
        limit = (median + torch.clamp(factor * spread, min=math.log(factor))).exp()
        unknown = (self.window > 0).sum(dim=1, keepdim=True) < KNOWN_STEPS
        return median.exp().nan_to_num(0)[:, 0].tolist(), limit.masked_fill(unknown, math.inf)[:, 0].tolist()

    def first_doubtful_step(self) -> int:
        """Return the first step whose weights may still turn out to be ruined; those of earlier steps are certainly good.

        A loss that stays high is noticed within a quarter of the window, once there are enough losses to judge by; a skipped
        step counts for a whole window.
        """
        can_judge = len(self.losses) >= KNOWN_STEPS + self.patience
        first_bad = self.step + 1 - self.patience if can_judge else min([self.step, *(step for step, _ in self.losses)])
        return min([first_bad, *self.skips]) - 1

    def resume_after(self, former: GradientMonitor) -> None:
        """Resume from the state to which the run has gone back; `former` is the monitor that decided to do so."""
        self.roll_backs = former.roll_backs + 1
        self.rate_factor = former.rate_factor * self.config.guard_rate_factor
        self.latest, self.in_a_row, self.skips = [], 0, []

    def state_dict(self) -> dict[str, Any]:
        """Return the whole state as JSON values, the window's columns oldest first."""
        kept = range(max(0, self.columns - self.window.shape[1]), self.columns)
        columns = [number % self.window.shape[1] for number in kept]
        return {
            "step": self.step,
            "skips": list(self.skips),
            "roll_backs": self.roll_backs,
            "rate_factor": self.rate_factor,
            "first_loss": self.first_loss if self.first_loss < math.inf else None,
            "losses": [list(pair) for pair in self.losses],
            "names": list(self.names),
            "window": self.window[:, columns].T.tolist(),
            "latest": [[norms, unusual] for norms, unusual in self.latest],
            "in_a_row": self.in_a_row,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Load `state`; from a network with other groups only the responses and the losses are taken, not the norms."""
        self.step, self.skips = int(state["step"]), list(map(int, state["skips"]))
        self.roll_backs, self.rate_factor = int(state["roll_backs"]), float(state["rate_factor"])
        first = state.get("first_loss")  # missing in older checkpoints
        self.first_loss = math.inf if first is None else float(first)
        self.losses = [(int(step), float(loss)) for step, loss in state["losses"]][-self.config.guard_window :]
        if state["names"] != list(self.names):
            return
        self._learn_anew(state["window"])
        self.latest = [(list(map(float, norms)), bool(unusual)) for norms, unusual in state["latest"]]
        self.in_a_row = int(state["in_a_row"])

    def _skip(self, why: str) -> Decision:
        self.skips.append(self.step)
        if len(self.skips) <= self.config.guard_skips:
            return Decision("skip", why)
        why = f"{why}, and so it was in {len(self.skips)} of the last {self.config.guard_window} steps"
        return self._roll_back(why, self.skips[0])

    def _roll_back(self, why: str, first_bad: int) -> Decision:
        """Decide to return to the state before the weights that gave the bad loss or gradient of step `first_bad`."""
        return Decision("roll_back" if self.roll_backs < self.config.max_rollbacks else "stop", why, began=first_bad - 1)

    def _usual_loss(self) -> float:
        """Return the median of the losses before those being judged, at most 25 times the first one; inf without any."""
        before = [loss for _, loss in self.losses[: -self.patience]]
        return min(statistics.median(before) if len(before) >= KNOWN_STEPS else math.inf, _USUAL_AT_MOST * self.first_loss)

    def _first_high(self) -> int:
        """Return the step of the first high loss.

        Losses may have been high for longer than the judged span, since before anything was usual.
        """
        high = set(self._high_losses(len(self.losses)))
        steps, began = [step for step, _ in self.losses], self.step
        for end in range(len(steps), 0, -1):
            those = [step for step in steps[max(0, end - self.patience) : end] if step in high]
            if len(those) <= self.patience // 2:
                break
            began = those[0]
        return began

    def _high_losses(self, number: int) -> list[int]:
        """Return those of the last `number` steps whose losses are high."""
        limit = _HIGH * self._usual_loss()
        return [step for step, loss in self.losses[-number:] if loss > limit]

    def _learn(self, norms: Sequence[float]) -> None:
        self.window[:, self.columns % self.window.shape[1]] = torch.tensor(norms, dtype=torch.float64)
        self.columns += 1

    def _learn_anew(self, rows: Iterable[Sequence[float]]) -> None:
        self.window.zero_()
        self.columns = 0
        for norms in rows:
            self._learn(norms)


def async_copy_to_cpu(seen: Tensor) -> Callable[[], Tensor]:
    """Start an asynchronous copy from the GPU and return a function that waits for that copy only, not for later GPU work."""
    if not seen.is_cuda:
        return lambda: seen
    copy, arrived = seen.to("cpu", non_blocking=True), torch.cuda.Event()
    arrived.record(torch.cuda.current_stream(seen.device))

    def wait() -> Tensor:
        arrived.synchronize()
        return copy

    return wait
