"""Checks of a recipe against its data set and its network, before the first phase trains."""

import json
from collections.abc import Sequence
from contextlib import suppress
from importlib.util import find_spec
from typing import NamedTuple

import torch
from torch import nn

from cpmix_cli.backbones import Backbone, ImagesUnfit
from cpmix_cli.models import make_network, within
from cpmix_cli.recipe.libraries import is_library_name, published
from cpmix_cli.recipe.loading import refusal, typed_flags, with_settings
from cpmix_cli.recipe.schema import Recipe
from cpmix_cli.runtime.errors import EnvironmentFault, UsageError
from cpmix_cli.training.tuning import matching

_NETWORKS = ("resnet18", "resnet32", "one-hidden-layer")
"""Networks to suggest: for images of more than 32 pixels, for smaller ones, for points."""


class _Misfit(NamedTuple):
    """Key of a recipe whose value the data set does not allow."""

    message: str
    """Line that starts with the key."""
    settings: tuple[str, ...] = ()
    """Settings "key=value" that the data set allows; empty if cpmix cannot choose them."""


def check_fits(
    recipe: Recipe, num_classes: int, shape: Sequence[int], *, has_statistics: bool = True, settings: Sequence[str] = ()
) -> None:
    """Check all phases of a recipe against a data set.

    Args:
        recipe: valid by itself.
        num_classes: C.
        shape: shape of an image (H, W, channels), or (2,) for points.
        has_statistics: whether mean and standard deviation of the training pixels are known.
        settings: values of --set that changed the recipe, for the message.

    Raises:
        UsageError: the recipe does not fit the data set or the network; the message lists all errors.
        EnvironmentFault: a package that the recipe needs is not installed.
    """
    found = _misfits(recipe, num_classes, shape, has_statistics)
    if found:
        mending = fitting_settings(recipe, num_classes, shape, has_statistics=has_statistics)
        change = "give " + " ".join(flag for _, flag in typed_flags(mending)) + " as well" if mending else ""
        fix = f"{change or 'change these keys with --set'}, or give a recipe for this data set with --recipe"
        raise refusal("the recipe", [misfit.message for misfit in found], typed_flags(settings), None, fix)


def fitting_settings(
    recipe: Recipe, num_classes: int, shape: Sequence[int], *, has_statistics: bool = True
) -> list[str]:
    """Return the settings with which a recipe fits a data set; an empty list if it fits, or cpmix finds none.

    Args:
        recipe, num_classes, shape, has_statistics: see check_fits().

    Raises:
        EnvironmentFault: see check_fits().
    """
    settings: dict[str, str] = {}
    try:
        while found := _misfits(with_settings(recipe, settings.values()), num_classes, shape, has_statistics):
            new = {setting.partition("=")[0]: setting for misfit in found for setting in misfit.settings}
            if not all(misfit.settings for misfit in found) or new.keys() & settings.keys():
                return []
            settings |= new
    except UsageError:  # rules between keys forbid what the data set asks
        return []
    return list(settings.values())


def _misfits(recipe: Recipe, num_classes: int, shape: Sequence[int], has_statistics: bool) -> list[_Misfit]:
    found = []
    has_images, data = len(shape) == 3, recipe.data
    try:
        with torch.device("meta"):
            network = make_network(recipe.model, num_classes, data.input_shape(shape))
        if isinstance(network, Backbone):
            network.try_images(data.input_shape(shape))
        if is_library_name(data.normalisation):
            published(data.normalisation)
        found += [_Misfit(line) for line in _name_faults(recipe, network)]
    except ImagesUnfit as fault:
        found.append(_Misfit(f'model.name = "{recipe.model.name}": {fault}', _crop_for(recipe, shape)))
    except ValueError as fault:
        found.append(_Misfit(f'model.name = "{recipe.model.name}": {fault}', _network_for(recipe, num_classes, shape)))
    if data.crop and not has_images:
        found.append(_Misfit(f"data.crop = {data.crop}: for images, the data set has points", ("data.crop=0",)))
    elif data.crop > min(shape[:2]):
        message = f"data.crop = {data.crop}: the images have {shape[0]} x {shape[1]} pixels"
        found.append(_Misfit(message, (f"data.crop={min(shape[:2])}",)))
    if not has_images:
        found += [
            _Misfit(f"data.{key} = {json.dumps(value)}: for images, the data set has points", (f"data.{key}={plain}",))
            for key, plain in (("augment", "crop-flip"), ("fill", 0), ("cutout", 0), ("flip", "random"))
            if (value := getattr(data, key)) != plain and (key != "augment" or value == "crop-flip-autoaugment")
        ]
    elif data.cutout > min(shape[:2]):
        message = f"data.cutout = {data.cutout}: the images have {shape[0]} x {shape[1]} pixels"
        found.append(_Misfit(message, (f"data.cutout={min(shape[:2])}",)))
    if recipe.evaluation.mirror and not has_images:
        found.append(
            _Misfit("evaluation.mirror = true: for images, the data set has points", ("evaluation.mirror=false",))
        )
    if data.normalisation not in ("dataset", "none") and has_images and shape[-1] != 3:
        message = f'data.normalisation = "{data.normalisation}": for 3 channels, the images have {shape[-1]}'
        found.append(_Misfit(message, ("data.normalisation=dataset",)))
    if data.normalisation == "dataset" and not has_statistics:
        message = (
            'data.normalisation = "dataset": of images that stay in their files no statistics are known; '
            "pack them (build-lt --pack S), or name published ones"
        )
        found.append(_Misfit(message, ("data.normalisation=imagenet",)))
    for place, term in recipe.terms(idle=True):
        for what, needs in term.needs(place):
            if needs.images and not has_images:
                found.append(_Misfit(f"{what}: for images, the data set has points"))
            if needs.package and find_spec(needs.package) is None:
                raise EnvironmentFault(
                    f'{what} needs the package "{needs.package}"', fix=f"pip install 'cpmix[{needs.extra}]'"
                )
            found += [
                _Misfit(f"{place}.{needs.class_pairs}: {pair} is not two of the {num_classes} class ids")
                for pair in term.parameters.get(needs.class_pairs, [])
                if len(pair) != 2 or not all(0 <= c < num_classes for c in pair)
            ]
    return found


def _crop_for(recipe: Recipe, shape: Sequence[int]) -> tuple[str, ...]:
    """Return the settings that crop images to the side that the published weights of a library's network have."""
    side, augment = published(recipe.model.name).size, recipe.data.augment
    if min(shape[:2]) < side or recipe.data.crop == side:
        return ()
    cropped = augment == "none" or augment.startswith("resized-crop")
    return (f"data.crop={side}", *(() if cropped else ("data.augment=resized-crop-flip",)))


def _network_for(recipe: Recipe, num_classes: int, shape: Sequence[int]) -> tuple[str, ...]:
    """Return the settings of a network for samples of this shape; an empty tuple if [model] forbids all of them."""
    for name in _NETWORKS:
        with suppress(ValueError), torch.device("meta"):
            model = recipe.model.model_copy(update={"name": name, "drop_path": 0.0})
            make_network(model, num_classes, recipe.data.input_shape(shape))
            own = {  # keys that belong to the other network
                "model.init=": recipe.model.init,
                "model.frozen=[]": recipe.model.frozen,
                "model.drop_path=0": recipe.model.drop_path,
                "data.normalisation=imagenet": is_library_name(recipe.data.normalisation),
            }
            return (f"model.name={name}", *(setting for setting, given in own.items() if given))
    return ()


def _name_faults(recipe: Recipe, network: nn.Module) -> list[str]:
    """Return errors: unknown parameter prefixes or modules, and phases without a trained parameter.

    `network` has a linear head.
    """
    names = [name for name, _ in network.named_parameters()]
    heads = [name for name in names if name.startswith("head.")]
    if recipe.model.head == "cosine":
        names = [name for name in names if name not in heads or not name.endswith("bias")]
    own = {"stage1": names, "stage2": names, "finetune": list(names)}
    if (finetune := recipe.finetune) is not None:
        scales = [name.replace("weight", "scale") for name in heads if name.endswith("weight")]
        own["finetune"] += {"scale": scales, "routers": ["routers."]}.get(finetune.head, [])
    stages = {phase: stage for phase in own if (stage := getattr(recipe, phase)) is not None}
    wanted = [("optimizer.groups", group.prefix, names) for group in recipe.optimizer.groups]
    wanted += [(f"{phase}.train", part, own[phase]) for phase, stage in stages.items() for part in stage.train]
    wanted += [("finetune.groups", group.prefix, own["finetune"]) for group in finetune.groups] if finetune else []

    def found(pattern: str, known: list[str]) -> list[str]:
        chosen = set(matching(network, [pattern]))
        return [name for name in known if name in chosen or name.startswith(pattern)]

    frozen = recipe.model.frozen
    trained = {"model.frozen": names} | {
        f"{phase}.train": matched
        for phase, stage in stages.items()
        if stage.train != [""] and (matched := [name for part in stage.train for name in found(part, own[phase])])
    }
    modules = ", ".join(dict.fromkeys(name.partition(".")[0] for name in names))
    faults = [
        f'model.frozen: the network has no "{module}", but {modules} and what lies in them'
        for module in frozen
        if not any(within(name, [module]) for name in names)
    ]
    faults += [
        f"{key}: all of it is frozen, nothing is left to train"
        for key, matched in trained.items()
        if all(within(name, frozen) for name in matched)
    ]
    meant = {"norm": "is of a normalisation layer", "bias": "is a bias"}
    return faults + [
        f"{key}: no parameter of the network "
        + meant.get(pattern, f'starts with "{pattern}"')
        + f"; some are {', '.join(known[:1] + known[-2:])}"
        for key, pattern, known in wanted
        if not found(pattern, known)
    ]
