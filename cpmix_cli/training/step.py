"""One optimizer step, computed on the device only: batches, losses, gradients, confusion counts, sums.

Data flow: Inputs of the step -> partners -> image requests -> batches of the terms -> logits -> losses -> EpochSums.
A step reads no value back from the device, and each tensor that it changes keeps its address. So a CUDA graph can
contain a whole step (cuda_graphs.py). The CPU runs the same code.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from cpmix_cli.confusion import count_confusions, count_images, prediction_codes
from cpmix_cli.mixing import MixingState
from cpmix_cli.models import Classifier
from cpmix_cli.runtime import ranks
from cpmix_cli.training.averaging import update_average
from cpmix_cli.training.batch_slices import BatchSlice, batch_slices
from cpmix_cli.training.cuda_graphs import EAGER_STEPS, CudaGraphRunner, StepsInFlight
from cpmix_cli.training.inputs import EpochInputs, Inputs, TrainingData, fetch
from cpmix_cli.training.objective import Output, TermBatch
from cpmix_cli.training.plan import Plan
from cpmix_cli.training.randomness import Draws, TermDraws, seed_torch
from cpmix_cli.training.state import TrainingState


class _ForwardPass(nn.Module):
    """Forward pass over the terms of a step; the module that DistributedDataParallel wraps.

    With `joint`, the batches of all terms are concatenated, so batch norm has common statistics. Otherwise each term
    has its own forward pass. Terms that mix features need only the heads.
    """

    def __init__(self, model: Classifier, plan: Plan) -> None:
        super().__init__()
        self.model = model
        self.joint = plan.joint_forward
        self.has_features = [term.recipe.mixes_features for term in plan.terms]

    def forward(self, inputs: list[Tensor]) -> list[tuple[Tensor, Tensor | None]]:
        """Compute for each term: inputs or features -> raw logits [E, P, C], and router logits [E - 1, P] or None."""
        if self.model.routers is not None:
            return [self.model.routed(x) for x in inputs]
        whole = [x for x, has in zip(inputs, self.has_features, strict=True) if not has]
        if self.joint and whole:
            logits = self.model.expert_logits(torch.cat(whole))
            found = iter(torch.split(logits, [len(x) for x in whole], 1))
        else:
            found = (self.model.expert_logits(x) for x in whole)
        return [
            (self.model.classify(x.flatten(1)) if has else next(found), None)
            for x, has in zip(inputs, self.has_features, strict=True)
        ]


class Step:
    """Training step of a plan: call begin_epoch(), then the object once per step. On CUDA, call it in own_stream().

    Several ranks take a step together, each with its slices of the batch. All ranks draw the same random numbers, for
    the whole batch. The network, optimizer, confusion counts and sums of `state` change in place.
    """

    def __init__(self, plan: Plan, data: TrainingData, state: TrainingState) -> None:
        self._plan = plan
        self._data = data
        self._state = state
        self._ranks = ranks.current()
        self._device = data.labels.device
        self._epoch = 0
        self.inputs = EpochInputs(plan, data, state.model.num_features)
        self._network: nn.Module = _ForwardPass(state.model, plan)
        self._no_sync: Callable[[], AbstractContextManager[None]] = nullcontext  # DDP: no all-reduce for this slice
        if self._ranks.size > 1:
            own_device = [self._device] if self._device.type == "cuda" else None
            network = DistributedDataParallel(self._network, own_device)
            self._network, self._no_sync = network, network.no_sync
        matches = any(term.recipe.match is not None for term in plan.terms)
        record = plan.cuda_graphs and data.batches.resident and self._ranks.size == 1 and not matches
        self._take = CudaGraphRunner(self._run, self._device, record=record)
        self._in_flight = StepsInFlight(self._device)

    def begin_epoch(self, epoch: int) -> None:
        """Draw the inputs of an epoch and copy them to the device."""
        self._epoch = epoch
        began = self._state.epoch_confusion
        self.inputs.begin_epoch(epoch, self._state.confusion if began is None else began)

    def __call__(self, number: int) -> None:
        """Run step `number` of the epoch, counted from 0."""
        plan = self._plan
        seed_torch(self._device, plan.seed, plan.phase, self._epoch, number, self._ranks.rank, "dropout")
        self.inputs.select(number)
        self._take(self._plan.size(number, len(self._data.labels)))
        self._in_flight.launched()

    def record(self) -> None:
        """Run steps until the CUDA graphs of all batch sizes are recorded; without graphs, do nothing."""
        numbers = {0, self._plan.num_steps(len(self._data.labels)) - 1}  # a full batch, and the last one
        for number in sorted(numbers) if self._take.records else ():
            for _ in range(EAGER_STEPS + 1):
                self(number)

    @property
    def capture_seconds(self) -> float:
        """Seconds spent recording CUDA graphs so far."""
        return self._take.capture_seconds

    def _run(self, size: int) -> None:
        """Run the selected step, a batch of `size` images.

        Paper: Algorithm 1 and Eq. (13). Differs: with one joint forward pass, the errors of this step are not known
        when partners are drawn. Partners come from the counts up to the previous step.
        """
        plan, state = self._plan, self._state
        inputs = self.inputs.row(size)
        mixing = MixingState(self._data.class_counts, state.confusion, inputs.fallbacks[0], state.counted_images)
        inputs = self.inputs.choose_partners(inputs, mixing)
        parts = batch_slices(size, plan.micro_batches, self._ranks)
        state.optimizer.zero_grad(set_to_none=True)
        values, codes = [], []
        for part in parts:
            batches = self._batches(inputs.draws, part, mixing)
            with nullcontext() if part is parts[-1] else self._no_sync():
                outputs = self._forward(batches)
                losses = [
                    term.loss(output, batch, self._data.class_counts)
                    for term, output, batch in zip(plan.terms, outputs, batches, strict=True)
                ]
                weighted = [t.recipe.weight * x for t, x in zip(plan.terms, losses, strict=True)]
                losses = [torch.stack(weighted).sum(), *losses]
                (losses[0] / len(parts)).backward()  # type: ignore[no-untyped-call]
            correct, found = self._predictions(outputs, batches, inputs)
            values.append(torch.stack([*(x.detach().double() / part.num_slices for x in losses), correct]))
            codes += found
        norm = torch.nn.utils.get_total_norm([p.grad for p in state.model.parameters() if p.grad is not None])
        for group in state.optimizer.param_groups:
            group["lr"].copy_(inputs.learning_rate[0] * group["lr_factor"])
        state.optimizer.step()
        if state.average is not None and inputs.average_share is not None:
            update_average(state.average, state.model, inputs.average_share[0])

        *means, right = self._ranks.sum_(torch.stack(values).sum(0)).unbind()
        errors = torch.zeros_like(right)
        if codes:
            counted = self._ranks.all_gather(torch.cat(codes))
            errors = count_confusions(state.confusion, counted)
            if state.counted_images is not None:
                count_images(state.counted_images, counted)
        state.sums.add(losses=means, gradient_norm=norm, correct=right, errors=errors, fallbacks=inputs.fallbacks[0])

    def _batches(self, draws: Draws, part: BatchSlice, state: MixingState) -> list[TermBatch]:
        """Make the batch of each term for a slice; terms share the natural images, which are read once."""
        made: list[TermBatch] = []
        natural = fetch(self._data.batches, draws.natural, part)
        for term, own in zip(self._plan.terms, draws.terms, strict=True):
            x1 = natural if own.first is None else fetch(self._data.batches, own.first, part)
            assert x1 is not None  # a term without its own images uses the natural batch
            x2 = fetch(self._data.batches, own.second, part)
            if x2 is None and own.partners is not None:
                x2 = x1[own.partners.index]  # partners in the batch: then the slice is the whole batch
            features = None
            if x2 is not None and _matches(own):
                features = self._features(x1, train=False), self._features(x2, train=False)
            if x2 is not None and term.recipe.mixes_features:  # apart: batch norm never sees both
                pair = (self._features(x, train=self._plan.train_mode) for x in (x1, x2))
                x1, x2 = (f.view(len(f), len(self._state.model.heads), -1) for f in pair)
            made.append(term.batch(x1, x2, own, part, state, features))
        return made

    def _forward(self, batches: list[TermBatch]) -> list[Output]:
        """Compute the logits of the network, the routers and the teacher for each term's batch."""
        plan = self._plan
        taught = [
            self._taught(b.x) if "teacher" in t.functions else None for t, b in zip(plan.terms, batches, strict=True)
        ]
        with torch.autocast(self._device.type, dtype=torch.bfloat16, enabled=plan.precision == "bf16"):
            passed = self._network([batch.x for batch in batches])
        return [
            Output(_at_least_fp32(logits), None if routes is None else _at_least_fp32(routes), teacher)
            for (logits, routes), teacher in zip(passed, taught, strict=True)
        ]

    def _predictions(
        self, outputs: list[Output], batches: list[TermBatch], inputs: Inputs
    ) -> tuple[Tensor, list[Tensor]]:
        """Return the correct predictions of the measured terms, a float64 scalar, and the counted term's codes."""
        plan = self._plan
        counts = inputs.counts_errors > 0
        correct, codes = inputs.counts_errors.new_zeros(()), []
        measured, counted = plan.measured_terms, plan.counted_term
        for term, output, batch in zip(plan.terms, outputs, batches, strict=True):
            if term is not counted and term not in measured:
                continue
            logits = output.logits.detach()
            predicted = logits.mean(0).argmax(1)
            weights = batch.image_weights
            own = torch.ones_like(predicted, dtype=torch.bool) if weights is None else weights > 0  # without padding
            if term in measured:
                correct = correct + ((predicted == batch.y1) & own).sum()
            if term is counted:
                unmixed = counts if batch.gate is None else counts & ~batch.gate
                codes.append(prediction_codes(batch.y1, predicted, own & unmixed, logits.shape[-1]))
        return correct, codes

    @torch.no_grad()
    def _taught(self, x: Tensor) -> Tensor:
        """Compute the teacher's logits: inputs [P, ...] -> [P, C]."""
        teacher = self._plan.teacher
        assert teacher is not None  # train-stage1 requires --teacher
        with torch.autocast(x.device.type, dtype=torch.bfloat16, enabled=self._plan.precision == "bf16"):
            logits: Tensor = teacher(x)
        return _at_least_fp32(logits)

    @torch.no_grad()
    def _features(self, x: Tensor, *, train: bool) -> Tensor:
        """Compute the network's features without a gradient, in training or eval mode: inputs [P, ...] -> [P, D]."""
        model = self._state.model
        model.train(train)
        with torch.autocast(x.device.type, dtype=torch.bfloat16, enabled=self._plan.precision == "bf16"):
            found = _at_least_fp32(model.features(x))
        model.train(self._plan.train_mode)
        return found


def _matches(draws: TermDraws) -> bool:
    """Return whether this step matches partners with images. Waits for the device if batches are gated."""
    if not draws.matching or draws.mixing is None:
        return False
    return draws.mixing.gate is None or bool(draws.mixing.gate)


def _at_least_fp32(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))
