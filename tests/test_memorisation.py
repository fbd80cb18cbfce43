"""Copies of training images: planted ones, and a plain loop."""

import numpy as np
import pytest
import scipy.ndimage
import scipy.stats
import torch

from evaluation import memorisation
from evaluation.generation import of_arrays
from preparation import phantoms


@pytest.fixture(scope="module")
def slices() -> torch.Tensor:
    """Phantoms of 30 heads (30, 1, 256, 256) uint8."""
    return torch.from_numpy(np.stack([phantoms.make_pair(case, case % 32)[0] for case in range(30)])[:, None])


def test_the_nearest_image_is_that_of_a_plain_loop_over_shifts(slices):
    images, others = slices[:3, :, 80:144, 80:144].contiguous(), slices[3:7, :, 80:144, 80:144].contiguous()
    found = memorisation.nearest(images, others)

    def smooth(images):
        return [scipy.ndimage.gaussian_filter(each, 2, mode="mirror", truncate=3) for each in images[:, 0].double()]

    for i, image in enumerate(smooth(images)):
        x, best = image[2:-2, 2:-2], (2.0,)
        for k, other in enumerate(smooth(others)):
            for row in range(-2, 3):
                for column in range(-2, 3):
                    y = other[2 - row : 62 - row, 2 - column : 62 - column]
                    factor = (x * y).sum() / (y * y).sum()
                    distance = np.linalg.norm(x - factor * y) / np.linalg.norm(x)
                    best = min(best, (distance, k, row, column, factor))
        assert found.distance[i].item() == pytest.approx(best[0], abs=1e-4)
        assert (found.index[i], found.rows[i], found.columns[i]) == best[1:4]
        assert found.brightness[i].item() == pytest.approx(best[4], rel=1e-4)


def test_copies_are_found_moved_and_brighter_ones_too(slices):
    train, real, own = slices[:14], slices[14:22], slices[22:]
    copies = torch.cat([train[3:4], train[5:6].roll((2, -1), (2, 3)), (train[7:8].float() * 0.9).round().byte(), own])
    sides = [of_arrays(each) for each in (copies, real, train)]
    found = memorisation.find_copies(*sides, torch.Generator())
    assert found.fake.index[:3].tolist() == [3, 5, 7] and (found.fake.distance[:3] < 0.02).all()
    assert (found.fake.rows[1], found.fake.columns[1]) == (2, -1)
    assert found.fake.brightness[2].item() == pytest.approx(0.9, rel=1e-2)
    assert found.near[:3].all() and found.threshold == found.real.distance.min()
    assert found.share.value == found.near.double().mean() and found.share.low < found.share.value < found.share.high
    none = memorisation.find_copies(of_arrays(own), of_arrays(real), of_arrays(train), torch.Generator())
    assert not none.near.any()
    assert none.share.high == pytest.approx(1 - 0.025 ** (1 / len(own)))  # Clopper and Pearson


def test_a_black_image_is_no_copy_and_held_out_images_are_rarely_near(slices):
    black = memorisation.nearest(torch.zeros(1, 1, 256, 256, dtype=torch.uint8), slices)
    assert black.distance.item() == 1
    values = torch.rand(1000, generator=torch.Generator().manual_seed(0)).double()
    weights = torch.ones(1, 1000).double()
    assert (values < memorisation._quantile(values, weights)).sum() == 10  # numpy's "higher"


@pytest.mark.parametrize("k, n", [(0, 30), (3, 256), (128, 256), (30, 30)])
def test_the_interval_of_a_share_is_scipys(k, n):
    expected = scipy.stats.binomtest(k, n).proportion_ci()
    assert memorisation.exact_interval(k, n) == pytest.approx((expected.low, expected.high), abs=1e-9)
