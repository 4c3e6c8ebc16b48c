"""Flags of all commands: one frozen dataclass per command, which the command line reads.

The docstring of the dataclass is the command's help. To add a flag, add a field here; the command finds it in its
options. Imports nothing heavy.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Annotated, Any

from typer import Argument, CallbackParam, Option
from typer.models import ArgumentInfo

from cpmix_cli.runtime import console
from cpmix_cli.runtime.errors import UsageError, give_one_of


def one_of(*choices: str, **meant: str) -> Callable[[CallbackParam, str | None], str | None]:
    """Return a callback that checks the value of a flag against `choices`, which completion offers.

    The callback raises UsageError for any other value and names the nearest choice, or the one that is meant.

    Args:
        choices: values that can be given.
        meant: another name of a choice -> the choice, such as gpu="cuda".
    """

    def check(parameter: CallbackParam, value: str | None) -> str | None:
        if value is not None and value not in choices:
            flag, near = parameter.opts[0], meant.get(value.lower(), value)
            raise UsageError(f'{flag} "{value}" is unknown', fix=give_one_of(near, choices, flag))
        return value

    check.choices = choices  # type: ignore[attr-defined]
    return check


def several_of(*choices: str) -> Callable[[CallbackParam, str | None], str | None]:
    """Return a callback like that of one_of(), for a list with commas."""
    check_one = one_of(*choices)

    def check(parameter: CallbackParam, value: str | None) -> str | None:
        for part in () if value is None else value.split(","):
            check_one(parameter, part)
        return value

    check.choices = choices  # type: ignore[attr-defined]
    return check


def flag(default: Any, help: str, *names: str, **settings: Any) -> Any:
    """Return the dataclass field of a flag.

    Args:
        default: value without the flag. The type `list` makes the flag repeatable; its default is the empty list.
        help: help text, clear without the other flags' texts.
        names: names of the flag, such as "--set"; none: the field's name.
        settings: other arguments of Typer's Option.
    """
    if default is list:
        return field(default_factory=list, metadata={"option": Option(None, *names, help=help, **settings)})
    return field(default=default, metadata={"option": Option(default, *names, help=help, **settings)})


def _set_json(wanted: bool) -> bool:
    console.as_json = wanted
    return wanted


def _check_world_sizes(text: str | None) -> str | None:
    parts = (text or "1").split(",")
    if not all(part.strip().isdecimal() and len(part) <= 8 and int(part) > 0 for part in parts):
        raise UsageError(
            f'--world-size "{text}" is no list of numbers of ranks',
            fix="give numbers from 1 up, such as --world-size 1,8,64",
        )
    return text


def _check_seeds(text: str | None) -> str | None:
    parts = [part.strip() for part in (text or "0").split(",")]
    if not all(part.isdecimal() and len(part) <= 18 for part in parts) or len(set(map(int, parts))) < len(parts):
        raise UsageError(f'--seeds "{text}" is no list of different seeds', fix="give --seeds 0,1,2 or the like")
    return text


_NAMES = {"settings": "--set", "from_folder": "--from", "form": "--format"}
"""Fields whose flag has another name."""


def given_flags(options: Any) -> dict[str, Any]:
    """Return the flags of a command that differ from their defaults, name -> value; of arguments too, by field."""
    found = {}
    for known in fields(options):
        value = getattr(options, known.name)
        is_argument = any(isinstance(part, ArgumentInfo) for part in getattr(known.type, "__metadata__", ()))
        if value not in (known.default, []):
            flag = known.name if is_argument else f"--{known.name.replace('_', '-')}"
            found[_NAMES.get(known.name, flag)] = value
    return found


def words_of(options: Any) -> list[object]:
    """Return the words that a user types after the name of a command to give it these options."""
    words: list[object] = []
    for flag, value in given_flags(options).items():
        values = value if isinstance(value, list) else [value]
        if not flag.startswith("-"):
            words += values
        else:
            words += [word for one in values for word in ((flag,) if one is True else (flag, one))]
    return words


Json = Annotated[
    bool,
    # Eager, so that errors in other flags are printed as JSON too.
    Option("--json", callback=_set_json, is_eager=True, help="Print one JSON object on stdout and nothing else."),
]
"""The flag of every command; see console.as_json."""

# -- flags of several commands -----------------------------------------------------------------------------------------

From = Annotated[Path, Option("--from", help="Run folder, or the folder of one of its phases.")]
Out = Annotated[Path | None, Option(help="Run folder to write to. Default: the run that is read.")]
Phase = Annotated[
    str | None, Option(help="Phase to use: stage1, stage2 or finetune. Default: the last finished phase.")
]
Data = Annotated[Path | None, Option(help="Data set folder, if it has moved since the run recorded it.")]
DataRoot = Annotated[Path | None, Option(help="Folder of the image files, if they have moved since build-lt.")]
Overwrite = Annotated[bool, Option("--overwrite", help="Start over and replace existing output.")]
Device = Annotated[
    str,
    Option(
        help="Device to compute on: auto, cpu or cuda.",
        metavar="DEVICE",
        callback=one_of("auto", "cpu", "cuda", gpu="cuda"),
    ),
]
Threads = Annotated[
    int | None,
    Option(
        help="CPU threads to compute with. Default: OMP_NUM_THREADS, else as many as cores are idle at the start.",
        min=1,
        max=1024,
    ),
]
RecipeName = Annotated[
    str | None, Option(help="Recipe file or name, such as cifar100-lt/cpmix. Default: that of the run or data set.")
]
Settings = Annotated[
    list[str], Option("--set", help="Change a recipe key: table.key=value. Repeatable.", metavar="KEY=VALUE")
]
Epochs = Annotated[
    int | None,
    Option(help="Rescale all epoch counts so that both stages last this many epochs together.", min=1, max=1_000_000),
]
Seed = Annotated[int | None, Option(help="Replace the recipe's seed.", min=0)]
SkipUnreadable = Annotated[
    bool, Option("--skip-unreadable", help="Leave out image files that cannot be decoded, and name them in a warning.")
]
PluginFile = Annotated[
    Path | None,
    Option(
        help="Python file of your own losses, mixes, networks and the like, which join those of cpmix; its code runs. "
        "A run made with one needs it again.",
        metavar="FILE.py",
    ),
]
FewInclusive = Annotated[bool, Option("--few-inclusive", help="Count classes with exactly 20 training images as few.")]


@dataclass(frozen=True, kw_only=True)
class _FromRun:
    from_folder: From
    out: Out = None


@dataclass(frozen=True, kw_only=True)
class _FromPhase(_FromRun):
    phase: Phase = None


# -- the pipeline ------------------------------------------------------------------------------------------------------


SOURCE_NAMES = (
    *("digits", "toy", "cifar10", "cifar100", "fashion-mnist"),
    *("imagenet-lt", "places-lt", "inaturalist2018", "image-folder", "parquet"),
)
"""The sources of data/sources.py, known before that is imported."""


@dataclass(frozen=True, kw_only=True)
class BuildOptions:
    """Build a long-tailed data set folder from a source.

    Example: cpmix build-lt cifar100 --rho 200 --data-root /data/cifar100
    """

    source: Annotated[
        str,
        Argument(help=f"Source of the images: {', '.join(SOURCE_NAMES[:-1])} or {SOURCE_NAMES[-1]}.", metavar="SOURCE"),
    ]
    rho: float | None = flag(
        None, "Imbalance factor: images of the largest / smallest class. Default: set by the source."
    )
    out: Path | None = flag(None, "Data set folder to write. Default: data/NAME.")
    data_root: Path | None = flag(
        None,
        "Folder with the source's files, or with a sub-folder per source. Default: data/download.",
        envvar="CPMIX_DATA_DIR",
    )
    list_dir: Path | None = flag(
        None,
        "Folder of the image lists: official ones (ImageNet_LT_train.txt, ...), or for image-folder your train.txt, "
        "test.txt and val.txt. Each line is PATH LABEL, where --data-root holds PATH.",
    )
    subset_seed: int = flag(0, "Seed that selects the images; 0 gives the published subset.", min=0, max=2**32 - 1)
    profile: str | None = flag(
        None,
        "Class profile, with --rho, of image-folder and parquet: exponential, step, ranked (default) or pareto.",
        metavar="NAME",
    )
    val_per_class: int = flag(0, "Training images per class to hold out as val split.", min=0, max=1_000_000)
    val_capped: bool = flag(
        False,
        "Keep the class counts of the data set without val split. A class has fewer images only where --val-per-class "
        "does not leave enough. Without this flag, the whole profile shrinks. Needs --rho and --val-per-class.",
        "--val-capped",
    )
    test_per_class: int | None = flag(
        None, "Test images per class to hold out, for sources without a test split.", min=1, max=1_000_000
    )
    image_size: int | None = flag(
        None,
        "Height and width of images in pixels. Default: 64, or 256 for images left in their files.",
        min=8,
        max=1024,
    )
    pack: int | None = flag(
        None,
        "Decode images once into shards of S x S pixels, which may exceed the memory; 0 leaves images in their files. "
        "Default: 0 for official lists, one tensor for image-folder and parquet.",
        metavar="S",
        min=0,
        max=1024,
    )
    few_inclusive: FewInclusive = False
    layout: str = flag(
        "auto",
        "Sub-folders of image-folder: classes, splits (train, val, test), or auto: splits if one is called train.",
        callback=one_of("auto", "classes", "splits"),
    )
    image_column: str | None = flag(
        None, "Column of the images in the files of parquet, if there are several.", metavar="NAME"
    )
    label_column: str | None = flag(
        None, "Column of the labels in the files of parquet, if there are several.", metavar="NAME"
    )
    skip_unreadable: SkipUnreadable = False
    download: bool = flag(
        False, "First download the source's files into --data-root and check their hashes.", "--download"
    )
    verify: bool = flag(False, "Check every packed image, or decode every image file.", "--verify")
    overwrite: Overwrite = False


@dataclass(frozen=True, kw_only=True)
class TrainingOptions:
    """Flags of all three training commands."""

    recipe: RecipeName = None
    settings: Settings = field(default_factory=list)
    epochs: Epochs = None
    seed: Seed = None
    device: Device = "auto"
    threads: Threads = None
    data: Data = None
    data_root: DataRoot = None
    plugin: PluginFile = None
    eval_every: int = flag(
        0, "Record the test accuracy in metrics.parquet every N epochs; 0: never. Selects no checkpoint.", min=0
    )
    checkpoint_every: int = flag(1, "Save the training state every N epochs.", min=1)
    tracker: str | None = flag(
        None,
        "Also write the curves of metrics.parquet for trackers: tensorboard, wandb, mlflow, or several with commas.",
        metavar="NAME,...",
        callback=several_of("tensorboard", "wandb", "mlflow"),
    )
    dry_run: bool = flag(
        False, "Check everything and run one step of each remaining phase; write nothing.", "--dry-run"
    )
    overwrite: Overwrite = False

    @property
    def changes_recipe(self) -> bool:
        """Whether a flag changes the recipe of the checkpoint."""
        return bool(self.recipe or self.settings) or not (self.epochs is None and self.seed is None)


@dataclass(frozen=True, kw_only=True)
class TrainStage1Options(TrainingOptions):
    """Train on the natural batches and collect confusion pairs.

    Example: cpmix train-stage1 --data data/digits-lt-rho20 --out ckpt/digits
    """

    data: Path | None = flag(None, "Data set folder that build-lt wrote. Required.", show_default=False)
    out: Path = flag(Path("ckpt"), "Run folder to write to.")
    init: Path | None = flag(
        None,
        "Pretrained weights to start from: a safetensors file (torchvision's names, with or without a prefix), or the "
        "folder of a run or phase. The head is new; classes that a run had keep their rows, by name.",
    )
    teacher: Path | None = flag(None, "Run whose network is the teacher of terms with distillation.")


@dataclass(frozen=True, kw_only=True)
class TrainStage2Options(TrainingOptions, _FromRun):
    """Continue from stage 1 with mixed confusion pairs.

    Example: cpmix train-stage2 --from ckpt/digits
    """


@dataclass(frozen=True, kw_only=True)
class FinetuneOptions(TrainingOptions, _FromPhase):
    """Finetune the head with class-balanced sampling.

    Example: cpmix finetune --from ckpt/digits
    """

    phase: str | None = flag(None, "Phase to finetune: stage1 or stage2. Default: the last finished phase.")


@dataclass(frozen=True, kw_only=True)
class EvaluateOptions(_FromPhase):
    """Measure accuracy per class and group, and calibration.

    Example: cpmix evaluate --from ckpt/digits
    """

    settings: list[str] = flag(
        list, "Change a key of [evaluation]: evaluation.key=value. Repeatable.", "--set", metavar="KEY=VALUE"
    )
    label: str | None = flag(None, "Write the results to evaluation/PHASE-LABEL/.")
    split: str = flag(
        "test",
        "Split of the data set to predict: test, train, or val if build-lt held it out.",
        callback=one_of("test", "val", "train"),
    )
    test_data: Path | None = flag(
        None, "Other test images: a folder of FOLDER/CLASS/IMAGE, or a data set folder (its test split)."
    )
    skip_unreadable: SkipUnreadable = False
    test_distribution: str = flag(
        "uniform",
        "Class distribution of the test set: uniform (images as they are), forward (long-tailed like training) or "
        "backward (reversed).",
        callback=one_of("uniform", "forward", "backward"),
    )
    ratio: float = flag(50.0, "Imbalance factor of the test set under --test-distribution forward or backward.", min=1)
    threshold_for: str | None = flag(
        None,
        "Choose a confidence threshold per class on the val split that reaches a precision or recall, and measure it: "
        "precision=0.9. Kept by later commands without the flag.",
        metavar="MEASURE=SHARE",
    )
    few_inclusive: FewInclusive = False
    device: Device = "auto"
    threads: Threads = None
    tracker: str | None = flag(
        None,
        "Also write the numbers for trackers, beside the curves of the phase: tensorboard, wandb, mlflow, or several.",
        metavar="NAME,...",
        callback=several_of("tensorboard", "wandb", "mlflow"),
    )
    data: Data = None
    data_root: DataRoot = None
    plugin: PluginFile = None
    overwrite: Overwrite = False

    @property
    def is_plain(self) -> bool:
        """Whether the test images are the data set's own test split, where readers of the evaluation look for them."""
        return self.test_data is None and self.split == "test"

    @property
    def distribution(self) -> str:
        """Name of the test distribution: uniform, or such as forward-50."""
        return "uniform" if self.test_distribution == "uniform" else f"{self.test_distribution}-{self.ratio:g}"


@dataclass(frozen=True, kw_only=True)
class ReportOptions(_FromPhase):
    """Report confused pairs as tables, figures and one page.

    Example: cpmix confusion-report --from ckpt/digits
    """

    label: str | None = flag(
        None, "Report evaluation/PHASE-LABEL/ into confusion/PHASE-LABEL/, which has a page of its own."
    )
    compare: list[Path] = flag(
        list,
        "Folder of another run, to show next to this one with the difference. Repeatable. Kept until --no-compare.",
        metavar="RUN",
    )
    no_compare: bool = flag(
        False, "Show this run only, where the page was asked to compare it with others.", "--no-compare"
    )
    images: int = flag(1500, "Maximum number of misclassified test images on the page.", min=0, max=20_000)
    data: Data = None
    data_root: DataRoot = None
    overwrite: Overwrite = False


@dataclass(frozen=True, kw_only=True)
class RunOptions(TrainingOptions, BuildOptions):
    """Do all six commands, or what is left of them.

    Example: cpmix run digits --out ckpt/digits
    """

    source: Annotated[
        str,
        Argument(
            help="Source of the images, as for build-lt, or a data set folder that build-lt wrote.",
            metavar="SOURCE|DATA",
        ),
    ]
    out: Path | None = flag(None, "Run folder to write to. Default: ckpt/NAME, by the name of the data set.")
    data: Path | None = flag(None, "Data set folder to write, for a SOURCE. Default: data/NAME.")
    data_root: Path | None = flag(
        None,
        "Folder with the source's files, as for build-lt; for a DATA folder, that of the image files, if they have "
        "moved.",
    )
    seeds: str | None = flag(
        None,
        "Train once for each of these seeds, into RUN/seed-0 and so on, and compare them: 0,1,2.",
        metavar="N,N,...",
        callback=_check_seeds,
    )
    init: Path | None = flag(None, "Pretrained weights to start from, as for train-stage1.")
    teacher: Path | None = flag(None, "Run whose network is the teacher, as for train-stage1.")


# -- the helpers -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class StatusOptions:
    """Show the state of runs and the next command of each.

    Example: cpmix status ckpt/*
    """

    folders: Annotated[
        list[Path], Argument(help="Run folders to show, or folders that hold runs. Default: ckpt.", metavar="[RUN...]")
    ] = field(default_factory=list)
    curves: bool = flag(
        False, "Also show the course of loss, accuracy and learning rate over the finished epochs of each phase."
    )


@dataclass(frozen=True, kw_only=True)
class CompareOptions:
    """Compare runs with each other and with the paper.

    Example: cpmix compare ckpt/* --paper table1
    """

    folders: Annotated[list[Path], Argument(help="Run folders, or folders of single phases.", metavar="RUN...")]
    paper: str | None = flag(
        None,
        "Use the layout of a table of the paper: table1, table2, table3, table4, table7, table8 or table9.",
        metavar="TABLE",
        callback=one_of("table1", "table2", "table3", "table4", "table7", "table8", "table9"),
    )
    split: str | None = flag(
        None,
        "Only evaluations of this split of the runs' own data sets: test, val or train. Rows of val are ranked.",
        metavar="SPLIT",
        callback=one_of("test", "val", "train"),
    )
    form: str = flag(
        "table",
        "Output format: table, csv, markdown, latex or json.",
        "--format",
        metavar="FORMAT",
        callback=one_of("table", "csv", "markdown", "latex", "json"),
    )
    out: Path | None = flag(None, "Write to this file instead of stdout.")
    overwrite: bool = flag(False, "Replace the file of --out.", "--overwrite")
    append: Path | None = flag(
        None, "Also append a row per evaluation to this results file (CSV), unless the file has it already."
    )
    study: str | None = flag(
        None, "Study that the rows of --append belong to. Default: the name of the data set.", metavar="NAME"
    )


@dataclass(frozen=True, kw_only=True)
class ResultsOptions:
    """Show a results file, or update tables made from it.

    Example: cpmix results results.csv --update RESULTS.md
    """

    file: Annotated[Path, Argument(help="Results file (CSV) that compare --append wrote.", metavar="FILE")]
    update: Path | None = flag(
        None,
        "Markdown file whose marked tables to make anew, instead of showing them. A mark is a comment such as "
        "results: study=NAME columns=method,seed,top1,+top1.",
    )


@dataclass(frozen=True, kw_only=True)
class RecipesOptions:
    """List, show, compare or copy recipes; show costs.

    Example: cpmix recipes digits/cpmix digits/cross-entropy
    """

    name: Annotated[str | None, Argument(help="Recipe to show; without it, all are listed.", metavar="[NAME]")] = None
    other: Annotated[
        str | None, Argument(help="Second recipe, to show its differences from the first.", metavar="[OTHER]")
    ] = None
    settings: Settings = field(default_factory=list)
    epochs: Epochs = None
    seed: Seed = None
    rho: float | None = flag(None, "Imbalance factor that selects the [by_rho.R] tables.")
    plugin: PluginFile = None
    budget: bool = flag(False, "Show epochs and image passes per recipe, and their ratio to CP-Mix's.", "--budget")
    copy: Path | None = flag(
        None, "Copy all recipes, Slurm scripts and figure scripts into this folder, to edit them there.", metavar="DIR"
    )
    overwrite: bool = flag(
        False, "Replace the unedited copies of another version in the folder of --copy.", "--overwrite"
    )


@dataclass(frozen=True)
class MethodsOptions:
    """List methods: paper, recipes, published numbers.

    Example: cpmix methods --json
    """


@dataclass(frozen=True, kw_only=True)
class PredictOptions:
    """Predict class and confidence of your own images.

    Example: cpmix predict photo.jpg more/ --from ckpt/mine
    """

    images: Annotated[list[Path], Argument(help="Image files, or folders of images.", metavar="IMAGES...")]
    from_folder: From
    phase: Phase = None
    top: int = flag(1, "Number of classes to show per image, most likely first.", min=1)
    out: Path | None = flag(None, "Also write the predictions to this file: .parquet, .csv or .json.")
    probabilities: bool = flag(
        False,
        "Also give the probability of every class: a column each in the output file, or in JSON.",
        "--probabilities",
    )
    unsure_below: str | None = flag(
        None,
        "Mark images as unsure whose confidence is below P, or below the threshold of their class in the file "
        "thresholds.parquet of evaluate --threshold-for.",
        metavar="P|FILE",
    )
    sort_into: Path | None = flag(
        None, "Copy each image into DIR/CLASS/, unsure ones into DIR/unsure/. Originals stay.", metavar="DIR"
    )
    skip_unreadable: SkipUnreadable = False
    device: Device = "auto"
    threads: Threads = None
    plugin: PluginFile = None
    overwrite: Overwrite = False


@dataclass(frozen=True, kw_only=True)
class ExportOptions:
    """Write a trained network as one ONNX or .pt2 file.

    Example: cpmix export --from ckpt/mine --format onnx
    """

    from_folder: From
    phase: Phase = None
    form: str = flag(
        "onnx",
        "Format of the file: onnx, which needs the extra cpmix[onnx], or pt2, of torch.export.",
        "--format",
        metavar="FORMAT",
        callback=one_of("onnx", "pt2"),
    )
    out: Path | None = flag(None, "Output file. Default: RUN/export/PHASE with the format as its ending.")
    data: Data = None
    data_root: DataRoot = None
    plugin: PluginFile = None
    overwrite: bool = flag(False, "Replace a file that cpmix exported.", "--overwrite")


@dataclass(frozen=True, kw_only=True)
class MisclassifiedOptions:
    """List the misclassified images of a confusion matrix.

    Example: cpmix misclassified --from ckpt/mine --true lynx --predicted cat
    """

    from_folder: From
    true: str | None = flag(None, "Show only images of this true class (name or id).", metavar="CLASS")
    predicted: str | None = flag(None, "Show only images predicted as this class (name or id).", metavar="CLASS")
    phase: Phase = None
    label: str | None = flag(None, "Read evaluation/PHASE-LABEL/ instead of evaluation/PHASE/.")
    limit: int = flag(20, "Number of images to show; --json gives all.", min=1)
    out: Path | None = flag(None, "Also write all of them to this file: .parquet, .csv or .json.")
    data: Data = None
    data_root: DataRoot = None
    overwrite: bool = flag(False, "Replace the file of --out.", "--overwrite")


@dataclass(frozen=True, kw_only=True)
class FigureOptions:
    """Draw a figure of the paper from your runs.

    Example: cpmix figure 3 ckpt/c100-ce ckpt/c100-mixup ckpt/c100-balanced --out figure3.pdf
    """

    number: Annotated[int, Argument(help="Number of the figure in the paper, 1 to 6.", metavar="N", min=1, max=6)]
    folders: Annotated[
        list[Path], Argument(help="Run folders, or folders of single phases, in any order.", metavar="RUN...")
    ]
    out: list[Path] = flag(list, "Output file (.pdf, .svg or .png). Repeatable. Default: figureN.pdf.", metavar="FILE")
    data: list[Path] = flag(
        list, "Data set folder, if it has moved since a run recorded it. Repeatable.", metavar="DIR"
    )
    plugin: PluginFile = None
    overwrite: bool = flag(False, "Replace the files of --out.", "--overwrite")


@dataclass(frozen=True, kw_only=True)
class ImportOptions:
    """Convert a PyTorch checkpoint to safetensors, for --init.

    Example: cpmix import-weights resnet50-11ad3fa6.pth --sha256 11ad3fa6
    """

    file: Annotated[
        Path, Argument(help="PyTorch checkpoint to convert; with --prefix also safetensors.", metavar="FILE")
    ]
    sha256: Annotated[str, Option(help="Published SHA-256 of FILE, or at least its first 8 digits.", metavar="HASH")]
    prefix: str | None = flag(
        None,
        "Take only the tensors whose names begin with this, such as encoder_q, and take it off. Default: all of the "
        "state_dict.",
        metavar="NAME",
    )
    out: Path | None = flag(None, "Output file. Default: FILE with the suffix .safetensors.")
    overwrite: Overwrite = False


@dataclass(frozen=True, kw_only=True)
class BenchOptions:
    """Measure training speed, or project it to more GPUs.

    Example: cpmix bench --data data/cifar100-lt-rho200 --recipe cifar100-lt/cpmix
    """

    recipe: str | None = flag(None, "Recipe to time or project. Default: the recipe of the data set.")
    settings: Settings = field(default_factory=list)
    epochs: Epochs = None
    data: Path | None = flag(
        None,
        "Data set folder. Default: random images like those of CIFAR-100-LT; a projection takes the recipe's published "
        "number of images.",
    )
    data_root: DataRoot = None
    device: Device = "auto"
    threads: Threads = None
    plugin: PluginFile = None
    rounds: int = flag(10, "Number of rounds; each times every loop once. Medians are shown.", min=1)
    seconds: float = flag(1.0, "Seconds per loop and round; each loop runs at least three steps.", min=0, max=3600)
    ingredients: bool = flag(
        False,
        "Time a training step with and without each ingredient, such as AutoAugment, instead of the loops.",
        "--ingredients",
    )
    world_size: str | None = flag(
        None,
        "Instead of timing, project the training time to these numbers of ranks: 1,8,64.",
        metavar="N,N,...",
        callback=_check_world_sizes,
    )
    cores: int | None = flag(
        None, "CPU cores that read images, per rank, in the projection. Default: 8.", min=1, max=1024
    )
    link: float | None = flag(
        None, "Network bandwidth per rank in GB/s, in the projection. Default: 12.5.", min=0.001, max=10_000
    )

    @property
    def world_sizes(self) -> list[int]:
        """Numbers of ranks of --world-size, ascending; empty without the flag."""
        return sorted({int(part) for part in self.world_size.split(",")}) if self.world_size else []
