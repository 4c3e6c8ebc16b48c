"""What must be equal between two equal runs."""

from pathlib import Path

import pandas as pd

from cpmix_cli.artifacts.tensors import read_tensors

CLOCK = ["seconds", "images_per_second"]


def files(folder: Path) -> list[str]:
    """All files below a folder, as sorted relative names; hidden ones too."""
    return sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())


def exact_contents(folder: Path) -> dict[str, bytes]:
    """Every file below a folder with its bytes."""
    return {name: (folder / name).read_bytes() for name in files(folder)}


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below a folder: all but the times, hosts and paths in records, and the clock in metrics and states."""
    found = {}
    for name in files(folder):
        path = folder / name
        if path.name == "metrics.parquet":
            found[name] = pd.read_parquet(path).drop(columns=CLOCK).to_csv().encode()
        elif path.name == "training_state.safetensors":
            tensors, _ = read_tensors(path)
            kept = {n: t for n, t in tensors.items() if n not in ("history", "sums")}
            found[name] = b"".join(t.numpy().tobytes() for _, t in sorted(kept.items()))
        elif path.name != "run.json":
            found[name] = path.read_bytes()
    return found
