"""Brain volumes, as OASIS hands them out -> the folder of slices that train.py reads.

    python -m preparation.oasis SOURCE DEST    # then: python train.py --data DEST

SOURCE is the folder of OASIS-1's discs, of which come the very slices of the PNG set; neurite-OASIS v1.0 (its tar, or
unpacked); or any folder of NIfTI volumes. `preparation.sources` says how they are recognised. Interrupted and called
again, it goes on where it was: until all is done, everything is in DEST.unfinished.

Each volume is turned to RAS, resampled linearly where its voxels are not of 1 mm, and cut into slices of 256x256 pixels
like those of the PNG set (`preparation.volumes`). Subjects of OASIS-1's discs and of neurite-OASIS are split as there.
"""

import argparse
import math
import sys
from pathlib import Path

from preparation import folder, sources
from preparation.volumes import PLANES, Volume, VolumeError, cut, cut_atlas, cut_labels, read
from support import console, files
from support.console import Number, UserError

FIRST_PLANE = Number(int, 1, "a whole number from 1 to 512", below=513)
SLICES = Number(int, 2, "a whole number from 2 to 256", below=257)
SHARE = Number(float, 0.01, "a number from 0.01 to 1", below=math.nextafter(1, 2))
WORKERS = Number(int, 1, "a whole number from 1 to 256", below=257)
OPTIONS = ("slices", "least_brain", "plane", "first_plane", "seed")  # which decide what is written, beside the split
COLUMNS = ("case", "subject", "session", "split", "source", "slices", "notes")


def main(argv: list[str] | None = None) -> None:
    o = parse(argv)
    console.install_signal_handlers()
    source = Path(o.source)
    dest = Path(o.dest).resolve()
    kind, scans, strange = sources.find(source)
    volumes, errors = sources.without_copies(scans)
    own = sources.sets_own_split(scans) if kind != sources.NIFTI and o.split is None else {}
    splits = own or folder.split_subjects(scans, o.seed, o.split)
    print(f"Source: {kind}, {len(volumes)} volumes of {len(splits)} subjects in {source}")
    how = "that of the PNG set" if own else f"as {o.split} says" if o.split else "drawn"
    print(f"Split by subject, {how}: {folder.counted(splits, o)}")
    if strange:
        print(f"Passed over: {len(strange)} files, such as {strange[0]}")
    if o.dry_run:
        print("\n".join([*errors, f"{len(volumes) * o.slices} slices would be written to {dest} (--dry-run)."]))
        return
    plan = {name: getattr(o, name) for name in OPTIONS}
    plan |= {"kind": kind, "splits": {str(case): split for case, split in sorted(splits.items())}}
    plan["volumes"] = [[volume.name, *sources.sizes_and_times(volume)[0]] for volume in scans]
    if not folder.is_complete(dest, plan):
        # removing one of two volumes that contradict each other must not cost what is done
        with folder.begun(dest, plan, checked_later="volumes") as unfinished:
            convert_all(volumes, splits, unfinished, errors, kind, o)
    elif left_out := len(volumes) - len(folder.slices(dest)) // o.slices:
        print(f"Left out when {dest} was made: {left_out} volumes. Its subjects.csv lists the others.")
    for path in dest.glob("volume_*.json"):  # records of volumes, which an interrupted call needs until the very end
        path.unlink()
    folder.complete(dest, o.preview)


def convert_all(volumes, splits: dict[int, str], unfinished: Path, errors: list[str], kind: str, o) -> None:
    """Convert what is not done, and write subjects.csv.

    Raises UserError if volumes cannot be used, those of `errors` and further ones, unless they are to be left out.
    """
    todo = [volume for volume in volumes if not record(volume, unfinished, o)]

    def work(volume: Volume) -> str | None:
        try:
            convert(volume, splits[volume.case], unfinished, kind, o)
        except VolumeError as error:
            return str(error)
        except MemoryError:
            return f"{volume.name}: does not fit into memory; give fewer --workers"

    bad = sorted(filter(None, console.in_threads(todo, work, o.workers, unit=" volumes")))
    errors = [*errors, *bad]
    if errors and not o.skip_bad:
        advice = "Replace them, or leave them out with --skip-bad; what is done is kept."
        raise UserError("\n  ".join([f"{len(errors)} volumes cannot be used:", *errors]) + f"\n{advice}")
    rows = [row for volume in volumes if (row := record(volume, unfinished, o))]
    if changed := len(volumes) - len(bad) - len(rows):
        raise UserError(f"{changed} volumes have changed meanwhile; the same command converts them again")
    if missing := folder.SHARES.keys() - {row["split"] for row in rows}:
        raise UserError(f"{unfinished}: no subject is left for {min(missing)}; train.py needs all three splits")
    remove_others(rows, unfinished, o)
    files.write_csv(unfinished / "subjects.csv", COLUMNS, [[row[key] for key in COLUMNS] for row in rows])
    for row in rows:
        if row["notes"]:
            print(f"warning: {row['source']}: {row['notes']}", file=sys.stderr)
    print("\n  ".join([f"Left out: {len(errors)} volumes.", *errors]) if errors else "All volumes were used.")


def convert(volume: Volume, split: str, unfinished: Path, kind: str, o: argparse.Namespace) -> None:
    """Write the slices of a volume, then its record, which marks it as done.

    Raises VolumeError if the volume cannot be used.
    """
    paths = slice_paths(volume.case, volume.session, split, unfinished, o)
    row = known(volume)
    for path in (record_path(volume, unfinished), *map(folder.label_map, paths)):  # of a volume that was there before
        path.unlink(missing_ok=True)
    scan = read(volume)
    in_atlas, highest = ((kind, o.plane) == (name, "axial") for name in (sources.ATLAS, sources.NEURITE))
    try:
        if in_atlas:
            images, positions = cut_atlas(scan.voxels, o.first_plane, o.slices)
        else:
            images, positions = cut(scan.voxels, o.plane, o.slices, o.least_brain, highest)
    except ValueError as error:
        raise VolumeError(f"{volume.name}: {error}") from None
    for path, image in zip(paths, images, strict=True):
        folder.write_slice(image, path)
    if in_atlas and (labels := sources.label_volume(volume)):
        tissue = read(labels, labels=True).voxels
        if tissue.shape != scan.voxels.shape:
            raise VolumeError(f"{labels.name}: has another shape than {volume.name}; remove it")
        for path, image in zip(paths, cut_labels(tissue, positions), strict=True):
            folder.write_slice(image, folder.label_map(path))
    row |= {"split": split, "slices": " ".join(map(str, positions)), "notes": "; ".join(scan.notes)}
    files.write_json(record_path(volume, unfinished), row)


def slice_paths(case: int, session: int, split: str, unfinished: Path, o: argparse.Namespace) -> list[Path]:
    """The files of a volume's slices. A second scan's numbers follow those of the first."""
    where = unfinished / f"keras_png_slices_{split}"
    first = (session - 1) * o.slices
    return [where / f"case_{case:03d}_slice_{first + i}.nii.png" for i in range(o.slices)]


def known(volume: Volume) -> dict:
    """What a volume's record says of it before it is read."""
    facts = {"case": volume.case, "subject": volume.subject, "session": volume.session, "source": volume.name}
    return facts | {"files": sources.sizes_and_times(volume)}


def record_path(volume: Volume, unfinished: Path) -> Path:
    return unfinished / f"volume_{volume.case:03d}_{volume.session}.json"


def record(volume: Volume, unfinished: Path, o: argparse.Namespace) -> dict:
    """The record of a volume that is done, else {}."""
    row = files.read_json(record_path(volume, unfinished))
    if not row.keys() >= set(COLUMNS) or row["split"] not in list(folder.SHARES) or row | known(volume) != row:
        return {}
    paths = slice_paths(volume.case, volume.session, row["split"], unfinished, o)
    return row if all(map(folder.is_written, paths)) else {}


def remove_others(rows: list[dict], unfinished: Path, o: argparse.Namespace) -> None:
    """Remove the slices of volumes that are no longer there."""
    paths = [slice_paths(row["case"], row["session"], row["split"], unfinished, o) for row in rows]
    kept = {path for volume in paths for path in volume}
    kept |= {folder.label_map(path) for path in kept}
    for path in {*unfinished.glob("keras_png_slices_*/*.png")} - kept:
        path.unlink()


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m preparation.oasis", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    folder.add_options(parser, "the download: a folder, or the tar of neurite-OASIS")
    add = parser.add_argument
    add("--slices", metavar="N", type=SLICES, default=32, help="of a volume (default: 32)")
    text = "the lowest and the highest slice have this share of the largest slice's brain (default: 0.92)"
    add("--least-brain", metavar="F", type=SHARE, default=0.92, help=text)
    add("--plane", choices=PLANES, default="axial", help="(default: axial)")
    text = "of OASIS-1's discs: the number of the first slice's plane, from 1 (default: 73, as in the PNG set)"
    add("--first-plane", metavar="N", type=FIRST_PLANE, default=73, help=text)
    add("--skip-bad", action="store_true", help="leave out volumes that cannot be used, and list them")
    text = f"volumes at a time (default: {folder.CORES}, the cores)"
    add("--workers", metavar="N", type=WORKERS, default=folder.CORES, help=text)
    return parser.parse_args(argv)


if __name__ == "__main__":
    console.run_program(main, "preparation.oasis")
