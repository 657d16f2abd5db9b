"""The page in a real browser: it runs without a complaint, sorts, and fits any screen."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image

from anchorpatch.report.page import ReportConfig, run
from tests.report.browser import Browser, chromium
from tests.report.samples import sheet, write_all

FIRST = "document.querySelector('table')"
TABLE_3 = "[...document.querySelectorAll('table')].find(t => t.caption.innerText == {!r})"


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = write_all(tmp_path_factory.mktemp("all"))
    sheet(900, 700).save(root / "figures" / "patches.png")  # goes into the page as WebP
    return run(ReportConfig(root)).report.resolve()


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    program = chromium()
    if program is None:
        pytest.skip("needs Chromium on PATH (Debian: apt-get install chromium)")
    found = Browser(program, tmp_path_factory.mktemp("profile"))
    yield found
    found.close()


@pytest.fixture
def shown(browser: Browser, page: Path) -> Browser:
    browser.width(1200)
    browser.media()
    browser.open(page)
    return browser


def column(browser: Browser, table: str, index: int) -> list[str]:
    """The texts of a column, without the row of totals."""
    return browser.run(f"[...{table}.tBodies[0].rows].map(row => row.cells[{index}].innerText)")


def test_it_loads_without_a_complaint_or_a_request(shown: Browser, page: Path) -> None:
    pictures = shown.run("[...document.images].map(i => [i.complete, i.naturalWidth])")
    assert pictures == [[True, 900], [True, 96]]
    assert shown.told("Log.entryAdded") == []
    assert shown.told("Runtime.consoleAPICalled") == []
    assert shown.told("Runtime.exceptionThrown") == []
    asked = [event["request"]["url"] for event in shown.told("Network.requestWillBeSent")]
    assert asked[0] == page.as_uri()
    assert all(url.startswith("data:") for url in asked[1:])


def test_a_script_of_a_file_would_not_run(shown: Browser) -> None:
    shown.run(
        "void document.body.insertAdjacentHTML('beforeend', '<img src=x onerror=\"evil = 1\">');"
        "document.body.append(Object.assign(document.createElement('script'), {text: 'evil = 1'}))"
    )
    assert shown.run("typeof evil") == "undefined"
    assert "violates" in str(shown.told("Log.entryAdded"))


def test_tables_sort_by_click_up_and_down(shown: Browser) -> None:
    table = TABLE_3.format("Table 3: resnet<18>")
    assert column(shown, table, 0) == ["224 px", "63 px", "95 px", "111 px"]
    press = f"{table}.tHead.rows[0].cells[{{}}].querySelector('button').click()"
    shown.run(press.format(0))
    assert column(shown, table, 0) == ["63 px", "95 px", "111 px", "224 px"]
    shown.run(press.format(7))
    # What has no value goes last, and the totals stay below.
    assert column(shown, table, 7) == ["25.00%", "50.00%", "75.00%", "–"]  # noqa: RUF001
    shown.run(press.format(7))
    assert column(shown, table, 7) == ["75.00%", "50.00%", "25.00%", "–"]  # noqa: RUF001
    assert shown.run(f"{table}.tFoot.innerText.split(/\\s/)[0]") == "all"
    states = shown.run(f"[...{table}.tHead.rows[0].cells].map(c => c.getAttribute('aria-sort'))")
    assert states == [*[None] * 7, "descending", None]


def test_everything_can_be_reached_and_pressed_by_keyboard(shown: Browser) -> None:
    shown.press("Tab", 9)
    assert shown.run("document.activeElement.className") == "skip"
    assert shown.run("document.activeElement.getBoundingClientRect().left") == 0
    shown.press("Enter", 13)
    assert shown.run("document.activeElement.id") == "content"
    shown.press("Tab", 9)  # the table's own scrolling
    assert shown.run("document.activeElement.getAttribute('role')") == "region"
    shown.press("Tab", 9)
    assert shown.run("document.activeElement.innerText") == "run"
    outline = shown.run("getComputedStyle(document.activeElement).outlineStyle")
    assert outline == "solid"
    before = column(shown, FIRST, 0)
    shown.press("Enter", 13)
    shown.press(" ", 32)
    assert shown.run("document.activeElement.closest('th').ariaSort") == "descending"
    assert column(shown, FIRST, 0) == sorted(before, reverse=True, key=lambda name: name[0])
    details = "document.querySelector('details')"
    shown.run(f"{details}.querySelector('summary').focus()")
    shown.press("Enter", 13)
    assert shown.run(f"{details}.open") is True


def test_it_fits_a_phone(shown: Browser) -> None:
    for width in (320, 360, 390, 1200):
        shown.width(width)
        shown.run("for (const d of document.querySelectorAll('details')) d.open = true")
        across = "[innerWidth, document.documentElement.scrollWidth <= innerWidth]"
        assert shown.run(across) == [width, True]


def test_tables_fit_a_window_of_1200_pixels_and_paper(shown: Browser) -> None:
    beyond = (
        "[...document.querySelectorAll('.table > .scroll')].filter(box => "
        "box.querySelector('table').getBoundingClientRect().right > "
        "box.getBoundingClientRect().right + 1).map(box => box.ariaLabel)"
    )
    shown.run("for (const d of document.querySelectorAll('details')) d.open = true")
    assert shown.run(beyond) == []
    # A4 without its margins, at 96 px an inch.
    shown.media("print")
    shown.width(680)
    assert shown.run(beyond) == []


def test_it_is_dark_in_the_dark_and_light_on_paper(shown: Browser) -> None:
    def lightness(what: str, name: str) -> float:
        color = shown.run(f"getComputedStyle({what}).{name}")
        return sum(map(int, color[color.index("(") + 1 : -1].split(", ")[:3])) / 765

    text = "document.querySelector('.chart svg text')"
    for kind, scheme, dark in (
        ("screen", "light", False),
        ("screen", "dark", True),
        ("print", "dark", False),
    ):
        shown.media(kind, scheme)
        assert (lightness("document.body", "backgroundColor") < 0.2) == dark
        assert (lightness("document.body", "color") > 0.8) == dark
        assert (lightness(text, "fill") > 0.8) == dark
    assert shown.run("getComputedStyle(document.querySelector('nav')).display") == "none"


def test_on_paper_everything_is_unfolded(shown: Browser) -> None:
    folded = "document.querySelectorAll('details:not([open])').length"
    before = shown.run(folded)
    assert before > 2
    shown.run(f"void addEventListener('beforeprint', () => {{ self.atPrint = {folded} }})")
    assert base64.b64decode(shown.call("Page.printToPDF")["data"])[:4] == b"%PDF"
    assert shown.run("self.atPrint") == 0
    assert shown.run(folded) == before


def test_a_screenshot_shows_something(shown: Browser) -> None:
    data = base64.b64decode(shown.call("Page.captureScreenshot")["data"])
    colors = Image.open(io.BytesIO(data)).convert("RGB").getcolors(1 << 24)
    assert colors is not None
    assert len(colors) > 50
