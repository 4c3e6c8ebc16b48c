"""The page of confusion-report, in a real browser where there is one (Debian's chromium), and as text."""

import html
import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from conftest import cpmix, must

from cpmix_cli.report.page import ShownRun, render_page
from cpmix_cli.report.pairs import clustered_order, confused_pairs, relation

CHROMIUM = shutil.which("chromium")
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # playwright's event loop


def shown(matrix: np.ndarray, counts: np.ndarray, name: str = "run", confusions: np.ndarray | None = None) -> ShownRun:
    """A run of the page with two bins of confidence."""
    reliability = np.full((15, 3), np.nan)
    reliability[:, 0] = 0
    reliability[3], reliability[14] = (40, 0.25, 0.5), (60, 0.99, 0.9)
    related = {} if confusions is None else relation(confusions, matrix)
    return ShownRun(name, [("Data", "by hand")], counts, matrix, confusions, reliability, related)


def rendered(runs: list[ShownRun], names: list[str], *, order: np.ndarray | None = None, **more: Any) -> str:
    """A page with the smallest of everything else."""
    pairs = confused_pairs(sum(run.matrix for run in runs), runs[0].class_counts)
    named = pd.DataFrame({"rarer class": [names[c] for c in pairs["rarer_class"]], "confusions": pairs["count"]})
    fields = {
        "title": "Confusion",
        "notes": [],
        "accuracy": pd.DataFrame({"evaluation": ["stage1"], "top-1": ["12.50"]}),
        "images": None,
        "pictures": [],
        "embedded": [],
    }
    clustered = clustered_order(runs[0].matrix) if order is None else order
    return render_page(
        **fields | more, runs=runs, class_names=names, pairs=pairs, named_pairs=named.head(100), clustered=clustered
    )


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
    assert "default-src 'none'" in page and "unsafe" not in page
    assert 'src="data:image/png;base64,iVBORw=="' in page
    assert '<td class="number">12.50</td>' in page
    data = json.loads(re.search(r'id="data">(.*?)</script>', page).group(1))  # type: ignore[union-attr]
    assert data["names"][0] == evil


def test_page_is_in_full_without_scripts() -> None:
    page = rendered([shown(HAND, COUNTS)], NAMES)
    table = re.search(r'<table id="pairs".*?</table>', page, re.DOTALL)
    assert table is not None
    assert re.findall(r'<th scope="row">(\w+)</th><td class="number">(\d+)</td>', table[0]) == [
        ("wolf", "40"),
        ("dog", "15"),
    ]


def test_page_of_8142_classes_is_small() -> None:
    size = 8142
    generator = np.random.Generator(np.random.Philox(0))
    matrix = np.zeros((size, size), dtype=np.int16)
    np.add.at(matrix, (np.repeat(np.arange(size), 3), generator.integers(0, size, 3 * size)), 1)  # nothing is right
    counts = np.maximum(2, (1000 * 500 ** (-np.arange(size) / size)).astype(np.int64))
    names = [f"Genus{c} species-{c}" for c in range(size)]
    assert len(rendered([shown(matrix, counts)], names, order=np.arange(size))) < 3_000_000


# -- in the browser ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Headless chromium."""
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

    def cell(self, row: int, column: int, number: int = 0) -> tuple[float, float]:
        """Where the middle of a cell of a map is, in its canvas."""
        place = self.page.evaluate(
            f"(() => {{ const m = maps[{number}]; return [m.x({column}) + m.cell / 2, m.y({row}) + m.cell / 2]; }})()"
        )
        return place[0], place[1]

    def point(self, row: int, column: int, number: int = 0) -> str:
        """Point at a cell; what the tip says."""
        x, y = self.cell(row, column, number)
        self.page.locator("#maps canvas").nth(number).hover(position={"x": x, "y": y})
        return str(self.page.locator("#tip").inner_text())

    def colour(self, row: int, column: int, number: int = 0) -> list[int]:
        """Of a cell, away from its number."""
        x, y = self.cell(row, column, number)
        away = f"- maps[{number}].cell * 0.4"
        got: list[int] = self.page.evaluate(
            f"[...maps[{number}].canvas.getContext('2d').getImageData({x} {away}, {y} {away}, 1, 1).data].slice(0, 3)"
        )
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


def test_pointing_at_cells_tells_what_they_are(opened: Any) -> None:
    shows = opened(rendered([shown(HAND, COUNTS, confusions=np.array([[0.0, 3, 1], [0, 0, 0], [2, 2, 0]]))], NAMES))
    assert shows.point(2, 1) == "wolf taken for dog\n30 of 100 test images (30.0 %)\ntraining images: 5 and 50"
    assert shows.point(0, 0) == "cat, right\n90 of 100 test images (90.0 %)\n500 training images"
    assert shows.point(0, 2) == "cat taken for wolf\n0 of 100 test images (0.0 %)\ntraining images: 500 and 5"
    panel = shows.page.locator("#cell")
    assert "1 of 4 confusions of the class" in panel.inner_text()
    shows.page.mouse.move(5, 5)
    assert shows.page.locator("#tip").is_hidden()
    assert "Point at a cell" in panel.inner_text()
    x, y = shows.cell(2, 1)
    shows.page.locator("#maps canvas").click(position={"x": x, "y": y})
    shows.point(0, 0)
    assert panel.locator("h3").inner_text() == "wolf taken for dog"  # a click keeps it


def test_groups_are_the_sums_of_their_classes(opened: Any) -> None:
    shows = opened(rendered([shown(HAND, COUNTS)], NAMES))
    shows.page.select_option("#grouping", "groups")
    assert shows.page.evaluate("places.labels") == ["many", "medium", "few"]
    assert shows.point(2, 1) == "few taken for medium\n30 of 100 test images (30.0 %)"
    two = opened(rendered([shown(HAND, np.array([500, 400, 5]))], NAMES))
    two.page.select_option("#grouping", "groups")
    assert two.point(0, 0) == "many, right\n190 of 200 test images (95.0 %)"
    assert two.point(0, 1) == "many taken for few\n10 of 200 test images (5.0 %)"


def test_orders(opened: Any) -> None:
    shows = opened(rendered([shown(HAND, np.array([5, 50, 500]))], ["b10", "b9", "a"]))
    labels = {}
    for order in ("count", "confusion", "accuracy", "name"):
        shows.page.select_option("#order", order)
        labels[order] = shows.page.evaluate("places.labels")
    assert labels["count"] == ["a", "b9", "b10"]
    assert labels["accuracy"] == ["b10", "b9", "a"]
    assert labels["name"] == ["a", "b9", "b10"]
    assert labels["confusion"][1] == "b9"  # confused with both


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_an_empty_cell_is_the_page_and_one_with_few_images_is_not(opened: Any, scheme: str) -> None:
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


def test_compared_runs_stand_beside_each_other_with_their_difference(opened: Any) -> None:
    better = np.array([[80, 20, 0], [5, 90, 5], [0, 10, 90]])
    shows = opened(rendered([shown(HAND, COUNTS, "plain"), shown(better, COUNTS, "mixed")], NAMES))
    titles = shows.page.locator("#maps h3").all_inner_texts()
    assert titles == ["plain", "mixed", "mixed less plain"]
    assert shows.page.evaluate("maps[2].value(2 * 3 + 1)") == -20
    assert shows.point(2, 1, 2).splitlines() == [
        "wolf taken for dog",
        "plain: 30 of 100 test images (30.0 %)",
        "mixed: 10 of 100 test images (10.0 %)",
        "training images: 5 and 50",
    ]
    gain, loss = shows.colour(2, 2, 2), shows.colour(2, 1, 2)
    assert gain[2] > gain[0] and loss[0] > loss[2]  # blue and orange
    table = shows.page.locator("#pairs")
    assert table.locator("tbody tr").first.locator("th, td").all_inner_texts()[-1] == "-25"  # dog and wolf: 40, then 15
    keys = shows.page.locator(".legend").first.inner_text()
    assert keys == "plainmixed"


def test_keyboard_moves_zooms_and_speaks(opened: Any) -> None:
    shows = opened(rendered([shown(HAND, COUNTS)], NAMES))
    page = shows.page
    page.get_by_role("application", name="run. Arrow keys move").focus()
    for key in ("ArrowDown", "ArrowDown", "ArrowRight"):
        page.keyboard.press(key)
    assert page.locator("#spoken").inner_text().startswith("dog, right")
    page.keyboard.press("ArrowDown")
    assert page.locator("#spoken").inner_text().startswith("wolf taken for dog")
    page.keyboard.press("End")
    assert page.evaluate("state.cursor") == {"row": 2, "column": 2}
    page.keyboard.press("Escape")
    assert page.evaluate("state.cursor") is None


def test_zoom_keeps_the_cell_and_shows_names(opened: Any) -> None:
    size = 300
    matrix = np.diag([9] * size) + np.eye(size, k=1, dtype=int)
    shows = opened(rendered([shown(matrix, np.arange(size, 0, -1))], [f"class {c}" for c in range(size)]))
    page = shows.page
    before = shows.cell(200, 201)
    page.evaluate("zoom(0.1, { row: 200, column: 201 })")
    page.wait_for_timeout(100)
    assert page.evaluate("state.span") == 30
    after = shows.cell(200, 201)
    assert max(abs(a - b) for a, b in zip(before, after, strict=True)) < 0.2 * 900
    assert shows.point(200, 201).startswith("class 200 taken for class 201")
    page.get_by_role("button", name="whole").click()
    assert page.evaluate("state.span") == size
    find = page.get_by_role("combobox", name="Class").first
    find.fill("class 250")
    find.press("Enter")
    assert page.evaluate("state.cursor") == {"row": 250, "column": 250}
    assert page.evaluate("state.span") == 12


def test_tables_sort_filter_and_lead_to_the_cell(opened: Any) -> None:
    size = 30
    matrix = np.diag([50] * size)
    matrix[np.arange(1, size), 0] = np.arange(1, size)  # class c is taken for class 0 c times
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
    assert page.locator("#cell h3").inner_text() == "class 12 taken for class 0"
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


def test_page_of_a_real_run(digits_run: Path, opened: Any) -> None:
    must("confusion-report", "--from", digits_run, "--overwrite")
    shows = opened(digits_run / "confusion" / "index.html")
    cells = pd.read_parquet(digits_run / "confusion" / "finetune" / "confusion_matrix.parquet")
    counts = pd.read_parquet(digits_run / "finetune" / "class_counts.parquet")["num_train"].to_numpy()
    order = np.argsort(-counts, kind="stable").tolist()
    wrong = cells[cells["true_class"] != cells["predicted_class"]].sort_values("count", ascending=False).iloc[0]
    row, column = order.index(wrong["true_class"]), order.index(wrong["predicted_class"])
    assert f"{wrong['count']} of 50 test images" in shows.point(row, column)
    x, y = shows.cell(row, column)
    shows.page.locator("#maps canvas").click(position={"x": x, "y": y})
    thumbs = shows.page.get_by_role("img", name=re.compile("test image: .* taken for"))
    assert thumbs.count() == min(8, wrong["count"])
    for name in ("accuracy", "histogram", "calibration", "relation"):
        data = shows.page.evaluate(
            f"new Set(document.getElementById('plot-{name}').getContext('2d').getImageData(60, 10, 300, 250).data).size"
        )
        assert data > 3, name


# -- the command -------------------------------------------------------------------------------------------------------


def page_data(run: Path) -> dict[str, Any]:
    text = (run / "confusion" / "index.html").read_text(encoding="utf-8")
    found: dict[str, Any] = json.loads(re.search(r'id="data">(.*?)</script>', text).group(1))  # type: ignore[union-attr]
    return found


def test_compare_takes_runs_of_the_same_classes(digits_run: Path, toy_run: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(digits_run, other)
    result = must("confusion-report", "--from", digits_run, "--compare", other / "finetune", "--json")
    assert result.json["status"] == "done"
    assert [run["name"] for run in page_data(digits_run)["runs"]] == [digits_run.name, "other"]
    again = must("confusion-report", "--from", digits_run, "--compare", other / "finetune", "--json")
    assert again.json["status"] == "up to date"
    must("confusion-report", "--from", digits_run)
    assert len(page_data(digits_run)["runs"]) == 1

    refused = cpmix("confusion-report", "--from", digits_run, "--compare", toy_run)
    assert refused.code == 3
    assert f"{toy_run} has other classes than {digits_run}" in refused.stderr
    shutil.rmtree(other / "evaluation")
    refused = cpmix("confusion-report", "--from", digits_run, "--compare", other)
    assert refused.code == 3
    assert f"fix: cpmix evaluate --from {other}" in refused.stderr


def test_images_are_as_many_as_asked_for(digits_run: Path) -> None:
    whole = page_data(digits_run)["images"]
    assert len(whole["confidence"]) > 3
    must("confusion-report", "--from", digits_run, "--images", 2)
    assert len(page_data(digits_run)["images"]["confidence"]) == 2
    must("confusion-report", "--from", digits_run, "--images", 0)
    assert page_data(digits_run)["images"] is None


def test_the_toys_page_has_its_regions(toy_run: Path) -> None:
    text = (toy_run / "confusion" / "index.html").read_text(encoding="utf-8")
    assert text.count("data:image/png;base64,") == 1
    assert "Decision regions" in html.unescape(text)
