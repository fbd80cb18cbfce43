"""Methods of keeping the codebook in use, compared: a table of docs/results.md, from short runs of train.py.

    python benchmarks/ablation.py --data DIR --out OUT                  # trains what OUT does not hold yet, then prints
    python benchmarks/ablation.py --data DIR --out OUT --rows paper ema --seeds 0 --epochs 2

One run after the other, each in a process of its own. A row is a method of training/codebook.py or a variant of one,
and is trained for six epochs unless it says otherwise. A run that was interrupted begins anew. No figure is of the test
split.
"""

import argparse
import csv
import subprocess
import sys
from math import nan
from pathlib import Path
from typing import NamedTuple

HERE = Path(__file__).resolve()
sys.path.insert(0, str(HERE.parent.parent))

import torch

import train  # noqa: E402
from dataset import OasisDataset  # noqa: E402
from support import console, files  # noqa: E402
from support.console import UserError  # noqa: E402
from support.run import Run  # noqa: E402
from training import codebook, config  # noqa: E402
from training.fit import fit  # noqa: E402
from training.vqvae import AVERAGE_DECAY, VQVAEStage  # noqa: E402


class StartOnly(codebook.KMeans):
    """The k-means steps of the first steps; a code that dies later stays dead."""

    revive_every = sys.maxsize


class EMAWithRevival(codebook.KMeans):
    """Moving averages as in `EMA`, with the start and the revival of `KMeans`."""

    def __init__(self, quantizer, optimizer):
        super().__init__(quantizer, optimizer)
        self.ema = codebook.EMA(quantizer, optimizer)

    def before_lookup(self, step, z_e, n, rng):
        super().before_lookup(step, z_e, n, rng)
        if step < self.kmeans_steps:
            self.ema.sums.copy_(self.embeddings)
        else:
            self.ema.before_lookup(step, z_e, n, rng)

    def revive(self, dead, z_e, rng):
        codebook.move_dead(self.quantizer, dead, z_e, rng)
        self.ema.counts.masked_fill_(dead[:, None], 1)
        self.ema.sums.copy_(torch.where(dead[:, None], self.embeddings, self.ema.sums))


class Frozen(codebook.LossOnly):
    """The codebook stays at its random start: the report's program computed the codebook term and did not use it."""

    def __init__(self, quantizer, optimizer):
        super().__init__(quantizer, optimizer)
        quantizer.embedding.weight.requires_grad_(False)


class Row(NamedTuple):
    text: str
    method: type[codebook.LossOnly]
    average_decay: float = AVERAGE_DECAY
    epochs: int | None = None  # None: as many as --epochs


ROWS = {
    "kmeans": Row("`kmeans`: k-means for 100 steps, then revival (the default)", codebook.KMeans),
    "start": Row("the same without revival", StartOnly),
    "unaveraged": Row("`kmeans`, weights not averaged", codebook.KMeans, average_decay=0.0),
    "paper": Row("`paper`: random start, loss alone", codebook.LossOnly),
    "paper-unaveraged": Row("`paper`, weights not averaged", codebook.LossOnly, average_decay=0.0),
    "ema": Row("`ema`: random start, moving averages", codebook.EMA),
    "ema-revival": Row("moving averages with the start and revival of `kmeans`", EMAWithRevival),
    "report": Row("the report's procedure: codebook frozen at its start, epoch 1", Frozen, 0.0, epochs=1),
}
MEASURES = {  # columns of metrics.csv, for priors
    "coherence": ("coherence", ".3f"),
    "kurtosis_256": ("kurtosis", ".2f"),
    "outside": ("energy outside × 10⁶", ".2f"),
    "dimmest": ("dimmest 5 %", ".3f"),
    "texture_auc": ("texture AUC", ".3f"),
    "anatomy_auc": ("anatomy AUC", ".2f"),
    "kernel_distance": ("kernel distance", ".2f"),
    "coverage": ("coverage", ".2f"),
    "swd_mean": ("SWD, mean", ".0f"),
}


def main() -> None:
    o = parser(__doc__, ROWS, 6).parse_args()
    if o.train:
        train_row(ROWS[o.train], o)
        return
    train_missing(HERE, o, ["--data", o.data], {name: row.epochs or o.epochs for name, row in ROWS.items()})
    print_table(o)


def train_missing(script: Path, o: argparse.Namespace, words: list[str], epochs: dict[str, int]) -> None:
    """Call a script of this kind for each row and seed that OUT does not hold, with `words` and what names them."""
    for name in o.rows:
        for seed in o.seeds:
            folder = run_folder(o.out, name, seed)
            if find_run(folder, epochs[name]) is None:
                which = ["--out", folder, "--train", name, "--seeds", str(seed), "--epochs", str(epochs[name])]
                print(f"{name}, seed {seed} …", file=sys.stderr, flush=True)
                done = subprocess.run([sys.executable, script, *words, *which], stdout=subprocess.DEVNULL)
                if done.returncode:
                    sys.exit(f"{script.name}: error: {name}, seed {seed} failed; its message is above")


def train_row(row: Row, o: argparse.Namespace) -> None:
    words = ["--data", o.data, "--out", o.out, "--only", "vqvae", "--epochs", str(o.epochs), "--seed", str(o.seeds[0])]
    run, train_set, validate_set = begin(words, codebook=o.train)
    stage = VQVAEStage(run, train_set, validate_set, row.method, row.average_decay)
    fit(stage, run)
    stage.best()


def begin(words: list[str], **row: str) -> tuple[Run, OasisDataset, OasisDataset]:
    """A new run of train.py with these options, and its training and validation splits. It records the row's name."""
    run = config.make_run(config.parse(words))
    for name, value in row.items():
        setattr(run.config, name, value)
    return run, *train.begin_run(run)


def run_folder(out: str, name: str, seed: int) -> Path:
    return Path(out) / f"{name}-{seed}"


def find_run(folder: Path, epochs: int) -> Path | None:
    """A run in the folder that has so many epochs, or more."""
    logs = sorted(folder.glob("*/metrics.csv"))
    return next((log.parent for log in logs if len(log.read_text().splitlines()) > epochs), None)


def print_table(o: argparse.Namespace) -> None:
    """Markdown; the seeds of a row side by side, each at the epoch that its vqvae.pth is of."""
    seeds = " and ".join(map(str, o.seeds))
    print(f"Validation split, seeds {seeds}, best of {o.epochs} epochs. Loss: greatest of a batch after 20 updates.\n")
    print("| codebook | SSIM, mean | SSIM, min | PSNR / dB | codes used | foreground perplexity | loss |")
    print("|---|" + "---:|" * 6)
    columns = (("ssim_mean", ".4f"), ("ssim_min", ".4f"), ("psnr_mean", ".2f"))
    columns += (("codes_used", ".0f"), ("foreground_perplexity", ".0f"), ("loss", ".3f"))
    for name in o.rows:
        epochs = ROWS[name].epochs or o.epochs
        found = [read_run(find_run(run_folder(o.out, name, seed), epochs), epochs) for seed in o.seeds]
        cells = [" ".join(format(row[key], form) for row in found) for key, form in columns]
        print(f"| {ROWS[name].text} | " + " | ".join(cells) + " |")


def read_run(folder: Path, epochs: int) -> dict[str, float]:
    """The best of a run's first epochs: a longer run with the same options serves as well."""
    with open(folder / "metrics.csv", newline="") as file:
        rows = [{key: float(value) for key, value in row.items() if key != "stage"} for row in csv.DictReader(file)]
    losses = files.load(folder / "resume.pth")["state"]["vqvae"]["history"]["training_loss"]
    rows = rows[:epochs]
    losses = losses[20 : int(sum(row["updates"] for row in rows))]
    return max(rows, key=lambda row: row["ssim_mean"]) | {"loss": max(losses, default=nan)}


def print_last_epochs(o: argparse.Namespace, what: str, rows: dict[str, tuple], columns: dict[str, tuple]) -> None:
    """Markdown: the last epoch of each row of a prior's ablation, the seeds of a row side by side.

    Args:
        what: the table's first heading.
        rows: those of the ablation, each beginning with what it is called.
        columns: those of metrics.csv, each with its heading and its format.

    Raises UserError if a run has another number of epochs.
    """
    print(f"Validation split, seeds {' and '.join(map(str, o.seeds))}, after {o.epochs} epochs.\n")
    print(f"| {what} | " + " | ".join(heading for heading, _ in columns.values()) + " |")
    print("|---|" + "---:|" * len(columns))
    for name in o.rows:
        found = []
        for seed in o.seeds:
            folder = find_run(run_folder(o.out, name, seed), o.epochs)
            with open(folder / "metrics.csv", newline="") as file:
                log = list(csv.DictReader(file))
            if len(log) != o.epochs:
                raise UserError(f"{folder}: has {len(log)} epochs, not {o.epochs}; use another --out")
            found.append(log[-1])
        cells = [" ".join(format(float(row[key]), form) for row in found) for key, (_, form) in columns.items()]
        print(f"| {rows[name][0]} | " + " | ".join(cells) + " |")


def parser(description: str, rows: dict, epochs: int) -> argparse.ArgumentParser:
    """The options that scripts of this kind share."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", metavar="DIR", required=True, help="OASIS folder")
    parser.add_argument("--out", metavar="DIR", required=True, help="where the runs are kept")
    parser.add_argument("--rows", nargs="+", choices=rows, default=list(rows), help="default: all")
    parser.add_argument("--seeds", nargs="+", type=int, metavar="S", default=[0, 1], help="default: 0 1")
    parser.add_argument("--epochs", type=int, metavar="N", default=epochs, help=f"default: {epochs}")
    parser.add_argument("--train", choices=rows, help=argparse.SUPPRESS)
    return parser


def prior_parser(description: str, rows: dict, epochs: int) -> argparse.ArgumentParser:
    """Those of `parser`, and what the ablations of priors share."""
    options = parser(description, rows, epochs)
    options.add_argument("--vqvae", metavar="PATH", required=True, help="the trained VQ-VAE of all rows")
    choices = ("float32", "bfloat16")
    options.add_argument("--precision", choices=choices, default="float32", help="of the prior (default: float32)")
    return options


if __name__ == "__main__":
    console.run_program(main, "ablation.py")
