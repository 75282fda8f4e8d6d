"""Pictures of a sample on the report's page: all frames, errors and flows, two of them under a before/after slider."""

from __future__ import annotations

import base64
import io
import re
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import NamedTuple

from PIL import Image, UnidentifiedImageError

from vfi.evaluation.results import ERROR_WHITE, FRAME_AVERAGE, ImageScore, Picture, ResultError, Results
from vfi.reporting.tables import gain_cell

EMBEDDED_SIDE = 640
"""Pictures with a longer side are shrunk to it."""
SMALL_SIDE = 256
"""Pictures up to this side are embedded unchanged and enlarged without smoothing; larger ones are embedded as JPEG."""
_LEFT, _RIGHT = 3, 4  # what the slider shows at first: the frame average and the first prediction


def breakable(text: str) -> str:
    """Escape text and allow line breaks within paths and names of adapters."""
    return re.sub(r"([/:])(?=\S)", r"\1<wbr>", escape(text))


class _Frame(NamedTuple):
    name: str
    file: str
    note: str = ""


def samples(folder: Path, results: Results) -> list[str]:
    """Render an article per picture. Raises ResultError when a file that the results name is missing or damaged."""
    return [_sample(folder, picture, results) for picture in results.pictures]


def legend_of_pictures(shown: Sequence[Results]) -> str:
    """Explain the colours of errors and flows."""
    text = f"Errors are absolute, averaged over the colours: black 0, white {ERROR_WHITE} and more."
    if any(picture.flows for results in shown for picture in results.pictures):
        text += (
            " Flow leads from the frame in between to the first one: the hue is its direction (right red, down yellow, left "
            "cyan to blue, up violet), the saturation its length, relative to the longest of that picture; white stands still."
        )
    return text


def _sample(folder: Path, picture: Picture, results: Results) -> str:
    scores = {row.model: {image.key: image for image in row.images}[picture.key] for row in results.rows}
    gain = gain_cell(scores[next(iter(picture.predictions))].psnr - scores[FRAME_AVERAGE].psnr)
    figures, options = [], []
    for number, frame in enumerate(_frames(picture, scores)):
        source, small = _embed(folder / frame.file)
        image = f'<img src="{source}" alt="{escape(frame.name)} of sample {escape(picture.key)}">'
        caption = breakable(frame.name) + (f"<br><small>{escape(frame.note)}</small>" if frame.note else "")
        kind = ' class="small"' if small else ""
        figures.append(f"<figure{kind}>{image}<figcaption>{caption}</figcaption></figure>")
        options.append((number, escape(frame.name)))
    return (
        f'<article class="sample"><header><strong class="{gain.kind}">{gain.text} dB</strong>'
        f'<span class="muted">{escape(picture.key)}, rank {picture.rank} of {picture.of}</span></header>'
        f'<div class="side"><div class="compare"><div class="stage{" small" if small else ""}">'
        f'<img alt="" draggable="false"><img alt="" draggable="false"></div>'
        f'<input type="range" min="0" max="100" value="50" aria-label="Border between the left and the right picture">'
        f'<div class="choice">{_select("Left", options, _LEFT)}{_select("Right", options, _RIGHT)}</div></div>'
        f'<div class="strip">{"".join(figures)}</div></div></article>'
    )


def _frames(picture: Picture, scores: dict[str, ImageScore]) -> list[_Frame]:
    """Return all frames, errors and flows of a sample, in the order of the strip."""
    one = len(picture.predictions) == 1
    frames = [_Frame("first frame", picture.img0), _Frame("truth", picture.truth), _Frame("last frame", picture.img1)]
    frames.append(_Frame(FRAME_AVERAGE, picture.average, f"{scores[FRAME_AVERAGE].psnr:.2f} dB"))
    for model, file in picture.predictions.items():
        frames.append(_Frame("prediction" if one else model, file, f"{scores[model].psnr:.2f} dB"))
    frames.append(_Frame(f"error of {FRAME_AVERAGE}", picture.average_error))
    frames += [_Frame(f"error of {'prediction' if one else model}", file) for model, file in picture.errors.items()]
    frames += [_Frame("flow" if one else f"flow of {model}", file) for model, file in picture.flows.items()]
    return frames


def _select(label: str, options: Sequence[tuple[int, str]], chosen: int) -> str:
    items = "".join(f'<option value="{i}"{" selected" if i == chosen else ""}>{name}</option>' for i, name in options)
    return f"<label>{label}<select>{items}</select></label>"


def _embed(path: Path) -> tuple[str, bool]:
    """Return a picture file as data URI, and whether it is small."""
    try:
        data = path.read_bytes()
        with Image.open(io.BytesIO(data)) as image:
            small = max(image.size) <= SMALL_SIDE
            kind = "png"
            if not small:
                image.thumbnail((EMBEDDED_SIDE, EMBEDDED_SIDE), Image.Resampling.LANCZOS)
                buffer = io.BytesIO()
                image.convert("RGB").save(buffer, "jpeg", quality=90, subsampling=0)
                data, kind = buffer.getvalue(), "jpeg"
    except (OSError, UnidentifiedImageError) as error:
        raise ResultError(f"picture {path} cannot be read ({error}): keep the pictures beside their results file") from error
    return f"data:image/{kind};base64,{base64.b64encode(data).decode('ascii')}", small
