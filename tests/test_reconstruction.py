"""SSIM against its definition, the scoring function against a plain loop, codebook usage against closed forms."""

import math

import numpy as np
import pytest
import scipy.stats
import torch
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from dataset import OasisDataset
from evaluation import reconstruction
from evaluation.reconstruction import (
    PRIOR_COUNT,
    Scores,
    adaptive_bits,
    codebook_usage,
    entropy,
    score,
    ssim,
)
from modules import VQVAE
from training import codebook


def pairs(images):
    rng = torch.Generator().manual_seed(1)

    def noise(scale):
        return scale * torch.randn(images.shape, generator=rng)

    flat = torch.full_like(images, 0.5)
    return {
        "brain against noisy brain": (images, images + noise(0.1)),
        "brain against another": (images, images.roll(1, 0)),
        "identical": (images, images.clone()),
        "beyond the range": (images, 1.7 * images - 0.4),
        "noise": (noise(1).abs(), noise(1).abs()),
        "both black": (0 * images, 0 * images),
        "two constants": (flat, 0.8 * flat),
        "constant against nearly constant": (flat, flat + noise(1e-4)),
        "both nearly constant": (flat + noise(1e-6), flat + noise(1e-6)),
        "brain against black": (images, 0 * images),
        "nearly black": (noise(1e-5).abs(), noise(1e-5).abs()),
    }


def windows(image: torch.Tensor) -> np.ndarray:
    """The pixels of each 7x7 window of an image (1, H, W): (H - 6, W - 6, 49)."""
    view = np.lib.stride_tricks.sliding_window_view(image[0].double().numpy(), (7, 7))
    return view.reshape(*view.shape[:2], 49)


def ssim_by_definition(x: torch.Tensor, y: torch.Tensor) -> np.ndarray:
    """Equation 13 of Wang et al. 2004 in each window that lies inside the image, with sample (co)variances."""
    a, b = windows(x), windows(y)
    mean_a, mean_b = a.mean(2), b.mean(2)
    covariance = ((a - mean_a[..., None]) * (b - mean_b[..., None])).sum(2) / 48
    numerator = (2 * mean_a * mean_b + 0.01**2) * (2 * covariance + 0.03**2)
    return numerator / ((mean_a**2 + mean_b**2 + 0.01**2) * (a.var(2, ddof=1) + b.var(2, ddof=1) + 0.03**2))


@pytest.mark.parametrize("kind", pairs(torch.zeros(1, 1, 8, 8)))
def test_ssim_is_its_definition(images, kind):
    x, x_hat = (side[:3, :, 30:201, 17:230] for side in pairs(images)[kind])
    values = ssim(x, x_hat)
    assert values.shape == (3,)
    for value, a, b in zip(values.tolist(), x, x_hat, strict=True):
        assert value == pytest.approx(ssim_by_definition(a, b).mean(), abs=1e-9)


def test_scores_of_tissues_are_means_over_their_windows(data):
    torch.manual_seed(0)
    dataset, model, rng = OasisDataset(data, "validate"), VQVAE(), np.random.default_rng(0)
    labels = torch.from_numpy(rng.integers(0, 4, (len(dataset), 256, 256), np.uint8))
    labels[1] = 0  # a slice without a brain
    labels[2][labels[2] == 1] = 0  # and one without CSF
    scores = score(model, dataset, labels)
    assert scores.tissue_ssim[1].isnan().all() and scores.tissue_psnr[1].isnan().all()
    assert scores.tissue_ssim[2].isnan().tolist() == [False, True, False, False]
    for i in (0, 2, 9):
        x = dataset[i]
        x_hat = model.decode(model.encode(dataset.batch(range(10))))[i].detach()
        similarity, error = ssim_by_definition(x, x_hat), (x - x_hat)[0, 3:-3, 3:-3].double().numpy() ** 2
        label = labels[i, 3:-3, 3:-3].numpy()
        for k, mask in enumerate((label > 0, label == 1, label == 2, label == 3)):
            if mask.any():
                assert scores.tissue_ssim[i, k].item() == pytest.approx(similarity[mask].mean(), abs=1e-4)
                psnr = -10 * math.log10(error[mask].mean())
                assert scores.tissue_psnr[i, k].item() == pytest.approx(psnr, abs=1e-2)
    assert score(model, dataset).tissue_ssim.isnan().all()  # without label maps


def test_score_is_a_plain_loop(data, monkeypatch):
    monkeypatch.setattr(reconstruction, "SCORE_BATCH", 4)  # of 10 images: the last batch is smaller
    torch.manual_seed(0)
    dataset = OasisDataset(data, "validate")
    model = VQVAE()
    with torch.no_grad():
        z_e = model.latents(dataset[0][None])
    codebook.start_from(model.vector_quantizer, z_e, torch.Generator().manual_seed(0))
    scores = score(model, dataset)
    usage, foreground_usage = np.zeros((64, 64, 512), int), np.zeros(512, int)
    for i in range(len(dataset)):
        x = dataset[i]
        with torch.no_grad():
            _, x_hat, _, codes = model(x[None])
        expected = structural_similarity(x[0].numpy(), x_hat[0, 0].numpy(), data_range=1.0)
        assert scores.ssim[i].item() == pytest.approx(expected, abs=1e-5)
        expected = peak_signal_noise_ratio(x[0].numpy(), x_hat[0, 0].numpy(), data_range=1.0)
        assert scores.psnr[i].item() == pytest.approx(expected, abs=1e-3)
        for row in range(64):
            for column in range(64):
                k = codes[0, row, column]
                usage[row, column, k] += 1
                pixels = x[0, 4 * row : 4 * row + 4, 4 * column : 4 * column + 4]
                foreground_usage[k] += pixels.double().mean() > reconstruction.FOREGROUND
    # another batch size may round a latent to the other side of a boundary between two codes
    assert abs(scores.usage.numpy() - usage.reshape(4096, 512)).sum() <= 4
    assert abs(scores.foreground_usage.numpy() - foreground_usage).sum() <= 4
    assert scores.usage.sum() == len(dataset) * 64 * 64


def test_entropy_is_scipys():
    counts = np.random.default_rng(0).integers(0, 4, (6, 9))
    counts[2] = 0
    counts[2, 4] = 7
    expected = scipy.stats.entropy(counts, base=2, axis=1)
    torch.testing.assert_close(entropy(torch.from_numpy(counts)), torch.from_numpy(expected))
    assert entropy(torch.zeros(3, 5)).tolist() == [0, 0, 0]


def test_bits_of_codes_known_by_construction():
    """Half of the positions always have one code, the others one of two, equally often."""
    usage = torch.zeros(4096, 512, dtype=torch.int32)
    usage[:2048, 0] = 100
    usage[2048:, 1] = usage[2048:, 2] = 50
    use = codebook_usage(
        Scores(torch.ones(100), torch.ones(100), usage, torch.tensor([0, 12, 9]), *torch.ones(2, 100, 4))
    )
    assert use["bits_raw"] == 9 * 4096
    assert use["bits_entropy"] == pytest.approx(1.5 * 4096)  # shares 1/2, 1/4, 1/4
    assert use["bits_entropy_by_position"] == pytest.approx(2048)
    assert (use["codes_used"], use["codes_used_10_times"]) == (3, 3)
    assert use["perplexity"] == pytest.approx(2**1.5)


def test_adaptive_bits_are_those_of_coding_one_image_after_the_other():
    rng = np.random.default_rng(0)
    codes = rng.integers(0, 5, (40, 7)) // rng.integers(1, 4, 7)  # (images, positions)
    usage = np.stack([(codes == k).sum(0) for k in range(6)], 1)  # the sixth code is never used
    p = usage.sum(0) / usage.sum()
    bits, seen = 0.0, np.zeros((7, 6))
    for n, image in enumerate(codes):
        for position, k in enumerate(image):
            bits -= math.log2((seen[position, k] + PRIOR_COUNT * p[k]) / (n + PRIOR_COUNT))
            seen[position, k] += 1
    assert adaptive_bits(torch.from_numpy(usage)) == pytest.approx(bits)


def test_validation_in_shares_is_validation(data, monkeypatch):
    monkeypatch.setattr(reconstruction, "SCORE_BATCH", 3)
    torch.manual_seed(0)
    model, validate_set = VQVAE(64), OasisDataset(data, "validate")
    labels = torch.zeros(10, 256, 256, dtype=torch.uint8)
    labels[4:, 100:150, 90:160] = 2
    whole = score(model, validate_set, labels)
    for world_size in (2, 3, 8):  # 10 images make 4 batches: the last processes of 8 have nothing to do
        parts = [score(model, validate_set, labels, rank, world_size) for rank in range(world_size)]
        for expected, shares in zip(whole, zip(*parts, strict=True), strict=True):
            total = torch.stack(shares).sum(0, dtype=expected.dtype)
            torch.testing.assert_close(total, expected, rtol=0, atol=0, equal_nan=True)
        assert sum(int((part.ssim != 0).sum()) for part in parts) == len(validate_set)
