"""The full-size run: both stages with default options on as many images as the full OASIS set has.

    python benchmarks/full_size.py                 # on the GPU if there is one; hours on a CPU
    python benchmarks/full_size.py --scale 0.02    # a fiftieth of the images, to see that it works

The images are phantoms, repeated under other names (--data DIR repeats the scans of an OASIS folder): what is measured
is speed. Training time is what train.py records for its epochs' steps; wall time is everything from start to end.
"""

import argparse
import csv
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

PROJECT = Path(__file__).parent.parent
sys.path.insert(0, str(PROJECT))

import speed
import torch

from modules import VQVAE
from preparation import phantoms
from support import files
from support.device import FastPath, choose_device
from support.run import environment

COUNTS = {"train": 9664, "validate": 1120, "test": 544}


def enlarge(source: Path, target: Path, scale: float) -> None:
    """Fill `target` with links to the images of `source`, each as often as it takes."""
    for part, (split, count) in enumerate(COUNTS.items()):
        scans = sorted((source / f"keras_png_slices_{split}").glob("*.png"))
        folder = target / f"keras_png_slices_{split}"
        folder.mkdir(parents=True)
        for i in range(max(2, round(count * scale))):
            case = 1000 * part + i // 32  # a subject in two splits would be refused
            os.symlink(scans[i % len(scans)].resolve(), folder / f"case_{case:03d}_slice_{i % 32}.nii.png")
    if (source / phantoms.MARKER).is_file():
        os.symlink((source / phantoms.MARKER).resolve(), target / phantoms.MARKER)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="OASIS folder whose images are repeated (default: phantoms)")
    parser.add_argument("--scale", type=float, default=1.0, help="of the numbers of images (default: 1)")
    parser.add_argument("--device", default="auto", help="(default: auto)")
    parser.add_argument("words", nargs="*", help="options for train.py, after --")
    o = parser.parse_args()
    device = choose_device(o.device)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        if o.data is None:  # as many subjects as it takes, at most those of the demo
            n = {split: max(1, round(count * o.scale / phantoms.SLICES)) for split, count in COUNTS.items()}
            phantoms.write(folder / "phantoms", {split: cases[: n[split]] for split, cases in phantoms.CASES.items()})
        enlarge(o.data or folder / "phantoms", folder / "data", o.scale)
        words = ["train.py", "--data", folder / "data", "--device", o.device, "--out", folder / "out", *o.words]
        started = time.perf_counter()
        subprocess.run([sys.executable, *map(str, words)], cwd=PROJECT, check=True)
        wall = time.perf_counter() - started
        (run,) = (folder / "out").iterdir()
        with open(run / "metrics.csv", newline="") as file:
            rows = list(csv.DictReader(file))
        fast_path = FastPath(**files.read_json(run / "run.json")["fast_path"])
    limit = speed.matrix_product(torch.bfloat16 if fast_path.bfloat16 else torch.float32, device, folder)
    speed.timed(limit, device)
    limit_rate = speed.PRODUCT_FLOPS / min(speed.timed(limit, device) for _ in range(3 if device.type == "cpu" else 10))
    model, training = VQVAE().to(device), 0.0
    flops = speed.flops_an_image(lambda x: model(x)[:2], device)
    print(f"\n{speed.processor()}, {environment(device)['device']}, torch {torch.__version__}, {fast_path}")
    for stage in ("vqvae", "dcgan"):
        epochs = [row for row in rows if row["stage"] == stage]
        if not epochs:
            continue
        seconds = sorted(float(row["seconds"]) for row in epochs)
        training += sum(seconds)
        rate = sorted(float(row["images_per_second"]) for row in epochs)[len(epochs) // 2]
        print(f"{stage}: {len(epochs)} epochs, {sum(seconds):.1f} s, {rate:.0f} images/s (median epoch)", end="")
        if stage == "vqvae":
            share = rate * flops / limit_rate
            print(f", {share:.1%} of {limit_rate / 1e12:.1f} TFLOP/s (a 4096 x 4096 x 4096 matrix product)", end="")
        print()
    print(f"Training time: {training:.1f} s. Wall time, from reading the images to the last figure: {wall:.1f} s.")


if __name__ == "__main__":
    main()
