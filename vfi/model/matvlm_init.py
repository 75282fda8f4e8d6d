"""Initialise the scan from trained attention, as MaTVLM does: x <- W_V, B <- W_K, C <- W_Q, out_proj <- W_O.

Without softmax, attention is y_i = sum_j (q_i . k_j) v_j, and SSD is the same sum over j <= i with C, B, x for q, k, v. So
the weights of a window attention are copied into the SS2D of a receiver, block by block at the same level and position:

- plan A: any layout of Mamba-2; the common part is copied and the rest is reported.
- plan B: --expand 1 --ssd_groups per_head, --d_state equal to --head_dim: every slice matches.
- plan C: as B with --xb_share k: x and B are the means of k heads of W_V and W_K (the way grouped-query attention is derived
  from full attention), C is exact.

"Exact" refers to the projections. What attention lacks stays in between: the short convolution and SiLU on x, B and C, the
time step and its decay, D, the gate z with its RMSNorm, and the causal order. All of these keep their own initial values,
and attention's softmax and scale have no counterpart. Training closes that gap; it does not start at zero.

Source: MaTVLM (arXiv 2503.13440), after MambaInLlama (arXiv 2408.15237).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from vfi.config.configs import ModelConfig
from vfi.model.backbone import HybridBackbone
from vfi.model.ss2d import SS2D, Mamba2SS2D

PLANS = ("A", "B", "C")
TRAINED_STEPS = 1000
"""A donor trained for fewer steps than this counts as untrained."""
_WEIGHTS = ("qkv_gate.weight", "out_proj.weight")  # of a GatedWindowAttention; rows of the first: q, k, v, gate


class Copied(NamedTuple):
    """Weights that one part of an SS2D took over. Rows are those of in_proj, or columns of out_proj."""

    part: str
    """x, B, C or out_proj."""
    source: str
    """Name of the donor's weights."""
    rows: int
    """Number of rows that were overwritten …"""
    of: int
    """… out of all rows of the part."""
    used: int
    """Number of donor rows that were used …"""
    available: int
    """… out of all rows of the donor."""

    def __str__(self) -> str:
        axis = "columns" if self.part == "out_proj" else "rows"
        return (
            f"{self.part} <- {self.source}: {self.rows} of {self.of} {axis}, from {self.used} of the donor's {self.available}"
        )


@dataclasses.dataclass(frozen=True)
class InitReport:
    """Report of which weights were copied from where."""

    lines: tuple[str, ...]
    warning: str | None
    """Set if the donor is not trained, else None."""

    def __str__(self) -> str:
        return "\n".join((*self.lines, *([f"WARNING: {self.warning}"] if self.warning else [])))


def init_mamba_from_attn(
    backbone: nn.Module, donor_state: Mapping[str, Tensor], plan: str, donor_steps: int | None
) -> InitReport:
    """Initialise every SS2D of `backbone` from the donor's attention at the same position.

    Args:
        donor_state: weights by name of a backbone or of a whole model (names with `backbone.`), with window attention and the
            same --width and --head_dim, and at least as many blocks.
        plan: A, B or C.
        donor_steps: optimiser steps for which the donor was trained; 0 or None if it was not.

    Raises:
        ValueError: the donor lacks a block or has another width, or the receiver does not have the layout of the plan. Nothing
            is changed then.
    """
    scans = {name: module for name, module in backbone.named_modules() if isinstance(module, SS2D)}
    if not scans:
        raise ValueError("this backbone has no scan to initialise: use --backbone_mode hybrid or mamba2_only")
    donors = {name: _attention_weights(donor_state, name) for name in scans}
    for name, module in scans.items():
        _check(module, donors[name], plan, name)
    lines = [f"plan {plan}: time steps, decays, D, convolutions and gates of the scan keep their own first values"]
    for name, module in scans.items():
        lines += [f"{name}: {record}" for record in matvlm_init_mamba2(module, donors[name], plan)]
    if donor_steps is None or donor_steps < TRAINED_STEPS:
        warning = (
            f"the donor was trained for {donor_steps or 0} steps (less than {TRAINED_STEPS}): copying untrained attention "
            f"copies random numbers; use a checkpoint of a run with --backbone_mode gated_attn_only"
        )
        return InitReport(tuple(lines), warning)
    return InitReport((*lines, f"the donor was trained for {donor_steps} steps"), None)


@torch.no_grad()
def matvlm_init_mamba2(ss2d: SS2D, attention_weights: Mapping[str, Tensor], plan: str) -> list[Copied]:
    """Copy `qkv_gate.weight` and `out_proj.weight` of one GatedWindowAttention into one SS2D, in place.

    Heads stay together: B and C of a head come from the K and Q of one head of the donor, so that their product keeps its
    meaning, and x and the columns of out_proj come from its V and W_O. Where heads share x and B, plan A gives them those of
    the first head of the group and leaves C and out_proj of the others as they are; plan C gives them the mean of the group.
    """
    mamba = _check(ss2d, attention_weights, plan, "SS2D")
    dim, d, share = mamba.in_proj.in_features, mamba.head_dim, mamba.share
    qkv, out = (attention_weights[name].to(mamba.in_proj.weight) for name in _WEIGHTS)
    q, k, v = (t.unflatten(0, (-1, d)) for t in qkv[: 3 * dim].split(dim))  # [heads, d, dim]
    _, xbc, _ = mamba.in_proj.weight.split(mamba.splits)
    x, B, C = xbc.split(mamba.inner_splits)

    # for every head (or group of heads) of the scan: the donor heads that it is copied from
    groups = [range(g, g + share) for g in range(0, mamba.heads, share)]
    if plan == "C":
        of_group = [list(group) for group in groups]
        of_head = [[head] for head in range(mamba.heads)]
        mean = f"means of {share} heads of "
    else:
        of_group = [[group[0]] if group[0] < len(q) else [] for group in groups]
        of_head = [[head] if head % share == 0 and head < len(q) else [] for head in range(mamba.heads)]
        mean = ""
    of_b, of_c = of_group, of_head
    if mamba.groups < mamba.heads:
        # one B and one C for all heads: as many rows of the donor's heads, one after another, as the state holds
        q, k, of_b, of_c = q.flatten(0, 1).unsqueeze(0), k.flatten(0, 1).unsqueeze(0), [[0]], [[0]]
    return [
        _copy("x", mean + "W_V", x, v, of_group),
        _copy("B", mean + "W_K", B, k, of_b),
        _copy("C", "W_Q", C, q, of_c),
        _copy("out_proj", "W_O", mamba.out_proj.weight.t(), out.t().unflatten(0, (-1, d)), of_head),
    ]


def _copy(part: str, source: str, target: Tensor, donor: Tensor, sources: Sequence[Sequence[int]]) -> Copied:
    """Set each head of `target [heads * rows, dim]` to the mean of heads of `donor [heads, rows, dim]`, in the common rows."""
    slots = target.unflatten(0, (len(sources), -1))
    rows = min(slots.shape[1], donor.shape[1])
    for slot, heads in zip(slots, sources, strict=True):
        if heads:
            slot[:rows] = donor[list(heads), :rows].mean(0)
    filled, used = (rows * sum(counts) for counts in ([bool(heads) for heads in sources], [len(heads) for heads in sources]))
    return Copied(part, source, filled, len(target), used, donor.shape[0] * donor.shape[1])


def random_source(config: ModelConfig, seed: int) -> dict[str, Tensor]:
    """Return weights of a backbone with random attention that fits `config`: the control arm, with nothing learned to copy."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        config = dataclasses.replace(config, backbone_mode="gated_attn_only", attention_backend="sdpa")
        return HybridBackbone(config, torch.device("cpu")).state_dict()


def _attention_weights(state: Mapping[str, Tensor], scan: str) -> dict[str, Tensor]:
    """Return the donor's attention weights that lie next to, or in place of, the scan of this name; else raise ValueError."""
    place = scan.removesuffix("ss2d") + "attention."
    for prefix in ("", "backbone."):
        if all(prefix + place + name in state for name in _WEIGHTS):
            return {name: state[prefix + place + name] for name in _WEIGHTS}
    present = sorted({name.partition("stages.")[2].partition(".branches")[0] for name in state if ".attention." in name})
    raise ValueError(
        f"the donor has no {place}{_WEIGHTS[0]}; it has attention in the blocks {', '.join(present) or '(none)'}: use a donor "
        f"with --backbone_mode gated_attn_only or hybrid and the same --depths"
    )


def _check(ss2d: SS2D, weights: Mapping[str, Tensor], plan: str, name: str) -> Mamba2SS2D:
    """Return the SS2D if plan and donor fit it; otherwise raise a ValueError that names the settings that would."""
    if plan not in PLANS:
        raise ValueError(f"--matvlm_plan {plan!r} does not exist; choose from {', '.join(PLANS)}")
    if not isinstance(ss2d, Mamba2SS2D):
        raise ValueError(f"{name}: the plans of MaTVLM are for --ssm mamba2")
    dim, d = ss2d.in_proj.in_features, ss2d.head_dim
    rows, donor_dim = weights[_WEIGHTS[0]].shape
    if donor_dim != dim:
        raise ValueError(f"{name}: the donor has {donor_dim} channels here and this model {dim}: use the donor's --width")
    gates = rows - 3 * dim  # one for each head with --gate headwise; else the number of heads is unknown
    if 0 < gates < dim and gates * d != dim:
        raise ValueError(
            f"{name}: the donor has {gates} heads and this model's --head_dim {d} makes {dim // d}: use its --head_dim"
        )
    shared = ss2d.share > 1
    layout = ss2d.out_proj.in_features == dim and ss2d.groups == ss2d.heads and ss2d.state == d
    if plan != "A" and not (layout and shared == (plan == "C")):
        raise ValueError(
            f"{name}: plan {plan} needs --expand 1 --ssd_groups per_head --d_state {d} --head_dim {d} "
            f"{'--xb_share 2 or more' if plan == 'C' else '--xb_share 1'}; plan A takes any layout"
        )
    return ss2d
