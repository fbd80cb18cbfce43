"""Measures of reconstructions: SSIM by scikit-image, PSNR, codebook usage; `score` computes all of them."""

import math
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from skimage.metrics import structural_similarity
from torch import Tensor

from support.console import in_batches
from support.device import exact_float32

INSIDE = slice(3, -3)  # rows and columns around whose pixels a 7x7 window lies inside the image
SCORE_BATCH = 32  # images; fixed, so that scores do not depend on --batch-size
PRIOR_COUNT = 32.0  # weight, in images, of the overall code frequencies with which `adaptive_bits` starts
# A code position is foreground where its 4x4 pixels have a greater mean. In the report's set these are 99.8 % of the
# positions inside the brain, and 7 % of those with noise alone, at more than 8 pixels from the head.
FOREGROUND = 0.06


def ssim(x: Tensor, x_hat: Tensor) -> Tensor:
    """Structural similarity of each pair of images (Wang et al. 2004, "Image quality assessment"): the mean of its map.

    x and x_hat are (B, 1, H, W), H and W at least 7; x is in [0, 1], x_hat may leave that range. Returns (B,) float64
    on the CPU, at most 1.
    """
    return ssim_map(x, x_hat)[:, INSIDE, INSIDE].mean((1, 2))


def ssim_map(x: Tensor, x_hat: Tensor) -> Tensor:
    """SSIM of the 7x7 window around each pixel, by scikit-image, of images as `ssim` takes them: (B, H, W) float64.

    Windows lie inside the image at INSIDE. Variances are differences of nearly equal moments: in float32 flat regions
    would lose all their digits.
    """
    pairs = zip(x[:, 0].cpu().double().numpy(), x_hat[:, 0].cpu().double().numpy(), strict=True)
    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        maps = pool.map(lambda pair: structural_similarity(*pair, data_range=1.0, full=True)[1], pairs)
        return torch.from_numpy(np.stack(list(maps)))


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
        psnr: (N,) float64, peak signal-to-noise ratio in dB.
        usage: (64·64, n_embeddings) int32, number of images with each code at each position, row by row.
        foreground_usage: (n_embeddings,) int64, number of foreground positions of all images with each code.
        tissue_ssim, tissue_psnr: (N, 4) float64, mean SSIM of the windows around the pixels of the brain, CSF, grey and
            white matter, and PSNR of these pixels; NaN where an image has none, or without label maps.
    """

    ssim: Tensor
    psnr: Tensor
    usage: Tensor
    foreground_usage: Tensor
    tissue_ssim: Tensor
    tissue_psnr: Tensor


@torch.no_grad()
def score(vqvae, dataset, labels: Tensor | None = None, rank: int = 0, world_size: int = 1) -> Scores:
    """Reconstruct every image of a data set and compare. train.py and predict.py share this function.

    Args:
        vqvae: a `modules.VQVAE`. Its layout becomes channels_last and its mode eval.
        dataset: a `dataset.OasisDataset` with batches on the network's device.
        labels: label maps (N, 256, 256) of the images, as `dataset.OasisDataset` has them.
        rank, world_size: each of several processes scores every world_size-th batch and returns 0 for the others. The
            sum over processes is what one process returns.
    """
    vqvae = vqvae.eval().to(memory_format=torch.channels_last)
    n = len(dataset)
    device = vqvae.conv1.weight.device
    n_embeddings = vqvae.vector_quantizer.embedding.num_embeddings
    ssim_of, psnr_of = torch.zeros(2, n, dtype=torch.double)
    tissue_ssim, tissue_psnr = torch.full((2, n, 4), math.nan if labels is None else 0.0, dtype=torch.double)
    usage = torch.zeros(64 * 64, n_embeddings, dtype=torch.int32, device=device)
    foreground_usage = torch.zeros(n_embeddings, dtype=torch.int64)
    mine = [i for i in range(n) if i // SCORE_BATCH % world_size == rank]
    batches = in_batches(dataset, mine, SCORE_BATCH, "Scoring")
    with exact_float32(), torch.autocast(device.type, enabled=False):
        for i, x in enumerate(batches):
            codes = vqvae.encode(x)
            x_hat = vqvae.decode(codes)
            here = mine[i * SCORE_BATCH : (i + 1) * SCORE_BATCH]
            similarity = ssim_map(x, x_hat)
            ssim_of[here] = similarity[:, INSIDE, INSIDE].mean((1, 2))
            psnr_of[here] = psnr(x, x_hat)
            if labels is not None:
                error = (x_hat - x)[:, 0].square().cpu()
                tissue_ssim[here] = means_by_tissue(labels[here], similarity)
                tissue_psnr[here] = -10 * means_by_tissue(labels[here], error).log10()
            by_position = codes.flatten(1).T  # (64·64, B)
            usage.scatter_add_(1, by_position, torch.ones_like(by_position, dtype=torch.int32))
            foreground = F.avg_pool2d(x, 4)[:, 0] > FOREGROUND
            foreground_usage += torch.bincount(codes[foreground], minlength=n_embeddings).cpu()
    return Scores(ssim_of, psnr_of, usage.cpu(), foreground_usage, tissue_ssim, tissue_psnr)


def means_by_tissue(labels: Tensor, values: Tensor) -> Tensor:
    """Means of values (B, H, W) over the brain, CSF, grey matter and white matter of each image: (B, 4) float64.

    labels (B, H, W) are 1, 2 and 3 in the tissues, which together are the brain, and 0 elsewhere. Pixels without a
    window around them are left out. NaN where an image has none.
    """
    kind = labels[:, INSIDE, INSIDE].long() + 4 * torch.arange(len(labels))[:, None, None]
    kind = kind.flatten()
    values = values[:, INSIDE, INSIDE].double().flatten()
    sums = torch.bincount(kind, values, minlength=4 * len(labels)).view(-1, 4)
    counts = torch.bincount(kind, minlength=4 * len(labels)).view(-1, 4)
    sums[:, 0] = sums[:, 1:].sum(1)
    counts[:, 0] = counts[:, 1:].sum(1)
    return sums / counts


def entropy(counts: Tensor) -> Tensor:
    """Entropy in bits of the distributions given by counts (…, n): (…).

    Between 0 and log2(n); 0 where nothing was counted. k samples give at most log2(k), so few samples bias it low.
    """
    p = counts.double() / counts.sum(-1, keepdim=True).clamp(min=1)
    return torch.special.entr(p).sum(-1) / math.log(2)


def adaptive_bits(usage: Tensor) -> float:
    """Bits that an adaptive coder spends on all images whose codes at each position are counted in (positions, n).

    The coder knows the overall frequency p_k of each code and learns the frequencies at a position from the images that
    it has coded. After n images, n_k of which had code k there, its probability of k is
    (n_k + PRIOR_COUNT p_k) / (n + PRIOR_COUNT). The product over images is a ratio of gamma functions
    (Dirichlet-multinomial) and does not depend on their order; only p has to be stored beside the codes.
    """
    usage = usage[:, usage.sum(0) > 0].double()
    prior = PRIOR_COUNT * usage.sum(0) / usage.sum()
    n = usage.sum(1)
    codes = torch.lgamma(usage + prior) - torch.lgamma(prior)
    total = torch.lgamma(n + PRIOR_COUNT) - math.lgamma(PRIOR_COUNT)
    return (total.sum() - codes.sum()).item() / math.log(2)


def codebook_usage(scores: Scores) -> dict[str, float]:
    """How the codebook is used on a data set, by the names of metrics.csv.

    Bits are for one image: `bits_raw` is log2(n_embeddings) at each position, `bits_entropy` the entropy of all codes
    together, `bits_adaptive` that of `adaptive_bits`, and `bits_entropy_by_position` the sum of the entropies at each
    position. No coder reaches the last one: estimated from N images, an entropy is at most log2(N).
    """
    overall = scores.usage.sum(0)
    positions, n_embeddings = scores.usage.shape
    return {
        "codes_used": int((overall > 0).sum()),
        "codes_used_10_times": int((overall >= 10).sum()),
        "perplexity": 2 ** entropy(overall).item(),
        "foreground_perplexity": 2 ** entropy(scores.foreground_usage).item(),
        "bits_raw": positions * math.log2(n_embeddings),
        "bits_entropy": positions * entropy(overall).item(),
        "bits_adaptive": adaptive_bits(scores.usage) / len(scores.ssim),
        "bits_entropy_by_position": entropy(scores.usage).sum().item(),
    }
