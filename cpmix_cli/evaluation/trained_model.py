"""Trained networks that classify a user's images: the Python API, cpmix_cli.load(), and the work of `predict`."""

import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from torch import Tensor

from cpmix_cli.artifacts import files, tables
from cpmix_cli.data import image_folder
from cpmix_cli.data.batches import stream_batches
from cpmix_cli.data.decoding import LEAVE_OUT, UnreadableImages, all_unreadable_named, check_headers
from cpmix_cli.data.stream import FileReader
from cpmix_cli.evaluation.prediction import check_finite, predicted, read_model
from cpmix_cli.evaluation.saved import read_current_numbers
from cpmix_cli.recipe import plugins
from cpmix_cli.runs.folders import PhaseFolder
from cpmix_cli.runs.phase_choice import best_phase, choose_phase, locate
from cpmix_cli.runs.plugin_needs import PluginMissing, check_plugin
from cpmix_cli.runs.repair import fix_of
from cpmix_cli.runs.run_json import DatasetReference
from cpmix_cli.runtime import console
from cpmix_cli.runtime.errors import InputError, UsageError, give_one_of
from cpmix_cli.runtime.hardware import use_device
from cpmix_cli.runtime.rounding import percent
from cpmix_cli.runtime.text import on_a_line

PROBABILITY = "probability_"
"""Start of the names of columns with probabilities."""
_DEVICES = ("auto", "cpu", "cuda")


def choose_for_use(given: Path, phase: str | None) -> PhaseFolder:
    """Return the phase of --from and --phase. Warn if none was named and an earlier one is better on val.

    Raises:
        UsageError, InputError: see locate() and choose_phase().
    """
    run, named = locate(given)
    source = choose_phase(run, phase or named, files.PHASES)
    if phase or named:
        return source
    phases = [PhaseFolder(run, name) for name in files.PHASES]
    found = {each.phase: on_val for each in phases if (on_val := _on_val(each)) is not None}
    if source.phase in found and found[best := best_phase(found)] > found[source.phase]:
        console.warn(
            f"{best} is better than {source.phase} on val, balanced accuracy {percent(found[best], 2)} against "
            f"{percent(found[source.phase], 2)}; to take it: --phase {best}"
        )
    return source


def _on_val(phase: PhaseFolder) -> float | None:
    """Return the balanced accuracy of a phase on val; None if it is not known, or the phase is not usable."""
    with suppress(InputError):  # a damaged evaluation says nothing
        if phase.unusable_because() is None and (numbers := read_current_numbers(phase, phase.evaluation("val"))):
            return numbers.balanced_accuracy
    return None


def images_of(source: PhaseFolder) -> DatasetReference:
    """Return the record of the images that a phase was trained on; raise InputError if they are points."""
    seen = source.record().dataset
    if len(seen.shape) != 3:
        raise InputError(
            f"{source.path} was trained on points ({seen.name}) and takes no images",
            fix="give --from a run that was trained on images",
        )
    return seen


def probability_columns(classes: Sequence[str]) -> list[str]:
    """Return the name of each class's column; names that are equal once they are escaped get the class id."""
    names = [PROBABILITY + on_a_line(files.utf8_text(name)) for name in classes]
    return [name if names.count(name) == 1 else f"{name} ({c})" for c, name in enumerate(names)]


class TrainedModel:
    """A trained network that classifies images, with the settings of [evaluation] that it was trained with.

    Threads may call predict() at the same time; it works on one call after the other.

    Args:
        source: a finished phase.
        device: device to compute on, from use_device().

    Raises:
        InputError: the phase was trained on points, or its files are missing or damaged.
    """

    def __init__(self, source: PhaseFolder, device: torch.device) -> None:
        self.source = source
        self.seen = images_of(source)
        self.recipe = source.recipe()
        counts = tables.read_class_counts(*source.output(files.CLASS_COUNTS))
        self.class_names: list[str] = counts["class_name"].tolist()
        self.class_counts = torch.tensor(counts["num_train"].to_numpy())
        self.network = read_model(source, self.recipe, len(self.class_names), self.seen.shape).to(device).eval()
        self._device = device
        self._lock = threading.Lock()

    def predict(self, images: Any, *, probabilities: bool = False) -> pd.DataFrame:
        """Classify images.

        Files are decoded, rotated by their EXIF tag, resized and centre-cropped as for `cpmix predict`; arrays are
        resized and cropped in the same way.

        Args:
            images: a path or a sequence of paths, of files or of folders, which stand for all images below them; or RGB
                pixels, uint8 [H, W, 3] or [N, H, W, 3], or a sequence of such arrays of different sizes.
            probabilities: add a column "probability_CLASS" for each class.

        Returns:
            A row per image, in the order given: path (without arrays), class_name, confidence (0 to 1).

        Raises:
            InputError: a file is missing or no image, or an array has another shape or type.
            UnreadableError: a file cannot be read now.
        """
        found = _listed(images)
        is_files = all(isinstance(image, Path) for image in found)
        with _advised(), self._lock:
            if is_files and found:
                found = image_folder.find_images(found)
            shares = self.probabilities(found)
        confidence, classes = shares.max(1)
        names = [self.class_names[c] for c in classes.tolist()]
        columns: dict[str, Any] = {"path": [str(path) for path in found]} if is_files else {}
        columns |= {"class_name": pd.Series(names, dtype="str"), "confidence": confidence.numpy()}
        if probabilities:
            columns |= zip(probability_columns(self.class_names), shares.numpy().T, strict=True)
        return pd.DataFrame(columns)

    def probabilities(self, images: Sequence[Path | NDArray[np.uint8]]) -> Tensor:
        """Return the probability of each class: N image files or arrays -> [N, C] float32; raises as predict()."""
        return self.logits(images).softmax(1)

    def logits(self, images: Sequence[Path | NDArray[np.uint8]]) -> Tensor:
        """Return the logits of the combined experts, after post_hoc(): N images -> [N, C] float32.

        Args:
            images: image files, or arrays uint8 [H, W, 3] [N].

        Raises:
            InputError: images cannot be read, or logits are not finite.
        """
        if not images:
            return torch.empty(0, len(self.class_names))
        paths = [image for image in images if isinstance(image, Path)]
        check_headers(paths)
        reader = FileReader(images, self.seen.shape, self.recipe.data, upright=True)
        batches = stream_batches(reader, self.recipe.data, self.seen, self._device)
        with all_unreadable_named(paths, upright=True, fix=LEAVE_OUT):
            found = predicted(self.network, batches, len(images), self.class_counts, self.recipe.evaluation)
        check_finite(found, self.recipe, self.source)
        return found.logits


def load_model(run: Path, phase: str | None, device: str, plugin: Path | None = None) -> TrainedModel:
    """Load a trained network; see cpmix_cli.load() for arguments and errors."""
    if device not in _DEVICES:
        raise UsageError(f'device "{device}" is unknown', fix=give_one_of(device, _DEVICES))
    with _advised(), plugins.joined(plugin):
        plugins.run_code()
        source = choose_for_use(run, phase)
        check_plugin(source)
        return TrainedModel(source, use_device(device, torch.get_num_threads()))


def _listed(images: Any) -> list[Any]:
    """Return what predict() is given as a list, of paths or of arrays uint8 [H, W, 3].

    Raises:
        InputError: it has both, or an array of another shape or type.
    """
    if isinstance(images, str | PathLike):
        return [Path(images).expanduser()]
    if isinstance(images, Iterable) and getattr(images, "ndim", 0) < 2:
        found = [image for given in images for image in _listed(given)]
        if len({isinstance(image, Path) for image in found}) == 2:
            raise InputError("paths and arrays are given together", fix="give one kind in a call")
        return found
    pixels = np.asarray(images)
    if pixels.dtype != np.uint8 or pixels.ndim not in (3, 4) or pixels.shape[-1] != 3 or 0 in pixels.shape[-3:]:
        raise InputError(
            f"no RGB image: an array of type {pixels.dtype} and shape {pixels.shape}",
            fix="give uint8 pixels [H, W, 3] or [N, H, W, 3], or paths of files",
        )
    return [pixels] if pixels.ndim == 3 else list(pixels)


@contextmanager
def _advised() -> Iterator[None]:
    """Complete the fixes of errors, which the command line otherwise does, for a caller in Python."""
    try:
        yield
    except UnreadableImages as fault:
        fault.fix = "repair, convert or delete these files, or give the others only"
        raise
    except PluginMissing as fault:
        fault.fix = f'give its file: cpmix_cli.load(..., plugin="{fault.plugin.path}")'
        raise
    except InputError as fault:
        fault.fix = fix_of(fault)
        raise
