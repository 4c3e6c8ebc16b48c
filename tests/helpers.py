"""Functions that several tests share; no test is here."""

import colorsys
import copy
import hashlib
import io
import json
import math
import os
import resource
import shlex
import signal
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import printed_lines
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from torch import Tensor
from typer.testing import CliRunner

from cpmix_cli.artifacts import records
from cpmix_cli.artifacts.tensors import read_tensors
from cpmix_cli.cli import app
from cpmix_cli.data.batches import ImageBatches
from cpmix_cli.mixing import CLASS_PARTNERS
from cpmix_cli.models import Classifier, build_model
from cpmix_cli.recipe.loading import find_recipe
from cpmix_cli.recipe.schema import Data, Model, Optimizer, ParameterGroup, Stage
from cpmix_cli.runtime import signals
from cpmix_cli.training.inputs import TrainingData
from cpmix_cli.training.loop import fit
from cpmix_cli.training.objective import Term, compile_stage
from cpmix_cli.training.plan import Plan, make_optimizer
from cpmix_cli.training.randomness import stream
from cpmix_cli.training.state import EpochSums, TrainingState

# -- Commands: cpmix in this process and in processes of its own -------------------------------------------------------


without_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a CUDA device")


@dataclass
class Result:
    """What a command left behind."""

    code: int
    stdout: str
    stderr: str

    @property
    def json(self) -> dict[str, Any]:
        return json.loads(self.stdout)


def cpmix(*arguments: object) -> Result:
    """Run a command in this process; a traceback fails the test."""
    result = CliRunner().invoke(app, [str(a) for a in arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    found = Result(result.exit_code, result.stdout, result.stderr)
    printed_lines.follow(arguments, found, cpmix, Path.cwd())
    return found


def must(*arguments: object) -> Result:
    result = cpmix(*arguments)
    assert result.code == 0, result.stderr
    return result


def refused(code: int, messages: str | Sequence[str], *arguments: object) -> Result:
    """Run a command that has to end with this exit code and with each message on stderr."""
    return ended(cpmix(*arguments), code, messages)


def ended(result: Result, code: int, messages: str | Sequence[str] = ()) -> Result:
    """Check the exit code of a command and that stderr has each message and no traceback; returns its result."""
    assert result.code == code, result.stderr
    for message in (messages,) if isinstance(messages, str) else messages:
        assert message in result.stderr
    assert "Traceback" not in result.stderr
    return result


def fix_of(result: Result) -> str:
    """The command or change on the fix: line of an error."""
    (fix,) = [line.removeprefix("  fix: ") for line in result.stderr.splitlines() if line.startswith("  fix: ")]
    return fix


def follow_fix(result: Result) -> str:
    """Run the commands on the fix: line of an error, as a user would paste them; returns the line."""
    run_commands(fix_of(result))
    return fix_of(result)


def run_commands(line: str) -> None:
    """Run commands of a shell, joined by &&; cpmix in this process."""
    for command in line.split(" && "):
        name, *words = shlex.split(command)
        assert name in ("cpmix", "mv", "rm"), command
        must(*words) if name == "cpmix" else subprocess.run([name, *words], check=True)


def process(*arguments: object, code: str = "", **options: Any) -> Result:
    """Run cpmix, or some Python code, in a process of its own; the options are those of subprocess.run()."""
    options["env"] = {**os.environ, **options.get("env", {})}
    command = [sys.executable, *(("-c", code) if code else ("-m", "cpmix_cli")), *map(str, arguments)]
    found = subprocess.run(command, capture_output=True, text=True, **options)
    result = Result(found.returncode, found.stdout, found.stderr)
    if not code:
        printed_lines.follow(arguments, result, cpmix, Path(options.get("cwd") or Path.cwd()))
    return result


def installed_wheel(folder: Path) -> Path:
    """Build the wheel and unpack it in a folder, as pip does; returns what PYTHONPATH needs."""
    build = "import os, sys, hatchling.build as b; os.chdir(sys.argv[1]); print(b.build_wheel(sys.argv[2]))"
    name = process(Path(__file__).parents[1], folder, code=build).stdout.strip()
    with zipfile.ZipFile(folder / name) as wheel:
        wheel.extractall(folder / "site")
    return folder / "site"


def signalled(number: signal.Signals, at: str, *arguments: object) -> Result:
    """Run cpmix in a process of its own and send it a signal after the first line of stderr that has `at`."""
    command = [sys.executable, "-m", "cpmix_cli", *map(str, arguments)]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as running:
        assert running.stderr is not None
        any(at in line for line in running.stderr)
        running.send_signal(number)
        stderr = running.stderr.read()
    return Result(running.returncode, "", stderr)


def quick_first(cases: Mapping[str, object], *marks: pytest.MarkDecorator) -> list[Any]:
    """Values of a parameter, by name: the first is tested in each run, the others have these marks."""
    return [pytest.param(cases[name], id=name, marks=marks if n else ()) for n, name in enumerate(cases)]


def setting(*values: object, table: str = "") -> list[str]:
    """Flags --set for changes such as "optimizer.lr=0.1", or "lr=0.1" of the table "optimizer"."""
    prefix = f"{table}." if table else ""
    return [word for value in values for word in ("--set", f"{prefix}{value}")]


def trained(data: Path, run: Path, *flags: object) -> Path:
    """Train stage 1 and evaluate the run; returns the run's folder."""
    must("train-stage1", "--data", data, "--out", run, *flags)
    must("evaluate", "--from", run)
    return run


def pipeline(data: Path, run: Path, *flags: object) -> None:
    must("train-stage1", "--data", data, "--out", run, *flags)
    must("train-stage2", "--from", run)
    must("finetune", "--from", run)
    must("evaluate", "--from", run)
    must("confusion-report", "--from", run)


def forget_signals() -> None:
    """Make this process one that has had no signal and trains nothing."""
    signals._pending, signals._has_state = None, False


def run_to_the_end(*arguments: object) -> int:
    """Give a command again until it is done; returns how often it was interrupted."""
    for interruptions in range(1000):
        forget_signals()
        result = cpmix(*arguments)
        if result.code == 0:
            return interruptions
        assert result.code == 75, result.stderr
        assert "SIGTERM received" in result.stderr
    raise AssertionError("it never ends")


HOOKED = """
import os, signal, sys
{hook}
from cpmix_cli.__main__ import main
main()
"""


def hooked(hook: str, *arguments: object) -> Result:
    """cpmix in a process of its own, and its own process group, with code that runs first."""
    return process(*arguments, code=HOOKED.format(hook=hook), start_new_session=True)


def on_event(event: str, test: str, number: signal.Signals, seconds: float = 0.0) -> str:
    """A hook that sends a signal to the group, and waits, when Python is about to do something for the first time."""
    return (
        "import time\n"
        "left = [1]\n"
        "def hook(event, args):\n"
        f"    if event == {event!r} and left and ({test}):\n"
        "        left.clear()\n"
        f"        os.killpg(0, {int(number)})\n"
        f"        time.sleep({seconds})\n"
        "sys.addaudithook(hook)"
    )


# -- Files: what is equal between two equal runs, and files that tests write, change and damage ------------------------


CLOCK = ["seconds", "images_per_second"]
COLOURS = {
    "red": (220, 40, 30),
    "green": (30, 200, 60),
    "blue": (20, 60, 210),
    "yellow": (220, 210, 30),
    "purple": (150, 30, 160),
}


def files(folder: Path) -> list[str]:
    """All files below a folder, as sorted relative names; hidden ones too."""
    return sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())


def header(name: str) -> str:
    """The comment at a recipe's head, in one line."""
    lines = find_recipe(name).read_text().splitlines()
    return " ".join(line.removeprefix("#").strip() for line in lines if line.startswith("#"))


def exact_contents(folder: Path) -> dict[str, bytes]:
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


@contextmanager
def unchanged(*folders: Path) -> Iterator[None]:
    """Check that all files of these folders have the same bytes before and after."""
    before = [exact_contents(folder) for folder in folders]
    yield
    assert [exact_contents(folder) for folder in folders] == before


def flip(path: Path, place: int = -1, bit: int = 1) -> bytes:
    """Flip bits of one byte of a file; returns the bytes that it had before."""
    whole = path.read_bytes()
    damaged = bytearray(whole)
    damaged[place] ^= bit
    path.write_bytes(damaged)
    return whole


def edit_record(path: Path, **changes: object) -> None:
    """Change fields of a record and seal it again, as a stranger would who knows how."""
    records.publish_record(path, {**records.read_fields(path), **changes})


def write_image(path: Path, pixels: Any = (0, 0, 0), size: tuple[int, int] = (20, 20)) -> Path:
    """Write an image: of one colour, or an array of pixels [height, width, 3] uint8; folders are made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    (Image.new("RGB", size, pixels) if isinstance(pixels, str | tuple) else Image.fromarray(pixels)).save(path)
    return path


def write_photos(folder: Path, counts: dict[str, int], seed: int = 0, noise: float = 25) -> None:
    """Noisy images of a colour each, of different sizes and formats."""
    generator = np.random.Generator(np.random.PCG64(seed))
    for name, count in counts.items():
        (folder / name).mkdir(parents=True)
        for i in range(count):
            size = (20 + 3 * (i % 4), 24 + 2 * (i % 3), 3)
            pixels = np.clip(np.array(COLOURS[name]) + generator.normal(0, noise, size), 0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{i:03d}.{('png', 'jpg')[i % 2]}")


@contextmanager
def file_limit(size: int) -> Iterator[None]:
    """Let this process write no file beyond `size` bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


class Canary:
    """Leaves a file behind when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __reduce__(self) -> tuple[object, ...]:
        return Path.touch, (self._path,)


def png(image: torch.Tensor) -> bytes:
    """[H, W, 3] uint8 as PNG."""
    buffer = io.BytesIO()
    Image.fromarray(image.numpy()).save(buffer, "PNG")
    return buffer.getvalue()


def write_cifar(folder: Path, num_train: int = 12, classes: int = 10) -> None:
    """A small CIFAR-10 in the Hugging Face layout: PNG bytes, label."""
    generator = torch.Generator().manual_seed(1)
    for split, size in (("train", num_train * classes), ("test", 2 * classes)):
        images = torch.randint(0, 256, (size, 32, 32, 3), dtype=torch.uint8, generator=generator)
        encoded = [{"bytes": png(i), "path": None} for i in images]
        labels = [i % classes for i in range(size)]
        table = pa.table({"img": encoded, "label": labels})
        pq.write_table(table, folder / f"{split}-00000-of-00001.parquet")


def save(content: object, path: Path) -> str:
    """torch.save; the file's sha256."""
    torch.save(content, path)
    return hashlib.sha256(path.read_bytes()).hexdigest()


# -- Trees of small JPEG files -----------------------------------------------------------------------------------------


GOLDEN = (math.sqrt(5) - 1) / 2


def picture(label: int, generator: np.random.Generator, size: int) -> Image.Image:
    """Noisy stripes; sides from `size` to 1.5 `size`."""
    height, width = (int(size * generator.uniform(1, 1.5)) for _ in range(2))
    colour = np.array(colorsys.hsv_to_rgb(label * GOLDEN % 1, 0.4 + 0.6 * (label * 7 % 10) / 10, 0.9))
    angle = math.pi * (label * 13 % 17) / 17
    y, x = np.mgrid[:height, :width] / size
    wave = np.sin(2 * math.pi * (4 + label % 5) * (x * math.cos(angle) + y * math.sin(angle)) + generator.uniform(0, 6))
    pixels = 255 * colour * (0.7 + 0.3 * wave[..., None]) + generator.normal(0, 20, (height, width, 3))
    return Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))


def make(list_dir: Path, out: Path, size: int, distinct: int) -> None:
    """Write OUT/lists and OUT/images; of a class and split, at most `distinct` are no hard links to others."""
    (out / "lists").mkdir(parents=True)
    for number, source in enumerate(sorted(list_dir.glob("*.txt"))):
        (out / "lists" / source.name).write_text(source.read_text())
        made: dict[int, list[Path]] = {}
        for place, line in enumerate(source.read_text().splitlines()):
            path, _, label = line.rpartition(" ")
            file = out / "images" / path
            file.parent.mkdir(parents=True, exist_ok=True)
            own = made.setdefault(int(label), [])
            if len(own) < distinct:
                generator = np.random.default_rng([number, int(label), len(own)])
                picture(int(label), generator, size).save(file, quality=85)
                own.append(file)
            else:
                file.hardlink_to(own[place % distinct])


# -- A small training: data, network, plan, and one step by hand -------------------------------------------------------


LR, MOMENTUM, DECAY = 0.1, 0.9, 2e-4
COUNTS = [14, 6, 3, 1]
IMAGES = torch.randint(0, 256, (24, 8, 8, 1), dtype=torch.uint8, generator=torch.Generator().manual_seed(7))
STD = 64 / 255  # a power of two, so both sides normalise to the same float32
LABELS = torch.repeat_interleave(torch.arange(4), torch.tensor(COUNTS))

ERM = {"draw": "natural", "loss": "balanced-softmax"}
EQ_9 = {"ratio": "beta", "alpha": 1.5, "mix": "linear", "label": "imbalance-aware", "t": 0.5}
MIXED = {**EQ_9, "loss": "cross-entropy", "weight": 2.5}
CP = {"draw": "class-uniform", "partner": "confusion", **MIXED}
MIX = {"draw": "natural", "partner": "permutation", **MIXED}


def terms_of(**tables: dict[str, object]) -> tuple[Term, ...]:
    return compile_stage(Stage.model_validate({"terms": tables}))


def data() -> TrainingData:
    recipe = Data(augment="crop", padding=1, normalisation="dataset")
    batches = ImageBatches(IMAGES, recipe, [0.5], [STD])
    return TrainingData(batches, LABELS, torch.tensor(COUNTS))


def in_double(model: Classifier) -> Classifier:
    """The network in float64: in float32 two orders of the same sums can fall on two sides of a ReLU's kink."""
    first = next(m for m in model.modules() if isinstance(m, torch.nn.Conv2d | torch.nn.Linear))
    first.register_forward_pre_hook(lambda _, inputs: (inputs[0].double(),))
    return model.double()


def fresh(epoch: int = 1) -> TrainingState:
    model = in_double(build_model(Model(name="resnet8"), 4, (8, 8, 1), torch.Generator().manual_seed(0)))
    recipe = Optimizer(lr=LR, momentum=MOMENTUM, weight_decay=DECAY, batch_size=64)
    confusion = torch.zeros(4, 4, dtype=torch.float64)
    return TrainingState(model, make_optimizer(model, recipe), confusion, epoch=epoch)


def plan_of(terms: tuple[Term, ...], epochs: int, *, batch: int = 64, joint: bool = True) -> Plan:
    return Plan("stage2", 11, terms, joint, 1, epochs, epochs, batch, lambda *_: LR)


def sums_of(plan: Plan, device: str = "cpu") -> EpochSums:
    return EpochSums([term.name for term in plan.terms], device)


def never() -> None:
    """A publish that writes nowhere: these tests look at the state itself."""


def crop(image: Tensor, uniforms: list[float]) -> Tensor:
    """One augmented image [1, 8, 8], pixel by pixel: black border of 1, crop, normalise."""
    row, column = int(uniforms[0] * 3), int(uniforms[1] * 3)
    out = torch.zeros(1, 8, 8)
    for i in range(8):
        for j in range(8):
            y, x = i + row - 1, j + column - 1
            value = float(image[y, x, 0]) if 0 <= y < 8 and 0 <= x < 8 else 0.0
            out[0, i, j] = (value / 255 - 0.5) / STD
    return out


def check_against_loop(
    state: TrainingState,
    terms: tuple[Term, ...],
    loop: Callable[[Classifier], Tensor],
    *,
    nesterov: bool = False,
    groups: Sequence[ParameterGroup] = (),
) -> TrainingState:
    """Take one step of `state` by fit() and one by hand, its loss by `loop`; compare weights and loss."""
    by_hand = copy.deepcopy(state)
    fit(plan_of(terms, state.epoch), data(), state, publish=never)

    model = by_hand.model.train()
    loss = loop(model)
    gradients = torch.autograd.grad(loss, list(model.parameters()))
    for (name, p), g in zip(model.named_parameters(), gradients, strict=True):
        buffer = by_hand.optimizer.state.get(p, {}).get("momentum_buffer")
        own = next((group for group in groups if name.startswith(group.prefix)), ParameterGroup(prefix=""))
        step = g + (DECAY if own.weight_decay is None else own.weight_decay) * p.detach()
        velocity = step if buffer is None else MOMENTUM * buffer + step
        expected = p.detach() - LR * own.lr_factor * (step + MOMENTUM * velocity if nesterov else velocity)
        found = state.model.get_parameter(name).detach()
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-7, msg=lambda m, name=name: f"{name}: {m}")
    assert state.history[-1]["loss"] == pytest.approx(loss.item(), rel=1e-5)
    return state


# -- Random numbers of an epoch, drawn from the named streams only -----------------------------------------------------


def draw_epoch(
    terms: Sequence[Term],
    num_samples: int,
    batch_size: int,
    key: tuple[int | str, ...],
    epoch: int,
    num_epochs: int,
    num_uniforms: int,
    num_features: int = 0,
) -> dict[str, Tensor]:
    """All random numbers of an epoch by purpose, [S, B] or as the purpose has it."""
    steps = -(-num_samples // batch_size)
    size = (steps, batch_size)
    order = np.zeros(steps * batch_size, dtype=np.int64)
    order[:num_samples] = stream(*key, epoch, "order").permutation(num_samples)
    drawn = {"order": order.reshape(size)}
    shapes: dict[str, tuple[int, ...]] = {}
    for term in terms:
        recipe, name = term.recipe, term.name
        several = size if recipe.per_sample else (steps, 1)
        if recipe.draw == "natural":
            shapes["augment"] = (*size, num_uniforms)
        else:
            shapes |= {f"{name}/class": size, f"{name}/image": size, f"{name}/augment": (*size, num_uniforms)}
        if recipe.partner is not None:
            shapes |= {f"{name}/partner": size, f"{name}/box": (*several, num_features or 2)}
            if recipe.alpha is not None:
                drawn[f"{name}/ratio"] = stream(*key, epoch, f"{name}/ratio").beta(recipe.alpha, recipe.alpha, several)
        if recipe.partner in CLASS_PARTNERS:
            shapes |= {f"{name}/partner-image": size, f"{name}/partner-augment": (*size, num_uniforms)}
        if recipe.is_gated:
            is_open = recipe.unmixed_first < epoch <= num_epochs - recipe.unmixed_last
            gate = stream(*key, epoch, f"{name}/gate").random((steps, 1)) < recipe.probability * is_open
            drawn[f"{name}/gate"] = gate * 1.0
    drawn |= {purpose: stream(*key, epoch, purpose).random(shape) for purpose, shape in shapes.items()}
    return {purpose: torch.from_numpy(values) for purpose, values in drawn.items()}


# -- Losses by loops ---------------------------------------------------------------------------------------------------


def slow_loss(
    name: str, logits: Tensor, labels: list[int], weights: list[Tensor], counts: list[int], parameters: dict[str, Any]
) -> Tensor:
    """A loss of losses.py by loops over images and classes, from its formula; differentiable."""
    p = {"tau": 1.0, "uniform_share": 0.0, "max_margin": 0.5, "scale": 30.0, "over": "others", **parameters}
    batch_size, num_classes = logits.shape
    total = torch.zeros(())
    for b, y in enumerate(labels):
        z = [logits[b, c] for c in range(num_classes)]
        if name in ("balanced-softmax", "lade"):
            z = [a + math.log(n) for a, n in zip(z, counts, strict=True)]
        if name == "logit-adjusted":
            s = p["uniform_share"]
            prior = [(1 - s) * n / sum(counts) + s / num_classes for n in counts]
            learnt = [(n / sum(counts)) ** (1 - p["tau"]) for n in counts]
            z = [a + math.log(q / own) for a, q, own in zip(z, prior, learnt, strict=True)]
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
