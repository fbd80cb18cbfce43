"""SSIM against bits an image: standard codecs beside the codes of trained VQ-VAEs.

    python benchmarks/rate_codecs.py --data DIR PATH/vqvae.pth ... --out FOLDER     # about five minutes on two cores

Codecs are those of Pillow: JPEG, WebP, JPEG 2000 and AVIF, in grey where they have it, at several qualities; bits are
those of the whole file. SSIM is the mean over every seventh validation image, for every side. A VQ-VAE's bits are those
of `evaluation.reconstruction.codebook_usage`, counted on the whole split, for an adaptive coder has to learn.

FOLDER gets rate_codecs.png. Tables are printed: the bits with which each codec reaches some SSIM, between two qualities
on a straight line of SSIM against the logarithm of bits, and those of each VQ-VAE. At some qualities JPEG decodes black
to a grey level above 0, and SSIM falls by up to 0.06; such qualities count as the best one below them.
"""

import argparse
import io
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch
from PIL import Image

from dataset import OasisDataset, describe
from evaluation import reconstruction
from priors.autoregressive import likelihoods
from priors.checkpoints import load_autoregressive, load_vqvae
from priors.code_cache import CodeCache
from report.plots import Figures
from support import console
from training.options import COUNT

TARGETS = (0.95, 0.97, 0.975, 0.98)
CODECS = {
    "JPEG": [{"format": "JPEG", "quality": q, "optimize": True} for q in (20, 25, 30, 35, 45, 50, 60, 70, 80)],
    "WebP": [{"format": "WEBP", "quality": q, "method": 6} for q in (15, 30, 45, 60, 75, 85)],
    "JPEG 2000": [
        {"format": "JPEG2000", "quality_mode": "dB", "quality_layers": [db], "irreversible": True}
        for db in (34, 36, 38, 40, 42, 44)
    ],
    "AVIF": [{"format": "AVIF", "quality": q, "subsampling": "4:0:0", "speed": 4} for q in (25, 30, 40, 50, 60, 70)],
}
BITS = {
    "bits_raw": "9 bits a code",
    "bits_entropy": "entropy of all codes",
    "bits_adaptive": "adaptive, by position",
    "bits_entropy_by_position": "entropy by position (no coder reaches it)",
}


def coded(image: np.ndarray, settings: dict) -> tuple[int, np.ndarray]:
    """The bits of the file of an image (H, W) uint8, and the image that it decodes to, (H, W) uint8."""
    file = io.BytesIO()
    Image.fromarray(image).save(file, **settings)
    with Image.open(file) as decoded:
        return 8 * file.getbuffer().nbytes, np.asarray(decoded.convert("L"))


def codec_curve(images: torch.Tensor, qualities: list[dict]) -> tuple[list[float], list[float]]:
    """Mean bits and mean SSIM of images (N, 1, H, W) uint8 at each quality."""
    bits, ssim = [], []
    for settings in qualities:
        sizes, decoded = zip(*(coded(image[0], settings) for image in images.numpy()), strict=True)
        bits.append(float(np.mean(sizes)))
        ssim.append(reconstruction.ssim(images / 255, torch.from_numpy(np.stack(decoded))[:, None] / 255).mean().item())
    return bits, ssim


def bits_at(target: float, bits: list[float], ssim: list[float]) -> float | None:
    """The bits at which the best SSIM so far of a curve of rising bits reaches `target`; None outside its range."""
    rising = [i for i, value in enumerate(ssim) if value > max(ssim[:i], default=-1)]
    x, y = (np.array(values)[rising] for values in (ssim, bits))
    if not x[0] <= target <= x[-1]:
        return None
    return float(np.exp(np.interp(target, x, np.log(y))))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("paths", metavar="PATH", nargs="*", help="vqvae.pth")
    parser.add_argument("--prior", metavar="PATH", help="autoregressive.pth of the first VQ-VAE")
    parser.add_argument("--data", metavar="DIR", required=True, help="OASIS folder")
    parser.add_argument("--out", metavar="FOLDER", type=Path, required=True, help="folder of the figure, which exists")
    parser.add_argument(
        "--every", metavar="N", type=COUNT, default=7, help="one validation image in N (default: 7, to see all planes)"
    )
    o = parser.parse_args()
    if not o.out.is_dir():
        parser.error(f"--out {o.out}: no such folder")
    if o.prior and not o.paths:
        parser.error("--prior belongs to a VQ-VAE; name its vqvae.pth")
    vqvaes = {path: load_vqvae(path) for path in o.paths}
    prior = load_autoregressive(o.prior, vqvaes[o.paths[0]]) if o.prior else None
    dataset = OasisDataset(o.data, "validate")
    indices = range(0, len(dataset), o.every)
    images = dataset.images[indices]
    black = reconstruction.ssim(images / 255, torch.zeros(images.shape)).mean().item()
    print(f"Data: {describe(dataset)}; SSIM of {len(images)} images; a black image has {black:.3f}\n")

    curves = {name: codec_curve(images, qualities) for name, qualities in CODECS.items()}
    print("| bits an image at SSIM | " + " | ".join(map(str, TARGETS)) + " |\n|---|" + "---:|" * len(TARGETS))
    for name, curve in curves.items():
        cells = [bits_at(target, *curve) for target in TARGETS]
        print(f"| {name} | " + " | ".join("" if bits is None else f"{bits:,.0f}" for bits in cells) + " |")

    print("\n| VQ-VAE | SSIM | " + " | ".join(BITS.values()) + " |\n|---|" + "---:|" * (1 + len(BITS)))
    for path, vqvae in vqvaes.items():
        scores = reconstruction.score(vqvae, dataset)
        usage = reconstruction.codebook_usage(scores)
        ssim = scores.ssim[indices].mean().item()
        print(f"| {path} | {ssim:.4f} | " + " | ".join(f"{usage[key]:,.0f}" for key in BITS) + " |")
        for key in BITS:
            curve = curves.setdefault(f"codes, {BITS[key]}", ([], []))
            curve[0].append(usage[key])
            curve[1].append(ssim)
    if prior:
        by_condition = likelihoods(prior, CodeCache(prior.vqvae, dataset), torch.tensor(indices))
        for name, bits in by_condition.items():
            print(f"prior over the codes of {o.paths[0]}, {name}: {bits.mean():,.0f} bits an image")
            curves[f"prior over codes, {name}"] = [bits.mean().item()], [curves["codes, adaptive, by position"][1][0]]
    title = f"SSIM and bits of {len(images)} validation images (an image has 524,288)"
    Figures(o.out, dataset.phantoms).curves("rate_codecs.png", curves, title, "bits an image (log scale)", {})


if __name__ == "__main__":
    console.run_program(main, "rate_codecs.py")
