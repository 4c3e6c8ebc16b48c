"""cpmix: Confusion-Pairing Mixup for long-tailed image recognition.

In Python, load() gives a trained network as an object with `class_names` and `predict()`.
"""

from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from cpmix_cli.evaluation.trained_model import TrainedModel

__version__ = "0.1.0"


def load(
    run: str | PathLike[str],
    *,
    phase: str | None = None,
    device: str = "auto",
    plugin: str | PathLike[str] | None = None,
) -> "TrainedModel":
    """Load a trained network, to classify images in Python as `cpmix predict` does.

    torch is imported by the first call. Its number of CPU threads stays as it is. A line on stderr names the phase that
    is taken.

    Args:
        run: run folder, or the folder of one of its phases.
        phase: stage1, stage2 or finetune; None: the last finished phase.
        device: auto, cpu or cuda.
        plugin: the file of --plugin that the run was made with; its code runs. None for a run without.

    Returns:
        A model with `class_names`, the names of the C classes in their order, and `predict(images)`, which takes paths
        or uint8 arrays and returns a pandas DataFrame.

    Raises:
        CpmixError: base class of all errors, in cpmix_cli.runtime.errors; it has the text, with a fix. UsageError: the
            phase or device is unknown, or the plugin has an error. InputError: no such phase is finished, it was
            trained on points or with another plugin, or a file of it is damaged. EnvironmentFault: the device is
            missing.
    """
    from cpmix_cli.evaluation.trained_model import load_model

    file = None if plugin is None else Path(plugin).expanduser()
    return load_model(Path(run).expanduser(), phase, device, file)
