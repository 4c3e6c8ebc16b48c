"""Terms: from the recipe's words to what a training step computes.

A phase minimises the sum of its terms, and a term is draw -> partner -> ratio -> mix -> label -> loss (recipe.Term).
Here the functions are bound that a term names, and its draws of an epoch are made ahead. Shapes: S steps an epoch, B
batch, C classes.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cpmix_cli.data.batches import NUM_UNIFORMS, PUBLISHED, Batches, ClassPool
from cpmix_cli.errors import UsageError
from cpmix_cli.mixing import BATCH_PARTNERS, MixingState
from cpmix_cli.models import MODELS
from cpmix_cli.randomness import stream
from cpmix_cli.recipe import Recipe, Stage
from cpmix_cli.recipe import Term as TermRecipe
from cpmix_cli.vocabulary import TABLES, bind, known

FUNCTIONS = {kind: known(kind, lambda module: vars(import_module(f"cpmix_cli.{module}"))) for kind in TABLES}


@dataclass
class TermBatch:
    """The images of one term in one step."""

    x: Tensor
    """Inputs [B, ...]."""
    y1: Tensor
    """Labels [B] int64."""
    y2: Tensor | None = None
    """Labels of the partners [B]; None where the batch is unmixed."""
    lam: Tensor | None = None
    """lambda_y [B], the weight of y1."""


class Term:
    """One compiled term.

    Args:
        name: its key in [stageN.terms].
        recipe: its table, already checked.
    """

    def __init__(self, name: str, recipe: TermRecipe) -> None:
        self.name = name
        self.weight = recipe.weight
        self.natural = recipe.draw == "natural"
        self.mixed = recipe.partner is not None
        self.in_batch = recipe.partner in BATCH_PARTNERS
        self._per_sample = recipe.per_sample
        self._functions, faults = bind(recipe.functions, recipe.parameters, FUNCTIONS, recipe.keys())
        assert not faults, faults

    def draws(self, steps: int, batch_size: int) -> dict[str, tuple[tuple[int, ...], Any]]:
        """Purpose -> (shape of uniforms, or of ratios where a function draws them, that function or None)."""
        size = (steps, batch_size)
        wanted: dict[str, tuple[tuple[int, ...], Any]] = {}
        if self.natural:
            wanted["augment"] = ((*size, NUM_UNIFORMS), None)  # shared by all natural terms
        else:
            wanted[f"{self.name}/class"] = (size, None)
            wanted[f"{self.name}/image"] = (size, None)
            wanted[f"{self.name}/augment"] = ((*size, NUM_UNIFORMS), None)
        if self.mixed:
            wanted[f"{self.name}/partner"] = (size, None)
            wanted[f"{self.name}/ratio"] = (size if self._per_sample else (steps, 1), self._functions["ratio"])
            if not self.in_batch:
                wanted[f"{self.name}/partner-image"] = (size, None)
                wanted[f"{self.name}/partner-augment"] = ((*size, NUM_UNIFORMS), None)
        return wanted

    def batch(
        self,
        draws: Mapping[str, Tensor],
        natural: tuple[Tensor, Tensor],
        batches: Batches,
        pool: ClassPool,
        state: MixingState,
    ) -> TermBatch:
        """This term's images of one step.

        Args:
            draws: the step's random numbers by purpose, the batch in front (a ratio for the whole batch: [1]).
            natural: inputs and labels of the step's natural batch, already augmented.
            batches: the training images.
            pool: the same by class.
            state: what partners look at.
        """

        def drawn(purpose: str) -> Tensor:
            return draws[f"{self.name}/{purpose}"]

        if self.natural:
            x1, y1 = natural
        else:
            y1 = (drawn("class") * len(state.class_counts)).long()
            x1 = batches.batch(pool.draw(y1, drawn("image")), drawn("augment"))
        if not self.mixed:
            return TermBatch(x1, y1)
        chosen = self._functions["partner"](drawn("partner"), y1, state)
        if self.in_batch:
            x2, y2 = x1[chosen], y1[chosen]
        else:
            y2 = chosen
            x2 = batches.batch(pool.draw(y2, drawn("partner-image")), drawn("partner-augment"))
        x, lam = self._functions["mix"](x1, x2, drawn("ratio"))
        n1, n2 = state.class_counts[y1], state.class_counts[y2]
        return TermBatch(x, y1, y2, self._functions["label"](lam, n1, n2))

    def loss(self, logits: Tensor, batch: TermBatch, class_counts: Tensor) -> Tensor:
        """L(y1, lambda_y) + L(y2, 1 - lambda_y), or L(y) for an unmixed batch; unweighted scalar.

        Args:
            logits: [B, C] float32.
            batch: what they were computed on.
            class_counts: [C].
        """
        loss = self._functions["loss"]
        if batch.y2 is None or batch.lam is None:
            ones = torch.ones_like(batch.y1, dtype=logits.dtype)
            return loss(logits, batch.y1, ones, class_counts)  # type: ignore[no-any-return]
        lam = batch.lam.to(logits.dtype)
        first = loss(logits, batch.y1, lam, class_counts)
        return first + loss(logits, batch.y2, 1 - lam, class_counts)  # type: ignore[no-any-return]


def draw_epoch(terms: list[Term], num_samples: int, batch_size: int, key: tuple[int | str, ...]) -> dict[str, Tensor]:
    """All random numbers of an epoch by purpose, on the CPU; step in front, then the batch.

    Each purpose has its own stream, so two recipes that share a term share its draws. "order" [S, B] holds the images
    of the natural batches, a permutation of all, with zeros after the last.

    Args:
        terms: the phase's terms.
        num_samples: N.
        batch_size: B; the last batch of an epoch uses the first part of its draws.
        key: (seed, phase, epoch).
    """
    steps = -(-num_samples // batch_size)
    order = np.zeros(steps * batch_size, dtype=np.int64)
    order[:num_samples] = stream(*key, "order").permutation(num_samples)
    drawn = {"order": torch.from_numpy(order.reshape(steps, batch_size))}
    wanted = {purpose: how for term in terms for purpose, how in term.draws(steps, batch_size).items()}
    for purpose, (shape, function) in wanted.items():
        generator = stream(*key, purpose)
        drawn[purpose] = torch.from_numpy(generator.random(shape) if function is None else function(generator, shape))
    return drawn


def compile_stage(stage: Stage) -> list[Term]:
    """The terms of a stage whose weight is not zero, in the recipe's order."""
    return [Term(name, recipe) for name, recipe in stage.terms.items() if recipe.weight > 0]


def check_fits(recipe: Recipe, num_classes: int, shape: Sequence[int]) -> None:
    """Check a recipe against a data set, all its phases before the first has trained.

    Args:
        recipe: valid by itself.
        num_classes: C of the data set.
        shape: of one of its images (H, W, channels) or points (2,).

    Raises:
        UsageError: all that does not fit.
    """
    faults = []
    try:
        with torch.device("meta"):
            MODELS[recipe.model.name](num_classes, shape)
    except ValueError as fault:
        faults.append(f'model.name = "{recipe.model.name}": {fault}')
    normalisation = recipe.data.normalisation
    if normalisation in PUBLISHED and len(shape) == 3 and shape[-1] != 3:
        faults.append(f'data.normalisation = "{normalisation}": for 3 channels, the images have {shape[-1]}')
    for table in ("stage1", "stage2", "finetune"):
        stage = getattr(recipe, table)
        if stage is not None:
            faults += _pair_faults(stage, table, num_classes)
    if faults:
        count = f"{len(faults)} fault{'s' if len(faults) > 1 else ''}"
        raise UsageError(f"the recipe has {count}:\n    " + "\n    ".join(faults))


def _pair_faults(stage: Stage, table: str, num_classes: int) -> list[str]:
    """Faults of `fixed` pairs, the one parameter whose range is the data set's."""
    return [
        f"{table}.terms.{name}.pairs: {pair} is not two of the {num_classes} class ids"
        for name, term in stage.terms.items()
        if term.partner == "fixed"
        for pair in term.parameters.get("pairs", [])
        if len(pair) != 2 or not all(0 <= c < num_classes for c in pair)
    ]
