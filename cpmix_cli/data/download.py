"""Downloads of published sets: the only file that reads a network, and only for `build-lt --download`.

Pooch writes a temporary file, checks its hash and renames it. A file with the right hash is not fetched again.
"""

from collections.abc import Mapping
from functools import partial
from pathlib import Path

from cpmix_cli.artifacts import files
from cpmix_cli.data.cifar import CIFAR10, CIFAR100
from cpmix_cli.runtime import console
from cpmix_cli.runtime.errors import EnvironmentFault, InputError, UsageError

_TIMEOUT = 60  # seconds without a byte
_CIFAR = "https://www.cs.toronto.edu/~kriz"
_FASHION = "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com"
Remotes = Mapping[str, Mapping[str, tuple[str, int]]]
"""Source with a public copy -> URL of each file -> its sha256 and its size in bytes."""
REMOTES: Remotes = {
    **{
        published.name: {f"{_CIFAR}/{published.archive}": (published.sha256, published.archive_bytes)}
        for published in (CIFAR10, CIFAR100)
    },
    "fashion-mnist": {
        f"{_FASHION}/train-images-idx3-ubyte.gz": (
            "3aede38d61863908ad78613f6a32ed271626dd12800ba2636569512369268a84",
            26_421_880,
        ),
        f"{_FASHION}/train-labels-idx1-ubyte.gz": (
            "a04f17134ac03560a47e3764e11b92fc97de4d1bfaf8ba1a3aa29af54cc90845",
            29_515,
        ),
        f"{_FASHION}/t10k-images-idx3-ubyte.gz": (
            "346e55b948d973a97e58d2351dde16a484bd415d4595297633bb08f03db6a073",
            4_422_102,
        ),
        f"{_FASHION}/t10k-labels-idx1-ubyte.gz": (
            "67da17c76eaffca5446c3361aaab5c3cd6d1c2608764d35dfb1850b086bf8dd5",
            5_148,
        ),
    },
}


class _TooLong(ValueError):
    """A server sends more bytes than the published file has."""


def _fetch(url: str, output: str, pooch_: object, *, size: int) -> None:
    """Fetch a file of at most `size` bytes, whatever the server says that it sends; the downloader of pooch."""
    import requests

    with requests.get(url, timeout=_TIMEOUT, stream=True) as response, Path(output).open("wb") as file:
        response.raise_for_status()
        for chunk in response.iter_content(2**16):
            if file.tell() + len(chunk) > size:
                raise _TooLong
            file.write(chunk)


def download(source: str, folder: Path, remotes: Remotes = REMOTES) -> None:
    """Fetch the published files of a source.

    Args:
        source: name of the source.
        folder: folder that the files are written to; it is created if missing.
        remotes: see Remotes.

    Raises:
        UsageError: the source has no public copy.
        InputError: a fetched file is not the published one, or the server sends more bytes than that has.
        EnvironmentFault: the network fails, or a file cannot be written.
    """
    if source not in remotes:
        raise UsageError(
            f"--download: {source} has no public copy to fetch (those with one: {', '.join(remotes)})",
            fix="drop the flag",
        )
    import pooch
    import requests

    files.make_folder(folder)
    pooch.get_logger().setLevel("ERROR")  # at lower levels it prints
    for url, (sha, size) in remotes[source].items():
        name = url.rpartition("/")[2]
        if not (folder / name).is_file():
            console.note(f"fetching {url} to {folder}")
        try:
            pooch.retrieve(
                url, known_hash=f"sha256:{sha}", fname=name, path=folder, downloader=partial(_fetch, size=size)
            )
        except requests.RequestException as fault:
            raise EnvironmentFault(
                f"cannot fetch {url}: {fault}", fix=f"check the network, or put {name} into {folder} yourself"
            ) from fault
        except OSError as fault:
            raise files.write_fault(folder / name, fault, needed_bytes=size) from fault
        except ValueError as fault:
            more = f": the server sends more than its {size:,} bytes" if isinstance(fault, _TooLong) else ""
            raise InputError(
                f"{url} is not the published file (sha256 {sha}){more}",
                fix=f"put the published {name} into {folder} yourself",
            ) from fault
