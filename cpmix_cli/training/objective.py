"""Terms: from the recipe's words to what a training step computes.

A phase minimises the sum of its terms, and a term is draw -> partner -> ratio -> mix -> label -> loss (recipe.Term).
Here the functions are bound that a term names, and its draws of an epoch are made ahead. Draws, partners and labels are
those of the whole batch; images are made for a part of it, a rank's share or a piece of that. Shapes: S steps an epoch,
B batch, P images of a part, C classes.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from cpmix_cli.data.batches import ClassPool
from cpmix_cli.losses import ENSEMBLE_LOSSES, ROUTING_LOSSES
from cpmix_cli.mixing import BATCH_PARTNERS, MixingState
from cpmix_cli.recipe.functions import FUNCTION_TABLES, bind, known
from cpmix_cli.recipe.schema import Stage, TermRecipe
from cpmix_cli.training.randomness import stream

FUNCTIONS = {kind: known(kind, lambda module: vars(import_module(f"cpmix_cli.{module}"))) for kind in FUNCTION_TABLES}


@dataclass(frozen=True)
class Part:
    """Part `number` of `count` equal ones of a batch; where they do not come out even, the last go on at the beginning
    of the batch with images that count nothing.
    """

    number: int
    count: int
    size: int
    """Images of the batch."""

    @property
    def length(self) -> int:
        """P, the same for all parts."""
        return -(-self.size // self.count)

    def of(self, values: Tensor) -> Tensor:
        """This part of values for the batch [B, ...]: [P, ...]."""
        start, end = self.number * self.length, (self.number + 1) * self.length
        if end <= self.size:
            return values[start:end]
        return values[torch.arange(start, end, device=values.device) % self.size]

    def weights(self, device: torch.device) -> Tensor | None:
        """What its images count in a mean over the part [P] float64, so that the mean over all parts is that over the
        batch; None where each counts 1.
        """
        if self.count * self.length == self.size:
            return None
        places = torch.arange(self.number * self.length, (self.number + 1) * self.length, device=device)
        return (places < self.size).double() * (self.count * self.length / self.size)


class Images(Protocol):
    """Makes the inputs of a part."""

    def __call__(self, indices: str, uniforms: str, by: str | None = None) -> Tensor:
        """Inputs [P, ...] of the images [B] and the uniforms [B, U] that stand under these names, or of those at the
        positions in the batch [B] that stand under `by`.
        """
        ...


@dataclass
class TermBatch:
    """The images of one term in a part of a step's batch."""

    x: Tensor
    """Inputs [P, ...]."""
    y1: Tensor
    """Labels [P] int64."""
    y2: Tensor | None = None
    """Labels of the partners [P]; None where the batch is unmixed."""
    lam: Tensor | None = None
    """lambda_y [P], the weight of y1."""
    unmixed: Tensor | None = None
    """Where only some batches are mixed: 1 if this one is not, else 0; [1] float64."""
    class_weights: Tensor | None = None
    """[C]; None where all count alike."""
    reweighting: Tensor | None = None
    """1 in epochs whose class weights count, else 0; [1] float64. None where there are none."""
    weights: Tensor | None = None
    """Part.weights()."""
    mean_weights: tuple[Tensor | None, Tensor | None] = (None, None)
    """Mean class weight of y1 and of y2 over the whole batch; None where the part is all of it."""
    teacher: Tensor | None = None
    """The teacher's logits [P, C] on x; None where the term has none."""
    routes: Tensor | None = None
    """The routers' logits [E - 1, P] on x; None where there are none."""


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
        self.matched = recipe.match is not None
        self.across_experts = recipe.loss in ENSEMBLE_LOSSES
        self.routing = recipe.loss in ROUTING_LOSSES
        self.taught = recipe.teacher is not None
        self.gated = recipe.probability < 1 or recipe.unmixed_first > 0 or recipe.unmixed_last > 0
        self._recipe = recipe
        self._functions, faults = bind(recipe.functions, recipe.parameters, FUNCTIONS, TermRecipe.model_fields)
        assert not faults, faults  # recipe.resolve() has told them

    def draws(self, steps: int, batch_size: int, num_uniforms: int, epoch: int, num_epochs: int) -> dict[str, "Draw"]:
        """Purpose -> how its numbers of an epoch are drawn.

        Args:
            steps: S.
            batch_size: B.
            num_uniforms: that augment an image.
            epoch: from 1.
            num_epochs: of the whole training.
        """
        recipe, size = self._recipe, (steps, batch_size)
        wanted: dict[str, Draw] = {}

        def want(purpose: str, *shape: int, how: Callable[..., Any] = np.random.Generator.random) -> None:
            wanted[f"{self.name}/{purpose}"] = (shape, how)

        if self.natural:
            wanted["augment"] = ((*size, num_uniforms), np.random.Generator.random)  # shared by all natural terms
        else:
            want("class", *size)
            want("image", *size)
            want("augment", *size, num_uniforms)
        if self.mixed:
            several = size if recipe.per_sample else (steps, 1)
            want("partner", *size)
            want("ratio", *several, how=lambda g, shape: g.beta(recipe.alpha, recipe.alpha, size=shape))
            want("box", *several, 2)
            if not self.in_batch:
                want("partner-image", *size)
                want("partner-augment", *size, num_uniforms)
        if self.gated:
            open_now = recipe.unmixed_first < epoch <= num_epochs - recipe.unmixed_last
            want("gate", steps, 1, how=lambda g, shape: (g.random(shape) < recipe.probability * open_now) * 1.0)
        if recipe.reweight is not None:
            want("reweight", steps, 1, how=lambda g, shape: np.full(shape, float(epoch > recipe.reweight_after)))
        return wanted

    def weight_spread(self, class_counts: Tensor) -> float:
        """The largest class weight over the smallest; infinite where the term weights no classes."""
        if "reweight" not in self._functions:
            return float("inf")
        weights: Tensor = self._functions["reweight"](class_counts)
        return float(weights.max() / weights.min())

    def matches(self, generator: np.random.Generator, epoch: int, num_epochs: int) -> bool:
        """Whether partners are matched in this epoch."""
        chance = (epoch / num_epochs) ** self._recipe.match_power
        return self.matched and bool(generator.random() < chance)

    def chosen(self, draws: dict[str, Tensor], pool: ClassPool) -> dict[str, Tensor]:
        """Images of the term's own draws, whatever the network does: "NAME/first" [..., B] int64.

        Args:
            draws: random numbers by purpose; those of "NAME/class" and "NAME/image" are used up.
            pool: the training images by class.
        """
        if self.natural:
            return {}
        classes = (draws.pop(f"{self.name}/class") * pool.num_classes).long()
        return {self._first: pool.draw(classes, draws.pop(f"{self.name}/image"))}

    def partners(
        self, draws: Mapping[str, Tensor], labels: Tensor, pool: ClassPool, state: MixingState
    ) -> dict[str, Tensor]:
        """Who the images of a step are mixed with: "NAME/position" in the batch, or the image "NAME/second", [B] int64.

        Args:
            draws: the step's random numbers and chosen images, by purpose.
            labels: class of each training image [N].
            pool: the training images by class.
            state: what partners look at.
        """
        if not self.mixed:
            return {}
        found = self._functions["partner"](draws[f"{self.name}/partner"], labels[draws[self._first]], state)
        if self.in_batch:
            return {f"{self.name}/position": found}
        return {f"{self.name}/second": pool.draw(found, draws[f"{self.name}/partner-image"])}

    def wanted(self, whole: bool) -> list[tuple[str, str, str | None]]:
        """What batch() asks Images for, the natural batch aside: names of indices, uniforms and positions.

        Args:
            whole: the part is the whole batch.
        """
        asked: list[tuple[str, str, str | None]] = []
        if not self.natural:
            asked.append((self._first, f"{self.name}/augment", None))
        if self.mixed and not self.in_batch:
            asked.append((f"{self.name}/second", f"{self.name}/partner-augment", None))
        elif self.mixed and not whole:  # the partner may be another rank's: it is made anew, as it is made there
            own = "augment" if self.natural else f"{self.name}/augment"
            asked.append((self._first, own, f"{self.name}/position"))
        return asked

    @property
    def _first(self) -> str:
        return "order" if self.natural else f"{self.name}/first"

    def batch(
        self,
        draws: Mapping[str, Tensor],
        part: Part,
        natural: Tensor,
        labels: Tensor,
        images: Images,
        state: MixingState,
        matching: bool,
    ) -> TermBatch:
        """This term's images of a part of a step's batch.

        Args:
            draws: the step's random numbers, chosen images and partners by purpose, the batch in front (a ratio for the
                whole batch: [1]).
            part: which part.
            natural: inputs of the part's natural batch [P, ...], already augmented.
            labels: class of each training image [N].
            images: makes the others.
            state: what matches look at.
            matching: whether partners are matched in this epoch.
        """

        def drawn(purpose: str) -> Tensor:
            return draws[f"{self.name}/{purpose}"]

        def per_image(purpose: str) -> Tensor:
            return part.of(drawn(purpose)) if self._recipe.per_sample else drawn(purpose)

        weights = part.weights(labels.device)
        class_weights = reweighting = None
        if "reweight" in self._functions:
            reweighting = drawn("reweight")
            class_weights = torch.where(reweighting > 0, self._functions["reweight"](state.class_counts), 1.0)
        made = [images(*names) for names in self.wanted(part.count == 1)]
        x1 = natural if self.natural else made[0]
        whole_y1 = labels[draws[self._first]]
        y1 = part.of(whole_y1)

        def mean_weight(whole: Tensor) -> Tensor | None:
            # Of matched images a rank knows its own alone.
            wanted = class_weights is not None and part.count > 1 and not matching
            return class_weights[whole].mean() if wanted and class_weights is not None else None

        if not self.mixed:
            mean = mean_weight(whole_y1)
            return TermBatch(x1, y1, None, None, None, class_weights, reweighting, weights, (mean, None))
        whole_y2 = whole_y1[drawn("position")] if self.in_batch else labels[drawn("second")]
        x2, y2 = x1[drawn("position")] if self.in_batch and part.count == 1 else made[-1], part.of(whole_y2)
        gate = drawn("gate") > 0 if self.gated else None
        if matching and (gate is None or bool(gate)):
            place = self._functions["match"](x1, y1, x2, y2, state)
            x1, y1 = x1[place], y1[place]
        n1, n2 = state.class_counts[y1], state.class_counts[y2]
        lam = self._functions["ratio"](per_image("ratio"), n1, n2)
        if gate is not None:
            lam = torch.where(gate, lam, 1.0)
        means = mean_weight(whole_y1), mean_weight(whole_y2)
        x, lam = self._functions["mix"](x1, x2, lam, per_image("box"))
        lam = self._functions["label"](lam, n1, n2)
        if gate is None:
            return TermBatch(x, y1, y2, lam, None, class_weights, reweighting, weights, means)
        lam = torch.where(gate, lam, 1.0)
        return TermBatch(x, y1, y2, lam, 1.0 - gate.double(), class_weights, reweighting, weights, means)

    def loss(self, logits: Tensor, batch: TermBatch, class_counts: Tensor) -> Tensor:
        """L(y1, lambda_y) + L(y2, 1 - lambda_y), or L(y) for an unmixed batch, and the regulariser; unweighted scalar.

        Where parts of a batch do not come out even, what fills the last ones up counts nothing in L, but is seen by
        regularisers, teachers and routers.

        Args:
            logits: [E, P, C] float32.
            batch: what they were computed on.
            class_counts: [C].
        """

        if self.routing:
            routed: Tensor = self._functions["loss"](logits, batch.routes, batch.y1)
            return routed

        def share(labels: Tensor, lam: Tensor, mean: Tensor | None) -> Tensor:
            """L(labels, lam), summed over the experts; `mean` is that of the whole batch's class weights."""
            if batch.weights is not None:
                lam = lam * batch.weights.to(logits.dtype)
            if batch.class_weights is not None:
                weights = batch.class_weights[labels].to(logits.dtype)
                if self._recipe.reweight_norm == "batch-sum":
                    weights = weights / (weights.mean() if mean is None else mean.to(logits.dtype))
                lam = lam * weights
            taken = [logits] if self.across_experts else list(logits)
            return torch.stack([self._functions["loss"](z, labels, lam, class_counts) for z in taken]).sum()

        if batch.y2 is None or batch.lam is None:
            total = share(batch.y1, torch.ones_like(batch.y1, dtype=logits.dtype), batch.mean_weights[0])
        else:
            lam = batch.lam.to(logits.dtype)
            first, second = batch.mean_weights
            total = share(batch.y1, lam, first) + share(batch.y2, 1 - lam, second)
        if "regulariser" in self._functions:
            reweighting = logits.new_zeros(1) if batch.reweighting is None else batch.reweighting
            total = total + self._functions["regulariser"](logits, class_counts, reweighting)
        if batch.teacher is not None:
            total = total + self._functions["teacher"](logits, batch.teacher)
        return total


Draw = tuple[tuple[int, ...], Callable[[np.random.Generator, tuple[int, ...]], Any]]


def draw_epoch(
    terms: list[Term],
    num_samples: int,
    batch_size: int,
    key: tuple[int | str, ...],
    epoch: int,
    num_epochs: int,
    num_uniforms: int,
) -> dict[str, Tensor]:
    """All random numbers of an epoch by purpose, on the CPU; step in front, then the batch.

    Each purpose has its own stream, so two recipes that share a term share its draws. "order" [S, B] holds the images
    of the natural batches, a permutation of all, with zeros after the last.

    Args:
        terms: the phase's terms.
        num_samples: N.
        batch_size: B; the last batch of an epoch uses the first part of its draws.
        key: (seed, phase).
        epoch: from 1.
        num_epochs: of the whole training.
        num_uniforms: that augment an image.
    """
    steps = -(-num_samples // batch_size)
    order = np.zeros(steps * batch_size, dtype=np.int64)
    order[:num_samples] = stream(*key, epoch, "order").permutation(num_samples)
    drawn = {"order": torch.from_numpy(order.reshape(steps, batch_size))}
    wanted: dict[str, Draw] = {}
    for term in terms:
        wanted |= term.draws(steps, batch_size, num_uniforms, epoch, num_epochs)
    for purpose, (shape, how) in wanted.items():
        drawn[purpose] = torch.from_numpy(how(stream(*key, epoch, purpose), shape))
    return drawn


def matching_terms(terms: list[Term], key: tuple[int | str, ...], epoch: int, num_epochs: int) -> set[str]:
    """Names of the terms whose partners are matched in this epoch; arguments as above."""
    return {t.name for t in terms if t.matches(stream(*key, epoch, f"{t.name}/match"), epoch, num_epochs)}


def compile_stage(stage: Stage) -> list[Term]:
    """The terms of a stage whose weight is not zero, in the recipe's order."""
    return [Term(name, recipe) for name, recipe in stage.terms.items() if recipe.weight > 0]
