"""Statistics of phantoms and of real slices, side by side: a table of docs/method.md.

python benchmarks/phantom_statistics.py PHANTOMS OASIS    # two folders of slices with label maps
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
from PIL import Image

from dataset import list_scans
from preparation.folder import label_map
from support import console

WHITE_MATTER = 255  # in label maps
EVERY = 5  # of 32 slices a subject: all heights occur equally often


def main() -> None:
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    ours, theirs = (statistics(folder) for folder in sys.argv[1:])
    print(f"{'':32}{sys.argv[1]:>16}{sys.argv[2]:>16}{'ratio':>8}")
    print(f"{'slices':32}{ours.pop('slices'):16}{theirs.pop('slices'):16}")
    for name, value in ours.items():
        print(f"{name:32}{value:16.4g}{theirs[name]:16.4g}{value / theirs[name]:8.3f}")


def statistics(folder: str | Path, every: int = EVERY) -> dict[str, float]:
    """Means over an OASIS-shaped folder, by which phantoms and scans are compared, and how many slices they are over.

    They are over every fifth slice of the training and validation splits that has a label map. The test split is not
    read. Raises UserError if no slice has one.

    The foreground is above 0.04 of the grey range. The level of white matter is its mean in that range. The slope is
    that of log power against log spatial frequency, fitted to the radially averaged spectrum from 4 to 100 cycles an
    image.
    """
    scans = [path for split in ("train", "validate") for path in list_scans(Path(folder), split)]
    scans = [path for path in scans if label_map(path).is_file()][::every]
    if not scans:
        raise console.UserError(f"{folder}: has no label maps of the training and validation splits")
    rows = []
    power = np.zeros((256, 256))
    for path in scans:
        image = np.asarray(Image.open(path).convert("L")) / 255
        foreground = image[image > 0.04]
        white = image[np.asarray(Image.open(label_map(path))) == WHITE_MATTER]
        rows.append(
            {
                "foreground share": foreground.size / image.size,
                "foreground mean": foreground.mean(),
                "foreground standard deviation": foreground.std(),
                "PNG size / bytes": path.stat().st_size,
                "share of exact zeros": (image == 0).mean(),
                "level of white matter": white.mean(),
            }
        )
        power += np.abs(np.fft.fft2(image)) ** 2
    values = {name: float(np.mean([row[name] for row in rows])) for name in rows[0]}
    return values | {"slope of the power spectrum": _slope(power), "slices": len(rows)}


def _slope(power: np.ndarray) -> float:
    """Of a power spectrum (256, 256), radially averaged."""
    frequency = np.fft.fftfreq(256, 1 / 256)
    radius = np.hypot(frequency[:, None], frequency).round().astype(int).ravel()
    band = np.arange(4, 101)
    radial = (np.bincount(radius, power.ravel()) / np.bincount(radius))[band]
    return np.polyfit(np.log(band), np.log(radial), 1)[0].item()


if __name__ == "__main__":
    console.run_program(main, "phantom_statistics.py")
