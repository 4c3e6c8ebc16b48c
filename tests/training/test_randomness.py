"""Random numbers of an epoch: flips that alternate."""

from typing import Any

import pytest
import torch
from torch import Tensor

from cpmix_cli.data import augment
from cpmix_cli.data.batches import CropBatches, ImageBatches
from cpmix_cli.recipe.schema import Data, TermRecipe
from cpmix_cli.training.randomness import Draws, Sampler, leaves

COUNT, BATCH, COLUMN = 500, 64, 2
MIXED = {"ratio": "beta", "alpha": 1.0, "mix": "linear", "label": "lambda"}
TERMS = {
    "erm": TermRecipe(draw="natural"),
    "mix": TermRecipe(draw="natural", partner="frequency-power", power=1.0, **MIXED),  # type: ignore[call-arg]
    "cp": TermRecipe(draw="class-uniform", partner="confusion", **MIXED),  # type: ignore[arg-type]
}


def draws(epoch: int, *, alternating: int | None = COLUMN, seed: int = 0, phase: str = "stage1") -> Draws:
    return Sampler(
        TERMS,
        torch.arange(COUNT) % 10,
        10,
        batch_size=BATCH,
        num_uniforms=3,
        key=(seed, phase),
        num_epochs=300,
        alternating=alternating,
    ).epoch(epoch)


def flips(*args: Any, **keys: Any) -> Tensor:
    """Whether each image of the natural batches is flipped, by its index: [COUNT] bool."""
    natural = draws(*args, **keys).natural
    assert natural is not None and natural.index is not None
    found = torch.empty(COUNT, dtype=torch.bool)
    order = natural.index.view(-1)[:COUNT]
    found[order] = natural.augment.view(-1, 3)[:COUNT, COLUMN] < 0.5
    assert order.unique().numel() == COUNT
    return found


def test_each_image_is_flipped_in_every_second_epoch() -> None:
    first = flips(1)
    for epoch in range(2, 6):
        assert flips(epoch).equal(first if epoch % 2 else ~first)
    assert first.double().mean() == pytest.approx(0.5, abs=0.1)
    random = [flips(epoch, alternating=None) for epoch in (1, 2)]
    assert 0.4 < (random[0] == random[1]).double().mean() < 0.6


def test_stages_and_interrupted_runs_continue_the_alternation() -> None:
    """The bits are the seed's, not the phase's; each epoch is drawn from its number only."""
    assert flips(201, phase="stage2").equal(flips(1)) and flips(202, phase="stage2").equal(flips(2))
    assert 0.4 < (flips(1, seed=1) == flips(1)).double().mean() < 0.6


def test_alternating_flips_change_no_other_number() -> None:
    """Crops, angles (what is left of the number modulo 1/2), partners and images drawn with replacement stay."""
    for epoch in (1, 2):
        random, alternating = draws(epoch, alternating=None), draws(epoch)
        assert random.natural is not None and alternating.natural is not None
        assert alternating.natural.augment[..., :COLUMN].equal(random.natural.augment[..., :COLUMN])
        angles = [natural.augment[..., COLUMN] % 0.5 for natural in (random.natural, alternating.natural)]
        assert angles[0].equal(angles[1])
        pairs = zip(leaves(random, Tensor), leaves(alternating, Tensor), strict=True)
        assert [number for number, (a, b) in enumerate(pairs) if not a.equal(b)] == [1]  # natural.augment


def test_both_kinds_of_images_are_mirrored_in_one_of_two_epochs(generator: torch.Generator) -> None:
    images = torch.randint(0, 256, (COUNT, 6, 6, 1), dtype=torch.uint8, generator=generator)
    for batches in (
        ImageBatches(images, Data(padding=0, normalisation="none", flip="alternating"), [], []),
        CropBatches(
            images,
            Data(augment="resized-crop-flip", crop=6, normalisation="none", flip="alternating"),
            [],
            [],
            cropped=True,
        ),
    ):
        assert batches.alternating == (COLUMN if isinstance(batches, ImageBatches) else augment.FLIP)
        sampler = Sampler(
            TERMS,
            torch.arange(COUNT) % 10,
            10,
            batch_size=COUNT,
            num_uniforms=batches.num_uniforms,
            key=(0, "stage1"),
            num_epochs=2,
            alternating=batches.alternating,
        )
        seen = torch.empty(2, COUNT, 6, 6)
        for epoch in (1, 2):
            natural = sampler.epoch(epoch).natural
            assert natural is not None and natural.index is not None
            seen[epoch - 1, natural.index[0]] = batches.batch(natural.index[0], natural.augment[0])[:, 0]
        plain = batches.plain(torch.arange(COUNT))[:, 0]
        in_first = (seen[0] == plain).flatten(1).all(1)
        assert seen[0].equal(torch.where(in_first[:, None, None], plain, plain.flip(2)))
        assert seen[1].equal(torch.where(in_first[:, None, None], plain.flip(2), plain))
