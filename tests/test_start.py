"""The start of the generator from data: against SciPy, and by what it is for."""

import numpy as np
import pytest
import scipy.linalg
import torch
import torch.nn.functional as F

from modules import Generator, dcgan_init
from support.device import FastPath
from training.start import principal_scores, start_generator


def test_scores_are_scipys_principal_components(latents):
    x = F.avg_pool2d(latents.batch(range(15)), 2).flatten(1).double().numpy()
    left, size, _ = scipy.linalg.svd(x - x.mean(0), full_matrices=False)
    found = principal_scores(latents, torch.arange(15), 5, torch.Generator().manual_seed(0)).double().numpy()
    np.testing.assert_allclose(np.abs(found.T @ left[:, :5]), 15**0.5 * np.eye(5), atol=0.02)
    assert size[4] > 1.01 * size[5]  # else the fifth would not be defined


def test_noise_takes_the_place_of_components_that_are_not_there(latents):
    found, again, other = (
        principal_scores(latents, torch.arange(15), 128, torch.Generator().manual_seed(seed)) for seed in (0, 0, 1)
    )
    assert found.shape == (15, 128) and torch.equal(found, again)
    assert found[:, :14].mean(0).abs().max() < 1e-3  # fifteen images have fourteen components
    torch.testing.assert_close(found[:, :14].square().mean(0), torch.ones(14), rtol=1e-3, atol=0)
    assert found[:, 14:].std().item() == pytest.approx(1, abs=0.1)
    assert not torch.equal(found[:, 14:], other[:, 14:])


def test_a_started_generator_resembles_latents(latents):
    torch.manual_seed(0)
    generator, c = Generator(embeddings_dim=8).apply(dcgan_init), latents.batch(range(15))
    before = {key: value.clone() for key, value in generator.state_dict().items()}
    optimizer = torch.optim.Adam(generator.parameters(), 1e-3)
    assert not list(start_generator(generator, optimizer, latents, range(0), 4, FastPath("cpu"), seed=0))
    assert all(torch.equal(generator.state_dict()[key], value) for key, value in before.items())
    assert not list(start_generator(generator, optimizer, latents, range(40), 8, FastPath("cpu"), seed=0))
    state = {key: value.clone() for key, value in generator.state_dict().items()}
    noise, mean = torch.randn(64, 128, 1, 1, generator=torch.Generator().manual_seed(0)), c.mean(0)
    for weights, low, high in ((before, -0.1, 0.1), (state, 0.4, 1.0)):
        generator.load_state_dict(weights)
        with torch.no_grad():
            made = latents.space.to_coefficients(generator(noise)).mean(0)
        assert low < (made * mean).sum() / made.norm() / mean.norm() < high
