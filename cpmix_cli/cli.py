"""The command line: flags in (flags.py has them), one call to a command out. Imports nothing heavy: torch and pandas
wait for the command.

Errors become exit codes here and nowhere else.
"""

import inspect
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from cpmix_cli import __version__
from cpmix_cli.artifacts.files import PHASES, TRAINING_STATE
from cpmix_cli.flags import (
    BenchOptions,
    BuildOptions,
    CompareOptions,
    EvaluateOptions,
    FigureOptions,
    FinetuneOptions,
    ImportOptions,
    Json,
    MisclassifiedOptions,
    PredictOptions,
    RecipesOptions,
    ReportOptions,
    StatusOptions,
    TrainingOptions,
    TrainStage1Options,
    TrainStage2Options,
)
from cpmix_cli.runtime import console, ranks, signals
from cpmix_cli.runtime.errors import CpmixError, EnvironmentFault, UsageError

PIPELINE, HELPERS = "Commands", "Helpers"
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
        console.error(fault)
        raise typer.Exit(fault.exit_code) from fault
    except BrokenPipeError:  # the reader went away (cpmix ... | head)
        with suppress(BrokenPipeError):
            console.flush()
        raise typer.Exit(0) from None


class Commands(TyperGroup):
    """Turns user errors into three lines on stderr and the exit code of their kind."""

    def main(self, *args: Any, **kwargs: Any) -> Any:
        """One command line. A process may run several: none inherits the --json of the one before."""
        console.as_json, console.command = False, ""
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
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version and leave.")
    ] = False,
) -> None:
    # What does not train is one rank's work, and several would write the same files.
    if context.invoked_subcommand not in TRAINING and ranks.is_later(os.environ):
        raise typer.Exit


def _look_for_state(folder: Path, *, overwrite: bool) -> None:
    """From here on Ctrl-C exits with 75 if the phase has a state on disk, while torch is still to be imported."""
    if not overwrite and os.path.lexists(folder / TRAINING_STATE):
        signals.state_is_saved()


def _run_of(folder: Path) -> tuple[Path, str | None]:
    """The run folder that --from means, and the phase if it names one; the command looks closer."""
    return (folder.parent, folder.name) if folder.name in PHASES else (folder, None)


def _check_recipe(options: TrainingOptions | BenchOptions, name: str | None, data: Path | None, *phases: Path) -> None:
    """Report faults of the recipe before torch is imported, see check_request()."""
    from cpmix_cli.recipe.early_checks import check_request

    if name is not None or options.settings or options.epochs is not None:
        check_request(name, options.settings, options.epochs, data=data, phases=phases)


def command(example: str, panel: str = PIPELINE) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Register a function as the command of its name; its one parameter is the class of its flags, if it has any.

    Args:
        example: a command line, the last line of its help.
        panel: where `cpmix --help` lists it.
    """

    def register(function: Callable[..., None]) -> Callable[..., None]:
        name = function.__name__.replace("_", "-")
        classes = [parameter.annotation for parameter in inspect.signature(function).parameters.values()]

        def run(json: bool, **given: Any) -> None:
            console.command = name
            flags = {flag: value for flag, value in given.items() if value is not None}
            function(*(options(**flags) for options in classes))

        parameters = [parameter for options in classes for parameter in _parameters(options)]
        parameters.append(inspect.Parameter("json", inspect.Parameter.KEYWORD_ONLY, default=False, annotation=Json))
        run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
        register_as = app.command(name, help=function.__doc__, epilog=f"Example: {example}", rich_help_panel=panel)
        register_as(run)
        return function

    return register


def _parameters(options: type) -> Iterator[inspect.Parameter]:
    """The flags of a command as Typer reads them, its own before those that it shares."""
    own = inspect.get_annotations(options)
    for flag in sorted(fields(options), key=lambda flag: flag.name not in own):
        default = inspect.Parameter.empty if flag.default is MISSING else flag.default
        if flag.default_factory is not MISSING:
            default = None
        yield inspect.Parameter(flag.name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=flag.type)


@command("cpmix build-lt cifar100 --rho 200 --data-root /data/cifar100")
def build_lt(options: BuildOptions) -> None:
    """Build a long-tailed data set folder from a source."""
    from cpmix_cli.commands import build_lt

    build_lt.run(options)


@command("cpmix train-stage1 --data data/digits-lt-rho20 --out ckpt/digits")
def train_stage1(options: TrainStage1Options) -> None:
    """Train on the natural batches and collect confusion pairs."""
    _check_recipe(options, options.recipe, options.data)
    _look_for_state(options.out / "stage1", overwrite=options.overwrite)
    from cpmix_cli.commands import train_stage1

    with ranks.together():
        train_stage1.run(options)


@command("cpmix train-stage2 --from ckpt/digits")
def train_stage2(options: TrainStage2Options) -> None:
    """Continue from stage 1 with mixed confusion pairs."""
    root, _ = _run_of(options.from_folder)
    _check_recipe(options, options.recipe, None, root / "stage1")
    _look_for_state((options.out or root) / "stage2", overwrite=options.overwrite)
    from cpmix_cli.commands import train_stage2

    with ranks.together():
        train_stage2.run(options)


@command("cpmix finetune --from ckpt/digits")
def finetune(options: FinetuneOptions) -> None:
    """Finetune the head with class-balanced sampling."""
    root, named = _run_of(options.from_folder)
    phase = options.phase or (named if named != "finetune" else None)
    _check_recipe(options, options.recipe, None, *(root / p for p in ([phase] if phase else ["stage2", "stage1"])))
    _look_for_state((options.out or root) / "finetune", overwrite=options.overwrite)
    from cpmix_cli.commands import finetune

    with ranks.together():
        finetune.run(options)


@command("cpmix evaluate --from ckpt/digits")
def evaluate(options: EvaluateOptions) -> None:
    """Accuracy by class and group, calibration, predictions."""
    from cpmix_cli.commands import evaluate

    evaluate.run(options)


@command("cpmix confusion-report --from ckpt/digits")
def confusion_report(options: ReportOptions) -> None:
    """Confusion matrix, most confused pairs, figures, one page."""
    from cpmix_cli.commands import confusion_report

    confusion_report.run(options)


@command("cpmix status ckpt/*", HELPERS)
def status(options: StatusOptions) -> None:
    """Where runs stand and what to type next."""
    from cpmix_cli.commands import status

    raise typer.Exit(status.run(options))


@command("cpmix compare ckpt/* --paper table1", HELPERS)
def compare(options: CompareOptions) -> None:
    """Runs in one table, beside the paper's numbers."""
    if console.as_json and options.form not in ("table", "json"):
        raise UsageError(f"--json and --format {options.form}: give one of the two")
    console.as_json = console.as_json or options.form == "json"
    from cpmix_cli.commands import compare

    compare.run(options)


@command("cpmix recipes digits/cpmix digits/cross-entropy", HELPERS)
def recipes(options: RecipesOptions) -> None:
    """List recipes, show one, tell two apart, or cost them."""
    from cpmix_cli.commands import recipes

    recipes.run(options)


@command("cpmix methods --json", HELPERS)
def methods() -> None:
    """List methods: paper, recipes, published numbers."""
    from cpmix_cli.commands import methods

    methods.run()


@command("cpmix predict photo.jpg more/ --from ckpt/mine", HELPERS)
def predict(options: PredictOptions) -> None:
    """Class and confidence of your own images."""
    from cpmix_cli.commands import predict

    predict.run(options)


@command("cpmix misclassified --from ckpt/mine --true lynx --predicted cat", HELPERS)
def misclassified(options: MisclassifiedOptions) -> None:
    """The wrong test images behind a confusion matrix."""
    from cpmix_cli.commands import misclassified

    misclassified.run(options)


@command("cpmix figure 3 ckpt/c100-ce ckpt/c100-mixup ckpt/c100-balanced --out figure3.pdf", HELPERS)
def figure(options: FigureOptions) -> None:
    """A figure of the paper from your runs."""
    from cpmix_cli.commands import figure

    figure.run(options)


@command("cpmix import-weights resnet50-11ad3fa6.pth --sha256 11ad3fa6", HELPERS)
def import_weights(options: ImportOptions) -> None:
    """A PyTorch checkpoint as safetensors, for --init."""
    from cpmix_cli.commands import import_weights

    import_weights.run(options)


@command("cpmix bench --data data/cifar100-lt-rho200 --recipe cifar100-lt/cpmix", HELPERS)
def bench(options: BenchOptions) -> None:
    """Training speed here, and what more GPUs would make of it."""
    if not options.world_sizes and (options.cores is not None or options.link is not None):
        raise UsageError("--cores and --link are a projection's", fix="say for how many ranks: --world-size 1,8,64")
    _check_recipe(options, options.recipe or (None if options.data else "cifar100-lt/cpmix"), options.data)
    from cpmix_cli.commands import bench

    bench.run(options)
