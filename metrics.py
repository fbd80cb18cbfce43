"""Measures: SSIM as scikit-image computes it, the one scoring function, and how the codebook is used."""

import contextlib
import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

SCORE_BATCH = 32  # fixed, so that a score does not depend on how a model was trained
PRIOR_COUNT = 32.0  # images' worth of the overall shares that `adaptive_bits` begins with at each position
FOREGROUND = 0.04  # a code position is foreground where its 4x4 pixels have a greater mean


def ssim(x: Tensor, x_hat: Tensor) -> Tensor:
    """Structural similarity of each pair of images (Wang et al. 2004, "Image quality assessment").

    Equals skimage.metrics.structural_similarity(x, x_hat, data_range=1.0) with its defaults: uniform 7x7 windows
    that lie inside the image, sample covariance, K1 = 0.01, K2 = 0.03.

    Args:
        x, x_hat: (B, 1, H, W), images in [0, 1], H and W at least 7; x_hat may leave that range.

    Returns:
        (B,) float64, at most 1. On a device without float64 the computation, and the result, are on the CPU.
    """
    device = torch.device("cpu") if x.device.type == "mps" else x.device
    at_once = 2 if device.type == "cpu" else len(x)  # two images' moments stay in a CPU's cache: 5 times faster
    pairs = zip(x.to(device).split(at_once), x_hat.to(device).split(at_once), strict=True)
    return torch.cat([_ssim(a[:, 0].double(), b[:, 0].double()) for a, b in pairs])


def _ssim(x: Tensor, y: Tensor) -> Tensor:
    # Variances are differences of nearly equal moments: in float32 flat regions would lose all their digits.
    # From the sum s and the difference d of the images four window sums suffice, where x and y need five:
    # 4xy = s² - d², 2(x² + y²) = s² + d², and so for means and (co)variances. Numerator and denominator are doubled.
    s, d = x + y, x - y
    mean_s2, mean_d2 = (_window_sum(m).div_(49).square_() for m in (s, d))
    var_s, var_d = (_window_sum(m.square()).div_(49).sub_(m2).mul_(49 / 48) for m, m2 in ((s, mean_s2), (d, mean_d2)))
    c1, c2 = 2 * 0.01**2, 2 * 0.03**2
    similarity = (mean_s2 - mean_d2 + c1) * (var_s - var_d + c2)
    similarity /= (mean_s2 + mean_d2 + c1) * (var_s + var_d + c2)
    return similarity.mean((1, 2))


def _window_sum(image: Tensor) -> Tensor:
    """Sum over every 7x7 window: (B, H, W) -> (B, H - 6, W - 6). Sums of 7 from sums of 2."""
    for axis in (1, 2):
        n = image.shape[axis] - 6
        two = image.narrow(axis, 0, n + 5) + image.narrow(axis, 1, n + 5)
        seven = two.narrow(axis, 0, n) + two.narrow(axis, 2, n)
        seven += two.narrow(axis, 4, n)
        seven += image.narrow(axis, 6, n)
        image = seven
    return image


def psnr(x: Tensor, x_hat: Tensor) -> Tensor:
    """Peak signal-to-noise ratio of each pair of images (B, 1, H, W), peak 1: 10 log10(1 / mean squared error).

    As for SSIM, x_hat is not clamped, and the background counts.

    Returns:
        (B,) float64 on the CPU, in dB; infinite where the two are equal.
    """
    return -10 * (x_hat - x).square().mean((1, 2, 3)).cpu().double().log10()


class Scores(NamedTuple):
    """What `score` measures on a data set.

    Attributes:
        ssim: (N,) float64 on the CPU, in the data set's order.
        psnr: (N,) float64, peak signal-to-noise ratio in dB, of the same images.
        usage: (64·64, n_embeddings) int32, how many images have which code at a position, row by row.
        foreground_usage: (n_embeddings,) int64, how many foreground positions of all images have each code.
    """

    ssim: Tensor
    psnr: Tensor
    usage: Tensor
    foreground_usage: Tensor


@contextlib.contextmanager
def _exact_float32():
    """Switch off TF32 and what lets CUDA choose its algorithms by timing: scores must not depend on the day."""
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    before = matmul.allow_tf32, cudnn.allow_tf32, cudnn.benchmark, cudnn.deterministic
    matmul.allow_tf32, cudnn.allow_tf32, cudnn.benchmark, cudnn.deterministic = False, False, False, True
    try:
        yield
    finally:
        matmul.allow_tf32, cudnn.allow_tf32, cudnn.benchmark, cudnn.deterministic = before


@torch.no_grad()
def score(model, dataset, progress=tqdm, rank: int = 0, world: int = 1) -> Scores:
    """Reconstruct every image of a data set and compare: the scoring that train.py and predict.py share.

    Args:
        model: a `modules.VQVAE`; its layout becomes channels_last, its mode eval.
        dataset: an `OasisDataset`, whose batches are on the model's device.
        progress: called as tqdm is.
        rank, world: of several processes, each scores every world-th batch; the sum of what they return, which is 0
            for what another one scored, is what one process returns.
    """
    model = model.eval().to(memory_format=torch.channels_last)
    n_embeddings = model.vector_quantizer.embedding.num_embeddings
    n = len(dataset)
    similarity, noise_ratio = torch.zeros(2, n, dtype=torch.double)
    device = model.conv1.weight.device
    usage = torch.zeros(64 * 64, n_embeddings, dtype=torch.int32, device=device)
    foreground_usage = torch.zeros(n_embeddings, dtype=torch.int64)
    bar = progress(total=n, desc="Scoring", unit=" images", leave=False)
    with bar, _exact_float32(), torch.autocast(device.type, enabled=False):
        for start in range(rank * SCORE_BATCH, n, world * SCORE_BATCH):
            x = dataset.__getitems__(range(start, min(start + SCORE_BATCH, n)))
            codes = model.encode(x)
            x_hat = model.decode(codes)
            here = slice(start, start + len(x))
            similarity[here], noise_ratio[here] = ssim(x, x_hat), psnr(x, x_hat)
            by_position = codes.flatten(1).T  # (64·64, B)
            usage.scatter_add_(1, by_position, torch.ones_like(by_position, dtype=torch.int32))
            foreground = F.avg_pool2d(x, 4)[:, 0] > FOREGROUND
            foreground_usage += torch.bincount(codes[foreground], minlength=n_embeddings).cpu()
            bar.update(len(x))
    return Scores(similarity, noise_ratio, usage.cpu(), foreground_usage)


@torch.no_grad()
def reconstruct(model, dataset, indices: Sequence[int]) -> Tensor:
    """Images (N, 1, 256, 256) of a data set, decoded from their codes and clamped to [0, 1]."""
    parts = [
        dataset.__getitems__(indices[start : start + SCORE_BATCH]) for start in range(0, len(indices), SCORE_BATCH)
    ]
    return torch.cat([model.decode(model.encode(x)).clamp(0, 1) for x in parts])


def entropy(counts: Tensor) -> Tensor:
    """Entropy in bits of the distributions that counts (…, n) are drawn from, as estimated by their shares: (…).

    Between 0 and log2(n); 0 where nothing was counted. With few counts it is an underestimate: k of them give at most
    log2(k), whatever they are drawn from.
    """
    p = counts.double() / counts.sum(-1, keepdim=True).clamp(min=1)
    return torch.special.entr(p).sum(-1) / math.log(2)


def perplexity(usage: Tensor) -> float:
    """2 to the entropy of code counts (n_embeddings,): how many equally used codes would carry as much.

    Between 1 and n_embeddings; 1 where nothing was counted.
    """
    return 2 ** entropy(usage).item()


def adaptive_bits(usage: Tensor) -> float:
    """Bits that an adaptive coder spends on all images whose codes at each position are counted in (positions, n).

    The coder knows how often each code is used overall, p, and learns what is frequent at a position from the images
    that it has coded: its probability of code k is (n_k + PRIOR_COUNT p_k) / (n + PRIOR_COUNT) after n images, n_k of
    which had it there. The product of these over images is a ratio of gamma functions (Dirichlet-multinomial), the
    same in every order of the images, and nothing but p has to be stored beside the codes.
    """
    usage = usage[:, usage.sum(0) > 0].double()
    prior = PRIOR_COUNT * usage.sum(0) / usage.sum()
    n = usage.sum(1)
    codes = torch.lgamma(usage + prior) - torch.lgamma(prior)
    total = torch.lgamma(n + PRIOR_COUNT) - math.lgamma(PRIOR_COUNT)
    return (total.sum() - codes.sum()).item() / math.log(2)


def codebook_use(scores: Scores) -> dict[str, float]:
    """How the codebook is used on a data set, by the names of metrics.csv.

    Bits are those of an image: `bits_raw` for log2(n_embeddings) at each position, `bits_entropy` for the entropy of
    all codes together, `bits_adaptive` for `adaptive_bits`, `bits_entropy_by_position` for the entropies of the codes
    at each position: no coder reaches that, for N images show at most log2(N) bits of an entropy.
    """
    overall = scores.usage.sum(0)
    positions, n_embeddings = scores.usage.shape
    return {
        "codes_used": int((overall > 0).sum()),
        "codes_used_10_times": int((overall >= 10).sum()),
        "perplexity": perplexity(overall),
        "foreground_perplexity": perplexity(scores.foreground_usage),
        "bits_raw": positions * math.log2(n_embeddings),
        "bits_entropy": positions * entropy(overall).item(),
        "bits_adaptive": adaptive_bits(scores.usage) / len(scores.ssim),
        "bits_entropy_by_position": entropy(scores.usage).sum().item(),
    }


# --- measures of generated images, none of which needs a downloaded network

PYRAMID_LEVELS = 5  # 256, 128, 64, 32 and 16 pixels
PATCH, PATCHES_PER_IMAGE, PROJECTIONS = 7, 128, 512
MS_SSIM_WEIGHTS = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)


@_exact_float32()
def sliced_wasserstein(real: Tensor, fake: Tensor, random: torch.Generator) -> Tensor:
    """Sliced Wasserstein distance of Laplacian-pyramid patches (Karras et al. 2018, arXiv 1710.10196, section 5).

    At each level of the pyramids 128 patches of 7x7 pixels an image are taken, normalised, and projected on 512 random
    directions, in each of which the distance between both sides is that of the sorted values. Both sides are normalised
    by the real patches' mean and standard deviation (the paper: each by its own), so that brightness and contrast
    count, and patches are taken at the same places of both, so that equal sides have distance 0.

    Args:
        real, fake: (N, 1, 256, 256), equally many images.
        random: a CPU generator, of places and directions.

    Returns:
        (5,) float64, times 10³: the levels of 256, 128, 64, 32 and 16 pixels.
    """
    if real.shape != fake.shape:
        raise ValueError(f"both sides must be equally many images, not {tuple(real.shape)} and {tuple(fake.shape)}")
    directions = torch.randn(PATCH * PATCH, PROJECTIONS, generator=random)
    directions = (directions / directions.norm(dim=0)).to(real.device)
    distances = []
    for a, b in zip(laplacian_pyramid(real), laplacian_pyramid(fake), strict=True):
        n, _, h, w = a.shape
        top, left = (
            torch.randint(size - PATCH + 1, (n, PATCHES_PER_IMAGE), generator=random).to(a.device) for size in (h, w)
        )
        a, b = _patches(a, top, left), _patches(b, top, left)
        mean, deviation = a.mean(), a.std()
        a, b = ((side - mean) / deviation @ directions for side in (a, b))
        apart = (a.sort(0).values - b.sort(0).values).abs()
        distances.append(apart.mean().cpu().double())  # MPS has no float64
    return 1000 * torch.stack(distances)


def _patches(images: Tensor, top: Tensor, left: Tensor) -> Tensor:
    """The 7x7 patches at (N, P) places of images (N, 1, H, W): (N·P, 49)."""
    inside = torch.arange(PATCH, device=images.device)
    image = torch.arange(len(images), device=images.device)[:, None, None, None]
    rows, columns = top[:, :, None, None] + inside[:, None], left[:, :, None, None] + inside
    return images[:, 0][image, rows, columns].reshape(-1, PATCH * PATCH)


def laplacian_pyramid(images: Tensor) -> list[Tensor]:
    """Differences of images (N, 1, H, W) to their blurred halves, finest first; last what remains (Burt, Adelson 1983).

    The filter is (1, 4, 6, 4, 1) / 16 along both axes, images are mirrored at their borders.
    """
    kernel = torch.tensor([1.0, 4.0, 6.0, 4.0, 1.0], device=images.device) / 16
    kernel = (kernel[:, None] * kernel)[None, None]

    def blur(x: Tensor) -> Tensor:
        return F.conv2d(F.pad(x, (2, 2, 2, 2), mode="reflect"), kernel)

    levels = []
    for _ in range(PYRAMID_LEVELS - 1):
        half = blur(images)[:, :, ::2, ::2]
        spread = torch.zeros_like(images)
        spread[:, :, ::2, ::2] = 4 * half
        levels.append(images - blur(spread))
        images = half
    return [*levels, images]


@_exact_float32()
def ms_ssim(x: Tensor, y: Tensor) -> Tensor:
    """Multi-scale structural similarity of pairs of images (Wang, Simoncelli, Bovik 2003).

    Five scales, Gaussian 11x11 windows of standard deviation 1.5 that lie inside the image, K1 = 0.01, K2 = 0.03.
    Between images of one set it measures how alike they are (Odena et al. 2017, arXiv 1610.09585, section 4.2). A scale
    where structure is opposed counts as 0.

    Args:
        x, y: (B, 1, H, W) in [0, 1], H and W at least 176.

    Returns:
        (B,) float64 on the CPU, between 0 and 1.
    """
    offsets = torch.arange(11, device=x.device) - 5
    window = torch.exp(-(offsets**2) / (2 * 1.5**2))
    window = window / window.sum()

    def mean(image: Tensor) -> Tensor:
        return F.conv2d(F.conv2d(image, window.view(1, 1, -1, 1)), window.view(1, 1, 1, -1))

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


@_exact_float32()
def nearest_distances(images: Tensor, others: Iterable[Tensor]) -> Tensor:
    """Root mean squared difference of each image (N, 1, H, W) to the nearest of others, batches (B, 1, H, W): (N,).

    Of generated images to the training images, it shows whether these were memorised.
    """
    best = torch.full((len(images),), torch.inf, dtype=torch.double)
    for batch in others:
        best = torch.minimum(best, torch.cdist(images.flatten(1), batch.flatten(1)).min(1).values.cpu().double())
    return best / images[0].numel() ** 0.5


def grey_value_distance(real: Tensor, fake: Tensor) -> float:
    """Wasserstein distance between the grey values of two sets of images in [0, 1], foreground pixels only.

    Grey values are taken in 256 levels; those above FOREGROUND count. 0.01 means that they differ by a hundredth of the
    range on average; 1 where one side has no foreground.
    """
    shares = []
    for images in (real, fake):
        levels = (images[images > FOREGROUND] * 255).round().clamp(0, 255).long().cpu()
        if len(levels) == 0:
            return 1.0
        shares.append(torch.bincount(levels, minlength=256).double() / len(levels))
    return ((shares[0] - shares[1]).cumsum(0).abs().sum() / 255).item()


def distances(real: Tensor, fake: Tensor, seed: int) -> dict[str, float]:
    """How far images are from real ones (N, 1, 256, 256), equally many, by the names of metrics.csv.

    `swd_256` to `swd_16` and `swd_mean`: `sliced_wasserstein` by level, and their mean; `grey_values`:
    `grey_value_distance`.
    """
    swd = sliced_wasserstein(real, fake, torch.Generator().manual_seed(seed))
    by_level = {f"swd_{256 >> level}": value for level, value in enumerate(swd.tolist())}
    return by_level | {"swd_mean": swd.mean().item(), "grey_values": grey_value_distance(real, fake)}


def diversity(images: Tensor, groups: Sequence, random: torch.Generator, n_pairs: int = 1000) -> float:
    """Mean `ms_ssim` of random pairs of images (N, 1, H, W), pairs of one group left out: the higher, the more alike.

    Args:
        groups: of each image what it belongs to (its subject); an image is never paired with itself.
        random: a CPU generator.

    Returns:
        A number from 0 to 1; NaN where there is no such pair.
    """
    drawn = torch.randint(len(images), (8 * n_pairs, 2), generator=random).tolist()
    pairs = torch.tensor([(i, j) for i, j in drawn if i != j and groups[i] != groups[j]][:n_pairs])
    values = [ms_ssim(images[part[:, 0]], images[part[:, 1]]) for part in pairs.split(50) if len(part)]
    return torch.cat(values).mean().item() if values else math.nan
