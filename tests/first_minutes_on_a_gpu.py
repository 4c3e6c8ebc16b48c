"""The first three minutes on a GPU: what has only been simulated so far, run and measured.

    python tests/first_minutes_on_a_gpu.py                     all parts, on the GPU
    python tests/first_minutes_on_a_gpu.py graphs signal       some of them
    python tests/first_minutes_on_a_gpu.py --device cpu        the same calls on the CPU, smaller: tests this script

machine   versions, the GPU, cuDNN
graphs    eager steps against CUDA graphs, in fp32 and bf16: seconds, and whether the weights have equal bits
tests     the tests marked gpu
speed     cpmix bench: training against the network alone; and what cuDNN's deterministic algorithms cost
signal    SIGTERM in a long epoch: seconds to the exit, exit code 75, and the same command goes on
memory    peak memory of a step of Places-LT (stage 2, ResNet-152, 128 images of 224 pixels in each of three terms)

Exit code: 0 if all is as it should be, 1 if a part is not, 4 without a GPU. Please send what it prints.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])

NO_GPU = 4
SIZES: dict[str, dict[str, Any]] = {
    "cuda": {
        "epochs": 24,
        "bench": ("--rounds", 3, "--seconds", 1),
        "images": (1500, 224),
        "network": ("model.name=resnet50", "model.experts=12", "optimizer.micro_batches=4", "optimizer.batch_size=32"),
        "wait": 8.0,
        "places": (),
    },
    "cpu": {
        "epochs": 3,
        "bench": ("--rounds", 1, "--seconds", 0.01, "--set", "model.name=resnet8"),
        "images": (800, 64),
        "network": ("model.name=resnet10", "optimizer.batch_size=2"),
        "wait": 1.0,
        "places": ("model.name=resnet10", "data.crop=64", "optimizer.batch_size=8"),
    },
}
"""What each part runs on each device."""
ANSWER_SECONDS = 15.0
"""Longest time from SIGTERM to the exit that counts as seconds."""


def say(text: str) -> None:
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


def cpmix(*words: object) -> subprocess.CompletedProcess[str]:
    """Run cpmix; its stderr is shown if it fails."""
    command = [sys.executable, "-m", "cpmix_cli", *map(str, words)]
    found = subprocess.run(command, capture_output=True, text=True, check=False)
    if found.returncode:
        say(f"cpmix {' '.join(map(str, words))}\nexit code {found.returncode}\n{found.stderr}")
    return found


def settings(*changes: str) -> list[str]:
    return [word for change in changes for word in ("--set", change)]


def machine(device: str, folder: Path) -> bool:
    import torch

    from cpmix_cli.runtime import hardware

    chosen = hardware.use_device(device)
    say(f"torch {torch.__version__}, CUDA {torch.version.cuda}, python {sys.version.split()[0]}")
    say(f"{hardware.device_name(chosen)}; precision auto is {hardware.resolve_precision('auto', chosen)}")
    if device == "cuda":
        properties = torch.cuda.get_device_properties(chosen)
        say(f"capability {properties.major}.{properties.minor}, {properties.total_memory / 2**30:.0f} GiB")
        say(f"cuDNN {hardware.cudnn_settings()}")
    return True


def graphs(device: str, folder: Path) -> bool:
    import torch

    from cpmix_cli.artifacts.tensors import read_tensors

    data, good = folder / "digits", True
    good &= cpmix("build-lt", "digits", "--out", data).returncode == 0
    for precision in ("fp32", "bf16"):
        weights, seconds = [], []
        for recorded in ("true", "false"):
            run = folder / f"{precision}-{recorded}"
            flags = settings(f"model.precision={precision}", f"model.cuda_graphs={recorded}")
            first = ("train-stage1", "--data", data, "--out", run, "--epochs", SIZES[device]["epochs"], *flags)
            found = cpmix(*first, "--device", device)
            good &= found.returncode == 0 and "cannot be recorded" not in found.stderr
            if found.returncode:
                return False
            record = json.loads((run / "stage1" / "run.json").read_text())
            seconds.append(record["training_seconds"] - record["capture_seconds"])
            good &= (record["capture_seconds"] > 0) == (device == "cuda" and recorded == "true")
            weights.append(read_tensors(run / "stage1" / "model.safetensors")[0])
        pairs = [(weights[0][name].double(), weights[1][name].double()) for name in weights[0]]
        equal = all(torch.equal(a, b) for a, b in pairs)
        largest = max(float((a - b).abs().max()) for a, b in pairs)
        say(
            f"{precision}: graphs {seconds[0]:.2f} s, eager {seconds[1]:.2f} s without recording; weights "
            + ("equal bit for bit" if equal else f"differ by at most {largest:.3g}")
        )
        good &= largest < 0.5
    return good


def tests(device: str, folder: Path) -> bool:
    chosen = ["-m", "gpu", "tests"] if device == "cuda" else ["tests/training/test_gpu.py"]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *chosen]
    found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    say("\n".join(found.stdout.splitlines()[-40:] if found.returncode else found.stdout.splitlines()[-1:]))
    return found.returncode == 0


def speed(device: str, folder: Path) -> bool:
    import torch

    from cpmix_cli.bench.loops import NetworkAlone
    from cpmix_cli.bench.measure import Memory, measure, prepare, random_data, training_set
    from cpmix_cli.flags import BenchOptions
    from cpmix_cli.training.plan import rehearsal

    found = cpmix("bench", "--device", device, *SIZES[device]["bench"])
    say(found.stdout.rstrip())
    dataset = training_set(None, None)
    _, context, _ = prepare(BenchOptions(device=device), dataset)
    labels = torch.arange(dataset.num_classes).repeat_interleave(torch.tensor(dataset.class_counts))

    def alone(chosen: bool) -> NetworkAlone:
        torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic = not chosen, chosen
        return NetworkAlone(random_data(context, labels), *rehearsal(context, "stage1"))

    kinds = {"deterministic": lambda: alone(True), "timed": lambda: alone(False)}
    timings = measure(kinds, 2, 0.5, Memory(context.device))  # type: ignore[arg-type]
    ratio = timings["deterministic"].ratio_to(timings["timed"])
    say(f"cuDNN's deterministic algorithms: {ratio:.3f} times the speed of those chosen by timing")
    return found.returncode == 0


def write_images(folder: Path, count: int, size: int) -> None:
    """Write images of random pixels in two classes."""
    import numpy as np
    from PIL import Image

    for number in range(count):
        pixels = np.random.default_rng(number).integers(0, 256, (size, size, 3), dtype=np.uint8)
        place = folder / f"class-{number % 2}" / f"{number}.jpg"
        place.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(place)


def in_a_long_epoch(device: str, folder: Path) -> bool:
    size = SIZES[device]
    write_images(folder / "images", *size["images"])
    data, run = folder / "photos", folder / "long"
    build = ("build-lt", "image-folder", "--data-root", folder / "images", "--image-size", size["images"][1])
    if cpmix(*build, "--out", data).returncode:
        return False
    flags = settings(*size["network"], "model.precision=fp32")
    words = ("train-stage1", "--data", data, "--out", run, "--epochs", 2, *flags, "--device", device)
    command = [sys.executable, "-m", "cpmix_cli", *map(str, words)]
    with subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True) as running:
        lines: list[str] = []
        reader = threading.Thread(target=lambda: lines.extend(running.stderr or ()))
        reader.start()
        while running.poll() is None and not any(line.startswith("stage1:") for line in lines):
            time.sleep(0.05)
        time.sleep(size["wait"])
        began = time.monotonic()
        running.send_signal(signal.SIGTERM)
        running.wait()
        seconds = time.monotonic() - began
        reader.join()
    say(f"SIGTERM to exit: {seconds:.2f} s, exit code {running.returncode}; {lines[-2].strip() if lines[1:] else ''}")
    if running.returncode != 75:
        say("".join(lines))
        return False
    again = cpmix(*words, "--dry-run")
    say(next((line for line in again.stderr.splitlines() if "goes on" in line), "it does not go on"))
    return seconds < ANSWER_SECONDS and again.returncode == 0 and "goes on after epoch" in again.stderr


def memory(device: str, folder: Path) -> bool:
    import numpy as np
    import torch

    from cpmix_cli.bench.loops import TrainingLoop
    from cpmix_cli.bench.measure import Memory, random_data
    from cpmix_cli.data.dataset import unwritten_dataset
    from cpmix_cli.recipe.loading import load
    from cpmix_cli.runtime import hardware
    from cpmix_cli.training.plan import PhaseContext, rehearsal

    name, chosen, good = "places-lt/cpmix", hardware.use_device(device), True
    counts = np.ones(365, dtype=np.int64)  # images are read from disk in training, so a few are enough here
    dataset = unwritten_dataset("Places-LT", counts, [256, 256, 3], recipe=name, rho=None, storage="tensors")
    # Such training is eager.
    recipe = load(name, settings=[*SIZES[device]["places"], "model.cuda_graphs=false"])
    for precision in ("fp32", "bf16"):
        context = PhaseContext(recipe, dataset, chosen, precision, {})
        data, used = random_data(context, torch.arange(365)), Memory(chosen)
        used.restart()
        try:
            loop = TrainingLoop(data, *rehearsal(context, "stage2"))
            seconds, images = loop.timed(2)
        except torch.OutOfMemoryError as fault:
            say(f"{precision}: does not fit ({str(fault).splitlines()[0]}); try optimizer.micro_batches")
            continue
        peak = used.peak()
        good &= images > 0
        shown = "unknown" if peak is None else f"{peak / 2**30:.2f} GiB"
        say(f"{precision}: peak {shown}, {seconds / 2:.3f} s a step of {images // 2} images; {recipe.model.name}")
        del loop
    return good


PARTS: dict[str, Callable[[str, Path], bool]] = {
    "machine": machine,
    "graphs": graphs,
    "tests": tests,
    "speed": speed,
    "signal": in_a_long_epoch,
    "memory": memory,
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "parts", nargs="*", choices=[[], *PARTS], metavar="PART", help=f"{', '.join(PARTS)}; default: all"
    )
    parser.add_argument("--device", choices=list(SIZES), default="cuda", help="cuda, or cpu to test this script")
    options = parser.parse_args()
    import torch

    if options.device == "cuda" and not torch.cuda.is_available():
        say(f"no GPU here: torch {torch.__version__} finds no CUDA device; --device cpu tests this script without one")
        return NO_GPU
    began, bad = time.monotonic(), []
    for part in options.parts or PARTS:
        say(f"-- {part}")
        with tempfile.TemporaryDirectory() as folder:
            try:
                good = PARTS[part](options.device, Path(folder))
            except Exception as fault:
                say(f"{type(fault).__name__}: {fault}")
                good = False
        if not good:
            bad.append(part)
    say(f"-- {time.monotonic() - began:.0f} s; " + (f"not as it should be: {', '.join(bad)}" if bad else "all good"))
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
