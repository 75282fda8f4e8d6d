"""What does the report's page hold? Groups of results -> the text of one HTML file that needs nothing beside it.

Pictures are embedded, charts are inline SVG (vfi/charts.py), style and script come from report_template.html. All text that
comes from files is escaped.
"""

from __future__ import annotations

import base64
import io
import json
import math
from collections.abc import Sequence
from html import escape
from pathlib import Path
from string import Template
from typing import Any

from PIL import Image, UnidentifiedImageError

from vfi.charts import Series, legend, line_chart, scatter_chart, thin
from vfi.published import published_cells
from vfi.results import ERROR_WHITE, FRAME_AVERAGE, Entry, Group, Picture, ResultError, Results

TEMPLATE = Path(__file__).with_name("report_template.html")
EMBEDDED_SIDE = 640
"""Pictures with a longer side are shrunk to it and embedded as JPEG; smaller ones are embedded as they are."""
SMALL_SIDE = 256
"""Pictures up to this side are enlarged without smoothing."""


def page(groups: Sequence[Group]) -> str:
    """The whole page. Raises ResultError when a picture that a results file names is missing or damaged."""
    models = len({entry.label for group in groups for entry in group.entries})
    days = sorted({results.environment.get("created", "")[:10] for group in groups for _, results in group.files})
    measured = " to ".join(dict.fromkeys((days[0], days[-1])))
    subtitle = f"{_count(models, 'model')} on {_count(len(groups), 'data set')}, measured {measured}"
    return Template(TEMPLATE.read_text(encoding="utf-8")).substitute(
        title="Video frame interpolation: results",
        subtitle=escape(subtitle),
        body="\n".join(_section(group) for group in groups),
        footer="Made with <code>vfi report</code> from "
        + ", ".join(f"<code>{escape(str(path))}</code>" for group in groups for path, _ in group.files),
    )


def short_number(value: int | None) -> str:
    """1234567 -> 1.23 M; None -> nothing."""
    if value is None:
        return ""
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:.3g} {unit}"
    return str(value)


def better_on(entry: Entry, group: Group) -> str:
    """On how many images a model beats the frame average, such as 62 / 64."""
    pairs = zip(entry.row.images, group.average.images, strict=True)
    return f"{sum(ours.psnr > average.psnr for ours, average in pairs)} / {group.samples}"


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


def _section(group: Group) -> str:
    first = group.files[0][1]
    protocol = first.protocol
    about = f"{_count(group.samples, 'sample')}, {protocol.get('sizes', '')}, {protocol.get('codec', '')}"
    parts = [f"<section><h2>{escape(group.data)}</h2>", f'<p class="muted">{escape(about)}</p>', _table(group)]
    if published := published_cells(protocol.get("protocol", "")):
        parts.append("<h3>Published, not measured here</h3>")
        parts.append(_plain_table(("Model", "PSNR dB", "SSIM", "IE", ""), published, "Published results"))
    parts.append(f"<h3>Image by image, and training</h3>{legend([entry.label for entry in group.entries])}")
    parts.append(f'<div class="charts">{_scatter(group)}{_curves(group)}</div>')
    pictures = [(path, results) for path, results in group.files if results.pictures]
    if pictures:
        parts.append("<h3>Pictures, from the smallest to the largest gain over the frame average</h3>")
        parts.append(
            f'<p class="muted">Errors are absolute, averaged over the colours: black 0, white {ERROR_WHITE} and more.</p>'
        )
        parts += [_sample(path.parent, picture, results) for path, results in pictures for picture in results.pictures]
    parts.append(_facts(group))
    return "\n".join([*parts, "</section>"])


def _table(group: Group) -> str:
    names = ("Model", "PSNR dB", "Gain dB", "SSIM", "Better on", "Parameters", "Step", "Precision")
    best_psnr = max((entry.row.psnr for entry in group.entries), default=math.inf)
    best_ssim = max((entry.row.ssim for entry in group.entries), default=math.inf)
    rows = [(FRAME_AVERAGE, f"{group.average.psnr:.2f}", "", f"{group.average.ssim:.4f}", "", "", "", "")]
    cells = ["".join(f"<td>{escape(cell)}</td>" for cell in row) for row in rows]
    for entry in group.entries:
        row = entry.row
        gain = row.psnr - group.average.psnr
        step = "" if row.step is None else f"{row.step:,}"
        cells.append(
            f"<td>{escape(entry.label)}</td>"
            f"<td{_class('best', row.psnr == best_psnr)}>{row.psnr:.2f}</td>"
            f'<td class="{_kind(gain)}">{_signed(gain)}</td>'
            f"<td{_class('best', row.ssim == best_ssim)}>{row.ssim:.4f}</td>"
            f"<td>{better_on(entry, group)}</td><td>{short_number(row.parameters)}</td>"
            f"<td>{step}</td><td>{escape(entry.results.environment.get('precision', ''))}</td>"
        )
    return _scrolling_table(names, cells, "Results")


def _plain_table(names: Sequence[str], rows: Sequence[Sequence[str]], label: str) -> str:
    return _scrolling_table(names, ["".join(f"<td>{escape(cell)}</td>" for cell in row) for row in rows], label)


def _scrolling_table(names: Sequence[str], rows: Sequence[str], label: str) -> str:
    """`rows`: the cells of each, already HTML."""
    head = "".join(f'<th scope="col">{name}</th>' for name in names)
    body = "".join(f"<tr>{row}</tr>" for row in rows)
    table = f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
    return f'<div class="scroll" tabindex="0" role="region" aria-label="{label}">{table}</div>'


def _class(name: str, given: bool) -> str:
    return f' class="{name}"' if given else ""


def _kind(gain: float) -> str:
    """Class of a gain, by what is left of it after rounding."""
    return "gain" if gain >= 0.005 else "loss" if gain <= -0.005 else "muted"


def _signed(value: float) -> str:
    """With a sign, and a true minus, which is as wide as a plus."""
    return f"{round(value, 2) + 0.0:+.2f}".replace("-", "−")


def _chart(caption: str, svg: str, note: str = "") -> str:
    return f"<figure><figcaption>{caption}</figcaption>{svg}{f'<small>{note}</small>' if note else ''}</figure>"


def _scatter(group: Group) -> str:
    """PSNR of the frame average against that of each model."""
    average = {image.key: image.psnr for image in group.average.images}
    series = [
        Series(
            entry.label,
            [
                (average[i.key], i.psnr, f"{i.key}: {i.psnr:.2f} dB, frame average {average[i.key]:.2f} dB ({entry.label})")
                for i in entry.row.images[:: math.ceil(len(entry.row.images) / 2000)]
            ],
        )
        for entry in group.entries
    ]
    svg = scatter_chart("PSNR of each image", series, "frame average, PSNR dB", "model, PSNR dB")
    return _chart("PSNR of each image", svg, "Above the dashed line the model is better than the average.")


def _curves(group: Group) -> str:
    """Loss and validation over the training steps of every model whose run folder is there."""
    rows = {entry.label: _metrics(run / "metrics.jsonl") for entry in group.entries if (run := _run_folder(entry))}
    names = [entry.label for entry in group.entries]  # every model keeps its colour, also beside one without curves
    loss = [Series(name, thin(_points(rows.get(name, ()), "train", "loss"))) for name in names]
    val = [Series(name, thin(_points(rows.get(name, ()), "val", "psnr"))) for name in names]
    loss = [Series(name, [point for point in points if point[1] > 0]) for name, points in loss]
    figures = []
    if any(points for _, points in loss):
        figures.append(_chart("Training loss", line_chart("Training loss", loss, "step", "loss", log=True)))
    if any(points for _, points in val):
        averages = {y for events in rows.values() for _, y, _ in _points(events, "val", "average_psnr")}
        rules = [(FRAME_AVERAGE, y) for y in sorted(averages)] if len(averages) == 1 else []
        figures.append(_chart("Validation", line_chart("Validation PSNR", val, "step", "PSNR dB", rules=rules)))
    return "".join(figures)


def _run_folder(entry: Entry) -> Path | None:
    folder = entry.file.parent / entry.row.run if entry.row.run else None
    return folder if folder and folder.is_dir() else None


def _metrics(path: Path) -> list[dict[str, Any]]:
    """The rows of a metrics.jsonl; a last line that was cut short is left out."""
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else ():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return rows


def _points(rows: Sequence[dict[str, Any]], event: str, name: str) -> list[tuple[float, float, str]]:
    """(step, value, label) of one number, by step; values that are not finite are left out."""
    found = {row["step"]: row[name] for row in rows if row.get("event") == event and row.get(name) is not None}
    return [(step, y, f"step {step}: {y:.4g}") for step, y in sorted(found.items()) if math.isfinite(y)]


def _sample(folder: Path, picture: Picture, results: Results) -> str:
    """One sample: a before/after slider and all of its frames."""
    scores = {row.model: {image.key: image for image in row.images}[picture.key] for row in results.rows}
    average = scores[FRAME_AVERAGE]
    frames = [("first frame", picture.img0, ""), ("truth", picture.truth, ""), ("last frame", picture.img1, "")]
    frames.append((FRAME_AVERAGE, picture.average, f"{average.psnr:.2f} dB"))
    for model, file in picture.predictions.items():
        frames.append(("prediction" if len(picture.predictions) == 1 else model, file, f"{scores[model].psnr:.2f} dB"))
    frames.append((f"error of {FRAME_AVERAGE}", picture.average_error, ""))
    for model, file in picture.errors.items():
        frames.append((f"error of {'prediction' if len(picture.errors) == 1 else model}", file, ""))
    gain = scores[next(iter(picture.predictions))].psnr - average.psnr
    figures, options = [], []
    for number, (name, file, note) in enumerate(frames):
        source, small = _embed(folder / file)
        image = f'<img src="{source}" alt="{escape(name)} of sample {escape(picture.key)}">'
        caption = escape(name) + (f"<br><small>{escape(note)}</small>" if note else "")
        figures.append(f"<figure{_class('small', small)}>{image}<figcaption>{caption}</figcaption></figure>")
        options.append((number, escape(name)))
    return (
        f'<article class="sample"><header><strong class="{_kind(gain)}">{_signed(gain)} dB</strong>'
        f'<span class="muted">{escape(picture.key)}, rank {picture.rank} of {picture.of}</span></header>'
        f'<div class="side"><div class="compare"><div class="stage{" small" if small else ""}"><img alt=""><img alt=""></div>'
        f'<input type="range" min="0" max="100" value="50" aria-label="Border between the left and the right picture">'
        f'<div class="choice">{_select("Left", options, 3)}{_select("Right", options, 4)}</div></div>'
        f'<div class="strip">{"".join(figures)}</div></div></article>'
    )


def _select(label: str, options: Sequence[tuple[int, str]], chosen: int) -> str:
    items = "".join(f'<option value="{i}"{" selected" if i == chosen else ""}>{name}</option>' for i, name in options)
    return f"<label>{label}<select>{items}</select></label>"


def _embed(path: Path) -> tuple[str, bool]:
    """A picture file as data URI, and whether it is small."""
    try:
        data = path.read_bytes()
        with Image.open(io.BytesIO(data)) as image:
            small = max(image.size) <= SMALL_SIDE
            kind = "png"
            if max(image.size) > EMBEDDED_SIDE:
                image.thumbnail((EMBEDDED_SIDE, EMBEDDED_SIDE), Image.Resampling.LANCZOS)
                buffer = io.BytesIO()
                image.convert("RGB").save(buffer, "jpeg", quality=90, subsampling=0)
                data, kind = buffer.getvalue(), "jpeg"
    except (OSError, UnidentifiedImageError) as error:
        raise ResultError(f"picture {path} cannot be read ({error}): keep the pictures beside their results file") from error
    return f"data:image/{kind};base64,{base64.b64encode(data).decode('ascii')}", small


def _facts(group: Group) -> str:
    """Protocol, environment of each results file, and the settings of each run."""
    parts = [
        "<h3>How this was measured</h3>",
        _list(group.files[0][1].protocol | {"index sha256": group.files[0][1].index_sha256}),
    ]
    for path, results in group.files:
        parts.append(f'<p class="muted">{escape(str(path))}</p>{_list(results.environment)}')
    for entry in group.entries:
        folder = _run_folder(entry)
        if folder is None:
            parts.append(f'<p class="muted">{escape(entry.label)}: its run folder is not there, so no training curves.</p>')
            continue
        for name, title in (("config.json", "Settings"), ("environment.json", "Training environment")):
            if (folder / name).is_file():
                text = escape((folder / name).read_text(encoding="utf-8"))
                parts.append(f"<details><summary>{title} of {escape(entry.label)}</summary><pre>{text}</pre></details>")
    return "".join(parts)


def _list(facts: dict[str, str]) -> str:
    return "<dl>" + "".join(f"<dt>{escape(name)}</dt><dd>{escape(value)}</dd>" for name, value in facts.items()) + "</dl>"
