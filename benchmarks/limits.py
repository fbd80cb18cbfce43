"""What limits a VQ-VAE's reconstructions: quantization or the networks, and where in the image.

    python benchmarks/limits.py PATH/vqvae.pth --data DIR        # every fourth image of the validation split

SSIM is scikit-image's map of 7x7 windows, averaged over the windows around the brain's pixels (by the label maps beside
the scans, which must be there), around other pixels of the plane that are above 0 (skull, scalp, noise), around pixels
that are 0 inside the plane, and around those of the frame outside it. What the DCGAN keeps is what `LatentSpace` maps
there and back. Decoded images are cut to [0, 1], as new slices are. The second table says in how many directions of
latent space the images are: latents are cut to the first k directions of greatest mean square, as seen from the
background's embedding, then quantized and decoded.
"""

import argparse
import sys
from pathlib import Path

HERE = Path(__file__).resolve()
sys.path.insert(0, str(HERE.parent.parent))

import torch

from dataset import OasisDataset, picture_box
from evaluation import reconstruction
from evaluation.reconstruction import BORDER
from modules import VQVAE, rows
from priors.checkpoints import load_vqvae
from priors.latent_space import LatentSpace
from support import console
from support.console import UserError

REGIONS = ("the image", "the brain", "skull, scalp and noise", "black in the plane", "the frame")


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("path", metavar="PATH", help="vqvae.pth")
    parser.add_argument("--data", metavar="DIR", required=True, help="OASIS folder")
    o = parser.parse_args()
    vqvae = load_vqvae(o.path)
    dataset = OasisDataset(o.data, "validate", with_labels=True)
    train_set = OasisDataset(o.data, "train")
    labels = dataset.labels
    if labels is None:
        raise UserError(f"{o.data}: has no label maps of the validation split, by which the brain is found")
    space = LatentSpace.fit(vqvae, train_set)
    frame = torch.ones(256, 256, dtype=torch.bool)
    frame[picture_box(dataset.images, margin=0)] = False
    ways = ("codes", "the encoder's output, not quantized", "codes of what the DCGAN keeps")
    measured = {name: [] for name in ways}
    shares = []
    for i in range(0, len(dataset), 4):
        x = dataset[i][None]
        brain = labels[i] > 0
        black = x[0, 0] == 0
        masks = torch.stack([torch.ones_like(brain), brain, ~brain & ~black, black & ~frame, frame])
        masks = masks[:, BORDER:-BORDER, BORDER:-BORDER]
        shares.append(masks.double().mean((1, 2)))
        z_e = vqvae.latents(x)
        through = space.decode(space.clipped(space.encode(z_e)))
        codes, kept = (vqvae.vector_quantizer.nearest(z) for z in (z_e, through))
        decoded = (vqvae.decode(codes), vqvae.decoder(z_e), vqvae.decode(kept))
        for row, x_hat in zip(measured.values(), decoded, strict=True):
            x_hat = x_hat.clamp(0, 1)
            similarity = reconstruction.ssim_map(x, x_hat)[0, BORDER:-BORDER, BORDER:-BORDER]
            row.append([similarity[mask].mean().item() for mask in masks] + [reconstruction.psnr(x, x_hat).item()])
    print(f"{len(shares)} validation images; SSIM by where the window's middle lies\n")
    print("| decoded from | " + " | ".join(REGIONS) + " | PSNR / dB |\n|---|" + "---:|" * (len(REGIONS) + 1))
    print("| share of windows | " + " | ".join(f"{share:.1%}" for share in torch.stack(shares).mean(0)) + " | |")
    for name, row in measured.items():
        mean = torch.tensor(row).nanmean(0).tolist()
        print(f"| {name} | " + " | ".join(f"{value:.4f}" for value in mean[:-1]) + f" | {mean[-1]:.2f} |")
    print_directions(vqvae, dataset.batch(range(0, len(dataset), 4)))


def print_directions(vqvae: VQVAE, images: torch.Tensor) -> None:
    z_e = torch.cat([vqvae.latents(x) for x in images.split(16)])
    quantizer = vqvae.vector_quantizer
    codes = quantizer.nearest(z_e).flatten()
    latents = rows(z_e)
    background = codes.mode().values
    difference = (latents - quantizer.embedding.weight[background]).double()
    foreground = difference[codes != background]
    values, directions = torch.linalg.eigh(foreground.T @ foreground / len(foreground))
    values = values.flip(0)
    directions = directions.flip(1)
    print("\n| directions | share of the mean square | root mean square of the last | SSIM |\n|---:|---:|---:|---:|")
    for k in (1, 2, 3, 4, 6, 8, len(values)):
        kept = difference @ directions[:, :k] @ directions[:, :k].T + quantizer.embedding.weight[background]
        kept = kept.float().view(len(images), 64, 64, -1).permute(0, 3, 1, 2)
        decoded = [vqvae.decode(quantizer.nearest(part)).clamp(0, 1) for part in kept.split(16)]
        ssim = reconstruction.ssim(images, torch.cat(decoded)).mean()
        share = values[:k].sum() / values.sum()
        print(f"| {k} | {share:.4f} | {values[k - 1].clamp(min=0).sqrt():.3f} | {ssim:.4f} |")


if __name__ == "__main__":
    console.run_program(main, "limits.py")
