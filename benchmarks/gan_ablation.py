"""The parts of the DCGAN's training, compared: a table of docs/results.md, from short runs of train.py.

    python benchmarks/gan_ablation.py --data DIR --vqvae PATH/vqvae.pth --out OUT    # trains what OUT does not hold yet
    python benchmarks/gan_ablation.py … --rows by-channel report --seeds 0 --epochs 5

One run after the other, each in a process of its own. Distances are those that train.py measures at the end of a run,
on the validation split. The networks, optimizers and losses are the same in every row. OUT belongs to one VQ-VAE, one
commit and one number of epochs.
"""

import argparse
import csv
import sys
from pathlib import Path

HERE = Path(__file__).resolve()
sys.path[:0] = [str(HERE.parent), str(HERE.parent.parent)]

import torch  # noqa: E402
from ablation import begin, find_run, parser, run_folder, train_missing  # noqa: E402

import train  # noqa: E402
from support import console  # noqa: E402
from training.dcgan import BalancedUpdate, DCGANStage, PlainUpdate  # noqa: E402
from training.fit import fit  # noqa: E402
from training.latents import RMS, LatentScale, foreground_differences  # noqa: E402


class FixedGamma(BalancedUpdate):
    r1_strength = 0.0


class Quantized(BalancedUpdate):
    fit_scale = LatentScale.of_codebook
    quantized = True


class Uncalibrated(BalancedUpdate):
    calibrated = False


class Unaveraged(BalancedUpdate):
    average_decay = 0.0


class LongAverage(BalancedUpdate):
    average_decay = 0.995


class ByChannel(BalancedUpdate):
    """Every channel at the same root mean square by a factor of its own, without a rotation."""

    @staticmethod
    def fit_scale(vqvae, dataset) -> LatentScale:
        background, difference = foreground_differences(vqvae, dataset)
        factors = difference.square().mean(0).sqrt() / RMS
        to = dict(dtype=torch.float32, device=vqvae.vector_quantizer.embedding.weight.device)
        return LatentScale(background.to(**to), torch.diag(factors).to(**to))


ROWS = {
    "balanced": ("`balanced`: the default", BalancedUpdate),
    "uncalibrated": ("generated latents not calibrated", Uncalibrated),
    "by-channel": ("latents divided by a factor for each channel", ByChannel),
    "fixed-gamma": ("R1 with a fixed γ of 1", FixedGamma),
    "quantized": ("embeddings as the real side, in the codebook's range by one factor", Quantized),
    "unaveraged": ("samples without averaged weights", Unaveraged),
    "long-average": ("samples with weights averaged over 200 steps", LongAverage),
    "report": ("`report`: the report's bare procedure", PlainUpdate),
}
COLUMNS = {"d_real": ".2f", "d_fake": ".2f", "g_loss": ".2f", "swd_mean": ".0f", "grey_values": ".3f"}


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
    print("| DCGAN's training | D(x) | D(G(z)) | generator's loss | sliced Wasserstein distance | grey values |")
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
        cells = [" ".join(format(float(row[key]), form) for row in found) for key, form in COLUMNS.items()]
        print(f"| {ROWS[name][0]} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    console.run_program(main, "gan_ablation.py")
