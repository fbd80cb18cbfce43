"""DEST, the folder of slices that train.py reads: how subjects are split, how it is begun, gone on with and completed.

Until all is done, everything is in DEST.unfinished. Subjects have a `case` and a `subject`, the number and the name.
"""

import argparse
import contextlib
import csv
import os
import re
import shlex
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from support import console, files
from support.console import SEED, UserError

SIZE = 256  # of a slice, in pixels
LABEL_STEP = 85  # grey levels between two labels in the files of label maps
SHARES = {"train": 302, "validate": 35, "test": 17}  # subjects of the PNG set
PLAN = "conversion.json"
CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def add_options(parser: argparse.ArgumentParser, source: str) -> None:
    add = parser.add_argument
    add("source", metavar="SOURCE", help=source)
    add("dest", metavar="DEST", help="folder to make")
    add("--seed", metavar="S", type=SEED, default=0, help="draws the split (default: 0)")
    add("--split", metavar="FILE", help="CSV file with columns subject and split, instead of drawing")
    add("--dry-run", action="store_true", help="say what would be done, and stop")
    add("--preview", action="store_true", help="also draw some slices, as DEST/preview.png")


def split_subjects(subjects: Sequence, seed: int, file: str | None = None) -> dict[int, str]:
    """The split of each case: as the CSV file of --split says, else drawn in the proportions of the PNG set.

    Raises UserError if there are too few subjects, or if the file does not name each of them.
    """
    cases = sorted({each.case for each in subjects})
    if len(cases) < len(SHARES):
        raise UserError(f"{len(cases)} subjects cannot be split in three; at least one is needed for each split")
    if file is not None:
        return _read_split(Path(file), subjects)
    total = sum(SHARES.values())
    n_validate, n_test = (max(1, round(len(cases) * SHARES[name] / total)) for name in ("validate", "test"))
    order = np.random.default_rng(seed).permutation(cases).tolist()
    names = ["validate"] * n_validate + ["test"] * n_test + ["train"] * len(order)
    return dict(zip(order, names, strict=False))


def _read_split(path: Path, subjects: Sequence) -> dict[int, str]:
    try:
        if path.exists() and not path.is_file():  # a pipe would be waited for
            raise OSError("it is no file")
        with open(path, newline="", encoding="utf-8-sig") as file:
            first = file.readline()
            delimiter = max(",;\t", key=first.count)
            columns = [name.strip().lower() for name in next(csv.reader([first.strip()], delimiter=delimiter), [])]
            rows = list(csv.DictReader(file, columns, delimiter=delimiter))
    except (OSError, UnicodeError, csv.Error) as error:
        raise UserError(f"{path}: cannot be read ({console.one_line(error)}); name a CSV file with --split") from None
    if not rows or not {"subject", "split"} <= rows[0].keys():
        raise UserError(f"{path}: has no columns named subject and split, or no rows")
    by_case = {each.case: each.subject for each in subjects}
    cases: dict[str, int] = {}
    for case, name in by_case.items():  # a number tells a subject if it is the only one in its name
        if [int(n) for n in re.findall(r"\d+", re.sub(r"^(OASIS_)?OAS1_|_MR\d$", "", name))] == [case]:
            cases |= dict.fromkeys((f"{case}", f"{case:03d}", f"{case:04d}"), case)
    for each in subjects:  # a name counts before a number
        names = {each.subject, each.subject.removeprefix("OASIS_")}
        cases |= dict.fromkeys(names | {re.sub(r"_MR\d$", "", name) for name in names}, each.case)
    splits: dict[int, str] = {}
    for row in rows:
        name, split = row["subject"], row["split"]
        if split not in SHARES:
            raise UserError(f"{path}: {split!r} of {name!r} is no split; there are {', '.join(SHARES)}")
        if name in cases and splits.setdefault(cases[name], split) != split:
            raise UserError(f"{path}: {name!r} is in two splits; remove one")
    missing = [name for case, name in by_case.items() if case not in splits]
    if missing:
        raise UserError(f"{path}: does not name {missing[0]} ({len(missing)} of {len(by_case)} subjects are missing)")
    return splits


def counted(splits: dict[int, str], o: argparse.Namespace) -> str:
    """How many subjects each split has. Raises UserError if one has none."""
    counts = {split: list(splits.values()).count(split) for split in SHARES}
    if not all(counts.values()):
        raise UserError(f"{o.split or o.source}: gives no subject to a split; train.py needs all three")
    return ", ".join(f"{n} {split}" for split, n in counts.items())


def is_complete(dest: Path, plan: dict) -> bool:
    """Whether DEST is there, made by this plan. Raises UserError if it is something else."""
    if not dest.exists() or dest.is_dir() and not any(dest.iterdir()):
        return False
    before = files.read_json(dest / PLAN)
    written = before.pop("written", 0)
    n = len(slices(dest))
    if before != plan:
        how = "of other files or with other options" if before else "by another program"
        raise UserError(f"{dest}: was made {how}; name another DEST")
    if written != n:
        raise UserError(f"{dest}: has {n} slices, and had {console.one_line(written)}; name another DEST")
    return True


def slices(folder: Path) -> list[Path]:
    """The slices of all splits."""
    return list(folder.glob("keras_png_slices_*/case_*.png"))


@contextlib.contextmanager
def begun(dest: Path, plan: dict, checked_later: str = "") -> Iterator[Path]:
    """`with begun(dest, plan) as folder`: a folder, new or left by an interrupted call, that becomes DEST at the end.

    Raises UserError if it was begun by another plan, but for what is under the key `checked_later`.
    """
    if os.path.ismount(dest):
        raise UserError(f"{dest}: a disk is mounted there; name a folder on it")
    folder = dest.parent / f"{dest.name}.unfinished"
    folder.mkdir(parents=True, exist_ok=True)
    with files.locked(folder):
        before = files.read_json(folder / PLAN)
        if not before and any(not path.name.startswith(".") for path in folder.iterdir()):
            raise UserError(f"{folder}: was not made by this program; remove it, or name another DEST")
        if before and any(before.get(key) != value for key, value in plan.items() if key != checked_later):
            raise UserError(f"{folder}: was begun with other options or subjects; remove it, or name another DEST")
        files.write_json(folder / PLAN, plan)
        try:
            yield folder
        except console.Stopped:
            print("Stopped. The same command goes on.", file=sys.stderr)
            raise
        for path in folder.rglob(".*.tmp"):  # of a call that was killed
            path.unlink()
        files.write_json(folder / PLAN, plan | {"written": len(slices(folder))})
        if dest.exists():
            dest.rmdir()  # empty
        os.rename(folder, dest)


def walk(source: Path) -> Iterator[tuple[str, Path]]:
    """The files of a folder, but for hidden ones: the name in it, as text, and the path. Links are followed.

    Raises UserError if a folder in it cannot be read.
    """

    def fail(error: OSError) -> None:
        raise UserError(f"{error.filename}: cannot be read ({error.strerror})")

    visited = set()
    for folder, folders, names in os.walk(source, onerror=fail, followlinks=True):
        if os.path.realpath(folder) in visited:  # a link that leads back
            folders.clear()
            continue
        visited.add(os.path.realpath(folder))
        folders[:] = [name for name in folders if not name.startswith(".")]
        for path in (Path(folder, name) for name in names if not name.startswith(".")):
            yield path.relative_to(source).as_posix().encode("utf-8", "backslashreplace").decode(), path


def label_map(scan: Path) -> Path:
    """Where the label map of a scan would lie: keras_png_slices_seg_<split>/seg_C_slice_S…."""
    name = scan.parent.name.replace("slices_", "slices_seg_", 1)
    return scan.parent.with_name(name) / scan.name.replace("case_", "seg_", 1)


def write_slice(image: np.ndarray, path: Path) -> None:
    """Write (H, W) uint8 as PNG."""
    path.parent.mkdir(exist_ok=True)
    with files.atomically(path) as temporary:
        Image.fromarray(image).save(temporary, format="PNG")


def is_written(path: Path) -> bool:
    """Whether a slice is there. It may have been emptied, as a disk that lost power leaves it."""
    return path.is_file() and path.stat().st_size > 0


def complete(dest: Path, preview: bool) -> None:
    """Draw preview.png if asked to, 32 slices spread over DEST, eight a row; and say what comes next."""
    if preview:
        paths = sorted(slices(dest), key=lambda path: files.natural(path.name))
        sheet = Image.new("L", (8 * SIZE, 4 * SIZE))
        for i, k in enumerate(sorted({i * len(paths) // 32 for i in range(32)})):
            with Image.open(paths[k]) as image:
                sheet.paste(image, (i % 8 * SIZE, i // 8 * SIZE))
        write_slice(np.asarray(sheet), dest / "preview.png")
        print(f"Look at {dest / 'preview.png'}")
    print(f"{dest} is complete." + " The same command with --preview draws a sheet of some slices." * (not preview))
    print(f"Train: python train.py --data {shlex.quote(str(dest))}")
