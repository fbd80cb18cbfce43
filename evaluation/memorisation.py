"""Whether generated images are copies of training images."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from scipy.special import betaincinv  # scipy.stats takes half a second to import
from torch import Tensor

from evaluation.texture import blur
from evaluation.two_sample import Interval, interval, numbered, resample
from support import console

SHIFT = 2  # pixels by which a copy may be moved along each axis
# Pixels of the Gaussian after which images are compared. Otherwise blurred images, which lack noise, would be nearer to
# everything than held-out ones: 9 % of slices blurred by a pixel were near, and are 0.9 % now.
SMOOTHING = 2.0
# Only CANDIDATES images, the nearest when all are reduced by a factor of SMALLER, are compared pixel by pixel. For 200
# slices that were copied and moved by 2 pixels along both axes, the source was always among the first 4 (reduced by 4
# instead of 8, where neighbouring planes of a head are as near: for 197).
SMALLER, CANDIDATES = 8, 4
CHANCE = 0.01  # share of the held-out images that count as near: a perfect generator has as many
AT_ONCE = 32  # images at once, whose candidates take 34 MB


class Nearest(NamedTuple):
    """For each of N images, the nearest of others.

    Attributes:
        index: (N,) int64, its index among the others.
        distance: (N,) float64 in [0, 1]: the least ‖x - a·y‖ / ‖x‖ of smoothed images over factors a and shifts of y.
        rows, columns: (N,) int64, the shift in pixels at which it is nearest.
        brightness: (N,) float64, the factor a.
    """

    index: Tensor
    distance: Tensor
    rows: Tensor
    columns: Tensor
    brightness: Tensor


class Copies(NamedTuple):
    """Which fake images are near training images.

    Attributes:
        fake, real: the nearest training image of each fake image, and of each held-out one.
        threshold: the distance that CHANCE of the held-out images are below.
        near: (N,) bool, whether a fake image is as near as that.
        share: of the fake images.
    """

    fake: Nearest
    real: Nearest
    threshold: float
    near: Tensor
    share: Interval


def find_copies(fake, real, train, rng: torch.Generator) -> Copies:
    """Compare the distances from fake images to training images with those from held-out images to them.

    Each is an `evaluation.generation.Images`; `real` has other subjects than `train`. The interval is over samples of
    as many subjects on both sides, and at least that of a binomial distribution (Clopper and Pearson 1934).
    """
    sides = [nearest(images.pixels, train.pixels) for images in (fake, real)]
    weights = [resample(numbered(images.subjects), rng) for images in (fake, real)]
    thresholds = _quantile(sides[1].distance, weights[1])
    near = sides[0].distance <= thresholds[:, None]
    share = interval((near * weights[0]).sum(1) / weights[0].sum(1))
    # samples of none, or of all, are of none or all: at least as wide as for images drawn one by one
    low, high = exact_interval(int(near[0].sum()), len(near[0]))
    if share.low is not None:
        share = Interval(share.value, min(share.low, low), max(share.high, high))
    return Copies(*sides, thresholds[0].item(), near[0], share)


def exact_interval(k: int, n: int) -> tuple[float, float]:
    """The 95 % confidence interval of a proportion, k successes in n trials (Clopper and Pearson 1934)."""
    low = betaincinv(k, n - k + 1, 0.025) if k > 0 else 0.0
    high = betaincinv(k + 1, n - k, 0.975) if k < n else 1.0
    return float(low), float(high)


def _quantile(values: Tensor, weights: Tensor) -> Tensor:
    """The CHANCE quantile of values (N,) in each of R samples with weights (R, N): (R,)."""
    values, order = values.sort()
    share = weights[:, order].cumsum(1) / weights.sum(1, keepdim=True)
    return values[(share > CHANCE).int().argmax(1)]


@torch.no_grad()
def nearest(images: Tensor, others: Tensor) -> Nearest:
    """For each of images (N, 1, H, W) uint8, the nearest of others (M, 1, H, W) uint8, up to a factor of brightness.

    The others may be shifted by up to SHIFT pixels. Only CANDIDATES of them, those with the highest cosine similarity
    when both are SMALLER times smaller, are compared pixel by pixel.
    """
    batches = []
    small = _normalised(others)
    for part in console.in_parts(images, AT_ONCE, "Looking for copies"):
        candidates = (_normalised(part) @ small.T).topk(min(CANDIDATES, len(others))).indices
        batches.append(_among(part, others, candidates))
    return Nearest(*(torch.cat(parts) for parts in zip(*batches, strict=True)))


def _normalised(images: Tensor) -> Tensor:
    """Images (N, 1, H, W) uint8 SMALLER times smaller, as vectors of length 1: (N, H·W / SMALLER²)."""
    small = torch.empty(len(images), images[0].numel() // SMALLER**2)
    for place, part in zip(small.split(AT_ONCE), images.split(AT_ONCE), strict=True):
        place.copy_(F.avg_pool2d(part.cpu().float(), SMALLER).flatten(1))
    return F.normalize(small)


def _among(images: Tensor, others: Tensor, candidates: Tensor) -> tuple[Tensor, ...]:
    """`Nearest` of images (B, 1, H, W), of the others whose numbers are candidates (B, K)."""
    inside = slice(SHIFT, -SHIFT)  # of an image; so a candidate that is moved still covers it
    x = blur(images.cpu().float(), SMOOTHING)[:, 0, inside, inside]
    height, width = x.shape[1:]
    y = others[candidates.flatten().to(others.device)].cpu().float()
    y = blur(y, SMOOTHING).unflatten(0, candidates.shape)[:, :, 0]  # (B, K, H, W)
    squares = F.avg_pool2d(y.square(), (height, width), 1) * height * width  # (B, K, 5, 5), by shift
    products = torch.empty_like(squares)
    for row in range(2 * SHIFT + 1):
        for column in range(2 * SHIFT + 1):
            moved = y[:, :, row : row + height, column : column + width]
            products[:, :, row, column] = (x[:, None] * moved).sum((2, 3))
    size = x.double().square().sum((1, 2))
    products = products.double().flatten(1)
    squares = squares.double().flatten(1).clamp(min=1)
    explained, best = (products.square() / squares).max(1)
    distance = (1 - explained / size.clamp(min=1)).clamp(min=0).sqrt()
    candidate, row, column = torch.unravel_index(best, (candidates.shape[1], 2 * SHIFT + 1, 2 * SHIFT + 1))
    factor = (products / squares).gather(1, best[:, None])[:, 0]
    return candidates.gather(1, candidate[:, None])[:, 0], distance, SHIFT - row, SHIFT - column, factor
