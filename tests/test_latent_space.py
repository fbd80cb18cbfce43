"""The map between latents and the generator's range: against NumPy, SciPy and maps whose answer is known."""

import numpy as np
import pytest
import scipy.linalg
import scipy.ndimage
import torch
from conftest import PRETRAINED

from evaluation.reconstruction import ssim
from modules import VQVAE
from priors.checkpoints import load_vqvae
from priors.latent_cache import LatentCache
from priors.latent_space import CLIPPED, LatentSpace
from priors.spectrum import power_spectrum


@pytest.fixture(scope="module")
def space(vqvae, train_set):
    return LatentSpace.fit(vqvae, train_set, 4, 0.5)


@pytest.fixture(scope="module")
def encoded(vqvae, train_set):
    """Latents and codes of the training split, which has fewer images than a space is fitted on."""
    with torch.no_grad():
        return vqvae.latents(train_set.batch(range(15))), vqvae.encode(train_set.batch(range(15)))


@pytest.fixture(scope="module")
def usual(space, vqvae):
    """The code (64, 64) whose embedding is the space's shift."""
    weight = vqvae.vector_quantizer.embedding.weight.detach()
    return (space.shift.flatten(1).T[:, None] == weight).all(2).int().argmax(1).view(64, 64)


def test_a_space_maps_there_and_back(space):
    c = 0.1 * torch.randn(3, 4, 64, 64, generator=torch.Generator().manual_seed(0)) * space.support
    t = torch.einsum("dk,bkhw->bdhw", space.mix, c)
    torch.testing.assert_close(space.to_channels(c), t, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(t.norm(dim=1), c.norm(dim=1), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(space.to_coefficients(t), c, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(space.clipped(c), c, rtol=1e-4, atol=1e-6)
    clipped = torch.einsum("dk,bdhw->bkhw", space.mix, (100 * t).clamp(-1, 1))  # to what tanh can give
    torch.testing.assert_close(space.clipped(100 * c), clipped, rtol=1e-4, atol=1e-5)
    z, outside = space.decode(c), space.support == 0
    assert outside.any() and torch.equal(z[:, :, outside], space.shift[:, outside].expand(3, -1, -1))
    assert not space.to_coefficients(torch.ones(1, 8, 64, 64))[:, :, outside].any()
    difference = z - space.shift  # only along the directions
    along = torch.einsum("dk,ek,behw->bdhw", space.directions, space.directions, difference)
    torch.testing.assert_close(along, difference, rtol=1e-3, atol=1e-4)


def test_the_support_reaches_two_positions_beyond_what_varies(space, encoded, usual):
    varies = (encoded[1] != usual).any(0).numpy()
    expected = scipy.ndimage.binary_dilation(varies, np.ones((5, 5)))
    assert (expected == space.support.numpy()).all() and (expected != varies).mean() > 0.05


def test_coefficients_are_numpys(space, encoded):
    z = encoded[0][:2]
    found = space.encode(z)
    difference = (z - space.shift).double().numpy()
    gain = np.concatenate([space.scale.numpy(), np.zeros((4, 64, 31))], 2)
    for i in range(2):
        for k in range(4):
            projected = np.tensordot(space.directions[:, k].double().numpy(), difference[i], 1)
            full = gain[k].copy()  # the other half of the frequencies has the same gains
            full[:, 33:] = full[-np.arange(64)][:, 31:0:-1]
            expected = np.fft.ifft2(np.fft.fft2(projected) * full).real * space.support.numpy()
            np.testing.assert_allclose(found[i, k].numpy(), expected, atol=1e-4)


def test_what_is_constant_is_subtracted(space, encoded, vqvae):
    z, codes = encoded
    weight = vqvae.vector_quantizer.embedding.weight.detach()
    background = codes.flatten().mode().values
    for row, column in ((0, 5), (63, 63), (10, 3), (32, 32), (30, 25)):
        counts = np.bincount(codes[:, row, column].numpy(), minlength=64)
        usual = counts.argmax() if counts.max() > 7.5 else background
        assert torch.equal(space.shift[:, row, column], weight[usual])


def test_directions_are_scipys_principal_ones(space, encoded, usual):
    z, codes = encoded
    head = (z - space.shift).permute(0, 2, 3, 1)[codes != usual].double().numpy()
    expected = scipy.linalg.svd(head, full_matrices=False)[2][:4]
    overlap = np.abs(np.einsum("kd,dk->k", expected, space.directions.double().numpy()))
    np.testing.assert_allclose(overlap, 1, atol=1e-3)
    t = torch.einsum("dk,bkhw->bhwd", space.mix, space.encode(z))[codes != usual].abs()
    assert (t >= 1).double().mean().item() == pytest.approx(CLIPPED, rel=0.1)


@pytest.mark.parametrize("emphasis", [0.0, 0.5, 1.0])
def test_emphasis_is_the_exponent_of_the_spectrum_that_is_divided_by(vqvae, train_set, encoded, emphasis):
    space = LatentSpace.fit(vqvae, train_set, 4, emphasis)
    plain = LatentSpace.fit(vqvae, train_set, 4, 0.0)
    before, after = (power_spectrum(each.encode(encoded[0])).double().log() for each in (plain, space))
    for k in range(2):  # the leading ones
        slope = np.polyfit(before[k].flatten().numpy(), after[k].flatten().numpy(), 1)[0]
        assert slope == pytest.approx(1 - emphasis, abs=0.05)


def test_a_codebook_of_one_used_code_has_a_space(train_set):
    space = LatentSpace.fit(VQVAE(1, 4), train_set, 4, 0.5)
    assert all(value.isfinite().all() for value in vars(space).values()) and (space.scale > 0).all()


def test_images_decode_from_what_is_kept_as_from_all(train_set):
    vqvae = load_vqvae(PRETRAINED / "vqvae.pth")
    space = LatentSpace.fit(vqvae, train_set, 4, 0.5)
    x = train_set.batch(range(8))
    through = space.decode(LatentCache(vqvae, train_set, space).batch(range(8)))
    found, best = (vqvae.decode(k).clamp(0, 1) for k in (vqvae.vector_quantizer.nearest(through), vqvae.encode(x)))
    assert ssim(x, found).mean() > ssim(x, best).mean() - 0.01
