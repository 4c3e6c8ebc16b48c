"""Runs that a report's page compares with: recorded with links resolved, and found again for a later report."""

import os
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from cpmix_cli.artifacts import files
from cpmix_cli.runs import run_json
from cpmix_cli.runs.folders import beside
from cpmix_cli.runs.run_json import ComparedReference, ReportRecord
from cpmix_cli.runtime import console
from cpmix_cli.runtime.errors import InputError


def references(given: Sequence[Path], run: Path) -> list[dict[str, str]]:
    """Return the records of runs that a page of the run folder `run` compares with, see ComparedReference."""
    places = [place.resolve() for place in given]
    return [{"relative": os.path.relpath(place, run.resolve()), "absolute": str(place)} for place in places]


def record_of(index: Path, folder: Path) -> ReportRecord | None:
    """Return the record of the report that wrote a page: of any phase, as all of them write the same page.

    Args:
        index: the page.
        folder: folder of a report; its record is returned if no report of this page is found.
    """
    page, own = None, None
    with suppress(InputError):
        page = files.sha256(files.read_bytes(index))
    for path in [folder / files.RUN, *index.parent.glob(f"*/{files.RUN}")]:
        with suppress(InputError):
            record = run_json.read_run(path.parent, ReportRecord)
            own = own or (record if path.parent == folder else None)
            if record.page == page:
                return record
    return own


def places_in(record: ReportRecord | None, run: Path) -> list[Path]:
    """Return the folders that a report in the run folder `run` compares with: where they are, else where they were."""
    return [] if record is None else [_found(reference, run) for reference in record.compared]


def warn_of_unknown(record: ReportRecord | None, index: Path, folder: Path, again: str) -> None:
    """Warn if a page may compare with runs that are not recorded. A new report of one run replaces it.

    Args:
        record: result of record_of().
        index: the page.
        folder: folder of the report.
        again: command of this report, to which --compare can be added.
    """
    if record is None:
        if files.is_there(folder / files.RUN):
            console.warn(f"{folder / files.RUN} is damaged; if {index} compared with other runs: {again} --compare RUN")
    elif record.made_from.inputs().get("compared") and not record.compared:
        console.warn(
            f"{index} no longer compares with other runs: an older cpmix did not record which; to name them: "
            f"{again} --compare RUN"
        )


def _found(reference: ComparedReference, run: Path) -> Path:
    near = beside(run, reference.relative)
    with suppress(OSError):  # a folder above it cannot be searched
        if near.is_dir():
            return near
    return Path(reference.absolute)
