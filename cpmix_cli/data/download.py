"""Fetching published sets: the only file that reads a network, and only for `build-lt --download`.

Pooch does the work: a temporary file, a hash, then a rename; a file with the right hash is not fetched again.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from cpmix_cli.artifacts import files
from cpmix_cli.data.cifar import CIFAR10, CIFAR100
from cpmix_cli.runtime import console
from cpmix_cli.runtime.errors import EnvironmentFault, InputError, UsageError

TIMEOUT = 60  # seconds without a byte


@dataclass(frozen=True)
class Remote:
    """A published file."""

    url: str
    sha256: str

    @property
    def name(self) -> str:
        """Its file name."""
        return self.url.rsplit("/", 1)[1]


FASHION = "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com"
FASHION_ARCHIVES = {
    "train-images-idx3-ubyte.gz": "3aede38d61863908ad78613f6a32ed271626dd12800ba2636569512369268a84",
    "train-labels-idx1-ubyte.gz": "a04f17134ac03560a47e3764e11b92fc97de4d1bfaf8ba1a3aa29af54cc90845",
    "t10k-images-idx3-ubyte.gz": "346e55b948d973a97e58d2351dde16a484bd415d4595297633bb08f03db6a073",
    "t10k-labels-idx1-ubyte.gz": "67da17c76eaffca5446c3361aaab5c3cd6d1c2608764d35dfb1850b086bf8dd5",
}
REMOTES: Mapping[str, Sequence[Remote]] = {
    **{c.name: [Remote(f"https://www.cs.toronto.edu/~kriz/{c.archive}", c.sha256)] for c in (CIFAR10, CIFAR100)},
    "fashion-mnist": [Remote(f"{FASHION}/{name}", sha) for name, sha in FASHION_ARCHIVES.items()],
}


def download(source: str, folder: Path, remotes: Mapping[str, Sequence[Remote]] = REMOTES) -> None:
    """Fetch a source's files into a folder.

    Args:
        source: a name of SOURCES.
        folder: where to; made if missing.
        remotes: the files of each source that has a public copy.

    Raises:
        UsageError: the source has no public copy.
        InputError: what came is not the published file.
        EnvironmentFault: the network or the disk does not allow it.
    """
    if source not in remotes:
        raise UsageError(
            f"--download: {source} has no public copy to fetch (those with one: {', '.join(remotes)})",
            fix="drop the flag",
        )
    import pooch
    import requests

    files.make_folder(folder)
    pooch.get_logger().setLevel("ERROR")  # it would print; what is fetched is said here
    for remote in remotes[source]:
        if not (folder / remote.name).is_file():
            console.note(f"fetching {remote.url} to {folder}")
        try:
            pooch.retrieve(
                remote.url,
                known_hash=f"sha256:{remote.sha256}",
                fname=remote.name,
                path=folder,
                downloader=pooch.HTTPDownloader(timeout=TIMEOUT),
            )
        except requests.RequestException as fault:
            raise EnvironmentFault(
                f"cannot fetch {remote.url}: {fault}",
                fix=f"check the network, or put {remote.name} into {folder} yourself",
            ) from fault
        except OSError as fault:
            raise files.write_fault(folder / remote.name, fault) from fault
        except ValueError as fault:
            raise InputError(
                f"{remote.url} is not the published file (sha256 {remote.sha256})",
                fix=f"put the published {remote.name} into {folder} yourself",
            ) from fault
