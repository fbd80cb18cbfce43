"""The spectra of coefficients: against NumPy, and by what linear maps do."""

import numpy as np
import pytest
import torch

from priors.spectrum import LARGEST_FACTOR, covariance_spectrum, multiply_spectrum, power_spectrum, transport


def test_power_spectrum_is_numpys_by_ring():
    c = torch.randn(600, 2, 64, 64, generator=torch.Generator().manual_seed(0))
    c[:, 1] += torch.cos(2 * torch.pi * 9 * torch.arange(64) / 64)
    found = power_spectrum(c)
    assert found.shape == (2, 64, 33)
    np.testing.assert_allclose(found[0].numpy(), 1, atol=0.05)  # white noise
    frequency = np.hypot(np.fft.fftfreq(64)[:, None], np.fft.fftfreq(64)) * 64
    power = (np.abs(np.fft.fft2(c[:, 1].numpy(), norm="ortho")) ** 2).mean(0)
    rings = [np.log(power[np.abs(frequency - n) <= 0.5].mean()) for n in (8, 9, 10)]
    assert found[1, 0, 9].item() == pytest.approx(np.exp(np.mean(rings)), rel=0.02)
    torch.testing.assert_close(found[1, 9, 0], found[1, 0, 9])
    torch.testing.assert_close(found[1, 0, 20], found[1, 12, 16])  # both 20 cycles


def test_covariance_spectrum_and_its_product_are_numpys():
    rng = np.random.default_rng(0)
    c, matrices = rng.standard_normal((3, 2, 64, 64)), rng.standard_normal((45, 2, 2))
    c[:, 1] += 0.5 * c[:, 0] + 1
    rings = np.hypot(np.fft.fftfreq(64)[:, None], np.fft.fftfreq(64)) * 64
    rings = np.maximum(np.round(rings), 1).astype(int) - 1
    spectrum = np.fft.fft2(c, norm="ortho")
    expected = [spectrum[:, :, rings == n] for n in range(45)]
    expected = [np.einsum("bkp,blp->kl", part, part.conj()).real / part.shape[2] / 3 for part in expected]
    found = covariance_spectrum(torch.tensor(c).float())
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-3, atol=1e-4)
    product = np.fft.ifft2(np.einsum("hwkl,blhw->bkhw", matrices[rings], spectrum), norm="ortho")
    found = multiply_spectrum(torch.tensor(c).float(), torch.tensor(matrices).float())
    np.testing.assert_allclose(found.numpy(), product.real, rtol=0, atol=1e-4)


def test_transport_is_the_symmetric_map_between_two_covariances():
    roots = 0.05 * torch.randn(2, 9, 6, 6, generator=torch.Generator().manual_seed(0)) + torch.eye(6)
    a, b = roots @ roots.mT
    t = transport(a, b)
    torch.testing.assert_close(t, t.mT)
    assert torch.linalg.eigvalsh(t).min() > 0
    torch.testing.assert_close(t @ a @ t, b, rtol=1e-3, atol=1e-4)
    much = transport(a, 100 * a), transport(a, a / 100)  # a change of amplitudes by 10 is too much
    same = transport(a, a), transport(0 * a, 0 * a)
    for found, expected in zip((*much, *same), (LARGEST_FACTOR, 1 / LARGEST_FACTOR, 1, 1), strict=True):
        torch.testing.assert_close(found, (expected * torch.eye(6)).expand_as(found), rtol=0, atol=1e-3)
