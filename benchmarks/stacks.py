"""Whether planes that a prior draws are those that it was asked for, and whether the planes of a stack fit together.

    python benchmarks/stacks.py --data DIR PATH/vqvae.pth PATH/autoregressive.pth     # about two minutes on two cores

A linear reader of height, ridge regression of a slice's number on the slice four times smaller, is fitted on training
slices. It reads validation slices, their reconstructions and the planes of drawn stacks: R², and the mean error in
planes. Below, the mean correlation of the pixels of two planes of one head, by their distance.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
import torch.nn.functional as F
from torch import Tensor

from dataset import OasisDataset, describe
from modules import N_PLANES
from priors.checkpoints import load_autoregressive, load_vqvae
from support import console, seeds
from support.console import in_batches
from training.options import COUNT

RIDGE = 1e-2  # of the mean square of a feature
DISTANCES = (1, 2, 4, 8)


def small(images: Tensor) -> Tensor:
    """Images (N, 1, 256, 256) four times smaller, as rows (N, 4096) float64."""
    return F.avg_pool2d(images, 4).flatten(1).double()


def fit_reader(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Weights and offset of ridge regression of y (N,) on rows x (N, F)."""
    mean = x.mean(0)
    offset = y.mean()
    x = x - mean
    gram = x.T @ x
    gram.diagonal().add_(RIDGE * gram.diagonal().mean())
    weights = torch.linalg.solve(gram, x.T @ (y - offset))
    return weights, offset - mean @ weights


def correlations(stacks: Tensor) -> list[float]:
    """Mean correlation of planes of one head (N, S, …) at DISTANCES."""
    x = stacks.flatten(2).double()
    x = F.normalize(x - x.mean(2, keepdim=True), dim=2)
    return [(x[:, d:] * x[:, :-d]).sum(2).mean().item() for d in DISTANCES]


def print_row(name: str, stacks: Tensor, reader: tuple[Tensor, Tensor]) -> None:
    """Print what stacks (N, S, 1, 256, 256) of all planes are read as."""
    planes = torch.arange(stacks.shape[1]).double().repeat(len(stacks))
    error = small(stacks.flatten(0, 1)) @ reader[0] + reader[1] - planes
    r2 = 1 - error.square().mean() / planes.var(correction=0)
    shown = " | ".join(f"{value:.3f}" for value in correlations(stacks))
    print(f"| {name} | {r2:.3f} | {error.abs().mean():.2f} | {shown} |")


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("vqvae", metavar="VQVAE", help="vqvae.pth")
    parser.add_argument("prior", metavar="PRIOR", help="autoregressive.pth")
    parser.add_argument("--data", metavar="DIR", required=True, help="OASIS folder")
    parser.add_argument("--stacks", metavar="N", type=COUNT, default=8, help="heads (default: 8)")
    parser.add_argument("--seed", metavar="S", type=console.SEED, default=0, help="of the noise (default: 0)")
    o = parser.parse_args()
    vqvae = load_vqvae(o.vqvae)
    prior = load_autoregressive(o.prior, vqvae)
    train, validate = (OasisDataset(o.data, split) for split in ("train", "validate"))
    if None in [split.case_and_slice(i)[1] for split in (train, validate) for i in range(len(split))]:
        raise console.UserError(f"{o.data}: file names have no slice numbers")
    every = max(1, len(train) // 3000)
    x = torch.cat([small(part) for part in in_batches(train, range(0, len(train), every), desc="Training slices")])
    y = torch.tensor([train.case_and_slice(i)[1] for i in range(0, len(train), every)]).double()
    reader = fit_reader(x, y)

    heads: dict[int | str, dict[int, int]] = {}
    for i in range(len(validate)):
        heads.setdefault(validate.subject(i), {})[validate.case_and_slice(i)[1]] = i
    whole = [slices for slices in heads.values() if slices.keys() >= set(range(N_PLANES))][: o.stacks]
    if not whole:
        raise console.UserError(f"{o.data}: no head of the validation split has all {N_PLANES} planes")
    indices = [slices[plane] for slices in whole for plane in range(N_PLANES)]
    noise = prior.noise(o.stacks * N_PLANES, seeds.generator(o.seed, "samples")).unflatten(0, (o.stacks, -1))
    codes = prior.sample_stacks(noise, range(N_PLANES)).flatten(0, 1)
    print(f"Data: {describe(train, validate)}; {len(whole)} validation heads, {o.stacks} drawn, seed {o.seed}\n")
    print(
        "| stacks | R² of height | error / planes | " + " | ".join(f"correlation, {d} apart" for d in DISTANCES) + " |"
    )
    print("|---|" + "---:|" * (2 + len(DISTANCES)))
    for name, images in (
        ("validation", validate.batch(indices)),
        ("reconstructed", torch.cat([vqvae(part)[1].clamp(0, 1) for part in validate.batch(indices).split(32)])),
        ("drawn", torch.cat([prior.decode(part) for part in codes.split(32)])),
    ):
        print_row(name, images.unflatten(0, (-1, N_PLANES)), reader)


if __name__ == "__main__":
    console.run_program(main, "stacks.py")
