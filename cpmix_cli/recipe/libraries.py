"""Libraries of networks: the classifiers of torchvision and timm by name, and what their published weights need.

Names are read from the source text of the installed library, because an import of torchvision or timm takes seconds.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path

from cpmix_cli.runtime.errors import EnvironmentFault, suggest

LIBRARIES = ("torchvision", "timm")
_REGISTERED = re.compile(r"^@register_model\b.*\n(?:@.*\n)*def (\w+)\(", re.MULTILINE)


@dataclass(frozen=True)
class Published:
    """Published weights of a network of a library, and the images that they were trained with."""

    mean: tuple[float, ...]
    """Mean of red, green, blue on the scale 0..1."""
    std: tuple[float, ...]
    """Standard deviation of red, green, blue on the same scale."""
    size: int
    """Side of the square input, in pixels."""
    url: str
    """Where the weights were published; "" if the library names no place."""

    @property
    def file(self) -> str:
        """Name of the file of the weights; torchvision's end in the first digits of their sha256."""
        return self.url.rpartition("/")[2]


def is_library_name(name: str) -> bool:
    """Return whether a name has the form LIBRARY/NAME, such as torchvision/convnext_tiny."""
    return name.partition("/")[0] in LIBRARIES and "/" in name


@cache
def library_names(library: str) -> Sequence[str]:
    """Return the classifiers of a library as LIBRARY/NAME; none if it is not installed, or installed without source."""
    spec = find_spec(library)
    if spec is None or not spec.submodule_search_locations:
        return ()
    sources = sorted((Path(spec.submodule_search_locations[0]) / "models").glob("*.py"))
    return [f"{library}/{name}" for path in sources for name in _REGISTERED.findall(path.read_text(encoding="utf-8"))]


def check_library_name(name: str) -> None:
    """Raise ValueError if the installed library has no classifier of that name.

    The tag of timm's weights (`.lvd142m`) is not looked at. Without the library any name is taken: the runs of another
    machine can be listed, and require_library() refuses to train or evaluate.
    """
    library, _, own = name.partition("/")
    if not re.fullmatch(r"[\w.]+", own):  # such as timm's hf-hub:NAME, which is fetched
        raise ValueError(f"a name of {library} has letters, digits, _ and . only")
    known = library_names(library)
    if known and (f"{library}/{own.partition('.')[0]}" if library == "timm" else name) not in known:
        raise ValueError(f"unknown.{suggest(name, known)}")


def require_library(name: str) -> None:
    """Raise EnvironmentFault if the library of a network LIBRARY/NAME is not installed."""
    library = name.partition("/")[0]
    if find_spec(library) is None:
        raise EnvironmentFault(
            f'model.name = "{name}" needs the package "{library}"', fix=f"pip install 'cpmix[{library}]'"
        )


@cache
def published(name: str) -> Published:
    """Return the published weights of a network LIBRARY/NAME, of torchvision those that it calls the default.

    Raises:
        EnvironmentFault: the library is not installed.
        ValueError: timm has no such weights.
    """
    require_library(name)
    library, _, own = name.partition("/")
    if library == "torchvision":
        from torchvision.models import get_model_weights  # imported here, as is timm: it takes seconds

        weights = get_model_weights(own).DEFAULT
        seen = weights.transforms()
        return Published(tuple(seen.mean), tuple(seen.std), seen.crop_size[0], weights.url)
    from timm.models import get_pretrained_cfg

    try:
        found = get_pretrained_cfg(own)
    except RuntimeError as fault:
        raise ValueError(str(fault)) from fault
    if found is None:
        raise ValueError("timm knows no weights of it")
    hub = f"https://huggingface.co/{found.hf_hub_id}/resolve/main/model.safetensors"
    return Published(found.mean, found.std, found.input_size[-1], hub if found.hf_hub_id else str(found.url or ""))
