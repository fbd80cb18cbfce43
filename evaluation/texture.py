"""Texture of images, and the features with which `evaluation.two_sample` compares sets of images."""

import math
from collections.abc import Hashable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from modules import VQVAE
from support.console import stop_if_signalled
from support.device import exact_float32

# Grey level above which an image, blurred by a Gaussian of 4 pixels, shows the head: in the report's set 99.8 % of the
# brain's pixels, ventricles and skull included, and 1 % of the noise around it.
HEAD = 0.08
BANDS = (1 / 64, 1 / 32, 1 / 16, 1 / 8, 1 / 4, 1 / 2)  # cycles per pixel: the limits of five octaves
PYRAMID_LEVELS = 5  # 256, 128, 64, 32 and 16 pixels
WINDOW, SQUARES = 64, 4  # size of a window of texture in pixels; an image is 4x4 of them


class Features(NamedTuple):
    """What the measures need of N images.

    Attributes:
        subjects: the subject of each image.
        coherence: (N,), the mean `coherence` inside the head.
        moments: what `encoder_moments` returns.
        anatomy: (N, 4096), the images four times smaller.
        windows, window_image: features (M, F) of the texture of windows inside heads, and the image (M,) of each. The
            columns are `log_band_powers`, coherence, and means and standard deviations of the encoder's channels.
    """

    subjects: list[Hashable]
    coherence: Tensor
    moments: Tensor
    anatomy: Tensor
    windows: Tensor
    window_image: Tensor


@torch.no_grad()
@exact_float32()
def features(vqvae: VQVAE, images: Tensor, subjects: Sequence[Hashable]) -> Features:
    """The features of images (N, 1, 256, 256) uint8, float64 on the CPU."""
    device = vqvae.conv1.weight.device
    parts = []
    for part in images.split(32):
        part = part.to(device).float() / 255
        inside = head(part)
        direction = coherence(part)
        moments = encoder_moments(vqvae, part)
        cut = [_windows(each) for each in (part, inside, direction)]  # (B, 4, 4, 64, 64) each
        chosen = cut[1].mean((3, 4)) >= 0.9
        powers = log_band_powers(cut[0].reshape(-1, 1, WINDOW, WINDOW)).view(*chosen.shape, -1)
        windows = torch.cat([powers, cut[2].mean((3, 4))[..., None], moments], 3)[chosen]
        small = F.avg_pool2d(part, 4).flatten(1)
        counts = chosen.sum((1, 2))
        means = (direction * inside).sum((1, 2, 3)) / inside.sum((1, 2, 3)).clamp(min=1)
        parts.append([*(each.cpu().double() for each in (means, moments, small, windows)), counts.cpu()])
        stop_if_signalled()
    *columns, counts = (torch.cat(column) for column in zip(*parts, strict=True))
    return Features(list(subjects), *columns, torch.arange(len(images)).repeat_interleave(counts))


def _windows(images: Tensor) -> Tensor:
    """Images (N, 1, 256, 256) cut into windows: (N, 4, 4, 64, 64)."""
    return images[:, 0].unfold(1, WINDOW, WINDOW).unfold(2, WINDOW, WINDOW)


def head(images: Tensor) -> Tensor:
    """1 at each pixel of images (N, 1, H, W) that is near the head, else 0."""
    return (blur(images, 4) > HEAD).float()


def blur(images: Tensor, sigma: float) -> Tensor:
    """Images (N, 1, H, W) after a Gaussian of `sigma` pixels, cut at 3 sigma; images are mirrored at their borders."""
    reach = math.ceil(3 * sigma)
    kernel = torch.exp(-torch.arange(-reach, reach + 1, device=images.device).square() / (2 * sigma**2))
    kernel = kernel / kernel.sum()
    images = filtered(F.pad(images, (reach, reach, 0, 0), mode="reflect"), kernel[None])
    return filtered(F.pad(images, (0, 0, reach, reach), mode="reflect"), kernel[:, None])


def filtered(images: Tensor, kernel: Tensor) -> Tensor:
    """Images (N, 1, H, W) convolved with a kernel (h, w), without padding: (N, 1, H - h + 1, W - w + 1).

    N is at least 1. The images are passed as channels of one image, which is many times faster on a CPU.
    """
    n = len(images)
    return F.conv2d(images.transpose(0, 1), kernel.repeat(n, 1, 1, 1), groups=n).transpose(0, 1)


def coherence(images: Tensor) -> Tensor:
    """Coherence of the structure tensor at each pixel of images (N, 1, H, W), in [0, 1].

    (λ1 - λ2) / (λ1 + λ2) of the tensor's eigenvalues, with a Gaussian window of 4 pixels and central differences
    (Jähne, Digital Image Processing, section 13.3): 1 where all edges near a pixel run in one direction, as along the
    folds of the cortex, and near 0 in noise.
    """
    padded = F.pad(images, (1, 1, 1, 1), mode="replicate")
    x = (padded[:, :, 1:-1, 2:] - padded[:, :, 1:-1, :-2]) / 2
    y = (padded[:, :, 2:, 1:-1] - padded[:, :, :-2, 1:-1]) / 2
    xx, yy, xy = blur(x * x, 4), blur(y * y, 4), blur(x * y, 4)
    return torch.hypot(xx - yy, 2 * xy) / (xx + yy + 1e-8)


def log_band_powers(images: Tensor) -> Tensor:
    """log10 of the mean power of images (N, 1, S, S) in each octave of BANDS, by radial frequency: (N, 5)."""
    size = images.shape[-1]
    device = images.device
    window = torch.hann_window(size, periodic=False, device=device)
    varying = images[:, 0] - images.mean((2, 3))[:, :, None]  # the mean would leak into the lowest octave of a window
    power = torch.fft.fft2(varying * window[:, None] * window).abs().square() / size**2
    frequency = torch.fft.fftfreq(size, device=device)
    frequency = torch.hypot(frequency[:, None], frequency)
    octaves = [(frequency >= low) & (frequency < high) for low, high in zip(BANDS, BANDS[1:], strict=False)]
    return torch.stack([power[:, octave].mean(1) for octave in octaves], 1).clamp(min=1e-12).log10()


def laplacian_pyramid(images: Tensor) -> list[Tensor]:
    """Differences of images (N, 1, H, W) to their blurred halves, finest first; last what remains (Burt, Adelson 1983).

    The filter is (1, 4, 6, 4, 1) / 16 along both axes, images are mirrored at their borders.
    """
    kernel = torch.tensor([1.0, 4.0, 6.0, 4.0, 1.0], device=images.device) / 16
    kernel = kernel[:, None] * kernel

    def smoothed(x: Tensor) -> Tensor:
        return filtered(F.pad(x, (2, 2, 2, 2), mode="reflect"), kernel)

    levels = []
    for _ in range(PYRAMID_LEVELS - 1):
        half = smoothed(images)[:, :, ::2, ::2]
        spread = torch.zeros_like(images)
        spread[:, :, ::2, ::2] = 4 * half
        levels.append(images - smoothed(spread))
        images = half
    return [*levels, images]


def encoder_moments(vqvae: VQVAE, images: Tensor) -> Tensor:
    """Mean and standard deviation of the encoder's D channels in 4x4 squares of images: (N, 4, 4, 2·D)."""
    z = vqvae.latents(images)
    size = z.shape[-1] // SQUARES
    mean = F.avg_pool2d(z, size)
    square = F.avg_pool2d(z.square(), size)
    std = (square - mean.square()).clamp(min=0).sqrt()
    return torch.cat([mean, std], 1).permute(0, 2, 3, 1)
