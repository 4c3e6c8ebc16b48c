"""The starting point of --init: its weights, and the recipe, network and images that are the defaults with it."""

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from unicodedata import normalize

from cpmix_cli.artifacts import files, tables
from cpmix_cli.artifacts.tensors import read_tensors
from cpmix_cli.data.dataset import Dataset
from cpmix_cli.data.sources import IMAGE_SIZE
from cpmix_cli.data.splits import OWN_SOURCES
from cpmix_cli.recipe.libraries import is_library_name, library_names, published
from cpmix_cli.recipe.loading import load, of_dataset
from cpmix_cli.runs.folders import PhaseFolder
from cpmix_cli.runs.phase_choice import choose_phase, locate
from cpmix_cli.runtime import console
from cpmix_cli.runtime.errors import InputError
from cpmix_cli.training.checks import fitting_settings
from cpmix_cli.training.pretrained import fitting_network

_RECIPE = "pretrained"
"""Recipe of a data set's folder that is the default with --init."""
_SIDES = {"resnet32": 32, "resnet8": 8}
"""Side of the images that a network of cpmix is for; the others are ImageNet's, of 224 pixels."""


@dataclass(frozen=True)
class _Start:
    """What weights are known to need."""

    settings: dict[str, str]
    """Keys of a recipe."""
    side: int
    """Side of the images to store, in pixels."""
    classes: frozenset[str]
    """Classes that the weights know, if cpmix trained them."""
    why: str


def weights_of(given: Path) -> tuple[Path, PhaseFolder | None]:
    """Return the weights of --init, and the phase that they are of, if cpmix trained them.

    They are a file, or model.safetensors of a folder or of the last finished phase of a run.

    Raises:
        InputError: the folder has no such file, or the weights of a finished phase differ from its record.
    """
    if given.is_dir():
        run, named = locate(given)
        if not any(PhaseFolder(run, phase).is_begun for phase in files.PHASES):
            if (given / files.MODEL).is_file():  # such as a copied phase, or the folder of a model hub
                return given / files.MODEL, None
            raise InputError(
                f"{given} holds no phase of a run, and no {files.MODEL}",
                needed_by="--init",
                fix="give a safetensors file, or the folder of a trained run, such as --init ckpt/digits",
            )
        phase = choose_phase(run, named, files.PHASES)
    else:
        phase = PhaseFolder(given.parent.parent, given.parent.name)
        if given.name != files.MODEL or phase.phase not in files.PHASES or not phase.done:
            return given, None
    path, sha = phase.output(files.MODEL)
    files.read_bytes(path, sha)
    return path, phase


def image_size_for(init: Path, source: str, settings: Sequence[str]) -> int | None:
    """Return the side in pixels at which build-lt stores a user's images for the weights of --init; say it.

    None: the default of build-lt, for other sources or weights that cannot be read. `settings` are those of --set.
    """
    start = _start_of(init, settings) if source in OWN_SOURCES else None
    if start is None or start.side == IMAGE_SIZE:
        return None
    console.note(f"images of {start.side} x {start.side} pixels, as --init is given: {start.why}")
    return start.side


def default_recipe(init: Path, dataset: Dataset, settings: Sequence[str]) -> tuple[str, list[str]] | None:
    """Return the recipe that is the default with --init, and its settings with those of --set; say why.

    None: the default is the data set's own recipe. It has no recipe for pretrained networks, or the weights are those
    of a run that knew some of these classes, whose head goes on.

    Raises:
        UsageError: a setting is wrong.
    """
    name = of_dataset(_RECIPE, dataset.record.recipe)
    start = _start_of(init, settings) if name != _RECIPE else None
    names = {normalize("NFC", name) for name in dataset.class_names}
    if start is None or names & start.classes:
        return None
    given, wanted = _by_key(settings), _typed(start.settings)
    recipe = load(name, settings=[*wanted, *settings], rho=dataset.record.rho)
    fitting = fitting_settings(recipe, dataset.num_classes, dataset.shape, has_statistics=dataset.has_statistics)
    own = _typed({key: value for key, value in _by_key([*wanted, *fitting]).items() if key not in given})
    said = f"the recipe is {name}, as --init is given{', with ' if own else ''}{' '.join(own)}: {start.why}"
    console.note(f"{said}, of other classes" if start.classes else said)
    return name, [*own, *settings]


def _by_key(settings: Sequence[str]) -> dict[str, str]:
    return {key: value for key, _, value in (setting.partition("=") for setting in settings)}


def _typed(settings: dict[str, str]) -> list[str]:
    return [f"{key}={value}" for key, value in settings.items()]


def _start_of(init: Path, settings: Sequence[str]) -> _Start | None:
    """Return what the weights of --init need; None if they or --set are wrong, which train-stage1 says."""
    with suppress(InputError, ValueError):
        path, begun = weights_of(init)
        return _start_of_run(begun) if begun else _start_of_file(path, _by_key(settings).get("model.name"))
    return None


def _start_of_run(begun: PhaseFolder) -> _Start | None:
    recipe, shape = begun.recipe(), begun.record().dataset.shape
    if len(shape) != 3:  # points
        return None
    keys = {"name", "experts", "shared_stages", "expert_width"}
    settings = {f"model.{key}": str(value) for key, value in recipe.tables()["model"].items() if key in keys}
    settings |= {
        f"data.{key}": str(getattr(recipe.data, key)) for key in ("augment", "padding", "crop", "normalisation")
    }
    known = tables.read_class_counts(*begun.output(files.CLASS_COUNTS))["class_name"]
    classes = frozenset(normalize("NFC", name) for name in known)
    return _Start(settings, shape[0], classes, f"the weights are those of {begun.path}")


def _start_of_file(path: Path, named: str | None) -> _Start:
    tensors, metadata = read_tensors(path)
    file = metadata.get("file") if isinstance(metadata, dict) else None  # of import-weights
    name = named or fitting_network(tensors, _called(Path(str(file or path)).name))
    if name is None:
        return _Start({}, 224, frozenset(), "the weights are pretrained")
    is_library = is_library_name(name)
    side = published(name).size if is_library else _SIDES.get(name, 224)
    settings = {"model.name": name, "data.crop": str(side)} | ({"data.normalisation": "network"} if is_library else {})
    if name in _SIDES:  # small images: as in the recipes of CIFAR
        settings |= {"data.augment": "crop-flip", "data.padding": str(side // 8), "data.crop": "0"}
    return _Start(settings, side, frozenset(), f"the weights are those of a {name}")


def _called(file: str) -> list[str]:
    """Return the networks of libraries after which a file may be called: its name, for torchvision also its start."""
    stem = file.removesuffix(".safetensors")
    found = [f"timm/{stem}"] if f"timm/{stem.partition('.')[0]}" in library_names("timm") else []
    begun = [name for name in library_names("torchvision") if file.startswith(name.partition("/")[2])]
    return [*sorted(begun, key=len)[-1:], *found]
