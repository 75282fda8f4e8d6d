"""vfi report: tables, a page that stands alone and shows what the files say, and every refusal."""

import base64
import dataclasses
import io
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vfi.charts import Series, line_chart, log_ticks, nice_ticks, scatter_chart, thin
from vfi.report import main
from vfi.results import FRAME_AVERAGE, ImageScore, Picture, ResultError, Results, Row, read_results, write_results

VOID = {"meta", "img", "input", "br", "link", "hr"}  # elements of HTML that have no end


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


def _row(model: str, values: list[tuple[float, float]], run: str | None = None) -> Row:
    images = tuple(ImageScore(f"sample-{i}", psnr, ssim, 100 - psnr) for i, (psnr, ssim) in enumerate(values))
    mean = [float(np.mean(column)) for column in zip(*values, strict=True)]
    if model == FRAME_AVERAGE:
        return Row(model, None, None, None, None, None, None, mean[0], mean[1], 100 - mean[0], images)
    return Row(
        model, f"runs/{model}", run or f"runs/{model}", 1200, 1_330_000, "tiny", 1, mean[0], mean[1], 100 - mean[0], images
    )


AVERAGE = [(30.0, 0.9), (32.0, 0.92), (28.0, 0.85)]
BETTER = [(33.5, 0.95), (34.5, 0.96), (27.5, 0.84)]


def _results(model: str = "tiny", sha: str = "a" * 64, data: str = "shards/val", **changes) -> Results:
    rows = (_row(FRAME_AVERAGE, AVERAGE), _row(model, BETTER))
    environment = {"precision": "fp32", "created": "2026-01-02T03:04:05+00:00", "device": "CPU"}
    return dataclasses.replace(
        Results(data, sha, 3, 3, {"protocol": "shards", "codec": "png"}, environment, rows, ()), **changes
    )


def _report(tmp_path: Path, *results: Results) -> tuple[str, _Page]:
    paths = []
    for number, content in enumerate(results):
        paths.append(tmp_path / f"results{number}.json")
        write_results(paths[-1], content)
    main([*map(str, paths), "--out", str(tmp_path / "report")])
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
    results = _results()
    write_results(tmp_path / "r.json", results)
    assert read_results(tmp_path / "r.json") == results
    assert [path.name for path in tmp_path.iterdir()] == ["r.json"]


def test_tables_hold_the_numbers(tmp_path) -> None:
    text, page = _report(tmp_path, _results())
    (table,) = _markdown_tables(text)
    assert table[2] == ["frame average", "", "", "30.00", "0.8900", "70.00", "", "", "3", "shards/val"]
    assert table[3] == ["tiny", "1.33 M", "1200", "31.83", "0.9167", "68.17", "+1.83", "2 / 3", "3", "shards/val"]
    assert "- codec: png" in text
    (shown,) = page.rows
    assert shown[1] == ["frame average", "30.00", "", "0.8900", "", "", "", ""]
    assert shown[2] == ["tiny", "31.83", "+1.83", "0.9167", "2 / 3", "1.33 M", "1,200", "fp32"]


def test_other_samples_get_a_table_of_their_own(tmp_path) -> None:
    same_set_but_fewer = _results("c", samples=2, rows=(_row(FRAME_AVERAGE, AVERAGE[:2]), _row("c", BETTER[:2])))
    text, page = _report(
        tmp_path, _results("a"), _results("b", sha="b" * 64, data="shards/other"), _results("d"), same_set_but_fewer
    )
    for tables in (_markdown_tables(text), page.rows):
        models = [[row[0] for row in table if row[0] not in ("model", "Model", "---")] for table in tables]
        assert models == [["frame average", "a", "d"], ["frame average", "b"], ["frame average", "c"]]


def test_models_of_one_name_are_told_apart_and_a_file_given_twice_counts_once(tmp_path) -> None:
    _, page = _report(tmp_path, _results("tiny"), _results("tiny"))
    names = [row[0] for row in page.rows[0][2:]]
    assert names == [f"tiny ({tmp_path / 'results0.json'})", f"tiny ({tmp_path / 'results1.json'})"]
    path = str(tmp_path / "results0.json")
    main([path, path, "--out", str(tmp_path / "twice")])
    assert len(_markdown_tables((tmp_path / "twice" / "report.md").read_text())[0]) == 4


def test_everything_from_files_is_escaped(tmp_path) -> None:
    evil = '"><script>alert(1)</script><img src=x onerror=alert(2)>'
    results = _results(evil, data=evil, protocol={evil: evil}, environment={evil: evil})
    run = tmp_path / "runs" / "evil"
    run.mkdir(parents=True)
    (run / "config.json").write_text(json.dumps({"x": evil}))
    rows = tuple(dataclasses.replace(row, images=tuple(_evil(i, evil) for i in row.images)) for row in results.rows)
    rows = (rows[0], dataclasses.replace(rows[1], run="runs/evil"))
    text, page = _report(tmp_path, dataclasses.replace(results, rows=rows))
    assert len(page.all("script")) == 1
    assert page.all("img") == []
    assert not any("onerror" in attrs for _, attrs in page.elements)
    assert page.rows[0][2][0] == evil
    assert any(evil in piece for piece in page.texts)
    (table,) = _markdown_tables(text)
    assert len({len(row) for row in table}) == 1
    assert "<script" not in text.replace("\\<", "")


def _evil(image: ImageScore, evil: str) -> ImageScore:
    return dataclasses.replace(image, key=evil + image.key)


def _with_picture(folder: Path, size: tuple[int, int], model: str = "tiny") -> Results:
    rng = np.random.default_rng(0)
    names = ("img0", "img1", "truth", "average", "average_error", "model0", "error0")
    (folder / "pictures").mkdir(exist_ok=True)
    for name in names:
        Image.fromarray(rng.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)).save(folder / f"pictures/{name}.png")
    file = {name: f"pictures/{name}.png" for name in names}
    frames = [file[name] for name in names[:5]]
    picture = Picture("sample-1", 2, 3, *frames, predictions={model: file["model0"]}, errors={model: file["error0"]})
    return _results(model, pictures=(picture,))


def test_the_page_needs_nothing_beside_it(tmp_path) -> None:
    _, page = _report(tmp_path, _with_picture(tmp_path, (40, 32)))
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
    _, page = _report(tmp_path, _with_picture(tmp_path, (40, 32)))
    (slider,) = page.all("input")
    assert slider["type"] == "range"
    assert slider["aria-label"]
    chosen = [attrs["value"] for tag, attrs in page.elements if tag == "option" and "selected" in attrs]
    pictures = [img["alt"] for img in page.all("img") if "src" in img]
    assert [pictures[int(value)] for value in chosen] == ["frame average of sample sample-1", "prediction of sample sample-1"]
    assert "+2.50 dB" in page.texts  # 34.5 − 32.0


def test_large_pictures_are_shrunk(tmp_path) -> None:
    _, page = _report(tmp_path, _with_picture(tmp_path, (1400, 700)))
    source = next(img["src"] for img in page.all("img") if "src" in img)
    assert source.startswith("data:image/jpeg;base64,")
    assert Image.open(io.BytesIO(base64.b64decode(source.partition(",")[2]))).size == (640, 320)


def test_a_missing_picture_is_an_error(tmp_path, capsys) -> None:
    results = _with_picture(tmp_path, (40, 32))
    (tmp_path / "pictures" / "truth.png").unlink()
    write_results(tmp_path / "r.json", results)
    assert "truth.png cannot be read" in _refusal(capsys, tmp_path / "r.json", "--out", tmp_path / "report")
    assert not (tmp_path / "report").exists()


def test_curves_come_from_the_run_folder(tmp_path) -> None:
    run = tmp_path / "runs" / "tiny"
    run.mkdir(parents=True)
    rows = [{"step": 10 * i, "event": "train", "loss": 1 / (i + 1), "lr": 1e-3} for i in range(8)]
    rows += [{"step": 35, "event": "train", "loss": None}, {"step": 40, "event": "val", "psnr": 30.5, "average_psnr": 30.0}]
    rows += [{"step": 80, "event": "val", "psnr": 31.5, "average_psnr": 30.0}]
    (run / "metrics.jsonl").write_text("\n".join(map(json.dumps, rows)) + '\n{"step": 90, "ev')
    _, page = _report(tmp_path, _results())
    lines = [line["points"].split() for line in page.all("polyline")]
    assert [len(points) for points in lines] == [8, 2]
    heights = [float(point.split(",")[1]) for point in lines[0]]
    assert heights == sorted(heights)  # a falling loss goes down, and down is a larger y
    steps = np.diff(heights)
    assert steps[0] == pytest.approx(heights[3] - heights[1], abs=0.2)  # log: 1 -> 1/2 looks like 1/2 -> 1/4
    assert len(page.all("line", "rule")) == 2  # diagonal of the scatter, frame average of the validation
    assert not any("run folder is not there" in text for text in page.texts)


def test_without_the_run_folder_the_page_says_so(tmp_path) -> None:
    _, page = _report(tmp_path, _results())
    assert page.all("polyline") == []
    assert any("run folder is not there" in text for text in page.texts)


def test_scatter_puts_better_images_above_the_diagonal(tmp_path) -> None:
    _, page = _report(tmp_path, _results())
    points = page.all("circle", "point")
    diagonal = next(line for line in page.all("line", "rule"))
    x1, y1, x2, y2 = (float(diagonal[name]) for name in ("x1", "y1", "x2", "y2"))
    above = [float(p["cy"]) < y1 + (float(p["cx"]) - x1) / (x2 - x1) * (y2 - y1) for p in points]
    assert above == [True, True, False]


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
    write_results(path, _results())
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


def test_out_and_missing_arguments(tmp_path, capsys) -> None:
    write_results(tmp_path / "r.json", _results())
    assert "is a file" in _refusal(capsys, tmp_path / "r.json", "--out", tmp_path / "r.json")
    assert "no results file was given" in _refusal(capsys, "--out", tmp_path / "report")
