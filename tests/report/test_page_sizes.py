"""The page of confusion-report on a narrow screen and on paper."""

import io
from typing import Any

import numpy as np
import pytest
from PIL import Image
from test_page import browser, opened, rendered, shown

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
