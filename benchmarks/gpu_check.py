"""What only a GPU can show. Run it where there is one, and paste the block that it ends with into an issue.

    python benchmarks/gpu_check.py                   # as `make gpu-check` does

tests: the tests of tests/test_gpu.py on the real device. epochs: an epoch of each stage on phantoms, on the GPU and on
the CPU, whose values must agree within BOUNDS. speed: the benchmark of this name. The exit status is 1 if a part fails.
"""

import argparse
import csv
import json
import statistics
import subprocess
import sys
import tempfile
from collections import deque
from pathlib import Path

PROJECT = Path(__file__).parent.parent
sys.path.insert(0, str(PROJECT))

import torch

from preparation import phantoms
from support.console import UserError, run_program
from support.run import environment

# By how much the GPU's values after an epoch of 32 steps may differ from the CPU's. On a CPU, bfloat16 and --plain
# change them by up to a third of this. (SSIM after so few steps changes by 0.4: it depends on the background's grey
# level.) Scores of the pretrained weights are computed in exact float32 everywhere.
BOUNDS = {"training_loss": 7e-4, "vq_loss": 1e-5, "d_loss": 0.35, "g_loss": 0.5, "pretrained_ssim": 1e-4}


class Failed(Exception):
    """A program failed. The message is the end of its output."""


def run(*argv) -> str:
    """The last 60 lines of what a Python program prints. Raises Failed if it fails."""
    command = [sys.executable, *map(str, argv)]
    process = subprocess.Popen(command, cwd=PROJECT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    lines = deque(maxlen=60)
    for line in process.stdout:
        lines.append(line)
        print(line, end="", flush=True)
    output = "".join(lines).strip()
    if process.wait():
        raise Failed(output)
    return output


def tests(device: str) -> str:
    return run("-m", "pytest", "-q", "tests/test_gpu.py", "-k", "not pretended").splitlines()[-1]


def epochs(device: str) -> str:
    """Train an epoch of each stage on the CPU and on the device, and compare."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        phantoms.write(folder / "data", {"train": range(1, 9), "validate": [9], "test": [10]})
        return compare(values(folder / "data", folder / "cpu", "cpu"), values(folder / "data", folder / "gpu", device))


def values(data: Path, out: Path, device: str) -> dict[str, float]:
    """What BOUNDS names, after an epoch of each stage on a device."""
    argv = ("--data", data, "--epochs", 1, "--dcgan-epochs", 1, "--batch-size", 8, "--dcgan-batch-size", 8)
    run("train.py", *argv, "--device", device, "--out", out)
    (metrics,) = out.glob("*/metrics.csv")
    with open(metrics, newline="") as file:
        cells = [cell for row in csv.DictReader(file) for cell in row.items()]
    measured = {key: float(value) for key, value in cells if value and key in BOUNDS}
    run("predict.py", "resources/pretrained/vqvae.pth", "--data", data, "--device", device, "--out", out / "scored")
    (scores,) = out.glob("scored/*/scores.csv")
    with open(scores, newline="") as file:
        measured["pretrained_ssim"] = statistics.mean(float(row["ssim"]) for row in csv.DictReader(file))
    return measured


def compare(on_cpu: dict[str, float], on_gpu: dict[str, float]) -> str:
    """A line for each value. Raises Failed if one differs by more than its bound, or is not finite."""
    lines = []
    for name, bound in BOUNDS.items():
        verdict = "within" if abs(on_gpu[name] - on_cpu[name]) <= bound else "BEYOND"  # as NaN is
        lines.append(f"{name}: CPU {on_cpu[name]:.7f}, GPU {on_gpu[name]:.7f}, {verdict} {bound}")
    if any("BEYOND" in line for line in lines):
        raise Failed("\n".join(lines))
    return "\n".join(lines)


def speed(device: str) -> str:
    return run("benchmarks/speed.py", "vqvae", "dcgan", "--device", device)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else ""
    if not device:
        raise UserError("no GPU here; make test shows what a machine without one can show")
    results = []
    for part in (tests, epochs, speed):
        name = part.__name__
        try:
            results.append(f"{name}: good\n{part(device)}")
        except Exception as error:  # the other parts are worth having
            results.append(f"{name}: FAILED\n{error if isinstance(error, Failed) else repr(error)}")
    print("\n----- paste from here into an issue -----")
    print(json.dumps(environment(torch.device(device)), indent=2), *results, sep="\n\n")
    print("----- to here -----")
    if any(": FAILED\n" in result for result in results):
        sys.exit(1)


if __name__ == "__main__":
    run_program(main, "gpu_check.py")
