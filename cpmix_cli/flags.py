"""Every flag of every command, written once: one frozen dataclass per command, which the command line reads; its
docstring is the command's help.

To add a flag, add a field here; the command finds it in its options. Imports nothing heavy.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

from typer import Argument, CallbackParam, Option

from cpmix_cli.runtime import console
from cpmix_cli.runtime.errors import UsageError, suggest


def one_of(*choices: str) -> Callable[[CallbackParam, str | None], str | None]:
    """Return the check of a flag that takes one of these words.

    Raises (the check):
        UsageError: another word, with the nearest choice.
    """

    def check(parameter: CallbackParam, value: str | None) -> str | None:
        if value is not None and value not in choices:
            raise UsageError(f'{parameter.opts[0]} "{value}".{suggest(value, choices)}')
        return value

    return check


def flag(default: Any, help: str, *names: str, **settings: Any) -> Any:
    """Return the field of a flag: `names` if it has another than the field's, `settings` as Typer's Option takes them.

    A default of `list` is an empty one: the flag is repeatable.
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
        raise UsageError(f'--world-size "{text}": numbers of ranks, such as 1,8,64')
    return text


Json = Annotated[
    bool,
    # Eager: a fault of another flag is to be one JSON object too.
    Option("--json", callback=_set_json, is_eager=True, help="One JSON object on stdout and nothing else."),
]
"""Every command has it; see console.as_json."""

# -- flags of several commands -----------------------------------------------------------------------------------------

From = Annotated[Path, Option("--from", help="Run folder, or a phase's folder in it.")]
Out = Annotated[Path | None, Option(help="Output folder; another run folder than --from.")]
Phase = Annotated[str | None, Option(help="stage1, stage2 or finetune; default: the last one done.")]
Data = Annotated[Path | None, Option(help="Data set folder, where it is not where the run recorded it.")]
DataRoot = Annotated[Path | None, Option(help="Folder of the image files, where it is not where build-lt found them.")]
Overwrite = Annotated[bool, Option("--overwrite", help="Start again, whatever the output folder holds.")]
Device = Annotated[str, Option(help="auto, cpu or cuda.", metavar="DEVICE", callback=one_of("auto", "cpu", "cuda"))]
RecipeName = Annotated[
    str | None, Option(help="Recipe file or name, such as cifar100-lt/cpmix. Default: the data set's.")
]
Settings = Annotated[
    list[str], Option("--set", help="Change a recipe key: table.key=value. Repeatable.", metavar="KEY=VALUE")
]
Epochs = Annotated[
    int | None, Option(help="Rescale every epoch count so that both stages last this long.", min=1, max=1_000_000)
]
Seed = Annotated[int | None, Option(help="Replace the recipe's seed.", min=0)]
FewInclusive = Annotated[bool, Option("--few-inclusive", help="Count classes of exactly 20 training images as few.")]


@dataclass(frozen=True, kw_only=True)
class _FromRun:
    from_folder: From
    out: Out = None


@dataclass(frozen=True, kw_only=True)
class _FromPhase(_FromRun):
    phase: Phase = None


# -- the pipeline ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class BuildOptions:
    """Build a long-tailed data set folder from a source.

    Example: cpmix build-lt cifar100 --rho 200 --data-root /data/cifar100
    """

    source: Annotated[
        str,
        Argument(
            help="digits, toy, cifar10, cifar100, fashion-mnist, imagenet-lt, places-lt, inaturalist2018 or "
            "image-folder.",
            metavar="SOURCE",
        ),
    ]
    rho: float | None = flag(None, "Imbalance factor, largest over smallest class. Default: the source's own.")
    out: Path | None = flag(None, "Data set folder. Default: data/NAME.")
    data_root: Path | None = flag(
        None,
        "Folder of the source's own files, or one that holds a folder for each source. Default: data/download.",
        envvar="CPMIX_DATA_DIR",
    )
    list_dir: Path | None = flag(
        None,
        "Folder of the official lists (ImageNet_LT_train.txt, ...); with image-folder, of your own train.txt, "
        "test.txt and val.txt. Lines: PATH LABEL, the path below --data-root.",
    )
    subset_seed: int = flag(0, "Which images; 0 is the published subset.", min=0, max=2**32 - 1)
    profile: str | None = flag(
        None, "image-folder: exponential, step, ranked (default) or pareto; with --rho.", metavar="NAME"
    )
    val_per_class: int = flag(0, "Training images of each class held out as val.", min=0, max=1_000_000)
    test_per_class: int | None = flag(
        None, "Test images a class, for sources without a test split.", min=1, max=1_000_000
    )
    image_size: int | None = flag(
        None,
        "Images at this height and width. Default: 64 for image-folder, 256 where they stay in their files.",
        min=8,
        max=1024,
    )
    pack: int | None = flag(
        None,
        "Decode image files once, into shards of S x S pixels that need not fit into memory; 0: leave them in their "
        "files. Default: 0 for official lists, one tensor for image-folder.",
        metavar="S",
        min=0,
        max=1024,
    )
    few_inclusive: FewInclusive = False
    download: bool = flag(False, "Fetch the source's files into --data-root first, checked by hash.", "--download")
    verify: bool = flag(False, "Read every packed image back and check it; every image file, its header.", "--verify")
    overwrite: Overwrite = False


@dataclass(frozen=True, kw_only=True)
class TrainingOptions:
    """Flags of all training phases."""

    recipe: RecipeName = None
    settings: Settings = field(default_factory=list)
    epochs: Epochs = None
    seed: Seed = None
    device: Device = "auto"
    data: Data = None
    data_root: DataRoot = None
    eval_every: int = flag(0, "Test accuracy every N epochs, into metrics.parquet; selects nothing.", min=0)
    checkpoint_every: int = flag(1, "Save the state every N epochs.", min=1)
    tracker: str | None = flag(
        None,
        "tensorboard: also write the curves of metrics.parquet for it.",
        metavar="NAME",
        callback=one_of("tensorboard"),
    )
    dry_run: bool = flag(False, "Check everything, take a step of each phase to come, write nothing.", "--dry-run")
    overwrite: Overwrite = False

    @property
    def changes_recipe(self) -> bool:
        """A flag asks for another recipe than the checkpoint's."""
        return bool(self.recipe or self.settings) or not (self.epochs is None and self.seed is None)


@dataclass(frozen=True, kw_only=True)
class TrainStage1Options(TrainingOptions):
    """Train on the natural batches and collect confusion pairs.

    Example: cpmix train-stage1 --data data/digits-lt-rho20 --out ckpt/digits
    """

    data: Path | None = flag(None, "Data set folder.", show_default=False)
    out: Path = flag(Path("ckpt"), "Run folder.")
    init: Path | None = flag(None, "Start from these weights (safetensors, torchvision's names); the head is new.")
    teacher: Path | None = flag(None, "Run whose network the terms with a teacher learn from (distillation).")


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

    phase: str | None = flag(None, "stage1 or stage2; default: the last one done.")


@dataclass(frozen=True, kw_only=True)
class EvaluateOptions(_FromPhase):
    """Accuracy by class and group, calibration, predictions.

    Example: cpmix evaluate --from ckpt/digits
    """

    settings: list[str] = flag(list, "Change an [evaluation] key. Repeatable.", "--set", metavar="KEY=VALUE")
    label: str | None = flag(None, "Write to evaluation/PHASE-LABEL/.")
    split: str = flag(
        "test", "test, train, or val where build-lt held one out.", callback=one_of("test", "val", "train")
    )
    test_data: Path | None = flag(None, "Another folder: FOLDER/CLASS/IMAGE, or a data set's test split.")
    test_distribution: str = flag(
        "uniform",
        "uniform (the test images as they are), forward or backward: as if the test set were long-tailed too.",
        callback=one_of("uniform", "forward", "backward"),
    )
    ratio: float = flag(50.0, "Imbalance factor of the test set under --test-distribution forward or backward.", min=1)
    few_inclusive: FewInclusive = False
    device: Device = "auto"
    data: Data = None
    data_root: DataRoot = None
    overwrite: Overwrite = False

    @property
    def is_plain(self) -> bool:
        """On the test split, where every reader of the evaluation looks for its samples."""
        return self.test_data is None and self.split == "test"

    @property
    def distribution(self) -> str:
        """uniform, or forward-50."""
        return "uniform" if self.test_distribution == "uniform" else f"{self.test_distribution}-{self.ratio:g}"


@dataclass(frozen=True, kw_only=True)
class ReportOptions(_FromPhase):
    """Confusion matrix, most confused pairs, figures, one page.

    Example: cpmix confusion-report --from ckpt/digits
    """

    compare: list[Path] = flag(
        list, "Another run's folder, shown beside it with the difference. Repeatable.", metavar="RUN"
    )
    images: int = flag(1500, "How many misclassified test images the page carries at most.", min=0, max=20_000)
    data: Data = None
    data_root: DataRoot = None
    overwrite: Overwrite = False


# -- the helpers -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class StatusOptions:
    """Where runs stand and what to type next.

    Example: cpmix status ckpt/*
    """

    folders: Annotated[list[Path], Argument(help="Run folders.", metavar="RUN...")]


@dataclass(frozen=True, kw_only=True)
class CompareOptions:
    """Runs in one table, beside the paper's numbers.

    Example: cpmix compare ckpt/* --paper table1
    """

    folders: Annotated[list[Path], Argument(help="Run folders, or phases' folders in them.", metavar="RUN...")]
    paper: str | None = flag(
        None,
        "Laid out as a table of the paper: table1, table2, table3, table4, table7, table8 or table9.",
        metavar="TABLE",
        callback=one_of("table1", "table2", "table3", "table4", "table7", "table8", "table9"),
    )
    form: str = flag(
        "table",
        "table, csv, markdown, latex or json (as --json).",
        "--format",
        metavar="FORMAT",
        callback=one_of("table", "csv", "markdown", "latex", "json"),
    )
    out: Path | None = flag(None, "Write to this file, not to stdout.")
    overwrite: bool = flag(False, "Replace the file --out.", "--overwrite")


@dataclass(frozen=True, kw_only=True)
class RecipesOptions:
    """List recipes, show one, tell two apart, or cost them.

    Example: cpmix recipes digits/cpmix digits/cross-entropy
    """

    name: Annotated[str | None, Argument(help="Recipe to show; none lists all.", metavar="[NAME]")] = None
    other: Annotated[str | None, Argument(help="Recipe to compare with.", metavar="[OTHER]")] = None
    settings: Settings = field(default_factory=list)
    epochs: Epochs = None
    seed: Seed = None
    rho: float | None = flag(None, "Imbalance factor, for [by_rho.R] tables.")
    budget: bool = flag(False, "Epochs and image passes of each recipe, and their ratio to CP-Mix's.", "--budget")


@dataclass(frozen=True)
class MethodsOptions:
    """List methods: paper, recipes, published numbers.

    Example: cpmix methods --json
    """


@dataclass(frozen=True, kw_only=True)
class PredictOptions:
    """Class and confidence of your own images.

    Example: cpmix predict photo.jpg more/ --from ckpt/mine
    """

    images: Annotated[list[Path], Argument(help="Image files, or folders of them.", metavar="IMAGES...")]
    from_folder: From
    phase: Phase = None
    top: int = flag(1, "Classes shown for each image, most likely first.", min=1)
    out: Path | None = flag(None, "Write a Parquet file as well.")
    device: Device = "auto"
    overwrite: Overwrite = False


@dataclass(frozen=True, kw_only=True)
class MisclassifiedOptions:
    """The wrong test images behind a confusion matrix.

    Example: cpmix misclassified --from ckpt/mine --true lynx --predicted cat
    """

    from_folder: From
    true: str | None = flag(None, "Only images of this class (name or id).", metavar="CLASS")
    predicted: str | None = flag(None, "Only images predicted as this class (name or id).", metavar="CLASS")
    phase: Phase = None
    label: str | None = flag(None, "Of evaluation/PHASE-LABEL/.")
    limit: int = flag(20, "Images shown; --json gives all.", min=1)
    data: Data = None
    data_root: DataRoot = None


@dataclass(frozen=True, kw_only=True)
class FigureOptions:
    """A figure of the paper from your runs.

    Example: cpmix figure 3 ckpt/c100-ce ckpt/c100-mixup ckpt/c100-balanced --out figure3.pdf
    """

    number: Annotated[int, Argument(help="1 to 6, as in the paper.", metavar="N", min=1, max=6)]
    folders: Annotated[
        list[Path], Argument(help="Run folders, or phases' folders in them, in any order.", metavar="RUN...")
    ]
    out: list[Path] = flag(list, "A .pdf, .svg or .png file. Repeatable. Default: figureN.pdf.", metavar="FILE")
    data: list[Path] = flag(
        list, "Data set folder, where it is not where a run recorded it. Repeatable.", metavar="DIR"
    )
    overwrite: bool = flag(False, "Replace what the files of --out hold.", "--overwrite")


@dataclass(frozen=True, kw_only=True)
class ImportOptions:
    """A PyTorch checkpoint as safetensors, for --init.

    Example: cpmix import-weights resnet50-11ad3fa6.pth --sha256 11ad3fa6
    """

    file: Annotated[Path, Argument(help="A PyTorch checkpoint.", metavar="FILE")]
    sha256: Annotated[str, Option(help="Its published hash, or the first 8 digits or more.", metavar="HASH")]
    out: Path | None = flag(None, "Default: FILE with the ending .safetensors.")
    overwrite: Overwrite = False


@dataclass(frozen=True, kw_only=True)
class BenchOptions:
    """Training speed here, and what more GPUs would make of it.

    Example: cpmix bench --data data/cifar100-lt-rho200 --recipe cifar100-lt/cpmix
    """

    recipe: str | None = flag(None, "Recipe to time and to project. Default: the data set's.")
    settings: Settings = field(default_factory=list)
    epochs: Epochs = None
    data: Path | None = flag(
        None,
        "Data set folder. Default: random images like CIFAR-100-LT's; for a projection as many as the recipe's "
        "published set has.",
    )
    data_root: DataRoot = None
    device: Device = "auto"
    rounds: int = flag(10, "Turns of each loop; medians are shown.", min=1)
    seconds: float = flag(1.0, "Length of a turn; three steps at least.", min=0, max=3600)
    world_size: str | None = flag(
        None, "Project the recipe to so many ranks instead: 1,8,64.", metavar="N,N,...", callback=_check_world_sizes
    )
    cores: int | None = flag(None, "Cores that read for each rank, in that projection. Default: 8.", min=1, max=1024)
    link: float | None = flag(
        None, "GB a second that a rank sends, in that projection. Default: 12.5.", min=0.001, max=10_000
    )

    @property
    def world_sizes(self) -> list[int]:
        """Numbers of ranks to project to, in their order; none without --world-size."""
        return sorted({int(part) for part in self.world_size.split(",")}) if self.world_size else []
