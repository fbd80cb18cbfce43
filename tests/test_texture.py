"""What describes an image's texture: against SciPy, NumPy and patterns whose answer is known."""

import numpy as np
import pytest
import scipy.ndimage
import torch

from evaluation import texture
from modules import VQVAE

TEXTURED = torch.rand(2, 1, 256, 256, generator=torch.Generator().manual_seed(0))


def stripes(period: float, angle: float = 0.0) -> torch.Tensor:
    """An image (1, 1, 256, 256) in [0, 1] of stripes with a period in pixels."""
    y, x = torch.meshgrid(torch.arange(256.0), torch.arange(256.0), indexing="ij")
    across = x * np.cos(angle) + y * np.sin(angle)
    return (0.5 + 0.5 * torch.sin(2 * torch.pi * across / period))[None, None]


def test_coherence_is_that_of_numpys_eigenvalues(images):
    image = images[0, 0].double().numpy()
    slopes = np.gradient(image)
    tensor = np.empty((256, 256, 2, 2))
    for i in range(2):
        for j in range(2):
            tensor[..., i, j] = scipy.ndimage.gaussian_filter(slopes[i] * slopes[j], 4, mode="mirror", truncate=3)
    low, high = np.moveaxis(np.linalg.eigvalsh(tensor), -1, 0)
    inside = (slice(16, -16), slice(16, -16))  # NumPy's slopes at the border are one-sided
    expected, found = ((high - low) / (high + low + 1e-8))[inside], texture.coherence(images[:1])[0, 0][inside]
    np.testing.assert_allclose(found.numpy(), expected, atol=1e-4)


@pytest.mark.parametrize("angle", [0.0, 0.7, 1.57])
def test_stripes_are_coherent_and_noise_is_not(angle):
    assert texture.coherence(stripes(12, angle))[:, :, 16:-16, 16:-16].min() > 0.95
    assert texture.coherence(TEXTURED).mean() < 0.25


@pytest.mark.parametrize(("period", "octave"), [(45, 0), (22, 1), (11, 2), (5.5, 3), (2.7, 4)])
def test_the_power_of_stripes_is_in_their_octave(period, octave):
    powers = texture.log_band_powers(stripes(period, 0.4))[0]
    assert powers.argmax() == octave and powers.sort().values[-1] > powers.sort().values[-2] + 1


def test_band_powers_of_noise_are_its_variance(images):
    noise = torch.randn(4, 1, 256, 256, generator=torch.Generator().manual_seed(1)) * 0.1
    window = np.hanning(256)  # which keeps (3 / 8)² of the energy
    expected = np.log10(0.01 * np.mean(np.outer(window, window) ** 2))
    np.testing.assert_allclose(texture.log_band_powers(noise).mean(0)[1:].numpy(), expected, atol=0.05)


def test_features_of_a_split_are_those_of_its_parts_and_windows_lie_in_heads(images):
    vqvae, bright = VQVAE().eval(), images.clone()
    bright[1, :, :128] += 0.5  # at least its upper half is head
    pixels = (bright.clamp(0, 1) * 255).round().byte()
    bright = pixels.float() / 255
    found, alone = (texture.features(vqvae, x, range(len(x))) for x in (pixels, pixels[1:2]))
    assert found.subjects == list(range(len(images)))
    torch.testing.assert_close(found.windows[found.window_image == 1], alone.windows, rtol=1e-4, atol=1e-4)
    assert (found.window_image == 1).sum() >= 8 > (found.window_image == 0).sum()
    z = vqvae.latents(bright[1:2])[0].detach()
    torch.testing.assert_close(found.moments[1, 2, 3, :64].float(), z[:, 32:48, 48:].mean((1, 2)), rtol=1e-4, atol=1e-5)
    std = z[:, 32:48, 48:].std((1, 2), correction=0)
    torch.testing.assert_close(found.moments[1, 2, 3, 64:].float(), std, rtol=1e-2, atol=1e-4)
    powers = texture.log_band_powers(bright[1:2, :, :64, :64])[0].double()  # of the first window, which is all head
    torch.testing.assert_close(alone.windows[0, :5], powers, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(alone.windows[0, 6:], alone.moments[0, 0, 0], rtol=1e-4, atol=1e-4)
    assert found.anatomy.shape == (len(images), 4096) and found.coherence.shape == (len(images),)
    for i, image in enumerate(bright[:, 0].double().numpy()):
        inside = scipy.ndimage.gaussian_filter(image, 4, mode="mirror", truncate=3) > texture.HEAD
        expected = texture.coherence(bright)[i, 0].numpy()[inside].mean()
        assert found.coherence[i].item() == pytest.approx(expected, rel=1e-3)
