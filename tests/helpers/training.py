"""A small training: data, network, plan, and one step by hand."""

import copy
from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

from cpmix_cli.data.batches import ImageBatches
from cpmix_cli.models import Classifier, build_model
from cpmix_cli.recipe.schema import Data, Model, Optimizer, ParameterGroup, Stage
from cpmix_cli.training.inputs import TrainingData
from cpmix_cli.training.loop import fit
from cpmix_cli.training.objective import Term, compile_stage
from cpmix_cli.training.plan import Plan, make_optimizer
from cpmix_cli.training.state import EpochSums, TrainingState

LR, MOMENTUM, DECAY = 0.1, 0.9, 2e-4
COUNTS = [14, 6, 3, 1]
IMAGES = torch.randint(0, 256, (24, 8, 8, 1), dtype=torch.uint8, generator=torch.Generator().manual_seed(7))
STD = 64 / 255  # a power of two, so both sides normalise to the same float32
LABELS = torch.repeat_interleave(torch.arange(4), torch.tensor(COUNTS))

ERM = {"draw": "natural", "loss": "balanced-softmax"}
EQ_9 = {"ratio": "beta", "alpha": 1.5, "mix": "linear", "label": "imbalance-aware", "t": 0.5}
MIXED = {**EQ_9, "loss": "cross-entropy", "weight": 2.5}
CP = {"draw": "class-uniform", "partner": "confusion", **MIXED}
MIX = {"draw": "natural", "partner": "permutation", **MIXED}


def terms_of(**tables: dict[str, object]) -> tuple[Term, ...]:
    return compile_stage(Stage.model_validate({"terms": tables}))


def data() -> TrainingData:
    recipe = Data(augment="crop", padding=1, normalisation="dataset")
    batches = ImageBatches(IMAGES, recipe, [0.5], [STD])
    return TrainingData(batches, LABELS, torch.tensor(COUNTS))


def in_double(model: Classifier) -> Classifier:
    """The network in float64: in float32 two orders of the same sums can fall on two sides of a ReLU's kink."""
    first = next(m for m in model.modules() if isinstance(m, torch.nn.Conv2d | torch.nn.Linear))
    first.register_forward_pre_hook(lambda _, inputs: (inputs[0].double(),))
    return model.double()


def fresh(epoch: int = 1) -> TrainingState:
    model = in_double(build_model(Model(name="resnet8"), 4, (8, 8, 1), torch.Generator().manual_seed(0)))
    recipe = Optimizer(lr=LR, momentum=MOMENTUM, weight_decay=DECAY, batch_size=64)
    confusion = torch.zeros(4, 4, dtype=torch.float64)
    return TrainingState(model, make_optimizer(model, recipe), confusion, epoch=epoch)


def plan_of(terms: tuple[Term, ...], epochs: int, *, batch: int = 64, joint: bool = True) -> Plan:
    return Plan("stage2", 11, terms, joint, 1, epochs, epochs, batch, lambda *_: LR)


def sums_of(plan: Plan, device: str = "cpu") -> EpochSums:
    return EpochSums([term.name for term in plan.terms], device)


def never() -> None:
    """A publish that writes nowhere: these tests look at the state itself."""


def crop(image: Tensor, uniforms: list[float]) -> Tensor:
    """One augmented image [1, 8, 8], pixel by pixel: black border of 1, crop, normalise."""
    row, column = int(uniforms[0] * 3), int(uniforms[1] * 3)
    out = torch.zeros(1, 8, 8)
    for i in range(8):
        for j in range(8):
            y, x = i + row - 1, j + column - 1
            value = float(image[y, x, 0]) if 0 <= y < 8 and 0 <= x < 8 else 0.0
            out[0, i, j] = (value / 255 - 0.5) / STD
    return out


def check_against_loop(
    state: TrainingState,
    terms: tuple[Term, ...],
    loop: Callable[[Classifier], Tensor],
    *,
    nesterov: bool = False,
    groups: Sequence[ParameterGroup] = (),
) -> TrainingState:
    """Take one step of `state` by fit() and one by hand, its loss by `loop`; compare weights and loss."""
    by_hand = copy.deepcopy(state)
    fit(plan_of(terms, state.epoch), data(), state, publish=never)

    model = by_hand.model.train()
    loss = loop(model)
    gradients = torch.autograd.grad(loss, list(model.parameters()))
    for (name, p), g in zip(model.named_parameters(), gradients, strict=True):
        buffer = by_hand.optimizer.state.get(p, {}).get("momentum_buffer")
        own = next((group for group in groups if name.startswith(group.prefix)), ParameterGroup(prefix=""))
        step = g + (DECAY if own.weight_decay is None else own.weight_decay) * p.detach()
        velocity = step if buffer is None else MOMENTUM * buffer + step
        expected = p.detach() - LR * own.lr_factor * (step + MOMENTUM * velocity if nesterov else velocity)
        found = state.model.get_parameter(name).detach()
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-7, msg=lambda m, name=name: f"{name}: {m}")
    assert state.history[-1]["loss"] == pytest.approx(loss.item(), rel=1e-5)
    return state
