"""The options of train.py, each declared once.

The parser, the demo's defaults, the check on resuming, the dry run and run.json all derive from `Options`.
"""

import argparse
import dataclasses
import sys
from typing import Any

from priors.checkpoints import PRIORS
from support.console import SEED, Number
from training import codebook
from training.recipes import DCGAN

STAGES = {"vqvae": "VQ-VAE"} | {name: prior.title for name, prior in PRIORS.items()}  # in order, with their titles
PRECISIONS = ("auto", "float32", "bfloat16")

COUNT = Number(int, 1, "a whole number from 1 to 2147483647", below=2**31)
SIZE = Number(int, 1, "a whole number from 1 to 65536", below=65537)
RATE = Number(float, sys.float_info.min, "a number above 0")
WEIGHT = Number(float, 0, "a number of 0 or more")
ADAM_BETA = Number(float, 0, "a number from 0 to below 1", below=1)


def _option(default: Any, group: str, text: str, *, demo: Any = None, resumable: bool = False, **argument: Any) -> Any:
    """A field of `Options`.

    Has the default, the demo's default if that differs, whether a new value is accepted with `--resume`, and further
    arguments of `ArgumentParser.add_argument`.
    """
    metadata = {"group": group, "text": text, "demo": demo, "resumable": resumable, "argument": argument}
    return dataclasses.field(default=default, metadata=metadata)


@dataclasses.dataclass
class Options:
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
        "auto", "run", "precision of training; auto is bfloat16 where the device multiplies it fast, else float32",
        choices=PRECISIONS)
    plain: bool = _option(False, "run", "no speed optimizations: standard layout, float32 without TF32")
    prior: str = _option(
        "dcgan", "run", f"what generates codes: {', '.join(PRIORS)}", choices=tuple(PRIORS))
    only: str | None = _option(None, "run", "train only this stage; a prior needs --vqvae", choices=tuple(STAGES))
    vqvae: str | None = _option(None, "run", "with --only and a prior: vqvae.pth of the trained VQ-VAE", metavar="PATH")

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
        "balanced", "DCGAN", "procedure: balanced (ours, docs/method.md) or report (cross entropy alone)",
        choices=tuple(DCGAN))

    autoregressive_epochs: int = _option(
        30, "Autoregressive prior", "passes over the training codes", demo=8, resumable=True, type=COUNT, metavar="N")
    autoregressive_batch_size: int = _option(
        32, "Autoregressive prior", "images in a step (of all processes together)", type=COUNT, metavar="N")
    autoregressive_lr: float = _option(
        2e-3, "Autoregressive prior", "highest learning rate of Adam", type=RATE, metavar="RATE")
    # fmt: on

    def __post_init__(self) -> None:
        self.dcgan_betas = tuple(self.dcgan_betas)  # argparse gives a list


FIELDS = {field.name: field for field in dataclasses.fields(Options)}


def flag(name: str) -> str:
    """The command-line option of a field: dcgan_lr is --dcgan-lr."""
    return "--" + name.replace("_", "-")


def stages(options: Options) -> list[tuple[str, str, int, int]]:
    """The stages that a run trains, in order: name, title, epochs, batch size."""
    trained = []
    for name, title in STAGES.items():
        if options.only in (None, name) and name in ("vqvae", options.prior):
            epochs, batch_size = (getattr(options, stage_option(name, key)) for key in ("epochs", "batch_size"))
            trained.append((name, title, epochs, batch_size))
    return trained


def stage_option(stage: str, name: str) -> str:
    """The field of `Options` of a stage's option: "epochs" of "dcgan" is dcgan_epochs."""
    return name if stage == "vqvae" else f"{stage}_{name}"


def parse(argv: list[str] | None, description: str | None = None) -> dict[str, Any]:
    """The options on the command line, by name; beside those of `Options`, "resume" and "dry_run"."""
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
        argument = dict(field.metadata["argument"])
        text = field.metadata["text"]
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
    return vars(parser.parse_args(argv))
