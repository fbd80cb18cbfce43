"""OASIS PNG folders -> batches of float images on the device.

A data folder holds keras_png_slices_train, keras_png_slices_validate and keras_png_slices_test; every .png in one of
them is a 256x256 scan. Folders of label maps beside them (keras_png_slices_seg_*) are not read.
"""

import os
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, Dataset, RandomSampler
from tqdm import tqdm

import hardware
import parallel
import phantom

SPLITS = ("train", "validate", "test")
IMAGE_SIZE = 256
DEFAULT_DATA = Path("keras_png_slices_data")
DEFAULT_PHANTOMS = Path("phantoms")


class DataError(Exception):
    """The data cannot be used; the message names the file or folder and says what to do."""


class OasisDataset(Dataset):
    """One split of an OASIS-shaped folder, decoded once into a uint8 tensor and served as float32 in [0, 1].

    `dataset[i]` is (1, 256, 256); `dataset.__getitems__(indices)` gathers (B, 1, 256, 256) at once, which is what a
    DataLoader calls, so that it needs no worker processes. Order: natural, by case and slice number.

    Args:
        root: the folder that holds keras_png_slices_<split>.
        split: "train", "validate" or "test".
        device: where batches are made; the images are kept there too if they take at most half of its free memory.
        progress: called as tqdm is, with an iterable, `total`, `desc` and `unit`.

    Attributes:
        images: (N, 1, 256, 256) uint8.
        files: the N paths, in the same order.

    Raises:
        DataError: a folder is missing or empty, or a file is not a readable 256x256 PNG.
    """

    def __init__(self, root: str | Path, split: str, device: str | torch.device = "cpu", progress=tqdm):
        self.files = list_scans(Path(root), split)
        pixels = np.empty((len(self.files), 1, IMAGE_SIZE, IMAGE_SIZE), np.uint8)

        def read(i: int) -> str | None:
            try:
                pixels[i, 0] = read_png(self.files[i])
            except DataError as error:
                return str(error)

        with ThreadPoolExecutor(torch.get_num_threads()) as pool:  # Pillow releases the interpreter while it decodes
            results = pool.map(read, range(len(self.files)))
            results = list(progress(results, total=len(self.files), desc=f"Reading {split}", unit=" images"))
        errors = [error for error in results if error]
        if errors:
            more = f" ({len(errors) - 1} more such files in this folder)" if len(errors) > 1 else ""
            raise DataError(errors[0] + more)
        self.device = torch.device(device)
        self.images = torch.from_numpy(pixels)
        if hardware.fits(self.images.nbytes, self.device):
            self.images = self.images.to(self.device)

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, i: int) -> Tensor:
        return self.images[i].float() / 255

    def __getitems__(self, indices: list[int]) -> Tensor:
        batch = self.images[torch.as_tensor(indices).to(self.images.device, non_blocking=True)]
        return batch.to(self.device, non_blocking=True).float() / 255

    def case_and_slice(self, i: int) -> tuple[int | None, int | None]:
        """The numbers in image i's file name, None where its name has none."""
        found = re.search(r"case_(\d+)_slice_(\d+)", self.files[i].name)
        return (int(found[1]), int(found[2])) if found else (None, None)


class _Shares:
    """Of each batch of indices the part that this process works on."""

    def __init__(self, batches: BatchSampler):
        self.batches = batches

    def __iter__(self):
        for batch in self.batches:
            yield parallel.part(batch)

    def __len__(self) -> int:
        return len(self.batches)


def make_loader(dataset: Dataset, batch_size: int, generator: torch.Generator) -> DataLoader:
    """Batches of `dataset` in an order drawn from `generator`, the last, smaller one kept.

    Each of several processes gets its share of every batch.
    """
    batches = BatchSampler(RandomSampler(dataset, generator=generator), batch_size, drop_last=False)
    return DataLoader(dataset, batch_sampler=_Shares(batches), generator=generator, collate_fn=lambda batch: batch)


def list_scans(root: Path, split: str) -> list[Path]:
    """The scans of a split in natural order of case and slice; hidden files are passed over.

    Raises:
        DataError: the folder is missing or holds no PNG.
    """
    if not root.is_dir():
        raise DataError(f"{root}: no such folder; name the folder that holds keras_png_slices_train with --data")
    folder = root / f"keras_png_slices_{split}"
    if not folder.is_dir():
        raise DataError(f"{folder}: missing; the data folder (--data) must hold it, as the OASIS PNG set does")
    try:
        files = [path for path in folder.iterdir() if path.suffix.lower() == ".png" and path.name[0] != "."]
    except OSError as error:
        raise DataError(f"{folder}: cannot be read ({error.strerror})") from None
    if not files:
        raise DataError(f"{folder}: holds no .png files; put the split's scans there")

    def natural(path: Path) -> tuple:
        parts = re.split(r"(\d+)", path.name)
        return [int(part) if part.isdigit() else part for part in parts], path.name

    return sorted(files, key=natural)


def read_png(path: Path) -> np.ndarray:
    """A 256x256 PNG as uint8 grey: 8-bit grey as it is, 16-bit grey scaled by 65535, colour and palettes converted.

    Raises:
        DataError: it cannot be decoded, is truncated, or has another size.
    """
    try:
        with Image.open(path, formats=["PNG"]) as image:
            if image.size != (IMAGE_SIZE, IMAGE_SIZE):  # known from the header, before anything is decoded
                width, height = image.size
                raise DataError(f"{path}: is {width}x{height} pixels, not 256x256; resize or remove it")
            if image.mode.startswith("I"):  # "I;16", or "I" in older versions of Pillow
                return np.rint(np.asarray(image, np.float64) * (255 / 65535)).astype(np.uint8)
            return np.asarray(image if image.mode == "L" else image.convert("L"))
    except DataError:
        raise
    except Exception as error:  # for broken files Pillow raises OSError, SyntaxError, ValueError, zlib.error, …
        reason = str(error).replace(str(path), "").strip() or type(error).__name__
        raise DataError(f"{path}: cannot be decoded as PNG ({reason}); replace or remove it") from None


def find_data(named: str | None) -> Path | None:
    """The OASIS folder: `named` (--data), else the environment's OASIS_DIR, else ./keras_png_slices_data, else None.

    Raises:
        DataError: a folder was named and is not there.
    """
    for value, source in ((named, "--data"), (os.environ.get("OASIS_DIR"), "OASIS_DIR")):
        if value is not None:
            if not value or not Path(value).is_dir():
                raise DataError(f"{value or '(empty)'}: no such folder, named by {source}; name the OASIS folder there")
            return Path(value)
    return DEFAULT_DATA if DEFAULT_DATA.is_dir() else None


def demo_data(progress=tqdm) -> Path:
    """The phantoms in ./phantoms, written there the first time.

    Raises:
        DataError: they cannot be written.
    """
    if not phantom.is_complete(DEFAULT_PHANTOMS):
        try:
            phantom.write(DEFAULT_PHANTOMS, progress=progress)
        except OSError as error:
            raise DataError(f"{DEFAULT_PHANTOMS}: cannot write phantoms there ({error.strerror})") from None
    return DEFAULT_PHANTOMS
