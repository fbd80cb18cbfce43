"""The parts of the DCGAN's training, compared: a table of docs/results.md, from short runs of train.py.

    python benchmarks/gan_ablation.py --data DIR --vqvae PATH/vqvae.pth --out OUT    # trains what OUT does not hold yet
    python benchmarks/gan_ablation.py … --rows unflattened report --seeds 0 --epochs 5

One run after the other, each in a process of its own. Measures are those that train.py takes at the end of a run, on
the validation split. The networks, optimizers and losses are the same in every row. OUT belongs to one VQ-VAE, one
commit and one number of epochs.
"""

import argparse
import csv
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

HERE = Path(__file__).resolve()
sys.path[:0] = [str(HERE.parent), str(HERE.parent.parent)]

import torch  # noqa: E402
from ablation import begin, find_run, parser, run_folder, train_missing  # noqa: E402

import train  # noqa: E402
from support import console  # noqa: E402
from training.dcgan import BalancedUpdate, DCGANStage, PlainUpdate  # noqa: E402
from training.fit import fit  # noqa: E402
from training.scale import LatentScale  # noqa: E402


class FixedGamma(BalancedUpdate):
    r1_strength = 0.0


class Unflattened(BalancedUpdate):
    fit_scale = staticmethod(partial(LatentScale.fit, emphasis=0.0))


class Whitened(BalancedUpdate):
    fit_scale = staticmethod(partial(LatentScale.fit, emphasis=1.0))


class AllDirections(BalancedUpdate):
    fit_scale = staticmethod(partial(LatentScale.fit, n_directions=64))


class Everywhere(BalancedUpdate):
    """Without the mask of where heads are."""

    @staticmethod
    def fit_scale(vqvae, dataset) -> LatentScale:
        scale = LatentScale.fit(vqvae, dataset)
        return replace(scale, support=torch.ones_like(scale.support))


class Quantized(BalancedUpdate):
    quantized = True


class Uncalibrated(BalancedUpdate):
    calibrated = False


class Unaveraged(BalancedUpdate):
    average_decay = 0.0


class ShortAverage(BalancedUpdate):
    average_decay = 0.95


class LongAverage(BalancedUpdate):
    average_decay = 0.998


ROWS = {
    "balanced": ("`balanced`: the default", BalancedUpdate),
    "unflattened": ("spectrum of latents not flattened", Unflattened),
    "whitened": ("spectrum of latents whitened", Whitened),
    "all-directions": ("all 64 directions", AllDirections),
    "everywhere": ("positions outside of all heads, too", Everywhere),
    "uncalibrated": ("generated latents not calibrated", Uncalibrated),
    "fixed-gamma": ("R1 with a fixed γ of 1", FixedGamma),
    "quantized": ("embeddings as the real side", Quantized),
    "unaveraged": ("samples without averaged weights", Unaveraged),
    "short-average": ("samples with weights averaged over at most 20 steps", ShortAverage),
    "long-average": ("samples with weights averaged over a quarter of the steps", LongAverage),
    "report": ("`report`: the report's bare procedure", PlainUpdate),
}
COLUMNS = {
    "d_real": ("D(x)", ".2f"),
    "d_fake": ("D(G(z))", ".2f"),
    "g_loss": ("generator's loss", ".2f"),
    "coherence": ("coherence", ".3f"),
    "kurtosis_256": ("kurtosis", ".2f"),
    "outside": ("energy outside × 10⁶", ".1f"),
    "dimmest": ("dimmest 5 %", ".3f"),
    "texture_auc": ("texture AUC", ".3f"),
    "anatomy_auc": ("anatomy AUC", ".2f"),
    "kernel_distance": ("kernel distance", ".2f"),
    "coverage": ("coverage", ".2f"),
    "swd_mean": ("SWD, mean", ".0f"),
}


def main() -> None:
    options = parser(__doc__, ROWS, 10)
    options.add_argument("--vqvae", metavar="PATH", required=True, help="the trained VQ-VAE of all rows")
    o = options.parse_args()
    if o.train:
        train_row(o)
        return
    train_missing(HERE, o, ["--data", o.data, "--vqvae", o.vqvae], dict.fromkeys(ROWS, o.epochs))
    print_table(o)


def train_row(o: argparse.Namespace) -> None:
    words = ["--data", o.data, "--out", o.out, "--only", "gan", "--vqvae", o.vqvae]
    words += ["--gan-epochs", str(o.epochs), "--seed", str(o.seeds[0])]
    run, train_set, validate_set = begin(words, gan_training=o.train)
    method = ROWS[o.train][1]
    fit(DCGANStage(run, train.copy_vqvae(run), train_set, validate_set, method, n_measures=1), run)


def print_table(o: argparse.Namespace) -> None:
    """Markdown; the seeds of a row side by side."""
    print(f"Validation split, seeds {' and '.join(map(str, o.seeds))}, after {o.epochs} epochs.\n")
    print("| DCGAN's training | " + " | ".join(name for name, _ in COLUMNS.values()) + " |")
    print("|---|" + "---:|" * len(COLUMNS))
    for name in o.rows:
        found = []
        for seed in o.seeds:
            folder = find_run(run_folder(o.out, name, seed), o.epochs)
            with open(folder / "metrics.csv", newline="") as file:
                log = list(csv.DictReader(file))
            if len(log) != o.epochs:
                sys.exit(f"gan_ablation.py: error: {folder} has {len(log)} epochs, not {o.epochs}; use another --out")
            found.append(log[-1])
        cells = [" ".join(format(float(row[key]), form) for row in found) for key, (_, form) in COLUMNS.items()]
        print(f"| {ROWS[name][0]} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    console.run_program(main, "gan_ablation.py")
