"""The beginning of a run: a new one, a resumed one, and the dry run."""

import contextlib
import dataclasses
import math
import shlex
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from dataset import (
    SPLITS,
    OasisDataset,
    describe,
    find_data,
    list_scans,
    refuse_equal_images,
    refuse_shared_cases,
)
from preparation import phantoms
from priors.checkpoints import PRIORS, load_vqvae
from support import distributed, files
from support.console import UserError
from support.device import FastPath, choose_device, choose_fast_path, has_fast_bfloat16
from support.run import RESUME_FILE, Run, Saved, new_folder, open_run, read_record
from training.options import FIELDS, STAGES, Options, flag, stage_option, stages
from training.recipes import recipes_of


def prepare(args: dict[str, Any]) -> Saved:
    """The options of a new run, or the saved state of the run to resume. Writes nothing except the demo's phantoms.

    Raises UserError if options contradict each other, or something that they name does not exist.
    """
    saved = _resumed(args) if "resume" in args else _new(args)
    size = distributed.world_size()
    device = choose_device(saved.options.device)
    if size > 1 and (device.type == "mps" or ":" in saved.options.device):
        raise UserError(f"--device {saved.options.device}: several processes need --device cuda (one GPU each) or cpu")
    for stage, _, _, batch_size in stages(saved.options):
        if batch_size < size:
            name = flag(stage_option(stage, "batch_size"))
            raise UserError(f"{name} {batch_size}: must be at least the number of processes, {size}")
    return saved


def _new(args: dict[str, Any], dry: bool = False) -> Saved:
    """A new run. If it has no data, phantoms are written for it, unless this is a dry run."""
    if args.get("demo") and "data" in args:
        raise UserError("--demo and --data contradict each other; give one of them")
    if args.get("plain") and args.get("precision") == "bfloat16":
        raise UserError("--plain and --precision bfloat16 contradict each other; give one of them")
    only = args.get("only")
    if only in PRIORS and args.setdefault("prior", only) != only:
        raise UserError(f"--only {only} and --prior {args['prior']} contradict each other; give one of them")
    if (only in PRIORS) != ("vqvae" in args):
        raise UserError(f"--only {', --only '.join(PRIORS)} need --vqvae PATH, and only then is it used")
    choose_device(args.get("device", Options.device))  # fail before phantoms are written
    if "vqvae" in args:
        args["vqvae"] = str(files.find(args["vqvae"]).resolve())
        load_vqvae(args["vqvae"])
    data = None if args.get("demo") else find_data(args.get("data"))
    _name_unused(args, Options(**args))
    if data is not None:
        return Saved(Options(**args | {"data": str(data.resolve())}))
    print("=" * 78)
    print("DEMO: training on phantoms, synthetic brain slices. No real scan is used, and")
    print("no figure below is a result. With OASIS data: python train.py --data DIR")
    print("=" * 78, flush=True)
    data = phantoms.DEMO_FOLDER if dry else phantoms.write_demo()
    defaults = {name: field.metadata["demo"] for name, field in FIELDS.items() if field.metadata["demo"] is not None}
    return Saved(Options(**defaults | args | {"demo": True, "data": str(data.resolve())}))


def _name_unused(args: dict[str, Any], options: Options) -> None:
    """Warn of options that are given for a stage that is not trained."""
    groups = {*STAGES.values()} - {title for _, title, _, _ in stages(options)}
    for name in args:
        group = FIELDS[name].metadata["group"]
        if group in groups:
            print(f"warning: {flag(name)} is for training the {group}, which this run does not", file=sys.stderr)


def _resumed(args: dict[str, Any]) -> Saved:
    """The saved run, with the options in `args` changed. Raises UserError if one may not change."""
    saved = open_run(args.pop("resume"), Options)
    for name, value in args.items():
        if not FIELDS[name].metadata["resumable"]:
            raise UserError(f"{flag(name)} cannot change on resuming; leave it out")
        before = getattr(saved.options, name)
        if name.endswith("epochs") and value < before:
            raise UserError(f"{flag(name)} {value}: the run has {before}; it can only increase")
    if "data" in args:
        args["data"] = str(find_data(args["data"]).resolve())
    _name_unused(args, saved.options)
    options = dataclasses.replace(saved.options, **args)
    state, rows, prior = saved.state, saved.rows, options.prior
    if options.only == prior:
        options.vqvae = str((saved.folder / "vqvae.pth").resolve())
    print(f"Resuming {saved.folder} after " + ", ".join(f"{s} epoch {part['epoch']}" for s, part in state.items()))
    if prior in state and options.only != prior and saved.epochs_of("vqvae") < options.epochs:
        print(f"The VQ-VAE is trained further, so the {STAGES[prior]} begins anew; its files will be replaced.")
        state = {stage: part for stage, part in state.items() if stage != prior}
        rows = saved.rows_of("vqvae")
    return dataclasses.replace(saved, options=options, state=state, rows=rows)


@contextlib.contextmanager
def begin(saved: Saved, **recipes: dict) -> Iterator[tuple[Run, OasisDataset, OasisDataset]]:
    """A context with a run, its folder locked, and its training and validation split.

    `recipes` are recorded instead of those that train.py uses, by stage.
    """
    started = time.perf_counter()
    options = saved.options
    device = choose_device(saved.options.device)
    train_set, validate_set, counts = _read_splits(options, device)
    fast_path = choose_run_fast_path(saved, device)
    fast_path.set_up()

    folder = saved.folder or distributed.from_first(lambda: new_folder(options.out))
    # also by run.json: the file that marks phantoms may have been removed since the run began
    synthetic = train_set.phantoms or read_record(folder).get("data", {}).get("phantoms", False)
    run = Run(options, folder, saved.state, saved.rows, fast_path, device, synthetic, started)
    content = describe(train_set, validate_set)
    digests = {dataset.split: dataset.digest for dataset in (train_set, validate_set)}
    record = {"folder": options.data, "phantoms": run.phantoms, "content": content, "images": counts}
    with files.locked(folder) if distributed.is_first() else contextlib.nullcontext():
        if distributed.is_first():
            run.begin(record | {"digests": digests}, recipes_of(options) | recipes, _outdated(run))
        images = f"{counts['train']} training, {counts['validate']} validation images"
        print(f"Data: {options.data} ({images}): {content}")
        print(f"Device: {device}. Folder: {run.folder}. To resume it: {resume_command(run)}")
        processes = f"{distributed.world_size()} processes, " if distributed.world_size() > 1 else ""
        print(f"Fast path: {processes}{fast_path}", flush=True)
        yield run, train_set, validate_set


def _read_splits(options: Options, device: torch.device) -> tuple[OasisDataset, OasisDataset, dict[str, int]]:
    """The training and the validation split, and how many images each split has.

    Raises DataError if they cannot be used. Without --allow-shared-cases, also if a subject is in two of the three
    splits, or an image in both of these.
    """
    data = Path(options.data)
    counts = {split: len(list_scans(data, split)) for split in SPLITS}
    if not options.allow_shared_cases:
        refuse_shared_cases(data)
    train_set = OasisDataset(data, "train", device, options.skip_bad)
    with_labels = options.only in (None, "vqvae")
    validate_set = OasisDataset(data, "validate", device, options.skip_bad, with_labels)
    for dataset in (train_set, validate_set):
        dataset.print_skipped()
        counts[dataset.split] = len(dataset)
    if not options.allow_shared_cases:
        advice = "scores would be too good; correct the splits, or give --allow-shared-cases"
        refuse_equal_images(train_set, validate_set, advice)
    return train_set, validate_set, counts


def _outdated(run: Run) -> list[Path]:
    """Files of a prior that begins anew."""
    anew = [PRIORS[stage] for stage, *_ in stages(run.options) if stage in PRIORS and stage not in run.state]
    patterns = [pattern for prior in anew for pattern in (*prior.weights, f"{prior.prefix}_*.png")]
    return [path for pattern in patterns for path in run.folder.glob(pattern)]


def choose_run_fast_path(saved: Saved, device: torch.device) -> FastPath:
    """A run's fast path: kept when it is resumed, chosen anew on another type of device."""
    kept = saved.fast_path
    if kept is None or kept.device != device.type:
        return choose_fast_path(device, saved.options.precision, saved.options.plain)
    if kept.bfloat16 and not has_fast_bfloat16(device):
        text = "the run began in bfloat16, which may be slow on this machine; it continues so, to give the same numbers"
        print(f"warning: {text}", file=sys.stderr)
    return kept


def print_plan(args: dict[str, Any]) -> None:
    """Print the data, device, stages and options of the training that was asked for. Nothing is written."""
    saved = _resumed(args) if "resume" in args else _new(args, dry=True)
    options = saved.options
    data = Path(saved.options.data)
    device = choose_device(saved.options.device)
    if saved.folder or not options.demo or phantoms.is_complete(data):
        *datasets, counts = _read_splits(options, torch.device("cpu"))
        images = ", ".join(f"{n} {split}" for split, n in counts.items())
        print(f"Data: {data} ({images} images): {describe(*datasets)}")
    else:
        counts = {"train": len(phantoms.CASES["train"]) * phantoms.SLICES}
        print(f"Data: phantoms, which would be written to {data} ({counts['train']} training images)")
    print(f"Device: {device}. Folder: {saved.folder or 'a new one in ' + options.out}")
    for stage, title, epochs, batch_size in stages(options):
        done = saved.epochs_of(stage)
        steps = math.ceil(counts["train"] / batch_size)
        print(f"{title}: {epochs - done} epochs of {steps} steps, {done} complete")
    values = dataclasses.asdict(options)
    print("Options: " + ", ".join(f"{name} {value}" for name, value in values.items() if value is not None))
    print("Nothing was done (--dry-run).")


def how_to_resume(saved: Saved) -> str:
    """What to print when a run is stopped."""
    if saved.folder is None or not (saved.folder / RESUME_FILE).exists():
        return "Stopped. Nothing was saved yet, so there is nothing to resume."
    for stage, title, epochs, _ in stages(saved.options):
        done = saved.epochs_of(stage)
        if done < epochs:
            return f"Stopped. To resume at {title} epoch {done + 1}: {resume_command(saved)}"
    return f"Stopped. To draw the last figures: {resume_command(saved)}"


def resume_command(saved: Saved) -> str:
    """The command that resumes a run."""
    start = "python" if distributed.world_size() == 1 else "torchrun ..."
    return f"{start} train.py --resume {shlex.quote(str(saved.folder))}"
