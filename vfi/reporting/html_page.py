"""The report's page: a single HTML file that needs no other files.

Pictures are embedded, charts are inline SVG (vfi/reporting/svg.py), style and script come from report_template.html. All text
that comes from files is escaped.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from string import Template
from typing import Any

from vfi.evaluation.latency_results import Speed
from vfi.evaluation.results import Group
from vfi.reporting.charts import charts, run_folder
from vfi.reporting.images import breakable, legend_of_pictures, samples
from vfi.reporting.svg import legend
from vfi.reporting.tables import Cell, Table, clip_table, motion_table, published_table, results_table, speed_table

TITLE = "Video frame interpolation: results"
TEMPLATE = Path(__file__).with_name("report_template.html")


@dataclasses.dataclass(frozen=True)
class Content:
    """Everything that a report shows."""

    groups: Sequence[Group]
    speeds: Mapping[Path, Speed] = dataclasses.field(default_factory=dict)
    gate: Table | None = None
    ablation: Table | None = None


def page(content: Content) -> str:
    """Render the whole page. Raises ResultError when a picture that a results file names is missing or damaged."""
    sections = [(table.label, _table(table)) for table in (content.gate,) if table]
    sections += [(group.data, _group(group, content.speeds)) for group in content.groups]
    sections += [("Speed", _speeds(content.speeds))] if content.speeds else []
    sections += [(table.label, _table(table)) for table in (content.ablation,) if table]
    body = [f'<section id="part-{i}"><h2>{escape(title)}</h2>{html}</section>' for i, (title, html) in enumerate(sections, 1)]
    if len(sections) > 2:
        links = "".join(f'<li><a href="#part-{i}">{escape(title)}</a></li>' for i, (title, _) in enumerate(sections, 1))
        body.insert(0, f'<nav aria-label="Sections"><ul>{links}</ul></nav>')
    files = [*(path for group in content.groups for path, _ in group.files), *content.speeds]
    made_from = " from " + ", ".join(f"<code>{escape(str(path))}</code>" for path in files) if files else ""
    return Template(TEMPLATE.read_text(encoding="utf-8")).substitute(
        title=TITLE, subtitle=escape(_subtitle(content)), body="\n".join(body),
        footer=f"Made with <code>vfi report</code>{made_from}",
    )  # fmt: skip


def about(group: Group) -> str:
    """Describe the number, size and kind of the samples, and whether they are a part of the set, or not the published one."""
    protocol = group.files[0][1].protocol
    part = protocol.get("frame set", "").removeprefix("all samples").lstrip("; ")
    facts = (_count(group.samples, "sample"), part, protocol.get("sizes", ""), protocol.get("codec", ""))
    return ", ".join(fact for fact in facts if fact)


def fact(value: Any) -> str:
    """Format a value of an environment or of settings as text."""
    if isinstance(value, dict):
        return ", ".join(f"{name} {fact(part)}" for name, part in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(map(fact, value))
    if isinstance(value, bool):
        return "yes" if value else "no"
    return "none" if value is None else str(value)


def _subtitle(content: Content) -> str:
    models = {entry.label for group in content.groups for entry in group.entries}
    environments = [results.environment for group in content.groups for _, results in group.files]
    environments += [speed.environment for speed in content.speeds.values()]
    days = sorted({str(environment["created"])[:10] for environment in environments if "created" in environment})
    parts = [f"{_count(len(models), 'model')} on {_count(len(content.groups), 'data set')}"] if content.groups else []
    if content.speeds:
        parts.append(f"speed of {_count(len({row.model for speed in content.speeds.values() for row in speed.rows}), 'model')}")
    parts += [f"measured {' to '.join(dict.fromkeys((days[0], days[-1])))}"] if days else []
    return ", ".join(parts)


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def _group(group: Group, speeds: Mapping[Path, Speed]) -> str:
    """Render everything that was measured on the same samples."""
    parts = [f'<p class="muted">{escape(about(group))}</p>', _table(results_table(group))]
    for title, table in (
        ("Published, not measured here", published_table(group)),
        ("PSNR by how far things move", motion_table(group)),
        ("PSNR by clip", clip_table(group)),
    ):
        parts += [f"<h3>{title}</h3>{_table(table)}"] if table else []
    parts.append(f"<h3>Image by image, training, speed</h3>{legend([entry.label for entry in group.entries])}")
    parts.append(f'<div class="charts">{charts(group, speeds)}</div>')
    if pictured := [(path, results) for path, results in group.files if results.pictures]:
        parts.append("<h3>Pictures, from the smallest to the largest gain over the frame average</h3>")
        parts.append(f'<p class="muted">{escape(legend_of_pictures([results for _, results in pictured]))}</p>')
        parts += [sample for path, results in pictured for sample in samples(path.parent, results)]
    return "\n".join([*parts, _facts(group)])


def _speeds(speeds: Mapping[Path, Speed]) -> str:
    parts = []
    for path, speed in speeds.items():
        parts.append(f'<p class="muted">{escape(str(path))}</p>{_table(speed_table(speed))}')
        parts.append(f"<h3>How this was measured</h3>{_list(speed.settings | speed.environment)}")
    return "".join(parts)


def _table(table: Table) -> str:
    """Render a table, which the page's script can sort, and the notes that explain it."""
    kinds = [_class("words" if words else "") for words in table.words]
    head = "".join(f'<th scope="col"{kind}>{escape(name)}</th>' for name, kind in zip(table.head, kinds, strict=True))
    rows = "".join(
        f"<tr{_class('baseline' if number < table.baselines else '')}>{''.join(map(_cell, row))}</tr>"
        for number, row in enumerate(table.rows)
    )
    notes = f'<p class="muted">{escape(" ".join(table.notes))}</p>' if table.notes else ""
    text = f"<table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>"
    return f'<div class="scroll" tabindex="0" role="region" aria-label="{escape(table.label)}">{text}</div>{notes}'


def _cell(cell: Cell) -> str:
    return f"<td{_class(cell.kind)}>{breakable(cell.text)}</td>"


def _class(name: str) -> str:
    return f' class="{name}"' if name else ""


def _facts(group: Group) -> str:
    """List the protocol, the environment of each results file, and the settings of each run."""
    parts = [
        "<h3>How this was measured</h3>",
        _list(group.files[0][1].protocol | {"index sha256": group.files[0][1].index_sha256}),
    ]
    for path, results in group.files:
        parts.append(f'<p class="muted">{escape(str(path))}</p>{_list(results.environment)}')
    for entry in group.entries:
        folder = run_folder(entry)
        if folder is None:
            parts.append(f'<p class="muted">{escape(entry.label)}: its run folder is not there, so no training curves.</p>')
            continue
        for name, title in (("config.json", "Settings"), ("environment.json", "Training environment")):
            if (folder / name).is_file():
                text = escape((folder / name).read_text(encoding="utf-8"))
                parts.append(f"<details><summary>{title} of {escape(entry.label)}</summary><pre>{text}</pre></details>")
    return "".join(parts)


def _list(facts: Mapping[str, Any]) -> str:
    items = "".join(f"<dt>{escape(name)}</dt><dd>{escape(fact(value))}</dd>" for name, value in facts.items())
    return f"<dl>{items}</dl>"
