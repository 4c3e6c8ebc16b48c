"""The recipe: everything that changes the numbers, as a strict TOML file.

Loading knows every key and type and lists all faults at once; `--set`, `--epochs` and `--seed` are applied here, and
what comes out is written beside each phase's output as a recipe that is itself valid. Where a run takes place
(folders, device) is a flag and never stands in a recipe. Imports nothing heavy.
"""

import hashlib
import json
import os
import stat
import tomllib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, TypeVar

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    ValidationError,
    field_validator,
    model_serializer,
    model_validator,
)

from cpmix_cli.errors import UsageError, suggest
from cpmix_cli.vocabulary import TERM_KINDS, bind, keywords, known

# What each phase depends on. An output is refused to another recipe when one of its tables differs.
TRAINING_TABLES = ("seed", "data", "model", "optimizer", "schedule", "confusion")
PHASE_TABLES: dict[str, tuple[str, ...]] = {
    "stage1": (*TRAINING_TABLES, "stage1"),
    "stage2": (*TRAINING_TABLES, "stage1", "stage2"),
    "finetune": (*TRAINING_TABLES, "stage1", "stage2", "finetune"),
}

MAX_BYTES = 4_000_000  # of a recipe and of a record looked at here; the record of 10,000 classes has half a million
MAX_DEPTH = 16  # of tables in tables; a recipe has 4
MAX_EXTENDS = 16
MAX_EPOCHS = 1_000_000
MAX_BATCH = 1_000_000


class Table(BaseModel):
    """A TOML table: unknown keys are faults, no type is coerced but int to float, and inf and nan are no numbers."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)
    _quiet: ClassVar[tuple[str, ...]] = ()
    """Keys that a resolved recipe leaves out where they say what was so before there were such keys: the runs from then
    stay what they are."""

    @model_serializer(mode="wrap")
    def _without_idle_keys(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        idle = {key for key in self._quiet if getattr(self, key) == type(self).model_fields[key].default}
        return {key: value for key, value in handler(self).items() if key not in idle}


class Data(Table):
    """How images become inputs."""

    augment: Literal[
        "resized-crop-flip-jitter", "resized-crop-flip", "crop-flip-rotate", "crop-flip", "crop", "none"
    ] = "crop-flip"
    """Training augmentation. crop: random, from `padding` pixels of black. resized-crop: of 8 to 100 % of the image,
    3:4 to 4:3 in shape, resized to `crop`. flip: left for right, every other time. rotate: up to 15 degrees. jitter:
    brightness, contrast and saturation by up to 40 %."""
    padding: int = Field(default=4, ge=0, le=1024)
    """Black pixels on each side before the crop."""
    crop: int = Field(default=0, ge=0, le=4096)
    """Side of the square that the network sees: resized crops in training, the middle of the image in tests; 0: all of
    the image."""
    normalisation: Literal["cifar10", "imagenet", "inaturalist", "dataset", "none"] = "dataset"
    """Mean and deviation a channel: the published ones of CIFAR-10, ImageNet or iNaturalist, the training set's own, or
    0 and 1."""
    _quiet: ClassVar[tuple[str, ...]] = ("crop",)

    @model_validator(mode="after")
    def _crops_have_a_size(self) -> "Data":
        resized = self.augment.startswith("resized-crop")
        if resized and not self.crop:
            raise ValueError(f'augment = "{self.augment}" resizes to crop: crop = 0 is no size')
        if self.crop and not resized and self.augment != "none":
            raise ValueError(f'crop goes with a resized-crop or with "none", not with augment = "{self.augment}"')
        return self

    def input_shape(self, shape: Sequence[int]) -> list[int]:
        """What the network sees of images (H, W, channels) or points (D,) of `shape`."""
        return [self.crop, self.crop, shape[2]] if self.crop and len(shape) == 3 else list(shape)


class Model(Table):
    """The network."""

    name: str = "resnet32"
    """A key of models.MODELS."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """Forward and backward; auto is bf16 autocast where the processor has it, resolved when stage 1 starts."""
    head: Literal["linear", "cosine"] = "linear"
    """cosine: `head_scale` times the cosine of feature and class vector, without bias (LDAM's NormedLinear)."""
    head_scale: float = Field(default=30.0, gt=0)
    """Of a cosine head."""
    head_bias: Literal["drawn", "rare"] = "drawn"
    """Initial bias of a linear head; rare: -log(C - 1), for sigmoid losses (Cui et al., Sec. 5.1)."""
    experts: int = Field(default=1, ge=1, le=100)
    """Branches of the network, each with a head of its own; the logits are their mean."""
    shared_stages: int = Field(default=1, ge=1)
    """Stages that all experts share, after the stem; the rest each has for itself. RIDE has 1 on the CIFAR networks,
    which have three, and 2 on torchvision's."""
    expert_width: float = Field(default=1.0, gt=0, le=1)
    """Channels of an expert's own stages, as a share of the network's."""
    expert_layout: Literal["loop", "fused"] = "loop"
    """The experts' convolutions one after the other, or grouped into one a layer: the same numbers, another speed."""
    detached_experts: bool = False
    """Experts after the first learn on the shared stages without moving them (ACE, which does not say)."""
    init: str = Field(default="", pattern=r"^(|[\w.-]+-[0-9a-f]{8,64}\.\w+)$")
    """File of published weights that stage 1 has to start from, by its publisher's name, which ends in the first digits
    of its sha256 (torchvision's resnet152-394f9c45.pth): `train-stage1 --init` gives it, as import-weights made it. "":
    from fresh weights, or any that --init names."""
    frozen: list[str] = []
    """Modules that no phase trains, by name (layer1, layer4.0); batch norm there keeps its statistics."""
    sync_batchnorm: bool = False
    """With several ranks, batch norm looks at the images of all of them; else each rank at its own."""

    @field_validator("name")
    @classmethod
    def _is_known(cls, name: str) -> str:
        if name not in known("model"):
            raise ValueError(f"unknown.{suggest(name, known('model'))}")
        return name

    _of_experts: ClassVar[tuple[str, ...]] = ("shared_stages", "expert_width", "expert_layout", "detached_experts")

    @model_validator(mode="after")
    def _has_experts(self) -> "Model":
        given = [key for key in self._of_experts if getattr(self, key) != type(self).model_fields[key].default]
        if self.experts == 1 and given:
            raise ValueError(f"{', '.join(given)} {'needs' if len(given) == 1 else 'need'} experts = 2 or more")
        return self

    @model_serializer(mode="wrap")
    def _without_idle_keys(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """As a resolved recipe shows it: of a plain network, nothing of experts."""
        dropped = ["experts", *self._of_experts] if self.experts == 1 else []
        dropped += [key for key in ("init", "frozen", "sync_batchnorm") if not getattr(self, key)]
        return {key: value for key, value in handler(self).items() if key not in dropped}


class ParameterGroup(Table):
    """Parameters whose name starts with `prefix` get their own settings; the first matching group counts."""

    prefix: str
    lr_factor: float = Field(default=1.0, ge=0, le=1e6)
    weight_decay: float | None = Field(default=None, ge=0)


T = TypeVar("T", bound="Optimizer | Finetune")


def _checked_nesterov(table: T) -> T:
    if table.nesterov and table.momentum == 0:
        raise ValueError("nesterov needs momentum > 0")
    return table


class Optimizer(Table):
    """One optimizer for both stages."""

    kind: Literal["sgd", "adam"] = "sgd"
    lr: float = Field(default=0.1, gt=0, le=1e30)
    momentum: float = Field(default=0.9, ge=0, lt=1)
    """SGD only."""
    nesterov: bool = False
    """SGD only."""
    weight_decay: float = Field(default=2e-4, ge=0)
    batch_size: int = Field(default=128, ge=1, le=MAX_BATCH)
    """Of a step, over all ranks."""
    micro_batches: int = Field(default=1, ge=1, le=10_000)
    """Parts that each rank takes its share of the batch in, one after the other, gradients added up: less memory; batch
    norm sees a part."""
    groups: list[ParameterGroup] = []
    expert_rates: Literal["equal", "target-share"] = "equal"
    """Of the experts' own parameters; target-share: lr times the share of the training images that are of the classes
    which the expert answers for (ACE)."""
    _quiet: ClassVar[tuple[str, ...]] = ("micro_batches",)

    @model_validator(mode="after")
    def _nesterov_has_momentum(self) -> "Optimizer":
        return _checked_nesterov(self)


class Schedule(Table):
    """One schedule over all epochs; stage 2 continues where stage 1 ends."""

    epochs: int = Field(default=300, ge=1, le=MAX_EPOCHS)
    """E, both stages together."""
    stage1_epochs: int = Field(default=200, ge=1, le=MAX_EPOCHS)
    """E_cp of Algorithm 1; equal to `epochs` in a single-stage recipe."""
    warmup_epochs: float = Field(default=10, ge=0)
    """Epoch e (from 1) runs at lr * min(1, e / warmup_epochs)."""
    kind: Literal["multistep", "cosine", "constant"] = "multistep"
    milestones: list[float] = []
    """Multistep: each epoch later than a milestone has one more factor `decay`; may lie beyond the end."""
    decay: Annotated[float, Field(gt=0, le=1)] | list[Annotated[float, Field(gt=0, le=1)]] = 0.01
    """The same at each milestone, or one for each."""
    rescaled_from: int = Field(default=0, ge=0)
    """Epochs before --epochs changed them; 0 where it did not."""


class Confusion(Table):
    """Collecting confusion pairs."""

    start_epoch: int = Field(default=1, ge=1)
    """First epoch (from 1) whose errors count."""
    decay: float = Field(default=1.0, gt=0, le=1)
    """Factor on all counts at the start of each epoch; 1 accumulates for ever, as the paper does."""
    source: Literal["train", "heldout", "test_legacy"] = "train"
    """Whose errors: the unmixed natural training batch of every step; or, after each epoch anew, all of the val split;
    test_legacy: of the test split, as OTmix's released code has it (leaks test labels; the results are marked)."""
    predictions: Literal["ensemble", "each-expert"] = "ensemble"
    """Of several experts: what their mean takes for what, or each of them, all in one bag. source = "train" only."""
    refresh: Literal["step", "epoch"] = "step"
    """Partner classes are drawn from the counts through the step before, or from those at the beginning of the epoch:
    then all images of an epoch are known when it begins, and are read ahead from disk."""
    _quiet: ClassVar[tuple[str, ...]] = ("refresh",)

    @model_validator(mode="after")
    def _each_expert_in_training(self) -> "Confusion":
        if self.predictions == "each-expert" and self.source != "train":
            raise ValueError(f'predictions = "each-expert" is of source = "train", not of "{self.source}"')
        return self


class Term(BaseModel):
    """One named part of an objective: draw -> partner -> ratio -> mix -> label -> loss.

    Keys beyond these are keyword arguments of the functions named (t of `imbalance-aware`, beta of `effective-number`).
    """

    model_config = ConfigDict(extra="allow", strict=True, frozen=True, allow_inf_nan=False)
    _idle_without: ClassVar[dict[str, tuple[str, ...]]] = {
        "partner": (
            *("match", "ratio", "alpha", "per_sample", "mix", "label"),
            *("probability", "unmixed_first", "unmixed_last"),
        ),
        "match": ("match_power",),
        "reweight": ("reweight_after", "reweight_norm"),
    }
    """Step -> keys that say nothing in a term without it."""

    draw: Literal["natural", "class-uniform"] = "natural"
    """The epoch's shuffled batch, or classes drawn uniformly and an image of each."""
    partner: str | None = None
    """A key of mixing.BATCH_PARTNERS or CLASS_PARTNERS; none leaves the batch unmixed."""
    match: str | None = None
    """A key of mixing.MATCHES: which image of the batch each partner goes with; none: its own."""
    match_power: float = Field(default=1.0, ge=0)
    """Epoch e of E matches with probability (e / E) ** match_power; otherwise its partners go with their own."""
    ratio: str | None = None
    alpha: float | None = Field(default=None, gt=0)
    """The draws behind the ratio are Beta(alpha, alpha)."""
    per_sample: bool = False
    """A mixing ratio for each image and not one for the batch."""
    mix: str | None = None
    label: str | None = None
    probability: float = Field(default=1.0, gt=0, le=1)
    """Of a batch being mixed; otherwise it goes unmixed."""
    unmixed_first: float = Field(default=0.0, ge=0)
    """Epochs at the beginning whose batches all go unmixed."""
    unmixed_last: float = Field(default=0.0, ge=0)
    """The same at the end."""
    loss: str = "cross-entropy"
    """A key of losses.LOSSES, of each expert and summed; or of losses.ENSEMBLE_LOSSES."""
    regulariser: str | None = None
    """A key of losses.REGULARISERS: what is added once, whatever the labels are."""
    teacher: str | None = None
    """A key of losses.DISTILLATIONS: what is learnt of the network that `train-stage1 --teacher RUN` names."""
    reweight: str | None = None
    """A key of losses.CLASS_WEIGHTS."""
    reweight_after: float = Field(default=0.0, ge=0)
    """Epochs without the weights (DRW)."""
    reweight_norm: Literal["batch-sum", "count"] = "batch-sum"
    """A weighted loss is divided by the sum of the batch's class weights, or by the batch size."""
    weight: float = Field(default=1.0, ge=0)
    """Factor of the term in the objective; 0 leaves the term out."""

    @model_validator(mode="after")
    def _complete(self) -> "Term":
        for step, keys in self._idle_without.items():
            fields = type(self).model_fields
            given = [key for key in keys if getattr(self, key) != fields[key].default]
            if getattr(self, step) is None and given:
                raise ValueError(f"{', '.join(given)} {'needs' if len(given) == 1 else 'need'} {step}")
        missing = [key for key in ("ratio", "alpha", "mix", "label") if getattr(self, key) is None]
        if self.partner is not None and missing:
            raise ValueError(f"a partner needs {', '.join(missing)}")
        return self

    @property
    def functions(self) -> dict[str, str]:
        """Kind -> name of each function named."""
        return {kind: name for kind in TERM_KINDS if (name := getattr(self, kind)) is not None}

    @model_serializer(mode="wrap")
    def _without_idle_keys(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """As a resolved recipe shows it: no keys of steps that the term does not have."""
        dropped = {key for step, keys in self._idle_without.items() if getattr(self, step) is None for key in keys}
        return {key: value for key, value in handler(self).items() if key not in dropped}

    @property
    def parameters(self) -> dict[str, Any]:
        """The keys that belong to the functions named."""
        return dict(self.__pydantic_extra__ or {})


class Stage(Table):
    """What a training stage minimises: the sum of its terms."""

    terms: dict[str, Term]
    forward: Literal["joint", "separate"] = "joint"
    """All terms in one forward (batch norm sees them together), or each in its own."""

    @model_validator(mode="after")
    def _has_terms(self) -> "Stage":
        if not any(term.weight > 0 for term in self.terms.values()):
            raise ValueError("needs at least one term with weight > 0")
        return self


class Finetune(Stage):
    """Training of the head on a trained network."""

    epochs: int = Field(default=30, ge=1, le=MAX_EPOCHS)
    lr: float = Field(default=0.5, gt=0, le=1e30)
    momentum: float = Field(default=0.9, ge=0, lt=1)
    nesterov: bool = False
    weight_decay: float = Field(default=0.0, ge=0)
    batch_size: int = Field(default=128, ge=1, le=MAX_BATCH)
    kind: Literal["cosine", "constant"] = "cosine"
    """Schedule of the rate; cosine falls to 0 over the steps."""
    head: Literal["keep", "reinit", "scale", "routers"] = "keep"
    """Start from the trained head, from a fresh one (cRT), put a learnable scale a class behind it (LWS), or add
    routers that choose how many experts an image gets (RIDE)."""
    router_top: int = Field(default=30, ge=1, le=10_000)
    """Largest logits that routers look at."""
    train: list[str] = Field(default=["head"], min_length=1)
    """Parameter-name prefixes that are trained."""
    groups: list[ParameterGroup] = []
    """As in [optimizer]."""
    batchnorm: Literal["frozen", "shift"] = "frozen"
    """frozen: the network is in eval mode; shift: running statistics move."""

    @model_validator(mode="after")
    def _nesterov_has_momentum(self) -> "Finetune":
        return _checked_nesterov(self)


class Evaluation(Table):
    """Measuring a checkpoint; always fp32."""

    batch_size: int = Field(default=500, ge=1, le=MAX_BATCH)
    aggregate: Literal["mean", "targets", "test-time", "routed"] = "mean"
    """How the experts' logits become one: their mean; targets: each head scaled to the first one's size, and for each
    class the mean over the experts that answer for it (ACE); test-time: with weights under which predictions of two
    views of a test image agree, learnt without labels by `evaluate` (SADE), else their mean; routed: the mean of the
    first ones, as many as the routers say (RIDE), else of all."""
    routing_threshold: float = Field(default=0.5, ge=0, le=1)
    """A router's chance above which an image goes on to the next expert."""
    temperature: float = Field(default=1.0, gt=0)
    """Divides the logits, for calibration; to be chosen on held-out images."""
    logit_adjustment: float = Field(default=0.0, ge=0, le=100)
    """tau of the post-hoc logit adjustment, z - tau log(class frequency); 0 leaves the logits."""
    tau_norm: float = Field(default=0.0, ge=0, le=100)
    """Exponent of the norm that each class vector of a linear head is divided by; 0 leaves them."""

    @model_validator(mode="after")
    def _threshold_is_of_routers(self) -> "Evaluation":
        usual = type(self).model_fields["routing_threshold"].default
        if self.routing_threshold != usual and self.aggregate != "routed":
            raise ValueError('routing_threshold needs aggregate = "routed"')
        return self


class Recipe(Table):
    """A whole recipe."""

    seed: int = Field(default=0, ge=0, lt=2**63)
    data: Data = Data()
    model: Model = Model()
    optimizer: Optimizer = Optimizer()
    schedule: Schedule = Schedule()
    confusion: Confusion = Confusion()
    stage1: Stage
    stage2: Stage | None = None
    finetune: Finetune | None = None
    evaluation: Evaluation = Evaluation()

    @model_validator(mode="after")
    def _stages_fit(self) -> "Recipe":
        scaled = self.finetune is not None and self.finetune.head == "scale"
        routed = self.finetune is not None and self.finetune.head == "routers"
        if self.model.head == "cosine" and (scaled or self.model.head_bias == "rare" or self.evaluation.tau_norm):
            raise ValueError(
                'model.head = "cosine" has no bias and no norms: it goes without model.head_bias = "rare", '
                'finetune.head = "scale" and evaluation.tau_norm'
            )
        for name, term in self._terms():
            if term.loss == "ldam" and (self.model.head, term.parameters.get("scale")) != (
                "cosine",
                self.model.head_scale,
            ):
                raise ValueError(
                    f'{name}.loss = "ldam" takes its margins off scaled cosines: it wants model.head = "cosine" and '
                    f"{name}.scale = model.head_scale ({self.model.head_scale:g})"
                )
            if (term.loss == "routing") != (routed and name.startswith("finetune.")):
                raise ValueError(f'{name}: loss = "routing" and finetune.head = "routers" go together')
            if term.parameters.get("temperature_spread") and term.reweight is None:
                raise ValueError(
                    f"{name}.temperature_spread is of the epochs whose class weights count: needs reweight"
                )
            if term.teacher is not None and not name.startswith("stage1."):
                raise ValueError(f"{name}.teacher: only stage1 has one")
            if term.loss == "sade" and self.model.experts != 3:
                raise ValueError(f'{name}.loss = "sade" is one of 3 experts: model.experts = {self.model.experts}')
            if term.loss == "ace" and self.model.experts < 2:
                raise ValueError(f'{name}.loss = "ace" is one of several experts: model.experts = 1')
        if routed and self.model.experts < 2:
            raise ValueError('finetune.head = "routers" needs several experts')
        if self.finetune is not None and routed and not all(p.startswith("routers") for p in self.finetune.train):
            raise ValueError('finetune.head = "routers" trains nothing else: it wants finetune.train = ["routers"]')
        if self.optimizer.expert_rates != "equal" and (self.model.experts == 1 or self.model.expert_layout == "fused"):
            raise ValueError('optimizer.expert_rates = "target-share" needs several experts, expert_layout = "loop"')
        if self.model.experts == 1 and self.confusion.predictions != "ensemble":
            raise ValueError('confusion.predictions = "each-expert" needs several experts')
        if self.model.experts == 1 and self.evaluation.aggregate != "mean":
            raise ValueError(f'evaluation.aggregate = "{self.evaluation.aggregate}" needs several experts')
        if self.evaluation.aggregate == "routed" and not routed:
            raise ValueError('evaluation.aggregate = "routed" needs finetune.head = "routers"')
        if self.evaluation.aggregate == "targets" and self.model.head == "cosine":
            raise ValueError(
                'evaluation.aggregate = "targets" scales heads to one size, which says nothing of the logits of '
                'model.head = "cosine"'
            )
        s = self.schedule
        if isinstance(s.decay, list) and len(s.decay) != len(s.milestones):
            raise ValueError(f"schedule.decay has {len(s.decay)} factors for {len(s.milestones)} milestones")
        if s.stage1_epochs > s.epochs:
            raise ValueError(f"schedule.stage1_epochs = {s.stage1_epochs} exceeds schedule.epochs = {s.epochs}")
        if (self.stage2 is None) != (s.stage1_epochs == s.epochs):
            raise ValueError(
                f"schedule leaves {s.epochs - s.stage1_epochs} epochs to stage 2, "
                f"but [stage2] is {'missing' if self.stage2 is None else 'given'}"
            )
        return self

    def _terms(self) -> Iterator[tuple[str, Term]]:
        """All terms that count, with their names from the top."""
        for table in ("stage1", "stage2", "finetune"):
            stage: Stage | None = getattr(self, table)
            for name, term in stage.terms.items() if stage is not None else ():
                if term.weight > 0:
                    yield f"{table}.terms.{name}", term

    def tables(self) -> dict[str, Any]:
        """Plain nested dictionaries, as TOML and JSON hold them."""
        return self.model_dump(exclude_none=True)

    def tables_of(self, phase: str) -> dict[str, Any]:
        """The tables that a phase's numbers depend on."""
        tables = self.tables()
        names = PHASE_TABLES.get(phase, ("evaluation",))
        if phase in ("stage1", "stage2") and self.confusion.source != "train":
            names = (*names, "evaluation")  # it says how experts become the one that confuses
        return {name: tables[name] for name in names if name in tables}

    def to_toml(self) -> str:
        """The recipe as TOML text."""
        import tomli_w

        return tomli_w.dumps(self.tables())


def recipe_folders() -> list[Path]:
    """Where recipes are found by name: in the installed package, or beside it in a checkout."""
    package = Path(__file__).resolve().parent
    return [f for f in (package / "recipes", package.parent / "recipes") if f.is_dir()]


def recipe_names() -> list[str]:
    """Names of all recipes that come with cpmix, such as cifar100-lt/cpmix."""
    return sorted(
        path.relative_to(folder).with_suffix("").as_posix()
        for folder in recipe_folders()
        for path in folder.rglob("*.toml")
    )


def find_recipe(name: str) -> Path:
    """The file of a recipe given by path or by name.

    Raises:
        UsageError: neither a file nor a known name, or a name that no file can have.
    """
    path = Path(name)
    try:
        if path.suffix == ".toml" and path.is_file():
            return path
        for folder in recipe_folders():
            if (found := folder / f"{name}.toml").is_file():
                return found
    except OSError as fault:  # too long a name, a folder that may not be looked into
        raise UsageError(f'recipe "{name}": {fault.strerror}', needed_by="--recipe") from fault
    if path.suffix == ".toml":
        raise UsageError(f"no file {path}", needed_by="--recipe")
    raise UsageError(
        f'no recipe "{name}".{suggest(name, recipe_names())}', needed_by="--recipe", fix="cpmix recipes lists all"
    )


def load(
    name: str,
    *,
    settings: Sequence[str] = (),
    epochs: int | None = None,
    seed: int | None = None,
    rho: float | None = None,
) -> Recipe:
    """Read and resolve a recipe.

    Args:
        name: path of a TOML file, or the name of a recipe that comes with cpmix.
        settings: "table.key=value" overrides, values as in TOML (a bare word is a string).
        epochs: rescale every epoch count so that both stages together last this many.
        seed: replaces the recipe's seed.
        rho: imbalance factor of the data set; chooses the [by_rho.R] overrides.

    Raises:
        UsageError: file, syntax, keys, types, ranges or settings are wrong; all faults are listed.
    """
    path = find_recipe(name)
    return resolve(read_tables(path), origin=str(path), settings=settings, epochs=epochs, seed=seed, rho=rho)


def read_tables(path: Path, above: Sequence[Path] = ()) -> dict[str, Any]:
    """The tables of a recipe file, over those of the recipe that it `extends`, `without` some of these; `about` is the
    file's own.

    Args:
        path: the file.
        above: files that extend it.

    Raises:
        UsageError: a file is not there, is no TOML, extends itself or too many, or goes without what is not there.
    """
    if len(above) > MAX_EXTENDS:
        raise UsageError(f"{above[-1]} extends more than {MAX_EXTENDS} recipes, one on the other", needed_by="--recipe")
    try:
        tables = _parse(_read_small(path).decode())
    except (ValueError, OSError) as fault:
        raise UsageError(f"{path} is not readable TOML: {fault}", needed_by="--recipe") from fault
    without = tables.pop("without", [])
    if (base := tables.pop("extends", None)) is None:
        if without:
            raise UsageError(f"{path}: without: there is no recipe that it extends", needed_by="--recipe")
        return tables
    try:
        found = find_recipe(str(base))
    except UsageError as fault:
        raise UsageError(f"{path}: extends: {fault.message}", needed_by=fault.needed_by, fix=fault.fix) from fault
    if found in (path, *above):
        raise UsageError(f'{path}: extends = "{base}" leads back to itself', needed_by="--recipe")
    below = read_tables(found, (path, *above))
    below.pop("about", None)
    for key in without if isinstance(without, list) else [without]:
        _take_away(below, key, path)
    return _merged(below, tables)


def _read_small(path: Path) -> bytes:
    """The bytes of a small file; artifacts.py has what reads large ones, and imports torch.

    Raises:
        OSError: it is missing, unreadable, a folder, pipe or device, or has more than MAX_BYTES.
    """
    with open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK)) as file:
        status = os.fstat(file.fileno())
        if not stat.S_ISREG(status.st_mode):
            raise OSError(f"{path} is no file")
        if status.st_size > MAX_BYTES:
            raise OSError(f"{path} has {status.st_size:,} bytes; at most {MAX_BYTES:,} are read")
        return file.read(MAX_BYTES)


def _read_json(path: Path) -> dict[str, Any] | None:
    """A small JSON file's object with its numbers as floats; None where that cannot be read or is none."""
    try:
        found = json.loads(_read_small(path), parse_int=float)  # an int may be too large for a float
    except (OSError, ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None


def _parse(text: str) -> dict[str, Any]:
    """The tables of TOML text.

    Raises:
        ValueError: it is none, or holds what would break those who walk, show or write it: tables too deep in each
            other, an integer of more than 64 bits (which TOML does not promise either).
    """
    try:
        tables = tomllib.loads(text)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    except tomllib.TOMLDecodeError:
        raise
    except ValueError:  # of int(), which reads some thousand digits and no more
        raise ValueError("it has an integer of more than 64 bits") from None
    rest: list[tuple[Any, int]] = [(tables, 0)]
    while rest:
        value, depth = rest.pop()
        if depth > MAX_DEPTH:
            raise ValueError("it is nested too deeply")
        if isinstance(value, int) and not -(2**63) <= value < 2**63:
            raise ValueError("it has an integer of more than 64 bits")
        inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
        rest += [(held, depth + 1) for held in inner]
    return tables


def _take_away(tables: dict[str, Any], key: object, path: Path) -> None:
    """Remove "table.key" from nested tables; `path` is of the file that wants it."""
    *places, last = str(key).split(".")
    for place in places:
        tables = tables.get(place, {}) if isinstance(tables, dict) else {}
    if not isinstance(tables, dict) or last not in tables:
        raise UsageError(f'{path}: without: the recipe that it extends has no "{key}"', needed_by="--recipe")
    del tables[last]


def check_request(
    name: str | None,
    settings: Sequence[str],
    epochs: int | None,
    *,
    data: Path | None = None,
    phases: Sequence[Path] = (),
) -> None:
    """Say what is wrong with a recipe that flags ask for, before anything heavy is imported for it.

    What is wrong with files, the recipe's own aside, the phase says.

    Args:
        name: of the recipe; without one that of the data set, or of a finished phase.
        settings: with epochs, see load().
        data: data set folder.
        phases: phase folders; the first that is finished counts.

    Raises:
        UsageError: as load() does.
    """
    rho = None
    if data is not None:
        record = _read_json(data / "dataset.json")
        if record is None or not {"recipe", "rho"} <= record.keys():
            return
        own, rho = record["recipe"], record["rho"]
        if own not in recipe_names() or not isinstance(rho, float | None):
            return
        name = name or own
    if name is None:
        finished = next((folder for folder in phases if (folder / "run.json").is_file()), None)
        name = None if finished is None else _own_recipe(finished)
    if name is None or (rho is None and "by_rho" in read_tables(find_recipe(name))):
        return
    load(name, settings=settings, epochs=epochs, rho=rho)


def _own_recipe(phase: Path) -> str | None:
    """The recipe of a finished phase, if it is the one that its record names; no user's --recipe is at fault for
    another.
    """
    path = phase / "recipe.toml"
    record = _read_json(phase / "run.json")
    outputs = record.get("outputs") if record is not None else None
    try:
        sha = hashlib.sha256(_read_small(path)).hexdigest()
    except OSError:
        return None
    return str(path) if isinstance(outputs, dict) and outputs.get(path.name) == sha else None


def resolve(
    tables: dict[str, Any],
    *,
    origin: str,
    settings: Sequence[str] = (),
    epochs: int | None = None,
    seed: int | None = None,
    rho: float | None = None,
) -> Recipe:
    """A checked recipe from plain tables; see load()."""
    tables = dict(tables)
    tables.pop("about", None)
    by_rho = tables.pop("by_rho", {})
    if not isinstance(by_rho, dict) or not all(isinstance(over, dict) for over in by_rho.values()):
        raise UsageError(f"recipe {origin}: by_rho holds a table for each rho, such as [by_rho.100.optimizer]")
    if rho is not None and f"{rho:g}" in by_rho:
        tables = _merged(tables, by_rho[f"{rho:g}"])
    for setting in settings:
        tables = _merged(tables, _parse_setting(setting))
    if seed is not None:
        tables["seed"] = seed
    lines, recipe = [], None
    try:
        recipe = Recipe.model_validate(tables)
    except ValidationError as fault:
        lines = [_explain(dict(error)) for error in fault.errors()]
    lines += _function_faults(tables)
    if recipe is None or lines:
        count = f"{len(lines)} fault{'s' if len(lines) > 1 else ''}"
        raise UsageError(f"recipe {origin} has {count}:\n    " + "\n    ".join(lines))
    return rescaled(recipe, epochs) if epochs is not None else recipe


def _function_faults(tables: dict[str, Any]) -> list[str]:
    """What is wrong with the functions that terms name and with their parameters, whatever else is wrong with them."""
    faults = []
    for stage in ("stage1", "stage2", "finetune"):
        terms = tables[stage].get("terms") if isinstance(tables.get(stage), dict) else None
        for name, term in terms.items() if isinstance(terms, dict) else []:
            if isinstance(term, dict):
                names = {kind: term[kind] for kind in TERM_KINDS if isinstance(term.get(kind), str)}
                given = {key: value for key, value in term.items() if key not in Term.model_fields}
                _, found = bind(names, given, {kind: known(kind) for kind in names}, Term.model_fields)
                faults += [f"{stage}.terms.{name}.{line}" for line in found]
    return faults


def rescaled(recipe: Recipe, epochs: int) -> Recipe:
    """The recipe with every epoch count multiplied by epochs / schedule.epochs.

    Whole counts are rounded and keep at least one epoch (each stage too); warm-up and milestones stay fractions, so
    that two milestones of a long schedule do not fall together in a short one.

    Raises:
        UsageError: too few epochs for the recipe's stages.
    """
    s = recipe.schedule
    if epochs == s.epochs:
        return recipe
    stages = 1 if recipe.stage2 is None else 2
    if epochs < stages:
        raise UsageError(f"--epochs {epochs}: this recipe has {stages} stages, one epoch each at least")
    scale = epochs / s.epochs

    def whole(count: int) -> int:
        return max(1, int(count * scale + 0.5))

    stage1 = epochs if recipe.stage2 is None else min(whole(s.stage1_epochs), epochs - 1)
    schedule = s.model_copy(
        update={
            "epochs": epochs,
            "stage1_epochs": stage1,
            "warmup_epochs": round(s.warmup_epochs * scale, 4),
            "milestones": [round(m * scale, 4) for m in s.milestones],
            "rescaled_from": s.rescaled_from or s.epochs,
        }
    )
    start = recipe.confusion.start_epoch
    confusion = recipe.confusion.model_copy(update={"start_epoch": 1 if start == 1 else whole(start)})

    def terms(stage: Stage) -> dict[str, Term]:
        counts = ("unmixed_first", "unmixed_last", "reweight_after")
        return {
            name: term.model_copy(update={key: round(getattr(term, key) * scale, 4) for key in counts})
            for name, term in stage.terms.items()
        }

    update: dict[str, Any] = {"schedule": schedule, "confusion": confusion}
    for name in ("stage1", "stage2"):
        if (stage := getattr(recipe, name)) is not None:
            update[name] = stage.model_copy(update={"terms": terms(stage)})
    if recipe.finetune is not None:
        shortened = {"epochs": whole(recipe.finetune.epochs), "terms": terms(recipe.finetune)}
        update["finetune"] = recipe.finetune.model_copy(update=shortened)
    return recipe.model_copy(update=update)


def differences(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """'table.key: old -> new' for each key in which two nested dictionaries differ."""
    return [f"{key}: {_shown(a)} -> {_shown(b)}" for key, a, b in changed(old, new)]


def changed(old: dict[str, Any], new: dict[str, Any], prefix: str = "") -> list[tuple[str, Any, Any]]:
    """('table.key', old, new) for each key in which two nested dictionaries differ; None where one has no such key."""
    found: list[tuple[str, Any, Any]] = []
    for key in sorted(old.keys() | new.keys()):
        a, b = old.get(key), new.get(key)
        if isinstance(a, dict) and isinstance(b, dict):
            found += changed(a, b, f"{prefix}{key}.")
        elif a != b:
            found.append((f"{prefix}{key}", a, b))
    return found


def _shown(value: Any) -> str:
    if value is None:
        return "(none)"
    return "(table)" if isinstance(value, dict) else repr(value)


def _merged(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """`base` with the nested values of `over` in it. Where `over` names another function in a term, the parameters of
    the old one go.
    """
    merged = dict(base)
    for kind in TERM_KINDS:
        old, new = base.get(kind), over.get(kind)
        if isinstance(old, str) and isinstance(new, str) and old != new:
            kept = {key for k in TERM_KINDS for key in keywords(k, over.get(k, base.get(k)))}
            merged = {key: value for key, value in merged.items() if key in kept or key not in keywords(kind, old)}
    for key, value in over.items():
        old = merged.get(key)
        both = isinstance(value, dict) and isinstance(old, dict)
        merged[key] = _merged(old, value) if both else value  # type: ignore[arg-type]
    return merged


def _parse_setting(setting: str) -> dict[str, Any]:
    key, equals, text = setting.partition("=")
    if not equals or not key.strip():
        raise UsageError(f'--set "{setting}" is not table.key=value', fix="for example --set optimizer.lr=0.05")
    parts = key.strip().split(".")
    value: Any
    try:
        if len(parts) > MAX_DEPTH:
            raise ValueError("it is nested too deeply")
        value = _parse(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text.strip()
    except ValueError as fault:
        shown = setting if len(setting) <= 80 else f"{setting[:80]}..."
        raise UsageError(f'--set "{shown}": {fault}') from fault
    for part in reversed(parts):
        value = {part: value}
    return dict(value)


def _explain(error: dict[str, Any]) -> str:
    """One pydantic fault as 'table.key: what is wrong'."""
    location = [str(part) for part in error["loc"]]
    name = ".".join(location)
    if error["type"] == "extra_forbidden":
        return f"{name}: unknown key.{suggest(location[-1], _keys_of(location[:-1]))}"
    if error["type"] == "missing":
        return f"{name}: missing"
    message = str(error["msg"]).removeprefix("Value error, ")
    if not location or isinstance(error["input"], dict):
        return f"{name}: {message}" if name else message
    return f"{name} = {error['input']!r}: {message}"


def _keys_of(location: list[str]) -> list[str]:
    """Field names of the table at `location`."""
    model: Any = Recipe
    for part in location:
        if not (isinstance(model, type) and issubclass(model, BaseModel)):
            return []
        field = model.model_fields.get(part)
        if field is None:
            return []
        options = getattr(field.annotation, "__args__", (field.annotation,))
        model = next((o for o in options if isinstance(o, type) and issubclass(o, Table)), None)
    return list(model.model_fields) if model is not None else []
