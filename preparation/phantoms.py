"""Synthetic T1-like axial brain slices in the OASIS layout, for those who have no OASIS data yet.

A subject is drawn from (seed, case): head shape, cortical folding, ventricle size, atrophy, contrast and noise. Its 32
slices run from the deep grey matter (slice 0) to above the ventricles (slice 31). They look like brains and share
first-order statistics with real slices (docs/method.md has the figures), but they are not a model of anatomy.

    python -m preparation.phantoms DIR    # 512 training, 64 validation and 64 test slices, as the demo has
"""

import support.early  # isort: skip  # noqa: F401  before what takes long to import, or is missing
import argparse
from pathlib import Path

import numpy as np
from PIL import Image
from scipy.ndimage import gaussian_filter, map_coordinates

from support import console, files
from support.console import UserError

SLICES = 32
CASES = {"train": range(1, 17), "validate": range(17, 19), "test": range(19, 21)}
MARKER = "PHANTOMS.txt"
COMPLETE = "All of them were written.\n"
DEMO_FOLDER = Path("phantoms")

# The head lies in the middle 192 x 160 pixels; coordinates are pixels from its centre, y down, front of the head up.
Y, X = np.mgrid[-96:96, -80:80].astype(np.float32) + 0.5
ANGLE = np.arctan2(Y, X)


def _spline_weights(n: int, spacing: float) -> np.ndarray:
    """(n, knots) weights of a cubic B-spline whose knots lie `spacing` pixels apart."""
    t = np.abs(np.arange(n)[:, None] / spacing - np.arange(-1, int(n / spacing) + 3)[None, :])
    return np.where(t < 1, 2 / 3 - t**2 + t**3 / 2, np.where(t < 2, (2 - t) ** 3 / 6, 0)).astype(np.float32)


ROWS, COLUMNS = _spline_weights(192, 40), _spline_weights(160, 40)


def _knots(rng: np.random.Generator, height: float, *shape: int) -> np.ndarray:
    """Random values that change smoothly with height in [0, 1], at constant variance."""
    planes = rng.standard_normal((5, *shape), np.float32)
    k = min(int(height * 4), 3)
    turn = (height * 4 - k) * np.pi / 2
    return np.cos(turn) * planes[k] + np.sin(turn) * planes[k + 1]


def _inside(distance: np.ndarray, width: float = 0.6) -> np.ndarray:
    """1 where the signed distance in pixels is positive, 0 where it is negative, with a soft edge."""
    return 1 / (1 + np.exp(-np.clip(distance / width, -30, 30)))


def _capsule(start: tuple, end: tuple, r_start: float, r_end: float) -> np.ndarray:
    """Signed distance in pixels, positive inside, to a rounded line whose radius runs from r_start to r_end."""
    (x0, y0), (x1, y1) = start, end
    along = ((X - x0) * (x1 - x0) + (Y - y0) * (y1 - y0)) / ((x1 - x0) ** 2 + (y1 - y0) ** 2)
    along = np.clip(along, 0, 1)
    gap = np.hypot(X - x0 - along * (x1 - x0), Y - y0 - along * (y1 - y0))
    return r_start + along * (r_end - r_start) - gap


def _ellipse(x: float, y: float, rx: float, ry: float) -> np.ndarray:
    return (1 - np.hypot((X - x) / rx, (Y - y) / ry)) * min(rx, ry)


def make_slice(case: int, slice_number: int, seed: int = 0) -> np.ndarray:
    """One slice, (256, 256) uint8, determined by the seed, the case (1 or more) and slice_number, 0 (low) to 31 (high).

    Raises ValueError if slice_number is outside 0 to 31.
    """
    if not 0 <= slice_number < SLICES:
        raise ValueError(f"slice_number must be 0 to {SLICES - 1}, not {slice_number}")
    rng = np.random.default_rng([seed, case])  # the same draws for every slice of a subject
    height = slice_number / (SLICES - 1)
    depth = _head(rng, height)
    surface, gap, middle = _surface(rng, height, depth)
    cortex = rng.normal(4.3, 0.25)
    gap = np.clip(gap + 2.0 * _slow_noise(rng, height), 0.6, 3.0)
    ventricles = _ventricles(rng, height, middle)

    # tissues, from the inside out
    contrast = rng.normal(0, 0.025, 3)
    white, grey, fluid = 0.87 + contrast[0], 0.52 + contrast[1], 0.13 + contrast[2] / 2
    shade = 1 + 0.06 * _slow_noise(rng, height)
    grain = rng.uniform(0.022, 0.040)
    brain = grey + (white - grey) * _inside(surface - gap - cortex, 0.8)
    brain = brain + (grey + 0.35 * (white - grey) - brain) * _inside(_deep_grey_matter(height), 1.2)
    brain = brain + (fluid - brain) * _inside(np.maximum(gap - surface, ventricles), 0.6)

    rng = np.random.default_rng([seed, case, slice_number + 1])  # from here on each slice has draws of its own
    texture = gaussian_filter(rng.standard_normal(X.shape, np.float32), 0.6)
    brain = brain * shade * rng.normal(1, 0.04) + grain * texture / 0.46
    image = np.zeros((256, 256), np.uint8)
    image[32:224, 48:208] = np.clip(brain * _inside(depth + 0.5, 0.15) * 255, 0, 255).round()
    return image


def _slow_noise(rng: np.random.Generator, height: float) -> np.ndarray:
    """Noise that varies over 40 pixels, (192, 160)."""
    return ROWS @ _knots(rng, height, ROWS.shape[1], COLUMNS.shape[1]) @ COLUMNS.T


def _head(rng: np.random.Generator, height: float) -> np.ndarray:
    """Depth below the outline in pixels, negative outside: an ellipse, narrower in front, with a wavy outline."""
    half_width, half_length = rng.normal(68.5, 1.8), rng.normal(85, 2.0)
    taper, waves = rng.normal(0.10, 0.03), rng.normal(0, 0.007, (2, 4))
    outline = 1 - 0.05 * height**2  # it shrinks a little towards the top
    for k in range(4):
        outline = outline + waves[0, k] * np.cos((k + 2) * ANGLE) + waves[1, k] * np.sin((k + 2) * ANGLE)
    width_here = half_width * (1 + taper * Y / half_length * (1 + height))
    return (1 - np.hypot(X / width_here, Y / half_length) / outline) * (half_width + half_length) / 2


def _surface(rng: np.random.Generator, height: float, depth: np.ndarray) -> tuple[np.ndarray, float, np.ndarray]:
    """Pixels to the nearest sulcus, fissure or outline; the mean width of sulci; signed distance to the midline.

    Sulci are zero crossings of noise that varies faster along the surface than inwards, so that they run inwards.
    """
    atrophy = rng.uniform(0, 1)
    inwards = depth / 12 + _slow_noise(rng, height)
    along = ANGLE * 36 / np.pi + 4 * _slow_noise(rng, height)
    folds = map_coordinates(_knots(rng, height, 8, 72), [inwards, along], order=3, mode="grid-wrap", prefilter=False)
    slope = np.hypot(*np.gradient(folds)) + 0.01
    reach = 20 + 5 * atrophy + 16 * _slow_noise(rng, height) + 12 * np.abs(X) / 67
    sulcus = np.abs(folds) / slope + 0.7 * np.maximum(depth - reach, 0)
    front, back = rng.normal(-46, 2) - 4 * height, rng.normal(44, 2) + 4 * height
    middle = X - 1.2 * np.sin(Y / 17 + rng.uniform(0, 6)) - rng.normal(0, 1)
    fissure = np.abs(middle) + 1.5 * np.maximum(np.minimum(Y - front, back - Y), 0)
    return np.minimum(np.minimum(sulcus, fissure), depth), 0.9 + 1.0 * atrophy, middle


def _ventricle_height(height: float) -> float:
    """1 where the bodies of the lateral ventricles are largest, towards 0 above and below."""
    return np.exp(-(((height - 0.65) / 0.35) ** 2))


def _ventricles(rng: np.random.Generator, height: float, middle: np.ndarray) -> np.ndarray:
    """Signed distance in pixels, positive inside: on each side a front horn, a body and a back horn; the third one."""
    size = rng.uniform(0.65, 1.3)
    fade = np.clip((1.12 - height) / 0.35, 0, 1)  # they close towards the top
    spread = rng.normal(1, 0.07)
    low, mid = max(0.0, 1 - height / 0.4), _ventricle_height(height)
    ventricles = np.full_like(X, -99)
    for side in (-1, 1):
        tilt = rng.normal(1, 0.06)
        front_horn = (side * spread * tilt * (11 + 10 * low + 7 * mid), -40 + 9 * height)
        body = (side * spread * (7 + 3 * low), -4.0)
        back_horn = (side * spread * tilt * (10 + 3 * mid), 24 + 6 * mid)
        r_front = size * (5 + 4 * low + 4 * mid) * fade
        r_body = size * (0.5 + 7 * mid) * fade
        r_back = size * (3.5 + 4 * mid) * fade
        if low > 0:  # below the bodies the two horns are separate
            horn = _ellipse(*front_horn, r_front, r_front * 1.5)
            tail = _ellipse(*back_horn, r_back + 0.1, r_back * 1.8 + 0.1)
            ventricles = np.maximum(ventricles, np.maximum(horn, tail))
        if r_body > 0.5:
            ventricles = np.maximum(ventricles, _capsule(front_horn, body, r_front * 0.8, r_body))
            ventricles = np.maximum(ventricles, _capsule(body, back_horn, r_body, r_back))
    third = 2.0 * size - np.abs(middle) - 0.5 * np.maximum(np.abs(Y - 2) - 14, 0) - 12 * max(0.0, height - 0.35)
    return np.maximum(ventricles, third)


def _deep_grey_matter(height: float) -> np.ndarray:
    """Signed distance in pixels, positive inside: thalamus, putamen and caudate of both sides."""
    deep = np.full_like(X, -99)
    for side in (-1, 1):
        deep = np.maximum(deep, _ellipse(side * 13, 8, 12, 17) - 22 * max(0.0, height - 0.45))
        deep = np.maximum(deep, _ellipse(side * 30, -8, 8, 20) - 22 * max(0.0, height - 0.30))
        caudate = _ellipse(side * (18 + 6 * _ventricle_height(height)), -22, 7, 14)
        deep = np.maximum(deep, caudate - 22 * max(0.0, height - 0.75))
    return deep


def write(folder: str | Path, cases: dict[str, range] = CASES, slices: int = SLICES, seed: int = 0) -> None:
    """Write phantoms as folder/keras_png_slices_<split>/case_CCC_slice_S.nii.png.

    `cases` are the subjects of each split, each with so many slices, spaced evenly from low to high.
    Raises UserError if the folder holds other slices.
    """
    marker = Path(folder) / MARKER
    if not marker.exists() and any(Path(folder).glob("keras_png_slices_*")):
        raise UserError(f"{folder}: holds other slices, which have the names of phantoms; name another folder")
    Path(folder).mkdir(parents=True, exist_ok=True)
    marker.write_text(f"Synthetic slices, written by preparation/phantoms.py with seed {seed}.\n")
    names = [
        (split, case, s)
        for split, numbers in cases.items()
        for case in numbers
        for s in np.linspace(0, SLICES - 1, slices).round().astype(int).tolist()
    ]
    for split, case, s in console.progress(names, desc="Writing phantoms", unit=" images"):
        path = Path(folder) / f"keras_png_slices_{split}" / f"case_{case:03d}_slice_{s}.nii.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        with files.atomically(path) as temporary:
            Image.fromarray(make_slice(case, s, seed)).save(temporary, format="PNG")
        console.stop_if_signalled()
    with open(marker, "a") as file:
        file.write(COMPLETE)


def write_demo() -> Path:
    """The phantoms in ./phantoms, written there the first time. Raises UserError if they cannot be written."""
    if not is_complete(DEMO_FOLDER):
        try:
            write(DEMO_FOLDER)
        except OSError as error:
            raise UserError(f"{DEMO_FOLDER}: cannot write phantoms there ({error.strerror})") from None
    return DEMO_FOLDER


def is_complete(folder: str | Path) -> bool:
    """Whether a folder holds phantoms that were written to the end."""
    marker = Path(folder) / MARKER
    return marker.is_file() and COMPLETE in marker.read_text(errors="replace")


def are_in(folder: str | Path) -> bool:
    """Whether a folder holds phantoms, complete or not. What is made from them says so."""
    return (Path(folder) / MARKER).is_file()


def main() -> None:
    settings = {"description": __doc__, "formatter_class": argparse.RawDescriptionHelpFormatter}
    parser = argparse.ArgumentParser(prog="python -m preparation.phantoms", **settings)
    parser.add_argument("folder", metavar="FOLDER", help="folder to make")
    write(parser.parse_args().folder)


if __name__ == "__main__":
    console.run_program(main, "preparation.phantoms")
