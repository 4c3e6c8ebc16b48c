"""Random numbers: named streams, and all draws of an epoch as typed objects.

Every draw comes from a generator keyed by (seed, phase, epoch, purpose), on the CPU and ahead of the epoch. So draws
are the same on every device, do not depend on each other's order, and a resumed run needs only integers to continue.
Two recipes that share a term share its draws.

Shapes: S steps per epoch, B batch, K = 1 (one number for the batch) or B, U uniforms that augment an image, V uniforms
of a mix. A single step has the same types without S.
"""

import hashlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields, is_dataclass, replace
from functools import cached_property
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from cpmix_cli.data.batches import ClassPool
from cpmix_cli.mixing import CLASS_PARTNERS, MIX_UNIFORMS
from cpmix_cli.recipe.schema import TermRecipe


def _key(parts: tuple[int | str, ...]) -> int:
    return int.from_bytes(hashlib.sha256("/".join(map(str, parts)).encode()).digest()[:16], "big")


def stream(*parts: int | str) -> np.random.Generator:
    """The NumPy generator of a name, such as stream(seed, "stage2", 201, "cp/ratio")."""
    return np.random.Generator(np.random.Philox(key=_key(parts)))


def torch_generator(*parts: int | str) -> torch.Generator:
    """The torch CPU generator of a name; for weight initialisation."""
    return torch.Generator().manual_seed(_key(parts) % 2**63)


# -- the draws of an epoch ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ImageRequest:
    """Images to be made. Requests are on the device of the images; all other draws are on that of the network."""

    index: Tensor | None
    """[S, B] int64, training images; None: not chosen yet."""
    augment: Tensor
    """[S, B, U] float64 in [0, 1)."""


@dataclass(frozen=True)
class MixingDraws:
    """Random numbers that mix a batch."""

    choice: Tensor
    """[S, B] float64 in [0, 1): the partner's place in the batch, or its class."""
    image: Tensor | None
    """[S, B] float64 in [0, 1): which image of that class; None for partners from the batch."""
    ratio: Tensor
    """[S, K] float64, from Beta(alpha, alpha)."""
    uniforms: Tensor
    """[S, K, V] float64 in [0, 1), for the mix."""
    gate: Tensor | None
    """[S, 1] float64: 1 mixed, 0 unmixed; None if every batch is mixed."""


@dataclass(frozen=True)
class Partners:
    """What the images of a batch are mixed with."""

    labels: Tensor
    """[S, B] int64."""
    index: Tensor
    """[S, B] int64: places in the batch, or training images."""


@dataclass(frozen=True)
class TermDraws:
    """Draws of one term."""

    first: ImageRequest | None
    """Its images; None: the natural batch."""
    labels: Tensor
    """[S, B] int64, of those images."""
    second: ImageRequest | None
    """The partners' images; None: unmixed, or taken from the term's own."""
    mixing: MixingDraws | None
    """None: unmixed."""
    reweight: Tensor | None
    """[S, 1] float64: 1 in epochs whose class weights count, else 0; None without class weights."""
    matching: bool
    """This epoch matches partners with images."""
    partners: Partners | None = None
    """None: unmixed, or not chosen yet."""


@dataclass(frozen=True)
class Draws:
    """Draws of all terms."""

    natural: ImageRequest | None
    """The epoch's shuffled batches, shared by all natural terms; None without such terms."""
    terms: tuple[TermDraws, ...]


@dataclass(frozen=True, eq=False)
class Sampler:
    """Draws of every epoch, on the CPU."""

    terms: Mapping[str, TermRecipe]
    """Of the phase, by name."""
    labels: Tensor
    """[N] int64, class of each training image, on the CPU."""
    num_classes: int
    """C; every class must have an image."""
    batch_size: int
    """B; the last batch of an epoch uses the first part of its draws."""
    num_uniforms: int
    """U."""
    key: tuple[int | str, ...]
    """(seed, phase)."""
    num_epochs: int
    """Of both stages together."""

    @cached_property
    def _pool(self) -> ClassPool:
        return ClassPool(self.labels, self.num_classes)

    @property
    def _num_steps(self) -> int:
        return -(-len(self.labels) // self.batch_size)

    def epoch(self, epoch: int) -> Draws:
        """All draws of an epoch, counted from 1."""
        natural, labels = None, torch.empty(0, dtype=torch.int64)
        if any(recipe.draw == "natural" for recipe in self.terms.values()):
            order = np.zeros(self._num_steps * self.batch_size, dtype=np.int64)  # 0 after the last image
            num_images = len(self.labels)
            order[:num_images] = stream(*self.key, epoch, "order").permutation(num_images)
            index = torch.from_numpy(order.reshape(self._num_steps, self.batch_size))
            natural = ImageRequest(index, self._uniforms(epoch, "augment", self.batch_size, self.num_uniforms))
            labels = self.labels[index]
        return Draws(natural, tuple(self._term(name, recipe, epoch, labels) for name, recipe in self.terms.items()))

    def _term(self, name: str, recipe: TermRecipe, epoch: int, labels: Tensor) -> TermDraws:
        """Draws of a term; `labels` are those of the natural batches."""
        size = self.batch_size

        def uniforms(purpose: str, *shape: int) -> Tensor:
            return self._uniforms(epoch, f"{name}/{purpose}", *shape)

        first = second = mixing = reweight = None
        if recipe.draw == "class-uniform":
            labels = (uniforms("class", size) * self.num_classes).long()
            index = self._pool.draw(labels, uniforms("image", size))
            first = ImageRequest(index, uniforms("augment", size, self.num_uniforms))
        if recipe.partner is not None:
            assert recipe.alpha is not None and recipe.mix is not None  # the recipe's checks see to it
            by_class = recipe.partner in CLASS_PARTNERS
            per_batch = size if recipe.per_sample else 1
            shape = (self._num_steps, per_batch)
            ratios = self._stream(epoch, f"{name}/ratio").beta(recipe.alpha, recipe.alpha, shape)
            is_open = recipe.unmixed_first < epoch <= self.num_epochs - recipe.unmixed_last
            mixing = MixingDraws(
                choice=uniforms("partner", size),
                image=uniforms("partner-image", size) if by_class else None,
                ratio=torch.from_numpy(ratios),
                uniforms=uniforms("box", per_batch, MIX_UNIFORMS[recipe.mix]),
                gate=(uniforms("gate", 1) < recipe.probability * is_open).double() if recipe.is_gated else None,
            )
            if by_class:
                second = ImageRequest(None, uniforms("partner-augment", size, self.num_uniforms))
        if recipe.reweight is not None:
            counts = float(epoch > recipe.reweight_after)
            reweight = torch.full((self._num_steps, 1), counts, dtype=torch.float64)
        matching = recipe.match is not None and bool(
            self._stream(epoch, f"{name}/match").random() < (epoch / self.num_epochs) ** recipe.match_power
        )
        return TermDraws(first, labels, second, mixing, reweight, matching)

    def _stream(self, epoch: int, purpose: str) -> np.random.Generator:
        return stream(*self.key, epoch, purpose)

    def _uniforms(self, epoch: int, purpose: str, *shape: int) -> Tensor:
        """Numbers of [0, 1) for an epoch: [S, *shape] float64."""
        return torch.from_numpy(self._stream(epoch, purpose).random((self._num_steps, *shape)))


# -- trees of draws ----------------------------------------------------------------------------------------------------

Tree = TypeVar("Tree")
Leaf = TypeVar("Leaf")


def map_tensors(
    tree: Tree, function: Callable[[Tensor], Tensor], images: Callable[[Tensor], Tensor] | None = None
) -> Tree:
    """Apply a function to all tensors of nested dataclasses and tuples, `images` to those of ImageRequests."""
    found: Any = tree
    if isinstance(tree, Tensor):
        found = function(tree)
    elif isinstance(tree, tuple):
        found = tuple(map_tensors(part, function, images) for part in tree)
    elif is_dataclass(tree) and not isinstance(tree, type):
        own = images if images is not None and isinstance(tree, ImageRequest) else function
        found = replace(tree, **{f.name: map_tensors(getattr(tree, f.name), own, images) for f in fields(tree)})
    result: Tree = found
    return result


def leaves(tree: object, kind: type[Leaf]) -> Iterator[Leaf]:
    """Yield all parts of one type (Tensor, ImageRequest) in the order of the fields."""
    if isinstance(tree, kind):
        yield tree
    elif isinstance(tree, tuple) or is_dataclass(tree):
        for part in tree if isinstance(tree, tuple) else vars(tree).values():
            yield from leaves(part, kind)
