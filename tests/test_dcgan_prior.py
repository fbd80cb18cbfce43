"""The DCGAN as a prior: sampling, snapping to codes, calibration, and its file."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from modules import VQVAE, Generator, dcgan_init
from priors import dcgan
from priors.checkpoints import load_prior
from priors.dcgan import DCGANPrior, walk
from priors.spectrum import covariance_spectrum, multiply_spectrum
from support.console import UserError


def test_samples_are_snapped_to_the_codebook(vqvae, latents, monkeypatch):
    torch.manual_seed(0)
    prior = DCGANPrior(Generator(embeddings_dim=8).eval(), latents.space, vqvae)
    noise = prior.noise(5, torch.Generator().manual_seed(0))
    codes = prior.sample(noise)
    coefficients = latents.space.to_coefficients(prior.generator(noise).detach())
    continuous = latents.space.decode(coefficients).permute(0, 2, 3, 1).reshape(-1, 8)
    distance = torch.cdist(continuous.double(), vqvae.vector_quantizer.embedding.weight.double())
    assert codes.shape == (5, 64, 64)  # of nearly equal embeddings either may be the nearest
    torch.testing.assert_close(distance.gather(1, codes.view(-1, 1))[:, 0], distance.amin(1), rtol=1e-3, atol=1e-4)
    monkeypatch.setattr(dcgan, "AT_ONCE", 2)
    images = prior.sample_images(noise)
    assert images.shape == (5, 1, 256, 256) and 0 <= images.min() and images.max() <= 1
    torch.testing.assert_close(images, vqvae.decode(codes).clamp(0, 1), atol=1e-5, rtol=0)


def test_calibration_gives_generated_latents_the_covariance_of_real_ones(vqvae, latents):
    class Wrong(torch.nn.Module):
        """A generator that draws real latents, some too weak, blurred or mixed: its noise holds their numbers."""

        def forward(self, noise):
            c = latents.batch([int(n) for n in noise[:, 0, 0, 0]])
            c[:, 1] *= 0.7
            c[:, 2] = 0.7 * c[:, 2] + 0.3 * F.avg_pool2d(c[:, 2:3], 3, 1, 1)[:, 0]
            c[:, 3] += 0.4 * c[:, 1]
            return torch.einsum("dk,bkhw->bdhw", latents.space.mix, c)

    prior, numbers = DCGANPrior(Wrong().eval(), latents.space, vqvae), torch.arange(15.0).view(15, 1, 1, 1)
    frequency = np.hypot(np.fft.fftfreq(64)[:, None], np.fft.fftfreq(64)) * 64

    def covariances(c):
        spectrum = np.fft.fft2(c.numpy())
        products = np.einsum("bkhw,blhw->klhw", spectrum, spectrum.conj()).real
        return np.stack([products[:, :, np.abs(frequency - n) < 0.5].mean(-1) for n in range(2, 32)])

    assert prior.gain is None
    for _ in range(2):  # what is calibrated already is calibrated anew, not once more
        prior = prior.calibrated(covariance_spectrum(latents.batch(range(15))), numbers)
        calibrated = multiply_spectrum(prior.coefficients(numbers), prior.gain)
        real, wrong, found = map(covariances, (latents.batch(range(15)), prior.coefficients(numbers), calibrated))
        sizes = np.sqrt(np.einsum("rkk,rll->rkl", real, real))
        assert np.abs((wrong - real) / sizes).max() > 0.3
        np.testing.assert_allclose(found / sizes, real / sizes, rtol=0, atol=0.02)
    z, quantizer = latents.space.decode(calibrated), vqvae.vector_quantizer
    nearest, sampled = ((quantizer.look_up(k) - z).norm(dim=1) for k in (quantizer.nearest(z), prior.sample(numbers)))
    torch.testing.assert_close(sampled, nearest, rtol=1e-3, atol=1e-4)  # of nearly equal embeddings either may be taken


def test_batch_statistics_are_measured_for_the_weights_as_they_are(vqvae, latents):
    generator = Generator(embeddings_dim=8).apply(dcgan_init)
    prior, noise = DCGANPrior(generator, latents.space, vqvae), torch.randn(64, 128, 1, 1)
    prior.reset_batch_norm(noise)
    first, after = generator.net[0][0], generator.net[0][1]
    with torch.no_grad():
        mean = torch.stack([first(part).mean((0, 2, 3)) for part in noise.split(32)]).mean(0)
    torch.testing.assert_close(after.running_mean, mean, rtol=1e-4, atol=1e-6)


def test_walk_goes_from_one_noise_vector_to_the_other_in_equal_angles():
    rng = torch.Generator().manual_seed(0)
    start, end = torch.randn(2, 128, 1, 1, generator=rng)
    steps = walk(start, 1.5 * end, 7)
    assert steps.shape == (7, 128, 1, 1)
    torch.testing.assert_close(steps[0], start)
    torch.testing.assert_close(steps[-1], 1.5 * end)
    lengths = steps.flatten(1).norm(dim=1)
    torch.testing.assert_close(lengths, torch.linspace(start.norm(), 1.5 * end.norm(), 7))
    units = (steps.flatten(1) / lengths[:, None]).double()
    angles = torch.acos((units[:-1] * units[1:]).sum(1))
    torch.testing.assert_close(angles, angles[:1].expand(6), rtol=1e-4, atol=0)
    torch.testing.assert_close(walk(start, start, 3), start.expand(3, -1, -1, -1))


@pytest.fixture
def prior(vqvae, latents):
    torch.manual_seed(0)
    return DCGANPrior(Generator(embeddings_dim=8), latents.space, vqvae)


def test_a_file_there_and_back(prior, vqvae, tmp_path):
    path = tmp_path / "x.pth"
    torch.save(prior.checkpoint(), path)
    assert load_prior(path, vqvae).gain is None
    prior.gain = torch.randn(45, 4, 4, generator=torch.Generator().manual_seed(2))
    torch.save(prior.checkpoint(), path)
    again = load_prior(path, vqvae)
    assert torch.equal(again.gain, prior.gain) and type(again) is type(prior)
    noise = prior.noise(2, torch.Generator().manual_seed(1))
    with torch.no_grad():
        torch.testing.assert_close(again.coefficients(noise), prior.coefficients(noise), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "key, value, message",
    [
        ("state_dict", 3, "state_dict to be dict-like"),
        ("state_dict", {}, "Missing key"),
        ("shift", 1.0, "does not hold what is expected"),
        ("gain", [], "does not hold what is expected"),
    ],
)
def test_a_spoiled_file_is_refused(prior, vqvae, tmp_path, key, value, message):
    torch.save(prior.checkpoint() | {key: value}, tmp_path / "x.pth")
    with pytest.raises(UserError, match=message):
        load_prior(tmp_path / "x.pth", vqvae)


@pytest.mark.parametrize("contents", [{}, [], {"state_dict": {}}, VQVAE(64, 8).state_dict()])
def test_what_is_no_prior_is_refused(vqvae, tmp_path, contents):
    torch.save(contents, tmp_path / "x.pth")
    with pytest.raises(UserError, match="no prior"):
        load_prior(tmp_path / "x.pth", vqvae)
