"""Which frames of a long sample are used: every choice that is allowed, as often as asked, and scaled as a plain mean."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from vfi.data.triplet_sampling import Triplet, draw_triplet, shrink


def draws(frames, sequence, count=4000) -> list[Triplet]:
    rng = np.random.default_rng(0)
    return [draw_triplet(rng, frames, sequence) for _ in range(count)]


def test_middle_draws_nothing():
    rng = np.random.default_rng(0)
    assert draw_triplet(rng, 7, "middle") == Triplet(0, 3, 6)
    assert rng.random() == np.random.default_rng(0).random()
    assert Triplet(0, 3, 6).timestep == 0.5


def test_random_time_takes_each_frame_between():
    """Five frames of seven, each as often, with the timestep that it has in the sample."""
    found = Counter(draws(7, "random_time"))
    assert found.keys() == {Triplet(0, k, 6) for k in range(1, 6)}
    assert all(700 < count < 900 for count in found.values())
    assert [Triplet(0, k, 6).timestep for k in range(1, 6)] == pytest.approx([1 / 6, 1 / 3, 1 / 2, 2 / 3, 5 / 6])
    assert set(draws(3, "random_time")) == {Triplet(0, 1, 2)}


def test_random_gap_takes_each_gap_and_start():
    found = draws(65, "random_gap", 20000)
    assert all(t.middle - t.first == t.last - t.middle > 0 and t.timestep == 0.5 for t in found)
    gaps = Counter(t.middle - t.first for t in found)
    assert gaps.keys() == set(range(1, 33))
    assert 500 < min(gaps.values()) < max(gaps.values()) < 750
    for gap in (1, 20, 32):
        assert {t.first for t in found if t.middle - t.first == gap} == set(range(65 - 2 * gap))
    scales = Counter(t.divisor for t in found)
    assert {divisor: round(count / 20000, 2) for divisor, count in scales.items()} == {1: 0.5, 2: 0.25, 4: 0.25}
    assert {t[:3] for t in draws(3, "random_gap", 20)} == {(0, 1, 2)}
    assert {t[:3] for t in draws(4, "random_gap", 40)} == {(0, 1, 2), (1, 2, 3)}


def test_a_seed_draws_what_it_always_drew():
    """Literals, since a run that goes on under a newer version has to see the same frames."""
    expected = {
        "random_time": [Triplet(0, 55, 64, 1), Triplet(0, 52, 64, 1)],
        "random_gap": [Triplet(7, 35, 63, 1), Triplet(10, 36, 62, 2)],
    }
    for sequence, triplets in expected.items():
        rng = np.random.default_rng((3, 0, 5, 0, 1))
        assert [draw_triplet(rng, 65, sequence) for _ in range(2)] == triplets


@pytest.mark.parametrize("divisor", [1, 2, 4])
@pytest.mark.parametrize("size", [(64, 80), (71, 83)])
def test_shrinking_is_the_mean_of_squares(divisor, size):
    frame = np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8)
    pooled = F.avg_pool2d(torch.from_numpy(frame).permute(2, 0, 1).double(), divisor)
    expected = torch.floor(pooled + 0.5).permute(1, 2, 0).to(torch.uint8).numpy()
    assert np.array_equal(shrink(frame, divisor, 8), expected)
    assert shrink(np.full((*size, 3), 255, np.uint8), divisor, 8).min() == 255


def test_a_shrunk_frame_holds_the_crop():
    frame = np.zeros((160, 144, 3), np.uint8)
    sizes = {crop: [shrink(frame, divisor, crop).shape[:2] for divisor in (1, 2, 4)] for crop in (32, 64, 96)}
    assert sizes == {
        32: [(160, 144), (80, 72), (40, 36)],
        64: [(160, 144), (80, 72), (80, 72)],
        96: [(160, 144), (160, 144), (160, 144)],
    }
