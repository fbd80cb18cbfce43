"""One update of the DCGAN against the formulas of its papers."""

import copy
import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F

from modules import Discriminator, Generator, dcgan_init
from training import gan_update


@pytest.fixture
def networks():
    torch.manual_seed(0)
    return Generator().apply(dcgan_init), Discriminator().apply(dcgan_init)


@pytest.fixture
def real():
    return torch.rand(4, 64, 64, 64, generator=torch.Generator().manual_seed(1)) - 0.5


@pytest.fixture
def noise():
    return torch.randn(4, 128, 1, 1, generator=torch.Generator().manual_seed(2))


def update_of(kind, networks, lr=0.0):
    return kind(*networks, [torch.optim.SGD(network.parameters(), lr=lr) for network in networks])


@pytest.mark.parametrize("kind", gan_update.METHODS.values())
def test_values_are_binary_cross_entropy_and_the_mean_probabilities(kind, networks, real, noise):
    generator, discriminator = copy.deepcopy(networks)
    with torch.no_grad():
        d_real, d_fake = discriminator(real), discriminator(generator(noise))  # in training mode, apart
    d_loss, mean_real, mean_fake, g_loss = update_of(kind, networks)(real.clone(), noise).tolist()
    assert d_loss == pytest.approx(-(d_real.log().mean() + (1 - d_fake).log().mean()).item(), rel=1e-4)
    assert mean_real == pytest.approx(d_real.mean().item(), rel=1e-4)
    assert mean_fake == pytest.approx(d_fake.mean().item(), rel=1e-4)
    assert g_loss == pytest.approx(-d_fake.log().mean().item(), rel=1e-4)  # non-saturating


@pytest.mark.parametrize("kind", gan_update.METHODS.values())
def test_each_network_moves_by_its_own_loss(kind, networks, real, noise, monkeypatch):
    monkeypatch.setattr(gan_update.BalancedUpdate, "gamma", 0.0)  # R1 has a test of its own
    networks, real, noise = [network.double() for network in networks], real.double(), noise.double()
    generator, discriminator = copy.deepcopy(networks)
    update_of(kind, networks, 0.1)(real.clone(), noise)
    d_real, d_fake = discriminator(real), discriminator(copy.deepcopy(generator)(noise))
    loss = -(d_real.log().mean() + (1 - d_fake).log().mean())
    slopes = torch.autograd.grad(loss, list(discriminator.parameters()))
    for new, old, slope in zip(networks[1].parameters(), discriminator.parameters(), slopes, strict=True):
        torch.testing.assert_close(new, old - 0.1 * slope, rtol=1e-3, atol=1e-5)
    # the generator is judged by the discriminator after its step
    d_fake = copy.deepcopy(networks[1])(generator(noise))
    slopes = torch.autograd.grad(-d_fake.log().mean(), list(generator.parameters()))
    for new, old, slope in zip(networks[0].parameters(), generator.parameters(), slopes, strict=True):
        torch.testing.assert_close(new, old - 0.1 * slope, rtol=1e-3, atol=1e-5)


def test_the_discriminator_cannot_see_the_amplitude_of_a_batch(networks, real):
    """But for its eps, BatchNorm makes a batch and half of it the same, unless there is something to compare with."""
    with torch.no_grad():
        whole, half = networks[1](real), networks[1](real / 2)
        torch.testing.assert_close(whole, half, rtol=0.02, atol=0)
        whole, half = networks[1](real + 0.5), networks[1](real / 2 + 0.5)
        assert (whole / half - 1).abs().max() > 0.05


class Quadratic(torch.nn.Module):
    """D with logits a·|x|²: its gradient is 2a·x, so the penalty is known."""

    def __init__(self):
        super().__init__()
        self.a = torch.nn.Parameter(torch.tensor(0.3))

    def logits(self, x, basis):
        return self.a * x.square().flatten(1).sum(1, keepdim=True)


@pytest.mark.parametrize("gamma", [7.0, 0.3])
def test_r1_is_the_squared_gradient_by_finite_differences(gamma):
    torch.manual_seed(0)
    generator, network = torch.nn.Conv2d(1, 2, 1), Quadratic()
    real, noise = torch.randn(5, 2, 3, 3), torch.randn(5, 1, 3, 3)
    fake = generator(noise).detach()

    def objective(a):
        logits = [a * x.double().square().sum((1, 2, 3)) for x in (real, fake)]
        loss = F.softplus(-logits[0]).mean() + F.softplus(logits[1]).mean()
        return loss + gamma / 2 * (2 * a * real.double()).square().sum((1, 2, 3)).mean()

    update = update_of(gan_update.BalancedUpdate, (generator, network), 1e-3)
    update.lead.fill_(0.4 + math.log(gamma / 0.3) / 10)
    slope = (objective(torch.tensor(0.3001)) - objective(torch.tensor(0.2999))) / 0.0002
    update(real, noise)
    assert (0.3 - network.a.item()) / 1e-3 == pytest.approx(slope.item(), rel=1e-3)


def test_gamma_rises_with_how_far_the_discriminator_is_ahead_on_average(networks, real, noise):
    update = update_of(gan_update.BalancedUpdate, networks)
    expected = 0.0
    for _ in range(3):
        _, mean_real, mean_fake, _ = update(real.clone(), noise).tolist()
        expected = 0.98 * expected + 0.02 * (mean_real - mean_fake)
    assert update.lead.item() == pytest.approx(expected, rel=1e-5) and expected != 0
    for lead, gamma in ((-0.5, 0.3), (0.4, 0.3), (0.5, 0.3 * math.e), (0.6, 0.3 * math.e**2)):
        update.lead.fill_(lead)
        assert update.gamma.item() == pytest.approx(gamma, rel=1e-5)
    again = update_of(gan_update.BalancedUpdate, networks)
    again.load_state_dict(update.state_dict())
    assert again.gamma == update.gamma


def test_autocast_changes_nothing_but_the_precision_of_the_networks(networks, real, noise):
    copies, found = copy.deepcopy(networks), []
    for pair, context in ((copies, None), (networks, partial(torch.autocast, "cpu", torch.bfloat16))):
        update = update_of(gan_update.BalancedUpdate, pair, 0.03)  # so that the generator's loss shows D's step
        update.autocast = context or update.autocast
        found.append(update(real.clone(), noise))
    assert found[1].dtype == torch.float32
    torch.testing.assert_close(found[1], found[0], rtol=0.05, atol=0.01)
