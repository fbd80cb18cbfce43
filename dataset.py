"""OASIS PNG folders -> batches of float images on the device.

A data folder holds keras_png_slices_train, keras_png_slices_validate and keras_png_slices_test; every .png in one of
them is a 256x256 scan. Folders of label maps beside them (keras_png_slices_seg_*) are never read as scans; they say
where the brain is.
"""

import hashlib
import os
import re
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, Dataset, RandomSampler

from evaluation.generation import Images
from preparation import phantoms
from preparation.folder import LABEL_STEP, SHARES, SIZE, label_map
from support import console, distributed
from support.console import UserError
from support.device import fits, move
from support.files import natural

SPLITS = tuple(SHARES)
TISSUES = ("brain", "CSF", "grey matter", "white matter")  # labels 1, 2 and 3 are the last three, together the brain
# `OasisDataset.digest` of the set that the report used
REPORT_SET = {
    "train": "037125ce7bcdfee926c84c46107ae9a04270bbf407a3653d664faacf72c4f594",
    "validate": "c0cb3c1038f3066a7cb533d235f9a29e2b22d9ef956087592bb5de4cda84d95b",
    "test": "a5cc9d92aa2c70a96e7d88f74f704a184c91bcd6ea1060edc693a0879e268ba9",
}
DARK = 64  # grey level: a split whose maximum is below causes a warning (each slice of the report's set reaches 255)
DEFAULT_DATA = Path("keras_png_slices_data")
BOX_MARGIN = 12  # pixels: the padding of hidden layers changes only the outermost 3 codes, of 4 pixels each
MOST_BYTES = 16 * 2**20  # of a file; 256x256 uncompressed pixels take at most half a megabyte (16-bit RGBA)

# Pillow's guard against images that fill the memory. Here the size is checked before anything is decoded.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)


class DataError(UserError):
    """The data cannot be used. The message names the file or folder and says what to do."""


class ImageFolder(Dataset):
    """The PNGs of a folder, decoded once into a uint8 tensor and served as float32 in [0, 1].

    `dataset[i]` is (1, 256, 256), `dataset.batch(indices)` is (B, 1, 256, 256), gathered at once, so that a DataLoader
    needs no worker processes. The order is natural, by case and slice number.

    Args:
        folder: every .png in it is a 256x256 scan.
        device: where batches are made. The images are kept there too if they take at most half of its free memory.
        skip_bad: leave out files that cannot be used instead of raising an error that lists them.
        place: the folder's name in printed lines.

    Attributes:
        images, files: (N, 1, 256, 256) uint8, and the N paths in the same order.
        skipped: for each file that was left out, a line that names it and says what is wrong.
        digests, digest: SHA-256 of each image's pixels, and that of these together, in order.

    Raises:
        DataError: the folder is missing or empty, a file is not a readable 256x256 PNG, or all images are black.
    """

    def __init__(self, folder: Path, device: str | torch.device = "cpu", skip_bad: bool = False, place: str = ""):
        self.files = list_pngs(folder)
        self.place = place
        pixels, digests, errors = read_pngs(self.files, f"Reading {place}")
        self.skipped = [error for error in errors if error]
        good = [i for i, error in enumerate(errors) if not error]
        if self.skipped and (not skip_bad or not good):
            raise DataError(_report(self.skipped, len(errors)))
        if self.skipped:
            self.files = [self.files[i] for i in good]
            pixels = pixels[good]
        self.digests = [digests[i] for i in good]
        self.digest = hashlib.sha256(b"".join(self.digests)).hexdigest()
        name = printable(folder)
        brightest = pixels.max()
        if not brightest:
            raise DataError(f"{name}: every image is black; put the split's scans there")
        if brightest < DARK:
            print(
                f"warning: {name}: the brightest value is {brightest} of 255; if these are 12-bit values in 16-bit "
                f"files, multiply them by {255 / brightest:.0f}",
                file=sys.stderr,
            )
        self.device = torch.device(device)
        self.images = torch.from_numpy(pixels)
        if fits(self.images.nbytes, self.device):
            self.images = self.images.to(self.device)

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, i: int) -> Tensor:
        return self.images[i].float() / 255

    def batch(self, indices: Sequence[int]) -> Tensor:
        """Images (B, 1, 256, 256) float32 in [0, 1] on the device."""
        images = self.images[move(torch.as_tensor(indices), self.images.device)]
        return move(images, self.device).float() / 255

    __getitems__ = batch  # what DataLoader calls

    def print_skipped(self) -> None:
        """Print what was left out, if anything."""
        if self.skipped:
            n = len(self.skipped)
            lines = [f"Left out of {self.place}: {n} of {n + len(self)} files.", *self.skipped]
            print("\n  ".join(lines), flush=True)

    def name(self, i: int) -> str:
        """The name of image i's file, as it can be printed."""
        return printable(self.files[i].name)

    def case_and_slice(self, i: int) -> tuple[int | None, int | None]:
        """The numbers in image i's file name, None where its name has none."""
        return case_and_slice(self.files[i])

    def as_images(self) -> Images:
        """The images with their subjects and names, for `evaluation.compare`."""
        numbers = range(len(self))
        return Images(self.images, list(map(self.subject, numbers)), list(map(self.name, numbers)))

    def subject(self, i: int) -> int | str:
        """The subject of image i: the case number in its file name, else the file name."""
        case, _ = self.case_and_slice(i)
        return self.name(i) if case is None else case


class OasisDataset(ImageFolder):
    """One split of an OASIS-shaped folder.

    Args:
        root, split: the folder that holds keras_png_slices_<split>, and "train", "validate" or "test".
        device, skip_bad: as of `ImageFolder`.
        with_labels: read the label maps beside the scans, if there are any.

    Attributes:
        labels: with `with_labels`, (N, 256, 256) uint8, 0 outside the brain, else the index in TISSUES; or None.
        phantoms: whether the folder holds phantoms.

    Raises:
        DataError: as of `ImageFolder`.
    """

    def __init__(
        self,
        root: str | Path,
        split: str,
        device: str | torch.device = "cpu",
        skip_bad: bool = False,
        with_labels: bool = False,
    ):
        self.root = Path(root)
        self.split = split
        super().__init__(split_folder(self.root, split), device, skip_bad, split)
        self.labels = self._read_labels() if with_labels else None
        self.phantoms = phantoms.are_in(self.root)

    def _read_labels(self) -> Tensor | None:
        """The files keras_png_slices_seg_<split>/seg_C_slice_S… beside the scans, with grey values 0, 85, 170 and 255.

        None if there is no such folder; and, after a warning, if an image has no map there.
        """
        folder = self.root / f"keras_png_slices_seg_{self.split}"
        if not folder.is_dir():
            return None
        paths = [label_map(path) for path in self.files]
        missing = [path.name for path in paths if not path.exists()]
        if missing:
            error = f"{printable(folder)}: {len(missing)} of {len(self)} images have no map, such as {missing[0]}"
        else:
            pixels, _, errors = read_pngs(paths, f"Reading label maps of {self.split}")
            error = next(filter(None, errors), None)
            if error is None and (pixels % LABEL_STEP).any():
                error = f"{printable(folder)}: has grey values other than 0, 85, 170 and 255"
            if error is None and not pixels.any():
                error = f"{printable(folder)}: no map shows a brain"
        if error is not None:
            print(f"warning: label maps are left out: {error}", file=sys.stderr)
            return None
        return torch.from_numpy(pixels[:, 0] // LABEL_STEP)


def describe(*datasets: OasisDataset) -> str:
    """Which data these splits are, in a few words: the report's set, phantoms or others."""
    if all(dataset.digest == REPORT_SET.get(dataset.split) for dataset in datasets):
        return "the report's set"
    kind = "phantoms" if datasets[0].phantoms else "not the report's set"
    n = sum(map(len, datasets))
    cases = {dataset.case_and_slice(i)[0] for dataset in datasets for i in range(len(dataset))}
    return f"{kind}, {n} slices" + ("" if None in cases else f" of {len(cases)} subjects")


def read_pngs(paths: Sequence[Path], desc: str) -> tuple[np.ndarray, list[bytes], list[str | None]]:
    """Read 256x256 PNGs with `read_png` in several threads, since Pillow releases the GIL while it decodes.

    Returns:
        pixels (N, 1, 256, 256) uint8, undefined where an image could not be read; the SHA-256 of each image that could;
        and for each image what is wrong with it, or None.
    """
    pixels = np.empty((len(paths), 1, SIZE, SIZE), np.uint8)

    def read(i: int) -> tuple[bytes, str | None]:
        try:
            pixels[i, 0] = read_png(paths[i])
        except DataError as error:
            return b"", str(error)
        return hashlib.sha256(pixels[i]).digest(), None

    results = console.in_threads(range(len(paths)), read, torch.get_num_threads(), desc=desc, unit=" images")
    digests, errors = zip(*results, strict=True)
    return pixels, list(digests), list(errors)


def case_and_slice(path: Path) -> tuple[int | None, int | None]:
    match = re.search(r"case_([0-9]+)_slice_([0-9]+)", path.name)
    if not match or max(map(len, match.groups())) > 18:  # more than a 64-bit integer holds is no number of a case
        return None, None
    return int(match[1]), int(match[2])


def printable(path: str | Path) -> str:
    """A path as one printable line: unprintable characters, such as line breaks, are escaped."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in str(path))


def _report(errors: list[str], n_files: int) -> str:
    """One line for one bad file; for more, a line each."""
    advice = "or leave such files out with --skip-bad"
    if len(errors) == 1:
        return f"{errors[0]}, {advice}"
    return "\n  ".join([f"{len(errors)} of {n_files} files cannot be used:", *errors]) + f"\n{advice.capitalize()}."


def refuse_shared_cases(root: Path) -> None:
    """Raise DataError if a case (a subject) is in two splits: scores of subjects seen in training are too good."""
    where: dict[int, str] = {}
    shared = {}
    for split in SPLITS:
        cases = [case_and_slice(path)[0] for path in list_scans(root, split)]
        if None in cases:
            n = cases.count(None)
            print(f"{n} file names of {split} have no case number; their subjects may also be in another split.")
        for case in set(cases) - {None}:
            if where.setdefault(case, split) != split:
                shared[case] = (where[case], split)
    if shared:
        case, (first, second) = min(shared.items())
        more = f" (and {len(shared) - 1} more cases are in two splits)" if len(shared) > 1 else ""
        raise DataError(
            f"{printable(root)}: case {case} is in keras_png_slices_{first} and keras_png_slices_{second}{more}, so "
            "scores would be too good; correct the splits, or give --allow-shared-cases"
        )


def refuse_equal_images(one: ImageFolder, other: ImageFolder, advice: str) -> None:
    """Raise DataError, which ends with `advice`, if an image that is not black is in both, under whatever name."""
    place = {digest: i for i, digest in enumerate(one.digests)}
    equal = [(place[k], j) for j, k in enumerate(other.digests) if k in place and other.images[j].any()]
    if equal:
        (i, j), more = equal[0], f" ({len(equal)} images are in both)" if len(equal) > 1 else ""
        raise DataError(f"{printable(other.files[j])}: has the pixels of {printable(one.files[i])}{more}; {advice}")


def picture_box(images: Tensor) -> tuple[slice, slice]:
    """The rows and columns in which any of images (N, 1, H, W) is above 0, and BOX_MARGIN pixels around them.

    They begin at a multiple of 4, so that the codes of cropped images lie on the grid of whole ones. Their number is a
    multiple of 8, or all of them. If every image is black, all rows and columns.
    """
    bright = images.amax((0, 1)) > 0
    return _box_along(bright.any(1)), _box_along(bright.any(0))


def _box_along(bright: Tensor) -> slice:
    size = len(bright)
    places = bright.nonzero().flatten().tolist()
    first, end = (places[0], places[-1] + 1) if places else (0, size)
    start = max(0, first - BOX_MARGIN) // 4 * 4
    length = min(size, -(-(end + BOX_MARGIN - start) // 8) * 8)
    start = min(start, size - length)
    return slice(start, start + length)


class _Shares(BatchSampler):
    """This process's share of each batch of indices."""

    def __iter__(self):
        return map(distributed.part, super().__iter__())


def make_loader(dataset: Dataset, batch_size: int, generator: torch.Generator) -> DataLoader:
    """Batches of `dataset` in an order drawn from `generator`, the last, smaller one kept.

    Each of several processes gets its share of every batch.
    """
    batches = _Shares(RandomSampler(dataset, generator=generator), batch_size, drop_last=False)
    return DataLoader(dataset, batch_sampler=batches, generator=generator, collate_fn=lambda batch: batch)


def split_folder(root: Path, split: str) -> Path:
    """The folder of a split. Raises DataError if it is missing."""
    if not root.is_dir():
        raise DataError(
            f"{printable(root)}: no such folder; name the folder that holds keras_png_slices_train with --data"
        )
    folder = root / f"keras_png_slices_{split}"
    if not folder.is_dir():
        near = next(
            (path.parent for path in (root.parent / folder.name, *root.glob(f"*/{folder.name}")) if path.is_dir()), None
        )
        if near:
            raise DataError(f"{printable(folder)}: missing; --data {printable(near)} has one")
        others = sorted(printable(path.name) for path in root.iterdir() if path.is_dir())[:6]
        advice = "the data folder (--data) must hold it" + (f", and has {', '.join(others)}" if others else "")
        advice += "; python -m preparation.images makes such a folder of any images"
        raise DataError(f"{printable(folder)}: missing; {advice}")
    return folder


def list_scans(root: Path, split: str) -> list[Path]:
    """The scans of a split. Raises DataError if the folder is missing or holds no PNG."""
    return list_pngs(split_folder(root, split))


def list_pngs(folder: Path) -> list[Path]:
    """The PNGs of a folder in natural order of case and slice; hidden files are passed over.

    Raises DataError if it is missing or holds none.
    """
    try:
        names = [path for path in folder.iterdir() if path.name[0] != "."]
        files = [path for path in names if path.suffix.lower() == ".png"]
    except (FileNotFoundError, NotADirectoryError):
        raise DataError(f"{printable(folder)}: no such folder") from None
    except OSError as error:
        raise DataError(f"{printable(folder)}: cannot be read ({error.strerror})") from None
    if not files:
        kinds = sorted({printable(path.suffix) for path in names if path.suffix})[:6]
        found = f" but {', '.join(kinds)}" if kinds else ""
        below = sorted(printable(path.name) for path in names if path.is_dir())
        advice = f"name one of its folders, such as {below[0]}" if below else "put the split's scans there"
        raise DataError(f"{printable(folder)}: holds no .png files{found}; {advice}, as 256x256 grey PNGs")
    return sorted(files, key=lambda path: (natural(path.name), path.name))


def read_png(path: Path) -> np.ndarray:
    """A 256x256 PNG as uint8 grey: 8-bit grey as it is, 16-bit grey scaled by 65535, colour and palettes converted.

    Raises DataError if it cannot be read or decoded, is truncated or animated, or has another size.
    """
    name = printable(path)
    try:
        if not path.is_file():  # a pipe of that name would be waited for
            what = "a folder" if path.is_dir() else "a link to nothing" if path.is_symlink() else "not a regular file"
            raise DataError(f"{name}: is {what}; replace or remove it")
        if path.stat().st_size > MOST_BYTES:
            raise DataError(f"{name}: is larger than {MOST_BYTES >> 20} MiB; replace or remove it")
        with Image.open(path, formats=["PNG"]) as image:
            if image.size != (SIZE, SIZE):  # known from the header, before anything is decoded
                width, height = image.size
                raise DataError(f"{name}: is {width}x{height} pixels, not 256x256; resize or remove it")
            if getattr(image, "n_frames", 1) != 1:
                raise DataError(f"{name}: is an animation; replace or remove it")
            image.verify()  # checksums, which reading does not look at
        with Image.open(path, formats=["PNG"]) as image:
            if image.mode.startswith("I"):  # "I;16", or "I" in older versions of Pillow
                return np.rint(np.asarray(image, np.float64) * (255 / 65535)).astype(np.uint8)
            grey = np.asarray(image if image.mode == "L" else image.convert("L"))
            if "A" in image.getbands() and np.ptp(grey) == 0 and np.ptp(np.asarray(image.getchannel("A"))) > 0:
                raise DataError(f"{name}: has its picture in the alpha channel alone; convert it to grey")
            return grey
    except DataError:
        raise
    except Exception as error:  # for broken files Pillow raises OSError, SyntaxError, ValueError, zlib.error, …
        if isinstance(error, OSError) and error.strerror:
            raise DataError(f"{name}: cannot be read ({error.strerror}); replace or remove it") from None
        reason = printable(error).replace(f" {str(path)!r}", "").replace(name, "").strip() or type(error).__name__
        raise DataError(f"{name}: cannot be decoded as PNG ({reason}); replace or remove it") from None


def find_data(named: str | None) -> Path | None:
    """The OASIS folder: `named` (--data), else the environment's OASIS_DIR, else ./keras_png_slices_data, else None.

    Raises DataError if a folder was named and is not there.
    """
    for value, source in ((named, "--data"), (os.environ.get("OASIS_DIR") or None, "OASIS_DIR")):
        if value is not None:
            if Path(value).is_file():
                raise DataError(f"{value}: is a file, named by {source}; unpack it, and name the folder there")
            if not value or not Path(value).is_dir():
                raise DataError(f"{value or '(empty)'}: no such folder, named by {source}; name the OASIS folder there")
            return Path(value)
    return DEFAULT_DATA if DEFAULT_DATA.is_dir() else None
