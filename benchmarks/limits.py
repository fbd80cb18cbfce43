"""What limits a VQ-VAE's reconstructions: quantization or the networks, the brain or the background around it.

    python benchmarks/limits.py PATH/vqvae.pth --data DIR        # every fourth image of the validation split

SSIM is scikit-image's map of 7x7 windows; windows whose pixels are all at most 0.02 are background.
"""

import argparse
import sys
from pathlib import Path

HERE = Path(__file__).resolve()
sys.path.insert(0, str(HERE.parent.parent))

import torch
import torch.nn.functional as F
from skimage.metrics import structural_similarity

import metrics
import runs
from dataset import DataError, OasisDataset
from modules import VQVAE

BACKGROUND = 0.02


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("path", metavar="PATH", help="vqvae.pth")
    parser.add_argument("--data", metavar="DIR", required=True, help="OASIS folder")
    o = parser.parse_args()
    vqvae = runs.load(Path(o.path), VQVAE.from_state_dict)
    dataset = OasisDataset(o.data, "validate", progress=runs.progress)
    rows = {"decoded from codes": [], "decoded from the encoder's output": []}
    share = []
    for i in range(0, len(dataset), 4):
        x = dataset[i][None]
        background = F.max_pool2d(x, 7, 1)[0, 0].numpy() <= BACKGROUND
        share.append(background.mean())
        z_e = vqvae.latents(x)
        decoded = (vqvae.decode(vqvae.vector_quantizer.nearest(z_e)), vqvae.decoder(z_e))
        for row, x_hat in zip(rows.values(), decoded, strict=True):
            by_window = structural_similarity(x[0, 0].numpy(), x_hat[0, 0].numpy(), data_range=1.0, full=True)[1]
            by_window = by_window[3:-3, 3:-3]  # windows that lie inside the image, as in the mean
            parts = by_window.mean(), by_window[~background].mean(), by_window[background].mean()
            row.append([*parts, metrics.psnr(x, x_hat).item()])
    print(f"{len(share)} validation images; {100 * sum(share) / len(share):.0f} % of windows are background\n")
    print("| | SSIM | in the brain | in the background | PSNR / dB |\n|---|---:|---:|---:|---:|")
    for name, row in rows.items():
        mean = torch.tensor(row).mean(0).tolist()
        print(f"| {name} | " + " | ".join(f"{value:.4f}" for value in mean[:3]) + f" | {mean[3]:.2f} |")


if __name__ == "__main__":
    try:
        main()
    except (DataError, runs.RunError) as error:
        sys.exit(f"limits.py: error: {error}")
