"""`python -m cpmix_cli` is `cpmix`."""

from cpmix_cli.cli import main

main()
