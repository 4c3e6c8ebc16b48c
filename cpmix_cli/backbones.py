"""Networks of torchvision and timm, as a Classifier: all that one of theirs computes before its last linear layer.

A network starts from random weights, as its library draws them; it is never fetched. Published weights come from a
file, through `train-stage1 --init`, under the names that the library has for them.
"""

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from cpmix_cli.models import TorchvisionWeights, within
from cpmix_cli.recipe.libraries import published, require_library
from cpmix_cli.recipe.schema import Model
from cpmix_cli.runtime.errors import shortened

_OWN = "backbone."
_RENAMED = (
    (re.compile(r"(denselayer\d+\.(?:norm|conv))\.([12])\."), r"\1\2."),
    (re.compile(r"\.mlp\.linear_1\."), ".mlp.0."),
    (re.compile(r"\.mlp\.linear_2\."), ".mlp.3."),
)
"""Names in published files of torchvision's DenseNets and ViTs -> their names since."""


class ImagesUnfit(ValueError):
    """The network takes images, but not of this size."""


def _unfit(name: str, shape: Sequence[int], why: object) -> ValueError:
    """Return the error of a network LIBRARY/NAME that fails for images of a shape [H, W, 3]."""
    side, reason = published(name).size, str(why).partition("\n")[0] or type(why).__name__
    if "more than 1 value per channel" in reason:
        reason = "its batch norm fails on a single image, which the last batch of an epoch may be"
    if tuple(shape[:2]) == (side, side):
        return ValueError(f"cannot be used: {reason}")
    return ImagesUnfit(
        f"takes no images of {shape[0]} x {shape[1]} pixels ({reason}); its published weights had {side} x {side}: "
        f"cut that from larger images with data.crop, or build the data set with build-lt --image-size {side}"
    )


def _leaves(tensor: Tensor) -> set[Tensor]:
    """Return the parameters that a tensor was computed from."""
    found, seen, waiting = set(), set(), [tensor.grad_fn]
    while waiting:
        node: Any = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            found.add(node.variable)
        waiting += [after for after, _ in node.next_functions]
    return found


class Backbone(TorchvisionWeights):
    """Network of a library, and a linear head of our own.

    Args:
        name: LIBRARY/NAME.
        network: the library's network, whose last linear layer is the identity.
        classifier: names of that layer in published files; ViTs that were distilled have two.
        num_features: D.
        num_classes: C.
    """

    def __init__(
        self, name: str, network: nn.Module, classifier: Sequence[str], num_features: int, num_classes: int
    ) -> None:
        super().__init__()
        self.name = name
        self.backbone: Any = network
        self.head = nn.Linear(num_features, num_classes)
        self._classifier = classifier

    def features(self, x: Tensor) -> Tensor:
        """Compute features: [B, 3, H, W] -> [B, D]."""
        found: Tensor = self.backbone(x)
        return found

    def places_of(self, name: str) -> list[str]:
        """Return the tensor that starts from a published one, or from one of a network of cpmix."""
        if name.startswith(_OWN):
            return [name]
        for pattern, now in _RENAMED:
            name = pattern.sub(now, name)
        return [_OWN + name]

    def is_head(self, name: str) -> bool:
        """Return whether a published tensor, or one of cpmix, belongs to the last linear layer."""
        return within(name, self._classifier) or name in ("head.weight", "head.bias", "head.scale")

    def layer_depths(self) -> dict[str, int] | None:
        """Return the depth of each parameter below the head by the library's own layers; None if it has none."""
        return None

    def try_images(self, shape: Sequence[int]) -> None:
        """Pass an image of this shape [H, W, 3] through the network, whose weights are on the meta device.

        Raises:
            ImagesUnfit: the network fails, or returns no features [1, D].
            ValueError: it does so for images of the size of its published weights, too; or it has weights that are
                never trained, of which an optimizer has no state to resume from.
        """
        try:
            # One image: batch norm over a single value fails, and the last batch of an epoch may be a single image.
            found = self.train().features(torch.empty(1, 3, *shape[:2], device="meta"))
        except (RuntimeError, ValueError, AssertionError, IndexError, TypeError, ZeroDivisionError) as fault:
            if "meta tensor" in str(fault):  # it reads values, which weights have none of here
                return
            raise _unfit(self.name, shape, fault) from fault
        if found.shape != (1, self.num_features):
            raise _unfit(self.name, shape, f"features have the shape {tuple(found.shape)}")
        reached = _leaves(found)
        if idle := [name for name, parameter in self.backbone.named_parameters() if parameter not in reached]:
            raise ValueError(f"cannot be used: its features do not depend on its weights {shortened(idle, 5)}")


class _TorchvisionBackbone(Backbone):
    def fitted(self, name: str, tensor: Tensor) -> Tensor:
        """Return a published tensor; position embeddings of a ViT are resampled for this size of images."""
        if not name.endswith("encoder.pos_embedding"):
            return tensor
        if tensor.shape == self.backbone.encoder.pos_embedding.shape:
            return tensor
        from torchvision.models.vision_transformer import interpolate_embeddings

        network, state = self.backbone, {"encoder.pos_embedding": tensor}
        resampled: Tensor = interpolate_embeddings(network.image_size, network.patch_size, state)[
            "encoder.pos_embedding"
        ]
        return resampled


class _TimmBackbone(Backbone):
    def features(self, x: Tensor) -> Tensor:
        """Compute features: [B, 3, H, W] -> [B, D], with the hidden layers of the head, if it has some."""
        found: Tensor = self.backbone.forward_head(self.backbone.forward_features(x), pre_logits=True)
        return found

    def layer_depths(self) -> dict[str, int] | None:
        """Return the depths that timm's own layer decay gives, in which some heads are one layer with a last norm."""
        if not hasattr(self.backbone, "group_matcher"):
            return None
        from timm.models._manipulate import group_with_matcher

        classifier = [(f"{name}.weight", None) for name in self._classifier[:1] or ["head"]]
        named = chain(self.backbone.named_parameters(), classifier)
        numbers = group_with_matcher(named, self.backbone.group_matcher(coarse=False), reverse=True)
        last = max(numbers.values())
        depths = {_OWN + name: last - numbers[name] for name, _ in self.backbone.named_parameters()}
        return depths | {f"head.{name}": 0 for name, _ in self.head.named_parameters()}

    def fitted(self, name: str, tensor: Tensor) -> Tensor:
        """Return a published tensor; position embeddings of a ViT are resampled for this size of images."""
        own = getattr(self.backbone, "pos_embed", None)
        patches = getattr(self.backbone, "patch_embed", None)
        if not name.endswith("pos_embed") or own is None or patches is None or tensor.shape == own.shape:
            return tensor
        from timm.layers.pos_embed import resample_abs_pos_embed

        grid = patches.grid_size
        others = own.shape[1] - grid[0] * grid[1]  # of class and register tokens
        if (
            tensor.ndim != 3
            or own.ndim != 3
            or round((tensor.shape[1] - others) ** 0.5) ** 2 != tensor.shape[1] - others
        ):
            return tensor
        resampled: Tensor = resample_abs_pos_embed(tensor, grid, num_prefix_tokens=others)
        return resampled


def make_backbone(recipe: Model, num_classes: int, shape: Sequence[int]) -> Backbone:
    """Make a network of a library with random weights of torch's global generator; on the meta device without any.

    Args:
        recipe: table [model]; its name is LIBRARY/NAME.
        num_classes: C.
        shape: (H, W, 3) of an image.

    Raises:
        ValueError: the samples are no RGB images, or the network has no such key, or cannot be used.
        EnvironmentFault: the library is not installed.
    """
    if len(shape) != 3 or shape[-1] != 3:
        raise ValueError(f"takes RGB images, the data set has samples of shape {tuple(shape)}")
    if recipe.experts > 1:
        raise ValueError(f"model.experts = {recipe.experts}: networks of libraries have one head")
    require_library(recipe.name)
    make = _of_torchvision if recipe.name.startswith("torchvision/") else _of_timm
    if torch.get_default_device().type != "meta":
        return make(recipe, num_classes, shape)
    with suppress(ValueError), _parameters_on_meta():
        return make(recipe, num_classes, shape).to("meta")
    with torch.device("cpu"), torch.random.fork_rng(devices=[]):  # it reads parameters, or is refused once more
        return make(recipe, num_classes, shape).to("meta")


@contextmanager
def _parameters_on_meta() -> Iterator[None]:
    """Make parameters without memory or values. torch.device("meta") does not suffice: some networks read tensors."""

    def to_meta(_: nn.Module, __: str, parameter: nn.Parameter) -> Any:
        return nn.Parameter(parameter.to("meta"), parameter.requires_grad)

    hook = register_module_parameter_registration_hook(to_meta)
    try:
        with torch.device("cpu"):
            yield
    finally:
        hook.remove()


def _of_torchvision(recipe: Model, num_classes: int, shape: Sequence[int]) -> Backbone:
    from torchvision import models  # imported here, as is timm: it takes seconds
    from torchvision.ops import StochasticDepth

    name = recipe.name.partition("/")[2]
    keys: dict[str, Any] = {}
    if name in ("googlenet", "inception_v3"):  # published weights expect images that these networks normalise again
        keys = {"aux_logits": False, "init_weights": True, "transform_input": True}
    elif name.startswith(("vit_", "maxvit_")):
        if shape[0] != shape[1]:
            raise _unfit(recipe.name, shape, "square ones only")
        keys = {"image_size": shape[0]} if name.startswith("vit_") else {"input_size": (shape[0], shape[1])}
    try:
        network = models.get_model(name, weights=None, **keys)
    except (ValueError, AssertionError, RuntimeError) as fault:
        raise _unfit(recipe.name, shape, fault) from fault
    last, classifier = list(network.named_modules())[-1]
    if not isinstance(classifier, nn.Linear):
        raise ValueError("it does not end in a linear layer, which cpmix would replace by its own head")
    network.set_submodule(last, nn.Identity())

    branches = [module for module in network.modules() if isinstance(module, StochasticDepth)]
    if recipe.drop_path and not branches:
        raise ValueError(f"model.drop_path = {recipe.drop_path:g}: the network has no drop path")
    most = max((branch.p for branch in branches), default=1.0)
    for branch in branches:  # they rise from 0 to the probability that torchvision trained with
        branch.p *= recipe.drop_path / most
    return _TorchvisionBackbone(recipe.name, network, [last], classifier.in_features, num_classes)


def _of_timm(recipe: Model, num_classes: int, shape: Sequence[int]) -> Backbone:
    import timm

    published(recipe.name)  # timm reports an unknown tag as it does wrong sizes
    name = recipe.name.partition("/")[2]
    keys: dict[str, Any] = {"img_size": tuple(shape[:2]), "drop_path_rate": recipe.drop_path}
    while True:
        try:
            network: Any = timm.create_model(name, pretrained=False, num_classes=0, **keys)
            break
        except TypeError as fault:  # not all networks have both keys
            refused = next((key for key in keys if key in str(fault)), None)
            if refused is None:
                raise ValueError(f"timm cannot make it ({fault})") from fault
            if refused == "drop_path_rate" and recipe.drop_path:
                raise ValueError(f"model.drop_path = {recipe.drop_path:g}: the network has no drop path") from fault
            del keys[refused]
        except (ValueError, AssertionError, RuntimeError) as fault:
            raise _unfit(recipe.name, shape, fault) from fault
    classifier = network.pretrained_cfg.get("classifier") or ()
    names = [classifier] if isinstance(classifier, str) else list(classifier)
    return _TimmBackbone(recipe.name, network, names, network.head_hidden_size, num_classes)
