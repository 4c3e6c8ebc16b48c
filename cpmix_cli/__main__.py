"""`cpmix`, which is also `python -m cpmix_cli`."""

import os
import sys

from cpmix_cli.runtime import signals


def main() -> None:
    """Run one command line. The signals are taken over before anything else is imported."""
    signals.install()
    try:
        from cpmix_cli.runtime import console, ranks

        console.set_up()
        console.mute(ranks.is_later(os.environ))
        if asked := os.environ.get("_CPMIX_COMPLETE"):  # a shell asks at TAB; other instructions are Typer's
            from cpmix_cli.completion import answer

            if (answered := answer(asked, os.environ)) is not None:
                console.raw(answered[0])
                sys.exit(answered[1])
        from cpmix_cli.cli import app

        app(prog_name="cpmix")
    except signals.Stopped as stop:
        from cpmix_cli.runtime import console

        fault = signals.interrupted("what was published stays")
        fault.exit_code = int(str(stop.code))
        console.error(fault)
        raise
    except MemoryError:  # before the command began, which explains its own
        from cpmix_cli.runtime import console
        from cpmix_cli.runtime.errors import EnvironmentFault

        exhausted = EnvironmentFault("out of memory: that of the CPU is used up", fix="give the process more memory")
        console.error(exhausted)
        sys.exit(exhausted.exit_code)
    finally:
        signals.ignore()
        from cpmix_cli.runtime import console

        console.drop_unwritten_notes()


if __name__ == "__main__":
    main()
