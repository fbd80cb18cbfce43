"""What train.py was asked for: its options, and the run that they begin or go on with."""

import argparse
import math
import shlex
import sys
from pathlib import Path

import torch

import codebook
import gan
import hardware
import parallel
import phantom
import runs
from dataset import DEFAULT_PHANTOMS, SPLITS, demo_data, find_data, list_scans
from modules import VQVAE

# The report's values; arXiv 1711.00937 gives β = 0.25, arXiv 1511.06434 the DCGAN's rate and betas.
DEFAULTS = dict(
    epochs=12,
    batch_size=32,
    lr=1e-3,
    beta=0.25,
    n_embeddings=512,
    embeddings_dim=64,
    codebook="kmeans",
    gan_epochs=25,
    gan_batch_size=32,
    gan_lr=2e-4,
    gan_betas=(0.5, 0.999),
    gan_training="balanced",
    data=None,
    demo=False,
    skip_bad=False,
    allow_shared_cases=False,
    seed=0,
    device="auto",
    out="gen_imgs",
    only=None,
    vqvae=None,
    precision="auto",
    plain=False,
    fast_path=None,  # what `choose_fast_path` gives; no option of the command line
)
DEMO_DEFAULTS = dict(epochs=5, gan_epochs=12)  # what fits in six minutes on two cores
MAY_CHANGE_ON_RESUME = {"resume", "epochs", "gan_epochs", "data", "device"}


def open_run(given: dict) -> runs.Run:
    """A new run, or the one to go on with."""
    run = resumed_run(given) if "resume" in given else new_run(given)
    if parallel.world() == 1:
        return run
    if runs.choose_device(run.options["device"]).type == "mps" or ":" in run.options["device"]:
        raise runs.RunError(
            f"--device {run.options['device']}: several processes need --device cuda (one GPU each) or cpu"
        )
    for stage, name in (("vqvae", "batch_size"), ("gan", "gan_batch_size")):
        size = run.options[name]
        if size < parallel.world() and run.options["only"] in (None, stage):
            option = name.replace("_", "-")
            raise runs.RunError(f"--{option} {size}: less than one image for each of {parallel.world()} processes")
    return run


def choose_fast_path(run: runs.Run, device: torch.device, n_images: int) -> hardware.FastPath:
    """The run's way of training: kept when it is resumed, chosen anew where that is on another kind of device."""
    kept = run.options.get("fast_path")
    if kept and kept["device"] == device.type:
        return hardware.FastPath(**kept)
    if run.options["only"] == "gan":  # which has neither compiled nor bfloat16 networks
        return hardware.choose_fast_path(device, "float32", run.options["plain"], 0)
    n_updates = run.options["epochs"] * math.ceil(n_images / run.options["batch_size"])
    return hardware.choose_fast_path(device, run.options["precision"], run.options["plain"], n_updates)


def new_run(given: dict, dry: bool = False) -> runs.Run:
    """A run with every option; phantoms are written for it where it has no other data, unless it is a dry one."""
    if given.get("demo") and "data" in given:
        raise runs.RunError("--demo and --data contradict each other; give one of them")
    if given.get("plain") and given.get("precision") == "bfloat16":
        raise runs.RunError("--plain and --precision bfloat16 contradict each other; give one of them")
    if (given.get("only") == "gan") != ("vqvae" in given):
        raise runs.RunError("--only gan needs --vqvae PATH, and only then is it used")
    runs.choose_device(given.get("device", DEFAULTS["device"]))  # before phantoms are written for nothing
    if "vqvae" in given:
        given["vqvae"] = str(runs.find(given["vqvae"]).resolve())
        runs.load(Path(given["vqvae"]), VQVAE.from_state_dict)
    data = None if given.get("demo") else find_data(given.get("data"))
    demo = data is None
    if demo:
        print("=" * 78)
        print("DEMO: training on phantoms, synthetic brain slices. No real scan is used, and")
        print("no figure below is a result. With OASIS data: python train.py --data DIR")
        print("=" * 78, flush=True)
        data = DEFAULT_PHANTOMS if dry else demo_data(runs.progress)
    defaults = DEFAULTS | DEMO_DEFAULTS if demo else DEFAULTS
    return runs.Run(None, defaults | given | {"demo": demo, "data": str(data.resolve())})


def print_plan(given: dict) -> None:
    """Say what train.py would do with these options; nothing is written, no image is read."""
    run = resumed_run(given) if "resume" in given else new_run(given, dry=True)
    o, data = run.options, Path(run.options["data"])
    if data.is_dir():
        counts = {split: len(list_scans(data, split)) for split in SPLITS}
        print(f"Data: {data} ({', '.join(f'{n} {split}' for split, n in counts.items())} files)")
    else:
        counts = {"train": len(phantom.CASES["train"]) * phantom.SLICES}
        print(f"Data: phantoms, which would be written to {data} ({counts['train']} training images)")
    print(f"Device: {runs.choose_device(o['device'])}. Folder: {run.folder or 'a new one in ' + o['out']}")
    for stage, name, prefix in (("vqvae", "VQ-VAE", ""), ("gan", "DCGAN", "gan_")):
        if o["only"] in (None, stage):
            done, epochs = run.state.get(stage, {}).get("epoch", 0), o[f"{prefix}epochs"]
            updates = math.ceil(counts["train"] / o[f"{prefix}batch_size"])
            print(f"{name}: {epochs - done} epochs of {updates} updates, {done} done before")
    print("Options: " + ", ".join(f"{name} {value}" for name, value in o.items() if value is not None))
    print("Nothing was done (--dry-run).")


def how_to_go_on(run: runs.Run) -> str:
    """What to say when a run is stopped."""
    if run.folder is None or not (run.folder / runs.RESUME_FILE).exists():
        return "Stopped. No epoch was complete, so there is nothing to go on from."
    epoch = {stage: part["epoch"] for stage, part in run.state.items()}
    if run.options["only"] != "gan" and epoch.get("vqvae", 0) < run.options["epochs"]:
        at = f"VQ-VAE epoch {epoch.get('vqvae', 0) + 1}"
    elif run.options["only"] != "vqvae" and epoch.get("gan", 0) < run.options["gan_epochs"]:
        at = f"DCGAN epoch {epoch.get('gan', 0) + 1}"
    else:
        at = "the last figures"
    return f"Stopped. It goes on with {at} by: {resume_command(run)}"


def resume_command(run: runs.Run) -> str:
    start = "python" if parallel.world() == 1 else "torchrun ..."
    return f"{start} train.py --resume {shlex.quote(str(run.folder))}"


def check_types(options: dict) -> None:
    """Raise ValueError where the options of a resumed run are not such as a run has."""
    for name, value in options.items():
        kind = type(DEFAULTS[name]) if name in DEFAULTS else type(None)
        if kind is tuple:
            kind = (tuple, list)
        if name not in DEFAULTS or (DEFAULTS[name] is not None and not isinstance(value, kind)):
            raise ValueError(f"option {name} is {value!r}")
        if isinstance(value, (int, float)) and value < 0:
            raise ValueError(f"option {name} is {value!r}")
    if not isinstance(options["data"], str):
        raise ValueError("it names no data")
    hardware.FastPath(**(options.get("fast_path") or {"device": "cpu"}))


def resumed_run(given: dict) -> runs.Run:
    """The run to go on with, its options changed as `given` where that is allowed."""
    run = runs.Run.open(given["resume"])
    with runs.restoring(run):
        check_types(run.options)
    run.options = DEFAULTS | {"precision": "float32"} | run.options  # options that are younger than the run
    for name in given:
        if name not in MAY_CHANGE_ON_RESUME:
            raise runs.RunError(f"--{name.replace('_', '-')} cannot change on resuming; leave it out")
    for name in ("epochs", "gan_epochs"):
        if given.get(name, run.options[name]) < run.options[name]:
            option = name.replace("_", "-")
            raise runs.RunError(f"--{option} {given[name]}: the run has {run.options[name]}; it can only be raised")
    if "data" in given:
        given["data"] = str(find_data(given["data"]).resolve())
    run.options |= {name: value for name, value in given.items() if name != "resume"}
    if run.options["only"] == "gan":
        run.options["vqvae"] = str((run.folder / "vqvae.pth").resolve())
    print(f"Resuming {run.folder} after " + ", ".join(f"{s} epoch {part['epoch']}" for s, part in run.state.items()))
    if "gan" in run.state and run.options["only"] != "gan" and run.state["vqvae"]["epoch"] < run.options["epochs"]:
        print("The VQ-VAE trains on, so the DCGAN begins anew.")
        del run.state["gan"]
        run.rows = run.rows_of("vqvae")
        run.outdated = [run.folder / "generator.pth", run.folder / "discriminator.pth", *run.folder.glob("gan_*.png")]
    return run


def parse(words: list[str] | None, description: str | None = None) -> dict:
    """The options given, and only those, by name."""
    count = runs.number(int, 1, "a whole number from 1 to 2147483647", below=2**31)
    seed = runs.number(int, 0, "a whole number from 0 to 2147483647", below=2**31)
    size = runs.number(int, 1, "a whole number from 1 to 65536", below=65537)
    rate = runs.number(float, sys.float_info.min, "a number above 0")
    weight = runs.number(float, 0, "a number of 0 or more")
    beta = runs.number(float, 0, "a number from 0 to below 1", below=1)

    parser = argparse.ArgumentParser(
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS,
    )

    def add(group, option: str, text: str, **settings) -> None:
        default = DEFAULTS.get(option[2:].replace("-", "_"))
        shown = f" (default: {default})" if default is not None and default is not False else ""
        group.add_argument(option, help=text + shown, **settings)

    group = parser.add_argument_group("data")
    places = "$OASIS_DIR, else ./keras_png_slices_data, else the demo"
    add(group, "--data", f"folder of keras_png_slices_train, _validate and _test (default: {places})", metavar="DIR")
    demo = f"{DEMO_DEFAULTS['epochs']} and {DEMO_DEFAULTS['gan_epochs']} epochs"
    add(group, "--demo", f"train on phantoms, written to ./phantoms once, for {demo}", action="store_true")
    add(group, "--skip-bad", "leave out scans that cannot be used, and say so", action="store_true")
    text = "accept data with a subject in two splits, of which scores would be too good"
    add(group, "--allow-shared-cases", text, action="store_true")
    group = parser.add_argument_group("run")
    add(group, "--out", "where the run's folder is made", metavar="DIR")
    add(group, "--seed", "of weights, order and noise", type=seed, metavar="N")
    add(group, "--device", "auto (CUDA, then MPS, then CPU), cpu, cuda, cuda:1, mps", metavar="NAME")
    text = "of the encoder's convolutions; auto is bfloat16 on GPUs that have it, else float32"
    add(group, "--precision", text, choices=("auto", "float32", "bfloat16"))
    add(group, "--plain", "nothing that is there for speed alone: standard layout, float32, eager", action="store_true")
    add(group, "--only", "one stage alone; gan needs --vqvae", choices=("vqvae", "gan"))
    add(group, "--vqvae", "trained VQ-VAE for --only gan", metavar="PATH")
    add(group, "--dry-run", "say what would be done, and do nothing", action="store_true")
    allowed = "--epochs and --gan-epochs (upwards), --data and --device"
    add(group, "--resume", f"go on with the run in this folder; only {allowed} may change", metavar="RUN")
    group = parser.add_argument_group("VQ-VAE")
    add(group, "--epochs", "passes over the training images", type=count, metavar="N")
    add(group, "--batch-size", "images an update", type=count, metavar="N")
    add(group, "--lr", "learning rate of Adam", type=rate, metavar="RATE")
    add(group, "--beta", "weight of the commitment loss", type=weight, metavar="B")
    add(group, "--n-embeddings", "size of the codebook", type=size, metavar="N")
    add(group, "--embeddings-dim", "length of an embedding", type=size, metavar="D")
    text = "how codes are kept in use; kmeans: from data, with revival; paper: by the loss alone; ema: moving averages"
    add(group, "--codebook", text, choices=codebook.WAYS)
    group = parser.add_argument_group("DCGAN")
    add(group, "--gan-epochs", "passes over the training latents", type=count, metavar="N")
    add(group, "--gan-batch-size", "latents an update", type=count, metavar="N")
    add(group, "--gan-lr", "learning rate of Adam", type=rate, metavar="RATE")
    add(group, "--gan-betas", "betas of Adam", type=beta, nargs=2, metavar=("B1", "B2"))
    text = "balanced: what keeps both networks in balance; report: the report's bare procedure"
    add(group, "--gan-training", text, choices=gan.WAYS)
    return vars(parser.parse_args(words))
