"""Clips of VapourSynth: times, scene cuts, formats, threads, and the same pixels as `vfi interpolate`."""

from __future__ import annotations

import importlib
import math
import os
import random
import re
import subprocess
import sys
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from made_videos import call, new_run
from PIL import Image

from vfi.errors import JobError
from vfi.inference.engine import InterpolationEngine

try:
    import vapoursynth as vs

    from vfi.vapoursynth import interpolate
except ImportError as error:
    MISSING = str(error)
else:
    MISSING = ""

needs_vapoursynth = pytest.mark.skipif(bool(MISSING), reason=f"VapourSynth can't be imported: {MISSING}")
pytestmark = pytest.mark.usefixtures("one_thread")
SIZE = (48, 64)
RATE = Fraction(24000, 1001)
DOC = Path(__file__).parents[2] / "docs" / "vapoursynth.md"


@pytest.fixture(scope="module")
def mean(tmp_path_factory) -> Path:
    """A model that makes the mean of two frames, weighted by the timestep."""
    return new_run(tmp_path_factory.mktemp("work") / "runs" / "mean")


def clip_of(images: Sequence[np.ndarray], kind: str = "RGBS", rate: Fraction = RATE, **props: Sequence[int]) -> vs.VideoNode:
    """Frames `[H, W, 3]` of floats as a clip; `props`: values of a property, by frame."""
    height, width = images[0].shape[:2]
    blank = vs.core.std.BlankClip(
        width=width, height=height, format=vs.RGBS, length=len(images), fpsnum=rate.numerator, fpsden=rate.denominator
    )

    def fill(n: int, f: vs.VideoFrame) -> vs.VideoFrame:
        frame = f.copy()
        for plane in range(3):
            np.copyto(np.asarray(frame[plane]), images[n][..., plane])
        frame.props.update({name: values[n] for name, values in props.items()})
        return frame

    return blank.std.ModifyFrame(blank, fill).resize.Point(format=getattr(vs, kind))


def pixels(frame: vs.VideoFrame) -> np.ndarray:
    return np.stack([np.asarray(frame[plane]) for plane in range(3)], axis=-1)


def levels(number: int) -> list[np.ndarray]:
    """Frames of one grey each, brighter by a level and a half from one to the next."""
    return [np.full((*SIZE, 3), (60 + 1.5 * n) / 255, np.float32) for n in range(number)]


def scenes(*seeds: int) -> list[np.ndarray]:
    """A frame of blocks for each seed, brighter with it: a cut wherever two seeds differ by 40 or more."""
    blocks = [np.random.default_rng(seed).integers(0, 60, (6, 8, 3)).repeat(8, 0).repeat(8, 1) + 20 + seed for seed in seeds]
    return [(image / 255).astype(np.float32) for image in blocks]


def duration(frame: vs.VideoFrame) -> Fraction:
    return Fraction(frame.props["_DurationNum"], frame.props["_DurationDen"])


# ------------------------------------------------------------------------------------------------------------- frames and times


@needs_vapoursynth
@pytest.mark.parametrize(
    ("length", "asked", "factor"),
    [
        (5, {}, Fraction(2)),
        (4, {"factor_num": 4}, Fraction(4)),
        (6, {"factor_num": 5, "factor_den": 2}, Fraction(5, 2)),
        (7, {"factor_num": 5, "factor_den": 2}, Fraction(5, 2)),
        (6, {"factor_num": 2, "factor_den": 5}, Fraction(2, 5)),
        (4, {"fps_num": 60}, Fraction(1001, 400)),  # more frames in a cycle than the clip has
        (5, {"fps_num": 60000, "fps_den": 1001}, Fraction(5, 2)),
        (1, {"factor_num": 3}, Fraction(3)),
    ],
)
def test_frames_lie_at_exact_fractions(mean, length, asked, factor):
    made = interpolate(clip_of(levels(length)), mean, device="cpu", **asked)
    assert made.num_frames == math.ceil(length * factor)
    assert made.fps == RATE * factor
    for n, frame in enumerate(made.frames()):
        place = min(Fraction(n) / factor, length - 1)
        assert np.allclose(pixels(frame), float(60 + Fraction(3, 2) * place) / 255, rtol=0, atol=1e-6), n
        assert duration(frame) == 1 / (RATE * factor)


@needs_vapoursynth
@pytest.mark.parametrize("factor", [Fraction(2), Fraction(5, 2), Fraction(3, 4), Fraction(1, 3)], ids=str)
def test_varying_durations_are_divided_exactly(mean, factor):
    numbers, unit = [1001, 3003, 41, 500, 7, 1200], 24000
    starts = [Fraction(sum(numbers[:n]), unit) for n in range(len(numbers) + 1)]

    def time_at(place: Fraction) -> Fraction:
        whole = min(int(place), len(numbers) - 1)  # behind the end as long as the last frame
        return starts[whole] + (place - whole) * Fraction(numbers[whole], unit)

    clip = clip_of(
        levels(6),
        rate=Fraction(0, 1),
        _DurationNum=numbers,
        _DurationDen=[unit] * 6,
        _AbsoluteTime=[float(s) for s in starts[:6]],
    )
    made = interpolate(clip, mean, factor.numerator, factor.denominator, device="cpu")
    assert made.fps == 0
    frames = list(made.frames())
    assert [duration(frame) for frame in frames] == [
        time_at((n + 1) / factor) - time_at(n / factor) for n in range(len(frames))
    ]
    assert [frame.props["_AbsoluteTime"] for frame in frames] == pytest.approx(
        [time_at(n / factor) for n in range(len(frames))]
    )
    with pytest.raises(JobError, match=r"variable frame rate.*std.AssumeFPS"):
        interpolate(clip, mean, fps_num=60, device="cpu")


@needs_vapoursynth
def test_a_clip_of_unknown_length_is_taken(mean):
    """Players give it as many frames as a number can hold."""
    clip = vs.core.std.BlankClip(format=vs.RGBS, width=64, height=48, length=2**31 - 1, keep=True)
    made = interpolate(clip, mean, 5, 2, device="cpu")
    assert 2**31 - 3 <= made.num_frames <= 2**31 - 1
    assert made.get_frame(made.num_frames - 1).width == 64


@needs_vapoursynth
def test_a_clip_that_does_not_say_how_long_frames_are_gets_no_durations(mean):
    made = interpolate(clip_of(levels(2), rate=Fraction(0, 1)), mean, device="cpu")
    assert all("_DurationNum" not in frame.props for frame in made.frames())


# ------------------------------------------------------------------------------------------------------------------ scene cuts


@needs_vapoursynth
@pytest.mark.parametrize("stated", [True, False])
def test_a_cut_is_not_blended_and_stays_between_two_frames(mean, stated):
    images = scenes(0, 0, 120, 120)
    props = {"_SceneChangeNext": [0, 1, 0, 0], "_SceneChangePrev": [0, 0, 1, 0]} if stated else {}
    frames = list(interpolate(clip_of(images, **props), mean, 4, device="cpu").frames())
    for n, frame in enumerate(frames):
        assert np.array_equal(pixels(frame), images[0 if n < 6 else 3]), n
        assert frame.props["_SceneChangeNext"] == (n == 5)
        assert frame.props["_SceneChangePrev"] == (n == 6)


@needs_vapoursynth
def test_what_a_frame_says_counts_more_than_how_it_looks(mean):
    first, last = scenes(0, 120)
    between = [(clip_of([first, last], **props), sc) for props, sc in [({"_SceneChangeNext": [0, 0]}, True), ({}, False)]]
    for clip, sc in between:
        frame = interpolate(clip, mean, sc=sc, device="cpu").get_frame(1)
        assert np.allclose(pixels(frame), (first + last) / 2, atol=1e-6)
    same = interpolate(clip_of(levels(2), _SceneChangeNext=[1, 0]), mean, device="cpu").get_frame(1)
    assert np.array_equal(pixels(same), levels(2)[1])


# ---------------------------------------------------------------------------------------------------------- pixels and formats


@needs_vapoursynth
@pytest.mark.parametrize(("kind", "tolerance"), [("RGBS", 0.501), ("RGBH", 0.65)])
def test_pixels_are_those_of_the_command(tmp_path, kind, tolerance):
    """Which rounds to 8 bits. RGBH rounds to 0.06 levels above 0.5, both what the model gets and what it makes."""
    run = new_run(tmp_path / "runs" / "noise", noise=0.02)
    texture = np.asarray(Image.fromarray(np.random.default_rng(0).integers(40, 220, (9, 16, 3), np.uint8)).resize((96, 48), 3))
    images = [texture[:, 4 * n : 4 * n + 64] for n in range(3)]
    (tmp_path / "frames").mkdir()
    for n, image in enumerate(images):
        Image.fromarray(image).save(tmp_path / "frames" / f"{n}.png")
    call(tmp_path / "frames", "-o", tmp_path / "out", "--multiplier", "4", "--model", run)
    expected = [np.asarray(Image.open(path)) for path in sorted((tmp_path / "out").iterdir())]
    clip = interpolate(clip_of([(image / 255).astype(np.float32) for image in images], kind), str(run), 4, device="cpu")
    assert clip.format.name == kind
    found = [pixels(frame).astype(np.float64) * 255 for frame in clip.frames()]
    assert len(expected) == 9
    assert len(found) == 12
    for n, (mine, theirs) in enumerate(zip(found, expected, strict=False)):
        assert np.abs(mine - theirs).max() <= tolerance, n
    assert np.abs(found[2] - (images[0].astype(float) + images[1]) / 2).max() > 2  # no mean of the two


@needs_vapoursynth
def test_frames_of_the_input_keep_values_out_of_range(mean):
    images = [image * 6 - 0.9 for image in levels(2)]  # 0.51, and beyond: -0.9 … where it is dark
    images[0][:8], images[1][:8] = -0.25, 1.5
    frames = list(interpolate(clip_of(images), mean, sc=False, device="cpu").frames())
    assert np.array_equal(pixels(frames[0]), images[0])
    assert np.array_equal(pixels(frames[2]), images[1])
    assert np.allclose(pixels(frames[1]), (images[0].clip(0, 1) + images[1].clip(0, 1)) / 2, atol=1e-6)


@needs_vapoursynth
@pytest.mark.parametrize("kind", ["YUV420P8", "YUV444P16", "RGB24", "RGB48", "GRAYS"])
def test_other_formats_are_refused_with_the_line_that_converts(mean, kind):
    clip = vs.core.std.BlankClip(format=getattr(vs, kind), width=64, height=48, length=2)
    with pytest.raises(JobError, match=f"(?i)the clip is {kind};") as refused:
        interpolate(clip, mean, device="cpu")
    names = {"clip": clip, "vs": vs}
    exec(re.search(r"clip = .*", str(refused.value))[0], names)
    assert interpolate(names["clip"], mean, device="cpu").get_frame(1).width == 64


@needs_vapoursynth
@pytest.mark.parametrize(
    ("changes", "asked", "said"),
    [
        ({"varsize": True}, {}, "changes its size or format"),
        ({"varformat": True}, {}, "changes its size or format"),
        ({"width": 8}, {}, "8x48"),
        ({}, {"factor_num": 0}, "factor_num is 0"),
        ({}, {"factor_num": 2.5}, "factor_num is 2.5"),
        ({}, {"factor_den": 2}, "factor_num is missing"),
        ({}, {"factor_num": 2, "fps_num": 60}, "exclude each other"),
        ({}, {"factor_num": 65}, "between 1/64 and 64"),
        ({}, {"device": "gpu"}, "device is 'gpu'"),
        ({}, {"precision": "int8"}, "precision is 'int8'"),
        ({}, {"scale": 3.0}, "scale 3.0"),
        ({}, {"model": "test_vapoursynth:brightest", "precision": "bf16"}, "up to itself"),
    ],
)
def test_what_can_not_be_done_is_refused(mean, changes, asked, said):
    clip = vs.core.std.BlankClip(**{"format": vs.RGBS, "width": 64, "height": 48, "length": 2, **changes})
    with pytest.raises(JobError, match=re.escape(said)) as refused:
        interpolate(clip, **{"model": mean, "device": "cpu", **asked})
    assert "\n" not in str(refused.value)


@needs_vapoursynth
def test_what_is_no_clip_of_video_is_refused():
    with pytest.raises(JobError, match="clip is a AudioNode"):
        interpolate(vs.core.std.BlankAudio(length=10))


@needs_vapoursynth
def test_frames_of_fields_or_without_numbers_are_refused_by_their_number(mean):
    fields = interpolate(clip_of(levels(3)).std.SetFieldBased(1), mean, device="cpu")
    with pytest.raises(vs.Error, match=r"frame 1 is interlaced .*SetFieldBased\(0\)"):
        fields.get_frame(3)
    images = levels(3)
    images[2][0, 0, 0] = np.nan
    with pytest.raises(vs.Error, match="frame 2 has values that are NaN"):
        interpolate(clip_of(images), mean, device="cpu").get_frame(3)


def brightest(device):
    """MODULE:FACTORY of a test: the brighter value of two frames."""
    return lambda img0, img1, timestep, scale: img0.maximum(img1)


@needs_vapoursynth
def test_models_of_the_user_are_taken(monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parent)
    images = levels(3)
    clip = interpolate(clip_of(images), f"{Path(__file__).stem}:brightest", 3, static_regions=False, device="cpu")
    for n, frame in enumerate(clip.frames()):
        assert np.array_equal(pixels(frame), images[min(math.ceil(n / 3), 2)]), n


# ------------------------------------------------------------------------------------------------------------ threads and pairs


@pytest.fixture
def started(monkeypatch) -> list[list[Fraction]]:
    """The timesteps of each call of the engine."""
    calls: list[list[Fraction]] = []
    start = InterpolationEngine.start
    monkeypatch.setattr(
        InterpolationEngine, "start", lambda self, a, b, times: calls.append(list(times)) or start(self, a, b, times)
    )
    return calls


@pytest.fixture
def eight_threads():
    threads = vs.core.num_threads
    vs.core.num_threads = 8
    yield
    vs.core.num_threads = threads


@needs_vapoursynth
def test_each_pair_is_computed_once_by_many_threads(mean, started, eight_threads):
    for n, frame in enumerate(interpolate(clip_of(levels(30)), mean, 4, device="cpu").frames(prefetch=8)):
        assert np.allclose(pixels(frame), (60 + 1.5 * min(n / 4, 29)) / 255, rtol=0, atol=1e-6), n
    assert sorted(started) == [[Fraction(1, 4), Fraction(1, 2), Fraction(3, 4)]] * 29


@needs_vapoursynth
def test_frames_that_are_asked_for_all_at_once_are_right(mean, eight_threads):
    made = interpolate(clip_of(levels(12)), mean, 5, 2, device="cpu")
    order = list(range(made.num_frames))
    random.Random(0).shuffle(order)
    asked = {n: made.get_frame_async(n) for n in order}
    for n, frame in asked.items():
        assert np.allclose(pixels(frame.result()), (60 + 1.5 * min(n / 2.5, 11)) / 255, rtol=0, atol=1e-6), n


@needs_vapoursynth
def test_after_seeking_frames_are_right_and_few_pairs_are_held(mean, started, eight_threads):
    clip = clip_of(levels(60))
    made = interpolate(clip, mean, 4, device="cpu")
    order = [4 * n + 2 for n in range(59)]  # one frame of each pair: none is complete
    random.Random(0).shuffle(order)
    held = vs.core.num_threads + 2
    for n in (*order, *(one + 1 for one in order[-held:]), order[0] + 1):
        assert np.allclose(pixels(made.get_frame(n)), (60 + 1.5 * n / 4) / 255, rtol=0, atol=1e-6), n
    assert len(started) == 59 + 1  # the latest ones were held, the first was not


@needs_vapoursynth
def test_nothing_is_computed_between_equal_frames(mean, started):
    images = [levels(2)[n] for n in (0, 0, 1, 1)]
    frames = list(interpolate(clip_of(images), mean, device="cpu").frames())
    assert np.array_equal(pixels(frames[1]), images[0])
    assert len(started) == 1


# -------------------------------------------------------------------------------------------------------- scripts of the page


@needs_vapoursynth
def test_the_script_for_mpv_runs(mean, monkeypatch):
    (script,) = [code for code in re.findall(r"```python\n(.*?)```", DOC.read_text(), re.DOTALL) if "video_in" in code]
    monkeypatch.setattr("vfi.vapoursynth.interpolate", lambda clip, **given: interpolate(clip, mean, device="cpu"))
    source = vs.core.std.BlankClip(format=vs.YUV420P8, width=64, height=48, length=3, fpsnum=0, fpsden=1)
    exec(script, {"video_in": source})
    made = vs.get_output().clip
    vs.clear_outputs()
    assert made.num_frames == 6
    assert made.get_frame(5).format.name == "YUV420P8"


@needs_vapoursynth
def test_vspipe_writes_y4m(mean, tmp_path):
    script = tmp_path / "script.vpy"
    script.write_text(
        "import vapoursynth as vs\nfrom vfi.vapoursynth import interpolate\n"
        "clip = vs.core.std.BlankClip(format=vs.RGBS, width=64, height=48, length=4, fpsnum=24000, fpsden=1001)\n"
        f"clip = interpolate(clip, {str(mean)!r}, 5, 2, device='cpu')\n"
        "clip.resize.Bicubic(format=vs.YUV420P8, matrix_s='709').set_output()\n"
    )
    tools, environment = Path(sys.executable).parent, os.environ | {"XDG_CONFIG_HOME": str(tmp_path), "OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = os.pathsep.join(map(str, (DOC.parents[1], *filter(None, [os.environ.get("PYTHONPATH")]))))
    subprocess.run([tools / "vapoursynth", "config"], env=environment, check=True, capture_output=True, timeout=60)
    done = subprocess.run(
        [tools / "vspipe", "-c", "y4m", script, "-"], env=environment, check=True, capture_output=True, timeout=300
    )
    head, _, rest = done.stdout.partition(b"\n")
    assert head.startswith(b"YUV4MPEG2 C420 W64 H48 F60000:1001 ")
    assert len(rest) == 10 * (len(b"FRAME\n") + 64 * 48 * 3 // 2)


# --------------------------------------------------------------------------------------------------------- without VapourSynth


def test_without_vapoursynth_one_line_says_what_is_needed(monkeypatch):
    monkeypatch.setitem(sys.modules, "vapoursynth", None)
    monkeypatch.delitem(sys.modules, "vfi.vapoursynth", raising=False)
    with pytest.raises(ImportError, match=r"^vfi\.vapoursynth needs .* Python 3\.12 and newer .*this is Python 3\.[^\n]*$"):
        importlib.import_module("vfi.vapoursynth")
