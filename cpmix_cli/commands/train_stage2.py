"""train-stage2: train epochs E_cp + 1 to E with the mixed terms. Paper: Algorithm 1, second part, and Eq. (13).

Weights, momentum, schedule and confusion counts continue from stage 1. Several stage 2s can start from one stage 1.
"""

from cpmix_cli.evaluation.prediction import accuracy_on_test
from cpmix_cli.flags import TrainStage2Options
from cpmix_cli.runs.phase_choice import choose_phase, locate
from cpmix_cli.runtime.errors import UsageError
from cpmix_cli.runtime.text import quoted
from cpmix_cli.training.phase import continued, train


def run(options: TrainStage2Options) -> None:
    """Train from the end of stage 1 to the last epoch.

    Raises:
        UsageError: --from names another phase.
        CpmixError: see training.phase.continued() and train().
    """
    root, named = locate(options.from_folder)
    if named not in (None, "stage1"):
        raise UsageError(f"train-stage2 starts from stage 1, not from {named}", fix=f"give {quoted('--from', root)}")
    source = choose_phase(root, "stage1", ("stage1",))
    train(continued(options, source, "stage2", accuracy_on_test))
