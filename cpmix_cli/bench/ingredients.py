"""bench --ingredients: seconds of a training step of a recipe with each ingredient and without it."""

import statistics
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import torch

from cpmix_cli.artifacts.files import PHASES
from cpmix_cli.bench.loops import TimedLoop, TrainingLoop
from cpmix_cli.bench.measure import Memory, Timing, measure, prepare, random_data, training_set
from cpmix_cli.flags import BenchOptions
from cpmix_cli.recipe.loading import with_settings
from cpmix_cli.recipe.schema import Recipe
from cpmix_cli.runtime import console, hardware
from cpmix_cli.runtime.errors import UsageError, counted
from cpmix_cli.training.checks import check_fits
from cpmix_cli.training.inputs import TrainingData, training_data
from cpmix_cli.training.plan import PhaseContext, make_plan, rehearsal


class Ingredient(NamedTuple):
    """Settings "key=value" of a recipe with an ingredient and without it."""

    on: tuple[str, ...]
    off: tuple[str, ...]


_FINETUNE = "finetune.terms.erm"
_CHANNELS = ("partner=frequency-power", "power=1.0", "mix=channels", "p=0.25", "label=first")
INGREDIENTS = {
    "AutoAugment": Ingredient(("data.augment=crop-flip-autoaugment",), ("data.augment=crop-flip", "data.fill=0")),
    "Cutout": Ingredient(("data.cutout=16",), ("data.cutout=0",)),
    "alternating flips": Ingredient(("data.flip=alternating",), ("data.flip=random",)),
    "averaged weights": Ingredient(("optimizer.ema_epochs=5.0",), ("optimizer.ema_epochs=0.0",)),
    "three balanced experts": Ingredient(
        ("model.experts=3", "stage1.terms.erm.loss=balanced-experts", "stage1.terms.erm.taus=[0.0, 1.0, 2.0]"),
        ("model.experts=1", "stage1.terms.erm.loss=cross-entropy"),
    ),
    "H2T": Ingredient(
        (f"{_FINETUNE}.draw=class-uniform", *(f"{_FINETUNE}.{key}" for key in _CHANNELS)),
        (f"{_FINETUNE}.draw=class-uniform",),
    ),
}
"""Rows of the table: add one here. A row is timed in the first phase that its settings name, else in stage 1."""


class _Pair(NamedTuple):
    """Loops of one row, by their names."""

    phase: str
    on: str
    off: str


def run(options: BenchOptions) -> None:
    """Measure and print the table. Loops of equal recipes are one loop; all take turns in each round.

    Raises:
        EnvironmentFault: the device is missing.
        InputError: the data set is damaged, or contains points.
        UsageError: the recipe is wrong.
    """
    dataset = training_set(options.data, options.data_root)
    name, context, _ = prepare(options, dataset)
    contexts: dict[str, tuple[PhaseContext, str]] = {}  # by the name of the loop
    pairs: dict[str, _Pair] = {}
    left_out: dict[str, str] = {}
    for title, ingredient in INGREDIENTS.items():
        phase = next((p for p in PHASES if any(s.startswith(f"{p}.") for s in ingredient.on)), PHASES[0])
        try:
            found = [_changed(context, settings) for settings in ingredient]
        except UsageError as error:
            left_out[title] = "; ".join(line.strip() for line in error.message.splitlines()[1:])
            continue
        names = [f"{phase} {each.recipe.to_toml()}" for each in found]
        contexts |= {key: (each, phase) for key, each in zip(names, found, strict=True)}
        pairs[title] = _Pair(phase, *names)
    data: dict[str, TrainingData] = {}

    def data_of(changed: PhaseContext) -> TrainingData:
        """Return the training data; recipes with the same table [data] share it."""
        key = changed.recipe.data.model_dump_json()
        if key not in data:
            if options.data is not None:
                data[key] = training_data(dataset, changed.recipe, context.device)
            else:
                labels = torch.arange(dataset.num_classes).repeat_interleave(torch.tensor(dataset.class_counts))
                data[key] = random_data(changed, labels)
        return data[key]

    def loop(changed: PhaseContext, phase: str) -> TimedLoop:
        return TrainingLoop(data_of(changed), *rehearsal(changed, phase))

    loops: dict[str, Callable[[], TimedLoop]] = {key: partial(loop, *each) for key, each in contexts.items()}
    num_images = len(data_of(context).labels)
    console.note(
        f"bench: ingredients of {name} on {dataset.name}, {num_images:,} images; "
        f"{hardware.device_name(context.device)}, {counted(torch.get_num_threads(), 'thread')}"
    )
    timings = measure(loops, options.rounds, options.seconds, Memory(context.device))
    seconds = {key: _step_seconds(timings[key], *each, num_images) for key, each in contexts.items()}
    rows = {}
    for title, pair in pairs.items():
        ratios = [on / off for on, off in zip(seconds[pair.on], seconds[pair.off], strict=True)]
        rows[title] = {
            "phase": pair.phase,
            "settings": list(INGREDIENTS[title].on),
            "seconds_with": statistics.median(seconds[pair.on]),
            "seconds_without": statistics.median(seconds[pair.off]),
            "ratio": statistics.median(ratios),
            "ratio_by_round": ratios,
        }
    fields: dict[str, Any] = {
        "recipe": name,
        "data": dataset.name,
        "num_images": num_images,
        "rounds": options.rounds,
        "device": hardware.device_name(context.device),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "precision": context.precision,
        "ingredients": rows,
        "left_out": left_out,
    }
    _report(fields)


def _changed(context: PhaseContext, settings: tuple[str, ...]) -> PhaseContext:
    """Return the context of a changed recipe; raise UsageError if it is wrong or does not fit the data set."""
    recipe: Recipe = with_settings(context.recipe, settings)
    dataset = context.dataset
    check_fits(recipe, dataset.num_classes, dataset.shape, has_statistics=dataset.has_statistics, settings=settings)
    return replace(context, recipe=recipe)


def _step_seconds(timing: Timing, context: PhaseContext, phase: str, num_images: int) -> list[float]:
    """Return the seconds of a step over a full batch, in each round."""
    plan = make_plan(context, phase)
    images = min(plan.batch_size, num_images) * plan.num_passes
    return [images / speed for speed in timing.images_per_second]


def _report(fields: dict[str, Any]) -> None:
    """Print the table and a line per ingredient that the recipe does not allow, or the JSON object."""
    rows = []
    for title, row in fields["ingredients"].items():
        ratios = row["ratio_by_round"]
        rows.append(
            [
                *(title, row["phase"], f"{row['seconds_without']:.4f}", f"{row['seconds_with']:.4f}"),
                *(f"{row['ratio']:.3f}", f"{min(ratios):.3f} .. {max(ratios):.3f}", " ".join(row["settings"])),
            ]
        )
    header = ("ingredient", "phase", ">s/step without", ">with", ">ratio", ">lowest .. highest", "settings")
    lines = ["", *(f"left out: {title}: {reason}" for title, reason in fields["left_out"].items())]
    console.result(fields, header=header, rows=rows, lines=console.prose(lines) if fields["left_out"] else ())
