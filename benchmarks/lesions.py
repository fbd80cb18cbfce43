"""Whether a prior's map of surprise finds what does not belong in a brain.

    python benchmarks/lesions.py --data DIR PATH/vqvae.pth PATH/autoregressive.pth     # about a minute on two cores

Discs of 6 to 16 pixels, brighter or darker than the brain around them and blended at their rims, are planted inside the
brain of validation slices, at places that label maps allow. Positions of codes are ranked by the prior's -log2 p, mean
of 3x3 positions, and by the error of reconstruction, mean of as many pixels: the area under the curve (AUC) of
positions in the disc against those in the rest of the brain, over all slices.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import scipy.stats
import torch
import torch.nn.functional as F
from torch import Tensor

from dataset import OasisDataset, describe
from priors.autoregressive import plane_condition
from priors.checkpoints import load_autoregressive, load_vqvae
from priors.code_cache import CodeCache
from support import console
from training.options import COUNT

RIM = 2.0  # pixels in which a disc is blended
CONTRAST = (0.15, 0.35)  # grey values


def plant(image: Tensor, brain: Tensor, rng: torch.Generator) -> tuple[Tensor, Tensor]:
    """An image (256, 256) with a disc inside its brain (256, 256), and how much of each pixel is the disc's."""
    radius = 3 + 5 * torch.rand((), generator=rng).item()
    inside = -F.max_pool2d(-brain[None].float(), 17, 1, 8)[0] > 0  # at least 8 pixels from the brain's border
    places = (inside if inside.any() else brain).nonzero()
    row, column = places[int(torch.randint(len(places), (), generator=rng))].tolist()
    y = torch.arange(256.0)[:, None] - row
    x = torch.arange(256.0) - column
    disc = ((radius - torch.hypot(y, x)) / RIM + 0.5).clamp(0, 1)
    low, high = CONTRAST
    step = (low + (high - low) * torch.rand((), generator=rng)) * (1 if torch.rand((), generator=rng) < 0.5 else -1)
    return (image + disc * step).clamp(0, 1), disc


def auc(scores: Tensor, positive: Tensor) -> float:
    """Area under the ROC curve of scores (N,)."""
    n = positive.sum().item()
    return scipy.stats.mannwhitneyu(scores[positive], scores[~positive]).statistic / (n * (len(scores) - n))


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("vqvae", metavar="VQVAE", help="vqvae.pth")
    parser.add_argument("prior", metavar="PRIOR", help="autoregressive.pth")
    parser.add_argument("--data", metavar="DIR", required=True, help="OASIS folder, with label maps of validation")
    parser.add_argument("--every", metavar="N", type=COUNT, default=9, help="one validation image in N (default: 9)")
    parser.add_argument("--seed", metavar="S", type=console.SEED, default=0, help="of the discs (default: 0)")
    o = parser.parse_args()
    vqvae = load_vqvae(o.vqvae)
    prior = load_autoregressive(o.prior, vqvae)
    dataset = OasisDataset(o.data, "validate", with_labels=True)
    rng = torch.Generator().manual_seed(o.seed)
    if dataset.labels is None:
        raise console.UserError(f"{o.data}: has no label maps of the validation split")
    indices = [i for i in range(0, len(dataset), o.every) if (dataset.labels[i] > 0).sum() > 1000]
    if not indices:
        raise console.UserError(f"{o.data}: no slice of the validation split shows enough brain")
    pairs = [plant(dataset[i][0], dataset.labels[i] > 0, rng) for i in indices]
    x, discs = (torch.stack(side)[:, None] for side in zip(*pairs, strict=True))
    planes = CodeCache.planes_of([dataset.case_and_slice(i)[1] for i in indices])
    surprise, error = [], []
    for part, plane in zip(x.split(32), planes.split(32), strict=True):
        codes = vqvae.encode(part)
        surprise.append(F.avg_pool2d(prior.bits(codes, plane_condition(plane))[:, None], 3, 1, 1))
        error.append(F.avg_pool2d(F.avg_pool2d((vqvae.decode(codes) - part).square(), 4), 3, 1, 1))
    brain = F.avg_pool2d((dataset.labels[indices] > 0)[:, None].float(), 4) > 0.99
    disc = F.avg_pool2d(discs, 4)
    kept = brain & ((disc > 0.5) | (disc == 0))
    print(f"Data: {describe(dataset)}; {len(indices)} slices with a disc each, seed {o.seed}\n")
    print("| AUC of positions | |\n|---|---:|")
    for name, scores in (("-log2 p of the prior", surprise), ("error of reconstruction", error)):
        print(f"| {name} | {auc(torch.cat(scores)[kept], (disc > 0.5)[kept]):.3f} |")


if __name__ == "__main__":
    console.run_program(main, "lesions.py")
