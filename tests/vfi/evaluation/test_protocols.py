"""Published protocols, compared with the same computation by hand in numpy; every fact of a protocol affects the result."""

from __future__ import annotations

import dataclasses
import itertools
import math

import numpy as np
import pytest
import torch
from skimage import data
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from vfi.errors import JobError
from vfi.evaluation.evaluator import predict_between, score
from vfi.evaluation.protocols import PROFILES, PROTOCOLS, Padding, Rules
from vfi.evaluation.published import PUBLISHED
from vfi.evaluation.task import prepare
from vfi.metrics.image_quality import ssim_matlab

CPU = torch.device("cpu")
SIZE = (52, 76)


def photographs(height: int = SIZE[0], width: int = SIZE[1], count: int = 3) -> list[np.ndarray]:
    """A photograph that moves by three pixels a frame."""
    whole = data.astronaut()
    return [np.ascontiguousarray(whole[60 : 60 + height, 200 + 3 * i : 200 + 3 * i + width]) for i in range(count)]


def by_hand(frame: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(frame.astype(np.float32) / np.float32(255)).permute(2, 0, 1)[None]


def uneven(img0: torch.Tensor, img1: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
    """In place of a model, one whose result depends on everything: on place, size, border, direction and time."""
    height, width = img0.shape[-2:]
    ramp = torch.linspace(0, 0.1, width) + torch.linspace(0, 0.05, height)[:, None] + (height * 7 + width) / 1e5
    mean = img0 * (1 - timestep) + img1 * timestep
    return (mean + ramp * mean.mean() + 0.02 * (img0 - img1).roll(1, -1)).clamp(0, 1)


def test_what_is_published_is_what_the_table_says():
    """Counts, frames and sizes of the sets as published; every profile name is known."""
    counts = {name: (p.count, p.frames, len(p.truths)) for name, p in PROTOCOLS.items()}
    assert counts == {
        "vimeo90k": (3782, 3, 1), "vimeo90k_septuplet_147": (7824, 7, 1), "ucf101": (379, 3, 1), "middlebury": (12, 3, 1),
        "snu_film_easy": (310, 3, 1), "snu_film_medium": (310, 3, 1), "snu_film_hard": (310, 3, 1),
        "snu_film_extreme": (310, 3, 1), "xtest_4k": (15, 9, 7), "xtest_2k": (15, 9, 7), "xtest_l_4k": (15, 9, 1),
        "xtest_l_2k": (15, 9, 1), "xiph_4k": (392, 3, 1), "xiph_2k": (392, 3, 1),
    }  # fmt: skip
    assert {profile for p in PROTOCOLS.values() for profile in p.profiles} == set(PROFILES)
    assert PROTOCOLS["vimeo90k_septuplet_147"].timestep(3) == 0.5
    assert [PROTOCOLS["xtest_4k"].timestep(t) for t in PROTOCOLS["xtest_4k"].truths] == [n / 8 for n in range(1, 8)]
    with pytest.raises(JobError, match="--profile rife does not measure on SNU-FILM hard: choose from vfimamba, ema, amt"):
        PROTOCOLS["snu_film_hard"].rules("rife")


def test_families_measure_as_they_do():
    """Read off the repositories' own scripts."""
    rules = {(name, profile): p.rules(profile) for name, p in PROTOCOLS.items() for profile in p.profiles}
    assert {name for (name, profile), r in rules.items() if profile == "vfimamba" and r.rounded} == {
        "ucf101", "xtest_4k", "xtest_2k", "xtest_l_4k", "xtest_l_2k", "xiph_4k", "xiph_2k",
    }  # fmt: skip
    assert {key for key, r in rules.items() if r.recursive} == {("xtest_4k", "vfimamba"), ("xtest_2k", "vfimamba")}
    assert {name: r.scale for (name, profile), r in rules.items() if profile == "ema" and r.scale} == {
        **dict.fromkeys(("snu_film_easy", "snu_film_medium", "snu_film_hard", "snu_film_extreme"), 0.5),
        "xtest_4k": 0.25, "xtest_l_4k": 0.25, "xtest_2k": 0.5, "xtest_l_2k": 0.5, "xiph_4k": 0.5, "xiph_2k": 0.5,
    }  # fmt: skip
    assert {key[0] for key, r in rules.items() if r.ssim == "ssim_skimage"} == {"xiph_4k", "xiph_2k"}
    assert {key for key, r in rules.items() if r.measures_ie} == {("middlebury", profile) for profile in PROFILES}
    assert rules["vimeo90k", "rife"].rounded
    assert not rules["vimeo90k", "amt"].rounded
    assert not rules["ucf101", "amt"].rounded


@pytest.mark.parametrize(("side", "divisor"), [*itertools.product((1, 31, 32, 33, 480, 1080), (16, 20, 32))])
def test_centred_padding_is_that_of_the_repositories(side, divisor):
    """Their formula: ((side // divisor) + 1) * divisor - side, modulo divisor; the smaller half comes first."""
    amount = (((side // divisor) + 1) * divisor - side) % divisor
    padding = Padding("replicate", "centred", divisor)
    assert padding.amounts(side, 7 * divisor) == (0, 0, amount // 2, amount - amount // 2)
    assert padding.amounts(divisor, side)[:2] == (amount // 2, amount - amount // 2)


def test_padding_to_a_size_is_at_the_bottom_and_on_the_right():
    padding = Padding("zeros", "bottom right", smallest=(480, 640))
    assert padding.amounts(388, 584) == (0, 56, 0, 92)
    assert padding.amounts(480, 640) == (0, 0, 0, 0)


def test_frames_are_prepared_as_opencv_does():
    """Means over 2x2, exact in floats, rounded half up where OpenCV works in 8 bits; a quarter cut off on each side."""
    frame = photographs(64, 96)[0]
    squares = frame.reshape(32, 2, 48, 2, 3).astype(np.int64).sum((1, 3))
    torch.testing.assert_close(prepare(frame, "half size", CPU), by_hand(squares / 4), rtol=1e-6, atol=1e-7)
    assert torch.equal(prepare(frame, "half size, rounded", CPU), by_hand((squares + 2) // 4))
    assert (squares % 4 == 2).any()
    assert torch.equal(prepare(frame, "centre crop", CPU), by_hand(frame[16:48, 24:72]))
    assert torch.equal(prepare(frame, "as they are", CPU), by_hand(frame))
    with pytest.raises(JobError, match="half size needs sides that are multiples of 4, and a frame has 63x96"):
        prepare(frame[:-1], "half size", CPU)


def expected(frames: list[np.ndarray], rules: Rules, tta: bool) -> np.ndarray:
    """The middle frame by plain numpy padding and cutting, [H, W, 3]."""
    left, right, top, bottom = rules.padding.amounts(*frames[0].shape[:2]) if rules.padding else (0, 0, 0, 0)
    how = {"mode": "edge"} if rules.padding is None or rules.padding.mode == "replicate" else {"mode": "constant"}
    padded = [np.pad(frame, ((top, bottom), (left, right), (0, 0)), **how) for frame in (frames[0], frames[-1])]
    half = torch.tensor([0.5])
    found = uneven(by_hand(padded[0]), by_hand(padded[1]), half)[0].permute(1, 2, 0).numpy()
    if tta:
        turned = [by_hand(np.ascontiguousarray(frame[::-1, ::-1])) for frame in padded]
        found = (found + uneven(*turned, half)[0].permute(1, 2, 0).numpy()[::-1, ::-1]) / 2
    height, width = found.shape[:2]
    return found[top : height - bottom, left : width - right]


PLAIN = [(name, profile) for name, p in PROTOCOLS.items() for profile in p.profiles if not p.rules(profile).recursive]


@pytest.mark.parametrize("tta", [False, True])
@pytest.mark.parametrize(("name", "profile"), PLAIN)
def test_scores_are_those_by_hand(name, profile, tta):
    rules, frames = PROTOCOLS[name].rules(profile), photographs()
    images = [prepare(frame, "as they are", CPU) for frame in frames]
    (found,) = predict_between(uneven, images[0], images[-1], [0.5], rules, tta)
    by_numpy = expected(frames, rules, tta)
    np.testing.assert_allclose(found[0].permute(1, 2, 0).numpy(), by_numpy, atol=1e-6)
    psnr, ssim, ie, *_ = score(found, images[1], rules)
    whole = np.round(by_numpy.clip(0, 1).astype(np.float64) * 255)
    seen, truth = (whole / 255 if rules.rounded else by_numpy.astype(np.float64)), frames[1] / 255
    assert psnr == pytest.approx(-10 * math.log10(((seen - truth) ** 2).mean()), abs=1e-4)
    if rules.ssim == "ssim_skimage":
        eight = whole.astype(np.uint8)
        assert ssim == structural_similarity(frames[1], eight, data_range=255, channel_axis=-1)
        assert psnr == pytest.approx(peak_signal_noise_ratio(frames[1], eight, data_range=255), abs=1e-4)
    else:
        assert ssim == pytest.approx(ssim_matlab(by_hand(seen * 255).double(), by_hand(frames[1]).double()).item(), abs=1e-5)
    assert ie == pytest.approx(np.abs(whole - frames[1]).mean(), abs=1e-3)  # a value at .5 may go either way


CHANGES = {
    "rounding": lambda rules: dataclasses.replace(rules, rounded=not rules.rounded),
    "side": lambda rules: dataclasses.replace(rules, padding=dataclasses.replace(
        rules.padding, side="bottom right" if rules.padding.side == "centred" else "centred")),
    "mode": lambda rules: dataclasses.replace(rules, padding=dataclasses.replace(
        rules.padding, mode="zeros" if rules.padding.mode == "replicate" else "replicate")),
    "amount": lambda rules: dataclasses.replace(rules, padding=dataclasses.replace(
        rules.padding, divisor=rules.padding.divisor + 20, smallest=tuple(2 * side for side in rules.padding.smallest))),
    "kind of SSIM": lambda rules: dataclasses.replace(
        rules, ssim="ssim_skimage" if rules.ssim == "ssim_matlab" else "ssim_matlab"),
}  # fmt: skip


@pytest.mark.parametrize(("name", "profile"), PLAIN)
def test_every_fact_changes_the_numbers(name, profile):
    rules = PROTOCOLS[name].rules(profile)
    images = [prepare(frame, "as they are", CPU) for frame in photographs()]

    def scores(rules: Rules, frames=images, tta: bool = False):
        (found,) = predict_between(uneven, frames[0], frames[-1], [0.5], rules, tta)
        return score(found, frames[1], rules)

    usual = scores(rules)
    for what, change in CHANGES.items():
        if rules.padding or what in ("rounding", "kind of SSIM"):
            assert scores(change(rules)) != usual, what
    assert scores(rules, tta=True) != usual
    assert scores(rules, frames=images[1:] + images[:1]) != usual


def test_bisecting_asks_for_the_middle_of_its_own_frames():
    """Seven in-between frames: each is the middle of two that are already there, always padded, never rounded."""
    asked = []

    def middle(img0, img1, timestep):
        asked.append((img0.mean().item(), img1.mean().item(), timestep.item(), tuple(img0.shape)))
        return (img0 + img1) / 2

    rules = PROTOCOLS["xtest_4k"].rules("vfimamba")
    img0, img1 = torch.zeros(1, 3, *SIZE), torch.ones(1, 3, *SIZE)
    found = predict_between(middle, img0, img1, [n / 8 for n in range(1, 8)], rules, tta=False)
    assert [frame.mean().item() for frame in found] == [n / 8 for n in range(1, 8)]
    assert all(frame.shape == img0.shape for frame in found)
    assert sorted(asked) == sorted((a / 8, b / 8, 0.5, (1, 3, 64, 96)) for a, b in (
        (0, 8), (0, 4), (4, 8), (0, 2), (2, 4), (4, 6), (6, 8)))  # fmt: skip
    direct = predict_between(uneven, img0, img1, [0.25], PROTOCOLS["xtest_4k"].rules("ema"), tta=False)
    assert direct[0].mean() < 0.5
    with pytest.raises(ValueError, match="bisecting finds 1, 3, 7"):
        predict_between(middle, img0, img1, [0.25, 0.5], rules, tta=False)


def test_published_numbers_are_of_known_protocols_and_in_range():
    assert set(PUBLISHED) < set(PROTOCOLS)
    for protocol, rows in PUBLISHED.items():
        assert len({row.model for row in rows}) == len(rows)
        for row in rows:
            assert row.psnr is not None or row.ie is not None
            assert row.psnr is None or 20 < row.psnr < 45
            assert row.ssim is None or 0.9 < row.ssim < 1
            assert (row.ie is not None) <= PROTOCOLS[protocol].rules("ema").measures_ie
    assert not any("TTA" in row.note for rows in PUBLISHED.values() for row in rows if row.model in ("RIFE", "EMA-VFI-S"))
