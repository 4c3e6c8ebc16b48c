"""Exported networks: one file from uint8 RGB images to logits, normalisation included, checked before it is published.

The file says how an image is prepared for it. cpmix itself reads such files only to see whether it may replace them.
"""

import io
import json
import logging
import warnings
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from cpmix_cli import __version__
from cpmix_cli.artifacts import files, records
from cpmix_cli.data.batches import normalisation, pictures
from cpmix_cli.data.dataset import Dataset
from cpmix_cli.data.stream import FileReader, read_in_order
from cpmix_cli.evaluation.prediction import post_hoc
from cpmix_cli.evaluation.trained_model import TrainedModel
from cpmix_cli.experts import combiner, routed_weights
from cpmix_cli.runtime.errors import EnvironmentFault, InputError, counted
from cpmix_cli.runtime.memory import raise_if_exhausted

PACKAGES = ("onnx", "onnxscript", "onnxruntime")
"""Packages of the extra "onnx"."""
MOST_BYTES = 2_000_000_000
"""Largest size of the weights in an ONNX file, in bytes: the format ends at 2 GiB."""
LARGEST_DIFFERENCE = 1e-3
"""Largest difference between a logit of the file and of the network."""
BATCH_SIZES = (8, 1)
"""Batch sizes of the comparison. The graph is recorded with another one, 2."""
_OPSET = 20
_INPUT, _OUTPUT, _BATCH = "images", "logits", "batch"
_GREY = (19595.0, 38470.0, 7471.0)  # Pillow's grey is (their sum with red, green and blue + 2 ** 15) // 2 ** 16


class ImagesToLogits(nn.Module):
    """The graph of an exported file: uint8 RGB images [N, H, W, 3] of the network's size -> logits [N, C] of predict().

    Args:
        model: trained network, on the CPU.
    """

    def __init__(self, model: TrainedModel) -> None:
        super().__init__()
        self.network, self.settings = model.network, model.recipe.evaluation
        channels = model.seen.shape[2]
        offset, scale = normalisation(model.recipe.data, channels, model.seen.mean, model.seen.std, torch.device("cpu"))
        self.offset = nn.Buffer(offset.view(-1, 1, 1))
        self.scale = nn.Buffer(scale.view(-1, 1, 1))
        self.grey = nn.Buffer(torch.tensor(_GREY)) if channels == 1 else None
        self.class_counts = nn.Buffer(model.class_counts)
        self._combined = combiner(self.settings.aggregate, self.network, model.class_counts)

    def forward(self, images: Tensor) -> Tensor:
        x = images.float()
        if self.grey is not None:  # exact: all are integers below 2 ** 24
            x = (((x * self.grey).sum(3, keepdim=True) + 2**15) / 2**16).floor()
        x = (x.permute(0, 3, 1, 2) - self.offset) * self.scale
        logits, routes = self._answers(x)
        if self.settings.mirror:
            mirrored, other_routes = self._answers(x.flip(3))
            logits = (logits + mirrored) / 2
            routes = None if routes is None or other_routes is None else (routes + other_routes) / 2
        if routes is None:
            combined = self._combined(logits)
        else:
            weights = routed_weights(routes, self.settings.routing_threshold)
            combined = (weights[:, :, None] * logits).sum(0)
        return post_hoc(combined, self.class_counts, self.settings)

    def _answers(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return the logits of the experts [E, N, C], and of the routers [E - 1, N], if they choose."""
        if self.settings.aggregate == "routed" and self.network.routers is not None:
            return self.network.routed(x)
        return self.network.expert_logits(x), None


def description(model: TrainedModel) -> dict[str, Any]:
    """Return the JSON object "cpmix" of an exported file: input, preparation, output, and where the network is from."""
    source, recipe = model.source, model.recipe
    height, width, channels = recipe.data.input_shape(model.seen.shape)
    offset, scale = normalisation(recipe.data, channels, model.seen.mean, model.seen.std, torch.device("cpu"))
    return {
        "format_version": 1,
        "cpmix_version": __version__,
        "classes": [files.utf8_text(name) for name in model.class_names],
        "input": {
            "name": _INPUT,
            "dtype": "uint8",
            "layout": "NHWC",
            "shape": [None, height, width, 3],
            "colour": "RGB",
        },
        "preprocessing": {
            "exif_orientation": "applied",
            "transparency": "laid on white",
            "resize_shorter_side": model.seen.shape[0],
            "resize_filter": "bilinear",
            "antialias": True,
            "center_crop": [height, width],
        },
        "in_graph": {
            "grey": channels == 1,
            "mean": [round(value, 6) for value in (offset / 255).tolist()],
            "std": [round(value, 6) for value in (1 / (255 * scale)).tolist()],
        },
        "output": {"name": _OUTPUT, "dtype": "float32", "shape": [None, len(model.class_names)], "softmax": False},
        "evaluation": {
            "aggregate": _aggregate(model),
            "experts": recipe.model.experts,
            **{
                key: getattr(recipe.evaluation, key)
                for key in ("logit_adjustment", "temperature", "tau_norm", "mirror")
            },
        },
        "network": recipe.model.name,
        "dataset": model.seen.name,
        "phase": source.phase,
        "checkpoint_sha256": source.output(files.MODEL)[1],
        "recipe_sha256": source.output(files.RECIPE)[1],
        "run_digest": files.digest(records.read_fields(source.path / files.RUN)),
    }


def _aggregate(model: TrainedModel) -> str:
    """Return how the graph combines the experts: as predict, which has no test set to learn weights from."""
    how = model.recipe.evaluation.aggregate
    return "mean" if how == "test-time" or (how == "routed" and model.network.routers is None) else how


def metadata(about: Mapping[str, Any]) -> dict[str, str]:
    """Return the texts that are stored in an exported file, from its description().

    names is the text of a Python dictionary, class id -> name, as Ultralytics reads it. id2label is the same as JSON,
    as transformers has it.
    """
    names = dict(enumerate(about["classes"]))
    return {"names": repr(names), "id2label": json.dumps(names), "cpmix": json.dumps(about)}


def description_in(data: bytes, form: str) -> Any:
    """Return the description() in an exported file, without loading its network; None for other files.

    Args:
        data: the whole file.
        form: "onnx" or "pt2".
    """
    try:
        if form == "onnx":
            import onnx

            texts = {entry.key: entry.value for entry in onnx.load_model_from_string(data).metadata_props}
            return json.loads(texts["cpmix"])
        with zipfile.ZipFile(io.BytesIO(data)) as archive:  # no pickle in it is read
            (name,) = [name for name in archive.namelist() if name.endswith("/extra/cpmix")]
            return json.loads(archive.read(name))
    except Exception as fault:  # a file of someone else makes the readers raise any exception
        raise_if_exhausted(fault)
        return None


# -- writing -----------------------------------------------------------------------------------------------------------


def check_packages(form: str) -> None:
    """Raise EnvironmentFault if a package is missing that a format needs."""
    missing = [name for name in PACKAGES if find_spec(name) is None] if form == "onnx" else []
    if missing:
        raise EnvironmentFault(
            f"{' and '.join(missing)} {'is' if len(missing) == 1 else 'are'} not installed",
            needed_by="--format onnx",
            fix="pip install 'cpmix[onnx]', or give --format pt2, which needs torch only",
        )


def check_size(model: TrainedModel) -> None:
    """Raise InputError if the weights are too large for one ONNX file."""
    size = sum(tensor.nbytes for tensor in model.network.state_dict().values())
    if size > MOST_BYTES:
        raise InputError(
            f"the weights of {model.source.path} have {size:,} bytes; one ONNX file holds at most {MOST_BYTES:,}",
            fix="give --format pt2",
        )


Answer = Callable[[NDArray[np.uint8]], NDArray[np.float32]]
"""Images uint8 [N, H, W, 3] -> logits [N, C]."""


def exported(model: TrainedModel, form: str, texts: dict[str, str]) -> tuple[bytes, Answer]:
    """Export a network.

    Args:
        model: trained network, on the CPU.
        form: "onnx" or "pt2".
        texts: metadata() of the file.

    Returns:
        The file, and a function that answers as it does. A .pt2 file is not loaded for that, because loading it
        unpickles: the program that it was made of answers.

    Raises:
        EnvironmentFault: torch cannot export the network.
    """
    height, width, _ = model.recipe.data.input_shape(model.seen.shape)
    example = torch.zeros(2, height, width, 3, dtype=torch.uint8)
    try:
        with _for_exporters(), torch.no_grad():
            graph = ImagesToLogits(model).eval().requires_grad_(False)
            # A network that fixes the batch size is an error. With Dim.AUTO its file would have that size alone.
            program = torch.export.export(graph, (example,), dynamic_shapes=({0: torch.export.Dim(_BATCH, min=1)},))
            for part in program.graph_module.modules():
                for node in part.graph.nodes if isinstance(part, torch.fx.GraphModule) else ():
                    node.meta.pop("stack_trace", None)  # paths of this machine
            return (_as_onnx if form == "onnx" else _as_pt2)(program, texts)
    except Exception as fault:  # the exporters raise any exception
        raise_if_exhausted(fault)
        reason = next((line for line in str(fault).splitlines() if line.strip()), type(fault).__name__)
        raise EnvironmentFault(
            f"torch {torch.__version__} cannot export {model.recipe.model.name} of {model.source.path}: {reason}",
            needed_by=f"--format {form}",
            fix="give --format pt2" if form == "onnx" else _FROM_PYTHON,
        ) from fault


_FROM_PYTHON = "use the network itself, by predict or by cpmix_cli.load() in Python"


@contextmanager
def _for_exporters() -> Iterator[None]:
    """Drop what the exporters print, log and warn of, which is about their own code.

    They refuse to work where cuDNN has one precision for convolutions, which use_device() sets for a GPU, and another
    for recurrent networks.
    """
    before, cudnn = logging.root.manager.disable, torch.backends.cudnn
    precision = cudnn.conv.fp32_precision  # type: ignore[attr-defined]
    logging.disable(logging.CRITICAL)
    cudnn.conv.fp32_precision = cudnn.rnn.fp32_precision  # type: ignore[attr-defined]
    try:
        with warnings.catch_warnings(action="ignore"), redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
            yield
    finally:
        logging.disable(before)
        cudnn.conv.fp32_precision = precision  # type: ignore[attr-defined]


def _as_pt2(program: torch.export.ExportedProgram, texts: dict[str, str]) -> tuple[bytes, Answer]:
    buffer, module = io.BytesIO(), program.module()
    torch.export.save(program, buffer, extra_files=texts)
    return buffer.getvalue(), lambda images: module(torch.from_numpy(images)).numpy()


def _as_onnx(program: torch.export.ExportedProgram, texts: dict[str, str]) -> tuple[bytes, Answer]:
    import onnxruntime

    found = torch.onnx.export(
        program,
        (),
        dynamo=True,
        verbose=False,
        opset_version=_OPSET,
        input_names=[_INPUT],
        output_names=[_OUTPUT],
        dynamic_shapes=({0: _BATCH},),
    )
    assert found is not None
    for node in found.model.graph.all_nodes():
        node.metadata_props.clear()  # paths of this machine
    found.model.metadata_props.update(texts)
    data = found.model_proto.SerializeToString()
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = torch.get_num_threads(), 4
    session = onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])
    return data, lambda images: session.run([_OUTPUT], {_INPUT: images})[0]


# -- the comparison ----------------------------------------------------------------------------------------------------


def some_of(dataset: Dataset) -> list[NDArray[np.uint8]]:
    """Return test images of a data set, spread over the split, uint8 [S, S, 3]; grey ones in three equal channels.

    Raises:
        InputError: the data set has no test image, or its images are missing.
    """
    number = len(dataset.labels("test"))
    if not number:
        raise InputError(
            f"{dataset.folder} has no test image",
            fix="give --data with a folder that has some, or drop it: random images are compared then",
        )
    chosen = np.arange(max(BATCH_SIZES)) * number // max(BATCH_SIZES)
    return [np.broadcast_to(image, (*image.shape[:2], 3)) for image in pictures(dataset, "test", chosen)]


def generated(shape: Sequence[int]) -> list[NDArray[np.uint8]]:
    """Return random images, the same in each call: uint8 [S, S, 3]."""
    return list(np.random.default_rng(0).integers(0, 256, (max(BATCH_SIZES), *shape[:2], 3), dtype=np.uint8))


def largest_difference(model: TrainedModel, images: Sequence[NDArray[np.uint8]], answer: Answer) -> float:
    """Compare an exported file with the network as predict() uses it, in batches of each of BATCH_SIZES.

    Args:
        model: trained network.
        images: images [n], uint8 [S, S, 3].
        answer: answers as the file does.

    Returns:
        The largest difference between two logits.

    Raises:
        EnvironmentFault: it is above LARGEST_DIFFERENCE, a class differs, or the file cannot be run.
    """
    expected = model.logits(images)
    reader = FileReader(images, [*model.seen.shape[:2], 3], model.recipe.data, upright=True)
    inputs = np.stack(list(read_in_order(reader, range(len(images)))))
    largest = 0.0
    for size in BATCH_SIZES:
        try:
            parts = [answer(inputs[first : first + size]) for first in range(0, len(inputs), size)]
            found = torch.from_numpy(np.concatenate(parts))
            difference = (found - expected).abs().max().item()
        except Exception as fault:  # the runtimes raise any exception
            raise_if_exhausted(fault)
            raise EnvironmentFault(
                f"the exported file does not run with {counted(size, 'image')} at once: {fault}", fix=_FROM_PYTHON
            ) from fault
        others = int((found.argmax(1) != expected.argmax(1)).sum())
        if not difference <= LARGEST_DIFFERENCE or others:
            raise EnvironmentFault(
                f"the exported file answers otherwise than the network: with {counted(size, 'image')} at once, logits "
                f"differ by up to {difference:.2g} (at most {LARGEST_DIFFERENCE:g} is allowed), and {others} of "
                f"{len(found)} images get another class; it is not written",
                fix=_FROM_PYTHON,
            )
        largest = max(largest, difference)
    return largest
