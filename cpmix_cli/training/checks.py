"""Checks of a recipe against its data set and its network, before the first phase trains."""

from collections.abc import Sequence
from importlib.util import find_spec

import torch

from cpmix_cli.data.batches import NORMALISATIONS
from cpmix_cli.models import MODELS, within
from cpmix_cli.recipe.loading import refusal, typed_flags
from cpmix_cli.recipe.schema import Recipe
from cpmix_cli.runtime.errors import EnvironmentFault


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
    faults = []
    try:
        with torch.device("meta"):
            network = MODELS[recipe.model.name](num_classes, recipe.data.input_shape(shape), recipe.model)
        faults += _name_faults(recipe, [name for name, _ in network.named_parameters()])
    except ValueError as fault:
        faults.append(f'model.name = "{recipe.model.name}": {fault}')
    if recipe.data.crop and len(shape) != 3:
        faults.append(f"data.crop = {recipe.data.crop}: for images, the data set has points")
    elif recipe.data.crop > min(shape[:2]):
        faults.append(f"data.crop = {recipe.data.crop}: the images have {shape[0]} x {shape[1]} pixels")
    normalisation = recipe.data.normalisation
    if normalisation in NORMALISATIONS and len(shape) == 3 and shape[-1] != 3:
        faults.append(f'data.normalisation = "{normalisation}": for 3 channels, the images have {shape[-1]}')
    if normalisation == "dataset" and not has_statistics:
        faults.append(
            'data.normalisation = "dataset": of images that stay in their files no statistics are known; '
            "pack them (build-lt --pack S), or name published ones"
        )
    for place, term in recipe.terms(idle=True):
        for what, needs in term.needs(place):
            if needs.images and len(shape) != 3:
                faults.append(f"{what}: for images, the data set has points")
            if needs.package and find_spec(needs.package) is None:
                raise EnvironmentFault(
                    f'{what} needs the package "{needs.package}"', fix=f"pip install 'cpmix[{needs.extra}]'"
                )
            for pair in term.parameters.get(needs.class_pairs, []):
                if len(pair) != 2 or not all(0 <= c < num_classes for c in pair):
                    faults.append(f"{place}.{needs.class_pairs}: {pair} is not two of the {num_classes} class ids")
    if faults:
        fix = "change these keys with --set, or give a recipe for this data set with --recipe"
        raise refusal("the recipe", faults, typed_flags(settings), None, fix)


def _name_faults(recipe: Recipe, names: list[str]) -> list[str]:
    """Return errors: unknown parameter prefixes or modules, and phases without a trained parameter.

    `names` are the parameters of the network with a linear head.
    """
    heads = [name for name in names if name.startswith("head.")]
    if recipe.model.head == "cosine":
        names = [name for name in names if name not in heads or not name.endswith("bias")]
    wanted = [("optimizer.groups", group.prefix, names) for group in recipe.optimizer.groups]
    frozen = recipe.model.frozen
    trained = {"model.frozen": [name for name in names if not within(name, frozen)]}
    if (finetune := recipe.finetune) is not None:
        scales = [name.replace("weight", "scale") for name in heads if name.endswith("weight")]
        own = names + {"scale": scales, "routers": ["routers."]}.get(finetune.head, [])
        wanted += [("finetune.train", prefix, own) for prefix in finetune.train]
        wanted += [("finetune.groups", group.prefix, own) for group in finetune.groups]
        matched = [name for name in own if name.startswith(tuple(finetune.train))]
        if matched:
            trained["finetune.train"] = [name for name in matched if not within(name, frozen)]
    modules = ", ".join(dict.fromkeys(name.partition(".")[0] for name in names))
    faults = [
        f'model.frozen: the network has no "{module}", but {modules} and what lies in them'
        for module in frozen
        if not any(within(name, [module]) for name in names)
    ]
    faults += [f"{key}: all of it is frozen, nothing is left to train" for key, left in trained.items() if not left]
    return faults + [
        f'{key}: no parameter of the network starts with "{prefix}"; some are {", ".join(known[:1] + known[-2:])}'
        for key, prefix, known in wanted
        if not any(name.startswith(prefix) for name in known)
    ]
