"""The DCGAN's stage: one update against the formulas of its papers, its start, and what it does after an epoch."""

import copy
from dataclasses import replace
from functools import partial

import pytest
import torch
import torch.nn.functional as F

from dataset import OasisDataset
from priors.latent_cache import LatentCache
from support import seeds
from support.device import FastPath
from support.run import Run
from training import dcgan
from training.options import Options
from training.recipes import BALANCED, REPORT

PLAIN_MAP = replace(BALANCED, directions=None)  # coefficients are latents over the largest value of the codebook


@pytest.fixture
def new_stage(data, vqvae, tmp_path):
    """A stage of a recipe, its optimizers gradient descent with a rate."""
    splits = [OasisDataset(data, split) for split in ("train", "validate")]

    def new(recipe=None, lr=0.0, **options):
        chosen = Options(embeddings_dim=8, dcgan_batch_size=4, **options)
        stage = dcgan.DCGANStage(Run(chosen, tmp_path, fast_path=FastPath("cpu")), vqvae, *splits, recipe)
        set_rate(stage, lr)
        return stage

    return new


def set_rate(stage, lr: float) -> None:
    networks = {"generator": stage.generator, "discriminator": stage.discriminator}
    stage.optimizers = {name: torch.optim.SGD(network.parameters(), lr) for name, network in networks.items()}


def step(stage, real: torch.Tensor) -> torch.Tensor:
    """One step with noise that is the same each time."""
    return stage.step(real.clone(), len(real), 0, torch.Generator().manual_seed(2))


def noise_of(stage, n: int) -> torch.Tensor:
    return stage.prior.noise(n, torch.Generator().manual_seed(2))


@pytest.mark.parametrize("recipe", [PLAIN_MAP, REPORT], ids=["balanced", "report"])
def test_values_are_binary_cross_entropy_and_the_mean_probabilities(new_stage, recipe):
    stage = new_stage(recipe)
    real = stage.data.batch([0, 5, 9])
    generator, discriminator = copy.deepcopy(stage.generator), copy.deepcopy(stage.discriminator)
    with torch.no_grad():
        d_real, d_fake = discriminator(real), discriminator(generator(noise_of(stage, 3)))  # in training mode, apart
    d_loss, mean_real, mean_fake, g_loss = step(stage, real).tolist()
    assert d_loss == pytest.approx(-(d_real.log().mean() + (1 - d_fake).log().mean()).item(), rel=1e-4)
    assert mean_real == pytest.approx(d_real.mean().item(), rel=1e-4)
    assert mean_fake == pytest.approx(d_fake.mean().item(), rel=1e-4)
    assert g_loss == pytest.approx(-d_fake.log().mean().item(), rel=1e-4)  # non-saturating


def test_each_network_moves_by_its_own_loss(new_stage):
    stage = new_stage(replace(PLAIN_MAP, r1=0.0))  # R1 has a test of its own
    stage.generator.double(), stage.discriminator.double()
    set_rate(stage, 0.1)
    real = stage.data.batch([0, 5, 9]).double()
    generator, discriminator = copy.deepcopy(stage.generator), copy.deepcopy(stage.discriminator)
    noise = noise_of(stage, 3).double()
    stage.prior.noise = lambda n, rng: noise
    stage.space = replace(stage.space, support=stage.space.support.double(), mix=stage.space.mix.double())
    step(stage, real)
    d_real, d_fake = discriminator(real), discriminator(copy.deepcopy(generator)(noise))
    loss = -(d_real.log().mean() + (1 - d_fake).log().mean())
    slopes = torch.autograd.grad(loss, list(discriminator.parameters()))
    for new, old, slope in zip(stage.discriminator.parameters(), discriminator.parameters(), slopes, strict=True):
        torch.testing.assert_close(new, old - 0.1 * slope, rtol=1e-3, atol=1e-5)
    # the generator is judged by the discriminator after its step
    d_fake = copy.deepcopy(stage.discriminator)(generator(noise))
    slopes = torch.autograd.grad(-d_fake.log().mean(), list(generator.parameters()))
    for new, old, slope in zip(stage.generator.parameters(), generator.parameters(), slopes, strict=True):
        torch.testing.assert_close(new, old - 0.1 * slope, rtol=1e-3, atol=1e-5)


class Quadratic(torch.nn.Module):
    """D with logits a·|x|²: its gradient is 2a·x, so the penalty is known."""

    def __init__(self, a: float):
        super().__init__()
        self.a = torch.nn.Parameter(torch.tensor(a).double())

    def logits(self, x, mix):
        return (self.a * x.double().square().flatten(1).sum(1, keepdim=True)).float()


@pytest.mark.parametrize("gamma", [7.0, 0.3])
def test_r1_is_the_squared_gradient_by_finite_differences(new_stage, gamma):
    stage, a = new_stage(replace(PLAIN_MAP, r1=gamma)), 1e-4
    stage.discriminator = Quadratic(a)
    set_rate(stage, 1e-9)
    real = stage.data.batch([0, 5, 9])
    with torch.no_grad():
        fake = copy.deepcopy(stage.generator)(noise_of(stage, 3))

    def objective(a):
        logits = [a * x.double().square().sum((1, 2, 3)) for x in (real, fake)]
        loss = F.softplus(-logits[0]).mean() + F.softplus(logits[1]).mean()
        return loss + gamma / 2 * (2 * a * real.double()).square().sum((1, 2, 3)).mean()

    slope = (objective(a * 1.001) - objective(a * 0.999)) / (0.002 * a)
    step(stage, real)
    assert (a - stage.discriminator.a.item()) / 1e-9 == pytest.approx(slope.item(), rel=1e-3)


def test_autocast_changes_nothing_but_the_precision_of_the_networks(new_stage):
    found = []
    for autocast in (None, partial(torch.autocast, "cpu", torch.bfloat16)):
        stage = new_stage(PLAIN_MAP, 0.03)  # so that the generator's loss shows D's step
        stage.autocast = autocast or stage.autocast
        found.append(step(stage, stage.data.batch([0, 5, 9])))
    assert found[1].dtype == torch.float32
    torch.testing.assert_close(found[1], found[0], rtol=0.05, atol=0.01)


@pytest.mark.parametrize("recipe, n_steps", [(BALANCED, 12), (REPORT, 0)])
def test_the_generator_and_its_average_start_from_the_same_weights(new_stage, monkeypatch, recipe, n_steps):
    asked = []

    def start(generator, optimizer, latents, steps, *rest):
        asked.append(steps)
        generator.load_state_dict({key: value + 1 for key, value in generator.state_dict().items()})
        return []

    monkeypatch.setattr(dcgan, "start_generator", start)
    stage = new_stage(recipe, dcgan_epochs=3)
    before = copy.deepcopy(stage.average.state_dict())
    monkeypatch.setattr(stage.samples, "begin", lambda prior: None)
    stage.start()
    assert asked == [range(n_steps)]  # as many as follow: three epochs of four batches
    for network in (stage.average, stage.generator):
        assert all(torch.equal(value, before[key] + 1) for key, value in network.state_dict().items())


def test_the_discriminator_of_the_validation_split_is_in_training_mode_and_leaves_no_trace(new_stage, vqvae, data):
    stage = new_stage()
    before, space = copy.deepcopy(stage.discriminator.state_dict()), stage.space
    found = stage._d_of_validation()
    assert all(torch.equal(value, before[key]) for key, value in stage.discriminator.state_dict().items())
    latents, judged = LatentCache(vqvae, OasisDataset(data, "validate"), space), []
    for part in torch.randperm(10, generator=seeds.generator(0, "validation order")).split(4):
        judged += stage.discriminator(space.to_channels(latents.batch(part))).flatten().tolist()
    assert found == pytest.approx(sum(judged) / 10, abs=1e-4)
