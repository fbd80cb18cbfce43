"""Any images -> the folder of slices that train.py reads.

    python -m preparation.images SOURCE DEST    # then: python train.py --data DEST

SOURCE is a folder of PNG, JPEG or TIFF images, however nested, or an .npz file of MedMNIST. Images of one subject go to
one split: the first line says how subjects are told apart, and --group says it better. Images become grey and 256x256;
those of 8 bits that are so already keep their pixels. Deeper values are scaled by the set's own maximum. Interrupted
and called again, it goes on where it was: until all is done, everything is in DEST.unfinished.
"""

import argparse
import re
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageOps
from skimage.transform import resize

from preparation import folder
from preparation.folder import SIZE
from support import console, files
from support.console import Number, UserError

SUFFIXES = (".png", ".jpg", ".jpeg", ".tif", ".tiff")
NOT_IMAGES = re.compile(r"(^|[/_. -])(masks?|labels?|seg|segmentations?)([/_. -]|$)", re.IGNORECASE)
SPLITS = {"train": "train", "training": "train", "val": "validate", "valid": "validate", "validate": "validate"}
SPLITS |= {"validation": "validate", "test": "test", "testing": "test"}
FITS = ("pad", "crop", "resize")
SIDE = Number(int, 8, f"a whole number from 8 to {SIZE}", below=SIZE + 1)


class Item(NamedTuple):
    """An image of the source: its name there, its subject, the subject's number, and its file or its pixels."""

    name: str
    subject: str
    case: int
    source: Path | np.ndarray


def find(source: Path) -> tuple[dict[str, Path | np.ndarray], list[str]]:
    """The file or the pixels of each image of a source, by its name in natural order; and what was passed over."""
    if source.suffix == ".npz" and source.is_file():
        return _in_npz(source), []
    if not source.is_dir():
        raise UserError(f"{source}: is no folder and no .npz file; unpack an archive first")
    paths = dict(folder.walk(source))
    names = sorted(paths, key=files.natural)
    kept = [n for n in names if n.lower().endswith(SUFFIXES) and not NOT_IMAGES.search(n)]
    if strange := [paths[name] for name in kept if not paths[name].is_file()]:  # a pipe would be waited for
        raise UserError(f"{strange[0]}: is no regular file; remove it, or fetch what it links to")
    return {name: paths[name] for name in kept}, sorted(set(names) - set(kept))


def _in_npz(source: Path) -> dict[str, np.ndarray]:
    try:
        with np.load(source) as contents:
            keys = {split: f"{key}_images" for key, split in SPLITS.items() if f"{key}_images" in contents}
            arrays = {split: contents[key] for split, key in keys.items()}
    except Exception as error:  # a damaged archive shows itself in many ways
        raise UserError(f"{source}: cannot be read as .npz ({console.one_line(error)})") from None
    if set(arrays) != set(folder.SHARES):
        raise UserError(f"{source}: has no train_images, val_images and test_images, as files of MedMNIST have")
    if any(a.dtype != np.uint8 or a.ndim != 3 and a.shape[3:] != (3,) or 0 in a.shape[1:] for a in arrays.values()):
        raise UserError(f"{source}: holds no images (N, H, W) or (N, H, W, 3) of 8 bits")
    return {f"{split}/{i}": image for split, array in arrays.items() for i, image in enumerate(array)}


def read(source: Path | np.ndarray) -> np.ndarray:
    """An image as (H, W) grey values: uint8, or what is deeper. Raises UserError if its file cannot be read."""
    if isinstance(source, np.ndarray):
        return grey(Image.fromarray(source))
    try:
        with Image.open(source) as image:
            if getattr(image, "n_frames", 1) != 1:
                raise ValueError("it has several pages")
            return grey(image)
    except Exception as error:  # for broken files Pillow raises OSError, SyntaxError, ValueError, zlib.error, …
        raise UserError(f"{source}: cannot be used ({console.one_line(error)}); replace or remove it") from None


def grey(image: Image.Image) -> np.ndarray:
    """(H, W) uint8, or float64 of images of 16 and 32 bits, turned as EXIF says."""
    image = ImageOps.exif_transpose(image)
    if image.mode in ("F", "I") or image.mode.startswith("I;16"):
        values = np.asarray(image, np.float64)
        if not np.isfinite(values).all() or values.min() < 0:
            raise ValueError("values below 0 or not finite")
        return values
    values = np.asarray(image.convert("L"))
    if "A" in image.getbands() and np.ptp(values) == 0 < np.ptp(np.asarray(image.getchannel("A"))):
        raise ValueError("its picture is in the alpha channel alone")
    return values


def subjects_of(names: list[str], group: re.Pattern | None) -> tuple[str, list[str]]:
    """How subjects are told apart, in words, and the subject of each name."""
    stems = [Path(n).stem for n in names]
    folders = [n.split("/")[:-1] for n in names]
    folders = [parts[1:] if parts and parts[0].lower() in SPLITS else parts for parts in folders]
    numbered = [next((part for part in parts if re.search(r"\d", part)), None) for parts in folders]
    before = [re.fullmatch(r"(.*\d)\D+\d+\D*", stem) for stem in stems]  # what comes before the last number
    if group is not None:
        matches = [group.search(name) for name in names]
        subjects = [match and (match[1] if group.groups else match[0]) for match in matches]
        if None in subjects:
            raise UserError(f"--group {group.pattern}: finds no subject in {names[subjects.index(None)]}")
        return f"--group {group.pattern}", subjects
    if len(set(stems)) < len(stems) and None not in numbered:  # the same names in several folders
        return "the outermost folder with a number", numbered
    if all(before) and len({match[1] for match in before}) < len(names):
        return "the name without its last number", [match[1] for match in before]
    return "none: each image is one of its own", names


def split_of(items: list[Item], o: argparse.Namespace) -> tuple[str, dict[int, str]]:
    """How subjects are split, in words, and the split of each case: the source's folders are it, if they are all three.

    Raises UserError if some images are in folders named as splits, and others are not.
    """
    named = [SPLITS.get(item.name.split("/")[0].lower()) for item in items]
    if o.split is not None:
        return f"as {o.split} says", folder.split_subjects(items, o.seed, o.split)
    if set(named) == {None}:
        return "drawn", folder.split_subjects(items, o.seed)
    if set(named) != set(folder.SHARES):
        raise UserError(f"{o.source}: has folders named as splits, but not all images are in train, val or test")
    splits: dict[int, str] = {}
    for item, split in zip(items, named, strict=True):
        if splits.setdefault(item.case, split) != split:
            raise UserError(f"{item.name}: its subject {item.subject} is in two splits; give --group or --split")
    return "that of the source", splits


def fitted(image: np.ndarray, side: int, how: str) -> np.ndarray:
    """Values 0 to 255 (H, W) -> (SIZE, SIZE) uint8: the picture in a square of `side` pixels in the middle.

    `how` is "pad" (what is larger is made smaller, the rest is 0), "crop" (the shorter edge fills the square) or
    "resize" (both do).
    """
    if how == "crop":
        n = min(image.shape)
        image = image[tuple(slice((size - n) // 2, (size - n) // 2 + n) for size in image.shape)]
    factor = min(1, side / max(image.shape))
    shape = tuple(max(1, round(n * factor)) for n in image.shape) if how == "pad" else (side, side)
    if shape != image.shape:
        image = resize(image.astype(np.float64), shape, anti_aliasing=True, preserve_range=True)
    margins = [((SIZE - n) // 2, SIZE - n - (SIZE - n) // 2) for n in image.shape]
    return np.pad(np.rint(image).astype(np.uint8), margins)


def main(argv: list[str] | None = None) -> None:
    o = parse(argv)
    console.install_signal_handlers()
    source = Path(o.source)
    dest = Path(o.dest).resolve()
    if source.resolve() in (dest, *dest.parents):
        raise UserError(f"{dest}: lies in SOURCE; name another DEST")
    images, passed_over = find(source)
    if not images:
        raise UserError(
            f"{source}: holds no PNG, JPEG or TIFF images; convert others (DICOM by dcm2niix, for preparation.oasis)"
        )
    rule, subjects = subjects_of(list(images), o.group)
    case = {subject: i for i, subject in enumerate(dict.fromkeys(subjects), 1)}
    items = [Item(name, s, case[s], image) for (name, image), s in zip(images.items(), subjects, strict=True)]
    examples = ", ".join(f"{item.subject} of {item.name}" for item in items[:: -(-len(items) // 3)])
    print(f"Subjects: {rule} ({examples})")
    how, splits = split_of(items, o)
    print(f"{len(items)} images of {len(case)} subjects, split {how}: {folder.counted(splits, o)}")
    if passed_over:
        print(f"Passed over: {len(passed_over)} files, such as {passed_over[0]}")
    if o.dry_run:
        print(f"{len(items)} images would be written to {dest} (--dry-run).")
        return
    paths = [item.source for item in items] if source.is_dir() else [source]
    plan = {
        "images": [[item.name, item.subject, splits[item.case]] for item in items],
        "files": [[path.stat().st_size, path.stat().st_mtime_ns] for path in paths],
        "fit": o.fit,
        "size": o.size,
    }
    if not folder.is_complete(dest, plan):
        with folder.begun(dest, plan) as unfinished:
            convert_all(items, splits, unfinished, o)
    folder.complete(dest, o.preview)


def convert_all(items: list[Item], splits: dict[int, str], unfinished: Path, o: argparse.Namespace) -> None:
    """Write what is not there yet, and subjects.csv."""
    in_threads = partial(console.in_threads, items, n_threads=folder.CORES, unit=" images")
    depths = in_threads(lambda item: None if (x := read(item.source)).dtype == np.uint8 else x.max(), desc="Reading")
    deep = [greatest for greatest in depths if greatest is not None]
    factor = 255 / max(deep) if deep and max(deep) else 1.0
    if deep:
        print(f"{len(deep)} images have more than 8 bits; their greatest value, {max(deep):g}, becomes 255")
    names = numbered(items, splits)

    def write(item: Item) -> None:
        path = unfinished / names[item.name]
        if not folder.is_written(path):
            values = read(item.source)
            values = values if values.dtype == np.uint8 else values * factor
            folder.write_slice(fitted(values, o.size, o.fit), path)

    for _ in in_threads(write, desc="Writing"):
        pass
    columns = ("file", "case", "subject", "split", "source")
    rows = [(names[item.name], item.case, item.subject, splits[item.case], item.name) for item in items]
    files.write_csv(unfinished / "subjects.csv", columns, rows)


def numbered(items: list[Item], splits: dict[int, str]) -> dict[str, str]:
    """The file of each image in DEST, by its name."""
    counts: dict[int, int] = {}
    names = {}
    for item in items:
        n = counts[item.case] = counts.get(item.case, -1) + 1
        names[item.name] = f"keras_png_slices_{splits[item.case]}/case_{item.case:03d}_slice_{n}.png"
    return names


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m preparation.images", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    folder.add_options(parser, "folder of images, or an .npz file of MedMNIST")
    add = parser.add_argument
    text = "regular expression that finds the subject in a path under SOURCE: its first group, else all of it"
    add("--group", metavar="REGEX", type=_regex, help=text)
    text = f"side of the square in the middle that a picture is fitted to (default: {SIZE})"
    add("--size", metavar="N", type=SIDE, default=SIZE, help=text)
    text = "pad (reduce what is larger), crop (fill the square) or resize (distort); default: pad"
    add("--fit", choices=FITS, default="pad", help=text)
    return parser.parse_args(argv)


def _regex(text: str) -> re.Pattern:
    try:
        return re.compile(text)
    except re.error as error:
        raise argparse.ArgumentTypeError(f"is no regular expression ({error})") from None


if __name__ == "__main__":
    console.run_program(main, "preparation.images")
