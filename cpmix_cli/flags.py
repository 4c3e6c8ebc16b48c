"""Every flag of every command, written once: one frozen dataclass per command, which the command line reads.

To add a flag, add a field here; the command finds it in its options. Imports nothing heavy.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

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

# -- the pipeline ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class BuildOptions:
    """Flags of build-lt."""

    source: Annotated[
        str,
        Argument(
            help="digits, toy, cifar10, cifar100, fashion-mnist, imagenet-lt, places-lt, inaturalist2018 or "
            "image-folder.",
            metavar="SOURCE",
        ),
    ]
    rho: Annotated[
        float | None, Option(help="Imbalance factor, largest over smallest class. Default: the source's own.")
    ] = None
    out: Annotated[Path | None, Option(help="Data set folder. Default: data/NAME.")] = None
    data_root: Annotated[
        Path | None,
        Option(
            envvar="CPMIX_DATA_DIR",
            help="Folder of the source's own files, or one that holds a folder for each source. "
            "Default: data/download.",
        ),
    ] = None
    list_dir: Annotated[
        Path | None,
        Option(
            help="Folder of the official lists (ImageNet_LT_train.txt, ...); with image-folder, of your own train.txt, "
            "test.txt and val.txt. Lines: PATH LABEL, the path below --data-root."
        ),
    ] = None
    subset_seed: Annotated[int, Option(help="Which images; 0 is the published subset.", min=0, max=2**32 - 1)] = 0
    profile: Annotated[
        str | None,
        Option(help="image-folder: exponential, step, ranked (default) or pareto; with --rho.", metavar="NAME"),
    ] = None
    val_per_class: Annotated[
        int, Option(help="Training images of each class held out as val.", min=0, max=1_000_000)
    ] = 0
    test_per_class: Annotated[
        int | None, Option(help="Test images a class, for sources without a test split.", min=1, max=1_000_000)
    ] = None
    image_size: Annotated[
        int | None,
        Option(
            help="Images at this height and width. Default: 64 for image-folder, 256 where they stay in their files.",
            min=8,
            max=1024,
        ),
    ] = None
    pack: Annotated[
        int | None,
        Option(
            help="Decode image files once, into shards of S x S pixels that need not fit into memory; 0: leave them in "
            "their files. Default: 0 for official lists, one tensor for image-folder.",
            metavar="S",
            min=0,
            max=1024,
        ),
    ] = None
    few_inclusive: FewInclusive = False
    download: Annotated[
        bool, Option("--download", help="Fetch the source's files into --data-root first, checked by hash.")
    ] = False
    verify: Annotated[
        bool, Option("--verify", help="Read every packed image back and check it; every image file, its header.")
    ] = False
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
    eval_every: Annotated[
        int, Option(help="Test accuracy every N epochs, into metrics.parquet; selects nothing.", min=0)
    ] = 0
    checkpoint_every: Annotated[int, Option(help="Save the state every N epochs.", min=1)] = 1
    tracker: Annotated[
        str | None,
        Option(
            help="tensorboard: also write the curves of metrics.parquet for it.",
            metavar="NAME",
            callback=one_of("tensorboard"),
        ),
    ] = None
    dry_run: Annotated[
        bool, Option("--dry-run", help="Check everything, take a step of each phase to come, write nothing.")
    ] = False
    overwrite: Overwrite = False

    @property
    def changes_recipe(self) -> bool:
        """A flag asks for another recipe than the checkpoint's."""
        return bool(self.recipe or self.settings) or not (self.epochs is None and self.seed is None)


@dataclass(frozen=True, kw_only=True)
class TrainStage1Options(TrainingOptions):
    """Flags of train-stage1."""

    data: Annotated[Path | None, Option(help="Data set folder.", show_default=False)] = None
    out: Annotated[Path, Option(help="Run folder.")] = Path("ckpt")
    init: Annotated[
        Path | None, Option(help="Start from these weights (safetensors, torchvision's names); the head is new.")
    ] = None
    teacher: Annotated[
        Path | None, Option(help="Run whose network the terms with a teacher learn from (distillation).")
    ] = None


@dataclass(frozen=True, kw_only=True)
class TrainStage2Options(TrainingOptions):
    """Flags of train-stage2."""

    from_folder: From
    out: Out = None


@dataclass(frozen=True, kw_only=True)
class FinetuneOptions(TrainingOptions):
    """Flags of finetune."""

    from_folder: From
    out: Out = None
    phase: Annotated[str | None, Option(help="stage1 or stage2; default: the last one done.")] = None


@dataclass(frozen=True, kw_only=True)
class EvaluateOptions:
    """Flags of evaluate."""

    from_folder: From
    out: Out = None
    phase: Phase = None
    settings: Annotated[
        list[str], Option("--set", help="Change an [evaluation] key. Repeatable.", metavar="KEY=VALUE")
    ] = field(default_factory=list)
    label: Annotated[str | None, Option(help="Write to evaluation/PHASE-LABEL/.")] = None
    split: Annotated[
        str, Option(help="test, train, or val where build-lt held one out.", callback=one_of("test", "val", "train"))
    ] = "test"
    test_data: Annotated[
        Path | None, Option(help="Another folder: FOLDER/CLASS/IMAGE, or a data set's test split.")
    ] = None
    test_distribution: Annotated[
        str,
        Option(
            help="uniform (the test images as they are), forward or backward: as if the test set were long-tailed too.",
            callback=one_of("uniform", "forward", "backward"),
        ),
    ] = "uniform"
    ratio: Annotated[
        float, Option(help="Imbalance factor of the test set under --test-distribution forward or backward.", min=1)
    ] = 50.0
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
class ReportOptions:
    """Flags of confusion-report."""

    from_folder: From
    out: Out = None
    phase: Phase = None
    compare: Annotated[
        list[Path], Option(help="Another run's folder, shown beside it with the difference. Repeatable.", metavar="RUN")
    ] = field(default_factory=list)
    images: Annotated[
        int, Option(help="How many misclassified test images the page carries at most.", min=0, max=20_000)
    ] = 1500
    data: Data = None
    data_root: DataRoot = None
    overwrite: Overwrite = False


# -- the helpers -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class StatusOptions:
    """Flags of status."""

    folders: Annotated[list[Path], Argument(help="Run folders.", metavar="RUN...")]


@dataclass(frozen=True, kw_only=True)
class CompareOptions:
    """Flags of compare."""

    folders: Annotated[list[Path], Argument(help="Run folders, or phases' folders in them.", metavar="RUN...")]
    paper: Annotated[
        str | None,
        Option(
            help="Laid out as a table of the paper: table1, table2, table3, table4, table7, table8 or table9.",
            metavar="TABLE",
            callback=one_of("table1", "table2", "table3", "table4", "table7", "table8", "table9"),
        ),
    ] = None
    form: Annotated[
        str,
        Option(
            "--format",
            help="table, csv, markdown, latex or json (as --json).",
            metavar="FORMAT",
            callback=one_of("table", "csv", "markdown", "latex", "json"),
        ),
    ] = "table"
    out: Annotated[Path | None, Option(help="Write to this file, not to stdout.")] = None
    overwrite: Annotated[bool, Option("--overwrite", help="Replace the file --out.")] = False


@dataclass(frozen=True, kw_only=True)
class RecipesOptions:
    """Flags of recipes."""

    name: Annotated[str | None, Argument(help="Recipe to show; none lists all.", metavar="[NAME]")] = None
    other: Annotated[str | None, Argument(help="Recipe to compare with.", metavar="[OTHER]")] = None
    settings: Settings = field(default_factory=list)
    epochs: Epochs = None
    seed: Seed = None
    rho: Annotated[float | None, Option(help="Imbalance factor, for [by_rho.R] tables.")] = None
    budget: Annotated[
        bool, Option("--budget", help="Epochs and image passes of each recipe, and their ratio to CP-Mix's.")
    ] = False


@dataclass(frozen=True, kw_only=True)
class PredictOptions:
    """Flags of predict."""

    images: Annotated[list[Path], Argument(help="Image files, or folders of them.", metavar="IMAGES...")]
    from_folder: From
    phase: Phase = None
    top: Annotated[int, Option(help="Classes shown for each image, most likely first.", min=1)] = 1
    out: Annotated[Path | None, Option(help="Write a Parquet file as well.")] = None
    device: Device = "auto"
    overwrite: Overwrite = False


@dataclass(frozen=True, kw_only=True)
class MisclassifiedOptions:
    """Flags of misclassified."""

    from_folder: From
    true: Annotated[str | None, Option(help="Only images of this class (name or id).", metavar="CLASS")] = None
    predicted: Annotated[
        str | None, Option(help="Only images predicted as this class (name or id).", metavar="CLASS")
    ] = None
    phase: Phase = None
    label: Annotated[str | None, Option(help="Of evaluation/PHASE-LABEL/.")] = None
    limit: Annotated[int, Option(help="Images shown; --json gives all.", min=1)] = 20
    data: Data = None
    data_root: DataRoot = None


@dataclass(frozen=True, kw_only=True)
class FigureOptions:
    """Flags of figure."""

    number: Annotated[int, Argument(help="1 to 6, as in the paper.", metavar="N", min=1, max=6)]
    folders: Annotated[
        list[Path], Argument(help="Run folders, or phases' folders in them, in any order.", metavar="RUN...")
    ]
    out: Annotated[
        list[Path], Option(help="A .pdf, .svg or .png file. Repeatable. Default: figureN.pdf.", metavar="FILE")
    ] = field(default_factory=list)
    data: Annotated[
        list[Path], Option(help="Data set folder, where it is not where a run recorded it. Repeatable.", metavar="DIR")
    ] = field(default_factory=list)
    overwrite: Annotated[bool, Option("--overwrite", help="Replace what the files of --out hold.")] = False


@dataclass(frozen=True, kw_only=True)
class ImportOptions:
    """Flags of import-weights."""

    file: Annotated[Path, Argument(help="A PyTorch checkpoint.", metavar="FILE")]
    sha256: Annotated[str, Option(help="Its published hash, or the first 8 digits or more.", metavar="HASH")]
    out: Annotated[Path | None, Option(help="Default: FILE with the ending .safetensors.")] = None
    overwrite: Overwrite = False


@dataclass(frozen=True, kw_only=True)
class BenchOptions:
    """Flags of bench."""

    recipe: Annotated[str | None, Option(help="Recipe to time and to project. Default: the data set's.")] = None
    settings: Settings = field(default_factory=list)
    epochs: Epochs = None
    data: Annotated[
        Path | None,
        Option(
            help="Data set folder. Default: random images like CIFAR-100-LT's; for a projection as many as "
            "the recipe's published set has."
        ),
    ] = None
    data_root: DataRoot = None
    device: Device = "auto"
    rounds: Annotated[int, Option(help="Turns of each loop; medians are shown.", min=1)] = 10
    seconds: Annotated[float, Option(help="Length of a turn; three steps at least.", min=0, max=3600)] = 1.0
    world_size: Annotated[
        str | None,
        Option(
            help="Project the recipe to so many ranks instead: 1,8,64.", metavar="N,N,...", callback=_check_world_sizes
        ),
    ] = None
    cores: Annotated[
        int | None, Option(help="Cores that read for each rank, in that projection. Default: 8.", min=1, max=1024)
    ] = None
    link: Annotated[
        float | None,
        Option(help="GB a second that a rank sends, in that projection. Default: 12.5.", min=0.001, max=10_000),
    ] = None

    @property
    def world_sizes(self) -> list[int]:
        """Numbers of ranks to project to, in their order; none without --world-size."""
        return sorted({int(part) for part in self.world_size.split(",")}) if self.world_size else []
