"""Measures of generated images: against SciPy, plain loops, and cases whose answer is known."""

import csv
from functools import partial

import numpy as np
import pytest
import scipy.ndimage
import scipy.stats
import torch

import codebook
import metrics
import predict
from dataset import OasisDataset
from modules import VQVAE, Generator
from prior import LatentScale, Prior


@pytest.fixture(scope="module")
def some():
    return torch.rand(6, 1, 256, 256, generator=torch.Generator().manual_seed(0))


def scipys_pyramid(image: np.ndarray) -> list[np.ndarray]:
    kernel = np.outer([1, 4, 6, 4, 1], [1, 4, 6, 4, 1]) / 256
    levels = []
    for _ in range(4):
        half = scipy.ndimage.convolve(image, kernel, mode="mirror")[::2, ::2]
        spread = np.zeros_like(image)
        spread[::2, ::2] = half
        levels.append(image - scipy.ndimage.convolve(spread, 4 * kernel, mode="mirror"))
        image = half
    return [*levels, image]


def test_laplacian_pyramid_is_scipys(images):
    pyramid = metrics.laplacian_pyramid(images)
    assert [level.shape[-1] for level in pyramid] == [256, 128, 64, 32, 16]
    for i in range(2):
        for level, expected in zip(pyramid, scipys_pyramid(images[i, 0].double().numpy()), strict=True):
            np.testing.assert_allclose(level[i, 0].numpy(), expected, atol=1e-6)


def test_sliced_wasserstein_is_the_mean_of_scipys_distances(images, some, monkeypatch):
    monkeypatch.setattr(metrics, "PATCHES_PER_IMAGE", 5)
    monkeypatch.setattr(metrics, "PROJECTIONS", 4)
    found = metrics.sliced_wasserstein(images, some, torch.Generator().manual_seed(3))
    random = torch.Generator().manual_seed(3)  # the same draws, in the same order
    directions = torch.randn(49, 4, generator=random).double().numpy()
    directions /= np.sqrt((directions**2).sum(0))
    pyramids = [[scipys_pyramid(image) for image in side[:, 0].double().numpy()] for side in (images, some)]
    for level in range(5):
        size = 256 >> level
        top, left = (torch.randint(size - 6, (6, 5), generator=random).numpy() for _ in range(2))
        real, fake = (
            np.array(
                [
                    pyramid[i][level][top[i, j] : top[i, j] + 7, left[i, j] : left[i, j] + 7].ravel()
                    for i in range(6)
                    for j in range(5)
                ]
            )
            for pyramid in pyramids
        )
        mean, deviation = real.mean(), real.std(ddof=1)
        expected = [
            scipy.stats.wasserstein_distance((real - mean) / deviation @ d, (fake - mean) / deviation @ d)
            for d in directions.T
        ]
        assert found[level].item() == pytest.approx(1000 * np.mean(expected), rel=1e-4)


def test_sliced_wasserstein_of_known_cases(images, random):
    assert metrics.sliced_wasserstein(images, images.clone(), random).tolist() == [0] * 5
    darker = metrics.sliced_wasserstein(images, 0.8 * images, random)
    darkest = metrics.sliced_wasserstein(images, 0.5 * images, random)
    assert (darker > 20).all() and (darkest > 2 * darker).all()  # brightness counts
    noisy = images + 0.1 * torch.randn(images.shape, generator=random)
    by_level = metrics.sliced_wasserstein(images, noisy, random)
    assert by_level[0] > 5 * by_level[4]  # white noise is in the fine levels
    with pytest.raises(ValueError, match="equally many"):
        metrics.sliced_wasserstein(images, images[:3], random)


def test_ms_ssim_is_its_definition_by_scipy(images, some):
    def gaussian(image):
        return scipy.ndimage.gaussian_filter(image, 1.5, truncate=5 / 1.5)[5:-5, 5:-5]

    x, y = images[:3], (0.7 * images + 0.3 * some)[:3]
    found = metrics.ms_ssim(x, y)
    for i in range(3):
        a, b, product = x[i, 0].double().numpy(), y[i, 0].double().numpy(), 1.0
        for weight in (0.0448, 0.2856, 0.3001, 0.2363, 0.1333):
            ma, mb = gaussian(a), gaussian(b)
            va, vb, c = gaussian(a * a) - ma**2, gaussian(b * b) - mb**2, gaussian(a * b) - ma * mb
            structure = (2 * c + 0.0009) / (va + vb + 0.0009)
            luminance = (2 * ma * mb + 0.0001) / (ma**2 + mb**2 + 0.0001)
            last = a.shape[0] == 16
            product *= (structure * luminance if last else structure).mean() ** weight
            a, b = (side.reshape(len(side) // 2, 2, -1, 2).mean((1, 3)) for side in (a, b))
        assert found[i].item() == pytest.approx(product, abs=1e-5)


def test_ms_ssim_of_known_cases(images, some):
    torch.testing.assert_close(metrics.ms_ssim(images, images), torch.ones(6, dtype=torch.double))
    assert (metrics.ms_ssim(some, 1 - some) == 0).all()  # opposed structure
    assert torch.equal(metrics.ms_ssim(images, some), metrics.ms_ssim(some, images))


def test_nearest_distances_are_a_plain_loop(images, some):
    others = torch.cat([some, images[2:3] + 0.01])
    found = metrics.nearest_distances(images, others.split(3))
    for i, image in enumerate(images):
        expected = min(((image - other) ** 2).mean().sqrt().item() for other in others)
        assert found[i].item() == pytest.approx(expected, rel=1e-3)
    assert found[2].item() == pytest.approx(0.01, rel=1e-3)


def test_grey_value_distance_is_scipys(images, some):
    real, fake = images, images**2
    levels = [(side[side > 0.04] * 255).round().numpy() for side in (real, fake)]
    expected = scipy.stats.wasserstein_distance(*levels) / 255
    assert metrics.grey_value_distance(real, fake) == pytest.approx(expected, rel=1e-6)
    assert metrics.grey_value_distance(real, real) == 0
    half, whole = torch.full((1, 1, 256, 256), 51 / 255), torch.full((1, 1, 256, 256), 153 / 255)
    assert metrics.grey_value_distance(half, whole) == pytest.approx(0.4)
    assert metrics.grey_value_distance(images, torch.zeros_like(images)) == 1


def test_diversity_pairs_different_groups_only(images, some, random):
    alike = images[:1].expand(4, -1, -1, -1)
    assert metrics.diversity(alike, range(4), random, 20) == pytest.approx(1)
    two = torch.cat([alike, images[3:4].expand(4, -1, -1, -1)])
    between = metrics.ms_ssim(images[:1], images[3:4]).item()
    assert metrics.diversity(two, [0] * 4 + [1] * 4, random, 50) == pytest.approx(between, rel=1e-5)
    assert between < metrics.diversity(two, range(8), random, 50) < 1
    assert np.isnan(metrics.diversity(alike, [7] * 4, random))


def test_copies_of_one_training_image_are_seen_through(data, tmp_path, monkeypatch):
    class Copies(Prior):
        def sample_images(self, noise, **_):
            return train.__getitems__([3] * len(noise))

    monkeypatch.setattr(metrics, "diversity", partial(metrics.diversity, n_pairs=20))
    train, held_out = OasisDataset(data, "train"), OasisDataset(data, "validate")
    vqvae = VQVAE()
    predict.measure_samples(
        Copies(Generator(), LatentScale.of_codebook(vqvae), vqvae), held_out, train, seed=0, folder=tmp_path
    )
    with open(tmp_path / "measures.csv", newline="") as file:
        measures = {row["measure"]: (float(row["generated"]), float(row["beside"])) for row in csv.DictReader(file)}
    alike, alike_real = measures["MS-SSIM of pairs"]
    near, near_real = measures["distance to the nearest training image, 5th percentile"]
    assert alike == pytest.approx(1) and alike_real < 0.9
    assert near < 1e-3 and near_real > 0.01


def test_independent_codes_are_at_each_position_those_of_some_image(data):
    dataset = OasisDataset(data, "train")
    vqvae = VQVAE()
    with torch.no_grad():  # codes that spread, and a decoder that shows them
        codebook.start_from(vqvae.vector_quantizer, vqvae.latents(dataset.__getitems__([0, 3])), torch.Generator())
    codes = vqvae.encode(dataset.__getitems__([0, 3]))
    vqvae.decode = lambda codes: codes / 512
    drawn = predict.decode_independent_codes(vqvae, dataset, [0, 3], torch.Generator()) * 512
    for one in drawn:
        assert ((one == codes[0]) | (one == codes[1])).all()
        assert (one != codes[0]).any() and (one != codes[1]).any()
