"""The objective of a phase: named terms, from the recipe's functions to a loss.

A phase minimises the weighted sum of its terms. A term is draw -> partner -> ratio -> mix -> label -> loss
(TermRecipe). compile_stage() binds the functions that each term names. Partners are chosen for the whole batch; mixing
and the loss are computed per batch slice.

Shapes: B batch size, P images of a slice, K = 1 or B, C classes, E experts.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from cpmix_cli.data.batches import ClassPool
from cpmix_cli.losses import ENSEMBLE_LOSSES, ROUTING_LOSSES
from cpmix_cli.mixing import MixingState
from cpmix_cli.recipe.functions import FUNCTION_TABLES, Functions, bind, known
from cpmix_cli.recipe.schema import Stage, TermRecipe
from cpmix_cli.runtime.errors import UsageError
from cpmix_cli.training.batch_slices import BatchSlice
from cpmix_cli.training.randomness import Partners, TermDraws


def functions() -> dict[str, Functions]:
    """Return all functions that a term can name, those of a plugin included: kind -> function by name."""
    return {kind: known(kind, lambda module: vars(import_module(f"cpmix_cli.{module}"))) for kind in FUNCTION_TABLES}


@dataclass(frozen=True)
class ClassWeights:
    """Class weights in the loss of a batch."""

    values: Tensor
    """Weight of each class [C]; all 1 in epochs without class weights."""
    enabled: Tensor
    """1 in epochs with class weights, else 0 [1] float64."""
    means: tuple[Tensor | None, Tensor | None]
    """Mean weights over the whole batch, of y1 and of y2; None: the loss uses the mean over the slice."""


@dataclass(frozen=True)
class TermBatch:
    """Slice of a term's batch: network inputs and targets."""

    x: Tensor
    """Inputs of the network after mixing [P, ...]; features [P, E, D] if the term mixes features."""
    y1: Tensor
    """Labels [P] int64."""
    y2: Tensor | None = None
    """Labels of the partners [P] int64; None if unmixed."""
    lam: Tensor | None = None
    """lambda_y, weight of the loss at y1 [P]; None if unmixed."""
    gate: Tensor | None = None
    """True if this batch is mixed [1] bool; None if the term mixes all batches, or none."""
    image_weights: Tensor | None = None
    """See BatchSlice.image_weights()."""
    class_weights: ClassWeights | None = None
    """None: all classes have weight 1."""


@dataclass(frozen=True)
class Output:
    """Logits of a slice of a term's batch, in float32 or float64."""

    logits: Tensor
    """Raw logits of each expert [E, P, C]."""
    routes: Tensor | None = None
    """Logits of the routers [E - 1, P]; None without routers."""
    teacher: Tensor | None = None
    """Logits of the teacher [P, C]; None without a teacher."""


@dataclass(frozen=True, eq=False)
class Term:
    """Term of the objective, with its functions bound."""

    name: str
    recipe: TermRecipe
    functions: Mapping[str, Callable[..., Any]]
    """Functions of mixing.py and losses.py by recipe key ("partner", "loss"), with the recipe's parameters bound."""

    def choose_partners(self, draws: TermDraws, pool: ClassPool, state: MixingState) -> Partners | None:
        """Choose the partners of a whole batch; None for an unmixed term.

        Args:
            draws: random numbers and labels of one step [B].
            pool: training images by class.
            state: class counts and K; its `num_fallbacks` increases in place.

        Returns:
            Labels and indices of the partners [B].
        """
        if draws.mixing is None:
            return None
        found = self.functions["partner"](draws.mixing.choice, draws.labels, state)
        if draws.mixing.image is None:
            return Partners(draws.labels[found], found)
        return Partners(found, pool.draw(found, draws.mixing.image))

    def batch(
        self,
        x1: Tensor,
        x2: Tensor | None,
        draws: TermDraws,
        part: BatchSlice,
        state: MixingState,
        features: tuple[Tensor, Tensor] | None = None,
    ) -> TermBatch:
        """Match, mix and label a slice of the batch.

        Args:
            x1, x2: inputs of the term's images and of their partners [P, ...], or features [P, E, D] if the term mixes
                features; x2 is None if unmixed.
            draws: random numbers, labels and partners of the whole batch [B].
            part: the slice.
            state: class counts and K, for the ratio, the match and the class weights.
            features: features of x1 and of x2 [P, D] if partners are matched in this step, else None.
        """
        y1 = part.select(draws.labels)
        weights = part.image_weights(y1.device)
        if draws.mixing is None or draws.partners is None or x2 is None:
            return TermBatch(x1, y1, None, None, None, weights, self._class_weights(draws, part, state))
        y2 = part.select(draws.partners.labels)
        gate = None if draws.mixing.gate is None else draws.mixing.gate > 0
        if features is not None:
            place = self.functions["match"](features[0], y1, features[1], y2, state)
            x1, y1 = x1[place], y1[place]

        def per_image(values: Tensor) -> Tensor:
            return part.select(values) if self.recipe.per_sample else values

        def gated(lam: Tensor) -> Tensor:
            return lam if gate is None else torch.where(gate, lam, 1.0)

        n1, n2 = state.class_counts[y1], state.class_counts[y2]
        lam = per_image(draws.mixing.ratio)
        if "ratio" in self.functions:
            lam = self.functions["ratio"](lam, n1, n2)
        x, lam = self.functions["mix"](x1, x2, gated(lam), per_image(draws.mixing.uniforms))
        lam = gated(self.functions["label"](lam, n1, n2))
        return TermBatch(x, y1, y2, lam, gate, weights, self._class_weights(draws, part, state))

    def _class_weights(self, draws: TermDraws, part: BatchSlice, state: MixingState) -> ClassWeights | None:
        """Return the class weights of this step's loss; None without `reweight`."""
        if draws.reweight is None:
            return None
        values = torch.where(draws.reweight > 0, self.functions["reweight"](state.class_counts), 1.0)
        if part.is_whole or draws.matching:  # a rank knows only its own matched images
            return ClassWeights(values, draws.reweight, (None, None))
        second = None if draws.partners is None else values[draws.partners.labels].mean()
        return ClassWeights(values, draws.reweight, (values[draws.labels].mean(), second))

    def loss(self, output: Output, batch: TermBatch, class_counts: Tensor) -> Tensor:
        """Compute the loss of the term, a scalar without the term's weight.

        Mixed: L(y1, lambda_y) + L(y2, 1 - lambda_y); unmixed: L(y1). The regulariser and the distillation are added.
        Padding has weight 0 in L, but not in regularisers, distillation and routing losses.

        Args:
            output: logits of the slice [E, P, C].
            batch: targets of the slice.
            class_counts: training images per class [C].

        Raises:
            UsageError: the loss returns no scalar.
        """
        logits = output.logits
        total: Tensor
        if self.recipe.loss in ROUTING_LOSSES:
            total = self.functions["loss"](logits, output.routes, batch.y1)
            return total
        if batch.y2 is None or batch.lam is None:
            ones = torch.ones_like(batch.y1, dtype=logits.dtype)
            total = self._share(logits, batch.y1, ones, batch, class_counts, which=0)
        else:
            lam = batch.lam.to(logits.dtype)
            total = self._share(logits, batch.y1, lam, batch, class_counts, which=0)
            total = total + self._share(logits, batch.y2, 1 - lam, batch, class_counts, which=1)
        if "regulariser" in self.functions:
            enabled = logits.new_zeros(1) if batch.class_weights is None else batch.class_weights.enabled
            total = total + self.functions["regulariser"](logits, class_counts, enabled)
        if "teacher" in self.functions:
            total = total + self.functions["teacher"](logits, output.teacher)
        return total

    def _share(
        self, logits: Tensor, labels: Tensor, lam: Tensor, batch: TermBatch, class_counts: Tensor, which: int
    ) -> Tensor:
        """Compute L(labels, lam), summed over the experts; `which` is 0 for y1 and 1 for y2."""
        if batch.image_weights is not None:
            lam = lam * batch.image_weights.to(logits.dtype)
        if batch.class_weights is not None:
            weights = batch.class_weights.values[labels].to(logits.dtype)
            if self.recipe.reweight_norm == "batch-sum":
                mean = batch.class_weights.means[which]
                weights = weights / (weights.mean() if mean is None else mean.to(logits.dtype))
            lam = lam * weights
        taken = [logits] if self.recipe.loss in ENSEMBLE_LOSSES else list(logits)
        losses = [self.functions["loss"](z, labels, lam, class_counts) for z in taken]
        if losses[0].ndim:  # its sum would train, too
            raise UsageError(
                f'loss "{self.recipe.loss}" of term {self.name} returns shape {list(losses[0].shape)}, not a scalar',
                fix="return the mean over the batch: (weights * losses).mean()",
            )
        return torch.stack(losses).sum()


def compile_stage(stage: Stage) -> tuple[Term, ...]:
    """Return a stage's terms in the recipe's order, with their functions bound; terms of weight 0 are left out."""
    terms, known_functions = [], functions()
    for name, recipe in stage.terms.items():
        if recipe.weight > 0:
            bound, faults = bind(recipe.functions, recipe.parameters, known_functions, TermRecipe.model_fields)
            assert not faults, faults  # loading.resolve() reports them earlier
            terms.append(Term(name, recipe, bound))
    return tuple(terms)
