"""results: show the tables of a results file, or update those in a Markdown file."""

from cpmix_cli.artifacts import files
from cpmix_cli.flags import ResultsOptions
from cpmix_cli.results.results_file import read_results
from cpmix_cli.results.results_tables import sheets_of, updated
from cpmix_cli.results.table_formats import plain
from cpmix_cli.runtime import console
from cpmix_cli.runtime.errors import InputError, counted


def run(options: ResultsOptions) -> None:
    """Show the tables of a results file, or update those in a Markdown file.

    Raises:
        InputError: the results file is damaged, or the Markdown file has a wrong mark, no mark, or another encoding.
        EnvironmentFault: the Markdown file cannot be written.
    """
    rows = read_results(options.file)
    if options.update is None:
        lines = [line for sheet in sheets_of(rows) for line in (*plain(sheet, console.columns()), "")]
        console.result({"rows": rows}, lines=lines[:-1])
        return
    path = options.update.resolve()  # publishing replaces a link
    data = files.read_bytes(path)
    try:
        text, count = updated(str(options.update), data.decode(), rows)
    except UnicodeDecodeError as fault:
        raise InputError(f"{options.update} is no UTF-8 text: {fault}", fix="save it as UTF-8") from fault
    changed = text.encode() != data
    if changed:
        files.publish_out(path, text.encode())
    line = f"{options.update}: {counted(count, 'table')}, {'updated' if changed else 'up to date'}"
    console.result({"file": str(options.update), "tables": count, "changed": changed}, lines=[line])
