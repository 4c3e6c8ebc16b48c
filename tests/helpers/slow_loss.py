"""Losses by loops."""

import math
from typing import Any

import torch
from torch import Tensor


def slow_loss(
    name: str, logits: Tensor, labels: list[int], weights: list[Tensor], counts: list[int], parameters: dict[str, Any]
) -> Tensor:
    """A loss of losses.py by loops over images and classes, from its formula; differentiable."""
    p = {"tau": 1.0, "max_margin": 0.5, "scale": 30.0, "over": "others", **parameters}
    batch_size, num_classes = logits.shape
    total = torch.zeros(())
    for b, y in enumerate(labels):
        z = [logits[b, c] for c in range(num_classes)]
        if name in ("balanced-softmax", "lade"):
            z = [a + math.log(n) for a, n in zip(z, counts, strict=True)]
        if name == "logit-adjusted":
            z = [a + p["tau"] * math.log(n / sum(counts)) for a, n in zip(z, counts, strict=True)]
        if name == "ldam":
            z[y] = z[y] - p["scale"] * p["max_margin"] * counts[y] ** -0.25 / min(counts) ** -0.25
        log_sum = torch.log(sum(torch.exp(a) for a in z))  # type: ignore[arg-type]
        loss = log_sum - z[y]
        if name == "focal":
            loss = (1 - torch.exp(-loss)) ** p["gamma"] * loss
        if name == "sigmoid-focal":
            chances = [torch.sigmoid(a if c == y else -a) for c, a in enumerate(z)]
            loss = sum(((1 - q) ** p["gamma"] * -torch.log(q) for q in chances), torch.zeros(()))
        if name == "label-aware-smoothing":
            angle = math.pi * (counts[y] - min(counts)) / (2 * (max(counts) - min(counts)))
            eps = p["smooth_tail"] + (p["smooth_head"] - p["smooth_tail"]) * math.sin(angle)
            target = [0.0] * num_classes
            for c in range(num_classes):
                if p["over"] == "all":
                    target[c] = (1 - eps) * (c == y) + eps / num_classes
                else:
                    target[c] = 1 - eps if c == y else eps / (num_classes - 1)
            loss = sum((q * (log_sum - a) for q, a in zip(target, z, strict=True)), torch.zeros(()))
        total = total + weights[b] * loss
    total = total / batch_size
    if name == "lade":
        for c in range(num_classes):
            own = [logits[b, c] for b, y in enumerate(labels) if y == c]
            first = sum(own, torch.zeros(())) / len(own) if own else torch.zeros(())
            even = torch.zeros(())
            for b, y in enumerate(labels):
                even = even + torch.exp(logits[b, c]) / (num_classes * counts[y] / sum(counts)) / batch_size
            second = torch.log(even)
            regulariser = counts[c] / sum(counts) * (-first + second + p["remine"] * second**2)
            total = total + p["lader_weight"] * sum(weights) / batch_size * regulariser
    return total


def drawn(generator: torch.Generator, size: int = 7) -> tuple[Tensor, Tensor, Tensor]:
    """Logits, labels and weights; class 3 does not occur."""
    logits = torch.randn(size, 4, generator=generator, requires_grad=True)
    return logits, torch.randint(0, 3, (size,), generator=generator), torch.rand(size, generator=generator)
