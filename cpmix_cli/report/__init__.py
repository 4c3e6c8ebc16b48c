"""Figures and page of confusion-report, and the paper's figures: pure functions of arrays and text."""

import logging

# Before matplotlib is imported. It warns if the home folder is not writable (it uses a temporary folder instead), or if
# the font cache names fonts of a deleted environment. Neither changes a figure.
logging.getLogger("matplotlib").setLevel(logging.ERROR)
