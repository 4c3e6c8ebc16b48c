"""Pictures, tables and the page of confusion-report; pure functions of arrays."""

import logging

# Before matplotlib is imported: it warns of a home it cannot write its font cache to (it takes a temporary folder), and
# once a font of a cache that another, deleted environment left. Neither changes a picture.
logging.getLogger("matplotlib").setLevel(logging.ERROR)
