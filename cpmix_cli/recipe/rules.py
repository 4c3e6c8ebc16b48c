"""Rules between keys of different tables of a recipe, and between functions of terms and keys.

A rule between keys is a line of _RULES. The needs of a function are in NEEDS at the end of its file. Needs that concern
the data set or the machine are checked in training/checks.py. Keys without effect are found by schema.Table.
"""

import json
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from cpmix_cli.recipe.libraries import is_library_name
from cpmix_cli.recipe.schema import Recipe, TermRecipe


class _Rule(NamedTuple):
    """Rule: if `key` has one of `values`, then `other` must have one of the `allowed` values."""

    key: str
    """ "table.key"; `*` stands for each term with a weight above 0."""
    values: Sequence[object]
    other: str
    """ "table.key" of the other key."""
    allowed: Sequence[object]
    why: str = ""
    """Reason for the rule, for the message."""


_RESIZED = ["resized-crop-flip", "resized-crop-flip-jitter"]
_AUTOAUGMENT = "crop-flip-autoaugment"
_FLIPS = [*_RESIZED, _AUTOAUGMENT, "crop-flip-rotate", "crop-flip"]
_SEVERAL = range(2, 101)
_RULES = (
    _Rule("data.augment", _RESIZED, "data.crop", range(1, 4097), "it resizes to that"),
    _Rule("data.crop", range(1, 4097), "data.augment", [*_RESIZED, "none"]),
    _Rule("data.fill", range(1, 256), "data.augment", [_AUTOAUGMENT], "it fills what AutoAugment leaves open"),
    _Rule("data.cutout", range(1, 4097), "data.augment", [*_FLIPS, "crop"], "it augments"),
    _Rule("data.flip", ["alternating"], "data.augment", _FLIPS),
    _Rule("model.head_bias", ["rare"], "model.head", ["linear"], "a cosine head has no bias"),
    _Rule("model.init_head", ["class-means"], "model.head_bias", ["drawn"], "it sets the bias"),
    _Rule("finetune.head", ["scale"], "model.head", ["linear"], "a cosine head has no bias"),
    _Rule("model.head", ["cosine"], "evaluation.tau_norm", [0], "it has no norms"),
    _Rule("schedule.kind", ["multistep", "cosine", "constant"], "schedule.end", [0]),
    _Rule("schedule.warmup_steps", range(1, 1_000_001), "schedule.warmup_epochs", [0], "there is one warm-up"),
    _Rule("optimizer.kind", ["adam", "adamw"], "optimizer.nesterov", [False], "only SGD has it"),
    _Rule("optimizer.momentum", [0], "optimizer.nesterov", [False]),
    _Rule("optimizer.expert_rates", ["target-share"], "model.experts", _SEVERAL),
    _Rule("finetune.momentum", [0], "finetune.nesterov", [False]),
    _Rule("finetune.head", ["routers"], "model.experts", _SEVERAL),
    _Rule("finetune.head", ["routers"], "finetune.train", [["routers"], ["routers."]], "it trains nothing else"),
    _Rule("finetune.head", ["routers"], "finetune.terms.*.loss", ["routing"]),
    _Rule("evaluation.aggregate", ["targets", "test-time", "routed"], "model.experts", _SEVERAL),
    _Rule("evaluation.aggregate", ["targets"], "model.head", ["linear"], "heads of one size say nothing of cosines"),
    _Rule("evaluation.aggregate", ["routed"], "finetune.head", ["routers"]),
    _Rule("evaluation.aggregate", ["mean", "targets", "test-time"], "evaluation.routing_threshold", [0.5]),
)


def unmet(recipe: Recipe) -> list[str]:
    """Return one line per conflict in a recipe whose single tables are valid."""
    faults = []
    for key, values, other, allowed, why in _RULES:
        for place, value in _values(recipe, key):
            if value in values:
                faults += _missing(recipe, f"{place} = {_shown(value)}", other, allowed, why)
    for place, term in recipe.terms():
        faults += _unmet_of_functions(recipe, place, term)
    parts, batches = recipe.optimizer.micro_batches, [("optimizer", recipe.optimizer), ("finetune", recipe.finetune)]
    faults += [
        f"optimizer.micro_batches = {parts}: more than the images of a batch, {table}.batch_size = {found.batch_size}"
        for table, found in batches
        if found is not None and parts > found.batch_size
    ]
    if (seen := recipe.data.normalisation) not in (recipe.model.name, "network") and is_library_name(seen):
        faults.append(
            f'data.normalisation = "{seen}" is of that network, not of model.name = "{recipe.model.name}": give '
            'data.normalisation = "network"'
        )
    if recipe.data.normalisation == "network":
        faults.append(
            f'data.normalisation = "network" is for networks of torchvision and timm, not for model.name = '
            f'"{recipe.model.name}": give "imagenet" if its weights were trained with that'
        )
    if recipe.data.flip == "alternating" and all(term.draw != "natural" for _, term in recipe.terms()):
        faults.append('data.flip = "alternating" needs a term with draw = "natural": it is for these batches only')
    if recipe.optimizer.layer_decay < 1 and all(t.train == ["head"] for t in (recipe.stage1, recipe.stage2) if t):
        rate = f"optimizer.layer_decay = {recipe.optimizer.layer_decay:g}"
        faults.append(f"{rate}: the stages train the head alone, which has the whole rate")
    s = recipe.schedule
    faults += [
        f'{name}.warmup_epochs = {table.warmup_epochs:g}: with {name}.kind = "linear" at most {name}.epochs = '
        f"{table.epochs}, because the learning rate falls from there on"
        for name, table in (("schedule", s), ("finetune", recipe.finetune))
        if table is not None and table.kind == "linear" and table.warmup_epochs > table.epochs
    ]
    if isinstance(s.decay, list) and len(s.decay) != len(s.milestones):
        faults.append(f"schedule.decay has {len(s.decay)} factors for {len(s.milestones)} schedule.milestones")
    both = f"schedule.stage1_epochs = {s.stage1_epochs} of schedule.epochs = {s.epochs}"
    if s.stage1_epochs > s.epochs:
        faults.append(f"{both}: lower the first; --epochs N, not schedule.epochs, shortens a whole recipe")
    elif recipe.stage2 is None and s.stage1_epochs < s.epochs:
        faults.append(
            f"{both} leave {s.epochs - s.stage1_epochs} to stage 2, but [stage2] is missing: set both to one number in "
            "[schedule], or add [stage2]"
        )
    elif recipe.stage2 is not None and s.stage1_epochs == s.epochs:
        faults.append(f"{both} leave none to [stage2]: lower the first, or remove [stage2]")
    return faults


def _unmet_of_functions(recipe: Recipe, place: str, term: TermRecipe) -> Iterator[str]:
    for what, needs in term.needs(place):
        for other, allowed in needs.keys.items():
            yield from _missing(recipe, what, other, allowed, needs.why)
        for parameter, other in needs.repeats.items():
            yield from (
                f"{what} needs {place}.{parameter} = {other} ({_shown(value)})"
                for _, value in _values(recipe, other)
                if term.parameters.get(parameter) != value
            )
        for parameter, step in needs.idle_without.items():
            if term.parameters.get(parameter) and getattr(term, step) is None:
                yield f"{place}.{parameter} needs {step}"
        listed = term.parameters.get(needs.per_expert)
        if listed is not None and len(listed) != recipe.model.experts:
            yield (
                f"{place}.{needs.per_expert} = {_shown(listed)} has {len(listed)} values for model.experts = "
                f"{recipe.model.experts}"
            )
        if needs.stage and not place.startswith(f"{needs.stage}."):
            yield f"{what} goes into {needs.stage} only"


def _missing(recipe: Recipe, what: str, other: str, allowed: Sequence[object], why: str) -> list[str]:
    """Return one line per place of the key `other` whose value is not one that `what` needs."""
    several = f"{allowed.start} or more" if isinstance(allowed, range) else " or ".join(map(_shown, allowed))
    return [
        f"{what} needs {place} = {several}, not {_shown(value)}{f': {why}' if why else ''}"
        for place, value in _values(recipe, other)
        if value not in allowed
    ]


def _values(recipe: Recipe, key: str) -> list[tuple[str, Any]]:
    """Return the places and values of a key. The value is None if its table is missing."""
    found: list[tuple[str, Any]] = [("", recipe)]
    for part in key.split("."):
        if part == "*":
            found = [(f"{at}.{name}", t) for at, terms in found for name, t in (terms or {}).items() if t.weight > 0]
        else:
            found = [(f"{at}.{part}", getattr(value, part, None)) for at, value in found]
    return [(place[1:], value) for place, value in found]


def _shown(value: object) -> str:
    """Return a value in TOML notation."""
    return "(none)" if value is None else json.dumps(value)
