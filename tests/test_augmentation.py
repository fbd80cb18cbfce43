"""Images are moved as their positions say, against SciPy."""

import numpy as np
import pytest
import scipy.ndimage
import torch
import torch.nn.functional as F

from training.augmentation import ANGLE, MIRRORED, MOVED, SHIFT, ZOOM, affine, drawn_moves, moved, positions


def test_a_moved_image_shows_what_was_at_its_positions(images, rng):
    smooth = torch.from_numpy(scipy.ndimage.gaussian_filter(images[:6].numpy(), (0, 0, 5, 5)))
    moves = drawn_moves(6, rng)
    moves[:3, 0] *= -1  # of the other handedness
    at = (positions(moves, 256).numpy() + 1) / 2 * 255  # columns, rows
    for before, after, (column, row) in zip(smooth, moved(smooth, moves), at, strict=True):
        expected = scipy.ndimage.map_coordinates(before[0].numpy(), [row, column], order=3)
        np.testing.assert_allclose(after[0].numpy(), expected, atol=4e-3)
    assert (moved(smooth, moves) - smooth).abs().amax((1, 2, 3)).max() > 0.1


def test_an_image_that_stays_and_one_that_is_mirrored(images):
    stays = torch.eye(2, 3).expand(2, -1, -1)
    mirrored = stays * torch.tensor([-1.0, 1.0])[:, None]
    along = torch.linspace(-1, 1, 32)
    torch.testing.assert_close(moved(images[:2], stays), images[:2], rtol=0, atol=1e-5)
    torch.testing.assert_close(moved(images[:2], mirrored), images[:2].flip(3), rtol=0, atol=1e-4)
    for moves, columns in ((stays, along), (mirrored, -along)):
        found = positions(moves, 32)
        torch.testing.assert_close(
            found, torch.stack([columns.expand(32, 32), along[:, None].expand(32, 32)]).expand_as(found)
        )


def test_a_position_of_a_coarse_grid_is_the_mean_of_those_of_its_pixels(rng):
    moves = drawn_moves(9, rng)
    pixels = F.avg_pool2d((positions(moves, 256) + 1) / 2 * 255, 8)
    torch.testing.assert_close((positions(moves, 32) + 1) / 2 * 31 * 8 + 3.5, pixels, rtol=0, atol=1e-2)


def test_moves_are_within_their_bounds_and_as_frequent_as_stated(rng):
    moves = drawn_moves(2000, rng)
    matrix = moves[:, :, :2].double()
    mirrored = torch.linalg.det(matrix) < 0
    matrix[mirrored, 0] *= -1
    zoom, angle = torch.linalg.det(matrix).log() / 2, torch.atan2(matrix[:, 1, 0], matrix[:, 1, 1]).rad2deg()
    turned = angle.abs() > 1e-4
    assert mirrored.double().mean() == pytest.approx(MIRRORED, abs=0.04)
    assert turned.double().mean() == pytest.approx(MOVED, abs=0.04)
    assert (mirrored & turned).double().mean() == pytest.approx(MIRRORED * MOVED, abs=0.04)
    for found, bound in ((zoom, ZOOM), (angle, ANGLE), *((moves[:, i, 2].double(), SHIFT) for i in (0, 1))):
        assert -bound * 1.001 <= found.min() < -0.95 * bound and 0.95 * bound < found.max() <= bound * 1.001
        assert (found[~turned].abs() < 1e-5).all()


def test_an_affine_map_turns_then_shifts():
    found = affine(torch.tensor([90.0]), torch.tensor([2.0]).log(), torch.tensor([[0.5, -0.25]]))
    point = found[0] @ torch.tensor([1.0, 0.0, 1.0])
    torch.testing.assert_close(point, torch.tensor([0.5, 1.75]))


def test_a_shift_is_a_share_of_half_the_width():
    shifted = torch.tensor([[[1.0, 0.0, 0.25], [0.0, 1.0, 0.0]]])  # of two positions: a quarter of one
    assert torch.equal(positions(shifted, 2)[0, 0], torch.tensor([[-0.5, 1.5], [-0.5, 1.5]]))
