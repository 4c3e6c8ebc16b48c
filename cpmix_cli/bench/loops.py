"""Training loops that `bench` times: cpmix, the loop of the released long-tail code, and single parts of training.

All loops train the same network on the same images, with a very small learning rate, so the weights hardly change. A
loop counts an image once per forward pass.
"""

import signal
import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import cycle
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, RandomSampler

from cpmix_cli.data.batches import Batches
from cpmix_cli.data.decoding import open_image
from cpmix_cli.models import Classifier
from cpmix_cli.recipe.schema import Data
from cpmix_cli.runtime import signals
from cpmix_cli.training.cuda_graphs import EAGER_STEPS, CudaGraphRunner, own_stream, synchronize
from cpmix_cli.training.inputs import STEPS_AHEAD, TrainingData
from cpmix_cli.training.loop import epoch_steps
from cpmix_cli.training.plan import Plan
from cpmix_cli.training.state import EpochSums, TrainingState
from cpmix_cli.training.step import Step

_RATE = 1e-5


class TimedLoop(ABC):
    """Loop of training steps, or of a part of them, on a device."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    @abstractmethod
    def take(self, num_steps: int) -> int:
        """Run `num_steps` steps; return the images processed, counted once per forward pass."""

    def warm_up(self) -> None:
        """Run steps until kernels are selected, memory is allocated and CUDA graphs are recorded."""
        self.timed(EAGER_STEPS + 1)

    def timed(self, num_steps: int) -> tuple[float, int]:
        """Run `num_steps` steps; return the seconds until the device is done, and the images processed."""
        with own_stream(self.device):
            synchronize(self.device)
            started = time.perf_counter()
            images = self.take(num_steps)
            synchronize(self.device)
            return time.perf_counter() - started, images


class TrainingLoop(TimedLoop):
    """Training loop of cpmix: the epochs of a phase, without checkpoints and console output."""

    def __init__(self, data: TrainingData, plan: Plan, state: TrainingState) -> None:
        super().__init__(data.labels.device)
        self._state, self._num_images = state, len(data.labels)
        self._plan = replace(plan, learning_rate=lambda *_: _RATE)
        state.sums = EpochSums([term.name for term in plan.terms], self.device)
        state.model.train(plan.train_mode)
        self._step = Step(self._plan, data, state)
        self._num_steps = plan.num_steps(self._num_images)
        self._steps = self._endless()

    def _endless(self) -> Iterator[None]:
        while True:
            self._state.step = 0
            yield from epoch_steps(self._plan, self._step, self._state, self._num_steps)

    def warm_up(self) -> None:
        with own_stream(self.device):
            self._step.begin_epoch(self._state.epoch)
            for number in {0, self._num_steps - 1}:  # a full batch, and the last one, which may be smaller
                for _ in range(EAGER_STEPS + 1):
                    self._step(number)
            synchronize(self.device)

    def take(self, num_steps: int) -> int:
        images = 0
        for _ in range(num_steps):
            next(self._steps)
            images += self._plan.size(self._state.step - 1, self._num_images) * self._plan.num_passes
        return images


class NetworkAlone(TimedLoop):
    """Forward pass, backward pass and optimizer step on one resident batch.

    On CUDA the step is a graph, as in training on one rank. `record` False runs it eagerly, as in training on several.
    """

    def __init__(self, data: TrainingData, plan: Plan, state: TrainingState, *, record: bool = True) -> None:
        super().__init__(data.labels.device)
        self._precision = plan.precision
        self._state = state
        state.model.train(plan.train_mode)
        for group in state.optimizer.param_groups:
            group["lr"].fill_(_RATE)
        size = plan.size(0, len(data.labels))
        wanted = [size * plan.num_passes] if plan.joint_forward else [size] * plan.num_passes
        chosen = [torch.arange(n, device=self.device) % len(data.labels) for n in wanted]
        self._inputs = [(data.batches.plain(i.to(data.batches.device)), data.labels[i]) for i in chosen]
        self._step = CudaGraphRunner(self._run, self.device, record=record and plan.cuda_graphs)

    def _run(self, key: int) -> None:
        with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self._precision == "bf16"):
            losses = [F.cross_entropy(self._state.model(x).float(), labels) for x, labels in self._inputs]
        self._state.optimizer.zero_grad(set_to_none=True)
        torch.stack(losses).sum().backward()  # type: ignore[no-untyped-call]
        self._state.optimizer.step()

    def take(self, num_steps: int) -> int:
        for _ in range(num_steps):
            self._step(0)
        return num_steps * sum(len(x) for x, _ in self._inputs)


class InputAlone(TimedLoop):
    """Reading and augmentation of images, without a network.

    Images on disk are prefetched as in training. Resident images are the same at each step, so only augmentation is
    timed.
    """

    def __init__(self, batches: Batches, device: torch.device, num_images: int, batch_size: int) -> None:
        super().__init__(device)
        generator = torch.Generator().manual_seed(0)
        self._batches = batches
        self._size = batch_size

        def draw() -> tuple[Tensor, Tensor]:
            indices = torch.randint(num_images, (batch_size,), generator=generator)
            uniforms = torch.rand(batch_size, batches.num_uniforms, dtype=torch.float64, generator=generator)
            return indices.to(batches.device), uniforms.to(batches.device)

        self._draws = cycle([draw()]) if batches.resident else iter(draw, None)
        self._coming: deque[tuple[Tensor, Tensor]] = deque()

    def take(self, num_steps: int) -> int:
        for _ in range(num_steps):
            while len(self._coming) <= STEPS_AHEAD:
                self._coming.append(next(self._draws))
                self._batches.prefetch(*self._coming[-1])
            self._batches.batch(*self._coming.popleft())
        return num_steps * self._size


def _leave_signals(worker: int) -> None:
    """Ignore Ctrl-C in a loader process, and restore the defaults of other signals: the main process handles them."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    for number in signals.HANDLED:
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, signal.SIG_DFL)


class PilImages(Dataset[tuple[Tensor, int]]):
    """Map-style data set of PIL images, which torchvision transforms one by one.

    Args:
        images: images [N, H, W, channels] uint8, or N image files.
        shape: shape of a test image (H, W, channels).
        labels: class of each image [N] int64.
        recipe: [data] of the recipe: crop, padding and augmentation.
    """

    def __init__(self, images: Tensor | Sequence[Path], shape: Sequence[int], labels: Tensor, recipe: Data) -> None:
        from torchvision import transforms

        self._images = images.numpy() if isinstance(images, Tensor) else images
        self._labels = labels.tolist()
        height, width, channels = shape
        steps: list[Any] = []
        if recipe.augment.startswith("resized-crop"):
            steps = [transforms.RandomResizedCrop(recipe.crop)]
        elif not isinstance(images, Tensor):
            steps = [transforms.Resize(height), transforms.CenterCrop(height)]
        if recipe.augment.startswith("crop"):
            steps.append(transforms.RandomCrop((height, width), padding=recipe.padding))
        elif recipe.augment == "none" and recipe.crop:
            steps.append(transforms.CenterCrop(recipe.crop))
        if "flip" in recipe.augment:
            steps.append(transforms.RandomHorizontalFlip())
        if recipe.augment.endswith("autoaugment"):
            steps.append(transforms.AutoAugment(transforms.AutoAugmentPolicy.CIFAR10, fill=recipe.fill))
        if recipe.augment.endswith("jitter"):
            steps.append(transforms.ColorJitter(0.4, 0.4, 0.4))
        steps += [transforms.ToTensor(), transforms.Normalize((0.5,) * channels, (0.25,) * channels)]
        self._transform = transforms.Compose(steps)

    def __len__(self) -> int:
        return len(self._labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        found = self._images[index]
        if isinstance(found, Path):
            with found.open("rb") as file, open_image(file) as image:
                return self._transform(image.convert("RGB")), self._labels[index]
        image = Image.fromarray(found.squeeze(-1) if found.shape[-1] == 1 else found)
        return self._transform(image), self._labels[index]


class ReferenceLoop(TimedLoop):
    """Reference loop, as in the released code of LDAM-DRW and its successors.

    PIL transforms run in loader processes, convolutions in TF32, which is cuDNN's default, and the loss is read at each
    step.
    """

    def __init__(self, data: PilImages, model: Classifier, batch_size: int, num_workers: int) -> None:
        super().__init__(next(model.parameters()).device)
        self._data = data
        self._model = model.train()
        self._optimizer = torch.optim.SGD(model.parameters(), lr=_RATE, momentum=0.9, weight_decay=2e-4)
        self._batch_size, self._num_workers = batch_size, num_workers
        self._batches: Iterator[Any] = iter(())

    def timed(self, num_steps: int) -> tuple[float, int]:
        """Run `num_steps` steps with new workers; return the seconds and the images processed.

        Batches that the workers prefetched before are used up first. The workers end afterwards: they would slow down
        the other loops.
        """
        ahead = self._num_workers * 2  # each worker prefetches two batches, the loader's default
        # The loader has as many batches after the timed ones, so the workers are busy until the end.
        num_samples = (num_steps + 2 * ahead) * self._batch_size
        generator = torch.Generator().manual_seed(0)
        loader = DataLoader(
            self._data,
            batch_size=self._batch_size,
            sampler=RandomSampler(self._data, replacement=True, num_samples=num_samples, generator=generator),
            num_workers=self._num_workers,
            pin_memory=self.device.type == "cuda",
            worker_init_fn=_leave_signals,
        )
        cudnn = torch.backends.cudnn
        own = cudnn.benchmark, cudnn.deterministic, cudnn.conv.fp32_precision  # type: ignore[attr-defined]
        cudnn.benchmark, cudnn.deterministic, cudnn.conv.fp32_precision = True, False, "tf32"  # type: ignore[attr-defined]
        try:
            with own_stream(self.device):
                self._batches = iter(loader)
                self.take(ahead)
            return super().timed(num_steps)
        finally:
            self._batches = iter(())
            cudnn.benchmark, cudnn.deterministic, cudnn.conv.fp32_precision = own  # type: ignore[attr-defined]

    def take(self, num_steps: int) -> int:
        for _ in range(num_steps):
            x, labels = next(self._batches)
            x, labels = x.to(self.device, non_blocking=True), labels.to(self.device, non_blocking=True)
            logits = self._model(x)
            loss = F.cross_entropy(logits, labels)
            loss.item()
            top5 = logits.topk(min(5, logits.shape[1]), 1).indices == labels[:, None]
            _accuracies = [100 * right.float().sum() / len(x) for right in (top5[:, :1], top5)]
            self._optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            self._optimizer.step()
        return num_steps * self._batch_size
