"""Between VQ-VAE and DCGAN: encoding a split, calibration, snapping to codes, generator.pth."""

from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from modules import VQVAE, Generator, dcgan_init
from support import device
from training.latents import Latents, Prior, codebook_hash, walk
from training.scale import LatentScale


def test_quantized_latents_are_embeddings(vqvae, train_set):
    scale = LatentScale.of_codebook(vqvae)
    found = scale.latents(Latents(vqvae, train_set, scale, quantized=True).batch([4]))
    expected = vqvae.vector_quantizer.look_up(vqvae.encode(train_set.batch([4])))
    torch.testing.assert_close(found, expected, atol=2e-3, rtol=0)  # half precision


def test_stored_latents_equal_encoding_afresh(vqvae, train_set, latents, monkeypatch):
    monkeypatch.setattr(device, "free_memory", lambda device: 0)
    afresh = Latents(vqvae, train_set, latents.scale)
    assert latents.stored and not afresh.stored
    first, second = latents.batch([3, 11, 0]), afresh.batch([3, 11, 0])
    assert first.shape == (3, 6, 64, 64) and first.dtype == torch.float32
    mixed = torch.einsum("dk,bkhw->bdhw", latents.scale.mix, first)
    assert mixed.abs().max() < 1.5  # cut to tanh's range, then projected
    torch.testing.assert_close(first, second, atol=4e-3, rtol=0)  # both rounded to half precision
    assert (first == second).float().mean() > 0.99
    assert not Latents(vqvae, train_set, latents.scale, stored=False).stored


def test_latents_decode_to_the_image(vqvae, train_set, latents):
    codes = vqvae.vector_quantizer.nearest(latents.scale.latents(latents.batch([2])))
    expected = vqvae.encode(train_set.batch([2]))
    assert (codes == expected).float().mean() > 0.95  # but for values that were clipped or fell across a boundary


def test_samples_are_snapped_to_the_codebook(vqvae, latents):
    torch.manual_seed(0)
    prior = Prior(Generator(embeddings_dim=8).eval(), latents.scale, vqvae)
    noise = prior.noise(5, torch.Generator().manual_seed(0))
    codes = prior.sample(noise)
    coefficients = latents.scale.generated(prior.generator(noise).detach())
    continuous = latents.scale.latents(coefficients).permute(0, 2, 3, 1).reshape(-1, 8)
    nearest = torch.cdist(continuous.double(), vqvae.vector_quantizer.embedding.weight.double()).argmin(1)
    assert codes.shape == (5, 64, 64) and (codes.flatten() == nearest).float().mean() > 0.999
    images = prior.sample_images(noise, size=2)
    assert images.shape == (5, 1, 256, 256) and 0 <= images.min() and images.max() <= 1
    torch.testing.assert_close(images, vqvae.decode(codes).clamp(0, 1), atol=1e-5, rtol=0)


def test_calibration_brings_generated_power_half_way_to_that_of_real_latents(vqvae, latents):
    class Weak(torch.nn.Module):
        """A generator that draws real latents, some of them too weak or blurred: its noise holds their numbers."""

        def forward(self, noise):
            c = latents.batch([int(n) for n in noise[:, 0, 0, 0]])
            c[:, 1] *= 0.7
            c[:, 2] = (c[:, 2] + F.avg_pool2d(c[:, 2:3], 3, 1, 1)[:, 0]) / 2
            return torch.einsum("dk,bkhw->bdhw", latents.scale.mix, c)

    free = replace(latents.scale, outline=torch.zeros(()), amplitudes=torch.tensor([0.0, 1e9]))
    prior, numbers = Prior(Weak().eval(), free, vqvae), torch.arange(15.0).view(15, 1, 1, 1)
    for _ in range(2):  # a second time changes nothing
        prior.calibrate(latents.power, free, numbers)
        before, after = (
            free.coefficients(scale.latents(free.generated(prior.generator(numbers)))) for scale in (free, prior.scale)
        )
        weak, found, real = (np.abs(np.fft.fft2(c.numpy())) ** 2 for c in (before, after, latents.batch(range(15))))
        for k in range(real.shape[1]):
            for part in (np.s_[:, k], np.s_[:, k, 8:24, 8:24]):
                halfway = (weak[part].mean() * real[part].mean()) ** 0.5
                assert found[part].mean() == pytest.approx(halfway, rel=0.1)
        assert (
            weak[:, 1].mean() < 0.6 * real[:, 1].mean()
            and weak[:, 2, 8:24, 8:24].mean() < 0.6 * real[:, 2, 8:24, 8:24].mean()
        )
    assert torch.equal(prior.scale.shift, free.shift)


def test_batch_statistics_are_measured_for_the_weights_as_they_are(vqvae, latents):
    generator = Generator(embeddings_dim=8).apply(dcgan_init)
    prior, noise = Prior(generator, latents.scale, vqvae), torch.randn(64, 128, 1, 1)
    prior.measure_statistics(noise)
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


def test_checkpoint_there_and_back(vqvae, latents, tmp_path):
    prior = Prior(Generator(embeddings_dim=8), latents.scale, vqvae)
    torch.save(prior.checkpoint(), tmp_path / "generator.pth")
    again = Prior.from_checkpoint(torch.load(tmp_path / "generator.pth", weights_only=True), vqvae)
    noise = torch.randn(2, 128, 1, 1)
    assert torch.equal(prior.sample(noise), again.sample(noise))


def test_checkpoint_of_another_codebook_is_refused(vqvae, latents):
    contents = Prior(Generator(embeddings_dim=8), latents.scale, vqvae).checkpoint()
    other = VQVAE(64, 8)
    assert codebook_hash(other) != codebook_hash(vqvae)
    with pytest.raises(ValueError, match="another codebook"):
        Prior.from_checkpoint(contents, other)


@pytest.mark.parametrize(
    "key, value, message",
    [
        ("state_dict", 3, "weights of a Generator"),
        ("state_dict", {}, "is missing"),
        ("shift", 1.0, "'shift'"),
        ("shift", torch.zeros(7), "'shift'"),
        ("scale", torch.full((6, 64, 33), torch.nan), "'scale'"),
        ("scale", torch.zeros(6, 64, 33), "'scale' has values that are not positive"),
        ("scale", torch.ones(6, 64, 64), "'scale' is not 6 x 64 x 33"),
        ("scale", 1.0, "'scale' is not"),
        ("mix", torch.zeros(8, 5), "'mix' is not 8 x 6"),
        ("amplitudes", torch.tensor([2.0, 1.0]), "'amplitudes' are not in order"),
    ],
)
def test_spoiled_checkpoint_is_refused(vqvae, latents, key, value, message):
    contents = Prior(Generator(embeddings_dim=8), latents.scale, vqvae).checkpoint() | {key: value}
    with pytest.raises(ValueError, match=message):
        Prior.from_checkpoint(contents, vqvae)


@pytest.mark.parametrize("contents", [{}, [], {"state_dict": {}}, VQVAE(64, 8).state_dict()])
def test_what_is_no_generator_is_refused(vqvae, contents):
    with pytest.raises(ValueError, match="no generator"):
        Prior.from_checkpoint(contents, vqvae)
