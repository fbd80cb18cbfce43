"""What a prior learns: a split's latents."""

import torch

from priors.latent_cache import LatentCache
from priors.latent_space import LatentSpace
from support import device


def test_quantized_latents_are_embeddings(vqvae, train_set):
    space = LatentSpace.of_codebook(vqvae)
    found = space.decode(LatentCache(vqvae, train_set, space, quantized=True).batch([4]))
    expected = vqvae.vector_quantizer.look_up(vqvae.encode(train_set.batch([4])))
    torch.testing.assert_close(found, expected, atol=2e-3, rtol=0)  # half precision


def test_stored_latents_equal_encoding_afresh(vqvae, train_set, latents, monkeypatch):
    monkeypatch.setattr(device, "free_memory", lambda device: 0)
    afresh = LatentCache(vqvae, train_set, latents.space)
    assert latents.stored and not afresh.stored
    first, second = latents.batch([3, 11, 0]), afresh.batch([3, 11, 0])
    assert first.shape == (3, 6, 64, 64) and first.dtype == torch.float32
    mixed = torch.einsum("dk,bkhw->bdhw", latents.space.mix, first)
    assert mixed.abs().max() < 1.5  # cut to tanh's range, then projected
    torch.testing.assert_close(first, second, atol=4e-3, rtol=0)  # both rounded to half precision
    assert (first == second).float().mean() > 0.99
    assert not LatentCache(vqvae, train_set, latents.space, stored=False).stored
