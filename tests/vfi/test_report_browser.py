"""The report's page in Chromium, from a file: it needs no network, works by mouse and by keyboard, and fits a phone."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import made_results as made
import pytest
from playwright.sync_api import Browser, Locator, Page

from vfi.evaluation.results import FRAME_AVERAGE, NEAREST_FRAME, Results, group_by_data
from vfi.report import write
from vfi.reporting import acceptance
from vfi.reporting.html_page import Content
from vfi.reporting.tables import from_markdown, gate_table

ABLATION = "| experiment | what is different | PSNR dB |\n| --- | --- | ---: |\n| Exp-1a | mamba2_only | 25.00 |\n\nA note."
pytestmark = pytest.mark.browser


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A page with everything that a report can hold."""
    folder = tmp_path_factory.mktemp("report")
    results, path = _results(folder), folder / "r.json"
    speed = made.speed(
        *(made.speed_row(name, ms) for name, ms in (("tiny", 12.0), ("big", None), ("odd/name:of_a_model", 9.0))),
        *(made.speed_row(name, ms, "2176x4096") for name, ms in (("tiny", 120.5), ("big", 1150.0))),
    )
    content = Content(
        group_by_data({path: results, folder / "other.json": made.results("other", sha="b" * 64, data="shards/other")}),
        {folder / "speed.json": speed},
        gate_table("phase2", acceptance.check("phase2", [results], [speed])),
        from_markdown("Ablation phase1", ABLATION),
    )
    return write(content, folder / "out")[1]


def _results(folder: Path) -> Results:
    """Four images, two pictures; one model has everything, another lacks what some models have not."""
    made.write_metrics(folder / "runs" / "tiny", [{"step": i, "event": "train", "loss": 1 / i} for i in range(1, 50)])
    pictured = made.with_picture(folder, (40, 32), flow=True)
    values = {FRAME_AVERAGE: 30.0, NEAREST_FRAME: 28.5, "tiny": 31.0, "big": 33.0, "odd/name:of_a_model": 9.5}
    rows = {name: made.row(name, [(psnr + image, psnr / 100) for image in range(4)]) for name, psnr in values.items()}
    rows["tiny"] = dataclasses.replace(rows["tiny"], lpips=0.2, macs=88_400_000_000, parameters=950_000)
    rows["big"] = dataclasses.replace(rows["big"], lpips=0.1, psnr_of_changes=35.0, parameters=48_100_000, step=12_000)
    (picture,) = pictured.pictures
    return dataclasses.replace(
        pictured, rows=tuple(rows.values()), samples=4, available=4, motion=(4.0, 1.0, 2.0, 3.0),
        pictures=(picture, dataclasses.replace(picture, key="sample-2", rank=3)),
    )  # fmt: skip


@pytest.fixture
def page(browser: Browser, report: Path) -> Iterator[Page]:
    """The page on a desktop. Nothing may go wrong in it, and nothing may be asked of the network."""
    yield from _open(browser, report, width=1280)


@pytest.fixture
def phone(browser: Browser, report: Path) -> Iterator[Page]:
    yield from _open(browser, report, width=360)


def _open(browser: Browser, report: Path, width: int) -> Iterator[Page]:
    context = browser.new_context(viewport={"width": width, "height": 740})
    page, said, asked = context.new_page(), [], []
    page.set_default_timeout(5000)
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on("request", lambda request: asked.append(request.url))
    page.goto(report.as_uri())
    yield page
    context.close()
    assert said == []
    assert {url for url in asked if not url.startswith("data:")} == {report.as_uri()}


def test_all_that_the_page_holds_is_shown(page: Page) -> None:
    titles = ["Gate phase2", "shards/val", "shards/other", "Speed", "Ablation phase1"]
    assert page.locator("h2").all_inner_texts() == titles
    assert page.locator("nav a").all_inner_texts() == titles
    for image in page.locator("img").all():
        assert image.evaluate("image => image.complete && image.naturalWidth") == 40
    captions = page.locator(".charts figcaption").all_inner_texts()
    assert captions == ["PSNR of each image", "Training loss", "Speed against quality", "PSNR of each image"]
    assert page.locator("svg .name").all_text_contents() == ["odd/name:of_a_model", "tiny"]  # big has no memory for it
    page.locator("nav a").last.click()
    assert page.evaluate("scrollY") > 0


def _cut(page: Page) -> str:
    """How much of the upper picture is cut away at its left."""
    style: str = page.locator(".stage img").nth(1).evaluate("image => getComputedStyle(image).clipPath")
    return style.removeprefix("inset(0px 0px 0px ").removesuffix(")")


def test_the_slider_moves_by_keyboard(page: Page) -> None:
    slider = page.locator("input[type=range]").first
    assert _cut(page) == "50%"
    slider.focus()
    for key, cut in (("ArrowRight", "51%"), ("ArrowRight", "52%"), ("ArrowLeft", "51%"), ("Home", "0%"), ("End", "100%")):
        page.keyboard.press(key)
        assert (_cut(page), slider.input_value() + "%") == (cut, cut)


def test_the_slider_moves_by_mouse(page: Page) -> None:
    slider, stage = page.locator("input[type=range]").first, page.locator(".stage").first
    stage.scroll_into_view_if_needed()
    _drag(page, slider, 0.5, 0.9)
    assert float(_cut(page).rstrip("%")) == pytest.approx(90, abs=2)
    _drag(page, stage, 0.9, 0.25)  # in the picture itself, too
    assert float(_cut(page).rstrip("%")) == pytest.approx(25, abs=1)
    assert float(slider.input_value()) == pytest.approx(25, abs=1)
    border = stage.evaluate("stage => getComputedStyle(stage, '::after').left")
    assert float(border.removesuffix("px")) == pytest.approx(0.25 * stage.bounding_box()["width"], abs=4)
    assert page.locator("input[type=range]").nth(1).input_value() == "50"  # that of the other sample


def _drag(page: Page, what: Locator, start: float, end: float) -> None:
    """From one fraction of its width to another."""
    box = what.bounding_box()
    page.mouse.move(box["x"] + start * box["width"], box["y"] + box["height"] / 2)
    page.mouse.down()
    page.mouse.move(box["x"] + end * box["width"], box["y"] + box["height"] / 2, steps=5)
    page.mouse.up()


def test_other_pictures_can_be_chosen(page: Page) -> None:
    sample = page.locator(".sample").first
    names = ["first frame", "truth", "last frame", FRAME_AVERAGE, "prediction", f"error of {FRAME_AVERAGE}",
             "error of prediction", "flow"]  # fmt: skip
    for side in (0, 1):
        select, shown = sample.locator("select").nth(side), sample.locator(".stage img").nth(side)
        assert select.locator("option").all_text_contents() == names
        for name in ("flow", "truth"):
            select.select_option(label=name)
            source = sample.get_by_alt_text(f"{name} of sample sample-1", exact=True)
            assert shown.get_attribute("src") == source.last.get_attribute("src")
            assert shown.get_attribute("alt") == f"{name} of sample sample-1"


def _column(table: Locator, head: str) -> list[str]:
    number = table.locator("th").all_inner_texts().index(head)
    return table.locator(f"tbody td:nth-child({number + 1})").all_inner_texts()


COLUMNS = {
    "PSNR dB": ["34.50", "32.50", "31.50", "30.00", "11.00"],
    "Gain dB": ["+3.00", "+1.00", "−1.50", "−20.50", ""],
    "LPIPS ↓": ["0.2000", "0.1000", "", "", ""],
    "Better on": ["4 / 4", "4 / 4", "0 / 4", "0 / 4", ""],
    "Parameters": ["48.1 M", "1.33 M", "950 k", "", ""],
    "Step": ["12,000", "1,200", "1,200", "", ""],
}


def test_tables_sort_by_click(page: Page) -> None:
    table = page.get_by_role("region", name="Results").first.locator("table")
    for head, falling in COLUMNS.items():
        known = [text for text in falling if text]
        rising = known[::-1] + falling[len(known) :]  # empty cells stay below
        for expected, order in ((falling, "descending"), (rising, "ascending"), (falling, "descending")):
            table.get_by_role("button", name=head, exact=True).click()
            assert _column(table, head) == expected
            assert table.locator("th[aria-sort]").all_inner_texts() == [head]
            assert table.locator("th[aria-sort]").get_attribute("aria-sort") == order


def test_tables_sort_by_keyboard(page: Page) -> None:
    table = page.get_by_role("region", name="Results").first.locator("table")
    names = ["big", FRAME_AVERAGE, NEAREST_FRAME, "odd/name:of_a_model", "tiny"]
    table.get_by_role("button", name="Model").focus()
    for key, expected in (("Enter", names), ("Space", names[::-1])):
        page.keyboard.press(key)
        assert _column(table, "Model") == expected
    page.keyboard.press("Tab")
    page.keyboard.press("Enter")
    assert _column(table, "Model") == ["big", "tiny", FRAME_AVERAGE, NEAREST_FRAME, "odd/name:of_a_model"]
    assert table.locator(".baseline td:first-child").all_inner_texts() == [FRAME_AVERAGE, NEAREST_FRAME]  # still grey


def test_other_tables_sort_too(page: Page) -> None:
    speed = page.get_by_role("region", name="Speed").locator("table")
    speed.get_by_role("button", name="ms", exact=True).click()
    assert _column(speed, "ms") == ["1150.00", "120.50", "12.00", "9.00", "out of memory"]
    speed.get_by_role("button", name="Size").click()
    assert _column(speed, "Size") == ["736x1280"] * 3 + ["2176x4096"] * 2
    gate = page.get_by_role("region", name="Gate phase2").locator("table")
    gate.get_by_role("button", name="Verdict").click()
    verdicts = _column(gate, "Verdict")
    assert verdicts == sorted(verdicts)
    assert len(verdicts) == len(acceptance.GATES["phase2"])


def test_everything_is_reached_by_keyboard_and_shows_its_focus(page: Page) -> None:
    reached = []
    for _ in range(250):
        page.keyboard.press("Tab")
        found = page.evaluate(
            "() => { const e = document.activeElement, style = getComputedStyle(e); return {tag: e.tagName, text: e.innerText,"
            " outline: e === document.body || style.outlineStyle !== 'none' && parseFloat(style.outlineWidth) >= 2} }"
        )
        if found["tag"] == "BODY":
            break
        assert found["outline"], found
        reached.append((found["tag"], found["text"]))
    tags = [tag for tag, _ in reached]
    assert {"A", "BUTTON", "DIV", "SUMMARY", "INPUT", "SELECT"} - set(tags) <= {"SUMMARY"}
    assert tags.count("INPUT") == 2
    assert tags.count("BUTTON") == page.locator("th").count()
    at = tags.index("INPUT")
    assert tags[at : at + 3] == ["INPUT", "SELECT", "SELECT"]
    assert [text for tag, text in reached if tag == "BUTTON"][:3] == ["Verdict", "Gate", "Why"]


def test_nothing_is_wider_than_a_phone(phone: Page) -> None:
    phone.get_by_role("button", name="PSNR dB", exact=True).first.click()
    assert phone.evaluate("document.documentElement.scrollWidth <= innerWidth")
    outside = phone.evaluate(
        "[...document.querySelectorAll('body *')].filter(e => !e.closest('.scroll *, svg *')"
        " && e.getBoundingClientRect().right > innerWidth).map(e => e.outerHTML.slice(0, 80))"
    )
    assert outside == []
    table = phone.get_by_role("region", name="Results").first
    assert table.evaluate("region => region.scrollWidth > region.clientWidth")  # it scrolls within its own box
    stage = phone.locator(".stage").first.bounding_box()
    assert stage["width"] == pytest.approx(328, abs=2)


def test_without_scripts_everything_is_there_but_what_needs_them(browser: Browser, report: Path) -> None:
    context = browser.new_context(java_script_enabled=False)
    page = context.new_page()
    page.goto(report.as_uri())
    assert page.locator(".strip img").first.is_visible()
    assert not page.locator(".compare").first.is_visible()
    assert page.locator("th button").count() == 0
    context.close()
