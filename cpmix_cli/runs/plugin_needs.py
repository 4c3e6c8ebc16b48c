"""What a run needs of a plugin: the file that its records name, by name and hash, given again with --plugin."""

import os
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from cpmix_cli.artifacts import files
from cpmix_cli.recipe import plugins
from cpmix_cli.runs.folders import PhaseFolder
from cpmix_cli.runs.run_json import BegunRecord, PluginReference
from cpmix_cli.runtime import console
from cpmix_cli.runtime.errors import InputError

FLAG = "--plugin"


class PluginMissing(InputError):
    """Run that needs a plugin which is not given. The command line completes the fix, since it knows the command."""

    def __init__(self, folder: PhaseFolder, plugin: PluginReference) -> None:
        super().__init__(f"{folder.path} needs the plugin {plugin.name}, sha256 {plugin.sha256}")
        self.plugin = plugin

    def say_how(self, words: Sequence[object]) -> None:
        """Make the fix: the command of these words with the plugin, where its file is as it was."""
        place = _place(self.plugin)
        command = console.typed(*words, FLAG, place)
        if not place.is_file():
            command = console.typed(*words, FLAG, "FILE.py")
            self.fix = f"{place} is not there; give the file in place of FILE.py: {command}"
        elif not _is_as_recorded(self.plugin, place):
            self.fix = f"restore {place}, which has changed, then: {command}"
        else:
            self.fix = command


def check_plugin(folder: PhaseFolder) -> None:
    """Check that the plugin which a phase needs is given.

    A phase needs a plugin if its recipe names a function of it. The file must be the same if the phase itself depends
    on such a function.

    Args:
        folder: a begun phase that the command goes on with, or whose network it uses.

    Raises:
        PluginMissing: no plugin is given.
        InputError: it is another file than the one that the phase was made with.
    """
    begun, given = folder.begun(), plugins.current()
    if begun.plugin is None:
        return
    if given is None:
        raise PluginMissing(folder, begun.plugin)
    if begun.made_from.plugin not in ("none", given.sha256):
        raise InputError(
            f"{folder.path} was made with another plugin: {begun.plugin.name}, sha256 {begun.plugin.sha256}; that of "
            f"{given.path} is {given.sha256}",
            needed_by=FLAG,
            fix=f"restore the file as it was, or train {folder.phase} again with this one and --overwrite",
        )


def needed_by(phases: Sequence[PhaseFolder]) -> PluginMissing | None:
    """Return the error of the first of these phases that needs a plugin, if none is given; else None."""
    for folder in phases if plugins.current() is None else ():
        with suppress(InputError):
            if folder.is_begun and (plugin := folder.begun().plugin) is not None:
                return PluginMissing(folder, plugin)
    return None


def plugin_words(begun: BegunRecord) -> list[str]:
    """Return the words that give a phase's plugin again; an empty list if it needs none."""
    return [] if begun.plugin is None else [FLAG, str(_place(begun.plugin))]


def plugin_words_of(folder: PhaseFolder) -> list[str]:
    """Return plugin_words() of a begun phase; an empty list if its record cannot be read."""
    with suppress(InputError):
        return plugin_words(folder.begun())
    return []


def reference(given: plugins.Plugin) -> dict[str, str]:
    """Return the record of a plugin, see PluginReference."""
    return {"name": given.path.name, "sha256": given.sha256, "path": str(given.path.resolve())}


def _place(plugin: PluginReference) -> Path:
    """Return the path of a plugin as the user typed it, or from the working directory if it is below that."""
    given, recorded = plugins.current(), Path(plugin.path)
    if given is not None and str(given.path.resolve()) == plugin.path:
        return given.path
    here = Path(os.path.realpath("."))
    return recorded.relative_to(here) if recorded.is_relative_to(here) else recorded


def _is_as_recorded(plugin: PluginReference, place: Path) -> bool:
    """Return whether the file has the recorded hash; its code does not run."""
    with suppress(InputError):
        return files.sha256(files.read_bytes(place, limit=plugins.MAX_BYTES)) == plugin.sha256
    return False
