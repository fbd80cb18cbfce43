"""What the DCGAN learns: a split's latents."""

import torch

from priors.latent_cache import LatentCache
from priors.latent_space import LatentSpace


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
