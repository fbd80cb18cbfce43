"""Statistics of phantoms and of real slices, side by side: a table of docs/method.md.

python benchmarks/phantom_statistics.py PHANTOMS OASIS    # two folders with keras_png_slices_train
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
from PIL import Image

from dataset import list_scans
from support import console


def main() -> None:
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    ours, theirs = (statistics(folder) for folder in sys.argv[1:])
    print(f"{'':32}{sys.argv[1]:>16}{sys.argv[2]:>16}{'ratio':>8}")
    for name, value in ours.items():
        print(f"{name:32}{value:16.4g}{theirs[name]:16.4g}{value / theirs[name]:8.3f}")


def statistics(folder: str | Path) -> dict[str, float]:
    """Means over every fourth training slice of an OASIS-shaped folder, by which phantoms and scans are compared.

    The foreground is above 0.04 of the grey range. The slope is that of log power against log spatial frequency, fitted
    to the radially averaged spectrum from 4 to 100 cycles an image.
    """
    frequency = np.fft.fftfreq(256, 1 / 256)
    radius = np.hypot(frequency[:, None], frequency).round().astype(int).ravel()
    rows, power = [], np.zeros((256, 256))
    for path in sorted(list_scans(Path(folder), "train"))[::4]:
        image = np.asarray(Image.open(path).convert("L")) / 255
        foreground = image[image > 0.04]
        rows.append((foreground.size / image.size, foreground.mean(), foreground.std(), path.stat().st_size))
        power += np.abs(np.fft.fft2(image)) ** 2
    band = np.arange(4, 101)
    radial = (np.bincount(radius, power.ravel()) / np.bincount(radius))[band]
    names = ("foreground share", "foreground mean", "foreground standard deviation", "PNG size / bytes")
    slope = np.polyfit(np.log(band), np.log(radial), 1)[0]
    return dict(zip(names, np.mean(rows, 0).tolist(), strict=True)) | {"slope of the power spectrum": slope.item()}


if __name__ == "__main__":
    console.run_program(main, "phantom_statistics.py")
