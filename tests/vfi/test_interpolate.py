"""vfi interpolate: the image is the model's, the video has the frames in order and in their colours, errors write nothing."""

from pathlib import Path

import av
import numpy as np
import pytest
import torch
from made_videos import new_run
from PIL import Image

from vfi import shipped
from vfi.checkpoint import weights
from vfi.interpolate import main
from vfi.video.convert import frames_of

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """A run with random weights, far from a plain average."""
    return new_run(tmp_path_factory.mktemp("work") / "runs" / "some", noise=0.005, step=4)


def _image(path: Path, width: int, height: int, seed: int = 0) -> Path:
    rng = np.random.default_rng(seed)
    small = Image.fromarray(rng.integers(40, 216, (3, 4, 3), dtype=np.uint8))
    path.parent.mkdir(parents=True, exist_ok=True)
    small.resize((width, height), Image.Resampling.BICUBIC).save(path)
    return path


def _pixels(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path).convert("RGB"))


def _call(*arguments: object) -> None:
    main([str(argument) for argument in (*arguments, "--device", "cpu")])


@pytest.mark.parametrize("timestep", [None, 0.2])
def test_the_image_is_the_models(run, tmp_path, capsys, timestep) -> None:
    a, b = _image(tmp_path / "a.png", 51, 37, 1), _image(tmp_path / "b.png", 51, 37, 2)
    out = tmp_path / "new" / "mid.png"
    _call(a, b, "-o", out, "--model", run, *(("--timestep", timestep) if timestep else ()))
    model, _ = weights.load_model(run, torch.device("cpu"))
    frames = [torch.from_numpy(_pixels(path) / 255).float().permute(2, 0, 1)[None] for path in (a, b)]
    with torch.no_grad():
        imgt = model(*frames, torch.tensor([timestep or 0.5])).imgt.clamp(0, 1)[0].permute(1, 2, 0).numpy()
    assert _pixels(out).shape == (37, 51, 3)
    np.testing.assert_allclose(_pixels(out), imgt * 255, atol=0.501)
    assert [path.name for path in out.parent.iterdir()] == ["mid.png"]
    assert f"51x37, timestep {timestep or 0.5:g}, by some at step 4 (cpu, fp32)" in capsys.readouterr().out


def test_first_and_second_image_are_not_swapped(run, tmp_path) -> None:
    a, b = _image(tmp_path / "a.png", 48, 32, 1), _image(tmp_path / "b.png", 48, 32, 2)
    _call(a, b, "-o", tmp_path / "early.png", "--model", run, "--timestep", 0.05)
    early = _pixels(tmp_path / "early.png").astype(float)
    assert np.abs(early - _pixels(a)).mean() < np.abs(early - _pixels(b)).mean()


def test_other_kinds_of_images_in_and_out(run, tmp_path) -> None:
    a, b = _image(tmp_path / "a.jpg", 48, 32, 1), _image(tmp_path / "b.webp", 48, 32, 2)
    for name in ("mid.jpg", "mid.bmp", "MID.TIFF", "mid.webp"):
        _call(a, b, "-o", tmp_path / name, "--model", run)
        assert _pixels(tmp_path / name).shape == (32, 48, 3)
    np.testing.assert_allclose(
        _pixels(tmp_path / "mid.jpg").astype(float).mean((0, 1)), _pixels(tmp_path / "mid.bmp").mean((0, 1)), atol=1.5
    )


def test_a_folder_becomes_a_video_of_twice_the_rate(run, tmp_path, capsys) -> None:
    folder = tmp_path / "frames"
    for number in (1, 2, 10, 11):  # in the order of the alphabet 10 would come before 2
        _image(folder / f"f{number}.png", 49, 35, number)
    (folder / "notes.txt").write_text("no frame")
    out = tmp_path / "clip.mp4"
    _call(folder, "-o", out, "--model", run, "--input_fps", 12)
    decoded, rate, seconds = _decode(out)
    assert len(decoded) == 7
    assert rate == 24
    assert seconds == pytest.approx(4 / 12)  # the last frame is shown for as long as in the folder
    assert decoded[0].shape == (36, 50, 3)
    for shown, number in zip(decoded[::2], (1, 2, 10, 11), strict=True):
        frame = np.pad(_pixels(folder / f"f{number}.png"), ((0, 1), (0, 1), (0, 0)), mode="edge")
        assert np.abs(shown.astype(float) - frame).mean() < 6
    _call(folder / "f2.png", folder / "f10.png", "-o", tmp_path / "between.png", "--model", run)
    between = np.pad(_pixels(tmp_path / "between.png"), ((0, 1), (0, 1), (0, 0)), mode="edge")
    assert np.abs(decoded[3].astype(float) - between).mean() < 6
    assert "7 frames at 24 per second from 4 at 12" in capsys.readouterr().out
    assert sorted(path.name for path in tmp_path.iterdir()) == ["between.png", "clip.mp4", "frames"]


def _decode(path: Path) -> tuple[list[np.ndarray], float, float]:
    """The frames of a video, its frames per second, and its seconds."""
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        rate, seconds = float(stream.guessed_rate), float(stream.duration * stream.time_base)
        return [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)], rate, seconds


def test_video_keeps_saturated_colours_and_says_which_matrix_made_them(run, tmp_path) -> None:
    colours = [(255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255), (0, 0, 0), (200, 80, 20)]
    (tmp_path / "frames").mkdir()
    for number, colour in enumerate(colours):
        Image.fromarray(np.full((64, 64, 3), colour, dtype=np.uint8)).save(tmp_path / "frames" / f"{number}.png")
    _call(tmp_path / "frames", "-o", tmp_path / "c.mp4", "--model", run, "--input_fps", 29.97, "--fps", 29.97)
    with av.open(str(tmp_path / "c.mp4")) as container:
        stream = container.streams.video[0]
        assert stream.pix_fmt == "yuv420p"
        assert (stream.codec_context.colorspace, stream.codec_context.color_range) == (1, 1)  # BT.709, 16 … 235
        assert float(stream.average_rate) == pytest.approx(29.97, abs=1e-3)
        for frame, colour in zip(container.decode(video=0), colours, strict=True):
            # the definition of BT.709 in 8 bits, from the decoded planes, without the library's own conversion
            y, cb, cr = (float(np.asarray(plane).astype(float).mean()) for plane in _planes(frame))
            luma, blue, red = (y - 16) / 219, (cb - 128) / 224, (cr - 128) / 224
            r, b = luma + 1.5748 * red, luma + 1.8556 * blue
            g = (luma - 0.2126 * r - 0.0722 * b) / 0.7152
            np.testing.assert_allclose(np.array([r, g, b]) * 255, colour, atol=4)


def _planes(frame: av.VideoFrame) -> list[np.ndarray]:
    array = frame.to_ndarray(format="yuv420p")
    height = frame.height
    chroma = array[height:].reshape(2, -1)
    return [array[:height], chroma[0], chroma[1]]


def test_names_are_sorted_by_their_numbers(tmp_path) -> None:
    names = ["clip2_9.png", "clip2_10.png", "clip10_1.png", "clip2_010b.png"]
    for name in names:
        (tmp_path / name).touch()
    assert [path.name for path in frames_of(tmp_path)] == ["clip2_9.png", "clip2_10.png", "clip2_010b.png", "clip10_1.png"]


def _refusal(capsys, *arguments: object) -> str:
    with pytest.raises(SystemExit) as stop:
        _call(*arguments)
    assert stop.value.code == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    return lines[0]


def test_unusable_images_are_refused(run, tmp_path, capsys) -> None:
    a, b = _image(tmp_path / "a.png", 48, 40, 1), _image(tmp_path / "b.png", 64, 40, 2)
    small = _image(tmp_path / "small.png", 31, 40)
    broken = tmp_path / "broken.png"
    broken.write_bytes(a.read_bytes()[:200])
    video = tmp_path / "film.MP4"
    video.touch()
    end = ("-o", tmp_path / "mid.png", "--model", run)
    message = _refusal(capsys, a, b, *end)
    assert "48x40" in message
    assert "64x40" in message
    assert "31x40" in _refusal(capsys, small, small, *end)
    assert "at least 32" in _refusal(capsys, small, small, *end)
    assert "broken.png" in _refusal(capsys, a, broken, *end)
    assert "none.png does not exist" in _refusal(capsys, a, tmp_path / "none.png", *end)
    assert "film.MP4 cannot be read as a video" in _refusal(capsys, video, "-o", tmp_path / "o.mp4", "--model", run)
    assert "give videos, folders of frames, or two images" in _refusal(capsys, a, *end)
    assert "give videos, folders of frames, or two images" in _refusal(capsys, a, tmp_path, *end)
    assert not (tmp_path / "mid.png").exists()


def test_unusable_outputs_and_flags_are_refused(run, tmp_path, capsys) -> None:
    a, b = _image(tmp_path / "a.png", 48, 40, 1), _image(tmp_path / "b.png", 48, 40, 2)
    before = a.read_bytes()
    (tmp_path / "link.png").symlink_to(a)
    assert "is the input" in _refusal(capsys, a, b, "-o", a, "--model", run)
    assert "is the input" in _refusal(capsys, a, b, "-o", tmp_path / "link.png", "--model", run)
    assert a.read_bytes() == before
    assert "must end in .png" in _refusal(capsys, a, b, "-o", tmp_path / "mid.xyz", "--model", run)
    assert "must end in .png" in _refusal(capsys, a, b, "-o", tmp_path / "mid.mp4", "--model", run)
    assert "a video ends in .mp4" in _refusal(capsys, tmp_path, "-o", tmp_path / "clip.png", "--model", run)
    assert "is not a folder" in _refusal(capsys, a, b, "-o", a / "mid.png", "--model", run)
    end = ("-o", tmp_path / "mid.png", "--model", run)
    for timestep in (0, 1, -0.5, "nan"):
        assert "--timestep" in _refusal(capsys, a, b, *end, "--timestep", timestep)
    assert "--fps and --slowmo are for videos" in _refusal(capsys, a, b, *end, "--fps", 30)
    assert "--timestep is for two images" in _refusal(
        capsys, tmp_path, "-o", tmp_path / "c.mp4", "--model", run, "--timestep", 0.5
    )
    for fps in (0, -5, "nan"):
        assert "--fps" in _refusal(capsys, tmp_path, "-o", tmp_path / "c.mp4", "--model", run, "--fps", fps)
    assert "some" in _refusal(capsys, a, b, "-o", tmp_path / "mid.png", "--model", run.parent / "other")


def test_a_run_is_not_taken_unless_it_is_named(run, tmp_path, capsys, monkeypatch) -> None:
    a, b = _image(tmp_path / "a.png", 48, 40, 1), _image(tmp_path / "b.png", 48, 40, 2)
    monkeypatch.setattr(shipped, "FOLDER", tmp_path / "none")
    monkeypatch.chdir(run.parents[1])
    assert "this installation has no shipped model" in _refusal(capsys, a, b, "-o", tmp_path / "mid.png")
    assert not (tmp_path / "mid.png").exists()


def test_unusable_folders_leave_nothing_behind(run, tmp_path, capsys) -> None:
    end = ("-o", tmp_path / "out" / "clip.mp4", "--model", run)
    folder = tmp_path / "frames"
    _image(folder / "1.png", 48, 40, 1)
    assert "holds 1 images" in _refusal(capsys, folder, *end)
    _image(folder / "2.png", 48, 44, 2)
    message = _refusal(capsys, folder, *end)
    assert "48x40" in message
    assert "48x44" in message
    whole = _image(folder / "2.png", 48, 40, 2).read_bytes()
    (folder / "2.png").write_bytes(whole[: len(whole) // 2])  # its head is whole, so it breaks in the middle of the job
    assert "2.png" in _refusal(capsys, folder, *end)
    (folder / "2.png").write_bytes(b"no image")
    assert "2.png cannot be read" in _refusal(capsys, folder, *end)
    assert list((tmp_path / "out").iterdir()) == []


def test_two_series_in_a_folder_follow_one_another(tmp_path) -> None:
    for name in ("a_0001", "b_0001", "a_0002", "b_0002", "a_0010"):
        (tmp_path / f"{name}.png").touch()
    assert [path.stem for path in frames_of(tmp_path)] == ["a_0001", "a_0002", "a_0010", "b_0001", "b_0002"]


def test_missing_numbers_are_named_and_made_when_asked_for(run, tmp_path, capsys) -> None:
    folder = tmp_path / "frames"
    for number in (1, 2, 5):
        _image(folder / f"f_{number:04d}.png", 48, 64, number)
    _call(folder, "-o", tmp_path / "closed", "--model", run)
    assert "frames 3, 4 (2) are missing: --fill_gaps makes them" in capsys.readouterr().out
    assert len(list((tmp_path / "closed").iterdir())) == 5
    _call(folder, "-o", tmp_path / "filled", "--model", run, "--fill_gaps", "--scene_cut", 0)
    assert "frames 3, 4 (2) are made" in capsys.readouterr().out
    made = [_pixels(path) for path in sorted((tmp_path / "filled").iterdir())]
    assert len(made) == 9
    first, second, last = (_pixels(folder / f"f_{number:04d}.png") for number in (1, 2, 5))
    for place, frame in ((0, first), (2, second), (8, last)):
        assert np.array_equal(made[place], frame)
    third, fourth = (second + part * (last.astype(float) - second) / 3 for part in (1, 2))
    assert np.abs(made[4] - third).mean() < np.abs(made[4] - fourth).mean()
    assert np.abs(made[6] - fourth).mean() < np.abs(made[6] - third).mean()
    _call(folder, "-o", tmp_path / "filled.mp4", "--model", run, "--fill_gaps", "--input_fps", 10)
    _, rate, seconds = _decode(tmp_path / "filled.mp4")
    assert rate == 20
    assert seconds == pytest.approx(0.5)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_images_lie_as_a_camera_says(run, tmp_path, orientation) -> None:
    upright = np.zeros((40, 64, 3), np.uint8)
    upright[:20, :20], upright[20:, 44:] = (200, 40, 40), (40, 40, 200)
    for number in (1, 2):
        image = Image.fromarray(upright)
        stored = {1: None, 2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}[orientation]  # what Pillow's transpose calls its inverse
        image = image if stored is None else image.transpose(Image.Transpose(stored))
        exif = Image.Exif()
        exif[0x0112] = orientation
        image.save(tmp_path / f"{number}.png", exif=exif)
        from PIL import ImageOps

        assert np.array_equal(np.asarray(ImageOps.exif_transpose(Image.open(tmp_path / f"{number}.png"))), upright)
    _call(tmp_path / "1.png", tmp_path / "2.png", "-o", tmp_path / "out.png", "--model", run)
    assert np.array_equal(_pixels(tmp_path / "out.png"), upright)


@pytest.mark.parametrize("suffix", [".png", ".webp"])
def test_an_animation_is_named_as_one(run, tmp_path, capsys, suffix) -> None:
    path = tmp_path / f"in{suffix}"
    images = [Image.fromarray(np.full((40, 64, 3), 40 * number, np.uint8)) for number in range(3)]
    images[0].save(path, save_all=True, append_images=images[1:], duration=100)
    with pytest.raises(SystemExit) as stop:
        _call(path, "-o", tmp_path / "out.mp4", "--model", run)
    assert stop.value.code == 2
    assert f"in{suffix} is an animation, which is read as GIF or video only" in capsys.readouterr().err
