"""Web page on this machine for interpolation without the command line: two images or a short video in, the result next to it.

    vfi app                                  the model that comes with the package, at http://127.0.0.1:7860
    vfi app --model runs/base --port 8000 --no-open

Needs the extra `app` (Gradio), which only this module imports. The page is local: nothing is shared or reported, and it needs
no network. It runs one job at a time; uploads and results are in a temporary folder, which is deleted at the end (Ctrl-C).
"""

from __future__ import annotations

import contextlib
import dataclasses
import html
import os
import signal
import socket
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from shards.cli import parse_flags
from shards.schema import ShardError
from vfi.errors import CheckpointError, JobError, clear_errors
from vfi.runtime.device import DeviceName, PrecisionName
from vfi.runtime.logging import logger
from vfi.video.app_session import COMPARE, Made, Session, compared

INSTALL = "pip install -e '.[app]'"
MAX_UPLOAD = "1gb"
_BAD_REQUEST = (KeyError, TypeError, ValueError)  # of Gradio's routes (6.31) for what the page itself never sends
_QUIET = {"GRADIO_ANALYTICS_ENABLED": "False", "HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_OFFLINE": "1"}
_STYLE = """
.gradio-container { width: 100% !important; max-width: 1060px !important; margin: 0 auto !important }
#head h1 { margin: 0; font-size: 1.7rem; letter-spacing: -0.01em }
#head p { margin: 0.2rem 0 0; color: var(--neutral-600) }
.dark #head p { color: var(--neutral-300) }
#head .model { font-size: 0.85rem }
.said p { margin: 0; padding: 0.6rem 0.9rem; border-radius: 8px; overflow-wrap: anywhere }
.said p { background: var(--background-fill-secondary) }
.said p.error { color: #991b1b; background: #fef2f2; border: 1px solid #fecaca }
.dark .said p.error { color: #fecaca; background: #450a0a; border-color: #7f1d1d }
[role=slider]:focus-visible { outline: 3px solid var(--primary-400); outline-offset: 2px }
"""
# Gradio's slider between two images supports only the mouse: make it focusable by Tab, and movable by arrow keys
_KEYS = """() => {
  const part = handle => {
    const [inner, outer] = [handle, handle.parentElement].map(element => element.getBoundingClientRect());
    return 100 * (inner.left + inner.width / 2 - outer.left) / outer.width;
  };
  const name = handle => {
    handle.tabIndex = 0;
    handle.setAttribute("role", "slider");
    handle.setAttribute("aria-label", "border between before and after, in percent");
    handle.setAttribute("aria-valuenow", Math.round(part(handle)));
  };
  new MutationObserver(() => document.querySelectorAll("[data-testid=slider]:not([role=slider])").forEach(name))
    .observe(document.body, {subtree: true, childList: true, attributes: true, attributeFilter: ["data-testid", "role"]});
  document.addEventListener("keydown", event => {
    const handle = event.target, step = {ArrowLeft: -5, ArrowRight: 5, Home: -100, End: 100}[event.key];
    if (!step || !handle.matches("[data-testid=slider]")) return;
    event.preventDefault();
    const inner = handle.getBoundingClientRect(), outer = handle.parentElement.getBoundingClientRect();
    const x = inner.left + inner.width / 2, y = inner.top + inner.height / 2;
    const send = (target, kind, x) =>
      target.dispatchEvent(new MouseEvent(kind, {clientX: x, clientY: y, bubbles: true, cancelable: true, view: window}));
    send(handle, "mousedown", x);
    send(window, "mousemove", x + step / 100 * outer.width);
    send(window, "mouseup", x + step / 100 * outer.width);
    requestAnimationFrame(() => name(handle));
  });
}"""


@dataclasses.dataclass(frozen=True)
class Options:
    """Options of `vfi app`; each field is a command-line flag."""

    model: Path | None = None
    """Run folder, checkpoint folder, weights file, folder of `vfi export`, or ORG/NAME on the Hugging Face hub; default:
    `shipped`, the model that comes with the package."""
    device: DeviceName = "auto"
    """auto selects a GPU if there is one."""
    precision: PrecisionName = "auto"
    """auto is bf16 autocast on a GPU that supports it, otherwise fp32."""
    port: int = 7860
    """Port of the page; 0 selects a free one."""
    host: str = "127.0.0.1"
    """Address to listen on: 127.0.0.1 is reachable from this machine alone, 0.0.0.0 from the network, without a password."""
    open: bool = True
    """Open the page in the browser."""


@clear_errors(ShardError, CheckpointError)
def main(argv: Sequence[str] | None = None) -> None:
    """Load the model, serve the page until Ctrl-C, and delete its files."""
    options = parse_flags(Options, "vfi app", __doc__, argv)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends like Ctrl-C: temporary files are deleted
    with contextlib.suppress(KeyboardInterrupt), serving(options) as address:
        print(f"the page is at {address}; Ctrl-C ends it", flush=True)
        threading.Event().wait()
    print("the page is closed")


@contextlib.contextmanager
def serving(options: Options) -> Iterator[str]:
    """Serve the page from threads until the end of the block; yields its address.

    Raises JobError for a port that is taken or without Gradio, CheckpointError for a model that can't be loaded.
    """
    port = _free_port(options.host, options.port)
    with tempfile.TemporaryDirectory(prefix="vfi_app_", ignore_cleanup_errors=True) as name:
        gr = _gradio(Path(name))
        work = Session(options.model, options.device, options.precision, Path(name))
        page = build(gr, work)
        try:
            page.launch(
                server_name=options.host, server_port=port, inbrowser=options.open, share=False, quiet=True,
                prevent_thread_lock=True, ssr_mode=False, run_history=False, footer_links=[], max_file_size=MAX_UPLOAD,
                app_kwargs={"exception_handlers": dict.fromkeys(_BAD_REQUEST, _refuse)},
                theme=_theme(gr), css=_STYLE, js=_KEYS, pwa=False, mcp_server=False, enable_monitoring=False,
            )  # fmt: skip
            yield f"http://{options.host}:{port}"
        finally:
            work.closed.set()
            page.close(verbose=False)
            with work.busy:  # the job in progress ends with its next frame
                pass


def _refuse(request: Any, error: Exception) -> Any:
    """Answer a request that Gradio's routes can't read, such as an upload without a file, and log one line."""
    from starlette.responses import PlainTextResponse  # comes with Gradio

    why = f"{type(error).__name__}: {error}"
    logger.warning(f"refused {request.method} {request.url.path}: {why}")
    return PlainTextResponse(why, status_code=400)


def _free_port(host: str, port: int) -> int:
    """Return the port, or for 0 a free one; JobError for a port that is taken."""
    if not 0 <= port <= 65535:
        raise JobError(f"--port {port} must lie between 1 and 65535, or be 0 for any that is free")
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise JobError(
                f"--host {host} --port {port} can't be used: {error.strerror}; use another port, or 0 for any that is free"
            ) from error
        found: int = probe.getsockname()[1]
    return found


def _gradio(folder: Path) -> Any:
    """Import Gradio, with its files in the folder and without network requests; JobError where it is not installed."""
    own = ("127.0.0.1", "localhost")  # otherwise a proxy of the environment would be used for the page itself
    os.environ.update(_QUIET, GRADIO_TEMP_DIR=str(folder / "page"))
    os.environ["no_proxy"] = ",".join(dict.fromkeys([*filter(None, os.environ.get("no_proxy", "").split(",")), *own]))
    try:
        import gradio
    except ModuleNotFoundError as error:
        if error.name != "gradio":
            raise
        raise JobError(f"the page needs Gradio, which is not installed: {INSTALL}") from error
    return gradio


def _theme(gr: Any) -> Any:
    """Return a theme with the fonts of the machine: none are fetched."""
    fonts = ("system-ui", "sans-serif")
    return gr.themes.Default(primary_hue="indigo", font=fonts, font_mono=("ui-monospace", "monospace"))


def build(gr: Any, work: Session) -> Any:
    """Build the page: a header and two tabs."""
    page = gr.Blocks(title="Frames between", analytics_enabled=False, delete_cache=(600, 3600))
    page.queue(default_concurrency_limit=1, api_open=False)
    with page:
        gr.HTML(
            "<h1>Frames between</h1><p>Two images or a short video in, the frames that lie between out.</p>"
            f"<p class='model'>{html.escape(work.about)}</p>", elem_id="head", padding=False,
        )  # fmt: skip
        with gr.Tab("Two images"):
            _images_tab(gr, work)
        with gr.Tab("Video"):
            _video_tab(gr, work)
    return page


def _images_tab(gr: Any, work: Session) -> None:
    with gr.Row():
        images = [
            gr.Image(sources=["upload", "clipboard"], label=f"{which} image", height=240, min_width=240)
            for which in ("First", "Second")
        ]
    with gr.Row():
        timestep = gr.Slider(
            0.05, 0.95, 0.5, step=0.05, label="Timestep", info="0 is the first image, 1 the second", min_width=240
        )
        slower = gr.Radio(
            [("none", 0), ("8×", 8), ("16×", 16), ("32×", 32)], value=8, label="Slow motion",
            info="a clip of the way there and back", min_width=240,
        )  # fmt: skip
    button = gr.Button("Make the image between", variant="primary")
    result = _Result(gr, "Slow motion", "Download the image", loop=True)

    def make(first: Any, second: Any, timestep: float, slower: int, choice: str, progress: Any = gr.Progress()) -> Any:  # noqa: B008
        return result.answer(work, choice, lambda: work.images(_path(first), _path(second), timestep, slower, progress))

    result.follows(button, make, [*images, timestep, slower])


def _video_tab(gr: Any, work: Session) -> None:
    video = gr.Video(sources=["upload"], label="Video", height=300)
    with gr.Row():
        slow = gr.Radio([("smoother", False), ("slow motion", True)], value=False, label="Make it", min_width=240)
        factor = gr.Radio([("2×", 2), ("4×", 4), ("8×", 8)], value=2, label="How much", min_width=240)
    button = gr.Button("Make the video", variant="primary")
    result = _Result(gr, "The video", "Download the video", loop=False)

    def make(video: Any, slow: bool, factor: int, choice: str, progress: Any = gr.Progress()) -> Any:  # noqa: B008
        return result.answer(work, choice, lambda: work.video(_path(video), slow, factor, progress))

    result.follows(button, make, [video, slow, factor])


def _path(payload: dict[str, Any] | None) -> Path | None:
    """Return the path of an upload, from the form in which the page sends it."""
    path = payload.get("path") if isinstance(payload, dict) else None
    return Path(path) if isinstance(path, str) and path else None


class _Result:
    """Output of a tab below its button: one line and, after success, the slider, a player and a file to download."""

    def __init__(self, gr: Any, player: str, download: str, loop: bool) -> None:
        self.gr = gr
        self.said = gr.HTML(elem_classes="said", padding=False)
        self.moment = gr.State(time_to_live=3600)
        with gr.Column(visible=False) as self.column, gr.Row():
            with gr.Column(min_width=300) as self.compare:
                self.slider = gr.ImageSlider(label="Before and after", format="png", interactive=False, buttons=["fullscreen"])
                self.choice = gr.Radio(list(COMPARE), value=COMPARE[0], label="Left of the slider")
            with gr.Column(min_width=300):
                self.player = gr.Video(label=player, autoplay=loop, loop=loop, interactive=False, buttons=[])
                self.download = gr.DownloadButton(download)
        self.choice.input(compared, [self.moment, self.choice], self.slider, show_progress="hidden", api_visibility="private")

    def follows(self, button: Any, make: Callable[..., Any], inputs: list[Any]) -> None:
        """Make the button call `make` with the inputs and the choice for the slider; one job at a time over both tabs."""
        button.click(
            make, [*inputs, self.choice],
            [self.said, self.moment, self.column, self.compare, self.slider, self.player, self.download],
            preprocess=False,  # uploads are read by this project's own code, which says what is wrong with them
            concurrency_id="model", concurrency_limit=1, show_progress_on=self.said, api_visibility="private",
        )  # fmt: skip

    def answer(self, work: Session, choice: str, make: Callable[[], Made]) -> list[Any]:
        """Run `make` and return the result, or the error message, as updates of the page."""
        show = self.gr.update
        try:
            made = make()
        except (JobError, ShardError, CheckpointError) as error:
            return [_line(work.line_of(error), error=True), None, show(visible=False), *[show()] * 4]
        return [
            _line(made.said), made.moment, show(visible=True), show(visible=made.moment is not None),
            compared(made.moment, choice), show(value=made.clip, visible=made.clip is not None), show(value=made.result),
        ]  # fmt: skip


def _line(text: str, error: bool = False) -> str:
    return f"<p class='{'error' if error else 'done'}' role='{'alert' if error else 'status'}'>{html.escape(text)}</p>"


if __name__ == "__main__":
    main()
