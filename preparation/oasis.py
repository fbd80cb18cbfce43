"""Brain volumes, as OASIS hands them out -> the folder of slices that train.py reads.

    python -m preparation.oasis SOURCE DEST    # then: python train.py --data DEST

SOURCE is the folder of OASIS-1's discs, of which come the very slices of the PNG set; neurite-OASIS v1.0 (its tar, or
unpacked); or any folder of NIfTI volumes. `preparation.sources` says how they are recognised. Interrupted and called
again, it goes on where it was: until all is done, everything is in DEST.unfinished.

Each volume is turned to RAS, resampled linearly where its voxels are not of 1 mm, and cut into slices of 256x256 pixels
like those of the PNG set (`preparation.volumes`). Subjects with OASIS-1's numbers are split as there.
"""

import sys

if not __package__:  # run as a file: its folder is the first in the path, not the project's
    sys.path[0] = sys.path[0].rpartition("preparation")[0] or "."
import support.early  # isort: skip  # noqa: F401  before what takes long to import, or is missing
import argparse
import csv
import math
import os
import shlex
import shutil
import signal
import threading
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from pathlib import Path

from PIL import Image, ImageDraw

from preparation import sources
from preparation.layout import label_map
from preparation.volumes import PLANES, SIZE, Volume, VolumeError, cut, cut_atlas, cut_labels, read
from support import console, files
from support.console import SEED, Number, UserError

LEAST_LITRES = 2.5  # of a head with its skull: four or more; a brain has less than two
FIRST_PLANE = Number(int, 1, "a whole number from 1 to 512", below=513)
SLICES = Number(int, 2, "a whole number from 2 to 256", below=257)
SHARE = Number(float, 0.01, "a number from 0.01 to 1", below=math.nextafter(1, 2))
WORKERS = Number(int, 1, "a whole number from 1 to 256", below=257)
PLAN = "conversion.json"
OPTIONS = ("slices", "least_brain", "plane", "first_plane", "seed")  # which decide what is written, beside the split
FACTS = ("shape", "zooms", "black", "white", "litres", "slices", "notes")
COLUMNS = ("case", "subject", "session", "split", "source", *FACTS)


def convert(volume: Volume, split: str, folder: Path, o: argparse.Namespace) -> None:
    """Write the slices of a volume, then its record, which marks it as done.

    Raises VolumeError if the volume cannot be used.
    """
    scan, in_atlas = read(volume), o.kind == sources.ATLAS and o.plane == "axial"
    try:
        if in_atlas:
            images, positions, facts = cut_atlas(scan.voxels, o.first_plane, o.slices)
        else:
            images, positions, facts = cut(scan.voxels, o.plane, o.slices, o.least_brain)
    except ValueError as error:
        raise VolumeError(f"{volume.name}: {error}") from None
    names = paths(volume.case, volume.session, split, o.slices)
    written = dict(zip(names, images, strict=True))
    if in_atlas and (labels := sources.label_volume(volume)):
        tissue = read(labels, labels=True).voxels
        if tissue.shape != scan.voxels.shape:
            raise VolumeError(f"{labels.name}: has another shape than {volume.name}; remove it")
        maps = cut_labels(tissue, positions)
        written |= {label_map(Path(name)).as_posix(): image for name, image in zip(names, maps, strict=True)}
    for path, image in written.items():
        (folder / path).parent.mkdir(exist_ok=True)
        with files.atomically(folder / path) as temporary:
            Image.fromarray(image).save(temporary, format="PNG")
    row = known(volume) | {"split": split, "notes": "; ".join(scan.notes)}
    row |= {"shape": "x".join(map(str, scan.shape)), "zooms": "x".join(map(str, scan.zooms))}
    files.write_json(record_path(volume, folder), row | facts | {"slices": " ".join(map(str, positions))})


def paths(case: int, session: int, split: str, n: int) -> list[str]:
    """The files of a volume's n slices, in the folder. A second scan's numbers follow those of the first."""
    return [f"keras_png_slices_{split}/case_{case:03d}_slice_{(session - 1) * n + i}.nii.png" for i in range(n)]


def known(volume: Volume) -> dict:
    """What a volume's record says of it before it is read."""
    facts = {"case": volume.case, "subject": volume.subject, "session": volume.session, "source": volume.name}
    return {"file": sources.identity(volume)} | facts


def record_path(volume: Volume, folder: Path) -> Path:
    return folder / "records" / f"{volume.case:03d}_{volume.session}.json"


def record(volume: Volume, folder: Path) -> dict:
    """The record of a volume that is done, else {}."""
    saved = files.read_json(record_path(volume, folder))
    complete = saved.keys() >= set(COLUMNS) and saved["split"] in list(sources.SHARES)
    return saved if complete and saved | known(volume) == saved else {}


def read_subjects(dest: Path) -> list[dict[str, str]]:
    """The rows of subjects.csv. Raises UserError if it is not as `finish` wrote it."""
    path = dest / "subjects.csv"
    try:
        with open(path, newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file, strict=True))
        numbers = [number for row in rows for number in (row["case"], row["session"], *row["slices"].split())]
        complete = all(row["slices"] and row["source"] and row["split"] in sources.SHARES for row in rows)
        if not rows or not complete or not all(number.isdecimal() for number in numbers):
            raise ValueError
    except (ValueError, KeyError, AttributeError, csv.Error):  # a field of a short row is None
        raise UserError(f"{path}: was changed, or is damaged; name another DEST, and convert again") from None
    return rows


def is_complete(dest: Path, plan: dict) -> bool:
    """Whether DEST is there, made from these volumes with these options. Raises UserError if it is something else."""
    if not dest.exists() or dest.is_dir() and not any(dest.iterdir()):
        return False
    before = files.read_json(dest / PLAN)
    if before != plan:
        how = "with other options or volumes" if before else "by another program"
        raise UserError(f"{dest}: was made {how}; name another DEST")
    shutil.rmtree(dest / "records", ignore_errors=True)  # if the last call was killed at its very end
    rows = read_subjects(dest)
    wanted, there = sum(len(row["slices"].split()) for row in rows), len(list(dest.glob("*/case_*.png")))
    if wanted != there:
        raise UserError(f"{dest}: has {there} slices, and had {wanted}; name another DEST")
    missing = sorted({name for name, *_ in plan["volumes"]} - {row["source"] for row in rows})
    if missing:
        print(f"{dest} is complete, but for {len(missing)} volumes that were left out, such as {missing[0]}")
    return True


def begin(folder: Path, plan: dict) -> None:
    """Prepare a folder to work in, new or left by an interrupted call. Raises UserError if it was begun otherwise."""
    before = files.read_json(folder / PLAN)
    if not before and any(not path.name.startswith(".") for path in folder.iterdir()):
        raise UserError(f"{folder}: was not made by this program; remove it, or name another DEST")
    # removing one of two volumes that contradict each other must not cost what is done
    if before and any(before.get(key) != value for key, value in plan.items() if key != "volumes"):
        raise UserError(f"{folder}: was begun with other options or subjects; remove it, or name another DEST")
    files.write_json(folder / PLAN, plan)
    for name in (*(f"keras_png_slices_{split}" for split in sources.SHARES), "records"):
        (folder / name).mkdir(exist_ok=True)


def convert_all(volumes: list[Volume], splits: dict[int, str], folder: Path, o: argparse.Namespace) -> list[str]:
    """Convert what is not done, in worker processes. Returns an error for each volume that cannot be used."""
    errors, todo = [], [volume for volume in volumes if not record(volume, folder)]
    kind = "fork" if sys.platform == "linux" else "spawn"  # a fork has all imported already
    with ProcessPoolExecutor(o.workers, get_context(kind), _start_worker, (os.getpid(),)) as pool:
        try:
            futures = [pool.submit(convert, volume, splits[volume.case], folder, o) for volume in todo]
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
    return sorted(errors)


def _start_worker(parent: int) -> None:
    """Leave Ctrl-C to the program, and end when that has been killed: nothing else would tell a worker."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=watch, daemon=True).start()


def finish(volumes: list[Volume], folder: Path, dest: Path, o: argparse.Namespace) -> list[dict]:
    """Write subjects.csv and give the folder its name. Returns the records of the volumes that are in it."""
    records = [saved for volume in volumes if (saved := record(volume, folder))]
    for split in sources.SHARES:
        if split not in {row["split"] for row in records}:
            raise UserError(f"{folder}: no subject is left for {split}; train.py needs all three splits")
    files.write_csv(folder / "subjects.csv", COLUMNS, [[row[key] for key in COLUMNS] for row in records])
    slices = [paths(row["case"], row["session"], row["split"], o.slices) for row in records]
    wanted = {folder / path for names in slices for path in names}
    wanted |= {folder / label_map(path.relative_to(folder)) for path in wanted}
    for path in filter(Path.is_file, {*folder.glob("keras_png_slices_*/*"), *folder.glob(".*.tmp")} - wanted):
        path.unlink()  # of a call that was killed, or of a volume that is no longer there
    os.rename(folder, dest)
    shutil.rmtree(dest / "records")
    return records


def draw_preview(dest: Path) -> None:
    """Write preview.png: five slices each of eight volumes, spread over subjects.csv."""
    rows = read_subjects(dest)
    rows = [rows[i] for i in sorted({i * len(rows) // 8 for i in range(8)})]
    line, text = SIZE + 20, {"fill": 255, "font_size": 14}  # pixels
    sheet = Image.new("L", (5 * SIZE, 26 + len(rows) * line))
    draw = ImageDraw.Draw(sheet)
    draw.text(
        (6, 4), f"{dest.name}: slices of {len(rows)} volumes, from the lowest to the highest; 1 mm a pixel", **text
    )
    for n, row in enumerate(rows):
        positions = row["slices"].split()
        names = paths(int(row["case"]), int(row["session"]), row["split"], len(positions))
        for column in range(5):
            i = column * (len(positions) - 1) // 4
            with Image.open(dest / names[i]) as image:
                sheet.paste(image, (column * SIZE, 26 + n * line))
            label = f"case {row['case']} ({row['split']}), {positions[i]} mm"
            draw.text((column * SIZE + 6, 26 + n * line + SIZE), label, **text)
    with files.atomically(dest / "preview.png") as temporary:
        sheet.save(temporary, format="PNG")


def main(argv: list[str] | None = None) -> None:
    o = parse(argv)
    console.install_signal_handlers()
    source, dest = Path(o.source), Path(o.dest).resolve()
    folder = dest.parent / f"{dest.name}.unfinished"
    kind, scans, strange = sources.find(source)
    volumes, errors = sources.without_copies(scans)
    own = sources.sets_own_split(scans) if kind != sources.NIFTI and o.split is None else {}
    splits = own or sources.split_subjects(scans, o.seed, o.split)
    counts = {split: list(splits.values()).count(split) for split in sources.SHARES}
    print(f"Source: {kind}, {len(volumes)} volumes of {len(splits)} subjects in {source}")
    o.kind, how = kind, "that of the PNG set" if own else f"as {o.split} says" if o.split else "drawn"
    print(f"Split by subject, {how}: " + ", ".join(f"{n} {split}" for split, n in counts.items()))
    if strange:
        print(f"Passed over: {len(strange)} files, such as {strange[0]}")
    if not all(counts.values()):
        raise UserError(f"{o.split}: gives no subject to a split; train.py needs all three")
    if o.dry_run:
        print("\n".join([*errors, f"{len(volumes) * o.slices} slices would be written to {dest} (--dry-run)."]))
        return
    plan = {name: getattr(o, name) for name in OPTIONS}
    plan |= {"kind": kind, "splits": {str(case): split for case, split in sorted(splits.items())}}
    plan["volumes"] = [sources.identity(volume)[:2] for volume in scans]
    if not is_complete(dest, plan):
        folder.mkdir(parents=True, exist_ok=True)
        with files.locked(folder):
            begin(folder, plan)
            convert_and_finish(volumes, splits, folder, dest, errors, o)
    if o.preview:
        draw_preview(dest)
        print(f"Look at {dest / 'preview.png'}")
    print(f"{dest} is complete. The same command with --preview draws a sheet of some slices.")
    print(f"Train: python train.py --data {shlex.quote(str(dest))}")


def convert_and_finish(volumes, splits, folder: Path, dest: Path, errors: list[str], o: argparse.Namespace) -> None:
    """Convert, and complete DEST. Raises UserError if there are `errors`, or further volumes that cannot be used."""
    try:
        errors = errors + convert_all(volumes, splits, folder, o)
    except console.Stopped:
        done = sum(bool(record(volume, folder)) for volume in volumes)
        print(f"Stopped after {done} of {len(volumes)} volumes. The same command goes on.", file=sys.stderr)
        raise
    if errors and not o.skip_bad:
        advice = "Replace them, or leave them out with --skip-bad; what is done is kept."
        raise UserError("\n  ".join([f"{len(errors)} volumes cannot be used:", *errors]) + f"\n{advice}")
    rows = finish(volumes, folder, dest, o)
    stripped = sum(row["litres"] < LEAST_LITRES for row in rows)
    if stripped:
        print(f"{stripped} of {len(rows)} volumes seem to have no skull; slices of the PNG set are of whole heads")
    for row in rows:
        if row["notes"]:
            print(f"warning: {row['source']}: {row['notes']}", file=sys.stderr)
    print("\n  ".join([f"Left out: {len(errors)} volumes.", *errors]) if errors else "All volumes were used.")


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m preparation.oasis", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("source", metavar="SOURCE", help="the download: a folder, or the tar of neurite-OASIS")
    add("dest", metavar="DEST", help="folder to make")
    add("--slices", metavar="N", type=SLICES, default=32, help="of a volume (default: 32)")
    text = "the lowest and the highest slice have this share of the largest slice's brain (default: 0.92)"
    add("--least-brain", metavar="F", type=SHARE, default=0.92, help=text)
    add("--plane", choices=PLANES, default="axial", help="(default: axial)")
    text = "of OASIS-1's discs: the number of the first slice's plane, from 1 (default: 73, as in the PNG set)"
    add("--first-plane", metavar="N", type=FIRST_PLANE, default=73, help=text)
    add("--seed", metavar="S", type=SEED, default=0, help="draws the split (default: 0)")
    add("--split", metavar="FILE", help="CSV file with columns subject and split, instead of drawing")
    add("--skip-bad", action="store_true", help="leave out volumes that cannot be used, and list them")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    add("--workers", metavar="N", type=WORKERS, default=cores, help=f"processes (default: {cores}, the cores)")
    add("--dry-run", action="store_true", help="say what would be done, and stop")
    add("--preview", action="store_true", help="also draw some slices, as DEST/preview.png")
    return parser.parse_args(argv)


if __name__ == "__main__":
    console.run_program(main, "preparation.oasis")
