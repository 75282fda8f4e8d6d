"""Times of the output's frames, compared with times computed in seconds from the definition."""

from __future__ import annotations

import itertools
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vfi.video.timeline import FrameMultiplier, Rate

BASES = st.sampled_from([Fraction(1, 25), Fraction(1, 90_000), Fraction(1001, 30_000), Fraction(1, 1000), Fraction(1, 12_800)])
TIMES = st.lists(st.integers(1, 400), min_size=0, max_size=8).flatmap(
    lambda gaps: st.integers(-500, 10_000).map(lambda first: [first + sum(gaps[:i]) for i in range(len(gaps) + 1)])
)


def made(line, times, base, duration=10):
    """(seconds, number of the frame before, timestep) of every frame."""
    out = line.start(times[0], base)
    found = []
    for number, (pts, after) in enumerate(itertools.pairwise(times)):
        found += [(moment.pts * out, number, moment.timestep) for moment in line.between(pts, after)]
    return found + [(moment.pts * out, len(times) - 1, moment.timestep) for moment in line.last(times[-1], duration)]


@given(TIMES, BASES, st.integers(2, 9))
def test_multiply_divides_every_gap_evenly(times, base, factor):
    found = made(FrameMultiplier(factor), times, base)
    assert len(found) == (len(times) - 1) * factor + 1
    for position, (seconds, number, timestep) in enumerate(found):
        assert (number, timestep) == (position // factor, Fraction(position % factor, factor))
        gap = times[number + 1] - times[number] if number + 1 < len(times) else 0
        assert seconds == (times[number] + timestep * gap) * base


@given(TIMES, BASES, st.integers(2, 9))
def test_slower_has_the_same_frames_in_stretched_time(times, base, factor):
    usual, slow = made(FrameMultiplier(factor), times, base), made(FrameMultiplier(factor, slower=True), times, base)
    assert [frame[1:] for frame in slow] == [frame[1:] for frame in usual]
    assert [frame[0] for frame in slow] == [frame[0] * factor for frame in usual]
    assert (FrameMultiplier(3, slower=True).rate(Fraction(25)), FrameMultiplier(3).rate(Fraction(25))) == (25, 75)
    assert (FrameMultiplier(3, slower=True).slowdown, FrameMultiplier(3).slowdown) == (3, 1)


@given(TIMES, BASES, st.sampled_from([Fraction(60), Fraction(60_000, 1001), Fraction(24), Fraction(7, 3)]), st.integers(1, 400))
@settings(max_examples=50)
def test_rate_shows_what_is_due_at_each_even_time(times, base, fps, duration):
    found = made(Rate(fps), times, base, duration)
    begin, end = times[0] * base, (times[-1] + duration) * base
    expected = []
    while begin + len(expected) / fps < end:
        expected.append(begin + len(expected) / fps)
    assert [frame[0] for frame in found] == expected
    for seconds, number, timestep in found:
        assert times[number] * base <= seconds
        if number + 1 < len(times):
            assert seconds == (times[number] + timestep * (times[number + 1] - times[number])) * base
            assert timestep < 1
        else:
            assert timestep == 0


def test_a_rate_that_the_input_has_already_leaves_its_frames():
    assert made(Rate(Fraction(25)), [0, 1, 2], Fraction(1, 25), 1) == [(Fraction(n, 25), n, 0) for n in range(3)]


@pytest.mark.parametrize(("fps", "base", "out"), [
    (Fraction(60), Fraction(1, 25), Fraction(1, 300)), (Fraction(60_000, 1001), Fraction(1, 90_000), Fraction(1, 180_000)),
])  # fmt: skip
def test_the_time_base_of_a_rate_counts_both(fps, base, out):
    assert Rate(fps).start(0, base) == out
