"""vfi app: results have the right sizes and counts, mistakes are one line, and the page works offline in Chromium."""

from __future__ import annotations

import builtins
import os
import shutil
import signal
import socket
import sys
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import av
import numpy as np
import pytest
from made_videos import new_run
from PIL import Image
from playwright.sync_api import Browser, Locator, Page

from shards.schema import ShardError
from vfi import app
from vfi.errors import JobError
from vfi.video import app_session
from vfi.video.app_session import COMPARE, Made, Moment, Session, compared

pytestmark = pytest.mark.usefixtures("one_thread")

ROOT = Path(__file__).parents[2]
WIDTH, HEIGHT, FRAMES = 64, 48, 4


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """A network as it is before training, but for weights that are far from a plain average."""
    return new_run(tmp_path_factory.mktemp("work") / "runs" / "some", noise=0.005, step=4)


def _image(number: int, width: int = WIDTH, height: int = HEIGHT) -> np.ndarray:
    y, x = np.mgrid[:height, :width]
    return np.stack([120 + 60 * np.sin((x + 3 * number) / 7 + c) + 30 * np.cos(y / 5) for c in range(3)], 2).astype(np.uint8)


def _video(path: Path, images: list[np.ndarray], rotation: int = 0, codec: str = "libx264") -> Path:
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=10)
        stream.height, stream.width, stream.pix_fmt = *images[0].shape[:2], "yuv420p"
        if rotation:
            stream.set_display_rotation(rotation)
        for image in images:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        container.mux(stream.encode())
    return path


@pytest.fixture(autouse=True)
def sigterm() -> Iterator[None]:
    """As it was: the job turns it into an interrupt."""
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> Path:
    """What is given to the page: good and bad."""
    folder = tmp_path_factory.mktemp("inputs")
    for name, image in {"a": _image(0), "b": _image(1), "low": _image(1, height=40), "tiny": _image(0, 16, 16)}.items():
        Image.fromarray(image).save(folder / f"{name}.png")
    shutil.copy(folder / "a.png", folder / "still.mp4")
    for name in ("text.png", "text.mp4"):
        (folder / name).write_text("neither an image nor a video")
    _video(folder / "clip.mp4", [_image(number) for number in range(FRAMES)])
    _video(folder / "small.mkv", [_image(number, 64, 16) for number in range(2)], codec="ffv1")
    return folder


@pytest.fixture
def work(run, tmp_path) -> Session:
    return Session(run, "cpu", "fp32", tmp_path)


def _ignore(part: float, what: str) -> None:
    assert 0 <= part <= 1


def _frames(path: Path) -> list[av.VideoFrame]:
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        assert (stream.codec_context.name, stream.codec_context.pix_fmt) == ("h264", "yuv420p")
        return list(container.decode(stream))


# ------------------------------------------------------------------------------------------------------ what is made


@pytest.mark.parametrize(("timestep", "slower"), [(0.5, 0), (0.25, 8)])
def test_two_images_give_the_models_image_and_a_clip(work, inputs, timestep, slower):
    made = work.images(inputs / "a.png", inputs / "b.png", timestep, slower, _ignore)
    expected = work.model(_image(0), _image(1), [timestep])[0]
    assert np.array_equal(made.moment.imgt, expected)
    assert np.array_equal(np.asarray(Image.open(made.result)), expected)
    assert made.said.startswith(f"64x48, timestep {timestep}")
    if not slower:
        assert made.clip is None
        return
    frames = _frames(made.clip)
    assert len(frames) == 2 * slower  # both images and 7 between, there and back
    assert {(frame.width, frame.height) for frame in frames} == {(WIDTH, HEIGHT)}
    shown = [frame.to_ndarray(format="rgb24").astype(int) for frame in frames]
    for number, image in {0: _image(0), slower: _image(1), slower // 2: work.model(_image(0), _image(1), [0.5])[0]}.items():
        assert np.abs(shown[number] - image).mean() < 4, number
    assert np.abs(shown[1] - shown[-1]).mean() < 2  # the way back


@pytest.mark.parametrize(
    ("slow", "factor", "name", "seconds"), [(False, 4, "clip_x4.mp4", 0.4), (True, 2, "clip_slow2.mp4", 0.8)]
)
def test_a_video_gets_its_frames_and_shows_a_moment(work, inputs, slow, factor, name, seconds):
    parts = []
    made = work.video(inputs / "clip.mp4", slow, factor, lambda part, what: parts.append((part, what)))
    frames = _frames(made.clip)
    assert (made.result, made.clip.name) == (made.clip, name)
    assert len(frames) == (FRAMES - 1) * factor + 1
    assert frames[-1].time == pytest.approx(seconds - 0.1 * (2 if slow else 1), abs=0.02)
    assert parts[-1] == (1, f"Frame {FRAMES} of {FRAMES}")
    assert [part for part, _ in parts] == sorted(part for part, _ in parts)
    assert {image.shape for image in made.moment[:3]} == {(HEIGHT, WIDTH, 3)}
    assert np.array_equal(made.moment.imgt, work.model(*made.moment[:2], [0.5])[0])


def test_the_moment_is_where_most_changes_but_no_cut_and_upright(work, tmp_path):
    other = np.random.default_rng(0).integers(180, 255, (HEIGHT, WIDTH, 3)).astype(np.uint8)
    images = [_image(0), _image(1), _image(5), other, other]  # to `other` it is a scene cut
    source = _video(tmp_path / "in.mp4", images, rotation=90)
    made = work.video(source, False, 2, _ignore)
    assert "1 scene cuts" in made.said
    for found, image in zip(made.moment[:2], (_image(1), _image(5)), strict=True):
        assert found.shape == (WIDTH, HEIGHT, 3)
        assert np.abs(found.astype(int) - np.rot90(image)).mean() < 6
    still = work.video(_video(tmp_path / "still.mp4", [other] * 3), False, 2, _ignore)
    assert still.moment is None
    assert compared(still.moment, COMPARE[0]) is None


def test_the_choice_decides_what_is_left_of_the_slider():
    img0, img1, imgt = (np.full((2, 2, 3), value, np.uint8) for value in (100, 200, 7))
    moment = Moment(img0, img1, imgt, 0.25)
    found = {choice: compared(moment, choice) for choice in COMPARE}
    assert {choice: int(left[0, 0, 0]) for choice, (left, _) in found.items()} == dict(
        zip(COMPARE, (125, 100, 200), strict=True)
    )
    assert all(right is imgt for _, right in found.values())


def test_results_are_those_of_one_job(work, inputs):
    work.video(inputs / "clip.mp4", False, 2, _ignore)
    work.images(inputs / "a.png", inputs / "b.png", 0.5, 0, _ignore)
    assert [path.name for path in work.results.iterdir()] == ["between.png"]


def test_jobs_wait_for_each_other(work, inputs):
    done: list[Made] = []
    with work.busy:
        other = threading.Thread(target=lambda: done.append(work.images(inputs / "a.png", inputs / "b.png", 0.5, 0, _ignore)))
        other.start()
        other.join(0.3)
        assert other.is_alive()
    other.join(30)
    assert len(done) == 1


def test_a_closed_page_ends_a_job_and_leaves_no_result(work, inputs):
    with pytest.raises(JobError, match="closed"):
        work.video(inputs / "clip.mp4", False, 2, lambda part, what: work.closed.set() if what.startswith("Frame 2") else None)
    assert list(work.results.iterdir()) == []


# --------------------------------------------------------------------------------------------------- what can go wrong


@pytest.mark.parametrize(
    ("first", "second", "message"),
    [
        (None, "b.png", "the first image is missing"),
        ("a.png", None, "the second image is missing"),
        ("a.png", "low.png", "the first image (a.png) is 64x48 and the second image (low.png) is 64x40 (width x height)"),
        ("tiny.png", "tiny.png", "the first image (tiny.png) is 16x16 (width x height): each side must be at least 32"),
        ("text.png", "b.png", "text.png cannot be decoded as png: cannot identify image file"),
    ],
)
def test_bad_images_are_one_line(work, inputs, first, second, message):
    paths = [inputs / name if name else None for name in (first, second)]
    with pytest.raises((JobError, ShardError)) as stop:
        work.images(*paths, 0.5, 8, _ignore)
    work.folder = inputs  # as if they had been uploaded
    line = work.line_of(stop.value)
    assert message in line
    assert "\n" not in line
    assert str(inputs) not in line
    assert "0x" not in line


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (None, "the video is missing"),
        ("text.mp4", "text.mp4 cannot be read as a video"),
        ("still.mp4", "still.mp4 has fewer than two frames"),
        ("small.mkv", "small.mkv is 64x16 (width x height): each side must be at least 32"),
    ],
)
def test_bad_videos_are_one_line_and_leave_nothing(work, inputs, name, message):
    with pytest.raises((JobError, ShardError)) as stop:
        work.video(inputs / name if name else None, False, 2, _ignore)
    work.folder = inputs
    assert message in work.line_of(stop.value)
    assert str(inputs) not in work.line_of(stop.value)
    assert not work.results.exists() or not list(work.results.iterdir())


def test_what_is_too_large_is_told_with_the_command(work, inputs, monkeypatch):
    monkeypatch.setattr(app_session, "MAX_FRAMES", FRAMES - 1)
    with pytest.raises(JobError, match=r"3 frames .*vfi interpolate clip.mp4 -o out.mp4 --slowmo 4"):
        work.video(inputs / "clip.mp4", True, 4, _ignore)
    monkeypatch.setattr(app_session, "MAX_VIDEO", (HEIGHT, WIDTH - 1))
    with pytest.raises(JobError, match=r"frames of 64x48 .* up to 63x48.*vfi interpolate clip.mp4 -o out.mp4 --multiplier 2"):
        work.video(inputs / "clip.mp4", False, 2, _ignore)
    monkeypatch.setattr(app_session, "MAX_IMAGE", (HEIGHT, WIDTH - 1))
    with pytest.raises(JobError, match=r"images of 64x48 .* up to 63x48.*vfi interpolate a.png b.png -o between.png"):
        work.images(inputs / "a.png", inputs / "b.png", 0.5, 0, _ignore)


def _refused(capsys, *arguments: object) -> str:
    with pytest.raises(SystemExit) as stop:
        app.main([*map(str, arguments), "--device", "cpu", "--no-open"])
    assert stop.value.code == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    return line


def test_a_port_that_is_taken_is_one_line(run, capsys):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        line = _refused(capsys, "--model", run, "--port", port)
    assert f"--port {port} can't be used: Address already in use" in line
    assert "--port 70000 must lie between 1 and 65535" in _refused(capsys, "--model", run, "--port", 70000)


def test_without_gradio_the_command_to_install_it_is_named(run, capsys, monkeypatch):
    plain = builtins.__import__

    def without(name, *rest):
        if name == "gradio":
            raise ModuleNotFoundError("No module named 'gradio'", name="gradio")
        return plain(name, *rest)

    for name in ("GRADIO_TEMP_DIR", "no_proxy", *app._QUIET):  # back to what they were afterwards
        monkeypatch.setenv(name, os.environ.get(name, ""))
    monkeypatch.setattr(builtins, "__import__", without)
    assert "pip install -e '.[app]'" in _refused(capsys, "--model", run, "--port", 0)


def test_gradio_is_named_by_the_page_alone():
    assert [path.name for path in (ROOT / "vfi").rglob("*.py") if "gradio" in path.read_text()] == ["app.py"]


# ------------------------------------------------------------------------------------------------------------ the page

_watching = False
_elsewhere: list[str] = []


def _watch(event: str, given: tuple[object, ...]) -> None:
    """Connections and look-ups of this process that are not for this machine."""
    if not _watching or event not in ("socket.connect", "socket.getaddrinfo"):
        return
    address = given[1] if event == "socket.connect" else given
    host = address[0] if isinstance(address, tuple) else "a file"
    if host not in ("127.0.0.1", "localhost", "a file", b"127.0.0.1", b"localhost", None):
        _elsewhere.append(f"{event} {address}")


@pytest.fixture(scope="module")
def address(run, tmp_path_factory) -> Iterator[str]:
    """The page, served by this process, which may ask nobody else. Its files go when it ends."""
    global _watching
    pytest.importorskip("gradio")
    temporary = tmp_path_factory.mktemp("temporary")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tempfile.tempdir", str(temporary))
        for name in ("GRADIO_TEMP_DIR", "no_proxy", *app._QUIET):
            patch.setenv(name, os.environ.get(name, ""))
        sys.addaudithook(_watch)
        _watching = True
        with app.serving(app.Options(run, "cpu", port=0, open=False)) as address:
            yield address
        _watching = False
    assert _elsewhere == []
    assert list(temporary.glob("vfi_app_*")) == []


def test_ctrl_c_ends_it_cleanly(run, tmp_path, monkeypatch, capsys):
    pytest.importorskip("gradio")
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    for name in ("GRADIO_TEMP_DIR", "no_proxy", *app._QUIET):
        monkeypatch.setenv(name, os.environ.get(name, ""))
    said, plain = [], builtins.print

    def say(text: str, **how: object) -> None:
        said.append((text, len(list(tmp_path.glob("vfi_app_*")))))
        if len(said) == 1:
            threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT)).start()
        plain(text, **how)

    monkeypatch.setattr(app, "print", say, raising=False)
    app.main(["--model", str(run), "--device", "cpu", "--port", "0", "--no-open"])
    (first, folders), last = said
    assert first.startswith("the page is at http://127.0.0.1:")
    assert folders == 1
    assert last == ("the page is closed", 0)
    assert capsys.readouterr().err == ""


def test_a_request_without_a_file_is_one_line(address, capfd):
    field = b'--x\r\nContent-Disposition: form-data; name="files"\r\n\r\nno file\r\n--x--\r\n'
    kind = {"Content-Type": "multipart/form-data; boundary=x"}
    with pytest.raises(urllib.error.HTTPError) as refused:
        urllib.request.urlopen(urllib.request.Request(f"{address}/gradio_api/upload", field, kind))
    assert refused.value.code == 400
    errors = capfd.readouterr().err
    assert errors.startswith("note: refused POST /gradio_api/upload: ")
    assert errors.count("\n") == 1


@pytest.mark.parametrize("payload", [None, {}, {"path": None}, {"path": ""}, "x", []])
def test_what_is_no_upload_is_a_message_of_the_page(work, payload):
    with pytest.raises(JobError):
        work.video(app._path(payload), False, 2, _ignore)


def _open(browser: Browser, address: str, width: int) -> Iterator[Page]:
    """Nothing may go wrong in the page, and nothing be asked of anyone but its server."""
    context = browser.new_context(viewport={"width": width, "height": 900})
    page, said, asked = context.new_page(), [], []
    page.set_default_timeout(15_000)
    page.on("console", lambda message: said.append(message.text) if message.type == "error" else None)
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on("request", lambda request: asked.append(request.url))
    page.goto(address)
    page.get_by_role("button", name="Make the image between").wait_for()
    yield page
    context.close()
    assert said == []
    hosts = {urlsplit(url).netloc for url in asked if urlsplit(url).scheme not in ("data", "blob")}
    assert hosts == {urlsplit(address).netloc}


@pytest.fixture
def page(browser, address) -> Iterator[Page]:
    yield from _open(browser, address, 1280)


@pytest.fixture
def phone(browser, address) -> Iterator[Page]:
    yield from _open(browser, address, 390)


def _upload(page: Page, **given: Path) -> None:
    for label, path in given.items():
        part = _part(page, label.replace("_", " "))
        part.locator("input[type=file]").set_input_files(path)
        part.locator("img:visible, video:visible").wait_for()


def _part(page: Page, label: str) -> Locator:
    """By its label, since parts come a while after their tab is clicked or something was made."""
    return page.locator(".block").filter(has=page.get_by_text(label, exact=True))


def _make(page: Page, button: str) -> Locator:
    page.get_by_role("button", name=button).click()
    line = page.locator(".said p:visible")
    line.wait_for()
    return line


def _border(page: Page) -> float:
    """How much of the upper picture is cut away at its left, in percent."""
    style: str = page.locator("[data-testid=imageslider-image]:visible").nth(1).evaluate("e => getComputedStyle(e).clipPath")
    return float(style.removesuffix("%)").rpartition(" ")[2])


def _tab_to(page: Page, wanted: Locator) -> None:
    """By keyboard alone."""
    wanted.wait_for()
    for _ in range(40):
        page.keyboard.press("Tab")
        if wanted.evaluate("e => e === document.activeElement"):
            return
    pytest.fail(f"Tab does not lead to {wanted}")


def _fits(page: Page) -> bool:
    found: bool = page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    return found


@pytest.mark.browser
def test_two_images_in_the_page(page, inputs):
    assert page.get_by_text("some, step 4 · cpu, fp32").is_visible()
    _upload(page, First_image=inputs / "a.png", Second_image=inputs / "b.png")
    page.get_by_role("button", name="Make the image between").focus()
    page.keyboard.press("Enter")
    line = page.locator(".said p:visible")
    line.wait_for()
    assert line.inner_text() == "64x48, timestep 0.5; 7 frames between for slow motion"
    handle = page.get_by_role("slider", name="border")
    _tab_to(page, handle)
    assert _border(page) == pytest.approx(50, abs=1)
    for key, border in (("ArrowRight", 55), ("ArrowLeft", 50), ("Home", 0), ("End", 100), ("ArrowLeft", 95)):
        page.keyboard.press(key)
        page.wait_for_function("e => e.ariaValueNow == " + str(border), arg=handle.element_handle())
        assert _border(page) == pytest.approx(border, abs=1)
    box = handle.bounding_box()
    page.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    page.mouse.down()
    page.mouse.move(box["x"] - 100, box["y"] + 30, steps=4)
    page.mouse.up()
    assert _border(page) < 90
    left = page.locator("[data-testid=imageslider-image]:visible").first
    average = left.get_attribute("src")
    page.get_by_label("second frame").check()
    page.wait_for_function("([e, before]) => e.src != before", arg=[left.element_handle(), average])
    video = page.locator("video:visible")
    page.wait_for_function("v => v.readyState >= 2", arg=video.element_handle())
    assert video.evaluate("v => [v.duration, v.videoWidth, v.loop]") == [1, WIDTH, True]
    _tab_to(page, page.get_by_role("button", name="Download the image"))
    with page.expect_download() as download:
        page.keyboard.press("Enter")
    assert Image.open(download.value.path()).size == (WIDTH, HEIGHT)


@pytest.mark.browser
def test_a_video_in_the_page(page, inputs):
    page.get_by_role("tab", name="Video").click()
    _upload(page, Video=inputs / "clip.mp4")
    page.get_by_label("slow motion").check()
    assert (
        _make(page, "Make the video").inner_text().startswith(f"{2 * FRAMES - 1} frames at 10 per second from {FRAMES} at 10")
    )
    video = _part(page, "The video").locator("video:visible")
    page.wait_for_function("v => v.readyState >= 2", arg=video.element_handle())
    assert video.evaluate("v => v.duration") == pytest.approx(0.7, abs=0.11)
    assert video.evaluate("v => v.videoWidth") == WIDTH
    page.get_by_role("slider", name="border").wait_for()
    with page.expect_download() as download:
        page.get_by_role("button", name="Download the video").click()
    assert len(_frames(Path(download.value.path()))) == 2 * FRAMES - 1


@pytest.mark.browser
def test_mistakes_are_one_line_in_the_page_and_it_goes_on(page, inputs):
    _upload(page, First_image=inputs / "a.png", Second_image=inputs / "text.png")
    line = _make(page, "Make the image between")
    assert line.inner_text() == "text.png cannot be decoded as png: cannot identify image file"
    assert line.get_attribute("role") == "alert"
    page.get_by_role("tab", name="Video").click()
    _upload(page, Video=inputs / "still.mp4")
    assert "fewer than two frames" in _make(page, "Make the video").inner_text()
    assert not page.get_by_role("slider", name="border").is_visible()


@pytest.mark.browser
def test_nothing_is_wider_than_a_phone(phone, inputs):
    assert _fits(phone)
    _upload(phone, First_image=inputs / "a.png", Second_image=inputs / "b.png")
    _make(phone, "Make the image between")
    phone.get_by_role("slider", name="border").wait_for()
    assert _fits(phone)
    phone.get_by_role("tab", name="Video").click()
    phone.get_by_role("button", name="Make the video").wait_for()
    assert _fits(phone)
