"""Brain volumes, as OASIS hands them out -> the folder of slices that train.py reads.

    python -m preparation.oasis SOURCE DEST    # then: python train.py --data DEST

SOURCE is neurite-OASIS v1.0 (its tar, or unpacked), the folder of OASIS-1's discs, or any folder of skull-stripped
NIfTI volumes; `preparation.sources` says how they are recognised. Interrupted and called again, it goes on where it
was: until all is done, everything is in DEST.unfinished.

A volume is turned to RAS and, where its voxels are not of 1 mm, resampled linearly. Each has one intensity window:
black is the background, white the 99.5 % quantile of the brain. Its slices are spaced evenly from the lowest to the
highest one that has enough brain, and padded or cropped to 256x256 about the brain's centre. Axial slices have the
front up and the patient's left on the right, as the files of OASIS-1 have them in which columns and rows are the first
two axes.
"""

import argparse
import csv
import dataclasses
import os
import shlex
import shutil
import sys
import threading
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from pathlib import Path

from PIL import Image, ImageDraw

from preparation import sources
from preparation.volumes import PLANES, SIZE, Volume, VolumeError, cut, read
from support import console, files
from support.console import UserError

MOST_LITRES = 2.5  # of brain; a head with its skull has four or more
PLAN = "conversion.json"
COLUMNS = (
    "case",
    "subject",
    "session",
    "split",
    "source",
    "shape",
    "zooms",
    "black",
    "white",
    "litres",
    "slices",
    "notes",
)


@dataclasses.dataclass(frozen=True)
class Options:
    """What decides how slices look, and which split they are in.

    `least_brain` is a share of the brain in the volume's largest slice: with a share of the image, small brains would
    have few slices or none.
    """

    slices: int = 32
    least_brain: float = 0.92
    plane: str = "axial"
    seed: int = 0
    split: str | None = None


def convert(volume: Volume, split: str, folder: Path, options: Options) -> dict:
    """Write the slices of a volume and its record, which marks it as done. Returns the record.

    Raises VolumeError if the volume cannot be used.
    """
    scan = read(volume)
    try:
        images, positions, facts = cut(scan.voxels, options.plane, options.slices, options.least_brain)
    except ValueError as error:
        raise VolumeError(f"{volume.name}: {error}") from None
    notes = list(scan.notes)
    if facts["litres"] > MOST_LITRES:
        notes.append(f"{facts['litres']} litres are brighter than the background: is the skull on?")
    for i, image in enumerate(images):
        number = (volume.session - 1) * options.slices + i
        path = folder / f"keras_png_slices_{split}" / f"case_{volume.case:03d}_slice_{number}.nii.png"
        with files.atomically(path) as temporary:
            Image.fromarray(image).save(temporary, format="PNG")
    record = {"case": volume.case, "subject": volume.subject, "session": volume.session, "split": split}
    record |= {"source": volume.name, "shape": "x".join(map(str, scan.shape)), "zooms": "x".join(map(str, scan.zooms))}
    record |= facts | {"slices": " ".join(map(str, positions)), "notes": "; ".join(notes)}
    files.write_json(record_of(volume, folder), record)
    return record


def record_of(volume: Volume, folder: Path) -> Path:
    return folder / "records" / f"{volume.case:03d}_{volume.session}.json"


def begin(dest: Path, plan: dict) -> Path | None:
    """The folder to work in, new or left by an interrupted call; None if DEST is complete.

    Raises UserError if DEST, or what is left, was made otherwise.
    """
    folder = dest.with_name(dest.name + ".unfinished")
    for path in (dest, folder):
        if path.exists() and (not path.is_dir() or any(path.iterdir())):
            before = files.read_json(path / PLAN) if (path / PLAN).exists() else {}
            # removing one of two volumes that contradict each other must not cost what is done
            differs = {key for key, value in plan.items() if before.get(key) != value}
            if differs - (set() if path == dest else {"volumes"}) and (before or path == dest):
                what = "was made with other options or volumes" if before else "was not made by this program"
                raise UserError(f"{path}: {what}; name another DEST, or remove it")
            if before and path == dest:
                shutil.rmtree(dest / "records", ignore_errors=True)  # if the last call was killed at its very end
                return None
    for split in sources.SHARES:
        (folder / f"keras_png_slices_{split}").mkdir(parents=True, exist_ok=True)
    (folder / "records").mkdir(exist_ok=True)
    files.write_json(folder / PLAN, plan)
    return folder


def convert_all(volumes: list[Volume], splits: dict, folder: Path, options: Options, workers: int) -> list[str]:
    """Convert what has no record yet, in worker processes. Returns an error for each volume that cannot be used."""
    errors, todo = [], [volume for volume in volumes if not record_of(volume, folder).exists()]
    context = get_context("fork" if sys.platform == "linux" else "spawn")  # a fork has all imported already
    with ProcessPoolExecutor(workers, context, _end_with_parent, (os.getpid(),)) as pool:
        try:
            futures = [pool.submit(convert, volume, splits[volume.case], folder, options) for volume in todo]
            with console.progress(total=len(volumes), initial=len(volumes) - len(todo), unit=" volumes") as bar:
                for future in as_completed(futures):
                    try:
                        future.result()
                    except VolumeError as error:
                        errors.append(str(error))
                    bar.update()
                    console.stop_if_signalled()
        except BrokenProcessPool:
            raise UserError("a worker process was killed, perhaps for its memory; give fewer --workers") from None
        finally:
            pool.shutdown(cancel_futures=True)
    return errors


def _end_with_parent(parent: int) -> None:
    """Let a worker end when the program has been killed: nothing else would tell it."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def finish(volumes: list[Volume], folder: Path, dest: Path) -> list[dict]:
    """Write subjects.csv and give the folder its name. Returns the records of the volumes that are in it."""
    found = [record_of(volume, folder) for volume in volumes if record_of(volume, folder).exists()]
    records = [files.read_json(path) for path in found]
    for split in sources.SHARES:
        if split not in {record["split"] for record in records}:
            raise UserError(f"{folder}: no subject is left for {split}; train.py needs all three splits")
    files.write_csv(folder / "subjects.csv", COLUMNS, [[record[key] for key in COLUMNS] for record in records])
    for path in folder.rglob(".*.tmp"):  # of a call that was killed
        path.unlink()
    os.rename(folder, dest)
    shutil.rmtree(dest / "records")
    return records


def draw_preview(dest: Path) -> None:
    """Write preview.png: five slices each of eight volumes, spread over subjects.csv."""
    with open(dest / "subjects.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    rows = [rows[i] for i in sorted({i * len(rows) // 8 for i in range(8)})]
    line, text = SIZE + 20, {"fill": 255, "font_size": 14}  # pixels
    sheet = Image.new("L", (5 * SIZE, 26 + len(rows) * line))
    draw = ImageDraw.Draw(sheet)
    draw.text(
        (6, 4), f"{dest.name}: slices of {len(rows)} volumes, from the lowest to the highest; 1 mm a pixel", **text
    )
    for n, row in enumerate(rows):
        positions = row["slices"].split()
        for column in range(5):
            i = column * (len(positions) - 1) // 4
            name = f"case_{int(row['case']):03d}_slice_{(int(row['session']) - 1) * len(positions) + i}.nii.png"
            with Image.open(dest / f"keras_png_slices_{row['split']}" / name) as image:
                sheet.paste(image, (column * SIZE, 26 + n * line))
            label = f"case {row['case']} ({row['split']}), {positions[i]} mm"
            draw.text((column * SIZE + 6, 26 + n * line + SIZE), label, **text)
    with files.atomically(dest / "preview.png") as temporary:
        sheet.save(temporary, format="PNG")


def main(words: list[str] | None = None) -> None:
    o = parse(words)
    console.install_signal_handlers()
    source, dest, options = Path(o.source), Path(o.dest), Options(o.slices, o.least_brain, o.plane, o.seed, o.split)
    kind, found, strange = sources.find(source)
    volumes, errors = sources.without_copies(found)
    splits = sources.split_subjects(found, o.seed, o.split)
    counts = {split: list(splits.values()).count(split) for split in sources.SHARES}
    print(f"Source: {kind}, {len(volumes)} volumes of {len(splits)} subjects in {source}")
    print("Split by subject: " + ", ".join(f"{n} {split}" for split, n in counts.items()))
    if strange:
        print(f"Passed over: {len(strange)} files, such as {strange[0]}")
    if o.dry_run:
        print("\n".join([*errors, f"{len(volumes) * o.slices} slices would be written to {dest} (--dry-run)."]))
        return
    kept = dataclasses.asdict(options) | {"split": {str(case): split for case, split in sorted(splits.items())}}
    plan = {"source": str(source.resolve()), "kind": kind, "options": kept, "volumes": [v.name for v in volumes]}
    folder = begin(dest, plan)
    if folder:
        with files.locked(folder):
            try:
                errors += convert_all(volumes, splits, folder, options, o.workers)
            except console.Stopped:
                done = sum(record_of(volume, folder).exists() for volume in volumes)
                print(f"Stopped after {done} of {len(volumes)} volumes. The same command goes on.", file=sys.stderr)
                raise
            if errors and not o.skip_bad:
                advice = "Mend them, or leave them out with --skip-bad; what is done is kept."
                raise UserError("\n  ".join([f"{len(errors)} volumes cannot be used:", *errors]) + f"\n{advice}")
            records = finish(volumes, folder, dest)
        for record in records:
            if record["notes"]:
                print(f"warning: {record['source']}: {record['notes']}", file=sys.stderr)
        print("\n  ".join([f"Left out: {len(errors)} volumes.", *errors]) if errors else "All volumes were used.")
    if o.preview:
        draw_preview(dest)
        print(f"Look at {dest / 'preview.png'}")
    print(f"{dest} is complete. Look at some slices: the same command with --preview draws a sheet.")
    print(f"Train: python train.py --data {shlex.quote(str(dest))}")


def parse(words: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m preparation.oasis", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("source", metavar="SOURCE", help="the download: a folder, or the tar of neurite-OASIS")
    add("dest", metavar="DEST", help="folder to make")
    add("--slices", metavar="N", type=_number(int, 1, 256), default=32, help="of a volume (default: 32)")
    text = "the lowest and the highest slice have this share of the largest slice's brain (default: 0.92)"
    add("--least-brain", metavar="F", type=_number(float, 0.01, 1), default=0.92, help=text)
    add("--plane", choices=PLANES, default="axial", help="(default: axial)")
    add("--seed", metavar="S", type=_number(int, 0, 2**31 - 1), default=0, help="draws the split (default: 0)")
    add("--split", metavar="FILE", help="CSV file with columns subject and split, instead of drawing")
    add("--skip-bad", action="store_true", help="leave out volumes that cannot be used, and list them")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    add(
        "--workers",
        metavar="N",
        type=_number(int, 1, 256),
        default=cores,
        help=f"processes (default: {cores}, the cores)",
    )
    add("--dry-run", action="store_true", help="say what would be done, and stop")
    add("--preview", action="store_true", help="also draw some slices, as DEST/preview.png")
    return parser.parse_args(words)


def _number(kind: type, low: float, high: float):
    def number(word: str):
        value = kind(word)
        if not low <= value <= high:
            raise ValueError
        return value

    number.__name__ = f"number from {low} to {high}"  # argparse names it
    return number


if __name__ == "__main__":
    console.run_program(main, "preparation.oasis")
