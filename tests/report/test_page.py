"""The page of confusion-report, in a real browser where there is one (Debian's chromium), and as text."""

import base64
import html
import json
import math
import re
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from decimal import Decimal
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from helpers import must, process, refused, run_commands

from cpmix_cli.artifacts.records import publish_record
from cpmix_cli.data.longtail import GROUPS, group_of
from cpmix_cli.report.changes import gains_and_losses, moved_errors
from cpmix_cli.report.findings import find
from cpmix_cli.report.images import ContactSheet
from cpmix_cli.report.page import ShownRun, render_page
from cpmix_cli.report.pairs import clustered_order, confused_pairs
from cpmix_cli.runtime.rounding import percent, signed

CHROMIUM = shutil.which("chromium")
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # playwright's event loop


def shown(matrix: np.ndarray, counts: np.ndarray, name: str = "run", confusions: np.ndarray | None = None) -> ShownRun:
    """A run of the page with two bins of confidence."""
    reliability = np.full((15, 3), np.nan)
    reliability[:, 0] = 0
    reliability[3], reliability[14] = (40, 0.25, 0.5), (60, 0.99, 0.9)
    groups = [group_of(int(n)) for n in counts]
    return ShownRun(
        name, "A network, trained on data.", [("Network", "by hand")], counts, groups, matrix, confusions, reliability
    )


def rendered(runs: list[ShownRun], names: list[str], *, order: np.ndarray | None = None, **more: Any) -> str:
    """A page with the smallest of everything else."""
    pairs = confused_pairs(sum(run.matrix for run in runs), runs[0].class_counts)
    named = pd.DataFrame({"rarer class": [names[c] for c in pairs["rarer_class"]], "confusions": pairs["count"]})
    accuracy = pd.DataFrame({"evaluation": ["stage1"], "top-1": ["12.50"]})
    fields = {"title": "Confusion", "notes": [], "accuracy": accuracy, "images": None, "pictures": [], "embedded": []}
    clustered = clustered_order(runs[0].matrix) if order is None else order
    fields |= {"pairs": pairs, "named_pairs": named.head(100), "clustered": clustered, **more}
    return render_page(**fields, runs=runs, class_names=names)


PNG = (Path(__file__).parents[2] / ".readme" / "report.png").read_bytes()
HAND = np.array([[90, 10, 0], [5, 85, 10], [0, 30, 70]])
COUNTS = np.array([500, 50, 5])
NAMES = ["cat", "dog", "wolf"]


# -- as text -----------------------------------------------------------------------------------------------------------


def test_page_fetches_nothing_and_escapes_every_word() -> None:
    evil = '</script><script>alert("x")</script><img src=x onerror=alert(1)>'
    page = rendered(
        [shown(HAND, COUNTS, evil)],
        [evil, "b", "c"],
        title=evil,
        notes=[evil],
        accuracy=pd.DataFrame({evil: [evil], "top-1": ["12.50"]}),
        pictures=[(evil, ["stage1/a.png"])],
        embedded=[(evil, b"\x89PNG")],
    )
    assert page.count("<script") == 2 and page.count("</script>") == 2
    assert "<img src=x" not in page
    assert not re.search(r"https?://|//cdn|@import|\bfetch\(|XMLHttpRequest", page)
    policy = re.search(r'Content-Security-Policy" content="([^"]*)"', page).group(1)  # type: ignore[union-attr]
    assert re.sub(r"'sha256-[^']+'", "HASH", policy) == (
        "default-src 'none'; script-src HASH; style-src HASH; img-src data:; base-uri 'none'; form-action 'none'"
    )
    assert 'src="data:image/png;base64,iVBORw=="' in page
    assert '<td class="number">12.50</td>' in page
    data = json.loads(re.search(r'id="data">(.*?)</script>', page).group(1))  # type: ignore[union-attr]
    assert data["names"][0] == evil


def test_page_is_in_full_without_scripts() -> None:
    page = rendered([shown(HAND, COUNTS)], NAMES)
    (table,) = re.findall(r'<table id="pairs".*?</table>', page, re.DOTALL)
    rows = re.findall(r'<th scope="row">(\w+)</th><td class="number">(\d+)</td>', table)
    assert rows == [("wolf", "40"), ("dog", "15")]


@pytest.mark.slow
@pytest.mark.long
def test_page_of_8142_classes_is_small() -> None:
    size = 8142
    generator = np.random.Generator(np.random.Philox(0))
    matrix = np.zeros((size, size), dtype=np.int16)
    np.add.at(matrix, (np.repeat(np.arange(size), 3), generator.integers(0, size, 3 * size)), 1)  # nothing is right
    counts = np.maximum(2, (1000 * 500 ** (-np.arange(size) / size)).astype(np.int64))
    names = [f"Genus{c} species-{c}" for c in range(size)]
    # K of a whole training: nearly two million pairs.
    confusions = np.zeros((size, size), dtype=np.float32)
    np.add.at(confusions, (generator.integers(0, size, 2_000_000), generator.integers(0, size, 2_000_000)), 1)
    np.fill_diagonal(confusions, 0)
    assert len(rendered([shown(matrix, counts, confusions=confusions)], names, order=np.arange(size))) < 5_000_000


# -- in the browser ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    if CHROMIUM is None:
        pytest.skip("needs chromium: apt-get install chromium")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        running = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])  # root has no sandbox
        yield running
        running.close()


class Opened:
    """A page that is read, with all that the browser complained of."""

    def __init__(self, browser: Any, path: Path, scheme: str = "light") -> None:
        self.complaints: list[str] = []
        self.requests: list[str] = []
        self.page = browser.new_page(viewport={"width": 1300, "height": 1000}, color_scheme=scheme)
        self.page.on("console", lambda message: self.complaints.append(message.text))
        self.page.on("pageerror", lambda fault: self.complaints.append(str(fault)))
        self.page.on("dialog", lambda dialog: self.complaints.append(dialog.message))
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.goto(path.as_uri())
        self.page.wait_for_selector("html[data-ready]")

    def cell(self, row: int, column: int, number: int = 0) -> Any:
        """Where the middle of a cell of a map is, in its canvas: {"x", "y"}."""
        m = f"maps[{number}]"
        return self.page.evaluate(f"({{ x: {m}.x({column}) + {m}.cell / 2, y: {m}.y({row}) + {m}.cell / 2 }})")

    def point(self, row: int, column: int, number: int = 0) -> str:
        """Point at a cell; what the tip says."""
        self.page.locator("#maps canvas").nth(number).hover(position=self.cell(row, column, number))
        return str(self.page.locator("#tip").inner_text())

    def colour(self, row: int, column: int, number: int = 0) -> list[int]:
        """Of a cell, away from its number."""
        place, away = self.cell(row, column, number), f"- maps[{number}].cell * 0.4"
        pixel = f"getImageData({place['x']} {away}, {place['y']} {away}, 1, 1)"
        got: list[int] = self.page.evaluate(f"[...maps[{number}].canvas.getContext('2d').{pixel}.data].slice(0, 3)")
        return got

    def close(self) -> None:
        """Close it; nothing was fetched and nothing complained of."""
        self.page.close()
        # Chromium advises the tests themselves, which read single pixels.
        assert [text for text in self.complaints if "willReadFrequently" not in text] == []
        assert len(self.requests) == len([url for url in self.requests if url.startswith(("file:", "data:"))])
        assert sum(url.startswith("file:") for url in self.requests) == 1


@pytest.fixture
def opened(browser: Any, tmp_path: Path) -> Iterator[Any]:
    """Opens pages, and looks at their complaints at the end."""
    pages = []

    def show(content: str | Path, scheme: str = "light") -> Opened:
        path = content
        if isinstance(content, str):
            path = tmp_path / f"page{len(pages)}.html"
            path.write_text(content, encoding="utf-8")
        pages.append(Opened(browser, path, scheme))  # type: ignore[arg-type]
        return pages[-1]

    yield show
    for page in pages:
        page.close()


def test_pointing_at_a_cell_shows_its_classes_and_counts(opened: Any) -> None:
    shows = opened(rendered([shown(HAND, COUNTS, confusions=np.array([[0.0, 3, 1], [0, 0, 0], [2, 2, 0]]))], NAMES))
    shows.page.locator("#maps canvas").press("Escape")  # the page opens with its most confused cell pinned
    assert shows.point(2, 1) == "wolf predicted as dog\n30 of 100 test images (30.0 %)\ntraining images: 5 and 50"
    assert shows.point(0, 0) == "cat, correct\n90 of 100 test images (90.0 %)\n500 training images"
    assert shows.point(0, 2) == "cat predicted as wolf\n0 of 100 test images (0.0 %)\ntraining images: 500 and 5"
    panel = shows.page.locator("#cell")
    assert "1 of 4 wrong predictions of the class, over the epochs" in panel.inner_text()
    shows.page.mouse.move(5, 5)
    assert shows.page.locator("#tip").is_hidden()
    assert "Point at a cell" in panel.inner_text()
    shows.page.locator("#maps canvas").click(position=shows.cell(2, 1))
    shows.point(0, 0)
    assert panel.locator("h3").inner_text() == "wolf predicted as dog"  # a click keeps it


def test_groups_are_the_sums_of_their_classes(opened: Any) -> None:
    shows = opened(rendered([shown(HAND, COUNTS)], NAMES))
    shows.page.select_option("#grouping", "groups")
    assert shows.page.evaluate("places.labels") == ["many", "medium", "few"]
    assert shows.point(2, 1) == "few predicted as medium\n30 of 100 test images (30.0 %)"
    two = opened(rendered([shown(HAND, np.array([500, 400, 5]))], NAMES))
    two.page.select_option("#grouping", "groups")
    assert two.point(0, 0) == (
        "many predicted as a class of the same group\n190 of 200 test images (95.0 %), 175 of them correct"
    )
    two.page.uncheck("#diagonal")  # the confusions within the group stay
    assert two.page.evaluate("maps[0].value(0)") == 7.5
    assert two.point(0, 0).endswith("190 of 200 test images (95.0 %), 175 of them correct")
    assert two.point(0, 1) == "many predicted as few\n10 of 200 test images (5.0 %)"


def test_choosing_percent_or_images_redraws_the_cells(opened: Any) -> None:
    shows = opened(rendered([shown(2 * HAND, COUNTS)], NAMES))
    pictures = []
    for numbers in ("percent", "images", "percent"):
        shows.page.select_option("#numbers", numbers)
        shows.page.wait_for_timeout(100)
        pictures.append(shows.page.evaluate("maps[0].canvas.toDataURL()"))
    assert pictures[0] == pictures[2] != pictures[1]


def test_classes_are_sorted_by_the_chosen_order(opened: Any) -> None:
    shows = opened(rendered([shown(HAND, np.array([5, 50, 500]))], ["b10", "b9", "a"]))
    labels = {}
    for order in ("count", "confusion", "recall", "name"):
        shows.page.select_option("#order", order)
        labels[order] = shows.page.evaluate("places.labels")
    assert labels["count"] == ["a", "b9", "b10"]
    assert labels["recall"] == ["b10", "b9", "a"]
    assert labels["name"] == ["a", "b9", "b10"]
    assert labels["confusion"][1] == "b9"  # confused with both


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_empty_cells_have_the_page_colour_and_others_do_not(opened: Any, scheme: str) -> None:
    matrix = np.array([[999, 1, 0], [100, 900, 0], [0, 0, 1000]])
    shows = opened(rendered([shown(matrix, COUNTS)], NAMES), scheme)
    background = shows.page.evaluate("getComputedStyle(document.body).backgroundColor")
    page = [int(v) for v in re.findall(r"\d+", background)]
    assert page == ([255, 255, 255] if scheme == "light" else [21, 23, 26])
    assert shows.colour(0, 2) == page
    contrasts = [contrast(shows.colour(*cell), page) for cell in ((0, 1), (1, 0), (1, 1))]
    assert contrasts[0] > 1.1  # one image in a thousand
    assert contrasts == sorted(contrasts)


def contrast(a: list[int], b: list[int]) -> float:
    """Of two colours, as WCAG 2 has it."""
    light = []
    for colour in (a, b):
        linear = [v / 12.92 if v <= 0.03928 else ((v + 0.055) / 1.055) ** 2.4 for v in (x / 255 for x in colour)]
        light.append(0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2] + 0.05)
    return max(light) / min(light)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_has_contrast(opened: Any, scheme: str) -> None:
    shows = opened(rendered([shown(HAND, COUNTS)], NAMES), scheme)
    for name in ("text", "quiet"):
        words, page = (
            [int(v[k : k + 2], 16) for k in (1, 3, 5)]
            for v in (shows.page.evaluate(f"colour('{name}')"), shows.page.evaluate("colour('page')"))
        )
        assert contrast(words, page) > 4.5


def test_a_class_that_one_run_did_not_test_is_not_compared(opened: Any) -> None:
    """Wolves: none of plain's test images, 40 of mixed's 50 right. On cats and dogs both have 87.5 %."""
    plain = np.array([[90, 10, 0], [15, 85, 0], [0, 0, 0]])
    mixed = np.array([[85, 15, 0], [10, 90, 0], [0, 10, 40]])
    shows = opened(rendered([shown(plain, COUNTS, "plain"), shown(mixed, COUNTS, "mixed")], NAMES))
    assert "mixed: not compared, as one run has no test images of the class" in shows.point(2, 2)
    assert shows.page.evaluate("[maps[2].value(8), maps[2].value(0)]") == [0, -5]
    assert shows.page.locator(".changes p").first.inner_text() == (
        "On the 2 classes that both tested, mixed has a balanced accuracy of 87.50 %, as plain (87.50 %)."
    )
    tables = shows.page.locator(".changes").inner_text()
    assert "By group, in points: many -5.0, medium +5.0." in tables and "wolf" not in tables


def test_compared_runs_are_shown_side_by_side_with_their_difference(opened: Any) -> None:
    better = np.array([[80, 20, 0], [5, 90, 5], [0, 10, 90]])
    shows = opened(rendered([shown(HAND, COUNTS, "plain"), shown(better, COUNTS, "mixed")], NAMES))
    assert shows.page.locator("#maps h3").all_inner_texts() == ["plain", "mixed", "mixed minus plain"]
    assert shows.page.evaluate("maps[2].value(2 * 3 + 1)") == -20
    assert shows.point(2, 1, 2).splitlines() == [
        "wolf predicted as dog",
        "plain: 30 of 100 test images (30.0 %)",
        "mixed: 10 of 100 test images (10.0 %)",
        "mixed predicts 20 fewer of 100 images of wolf as dog: better",
        "training images: 5 and 50",
    ]
    assert "mixed predicts 10 more of 100 images of cat as dog: worse" in shows.point(0, 1, 2)
    assert "mixed is right on 20 more of 100 images of wolf: better" in shows.point(2, 2, 0)
    assert "mixed: no difference" in shows.point(0, 2)
    shows.page.locator("#maps canvas").first.click(position=shows.cell(0, 0))
    assert "mixed is right on 10 fewer of 100 images of cat: worse" in shows.page.locator("#cell").inner_text()
    assert shows.page.locator("#maps figcaption").inner_text() == (
        "How many more (+) or fewer (-) of the row's test images mixed predicts so than plain, in points. "
        "Blue is better: more on the diagonal, fewer elsewhere. Orange is worse."
    )
    shows.page.keyboard.press("Escape")
    blue, orange = ((lambda c: c[2] > c[0]), (lambda c: c[0] > c[2]))
    assert blue(shows.colour(2, 2, 2)) and blue(shows.colour(2, 1, 2))  # 20 more wolves are right, 20 fewer are wrong
    assert orange(shows.colour(0, 0, 2)) and orange(shows.colour(0, 1, 2))  # 10 cats fewer, 10 more wrong
    assert "difference in points: worse, better" in shows.page.locator(".scale").inner_text()
    table = shows.page.locator("#pairs")
    assert table.locator("tbody tr").first.locator("th, td").all_inner_texts()[4:7] == [
        "40",
        "15",
        "-25",
    ]  # dog and wolf: 40, then 15
    assert shows.page.locator(".legend").first.inner_text() == "plainmixed"


def test_a_difference_of_groups_or_of_other_images_is_said_in_words(opened: Any) -> None:
    counts = np.array([500, 400, 5])
    after = np.array([[80, 10, 10], [5, 95, 0], [0, 10, 40]])  # 50 wolves, so shares are compared
    shows = opened(rendered([shown(HAND, counts, "plain"), shown(after, counts, "mixed")], NAMES))
    assert "mixed predicts 10.0 points fewer of the images of wolf as dog: better" in shows.point(2, 1)
    assert "mixed is right on 10.0 points more of the images of wolf: better" in shows.point(2, 2)
    assert "They were not tested on the same images" in shows.page.locator(".changes").inner_text()
    shows.page.select_option("#grouping", "groups")
    # cat and dog: 10 as wolf before and after, so 190 stay among the many; wolf: 30 of 100 as dog, then 10 of 50
    assert "mixed: no difference" in shows.point(0, 1) and "mixed: no difference" in shows.point(0, 0)
    assert "mixed predicts 10.0 points fewer of the images of few as many: better" in shows.point(1, 0)


def test_a_difference_is_beside_its_two_matrices_and_moves_with_them(opened: Any) -> None:
    others = [shown(np.roll(HAND, k, axis=1), COUNTS, f"a run of another folder, number {k}") for k in (1, 2)]
    shows = opened(rendered([shown(HAND, COUNTS, "plain"), *others], NAMES))
    page = shows.page
    titles = page.locator("#maps h3").all_inner_texts()
    assert titles == ["plain", *(title for run in others for title in (run.name, f"{run.name} minus plain"))]

    def corners(width: int) -> list[tuple[float, float]]:
        page.set_viewport_size({"width": width, "height": 900})
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        boxes = [canvas.bounding_box() for canvas in page.locator("#maps canvas").all()]
        return [(box["x"], box["y"]) for box in boxes]

    first, one, its, two, theirs = corners(1400)
    assert first[1] == one[1] == its[1] < two[1] == theirs[1]
    assert first[0] < one[0] == two[0] < its[0] == theirs[0]
    first, one, its, two, theirs = corners(900)
    assert first[1] < one[1] == its[1] < two[1] == theirs[1]
    assert len({x for x, _ in corners(420)}) == 1
    drawn = "maps.map((map) => map.canvas.toDataURL())"
    before = page.evaluate(drawn)
    page.locator("#maps canvas").nth(2).press("ArrowRight")
    page.wait_for_timeout(100)
    assert all(new != old for new, old in zip(page.evaluate(drawn), before, strict=True))


def test_keyboard_moves_the_cursor_and_announces_the_cell(opened: Any) -> None:
    shows = opened(rendered([shown(HAND, COUNTS)], NAMES))
    page = shows.page
    page.get_by_role("application", name="run. Arrow keys move").focus()
    page.keyboard.press("Escape")
    for key in ("ArrowDown", "ArrowDown", "ArrowRight"):
        page.keyboard.press(key)
    assert page.locator("#spoken").inner_text().startswith("dog, correct")
    page.keyboard.press("ArrowDown")
    assert page.locator("#spoken").inner_text().startswith("wolf predicted as dog")
    page.keyboard.press("End")
    assert page.evaluate("state.cursor") == {"row": 2, "column": 2}
    page.keyboard.press("Escape")
    assert page.evaluate("state.cursor") is None


def test_zoom_keeps_the_cell_and_shows_names(opened: Any) -> None:
    size = 300
    matrix = np.diag([9] * size) + np.eye(size, k=1, dtype=int)
    shows = opened(rendered([shown(matrix, np.arange(size, 0, -1))], [f"class {c}" for c in range(size)]))
    page = shows.page
    page.select_option("#order", "count")
    page.wait_for_timeout(100)
    before = shows.cell(200, 201)
    page.evaluate("zoom(0.1, { row: 200, column: 201 })")
    page.wait_for_timeout(100)
    assert page.evaluate("state.span") == 30
    after = shows.cell(200, 201)
    assert max(abs(a - b) for a, b in zip(before.values(), after.values(), strict=True)) < 180
    assert shows.point(200, 201).startswith("class 200 predicted as class 201")
    page.get_by_role("button", name="fit").click()
    assert page.evaluate("state.span") == size
    find = page.get_by_role("combobox", name="Find a class")
    find.fill("CLASS 250")
    find.press("Enter")
    assert page.locator("#spoken").inner_text().startswith("class 250, correct")
    assert page.evaluate("state.cursor") == {"row": 250, "column": 250}
    assert page.evaluate("state.span") == 12
    page.select_option("#numbers", "images")
    assert page.evaluate("[state.span, state.pinned]") == [12, True]  # what is looked at stays
    find.fill("nothing like it")
    find.press("Enter")
    assert find.get_attribute("aria-invalid") == "true"
    assert page.evaluate("state.cursor") == {"row": 250, "column": 250}


def test_dragging_wheel_and_double_click_move_the_view(opened: Any) -> None:
    size = 60
    shows = opened(rendered([shown(np.diag([9] * size), np.arange(size, 0, -1))], [f"c{c}" for c in range(size)]))
    page, canvas = shows.page, shows.page.locator("#maps canvas")
    canvas.scroll_into_view_if_needed()
    page.evaluate("look(20, 20, 20)")
    page.wait_for_timeout(100)
    cell = page.evaluate("maps[0].cell")
    box, start = canvas.bounding_box(), shows.cell(30, 30)
    x, y = box["x"] + start["x"], box["y"] + start["y"]
    page.mouse.move(x, y)
    page.mouse.down()
    page.mouse.move(x + 3 * cell, y + 2 * cell, steps=4)
    page.mouse.up()
    assert page.evaluate("[state.row0, state.column0].map(Math.round)") == [18, 17]
    assert page.evaluate("state.pinned") is False  # a drag is no click
    page.mouse.wheel(0, -100)
    assert page.evaluate("state.span") == 20  # the page scrolls
    canvas.scroll_into_view_if_needed()
    canvas.hover(position=shows.cell(25, 25))
    page.keyboard.down("Control")
    page.mouse.wheel(0, -100)
    page.keyboard.up("Control")
    page.wait_for_timeout(100)
    assert page.evaluate("state.span") == 16
    canvas.dblclick(position=shows.cell(25, 25))
    assert page.evaluate("state.span") == 8


def test_every_cell_with_images_can_be_pointed_at(opened: Any) -> None:
    size = 200
    matrix = np.diag([50] * size) + np.eye(size, k=1, dtype=int)
    shows = opened(rendered([shown(matrix, np.arange(size, 0, -1))], [f"class {c}" for c in range(size)]))
    shows.page.select_option("#order", "count")
    shows.page.wait_for_timeout(100)
    assert 2 < shows.page.evaluate("maps[0].cell") < 5
    assert shows.point(100, 101).startswith("class 100 predicted as class 101\n1 of 51")
    assert shows.point(100, 100).startswith("class 100, correct")
    assert shows.point(100, 102).startswith("class 101, correct")  # empty: the largest within reach


def test_browser_shortcuts_are_not_intercepted(opened: Any) -> None:
    shows = opened(rendered([shown(HAND, COUNTS)], NAMES))
    shows.page.locator("#maps canvas").focus()
    shows.page.evaluate("addEventListener('keydown', (event) => { window.taken = event.defaultPrevented; })")
    for key, taken in (("Control+0", False), ("Alt+ArrowLeft", False), ("Control+Minus", False), ("0", True)):
        shows.page.keyboard.press(key)
        assert shows.page.evaluate("taken") is taken, key


def test_a_name_of_any_length_leaves_the_tables_readable(opened: Any) -> None:
    shows = opened(rendered([shown(HAND, COUNTS)], ["x" * 3000, "dog", "grey_wolf"]))
    cells = shows.page.locator("#classes tbody th").all()
    widths = [cell.bounding_box()["width"] for cell in cells]
    assert widths[0] <= 24 * 16 + 1
    assert max(cell.bounding_box()["height"] for cell in cells) < 85  # three lines
    cells[0].get_by_role("button").focus()
    assert cells[0].bounding_box()["height"] > 500  # all of it


@pytest.mark.parametrize("width", [400, 1300])
def test_nothing_is_wider_than_the_window(opened: Any, width: int) -> None:
    runs = [shown(HAND, COUNTS, name) for name in ("plain", "mixed")]
    shows = opened(rendered(runs, NAMES, embedded=[("picture", PNG)]))
    shows.page.set_viewport_size({"width": width, "height": 800})
    shows.page.wait_for_timeout(200)
    assert shows.page.evaluate("document.documentElement.scrollWidth") == width
    for number in range(3):
        shows.page.locator("#maps canvas").nth(number).scroll_into_view_if_needed()
        shows.point(2, 2, number)
        box = shows.page.locator("#tip").bounding_box()
        assert box["x"] >= 0 and box["x"] + box["width"] <= width


def test_every_number_on_the_page_equals_that_by_hand(opened: Any) -> None:
    """A page of three classes: tables, panel, plots and thumbnails against what HAND says."""
    sprite = f"data:image/png;base64,{base64.b64encode(PNG).decode()}"
    images = ContactSheet(
        np.array([2, 2]), np.array([1, 1]), [90.0, 60.4], ["a.png", "b.png"], True, "", 8, 16, 8, sprite
    )
    confusions = np.array([[0.0, 3, 1], [0, 0, 0], [2, 6, 0]])
    shows = opened(rendered([shown(HAND, COUNTS, confusions=confusions)], NAMES, images=images))
    page = shows.page

    def rows(table: str) -> list[list[str]]:
        lines = page.locator(f"#{table} tbody tr").all()
        return [line.locator("th, td").all_inner_texts() for line in lines]

    assert page.locator("#pairs thead th").all_inner_texts() == [
        *("rarer class", "training images", "more frequent class", "its training images", "confusions"),
        *("rarer as more frequent", "rarer as more frequent, %", "in training"),
    ]
    assert rows("pairs") == [
        ["wolf", "5", "dog", "50", "40", "30", "75", "6"],
        ["dog", "50", "cat", "500", "15", "5", "33", "3"],
    ]
    assert page.locator("#classes thead th").all_inner_texts() == [
        *("class", "group", "training images", "test images", "recall", "95 % interval"),
        *("precision", "F1", "most taken for, images"),
    ]
    assert rows("classes") == [
        ["cat", "many", "500", "100", "90.0 %", "82.6 to 94.5", "94.7 %", "92.3 %", "dog 10"],
        ["dog", "medium", "50", "100", "85.0 %", "76.7 to 90.7", "68.0 %", "75.6 %", "wolf 10, cat 5"],
        ["wolf", "few", "5", "100", "70.0 %", "60.4 to 78.1", "87.5 %", "77.8 %", "dog 30"],
    ]
    page.locator("#classes").get_by_role("link", name="cat").click()
    page.locator("#cell h3", has_text="dog predicted as cat").wait_for()  # the link's cell; the row's is dog as wolf
    page.locator("#maps canvas").click(position=shows.cell(2, 1))
    assert page.locator("#cell dl").inner_text().split("\n") == [
        *("reverse", "10 of 100", "in training", "6 of 8 wrong predictions of the class, over the epochs")
    ]
    assert "the 2 most confident of 30 images, with the confidence:" in page.locator("#cell").inner_text()
    thumbs = page.locator(".thumb")
    assert thumbs.all()[1].get_attribute("aria-label") == "enlarge b.png"
    assert page.locator(".thumbs li").all_inner_texts() == ["a.png\n90.0 %", "b.png\n60.4 %"]
    places = thumbs.evaluate_all("found => found.map((e) => e.style.backgroundPosition)")
    assert places == ["0px 0px", "-64px 0px"]
    page.locator("#maps canvas").click(position=shows.cell(1, 1))
    assert page.locator("#cell dl").inner_text().split("\n") == ["false positives", "40 images of other classes"]

    relation_, accuracy, histogram, calibration = (page.evaluate(f"plots[{k}].spec") for k in range(4))
    assert sorted((p["x"], p["y"]) for p in relation_["points"]) == [(25, 0), (25, 0), (75, 10), (75, 30)]
    assert [(p["x"], p["y"]) for p in accuracy["points"]] == [(500, 90), (50, 85), (5, 70)]
    assert sum(bar["y"] for bar in histogram["bars"]) == 4
    assert [bar["y"] for bar in histogram["bars"] if bar["from"] <= 10 < bar["to"]] == [2]
    assert [(p["x"], p["y"]) for p in calibration["points"]] == [(0.25, 0.5), (0.99, 0.9)]
    assert calibration["points"][1]["size"] > calibration["points"][0]["size"]
    label = page.locator("#plot-calibration").get_attribute("aria-label")
    assert label == "run: mean confidence 69.4 per cent, accuracy 74.0 per cent"
    assert page.locator("#plot-relation").get_attribute("aria-label") == (
        "Training confused 4 of 6 ordered pairs of classes, including 2 of the test's 4 most confused pairs. For 2 of "
        "2 classes the most frequent confusion is the same. The wrong predictions of a class in training and test "
        "overlap by 75 per cent."
    )


def test_a_class_is_found_as_it_is_typed_and_stays_selected(opened: Any) -> None:
    shows = opened(rendered([shown(HAND, COUNTS)], ["cat", "Grey_dog", "wolf"]))
    page, title = shows.page, shows.page.locator("#cell h3")
    page.select_option("#grouping", "groups")
    page.locator("#find").fill("grey dog")
    page.locator("#find").press("Enter")
    assert page.locator("#grouping").input_value() == "classes"
    assert title.inner_text() == "Grey_dog, correct"
    assert "most taken for: wolf 10, cat 5" in page.locator("#cell").inner_text()
    page.select_option("#order", "confusion")
    assert title.inner_text() == "Grey_dog, correct"
    assert "This cell is pinned" in page.locator("#cell").inner_text()
    page.locator("#find").fill("zebra")
    page.locator("#find").press("Enter")
    assert page.locator("#not-found").inner_text() == "no class has this name"
    page.locator("#find").fill("WOLF")
    page.locator("#find").press("Enter")
    assert page.locator("#not-found").is_hidden() and title.inner_text() == "wolf, correct"
    page.locator("#pairs-search").fill("grey d")
    assert page.locator("#pairs tbody tr").count() == 2


@pytest.mark.parametrize(("width", "height"), [(1400, 900), (420, 850)])
def test_what_a_link_selects_is_in_view_and_has_the_focus(opened: Any, width: int, height: int) -> None:
    size = 60
    matrix = np.diag([50] * size)
    matrix[size - 1, 3] = 40
    names = [f"class {c}" for c in range(size)]
    for runs in ([shown(matrix, np.arange(size, 0, -1))], [shown(matrix, np.arange(size, 0, -1), n) for n in "ab"]):
        page = opened(rendered(runs, names)).page
        page.set_viewport_size({"width": width, "height": height})
        page.locator(".findings a").first.focus()
        page.keyboard.press("Enter")
        page.locator("#cell:focus").wait_for()
        box = page.locator("#cell h3").bounding_box()
        assert 0 <= box["y"] < height - 40
        assert page.locator("#cell h3").inner_text() == "class 59 predicted as class 3"


def test_the_script_rounds_as_python_does(opened: Any) -> None:
    """All shares of up to 160 images, of which every sixteenth or so is a half, against exact fractions."""
    shows = opened(rendered([shown(HAND, COUNTS)], NAMES))
    shares = [(k, n, places) for n in range(1, 161) for k in range(n + 1) for places in (0, 1, 2)]
    exact = [f"{Decimal(math.floor(Fraction(100 * k * 10**d, n) + Fraction(1, 2))).scaleb(-d):f}" for k, n, d in shares]
    assert [percent(100 * k / n, d) for k, n, d in shares] == exact
    assert [percent(k / n * 100, d) for k, n, d in shares] == exact
    assert shows.page.evaluate("shares => shares.map(([k, n, d]) => rounded((100 * k) / n, d))", shares) == exact
    assert shows.page.evaluate("[-2.25, -0.04, 0.04, 0.05].map((v) => signed(v))") == ["-2.3", "0.0", "0.0", "+0.1"]
    assert [signed(v, 1) for v in (-2.25, -0.04, 0.04, 0.05)] == ["-2.3", "0.0", "0.0", "+0.1"]


def test_classes_without_test_images_come_last_and_have_a_dash(opened: Any) -> None:
    matrix = np.array([[5, 5, 0], [0, 0, 0], [0, 1, 9]])
    shows = opened(rendered([shown(matrix, COUNTS)], NAMES))
    shows.page.select_option("#order", "recall")
    assert shows.page.evaluate("places.labels") == ["wolf", "cat", "dog"]
    header = shows.page.locator("#classes").get_by_role("button", name="recall")
    for _ in range(2):
        header.click()
        assert shows.page.locator("#classes tbody tr").last.locator("th").inner_text() == "dog"
    assert "-" in shows.page.locator("#classes tbody tr").last.locator("td").all_inner_texts()


def test_no_class_is_the_rarer_if_sizes_are_equal(opened: Any) -> None:
    shows = opened(rendered([shown(HAND, np.array([50, 50, 50]))], NAMES))
    assert {line.locator("td").all_inner_texts()[5] for line in shows.page.locator("#pairs tbody tr").all()} == {"-"}


def test_runs_are_plotted_by_their_own_class_counts(opened: Any) -> None:
    other = np.array([2, 900, 30])
    shows = opened(rendered([shown(HAND, COUNTS, "a"), shown(HAND, other, "b")], NAMES))
    spec = shows.page.evaluate("plots.find((p) => p.canvas.id === 'plot-accuracy').spec")
    assert [p["x"] for p in spec["points"]] == [500, 50, 5, 900, 30, 2]
    assert spec["x"]["low"] < 2 and spec["x"]["high"] > 900


def test_the_table_of_classes_has_the_images_of_each_run(opened: Any) -> None:
    """Dogs: 50 and 900 training images, 100 test images in both; 50 wolves of b's test images, 100 of a's."""
    fewer = HAND.copy()
    fewer[2] = (0, 10, 40)
    shows = opened(rendered([shown(HAND, COUNTS, "a"), shown(fewer, np.array([2, 900, 30]), "b")], NAMES))
    table = shows.page.locator("#classes")
    heads = ["training images, a", "training images, b", "test images, a", "test images, b", "recall, a"]
    assert [head.rstrip(" ▼▲") for head in table.locator("thead th").all_inner_texts()[2:7]] == heads
    rows = [row.locator("th, td").all_inner_texts()[:6] for row in table.locator("tbody tr").all()]
    assert rows[1][2:] == ["50", "900", "100", "100"]
    assert rows[2][2:] == ["5", "30", "100", "50"]
    shows = opened(rendered([shown(HAND, COUNTS, "a"), shown(HAND, COUNTS, "b")], NAMES))
    heads = shows.page.locator("#classes thead th").all_inner_texts()[2:5]
    assert [head.rstrip(" ▼▲") for head in heads] == ["training images", "test images", "recall, a"]


def test_long_tables_show_100_rows_first(opened: Any) -> None:
    size = 130
    matrix = np.diag([5] * size)
    shows = opened(rendered([shown(matrix, np.arange(size, 0, -1))], [f"c{c}" for c in range(size)]))
    rows = shows.page.locator("#classes tbody tr")
    assert rows.count() == 100
    more = shows.page.get_by_role("button", name="Show more (100 of 130)")
    more.click()
    assert rows.count() == size
    assert more.is_hidden()
    assert shows.page.evaluate("document.activeElement.id") == "classes"


def test_tables_sort_filter_and_lead_to_the_cell(opened: Any) -> None:
    size = 30
    matrix = np.diag([50] * size)
    matrix[np.arange(1, size), 0] = np.arange(1, size)  # class c is predicted as class 0 c times
    names = [f"class {c}" for c in range(size)]
    shows = opened(rendered([shown(matrix, np.arange(size, 0, -1) * 10)], names))
    page = shows.page
    table = page.locator("#pairs")
    rows = table.locator("tbody tr")
    assert rows.count() == size - 1
    assert rows.first.locator("th").inner_text() == "class 29"  # most confused first
    header = table.get_by_role("columnheader", name="training images", exact=False).first
    header.get_by_role("button").click()
    assert header.get_attribute("aria-sort") == "descending"
    assert rows.first.locator("th").inner_text() == "class 1"
    header.get_by_role("button").click()
    assert header.get_attribute("aria-sort") == "ascending"
    assert rows.first.locator("th").inner_text() == "class 29"
    table.get_by_role("button", name="rarer class").click()
    assert [rows.nth(k).locator("th").inner_text() for k in (0, 1, 9)] == ["class 1", "class 2", "class 10"]
    page.locator("#pairs-search").fill("CLASS 12")
    assert [row.locator("th").inner_text() for row in rows.all()] == ["class 12"]
    rows.first.click()
    assert page.locator("#cell h3").inner_text() == "class 12 predicted as class 0"
    classes = page.locator("#classes tbody tr")
    assert classes.count() == size
    assert classes.nth(29).locator("th, td").all_inner_texts()[:4] == ["class 29", "few", "10", "79"]


def test_every_control_and_picture_has_a_name(opened: Any) -> None:
    shows = opened(rendered([shown(HAND, COUNTS, confusions=np.array([[0.0, 3, 1], [0, 0, 0], [2, 2, 0]]))], NAMES))
    page = shows.page
    tree = page.locator("body").aria_snapshot()
    for role in ("combobox", "searchbox", "button", "checkbox", "application", "img"):
        named = re.findall(rf"""- '?{role} "[^"]+""", tree)
        assert named, role
        assert len(named) == len(re.findall(rf"- '?{role}\b", tree)), role
    assert tree.count('img "') == 4  # the plots
    assert page.evaluate("document.documentElement.lang") == "en"
    levels = [int(level) for level in re.findall(r"heading.*\[level=(\d)\]", tree)]
    assert levels[0] == 1 and levels.count(1) == 1


@pytest.mark.slow
def test_page_of_a_real_run_shows_its_confusions_and_plots(digits_run: Path, opened: Any) -> None:
    must("confusion-report", "--from", digits_run, "--overwrite")
    shows = opened(digits_run / "confusion" / "index.html")
    cells = pd.read_parquet(digits_run / "confusion" / "finetune" / "confusion_matrix.parquet")
    counts = pd.read_parquet(digits_run / "finetune" / "class_counts.parquet")["num_train"].to_numpy()
    order = np.argsort(-counts, kind="stable").tolist()
    wrong = cells[cells["true_class"] != cells["predicted_class"]].sort_values("count", ascending=False).iloc[0]
    row, column = order.index(wrong["true_class"]), order.index(wrong["predicted_class"])
    assert f"{wrong['count']} of 50 test images" in shows.point(row, column)
    shows.page.locator("#maps canvas").click(position=shows.cell(row, column))
    thumbs = shows.page.get_by_role("button", name=re.compile(r"enlarge test image \d+"))
    assert thumbs.count() == min(8, wrong["count"])
    for name in ("accuracy", "histogram", "calibration", "relation"):
        data = shows.page.evaluate(
            f"new Set(document.getElementById('plot-{name}').getContext('2d').getImageData(60, 10, 300, 250).data).size"
        )
        assert data > 3, name


def test_first_screen_says_what_was_found_and_leads_to_it(opened: Any) -> None:
    """The sentences by hand, their cells, and the cell that the page opens with."""
    found = find(HAND, COUNTS, NAMES)
    assert [(f.text, f.true_class, f.predicted_class) for f in found] == [
        ("wolf is taken for dog in 30 of 100 images; 5 training images against 50", 2, 1),
        ("cat is taken for dog in 10 of 100 images; 500 training images against 50", 0, 1),
        ("dog is taken for wolf in 10 of 100 images; 50 training images against 5", 1, 2),
    ]
    shows = opened(rendered([shown(HAND, COUNTS)], NAMES))
    page = shows.page
    first = page.locator(".summary").inner_text()
    # (90 + 85 + 70) / 3; Wilson's interval of 245 of 300 images is 76.9 to 85.6, without the strata
    assert "A network, trained on data." in first and "81.7 %" in first and "95 % interval 77.0 to 85.6 %" in first
    groups = [row.locator("th, td").all_inner_texts() for row in page.locator(".groups tr").all()]
    assert [(row[0], row[1].strip(), row[3]) for row in groups] == [
        ("many", "90.0 %", "1 class with 500 training images"),
        ("medium", "85.0 %", "1 class with 50 training images"),
        ("few", "70.0 %", "1 class with 5 training images"),
    ]
    panel = page.locator("#cell h3")
    assert panel.inner_text() == "wolf predicted as dog"
    page.get_by_role("link", name="cat is taken for dog").click()
    panel.get_by_text("cat predicted as dog", exact=True).wait_for()  # the browser follows the link after the click
    right = opened(rendered([shown(np.diag([5, 5, 5]), COUNTS)], NAMES))
    assert "No test image is predicted wrong." in right.page.locator("main").inner_text()


def test_first_screen_of_a_comparison_says_what_changes(opened: Any) -> None:
    """By hand: recalls of 90, 85 and 70 become 80, 90 and 90; one of 5 and one of 20 images of cat only plain knows."""
    names, counts = [*NAMES, "bear"], np.array([500, 50, 5, 1])
    before = np.zeros((4, 4), dtype=int)
    before[:3, :3] = HAND
    after = np.zeros((4, 4), dtype=int)
    after[:3, :3] = [[80, 20, 0], [5, 90, 5], [0, 10, 90]]
    confusions = np.array([[0.0, 3, 1, 0], [0, 0, 0, 0], [2, 2, 0, 0], [0, 0, 0, 0]])  # most: cat-dog and wolf-cat
    alone = np.array([5, 8, 24, 0]), np.array([15, 3, 4, 0])
    runs = [
        shown(before, counts, "plain", confusions),
        replace(shown(after, counts, "mixed"), alone=alone),
        replace(shown(before, counts, "same"), alone=(np.zeros(4, dtype=int), np.zeros(4, dtype=int))),
    ]
    page = opened(rendered(runs, names)).page
    mixed, same, moved = page.locator(".changes").all()
    # d = 5 points: 15 of 300 images. 59 images are only right in one: 15^2 / 59 = 3.8 is just below McNemar's 3.84.
    assert mixed.locator("p").nth(0).inner_text() == (
        "mixed has a balanced accuracy of 86.67 %, 5.00 points more than plain (81.67 %): which chance can explain."
    )
    assert (
        mixed.locator("p")
        .nth(1)
        .inner_text()
        .startswith(
            "By group, in points: many -10.0, medium +5.0, few +20.0. "
            "Of 300 test images, only mixed is right on 37, and only plain on 22."
        )
    )
    gained, lost = mixed.locator("ul").all()
    assert gained.locator("li").all_inner_texts() == [
        "wolf: 70 to 90 of 100 images (few, 5 training images)",
        "dog: 85 to 90 of 100 images (medium, 50 training images)",
    ]
    assert lost.locator("li").all_inner_texts() == ["cat: 90 to 80 of 100 images (many, 500 training images)"]
    assert same.locator("p").nth(0).inner_text() == "same has a balanced accuracy of 81.67 %, as plain (81.67 %)."
    assert same.locator("h3 + p").all_inner_texts() == ["None.", "None."]
    errors = [row.locator("th, td").all_inner_texts() for row in moved.locator("tbody tr").all()]
    assert errors == [
        ["plain", "10 (3.3 %)", "45 (15.0 %)"],
        ["mixed", "20 (6.7 %), +10", "20 (6.7 %), -25"],
        ["same", "10 (3.3 %), +0", "45 (15.0 %), +0"],
    ]
    assert "2 of 12 ordered pairs of classes (17 %)" in moved.inner_text()
    lost.get_by_role("link").click()
    page.locator("#cell h3").get_by_text("cat, correct", exact=True).wait_for()


def test_the_classes_that_change_most_are_listed_by_their_recall() -> None:
    before, after = np.diag([5] * 8), np.diag([5] * 8)
    before[:, 7], after[:, 7] = 5, 5
    before[7, 7] = after[7, 7] = 10
    for c, right in enumerate([6, 7, 6, 9, 9, 8, 2]):
        after[c, c], after[c, 7] = right, 10 - right
    counts, groups = np.arange(8, 0, -1), ["few"] * 8
    gained, lost = gains_and_losses(before, after, counts, groups, list("abcdefgh"))
    assert [found.true_class for found in gained] == [3, 4, 5, 1, 0]  # equal ones by id; class 2 is the sixth
    assert [found.text for found in lost] == ["g: 5 to 2 of 10 images (few, 2 training images)"]
    after[0] = 0
    assert 0 not in [found.true_class for found in gains_and_losses(before, after, counts, groups, list("abcdefgh"))[0]]
    after[3] *= 2
    texts = [found.text for found in gains_and_losses(before, after, counts, groups, list("abcdefgh"))[0]]
    assert texts[0] == "d: 5 of 10 to 18 of 20 images (few, 5 training images)"


def test_errors_of_other_numbers_of_images_are_compared_in_points() -> None:
    confusions, after = np.array([[0, 1, 0], [0, 0, 0], [3, 2, 0]]), np.array([[40, 10, 0], [0, 100, 0], [20, 0, 30]])
    words, rows = moved_errors([HAND, after], confusions)
    assert words.startswith("2 of 6 ordered pairs of classes (33 %): of each class, those that make up half")
    # 10 of 300, then 30 of 200; 45 of 300, then none
    assert rows == [["10 (3.3 %)", "45 (15.0 %)"], ["30 (15.0 %), +11.7 points", "0 (0.0 %), -15.0 points"]]


def test_findings_name_another_cell_each_and_prefer_certain_ones() -> None:
    matrix = np.array([[60, 40, 0, 0], [0, 100, 0, 0], [0, 30, 70, 0], [1, 0, 0, 0]])
    found = find(matrix, np.array([9, 500, 20, 1]), ["a", "b", "c", "d"])
    assert found[0].text == "a is taken for b in 40 of 100 images; 9 training images against 500"
    assert len({(f.true_class, f.predicted_class) for f in found}) == 3
    assert find(np.diag([3, 3]), np.array([2, 1]), ["a", "b"]) == []
    only = find(np.array([[0, 1], [0, 5]]), np.array([2, 1]), ["a", "b"])
    assert [f.text for f in only] == ["a is taken for b in 1 of 1 image; 2 training images against 1"]
    rare = find(np.array([[5, 0], [1, 0]]), np.array([2, 1]), ["a", "b"])
    assert rare[0].text == "b is taken for a in 1 of 1 image; 1 training image against 2"


def test_findings_leave_out_classes_without_test_images() -> None:
    found = find(np.array([[5, 5, 0], [0, 0, 0], [0, 1, 9]]), np.array([500, 50, 9]), ["cat", "dog", "wolf"])
    assert [(f.true_class, f.predicted_class) for f in found] == [(0, 1), (2, 1)]
    assert not [f.text for f in found if "dog is" in f.text or "0 of 0" in f.text]


def test_a_pair_leads_to_its_larger_direction_in_view(opened: Any) -> None:
    size = 60
    matrix = np.diag([50] * size)
    matrix[3, 50], matrix[50, 3] = 20, 0  # the frequent class is taken for the rare one
    shows = opened(rendered([shown(matrix, np.arange(size, 0, -1) * 10)], [f"c{c}" for c in range(size)]))
    page = shows.page
    assert page.locator("#order").input_value() == "confusion"  # above 30 classes
    page.select_option("#order", "count")
    page.locator("#pairs tbody tr").first.click()
    assert page.locator("#cell h3").inner_text() == "c3 predicted as c50"
    page.wait_for_timeout(200)
    top = page.evaluate("maps[0].canvas.getBoundingClientRect().top + maps[0].y(3)")
    assert 0 < top < 1000


def test_the_label_of_a_group_says_which_classes_it_has(opened: Any) -> None:
    shows = opened(rendered([shown(HAND, np.array([500, 400, 5]))], NAMES))
    canvas = shows.page.locator("#maps canvas")
    place = shows.cell(0, 0)
    edge = shows.page.evaluate("maps[0].margin + maps[0].side + 10")
    canvas.hover(position={"x": place["x"], "y": edge})
    tip = shows.page.locator("#tip")
    assert (
        tip.inner_text()
        == "many: 2 classes with 400 to 500 training images\nColumns: images predicted as these classes."
    )
    canvas.hover(position={"x": edge, "y": shows.cell(2, 0)["y"]})
    assert tip.inner_text() == "few: 1 class with 5 training images\nRows: images of these classes."


# -- the command -------------------------------------------------------------------------------------------------------


def page_data(run: Path) -> dict[str, Any]:
    text = (run / "confusion" / "index.html").read_text(encoding="utf-8")
    found: dict[str, Any] = json.loads(re.search(r'id="data">(.*?)</script>', text).group(1))  # type: ignore[union-attr]
    return found


@pytest.mark.slow
def test_compare_takes_runs_of_the_same_classes(digits_run: Path, toy_run: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(digits_run, other)
    result = must("confusion-report", "--from", digits_run, "--compare", other / "finetune", "--json")
    assert result.json["status"] == "done"
    assert result.json["compared_with"] == [str(other / "finetune")]
    assert [run["name"] for run in page_data(digits_run)["runs"]] == [digits_run.name, "other"]
    again = must("confusion-report", "--from", digits_run, "--compare", other / "finetune", "--json")
    assert again.json["status"] == "up to date"
    said = must("confusion-report", "--from", digits_run, "--compare", other).stdout.splitlines()[-1]
    here, there = digits_run / "finetune", other / "finetune"
    assert said == f"compares: {here} with {there} (difference: other minus {digits_run.name})"
    refused(2, "is given twice", "confusion-report", "--from", digits_run, "--compare", digits_run)
    others = f"{toy_run} has other classes than {digits_run}"
    refused(3, others, "confusion-report", "--from", digits_run, "--compare", toy_run)
    shutil.rmtree(other / "evaluation")
    refused(3, f"fix: cpmix evaluate --from {other}", "confusion-report", "--from", digits_run, "--compare", other)


@pytest.mark.slow
def test_data_is_for_a_compared_run_of_the_same_data_set_too(tmp_path: Path) -> None:
    data, run, moved = tmp_path / "data", tmp_path / "run", tmp_path / "elsewhere" / "moved"
    must("build-lt", "digits", "--rho", 6.2, "--out", data)
    must("train-stage1", "--data", data, "--recipe", "digits/cross-entropy", "--epochs", 1, "--out", run)
    must("evaluate", "--from", run)
    shutil.copytree(run, tmp_path / "other")
    moved.parent.mkdir()
    data.rename(moved)
    must("confusion-report", "--from", run, "--data", moved, "--compare", tmp_path / "other")


def small_runs(folder: Path) -> tuple[Path, Path]:
    """Two evaluated runs of an epoch on digits, with different seeds."""
    must("build-lt", "digits", "--rho", 6.2, "--out", folder / "data")
    runs = folder / "run", folder / "other"
    for seed, run in enumerate(runs):
        train = ("train-stage1", "--data", folder / "data", "--recipe", "digits/cross-entropy", "--epochs", 1)
        must(*train, "--seed", seed, "--out", run)
        must("evaluate", "--from", run)
    return runs


def names_in(run: Path) -> list[str]:
    return [shown["name"] for shown in page_data(run)["runs"]]


@pytest.mark.slow
@pytest.mark.long
def test_a_plain_report_keeps_the_comparison_until_no_compare(tmp_path: Path) -> None:
    run, other = small_runs(tmp_path)
    report = ("confusion-report", "--from", run)
    must(*report, "--compare", other)
    index = run / "confusion" / "index.html"
    page = index.read_bytes()
    again = must(*report, "--json").json
    assert (again["status"], again["compared_with"]) == ("up to date", [str(other / "stage1")])
    assert (again["comparison_kept"], again["comparison_dropped"]) == (True, [])
    compares = f"compares: {run / 'stage1'} with {other / 'stage1'}, as before; --no-compare drops it "
    assert must(*report).stdout.splitlines()[-1] == f"{compares}(difference: other minus run)"
    assert index.read_bytes() == page

    moved = tmp_path / "place" / "run"  # alone: the absolute path holds; with the other: the relative one
    moved.parent.mkdir()
    run.rename(moved)
    assert must("confusion-report", "--from", moved, "--data", tmp_path / "data", "--json").json["comparison_kept"]
    moved.rename(run)
    must(*report)  # its record has the places as they are now
    shutil.copytree(run, moved)
    shutil.copytree(other, moved.parent / "other")
    for status in ("done", "up to date"):  # the page says with which --data misclassified finds the images
        found = must("confusion-report", "--from", moved, "--data", tmp_path / "data", "--json").json
        assert found["status"] == status
    assert found["compared_with"] == [str(moved.parent / "other" / "stage1")]

    refused(2, "--compare and --no-compare are both given", *report, "--compare", other, "--no-compare")
    must("run", tmp_path / "data", "--recipe", "digits/cross-entropy", "--epochs", 1, "--seed", 0, "--out", run)
    assert names_in(run) == ["run finetune", "other stage1"]
    said = must(*report, "--no-compare").stdout.splitlines()[-1]
    assert said == f"no longer compares: {run / 'finetune'} with {other}"
    assert names_in(run) == ["finetune"]
    assert "compares" not in must(*report).stdout


@pytest.mark.slow
@pytest.mark.long
def test_reports_at_the_same_time_keep_the_comparison(tmp_path: Path) -> None:
    """Whichever comes first: the plain one reads what the page compares with before it may write."""
    run, other = small_runs(tmp_path)
    with ThreadPoolExecutor() as at_once:
        ends = [
            at_once.submit(process, "confusion-report", "--from", run, *flags)
            for flags in (["--compare", other], ["--images", 6])
        ]
    assert [end.result().code for end in ends] == [0, 0], ends
    assert names_in(run) == ["run", "other"]


@pytest.mark.slow
@pytest.mark.long
def test_a_comparison_that_cannot_be_kept_is_dropped_with_a_warning(tmp_path: Path) -> None:
    run, other = small_runs(tmp_path)
    report, index = ("confusion-report", "--from", run), run / "confusion" / "index.html"
    must(*report, "--compare", other, "--images", 0)
    shutil.rmtree(other / "evaluation")
    found = must(*report, "--images", 0)
    again = f"cpmix evaluate --from {other} --phase stage1 && cpmix confusion-report --from {run} --images 0"
    assert f"no longer compares with {other}: no evaluation {other / 'evaluation' / 'stage1'}; " in found.stderr
    assert f"to compare again: {again} --compare {other}\n" in found.stderr
    assert found.stdout.splitlines()[-1] == f"no longer compares: {run / 'stage1'} with {other}"
    assert names_in(run) == ["stage1"]
    run_commands(f"{again} --compare {other}")
    assert names_in(run) == ["run", "other"]

    third = tmp_path / "third"
    shutil.copytree(run, third)
    must(*report, "--compare", other, "--compare", third)
    other.rename(tmp_path / "moved")
    third.rename(tmp_path / "gone")
    where = f"compare with its new folder: cpmix confusion-report --from {run} --compare FOLDER"
    assert must(*report).stderr.count(f"{where}\n") == 2  # neither names the other, which is gone too

    (tmp_path / "moved").rename(other)
    must(*report, "--compare", other)
    other.rename(tmp_path / "moved")
    found = must(*report, "--json")
    assert f"no longer compares with {other}: it is gone; if it has moved, {where}\n" in found.stderr
    assert (found.json["compared_with"], found.json["comparison_dropped"]) == ([], [str(other)])

    record = run / "confusion" / "stage1" / "run.json"
    must(*report, "--compare", tmp_path / "moved")
    fields = json.loads(record.read_text())  # as an older version wrote it
    del fields["compared"], fields["digest"]
    publish_record(record, fields)
    said = f"an older cpmix did not record which; to name them: cpmix confusion-report --from {run} --compare RUN"
    assert said in must(*report).stderr
    record.write_text(record.read_text().replace('"page"', '"pages"'))
    said = (
        f"{record} is damaged; if {index} compared with other runs: cpmix confusion-report --from {run} --compare RUN"
    )
    assert said in must(*report, "--overwrite").stderr


@pytest.mark.slow
def test_images_flag_limits_the_thumbnails(digits_run: Path) -> None:
    whole = page_data(digits_run)["images"]
    assert len(whole["confidence"]) > 3
    must("confusion-report", "--from", digits_run, "--images", 2)
    assert len(page_data(digits_run)["images"]["confidence"]) == 2
    must("confusion-report", "--from", digits_run, "--images", 0)
    assert page_data(digits_run)["images"] is None


def test_the_toy_page_shows_decision_regions(toy_run: Path) -> None:
    text = (toy_run / "confusion" / "index.html").read_text(encoding="utf-8")
    assert text.count("data:image/png;base64,") == 1
    assert "Decision regions" in html.unescape(text)


@pytest.mark.slow
def test_the_page_uses_the_groups_of_the_evaluation(tmp_path: Path) -> None:
    data, run = tmp_path / "data", tmp_path / "run"
    must("build-lt", "digits", "--rho", 6.2, "--out", data)
    must("train-stage1", "--data", data, "--recipe", "digits/cross-entropy", "--epochs", 1, "--out", run)
    for flags, group in (([], "medium"), (["--few-inclusive", "--overwrite"], "few")):
        must("evaluate", "--from", run, *flags)
        must("confusion-report", "--from", run)
        found = page_data(run)["runs"][0]
        counts, groups = (
            np.frombuffer(base64.b64decode(found[key]), dtype="<i4").tolist() for key in ("train_counts", "groups")
        )
        assert GROUPS[groups[counts.index(20)]] == group
