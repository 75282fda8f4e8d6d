"""vfi report: tables, a self-contained page that shows the content of the files, and every error."""

import base64
import dataclasses
import io
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import made_results as made
import numpy as np
import pytest
from PIL import Image

from vfi import report
from vfi.evaluation.latency_results import Speed, write_speed
from vfi.evaluation.results import (
    BASELINES,
    FRAME_AVERAGE,
    MOST_CLIPS,
    NEAREST_FRAME,
    ImageScore,
    ResultError,
    Results,
    Row,
    read_results,
    write_results,
)
from vfi.report import main
from vfi.reporting.svg import Series, labelled_chart, line_chart, log_ticks, nice_ticks, scatter_chart, thin

VOID = {"meta", "img", "input", "br", "link", "hr", "wbr"}  # elements of HTML that have no end


class _Page(HTMLParser):
    """Elements and texts of a page; fails for elements that are not closed properly."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str]]] = []
        self.texts: list[str] = []
        self.rows: list[list[list[str]]] = []  # table -> row -> cell
        self.open: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, {name: value or "" for name, value in attrs}))
        if tag not in VOID:
            self.open.append(tag)
        if tag == "table":
            self.rows.append([])
        elif tag == "tr":
            self.rows[-1].append([])
        elif tag in ("td", "th"):
            self.rows[-1][-1].append("")

    def handle_startendtag(self, tag, attrs):
        self.elements.append((tag, {name: value or "" for name, value in attrs}))

    def handle_endtag(self, tag):
        assert self.open, f"</{tag}> without a start"
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data)
        if self.open and self.open[-1] in ("td", "th"):
            self.rows[-1][-1][-1] += data

    def all(self, tag: str, kind: str = "") -> list[dict[str, str]]:
        return [attrs for name, attrs in self.elements if name == tag and kind in ["", *attrs.get("class", "").split(" ")]]


def _report(tmp_path: Path, *contents: Results | Speed, flags: tuple[str, ...] = ()) -> tuple[str, _Page]:
    """Markdown and page of these files and flags."""
    paths = []
    for number, content in enumerate(contents):
        kind = "speed" if isinstance(content, Speed) else "results"
        paths.append(tmp_path / f"{kind}{number}.json")
        write_speed(paths[-1], content) if isinstance(content, Speed) else write_results(paths[-1], content)
    main([*map(str, paths), "--out", str(tmp_path / "report"), *flags])
    text = (tmp_path / "report" / "report.html").read_text(encoding="utf-8")
    return (tmp_path / "report" / "report.md").read_text(encoding="utf-8"), _Page(text)


def _markdown_tables(text: str) -> list[list[list[str]]]:
    tables: list[list[list[str]]] = [[]]
    for line in text.splitlines():
        if line.startswith("|"):
            tables[-1].append([cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]])
        elif tables[-1]:
            tables.append([])
    return [table for table in tables if table]


def test_what_is_written_is_read_back(tmp_path) -> None:
    results = made.results()
    write_results(tmp_path / "r.json", results)
    assert read_results(tmp_path / "r.json") == results
    assert [path.name for path in tmp_path.iterdir()] == ["r.json"]


HEAD = ["Model", "PSNR dB", "Gain dB", "SSIM", "IE ↓", "Better on", "Parameters", "Step", "Precision"]


def test_both_outputs_hold_the_same_numbers(tmp_path) -> None:
    text, page = _report(tmp_path, made.results())
    (table,), (shown,) = _markdown_tables(text), page.rows
    assert table[0] == shown[0] == HEAD
    assert table[2:] == shown[1:]
    assert shown[1:] == [
        ["frame average", "30.00", "", "0.8900", "70.00", "", "", "", ""],
        ["nearest frame", "29.17", "−0.83", "0.8533", "70.83", "1 / 3", "", "", ""],
        ["tiny", "31.83", "+1.83", "0.9167", "68.17", "2 / 3", "1.33 M", "1,200", "fp32"],
    ]
    assert "- codec: png" in text
    assert "\n3 samples, png\n" in text
    assert any("3 samples, png" in piece for piece in page.texts)
    assert [attrs.get("class") for tag, attrs in page.elements if tag == "tr"] == [None, "baseline", "baseline", None]


def test_measures_that_only_some_rows_have_get_their_columns(tmp_path) -> None:
    average, nearest, tiny = made.results().rows
    tiny = dataclasses.replace(tiny, ie=1.0)
    average = dataclasses.replace(average, lpips=0.1234, psnr_moving=21.0)
    tiny = dataclasses.replace(tiny, lpips=0.05, macs=1_234_000_000_000, psnr_of_changes=33.333)
    text, page = _report(tmp_path, made.results(rows=(average, nearest, tiny)), made.results("worse"))
    (table,), shown = _markdown_tables(text), page.rows[0]
    assert table[0] == shown[0] == [*HEAD[:5], "LPIPS ↓", "PSNR moving", "PSNR of changes", *HEAD[5:7], "MACs", *HEAD[7:]]
    assert [line[5:8] + line[10:11] for line in shown[1:]] == [
        ["0.1234", "21.00", "", ""], ["", "", "", ""], ["0.0500", "", "33.33", "1.23 T"], ["", "", "", ""],
    ]  # fmt: skip
    assert "LPIPS: lower is better" in text
    best = [attrs for tag, attrs in page.elements if tag == "td" and attrs.get("class") == "best"]
    assert len(best) == 2 + 2 + 1  # PSNR and SSIM of both models, which are equal, and one IE; one LPIPS is no best


def test_a_model_of_another_repository_chooses_its_precision(tmp_path) -> None:
    other = dataclasses.replace(made.row("my:model", made.AVERAGE), path="my:model", run=None, step=None)
    text, page = _report(tmp_path, made.results(rows=(*made.results().rows, other)))
    for shown in (_markdown_tables(text)[0], page.rows[0]):
        assert [row[-1] for row in shown if row[0] in ("tiny", "my:model")] == ["fp32", "its own"]


def test_psnr_by_motion(tmp_path) -> None:
    values = {FRAME_AVERAGE: 30.0, NEAREST_FRAME: 29.0, "tiny": 33.0}
    rows = tuple(made.row(name, [(psnr + image, 0.9) for image in range(4)]) for name, psnr in values.items())
    text, page = _report(tmp_path, made.results(rows=rows, samples=4, available=4, motion=(3.0, 0.5, 12.345, 1.0)))
    table, shown = _markdown_tables(text)[1], page.rows[1]
    assert table[0] == shown[0] == [
        "Model", "slowest quarter: up to 0.5 px", "second: up to 1 px", "third: up to 3 px", "fastest quarter: up to 12.3 px",
    ]  # fmt: skip
    assert table[2:] == shown[1:]
    assert shown[1] == ["frame average", "31.00", "33.00", "30.00", "32.00"]
    assert [line[0] for line in shown[1:]] == list(values)


def test_without_motion_there_is_no_such_table(tmp_path) -> None:
    text, page = _report(tmp_path, made.results(motion=(1.0, 2.0, 3.0)))  # fewer images than quarters
    assert len(page.rows) == 1
    assert "how far things move" not in text


def _keyed(values: dict[str, float], model: str) -> Row:
    """A row with these keys and their PSNR."""
    row = made.row(model, [(psnr, 0.9) for psnr in values.values()])
    images = tuple(dataclasses.replace(image, key=key) for image, key in zip(row.images, values, strict=True))
    return dataclasses.replace(row, images=images)


def test_psnr_by_clip_and_by_folder_of_clips(tmp_path) -> None:
    values = {"davis__goat-000000": 30.0, "davis__goat-000001": 33.0, "davis__soap-box-000007": 24.0, "film-1000000": 40.0}
    rows = tuple(
        _keyed({key: psnr + gain for key, psnr in values.items()}, model) for gain, model in enumerate((*BASELINES, "a"))
    )
    text, page = _report(tmp_path, made.results("a", rows=rows, samples=4, available=4))
    table, shown = _markdown_tables(text)[1], page.rows[1]
    assert [[cell.replace("\\", "") for cell in line] for line in [table[0], *table[2:]]] == shown
    assert shown == [
        ["Clip", "Samples", *BASELINES, "a"],
        ["davis__*", "3", "29.00", "30.00", "31.00"],
        ["davis__goat", "2", "31.50", "32.50", "33.50"],
        ["davis__soap-box", "1", "24.00", "25.00", "26.00"],
        ["film", "1", "40.00", "41.00", "42.00"],
    ]


@pytest.mark.parametrize(
    "keys",
    [
        ["clip-000000", "clip-000001", "clip-000002"],  # of one clip
        ["a-000000", "b-000000", "sequence_0007"],  # one is of another kind
        [f"clip{number}-000000" for number in range(MOST_CLIPS + 1)],
    ],
    ids=["one clip", "other keys", "many clips"],
)
def test_without_several_clips_there_is_no_such_table(tmp_path, keys) -> None:
    rows = tuple(_keyed(dict.fromkeys(keys, 30.0), model) for model in (*BASELINES, "a"))
    text, page = _report(tmp_path, made.results("a", rows=rows, samples=len(keys), available=len(keys)))
    assert len(page.rows) == 1
    assert "PSNR by clip" not in text


def test_clips_of_one_folder_alone_are_not_summed_up(tmp_path) -> None:
    keys = ["davis__goat-000000", "davis__soapbox-000000"]
    rows = tuple(_keyed(dict.fromkeys(keys, 30.0), model) for model in (*BASELINES, "a"))
    _, page = _report(tmp_path, made.results("a", rows=rows, samples=2, available=2))
    assert [row[0] for row in page.rows[1]] == ["Clip", "davis__goat", "davis__soapbox"]


def test_other_samples_get_a_table_of_their_own(tmp_path) -> None:
    same_set_but_fewer = made.results(
        "c",
        samples=2,
        rows=tuple(
            made.row(name, values[:2])
            for name, values in ((FRAME_AVERAGE, made.AVERAGE), (NEAREST_FRAME, made.NEAREST), ("c", made.BETTER))
        ),
    )
    text, page = _report(
        tmp_path, made.results("a"), made.results("b", sha="b" * 64, data="shards/other"), made.results("d"), same_set_but_fewer
    )
    for tables in (_markdown_tables(text), page.rows):
        models = [[row[0] for row in table if row[0] not in ("Model", "---")] for table in tables]
        assert models == [[*BASELINES, "a", "d"], [*BASELINES, "b"], [*BASELINES, "c"]]


def test_models_of_one_name_are_told_apart_and_a_file_given_twice_counts_once(tmp_path) -> None:
    _, page = _report(tmp_path, made.results("tiny"), made.results("tiny"))
    names = [row[0] for row in page.rows[0][3:]]
    assert names == [f"tiny ({tmp_path / 'results0.json'})", f"tiny ({tmp_path / 'results1.json'})"]
    path = str(tmp_path / "results0.json")
    main([path, path, "--out", str(tmp_path / "twice")])
    assert len(_markdown_tables((tmp_path / "twice" / "report.md").read_text())[0]) == 5


def test_everything_from_files_is_escaped(tmp_path) -> None:
    evil = '"><script>alert(1)</script><img src=x onerror=alert(2)>'
    results = made.results(evil, data=evil, protocol={evil: evil}, environment={evil: evil})
    run = tmp_path / "runs" / "evil"
    run.mkdir(parents=True)
    (run / "config.json").write_text(json.dumps({"x": evil}))
    rows = tuple(dataclasses.replace(row, images=tuple(_evil(i, evil) for i in row.images)) for row in results.rows)
    rows = (*rows[:2], dataclasses.replace(rows[2], run="runs/evil"))
    speed_rows = made.speed_row(evil, 1.0, evil, path=f"runs/{evil}"), made.speed_row(evil, 2.0, precision=evil)
    speed = dataclasses.replace(made.speed(*speed_rows, device=evil), settings={evil: {evil: [evil]}})
    text, page = _report(tmp_path, dataclasses.replace(results, rows=rows), speed)
    assert len(page.all("script")) == 1
    assert page.all("img") == []
    assert not any("onerror" in attrs for _, attrs in page.elements)
    assert page.rows[0][3][0] == evil
    assert any(evil in piece for piece in page.texts)
    assert [len({len(row) for row in table}) for table in _markdown_tables(text)] == [1, 1]
    assert page.rows[1][1][:2] == [evil, evil]
    assert "<script" not in text.replace("\\<", "")


def _evil(image: ImageScore, evil: str) -> ImageScore:
    return dataclasses.replace(image, key=evil + image.key)


def test_the_page_needs_nothing_beside_it(tmp_path) -> None:
    _, page = _report(tmp_path, made.with_picture(tmp_path, (40, 32)))
    for tag, attrs in page.elements:
        assert tag not in ("link", "iframe", "object")
        assert attrs.get("src", "data:").startswith("data:"), attrs
    text = (tmp_path / "report" / "report.html").read_text()
    assert not re.search(r"https?://|url\(|@import", text)
    embedded = [base64.b64decode(img["src"].partition(",")[2]) for img in page.all("img") if "src" in img]
    files = [(tmp_path / f"pictures/{name}.png").read_bytes() for name in ("img0", "truth", "img1", "average", "model0")]
    assert embedded[:5] == files
    assert len(embedded) == 7


def test_a_sample_has_a_slider_that_works_by_keyboard(tmp_path) -> None:
    _, page = _report(tmp_path, made.with_picture(tmp_path, (40, 32)))
    (slider,) = page.all("input")
    assert slider["type"] == "range"
    assert slider["aria-label"]
    chosen = [attrs["value"] for tag, attrs in page.elements if tag == "option" and "selected" in attrs]
    pictures = [img["alt"] for img in page.all("img") if "src" in img]
    assert [pictures[int(value)] for value in chosen] == ["frame average of sample sample-1", "prediction of sample sample-1"]
    assert "+2.50 dB" in page.texts  # 34.5 − 32.0


def test_flow_is_among_the_pictures(tmp_path) -> None:
    _, page = _report(tmp_path, made.with_picture(tmp_path, (40, 32), flow=True))
    pictures = [img for img in page.all("img") if "src" in img]
    assert pictures[-1]["alt"] == "flow of sample sample-1"
    assert base64.b64decode(pictures[-1]["src"].partition(",")[2]) == (tmp_path / "pictures/flow0.png").read_bytes()
    assert [text for text in page.texts if text == "flow"] == ["flow"] * 3  # below the picture, and in both selections
    assert any("Flow leads from" in text for text in page.texts)


def test_large_pictures_are_shrunk(tmp_path) -> None:
    _, page = _report(tmp_path, made.with_picture(tmp_path, (1400, 700)))
    source = next(img["src"] for img in page.all("img") if "src" in img)
    assert source.startswith("data:image/jpeg;base64,")
    assert Image.open(io.BytesIO(base64.b64decode(source.partition(",")[2]))).size == (640, 320)


def test_a_missing_picture_is_an_error(tmp_path, capsys) -> None:
    results = made.with_picture(tmp_path, (40, 32))
    (tmp_path / "pictures" / "truth.png").unlink()
    write_results(tmp_path / "r.json", results)
    assert "truth.png cannot be read" in _refusal(capsys, tmp_path / "r.json", "--out", tmp_path / "report")
    assert not (tmp_path / "report").exists()


def test_curves_come_from_the_run_folder(tmp_path) -> None:
    rows = [{"step": 10 * i, "event": "train", "loss": 1 / (i + 1), "lr": 1e-3} for i in range(8)]
    rows += [{"step": 35, "event": "train", "loss": None}, {"step": 40, "event": "val", "psnr": 30.5, "average_psnr": 30.0}]
    rows += [{"step": 80, "event": "val", "psnr": 31.5, "average_psnr": 30.0}]
    made.write_metrics(tmp_path / "runs" / "tiny", rows, cut_short=True)
    _, page = _report(tmp_path, made.results())
    lines = [line["points"].split() for line in page.all("polyline")]
    assert [len(points) for points in lines] == [8, 2]
    heights = [float(point.split(",")[1]) for point in lines[0]]
    assert heights == sorted(heights)  # a falling loss goes down, and down is a larger y
    steps = np.diff(heights)
    assert steps[0] == pytest.approx(heights[3] - heights[1], abs=0.2)  # log: 1 -> 1/2 looks like 1/2 -> 1/4
    assert len(page.all("line", "rule")) == 2  # diagonal of the scatter, frame average of the validation
    assert not any("run folder is not there" in text for text in page.texts)


def test_without_the_run_folder_the_page_says_so(tmp_path) -> None:
    _, page = _report(tmp_path, made.results())
    assert page.all("polyline") == []
    assert any("run folder is not there" in text for text in page.texts)


def test_scatter_puts_better_images_above_the_diagonal(tmp_path) -> None:
    _, page = _report(tmp_path, made.results())
    points = page.all("circle", "point")
    diagonal = next(line for line in page.all("line", "rule"))
    x1, y1, x2, y2 = (float(diagonal[name]) for name in ("x1", "y1", "x2", "y2"))
    above = [float(p["cy"]) < y1 + (float(p["cx"]) - x1) / (x2 - x1) * (y2 - y1) for p in points]
    assert above == [True, True, False]


def test_speed_files_get_tables_of_their_own(tmp_path) -> None:
    rows = made.speed_row("tiny", 12.345), made.speed_row("other:model", None, factor=8, path=None, parameters=None)
    text, page = _report(tmp_path, made.results(), made.speed(*rows), made.speed(made.speed_row("tiny", 1.0), device="CPU"))
    table, shown = _markdown_tables(text)[1], page.rows[1]
    assert table[0] == shown[0] == [
        "Model", "Size", "Rate", "ms", "p90 ms", "Ratio", "Frames/s",
        "GiB allocated", "GiB reserved", "Precision", "Parameters",
    ]  # fmt: skip
    assert table[2:] == shown[1:] == [
        ["tiny", "736x1280", "×2", "12.35", "13.58", "1.23", "81.0", "2.00", "4.00", "bf16", "1.33 M"],
        ["other:model", "736x1280", "×8", "out of memory", "", "", "", "", "", "bf16", ""],
    ]  # fmt: skip
    assert len(page.rows) == len(_markdown_tables(text)) == 3
    assert text.count("## Speed") == 1
    assert "- packages: torch 2.11\n- cuda: none" in text
    assert {"timed calls", "10", "torch 2.11", "no"} <= set(page.texts)
    assert "1 model on 1 data set, speed of 2 models, measured 2026-01-02 to 2026-01-03" in page.texts


def test_a_report_of_speed_alone(tmp_path) -> None:
    text, page = _report(tmp_path, made.speed(made.speed_row("tiny", 1.0, allocated=None, reserved=None, ratio=None)))
    assert [len(table) for table in (_markdown_tables(text)[0], page.rows[0])] == [3, 2]
    assert page.rows[0][0] == ["Model", "Size", "Rate", "ms", "p90 ms", "Frames/s", "Precision", "Parameters"]
    assert page.all("svg") == []


def _speed_points(page: _Page) -> dict[str, tuple[float, float]]:
    """Name -> place of the points of speed against quality."""
    names = [text.rpartition(": ")[0] for text in page.texts if " ms, " in text]
    points = [(float(point["cx"]), float(point["cy"])) for point in page.all("circle") if point["r"] == "4.5"]
    return dict(zip(names, points, strict=True))


def test_speed_against_quality_joins_by_path_then_by_name(tmp_path) -> None:
    average, nearest, tiny = made.results().rows
    better = made.row("better", [(psnr + 1, ssim) for psnr, ssim in made.BETTER])
    adapter = made.row("my:model", made.AVERAGE, path="my:model")
    results = made.results(rows=(average, nearest, tiny, better, adapter, made.row("untimed", made.AVERAGE)))
    rows = [made.speed_row("another name", 10.0, path="runs/tiny"), made.speed_row("better", 100.0, path="/elsewhere/better"),
            made.speed_row("tiny", 1.0, path="runs/other"), made.speed_row("my:model", 31.62, path=None),
            made.speed_row("better", 90.0, factor=8)]  # fmt: skip
    _, page = _report(tmp_path, results, made.speed(*rows))
    points = _speed_points(page)
    assert set(points) == {"tiny", "better", "my:model"}
    (left, low), (right, high), (middle, lowest) = (points[name] for name in ("tiny", "better", "my:model"))
    assert high < low < lowest  # y grows downwards
    assert middle - left == pytest.approx(right - middle, abs=0.2)  # 10, √1000, 100: log
    (note,) = [text for text in page.texts if text.startswith("Up and to the left")]
    assert "736x1280 on NVIDIA H100" in note


def test_speed_against_quality_takes_the_size_that_most_models_have(tmp_path) -> None:
    average, nearest, tiny = made.results().rows
    results = made.results(rows=(average, nearest, tiny, made.row("better", made.BETTER)))

    def size(*rows) -> str:
        _, page = _report(tmp_path, results, made.speed(*(made.speed_row(*one) for one in rows)))
        return next((text for text in page.texts if text.startswith("Up and to")), "").partition(" of ")[2].partition(" on ")[0]

    both = [(name, 9.0, at) for at in ("256x448", "736x1280", "1088x1920") for name in ("tiny", "better")]
    assert size(*both).endswith(" 736x1280")
    assert size(*both[1:3], *both[4:]).endswith(" 1088x1920")
    assert size(*both[:2], ("tiny", 9.0, "736x1280"), ("better", None, "736x1280")).endswith(" 256x448")
    assert size(("tiny", None, "736x1280"), ("unknown", 1.0, "736x1280")) == ""


def test_gates_are_a_section_and_an_exit_code(tmp_path) -> None:
    protocol = {"protocol": "vimeo90k", "profile": "ema", "TTA": "none", "frame set": "all samples"}
    rows = made.results().rows
    good = dataclasses.replace(rows[2], psnr=35.2, ssim=0.9)
    with pytest.raises(SystemExit) as stop:
        _report(tmp_path, made.results(protocol=protocol, rows=(*rows[:2], good)), flags=("--gate", "phase1"))
    assert stop.value.code == 1
    page = _Page((tmp_path / "report" / "report.html").read_text())
    text = (tmp_path / "report" / "report.md").read_text()
    table, shown = _markdown_tables(text)[0], page.rows[0]
    assert table[2:] == [[cell.replace("_", "\\_") for cell in row] for row in shown[1:]]
    assert shown[0] == ["Verdict", "Gate", "Why"]
    assert shown[1] == ["passed", "vimeo90k PSNR at least 35 dB", "tiny has 35.20 (target 35.5)"]
    assert shown[2] == ["NOT passed", "vimeo90k SSIM at least 0.975", "tiny has 0.9000"]
    assert shown[3][:2] == ["not measured", "vimeo90k_septuplet_147 PSNR reported"]
    assert "## Gate phase1" in text
    assert "1 of 7 passed, 5 not measured." in page.texts


def test_what_lies_beyond_published_models_is_said(tmp_path) -> None:
    with pytest.raises(SystemExit):
        _report(tmp_path, made.results(), flags=("--gate", "phase2"))
    for file in ("report.md", "report.html"):
        assert "no published model passes it (best: 25.79)" in (tmp_path / "report" / file).read_text()


def test_an_ablation_is_a_section(tmp_path, monkeypatch) -> None:
    made_table = "| experiment | what | PSNR dB |\n| --- | --- | ---: |\n| Exp-1a | mamba2_only | - |\n\nOne note.\nAnother."
    monkeypatch.setattr(report, "ablation_table", lambda folder, name: f"{made_table} {folder} {name}")
    text, page = _report(tmp_path, made.results(), flags=("--ablation", "phase1", "--output_dir", "somewhere"))
    assert page.rows[1] == [["experiment", "what", "PSNR dB"], ["Exp-1a", "mamba2_only", "-"]]
    assert _markdown_tables(text)[1][1:] == [["---", "---", "---:"], ["Exp-1a", "mamba2\\_only", "-"]]
    assert "One note. Another. somewhere phase1" in page.texts
    assert "## Ablation phase1" in text


def test_labels_of_points_side_by_side_make_room_for_each_other() -> None:
    series = [Series(name, [(10.0, 30.0, "")]) for name in ("a", "b", "a long name that no chart has room for")]
    svg = labelled_chart("t", series, "x", "y")
    heights = sorted(float(y) for y in re.findall(r'class="name" x="[\d.]+" y="([\d.]+)"', svg))
    assert np.diff(heights).min() >= 12
    assert "a long name that no cha…" in svg
    assert "nan" not in svg


def test_ticks_are_round_and_inside() -> None:
    assert nice_ticks(0, 10, 5) == [0, 2, 4, 6, 8, 10]
    assert nice_ticks(29.7, 31.2, 4) == [30.0, 30.5, 31.0]
    assert log_ticks(0.015, 0.3) == pytest.approx([0.02, 0.05, 0.1, 0.2])
    assert log_ticks(1e-4, 1.0) == pytest.approx([1e-4, 1e-3, 1e-2, 1e-1, 1])


def test_charts_of_a_single_point_and_of_equal_values_are_drawn() -> None:
    for log in (False, True):
        svg = line_chart("t", [Series("a", [(5, 2.0, "")])], "x", "y", log=log)
        assert "nan" not in svg
        assert svg.count("<circle") == 1
    assert "nan" not in scatter_chart("t", [Series("a", [(3, 3, "")])], "x", "y")


def test_thinning_keeps_range_and_mean() -> None:
    points = [(float(i), float(i % 7), "") for i in range(5000)]
    few = thin(points)
    assert len(few) <= 300
    assert few[-1] == points[-1]
    assert np.mean([y for _, y, _ in few]) == pytest.approx(3, abs=0.1)
    assert thin(points[:300]) == points[:300]


def _refusal(capsys, *arguments: object) -> str:
    with pytest.raises(SystemExit) as stop:
        main([str(argument) for argument in arguments])
    assert stop.value.code == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("error: ")
    return line


def test_files_that_are_no_results_are_refused_by_what_they_are(tmp_path, capsys) -> None:
    def refused(name: str, text: str) -> str:
        (tmp_path / name).write_text(text)
        return _refusal(capsys, tmp_path / name, "--out", tmp_path / "report")

    assert "does not exist" in _refusal(capsys, tmp_path / "none.json", "--out", tmp_path / "report")
    assert "is a folder" in _refusal(capsys, tmp_path, "--out", tmp_path / "report")
    assert "not JSON" in refused("a.json", "# report")
    assert "config.json of a run" in refused("b.json", json.dumps({"run": {}, "data": {}, "optim": {}, "model": {}}))
    assert "'vfi-shards'" in refused("c.json", json.dumps({"schema": "vfi-shards", "version": 1}))
    assert "JSON list" in refused("d.json", "[1, 2]")
    assert "version 99" in refused("e.json", json.dumps({"schema": "vfi-results", "version": 99}))
    assert "out is a file" not in refused("f.json", "{}")
    assert not (tmp_path / "report").exists()


def test_damaged_results_are_refused_by_place(tmp_path) -> None:
    path = tmp_path / "r.json"
    write_results(path, made.results())
    whole = json.loads(path.read_text())

    def problem(change) -> str:
        content = json.loads(json.dumps(whole))
        change(content)
        path.write_text(json.dumps(content))
        with pytest.raises(ResultError) as refused:
            read_results(path)
        return str(refused.value)

    assert "rows[1]: psnr is 'high'" in problem(lambda c: c["rows"][1].update(psnr="high"))
    assert "rows[1]: psnr is True" in problem(lambda c: c["rows"][1].update(psnr=True))
    assert "ssim" in problem(lambda c: c["rows"][0]["images"][2].pop("ssim"))
    assert "surprise" in problem(lambda c: c.update(surprise=1))
    assert "rows is {}" in problem(lambda c: c.update(rows={}))
    assert "frame average" in problem(lambda c: c.update(rows=c["rows"][1:]))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c["rows"][2].update(model="renamed"), "the picture 'sample-1' is of the model 'tiny', and the rows are"),
        (lambda c: c["rows"].append(c["rows"][2]), "two rows are called 'tiny'"),
        (lambda c: c["rows"][2]["images"].pop(), "row 'tiny' has other images than 'frame average'"),
        (lambda c: c["rows"][1]["images"][0].update(key="x"), "row 'nearest frame' has other images than 'frame average'"),
        (lambda c: c["pictures"][0].update(key="sample-9"), "no image has the key 'sample-9' of a picture"),
        (lambda c: c["pictures"][0].update(predictions={}), "the picture 'sample-1' shows no model"),
        (lambda c: c["pictures"][0]["flows"].update(other="a.png"), "is of the model 'other'"),
        (lambda c: c.update(motion=[1.0]), "it has the motion of 1 images, and 3 images"),
        (lambda c: c["protocol"].update(profile="rife"), "its protocol has no 'TTA'"),
    ],
)
def test_results_whose_names_do_not_fit_together_are_refused(change, message, tmp_path, capsys) -> None:
    """As after an edit by hand."""
    path = tmp_path / "r.json"
    write_results(path, made.with_picture(tmp_path, (8, 8)))
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))
    line = _refusal(capsys, path, "--out", tmp_path / "report")
    assert f"{path} does not fit together: " in line
    assert message in line


def test_files_of_one_set_with_other_images_are_refused(tmp_path, capsys) -> None:
    write_results(tmp_path / "a.json", made.results())
    text = (tmp_path / "a.json").read_text()
    (tmp_path / "b.json").write_text(text.replace("sample-2", "sample-9"))
    line = _refusal(capsys, tmp_path / "a.json", tmp_path / "b.json", "--out", tmp_path / "report")
    assert f"{tmp_path / 'b.json'} and {tmp_path / 'a.json'} state the same samples and have other images" in line


def test_out_and_missing_arguments(tmp_path, capsys) -> None:
    write_results(tmp_path / "r.json", made.results())
    assert "is a file" in _refusal(capsys, tmp_path / "r.json", "--out", tmp_path / "r.json")
    assert "no results file was given" in _refusal(capsys, "--out", tmp_path / "report")


def test_a_part_of_a_set_is_said_beside_the_table(tmp_path):
    whole = {"protocol": "ucf101", "profile": "rife", "TTA": "none", "frame set": "all samples"}
    part = whole | {"frame set": "all samples; NOT COMPARABLE: 3 of 379 samples"}
    for facts, words in ((whole, "3 samples"), (part, "3 samples, NOT COMPARABLE: 3 of 379 samples")):
        text, page = _report(tmp_path, made.results(protocol=facts))
        assert f"\n{words}\n" in text
        assert words in page.texts
