"""Model card for exported weights: README.md, with the front matter that the hub reads.

    about = card(loaded, licence="cc-by-4.0", results=[Path("results.json")])
    text = about.text(described)

The card claims nothing that was not given: without results there are no numbers, and a missing licence is `unknown`.
"""

from __future__ import annotations

import csv
import dataclasses
import math
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from vfi.checkpoint.pretrained_folder import Description, Origin, data_name
from vfi.config.configs import ModelConfig
from vfi.errors import JobError
from vfi.evaluation.results import BASELINES, Results, Row, read_results
from vfi.inference.loading import LoadedModel

TASK = "video-frame-interpolation"
# the hub's identifiers that suit weights; another licence is `other`, with its name
_LICENCES = (
    *("apache-2.0", "mit", "bsd-2-clause", "bsd-3-clause", "gpl-3.0", "agpl-3.0", "openrail", "unlicense", "cc0-1.0"),
    *("cc-by-3.0", "cc-by-4.0", "cc-by-sa-4.0", "cc-by-nd-4.0", "cc-by-nc-4.0", "cc-by-nc-sa-4.0", "cc-by-nc-nd-4.0"),
    "unknown",
)
_USE = """## Use

```python
from vfi import FrameInterpolator
model = FrameInterpolator.from_pretrained("{name}")  # this folder, or ORG/NAME on the hub
middle = model(img0, img1)  # arrays [H, W, 3] or tensors [3, H, W], or batches of them
quarters = model(img0, img1, timestep=[0.25, 0.5, 0.75])
```
"""
_USE_GRAPH = """## Use

{code}
`{file}` takes `img0` and `img1`, float32 `[B, 3, H, W]` RGB in 0 … 1, and `timestep`, float32 `[B]` above 0 and below 1, and
gives `imgt`, `[B, 3, H, W]` in 0 … 1. B is 1 or more, H and W are {smallest} or more; all may differ from call to call.
"""


@dataclasses.dataclass(frozen=True)
class Difference:
    """Deviation of the exported model from the original, for colours in 0 … 1."""

    frames: str
    """Number and size of the frames."""
    largest: float
    mean: float


@dataclasses.dataclass(frozen=True)
class Measured:
    """A results file, and the row of this model in it."""

    results: Results
    row: Row


@dataclasses.dataclass(frozen=True)
class Source:
    """A source of training data; the fields are the columns of the file that lists the sources."""

    name: str
    source: str
    """Origin of the data, such as a URL."""
    licence: str
    what: str
    """The part of it that was used."""


@dataclasses.dataclass(frozen=True)
class Training:
    """How the weights were trained, as far as it was given."""

    sources: tuple[Source, ...] = ()
    recipe: str = ""
    """Commands and hardware, as free text."""
    hours: float | None = None


NOT_GIVEN = Training()


@dataclasses.dataclass(frozen=True)
class Card:
    """Content of a card, apart from what is known only after the export."""

    origin: Origin
    measured: tuple[Measured, ...]
    training: Training = NOT_GIVEN

    def text(self, described: Description, differences: Sequence[Difference] = (), use: str | None = None) -> str:
        """Return the whole README.md; `use` is the section on usage, by default the one for weights."""
        about = described.origin
        parts = [
            f"# {about.name}\n",
            "Given two frames of a video, this network makes the frame at any time between them. It was trained with the VFI "
            "training stack, and runs with it.\n",
            use or _USE.format(name=about.name),
            *_facts(described),
            *_training(self.training),
            *_results(self.measured),
            *_comparison(described, differences),
            "## Licence\n",
            f"Of the weights: {about.licence}." if about.licence else
            "The author of this folder did not state under which licence the weights may be used.",
        ]  # fmt: skip
        return f"---\n{self._front_matter(about)}\n---\n\n" + "\n".join(parts) + "\n"

    def _front_matter(self, about: Origin) -> str:
        from huggingface_hub import EvalResult, ModelCardData  # deferred: the import takes a while

        known = about.licence.lower() in _LICENCES
        evaluated = [
            EvalResult(TASK, _slug(data), data, measure, round(value, 4), metric_name=name)
            for one in self.measured
            for data in (_what(one.results),)
            for measure, name, value in (("psnr", "PSNR (dB)", one.row.psnr), ("ssim", "SSIM", one.row.ssim))
        ]
        fields = ModelCardData(
            license=about.licence.lower() if known else "other" if about.licence else "unknown",
            license_name=None if known or not about.licence else _slug(about.licence),
            library_name="vfi-training-stack",
            tags=[TASK, "video", "mamba-2"],
            datasets=[_slug(data) for data in about.trained_on] or None,
            model_name=about.name if evaluated else None,
            eval_results=evaluated or None,
        )
        text: str = fields.to_yaml()
        return text.strip()


def card(
    loaded: LoadedModel,
    licence: str,
    results: Sequence[Path],
    trained_on: Sequence[str] = (),
    training: Training = NOT_GIVEN,
) -> Card:
    """Collect the content of a model's card. ResultError for an invalid results file, JobError for one without this model."""
    known = loaded.origin
    origin = dataclasses.replace(known, licence=licence or known.licence, trained_on=tuple(trained_on) or known.trained_on)
    return Card(origin, tuple(_of_model(file, loaded) for file in results), training)


def describe_training(sources: Path | None, recipe: str, hours: float | None) -> Training:
    """Describe the training for the card; `sources` is a CSV file with the fields of `Source` as its columns.

    Raises JobError for a file that can't be read, lacks a column or has an empty cell, and for hours that are not positive.
    """
    if hours is not None and not (math.isfinite(hours) and hours > 0):
        raise JobError(f"--hours {hours} must be positive and finite: give the hours that training took, or leave it out")
    return Training(_read_sources(sources) if sources else (), recipe.strip(), hours)


def _read_sources(path: Path) -> tuple[Source, ...]:
    columns = [field.name for field in dataclasses.fields(Source)]
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.reader(file, strict=True)
            lines = [(reader.line_num, [cell.strip() for cell in row]) for row in reader if row]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise JobError(f"--sources {path} cannot be read as CSV in UTF-8: {error}") from error
    (_, head), *rows = lines or [(0, [])]
    if sorted(head) != sorted(columns):
        raise JobError(f"--sources {path} has the columns {', '.join(head) or '(none)'}; needed are {', '.join(columns)}")
    for number, row in rows:
        if len(row) != len(head) or not all(row):
            raise JobError(
                f"--sources {path}, line {number}: fill in {', '.join(head)}, and nothing else (`unknown` is allowed)"
            )
    if not rows:
        raise JobError(f"--sources {path} lists no source: add a line for each, or leave it out")
    return tuple(Source(**dict(zip(head, row, strict=True))) for _, row in rows)


def use_graph(file: str, code: str, smallest: int) -> str:
    """Return the usage section for a traced graph in `file`; `code` calls it, `smallest` is the smallest side."""
    return _USE_GRAPH.format(file=file, code=code, smallest=smallest)


def _of_model(file: Path, loaded: LoadedModel) -> Measured:
    """Return the row that was measured with this run at this step."""
    results = read_results(file)
    for row in results.models:
        same_run = row.run is not None and (file.parent / row.run).resolve() == loaded.run_folder.resolve()
        if row.step == loaded.step and (same_run or row.model.partition("@")[0] == loaded.origin.name):
            return Measured(results, row)
    there = ", ".join(f"{row.model} (step {row.step})" for row in results.models) or "none"
    raise JobError(
        f"{file} was not measured with {loaded.origin.name} at step {loaded.step}: its models are {there}. Run "
        f"`vfi benchmark --model {loaded.path}`, or leave it out"
    )


def _facts(described: Description) -> Iterator[str]:
    about, model = described.origin, described.model
    differing = [
        f"{field.name} {getattr(model, field.name)}"
        for field in dataclasses.fields(ModelConfig)
        if field.name != "phase" and getattr(model, field.name) != field.default
    ]
    kind = {1: "blends the frames, without flow", 2: "with flow", 3: "with flow, for high resolution"}[model.phase]
    yield "## What it is\n"
    yield "| | |\n| --- | --- |"
    yield f"| phase | {model.phase}: {kind} |"
    yield f"| preset | {about.preset} |"
    yield f"| other than by default | {', '.join(differing) or 'nothing'} |"
    yield f"| weights | of step {about.step:,}{', their running mean' if about.averaged else ''}, kept in {described.dtype} |"
    yield f"| trained on | {', '.join(about.trained_on) or 'not said'} |"
    yield f"| written by | {described.written_by} |\n"


def _training(training: Training) -> Iterator[str]:
    if training == NOT_GIVEN:
        return
    yield "## Training\n"
    if training.recipe:
        yield "\n".join(f"    {line}" for line in training.recipe.splitlines()) + "\n"
    if training.hours is not None:
        yield f"It took {training.hours:g} hours.\n"
    if training.sources:
        yield "| data | source | licence | what |\n| --- | --- | --- | --- |"
        for one in training.sources:
            yield f"| {' | '.join(map(_cell, dataclasses.astuple(one)))} |"
        yield ""


def _cell(text: str) -> str:
    """Escape text for a cell of a Markdown table."""
    return " ".join(text.split()).replace("|", "\\|")


def _results(measured: Sequence[Measured]) -> Iterator[str]:
    if not measured:
        return
    yield "## Results\n"
    for one in measured:
        facts = one.results.protocol | {"precision": one.results.environment.get("precision", "not said")}
        facts.pop("source", None)  # the command that wrote the shards: its arguments name private folders
        yield f"{_what(one.results)}, {one.results.samples} of {one.results.available} samples\n"
        yield "| | PSNR dB | SSIM | IE |\n| --- | --- | --- | --- |"
        for row in (*one.results.rows[: len(BASELINES)], one.row):
            yield f"| {row.model} | {row.psnr:.2f} | {row.ssim:.4f} | {row.ie:.2f} |"
        yield f"\n{'; '.join(f'{name}: {value}' for name, value in facts.items())}.\n"


def _comparison(described: Description, differences: Sequence[Difference]) -> Iterator[str]:
    if not differences:
        return
    yield "## Compared with the original\n"
    yield f"What these files ({described.dtype}) make of moving photographs, beside what the original weights make, in fp32:\n"
    yield "| frames, width x height | largest difference, of 255 | mean difference, of 255 |\n| --- | --- | --- |"
    for one in differences:
        yield f"| {one.frames} | {255 * one.largest:.3g} | {255 * one.mean:.3g} |"
    yield ""


def _what(results: Results) -> str:
    """Name the data: the protocol and its profile, or the name of the shards."""
    facts = results.protocol
    profile = f" ({facts['profile']})" if "profile" in facts else ""
    return f"{facts['protocol']}{profile}" if profile else data_name(results.data)


def _slug(text: str) -> str:
    """Convert a name to the form of the hub's fields."""
    return re.sub(r"[^a-z0-9._-]+", "-", text.lower()).strip("-.")
