"""What limits a VQ-VAE's reconstructions: quantization or the networks, the brain or the background around it.

    python benchmarks/limits.py PATH/vqvae.pth --data DIR        # every fourth image of the validation split

SSIM is scikit-image's map of 7x7 windows; windows whose pixels are all at most 0.02 are background. What the DCGAN
keeps is what `LatentScale` maps there and back. The second table says in how many directions of latent space the images
are: latents are cut to the first k directions of greatest mean square, as seen from the background's embedding, then
quantized and decoded.
"""

import argparse
import sys
from pathlib import Path

HERE = Path(__file__).resolve()
sys.path.insert(0, str(HERE.parent.parent))

import torch
import torch.nn.functional as F
from skimage.metrics import structural_similarity

from dataset import OasisDataset
from evaluation import reconstruction
from modules import VQVAE, rows
from support import console
from training.scale import LatentScale
from training.vqvae import load_vqvae

BACKGROUND = 0.02


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("path", metavar="PATH", help="vqvae.pth")
    parser.add_argument("--data", metavar="DIR", required=True, help="OASIS folder")
    o = parser.parse_args()
    vqvae = load_vqvae(o.path)
    dataset = OasisDataset(o.data, "validate")
    scale = LatentScale.fit(vqvae, OasisDataset(o.data, "train"))
    names = ("codes", "the encoder's output, not quantized", "codes of what the DCGAN keeps")
    measured = {name: [] for name in names}
    share = []
    for i in range(0, len(dataset), 4):
        x = dataset[i][None]
        background = F.max_pool2d(x, 7, 1)[0, 0].numpy() <= BACKGROUND
        share.append(background.mean())
        z_e = vqvae.latents(x)
        through = scale.latents(scale.clipped(scale.coefficients(z_e)))
        codes, kept = (vqvae.vector_quantizer.nearest(z) for z in (z_e, through))
        decoded = (vqvae.decode(codes), vqvae.decoder(z_e), vqvae.decode(kept))
        for row, x_hat in zip(measured.values(), decoded, strict=True):
            by_window = structural_similarity(x[0, 0].numpy(), x_hat[0, 0].numpy(), data_range=1.0, full=True)[1]
            by_window = by_window[3:-3, 3:-3]  # windows that lie inside the image, as in the mean
            parts = by_window.mean(), by_window[~background].mean(), by_window[background].mean()
            row.append([*parts, reconstruction.psnr(x, x_hat).item()])
    print(f"{len(share)} validation images; {100 * sum(share) / len(share):.0f} % of windows are background\n")
    print("| decoded from | SSIM | in the brain | in the background | PSNR / dB |\n|---|---:|---:|---:|---:|")
    for name, row in measured.items():
        mean = torch.tensor(row).mean(0).tolist()
        print(f"| {name} | " + " | ".join(f"{value:.4f}" for value in mean[:3]) + f" | {mean[3]:.2f} |")
    print_directions(vqvae, dataset.batch(range(0, len(dataset), 4)))


def print_directions(vqvae: VQVAE, images: torch.Tensor) -> None:
    z_e = torch.cat([vqvae.latents(x) for x in images.split(16)])
    quantizer = vqvae.vector_quantizer
    codes, latents = quantizer.nearest(z_e).flatten(), rows(z_e)
    background = codes.mode().values
    difference = (latents - quantizer.embedding.weight[background]).double()
    foreground = difference[codes != background]
    values, directions = torch.linalg.eigh(foreground.T @ foreground / len(foreground))
    values, directions = values.flip(0), directions.flip(1)
    print("\n| directions | share of the mean square | root mean square of the last | SSIM |\n|---:|---:|---:|---:|")
    for k in (1, 2, 3, 4, 6, 8, len(values)):
        kept = difference @ directions[:, :k] @ directions[:, :k].T + quantizer.embedding.weight[background]
        kept = kept.float().view(len(images), 64, 64, -1).permute(0, 3, 1, 2)
        decoded = [vqvae.decode(quantizer.nearest(part)) for part in kept.split(16)]
        ssim = reconstruction.ssim(images, torch.cat(decoded)).mean()
        share = values[:k].sum() / values.sum()
        print(f"| {k} | {share:.4f} | {values[k - 1].clamp(min=0).sqrt():.3f} | {ssim:.4f} |")


if __name__ == "__main__":
    console.run_program(main, "limits.py")
