"""The parts of the DCGAN's training, compared: a table of docs/results.md, from short runs of train.py.

    python benchmarks/gan_ablation.py --data DIR --vqvae PATH/vqvae.pth --out OUT    # trains what OUT does not hold yet
    python benchmarks/gan_ablation.py … --rows unflattened report --seeds 0 --epochs 5

One run after the other, each in a process of its own. Measures are those that train.py takes at the end of a run, on
the validation split. The networks, optimizers and losses are the same in every row. OUT belongs to one VQ-VAE, one
commit and one number of epochs.
"""

import argparse
import csv
import math
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

HERE = Path(__file__).resolve()
sys.path[:0] = [str(HERE.parent), str(HERE.parent.parent)]

import torch  # noqa: E402
from ablation import begin, find_run, parser, run_folder, train_missing  # noqa: E402
from augmentation import NUMBERS, changed  # noqa: E402
from torch import Tensor  # noqa: E402

import train  # noqa: E402
from support import console  # noqa: E402
from training.dcgan import DCGANStage  # noqa: E402
from training.fit import fit  # noqa: E402
from training.gan_update import BalancedUpdate, PlainUpdate  # noqa: E402
from training.scale import LatentScale  # noqa: E402


class Unstarted(BalancedUpdate):
    most_start_steps = 0


class Unplaced(BalancedUpdate):
    """Without the channels that tell the discriminator its position."""

    def __call__(self, real: Tensor, noise: Tensor, weight: float = 1.0) -> Tensor:
        seen, basis = self.seen, self.basis
        self.seen, self.basis = PlainUpdate.seen, basis[:, : real.shape[1]]
        values = super().__call__(real, noise, weight)
        self.seen, self.basis = seen, basis
        return values


class Unlimited(BalancedUpdate):
    """Generated amplitudes as they are."""

    @staticmethod
    def fit_scale(vqvae, dataset) -> LatentScale:
        scale = LatentScale.fit(vqvae, dataset)
        return replace(scale, amplitudes=scale.amplitudes.new_tensor([0.0, 1e9]))


class Uncalibrated(BalancedUpdate):
    calibrated = False


class SteeredGamma(BalancedUpdate):
    """γ = exp(5 max(0, d)); in earlier versions also where d is negative."""

    least_gamma, guard, tolerated_lead = 1.0, 5.0, 0.0


class FixedGamma(BalancedUpdate):
    guard = 0.0


class WeakGamma(BalancedUpdate):
    least_gamma, guard = 0.1, 5.0


class FallingGamma(BalancedUpdate):
    """γ falls from 2 to 0.2 along a cosine (R3GAN, arXiv 2501.05441), and rises where D's lead is more than 0.5."""

    def __init__(self, *words):
        super().__init__(*words)
        self.step = 0

    def __call__(self, *words) -> Tensor:
        self.step += 1
        return super().__call__(*words)

    @property
    def gamma(self) -> Tensor:
        progress = min(1.0, self.step / self.n_steps)
        return (0.2 + 0.9 * (1 + math.cos(math.pi * progress))) * (5 * (self.lead - 0.5).clamp(min=0)).exp()


class Augmented(BalancedUpdate):
    """What the discriminator sees is moved a little, and loses a square. R1 is at what it sees."""

    def __call__(self, real: Tensor, noise: Tensor, weight: float = 1.0) -> Tensor:
        generated = self.generated
        self.generated = lambda t: self.changed(generated(t))
        values = super().__call__(self.changed(real), noise, weight)
        self.generated = generated
        return values

    @staticmethod
    def changed(c: Tensor) -> Tensor:
        return changed(c, torch.rand(len(c), NUMBERS).to(c.device))


class CutOut(Augmented):
    """A square is cut out of most of what the discriminator sees; nothing is moved."""

    @staticmethod
    def changed(c: Tensor) -> Tensor:
        numbers = torch.rand(len(c), NUMBERS)
        numbers[:, 0] = 1  # never below MOVED
        return changed(c, numbers.to(c.device))


class Flipped(Augmented):
    """Half of what the discriminator sees is mirrored left to right."""

    @staticmethod
    def changed(c: Tensor) -> Tensor:
        mirrored = (torch.rand(len(c), 1, 1, 1) < 0.5).to(c.device)
        return torch.where(mirrored, c.flip(3), c)


class Unflattened(BalancedUpdate):
    fit_scale = staticmethod(partial(LatentScale.fit, emphasis=0.0))


class Whitened(BalancedUpdate):
    fit_scale = staticmethod(partial(LatentScale.fit, emphasis=1.0))


class ManyDirections(BalancedUpdate):
    fit_scale = staticmethod(partial(LatentScale.fit, n_directions=61))  # three channels are left for the position


class Everywhere(BalancedUpdate):
    """Without the mask of where heads are."""

    @staticmethod
    def fit_scale(vqvae, dataset) -> LatentScale:
        scale = LatentScale.fit(vqvae, dataset)
        return replace(scale, support=torch.ones_like(scale.support))


class Quantized(BalancedUpdate):
    quantized = True


class Unaveraged(BalancedUpdate):
    average_decay = 0.0


class ShortAverage(BalancedUpdate):
    average_decay = 0.95


class LongAverage(BalancedUpdate):
    average_decay = 0.998


ROWS = {
    "balanced": ("`balanced`: the default", BalancedUpdate),
    "unstarted": ("generator not started from data", Unstarted),
    "unplaced": ("discriminator not told its position", Unplaced),
    "unlimited": ("amplitudes not limited", Unlimited),
    "uncalibrated": ("generated latents not calibrated", Uncalibrated),
    "unflattened": ("spectrum of latents not flattened", Unflattened),
    "whitened": ("spectrum of latents whitened", Whitened),
    "many-directions": ("61 directions", ManyDirections),
    "everywhere": ("positions outside of all heads, too", Everywhere),
    "steered-gamma": ("R1 with γ = exp(5 max(0, d))", SteeredGamma),
    "fixed-gamma": ("R1 with a fixed γ of 0.3", FixedGamma),
    "weak-gamma": ("R1 with γ = 0.1 exp(5 max(0, d − 0.4))", WeakGamma),
    "falling-gamma": ("R1 with γ falling from 2 to 0.2", FallingGamma),
    "augmented": ("what the discriminator sees moved and cut out", Augmented),
    "cut-out": ("squares cut out of what it sees", CutOut),
    "flipped": ("half of what it sees mirrored", Flipped),
    "quantized": ("embeddings as the real side", Quantized),
    "unaveraged": ("samples without averaged weights", Unaveraged),
    "short-average": ("samples with weights averaged over at most 20 steps", ShortAverage),
    "long-average": ("samples with weights averaged over at most 500 steps", LongAverage),
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
    choices = ("float32", "bfloat16")
    options.add_argument("--precision", choices=choices, default="float32", help="of the DCGAN (default: float32)")
    o = options.parse_args()
    if o.train:
        train_row(o)
        return
    words = ["--data", o.data, "--vqvae", o.vqvae, "--precision", o.precision]
    train_missing(HERE, o, words, dict.fromkeys(ROWS, o.epochs))
    print_table(o)


def train_row(o: argparse.Namespace) -> None:
    words = ["--data", o.data, "--out", o.out, "--only", "gan", "--vqvae", o.vqvae]
    words += ["--gan-epochs", str(o.epochs), "--seed", str(o.seeds[0]), "--precision", o.precision]
    run, train_set, validate_set = begin(words, gan_training=o.train)
    method = ROWS[o.train][1]
    method.n_steps = o.epochs * -(-len(train_set) // run.config.gan_batch_size)
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
