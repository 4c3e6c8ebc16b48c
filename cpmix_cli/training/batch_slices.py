"""Batch slices: the part of a batch in one forward pass, for one rank or one of its micro-batches."""

from dataclasses import dataclass

import torch
from torch import Tensor

from cpmix_cli.runtime.ranks import Ranks


@dataclass(frozen=True)
class BatchSlice:
    """One of `num_slices` equal slices of a batch, for one rank or one of its micro-batches.

    If B is not divisible, the last slices are padded with images from the start of the batch.
    """

    index: int
    """Number of this slice, from 0."""
    num_slices: int
    """Slices per batch: ranks * micro-batches per rank."""
    batch_size: int
    """B, images of the whole batch."""

    @property
    def length(self) -> int:
        """P = ceil(B / num_slices), images per slice with padding."""
        return -(-self.batch_size // self.num_slices)

    @property
    def is_whole(self) -> bool:
        """True if this slice is the whole batch."""
        return self.num_slices == 1

    def select(self, values: Tensor) -> Tensor:
        """Return this slice of per-image values: [B, ...] -> [P, ...]."""
        start, end = self.index * self.length, (self.index + 1) * self.length
        if end <= self.batch_size:
            return values[start:end]
        return values[torch.arange(start, end, device=values.device) % self.batch_size]

    def image_weights(self, device: torch.device) -> Tensor | None:
        """Return loss weights [P] float64, or None if no slice is padded.

        Padding weighs 0, other images num_slices * P / B: the average of the weighted slice means is the batch mean.
        """
        if self.num_slices * self.length == self.batch_size:
            return None
        places = torch.arange(self.index * self.length, (self.index + 1) * self.length, device=device)
        return (places < self.batch_size).double() * (self.num_slices * self.length / self.batch_size)


def batch_slices(batch_size: int, micro_batches: int, here: Ranks) -> list[BatchSlice]:
    """Return the slices of this rank, one per micro-batch.

    Args:
        batch_size: B, images of the whole batch over all ranks.
        micro_batches: slices per rank, processed one after the other.
        here: this rank and the number of ranks.
    """
    first = here.rank * micro_batches
    return [BatchSlice(first + i, here.size * micro_batches, batch_size) for i in range(micro_batches)]
