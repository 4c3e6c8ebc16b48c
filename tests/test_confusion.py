"""Confusion counts against a loop, and the pair distribution against K."""

import torch

from cpmix_cli.confusion import count_confusions, count_images, draw_confused, draw_weighted, prediction_codes

YES = torch.ones((), dtype=torch.bool)


def test_confusion_counts_equal_a_plain_loop(generator: torch.Generator) -> None:
    labels = torch.randint(0, 5, (300,), generator=generator)
    predictions = torch.randint(0, 5, (300,), generator=generator)
    counted = torch.rand(300, generator=generator) < 0.7
    counts, images = torch.zeros(5, 5, dtype=torch.float64), torch.zeros(5, dtype=torch.float64)
    num_errors = 0
    for batch in range(3):
        part = slice(100 * batch, 100 * batch + 100)
        codes = prediction_codes(labels[part], predictions[part], counted[part], 5)
        num_errors += int(count_confusions(counts, codes))
        count_images(images, codes)
    expected, seen = [[0] * 5 for _ in range(5)], [0] * 5
    for y, p, used in zip(labels.tolist(), predictions.tolist(), counted.tolist(), strict=True):
        seen[y] += used
        if used and y != p:
            expected[y][p] += 1
    assert counts.tolist() == expected
    assert images.tolist() == seen
    assert counts.diagonal().sum() == 0
    assert num_errors == counts.sum()


def test_pairs_follow_the_rows_of_k(generator: torch.Generator) -> None:
    counts = torch.tensor([[0, 6, 3, 1], [1, 0, 0, 0], [5, 5, 0, 0], [2, 2, 4, 0]]).double()
    draws = 40_000
    for c in range(4):
        uniforms = torch.rand(draws, dtype=torch.float64, generator=generator)
        partners, fell_back = draw_confused(counts, torch.full((draws,), c), uniforms)
        found = torch.bincount(partners, minlength=4).double() / draws
        expected = counts[c] / counts[c].sum()
        # Five standard deviations of a binomial share; zero cells exactly zero.
        assert ((found - expected).abs() <= 5 * (expected * (1 - expected) / draws).sqrt()).all()
        assert not fell_back.any()


def test_inverse_cdf_is_exact_at_its_borders() -> None:
    weights = torch.tensor([[0.0, 2.0, 0.0, 1.0, 1.0, 0.0]]).double().expand(6, -1)
    below_one = 1 - 2.0**-53
    uniforms = torch.tensor([0.0, 0.4999, 0.5, 0.7499, 0.75, below_one], dtype=torch.float64)
    assert draw_weighted(weights, uniforms).tolist() == [1, 1, 3, 3, 4, 4]


def test_inverse_cdf_never_draws_past_a_trailing_zero() -> None:
    for total in (3.0, 7.0, 9502.0, 1e6 + 3):  # u * total rounds up to total for some of these
        weights = torch.tensor([[total - 1, 1.0, 0.0]], dtype=torch.float64)
        assert draw_weighted(weights, torch.tensor([1 - 2.0**-53]).double()).item() == 1


def test_an_empty_row_falls_back_to_its_column_then_to_all_others() -> None:
    counts = torch.zeros(4, 4, dtype=torch.float64)
    counts[2, 0] = 3.0  # class 2 was taken for 0; nothing else was ever confused
    uniforms = torch.tensor([0.0, 0.3, 0.6, 0.99], dtype=torch.float64)
    partners, fell_back = draw_confused(counts, torch.full((4,), 0), uniforms)
    assert partners.tolist() == [2, 2, 2, 2]
    assert fell_back.all()
    partners, fell_back = draw_confused(counts, torch.full((4,), 1), uniforms)
    assert partners.tolist() == [0, 0, 2, 3]
    assert fell_back.all()
    partners, fell_back = draw_confused(counts, torch.full((4,), 2), uniforms)
    assert partners.tolist() == [0, 0, 0, 0]
    assert not fell_back.any()
