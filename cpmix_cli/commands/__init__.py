"""One file per command, each with a run() to read from top to bottom."""
