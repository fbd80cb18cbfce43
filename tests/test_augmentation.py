"""What the discriminator sees is changed as numbers say: against SciPy, and where nothing or all of it changes."""

import numpy as np
import pytest
import scipy.ndimage
import torch
from augmentation import ANGLE, CUT, MOVED, NUMBERS, SHIFT, SQUARE, ZOOM, changed


@pytest.fixture
def c():
    """Smooth maps, 0 at the borders."""
    x = torch.rand(3, 6, 64, 64, generator=torch.Generator().manual_seed(0)).numpy() - 0.5
    x[:, :, :14], x[:, :, -14:], x[:, :, :, :14], x[:, :, :, -14:] = 0, 0, 0, 0
    return torch.from_numpy(scipy.ndimage.gaussian_filter(x, (0, 0, 3, 3)))


def numbers(**given):
    """Of three images, which stay as they are but for what is given."""
    found = torch.tensor([0.999, 0.999, 0.5, 0.5, 0.5, 0.5, 0.5, 0.5]).repeat(3, 1)
    for name, value in given.items():
        found[:, ("moved", "cut", "angle", "zoom", "x", "y", "row", "column").index(name)] = torch.tensor(value)
    return found


def test_an_image_that_is_neither_moved_nor_cut_stays_as_it_is(c):
    torch.testing.assert_close(changed(c, numbers(angle=0.9, zoom=0.1, x=0.0, row=0.3)), c, rtol=0, atol=1e-5)


def test_images_are_turned_zoomed_and_shifted_about_their_middle(c):
    found = changed(c, numbers(moved=0.0, angle=[0.9, 0.2, 0.5], zoom=[0.1, 0.8, 0.5], x=[0.5, 0.7, 1.0], y=0.2))
    middle = np.array([31.5, 31.5])
    for image, result, angle, zoom, x in zip(c, found, (0.8, -0.6, 0), (-0.8, 0.6, 0), (0, 0.4, 1), strict=True):
        turn, factor = np.radians(ANGLE * angle), np.exp(ZOOM * zoom)
        # output to input, rows before columns
        matrix = factor * np.array([[np.cos(turn), np.sin(turn)], [-np.sin(turn), np.cos(turn)]])
        offset = middle + 64 * SHIFT * np.array([-0.6, x]) - matrix @ middle
        for one, expected in zip(result, image, strict=True):
            expected = scipy.ndimage.affine_transform(expected.numpy(), matrix, offset, order=3)
            np.testing.assert_allclose(one.numpy(), expected, atol=2e-3)
    assert c.abs().max() > 0.05


def test_squares_are_cut_out(c):
    found = changed(c + 1, numbers(cut=[0.0, 0.999, CUT], row=[0.5, 0.5, 0.5], column=[0.0, 0.5, 0.5]))
    expected, half = (c + 1).clone(), SQUARE * 32
    expected[0, :, round(32 - half) : round(32 + half), : round(half)] = 0
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)


def test_the_stated_shares_of_images_are_moved_and_cut(c):
    drawn = torch.rand(400, NUMBERS, generator=torch.Generator().manual_seed(1))
    many = torch.ones(400, 1, 64, 64)
    holes = changed(many, drawn * torch.tensor([0, 1] + 6 * [1]) + torch.tensor([1.0] + 7 * [0]))  # none is moved
    assert (holes.amin((1, 2, 3)) < 0.5).double().mean().item() == pytest.approx(CUT, abs=0.08)
    moved = changed(c[:1].expand(400, -1, -1, -1), drawn + torch.tensor([0.0, 1.0] + 6 * [0]))  # none is cut
    share = ((moved - c[:1]).abs().amax((1, 2, 3)) > 1e-4).double().mean()
    assert share.item() == pytest.approx(MOVED, abs=0.08)


def test_gradients_reach_what_was_changed(c):
    x = c.double().requires_grad_(True)
    given = torch.rand(3, NUMBERS, generator=torch.Generator().manual_seed(2))
    direction = torch.randn(x.shape, generator=torch.Generator().manual_seed(3)).double()
    (slope,) = torch.autograd.grad(changed(x, given).square().sum(), x)
    sides = [changed(x + e * direction, given).square().sum().item() for e in (1e-5, -1e-5)]
    assert (slope * direction).sum().item() == pytest.approx((sides[0] - sides[1]) / 2e-5, rel=1e-5)


def test_autocast_changes_nothing(c):
    given = torch.rand(3, NUMBERS, generator=torch.Generator().manual_seed(4))
    with torch.autocast("cpu", torch.bfloat16):
        found = changed(c, given)
    assert torch.equal(found, changed(c, given))
