"""Measures of generated images. None of them needs a downloaded network."""

import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from evaluation.reconstruction import FOREGROUND, reconstruct
from evaluation.texture import features, filtered, laplacian_pyramid
from evaluation.two_sample import Interval, compare, mean_indices
from support import seeds
from support.console import in_batches
from support.device import exact_float32

PATCH, PATCHES_PER_IMAGE, PROJECTIONS = 7, 128, 512
# Images a side that are measured, at most. More take longer, and the intervals hardly shrink, for they are over
# subjects.
MOST_MEASURED = 256
MS_SSIM_WEIGHTS = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)

HELD_OUT, TRAINED = "reconstructed held-out images", "reconstructed training images"
DISTANCES = {f"swd_{256 >> level}": f"sliced Wasserstein distance, {256 >> level} pixels" for level in range(5)} | {
    "swd_mean": "sliced Wasserstein distance, mean",
    "grey_values": "distance of grey values",
}
INDICES = {
    "coherence": "coherence of the structure tensor in the head",
    "kurtosis_256": "kurtosis of detail in the head, 256 pixels",
    "kurtosis_128": "kurtosis of detail in the head, 128 pixels",
    **{f"power_{2 * n}_{n}": f"log10 of power, periods of {2 * n} to {n} pixels" for n in (32, 16, 8, 4, 2)},
    "outside": "energy outside the head, times 10⁶",
    "dimmest": "brightness, 5th percentile",
}
COMPARISONS = {
    "texture_auc": "AUC of texture, windows of 64 pixels",
    "anatomy_auc": "AUC of anatomy, images four times smaller",
    "kernel_distance": "kernel distance of the encoder's moments",
    "density": "density",
    "coverage": "coverage",
}


class Row(NamedTuple):
    """A measure of generated images, what to compare it with and what that is of, and that of independent codes."""

    name: str
    generated: Interval
    beside: Interval
    independent: Interval
    what: str


@exact_float32()
def sliced_wasserstein(real: Tensor, fake: Tensor, rng: torch.Generator) -> Tensor:
    """Sliced Wasserstein distance of Laplacian-pyramid patches (Karras et al. 2018, arXiv 1710.10196, section 5).

    At each level of the pyramid, 128 patches of 7x7 pixels an image are normalised and projected on 512 random
    directions; in each direction the distance is that of the sorted values. Both sides are normalised by the mean and
    standard deviation of the real patches (in the paper each by its own), so that brightness and contrast count, and
    patches are taken at the same places of both, so that equal sides have distance 0.

    `real` and `fake` are equally many images (N, 1, 256, 256); `rng`, on the CPU, draws places and directions.

    Returns:
        (5,) float64, times 10³: the levels of 256, 128, 64, 32 and 16 pixels.
    """
    if real.shape != fake.shape:
        raise ValueError(f"both sides must be equally many images, not {tuple(real.shape)} and {tuple(fake.shape)}")
    directions = torch.randn(PATCH * PATCH, PROJECTIONS, generator=rng)
    directions = (directions / directions.norm(dim=0)).to(real.device)
    levels = []
    for a, b in zip(laplacian_pyramid(real), laplacian_pyramid(fake), strict=True):
        n, _, h, w = a.shape
        top, left = (
            torch.randint(size - PATCH + 1, (n, PATCHES_PER_IMAGE), generator=rng).to(a.device) for size in (h, w)
        )
        a, b = _patches(a, top, left), _patches(b, top, left)
        mean, std = a.mean(), a.std()
        a, b = (_sorted(((side - mean) / std @ directions).T.contiguous()) for side in (a, b))
        difference = (a - b).abs()
        levels.append(difference.mean().cpu().double())  # MPS has no float64
    return 1000 * torch.stack(levels)


def _patches(images: Tensor, top: Tensor, left: Tensor) -> Tensor:
    """The 7x7 patches at (N, P) places of images (N, 1, H, W): (N·P, 49)."""
    inside = torch.arange(PATCH, device=images.device)
    image = torch.arange(len(images), device=images.device)[:, None, None, None]
    rows, columns = top[:, :, None, None] + inside[:, None], left[:, :, None, None] + inside
    return images[:, 0][image, rows, columns].reshape(-1, PATCH * PATCH)


def _sorted(x: Tensor) -> Tensor:
    """Each row of x (N, M) in ascending order. On a CPU, NumPy is several times faster."""
    return torch.from_numpy(np.sort(x.numpy())) if x.device.type == "cpu" else x.sort().values


@exact_float32()
def ms_ssim(x: Tensor, y: Tensor) -> Tensor:
    """Multi-scale structural similarity of pairs of images (Wang, Simoncelli, Bovik 2003).

    Five scales, Gaussian 11x11 windows of standard deviation 1.5 that lie inside the image, K1 = 0.01, K2 = 0.03.
    Between images of one set it measures how similar they are (Odena et al. 2017, arXiv 1610.09585, section 4.2). A
    scale with negative structure counts as 0.

    x and y are (B, 1, H, W) in [0, 1], H and W at least 176. Returns (B,) float64 on the CPU, between 0 and 1.
    """
    offsets = torch.arange(11, device=x.device) - 5
    window = torch.exp(-(offsets**2) / (2 * 1.5**2))
    window = window / window.sum()

    def mean(image: Tensor) -> Tensor:
        return filtered(filtered(image, window[:, None]), window[None])

    result = torch.ones(len(x), dtype=torch.double)
    for scale, weight in enumerate(MS_SSIM_WEIGHTS):
        mean_x, mean_y = mean(x), mean(y)
        var_x, var_y, covariance = mean(x * x) - mean_x**2, mean(y * y) - mean_y**2, mean(x * y) - mean_x * mean_y
        similarity = (2 * covariance + 0.03**2) / (var_x + var_y + 0.03**2)  # contrast and structure
        if scale == len(MS_SSIM_WEIGHTS) - 1:
            similarity = similarity * (2 * mean_x * mean_y + 0.01**2) / (mean_x**2 + mean_y**2 + 0.01**2)
        result *= similarity.mean((1, 2, 3)).clamp(min=0).cpu().double() ** weight
        x, y = F.avg_pool2d(x, 2), F.avg_pool2d(y, 2)
    return result


@exact_float32()
def nearest_distances(images: Tensor, others: Iterable[Tensor]) -> Tensor:
    """Root mean squared difference of each image (N, 1, H, W) to the nearest of others, batches (B, 1, H, W): (N,).

    From generated images to the training images, it shows whether these were memorised.
    """
    best = torch.full((len(images),), torch.inf, dtype=torch.double)
    for batch in others:
        best = torch.minimum(best, torch.cdist(images.flatten(1), batch.flatten(1)).min(1).values.cpu().double())
    return best / images[0].numel() ** 0.5


def grey_value_distance(real: Tensor, fake: Tensor) -> float:
    """Wasserstein distance between the grey values of two sets of images in [0, 1], foreground pixels only.

    Grey values above FOREGROUND are counted in 256 levels. 0.01 means that they differ by a hundredth of the range on
    average. 1 if one side has no foreground.
    """
    shares = []
    for images in (real, fake):
        levels = (images[images > FOREGROUND] * 255).round().clamp(0, 255).long().cpu()
        if len(levels) == 0:
            return 1.0
        shares.append(torch.bincount(levels, minlength=256).double() / len(levels))
    return ((shares[0] - shares[1]).cumsum(0).abs().sum() / 255).item()


def distances(real: Tensor, fake: Tensor, seed: int) -> dict[str, float]:
    """Distances of images to real ones (N, 1, 256, 256), as many of each, by the names of metrics.csv.

    `swd_256` to `swd_16` and `swd_mean` are `sliced_wasserstein` by level and its mean, `grey_values` is
    `grey_value_distance`.
    """
    swd = sliced_wasserstein(real, fake, torch.Generator().manual_seed(seed))
    by_level = {f"swd_{256 >> level}": value for level, value in enumerate(swd.tolist())}
    return by_level | {"swd_mean": swd.mean().item(), "grey_values": grey_value_distance(real, fake)}


def similarity_of_pairs(images: Tensor, groups: Sequence, rng: torch.Generator, n_pairs: int = 1000) -> float:
    """Mean `ms_ssim` of random pairs of images (N, 1, H, W) of different groups: the higher, the less diverse.

    `groups` has the group of each image, such as its subject; `rng` is on the CPU. The mean is between 0 and 1, and NaN
    if there is no such pair.
    """
    drawn = torch.randint(len(images), (8 * n_pairs, 2), generator=rng).tolist()
    pairs = torch.tensor([(i, j) for i, j in drawn if i != j and groups[i] != groups[j]][:n_pairs])
    values = [ms_ssim(images[part[:, 0]], images[part[:, 1]]) for part in pairs.split(50) if len(part)]
    return torch.cat(values).mean().item() if values else math.nan


@torch.no_grad()
def decode_independent_codes(vqvae, dataset, indices: Sequence[int], rng: torch.Generator) -> Tensor:
    """Images (N, 1, 256, 256), one for each index; codes are drawn from those that the indexed images have at a place.

    This prior knows the codes of every position and nothing about their neighbours: a measure that it does well on says
    little.
    """
    codes = torch.cat([vqvae.encode(x) for x in in_batches(dataset, indices, desc="Encoding")])
    drawn = torch.randint(len(codes), codes.shape, generator=rng).to(codes.device)
    return torch.cat([vqvae.decode(part).clamp(0, 1) for part in codes.gather(0, drawn).split(32)])


def n_measured(held_out, train) -> int:
    """How many images a side are measured: MOST_MEASURED, or as many as the smaller data set has."""
    return min(MOST_MEASURED, len(held_out), len(train))


class HeldOut:
    """The images of a held-out split which generated images are measured against: `n_measured`, spaced evenly.

    Args:
        vqvae: the network that generated images are decoded with.
        held_out, train: data sets.
        seed: draws what is random in a measure; the same seed gives the same values.
    """

    def __init__(self, vqvae, held_out, train, seed: int):
        self.vqvae, self.held_out, self.train, self.seed = vqvae, held_out, train, seed
        n = n_measured(held_out, train)
        self.indices = [i * len(held_out) // n for i in range(n)]
        self.subjects = [held_out.subject(i) for i in self.indices]
        self.features = features(vqvae, reconstruct(vqvae, held_out, self.indices), self.subjects)
        self.picked = torch.randperm(len(train), generator=seeds.generator(seed, "measured images"))[:n].tolist()

    def measure(self, images: Tensor, subjects: Sequence | None = None) -> dict[str, Interval]:
        """`distances`, `two_sample.mean_indices` and `two_sample.compare` of images (n, 1, 256, 256) by name.

        Without `subjects`, each image is a subject of its own.
        """
        side, rng = features(self.vqvae, images, subjects), seeds.generator(self.seed, "resampling")
        found = distances(self.held_out.batch(self.indices), images, seeds.derived_seed(self.seed, "measures"))
        found = {name: Interval(value) for name, value in found.items()}
        return found | mean_indices(side, rng) | compare(self.features, side, rng)

    def floor(self) -> dict[str, Interval]:
        """What a perfect generator would have: measures of reconstructed training images, indices of held-out ones."""
        subjects = [self.train.subject(i) for i in self.picked]
        trained = self.measure(reconstruct(self.vqvae, self.train, self.picked), subjects)
        return trained | mean_indices(self.features, seeds.generator(self.seed, "resampling"))


@torch.no_grad()
def compare_generated(generated: Tensor, vqvae, held_out, train, seed: int, n_pairs: int = 1000) -> list[Row]:
    """Measures of generated images beside those of reconstructions and of independent codes.

    `generated` is (N, 1, 256, 256), N = `n_measured`, decoded by `vqvae`; `held_out` and `train` are data sets. With
    the seed of a run, measures are those that train.py gives.
    """
    n = len(generated)
    real, rng = HeldOut(vqvae, held_out, train, seed), seeds.generator(seed, "measured images")
    independent = decode_independent_codes(vqvae, train, real.picked, seeds.generator(seed, "independent codes"))
    measured, floor, unstructured = real.measure(generated), real.floor(), real.measure(independent)
    rows = [
        Row(text, measured[name], floor[name], unstructured[name], HELD_OUT if name in INDICES else TRAINED)
        for name, text in (DISTANCES | INDICES | COMPARISONS).items()
    ]
    groups = ((generated, range(n)), (held_out.batch(real.indices), real.subjects), (independent, range(n)))
    similar = [Interval(similarity_of_pairs(side, group, rng, n_pairs)) for side, group in groups]
    rows.append(Row("MS-SSIM of pairs", *similar, "held-out pairs of different subjects"))

    images = torch.cat([generated, reconstruct(vqvae, held_out, real.indices), independent])
    nearest = nearest_distances(images, in_batches(train, size=512, desc="Comparing")).split(n)
    near = [Interval(part.quantile(0.05).item()) for part in nearest]
    rows.append(Row("distance to the nearest training image, 5th percentile", *near, HELD_OUT))
    return rows
