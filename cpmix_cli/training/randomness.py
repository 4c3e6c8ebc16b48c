"""Random streams by name.

Every draw comes from a generator keyed by (seed, phase, epoch, purpose), on the CPU and ahead of the epoch. So draws
are the same on every device, do not depend on each other's order, and a resumed run needs only integers to go on.
"""

import hashlib

import numpy as np
import torch


def _key(parts: tuple[int | str, ...]) -> int:
    return int.from_bytes(hashlib.sha256("/".join(map(str, parts)).encode()).digest()[:16], "big")


def stream(*parts: int | str) -> np.random.Generator:
    """The NumPy generator of a name, such as stream(seed, "stage2", 201, "cp/ratio")."""
    return np.random.Generator(np.random.Philox(key=_key(parts)))


def torch_generator(*parts: int | str) -> torch.Generator:
    """The torch CPU generator of a name; for weight initialisation."""
    return torch.Generator().manual_seed(_key(parts) % 2**63)
