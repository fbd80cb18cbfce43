"""The options of train.py, each declared once, and the run that they begin or resume.

The parser, the demo's defaults, the check on resuming, the dry run and run.json all derive from `Config`.
"""

import argparse
import dataclasses
import math
import shlex
import sys
from functools import partial
from pathlib import Path
from typing import Any

from dataset import SPLITS, find_data, list_scans, refuse_shared_cases
from preparation import phantoms
from priors.checkpoints import load_vqvae
from priors.flow import STEP_COUNT, STEPS
from support import distributed, files
from support.console import SEED, Number, UserError
from support.device import FastPath, choose_device, choose_fast_path, has_fast_bfloat16
from support.run import RESUME_FILE, Run, open_run
from training import codebook
from training.recipes import DCGAN
from training.vqvae import first_loss

# in order, with their titles
STAGES = {"vqvae": "VQ-VAE", "dcgan": "DCGAN", "flow": "Flow", "autoregressive": "Autoregressive prior"}
PRIORS = ("dcgan", "flow", "autoregressive")

COUNT = Number(int, 1, "a whole number from 1 to 2147483647", below=2**31)
SIZE = Number(int, 1, "a whole number from 1 to 65536", below=65537)
RATE = Number(float, sys.float_info.min, "a number above 0")
WEIGHT = Number(float, 0, "a number of 0 or more")
ADAM_BETA = Number(float, 0, "a number from 0 to below 1", below=1)


def _option(default: Any, group: str, text: str, *, demo: Any = None, resumable: bool = False, **argument: Any) -> Any:
    """A field of `Config`: its default, the demo's if another, whether `--resume` accepts a new value, and further
    arguments of `ArgumentParser.add_argument`. Defaults are the report's where it gives one."""
    metadata = {"group": group, "text": text, "demo": demo, "resumable": resumable, "argument": argument}
    return dataclasses.field(default=default, metadata=metadata)


@dataclasses.dataclass
class Config:
    """The options of train.py."""

    # fmt: off
    data: str | None = _option(
        None, "data", "folder of keras_png_slices_train, _validate and _test (default: $OASIS_DIR, else "
        "./keras_png_slices_data, else the demo)", resumable=True, metavar="DIR")
    demo: bool = _option(False, "data", "a short run on phantoms, which are written to ./phantoms on first use")
    skip_bad: bool = _option(False, "data", "leave out scans that cannot be used, and list them")
    allow_shared_cases: bool = _option(
        False, "data", "accept data with a subject in two splits, although scores will be too good")

    out: str = _option("gen_imgs", "run", "where the run's folder is made", metavar="DIR")
    seed: int = _option(0, "run", "seed of initial weights, order of images, and noise", type=SEED, metavar="N")
    device: str = _option(
        "auto", "run", "auto (CUDA, then MPS, then CPU), cpu, cuda, cuda:1, mps", resumable=True, metavar="NAME")
    precision: str = _option(
        "auto", "run", "precision of training; auto is bfloat16 on GPUs that have it and CPUs with AMX, else float32",
        choices=("auto", "float32", "bfloat16"))
    plain: bool = _option(False, "run", "no speed optimizations: standard layout, float32, eager")
    prior: str = _option(
        "dcgan", "run", "what generates codes: dcgan, flow or autoregressive", choices=PRIORS)
    only: str | None = _option(None, "run", "train only this; a prior needs --vqvae", choices=tuple(STAGES))
    vqvae: str | None = _option(None, "run", "trained VQ-VAE for --only with a prior", metavar="PATH")

    epochs: int = _option(
        12, "VQ-VAE", "passes over the training images", demo=8, resumable=True, type=COUNT, metavar="N")
    batch_size: int = _option(32, "VQ-VAE", "images in a step (of all processes together)", type=COUNT, metavar="N")
    lr: float = _option(1e-3, "VQ-VAE", "learning rate of Adam", type=RATE, metavar="RATE")
    beta: float = _option(0.25, "VQ-VAE", "weight of the commitment loss", type=WEIGHT, metavar="B")
    n_embeddings: int = _option(512, "VQ-VAE", "size of the codebook", type=SIZE, metavar="N")
    embeddings_dim: int = _option(64, "VQ-VAE", "length of an embedding", type=SIZE, metavar="D")
    codebook: str = _option(
        "kmeans", "VQ-VAE", "codebook method: kmeans (start from data, revive dead codes), paper (the loss alone) or "
        "ema (moving averages)", choices=tuple(codebook.METHODS))

    dcgan_epochs: int = _option(
        25, "DCGAN", "passes over the training latents", demo=8, resumable=True, type=COUNT, metavar="N")
    dcgan_batch_size: int = _option(
        32, "DCGAN", "latents in a step (of all processes together)", type=COUNT, metavar="N")
    dcgan_lr: float = _option(2e-4, "DCGAN", "learning rate of Adam", type=RATE, metavar="RATE")
    dcgan_betas: tuple[float, float] = _option(
        (0.5, 0.999), "DCGAN", "betas of Adam", type=ADAM_BETA, nargs=2, metavar=("B1", "B2"))
    dcgan_training: str = _option(
        "balanced", "DCGAN", "update rule: balanced (start from data, R1, EMA) or report (cross entropy alone)",
        choices=tuple(DCGAN))

    flow_epochs: int = _option(
        50, "Flow", "passes over the training latents", demo=12, resumable=True, type=COUNT, metavar="N")
    flow_batch_size: int = _option(32, "Flow", "latents in a step (of all processes together)", type=COUNT, metavar="N")
    flow_lr: float = _option(1e-3, "Flow", "highest learning rate of Adam", type=RATE, metavar="RATE")
    flow_steps: int = _option(STEPS, "Flow", "solver's steps of samples", resumable=True, type=STEP_COUNT, metavar="N")

    autoregressive_epochs: int = _option(
        30, "Autoregressive prior", "passes over the training codes", demo=8, resumable=True, type=COUNT, metavar="N")
    autoregressive_batch_size: int = _option(
        32, "Autoregressive prior", "images in a step (of all processes together)", type=COUNT, metavar="N")
    autoregressive_lr: float = _option(
        2e-3, "Autoregressive prior", "highest learning rate of Adam", type=RATE, metavar="RATE")
    # fmt: on

    def __post_init__(self) -> None:
        """Validate values, which may come from an edited resume.pth. Raises ValueError."""
        self.dcgan_betas = tuple(self.dcgan_betas)
        for field in dataclasses.fields(self):
            value, argument = getattr(self, field.name), field.metadata["argument"]
            if value is None and field.default is None:
                continue
            values = value if isinstance(field.default, tuple) else (value,)
            kind = str if field.default is None else type(field.default)
            allowed = argument.get("type") or argument.get("choices")
            ok = all(each in allowed for each in values) if allowed else isinstance(value, kind)
            if not ok or len(values) != argument.get("nargs", 1):
                raise ValueError(f"option {field.name} is {value!r}")


FIELDS = {field.name: field for field in dataclasses.fields(Config)}


def flag(name: str) -> str:
    """The command-line option of a field: dcgan_lr is --dcgan-lr."""
    return "--" + name.replace("_", "-")


def stages(config: Config) -> list[tuple[str, str, int, int]]:
    """The stages that a run trains, in order: name, title, epochs, batch size."""
    return [
        (name, title, getattr(config, option(name, "epochs")), getattr(config, option(name, "batch_size")))
        for name, title in STAGES.items()
        if config.only in (None, name) and name in ("vqvae", config.prior)
    ]


def option(stage: str, name: str) -> str:
    """The field of `Config` for an option of a stage."""
    return name if stage == "vqvae" else f"{stage}_{name}"


def parse(words: list[str] | None, description: str | None = None) -> dict[str, Any]:
    """The options that were given, by name; beside those of `Config`, "resume" and "dry_run"."""
    parser = argparse.ArgumentParser(
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS,
    )
    groups = {}
    for name, field in FIELDS.items():
        group = field.metadata["group"]
        if group not in groups:
            groups[group] = parser.add_argument_group(group)
        argument, text = dict(field.metadata["argument"]), field.metadata["text"]
        if isinstance(field.default, bool):
            argument["action"] = "store_true"
        elif field.default is not None:
            demo = field.metadata["demo"]
            text += f" (default: {field.default}; in the demo: {demo})" if demo else f" (default: {field.default})"
        groups[group].add_argument(flag(name), help=text, **argument)
    resumable = [flag(name) for name, field in FIELDS.items() if field.metadata["resumable"]]
    text = f"continue the run in this folder; only {', '.join(resumable)} may change, and epochs only increase"
    groups["run"].add_argument("--resume", metavar="RUN", help=text)
    groups["run"].add_argument("--dry-run", action="store_true", help="print what would be done, and exit")
    return vars(parser.parse_args(words))


def make_run(given: dict[str, Any]) -> Run:
    """A new run, or the one to resume. Its folder is not touched yet.

    Raises UserError if options contradict each other, or something that they name does not exist.
    """
    run = _resumed_run(given) if "resume" in given else _new_run(given)
    size, device = distributed.world_size(), choose_device(run.config.device)
    if size > 1 and (device.type == "mps" or ":" in run.config.device):
        raise UserError(f"--device {run.config.device}: several processes need --device cuda (one GPU each) or cpu")
    for stage, _, _, batch_size in stages(run.config):
        if batch_size < size:
            name = flag(option(stage, "batch_size"))
            raise UserError(f"{name} {batch_size}: must be at least the number of processes, {size}")
    return run


def _new_run(given: dict[str, Any], dry: bool = False) -> Run:
    """A new run. If it has no data, phantoms are written for it, unless this is a dry run."""
    if given.get("demo") and "data" in given:
        raise UserError("--demo and --data contradict each other; give one of them")
    if given.get("plain") and given.get("precision") == "bfloat16":
        raise UserError("--plain and --precision bfloat16 contradict each other; give one of them")
    only = given.get("only")
    if only in PRIORS and given.setdefault("prior", only) != only:
        raise UserError(f"--only {only} and --prior {given['prior']} contradict each other; give one of them")
    if (only in PRIORS) != ("vqvae" in given):
        raise UserError(f"--only {', --only '.join(PRIORS)} need --vqvae PATH, and only then is it used")
    choose_device(given.get("device", Config.device))  # fail before phantoms are written
    if "vqvae" in given:
        given["vqvae"] = str(files.find(given["vqvae"]).resolve())
        load_vqvae(given["vqvae"])
    data = None if given.get("demo") else find_data(given.get("data"))
    _name_unused(given, Config(**given))
    if data is not None:
        return Run(Config(**given | {"data": str(data.resolve())}))
    print("=" * 78)
    print("DEMO: training on phantoms, synthetic brain slices. No real scan is used, and")
    print("no figure below is a result. With OASIS data: python train.py --data DIR")
    print("=" * 78, flush=True)
    data = phantoms.DEMO_FOLDER if dry else phantoms.write_demo()
    defaults = {name: field.metadata["demo"] for name, field in FIELDS.items() if field.metadata["demo"] is not None}
    return Run(Config(**defaults | given | {"demo": True, "data": str(data.resolve())}))


def _name_unused(given: dict[str, Any], config: Config) -> None:
    """Warn of options that were given for a stage that is not trained."""
    groups = {*STAGES.values()} - {title for _, title, _, _ in stages(config)}
    for name in given:
        group = FIELDS[name].metadata["group"]
        if group in groups:
            print(f"warning: {flag(name)} is for training the {group}, which this run does not", file=sys.stderr)


def _resumed_run(given: dict[str, Any]) -> Run:
    """The run to resume, its options changed as `given` where that is allowed."""
    run = open_run(given.pop("resume"), Config, STAGES)
    if not run.config.data:
        raise UserError(f"{run.folder / RESUME_FILE}: names no data; start a new run")
    for name, value in given.items():
        if not FIELDS[name].metadata["resumable"]:
            raise UserError(f"{flag(name)} cannot change on resuming; leave it out")
        before = getattr(run.config, name)
        if name.endswith("epochs") and value < before:
            raise UserError(f"{flag(name)} {value}: the run has {before}; it can only increase")
    if "data" in given:
        given["data"] = str(find_data(given["data"]).resolve())
    _name_unused(given, run.config)
    run.config = dataclasses.replace(run.config, **given)
    prior = run.config.prior
    if run.config.only == prior:
        run.config.vqvae = str((run.folder / "vqvae.pth").resolve())
    print(f"Resuming {run.folder} after " + ", ".join(f"{s} epoch {part['epoch']}" for s, part in run.state.items()))
    if prior in run.state and run.config.only != prior and run.epochs_of("vqvae") < run.config.epochs:
        print(f"The VQ-VAE trains further, so the {STAGES[prior]} begins anew; its files will be replaced.")
        del run.state[prior]
        run.rows = run.rows_of("vqvae")
        patterns = ("generator.pth", "discriminator.pth", "flow.pth", "autoregressive.pth")
        patterns += ("gan_*.png", "flow_*.png", "autoregressive_*.png")
        run.outdated = [path for pattern in patterns for path in run.folder.glob(pattern)]
    return run


def choose_run_fast_path(run: Run, n_images: int, size: tuple[int, int] = (256, 256)) -> FastPath:
    """The run's fast path: kept as far as it works when it is resumed, chosen anew on another type of device.

    `size` is that of the training images, inside their box.
    """
    config = run.config
    kept = run.fast_path if run.fast_path and run.fast_path.device == run.device.type else None
    if kept and kept.bfloat16 and not has_fast_bfloat16(run.device):
        print(
            "warning: the run was begun in bfloat16, which is slow here; it stays, for the same numbers",
            file=sys.stderr,
        )
    if kept and run.epochs_of("vqvae") >= config.epochs:  # only the prior is left
        return kept
    # priors are not compiled
    n_steps = 0 if config.only in PRIORS else config.epochs * math.ceil(n_images / config.batch_size)
    compute_loss = partial(first_loss, config, run.device, size)
    return choose_fast_path(run.device, config.precision, config.plain, n_steps, compute_loss, kept)


def print_plan(given: dict[str, Any]) -> None:
    """Print what train.py would do with these options. Nothing is written and no image is read."""
    run = _resumed_run(given) if "resume" in given else _new_run(given, dry=True)
    config, data = run.config, Path(run.config.data)
    if data.is_dir():
        counts = {split: len(list_scans(data, split)) for split in SPLITS}
        if not config.allow_shared_cases:
            refuse_shared_cases(data)
        print(f"Data: {data} ({', '.join(f'{n} {split}' for split, n in counts.items())} files)")
    else:
        counts = {"train": len(phantoms.CASES["train"]) * phantoms.SLICES}
        print(f"Data: phantoms, which would be written to {data} ({counts['train']} training images)")
    print(f"Device: {choose_device(config.device)}. Folder: {run.folder or 'a new one in ' + config.out}")
    for stage, title, epochs, batch_size in stages(config):
        done, steps = run.epochs_of(stage), math.ceil(counts["train"] / batch_size)
        print(f"{title}: {epochs - done} epochs of {steps} steps, {done} complete")
    options = dataclasses.asdict(config)
    print("Options: " + ", ".join(f"{name} {value}" for name, value in options.items() if value is not None))
    print("Nothing was done (--dry-run).")


def how_to_resume(run: Run) -> str:
    """What to print when a run is stopped."""
    if run.folder is None or not (run.folder / RESUME_FILE).exists():
        return "Stopped. Nothing was saved yet, so there is nothing to resume."
    for stage, title, epochs, _ in stages(run.config):
        done = run.epochs_of(stage)
        if done < epochs:
            return f"Stopped. To resume at {title} epoch {done + 1}: {resume_command(run)}"
    return f"Stopped. To draw the last figures: {resume_command(run)}"


def resume_command(run: Run) -> str:
    """The command that resumes a run."""
    start = "python" if distributed.world_size() == 1 else "torchrun ..."
    return f"{start} train.py --resume {shlex.quote(str(run.folder))}"
