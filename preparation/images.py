"""Any images -> the folder of slices that train.py reads.

    python -m preparation.images SOURCE DEST    # then: python train.py --data DEST

SOURCE is a folder of PNG, JPEG or TIFF images, however nested, or an .npz file of MedMNIST. Images of one subject go to
one split: the first line says how subjects are told apart, and --group says it better. Images become grey and 256x256;
those that are so already keep their pixels. Deeper values than 8 bits are scaled by the set's own maximum. Interrupted
and called again, it goes on where it was: until all is done, everything is in DEST.unfinished.
"""

import sys

if not __package__:  # run as a file: its folder is the first in the path, not the project's
    sys.path[0] = sys.path[0].rpartition("preparation")[0] or "."
import support.early  # isort: skip  # noqa: F401  before what takes long to import, or is missing
import argparse
import os
import re
import shlex
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image
from skimage.transform import resize

from preparation import sources
from preparation.volumes import SIZE
from support import console, files
from support.console import SEED, Number, UserError

SUFFIXES = (".png", ".jpg", ".jpeg", ".tif", ".tiff")
NOT_IMAGES = re.compile(r"(^|[/_. -])(masks?|labels?|seg|segmentations?)([/_. -]|$)", re.IGNORECASE)
SPLITS = {"train": "train", "training": "train", "val": "validate", "valid": "validate", "validate": "validate"}
SPLITS |= {"validation": "validate", "test": "test", "testing": "test"}
FITS = ("pad", "crop", "resize")
SIDE = Number(int, 8, f"a whole number from 8 to {SIZE}", below=SIZE + 1)
PLAN = "conversion.json"


class Item(NamedTuple):
    """An image of the source: its name there, its subject, the subject's number, and how it is read."""

    name: str
    subject: str
    case: int
    read: Callable[[], np.ndarray]


def find(source: Path) -> tuple[dict[str, Callable[[], np.ndarray]], list[str]]:
    """How each image of a source is read, by its name in natural order; and what was passed over."""
    if source.suffix == ".npz" and source.is_file():
        return _in_npz(source), []
    if not source.is_dir():
        raise UserError(f"{source}: is no folder and no .npz file; unpack an archive first")
    paths = [path for path in source.rglob("*") if path.is_file()]
    names = sorted((path.relative_to(source).as_posix() for path in paths), key=files.natural)
    kept = [n for n in names if n.lower().endswith(SUFFIXES) and not NOT_IMAGES.search(n)]
    kept = [n for n in kept if not any(part.startswith(".") for part in n.split("/"))]
    readers = {name: lambda path=source / name: read(path) for name in kept}
    readers = {name.encode("utf-8", "backslashreplace").decode(): reader for name, reader in readers.items()}
    return readers, sorted(set(names) - set(kept))


def _in_npz(source: Path) -> dict[str, Callable[[], np.ndarray]]:
    try:
        with np.load(source) as contents:
            keys = {split: f"{key}_images" for key, split in SPLITS.items() if f"{key}_images" in contents}
            arrays = {split: contents[key] for split, key in keys.items()}
    except Exception as error:  # a damaged archive shows itself in many ways
        raise UserError(f"{source}: cannot be read as .npz ({console.one_line(error)})") from None
    if set(arrays) != set(sources.SHARES):
        raise UserError(f"{source}: has no train_images, val_images and test_images, as files of MedMNIST have")
    if any(a.dtype != np.uint8 or a.ndim != 3 and a.shape[3:] != (3,) for a in arrays.values()):
        raise UserError(f"{source}: holds no images (N, H, W) or (N, H, W, 3) of 8 bits")
    named = {f"{split}/{i}": image for split, array in arrays.items() for i, image in enumerate(array)}
    return {name: lambda image=image: grey(Image.fromarray(image)) for name, image in named.items()}


def read(path: Path) -> np.ndarray:
    """An image file as (H, W) grey values: uint8, or what is deeper. Raises UserError if it cannot be read."""
    try:
        with Image.open(path) as image:
            if getattr(image, "n_frames", 1) != 1:
                raise ValueError("it has several pages")
            return grey(image)
    except Exception as error:  # for broken files Pillow raises OSError, SyntaxError, ValueError, zlib.error, …
        raise UserError(f"{path}: cannot be used ({console.one_line(error)}); replace or remove it") from None


def grey(image: Image.Image) -> np.ndarray:
    """(H, W) uint8, or float64 of images of 16 and 32 bits."""
    if image.mode in ("F", "I") or image.mode.startswith("I;16"):
        values = np.asarray(image, np.float64)
        if not np.isfinite(values).all() or values.min() < 0:
            raise ValueError("values below 0 or not finite")
        return values
    return np.asarray(image.convert("L"))


def subjects_of(names: list[str], group: re.Pattern | None) -> tuple[str, list[str]]:
    """How subjects are told apart, in words, and the subject of each name."""
    stems, folders = [Path(n).stem for n in names], [n.split("/")[:-1] for n in names]
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
        return f"as {o.split} says", sources.split_subjects(items, o.seed, o.split)
    if set(named) == {None}:
        return "drawn", sources.split_subjects(items, o.seed)
    if set(named) != set(sources.SHARES):
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
    factors = {"pad": min(1, side / max(image.shape)), "crop": side / min(image.shape)}
    shape = (side, side) if how == "resize" else tuple(max(1, round(n * factors[how])) for n in image.shape)
    if shape != image.shape:
        image = resize(image.astype(np.float64), shape, anti_aliasing=True, preserve_range=True)
    image = image[tuple(slice(max(0, n - side) // 2, max(0, n - side) // 2 + side) for n in image.shape)]
    margins = [((SIZE - n) // 2, SIZE - n - (SIZE - n) // 2) for n in image.shape]
    return np.pad(np.rint(image).astype(np.uint8), margins)


def main(argv: list[str] | None = None) -> None:
    o = parse(argv)
    console.install_signal_handlers()
    source, dest = Path(o.source), Path(o.dest).resolve()
    if source.resolve() in (dest, *dest.parents):
        raise UserError(f"{dest}: lies in SOURCE; name another DEST")
    readers, passed_over = find(source)
    if not readers:
        raise UserError(f"{source}: holds no PNG, JPEG or TIFF images")
    rule, subjects = subjects_of(list(readers), o.group)
    case = {subject: i for i, subject in enumerate(dict.fromkeys(subjects), 1)}
    items = [Item(name, s, case[s], reader) for (name, reader), s in zip(readers.items(), subjects, strict=True)]
    examples = ", ".join(f"{item.subject} of {item.name}" for item in items[:: -(-len(items) // 3)])
    print(f"Subjects: {rule} ({examples})")
    how, splits = split_of(items, o)
    counts = {split: list(splits.values()).count(split) for split in sources.SHARES}
    numbers = ", ".join(f"{n} {split}" for split, n in counts.items())
    print(f"{len(items)} images of {len(case)} subjects, split {how}: {numbers}")
    if passed_over:
        print(f"Passed over: {len(passed_over)} files, such as {passed_over[0]}")
    if not all(counts.values()):
        raise UserError(f"{o.split or source}: gives no subject to a split; train.py needs all three")
    if o.dry_run:
        print(f"{len(items)} images would be written to {dest} (--dry-run).")
        return
    if not is_complete(dest, plan := plan_of(items, splits, source, o)):
        convert(items, splits, dest, plan, o)
    if o.preview:
        draw_preview(dest)
        print(f"Look at {dest / 'preview.png'}")
    print(f"{dest} is complete. Train: python train.py --data {shlex.quote(str(dest))}")


def plan_of(items: list[Item], splits: dict[int, str], source: Path, o: argparse.Namespace) -> dict:
    """What decides the contents of DEST."""
    paths = sorted(path for path in source.rglob("*") if path.is_file()) if source.is_dir() else [source]
    return {
        "images": [[item.name, item.subject, splits[item.case]] for item in items],
        "files": [[path.stat().st_size, path.stat().st_mtime_ns] for path in paths],
        "fit": o.fit,
        "size": o.size,
    }


def is_complete(dest: Path, plan: dict) -> bool:
    """Whether DEST is there, made by the same plan. Raises UserError if it is something else."""
    if not dest.exists() or dest.is_dir() and not any(dest.iterdir()):
        return False
    if files.read_json(dest / PLAN) != plan:
        raise UserError(f"{dest}: was made of other images or with other options; name another DEST")
    return True


def convert(items: list[Item], splits: dict[int, str], dest: Path, plan: dict, o: argparse.Namespace) -> None:
    """Write what is not there yet, then give the folder its name."""
    folder = dest.parent / f"{dest.name}.unfinished"
    folder.mkdir(parents=True, exist_ok=True)
    with files.locked(folder):
        if files.read_json(folder / PLAN) != plan:
            if any(path.name[0] != "." for path in folder.iterdir()):
                raise UserError(f"{folder}: was begun otherwise; remove it, or name another DEST")
            files.write_json(folder / PLAN, plan)
        depths = _each(items, lambda item: None if (x := item.read()).dtype == np.uint8 else x.max(), "Reading")
        deep = [greatest for greatest in depths if greatest is not None]
        factor = 255 / max(deep) if deep and max(deep) else 1.0
        if deep:
            print(f"{len(deep)} images have more than 8 bits; their greatest value, {max(deep):g}, becomes 255")
        names = numbered(items, splits)

        def write(item: Item) -> None:
            path = folder / names[item.name]
            if not path.exists():
                values = item.read()
                values = values if values.dtype == np.uint8 else values * factor
                path.parent.mkdir(exist_ok=True)
                with files.atomically(path) as temporary:
                    Image.fromarray(fitted(values, o.size, o.fit)).save(temporary, format="PNG")

        for _ in _each(items, write, "Writing"):
            pass
        rows = [(names[item.name], item.case, item.subject, splits[item.case], item.name) for item in items]
        files.write_csv(folder / "subjects.csv", ("file", "case", "subject", "split", "source"), rows)
        for path in folder.rglob(".*.tmp"):  # of a call that was killed
            path.unlink()
        if dest.exists():
            dest.rmdir()  # empty
        os.rename(folder, dest)


def numbered(items: list[Item], splits: dict[int, str]) -> dict[str, str]:
    """The file of each image in DEST, by its name."""
    counts: dict[int, int] = {}
    names = {}
    for item in items:
        n = counts[item.case] = counts.get(item.case, -1) + 1
        names[item.name] = f"keras_png_slices_{splits[item.case]}/case_{item.case:03d}_slice_{n}.png"
    return names


def _each(items: list[Item], work: Callable, desc: str):
    """What `work` returns for each item, in threads; a signal takes effect between two of them."""
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        results = console.progress(pool.map(work, items), total=len(items), desc=desc, unit=" images")
        try:
            for result in results:
                yield result
                console.stop_if_signalled()
        except console.Stopped:
            print("Stopped. The same command goes on.", file=sys.stderr)
            raise
        finally:
            pool.shutdown(cancel_futures=True)


def draw_preview(dest: Path) -> None:
    """Write preview.png: 32 images, spread over the folder, eight a row."""
    paths = sorted(dest.glob("keras_png_slices_*/*.png"), key=lambda path: files.natural(path.name))
    sheet = Image.new("L", (8 * SIZE, 4 * SIZE))
    for i, k in enumerate(sorted({i * len(paths) // 32 for i in range(32)})):
        with Image.open(paths[k]) as image:
            sheet.paste(image, (i % 8 * SIZE, i // 8 * SIZE))
    with files.atomically(dest / "preview.png") as temporary:
        sheet.save(temporary, format="PNG")


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m preparation.images", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("source", metavar="SOURCE", help="folder of images, or an .npz file of MedMNIST")
    add("dest", metavar="DEST", help="folder to make")
    text = "regular expression that finds the subject in a path under SOURCE: its first group, else all of it"
    add("--group", metavar="REGEX", type=_regex, help=text)
    text = f"side of the square in the middle that a picture is fitted to (default: {SIZE})"
    add("--size", metavar="N", type=SIDE, default=SIZE, help=text)
    text = "pad (reduce what is larger), crop (fill the square) or resize (distort); default: pad"
    add("--fit", choices=FITS, default="pad", help=text)
    add("--seed", metavar="S", type=SEED, default=0, help="draws the split (default: 0)")
    add("--split", metavar="FILE", help="CSV file with columns subject and split, instead of drawing")
    add("--dry-run", action="store_true", help="say what would be done, and stop")
    add("--preview", action="store_true", help="also draw some images, as DEST/preview.png")
    return parser.parse_args(argv)


def _regex(text: str) -> re.Pattern:
    try:
        return re.compile(text)
    except re.error as error:
        raise argparse.ArgumentTypeError(f"is no regular expression ({error})") from None


if __name__ == "__main__":
    console.run_program(main, "preparation.images")
