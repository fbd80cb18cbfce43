"""Synthetic T1-weighted slices of whole heads in the OASIS layout, for those who have no OASIS data yet.

A subject is made from its number: head, cortical folding, ventricles, atrophy, contrast and noise. Its 32 slices run
upwards from the third ventricle (slice 0) to the top of the lateral ventricles (slice 31), the front of the head on the
right. They resemble the set's slices in what docs/method.md lists, but they are not a model of anatomy.

    python -m preparation.phantoms DIR    # 512 training, 64 validation and 64 test slices, with label maps
"""

import argparse
from pathlib import Path

import numpy as np

from preparation import heads
from preparation.folder import write_slice
from support import console
from support.console import UserError

SLICES = 32
CASES = {"train": range(1, 17), "validate": range(17, 19), "test": range(19, 21)}
MARKER = "PHANTOMS.txt"
COMPLETE = "All of them were written.\n"
DEMO_FOLDER = Path("phantoms")


def make_pair(case: int, slice_number: int) -> tuple[np.ndarray, np.ndarray]:
    """One slice and its label map, (256, 256) uint8 each, of a case (1 or more) and a slice's number: always the same.

    The slice's largest value is 255. Labels are 0 outside the brain, 85 CSF, 170 grey and 255 white matter. Raises
    ValueError if slice_number is not in 0 (low) to 31 (high).
    """
    if not 0 <= slice_number < SLICES:
        raise ValueError(f"slice_number must be 0 to {SLICES - 1}, not {slice_number}")
    subject = np.random.default_rng([0, case])
    noise = np.random.default_rng([0, case, slice_number + 1])
    return heads.draw(subject, noise, slice_number / (SLICES - 1))


def write(folder: str | Path, cases: dict[str, range] = CASES, slices: int = SLICES) -> None:
    """Write phantoms as folder/keras_png_slices_<split>/case_CCC_slice_S.nii.png, label maps as in the set beside them.

    `cases` are the subjects of each split, each with so many slices, spaced evenly from low to high. The label maps are
    folder/keras_png_slices_seg_<split>/seg_CCC_slice_S.nii.png.
    Raises UserError if the folder holds other slices.
    """
    marker = Path(folder) / MARKER
    if not marker.exists() and any(Path(folder).glob("keras_png_slices_*")):
        raise UserError(f"{folder}: holds other slices, which have the names of phantoms; name another folder")
    Path(folder).mkdir(parents=True, exist_ok=True)
    marker.write_text("Synthetic slices, written by preparation/phantoms.py.\n")
    names = [
        (split, case, s)
        for split, numbers in cases.items()
        for case in numbers
        for s in np.linspace(0, SLICES - 1, slices).round().astype(int).tolist()
    ]
    for split, case, s in console.progress(names, desc="Writing phantoms", unit=" images"):
        image, labels = make_pair(case, s)
        for kind, name, pixels in (("", "case", image), ("seg_", "seg", labels)):
            path = Path(folder) / f"keras_png_slices_{kind}{split}" / f"{name}_{case:03d}_slice_{s}.nii.png"
            write_slice(pixels, path)
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
