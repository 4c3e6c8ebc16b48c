"""The training state: all that a run resumes from, held, saved and restored."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from cpmix_cli.artifacts.seals import check_seal
from cpmix_cli.artifacts.tensors import check_fit, read_tensors, tensors_digest
from cpmix_cli.models import Classifier
from cpmix_cli.runs.run_json import StateRecord, state_record
from cpmix_cli.runtime.errors import InputError, shortened


class EpochSums:
    """Sums over the steps of an epoch, on the device; `terms` are the names of the phase's terms."""

    def __init__(self, terms: Sequence[str] = (), device: torch.device | str = "cpu") -> None:
        losses = [f"loss_{name}" for name in terms]
        self._names = ["loss", *losses, "gradient_norm", "correct", "errors", "finite_steps", "seconds", "fallbacks"]
        self._num_measured = self._names.index("finite_steps")
        self.values = torch.zeros(len(self._names), dtype=torch.float64, device=device)
        """[T + 7] float64; stays at its address."""

    def __getitem__(self, name: str) -> Tensor:
        """A sum as a view: sums["seconds"].add_(...)."""
        return self.values[self._names.index(name)]

    def add(
        self, *, losses: Sequence[Tensor], gradient_norm: Tensor, correct: Tensor, errors: Tensor, fallbacks: Tensor
    ) -> None:
        """Add one step. Its losses are the objective, then each term; `correct` counts where that is measured, and
        `fallbacks` the partners drawn without a confusion.
        """
        measured = self.values[: self._num_measured]
        measured += torch.stack([v.double() for v in (*losses, gradient_norm, correct, errors)])
        # A sum that is not finite never is again: this one counts the steps before the first that was not.
        self["finite_steps"].add_(measured.isfinite().all())
        self["fallbacks"].add_(fallbacks)

    def read(self) -> dict[str, float]:
        """All sums by name. Waits for the device."""
        return dict(zip(self._names, self.values.tolist(), strict=True))


@dataclass
class TrainingState:
    """All that a run resumes from."""

    model: Classifier
    optimizer: torch.optim.Optimizer
    confusion: Tensor
    """K [C, C] float64."""
    epoch: int
    """The epoch under way, counted as in Plan; the last one when all is done."""
    step: int = 0
    """Steps of that epoch already taken."""
    sums: EpochSums = field(default_factory=EpochSums)
    """Of the epoch under way."""
    history: list[dict[str, float | None]] = field(default_factory=list)
    """Rows of metrics.parquet."""
    epoch_confusion: Tensor | None = None
    """K as it was when the epoch under way began, on the CPU; None if partners are not chosen from that."""

    def tensors(self) -> dict[str, Tensor]:
        """Everything as named tensors; the history as float64 [epochs, columns], NaN for null."""
        rows = [[math.nan if v is None else v for v in row.values()] for row in self.history]
        return {**self._finite_tensors(), "history": torch.tensor(rows, dtype=torch.float64)}

    def not_finite(self) -> str:
        """Names of tensors with a value that is not finite, the first few; "" if training goes well."""
        return shortened([name for name, t in self._finite_tensors().items() if not t.isfinite().all()], 5)

    def _finite_tensors(self) -> dict[str, Tensor]:
        """All tensors but the history."""
        tensors = {f"model.{name}": tensor for name, tensor in self.model.state_dict().items()}
        for name, parameter in self.model.named_parameters():
            for key, value in self.optimizer.state.get(parameter, {}).items():
                if isinstance(value, Tensor):
                    tensors[f"optimizer.{name}.{key}"] = value
        tensors["confusion"] = self.confusion
        if self.epoch_confusion is not None and self.step > 0:
            tensors["epoch_confusion"] = self.epoch_confusion
        tensors["sums"] = self.sums.values
        return tensors

    def load(self, tensors: Mapping[str, Tensor], path: Path, *, optimizer: bool = True) -> None:
        """Copy the network, the optimizer (or leave it fresh) and the confusion counts of a training_state.safetensors;
        all of it is checked first.

        Raises:
            InputError: the file does not fit the network, lacks something or holds more, or holds values out of range.
        """
        own = {f"model.{name}": t for name, t in self.model.state_dict().items()} | {"confusion": self.confusion}
        others: tuple[str, ...] = ("sums", "history")
        if optimizer:
            own |= self._optimizer_tensors()
            if "epoch_confusion" in tensors:  # of an epoch under way
                own["epoch_confusion"] = self.confusion
        else:  # that of another phase, over other parameters
            others += ("optimizer.", "epoch_confusion")
        saved = {n: t for n, t in tensors.items() if not n.startswith(others)}
        check_fit(path, saved, own)
        counts = [t for n, t in saved.items() if n in ("confusion", "epoch_confusion")]
        if any((t < 0).any() or t.diagonal().any() for t in counts):
            raise InputError(f"{path} holds confusion counts below 0, or of a class with itself")
        self.model.load_state_dict({n.removeprefix("model."): t for n, t in saved.items() if n.startswith("model.")})
        self.confusion.copy_(saved["confusion"])
        if not optimizer:
            return
        self.epoch_confusion = saved.get("epoch_confusion")
        for name in self._optimizer_tensors():
            owner, _, key = name.removeprefix("optimizer.").rpartition(".")
            parameter, value = self.model.get_parameter(owner), saved[name]
            # A buffer shaped like its parameter also gets its memory format; Adam's step count is a scalar.
            like = parameter if value.shape == parameter.shape else value
            self.optimizer.state[parameter][key] = torch.empty_like(like, device=parameter.device).copy_(value)

    def _optimizer_tensors(self) -> dict[str, Tensor]:
        """What tensors() gives of the optimizer after a step, shapes and types alone."""
        found: dict[str, Tensor] = {}
        names = {parameter: name for name, parameter in self.model.named_parameters()}
        for group in self.optimizer.param_groups:
            for p in group["params"]:
                own = f"optimizer.{names[p]}"
                if isinstance(self.optimizer, torch.optim.Adam):
                    found |= {f"{own}.exp_avg": p, f"{own}.exp_avg_sq": p, f"{own}.step": torch.zeros(())}
                elif group["momentum"]:
                    found[f"{own}.momentum_buffer"] = p
        return found


def read_state(path: Path) -> tuple[dict[str, Tensor], StateRecord]:
    """Read tensors and metadata of an interrupted phase's training state, verified by its own digests.

    Raises:
        InputError: missing or damaged.
    """
    tensors, metadata = read_tensors(path)
    return tensors, state_record(path, check_seal(path, metadata, tensors_digest(tensors)))


def load_model(model: Classifier, tensors: Mapping[str, Tensor], path: Path) -> None:
    """Copy weights into a network, names, shapes, types and values checked first.

    Raises:
        InputError: the file is of another network or another number of classes, or holds values that are not finite.
    """
    check_fit(path, tensors, model.state_dict())
    model.load_state_dict(dict(tensors))
