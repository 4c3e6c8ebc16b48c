"""Networks of torchvision and timm: their features, their published names, and what they refuse."""

import hashlib
import re
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torchvision
from helpers import must, refused, setting, write_photos
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from cpmix_cli.backbones import Backbone
from cpmix_cli.data.batches import make_batches
from cpmix_cli.data.dataset import Shaped
from cpmix_cli.models import CosineHead, build_model, make_network
from cpmix_cli.recipe import libraries
from cpmix_cli.recipe.libraries import library_names, published
from cpmix_cli.recipe.loading import load
from cpmix_cli.recipe.schema import Data, Model
from cpmix_cli.runtime.errors import InputError
from cpmix_cli.training.pretrained import how_to_import, load_backbone, without_init

NO_HEAD = ("squeezenet1_0", "squeezenet1_1")


def made(name: str, side: int, **keys: Any) -> Backbone:
    model = build_model(Model(name=name, **keys), 3, (side, side, 3), torch.Generator().manual_seed(0))
    assert isinstance(model, Backbone)
    return model


def on_meta(name: str, side: int, **keys: Any) -> Backbone:
    """The network as the checks of a recipe make it, after one image has passed through it."""
    with torch.device("meta"):
        model = make_network(Model(name=name, **keys), 3, (side, side, 3))
    assert isinstance(model, Backbone)
    model.try_images((side, side, 3))
    return model


def randomised(network: nn.Module) -> nn.Module:
    """The network in eval mode, with other statistics of batch norm than a new one has."""
    for name, buffer in network.named_buffers():
        if name.endswith(("running_mean", "running_var")):
            buffer.uniform_(0.5, 2)
    return network.eval()


def of_torchvision(name: str, **keys: Any) -> nn.Module:
    """torchvision's own network for 1,000 classes, random."""
    return randomised(torchvision.models.get_model(name, weights=None, **keys))


def seen_by_last_layer(network: nn.Module, x: Tensor) -> Tensor:
    """What reaches the last linear layer of a network: an independent way to its features."""
    inputs: list[Tensor] = []
    last = [module for module in network.modules() if isinstance(module, nn.Linear)][-1]
    last.register_forward_pre_hook(lambda _, given: inputs.append(given[0]))
    with torch.no_grad():
        network(x)
    return inputs[0]


def check_features(model: Backbone, path: Path, expected: Tensor, x: Tensor, recipe: Model) -> None:
    """Load a file into the network as train-stage1 does, and compare its features with those of its library."""
    before = model.head.weight.clone()
    load_backbone(model, load_file(path), path, recipe, (*x.shape[2:], 3))
    with torch.no_grad():
        torch.testing.assert_close(model.eval().features(x), expected)
        assert model(x).shape == (len(x), 3)
    assert torch.equal(model.head.weight, before)


# Of two networks per library each quick test; the slow ones have the other families.
@pytest.mark.parametrize(
    ("name", "side", "keys"),
    [
        ("mobilenet_v3_small", 33, {}),
        ("shufflenet_v2_x0_5", 33, {}),
        *(
            pytest.param(name, side, keys, marks=pytest.mark.slow)
            for name, side, keys in (
                ("convnext_tiny", 32, {}),
                ("densenet121", 64, {}),
                ("efficientnet_b0", 40, {}),
                ("googlenet", 64, {"aux_logits": True, "transform_input": True, "init_weights": True}),
                ("mnasnet0_5", 40, {}),
                ("regnet_y_400mf", 40, {}),
                ("resnet18", 40, {}),
            )
        ),
    ],
)
def test_published_weights_give_torchvision_s_own_features(
    name: str, side: int, keys: dict[str, Any], tmp_path: Path
) -> None:
    network = of_torchvision(name, **keys)
    state = network.state_dict()
    if name == "densenet121":  # as in the published file, which is older than the names
        state = {n.replace(".norm1.", ".norm.1.").replace(".conv2.", ".conv.2."): t for n, t in state.items()}
    torch.save(state, tmp_path / "w.pth")
    sha = hashlib.sha256((tmp_path / "w.pth").read_bytes()).hexdigest()
    must("import-weights", tmp_path / "w.pth", "--sha256", sha)
    x = torch.randn(2, 3, side, side)
    recipe = Model(name=f"torchvision/{name}")
    expected = seen_by_last_layer(network, x)
    check_features(made(recipe.name, side), tmp_path / "w.safetensors", expected, x, recipe)


@pytest.mark.parametrize(
    ("name", "side"),
    [
        ("test_vit", 160),
        ("test_convnext", 32),
        *(
            pytest.param(name, side, marks=pytest.mark.slow)
            for name, side in (
                ("mobilenetv3_small_050", 40),
                ("test_efficientnet", 40),
                ("vit_tiny_patch16_224", 224),
                ("resnet10t", 40),
                ("deit_tiny_distilled_patch16_224", 224),
            )
        ),
    ],
)
def test_timm_s_files_are_taken_as_they_are(name: str, side: int, tmp_path: Path) -> None:
    network = randomised(timm.create_model(name, pretrained=False))
    save_file(network.state_dict(), tmp_path / "model.safetensors")
    x = torch.randn(2, 3, side, side)
    with torch.no_grad():
        expected = network.forward_head(network.forward_features(x), pre_logits=True)
    recipe = Model(name=f"timm/{name}")
    model = made(recipe.name, side)
    check_features(model, tmp_path / "model.safetensors", expected, x, recipe)
    # transformers' wrapper puts a prefix before timm's names.
    save_file({f"timm_model.{n}": t for n, t in network.state_dict().items()}, tmp_path / "wrapped.safetensors")
    check_features(made(recipe.name, side), tmp_path / "wrapped.safetensors", expected, x, recipe)


def test_weights_of_a_run_go_into_the_same_network(tmp_path: Path) -> None:
    recipe = Model(name="timm/test_convnext")  # whose own names have head.norm beside head.fc
    trained, model = made(recipe.name, 32), made(recipe.name, 32)
    nn.init.ones_(trained.head.weight)
    for parameter in trained.backbone.parameters():
        nn.init.normal_(parameter)
    load_backbone(model, trained.state_dict(), tmp_path, recipe, (32, 32, 3))
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, trained.state_dict()[name]) != name.startswith("head.weight"), name


@pytest.mark.parametrize(
    ("changed", "fault"), [({"stem.0.weight": "x"}, "backbone.stem.0.weight: missing"), ({".": ".odd."}, "200 tensors")]
)
def test_a_file_that_lacks_tensors_is_refused_and_the_network_stays(changed: dict[str, str], fault: str) -> None:
    """timm itself would load it, with an info line in its log, and leave the network random."""
    recipe, state = Model(name="timm/test_convnext"), timm.create_model("test_convnext", pretrained=False).state_dict()
    ((old, new),) = changed.items()
    model = made(recipe.name, 32)
    before = {n: t.clone() for n, t in model.state_dict().items()}
    with pytest.raises(InputError, match=re.escape(fault)):
        load_backbone(model, {n.replace(old, new): t for n, t in state.items()}, Path("w"), recipe, (32, 32, 3))
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())


def test_position_embeddings_are_resampled_for_another_size_of_images() -> None:
    network = timm.create_model("test_vit", pretrained=False)
    nn.init.normal_(network.pos_embed)
    grown = timm.create_model("test_vit", pretrained=False, img_size=96)
    from timm.models.vision_transformer import checkpoint_filter_fn

    expected = checkpoint_filter_fn(dict(network.state_dict()), grown)["pos_embed"]
    recipe = Model(name="timm/test_vit")
    model = made(recipe.name, 96)
    load_backbone(model, network.state_dict(), Path("w"), recipe, (96, 96, 3))
    torch.testing.assert_close(model.backbone.pos_embed, expected)


@pytest.mark.slow
def test_torchvision_s_position_embeddings_are_resampled_too() -> None:
    """From a file with the names of the published one, which is older than torchvision's names now."""
    state, recipe = of_torchvision("vit_b_32", image_size=64).state_dict(), Model(name="torchvision/vit_b_32")
    old = {n.replace(".mlp.0.", ".mlp.linear_1.").replace(".mlp.3.", ".mlp.linear_2."): t for n, t in state.items()}
    network, x = of_torchvision("vit_b_32", image_size=96), torch.randn(2, 3, 96, 96)
    network.load_state_dict(torchvision.models.vision_transformer.interpolate_embeddings(96, 32, state))
    model = made(recipe.name, 96).eval()
    load_backbone(model, old, Path("w"), recipe, (96, 96, 3))
    torch.testing.assert_close(model.features(x), seen_by_last_layer(network, x))


# -- what they are built of ------------------------------------------------------------------------------------------


def test_weights_come_from_the_generator_and_leave_torch_s_own_as_it_was() -> None:
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = made("torchvision/shufflenet_v2_x0_5", 64).state_dict()
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    second = made("torchvision/shufflenet_v2_x0_5", 64).state_dict()
    assert all(torch.equal(t, second[n]) for n, t in first.items())
    assert first["head.weight"].abs().max() <= first["head.weight"].shape[1] ** -0.5


def test_drop_path_rises_to_its_key_and_is_off_without_it() -> None:
    for name in ("torchvision/efficientnet_b0", "timm/test_convnext"):
        rates = {}
        for key in (0.0, 0.25):
            with torch.device("meta"):
                modules = list(make_network(Model(name=name, drop_path=key), 3, (64, 64, 3)).modules())
            branches = [module for module in modules if type(module).__name__ in ("StochasticDepth", "DropPath")]
            rates[key] = [getattr(branch, "p", getattr(branch, "drop_prob", 1.0)) for branch in branches]
        assert not any(rates[0.0])
        assert rates[0.25] == sorted(rates[0.25]) and rates[0.25][-1] == pytest.approx(0.25)
    for name in ("torchvision/resnet18", "timm/vgg11", "resnet18"):
        with pytest.raises(ValueError, match=r"model.drop_path = 0.1: the network has no"), torch.device("meta"):
            make_network(Model(name=name, drop_path=0.1), 3, (64, 64, 3))


def test_a_cosine_head_takes_the_place_of_the_linear_one() -> None:
    model = made("timm/test_convnext", 32, head="cosine", head_scale=5.0)
    assert isinstance(model.head, CosineHead)
    assert model(torch.randn(2, 3, 32, 32)).abs().max() <= 5


def test_dinov2_takes_the_size_of_the_images() -> None:
    model = on_meta("timm/vit_small_patch14_dinov2", 224)
    assert model.backbone.patch_embed.grid_size == (16, 16)  # 256 tokens, not the 1,369 of timm's default 518
    assert model.num_features == 384


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.parametrize("name", library_names("torchvision"))
def test_every_classifier_of_torchvision_builds(name: str) -> None:
    side, own = published(name).size, name.partition("/")[2]
    if own in NO_HEAD:
        with pytest.raises(ValueError, match="it does not end in a linear layer"):
            on_meta(name, side)
        return
    model = on_meta(name, side)
    keys: dict[str, Any] = {"image_size": side} if own.startswith("vit_") else {}
    if own in ("googlenet", "inception_v3"):
        keys = {"aux_logits": False, "init_weights": True}
    with torch.device("meta" if not own.startswith("regnet") else "cpu"):
        theirs = torchvision.models.get_model(own, weights=None, num_classes=3, **keys)
    assert sum(p.numel() for p in model.parameters()) == sum(p.numel() for p in theirs.parameters()) + (
        3 if own == "maxvit_t" else 0  # whose last layer has no bias
    )


def test_all_names_of_torchvision_are_known_without_its_import() -> None:
    listed = torchvision.models.list_models(module=torchvision.models)
    assert sorted(library_names("torchvision")) == [f"torchvision/{name}" for name in listed]
    for name in listed:
        url = published(f"torchvision/{name}").url
        assert how_to_import(url.rpartition("/")[2])[0].count(url) == 1


def test_all_names_of_timm_are_known_without_its_import() -> None:
    assert sorted(library_names("timm")) == sorted(f"timm/{name}" for name in timm.list_models())


# -- recipes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "mean", "std"),
    [
        ("torchvision/convnext_tiny", [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]),
        ("torchvision/efficientnet_v2_l", [0.5, 0.5, 0.5], [0.5, 0.5, 0.5]),
        ("timm/vit_tiny_patch16_224", [0.5, 0.5, 0.5], [0.5, 0.5, 0.5]),
        (
            "timm/vit_base_patch16_clip_224.openai",
            [0.48145466, 0.4578275, 0.40821073],
            [0.26862954, 0.26130258, 0.27577711],
        ),
    ],
)
def test_normalisation_network_is_that_of_the_published_weights(name: str, mean: list[float], std: list[float]) -> None:
    recipe = load("cifar100-lt/cross-entropy", settings=[f"model.name={name}", "data.normalisation=network"])
    assert recipe.data.normalisation == name
    images = torch.randint(256, (2, 8, 8, 3), dtype=torch.uint8)
    record = Shaped(shape=[8, 8, 3], mean=[0.1] * 3, std=[0.1] * 3)
    seen = make_batches(images, Data(augment="none", normalisation=recipe.data.normalisation), record)
    expected = (images.permute(0, 3, 1, 2) / 255 - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
    torch.testing.assert_close(seen.plain(torch.arange(2)), expected)


# -- commands --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of photos, and a data set of 64 x 64 pixels made of it."""
    folder = tmp_path_factory.mktemp("photos")
    write_photos(folder / "photos", {"red": 10, "green": 6})
    must("build-lt", "image-folder", "--data-root", folder / "photos", "--out", folder / "d", "--image-size", 64)
    return folder


def train(photos: Path, run: Path, name: str, *flags: object) -> list[object]:
    keys = setting(f"model.name={name}", "data.normalisation=network", "optimizer.batch_size=8")
    return ["train-stage1", "--data", photos / "d", "--out", run, *keys, "--epochs", 2, *flags]


@pytest.mark.slow
@pytest.mark.parametrize("library", ["torchvision", "timm"])
def test_a_pretrained_network_is_trained_evaluated_and_predicts(library: str, photos: Path, tmp_path: Path) -> None:
    if library == "torchvision":
        name, network = "torchvision/mobilenet_v3_small", torchvision.models.mobilenet_v3_small()
        torch.save(network.state_dict(), tmp_path / "w.pth")
        weights = tmp_path / "w.safetensors"
        sha = hashlib.sha256((tmp_path / "w.pth").read_bytes()).hexdigest()
        must("import-weights", tmp_path / "w.pth", "--sha256", sha)
    else:
        name, network = "timm/test_convnext", timm.create_model("test_convnext", pretrained=False)
        weights = tmp_path / "model.safetensors"
        save_file(network.state_dict(), weights)
    started = must(*train(photos, tmp_path / "run", name, "--init", weights))
    taken = len(network.state_dict()) - 2
    assert f"starts from {taken} tensors of {weights}; " in started.stderr
    must("evaluate", "--from", tmp_path / "run", "--phase", "stage1")
    found = must(
        "predict", photos / "photos", "--from", tmp_path / "run", "--phase", "stage1", "--out", tmp_path / "p.csv"
    )
    assert (tmp_path / "p.csv").read_text().count("\n") == 17, found.stderr
    refused(
        2,
        "model.drop_path = 0.1: the network has no drop path",
        *train(photos, tmp_path / "r", "resnet18"),
        *setting("data.normalisation=imagenet", "model.drop_path=0.1"),
    )


def test_recipes_are_refused_with_what_to_set_before_the_first_batch(photos: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    for name, said in {
        "torchvision/convnext_tony": 'unknown. Did you mean "torchvision/convnext_tiny"?',
        "convnext_tiny": 'unknown. Did you mean "torchvision/convnext_tiny"?',
        "timm/vit_smal_patch14_dinov2.lvd142m": 'unknown. Did you mean "timm/vit_small_patch14_dinov2"?',
        "timm/test_vit.none": "Invalid pretrained tag (none) for test_vit.",
        "timm/hf-hub:some/where": "a name of timm has letters, digits, _ and . only",
        "torchvision/squeezenet1_0": "it does not end in a linear layer, which cpmix would replace by its own head",
    }.items():
        refused(2, said, *train(photos, run, name))
    small = setting("data.crop=32", "data.augment=resized-crop-flip")
    said = (
        "takes no images of 32 x 32 pixels (its batch norm fails on a single image, which the last batch of an epoch "
        "may be); its published weights had 224 x 224: cut that from larger images with data.crop, or build the data "
        "set with build-lt --image-size 224"
    )
    refused(2, said, *train(photos, run, "torchvision/resnet18"), *small)
    two = setting("model.experts=2")
    refused(2, "model.experts = 2: networks of libraries have one head", *train(photos, run, "timm/test_vit"), *two)
    other = setting("data.normalisation=torchvision/resnet18")
    said = 'data.normalisation = "torchvision/resnet18" is of that network, not of model.name = "timm/test_vit"'
    refused(2, said, *train(photos, run, "timm/test_vit"), *other)
    refused(
        2, 'is for networks of torchvision and timm, not for model.name = "resnet18"', *train(photos, run, "resnet18")
    )
    assert not run.exists()


def test_without_its_library_a_network_is_refused_with_the_command_that_installs_it(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = libraries.find_spec
    monkeypatch.setattr(libraries, "find_spec", lambda name: None if name == "timm" else real(name))
    libraries.library_names.cache_clear()
    libraries.published.cache_clear()
    needs = 'model.name = "timm/test_vit" needs the package "timm"\n  fix: pip install \'cpmix[timm]\'\n'
    refused(4, needs, *train(photos, tmp_path / "run", "timm/test_vit"))
    libraries.library_names.cache_clear()


@pytest.mark.slow
def test_a_network_without_init_says_where_its_published_weights_are(photos: Path, tmp_path: Path) -> None:
    dry = must(*train(photos, tmp_path / "run", "timm/test_convnext"), "--dry-run")
    assert without_init("timm/test_convnext") in dry.stderr.replace("\n", " ")


def test_published_weights_are_named_with_the_command_that_imports_them() -> None:
    hub = "https://huggingface.co/timm/test_convnext.r160_in1k/resolve/main/model.safetensors"
    assert f"for its published ones, fetch {hub} and give that file with --init" in without_init("timm/test_convnext")
    command = "cpmix import-weights convnext_tiny-983f1562.pth --sha256 983f1562, and give --init convnext_tiny-"
    assert command in without_init("torchvision/convnext_tiny")


def test_a_file_of_transformers_is_refused_by_name(tmp_path: Path) -> None:
    recipe = Model(name="timm/test_vit")
    theirs = {"embeddings.cls_token": torch.zeros(1, 1, 64), "encoder.layer.0.attention.query.weight": torch.zeros(4)}
    with pytest.raises(InputError, match="transformers, which names and splits the tensors in its own way"):
        load_backbone(made(recipe.name, 160), theirs, Path("w"), recipe, (160, 160, 3))
