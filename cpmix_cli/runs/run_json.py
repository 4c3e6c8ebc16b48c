"""Records of a run folder: run.json, and the metadata of a training state."""

import struct
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import AfterValidator, ConfigDict, Field

from cpmix_cli.artifacts import files, records
from cpmix_cli.artifacts.files import TrainingPhase
from cpmix_cli.artifacts.records import Record
from cpmix_cli.artifacts.seals import check_seal, read_header, read_sealed
from cpmix_cli.data.dataset import FileName, Shaped, Storage
from cpmix_cli.runtime.errors import InputError


def _place(path: str) -> str:
    """Check a recorded path; a pydantic pattern would refuse file names that are not UTF-8."""
    if not path or "\0" in path or len(path) > 4096:
        raise ValueError("not a path: empty, longer than 4,096 characters, or with a NUL")
    return path


Place = Annotated[str, AfterValidator(_place)]


class DatasetReference(Shaped):
    """Data set of a run or an evaluation; see folders.dataset_entry()."""

    name: str
    relative: Place
    absolute: Place
    fingerprint: str
    storage: Storage = "tensors"


class SourceReference(Record):
    """Checkpoint that an output was made from."""

    phase: TrainingPhase
    sha256: str
    run: Place = "."


class PluginReference(Record):
    """Plugin whose functions the recipe of a phase names, in any of its phases."""

    name: FileName
    sha256: str
    path: Place
    """Where it was, for commands that are printed; no code is ever loaded from there."""


class MadeFrom(Record):
    """Inputs of an output; other fields are hashes of other inputs."""

    model_config = ConfigDict(extra="allow")

    recipe: dict[str, Any]
    """Tables of the resolved recipe that the output depends on."""
    dataset: str
    """Fingerprint of the data set, or of other test images."""
    init: str = "none"
    """sha256 of the file of --init."""
    plugin: str = "none"
    """sha256 of the file of --plugin, if the phase depends on a function of it."""

    def inputs(self) -> dict[str, Any]:
        """Return all recorded inputs, for the comparison in output.decide()."""
        return self.model_dump(exclude_unset=True)


class RunRecord(Record):
    """Fields of every run.json."""

    phase: str
    made_from: MadeFrom
    outputs: dict[FileName, str]
    argv: list[str] = Field(default_factory=list)
    versions: dict[str, str | None] = Field(default_factory=dict)
    """Versions of cpmix, python and torch, and commit of the code; see output.Recorder."""
    finished: str = ""
    """UTC, such as 2026-01-31T12:00:00+00:00: texts that sort as the times do."""


class BegunRecord(Record):
    """Fields that a training phase's run.json and its training state share."""

    phase: TrainingPhase
    made_from: MadeFrom
    source: SourceReference | None
    dataset: DatasetReference
    precision: Literal["fp32", "bf16"]
    threads: int
    ranks: int = 1
    inputs: dict[str, str] = Field(default_factory=dict)
    """Paths of other input files by flag; only a training state records them."""
    recipe_name: str | None = None
    """Name or file of the recipe that the phase began with, as it was given; None in older records."""
    settings: list[str] = Field(default_factory=list)
    """Values of --set that changed this recipe, also in earlier phases."""
    plugin: PluginReference | None = None


class PhaseRecord(BegunRecord, RunRecord):
    """Fields of a training phase's run.json."""

    phase: TrainingPhase
    device: str
    num_parameters: int
    epochs: int
    training_seconds: float
    gpu_hours: float


class StateRecord(BegunRecord):
    """Fields of a training state's metadata."""

    epoch: Annotated[int, Field(ge=1)]
    step: Annotated[int, Field(ge=0)]
    columns: list[str]
    recipe_sha256: str
    tensors_digest: str


class EvaluationRecord(RunRecord):
    """Fields of an evaluation's run.json."""

    source: SourceReference
    dataset: DatasetReference
    data_root: Place | None = None
    test_data: Place | None = None
    """Absolute path of --test-data. Older records lack it."""


class ComparedReference(Record):
    """Run that a report compares with: the folder of a run or of a phase that was given, with links resolved."""

    relative: Place
    absolute: Place


class ReportRecord(RunRecord):
    """Fields of a report's run.json."""

    page: str
    picture: str
    compared: list[ComparedReference] = Field(default_factory=list)
    """Runs of --compare. Older records lack it."""


_Run = TypeVar("_Run", bound=RunRecord)


def read_run(folder: Path, model: type[_Run]) -> _Run:
    """Read a folder's run.json.

    Raises:
        InputError: the file is missing or damaged, or lacks fields of `model`.
    """
    return records.read_record(folder / files.RUN, model)


def output_of(folder: Path, record: RunRecord, name: str) -> tuple[Path, str]:
    """Return the path and the recorded sha256 of an output file.

    Args:
        folder: output folder.
        record: its run.json.
        name: file name.

    Raises:
        InputError: run.json does not record the file.
    """
    if name not in record.outputs:
        raise InputError(f"{folder / files.RUN} records no file {name}", path=folder / files.RUN)
    return folder / name, record.outputs[name]


def read_state_record(path: Path) -> StateRecord:
    """Read only the metadata of a training state; its tensors are not verified.

    Raises:
        InputError: the file is missing, or its header is damaged.
    """
    return state_record(path, check_seal(path, read_header(path)[1]))


def verify_state(path: Path) -> tuple[StateRecord, list[list[float]]]:
    """Verify a whole training state; return its metadata and its history: numbers by epoch and column, NaN for null.

    Raises:
        InputError: the file is missing or damaged, or its history has other columns than its metadata.
    """
    metadata, tensors = read_sealed(path)
    record, values = state_record(path, metadata), tensors.get("history", b"")
    numbers = struct.unpack(f"<{len(values) // 8}d", values)
    width = len(record.columns)
    if len(numbers) % max(1, width):
        raise InputError(f"{path} has metrics of {len(numbers)} numbers in {width} columns", path=path)
    return record, [list(numbers[i : i + width]) for i in range(0, len(numbers), max(1, width))]


def state_record(path: Path, metadata: dict[str, Any]) -> StateRecord:
    """Check the metadata of a training state and return them as a record.

    Raises:
        InputError: the metadata have another format version, or lack a field.
    """
    records.check_format(path, metadata)
    return records.checked(path, StateRecord, metadata)
