"""Pretrained weights of --init: which names of a file are the network's, and their copy into the network.

The head is new, but for the classes of a run of cpmix.

Files name a backbone differently: `backbone.conv1.weight`, `module.encoder_q.conv1.weight`. The prefix to take off is
the one under which the file has every tensor of the backbone in its shape. No network is loaded in part.
"""

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unicodedata import normalize

import torch
from torch import Tensor

from cpmix_cli.artifacts import files
from cpmix_cli.artifacts.tensors import unfit
from cpmix_cli.models import MODELS, PUBLISHED_WEIGHTS, Classifier, make_network
from cpmix_cli.recipe.libraries import is_library_name, published
from cpmix_cli.recipe.schema import Model
from cpmix_cli.runtime import console
from cpmix_cli.runtime.errors import EnvironmentFault, InputError, counted, indented, shortened
from cpmix_cli.runtime.text import quoted

COPIES = frozenset({"k", "key", "momentum", "target", "student", "ema"})
"""Words in the prefix of a second network that a method keeps beside the one to use: MoCo's encoder_k and
momentum_encoder, BYOL's target network, DINO's student, averages of weights."""


def sha_of_published(name: str) -> str:
    """Return the sha256 of published weights, or as many of its digits as their file's name has; "" for no name."""
    return PUBLISHED_WEIGHTS.get(name) or (re.split(r"[-.]", name)[-2] if name else "")


def without_init(name: str) -> str:
    """Return how to get the published weights of a network LIBRARY/NAME, for a network that starts from random ones."""
    url = published(name).url
    how = f"fetch {url} and give that file with --init"
    if name.startswith("torchvision/"):
        how, made = how_to_import(url.rpartition("/")[2])
        how = f"{how}, and give --init {quoted(made)}"
    return f"without --init, {name} starts from random weights; for its published ones, {how}"


def how_to_import(name: str) -> tuple[str, Path]:
    """Return how to get published weights as a file for --init, which ends with a command, and that file."""
    command = f"cpmix import-weights {quoted(name)} --sha256 {sha_of_published(name)}"
    place = f"https://download.pytorch.org/models/{name}"
    fetch = f"fetch {name} from where it was published (torchvision's: {place}), then: {command}"
    return fetch, Path(name).with_suffix(".safetensors")


@dataclass(frozen=True)
class _Match:
    """Tensors of a file for a network, after a prefix of their names is taken off."""

    prefix: str
    own: dict[str, Tensor]
    """Tensors of the network, except the head."""
    given: dict[str, Tensor]
    """Tensors of the file by the names of the network."""
    left_out: list[str]
    """Names of the file that belong to none of the network's modules."""
    num_fitting: int
    """Number of tensors of the network that the file has in their shape, without batch-norm counters."""
    num_needed: int
    rivals: list[str]
    """Prefixes under which the file has the whole network, if none is to be preferred."""

    def faults(self) -> list[str]:
        """Return one line per tensor that does not fit."""
        return unfit(self.given, self.own, exact=False)


def load_backbone(
    model: Classifier, tensors: Mapping[str, Tensor], path: Path, recipe: Model, shape: Sequence[int]
) -> int:
    """Copy pretrained weights into a network, in place, except the head. Return the number of copied tensors.

    Notes say which prefix was taken off the names, and which tensors of other modules were left out. Experts of full
    width all start from the same weights.

    Args:
        model: the network.
        tensors: name -> tensor. `head.*` and torchvision's `fc.*` are ignored; batch-norm counters may be missing.
        path: file of the tensors, for messages.
        recipe: table [model] of the network.
        shape: shape of a sample: (H, W, channels) or (2,).

    Raises:
        InputError: tensors are missing, unknown, of another shape or dtype, or not finite; lists all of them. Or
            several networks of the file fit.
    """
    match = _match(model, tensors)
    if match.rivals:
        raise InputError(
            f"{path} has {len(match.rivals)} networks that fit, with these prefixes of names:{indented(match.rivals)}",
            needed_by="--init",
            fix=_choose(path, match.rivals[0]),
        )
    if faults := match.faults():
        found = (
            f". With the prefix '{match.prefix}' taken off its names, {match.num_fitting:,} of {match.num_needed:,} "
            "tensors of the network are found; what does not fit"
        )
        raise InputError(
            f"{path} does not fit the network{found if match.prefix else ''}, {counted(len(faults), 'tensor')}:"
            + indented(faults, 10),
            needed_by="--init",
            fix=_other_network(match, tensors, recipe, shape),
        )
    if match.prefix:
        num_names = sum(name.startswith(match.prefix) for name in tensors)
        console.note(f"took the prefix '{match.prefix}' off {counted(num_names, 'name')} of {path}")
    if match.left_out:
        modules = Counter(_diverging(name, match.prefix) for name in match.left_out)
        listed = [f"{module} ({count:,})" if count > 1 else module for module, count in sorted(modules.items())]
        console.note(f"left out {counted(len(match.left_out), 'other tensor')}: {shortened(listed, 10)}")
    with torch.no_grad():
        for name, tensor in match.given.items():
            match.own[name].copy_(tensor)
    return len(match.given)


def keep_head_rows(
    model: Classifier, tensors: Mapping[str, Tensor], classes: Sequence[str], known: Sequence[str]
) -> list[str] | None:
    """Copy rows of a trained head into a network's head, in place, for the classes that both have.

    Args:
        model: the network; the rows of its other classes stay as they were drawn.
        tensors: tensors of a phase, with the names of cpmix.
        classes: class names of `model` [C].
        known: class names of `tensors`, in any order.

    Returns:
        The classes that were found, in the order of `classes`. None if the heads do not fit each other: a linear and a
        cosine head, another number of experts or of features.
    """
    given = {name: tensor for name, tensor in tensors.items() if name.startswith("head.")}
    for name in [name for name in given if name.endswith(".scale")]:  # finetune.head = "scale": s (w f + b)
        scale = given.pop(name)
        for part in ("weight", "bias"):
            scaled = name.removesuffix("scale") + part
            given[scaled] = given[scaled] * (scale[:, None] if part == "weight" else scale)
    own = {name: tensor for name, tensor in model.state_dict().items() if name.startswith("head.")}
    shapes = {name: (len(known), *tensor.shape[1:]) for name, tensor in own.items()}
    if shapes != {name: tuple(tensor.shape) for name, tensor in given.items()}:
        return None
    rows = {normalize("NFC", name): row for row, name in enumerate(known)}
    found = [(i, rows[normalize("NFC", name)]) for i, name in enumerate(classes) if normalize("NFC", name) in rows]
    with torch.no_grad():
        for name, tensor in own.items():
            tensor[[i for i, _ in found]] = given[name][[row for _, row in found]].to(tensor)
    return [classes[i] for i, _ in found]


def fitting_network(tensors: Mapping[str, Tensor], others: Iterable[str] = ()) -> str | None:
    """Return the network for RGB images that has exactly these tensors, but for the head; None without one.

    Args:
        tensors: name -> tensor.
        others: networks of libraries to look at, beside those of cpmix.
    """
    for name in (*MODELS, *others):
        with suppress(ValueError, EnvironmentFault), torch.device("meta"):
            side = published(name).size if is_library_name(name) else 224
            match = _match(make_network(Model(name=name), 2, (side, side, 3)), tensors)
            if not match.faults() and not match.rivals:
                return name
    return None


def _match(model: Classifier, tensors: Mapping[str, Tensor]) -> _Match:
    """Match tensors with a network, under the prefix of which it is found whole, else under the closest one."""
    own = {name: t for name, t in model.state_dict().items() if not name.startswith("head.")}
    needed = {name for name in own if not name.endswith("num_batches_tracked")}

    def places(name: str, tensor: Tensor) -> set[str]:
        return {p for p in model.places_of(name) if p in needed and own[p].shape == model.fitted(name, tensor).shape}

    named: dict[str, set[str]] = defaultdict(set)
    fitting: dict[str, set[str]] = defaultdict(set)
    for name, tensor in tensors.items():
        for start in (0, *(dot.end() for dot in re.finditer(r"\.", name))):
            named[name[:start]] |= needed.intersection(model.places_of(name[start:]))
            fitting[name[:start]] |= places(name[start:], tensor)
    closest = max(named, key=lambda p: (len(named[p]), len(fitting[p]), -len(p)), default="")
    whole = sorted(prefix for prefix, found in fitting.items() if found == needed)
    first = [prefix for prefix in whole if COPIES.isdisjoint(re.split(r"[._]", prefix))]
    if len(named[closest]) * 2 < len(needed) or "" in whole:
        closest = ""
    elif len(first) == 1:
        (closest,) = first
    rivals = whole if closest and len(whole) > 1 and len(first) != 1 else []

    inside = {name.removeprefix(closest): t for name, t in tensors.items() if name.startswith(closest)}
    body = {name: t for name, t in inside.items() if not model.is_head(name)}
    left_out = [name for name in tensors if not name.startswith(closest)]
    if closest in whole:
        # layer1.2 or layer5 would be of a deeper network; projector.0 is of another module.
        kinds = {_kind(name) for name, tensor in body.items() if places(name, tensor)}
        strangers = [name for name in body if _kind(name) not in kinds]
        left_out += [closest + name for name in strangers]
        body = {name: tensor for name, tensor in body.items() if name not in strangers}
    given = {place: model.fitted(name, t) for name, t in body.items() for place in model.places_of(name)}
    return _Match(closest, own, given, sorted(left_out), len(fitting[closest]), len(needed), rivals)


def _kind(name: str) -> str:
    """Return the outermost module of a tensor without its number: layer1.0.conv1.weight -> layer."""
    return name.partition(".")[0].rstrip("0123456789")


def _diverging(name: str, prefix: str) -> str:
    """Return the outermost module of a tensor that does not lead to `prefix`: module.encoder_k of module.encoder_q."""
    parts = name.split(".")
    pairs = enumerate(zip(parts, prefix.split("."), strict=False))
    depth = next((depth for depth, (own, leading) in pairs if own != leading), len(parts))
    return ".".join(parts[: depth + 1])


def _choose(path: Path, prefix: str) -> str:
    """Return how to choose one of several networks of a file."""
    out = path.with_name(f"{path.stem}-{prefix.strip('.').replace('.', '-')}.safetensors")
    sha = files.sha256(files.read_bytes(path))
    command = console.typed("import-weights", path, "--sha256", sha, "--prefix", prefix, "--out", out)
    return f"choose one, and give --init {quoted(out)}; to make it: {command}"


def _other_network(match: _Match, tensors: Mapping[str, Tensor], recipe: Model, shape: Sequence[int]) -> str:
    """Return what to do about weights that do not fit: name a network that they fit, if there is one.

    Args:
        match: the match with the network of the recipe.
        tensors: tensors of the file.
        recipe: table [model] of the network.
        shape: shape of a sample.
    """
    if match.num_fitting == match.num_needed and match.given.keys() <= match.own.keys():
        return "give other weights: those of the network are finite floating-point numbers"
    if any(re.search(r"(^|\.)(encoder\.layer|encoder\.stages|embeddings)\.", name) for name in tensors):
        return (
            f"give weights of {recipe.name} under the names of its library: these are of Hugging Face's transformers, "
            "which names and splits the tensors in its own way; timm's repository of the same network has them"
        )
    changes: list[dict[str, Any]] = [*({"name": name} for name in MODELS), {"expert_width": 1.0}]
    for change in changes:
        other = recipe.model_copy(update=change)
        with suppress(ValueError), torch.device("meta"):  # ValueError: a network for other samples
            if not _match(make_network(other, 2, shape), tensors).faults():
                flags = " ".join(f"--set model.{key}={value}" for key, value in change.items())
                if is_library_name(recipe.name):  # data.normalisation may be of that network
                    flags += " --set data.normalisation=imagenet"
                return f"give {flags}, as these weights require"
    return f"give weights of {recipe.name}: these fit no network of cpmix for samples of shape {tuple(shape)}"
