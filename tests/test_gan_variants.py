"""What the variants of the DCGAN's update add, against closed forms."""

import gan_variants
import pytest
import torch
from torch import nn

from training.scale import N_RINGS


class Quadratic(nn.Module):
    """A discriminator whose logits are sums of weight times squares."""

    def __init__(self, *weights):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(weights)[:, None, None])

    def logits(self, x, basis=None):
        return (self.weight * x.square()).sum((1, 2, 3))[:, None]


class Amplitude(nn.Module):
    """A generator of given coefficients, times a factor."""

    def __init__(self, c, factor):
        super().__init__()
        self.c, self.factor = c, nn.Parameter(torch.tensor(factor))

    def forward(self, noise):
        return self.factor * self.c


def new_update(method, generator, discriminator):
    """The discriminator does not learn."""
    rates = zip((generator, discriminator), (1.0, 0.0), strict=True)
    return method(generator, discriminator, [torch.optim.SGD(n.parameters(), lr=lr) for n, lr in rates])


@pytest.fixture
def sides(rng):
    """Real and generated coefficients (3, 2, 8, 8)."""
    return torch.randn(3, 2, 8, 8, generator=rng), 0.5 + 0.5 * torch.randn(3, 2, 8, 8, generator=rng)


def recorded(update, real):
    """The discriminator's further loss in an update."""
    found, penalty = [], update.penalty
    update.penalty = lambda *words: found.append(penalty(*words)) or found[-1]
    update(real.clone(), torch.zeros(3, 1, 1, 1))
    return found[0].item()


def test_both_penalties_are_the_gradients_at_either_side_without_the_position(sides):
    weights = torch.tensor([0.1, -0.2])
    update = new_update(gan_variants.BothPenalties, Amplitude(sides[1], 1.0), Quadratic(0.1, -0.2, 7.0))
    update.seen = lambda c: torch.cat([c, torch.ones(3, 1, 8, 8)], 1)
    squares = [(2 * weights[:, None, None] * c).square().sum((1, 2, 3)).mean().item() for c in sides]
    assert squares[0] > 1.5 * squares[1]
    assert recorded(update, sides[0]) == pytest.approx(0.3 / 2 * sum(squares), rel=1e-5)


def test_lecam_holds_logits_to_the_running_mean_of_the_other_side(sides):
    update = new_update(gan_variants.LeCam, Amplitude(sides[1], 1.0), Quadratic(0.1, -0.2))
    update.least_gamma, mean = 0.0, None
    for factor in (1.0, 2.0):
        update.generator.factor.data.fill_(1.0)
        real, generated = (update.discriminator.logits(c).detach() for c in (factor * sides[0], sides[1]))
        mean = real.mean() if mean is None else 0.99 * mean + 0.01 * real.mean()
        apart = (real - generated.mean()).square().mean() + (generated - mean).square().mean()
        assert recorded(update, factor * sides[0]) == pytest.approx(0.1 * apart.item(), rel=1e-5)


@pytest.mark.parametrize("factor", [1.0, 3.0])
def test_the_spectrum_loss_teaches_the_generator_amplitudes(factor, rng):
    c = torch.randn(4, 6, 64, 64, generator=rng)
    update = new_update(gan_variants.SpectrumLoss, Amplitude(c, factor), Quadratic(*[0.0] * 6))
    update(2 * c, torch.zeros(4, 1, 1, 1))
    expected = factor - (1 if factor > 2 else -1) * 2 / factor  # of |log factor² - log 2²|
    assert update.generator.factor.item() == pytest.approx(expected, rel=1e-3)


def test_powers_are_sorted_means_over_rings(rng):
    c = torch.randn(2, 5, 64, 64, generator=rng)
    found = gan_variants.SpectrumLoss.powers(c)
    spectrum = torch.fft.fft2(c, norm="ortho").abs().square()
    frequency = torch.fft.fftfreq(64) * 64
    for ring in (0, 7, N_RINGS - 1):
        at = [
            (y, x)
            for y in range(64)
            for x in range(64)
            if max(1, round(float(torch.hypot(frequency[y], frequency[x])))) == ring + 1
        ]
        expected = [(sum(image[3, y, x] for y, x in at) / len(at) + 1e-6).log() for image in spectrum]
        torch.testing.assert_close(found[:, 3, ring], torch.stack(sorted(expected)), rtol=1e-4, atol=1e-4)
