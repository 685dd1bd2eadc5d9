"""Reports in headless Chromium: two widths, light and dark."""

import shutil
from dataclasses import dataclass, field

import pytest

from distprune.report.page import write_report

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium on this machine")

OPEN_ALL = "for (const details of document.querySelectorAll('details')) details.open = true"
ALL_DRAWN = "[...document.querySelectorAll('.plot')].every((plot) => plot.dataset.state === 'drawn')"
EMPTY = """
[...document.querySelectorAll('.plot')].filter((plot) => {
  const box = plot.querySelector('svg')?.getBoundingClientRect();
  const marks = [...plot.querySelectorAll('.mark-line path, .mark-rect path, .mark-symbol path')];
  const drawn = marks.filter((mark) => { const b = mark.getBBox(); return b.width + b.height > 0; });
  return !(box && box.width > 100 && box.height > 50 && drawn.length);
}).map((plot) => plot.getAttribute('aria-label'))
"""
OUTSIDE = """
[...document.querySelectorAll('.plot svg text')].filter((text) => {
  const box = text.getBoundingClientRect(), figure = text.closest('.plot').getBoundingClientRect();
  return box.width && (box.left < figure.left - 2 || box.right > figure.right + 2);
}).map((text) => text.textContent)
"""
UNNAMED = """
[...document.querySelectorAll('.plot')].filter((plot) => plot.role !== 'img' || !/[.] .{10}/.test(plot.ariaLabel))
.length
"""
COLOURS = """
[getComputedStyle(document.body).backgroundColor, getComputedStyle(document.querySelector('.mark-line path')).stroke]
"""


@dataclass
class Opened:
    """A page in a browser, and what it complained of or asked for."""

    page: object
    messages: list = field(default_factory=list)
    requests: list = field(default_factory=list)

    def cells(self, title, column):
        """What a table shows in a column."""
        return self.page.evaluate(
            "([title, column]) => [...document.querySelectorAll(`[aria-label='${title}'] tbody tr`)]"
            ".map((row) => row.cells[column].textContent)",
            [title, column],
        )


@pytest.fixture(scope="module")
def opened(full, four, tmp_path_factory):
    """Pages by kind, width and scheme, in one browser."""
    folder = tmp_path_factory.mktemp("pages")
    files = {
        "one": write_report([str(full)], str(folder / "one.html")),
        "four": write_report([str(path) for path in four], str(folder / "four.html")),
    }
    ways = [("one", width, scheme) for width in (360, 1280) for scheme in ("light", "dark")]
    ways += [("four", 360, "dark"), ("four", 1280, "light")]
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        found = {}
        for kind, width, scheme in ways:
            context = browser.new_context(viewport={"width": width, "height": 800}, color_scheme=scheme)
            one = Opened(context.new_page())

            def only_files(route, one=one):
                if route.request.url.startswith(("file:", "data:")):
                    route.continue_()
                else:
                    one.requests.append(route.request.url)
                    route.abort()

            context.route("**/*", only_files)
            one.page.on("console", lambda message, one=one: one.messages.append(f"{message.type}: {message.text}"))
            one.page.on("pageerror", lambda error, one=one: one.messages.append(str(error)))
            one.page.goto(files[kind].as_uri())
            one.page.evaluate(OPEN_ALL)
            one.page.wait_for_function(ALL_DRAWN, timeout=20_000)
            found[kind, width, scheme] = one
        yield found
        browser.close()


def test_every_figure_is_drawn_without_complaint_and_without_a_network(opened):
    for way, one in opened.items():
        assert one.messages == [], way
        assert one.requests == [], way
        assert one.page.evaluate(EMPTY) == [], way
        assert one.page.evaluate(UNNAMED) == 0, way
    figures = {way: one.page.locator(".plot").count() for way, one in opened.items()}
    assert figures["one", 360, "light"] == figures["one", 1280, "dark"] >= 15
    assert figures["four", 360, "dark"] > 40


def test_nothing_is_wider_than_the_screen(opened):
    for way, one in opened.items():
        assert one.page.evaluate("document.documentElement.scrollWidth") <= way[1], way
        assert one.page.evaluate(OUTSIDE) == [], way


def test_colours_are_those_of_light_and_dark_and_paper_is_white(opened):
    light, dark = (opened["one", 360, scheme].page.evaluate(COLOURS) for scheme in ("light", "dark"))
    assert light[0] == "rgb(255, 255, 255)"
    assert dark[0] != light[0]
    assert dark[1] != light[1]
    assert dark[1].startswith("rgb")
    page = opened["one", 1280, "dark"].page
    page.emulate_media(media="print")
    printed = page.evaluate(COLOURS)
    page.emulate_media(media="screen")
    assert printed == light


def test_tables_sort_by_mouse_and_by_keyboard(opened):
    one = opened["one", 1280, "light"]
    title, zeros = "Layers at the end", 3
    before = one.cells(title, zeros)
    button = one.page.locator(f"[aria-label='{title}'] th button", has_text="zeros")
    button.click()
    numbers = [int(cell.replace(",", "")) for cell in one.cells(title, zeros)]
    assert numbers == sorted((int(cell.replace(",", "")) for cell in before), reverse=True)
    assert button.locator("..").get_attribute("aria-sort") == "descending"
    button.press("Enter")
    assert [int(cell.replace(",", "")) for cell in one.cells(title, zeros)] == numbers[::-1]
    one.page.locator(f"[aria-label='{title}'] th button", has_text="layer").click()
    assert one.cells(title, 0) == ["0.weight", "3.weight", "8.weight", "10.weight"]


def test_a_tooltip_says_what_is_under_the_pointer(opened):
    page = opened["one", 1280, "light"].page
    bar = page.locator("[aria-label^='Points lost by class'] .mark-rect path").first
    bar.scroll_into_view_if_needed()
    bar.hover()
    tooltip = page.locator("#vg-tooltip-element")
    assert "class 29" in tooltip.inner_text()
    assert "19.8" in tooltip.inner_text()


def test_names_are_words_and_never_markup(opened):
    for one in opened.values():
        assert one.page.locator("main b").count() == 0
        assert one.page.locator("h1, summary", has_text="digits <b>&amp;").count() >= 1
