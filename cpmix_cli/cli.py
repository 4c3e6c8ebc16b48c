"""The command line: flags in, one call to a phase out. Imports nothing heavy: torch and pandas wait for the command.

Errors become exit codes here and nowhere else.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from cpmix_cli import __version__
from cpmix_cli.runtime import console, ranks, signals
from cpmix_cli.runtime.errors import CpmixError, EnvironmentFault

PIPELINE, HELPERS = "Commands", "Helpers"
PHASES = ("stage1", "stage2", "finetune")
TRAINING = ("train-stage1", "train-stage2", "finetune")


@contextmanager
def _explained() -> Iterator[None]:
    """Turns user errors into their lines on stderr and the exit code of their kind."""
    try:
        try:
            yield
        except BrokenPipeError:
            raise
        except OSError as fault:  # of a path that no file can have, or of a place that may not be looked at
            if isinstance(fault.filename, str | bytes):
                raise EnvironmentFault(f"{os.fsdecode(fault.filename)}: {fault.strerror}") from fault
            console.flush()  # the help, maybe, to a full disk
            raise EnvironmentFault(f"reading or writing failed: {fault.strerror or fault}") from fault
    except CpmixError as fault:
        console.error(str(fault), fault.exit_code)
        raise typer.Exit(fault.exit_code) from fault
    except BrokenPipeError:  # the reader went away (cpmix ... | head)
        with suppress(BrokenPipeError):
            console.flush()
        raise typer.Exit(0) from None


class Commands(TyperGroup):
    """Turns user errors into three lines on stderr and the exit code of their kind."""

    def main(self, *args: Any, **kwargs: Any) -> Any:
        """One command line. A process may run several: none inherits the --json of the one before."""
        console.as_json = False
        return super().main(*args, **kwargs)

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        """The pipeline's commands in their order, then the helpers."""
        width = max(map(len, self.commands))
        for panel in (PIPELINE, HELPERS):
            commands = {n: c for n, c in self.commands.items() if getattr(c, "rich_help_panel", None) == panel}
            if commands:
                with formatter.section(panel):
                    formatter.write_dl([(n.ljust(width), str(c.help).splitlines()[0]) for n, c in commands.items()])

    def make_context(self, *args: Any, **kwargs: Any) -> Any:
        """Read the flags; --help and --version write."""
        with _explained():
            return super().make_context(*args, **kwargs)

    def invoke(self, ctx: Any) -> Any:
        """Run the command."""
        with _explained():
            _check_working_directory()
            return super().invoke(ctx)


def _check_working_directory() -> None:
    try:
        Path.cwd()
    except OSError as fault:
        raise EnvironmentFault(
            f"the working directory is not there any more: {fault.strerror}", fix="cd to a folder that is there"
        ) from fault


app = typer.Typer(
    cls=Commands,
    name="cpmix",
    help="Long-tailed image recognition with Confusion-Pairing Mixup, from the data set to the confusion report.",
    epilog="First run: cpmix build-lt digits, then follow the 'next:' line of each command. "
    "Environment: CPMIX_DATA_DIR is the default of build-lt's --data-root.",
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(wanted: bool) -> None:
    if wanted:
        console.result({"version": __version__}, lines=[f"cpmix {__version__}"])
        raise typer.Exit


@app.callback()
def _root(
    context: typer.Context,
    version: Annotated[
        bool,
        typer.Option("--version", callback=_version, is_eager=True, help="Show the version and leave."),
    ] = False,
) -> None:
    # What does not train is one rank's work, and several would write the same files.
    if context.invoked_subcommand not in TRAINING and ranks.is_later(os.environ):
        raise typer.Exit


def _set_json(wanted: bool) -> bool:
    console.as_json = wanted
    return wanted


Json = Annotated[
    bool,
    typer.Option("--json", callback=_set_json, help="One JSON object on stdout and nothing else."),
]
Out = Annotated[Path | None, typer.Option("--out", help="Output folder; another run folder than --from.")]
From = Annotated[Path, typer.Option("--from", help="Run folder, or a phase's folder in it.")]
Data = Annotated[
    Path | None,
    typer.Option("--data", help="Data set folder, where it is not where the run recorded it."),
]
Images = Annotated[
    Path | None,
    typer.Option("--data-root", help="Folder of the image files, where it is not where build-lt found them."),
]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Start again, whatever the output folder holds.")]
Device = Annotated[str, typer.Option(help="auto, cpu or cuda.", metavar="DEVICE")]
RecipeName = Annotated[
    str | None,
    typer.Option("--recipe", help="Recipe file or name, such as cifar100-lt/cpmix. Default: the data set's."),
]
Set = Annotated[
    list[str] | None,
    typer.Option("--set", help="Change a recipe key: table.key=value. Repeatable.", metavar="KEY=VALUE"),
]
Epochs = Annotated[
    int | None,
    typer.Option(help="Rescale every epoch count so that both stages last this long.", min=1, max=1_000_000),
]
Seed = Annotated[int | None, typer.Option(help="Replace the recipe's seed.", min=0)]
DryRun = Annotated[
    bool, typer.Option("--dry-run", help="Check everything, take a step of each phase to come, write nothing.")
]
CheckpointEvery = Annotated[int, typer.Option(help="Save the state every N epochs.", min=1)]
EvalEvery = Annotated[
    int,
    typer.Option(help="Test accuracy every N epochs, into metrics.parquet; selects nothing.", min=0),
]
Tracker = Annotated[
    str | None,
    typer.Option(help="tensorboard: also write the curves of metrics.parquet for it.", metavar="NAME"),
]
DataRoot = Annotated[
    Path | None,
    typer.Option(
        "--data-root",
        envvar="CPMIX_DATA_DIR",
        help="Folder of the source's own files, or one that holds a folder for each source. Default: data/download.",
    ),
]


def _checked(flag: str, value: str, choices: tuple[str, ...]) -> str:
    from cpmix_cli.runtime.errors import UsageError, suggest

    if value not in choices:
        raise UsageError(f'{flag} "{value}".{suggest(value, choices)}')
    return value


def _checked_world_sizes(text: str) -> list[int]:
    from cpmix_cli.runtime.errors import UsageError

    parts = text.split(",")
    if not all(part.strip().isdecimal() and len(part) <= 8 and int(part) > 0 for part in parts):
        raise UsageError(f'--world-size "{text}": numbers of ranks, such as 1,8,64')
    return sorted({int(part) for part in parts})


def _checked_device(device: str) -> str:
    return _checked("--device", device, ("auto", "cpu", "cuda"))


def _checked_tracker(tracker: str | None) -> str | None:
    return tracker and _checked("--tracker", tracker, ("tensorboard",))


def _check_recipe(
    recipe: str | None, settings: list[str] | None, epochs: int | None, data: Path | None, *phases: Path
) -> None:
    from cpmix_cli.recipe.requests import check_request

    if recipe is not None or settings or epochs is not None:
        check_request(recipe, settings or [], epochs, data=data, phases=phases)


def _look_for_state(phase: str, out: Path | None, from_folder: Path | None = None, *, overwrite: bool) -> None:
    """Ctrl-C means "goes on" from here if the phase's state is on disk already, while torch is still to be imported."""
    run = out
    if run is None and from_folder is not None:
        run = from_folder.parent if from_folder.name in PHASES else from_folder
    if run is not None and not overwrite and os.path.lexists(run / phase / "training_state.safetensors"):
        signals.state_is_saved()


def _sources(from_folder: Path, *phases: str) -> list[Path]:
    """Phase folders that --from may mean, the likeliest first."""
    if from_folder.name in phases:
        return [from_folder]
    root = from_folder.parent if from_folder.name in PHASES else from_folder
    return [root / phase for phase in phases]


def command(name: str, example: str, panel: str = PIPELINE) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Register a command with an example line."""
    return app.command(name, epilog=f"Example: {example}", rich_help_panel=panel)


@command("build-lt", "cpmix build-lt cifar100 --rho 200 --data-root /data/cifar100")
def build_lt(
    source: Annotated[
        str,
        typer.Argument(
            help="digits, toy, cifar10, cifar100, fashion-mnist, imagenet-lt, places-lt, inaturalist2018 or "
            "image-folder.",
            metavar="SOURCE",
        ),
    ],
    rho: Annotated[
        float | None,
        typer.Option(help="Imbalance factor, largest over smallest class. Default: the source's own."),
    ] = None,
    out: Annotated[Path | None, typer.Option("--out", help="Data set folder. Default: data/NAME.")] = None,
    data_root: DataRoot = None,
    list_dir: Annotated[
        Path | None,
        typer.Option(
            "--list-dir",
            help="Folder of the official lists (ImageNet_LT_train.txt, ...); with image-folder, of your own train.txt, "
            "test.txt and val.txt. Lines: PATH LABEL, the path below --data-root.",
        ),
    ] = None,
    subset_seed: Annotated[
        int, typer.Option(help="Which images; 0 is the published subset.", min=0, max=2**32 - 1)
    ] = 0,
    profile: Annotated[
        str | None,
        typer.Option(help="image-folder: exponential, step, ranked (default) or pareto; with --rho.", metavar="NAME"),
    ] = None,
    val_per_class: Annotated[
        int, typer.Option(help="Training images of each class held out as val.", min=0, max=1_000_000)
    ] = 0,
    test_per_class: Annotated[
        int | None,
        typer.Option(help="Test images a class, for sources without a test split.", min=1, max=1_000_000),
    ] = None,
    image_size: Annotated[
        int | None,
        typer.Option(
            help="Images at this height and width. Default: 64 for image-folder, 256 where they stay in their files.",
            min=8,
            max=1024,
        ),
    ] = None,
    pack: Annotated[
        int | None,
        typer.Option(
            help="Decode image files once, into shards of S x S pixels that need not fit into memory; 0: leave them in "
            "their files. Default: 0 for official lists, one tensor for image-folder.",
            metavar="S",
            min=0,
            max=1024,
        ),
    ] = None,
    few_inclusive: Annotated[
        bool,
        typer.Option("--few-inclusive", help="Count classes of exactly 20 training images as few."),
    ] = False,
    download: Annotated[
        bool,
        typer.Option("--download", help="Fetch the source's files into --data-root first, checked by hash."),
    ] = False,
    verify: Annotated[
        bool, typer.Option("--verify", help="Read every packed image back and check it; every image file, its header.")
    ] = False,
    overwrite: Overwrite = False,
    json: Json = False,
) -> None:
    """Build a long-tailed data set folder from a source."""
    from cpmix_cli.commands import build_lt as phase

    phase.run(
        phase.Options(
            *(source, rho, out, data_root, list_dir, subset_seed, profile, val_per_class, test_per_class),
            *(image_size, pack, few_inclusive, download, verify, overwrite),
        )
    )


@command("train-stage1", "cpmix train-stage1 --data data/digits-lt-rho20 --out ckpt/digits")
def train_stage1(
    data: Annotated[Path | None, typer.Option("--data", help="Data set folder.", show_default=False)] = None,
    out: Annotated[Path, typer.Option("--out", help="Run folder.")] = Path("ckpt"),
    init: Annotated[
        Path | None,
        typer.Option("--init", help="Start from these weights (safetensors, torchvision's names); the head is new."),
    ] = None,
    teacher: Annotated[
        Path | None,
        typer.Option("--teacher", help="Run whose network the terms with a teacher learn from (distillation)."),
    ] = None,
    recipe: RecipeName = None,
    settings: Set = None,
    epochs: Epochs = None,
    seed: Seed = None,
    device: Device = "auto",
    data_root: Images = None,
    eval_every: EvalEvery = 0,
    checkpoint_every: CheckpointEvery = 1,
    tracker: Tracker = None,
    dry_run: DryRun = False,
    overwrite: Overwrite = False,
    json: Json = False,
) -> None:
    """Train on the natural batches and collect confusion pairs."""
    device, tracker = _checked_device(device), _checked_tracker(tracker)
    _check_recipe(recipe, settings, epochs, data)
    _look_for_state("stage1", out, overwrite=overwrite)
    from cpmix_cli.commands import train_stage1 as phase
    from cpmix_cli.training.phase import Options

    options = Options(
        *(recipe, settings or [], epochs, seed, device, data, data_root, overwrite, dry_run),
        *(eval_every, checkpoint_every, tracker),
    )
    with ranks.together():
        phase.run(options, out, init, teacher)


@command("train-stage2", "cpmix train-stage2 --from ckpt/digits")
def train_stage2(
    from_folder: From,
    out: Out = None,
    recipe: RecipeName = None,
    settings: Set = None,
    epochs: Epochs = None,
    seed: Seed = None,
    device: Device = "auto",
    data: Data = None,
    data_root: Images = None,
    eval_every: EvalEvery = 0,
    checkpoint_every: CheckpointEvery = 1,
    tracker: Tracker = None,
    dry_run: DryRun = False,
    overwrite: Overwrite = False,
    json: Json = False,
) -> None:
    """Go on from stage 1 with mixed confusion pairs."""
    device, tracker = _checked_device(device), _checked_tracker(tracker)
    _check_recipe(recipe, settings, epochs, None, *_sources(from_folder, "stage1"))
    _look_for_state("stage2", out, from_folder, overwrite=overwrite)
    from cpmix_cli.commands import train_stage2 as phase
    from cpmix_cli.training.phase import Options

    options = Options(
        *(recipe, settings or [], epochs, seed, device, data, data_root, overwrite, dry_run),
        *(eval_every, checkpoint_every, tracker),
    )
    with ranks.together():
        phase.run(options, from_folder, out)


@command("finetune", "cpmix finetune --from ckpt/digits")
def finetune(
    from_folder: From,
    out: Out = None,
    phase: Annotated[str | None, typer.Option(help="stage1 or stage2; default: the last one done.")] = None,
    recipe: RecipeName = None,
    settings: Set = None,
    epochs: Epochs = None,
    seed: Seed = None,
    device: Device = "auto",
    data: Data = None,
    data_root: Images = None,
    eval_every: EvalEvery = 0,
    checkpoint_every: CheckpointEvery = 1,
    tracker: Tracker = None,
    dry_run: DryRun = False,
    overwrite: Overwrite = False,
    json: Json = False,
) -> None:
    """Train the head on class-balanced draws, the rest frozen."""
    device, tracker = _checked_device(device), _checked_tracker(tracker)
    _check_recipe(recipe, settings, epochs, None, *_sources(from_folder, *([phase] if phase else ["stage2", "stage1"])))
    _look_for_state("finetune", out, from_folder, overwrite=overwrite)
    from cpmix_cli.commands import finetune as finetuning
    from cpmix_cli.training.phase import Options

    options = Options(
        *(recipe, settings or [], epochs, seed, device, data, data_root, overwrite, dry_run),
        *(eval_every, checkpoint_every, tracker),
    )
    with ranks.together():
        finetuning.run(options, from_folder, out, phase)


@command("evaluate", "cpmix evaluate --from ckpt/digits")
def evaluate(
    from_folder: From,
    out: Out = None,
    phase: Annotated[str | None, typer.Option(help="stage1, stage2 or finetune; default: the last one done.")] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", help="Change an [evaluation] key. Repeatable.", metavar="KEY=VALUE"),
    ] = None,
    label: Annotated[str | None, typer.Option(help="Write to evaluation/PHASE-LABEL/.")] = None,
    split: Annotated[str, typer.Option(help="test, train, or val where build-lt held one out.")] = "test",
    test_data: Annotated[
        Path | None,
        typer.Option("--test-data", help="Another folder: FOLDER/CLASS/IMAGE, or a data set's test split."),
    ] = None,
    test_distribution: Annotated[
        str,
        typer.Option(
            "--test-distribution",
            help="uniform (the test images as they are), forward or backward: as if the test set were long-tailed too.",
        ),
    ] = "uniform",
    ratio: Annotated[float, typer.Option(help="Of the largest to the smallest class of that.", min=1)] = 50.0,
    few_inclusive: Annotated[
        bool,
        typer.Option("--few-inclusive", help="Count classes of exactly 20 training images as few."),
    ] = False,
    device: Device = "auto",
    data: Data = None,
    data_root: Images = None,
    overwrite: Overwrite = False,
    json: Json = False,
) -> None:
    """Accuracy by class and group, calibration, predictions."""
    device = _checked_device(device)
    split = _checked("--split", split, ("test", "val", "train"))
    test_distribution = _checked("--test-distribution", test_distribution, ("uniform", "forward", "backward"))
    from cpmix_cli.commands import evaluate as evaluating

    evaluating.run(
        evaluating.Options(
            *(from_folder, out, phase, settings or [], label, split, test_data),
            *(test_distribution, ratio, few_inclusive, device, data, data_root, overwrite),
        )
    )


@command("confusion-report", "cpmix confusion-report --from ckpt/digits")
def confusion_report(
    from_folder: From,
    out: Out = None,
    phase: Annotated[str | None, typer.Option(help="stage1, stage2 or finetune; default: the last one done.")] = None,
    compare: Annotated[
        list[Path] | None,
        typer.Option(
            "--compare", help="Another run's folder, shown beside it with the difference. Repeatable.", metavar="RUN"
        ),
    ] = None,
    images: Annotated[
        int, typer.Option(help="How many misclassified test images the page carries at most.", min=0, max=20_000)
    ] = 1500,
    data: Data = None,
    data_root: Images = None,
    overwrite: Overwrite = False,
    json: Json = False,
) -> None:
    """Confusion matrix, most confused pairs, pictures, one page."""
    from cpmix_cli.commands import confusion_report as reporting

    reporting.run(reporting.Options(from_folder, out, phase, compare or [], images, data, data_root, overwrite))


Phase = Annotated[str | None, typer.Option(help="stage1, stage2 or finetune; default: the last one done.")]


@command("status", "cpmix status ckpt/*", HELPERS)
def status(
    folders: Annotated[list[Path], typer.Argument(help="Run folders.", metavar="RUN...")],
    json: Json = False,
) -> None:
    """Where runs stand and what to type next."""
    from cpmix_cli.commands import status as showing

    raise typer.Exit(showing.run(folders))


@command("compare", "cpmix compare ckpt/* --paper table1", HELPERS)
def compare(
    folders: Annotated[list[Path], typer.Argument(help="Run folders, or phases' folders in them.", metavar="RUN...")],
    paper: Annotated[
        str | None,
        typer.Option(
            help="Laid out as a table of the paper: table1, table2, table3, table4, table7, table8 or table9.",
            metavar="TABLE",
        ),
    ] = None,
    form: Annotated[
        str, typer.Option("--format", help="table, csv, markdown, latex or json (as --json).", metavar="FORMAT")
    ] = "table",
    out: Annotated[Path | None, typer.Option("--out", help="Write to this file, not to stdout.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the file --out.")] = False,
    json: Json = False,
) -> None:
    """Runs in one table, beside the paper's numbers."""
    from cpmix_cli.results.paper import PAPER_TABLES
    from cpmix_cli.runtime.errors import UsageError

    form = _checked("--format", form, ("table", "csv", "markdown", "latex", "json"))
    if json and form not in ("table", "json"):
        raise UsageError(f"--json and --format {form}: give one of the two")
    console.as_json = json or form == "json"
    if paper is not None:
        paper = _checked("--paper", paper, tuple(PAPER_TABLES))
    from cpmix_cli.commands import compare as comparing

    comparing.run(comparing.Options(folders, paper, "table" if console.as_json else form, out, overwrite))


@command("recipes", "cpmix recipes digits/cpmix digits/cross-entropy", HELPERS)
def recipes(
    name: Annotated[str | None, typer.Argument(help="Recipe to show; none lists all.", metavar="[NAME]")] = None,
    other: Annotated[str | None, typer.Argument(help="Recipe to compare with.", metavar="[OTHER]")] = None,
    settings: Set = None,
    epochs: Epochs = None,
    seed: Seed = None,
    rho: Annotated[float | None, typer.Option(help="Imbalance factor, for [by_rho.R] tables.")] = None,
    budget: Annotated[
        bool, typer.Option("--budget", help="Epochs and image passes of each recipe, and their ratio to CP-Mix's.")
    ] = False,
    json: Json = False,
) -> None:
    """List recipes, show one, tell two apart, or cost them."""
    from cpmix_cli.commands import recipes as showing

    showing.run(showing.Options(name, other, settings or [], epochs, seed, rho, budget))


@command("methods", "cpmix methods --json", HELPERS)
def methods(json: Json = False) -> None:
    """List methods: paper, recipes, published numbers."""
    from cpmix_cli.commands import methods as listing

    listing.run()


@command("predict", "cpmix predict photo.jpg more/ --from ckpt/mine", HELPERS)
def predict(
    images: Annotated[list[Path], typer.Argument(help="Image files, or folders of them.", metavar="IMAGES...")],
    from_folder: From,
    phase: Phase = None,
    top: Annotated[int, typer.Option(help="Classes shown for each image, most likely first.", min=1)] = 1,
    out: Annotated[Path | None, typer.Option("--out", help="Write a Parquet file as well.")] = None,
    device: Device = "auto",
    overwrite: Overwrite = False,
    json: Json = False,
) -> None:
    """Class and confidence of your own images."""
    device = _checked_device(device)
    from cpmix_cli.commands import predict as predicting

    predicting.run(predicting.Options(images, from_folder, phase, top, out, device, overwrite))


@command("misclassified", "cpmix misclassified --from ckpt/mine --true lynx --predicted cat", HELPERS)
def misclassified(
    from_folder: From,
    true: Annotated[str | None, typer.Option(help="Only images of this class (name or id).", metavar="CLASS")] = None,
    predicted: Annotated[
        str | None,
        typer.Option(help="Only images taken for this class (name or id).", metavar="CLASS"),
    ] = None,
    phase: Phase = None,
    label: Annotated[str | None, typer.Option(help="Of evaluation/PHASE-LABEL/.")] = None,
    limit: Annotated[int, typer.Option(help="Images shown; --json gives all.", min=1)] = 20,
    data: Data = None,
    data_root: Images = None,
    json: Json = False,
) -> None:
    """The wrong test images behind a confusion matrix."""
    from cpmix_cli.commands import misclassified as listing

    listing.run(listing.Options(from_folder, true, predicted, phase, label, limit, data, data_root))


@command("figure", "cpmix figure 3 ckpt/c100-ce ckpt/c100-mixup ckpt/c100-balanced --out figure3.pdf", HELPERS)
def figure(
    number: Annotated[int, typer.Argument(help="1 to 6, as in the paper.", metavar="N", min=1, max=6)],
    folders: Annotated[
        list[Path], typer.Argument(help="Run folders, or phases' folders in them, in any order.", metavar="RUN...")
    ],
    out: Annotated[
        list[Path] | None,
        typer.Option("--out", help="A .pdf, .svg or .png file. Repeatable. Default: figureN.pdf.", metavar="FILE"),
    ] = None,
    data: Annotated[
        list[Path] | None,
        typer.Option(
            "--data", help="Data set folder, where it is not where a run recorded it. Repeatable.", metavar="DIR"
        ),
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace what the files of --out hold.")] = False,
    json: Json = False,
) -> None:
    """A figure of the paper from your runs."""
    from cpmix_cli.commands import figure as drawing

    drawing.run(drawing.Options(number, folders, out or [], data or [], overwrite))


@command("import-weights", "cpmix import-weights resnet50-11ad3fa6.pth --sha256 11ad3fa6", HELPERS)
def import_weights(
    file: Annotated[Path, typer.Argument(help="A PyTorch checkpoint.", metavar="FILE")],
    sha256: Annotated[
        str,
        typer.Option("--sha256", help="Its published hash, or the first 8 digits or more.", metavar="HASH"),
    ],
    out: Annotated[Path | None, typer.Option("--out", help="Default: FILE with the ending .safetensors.")] = None,
    overwrite: Overwrite = False,
    json: Json = False,
) -> None:
    """A PyTorch checkpoint as safetensors, for --init."""
    from cpmix_cli.commands import import_weights as importing

    importing.run(importing.Options(file, sha256, out, overwrite))


@command("bench", "cpmix bench --data data/cifar100-lt-rho200 --recipe cifar100-lt/cpmix", HELPERS)
def bench(
    recipe: Annotated[
        str | None, typer.Option("--recipe", help="Recipe to time and to project. Default: the data set's.")
    ] = None,
    settings: Set = None,
    epochs: Epochs = None,
    data: Annotated[
        Path | None,
        typer.Option(
            "--data",
            help="Data set folder. Default: random images like CIFAR-100-LT's; for a projection as many as "
            "the recipe's published set has.",
        ),
    ] = None,
    data_root: Images = None,
    device: Device = "auto",
    rounds: Annotated[int, typer.Option(help="Turns of each contender; medians are shown.", min=1)] = 10,
    seconds: Annotated[float, typer.Option(help="Length of a turn; three steps at least.", min=0, max=3600)] = 1.0,
    world_size: Annotated[
        str | None,
        typer.Option("--world-size", help="Project the recipe to so many ranks instead: 1,8,64.", metavar="N,N,..."),
    ] = None,
    cores: Annotated[
        int | None,
        typer.Option(help="Cores that read for each rank, in that projection. Default: 8.", min=1, max=1024),
    ] = None,
    link: Annotated[
        float | None,
        typer.Option(help="GB a second that a rank sends, in that projection. Default: 12.5.", min=0.001, max=10_000),
    ] = None,
    json: Json = False,
) -> None:
    """Training speed here, and what more GPUs would make of it."""
    from cpmix_cli.runtime.errors import UsageError

    device = _checked_device(device)
    if world_size is None and (cores is not None or link is not None):
        raise UsageError("--cores and --link are a projection's", fix="say for how many ranks: --world-size 1,8,64")
    sizes = None if world_size is None else _checked_world_sizes(world_size)
    _check_recipe(recipe or (None if data else "cifar100-lt/cpmix"), settings, epochs, data)
    from cpmix_cli.bench.measure import Options
    from cpmix_cli.commands import bench as benching

    options = Options(recipe, settings or [], epochs, data, data_root, device, rounds, seconds)
    if sizes is None:
        benching.run(options)
    else:
        from cpmix_cli.bench import projection as scaling

        scaling.run(options, sizes, cores, link)
