"""The test images of a cell on the page of confusion-report: names, larger view, list of files."""

import base64
import shlex
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from helpers import must, write_photos
from test_page import COUNTS, HAND, NAMES, browser, opened, page_data, rendered, shown

from cpmix_cli.report.images import ContactSheet, sheet

__all__ = ["browser", "opened"]  # fixtures
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # playwright's event loop

PATHS = ["wolf/grey wolf.jpg", "wolf/<b>.png", "wolf/3.jpg"]
COLOURS = [(200, 40, 40), (40, 200, 40), (40, 40, 200)]


def three_wolves(side: int = 16) -> ContactSheet:
    """Three images, red, green and blue, of the 30 wolves that HAND has as dogs."""
    chosen = pd.DataFrame({"true_class": 2, "predicted_class": 1, "confidence": [0.99, 0.5049, 0.42]})
    images = [np.full((side, side, 3), colour, np.uint8) for colour in COLOURS]
    return sheet(images, side, chosen, pd.DataFrame({"path": PATHS}), "--phase stage1")


@pytest.mark.parametrize("side", [16, 200])
def test_the_larger_view_leads_through_the_images_by_keyboard(opened: Any, side: int) -> None:
    page = opened(rendered([shown(HAND, COUNTS)], NAMES, images=three_wolves(side))).page
    assert page.locator(".thumbs li").all_inner_texts() == [
        f"{path}\n{confidence} %" for path, confidence in zip(PATHS, ("99.0", "50.5", "42.0"), strict=True)
    ]
    dialog = page.get_by_role("dialog")

    def seen() -> list[str]:
        dialog.wait_for()
        page.wait_for_timeout(50)  # the sheet is decoded
        pixel = page.evaluate(
            "[...document.querySelector('#enlarged canvas').getContext('2d').getImageData(99, 99, 1, 1).data]"
        )
        number = int(np.argmin([np.abs(np.subtract(pixel[:3], colour)).max() for colour in COLOURS]))
        assert np.abs(np.subtract(pixel[:3], COLOURS[number])).max() < 12
        return [PATHS[number], dialog.locator("h3").inner_text(), dialog.locator("#enlarged-place").inner_text()]

    page.get_by_role("button", name="enlarge wolf/<b>.png").focus()
    page.keyboard.press("Enter")
    assert seen() == [PATHS[1], PATHS[1], "2 of 3"]
    assert dialog.locator("dl").inner_text().split("\n") == [
        *("true class", "wolf", "predicted class", "dog", "confidence", "50.5 %")
    ]
    page.keyboard.press("Enter")  # the button "next" has the focus
    assert seen() == [PATHS[2], PATHS[2], "3 of 3"]
    page.keyboard.press("ArrowRight")
    assert seen() == [PATHS[0], PATHS[0], "1 of 3"]
    page.keyboard.press("ArrowLeft")
    page.keyboard.press("ArrowLeft")
    page.get_by_role("button", name="previous image").click()
    assert seen() == [PATHS[0], PATHS[0], "1 of 3"]
    page.keyboard.press("Escape")
    dialog.wait_for(state="hidden")
    assert page.evaluate("document.activeElement.ariaLabel") == f"enlarge {PATHS[0]}"
    assert page.locator("#cell h3").inner_text() == "wolf predicted as dog"


def test_an_image_is_never_cropped_in_the_larger_view(opened: Any) -> None:
    page = opened(rendered([shown(HAND, COUNTS)], NAMES, images=three_wolves())).page
    page.set_viewport_size({"width": 320, "height": 500})
    page.locator(".thumb").first.click()
    dialog, canvas = page.get_by_role("dialog").bounding_box(), page.locator("#enlarged canvas").bounding_box()
    assert dialog["x"] >= 0 and dialog["x"] + dialog["width"] <= 320
    assert canvas["width"] == canvas["height"] > 250
    assert page.evaluate("document.querySelector('#enlarged canvas').width") == 18 * 16  # whole pixels


def test_the_list_of_files_is_copied(opened: Any) -> None:
    page = opened(rendered([shown(HAND, COUNTS)], NAMES, images=three_wolves())).page
    page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    page.get_by_role("button", name="copy the list of files").click()
    button = page.get_by_role("button", name="copied 3 names")
    button.wait_for()
    assert page.locator("#spoken").inner_text() == "copied 3 names"
    assert page.evaluate("navigator.clipboard.readText()") == "\n".join(PATHS)

    # As in a page of http, which has no navigator.clipboard; what was copied is pasted.
    page.evaluate("navigator.clipboard.writeText('').then(() => delete Navigator.prototype.clipboard)")
    button.click()
    page.wait_for_timeout(50)
    assert page.evaluate("document.activeElement.textContent") == "copied 3 names"
    page.evaluate("document.querySelector('main').append(element('textarea', { id: 'pasted' }))")
    page.locator("#pasted").press("Control+v")
    assert page.locator("#pasted").input_value() == "\n".join(PATHS)


def test_a_cell_says_how_to_list_the_images_that_the_page_leaves_out(opened: Any) -> None:
    names = ["cat", "dog", "it's a wolf"]
    page = opened(rendered([shown(HAND, COUNTS)], names, images=three_wolves())).page
    panel = page.locator("#cell")
    assert "the 3 most confident of 30 images, with the confidence:" in panel.inner_text()
    said = panel.locator("code").inner_text().strip()
    assert shlex.split(said) == [
        *("cpmix", "misclassified", "--from", "RUN", "--phase", "stage1"),
        *("--true", "it's a wolf", "--predicted", "dog", "--limit", "30"),
    ]
    page.get_by_role("link", name="cat is taken for dog").click()
    panel.get_by_text("The page has images of the most confused cells only, not of this one.").wait_for()
    assert panel.locator("code").inner_text().strip().endswith("--true cat --predicted dog --limit 10")


# -- the command -------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_command_on_the_page_lists_the_cell_wherever_the_run_is(
    digits_run: Path, tmp_path: Path, opened: Any
) -> None:
    must("confusion-report", "--from", digits_run, "--images", 1)
    moved = tmp_path / "it's moved" / "confusion"
    moved.parent.mkdir()
    digits_run.rename(moved)
    page = opened(moved / "confusion" / "index.html").page
    panel = page.locator("#cell")
    command = shlex.split(panel.locator("code").inner_text())
    assert command[:6] == ["cpmix", "misclassified", "--from", str(moved), "--phase", "finetune"]
    listed = must(*command[1:], "--json").json["images"]
    assert f"the 1 most confident of {len(listed)} images" in panel.inner_text()
    assert panel.locator(".thumbs li").inner_text().split("\n") == [
        *(f"test image {listed[0]['image']}", f"{100 * listed[0]['confidence']:.1f} %")
    ]


@pytest.mark.slow
def test_images_of_a_folder_have_their_paths(tmp_path: Path) -> None:
    write_photos(tmp_path / "photos", {"red": 30, "green": 30, "blue": 8})
    data, run = tmp_path / "data", tmp_path / "run"
    must("build-lt", "image-folder", "--data-root", tmp_path / "photos", "--image-size", 16, "--out", data)
    must("train-stage1", "--data", data, "--out", run, "--recipe", "digits/cross-entropy", "--epochs", 1)
    must("evaluate", "--from", run)
    must("confusion-report", "--from", run)
    images = page_data(run)["images"]
    listed = must("misclassified", "--from", run, *images["listing"].split(), "--json").json["images"]
    assert listed and images["are_files"]
    true = np.frombuffer(base64.b64decode(images["true_class"]), "<i4")
    assert [Path(name).parent.name for name in images["names"]] == [["blue", "green", "red"][c] for c in true]
    assert {str(tmp_path / "photos" / name) for name in images["names"]} <= {image["image"] for image in listed}
