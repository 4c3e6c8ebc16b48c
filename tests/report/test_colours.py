"""Colour maps of confusions and differences, the colour of text on them, and the rounding of percentages."""

import numpy as np
import pytest
from matplotlib.colors import to_rgb
from matplotlib.typing import ColorType

from cpmix_cli.report.colours import KINDS, MODES, Mode, colour_map, luminance, stops, text_colour
from cpmix_cli.runtime.rounding import percent

BACKGROUND = {"light": "#ffffff", "dark": "#15171a"}
# Machado, Oliveira and Fernandes 2009, severity 1, in linear RGB
COLOUR_BLIND = {
    "protanopia": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "deuteranopia": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
    "tritanopia": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]],
}


def oklab(colours: np.ndarray, sight: str | None = None) -> np.ndarray:
    """OKLab of sRGB colours [N, 3], as someone with a colour-blindness sees them."""
    linear = np.where(colours <= 0.04045, colours / 12.92, ((colours + 0.055) / 1.055) ** 2.4)
    if sight is not None:
        linear = np.clip(linear @ np.array(COLOUR_BLIND[sight]).T, 0, 1)
    cones = np.array(
        [
            [0.4122214708, 0.5363325363, 0.0514459929],
            [0.2119034982, 0.6806995451, 0.1073969566],
            [0.0883024619, 0.2817188376, 0.6299787005],
        ]
    )
    lab = np.array(
        [
            [0.2104542553, 0.7936177850, -0.0040720468],
            [1.9779984951, -2.4285922050, 0.4505937099],
            [0.0259040371, 0.7827717662, -0.8086757660],
        ]
    )
    return np.cbrt(linear @ cones.T) @ lab.T


def levels(kind: str, mode: Mode) -> np.ndarray:
    return colour_map(kind, mode)(np.linspace(0, 1, 257))[:, :3]  # type: ignore[arg-type]


def contrast(a: ColorType, b: ColorType) -> float:
    dark, light = sorted((luminance(a), luminance(b)))
    return (light + 0.05) / (dark + 0.05)


@pytest.mark.parametrize("mode", MODES)
def test_zero_and_masked_cells_have_the_background(mode: Mode) -> None:
    confusion, difference = stops("confusion", mode), stops("difference", mode)
    assert confusion[0] == difference[len(difference) // 2] == BACKGROUND[mode]
    assert len(set(confusion)) == len(confusion) and len(set(difference)) == len(difference)
    for kind in KINDS:
        masked = colour_map(kind, mode)(np.ma.masked_all(1))[0]
        assert tuple(masked) == (*to_rgb(BACKGROUND[mode]), 1.0)


@pytest.mark.parametrize("mode", MODES)
def test_lightness_orders_values_also_for_the_colour_blind(mode: Mode) -> None:
    away = -1 if mode == "light" else 1
    for sight in (None, *COLOUR_BLIND):
        rising = away * oklab(levels("confusion", mode), sight)[:, 0]
        assert (np.diff(rising) > 0).all()
        assert np.diff(rising).max() < 5 * np.diff(rising).mean()  # no jump that looks like a border
        for arm in np.split(away * oklab(levels("difference", mode), sight)[:, 0], [128])[::-1]:
            assert (np.diff(arm) > 0).all() or (np.diff(arm) < 0).all()


@pytest.mark.parametrize("mode", MODES)
def test_better_and_worse_differ_for_the_colour_blind(mode: Mode) -> None:
    for sight in (None, "protanopia", "deuteranopia"):
        lab = oklab(levels("difference", mode), sight)
        apart = np.linalg.norm(lab[:128][::-1] - lab[129:], axis=1)  # of equal distances from zero
        assert (apart[12:] > 0.04).all()  # 1 point is at 0.1 of the scale, whose distance is a square root


@pytest.mark.parametrize("mode", MODES)
def test_small_values_are_faint_and_the_diagonal_is_not(mode: Mode) -> None:
    shown = {share: colour_map("confusion", mode)(share**0.5) for share in (0.001, 0.01, 0.5, 0.9)}
    found = {share: contrast(colour[:3], BACKGROUND[mode]) for share, colour in shown.items()}
    assert 1.1 < found[0.001] < 1.2  # one image in a thousand is there
    assert found[0.01] < 1.5
    assert found[0.5] > 4.5 and found[0.9] > 10


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", KINDS)
def test_text_has_contrast_on_every_cell(kind: str, mode: Mode) -> None:
    for colour in levels(kind, mode):
        assert contrast(colour, text_colour(colour)) >= 4.5


@pytest.mark.parametrize(
    ("value", "places", "text"),
    [
        *(
            (12.5, 0, "13"),
            (0.5, 0, "1"),
            (2.5, 0, "3"),
            (14.499999999999998, 0, "15"),
            (14.4999, 0, "14"),
            (100.0, 0, "100"),
        ),
        *(
            (12.25, 1, "12.3"),
            (1.005, 2, "1.01"),
            (-2.5, 0, "-3"),
            (-0.04, 1, "0.0"),
            (0.0, 1, "0.0"),
            (float("nan"), 2, "nan"),
            (float("inf"), 0, "inf"),
        ),
    ],
)
def test_halves_are_rounded_away_from_zero(value: float, places: int, text: str) -> None:
    assert percent(value, places) == text
