"""What limits a VQ-VAE's reconstructions: the networks, quantization, or what the DCGAN keeps of the latents.

    python benchmarks/limits.py PATH/vqvae.pth --data DIR        # every fourth image of the validation split

Decoded images are cut to [0, 1], as new slices are. The brain is where the label maps beside the scans are above 0.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from torch import Tensor

from dataset import OasisDataset
from evaluation import reconstruction
from evaluation.reconstruction import INSIDE
from modules import VQVAE
from priors.checkpoints import load_vqvae
from priors.latent_space import LatentSpace
from support import console
from support.console import UserError
from training.recipes import BALANCED

DIRECTIONS = (2, 3, 4, 64)  # the last are all


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("path", metavar="PATH", help="vqvae.pth")
    parser.add_argument("--data", metavar="DIR", required=True, help="OASIS folder")
    o = parser.parse_args()
    vqvae = load_vqvae(o.path)
    dataset = OasisDataset(o.data, "validate", with_labels=True)
    train_set = OasisDataset(o.data, "train")
    if dataset.labels is None:
        raise UserError(f"{o.data}: has no label maps of the validation split, by which the brain is found")
    spaces = {k: LatentSpace.fit(vqvae, train_set, k, BALANCED.emphasis) for k in DIRECTIONS}
    scores = {}
    for i in range(0, len(dataset), 4):
        x = dataset[i][None]
        brain = dataset.labels[i][INSIDE, INSIDE] > 0
        for name, x_hat in decoded(vqvae, x, spaces).items():
            ssim = reconstruction.ssim_map(x, x_hat.clamp(0, 1))[0, INSIDE, INSIDE]
            scores.setdefault(name, []).append((ssim.mean().item(), ssim[brain].mean().item()))
    print("Every fourth validation image.\n\n| decoded from | SSIM | in the brain |\n|---|---:|---:|")
    for name, values in scores.items():
        whole, inside = torch.tensor(values).nanmean(0).tolist()
        print(f"| {name} | {whole:.4f} | {inside:.4f} |")


def decoded(vqvae: VQVAE, x: Tensor, spaces: dict[int, LatentSpace]) -> dict[str, Tensor]:
    """Images (B, 1, 256, 256) decoded from their codes, from z_e, and from the codes of what each space keeps."""
    nearest = vqvae.vector_quantizer.nearest
    z_e = vqvae.latents(x)
    images = {"codes": vqvae.decode(nearest(z_e)), "the encoder's output, not quantized": vqvae.decoder(z_e)}
    for k, space in spaces.items():
        images[f"codes of {k} directions"] = vqvae.decode(nearest(space.decode(space.clipped(space.encode(z_e)))))
    return images


if __name__ == "__main__":
    console.run_program(main, "limits.py")
