"""The training state: network, optimizer, confusion counts, position and metrics of a phase; saved and restored."""

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
    """Sums over the steps of an epoch, on the device; `terms` are the T names of the phase's terms."""

    def __init__(self, terms: Sequence[str] = (), device: torch.device | str = "cpu") -> None:
        losses = [f"loss_{name}" for name in terms]
        self._names = ["loss", *losses, "gradient_norm", "correct", "errors", "finite_steps", "seconds", "fallbacks"]
        self._num_measured = self._names.index("finite_steps")
        self.values = torch.zeros(len(self._names), dtype=torch.float64, device=device)
        """Sums [T + 7] float64; the address never changes."""

    def __getitem__(self, name: str) -> Tensor:
        """Return one sum as a view: sums["seconds"].add_(...)."""
        return self.values[self._names.index(name)]

    def add(
        self, *, losses: Sequence[Tensor], gradient_norm: Tensor, correct: Tensor, errors: Tensor, fallbacks: Tensor
    ) -> None:
        """Add the values of one step, all scalars on the device.

        Args:
            losses: the objective, then the unweighted loss of each term, T + 1 values.
            gradient_norm: L2 norm over all trained parameters.
            correct: correct predictions of the measured terms, in images.
            errors: counted errors, in images.
            fallbacks: partners drawn for a class without confusions.
        """
        measured = self.values[: self._num_measured]
        measured += torch.stack([v.double() for v in (*losses, gradient_norm, correct, errors)])
        # A sum stays non-finite once it is: so this counts the steps before the first non-finite one.
        self["finite_steps"].add_(measured.isfinite().all())
        self["fallbacks"].add_(fallbacks)

    def read(self) -> dict[str, float]:
        """Return all sums by name. Waits for the device."""
        return dict(zip(self._names, self.values.tolist(), strict=True))


@dataclass
class TrainingState:
    """Training state of a phase: all that a run needs to resume."""

    model: Classifier
    optimizer: torch.optim.Optimizer
    confusion: Tensor
    """Confusion counts K [C, C] float64: images of class i (row) predicted as class j (column)."""
    epoch: int
    """Current epoch, counted as in Plan; after training, the last epoch."""
    step: int = 0
    """Completed steps of that epoch."""
    sums: EpochSums = field(default_factory=EpochSums)
    """Sums of the current epoch."""
    history: list[dict[str, float | None]] = field(default_factory=list)
    """Rows of metrics.parquet, one per completed epoch."""
    epoch_confusion: Tensor | None = None
    """K [C, C] at the start of the current epoch, on the CPU; None unless partners are chosen once per epoch."""
    counted_images: Tensor | None = None
    """Counted images per class [C] float64, right or wrong predictions; None unless the recipe has a match."""
    average: Classifier | None = None
    """Network with the averaged weights; None unless the recipe averages. See averaging.py."""

    @property
    def result(self) -> Classifier:
        """Network that the phase publishes: the average, if there is one."""
        return self.model if self.average is None else self.average

    def tensors(self) -> dict[str, Tensor]:
        """Return the state as named tensors; the history is [epochs, columns] float64 with NaN for null."""
        rows = [[math.nan if v is None else v for v in row.values()] for row in self.history]
        return {**self._finite_tensors(), "history": torch.tensor(rows, dtype=torch.float64)}

    def not_finite(self) -> str:
        """Return the names of the first few tensors with a value that is not finite; "" if there are none."""
        tensors = {name: t for name, t in self._finite_tensors().items() if t.is_floating_point() and t.numel()}
        largest = torch.nn.utils.get_total_norm(tensors.values(), math.inf)  # one read of the device
        if largest.isfinite():
            return ""
        return shortened([name for name, t in tensors.items() if not t.isfinite().all()], 5)

    def _finite_tensors(self) -> dict[str, Tensor]:
        """Return all tensors except the history, whose nulls are NaN."""
        tensors = {f"model.{name}": tensor for name, tensor in self.model.state_dict().items()}
        for name, parameter in self.model.named_parameters():
            for key, value in self.optimizer.state.get(parameter, {}).items():
                if isinstance(value, Tensor):
                    tensors[f"optimizer.{name}.{key}"] = value
        tensors["confusion"] = self.confusion
        if self.epoch_confusion is not None and self.step > 0:
            tensors["epoch_confusion"] = self.epoch_confusion
        if self.counted_images is not None:
            tensors["counted_images"] = self.counted_images
        if self.average is not None:
            tensors |= {f"average.{name}": tensor for name, tensor in self.average.state_dict().items()}
        tensors["sums"] = self.sums.values
        return tensors

    def load(self, tensors: Mapping[str, Tensor], path: Path, *, optimizer: bool = True) -> None:
        """Copy networks, optimizer and confusion counts from a saved state. All are checked first.

        Args:
            tensors: content of training_state.safetensors, by name.
            path: that file, for messages.
            optimizer: False leaves the optimizer unchanged, for a phase with other parameters.

        Raises:
            InputError: tensors are missing, superfluous or of another shape or type, or have values out of range.
        """
        own = {f"model.{name}": t for name, t in self.model.state_dict().items()} | {"confusion": self.confusion}
        if self.average is not None:
            own |= {f"average.{name}": t for name, t in self.average.state_dict().items()}
        others: tuple[str, ...] = ("sums", "history")
        if optimizer:
            own |= self._optimizer_tensors()
            if "epoch_confusion" in tensors:  # saved within an epoch
                own["epoch_confusion"] = self.confusion
        else:  # the saved optimizer belongs to another phase and other parameters
            others += ("optimizer.", "epoch_confusion")
        if self.counted_images is None:
            others += ("counted_images",)
        elif "counted_images" not in tensors:
            raise InputError(
                f"{path} has no counts of the images of each class, which a match needs",
                fix="train that phase with the recipe that has the match, into another folder",
            )
        else:
            own["counted_images"] = self.counted_images
        saved = {n: t for n, t in tensors.items() if not n.startswith(others)}
        check_fit(path, saved, own)
        counts = [t for n, t in saved.items() if n in ("confusion", "epoch_confusion")]
        if any((t < 0).any() or t.diagonal().any() for t in counts):
            raise InputError(f"{path} has confusion counts below 0, or of a class with itself", path=path)
        if self.counted_images is not None and (saved["counted_images"] < saved["confusion"].sum(1) - 0.5).any():
            raise InputError(f"{path} counts more errors of a class than images", path=path)
        for prefix, network in (("model.", self.model), ("average.", self.average)):
            if network is not None:
                _copy(network, {n.removeprefix(prefix): t for n, t in saved.items() if n.startswith(prefix)})
        self.confusion.copy_(saved["confusion"])
        if self.counted_images is not None:
            self.counted_images.copy_(saved["counted_images"])
        if not optimizer:
            return
        self.epoch_confusion = saved.get("epoch_confusion")
        for name in self._optimizer_tensors():
            owner, _, key = name.removeprefix("optimizer.").rpartition(".")
            parameter, value = self.model.get_parameter(owner), saved[name]
            # A buffer of the parameter's shape gets its memory format too; Adam's step count is a scalar.
            like = parameter if value.shape == parameter.shape else value
            self.optimizer.state[parameter][key] = torch.empty_like(like, device=parameter.device).copy_(value)

    def _optimizer_tensors(self) -> dict[str, Tensor]:
        """Return the optimizer tensors that tensors() has after a step; only names, shapes and types are valid."""
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
    """Read the tensors and the metadata of an interrupted phase's training state, verified by the digests it contains.

    Raises:
        InputError: the file is missing or damaged.
    """
    tensors, metadata = read_tensors(path)
    return tensors, state_record(path, check_seal(path, metadata, tensors_digest(tensors)))


def load_model(model: Classifier, tensors: Mapping[str, Tensor], path: Path) -> None:
    """Copy weights into a network. Names, shapes, types and values are checked first.

    Args:
        model: changes in place.
        tensors: weights by name, as in the network's state_dict().
        path: file of the weights, for messages.

    Raises:
        InputError: the file belongs to another network or number of classes, or has values that are not finite.
    """
    check_fit(path, tensors, model.state_dict())
    _copy(model, tensors)


@torch.no_grad()
def _copy(network: Classifier, tensors: Mapping[str, Tensor]) -> None:
    """Copy weights of checked names and shapes. load_state_dict() of a library's module may ask for versions of it."""
    for name, own in network.state_dict().items():
        own.copy_(tensors[name])
