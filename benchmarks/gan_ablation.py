"""The parts of the DCGAN's training, compared: a table of docs/results.md, from short runs of train.py.

    python benchmarks/gan_ablation.py --data DIR --vqvae PATH/vqvae.pth --out OUT    # trains what OUT does not hold yet
    python benchmarks/gan_ablation.py … --rows unflattened report --seeds 0 --epochs 5

One run after the other, each in a process of its own. Measures are those that train.py takes at the end of a run, on
the validation split. The networks and optimizers are the same in every row. OUT belongs to one VQ-VAE, one
commit and one number of epochs.
"""

import argparse
import sys
from pathlib import Path

HERE = Path(__file__).resolve()
sys.path[:0] = [str(HERE.parent), str(HERE.parent.parent)]

import gan_variants  # noqa: E402
from ablation import MEASURES, begin, print_last_epochs, prior_parser, train_missing  # noqa: E402

import train  # noqa: E402
from support import console  # noqa: E402
from training.dcgan import DCGANStage  # noqa: E402
from training.fit import fit  # noqa: E402
from training.gan_update import BalancedUpdate, PlainUpdate  # noqa: E402

ROWS = {
    "balanced": ("`balanced`: the default", BalancedUpdate),
    "unstarted": ("generator not started from data", gan_variants.Unstarted),
    "unplaced": ("discriminator not told its position", gan_variants.Unplaced),
    "unlimited": ("amplitudes not limited", gan_variants.Unlimited),
    "uncalibrated": ("generated latents not calibrated", gan_variants.Uncalibrated),
    "unflattened": ("spectrum of latents not flattened", gan_variants.Unflattened),
    "whitened": ("spectrum of latents whitened", gan_variants.Whitened),
    "many-directions": ("61 directions", gan_variants.ManyDirections),
    "everywhere": ("positions outside of all heads, too", gan_variants.Everywhere),
    "steered-gamma": ("R1 with γ = exp(5 max(0, d))", gan_variants.SteeredGamma),
    "fixed-gamma": ("R1 with a fixed γ of 0.3", gan_variants.FixedGamma),
    "weak-gamma": ("R1 with γ = 0.1 exp(5 max(0, d − 0.4))", gan_variants.WeakGamma),
    "falling-gamma": ("R1 with γ falling from 2 to 0.2", gan_variants.FallingGamma),
    "augmented": ("what the discriminator sees moved and cut out", gan_variants.Augmented),
    "cut-out": ("squares cut out of what it sees", gan_variants.CutOut),
    "both-penalties": ("R1 and R2", gan_variants.BothPenalties),
    "lecam": ("LeCam", gan_variants.LeCam),
    "spectrum-loss": ("a loss of the generator on the spectrum", gan_variants.SpectrumLoss),
    "flipped": ("half of what it sees mirrored", gan_variants.Flipped),
    "quantized": ("embeddings as the real side", gan_variants.Quantized),
    "unaveraged": ("samples without averaged weights", gan_variants.Unaveraged),
    "short-average": ("samples with weights averaged over at most 20 steps", gan_variants.ShortAverage),
    "report": ("`report`: the report's bare procedure", PlainUpdate),
}
COLUMNS = {"d_real": ("D(x)", ".2f"), "d_fake": ("D(G(z))", ".2f"), "g_loss": ("generator's loss", ".2f"), **MEASURES}


def main() -> None:
    o = prior_parser(__doc__, ROWS, 10).parse_args()
    if o.train:
        train_row(o)
        return
    words = ["--data", o.data, "--vqvae", o.vqvae, "--precision", o.precision]
    train_missing(HERE, o, words, dict.fromkeys(ROWS, o.epochs))
    print_last_epochs(o, "DCGAN's training", ROWS, COLUMNS)


def train_row(o: argparse.Namespace) -> None:
    words = ["--data", o.data, "--out", o.out, "--only", "gan", "--vqvae", o.vqvae]
    words += ["--gan-epochs", str(o.epochs), "--seed", str(o.seeds[0]), "--precision", o.precision]
    run, train_set, validate_set = begin(words, gan_training=o.train)
    method = ROWS[o.train][1]
    method.n_steps = o.epochs * -(-len(train_set) // run.config.gan_batch_size)
    fit(DCGANStage(run, train.copy_vqvae(run), train_set, validate_set, method, n_measures=1), run)


if __name__ == "__main__":
    console.run_program(main, "gan_ablation.py")
