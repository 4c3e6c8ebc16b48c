"""Pictures hold at any size: no text overlaps another or leaves its figure; grouped matrices only of many classes."""

import shutil
from pathlib import Path

from helpers import must


def test_the_grouped_matrix_of_an_earlier_report_is_removed(digits_run: Path) -> None:
    folder = digits_run / "confusion" / "finetune"
    for kind in ("png", "svg"):
        shutil.copy(folder / f"class_accuracy.{kind}", folder / f"confusion_matrix_grouped.{kind}")
    must("confusion-report", "--from", digits_run, "--overwrite")
    assert sorted(path.stem for path in folder.glob("*.png")) == [
        "class_accuracy",
        "confusion_histogram",
        "confusion_matrix",
    ]
    assert not list(folder.glob("*grouped*"))
