"""What the variants of the DCGAN's update add, against closed forms."""

import gan_variants
import pytest
import torch
from torch import nn

from training.scale import N_RINGS


class Linear(nn.Module):
    """A discriminator whose gradient at its input is `weight` (C, 1, 1) at each position."""

    def __init__(self, weight):
        super().__init__()
        self.weight = nn.Parameter(weight)

    def logits(self, x, basis=None):
        return (self.weight * x).sum((1, 2, 3))[:, None]


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


def test_both_penalties_are_the_gradients_at_either_side_without_the_position(rng):
    weight = torch.tensor([0.1, -0.2, 7.0])[:, None, None]  # the last channel is the position's
    update = new_update(gan_variants.BothPenalties, Amplitude(torch.zeros(1), 1.0), Linear(weight))
    real = torch.randn(3, 2, 8, 8, generator=rng).requires_grad_()
    position = torch.ones(3, 1, 8, 8)
    d_real = update._logits(torch.cat([real, position], 1))
    update._logits(torch.randn(3, 3, 8, 8, generator=rng))
    of_one_side = 0.3 / 2 * 64 * (0.1**2 + 0.2**2)
    assert update.penalty(real, d_real).item() == pytest.approx(2 * of_one_side, rel=1e-5)


def test_lecam_holds_logits_to_the_running_mean_of_the_other_side():
    update = new_update(gan_variants.LeCam, Amplitude(torch.zeros(1), 1.0), Linear(torch.zeros(1, 1, 1)))
    real, bias = torch.zeros(2, 1, 4, 4, requires_grad=True), torch.tensor([[0.5], [-0.5]])
    for mean_real, mean_fake, step in ((2.0, -1.0, 0), (4.0, -3.0, 1)):
        d_real = mean_real + bias + 0 * update._logits(real)
        update.logits_last = mean_fake + bias
        found = update.penalty(real, d_real).item()
        running = [2.0, -1.0] if step == 0 else [2.02, -1.02]
        apart = (mean_real - running[1]) ** 2 + (mean_fake - running[0]) ** 2 + 2 * 0.5**2
        assert found == pytest.approx(0.1 * apart, rel=1e-5)


@pytest.mark.parametrize("factor", [1.0, 3.0])
def test_the_spectrum_loss_teaches_the_generator_amplitudes(factor, rng):
    c = torch.randn(4, 6, 64, 64, generator=rng)
    update = new_update(gan_variants.SpectrumLoss, Amplitude(c, factor), Linear(torch.zeros(6, 1, 1)))
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
