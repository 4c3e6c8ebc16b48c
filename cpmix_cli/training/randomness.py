"""Random numbers: named streams, and all random numbers of an epoch as typed objects.

Each generator is keyed by (seed, phase, epoch, purpose). It runs on the CPU, before the epoch. So the numbers are equal
on every device and independent of the order of the draws. A resumed run needs only integers to continue. Two recipes
that share a term draw the same numbers for it. Only dropout and drop path inside of a network draw on the device, from
torch's global generators, which each step seeds by its name (seed_torch()).

Shapes: S steps per epoch, B batch size, K = 1 (one number per batch) or B. An augmented image takes U uniform numbers,
a mix takes V. A single step has the same types without the axis S.
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
    """Return the NumPy generator of a name, such as stream(seed, "stage2", 201, "cp/ratio")."""
    return np.random.Generator(np.random.Philox(key=_key(parts)))


def torch_generator(*parts: int | str) -> torch.Generator:
    """Return the torch CPU generator of a name, for weight initialisation."""
    return torch.Generator().manual_seed(_key(parts) % 2**63)


def seed_torch(device: torch.device, *parts: int | str) -> None:
    """Seed torch's global generators, from which dropout and drop path draw, with the stream of a name.

    Nothing of them has to be saved: a resumed run seeds each step as the whole run did. A CUDA graph takes seed and
    offset from the generator at each replay, so the call stands before the replay, never in the recorded work.

    Args:
        device: the network's; of a CUDA device, the current one's generator is seeded as well as the CPU's.
        *parts: the name, such as (seed, "stage2", 201, 17, "dropout").
    """
    seed = _key(parts) % 2**63
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        torch.cuda.manual_seed(seed)


# -- random numbers of an epoch ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ImageRequest:
    """Training images to read and augment.

    Requests are on the device of the stored images, all other random numbers on the device of the network.
    """

    index: Tensor | None
    """Indices of training images [S, B] int64; None if not chosen yet."""
    augment: Tensor
    """Uniform numbers of the augmentation [S, B, U] float64 in [0, 1)."""


@dataclass(frozen=True)
class MixingDraws:
    """Random numbers that mix a batch."""

    choice: Tensor
    """Uniform numbers [S, B] float64 in [0, 1) that choose the partner's position in the batch, or its class."""
    image: Tensor | None
    """Uniform numbers [S, B] float64 in [0, 1) that choose an image of that class; None for partners in the batch."""
    ratio: Tensor
    """Samples of Beta(alpha, alpha) [S, K] float64; 0 if the term has no ratio."""
    uniforms: Tensor
    """Uniform numbers of the mix [S, K, V] float64 in [0, 1), such as the position of a box."""
    gate: Tensor | None
    """1 for a mixed batch, 0 for an unmixed one [S, 1] float64; None if every batch is mixed."""


@dataclass(frozen=True)
class Partners:
    """Partner images, which the images of a batch are mixed with."""

    labels: Tensor
    """Classes of the partners [S, B] int64."""
    index: Tensor
    """Positions in the batch, or indices of training images [S, B] int64."""


@dataclass(frozen=True)
class TermDraws:
    """Random numbers and image requests of one term."""

    first: ImageRequest | None
    """Images of the term; None for the natural batch."""
    labels: Tensor
    """Classes of the term's images [S, B] int64."""
    second: ImageRequest | None
    """Images of the partners; None if the term is unmixed, or its partners are images of its own batch."""
    mixing: MixingDraws | None
    """Random numbers of the mixing; None if the term is unmixed."""
    reweight: Tensor | None
    """1 in epochs with class weights, else 0 [S, 1] float64; None if the term has no class weights."""
    matching: bool
    """True if partners are matched with images in this epoch."""
    partners: Partners | None = None
    """Chosen partners; None if the term is unmixed, or they are not chosen yet."""


@dataclass(frozen=True)
class Draws:
    """Random numbers and image requests of all terms."""

    natural: ImageRequest | None
    """Shuffled batches of the epoch, shared by all natural terms; None without such terms."""
    terms: tuple[TermDraws, ...]
    """In the order of the plan's terms."""


@dataclass(frozen=True, eq=False)
class Sampler:
    """Generator of the random numbers of each epoch, on the CPU."""

    terms: Mapping[str, TermRecipe]
    """Terms of the phase by name."""
    labels: Tensor
    """Class of each training image [N] int64, on the CPU."""
    num_classes: int
    """C; every class must have at least one image."""
    batch_size: int
    """B; if the last batch is smaller, it uses the first numbers of its step."""
    num_uniforms: int
    """U, uniform numbers per augmented image."""
    key: tuple[int | str, ...]
    """(seed, phase), the beginning of each stream's name."""
    num_epochs: int
    """Epochs of both stages together."""
    alternating: int | None = None
    """Column of the uniforms whose flips alternate in the natural batches; None: all flips are random."""
    num_features: int = 0
    """Features of the network, of all experts together; for mixes of features."""

    @cached_property
    def _pool(self) -> ClassPool:
        return ClassPool(self.labels, self.num_classes)

    @cached_property
    def _first_flips(self) -> Tensor:
        """One bit per image [N] int64. An image is flipped if the sum of its bit and the epoch is odd.

        Both stages share them: the name of their stream has no phase. Source: Jordan, arXiv 2404.00498 (airbench).
        """
        return torch.from_numpy(stream(self.key[0], "flip").integers(2, size=len(self.labels)))

    @property
    def _num_steps(self) -> int:
        return -(-len(self.labels) // self.batch_size)

    def epoch(self, epoch: int) -> Draws:
        """Draw all random numbers of an epoch; epochs count from 1."""
        natural, labels = None, torch.empty(0, dtype=torch.int64)
        if any(recipe.draw == "natural" for recipe in self.terms.values()):
            order = np.zeros(self._num_steps * self.batch_size, dtype=np.int64)  # places after the last image stay 0
            num_images = len(self.labels)
            order[:num_images] = stream(*self.key, epoch, "order").permutation(num_images)
            index = torch.from_numpy(order.reshape(self._num_steps, self.batch_size))
            augment = self._uniforms(epoch, "augment", self.batch_size, self.num_uniforms)
            if self.alternating is not None:
                augment[..., self.alternating] %= 0.5  # what is left chooses the angle of a rotation
                augment[..., self.alternating] += 0.5 * ((self._first_flips[index] + epoch) % 2 == 0)
            natural = ImageRequest(index, augment)
            labels = self.labels[index]
        return Draws(natural, tuple(self._term(name, recipe, epoch, labels) for name, recipe in self.terms.items()))

    def _term(self, name: str, recipe: TermRecipe, epoch: int, labels: Tensor) -> TermDraws:
        """Draw the random numbers of a term; `labels` [S, B] are the classes of the natural batches."""
        size = self.batch_size

        def uniforms(purpose: str, *shape: int) -> Tensor:
            return self._uniforms(epoch, f"{name}/{purpose}", *shape)

        first = second = mixing = reweight = None
        if recipe.draw == "class-uniform":
            labels = (uniforms("class", size) * self.num_classes).long()
            index = self._pool.draw(labels, uniforms("image", size))
            first = ImageRequest(index, uniforms("augment", size, self.num_uniforms))
        if recipe.partner is not None:
            assert recipe.mix is not None  # checked by TermRecipe
            by_class = recipe.partner in CLASS_PARTNERS
            per_batch = size if recipe.per_sample else 1
            shape = (self._num_steps, per_batch)
            ratios = np.zeros(shape)
            if recipe.alpha is not None:
                ratios = self._stream(epoch, f"{name}/ratio").beta(recipe.alpha, recipe.alpha, shape)
            num_uniforms = self.num_features if recipe.mixes_features else MIX_UNIFORMS[recipe.mix]
            is_open = recipe.unmixed_first < epoch <= self.num_epochs - recipe.unmixed_last
            mixing = MixingDraws(
                choice=uniforms("partner", size),
                image=uniforms("partner-image", size) if by_class else None,
                ratio=torch.from_numpy(ratios),
                uniforms=uniforms("box", per_batch, num_uniforms),
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
        """Draw uniform numbers in [0, 1) for an epoch: [S, *shape] float64."""
        return torch.from_numpy(self._stream(epoch, purpose).random((self._num_steps, *shape)))


# -- nested dataclasses of tensors -------------------------------------------------------------------------------------

Tree = TypeVar("Tree")
Leaf = TypeVar("Leaf")


def map_tensors(
    tree: Tree, function: Callable[[Tensor], Tensor], images: Callable[[Tensor], Tensor] | None = None
) -> Tree:
    """Apply a function to every tensor of nested dataclasses and tuples, and return the copy.

    Args:
        tree: a tensor, or nested dataclasses and tuples of tensors and other values; other values are kept.
        function: applied to each tensor.
        images: applied instead to the tensors of an ImageRequest; None: `function` for all.
    """
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
    """Yield all values of a type, such as Tensor or ImageRequest, in the order of the fields."""
    if isinstance(tree, kind):
        yield tree
    elif isinstance(tree, tuple) or is_dataclass(tree):
        for part in tree if isinstance(tree, tuple) else vars(tree).values():
            yield from leaves(part, kind)
