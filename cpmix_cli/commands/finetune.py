"""finetune: finetune the head with class-balanced sampling. Paper: Sec. 5.1, B.3 (Table 6, last rows).

Differs: the paper gives no loss, schedule or sampler. Here: cross entropy, class-uniform sampling, a cosine schedule to
0, the head kept, batch norm and the rest of the network frozen. Each is a recipe key.
"""

from cpmix_cli.evaluation.prediction import accuracy_on_test, balanced_accuracy
from cpmix_cli.flags import FinetuneOptions
from cpmix_cli.runs.folders import PhaseFolder
from cpmix_cli.runs.next_command import next_command
from cpmix_cli.runs.phase_choice import choose_phase, locate
from cpmix_cli.runtime import console, hardware, ranks
from cpmix_cli.runtime.errors import InputError
from cpmix_cli.runtime.rounding import percent
from cpmix_cli.training.phase import PhaseRequest, continued, train


def run(options: FinetuneOptions) -> None:
    """Finetune the head from the last finished stage. With a val split, warn if val gets worse.

    Raises:
        InputError: only stage 1 of two stages is done, and neither --phase nor --from names it.
        CpmixError: see training.phase.continued() and train().
    """
    root, named = locate(options.from_folder)
    phase = options.phase or (named if named != "finetune" else None)
    source = choose_phase(root, phase, ("stage1", "stage2"))
    asked = continued(options, source, "finetune", accuracy_on_test)
    recipe = asked.recipe
    if phase is None and source.phase == "stage1" and recipe.stage2 is not None and recipe.finetune is not None:
        raise InputError(
            f"{root} has a stage 2 in its recipe, but only stage 1 is done; --phase stage1 finetunes that",
            fix=next_command(root),
        )
    train(asked)
    if ranks.current().first and asked.folder.done and "val" in asked.dataset.splits:
        _check_on_val(asked, source)


def _check_on_val(asked: PhaseRequest, source: PhaseFolder) -> None:
    """Report the balanced accuracy on val before and after the finetune, and warn if it fell."""
    device = hardware.use_device(asked.options.device, asked.options.threads)
    before, after = (balanced_accuracy(phase, asked.dataset, "val", device) for phase in (source, asked.folder))
    console.note(f"finetune: balanced accuracy on val {percent(before, 2)} before, {percent(after, 2)} after")
    if after < before:
        console.warn(
            f"the finetune makes val worse by {percent(before - after, 2)} points. The network without it is in "
            f"{source.path}: name it with --phase {source.phase}"
        )
