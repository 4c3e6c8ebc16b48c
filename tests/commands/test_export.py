"""export: the file answers as the network does and says what it needs; nothing else is published or replaced."""

import ast
import copy
import io
import json
import shutil
import sys
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import fix_of, must, refused, setting, unchanged, write_photos
from PIL import Image, ImageOps

import cpmix_cli
from cpmix_cli import models
from cpmix_cli.artifacts.files import sha256
from cpmix_cli.data.batches import pictures
from cpmix_cli.data.dataset import open_dataset
from cpmix_cli.evaluation import export
from cpmix_cli.evaluation.trained_model import TrainedModel
from cpmix_cli.models import CifarResNet, change_head
from cpmix_cli.recipe.schema import Finetune
from cpmix_cli.runtime.errors import EnvironmentFault

DIGITS = [str(digit) for digit in range(10)]
SETTINGS = setting("augment=none", "crop=12", table="data")
SETTINGS += setting("name=resnet8", "experts=3", "shared_stages=1", "head=cosine", table="model")
SETTINGS += setting("logit_adjustment=1.0", "temperature=2.0", "mirror=true", table="evaluation")


@pytest.fixture(scope="module")
def digits_model(_digits_run: Path) -> TrainedModel:
    return cpmix_cli.load(_digits_run, device="cpu")


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of several experts with cosine heads on crops of colour images."""
    root = tmp_path_factory.mktemp("photos")
    write_photos(root / "photos", {"red": 12, "green": 8, "blue": 4})
    must("build-lt", "image-folder", "--data-root", root / "photos", "--image-size", 16, "--out", root / "data")
    flags = ("--recipe", "digits/cross-entropy", "--epochs", 1, *SETTINGS)
    must("train-stage1", "--data", root / "data", "--out", root / "run", *flags)
    return root


@pytest.fixture(scope="module")
def onnx_file(_digits_run: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """An exported ONNX file, alone in a folder, and the JSON that the command printed."""
    out = tmp_path_factory.mktemp("alone") / "digits.onnx"
    return out, must("export", "--from", _digits_run, "--format", "onnx", "--out", out, "--json").json


def test_images(data: Path) -> np.ndarray:
    dataset = open_dataset(data)
    images = np.stack(list(pictures(dataset, "test", np.arange(11))))
    return np.broadcast_to(images, (*images.shape[:3], 3)).copy()


test_images.__test__ = False  # type: ignore[attr-defined]


def onnx_answer(data: bytes) -> Any:
    import onnxruntime

    session = onnxruntime.InferenceSession(data, providers=["CPUExecutionProvider"])
    assert [(i.name, i.type, i.shape) for i in session.get_inputs()] == [
        ("images", "tensor(uint8)", ["batch", 8, 8, 3])
    ]
    return lambda images: session.run(["logits"], {"images": images})[0], session.get_modelmeta().custom_metadata_map


# -- the file ----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_an_onnx_file_answers_alike_at_any_batch_size(
    onnx_file: tuple[Path, dict[str, Any]], digits: Path, _digits_run: Path, digits_model: TrainedModel
) -> None:
    path, printed = onnx_file
    assert [file.name for file in path.parent.iterdir()] == ["digits.onnx"]
    data = path.read_bytes()
    assert (printed["status"], printed["format"]) == ("done", "onnx")
    assert printed["compared_on"] == "test images of digits-lt-rho20"
    assert printed["largest_difference"] < 1e-4
    assert (printed["bytes"], printed["sha256"]) == (len(data), sha256(data))
    answer, texts = onnx_answer(data)
    images = test_images(digits)
    for size in (1, 3, 7):
        found = torch.from_numpy(answer(images[:size]))
        torch.testing.assert_close(found, digits_model.logits(list(images[:size])), rtol=0, atol=1e-4)
    assert ast.literal_eval(texts["names"]) == dict(enumerate(DIGITS))
    assert json.loads(texts["id2label"]) == {name: name for name in DIGITS}
    about = json.loads(texts["cpmix"])
    assert about == {key: printed[key] for key in about}
    assert about["classes"] == DIGITS
    assert about["checkpoint_sha256"] == sha256((_digits_run / "finetune" / "model.safetensors").read_bytes())
    assert about["recipe_sha256"] == sha256((_digits_run / "finetune" / "recipe.toml").read_bytes())
    assert about["run_digest"] == json.loads((_digits_run / "finetune" / "run.json").read_text())["digest"]
    assert (about["phase"], about["dataset"], about["cpmix_version"]) == ("finetune", "digits-lt-rho20", "0.1.0")
    for place in (str(Path(cpmix_cli.__file__).parent), str(Path(torch.__file__).parent), str(_digits_run)):
        assert place.encode() not in data


def prepared(path: Path, about: dict[str, Any]) -> np.ndarray:
    """An image file as the description in an exported file says, with Pillow alone: uint8 [H, W, 3]."""
    ways, (_, height, width, _) = about["preprocessing"], about["input"]["shape"]
    assert (ways["exif_orientation"], ways["resize_filter"], ways["antialias"]) == ("applied", "bilinear", True)
    with Image.open(path) as file:
        image = ImageOps.exif_transpose(file).convert("RGB")
    short = ways["resize_shorter_side"]
    size = [short * length // min(image.size) for length in image.size]
    image = image.resize((size[0], size[1]), Image.Resampling.BILINEAR)
    left, top = (round((length - crop) / 2) for length, crop in zip(image.size, (width, height), strict=True))
    assert ways["center_crop"] == [height, width]
    return np.asarray(image.crop((left, top, left + width, top + height)))


@pytest.mark.slow
def test_a_pt2_file_answers_alike_on_files_that_are_prepared_as_it_says(photos: Path, tmp_path: Path) -> None:
    shutil.copytree(photos / "photos", tmp_path / "new")
    exif = Image.Exif()
    exif[0x0112] = 6
    with Image.open(tmp_path / "new" / "red" / "000.png") as image:
        image.convert("RGB").save(tmp_path / "new" / "turned.jpg", exif=exif)
    run = Path(shutil.copytree(photos / "run", tmp_path / "elsewhere" / "run"))
    shutil.rmtree(run / "evaluation", ignore_errors=True)
    result = must("export", "--from", run, "--format", "pt2", "--data", photos / "data")
    path = run / "export" / "stage1.pt2"
    assert result.stderr == (f"export: takes stage1 of {run}\nexport: makes {path}, which takes seconds to minutes\n")
    assert result.stdout.splitlines()[:-2] == [
        "prepare: turn upright (EXIF), RGB, transparency on white, shorter side to 16 (bilinear, antialias), centre "
        "crop 12 x 12",
        "input: images, uint8 [N, 12, 12, 3], RGB",
        "in the graph: mean and deviation of the pixels, experts = 3, logit_adjustment = 1.0, temperature = 2.0, "
        "mirror = true",
        "output: logits, float32 [N, 3]; softmax gives the probabilities of predict",
    ]
    assert result.stdout.splitlines()[-2].startswith(
        "compared: 8 test images of image-folder-photos-16px, in batches of 8 "
    )
    assert result.stdout.splitlines()[-1] == f"done: {path} ({path.stat().st_size / 1e6:.1f} MB)"
    data = path.read_bytes()
    assert str(Path(cpmix_cli.__file__).parent).encode() not in data
    texts = dict.fromkeys(("names", "id2label", "cpmix"), "")
    program = torch.export.load(io.BytesIO(data), extra_files=texts).module()
    assert texts["names"] == "{0: 'blue', 1: 'green', 2: 'red'}"
    about = json.loads(texts["cpmix"])
    table = cpmix_cli.load(run).predict(tmp_path / "new", probabilities=True)
    assert len(table) == 25
    for count in (1, 25):
        inputs = np.stack([prepared(Path(name), about) for name in table["path"][:count]])
        shares = program(torch.from_numpy(inputs)).softmax(1).numpy()
        np.testing.assert_allclose(shares, table.iloc[:count, 3:].to_numpy(), rtol=0, atol=1e-5)
    assert must("export", "--from", run, "--format", "pt2", "--data", photos / "data", "--json").json["status"] == (
        "up to date"
    )


@pytest.mark.parametrize("aggregate", ["mean", "targets", "test-time", "routed"])
def test_the_graph_combines_experts_as_predict_does(photos: Path, aggregate: str) -> None:
    model = cpmix_cli.load(photos / "run", device="cpu")
    evaluation = model.recipe.evaluation.model_copy(update={"aggregate": aggregate, "routing_threshold": 0.5})
    model.recipe = model.recipe.model_copy(update={"evaluation": evaluation})
    if aggregate == "routed":
        finetune = Finetune.model_construct(head="routers", router_top=3)
        change_head(model.network, finetune, 3, torch.Generator().manual_seed(0))
    images = np.random.default_rng(1).integers(0, 256, (9, 16, 16, 3), dtype=np.uint8)
    with torch.no_grad():
        found = export.ImagesToLogits(model)(torch.from_numpy(images[:, 2:14, 2:14]))
    torch.testing.assert_close(found, model.logits(list(images)), rtol=0, atol=1e-5)
    said = export.description(model)["evaluation"]
    assert said["aggregate"] == {"test-time": "mean"}.get(aggregate, aggregate)
    assert (said["experts"], said["logit_adjustment"], said["mirror"]) == (3, 1.0, True)


def test_grey_in_the_graph_is_that_of_pillow(digits_model: TrainedModel) -> None:
    images = np.random.default_rng(1).integers(0, 256, (50, 8, 8, 3), dtype=np.uint8)
    with torch.no_grad():
        found = export.ImagesToLogits(digits_model)(torch.from_numpy(images))
    torch.testing.assert_close(found, digits_model.logits(list(images)), rtol=0, atol=1e-5)


# -- the comparison ----------------------------------------------------------------------------------------------------


class _OtherInExport(CifarResNet):
    """A network with a branch that only an exporter takes, as some libraries have."""

    def features(self, x: torch.Tensor) -> torch.Tensor:
        return super().features(x) + (0.01 if torch.compiler.is_exporting() else 0.0)


class _Sorted(CifarResNet):
    """A network with an operation that ONNX lacks."""

    def features(self, x: torch.Tensor) -> torch.Tensor:
        return super().features(x).sort(dim=1, stable=True).values


@pytest.mark.slow
def test_a_file_that_answers_otherwise_is_not_published(digits_run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(models.MODELS, "resnet8", lambda classes, shape, recipe: _OtherInExport(classes, 1, 1, 16))
    with unchanged(digits_run):
        result = refused(4, "the exported file answers otherwise", "export", "--from", digits_run, "--format", "pt2")
    assert "with 8 images at once, logits differ by up to 0.0" in result.stderr
    assert fix_of(result) == "use the network itself, by predict or by cpmix_cli.load() in Python"
    assert not (digits_run / "export").exists()


@pytest.mark.slow
def test_a_network_that_cannot_be_exported_is_refused(digits_run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(models.MODELS, "resnet8", lambda classes, shape, recipe: _Sorted(classes, 1, 1, 16))
    with unchanged(digits_run):
        result = refused(4, f"cannot export resnet8 of {digits_run}/finetune", "export", "--from", digits_run)
    assert fix_of(result) == "give --format pt2"
    must("export", "--from", digits_run, "--format", "pt2")


def test_each_difference_to_the_network_is_found(digits_model: TrainedModel) -> None:
    images = export.generated((8, 8, 1))
    expected = digits_model.logits(images).numpy()
    given = {image.tobytes(): logits for image, logits in zip(images, expected, strict=True)}

    def exact(batch: np.ndarray) -> np.ndarray:
        return np.stack([given[image.tobytes()] for image in batch])

    def in_one_logit(batch: np.ndarray) -> np.ndarray:
        return exact(batch) + 0.0011 * (np.arange(10) == 9)

    def alone(batch: np.ndarray) -> np.ndarray:
        return exact(batch) + (0.01 if len(batch) == 1 else 0)

    def without_number(batch: np.ndarray) -> np.ndarray:
        return exact(batch) * np.float32("nan")

    def for_one_size(batch: np.ndarray) -> np.ndarray:
        if len(batch) != 8:
            raise ValueError("Got invalid dimensions for input")
        return exact(batch)

    assert export.largest_difference(digits_model, images, exact) == 0
    cases = {in_one_logit: "with 8 images at once, logits differ by up to 0.0011", alone: "with 1 image at once"}
    cases |= {without_number: "up to nan", for_one_size: "does not run with 1 image at once: Got invalid dimensions"}
    for answer, message in cases.items():
        with pytest.raises(EnvironmentFault, match=message):
            export.largest_difference(digits_model, images, answer)
    head = digits_model.network.head
    before = copy.deepcopy(head.state_dict())
    best, other = expected[0].argsort()[[-1, 0]]
    try:
        with torch.no_grad():  # two classes that are almost equal: a change below 0.001 of the logits changes the class
            head.weight[other] = head.weight[best]
            head.bias[other] = head.bias[best] - 1e-4
        nearly = digits_model.logits(images).numpy()
        given.update((image.tobytes(), logits) for image, logits in zip(images, nearly, strict=True))
        with pytest.raises(EnvironmentFault, match=r"0\.0005 .* [1-8] of 8 images get another class"):
            export.largest_difference(
                digits_model, images, lambda batch: exact(batch) + 5e-4 * (np.arange(10) == other)
            )
    finally:
        head.load_state_dict(before)


# -- files that are there, and what is missing -------------------------------------------------------------------------


def test_a_user_s_file_is_never_replaced(digits_run: Path, tmp_path: Path) -> None:
    import onnx

    (tmp_path / "text.onnx").write_text("mine")
    (tmp_path / "text.pt2").write_text("mine")
    graph = onnx.helper.make_graph([], "graph", [], [])
    onnx.save(onnx.helper.make_model(graph), tmp_path / "theirs.onnx")
    with zipfile.ZipFile(tmp_path / "theirs.pt2", "w") as archive:
        archive.writestr("archive/extra/other", "{}")
    with unchanged(tmp_path):
        for path in sorted(tmp_path.glob("*.*")):
            export_it = ("export", "--from", digits_run, "--format", path.suffix[1:], "--out", path)
            for flags in ((), ("--overwrite",)):
                result = refused(4, f"{path} exists", *export_it, *flags)
                assert fix_of(result).endswith("or move it away first, because cpmix did not write it")


@pytest.mark.slow
def test_a_file_of_another_checkpoint_is_replaced_with_overwrite(
    onnx_file: tuple[Path, dict[str, Any]], digits_run: Path, tmp_path: Path
) -> None:
    out = Path(shutil.copy(onnx_file[0], tmp_path / "digits.onnx"))
    other = ("export", "--from", digits_run, "--phase", "stage2", "--out", out)
    with unchanged(tmp_path):
        refused(4, f"{out} is of another checkpoint, or of another version of cpmix", *other)
    assert must(*other, "--overwrite", "--json").json["phase"] == "stage2"
    assert sha256(out.read_bytes()) != onnx_file[1]["sha256"]


@pytest.mark.slow
def test_without_the_data_set_random_images_are_compared(photos: Path, tmp_path: Path) -> None:
    (photos / "data").rename(tmp_path / "moved")
    export_it = ("export", "--from", photos / "run", "--format", "pt2", "--out", tmp_path / "file.pt2")
    try:
        result = must(*export_it, "--json")
        assert (
            f"warning: compared on random images only: the data set image-folder-photos-16px of {photos}"
            in result.stderr
        )
        assert result.json["compared_on"] == "random images"
        assert must(*export_it, "--data", tmp_path / "moved", "--json").json["status"] == "up to date"
        refused(3, "is not found", *export_it, "--data", tmp_path)
    finally:
        (tmp_path / "moved").rename(photos / "data")


def test_what_an_export_lacks_is_named(digits_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    export_it = ("export", "--from", digits_run)
    with unchanged(digits_run):
        result = refused(2, "--out a.bin does not end in .onnx", *export_it, "--out", "a.bin")
        assert fix_of(result) == "give a name such as --out model.onnx, or the format with --format"
        refused(2, '--format "torchscript" is unknown', *export_it, "--format", "torchscript")
        monkeypatch.setattr(export, "MOST_BYTES", 10_000)
        result = refused(3, "one ONNX file holds at most 10,000", *export_it)
        assert fix_of(result) == "give --format pt2"
        monkeypatch.setitem(sys.modules, "onnxruntime", None)
        result = refused(4, "onnxruntime is not installed", *export_it)
        assert fix_of(result) == "pip install 'cpmix[onnx]', or give --format pt2, which needs torch only"
