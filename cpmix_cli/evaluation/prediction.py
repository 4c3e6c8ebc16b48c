"""Predictions of a trained network: logits of experts, combined and adjusted. Always fp32.

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
from cpmix_cli.experts import combined, routed_weights
from cpmix_cli.models import Classifier, build_model, change_head
from cpmix_cli.recipe.schema import Evaluation, Recipe
from cpmix_cli.runs.folders import PhaseFolder
from cpmix_cli.training.randomness import torch_generator
from cpmix_cli.training.state import load_model

_AHEAD = 3  # batches that are read from disk while another is predicted


@torch.no_grad()
def predict(
    model: Classifier, batches: Batches, num_samples: int, batch_size: int, of: Callable[[Tensor], Tensor] | None = None
) -> Tensor:
    """Raw logits of each expert [E, N, C] float32 on the CPU, in the data's order; the network in eval mode, fp32, no
    augmentation. With `of` what that function gives of the inputs, images along its second axis.
    """
    model.eval()
    function = of or model.expert_logits
    parts = torch.split(torch.arange(num_samples, device=batches.device), batch_size)
    found = []
    for number, part in enumerate(parts):
        for coming in parts[number : number + _AHEAD + 1]:
            batches.prefetch(coming, None)
        found.append(function(batches.plain(part)).cpu())
    return torch.cat(found, 1)


def post_hoc(logits: Tensor, class_counts: Tensor, recipe: Evaluation) -> Tensor:
    """Logits z [N, C], of an expert or of all, as [evaluation] says: adjusted, z - tau log(n_c / N), and scaled.

    Source: Menon et al., Long-tail learning via logit adjustment.
    """
    prior = torch.log(class_counts.double() / class_counts.sum()).to(logits.dtype)
    return (logits - recipe.logit_adjustment * prior) / recipe.temperature


@dataclass(frozen=True)
class Predicted:
    """What a network makes of N images."""

    logits: Tensor
    """[N, C], as [evaluation] says."""
    experts: Tensor
    """Raw ones of each expert [E, N, C]."""
    weights: Tensor | None
    """Of the experts, [E] or for each image [E, N]; None where there are none."""


def predicted(
    model: Classifier,
    batches: Batches,
    num_samples: int,
    class_counts: Tensor,
    recipe: Evaluation,
    weights: Tensor | None = None,
) -> Predicted:
    """Predict N images, and combine, adjust and scale the experts' logits; weights of the experts [E] are those learnt
    beforehand.
    """
    experts = predict(model, batches, num_samples, recipe.batch_size)
    if recipe.aggregate == "routed" and model.routers is not None:
        routes = predict(model, batches, num_samples, recipe.batch_size, lambda x: model.routed(x)[1])
        weights = routed_weights(routes, recipe.routing_threshold)
    logits = combined(experts, recipe.aggregate, model, class_counts, weights)
    return Predicted(post_hoc(logits, class_counts, recipe), experts, weights)


@torch.no_grad()
def _normalise(model: Classifier, tau: float) -> None:
    """Divide each class vector of a head by its norm ** tau; biases stay. Source: Kang et al., Decoupling."""
    for head in model.heads:
        assert isinstance(head, nn.Linear)
        head.weight /= head.weight.norm(dim=1, keepdim=True) ** tau


def accuracy_on_test(dataset: Dataset, recipe: Recipe, model: Classifier, device: torch.device) -> Callable[[], float]:
    """A function that measures the model's fraction of test images right as it is then, for --eval-every.

    As [evaluation] says, but for two of its keys: without weights learnt at test time experts are averaged, as are all
    of them before there are routers; and tau_norm changes weights, so a network in training goes without.
    """
    batches, labels = open_batches(dataset, "test", recipe.data, device)
    counts = torch.tensor(dataset.class_counts)

    def measure() -> float:
        found = predicted(model, batches, len(labels), counts, recipe.evaluation).logits.argmax(1)
        return float((found == labels).double().mean())

    return measure


def predicted_regions(source: PhaseFolder, dataset: Dataset, points: Tensor) -> tuple[NDArray[Any], NDArray[Any]]:
    """What a classifier of the plane says on a square grid around points: coordinates [G], classes [G, G] (row: y)."""
    edge = float(points.abs().max()) + 0.2
    axis = torch.linspace(-edge, edge, 400)
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    model = read_model(source, source.recipe(), dataset.num_classes, dataset.shape).eval()
    with torch.no_grad():
        classes = model(torch.stack([x.flatten(), y.flatten()], 1)).argmax(1)
    return axis.numpy(), classes.view(x.shape).numpy()


def read_model(source: PhaseFolder, recipe: Recipe, num_classes: int, shape: Sequence[int]) -> Classifier:
    """The network of a phase with its trained weights, normalised as [evaluation] says; images of the data set are of
    that shape (H, W, channels), points (2,).

    Raises:
        InputError: the weights are damaged or of another network.
    """
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
