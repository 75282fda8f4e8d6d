"""Choose the largest batch that fits a GPU, from memory_profiles.json, to which `python -m launch.profile` adds measurements.

    choice = choose_batch(config, gpu="a100-80gb", processes=8, precision="bf16")
    choice.device_batch, choice.accumulation, choice.why
    config = choice.applied_to(config)

Sources, best first: a *fit* on this card; a fit on another card, applied to this card's memory; a *point*, which is a single
measurement and holds for its own batch and crop and for smaller ones; a batch that was *stated*, for no model in particular.
The global batch is never changed: a device gets a divisor of its share of it, and accumulates gradients.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from typing import Any, Literal

from launch.memory.model import GIB, Entry, Fit, Point, Profiles, read_profiles, settings
from vfi.config.configs import Config, ConfigError, ModelConfig

OUTSIDE_GIB = 1.0
"""GiB of a card that are reserved for memory outside of torch: CUDA, libraries, NCCL."""
MARGIN = 0.06
"""Fraction of the rest that is kept free, for fragmentation and a second copy of gradients (DDP) and of weights (--ema)."""
ProfileSource = Literal["fit", "point", "stated"]
_OF_NOMINAL = 0.98  # usable GiB of a card / GB that it is sold with: 79.2 of 80, 15.8 of 16, 139.8 of 141
_LEAST_CROP, _CROP_STEP = 64, 16  # what vfi.config.configs accepts
_PRECISIONS = {"no": "fp32", "fp32": "fp32", "bf16": "bf16", "fp16": "fp16"}  # accelerate calls fp32 "no"
_MEASURE = "measure it by `python -m launch.profile`"


@dataclasses.dataclass(frozen=True)
class GpuSpec:
    """The GPU that a job will run on."""

    kind: str
    gib: float
    note: str = ""
    """Explains how its memory was guessed; empty when it is known."""

    @property
    def budget(self) -> float:
        """Bytes that the peak of a training step may take."""
        return max(0.0, (self.gib - OUTSIDE_GIB) * (1 - MARGIN) * GIB)

    def __str__(self) -> str:
        rule = f"{self.gib:.1f} GiB less {OUTSIDE_GIB:g} GiB and a margin of {MARGIN:.0%}"
        return f"{self.budget / GIB:.1f} GiB of {self.kind} ({rule})"


@dataclasses.dataclass(frozen=True)
class Choice:
    """Chosen batch sizes: global_batch = device_batch * processes * accumulation."""

    device_batch: int
    accumulation: int
    global_batch: int
    basis: ProfileSource
    why: str
    """Explanation of the choice for the user."""
    predicted_gib: float | None
    """Predicted peak memory of a training step with this batch; None where no formula is known."""

    def applied_to(self, config: Config) -> Config:
        """Return `config` with this device batch; the experiment stays the same."""
        data = dataclasses.replace(config.data, batch_size=self.device_batch, global_batch=self.global_batch)
        return dataclasses.replace(config, data=data)


def choose_batch(
    config: Config,
    gpu: str,
    processes: int,
    precision: str,
    *,
    memory_gib: float | None = None,
    profiles: Profiles | None = None,
) -> Choice:
    """Choose the largest device batch that fits and divides the global batch, which stays as `config` sets it for vfi.train.

    Args:
        gpu: name of the card in Slurm or torch: a100, a100-80gb, "NVIDIA A100-SXM4-80GB".
        precision: bf16, fp16 or fp32 (or "no", as accelerate calls fp32).
        memory_gib: memory of the card, if known; otherwise it is derived from the name.

    Raises ConfigError when nothing fits, naming what would; for a card of unknown size; for an unknown precision; for a global
    batch that is not a multiple of `processes`; and for a perceptual loss, which no profile includes.
    """
    if precision not in _PRECISIONS:
        raise ConfigError(f"precision {precision!r} does not exist; choose from {', '.join(_PRECISIONS)}")
    total = config.data.global_batch or config.data.batch_size * processes
    if total % processes:
        raise ConfigError(f"--global_batch {total} is not a multiple of {processes} processes: use one that is")
    if config.optim.is_perceptual:
        raise ConfigError("no memory profile includes the perceptual loss (--vgg_weight, --style_weight): give --batch_size")
    profiles = profiles or read_profiles()
    card = identify(gpu, memory_gib, profiles.cards)
    limit, why, basis, fit = _Asked(config, _PRECISIONS[precision], card, profiles).limit()
    share = total // processes
    batch = max(divisor for divisor in range(1, min(limit, share) + 1) if share % divisor == 0)
    predicted = fit.bytes_at(batch, config.data.largest_crop) / GIB if fit else None
    takes = f", predicted to take {predicted:.1f} GiB" if predicted else ""
    product = f"global batch {total} = {batch} * {processes} processes * {share // batch} accumulated"
    return Choice(batch, share // batch, total, basis, f"{product}{takes}: {why}{card.note}", predicted)


@dataclasses.dataclass(frozen=True)
class _Asked:
    """A model on a card, and the profiles to look it up in."""

    config: Config
    precision: str
    card: GpuSpec
    profiles: Profiles

    @property
    def crop(self) -> int:
        return self.config.data.largest_crop

    def limit(self) -> tuple[int, str, ProfileSource, Fit | None]:
        """Return the largest batch that fits, the explanation, its basis, and the formula if there is one."""
        known = self.known()
        entry, fit = _best_fit(known, self.card)
        if entry and fit:
            return *self._by_fit(entry, fit), "fit", fit
        points = [(point, entry) for entry in known for point in entry.points if point.crop >= self.crop]
        fitting = [pair for pair in points if pair[0].allocated <= self.card.budget]
        if fitting:
            return *self._by_point(*max(fitting, key=lambda pair: pair[0].batch)), "point", None
        return *self._by_statement(), "stated", None

    def known(self, **changed: Any) -> list[Entry]:
        """Return the entries measured with these settings, some of which `changed` may replace.

        Without such entries, return those of the same network without fused kernels and CUDA graphs, which takes more memory
        than either.
        """
        compute = self.config.compute
        asked: dict[str, Any] = {
            "precision": self.precision,
            "checkpointing": compute.checkpointing,
            "compiled": compute.compile,
            "cuda_graphs": compute.cuda_graphs,
        } | changed
        for sought in (
            settings(self.config.model, **asked),
            settings(_unfused(self.config.model), **asked | {"cuda_graphs": False}),
        ):
            if found := [entry for entry in self.profiles.measured if entry.settings == sought]:
                return found
        return []

    def _by_fit(self, entry: Entry, fit: Fit) -> tuple[int, str]:
        limit = fit.largest_batch(self.crop, self.card.budget)
        if not limit:
            raise ConfigError(self._refusal(f"a batch of 1 takes {fit.bytes_at(1, self.crop) / GIB:.1f} GiB", fit))
        most = max(entry.points, key=lambda point: point.pixels)
        beyond = (
            f", beyond what was measured (batch {most.batch} at crop {most.crop})" if limit * self.crop**2 > most.pixels else ""
        )
        return limit, f"up to {limit} fit into {self.card} at crop {self.crop} by measurement{self._where(entry)}{beyond}"

    def _by_point(self, point: Point, entry: Entry) -> tuple[int, str]:
        return point.batch, (
            f"up to {point.batch} by a single measurement{self._where(entry)}, {point.allocated / GIB:.1f} GiB at crop "
            f"{point.crop}, which {self.card} holds; more may fit, {_MEASURE}"
        )

    def _where(self, entry: Entry) -> str:
        own = entry.is_of(self.card.kind, self.card.gib)
        more = settings(entry.model, "", False, False) != settings(self.config.model, "", False, False)
        card = "" if own else f" on another card ({entry.card}, {entry.memory_gib:.0f} GiB)"
        return card + " without fused kernels, which take less" * more

    def _by_statement(self) -> tuple[int, str]:
        """Return the batch stated for the card itself, or for the largest card that has no more memory, and the explanation.

        A larger crop reduces the batch in proportion to its area. Raises ConfigError when nothing usable is stated.
        """
        card, nothing = self.card, "no measurement tells of this model on this card"
        sizes = {row: _OF_NOMINAL * row.gb for row in self.profiles.stated}
        own = [row for row, gib in sizes.items() if row.card == card.kind and abs(gib - card.gib) < 2]
        smaller = [row for row, gib in sizes.items() if gib <= card.gib + 0.5]
        if not own and not smaller:
            raise ConfigError(self._refusal(f"{nothing}, and no batch is stated for so little memory: give --batch_size", None))
        row = own[0] if own else max(smaller, key=lambda row: row.gb)
        limit = row.batch if self.crop <= row.crop else row.batch * row.crop**2 // self.crop**2
        stated = f"{row.batch} at crop {row.crop} for {row.card} {row.gb} GB"
        if not limit:
            raise ConfigError(self._refusal(f"{nothing}; stated is a batch of {stated}: give --batch_size, or measure", None))
        by = "" if own else f", the nearest to {card.kind} by its memory of {card.gib:.0f} GiB"
        return limit, f"up to {limit}, as {nothing} and stated is {stated}{by} ({row.source}); {_MEASURE}"

    def _refusal(self, needs: str, fit: Fit | None) -> str:
        """Return the error text: what was requested, and what would fit."""
        model, compute = self.config.model, self.config.compute
        asked = f"{self.config.run.preset}, phase {model.phase}, {self.precision}, crop {self.crop}"
        asked += (
            ", checkpointing" * compute.checkpointing + ", compiled" * compute.compile + ", CUDA graphs" * compute.cuda_graphs
        )
        advice = [self._smaller_crop(fit)]
        if not compute.checkpointing:
            advice.append("--checkpointing" + self._with(checkpointing=True))
        if self.precision == "fp32":
            advice.append("mixed precision bf16 (fp16 on cards without it)" + self._with(precision="bf16"))
        return f"{asked} does not fit into {self.card}: {needs}. Try {'; '.join(advice)}; or a card with more memory"

    def _smaller_crop(self, fit: Fit | None) -> str:
        flag = "--curriculum_crops" if self.config.data.curriculum else "--crop"
        if fit is None:
            return f"a smaller {flag}"
        crops = [crop for crop in range(_LEAST_CROP, self.crop, _CROP_STEP) if fit.largest_batch(crop, self.card.budget)]
        return f"{flag} up to {crops[-1]}, which fits by measurement" if crops else f"a smaller network (no {flag} fits)"

    def _with(self, **changed: Any) -> str:
        """Return in parentheses what is known of the same model with other settings."""
        _, fit = _best_fit(self.known(**changed), self.card)
        if fit is None:
            return " (not measured)"
        limit = fit.largest_batch(self.crop, self.card.budget)
        return f" (a batch of {limit} fits by measurement)" if limit else " (not enough by measurement)"


def _unfused(model: ModelConfig) -> ModelConfig:
    """Return the config of the same network with the operators of PyTorch and mamba-ssm."""
    return dataclasses.replace(
        model, ssd_backend="mamba_ssm", ssd_precision="fp32", attention_backend="sdpa", pointwise_backend="torch"
    )


def _best_fit(entries: Sequence[Entry], card: GpuSpec) -> tuple[Entry, Fit] | tuple[None, None]:
    """Return an entry with a fit on this card, else the one of another card that took most memory per pixel."""
    fitted = [(entry, entry.fit) for entry in entries if entry.fit is not None]
    own = [pair for pair in fitted if pair[0].is_of(card.kind, card.gib)]
    return max(own or fitted, key=lambda pair: pair[1].per_pixel, default=(None, None))


def identify(gpu: str, memory_gib: float | None, cards: dict[str, tuple[int, ...]]) -> GpuSpec:
    """Return the kind and memory of a card, derived from its name; raise ConfigError when its memory remains unknown."""
    tokens = re.findall(r"[a-z0-9]+", re.sub(r"rtx[\s_-]+", "rtx", gpu.lower()))
    sizes = [int(match[1]) for token in tokens if (match := re.fullmatch(r"(\d+)gb?", token))]
    words = [token for token in tokens if not re.fullmatch(r"\d+gb?|nvidia|tesla|geforce|quadro", token)]
    kind = next((token for token in words if token in cards), "-".join(words) or "unknown")
    if memory_gib is not None:
        return GpuSpec(kind, memory_gib)
    if sizes:
        return GpuSpec(kind, _OF_NOMINAL * sizes[-1])
    if kind not in cards:
        raise ConfigError(
            f"the memory of a GPU named {gpu!r} is not known (that of {', '.join(cards)} is): write its size after the name, "
            f"such as {kind}-48gb"
        )
    least, most = min(cards[kind]), max(cards[kind])
    other = f"write {kind}-{most}gb for one that has more, or --gpu_gb {most} to launch.submit"
    note = f". {kind} was taken to have {least} GB: {other}" if most > least else ""
    return GpuSpec(kind, _OF_NOMINAL * least, note)
