"""Pictures, the pair table, an order of classes, thumbnails. The page: test_page.py."""

import base64
import io

import matplotlib
import numpy as np
import pandas as pd
import pytest
from matplotlib.figure import Figure
from PIL import Image
from test_colours import contrast

from cpmix_cli.data.longtail import group_of
from cpmix_cli.report import figure_files, panels, report_figures
from cpmix_cli.report.images import most_confused, sheet
from cpmix_cli.report.pairs import clustered_order, confused_pairs, relation, trim_confusions


def test_confused_pairs_equal_those_by_hand() -> None:
    matrix = np.array([[90, 2, 0, 0], [5, 10, 0, 0], [1, 0, 8, 4], [0, 0, 3, 7]])
    table = confused_pairs(matrix, np.array([100, 20, 5, 5]))
    assert table.to_dict("list") == {
        "rarer_class": [1, 3, 2],  # 2 and 3 have equal counts: the larger id is the rarer
        "commoner_class": [0, 2, 0],
        "rarer_as_commoner": [5, 3, 1],
        "commoner_as_rarer": [2, 4, 0],
        "count": [7, 7, 1],
        "minority_share": [5 / 7, 3 / 7, 1.0],
    }
    assert table.dtypes.astype(str).tolist() == ["int32", "int32", "int64", "int64", "int64", "float64"]


def test_a_perfect_classifier_has_no_confused_pairs() -> None:
    assert len(confused_pairs(np.diag([3, 4, 5]), np.array([9, 6, 1]))) == 0


def test_pairs_find_the_rarer_class_in_any_class_order() -> None:
    matrix = np.array([[1, 6], [2, 1]])
    table = confused_pairs(matrix, np.array([3, 50]))
    assert table.iloc[0].tolist() == [0, 1, 6, 2, 8, 0.75]


def example(size: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """A confusion matrix, class counts and names with the look of real ones."""
    generator = np.random.Generator(np.random.Philox(seed))
    counts = (500 * 0.005 ** (np.arange(size) / max(1, size - 1))).astype(np.int64)
    matrix = generator.poisson(0.7, (size, size)) + np.diag(generator.integers(5, 60, size))
    matrix[0, 1] += 1 + 2 * seed
    return matrix, counts, [f"class_{c}" for c in range(size)]


def groups(counts: np.ndarray) -> list[str]:
    return [group_of(int(n)) for n in counts]


def heat_map(matrix: np.ndarray, counts: np.ndarray, names: list[str], title: str = "t") -> Figure:
    return report_figures.confusion_heat_map(matrix, names, counts, groups(counts), title=title)


def all_pictures(matrix: np.ndarray, counts: np.ndarray, names: list[str]) -> list[bytes]:
    return drawn(
        heat_map(matrix, counts, names),
        report_figures.grouped_heat_map(matrix, counts, title="t"),
        report_figures.class_accuracy(matrix, names, counts, title="t"),
        report_figures.confusion_histogram(matrix, title="t"),
    )


def drawn(*pictures: Figure) -> list[bytes]:
    return [figure_files.encode(picture, "png") for picture in pictures]


def pixels(png: bytes) -> np.ndarray:
    with Image.open(io.BytesIO(png)) as image:
        return np.asarray(image.convert("RGB"))


@pytest.mark.slow
@pytest.mark.parametrize("size", [2, 4, 10, 100, 300])
def test_every_figure_is_reproducible_at_every_size(size: int) -> None:
    for seed in (0, 1):
        matrix, counts, names = example(size, seed)
        matrix[-1] = 0  # without test images
        made = [all_pictures(matrix, counts, names) for _ in range(1 if size > 10 else 2)]
        assert made[0] == made[-1]  # equal arrays, equal bytes
        if seed == 0:
            first = made[0]
        assert all(min(pixels(png).shape[:2]) >= 500 for png in made[0])
    assert all(a != b for a, b in zip(first, made[0], strict=True))


def test_a_cell_without_images_is_white_and_a_small_one_is_not() -> None:
    matrices = np.array([[[1000, 0], [1, 999]], [[1000, 0], [0, 1000]]])
    picture, empty = (pixels(*drawn(heat_map(m, np.array([50, 5]), ["a", "b"], ""))) for m in matrices)
    height, width = picture.shape[:2]
    column = picture[:, width // 3]  # runs through the left column of cells
    assert (column == 255).all(1).any()
    assert (picture[height // 2 :] != empty[height // 2 :]).any(axis=2).sum() > 1000


def test_numbers_are_rounded_as_on_the_page_and_contrast_with_their_cells() -> None:
    matrix = np.array([[7, 1, 0], [1, 3, 4], [1, 0, 9999]])
    axes = heat_map(matrix, np.array([3, 2, 1]), ["a", "b", "c"]).axes[0]
    assert [t.get_text() for t in axes.texts[:9]] == ["88", "13", "", "13", "38", "50", "<1", "", "100"]
    fills = axes.images[0].to_rgba(axes.images[0].get_array()).reshape(9, 4)
    assert all(contrast(t.get_color(), fill) >= 4.5 for t, fill in zip(axes.texts, fills, strict=False))
    assert [tuple(fills[k]) == (1, 1, 1, 1) for k in (2, 6, 7)] == [True, False, True]
    assert contrast(fills[6], "white") > 1.1  # one image of 10,000


@pytest.mark.slow
def test_as_svg_and_pdf_a_picture_is_small_has_no_date_and_its_fonts() -> None:
    for kind in ("svg", "pdf"):
        first, second = (figure_files.encode(heat_map(*example(100)), kind) for _ in range(2))
        assert first == second
        assert len(first) < 600_000
        assert b"CreationDate" not in first
        assert b"<dc:date>" not in first
    assert b"/SMask" not in first  # nothing is see-through
    assert b"/FontFile2" in first
    assert b"/Type3" not in first


def test_values_of_whole_images_fall_into_whole_bins() -> None:
    """Of 4 test images each, every value is a multiple of 25 per cent; 1, 2 and 4 pairs have one, two and no image."""
    matrix = np.array([[2, 2, 0], [0, 3, 1], [1, 0, 3]])
    axes = Figure().add_subplot()
    panels.draw_histograms(axes, [matrix], [{}])
    heights = {round(b.get_x() + b.get_width(), 1): b.get_height() for b in axes.patches if b.get_height() > 0}
    assert heights == {25.2: 2, 50.2: 1}
    assert sorted(panels.confusion_values(matrix)) == [0, 0, 0, 25, 25, 50]


def test_class_names_are_not_parsed_as_formulas() -> None:
    matrix, counts, _ = example(3)
    names = ["$a^$", "$5^ to $10", "\\frac"]
    for kind in ("png", "svg", "pdf"):
        figure = heat_map(matrix, counts, names, "$x^$")
        assert figure_files.encode(figure, kind)
    assert [t.get_text() for t in figure.axes[0].get_xticklabels()] == names


UNASSIGNED = "\u0378"  # no font has it


def test_letters_that_no_font_has_cause_one_warning(
    recwarn: pytest.WarningsRecorder, capsys: pytest.CaptureFixture[str]
) -> None:
    names = ["caf\u00e9", f"{UNASSIGNED}a", f"b{UNASSIGNED}"]
    matrix, counts, _ = example(3)
    with figure_files.fonts_for([*names, "data"]):
        assert all(all_pictures(matrix, counts, names))
    said = f"no installed font has the letters {UNASSIGNED} of 2 names, such as {UNASSIGNED}a: the figures have boxes"
    told = capsys.readouterr().err
    assert said in told
    assert len(told.splitlines()) == 1
    assert not recwarn.list


def test_letters_are_drawn_with_an_installed_font_that_has_them(capsys: pytest.CaptureFixture[str]) -> None:
    def boxes(letter: str) -> bytes:
        names = [letter, "b", "c"]
        with figure_files.fonts_for(names):
            return figure_files.encode(heat_map(*example(3)[:2], names), "png")

    only_in_stix = "\u24b6"  # STIX comes with matplotlib
    assert boxes(only_in_stix) == boxes(only_in_stix)
    assert capsys.readouterr().err == ""
    plain = drawn(heat_map(*example(3)[:2], [only_in_stix, "b", "c"]))[0]
    assert plain != boxes(only_in_stix)
    assert matplotlib.rcParams["font.family"] == ["sans-serif"]


@pytest.mark.slow
def test_single_cells_of_a_large_matrix_stay_visible() -> None:
    values = np.zeros((7, 5))
    values[6, 4], values[0, 3], values[1, 2] = 3, 2, 1
    assert panels._largest_of_blocks(values, 2).tolist() == [[0, 2, 0], [0, 0, 0], [0, 0, 0], [0, 0, 3]]
    matrix = np.diag([100] * 2400)
    matrix[2000, 300] = 40
    names, counts = [str(c) for c in range(2400)], np.arange(2400, 0, -1)
    one, none = (pixels(*drawn(heat_map(m, counts, names, ""))) for m in (matrix, np.diag([100] * 2400)))
    changed = np.argwhere((one != none).any(2))
    assert len(changed) >= 1
    spread = changed.max(0) - changed.min(0)
    assert (spread <= 6).all()  # a cell, in one place


def test_a_perfect_classifier_has_pictures_too() -> None:
    matrix, counts, names = np.diag([4, 5, 6]), np.array([9, 5, 1]), ["a", "b", "c"]
    assert all(pixels(png).std() > 0 for png in all_pictures(matrix, counts, names))


def test_decision_regions_show_the_classes_of_the_grid() -> None:
    axis = np.linspace(-1, 1, 20)
    halves = np.broadcast_to((axis > 0).astype(int), (20, 20))
    points = np.array([[-0.5, 0.0], [0.5, 0.0], [0.6, 0.1]])
    arguments = (points, np.array([0, 1, 1]), ["left", "right"])
    split = report_figures.decision_regions(axis, halves, *arguments, title="t")
    whole = report_figures.decision_regions(axis, np.zeros((20, 20), int), *arguments, title="t")
    changed = (pixels(*drawn(split)) != pixels(*drawn(whole))).any(axis=2)
    middle = changed.shape[1] // 2
    assert changed[:, middle + 60 :].sum() > 50_000
    assert changed[:, : middle - 60].sum() == 0


def test_classes_confused_with_each_other_are_adjacent() -> None:
    matrix = np.diag([50] * 6)
    for a, b in ((0, 3), (1, 4), (2, 5)):
        matrix[a, b] = matrix[b, a] = 20
    order = clustered_order(matrix).tolist()
    assert sorted(order) == list(range(6))
    assert {frozenset(order[k : k + 2]) for k in (0, 2, 4)} == {frozenset(p) for p in ((0, 3), (1, 4), (2, 5))}


@pytest.mark.parametrize("matrix", [np.diag([3, 2]), np.array([[0, 5], [0, 0]]), np.zeros((4, 4)), np.diag([1] * 5)])
def test_clustered_order_without_confusions_is_a_permutation(matrix: np.ndarray) -> None:
    assert sorted(clustered_order(matrix).tolist()) == list(range(len(matrix)))


def test_relation_of_training_to_test_equals_that_by_hand() -> None:
    confusions = np.array([[0.0, 3, 1], [0, 0, 0], [2, 2, 0]])
    matrix = np.array([[90, 10, 0], [5, 85, 10], [0, 30, 70]])
    # Class 0: training 3/4, 1/4, test 1, 0: overlap 3/4, the same first. Class 1: none in training. Class 2: training
    # 1/2, 1/2, test 0, 1: overlap 1/2, one of its two firsts is the same. Test pairs: 0-1, 1-0, 1-2, 2-1; training has
    # two of them.
    found = relation(confusions, matrix)
    expected = {"num_pairs": 4, "num_top": 4, "top_in_training": 2, "num_classes": 2, "same_first": 2}
    assert found == {**expected, "overlap": 0.625}
    assert relation(confusions, matrix, num_top=1)["top_in_training"] == 1  # 2 taken for 1
    assert relation(confusions, np.diag([1, 1, 1]))["overlap"] is None


def test_the_most_frequent_confusions_of_training_are_kept() -> None:
    confusions = np.array([[0.0, 5, 4, 3], [1, 0, 2, 0], [0, 0, 0, 0], [9, 8, 7, 0]])
    matrix = np.array([[9, 0, 0, 0], [0, 9, 0, 0], [0, 0, 9, 0], [0, 0, 1, 8]])
    # The largest of each row, and 3-2 and 2-3, which the test confuses.
    kept = [[0, 5, 0, 0], [0, 0, 2, 0], [0, 0, 0, 0], [9, 0, 7, 0]]
    assert trim_confusions(confusions, matrix, num_largest=1).tolist() == kept
    assert trim_confusions(confusions, matrix).tolist() == confusions.tolist()


def test_thumbnails_show_the_most_confused_cells_first() -> None:
    wrong = [(0, 1, 0.5), (0, 1, 0.9), (2, 1, 0.99), (0, 1, 0.7), (1, 1, 1.0)]
    table = pd.DataFrame(wrong, columns=["label", "predicted", "confidence"]).reset_index(names="sample_id")
    assert most_confused(table, 3)["sample_id"].tolist() == [1, 3, 0]
    assert most_confused(table, 9)["sample_id"].tolist() == [1, 3, 0, 2]
    assert len(most_confused(table, 0)) == 0
    many = pd.DataFrame({"sample_id": range(20), "label": 0, "predicted": 1, "confidence": np.linspace(0, 1, 20)})
    assert most_confused(many, 100)["sample_id"].tolist() == list(range(19, 11, -1))


def test_thumbnails_keep_their_proportions() -> None:
    tall = np.full((1, 96, 48, 3), 255, dtype=np.uint8)
    chosen = pd.DataFrame({"true_class": [0], "predicted_class": [1], "confidence": [0.5], "sample_id": [0]})
    picture = pixels(base64.b64decode(sheet(tall, 96, chosen, chosen.assign(path="a.jpg"), "").sprite.split(",")[1]))
    assert picture[:, 17:47].min() > 245 and picture[:, [2, -2]].max() < 10


def test_as_many_thumbnails_as_the_flag_allows_fit() -> None:
    chosen = pd.DataFrame({"true_class": 0, "predicted_class": 1, "confidence": 0.5, "sample_id": [0] * 20_000})
    made = sheet([np.zeros((64, 64, 1), np.uint8)] * 20_000, 64, chosen, chosen.assign(path="a.jpg"), "")
    assert max(made.width, made.height) <= 16_383


@pytest.mark.parametrize(("shape", "side"), [((8, 8, 1), 8), ((32, 32, 3), 32), ((96, 96, 3), 64)])
def test_a_sheet_has_each_image_in_its_place(shape: tuple[int, ...], side: int) -> None:
    images = np.stack([np.full(shape, 40 * k, dtype=np.uint8) for k in range(6)])
    chosen = pd.DataFrame({"true_class": 0, "predicted_class": 1, "confidence": 0.5, "sample_id": [5, 0, 3]})
    made = sheet(images[[5, 0, 3]], shape[0], chosen, chosen.assign(source_index=[15, 10, 13]), "")
    assert made.names == ["test image 15", "test image 10", "test image 13"]
    kind, data = made.sprite.split(",")
    assert (kind, made.side, made.width, made.height) == ("data:image/webp;base64", side, 3 * side, side)
    values = pixels(base64.b64decode(data)).mean((0, 2)).reshape(3, side).mean(1)
    assert np.abs(values - [200, 0, 120]).max() < 3
