"""`cpmix`, which is also `python -m cpmix_cli`."""

from cpmix_cli import console, signals


def main() -> None:
    """Run one command line. The signals are taken over before anything slow is imported."""
    signals.install()
    console.set_up()
    try:
        from cpmix_cli.cli import app

        app(prog_name="cpmix")
    except signals.Stopped as stop:
        console.error(str(signals.interrupted("what was published stays")), int(str(stop.code)))
        raise


if __name__ == "__main__":
    main()
