"""The recipe: everything that changes the numbers, as a strict TOML file.

The resolved recipe is written beside each phase's output and is itself valid. Folders and devices are flags and never
keys of a recipe. Imports nothing heavy.
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import Annotated, Any, ClassVar, Literal, Self

import pydantic
from pydantic import BaseModel, ConfigDict, Field, model_validator

from cpmix_cli.recipe.functions import TERM_KINDS, Needs, known, needs_of
from cpmix_cli.runtime.errors import suggest

# What each phase depends on. An output is refused to another recipe when one of its tables differs.
TRAINING_TABLES = ("seed", "data", "model", "optimizer", "schedule", "confusion")
PHASE_TABLES: dict[str, tuple[str, ...]] = {
    "stage1": (*TRAINING_TABLES, "stage1"),
    "stage2": (*TRAINING_TABLES, "stage1", "stage2"),
    "finetune": (*TRAINING_TABLES, "stage1", "stage2", "finetune"),
}

MAX_EPOCHS = 1_000_000
MAX_BATCH = 1_000_000


class Table(BaseModel):
    """A TOML table: unknown keys are faults, no type is coerced but int to float, inf and nan are no numbers."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)
    _idle_without: ClassVar[dict[str, tuple[str, ...]]] = {}
    """Key -> keys without effect while it has its default: refused then, and left out of a resolved recipe."""
    _quiet: ClassVar[tuple[str, ...]] = ()
    """Keys that a resolved recipe leaves out at their defaults: runs older than the key keep their recipe."""

    def _given(self, keys: Iterable[str]) -> list[str]:
        """The keys that differ from their defaults."""
        return [key for key in keys if getattr(self, key) != type(self).model_fields[key].default]

    @model_validator(mode="after")
    def _has_no_idle_keys(self) -> Self:
        for key, idle in self._idle_without.items():
            if not self._given([key]) and (given := self._given(idle)):
                default = type(self).model_fields[key].default
                other = "" if default is None else f" other than {default}"
                raise ValueError(f"{', '.join(given)} {'needs' if len(given) == 1 else 'need'} {key}{other}")
        return self

    @pydantic.model_serializer(mode="wrap")
    def _without_idle_keys(self, handler: pydantic.SerializerFunctionWrapHandler) -> dict[str, Any]:
        idle = {key for without, keys in self._idle_without.items() if not self._given([without]) for key in keys}
        idle |= set(self._quiet) - set(self._given(self._quiet))
        return {key: value for key, value in handler(self).items() if key not in idle}


class Data(Table):
    """How images become inputs."""

    augment: Literal[
        "resized-crop-flip-jitter", "resized-crop-flip", "crop-flip-rotate", "crop-flip", "crop", "none"
    ] = "crop-flip"
    """Training augmentation. crop: random, after padding. resized-crop: 8 to 100 % of the image, 3:4 to 4:3 in shape,
    resized to `crop`. flip: mirrored with probability 1/2. rotate: up to 15 degrees. jitter: brightness, contrast and
    saturation by up to 40 %."""
    padding: int = Field(default=4, ge=0, le=1024)
    """Black pixels on each side before the crop."""
    crop: int = Field(default=0, ge=0, le=4096)
    """Side of the square that the network sees: a resized crop in training, the middle in tests; 0: the whole image."""
    normalisation: Literal["cifar10", "imagenet", "inaturalist", "dataset", "none"] = "dataset"
    """Mean and deviation per channel: those published of a data set, the training set's own, or 0 and 1."""
    _quiet: ClassVar[tuple[str, ...]] = ("crop",)

    def input_shape(self, shape: Sequence[int]) -> list[int]:
        """Return the network's input shape for images (H, W, channels) or points (D,) of `shape`."""
        return [self.crop, self.crop, shape[2]] if self.crop and len(shape) == 3 else list(shape)


class Model(Table):
    """The network."""

    name: str = "resnet32"
    """A key of models.MODELS."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """Of forward and backward; auto is bf16 autocast if the processor has it, resolved when stage 1 starts."""
    head: Literal["linear", "cosine"] = "linear"
    """cosine: scaled cosine of feature and class vector, without bias (LDAM's NormedLinear)."""
    head_scale: float = Field(default=30.0, gt=0)
    """Scale s of the cosine head: logits = s * cos(feature, class vector)."""
    head_bias: Literal["drawn", "rare"] = "drawn"
    """Initial bias of a linear head; rare: -log(C - 1), for sigmoid losses (Cui et al., Sec. 5.1)."""
    experts: int = Field(default=1, ge=1, le=100)
    """Branches of the network, each with its own head; the logits are their mean."""
    shared_stages: int = Field(default=1, ge=1)
    """Stages after the stem that all experts share. RIDE: 1 of the 3 of CIFAR networks, 2 of torchvision's 4."""
    expert_width: float = Field(default=1.0, gt=0, le=1)
    """Channels of an expert's own stages, relative to the network's."""
    expert_layout: Literal["loop"] = "loop"
    """The only layout: experts run one after the other. Recipes of earlier runs name it."""
    detached_experts: bool = False
    """Gradients of experts after the first do not reach the shared stages (ACE, whose paper leaves it open)."""
    init: str = Field(default="", pattern=r"^(|[\w.-]+-[0-9a-f]{8,64}\.\w+)$")
    """Published weights that `train-stage1 --init` must give, after import-weights: the file name, which ends in the
    first digits of its sha256 (resnet152-394f9c45.pth). "": fresh weights, or any that --init names."""
    frozen: list[str] = []
    """Names of modules that no phase trains (layer1, layer4.0); their batch norm keeps its statistics."""
    sync_batchnorm: bool = False
    """Batch norm uses the images of all ranks, not only of its own."""

    @pydantic.field_validator("name")
    @classmethod
    def _is_known(cls, name: str) -> str:
        if name not in known("model"):
            raise ValueError(f"unknown.{suggest(name, known('model'))}")
        return name

    _idle_without: ClassVar[dict[str, tuple[str, ...]]] = {
        "experts": ("shared_stages", "expert_width", "expert_layout", "detached_experts")
    }
    _quiet: ClassVar[tuple[str, ...]] = ("experts", "init", "frozen", "sync_batchnorm")


class ParameterGroup(Table):
    """Settings of the parameters whose name starts with `prefix`; the first matching group counts."""

    prefix: str
    lr_factor: float = Field(default=1.0, ge=0, le=1e6)
    weight_decay: float | None = Field(default=None, ge=0)


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
    """Parts of a rank's share of the batch, run one after the other to save memory; batch norm sees one part."""
    groups: list[ParameterGroup] = []
    expert_rates: Literal["equal", "target-share"] = "equal"
    """Learning rate of the experts' own parameters; target-share: lr times the share of the training images whose
    classes the expert answers for (ACE)."""
    _quiet: ClassVar[tuple[str, ...]] = ("micro_batches",)


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
    """multistep: epochs after a milestone have one more factor `decay`; milestones may lie beyond the end."""
    decay: Annotated[float, Field(gt=0, le=1)] | list[Annotated[float, Field(gt=0, le=1)]] = 0.01
    """One factor for all milestones, or one for each."""
    rescaled_from: int = Field(default=0, ge=0)
    """Epochs before --epochs changed them; 0 if it did not."""


class Confusion(Table):
    """Collecting confusion pairs."""

    start_epoch: int = Field(default=1, ge=1)
    """First epoch (from 1) whose errors count."""
    decay: float = Field(default=1.0, gt=0, le=1)
    """Factor on all counts at the start of each epoch; 1 as in the paper."""
    source: Literal["train"] = "train"
    """The only source: errors on the natural training batch of every step. Recipes of earlier runs name it."""
    predictions: Literal["ensemble"] = "ensemble"
    """The only kind: errors of the experts' mean. Recipes of earlier runs name it."""
    refresh: Literal["step", "epoch"] = "step"
    """Partner classes are drawn from the counts up to the previous step, or from those at the start of the epoch: then
    images can be prefetched from disk."""
    _quiet: ClassVar[tuple[str, ...]] = ("refresh",)


class TermRecipe(Table):
    """One named part of an objective: draw -> partner -> ratio -> mix -> label -> loss.

    Keys beyond these are keyword arguments of the functions named (t of `imbalance-aware`, beta of `effective-number`).
    """

    model_config = ConfigDict(extra="allow")
    _idle_without: ClassVar[dict[str, tuple[str, ...]]] = {
        "partner": (
            *("match", "ratio", "alpha", "per_sample", "mix", "label"),
            *("probability", "unmixed_first", "unmixed_last"),
        ),
        "match": ("match_power",),
        "reweight": ("reweight_after", "reweight_norm"),
    }

    draw: Literal["natural", "class-uniform"] = "natural"
    """The epoch's shuffled batch, or classes drawn uniformly and an image of each."""
    partner: str | None = None
    """A key of mixing.BATCH_PARTNERS or CLASS_PARTNERS; none leaves the batch unmixed."""
    match: str | None = None
    """A key of mixing.MATCHES: which image of the batch each partner is mixed with; none: its own."""
    match_power: float = Field(default=1.0, ge=0)
    """Epoch e of E matches with probability (e / E) ** match_power; otherwise partners stay with their own image."""
    ratio: str | None = None
    alpha: float | None = Field(default=None, gt=0)
    """The ratio is drawn from Beta(alpha, alpha)."""
    per_sample: bool = False
    """Draw one ratio per image, not per batch."""
    mix: str | None = None
    label: str | None = None
    probability: float = Field(default=1.0, gt=0, le=1)
    """Probability that a batch is mixed."""
    unmixed_first: float = Field(default=0.0, ge=0)
    """First epochs, in which no batch is mixed."""
    unmixed_last: float = Field(default=0.0, ge=0)
    """Last epochs, in which no batch is mixed."""
    loss: str = "cross-entropy"
    """A key of losses.LOSSES, summed over the experts; or of losses.ENSEMBLE_LOSSES."""
    regulariser: str | None = None
    """A key of losses.REGULARISERS, added once and without labels."""
    teacher: str | None = None
    """A key of losses.DISTILLATIONS, towards the network that `train-stage1 --teacher RUN` names."""
    reweight: str | None = None
    """A key of losses.CLASS_WEIGHTS."""
    reweight_after: float = Field(default=0.0, ge=0)
    """Epochs without the weights (DRW)."""
    reweight_norm: Literal["batch-sum", "count"] = "batch-sum"
    """A weighted loss is divided by the sum of the batch's class weights, or by the batch size."""
    weight: float = Field(default=1.0, ge=0)
    """Factor of the term in the objective; 0 leaves the term out."""

    @model_validator(mode="after")
    def _complete(self) -> "TermRecipe":
        missing = [key for key in ("ratio", "alpha", "mix", "label") if getattr(self, key) is None]
        if self.partner is not None and missing:
            raise ValueError(f"a partner needs {', '.join(missing)}")
        return self

    @property
    def is_gated(self) -> bool:
        """Whether some batches of the term are not mixed."""
        return self.probability < 1 or self.unmixed_first > 0 or self.unmixed_last > 0

    @property
    def functions(self) -> dict[str, str]:
        """Kind -> name of each function that the term names."""
        return {kind: name for kind in TERM_KINDS if (name := getattr(self, kind)) is not None}

    @property
    def parameters(self) -> dict[str, Any]:
        """Keys that are parameters of these functions."""
        return dict(self.__pydantic_extra__ or {})

    def needs(self, place: str) -> Iterator[tuple[str, Needs]]:
        """Yield ('stage1.terms.erm.loss = "ldam"', its needs) for each function of the term, which is at `place`."""
        for kind, name in self.functions.items():
            yield f'{place}.{kind} = "{name}"', needs_of(kind, name)


class Stage(Table):
    """The objective of a training stage: the sum of its terms."""

    terms: dict[str, TermRecipe]
    forward: Literal["joint", "separate"] = "joint"
    """One forward for all terms (batch norm sees them together), or one for each."""

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
    """Schedule of the learning rate; cosine falls to 0 over the steps."""
    head: Literal["keep", "reinit", "scale", "routers"] = "keep"
    """keep: the trained head. reinit: a fresh one (cRT). scale: a learnable scale per class behind it (LWS). routers:
    choose how many experts an image gets (RIDE)."""
    router_top: int = Field(default=30, ge=1, le=10_000)
    """Number of largest logits that routers see."""
    train: list[str] = Field(default=["head"], min_length=1)
    """Parameter-name prefixes that are trained."""
    groups: list[ParameterGroup] = []
    """As in [optimizer]."""
    batchnorm: Literal["frozen", "shift"] = "frozen"
    """frozen: the network is in eval mode; shift: running statistics move."""


class Evaluation(Table):
    """Measuring a checkpoint; always fp32."""

    batch_size: int = Field(default=500, ge=1, le=MAX_BATCH)
    aggregate: Literal["mean", "targets", "test-time", "routed"] = "mean"
    """How the experts' logits are combined. mean. targets: heads scaled to the first one's size, then for each class
    the mean of the experts that answer for it (ACE). test-time: weights under which predictions of two views of a test
    image agree, learnt without labels by `evaluate` (SADE). routed: mean of as many experts as the routers choose
    (RIDE)."""
    routing_threshold: float = Field(default=0.5, ge=0, le=1)
    """An image goes to the next expert if the router's probability exceeds this."""
    temperature: float = Field(default=1.0, gt=0)
    """Divides the logits, for calibration; choose it on held-out images."""
    logit_adjustment: float = Field(default=0.0, ge=0, le=100)
    """tau of the post-hoc logit adjustment: z - tau log(class frequency)."""
    tau_norm: float = Field(default=0.0, ge=0, le=100)
    """Each class vector of a linear head is divided by its norm to the power of this."""


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

    def terms(self, *, idle: bool = False) -> Iterator[tuple[str, TermRecipe]]:
        """Yield terms with their places such as stage1.terms.erm; those of weight 0 only if `idle`."""
        for table in ("stage1", "stage2", "finetune"):
            stage: Stage | None = getattr(self, table)
            for name, term in stage.terms.items() if stage is not None else ():
                if term.weight > 0 or idle:
                    yield f"{table}.terms.{name}", term

    def epochs_of(self, phase: str) -> int:
        """Epochs of a training phase; 0 if the recipe lacks it."""
        if phase == "finetune":
            return self.finetune.epochs if self.finetune else 0
        stage1 = self.schedule.stage1_epochs
        return {"stage1": stage1, "stage2": self.schedule.epochs - stage1}[phase]

    def tables(self) -> dict[str, Any]:
        """The recipe as plain nested dictionaries."""
        return self.model_dump(exclude_none=True)

    def tables_of(self, phase: str) -> dict[str, Any]:
        """The tables that a phase depends on."""
        tables = self.tables()
        return {name: tables[name] for name in PHASE_TABLES.get(phase, ("evaluation",)) if name in tables}

    def to_toml(self) -> str:
        """The recipe as TOML text."""
        import tomli_w

        return tomli_w.dumps(self.tables())


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
