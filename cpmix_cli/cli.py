"""The command line: parses the flags of flags.py and calls one command. Imports torch and pandas only with a command.

Errors become exit codes only here.
"""

import hashlib
import inspect
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import MISSING, fields
from importlib import import_module
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperCommand, TyperGroup
from typer.exceptions import TyperException

from cpmix_cli import __version__, flags
from cpmix_cli.artifacts.files import PHASES, TRAINING_STATE
from cpmix_cli.runtime import console, memory, ranks, signals
from cpmix_cli.runtime.errors import CpmixError, EnvironmentFault, InputError, UsageError, give_one_of, nearest
from cpmix_cli.runtime.text import quoted

TRAINING = ("train-stage1", "train-stage2", "finetune")
WITHOUT_TORCH = ("run", "status", "compare", "results", "misclassified", "recipes", "methods")
"""Commands that do not import torch themselves; `run` does other commands, which say so."""


@contextmanager
def _explained() -> Iterator[None]:
    """Print user errors on stderr and turn them into exit codes."""
    try:
        try:
            with memory.explained():
                yield
        except BrokenPipeError:
            raise
        except OSError as fault:  # such as an impossible path, or a folder without permission
            if isinstance(fault.filename, str | bytes):
                path = os.fsdecode(fault.filename)
                raise EnvironmentFault(
                    f"{path} cannot be read or written: {fault.strerror}",
                    fix=f"correct the path, or its permissions: {quoted('ls', '-ld', path)}",
                ) from fault
            console.flush()  # may fail too, such as on a full disk
            raise EnvironmentFault(
                f"reading or writing failed: {fault.strerror or fault}",
                fix="check the disk (df -h) and its mount, then give the command again",
            ) from fault
        except RuntimeError as fault:  # of Path.resolve()
            if not str(fault).startswith("Symlink loop"):
                raise
            raise EnvironmentFault(
                f"a link leads back to itself: {str(fault).removeprefix('Symlink loop from ')}",
                fix="delete the link, or give another path",
            ) from fault
    except CpmixError as fault:
        if isinstance(fault, InputError) and fault.path is not None:
            from cpmix_cli.runs.repair import fix_of  # imported here: it imports pandas

            fault.fix = fix_of(fault)
        ranks.speak_early(fault)
        console.error(fault)
        raise typer.Exit(fault.exit_code) from fault
    except BrokenPipeError:  # the reader of the pipe closed it (cpmix ... | head)
        with suppress(BrokenPipeError):
            console.flush()
        raise typer.Exit(0) from None


def _flag_error(fault: TyperException, words: Sequence[str], command: TyperCommand | TyperGroup) -> UsageError:
    """Return an error that Typer found in a command line as an error with the flag, its value and a fix.

    Args:
        fault: an unknown, missing or invalid flag or argument.
        words: words after the name of the command.
        command: the command.
    """
    option, parameter = getattr(fault, "option_name", ""), getattr(fault, "param", None)
    flags: dict[str, Any] = {name: known for known in command.params for name in known.opts if name.startswith("-")}
    called = "cpmix" if isinstance(command, TyperGroup) else f"cpmix {command.name}"
    if option in flags and flags[option].is_flag:
        return UsageError(f"{option} takes no value", fix=f"give {option} alone")
    if option in flags:
        return _without_value(option, flags[option].help)
    if option:
        known = nearest(option.strip("-"), [flag.strip("-") for flag in flags])
        change = "".join(f"give --{name} in place of {option}" for name in known) or quoted("drop", option)
        return UsageError(f"{called} has no flag {option}", fix=f"{change}; {called} --help lists all flags")
    if parameter is None:
        return UsageError(fault.format_message(), fix=f"drop them; {called} --help lists the arguments and flags")
    is_flag = parameter.opts[0] in flags
    name = parameter.opts[0] if is_flag else parameter.metavar
    if not fault.message:
        return UsageError(f"{name} is missing", fix=f"give {name}: {parameter.help}")
    pairs = [(word, after) for word, after in pairwise(words)] + [
        tuple(word.split("=", 1)) for word in words if "=" in word
    ]
    given = [value for flag, value in pairs if flag in parameter.opts] if is_flag else words[:1]
    reason = fault.message.removeprefix("Input should be ").partition(",")[0]
    low, high = parameter.min, parameter.max
    wanted = "a number" if low is None else f"a number from {low} " + ("up" if high is None else f"to {high}")
    return UsageError(f"{' '.join([name, *given[-1:]])} is not {reason}", fix=f"give {name} {wanted}")


def _without_value(flag: str, help: str) -> UsageError:
    return UsageError(f"{flag} has no value", fix=f"give {flag} a value: {help}")


class _Command(TyperCommand):
    """Command whose errors, also those of its flags, name it."""

    def make_context(self, info_name: str | None, args: list[str], *rest: Any, **more: Any) -> Any:
        console.command, words = str(self.name), list(args)
        flags: dict[str, Any] = {name: known for known in self.params for name in known.opts if name.startswith("--")}
        for flag, after in pairwise(words[: words.index("--")] if "--" in words else words):
            if after in flags and flag in flags and not flags[flag].is_flag:  # Typer would take --json as the value
                raise _without_value(flag, flags[flag].help)
        try:
            return super().make_context(info_name, args, *rest, **more)
        except TyperException as fault:
            raise _flag_error(fault, words, self) from fault


class _Commands(TyperGroup):
    """Click group that lists the commands in two panels and prints errors through console."""

    def main(self, *args: Any, **kwargs: Any) -> Any:
        # A process may run several command lines; --json of one must not affect the next.
        console.as_json, console.command = False, ""
        return super().main(*args, **kwargs)

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        width = max(map(len, self.commands))
        for panel, names in COMMANDS.items():
            with formatter.section(panel):
                formatter.write_dl([(name.ljust(width), str(self.commands[name].help)) for name in names])

    def make_context(self, *args: Any, **kwargs: Any) -> Any:
        with _explained():  # --help and --version print here, which may fail
            words = list(args[1])
            # The flag itself is parsed after the words of a command, whose errors are to be JSON too.
            console.as_json = "--json" in words
            try:
                return super().make_context(*args, **kwargs)
            except TyperException as fault:
                if not words:  # the help of cpmix
                    raise
                raise _flag_error(fault, words, self) from fault

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        if self.get_command(ctx, args[0]) is None and not args[0].startswith("-"):
            raise UsageError(f"cpmix has no command {args[0]}", fix=give_one_of(args[0], self.commands))
        return super().resolve_command(ctx, args)

    def invoke(self, ctx: Any) -> Any:
        with _explained():
            try:
                Path.cwd()
            except OSError as fault:
                raise EnvironmentFault(
                    f"the working directory is not there any more: {fault.strerror}", fix="cd to a folder that is there"
                ) from fault
            return super().invoke(ctx)


app = typer.Typer(
    cls=_Commands,
    name="cpmix",
    help="Long-tailed image recognition with Confusion-Pairing Mixup, from the data set to the confusion report.",
    epilog="First run: cpmix run digits; or cpmix build-lt digits, then follow the 'next:' line of each command. "
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
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    # Commands that do not train run on rank 0 only: several ranks would write the same files.
    if context.invoked_subcommand not in TRAINING and ranks.is_later(os.environ):
        raise typer.Exit


# -- before torch is imported ------------------------------------------------------------------------------------------


def _check_recipe(
    options: flags.TrainingOptions | flags.BenchOptions,
    name: str | None,
    data: Path | None,
    *phases: Path,
    written: Sequence[Path] = (),
) -> None:
    """Check --recipe, --set and --epochs: see check_request(); `written` are the phase folders to be written."""
    from cpmix_cli.recipe.early_checks import check_request, was_made_with_plugin

    if options.recipe == "":  # an unset variable of a shell
        raise UsageError("--recipe is empty", fix="give a name that cpmix recipes lists, or drop the flag")
    if ranks.find(os.environ).size > 1:  # the command checks it as well, where an error of one rank ends all
        return
    if name is not None or options.settings or options.epochs is not None:
        try:
            check_request(name, options.settings, options.epochs, data=data, phases=phases)
        except UsageError as fault:
            made = [phase for phase in (*written, *phases) if was_made_with_plugin(phase)]
            if not made:
                raise
            # Perhaps it names functions of that plugin. Imported here: they import pandas.
            from cpmix_cli.runs.folders import PhaseFolder
            from cpmix_cli.runs.plugin_needs import needed_by

            raise needed_by([PhaseFolder(phase.parent, phase.name) for phase in made]) or fault from None


def _look_for_state(options: flags.TrainingOptions, phase: Path) -> None:
    """If the phase has a training state on disk, make Ctrl-C exit with 75 from now on."""
    if not options.overwrite and os.path.lexists(phase / TRAINING_STATE):
        signals.state_is_saved()


def _before_stage1(options: flags.TrainStage1Options) -> None:
    if options.recipe is not None or options.init is None:  # else the weights decide the recipe
        _check_recipe(options, options.recipe, options.data, written=[options.out / "stage1"])
    _look_for_state(options, options.out / "stage1")


def _before_later_phases(options: flags.TrainStage2Options | flags.FinetuneOptions) -> None:
    # A guess at the source of --from, without reading it; the command checks it.
    given = options.from_folder
    run, named = (given.parent, given.name) if given.name in PHASES else (given, None)
    own, sources = "stage2", ["stage1"]
    if isinstance(options, flags.FinetuneOptions):
        wanted = options.phase or (named if named != "finetune" else None)
        own, sources = "finetune", [wanted] if wanted else ["stage2", "stage1"]
    written = (options.out or run) / own
    _check_recipe(options, options.recipe, None, *(run / source for source in sources), written=[written])
    _look_for_state(options, written)


def _before_bench(options: flags.BenchOptions) -> None:
    if not options.world_sizes and (options.cores is not None or options.link is not None):
        raise UsageError("--cores and --link are a projection's", fix="say for how many ranks: --world-size 1,8,64")
    _check_recipe(options, options.recipe or (None if options.data else "cifar100-lt/cpmix"), options.data)


# -- the commands ------------------------------------------------------------------------------------------------------

COMMANDS: dict[str, dict[str, type]] = {
    "Commands": {
        "build-lt": flags.BuildOptions,
        "train-stage1": flags.TrainStage1Options,
        "train-stage2": flags.TrainStage2Options,
        "finetune": flags.FinetuneOptions,
        "evaluate": flags.EvaluateOptions,
        "confusion-report": flags.ReportOptions,
    },
    "Helpers": {
        "run": flags.RunOptions,
        "status": flags.StatusOptions,
        "compare": flags.CompareOptions,
        "results": flags.ResultsOptions,
        "recipes": flags.RecipesOptions,
        "methods": flags.MethodsOptions,
        "predict": flags.PredictOptions,
        "export": flags.ExportOptions,
        "misclassified": flags.MisclassifiedOptions,
        "figure": flags.FigureOptions,
        "import-weights": flags.ImportOptions,
        "bench": flags.BenchOptions,
    },
}
"""Panel of `cpmix --help` -> command -> its options; commands/NAME.py runs the command."""
BEFORE: dict[str, Callable[[Any], None]] = {
    "train-stage1": _before_stage1,
    "train-stage2": _before_later_phases,
    "finetune": _before_later_phases,
    "bench": _before_bench,
}


def _perform(name: str, options: Any) -> int | None:
    """Do one command in this process; return its exit code. `cpmix run` does several."""
    console.command = name
    from cpmix_cli.recipe import plugins  # imported here: --help needs none of it

    plugin: Path | None = getattr(options, "plugin", None)
    try:
        # Of several ranks, each reads its file after all have met: an error of one rank ends all.
        with plugins.joined(None if name in TRAINING and ranks.find(os.environ).size > 1 else plugin):
            if name in BEFORE:
                BEFORE[name](options)
            if name not in WITHOUT_TORCH and "torch" not in sys.modules and not ranks.is_later(os.environ):
                console.note(f"{name}: loading torch")
            command = import_module(f"cpmix_cli.commands.{name.replace('-', '_')}")
            code: int | None
            with (
                ranks.together(_common_flags(name, options)) if name in TRAINING else nullcontext(),
                plugins.joined(plugin),
                plugins.explained(),
            ):
                if name not in WITHOUT_TORCH:
                    plugins.run_code()
                # No command imports another, so the one that does others gets them passed in.
                code = command.run(options, _perform) if name == "run" else command.run(options)
    except InputError as fault:
        from cpmix_cli.runs.plugin_needs import PluginMissing

        if isinstance(fault, PluginMissing):  # of `run`, not of its step
            fault.say_how([name, *flags.words_of(options)])
        raise
    return code


def _add(name: str, kind: type) -> None:
    def run(json: bool, **given: Any) -> None:
        options = kind(**{flag: _at_home(value) for flag, value in given.items() if value is not None})
        if code := _perform(name, options):
            raise typer.Exit(code)

    keyword = inspect.Parameter.KEYWORD_ONLY
    parameters = [*_parameters(kind), inspect.Parameter("json", keyword, default=False, annotation=flags.Json)]
    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    text, example = str(inspect.getdoc(kind)).split("\n\n")
    app.command(name, cls=_Command, help=text, epilog=example)(run)


_BY_CONTENT = ("--data", "--data-root", "--init", "--teacher", "--plugin")
"""Flags whose files are compared between ranks by their content; each machine may have its copy at another place."""


def _common_flags(name: str, options: Any) -> dict[str, str]:
    """Return the command and its given flags with their values, which must be the same at all ranks."""
    given = {
        flag: " ".join(value) if isinstance(value, list) else "given" if value is True else str(value)
        for flag, value in flags.given_flags(options).items()
        if flag not in _BY_CONTENT
    }
    if (plugin := getattr(options, "plugin", None)) is not None:
        given["--plugin"] = "unreadable"
        with suppress(OSError):
            given["--plugin"] = hashlib.sha256(Path(plugin).read_bytes()).hexdigest()
    return {"command": name, "version": __version__, **given}


def _at_home(value: Any) -> Any:
    """Return the value of a flag with ~ in its paths resolved, which a shell leaves in --out=~/x and in quotes."""
    if isinstance(value, list):
        return [_at_home(one) for one in value]
    with suppress(RuntimeError):  # ~name of no user, or a user without a home: a name like any other
        return value.expanduser() if isinstance(value, Path) else value
    return value


def _parameters(kind: type) -> Iterator[inspect.Parameter]:
    """Yield the flags of a command as Typer parameters, the shared training flags last."""
    shared = set(inspect.get_annotations(flags.TrainingOptions)) - set(inspect.get_annotations(kind))
    last = shared if issubclass(kind, flags.TrainingOptions) else set()
    for field in sorted(fields(kind), key=lambda field: field.name in last):
        option = field.metadata.get("option", None if field.default_factory is list else field.default)
        default = inspect.Parameter.empty if option is MISSING else option
        yield inspect.Parameter(field.name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=field.type)


for panel in COMMANDS.values():
    for name, kind in panel.items():
        _add(name, kind)
