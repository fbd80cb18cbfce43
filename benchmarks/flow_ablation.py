"""The choices of the flow, compared by short runs of train.py.

    python benchmarks/flow_ablation.py --data DIR --vqvae PATH/vqvae.pth --out OUT   # trains what OUT does not hold yet
    python benchmarks/flow_ablation.py … --rows flow dropout --seeds 0 --epochs 5

One run after the other, each in a process of its own. Measures are those that train.py takes at the end of a run, on
the validation split. Losses of rows with other directions are of other numbers, and not comparable. OUT belongs to one
VQ-VAE, one commit, one precision, one number of epochs and one of the solver's steps.
"""

import argparse
import sys
from functools import partial
from pathlib import Path

HERE = Path(__file__).resolve()
sys.path[:0] = [str(HERE.parent), str(HERE.parent.parent)]

import torch  # noqa: E402
from ablation import MEASURES, begin, print_last_epochs, prior_parser, train_missing  # noqa: E402
from torch import Tensor, nn  # noqa: E402
from torch.utils.data import Dataset  # noqa: E402

import train  # noqa: E402
from modules import UNet, UNetBlock  # noqa: E402
from support import console  # noqa: E402
from training.fit import fit  # noqa: E402
from training.flow import FlowStage  # noqa: E402
from training.latents import Latents  # noqa: E402
from training.prior import STEP_COUNT, STEPS  # noqa: E402


class Narrow(FlowStage):
    new_network = staticmethod(partial(UNet, widths=(48, 72, 96, 96)))


class Wide(FlowStage):
    new_network = staticmethod(partial(UNet, widths=(80, 120, 160, 160)))


class FourDirections(FlowStage):
    n_directions = 4


class EightDirections(FlowStage):
    n_directions = 8


class Dropout(FlowStage):
    """Dropout before the second convolution of each block (arXiv 2006.11239, appendix B)."""

    @staticmethod
    def new_network(channels: int) -> UNet:
        network = UNet(channels)
        for block in network.modules():
            if isinstance(block, UNetBlock):
                block.after[0] = nn.Sequential(nn.SiLU(), nn.Dropout(0.1))
        return network


class Later(FlowStage):
    """More times near the data in training: their logit has a mean of 0.5."""

    def losses(self, network: UNet, c: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        return super().losses(network, c, (t.logit() + 0.5).sigmoid() if network.training else t, noise)


class Unguided(FlowStage):
    """Samples follow the flow alone; the guide is trained, and has no weight."""

    def set_factor(self, factor: float) -> None:
        super().set_factor(factor)
        self.prior.guidance = 0.0


class Mirrored(FlowStage):
    """Half of the images are mirrored left to right, before they are encoded."""

    def data(self) -> Latents:
        if self.latents is None:
            self.latents = Latents(self.vqvae, HalfMirrored(self.train_set), self.scale, stored=False)
        return self.latents


class HalfMirrored(Dataset):
    """The images of a data set, each time mirrored or not by chance."""

    def __init__(self, images: Dataset):
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def batch(self, indices) -> Tensor:
        x = self.images.batch(indices)
        return torch.where((torch.rand(len(x), 1, 1, 1) < 0.5).to(x.device), x.flip(3), x)


ROWS = {
    "flow": ("the default", FlowStage),
    "narrow": ("widths 48, 72, 96, 96", Narrow),
    "wide": ("widths 80, 120, 160, 160", Wide),
    "four-directions": ("4 directions", FourDirections),
    "eight-directions": ("8 directions", EightDirections),
    "dropout": ("dropout of 0.1", Dropout),
    "later": ("logit of times with mean 0.5", Later),
    "unguided": ("samples not guided", Unguided),
    "mirrored": ("half of the images mirrored", Mirrored),
}
LOSSES = {name: (name.replace("_", " "), ".4f") for name in ("flow_loss", "guide_loss", "validation_loss")}
COLUMNS = LOSSES | MEASURES


def main() -> None:
    options = prior_parser(__doc__, ROWS, 14)
    text = f"of the solver (default: {STEPS})"
    options.add_argument("--flow-steps", type=STEP_COUNT, metavar="N", default=STEPS, help=text)
    o = options.parse_args()
    if o.train:
        train_row(o)
        return
    words = ["--data", o.data, "--vqvae", o.vqvae, "--flow-steps", str(o.flow_steps), "--precision", o.precision]
    train_missing(HERE, o, words, dict.fromkeys(ROWS, o.epochs))
    print_last_epochs(o, "flow", ROWS, COLUMNS)


def train_row(o: argparse.Namespace) -> None:
    words = ["--data", o.data, "--out", o.out, "--only", "flow", "--vqvae", o.vqvae]
    words += ["--flow-epochs", str(o.epochs), "--flow-steps", str(o.flow_steps), "--seed", str(o.seeds[0])]
    words += ["--precision", o.precision]
    run, train_set, validate_set = begin(words)
    fit(ROWS[o.train][1](run, train.copy_vqvae(run), train_set, validate_set, n_measures=1), run)


if __name__ == "__main__":
    console.run_program(main, "flow_ablation.py")
