"""Benchmark protocols as data: the frames of each benchmark, and how each profile pads, rounds and compares them.

    PROTOCOLS["snu_film_hard"].rules("vfimamba")

A profile follows the evaluation of a family of repositories: `vfimamba`, `ema` (which differs from it on X-TEST alone), `rife`,
`amt`. A protocol lacks the profile of a family that never measured it, or whose repositories quote two different values.
"""

from __future__ import annotations

import dataclasses
from typing import Literal, get_args

from vfi.errors import JobError

ProfileName = Literal["vfimamba", "ema", "rife", "amt"]
PROFILES = get_args(ProfileName)
Ssim = Literal["ssim_matlab", "ssim_skimage"]
Prepare = Literal["as they are", "half size", "half size, rounded", "centre crop"]


@dataclasses.dataclass(frozen=True)
class Padding:
    """Padding of the inputs, which is cropped from the prediction."""

    mode: Literal["replicate", "zeros"]
    side: Literal["centred", "bottom right"]
    divisor: int = 1
    """Both sides are padded to a multiple of this …"""
    smallest: tuple[int, int] = (0, 0)
    """… and to at least this (height, width)."""

    def amounts(self, height: int, width: int) -> tuple[int, int, int, int]:
        """Return the padding at the left, right, top and bottom."""
        missing = [
            max(least, -(-side // self.divisor) * self.divisor) - side
            for side, least in zip((height, width), self.smallest, strict=True)
        ]
        (top, left) = (amount // 2 for amount in missing) if self.side == "centred" else (0, 0)
        return left, missing[1] - left, top, missing[0] - top

    def __str__(self) -> str:
        size = f"a multiple of {self.divisor}" if self.divisor > 1 else "at least {}x{}".format(*self.smallest)
        return f"{self.mode}, {self.side}, to {size}"


@dataclasses.dataclass(frozen=True)
class Rules:
    """What a profile fixes for a protocol."""

    padding: Padding | None = None
    scale: float | None = None
    """Estimate flow at this fraction of the frame size; None: each model's own setting."""
    rounded: bool = False
    """Whether the prediction is rounded to 8 bits before it is compared."""
    recursive: bool = False
    """Whether in-between frames are found by recursive bisection, from the model's own unrounded frames."""
    ssim: Ssim = "ssim_matlab"
    measures_ie: bool = False
    """Whether the interpolation error is the published measure."""


@dataclasses.dataclass(frozen=True)
class Protocol:
    """A benchmark: which frames of which set, and how each profile measures on them."""

    title: str
    job: str
    """The module that knows the published layout, and converts it to shards."""
    arguments: dict[str, str]
    """Arguments of that module's command for this protocol."""
    signs: tuple[str, ...]
    """Glob patterns: a published folder of the set has a file that matches one of them."""
    count: int
    """Number of samples, as published."""
    frames: int
    """Frames per sample; the first and the last are the inputs."""
    truths: tuple[int, ...]
    """Positions in a sample of the frames to predict."""
    profiles: dict[str, Rules]
    prepare: Prepare = "as they are"
    size: tuple[int, int] | None = None
    """(height, width) of the published frames, where all have the same."""

    def rules(self, profile: str) -> Rules:
        """Return the rules of a profile. Raises JobError for a profile that this protocol lacks."""
        if profile not in self.profiles:
            raise JobError(f"--profile {profile} does not measure on {self.title}: choose from {', '.join(self.profiles)}")
        return self.profiles[profile]

    def timestep(self, truth: int) -> float:
        """Return the time of a sample's in-between frame."""
        return truth / (self.frames - 1)


def _both(rules: Rules) -> dict[str, Rules]:
    return {"vfimamba": rules, "ema": rules}


_TO_32 = Padding("replicate", "centred", 32)
_SNU = {
    **_both(Rules(_TO_32, scale=0.5)),
    "amt": Rules(Padding("replicate", "centred", 20), scale=0.8),
}
_MIDDLEBURY = Rules(Padding("zeros", "bottom right", smallest=(480, 640)), measures_ie=True)
_UHD = (2160, 4096)


def _xtest(half: bool, truths: tuple[int, ...]) -> Protocol:
    ema = Rules(_TO_32, scale=0.5 if half else 0.25, rounded=True)
    return Protocol(
        title=f"X-TEST {'2K' if half else '4K'}" + (", frame 16 alone" if len(truths) == 1 else ""),
        job="shards.x4k1000fps",
        arguments={"split": "test"},
        signs=("test/Type*",),
        count=15,
        frames=9,
        truths=truths,
        profiles={"vfimamba": dataclasses.replace(ema, recursive=len(truths) > 1), "ema": ema},
        prepare="half size" if half else "as they are",
        size=_UHD,
    )


def _xiph(half: bool) -> Protocol:
    return Protocol(
        title=f"Xiph {'2K' if half else '4K'}",
        job="shards.xiph",
        arguments={},
        signs=("*-002.png", "*/*-002.png", "*/002.png"),
        count=392,
        frames=3,
        truths=(1,),
        profiles=_both(Rules(Padding("replicate", "centred", 16), scale=0.5, rounded=True, ssim="ssim_skimage")),
        prepare="half size, rounded" if half else "centre crop",
        size=_UHD,
    )


PROTOCOLS: dict[str, Protocol] = {
    "vimeo90k": Protocol(
        title="Vimeo90K triplets", job="shards.vimeo90k", arguments={"kind": "triplet", "split": "test"},
        signs=("tri_testlist.txt",), count=3_782, frames=3, truths=(1,),
        profiles={**_both(Rules()), "rife": Rules(rounded=True), "amt": Rules()}, size=(256, 448),
    ),
    "vimeo90k_septuplet_147": Protocol(
        title="Vimeo90K septuplets, frames 1, 4 and 7", job="shards.vimeo90k",
        arguments={"kind": "septuplet", "split": "test"}, signs=("sep_testlist.txt",), count=7_824, frames=7, truths=(3,),
        profiles=_both(Rules()), size=(256, 448),
    ),
    "ucf101": Protocol(
        title="UCF101", job="shards.ucf101", arguments={}, signs=("*/frame_01_gt.png",), count=379, frames=3, truths=(1,),
        profiles={**_both(Rules(rounded=True)), "rife": Rules(rounded=True), "amt": Rules()}, size=(256, 256),
    ),
    **{
        f"snu_film_{split}": Protocol(
            title=f"SNU-FILM {split}", job="shards.snu_film", arguments={"split": split},
            signs=(f"test-{split}.txt", f"eval_modes/test-{split}.txt"), count=310, frames=3, truths=(1,), profiles=_SNU,
        )
        for split in ("easy", "medium", "hard", "extreme")
    },
    "middlebury": Protocol(
        title="Middlebury-Other", job="shards.middlebury", arguments={},
        signs=("other-gt-interp/*/frame10i11.png",), count=12, frames=3, truths=(1,),
        profiles={**_both(Rules(_TO_32, measures_ie=True)), "rife": _MIDDLEBURY, "amt": _MIDDLEBURY},
    ),
    "xtest_4k": _xtest(half=False, truths=tuple(range(1, 8))),
    "xtest_2k": _xtest(half=True, truths=tuple(range(1, 8))),
    "xtest_l_4k": _xtest(half=False, truths=(4,)),
    "xtest_l_2k": _xtest(half=True, truths=(4,)),
    "xiph_4k": _xiph(half=False),
    "xiph_2k": _xiph(half=True),
}  # fmt: skip
