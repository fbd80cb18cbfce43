"""What the DCGAN learns: a split's latents."""

import pytest
import torch

from priors.latent_cache import LatentCache
from priors.latent_space import LatentSpace
from support.console import UserError


def test_quantized_latents_are_embeddings(vqvae, train_set):
    space = LatentSpace.of_codebook(vqvae)
    found = space.decode(LatentCache(vqvae, train_set, space, quantized=True).batch([4]))
    expected = vqvae.vector_quantizer.look_up(vqvae.encode(train_set.batch([4])))
    torch.testing.assert_close(found, expected, atol=2e-3, rtol=0)  # half precision


def test_coefficients_are_of_the_images_that_are_asked_for_and_clipped(vqvae, train_set, latents):
    space = latents.space
    found = latents.batch([3, 11, 0])
    assert found.shape == (3, 4, 64, 64) and found.dtype == torch.float32
    mixed = torch.einsum("dk,bkhw->bdhw", space.mix, found)
    assert mixed.abs().max() < 1.5  # cut to tanh's range, then projected
    with torch.no_grad():
        z_e = vqvae.latents(train_set.batch([3, 11, 0]))
    torch.testing.assert_close(found, space.clipped(space.encode(z_e)), atol=4e-3, rtol=0)  # half precision


def test_latents_that_do_not_fit_into_memory_are_an_error(vqvae, train_set, latents, monkeypatch):
    monkeypatch.setattr("priors.latent_cache.free_memory", lambda device: 15 * 4 * 64 * 64 * 2 - 1)
    with pytest.raises(UserError, match="latents of 15 slices need 0.0 GB of memory, more than is free"):
        LatentCache(vqvae, train_set, latents.space)
    monkeypatch.setattr("priors.latent_cache.free_memory", lambda device: 15 * 4 * 64 * 64 * 2)
    LatentCache(vqvae, train_set, latents.space)
