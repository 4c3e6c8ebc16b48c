"""The records of a run folder: what readers of run.json and of a training state count on."""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import AfterValidator, BaseModel, ConfigDict, Field
from torch import Tensor

from cpmix_cli.artifacts import files, records
from cpmix_cli.artifacts.tensors import check_seal, read_tensors
from cpmix_cli.data.dataset import FileName, Shaped, Storage
from cpmix_cli.runtime.errors import InputError

TrainingPhase = Literal["stage1", "stage2", "finetune"]


PHASES: tuple[str, ...] = get_args(TrainingPhase)


def _place(path: str) -> str:
    """A path as it may be; checked here and not by a pattern, which takes no bytes that are not UTF-8."""
    if not path or "\0" in path or len(path) > 4096:
        raise ValueError("no path")
    return path


Place = Annotated[str, AfterValidator(_place)]


class DatasetReference(Shaped):
    """How a record names its data set; see dataset_entry()."""

    name: str
    relative: Place
    absolute: Place
    fingerprint: str
    storage: Storage = "tensors"


class SourceReference(BaseModel):
    """The checkpoint that something was made from."""

    model_config = ConfigDict(strict=True)

    phase: TrainingPhase
    sha256: str
    run: Place = "."


class RunRecord(BaseModel):
    """What readers of any run.json count on."""

    model_config = ConfigDict(strict=True)

    phase: str
    made_from: dict[str, Any]
    outputs: dict[FileName, str]


class PhaseRecord(RunRecord):
    """What readers of a training phase's run.json count on."""

    phase: TrainingPhase
    source: SourceReference | None
    dataset: DatasetReference
    device: str
    precision: Literal["fp32", "bf16"]
    threads: int
    ranks: int = 1
    num_parameters: int
    epochs: int
    training_seconds: float
    gpu_hours: float


class EvaluationRecord(RunRecord):
    """What readers of an evaluation's run.json count on."""

    source: SourceReference
    dataset: DatasetReference
    data_root: Place | None = None


class ReportRecord(RunRecord):
    """What readers of a report's run.json count on."""

    page: str
    picture: str


class StateRecord(BaseModel):
    """What readers of a training state's metadata count on."""

    model_config = ConfigDict(strict=True)

    phase: TrainingPhase
    made_from: dict[str, Any]
    precision: Literal["fp32", "bf16"]
    threads: int
    ranks: int = 1
    epoch: Annotated[int, Field(ge=1)]
    step: Annotated[int, Field(ge=0)]
    columns: list[str]
    source: SourceReference | None
    dataset: DatasetReference
    inputs: dict[str, str]
    recipe_sha256: str
    tensors_digest: str


def read_run(folder: Path, entry: type[RunRecord] = RunRecord) -> dict[str, Any]:
    """A folder's run.json, verified.

    Raises:
        InputError: missing or damaged, or a record of something else.
    """
    path = folder / files.RUN
    return records.checked(path, entry, records.read_record(path))


def output_of(folder: Path, record: Mapping[str, Any], name: str) -> tuple[Path, str]:
    """Path and recorded hash of one of a folder's files.

    Raises:
        InputError: its run.json does not name the file.
    """
    if name not in record["outputs"]:
        raise InputError(f"{folder / files.RUN} records no {name}")
    return folder / name, str(record["outputs"][name])


def read_state(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and metadata of an interrupted phase's training state, verified by what it says of itself.

    Raises:
        InputError: missing or damaged.
    """
    tensors, metadata = read_tensors(path)
    return tensors, _state_entry(path, check_seal(path, metadata, tensors))


def _state_entry(path: Path, metadata: dict[str, Any]) -> dict[str, Any]:
    records.check_format(path, metadata)
    return records.checked(path, StateRecord, metadata)
