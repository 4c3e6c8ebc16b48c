"""The random numbers of an epoch by purpose, made from the named streams alone: what the sampler is tested against."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from cpmix_cli.mixing import CLASS_PARTNERS
from cpmix_cli.training.objective import Term
from cpmix_cli.training.randomness import stream


def draw_epoch(
    terms: Sequence[Term],
    num_samples: int,
    batch_size: int,
    key: tuple[int | str, ...],
    epoch: int,
    num_epochs: int,
    num_uniforms: int,
) -> dict[str, Tensor]:
    """All random numbers of an epoch by purpose, [S, B] or as the purpose has it."""
    steps = -(-num_samples // batch_size)
    size = (steps, batch_size)
    order = np.zeros(steps * batch_size, dtype=np.int64)
    order[:num_samples] = stream(*key, epoch, "order").permutation(num_samples)
    drawn = {"order": order.reshape(size)}
    shapes: dict[str, tuple[int, ...]] = {}
    for term in terms:
        recipe, name = term.recipe, term.name
        several = size if recipe.per_sample else (steps, 1)
        if recipe.draw == "natural":
            shapes["augment"] = (*size, num_uniforms)
        else:
            shapes |= {f"{name}/class": size, f"{name}/image": size, f"{name}/augment": (*size, num_uniforms)}
        if recipe.partner is not None:
            assert recipe.alpha is not None
            shapes |= {f"{name}/partner": size, f"{name}/box": (*several, 2)}
            drawn[f"{name}/ratio"] = stream(*key, epoch, f"{name}/ratio").beta(recipe.alpha, recipe.alpha, several)
        if recipe.partner in CLASS_PARTNERS:
            shapes |= {f"{name}/partner-image": size, f"{name}/partner-augment": (*size, num_uniforms)}
        if recipe.is_gated:
            is_open = recipe.unmixed_first < epoch <= num_epochs - recipe.unmixed_last
            gate = stream(*key, epoch, f"{name}/gate").random((steps, 1)) < recipe.probability * is_open
            drawn[f"{name}/gate"] = gate * 1.0
    drawn |= {purpose: stream(*key, epoch, purpose).random(shape) for purpose, shape in shapes.items()}
    return {purpose: torch.from_numpy(values) for purpose, values in drawn.items()}
