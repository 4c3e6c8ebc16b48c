"""Predictions of a trained network: logits of its experts, combined and adjusted. Always fp32.

Shapes: N images, C classes, E experts.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from cpmix_cli.artifacts import files
from cpmix_cli.artifacts.tensors import read_tensors
from cpmix_cli.data.batches import Batches, open_batches
from cpmix_cli.data.dataset import Dataset
from cpmix_cli.evaluation.accuracy import class_accuracy, confusion_matrix
from cpmix_cli.experts import combined, routed_weights
from cpmix_cli.models import Classifier, build_model, change_head
from cpmix_cli.recipe.functions import known
from cpmix_cli.recipe.libraries import is_library_name
from cpmix_cli.recipe.schema import Evaluation, Recipe
from cpmix_cli.runs.folders import PhaseFolder
from cpmix_cli.runs.plugin_needs import check_plugin
from cpmix_cli.runtime.errors import InputError
from cpmix_cli.training.randomness import torch_generator
from cpmix_cli.training.state import load_model

_AHEAD = 3  # batches prefetched from disk while one is predicted


@torch.no_grad()
def predict(
    model: Classifier,
    batches: Batches,
    num_samples: int,
    batch_size: int,
    of: Callable[[Tensor], Tensor] | None = None,
    *,
    mirror: bool = False,
) -> Tensor:
    """Compute the raw logits of each expert in eval mode, in fp32 and without augmentation.

    Args:
        model: set to eval mode.
        batches: test inputs.
        num_samples: N; inputs 0 to N - 1 are predicted in that order.
        batch_size: images per forward pass.
        of: function of the inputs to use instead of the expert logits: [B, ...] -> [n, B, ...].
        mirror: True gives the mean over the inputs [B, 3, H, W] and their mirror images.

    Returns:
        Logits [E, N, C] float32 on the CPU, or the values of `of` [n, N, ...].
    """
    model.eval()
    function = of or model.expert_logits
    parts = torch.split(torch.arange(num_samples, device=batches.device), batch_size)
    found = []
    for number, part in enumerate(parts):
        for coming in parts[number : number + _AHEAD + 1]:
            batches.prefetch(coming, None)
        x = batches.plain(part)
        values = function(x)
        if mirror:
            values = (values + function(x.flip(-1))) / 2
        found.append(values.cpu())
    return torch.cat(found, 1)


def post_hoc(logits: Tensor, class_counts: Tensor, recipe: Evaluation) -> Tensor:
    """Adjust logits z for the class priors and divide by the temperature T: (z - tau log(n_c / n)) / T.

    Args:
        logits: combined logits, or those of one expert [N, C].
        class_counts: training images n_c per class [C]; n is their sum.
        recipe: [evaluation], with tau = logit_adjustment and T = temperature.

    Returns:
        Logits [N, C].

    Source: Menon et al., Long-tail learning via logit adjustment.
    """
    prior = torch.log(class_counts.double() / class_counts.sum()).to(logits.dtype)
    return (logits - recipe.logit_adjustment * prior) / recipe.temperature


@dataclass(frozen=True)
class Predicted:
    """Predictions for N images."""

    logits: Tensor
    """Logits of the combined experts [N, C], after post_hoc()."""
    experts: Tensor
    """Raw logits of each expert [E, N, C]."""
    weights: Tensor | None
    """Weights of the experts, [E] or per image [E, N]; None if they are averaged or combined by target classes."""


def predicted(
    model: Classifier,
    batches: Batches,
    num_samples: int,
    class_counts: Tensor,
    recipe: Evaluation,
    weights: Tensor | None = None,
) -> Predicted:
    """Predict N images: compute the experts' logits, combine and adjust them.

    Args:
        model: set to eval mode.
        batches: test inputs.
        num_samples: N.
        class_counts: training images per class [C].
        recipe: [evaluation].
        weights: weights of the experts [E] from learn_expert_weights(); None: combined as in experts.combined().
    """
    experts = predict(model, batches, num_samples, recipe.batch_size, mirror=recipe.mirror)
    if recipe.aggregate == "routed" and model.routers is not None:
        routes = predict(
            model, batches, num_samples, recipe.batch_size, lambda x: model.routed(x)[1], mirror=recipe.mirror
        )
        weights = routed_weights(routes, recipe.routing_threshold)
    logits = combined(experts, recipe.aggregate, model, class_counts, weights)
    return Predicted(post_hoc(logits, class_counts, recipe), experts, weights)


def check_finite(found: Predicted, recipe: Recipe, source: PhaseFolder) -> None:
    """Check the logits of an evaluation, before its files are written.

    Args:
        found: predictions of the network.
        recipe: its recipe, which gives [evaluation].
        source: phase of the network, for the message.

    Raises:
        InputError: a logit is NaN or infinite, by post-hoc keys or by the network itself.
    """
    if found.logits.isfinite().all():
        return
    values = recipe.evaluation
    keys = {"temperature": 1.0, "logit_adjustment": 0.0, "tau_norm": 0.0}
    given = [
        f"evaluation.{key} = {getattr(values, key):g}" for key, plain in keys.items() if getattr(values, key) != plain
    ]
    by = f" with {', '.join(given)}" if given else ""
    plain = " ".join(f"--set evaluation.{key}={value:g}" for key, value in keys.items())
    raise InputError(
        f"the network in {source.path / files.MODEL} gives logits that are not finite{by}",
        fix=f"give evaluate {plain}"
        if given
        else f"train {source.phase} again with a lower learning rate, --overwrite",
    )


@torch.no_grad()
def _normalise(model: Classifier, tau: float) -> None:
    """Divide each class vector of the heads by its norm ** tau, and set biases to 0.

    Source: Kang et al., Decoupling, and its code tau_norm.py, which leaves the bias out.
    """
    for head in model.heads:
        assert isinstance(head, nn.Linear)
        head.weight /= head.weight.norm(dim=1, keepdim=True) ** tau
        head.bias.zero_()


def accuracy_on_test(dataset: Dataset, recipe: Recipe, model: Classifier, device: torch.device) -> Callable[[], float]:
    """Return a function that measures the model's current test accuracy, a fraction, for --eval-every.

    It follows [evaluation] with two exceptions. Experts are averaged if their weights are learnt at test time, or if
    the network has no routers yet. tau_norm is not applied, because it would change the weights in training.

    Args:
        dataset: its test split is measured.
        recipe: gives [data] and [evaluation].
        model: read at each call; a call leaves it in eval mode.
        device: device of the model.
    """
    batches, labels = open_batches(dataset, "test", recipe.data, device)
    counts = torch.tensor(dataset.class_counts)

    def measure() -> float:
        found = predicted(model, batches, len(labels), counts, recipe.evaluation).logits.argmax(1)
        return float((found == labels).double().mean())

    return measure


def balanced_accuracy(source: PhaseFolder, dataset: Dataset, split: str, device: torch.device) -> float:
    """Return the mean over classes of the accuracy of a phase's network, in per cent. It follows [evaluation].

    Args:
        source: a finished phase.
        dataset: its data set.
        split: split to measure; classes without an image in it are left out.
        device: device to use.

    Raises:
        InputError: the weights or the split are missing or damaged.
    """
    recipe = source.recipe()
    model = read_model(source, recipe, dataset.num_classes, dataset.shape).to(device)
    batches, labels = open_batches(dataset, split, recipe.data, device)
    counts = torch.tensor(dataset.class_counts)
    found = predicted(model, batches, len(labels), counts, recipe.evaluation).logits.argmax(1)
    return 100 * float(class_accuracy(confusion_matrix(labels, found, dataset.num_classes)).nanmean())


def predicted_regions(source: PhaseFolder, dataset: Dataset, points: Tensor) -> tuple[NDArray[Any], NDArray[Any]]:
    """Predict the class at each point of a square grid, for a network that classifies points of the plane.

    Args:
        source: a finished phase.
        dataset: its data set, of points.
        points: points [n, 2] that the grid must contain.

    Returns:
        Coordinates of both axes [G] float32 and predicted classes [G, G] int64; rows are y.
    """
    edge = float(points.abs().max()) + 0.2
    axis = torch.linspace(-edge, edge, 400)
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    model = read_model(source, source.recipe(), dataset.num_classes, dataset.shape).eval()
    with torch.no_grad():
        classes = model(torch.stack([x.flatten(), y.flatten()], 1)).argmax(1)
    return axis.numpy(), classes.view(x.shape).numpy()


def read_model(source: PhaseFolder, recipe: Recipe, num_classes: int, shape: Sequence[int]) -> Classifier:
    """Return the network of a phase with its trained weights, and with tau_norm applied.

    Args:
        source: a finished phase.
        recipe: recipe of the phase.
        num_classes: C.
        shape: shape of an image of the data set (H, W, channels), or (2,) for points.

    Raises:
        InputError: the weights are missing, damaged or of another network, or this is of a plugin that is not given.
    """
    if recipe.model.name not in known("model") and not is_library_name(recipe.model.name):
        check_plugin(source)
    path, sha = source.output(files.MODEL)
    tensors, _ = read_tensors(path, sha)
    generator = torch_generator(recipe.seed, "weights")
    model = build_model(recipe.model, num_classes, recipe.data.input_shape(shape), generator)
    if source.phase == "finetune" and recipe.finetune is not None:
        change_head(model, recipe.finetune, num_classes, generator)
    load_model(model, tensors, path)
    if recipe.evaluation.tau_norm:
        _normalise(model, recipe.evaluation.tau_norm)
    return model
