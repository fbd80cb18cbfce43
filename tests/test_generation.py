"""Measures of generated images: against SciPy, plain loops, and cases whose answer is known."""

import numpy as np
import pytest
import scipy.ndimage
import scipy.stats
import torch

from dataset import OasisDataset
from evaluation import generation, texture
from modules import VQVAE
from training import codebook


@pytest.fixture(scope="module")
def noise():
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
    pyramid = texture.laplacian_pyramid(images)
    assert [level.shape[-1] for level in pyramid] == [256, 128, 64, 32, 16]
    for i in range(2):
        for level, expected in zip(pyramid, scipys_pyramid(images[i, 0].double().numpy()), strict=True):
            np.testing.assert_allclose(level[i, 0].numpy(), expected, atol=1e-6)


def test_sliced_wasserstein_is_the_mean_of_scipys_distances(images, noise, monkeypatch):
    monkeypatch.setattr(generation, "PATCHES_PER_IMAGE", 5)
    monkeypatch.setattr(generation, "PROJECTIONS", 4)
    found = generation.sliced_wasserstein(images, noise, torch.Generator().manual_seed(3))
    rng = torch.Generator().manual_seed(3)  # the same draws, in the same order
    directions = torch.randn(49, 4, generator=rng).double().numpy()
    directions /= np.sqrt((directions**2).sum(0))
    pyramids = [[scipys_pyramid(image) for image in side[:, 0].double().numpy()] for side in (images, noise)]
    for level in range(5):
        size = 256 >> level
        top, left = (torch.randint(size - 6, (6, 5), generator=rng).numpy() for _ in range(2))
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
        mean, std = real.mean(), real.std(ddof=1)
        expected = [
            scipy.stats.wasserstein_distance((real - mean) / std @ d, (fake - mean) / std @ d) for d in directions.T
        ]
        assert found[level].item() == pytest.approx(1000 * np.mean(expected), rel=1e-4)


def test_sliced_wasserstein_of_known_cases(images, rng):
    assert generation.sliced_wasserstein(images, images.clone(), rng).tolist() == [0] * 5
    darker = generation.sliced_wasserstein(images, 0.8 * images, rng)
    darkest = generation.sliced_wasserstein(images, 0.5 * images, rng)
    assert (darker > 20).all() and (darkest > 2 * darker).all()  # brightness counts
    noisy = images + 0.1 * torch.randn(images.shape, generator=rng)
    by_level = generation.sliced_wasserstein(images, noisy, rng)
    assert by_level[0] > 5 * by_level[4]  # white noise is in the fine levels
    with pytest.raises(ValueError, match="equally many"):
        generation.sliced_wasserstein(images, images[:3], rng)


def test_ms_ssim_is_its_definition_by_scipy(images, noise):
    def gaussian(image):
        return scipy.ndimage.gaussian_filter(image, 1.5, truncate=5 / 1.5)[5:-5, 5:-5]

    x, y = images[:3], (0.7 * images + 0.3 * noise)[:3]
    found = generation.ms_ssim(x, y)
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


def test_ms_ssim_of_known_cases(images, noise):
    torch.testing.assert_close(generation.ms_ssim(images, images), torch.ones(6, dtype=torch.double))
    assert (generation.ms_ssim(noise, 1 - noise) == 0).all()  # opposed structure
    assert torch.equal(generation.ms_ssim(images, noise), generation.ms_ssim(noise, images))


def test_nearest_distances_are_a_plain_loop(images, noise):
    others = torch.cat([noise, images[2:3] + 0.01])
    found = generation.nearest_distances(images, others.split(3))
    for i, image in enumerate(images):
        expected = min(((image - other) ** 2).mean().sqrt().item() for other in others)
        assert found[i].item() == pytest.approx(expected, rel=1e-3)
    assert found[2].item() == pytest.approx(0.01, rel=1e-3)


def test_grey_value_distance_is_scipys(images, noise):
    real, fake = images, images**2
    levels = [(side[side > generation.FOREGROUND] * 255).round().numpy() for side in (real, fake)]
    expected = scipy.stats.wasserstein_distance(*levels) / 255
    assert generation.grey_value_distance(real, fake) == pytest.approx(expected, rel=1e-6)
    assert generation.grey_value_distance(real, real) == 0
    half, whole = torch.full((1, 1, 256, 256), 51 / 255), torch.full((1, 1, 256, 256), 153 / 255)
    assert generation.grey_value_distance(half, whole) == pytest.approx(0.4)
    assert generation.grey_value_distance(images, torch.zeros_like(images)) == 1


def test_similarity_of_pairs_is_of_different_groups_only(images, noise, rng):
    same = images[:1].expand(4, -1, -1, -1)
    assert generation.similarity_of_pairs(same, range(4), rng, 20) == pytest.approx(1)
    two = torch.cat([same, images[3:4].expand(4, -1, -1, -1)])
    between = generation.ms_ssim(images[:1], images[3:4]).item()
    assert generation.similarity_of_pairs(two, [0] * 4 + [1] * 4, rng, 50) == pytest.approx(between, rel=1e-5)
    assert between < generation.similarity_of_pairs(two, range(8), rng, 50) < 1
    assert np.isnan(generation.similarity_of_pairs(same, [7] * 4, rng))


def test_copies_of_one_training_image_are_seen_through(data):
    train, held_out = OasisDataset(data, "train"), OasisDataset(data, "validate")
    copies = train.batch([3] * len(held_out))
    rows = generation.compare_generated(copies, VQVAE().eval(), held_out, train, seed=0, n_pairs=20)
    measures = {row.name: (row.generated.value, row.beside.value) for row in rows}
    similar, similar_real = measures["MS-SSIM of pairs"]
    near, near_real = measures["distance to the nearest training image, 5th percentile"]
    assert similar == pytest.approx(1) and similar_real < 0.9
    assert near < 1e-3 and near_real > 0.01


def test_independent_codes_are_at_each_position_those_of_some_image(data):
    dataset = OasisDataset(data, "train")
    vqvae = VQVAE()
    with torch.no_grad():  # codes that spread, and a decoder that shows them
        codebook.start_from(vqvae.vector_quantizer, vqvae.latents(dataset.batch([0, 3])), torch.Generator())
    codes = vqvae.encode(dataset.batch([0, 3]))
    vqvae.decode = lambda codes: codes / 512
    drawn = generation.decode_independent_codes(vqvae, dataset, [0, 3], torch.Generator()) * 512
    for one in drawn:
        assert ((one == codes[0]) | (one == codes[1])).all()
        assert (one != codes[0]).any() and (one != codes[1]).any()


def test_the_images_that_are_measured_are_spaced_over_all_subjects(data, monkeypatch):
    train, held_out = OasisDataset(data, "train"), OasisDataset(data, "validate")
    monkeypatch.setattr(generation, "MOST_MEASURED", 4)
    real = generation.HeldOut(VQVAE().eval(), held_out, train, seed=0)
    assert real.indices == [0, 2, 5, 7] and real.subjects == [4, 4, 5, 5]
    assert len(real.picked) == 4 == len(real.features.anatomy)
    assert generation.n_measured(held_out, held_out) == 4 < len(held_out)
    assert real.measure(held_out.batch([0, 2, 5, 7]))["swd_mean"].value == 0  # the same images on both sides
