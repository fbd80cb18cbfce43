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
from dataclasses import replace
from math import nan
from pathlib import Path
from typing import NamedTuple

HERE = Path(__file__).resolve()
sys.path.insert(0, str(HERE.parent.parent))


from support import console, files  # noqa: E402
from training import begin, codebook, options  # noqa: E402
from training.fit import fit  # noqa: E402
from training.vqvae import AVERAGE_DECAY, VQVAEStage  # noqa: E402


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
    "paper": Row("`paper`: random start, loss alone", codebook.LossOnly),
    "ema": Row("`ema`: random start, moving averages", codebook.EMA),
    "report": Row("the report's procedure: codebook frozen at its start, epoch 1", Frozen, 0.0, epochs=1),
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
    saved = begin.prepare(options.parse(words))
    saved = replace(saved, options=replace(saved.options, codebook=o.train))  # so that the run names its row
    run, train_set, validate_set = begin.begin(saved)
    stage = VQVAEStage(run, train_set, validate_set, row.method, row.average_decay)
    fit(stage, run)
    stage.best()


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


if __name__ == "__main__":
    console.run_program(main, "ablation.py")
