"""Measures of generated images: against SciPy, plain loops, and cases whose answer is known."""

from dataclasses import replace

import numpy as np
import pytest
import scipy.ndimage
import scipy.stats
import torch
from conftest import PRETRAINED

from dataset import OasisDataset
from evaluation import generation
from evaluation.two_sample import mean_coherence
from modules import VQVAE
from priors.checkpoints import load_vqvae
from support import seeds


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


@pytest.fixture
def few_are_enough(monkeypatch):
    """All measures, of the few phantoms of the tests too."""
    monkeypatch.setattr(generation, "FEWEST_COMPARED", 5)


def test_a_set_of_images_is_spaced_evenly_and_keeps_its_subjects(data):
    images = OasisDataset(data, "validate").as_images()
    some = images.evenly_spaced(4)
    assert some.subjects == [4, 4, 5, 5] and some.names == [images.names[i] for i in (0, 2, 5, 7)]
    assert torch.equal(some.pixels, images.pixels[[0, 2, 5, 7]]) and len(images.evenly_spaced(99)) == 10
    with pytest.raises(ValueError, match="uint8"):
        generation.of_arrays(np.zeros((3, 256, 256)))
    with pytest.raises(ValueError, match="256"):
        generation.of_arrays(np.zeros((3, 128, 128), np.uint8))


def test_equal_images_have_no_distance_and_a_reference_keeps_its_own_indices(data, vqvae, few_are_enough):
    images = OasisDataset(data, "validate").as_images()
    reference = generation.Reference(VQVAE().eval(), images, seed=0)
    found = reference.measure(images)
    assert found["swd"].value == 0 and list(found) == list(generation.MEASURES)
    rng = seeds.generator(0, "resampling")
    assert found["coherence"] == mean_coherence(reference.features, rng)
    again = generation.Reference(reference.vqvae, images, seed=0).measure(images)
    assert found == again and not np.isnan(found["texture_auc"].value)


def test_what_stands_beside_is_of_other_subjects_and_of_reconstructions(data, few_are_enough):
    """Each value of a row is that of two sets of images that the test makes itself."""
    train, real = (OasisDataset(data, split).as_images() for split in ("train", "validate"))
    fake = OasisDataset(data, "test").as_images()
    vqvae = load_vqvae(PRETRAINED / "vqvae.pth")
    everything = replace(train, pixels=train.pixels[:10], subjects=train.subjects[:10], names=train.names[:10])

    def swd(real, fake) -> float:
        return generation.Reference(vqvae, real, 0).measure(fake)["swd"].value

    decoded = {name: generation.reconstructed(vqvae, each) for name, each in (("real", real), ("fake", fake))}
    picked = generation.compare(real, fake, vqvae, everything)  # 10 of 10, in another order
    assert picked.rows[0].fake.value == swd(real, fake)
    row = generation.compare(real, fake, vqvae, everything, reconstruct="real").rows[0]
    assert row.fake.value == swd(decoded["real"], fake)
    row = generation.compare(real, fake, vqvae, everything, reconstruct="both").rows[0]
    assert row.fake.value == swd(decoded["real"], decoded["fake"])
    row = generation.compare(real, fake, vqvae).rows[0]  # halves: subject 4 beside subject 5
    first, second = real[range(5)], real[range(5, 10)]
    assert row.real.value == swd(first, second)
    assert row.reconstructions.value == swd(first, generation.reconstructed(vqvae, second))
    coherence = generation.compare(real, fake, vqvae).rows[1]
    assert coherence.real.value == generation.Reference(vqvae, first, 0).measure(second)["coherence"].value
    with pytest.raises(ValueError, match="reconstruct must be"):
        generation.compare(real, fake, vqvae, reconstruct="fake")


def test_too_few_images_and_one_subject_leave_measures_out_and_say_why(data):
    real, fake = OasisDataset(data, "validate").as_images(), OasisDataset(data, "test").as_images()
    found = generation.compare(real, fake, VQVAE().eval())
    assert [str(row.fake)[0] == "–" for row in found.rows] == [False] * 2 + [True] * 3
    assert "need 30 images a side" in found.missing[0] and found.copies is None
    images = generation.Images(real.pixels[torch.arange(32) % 10], [""] * 32, ["one subject"] * 32)
    alone = generation.compare(images, images, VQVAE().eval(), OasisDataset(data, "train").as_images())
    assert "of several subjects" in alone.missing[0]
