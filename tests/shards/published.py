"""Small imitations of the published sets: their layouts, and which files, in which order, a sample must hold."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

from sources import write_set

from shards import middlebury, snu_film, ucf101, x4k1000fps, xiph


@dataclasses.dataclass(frozen=True)
class Layout:
    """A set: its command, flags and split, a function that builds it, and the hand-written files of each sample by key."""

    job: ModuleType
    flags: tuple[str, ...]
    build: Callable[[Path], Path]
    samples: dict[str, list[str]]
    clips: tuple[str, ...]
    split: str = "test"


def build_ucf101(root: Path) -> Path:
    frames = ("frame_00", "frame_01_gt", "frame_01_ours", "frame_02")
    return write_set(root, (f"{folder}/{frame}.png" for folder in (1, 11, 1001) for frame in frames))


def build_middlebury(root: Path) -> Path:
    inputs = [f"other-data/{name}/frame{number:02d}.png" for name in ("Venus", "Beanbags") for number in range(7, 15)]
    inputs += ["other-data/Urban2/frame11.png", "other-data/Urban2/frame10.png"]
    truths = [f"other-gt-interp/{name}/frame10i11.png" for name in ("Venus", "Beanbags", "Urban2")]
    return write_set(root, inputs + truths)


def build_xiph(root: Path) -> Path:
    """Build one clip as loose frames and one in its own folder, next to the files that both were extracted from."""
    write_set(root, (f"Tango-{number:03d}.png" for number in range(1, 101)))
    write_set(root, (f"FoodMarket2/FoodMarket2-{number:03d}.png" for number in range(1, 101)), first_seed=100)
    (root / "Netflix_Tango_4096x2160_60fps_10bit_420.y4m").write_bytes(b"YUV4MPEG2")
    return root


def build_snu_film(root: Path) -> Path:
    """Build the set as downloaded: lists whose paths begin with folders that do not exist, more frames than the lists name."""
    write_set(root, (f"test/GOPRO_test/GOPR0384_11_00/{number:06d}.png" for number in range(1, 24)))
    write_set(root, (f"test/YouTube_test/0015/{number:05d}.png" for number in range(101, 124)), first_seed=23)
    for split, gap in (("easy", 1), ("medium", 2), ("hard", 4), ("extreme", 8)):
        lines = []
        for folder, middle, digits in (("GOPRO_test/GOPR0384_11_00", 9, 6), ("YouTube_test/0015", 110, 5)):
            numbers = (middle - gap, middle, middle + gap)
            lines.append(" ".join(f"data/SNU-FILM/test/{folder}/{number:0{digits}d}.png" for number in numbers))
        (root / f"test-{split}.txt").write_text("\n".join(lines) + "\n")
    return root


def build_x_train(root: Path) -> Path:
    return write_set(root, (f"train/002/occ008.3{clip}/{number:04d}.png" for clip in (20, 22) for number in range(65)))


def build_x_test(root: Path) -> Path:
    clips = ("Type1/TEST01_003_f0433", "Type3/TEST11_078_f4977", "Type3/scene/TEST12")
    return write_set(root, (f"test/{clip}/{number:04d}.png" for clip in clips for number in range(33)))


PUBLISHED = {
    "ucf101": Layout(
        ucf101,
        (),
        build_ucf101,
        {name: [f"{name}/frame_00.png", f"{name}/frame_01_gt.png", f"{name}/frame_02.png"] for name in ("1", "11", "1001")},
        ("1", "11", "1001"),
    ),
    "middlebury": Layout(
        middlebury,
        (),
        build_middlebury,
        {
            "Beanbags": [
                "other-data/Beanbags/frame10.png",
                "other-gt-interp/Beanbags/frame10i11.png",
                "other-data/Beanbags/frame11.png",
            ],
            "Urban2": [
                "other-data/Urban2/frame10.png",
                "other-gt-interp/Urban2/frame10i11.png",
                "other-data/Urban2/frame11.png",
            ],
            "Venus": ["other-data/Venus/frame10.png", "other-gt-interp/Venus/frame10i11.png", "other-data/Venus/frame11.png"],
        },
        ("Beanbags", "Urban2", "Venus"),
    ),
    "xiph": Layout(
        xiph,
        (),
        build_xiph,
        {
            f"{clip}-{number:03d}": [f"{stem}-{number + i:03d}.png" for i in (-1, 0, 1)]
            for clip, stem in (("FoodMarket2", "FoodMarket2/FoodMarket2"), ("Tango", "Tango"))
            for number in range(2, 100, 2)
        },
        ("FoodMarket2", "Tango"),
    ),
    "snu_film": Layout(
        snu_film,
        ("--split", "hard"),
        build_snu_film,
        {
            "hard_GOPRO_test_GOPR0384_11_00_000009": [
                f"test/GOPRO_test/GOPR0384_11_00/0000{number}.png" for number in ("05", "09", "13")
            ],
            "hard_YouTube_test_0015_00110": [f"test/YouTube_test/0015/00{number}.png" for number in (106, 110, 114)],
        },
        ("hard/GOPRO_test/GOPR0384_11_00", "hard/YouTube_test/0015"),
    ),
    "x_train": Layout(
        x4k1000fps,
        ("--split", "train"),
        build_x_train,
        {
            "002_occ008_320": [f"train/002/occ008.320/00{number:02d}.png" for number in range(65)],
            "002_occ008_322": [f"train/002/occ008.322/00{number:02d}.png" for number in range(65)],
        },
        ("002/occ008.320", "002/occ008.322"),
        "train",
    ),
    "x_test": Layout(
        x4k1000fps,
        ("--split", "test"),
        build_x_test,
        {
            key: [f"test/{clip}/00{number}.png" for number in ("00", "04", "08", "12", "16", "20", "24", "28", "32")]
            for key, clip in (
                ("Type1_TEST01_003_f0433", "Type1/TEST01_003_f0433"),
                ("Type3_scene_TEST12", "Type3/scene/TEST12"),
                ("Type3_TEST11_078_f4977", "Type3/TEST11_078_f4977"),
            )
        },
        ("Type1/TEST01_003_f0433", "Type3/scene/TEST12", "Type3/TEST11_078_f4977"),
    ),
}
