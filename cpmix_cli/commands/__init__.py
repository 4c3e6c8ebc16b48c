"""One file a command, each a run() to be read top to bottom."""
