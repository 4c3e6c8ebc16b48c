"""train-stage1: train epochs 1 to E_cp on natural batches and collect confusion pairs. Paper: Algorithm 1, part 1."""

import re
from dataclasses import replace
from functools import partial
from pathlib import Path

from torch import Tensor

from cpmix_cli.artifacts import files, tables
from cpmix_cli.artifacts.seals import check_seal, read_header
from cpmix_cli.artifacts.tensors import read_tensors, tensors_digest
from cpmix_cli.data.batches import published_normalisation
from cpmix_cli.data.dataset import Dataset, open_dataset
from cpmix_cli.evaluation.prediction import accuracy_on_test, read_model
from cpmix_cli.flags import TrainStage1Options
from cpmix_cli.models import Classifier
from cpmix_cli.recipe import loading, schema
from cpmix_cli.recipe.libraries import is_library_name
from cpmix_cli.runs.folders import PhaseFolder
from cpmix_cli.runs.phase_choice import choose
from cpmix_cli.runtime import console
from cpmix_cli.runtime.errors import InputError, UsageError, counted, shortened
from cpmix_cli.runtime.text import quoted
from cpmix_cli.training.checks import check_fits
from cpmix_cli.training.objective import compile_stage
from cpmix_cli.training.phase import PhaseRequest, train
from cpmix_cli.training.plan import PhaseContext, Plan, fresh_state, make_plan
from cpmix_cli.training.pretrained import how_to_import, keep_head_rows, load_backbone, sha_of_published, without_init
from cpmix_cli.training.starting_point import default_recipe, weights_of
from cpmix_cli.training.state import TrainingState


def run(options: TrainStage1Options) -> None:
    """Train from fresh weights, or those of --init, to the end of stage 1.

    Raises:
        UsageError: --teacher is given and no term uses it, or it is missing and a term requires it.
        InputError: the --init file is damaged or of another network; the --teacher was trained on other data, or with
            another normalisation.
        CpmixError: see training.phase.train().
    """
    if options.data is None:
        raise UsageError(
            "--data is missing: the data set folder",
            fix="give a folder that build-lt has written; for the handwritten digits: cpmix build-lt digits",
        )
    dataset = open_dataset(options.data, data_root=options.data_root)
    if options.recipe is not None:
        options = replace(options, recipe=loading.of_dataset(options.recipe, dataset.record.recipe))
    elif options.init is not None and (chosen := default_recipe(options.init, dataset, options.settings)):
        options = replace(options, recipe=chosen[0], settings=chosen[1])
    recipe = loading.load(
        options.recipe or dataset.recipe(),
        settings=options.settings,
        epochs=options.epochs,
        seed=options.seed,
        rho=dataset.record.rho,
    )
    check_fits(
        recipe, dataset.num_classes, dataset.shape, has_statistics=dataset.has_statistics, settings=options.settings
    )
    teacher = _choose_teacher(options.teacher, recipe, dataset)
    init, begun = (None, None) if options.init is None else weights_of(options.init)
    _check_init(recipe, init)
    inputs = {} if init is None else {"init": init}
    if teacher is not None:
        inputs["teacher"] = teacher.path / files.MODEL
    folder, prepared = PhaseFolder(options.out, "stage1"), partial(_prepare, init, begun, teacher)
    if init is not None and init.resolve() == (folder.path / files.MODEL).resolve():
        raise UsageError(
            f"{init} is what this command writes", needed_by="--init", fix="write elsewhere with --out FOLDER"
        )
    train(PhaseRequest(folder, None, recipe, dataset, options, prepared, accuracy_on_test, inputs))


def _check_init(recipe: schema.Recipe, init: Path | None) -> None:
    """Check that --init is a safetensors file, and was made from the weights that the recipe names, if any."""
    wanted = recipe.model.init
    sha = sha_of_published(wanted)
    if init is not None and not init.exists() and init.parent.name not in files.PHASES:
        raise InputError(
            f"cannot read {init}: it does not exist",
            needed_by="--init",
            fix="correct the path, or convert a checkpoint first: cpmix import-weights CHECKPOINT --sha256 HASH",
        )
    if init is not None and init.exists():
        _check_format(init, sha)
    if init is None and recipe.model.init_head != "by-name":
        why = {"new": "the head is new anyway", "class-means": "the features are random, and their means say nothing"}
        raise UsageError(
            f'model.init_head = "{recipe.model.init_head}": without --init {why[recipe.model.init_head]}',
            fix="give --init with pretrained weights, or drop the key: --set model.init_head=by-name",
        )
    if not wanted:
        return
    how, made = how_to_import(wanted)
    fix = f"give --init {quoted(made)} as well; to make it, {how}"
    if init is None:
        raise UsageError(f'model.init = "{wanted}": the recipe starts from these weights', needed_by="--init", fix=fix)
    metadata = read_header(init)[1]
    origin = metadata if isinstance(metadata, dict) else {}
    name, found = (str(origin.get(key, "")) for key in ("file", "sha256"))
    if not found.startswith(sha):
        of = f"was made from {name}, sha256 {found}" if found else "does not say what it was made from"
        raise InputError(
            f'{init} {of}; the recipe has model.init = "{wanted}", sha256 {sha}',
            needed_by="--init",
            fix=f"{fix}; or take any weights with --set model.init=",
        )


def _check_format(init: Path, sha: str) -> None:
    """Check that a file is safetensors, not a checkpoint of PyTorch, whose sha256 is `sha` ("": unknown)."""
    try:
        if not _is_checkpoint(init):
            read_header(init)
            return
    except InputError as fault:
        fix = fault.fix or "give a safetensors file; cpmix import-weights makes one of a PyTorch checkpoint"
        # The weights of a phase have another fix: to train it again.
        raise fault if init.name == files.MODEL else InputError(fault.message, needed_by="--init", fix=fix) from fault
    published = sha or next(iter(re.findall(r"-([0-9a-f]{8,64})\.", init.name)), "")
    digest = quoted(published) if published else f"$(sha256sum < {quoted(init)} | cut -c1-64)"
    made = init.with_suffix(".safetensors")
    command = f"{console.typed('import-weights', init, '--sha256')} {digest}"
    if made == init:  # a checkpoint by its content
        made = init.with_suffix(".imported.safetensors")
        command += f" --out {quoted(made)}"
    raise InputError(
        f"{init} is a PyTorch checkpoint; cpmix trains from safetensors alone",
        needed_by="--init",
        fix=f"give --init {quoted(made)}; to make it: {command}",
    )


def _is_checkpoint(path: Path) -> bool:
    """Return whether a file is named as PyTorch checkpoints are, or starts as they do: a ZIP archive or a pickle."""
    with files.open_file(path) as file:
        start = file.read(9)
    if path.suffix.lower() in (".pth", ".pt", ".bin", ".ckpt") or start.startswith(b"PK\x03\x04"):
        return True
    # The length of a safetensors header may begin as a pickle does, but its JSON follows.
    return start[:1] == b"\x80" and start[1:2] <= b"\x05" and start[8:] != b"{"


def _choose_teacher(run: Path | None, recipe: schema.Recipe, dataset: Dataset) -> PhaseFolder | None:
    """Return the phase that --teacher names, or its last finished phase; None without a teacher.

    Checks that a term uses the teacher, and that both networks have the same data set and normalisation.
    """
    taught = [term.name for term in compile_stage(recipe.stage1) if "teacher" in term.functions]
    if run is None:
        if taught:
            raise UsageError(f"stage1.terms.{taught[0]} learns from a teacher", fix="name its run: --teacher RUN")
        return None
    if not run.exists():
        raise InputError(
            f"no run folder {run}",
            needed_by="--teacher",
            fix="give the folder of a trained run, such as --teacher ckpt/ride",
        )
    source = choose(run.parent if run.is_file() else run)  # --teacher may be a model.safetensors
    if source.record().dataset.fingerprint != dataset.fingerprint:
        raise InputError(
            f"{source.path} was trained on {source.record().dataset.name}, not on {dataset.name} in {dataset.folder}",
            needed_by="--teacher",
            fix=f"give --teacher a run that was trained with {quoted('--data', dataset.folder)}",
        )
    if not taught:
        raise UsageError(
            "no term of the recipe learns from a teacher",
            needed_by="--teacher",
            fix="give --set stage1.terms.erm.teacher=distillation as well",
        )
    own, student = source.recipe().data.normalisation, recipe.data.normalisation
    if (published_normalisation(own) or own) != (published_normalisation(student) or student):
        raise InputError(
            f'{source.path} learnt from images of data.normalisation = "{own}", the recipe has "{student}"',
            needed_by="--teacher",
            fix="give the run of another teacher"
            if is_library_name(own)
            else f"give --set data.normalisation={own} as well",
        )
    return source


def _prepare(
    init: Path | None, begun: PhaseFolder | None, teacher: PhaseFolder | None, context: PhaseContext
) -> tuple[Plan, TrainingState]:
    """Return the stage-1 plan, and a state with fresh or pretrained weights and empty confusion counts.

    Args:
        init: file of the weights to start from.
        begun: phase that they are of, if cpmix trained them.
        teacher: phase of the teacher.
        context: inputs of the plan and the state.
    """
    plan = make_plan(context, "stage1")
    state = fresh_state(context)
    if init is not None:
        recipe, shape = context.recipe, context.recipe.data.input_shape(context.dataset.shape)
        tensors = _read_weights(init, context.inputs["init"])
        taken = load_backbone(state.model, tensors, init, recipe.model, shape)
        head = "the head is new" if recipe.model.init_head != "class-means" else "the head is that of class means"
        if begun is not None and recipe.model.init_head == "by-name":
            head = _keep_head(state.model, tensors, begun, context.dataset.class_names)
        console.note(f"starts from {counted(taken, 'tensor')} of {init}; {head}")
    elif is_library_name(context.recipe.model.name):
        console.note(without_init(context.recipe.model.name))
    elif frozen := context.recipe.model.frozen:
        # Frozen batch norm keeps mean 0 and variance 1, so deep networks may overflow.
        console.note(f"without --init, {', '.join(frozen)} stay at random weights (model.frozen)")
    if teacher is not None:
        # Without its [evaluation], which changes weights only for the teacher's own evaluations.
        trained = teacher.recipe().model_copy(update={"evaluation": schema.Evaluation()})
        model = read_model(teacher, trained, context.dataset.num_classes, context.dataset.shape)
        plan = replace(plan, teacher=model.to(context.device).eval().requires_grad_(False))
    return plan, state


def _keep_head(model: Classifier, tensors: dict[str, Tensor], begun: PhaseFolder, classes: list[str]) -> str:
    """Keep the rows of the classes that a trained phase had, and return what became of the head, for a line.

    Args:
        model: network that starts from the phase.
        tensors: tensors of the phase.
        begun: the phase.
        classes: class names of the network.
    """
    known = tables.read_class_counts(*begun.output(files.CLASS_COUNTS))["class_name"].tolist()
    kept = keep_head_rows(model, tensors, classes, known)
    if not kept:
        why = "is of another kind" if kept is None else "knows none of these classes"
        return f"the head is new, as that of {begun.path} {why}"
    new = [name for name in classes if name not in kept]
    said = [f"the head keeps {len(kept)} of {counted(len(known), 'class', 'classes')} of {begun.path}"]
    said += [f"{shortened(new, 5)} {'is' if len(new) == 1 else 'are'} new"] if new else []
    return "; ".join(said)


def _read_weights(path: Path, sha: str) -> dict[str, Tensor]:
    tensors, metadata = read_tensors(path, sha)
    if isinstance(metadata, dict) and "tensors_digest" in metadata:  # written by import-weights
        check_seal(path, metadata, tensors_digest(tensors))
    return tensors
