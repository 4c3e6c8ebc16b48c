"""The page of confusion-report on a narrow screen and on paper."""

import io
from typing import Any

import numpy as np
import pytest
from PIL import Image
from test_page import COUNTS, HAND, NAMES, browser, opened, rendered, shown
from test_page_images import three_wolves

__all__ = ["browser", "opened"]  # fixtures
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # playwright's event loop


def page_of(size: int) -> str:
    """A page of classes with names of 30 letters, each predicted as the next one in some images."""
    matrix = np.diag([40] * size) + 10 * np.eye(size, k=1, dtype=int)
    names = [f"{number:03d} grey_wolf_of_the_mountains"[:30].ljust(30, "x") for number in range(size)]
    return rendered([shown(matrix, 5 * np.arange(size, 0, -1), confusions=1.0 * (matrix == 10))], names)


def edge(page: Any, box: Any) -> list[int]:
    """The colour at the right edge of a table's box, beside its caption."""
    place = box.bounding_box()
    clip = {"x": place["x"] + place["width"] - 2, "y": place["y"] + 4, "width": 1, "height": 1}
    return list(Image.open(io.BytesIO(page.screenshot(clip=clip))).convert("RGB").getpixel((0, 0)))


@pytest.mark.parametrize(("size", "scheme"), [(5, "light"), (100, "dark")])
def test_a_narrow_page_is_whole_and_its_tables_show_that_they_scroll(opened: Any, size: int, scheme: str) -> None:
    page = opened(page_of(size), scheme).page
    page.set_viewport_size({"width": 420, "height": 800})
    page.wait_for_timeout(200)
    assert page.evaluate("document.documentElement.scrollWidth") == 420
    outside = """[...document.querySelectorAll("main *, dialog *")].filter((e) => !e.closest(".wide table")
        && e.getBoundingClientRect().right > 420).map((e) => e.outerHTML.slice(0, 200))"""
    assert page.evaluate(outside) == []
    background = [255, 255, 255] if scheme == "light" else [21, 23, 26]
    for name in ("accuracy", "pairs", "classes"):
        box, caption = page.locator(f".wide:has(#{name})"), page.locator(f"#{name} caption")
        box.scroll_into_view_if_needed()
        whole = caption.bounding_box()
        assert whole["x"] >= 0 and whole["x"] + whole["width"] <= 420
        if name == "accuracy":  # two columns
            assert [box.get_attribute("role"), edge(page, box)] == [None, background]
            continue
        assert edge(page, box) != background
        region = page.get_by_role("region", name=caption.inner_text())
        region.press("ArrowRight")
        page.wait_for_function("(e) => e.scrollLeft > 10", arg=box.element_handle())
        box.evaluate("(e) => e.scrollTo({ left: e.scrollWidth, behavior: 'instant' })")
        page.wait_for_timeout(100)
        assert edge(page, box) == background
        assert caption.bounding_box()["x"] == whole["x"]
        first = page.locator(f"#{name} tbody th").first
        assert first.bounding_box()["x"] == whole["x"]  # which row it is stays in view
        cut = "(found) => found.filter((e) => e.scrollHeight > e.clientHeight + 1).length"
        assert page.locator(f"#{name} .name").evaluate_all(cut) == 0
    page.set_viewport_size({"width": 1400, "height": 800})
    page.wait_for_timeout(200)
    assert (page.locator(".wide:has(#pairs)").get_attribute("tabindex") is None) == (size == 5)


def test_titles_of_axes_are_whole_on_a_narrow_screen(opened: Any) -> None:
    page = opened(page_of(5)).page
    page.set_viewport_size({"width": 420, "height": 800})
    page.wait_for_timeout(200)
    ink = """[...document.querySelectorAll(".plots canvas")].map((e) => {
        const found = e.getContext("2d").getImageData(e.width - 1, e.height - 20, 1, 20).data;
        return found.some((v) => v);
    })"""
    assert page.evaluate(ink) == [False] * 4


def test_a_dark_page_is_printed_in_light_colours_and_dark_again_afterwards(opened: Any) -> None:
    shows = opened(rendered([shown(HAND, COUNTS)], NAMES), "dark")
    page = shows.page

    def seen() -> list[Any]:
        return [shows.colour(0, 2), shows.colour(1, 2), page.evaluate("colour('text')")]

    dark = seen()
    assert dark[0] == [21, 23, 26]  # no cats are predicted as wolves, and 10 of 100 dogs
    page.evaluate("""addEventListener("beforeprint", () => {
        const { canvas, cell } = maps[0], dots = canvas.width / canvas.clientWidth;
        const at = (row, column) => [maps[0].x(column) + cell * 0.1, maps[0].y(row) + cell * 0.1].map((v) => v * dots);
        const pixel = (place) => [...canvas.getContext("2d").getImageData(...place, 1, 1).data].slice(0, 3);
        window.printed = { colours: [pixel(at(0, 2)), pixel(at(1, 2)), colour("text")], dots };
    })""")
    assert page.pdf(format="A4").startswith(b"%PDF")
    light = opened(rendered([shown(HAND, COUNTS)], NAMES))
    printed = page.evaluate("printed")
    assert printed["colours"] == [light.colour(0, 2), light.colour(1, 2), light.page.evaluate("colour('text')")]
    assert printed["colours"][0] == [255, 255, 255] and round(printed["dots"]) == 3
    assert seen() == dark


@pytest.mark.parametrize("names", [["plain"], ["plain", "mixed"]])
def test_a_printed_page_is_whole_and_has_nothing_to_press(opened: Any, names: list[str]) -> None:
    runs = [shown(HAND, COUNTS, name, np.ones((3, 3))) for name in names]
    page = opened(rendered(runs, NAMES, images=three_wolves(), pictures=[("Figure.", ["stage1/a.png"])]), "dark").page
    page.emulate_media(media="print", color_scheme="dark")
    page.set_viewport_size({"width": 687, "height": 1000})  # of A4 within its margins
    page.wait_for_timeout(200)
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    visible = "(found) => found.filter((e) => e.checkVisibility()).map((e) => e.textContent)"
    assert page.locator("select, input, dialog, #tip, button:not(th button, .thumb)").evaluate_all(visible) == []
    assert len(page.locator(".thumb").evaluate_all(visible)) == 3
    assert page.locator("details dl").first.evaluate("(e) => e.checkVisibility()")  # though closed on the screen
    assert max(page.locator("table").evaluate_all("(f) => f.map((e) => e.getBoundingClientRect().right)")) <= 687
    assert set(page.locator(".wide").evaluate_all("(f) => f.map((e) => getComputedStyle(e).overflowY)")) == {"visible"}
    shapes = "(f) => f.map((e) => e.clientHeight / e.clientWidth - e.height / e.width)"
    assert np.abs(page.locator("figure canvas").evaluate_all(shapes)).max() < 0.01  # nothing is stretched
    address = "(e) => getComputedStyle(e, '::after').content"
    assert page.locator("a", has_text="a.png").evaluate(address) == '" (stage1/a.png)"'
    assert page.locator("a", has_text="is taken for").first.evaluate(address) == "none"
