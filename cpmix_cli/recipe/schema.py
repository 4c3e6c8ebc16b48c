"""The recipe: all settings that change results, as a TOML file with strict keys and types.

The resolved recipe is written beside each phase's output and is a valid recipe itself. Folders and devices are flags,
not keys of a recipe. This module imports no slow package.
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import Annotated, Any, ClassVar, Literal, Self

import pydantic
from pydantic import BaseModel, ConfigDict, Field, StringConstraints, model_validator

from cpmix_cli.recipe.functions import TERM_KINDS, Needs, bind, in_float32, known, needs_of, outline
from cpmix_cli.recipe.libraries import check_library_name, is_library_name, library_names
from cpmix_cli.runtime.errors import suggest
from cpmix_cli.runtime.text import toml_text

# Tables that each phase depends on. If one of them differs, an existing output is not used with the new recipe.
TRAINING_TABLES = ("seed", "data", "model", "optimizer", "schedule", "confusion")
PHASE_TABLES: dict[str, tuple[str, ...]] = {
    "stage1": (*TRAINING_TABLES, "stage1"),
    "stage2": (*TRAINING_TABLES, "stage1", "stage2"),
    "finetune": (*TRAINING_TABLES, "stage1", "stage2", "finetune"),
}

AS_RECORD = {"as_record": True}
"""Context of the validation of a run's recipe, which may name functions of a plugin that is not given."""
MAX_EPOCHS = 1_000_000
MAX_BATCH = 1_000_000


class Table(BaseModel):
    """TOML table. Unknown keys, inf, nan and numbers beyond float32 are errors. Of types, only int becomes float."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)
    _idle_without: ClassVar[dict[str, tuple[str, ...]]] = {}
    """Key -> keys that have no effect while it has its default. They are then refused, and not in a resolved recipe."""
    _quiet: ClassVar[tuple[str, ...]] = ()
    """Keys that a resolved recipe omits at their defaults, so that recipes of runs older than the key are unchanged."""

    _in_float32 = pydantic.field_validator("*")(in_float32)

    def _given(self, keys: Iterable[str]) -> list[str]:
        """Return the keys whose values differ from their defaults."""
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


_NORMALISATIONS = ("cifar10", "imagenet", "inaturalist", "dataset", "none", "network")


class Data(Table):
    """Augmentation and normalisation: from stored images to network inputs."""

    augment: Literal[
        "resized-crop-flip-jitter",
        "resized-crop-flip",
        "crop-flip-autoaugment",
        "crop-flip-rotate",
        "crop-flip",
        "crop",
        "none",
    ] = "crop-flip"
    """Training augmentation. crop: random crop after padding. resized-crop: random crop with 8 to 100 % of the area and
    an aspect ratio from 3:4 to 4:3, resized to `crop`. flip: horizontal flip with probability 1/2. rotate: rotation by
    up to 15 degrees. autoaugment: AutoAugment's policy for CIFAR. jitter: brightness, contrast and saturation changed
    by up to 40 %."""
    fill: int = Field(default=0, ge=0, le=255)
    """Grey value of pixels that a translation, shear or rotation of AutoAugment leaves open. 0 as in torchvision, 128
    as in the long-tail code."""
    cutout: int = Field(default=0, ge=0, le=4096)
    """Side in pixels of a black square at a random place, clipped at the border, after all other augmentation (Cutout);
    0: none."""
    flip: Literal["random", "alternating"] = "random"
    """Flips of the shuffled natural batches. random: each image is flipped with probability 1/2. alternating: each
    image is flipped in every second epoch, from the first or the second epoch at random. Images drawn with replacement
    are always flipped at random."""
    padding: int = Field(default=4, ge=0, le=1024)
    """Black pixels that are added to each side before the random crop."""
    crop: int = Field(default=0, ge=0, le=4096)
    """Side of the network's square input, in pixels: a resized crop in training, the centre crop in tests. 0: images
    are not cropped."""
    normalisation: str = "dataset"
    """Mean and standard deviation per channel. cifar10, imagenet, inaturalist: published values. dataset: values of the
    training set. none: 0 and 1. network: those that the published weights of the network were trained with, for the
    networks of a library; a resolved recipe has the network's name in its place."""
    _quiet: ClassVar[tuple[str, ...]] = ("fill", "cutout", "flip", "crop")

    @pydantic.field_validator("normalisation")
    @classmethod
    def _is_known(cls, name: str) -> str:
        if is_library_name(name):
            check_library_name(name)
        elif name not in _NORMALISATIONS:
            raise ValueError(f"unknown.{suggest(name, _NORMALISATIONS)}")
        return name

    def input_shape(self, shape: Sequence[int]) -> list[int]:
        """Return the shape of a network input: image [H, W, channels] -> [crop, crop, channels] if `crop` is not 0.

        Shapes of points (D,), and of images that are not cropped, are returned unchanged.
        """
        return [self.crop, self.crop, shape[2]] if self.crop and len(shape) == 3 else list(shape)


class Model(Table):
    """The network."""

    name: str = "resnet32"
    """Name of the network: a key of models.MODELS, or torchvision/NAME or timm/NAME, a classifier of that library."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """Precision of forward and backward pass. auto: bf16 autocast if the hardware supports it, else fp32. auto is
    resolved when stage 1 starts."""
    head: Literal["linear", "cosine"] = "linear"
    """Classifier head. cosine: scaled cosine of feature and class weight, without bias (LDAM's NormedLinear)."""
    head_scale: float = Field(default=30.0, gt=0)
    """Scale s of the cosine head: logits = s * cos(feature, class weight)."""
    head_bias: Literal["drawn", "rare"] = "drawn"
    """Initial bias of a linear head. drawn: random. rare: -log(C - 1), for sigmoid losses (Cui et al., Sec. 5.1)."""
    experts: int = Field(default=1, ge=1, le=100)
    """Number of experts: branches of the network, each with its own head. The logits are the mean over the experts."""
    shared_stages: int = Field(default=1, ge=1)
    """Number of stages after the stem that all experts share. RIDE shares 1 of 3 in CIFAR networks, and 2 of 4 in
    torchvision's networks."""
    expert_width: float = Field(default=1.0, gt=0, le=1)
    """Channels in the stages of an expert, as a fraction of the network's channels."""
    expert_layout: Literal["loop"] = "loop"
    """Only layout: experts run one after the other. The key exists because recipes of earlier runs contain it."""
    detached_experts: bool = False
    """Gradients of experts after the first do not reach the shared stages (ACE, whose paper leaves it open)."""
    init: str = Field(default="", pattern=r"^(|[\w.-]+-[0-9a-f]{8,64}\.\w+)$")
    """Published weights that `train-stage1 --init` must give, after import-weights: the file name, which ends in the
    first digits of its sha256 (resnet152-394f9c45.pth). "": random weights, or any weights of --init."""
    init_head: Literal["by-name", "new", "class-means"] = "by-name"
    """Head of a network that starts from --init. by-name: classes that a run of cpmix had keep their rows. new: all
    are drawn. class-means: from the mean features of each class, see training/class_means.py."""
    drop_path: float = Field(default=0.0, ge=0, lt=1)
    """Probability that the last residual branch is left out for an image in training (drop path, or stochastic depth);
    it rises from 0 at the first branch. For the networks of a library that have it; 0: off."""
    frozen: list[str] = []
    """Names of modules that no phase trains (layer1, layer4.0). Their batch norm keeps its statistics."""
    sync_batchnorm: bool = False
    """Compute the statistics of batch norm over the images of all ranks, not of each rank separately."""
    cuda_graphs: bool = True
    """On a GPU, record a step once as a CUDA graph and replay it. False launches each kernel of each step. It changes
    no result, so it can be changed at any time."""

    @pydantic.field_validator("name")
    @classmethod
    def _is_known(cls, name: str, info: pydantic.ValidationInfo) -> str:
        if is_library_name(name):
            check_library_name(name)
        elif name not in known("model") and info.context != AS_RECORD:
            own = f"torchvision/{name}"
            hint = f' Did you mean "{own}"?' if own in library_names("torchvision") else suggest(name, known("model"))
            raise ValueError(f"unknown.{hint}")
        return name

    _idle_without: ClassVar[dict[str, tuple[str, ...]]] = {
        "experts": ("shared_stages", "expert_width", "expert_layout", "detached_experts")
    }
    _quiet: ClassVar[tuple[str, ...]] = (
        "experts",
        "init",
        "init_head",
        "drop_path",
        "frozen",
        "sync_batchnorm",
        "cuda_graphs",
    )


class ParameterGroup(Table):
    """Settings of the parameters whose names start with `prefix`. The first matching group applies."""

    prefix: str
    """Or "norm", the parameters of all normalisation layers, or "bias", all biases."""
    lr_factor: float = Field(default=1.0, ge=0, le=1e6)
    """Factor on the learning rate."""
    weight_decay: float | None = Field(default=None, ge=0)
    """Weight decay; None: that of the table that contains the group."""


class Optimizer(Table):
    """Optimizer of both stages."""

    kind: Literal["sgd", "adam", "adamw"] = "sgd"
    """adamw: Adam with decoupled weight decay. Both have torch's betas (0.9, 0.999) and eps (1e-8)."""
    lr: float = Field(default=0.1, gt=0, le=1e30)
    momentum: float = Field(default=0.9, ge=0, lt=1)
    """SGD only."""
    nesterov: bool = False
    """SGD only."""
    weight_decay: float = Field(default=2e-4, ge=0)
    batch_size: int = Field(default=128, ge=1, le=MAX_BATCH)
    """Images per step, over all ranks."""
    micro_batches: int = Field(default=1, ge=1, le=10_000)
    """Number of parts of a rank's batch, run one after the other to save memory. Batch norm uses the images of one
    part."""
    groups: list[ParameterGroup] = []
    layer_decay: float = Field(default=1.0, gt=0, le=1)
    """Factor on the learning rate for each layer that a parameter is away from the head: layer_decay ** depth. The
    head, and what follows the last block, have depth 0. training/tuning.py says what a layer is."""
    expert_rates: Literal["equal", "target-share"] = "equal"
    """Learning rate of the experts' own parameters. equal: lr. target-share: lr times the fraction of training images
    whose classes are the expert's targets (ACE)."""
    ema_epochs: float = Field(default=0.0, ge=0, le=MAX_EPOCHS)
    """Horizon of an exponential moving average of the weights, in epochs; 0: none. The phases publish and evaluate the
    average, and the finetune starts from it. Its batch norm statistics come from one more pass over the augmented
    training images, at the end of each stage."""
    _quiet: ClassVar[tuple[str, ...]] = ("micro_batches", "layer_decay", "ema_epochs")


class Schedule(Table):
    """Epochs and learning rate of both stages. Stage 2 continues the schedule of stage 1."""

    epochs: int = Field(default=300, ge=1, le=MAX_EPOCHS)
    """E, epochs of both stages together."""
    stage1_epochs: int = Field(default=200, ge=1, le=MAX_EPOCHS)
    """E_cp of Algorithm 1; equal to `epochs` in a single-stage recipe."""
    warmup_epochs: float = Field(default=10, ge=0)
    """Length of the linear warm-up: epoch e (from 1) has the factor min(1, e / warmup_epochs). linear: epochs until the
    learning rate has its peak, `lr`."""
    warmup_steps: int = Field(default=0, ge=0, le=MAX_EPOCHS)
    """Length of a warm-up in steps: step k (from 1) has the factor min(1, k / warmup_steps). Needs warmup_epochs = 0.
    linear: steps until the learning rate has its peak."""
    kind: Literal["multistep", "cosine", "constant", "linear"] = "multistep"
    """linear: rises from 0 to `lr` and falls to `end`, with every step."""
    end: float = Field(default=0.0, ge=0, le=1)
    """linear: learning rate of the last step, relative to `lr`."""
    milestones: list[float] = []
    """multistep: epochs after which the learning rate is multiplied by `decay`. Milestones may exceed `epochs`."""
    decay: Annotated[float, Field(gt=0, le=1)] | list[Annotated[float, Field(gt=0, le=1)]] = 0.01
    """One factor for all milestones, or one factor per milestone."""
    rescaled_from: int = Field(default=0, ge=0)
    """Value of `epochs` before --epochs changed it; 0 if it did not."""
    _quiet: ClassVar[tuple[str, ...]] = ("warmup_steps", "end")


class Confusion(Table):
    """Collection of confusion pairs."""

    start_epoch: int = Field(default=1, ge=1)
    """First epoch (from 1) whose errors are counted."""
    decay: float = Field(default=1.0, gt=0, le=1)
    """Factor on all counts at the start of each epoch; 1 as in the paper."""
    source: Literal["train"] = "train"
    """Only source: errors on the natural training batch of every step. Recipes of earlier runs contain the key."""
    predictions: Literal["ensemble"] = "ensemble"
    """Only kind: errors of the experts' mean. Recipes of earlier runs contain the key."""
    refresh: Literal["step", "epoch"] = "step"
    """Counts from which partner classes are sampled. step: counts up to the previous step. epoch: counts at the start
    of the epoch, so that images can be prefetched from disk."""
    _quiet: ClassVar[tuple[str, ...]] = ("refresh",)


class TermRecipe(Table):
    """One named term of an objective: draw -> partner -> ratio -> mix -> label -> loss.

    Any other key is a parameter of a function that the term names (t of `imbalance-aware`, beta of `effective-number`).
    It has the type that the function states.
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
    """Sampling. natural: the epoch's shuffled batch. class-uniform: a uniform class, then a uniform image of it."""
    partner: str | None = None
    """Choice of the partner image: a key of mixing.BATCH_PARTNERS or CLASS_PARTNERS. None: the batch is not mixed."""
    match: str | None = None
    """Assignment of partners to images of the batch: a key of mixing.MATCHES. None: partner i goes to image i."""
    match_power: float = Field(default=1.0, ge=0)
    """Power p of the probability (e / E)^p with which partners are matched in epoch e of E."""
    ratio: str | None = None
    """Distribution of the mixing ratio lambda: a key of mixing.RATIOS."""
    alpha: float | None = Field(default=None, gt=0)
    """Parameter of Beta(alpha, alpha), from which the ratio is sampled."""
    per_sample: bool = False
    """Sample one ratio per image, not per batch."""
    mix: str | None = None
    """Mixing of the pixels: a key of mixing.MIXES. Or of the features: a key of mixing.FEATURE_MIXES."""
    label: str | None = None
    """Rule for the label weight lambda_y of a mixed image: a key of mixing.LABELS."""
    probability: float = Field(default=1.0, gt=0, le=1)
    """Probability that a batch is mixed."""
    unmixed_first: float = Field(default=0.0, ge=0)
    """Number of epochs at the start in which no batch is mixed."""
    unmixed_last: float = Field(default=0.0, ge=0)
    """Number of epochs at the end in which no batch is mixed."""
    loss: str = "cross-entropy"
    """A key of losses.LOSSES, whose loss is summed over the experts, or of losses.ENSEMBLE_LOSSES."""
    regulariser: str | None = None
    """A key of losses.REGULARISERS. It is added once and uses no labels."""
    teacher: str | None = None
    """A key of losses.DISTILLATIONS. The teacher is the network of `train-stage1 --teacher RUN`."""
    reweight: str | None = None
    """Class weights of the loss: a key of losses.CLASS_WEIGHTS."""
    reweight_after: float = Field(default=0.0, ge=0)
    """Number of epochs before the class weights apply (DRW)."""
    reweight_norm: Literal["batch-sum", "count"] = "batch-sum"
    """Divisor of a weighted loss. batch-sum: sum of the batch's class weights. count: batch size."""
    weight: float = Field(default=1.0, ge=0)
    """Factor of the term in the objective; 0 leaves the term out."""

    @model_validator(mode="before")
    @classmethod
    def _typed(cls, given: Any) -> Any:
        """Convert parameters to the types of their functions: epsilon = 1 and epsilon = 1.0 are one recipe."""
        if not isinstance(given, dict):
            return given
        names = {kind: name for kind in TERM_KINDS if isinstance(name := given.get(kind), str)}
        own = {key: value for key, value in given.items() if key not in cls.model_fields}
        bound, _ = bind(names, own, {kind: known(kind) for kind in names}, ())
        return {**given, **{key: value for function in bound.values() for key, value in function.keywords.items()}}

    @model_validator(mode="after")
    def _complete(self) -> "TermRecipe":
        replaced = needs_of("mix", self.mix or "").replaces
        missing = [
            key for key in ("ratio", "alpha", "mix", "label") if getattr(self, key) is None and key not in replaced
        ]
        is_known = self.mix is None or self.mix in known("mix")  # that it is not is another error
        if self.partner is not None and missing and is_known:
            raise ValueError(f"a partner needs {', '.join(missing)}")
        if given := self._given(replaced):
            raise ValueError(f'{", ".join(given)} without effect beside mix = "{self.mix}"')
        return self

    @property
    def mixes_features(self) -> bool:
        """True if the term mixes features, not inputs: both images of a pair go through the network."""
        return self.mix in outline("mixing")["FEATURE_MIXES"]

    @property
    def is_gated(self) -> bool:
        """True if some batches of the term are not mixed."""
        return self.probability < 1 or self.unmixed_first > 0 or self.unmixed_last > 0

    @property
    def functions(self) -> dict[str, str]:
        """Functions that the term names: kind -> name."""
        return {kind: name for kind in TERM_KINDS if (name := getattr(self, kind)) is not None}

    @property
    def parameters(self) -> dict[str, Any]:
        """Parameters of these functions: key -> value."""
        return dict(self.__pydantic_extra__ or {})

    def needs(self, place: str) -> Iterator[tuple[str, Needs]]:
        """Yield the functions of the term with their needs, such as ('stage1.terms.erm.loss = "ldam"', Needs(...)).

        Args:
            place: place of the term in the recipe, such as "stage1.terms.erm".
        """
        for kind, name in self.functions.items():
            yield f'{place}.{kind} = "{name}"', needs_of(kind, name)


class Stage(Table):
    """Objective of a training stage: the weighted sum of its terms."""

    terms: dict[str, TermRecipe]
    forward: Literal["joint", "separate"] = "joint"
    """joint: one forward pass with the images of all terms, which share batch norm. separate: one pass per term."""
    train: list[str] = Field(default=[""], min_length=1)
    """Prefixes of the names of trained parameters; "norm": those of all normalisation layers; "bias": all biases; "":
    all. In a stage, modules of which nothing is trained are in eval mode."""
    _quiet: ClassVar[tuple[str, ...]] = ("train",)

    @model_validator(mode="after")
    def _has_terms(self) -> "Stage":
        if not any(term.weight > 0 for term in self.terms.values()):
            raise ValueError("needs at least one term with weight > 0")
        return self


class Finetune(Stage):
    """Finetuning of the head of a trained network."""

    epochs: int = Field(default=30, ge=1, le=MAX_EPOCHS)
    lr: float = Field(default=0.5, gt=0, le=1e30)
    momentum: float = Field(default=0.9, ge=0, lt=1)
    nesterov: bool = False
    weight_decay: float = Field(default=0.0, ge=0)
    batch_size: int = Field(default=128, ge=1, le=MAX_BATCH)
    kind: Literal["cosine", "constant", "linear"] = "cosine"
    """Schedule of the learning rate. cosine: falls to 0 over all steps. linear: the same in a straight line."""
    warmup_epochs: float = Field(default=0.0, ge=0)
    """Length of the linear warm-up, as in [schedule]."""
    head: Literal["keep", "reinit", "scale", "routers"] = "keep"
    """Head to train. keep: the trained head. reinit: a new random head (cRT). scale: the trained head with a learnable
    scale per class (LWS). routers: networks that choose the number of experts per image (RIDE)."""
    router_top: int = Field(default=30, ge=1, le=10_000)
    """Number of largest logits that are inputs of a router."""
    train: list[str] = Field(default=["head"], min_length=1)
    """As in a stage."""
    groups: list[ParameterGroup] = []
    """Parameter groups, as in [optimizer]."""
    batchnorm: Literal["frozen", "shift"] = "frozen"
    """frozen: the network is in eval mode, so batch norm uses its running statistics. shift: they are updated."""
    _quiet: ClassVar[tuple[str, ...]] = ("warmup_epochs",)


class Evaluation(Table):
    """Evaluation of a checkpoint, always in fp32."""

    batch_size: int = Field(default=500, ge=1, le=MAX_BATCH)
    aggregate: Literal["mean", "targets", "test-time", "routed"] = "mean"
    """Combination of the experts' logits. mean: their mean. targets: heads are scaled to the size of the first head,
    then each class gets the mean over the experts that have it as a target (ACE). test-time: a weighted mean;
    `evaluate` learns the weights without labels, so that predictions of two views of a test image agree (SADE).
    routed: mean of the experts that the routers choose (RIDE)."""
    routing_threshold: float = Field(default=0.5, ge=0, le=1)
    """Router probability above which an image also goes to the next expert."""
    temperature: float = Field(default=1.0, ge=1e-6, le=1e6)
    """Divisor of the logits, for calibration. Choose it on held-out images."""
    logit_adjustment: float = Field(default=0.0, ge=0, le=100)
    """tau of the post-hoc logit adjustment: z - tau log(class frequency)."""
    tau_norm: float = Field(default=0.0, ge=0, le=100)
    """Power tau of tau-normalisation: each class weight w of a linear head becomes w / |w|^tau,
    without the bias. 0: the head as it is, with its bias."""
    mirror: bool = False
    """The logits of an image are the mean over it and its mirror image, at twice the cost. Images only."""
    _quiet: ClassVar[tuple[str, ...]] = ("mirror",)


Kind = Literal["loss", "reweighting", "mixing", "decoupled", "ensemble", "CP-Mix", "control", "ablation"]


class About(Table):
    """Table [about] of a recipe: its method and where that comes from."""

    method: Annotated[str, StringConstraints(strip_whitespace=True, min_length=1, max_length=80)]
    """Name of the method, as in the paper's tables if it is there. All recipes of the method have it."""
    kind: Kind | None = None
    """Kind of the method. Only one recipe of a method has kind, paper and needs."""
    paper: str = ""
    """Authors, title, venue, year."""
    needs: str = ""
    """Requirements besides images and labels."""
    note: str = ""
    """Remarks."""


class Recipe(Table):
    """A complete recipe."""

    about: About | None = Field(default=None, exclude=True)
    """Not in tables(): it changes no result, so it changes no hash of inputs either."""
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

    @model_validator(mode="before")
    @classmethod
    def _names_the_network(cls, tables: Any) -> Any:
        """Put the name of a library's network in the place of data.normalisation = "network"."""
        data, model = (tables.get(key) if isinstance(tables, dict) else None for key in ("data", "model"))
        if not isinstance(data, dict) or not isinstance(model, dict) or data.get("normalisation") != "network":
            return tables
        name = model.get("name")
        if not isinstance(name, str) or not is_library_name(name):
            return tables
        return {**tables, "data": {**data, "normalisation": name}}

    def terms(self, *, idle: bool = False) -> Iterator[tuple[str, TermRecipe]]:
        """Yield terms with their places, such as "stage1.terms.erm". Terms of weight 0 are included only if `idle`."""
        for table in ("stage1", "stage2", "finetune"):
            stage: Stage | None = getattr(self, table)
            for name, term in stage.terms.items() if stage is not None else ():
                if term.weight > 0 or idle:
                    yield f"{table}.terms.{name}", term

    @property
    def has_match(self) -> bool:
        """True if a term of a training phase matches its partners."""
        return any(term.match is not None for _, term in self.terms())

    def epochs_of(self, phase: str) -> int:
        """Return the epochs of a training phase; 0 if the recipe does not contain the phase."""
        if phase == "finetune":
            return self.finetune.epochs if self.finetune else 0
        stage1 = self.schedule.stage1_epochs
        return {"stage1": stage1, "stage2": self.schedule.epochs - stage1}[phase]

    def tables(self) -> dict[str, Any]:
        """Return the recipe as nested dictionaries."""
        return self.model_dump(exclude_none=True)

    def tables_of(self, phase: str) -> dict[str, Any]:
        """Return the tables that a phase depends on, without the key that changes no result."""
        tables = self.tables()
        tables["model"].pop("cuda_graphs", None)
        return {name: tables[name] for name in PHASE_TABLES.get(phase, ("evaluation",)) if name in tables}

    def to_toml(self) -> str:
        """Return the recipe as TOML text, with line ends only between its lines."""
        import tomli_w

        about = {"about": self.about.model_dump(exclude_defaults=True)} if self.about else {}
        return toml_text(tomli_w.dumps({**about, **self.tables()}))


def differences(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """Return one line "table.key: old -> new" per key that differs between two nested dictionaries."""
    return [f"{key}: {_shown(a)} -> {_shown(b)}" for key, a, b in changed(old, new)]


def changed(old: dict[str, Any], new: dict[str, Any], prefix: str = "") -> list[tuple[str, Any, Any]]:
    """Return ("table.key", old value, new value) per key that differs between two nested dictionaries.

    Args:
        old: tables of a recipe.
        new: tables of another recipe. A missing key has the value None.
        prefix: start of all returned keys, such as "model.".
    """
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
