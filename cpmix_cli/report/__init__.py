"""Pictures, tables and pages of confusion-report, figure and compare; pure functions of arrays and text."""

import logging

# Before matplotlib is imported: it warns of a home it cannot write its font cache to (it takes a temporary folder), and
# once a font of a cache that another, deleted environment left. Neither changes a picture.
logging.getLogger("matplotlib").setLevel(logging.ERROR)
