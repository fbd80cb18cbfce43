"""The update rules that gan_ablation.py compares: `BalancedUpdate` without one of its parts, or with one more.

For one process, and not resumed.
"""

import math
from dataclasses import replace
from functools import partial

import torch
from augmentation import NUMBERS, changed
from torch import Tensor

from training.gan_update import BalancedUpdate, PlainUpdate
from training.scale import LatentScale, covariance_spectrum


class Unstarted(BalancedUpdate):
    most_start_steps = 0


class Unplaced(BalancedUpdate):
    """Without the channels that tell the discriminator its position."""

    def __call__(self, real: Tensor, noise: Tensor, weight: float = 1.0) -> Tensor:
        seen, basis = self.seen, self.basis
        self.seen, self.basis = PlainUpdate.seen, basis[:, : real.shape[1]]
        values = super().__call__(real, noise, weight)
        self.seen, self.basis = seen, basis
        return values


class Unlimited(BalancedUpdate):
    """Generated amplitudes as they are."""

    @staticmethod
    def fit_scale(vqvae, dataset) -> LatentScale:
        scale = LatentScale.fit(vqvae, dataset)
        return replace(scale, amplitudes=scale.amplitudes.new_tensor([0.0, 1e9]))


class Uncalibrated(BalancedUpdate):
    calibrated = False


class SteeredGamma(BalancedUpdate):
    """γ = exp(5 max(0, d))."""

    least_gamma, guard, tolerated_lead = 1.0, 5.0, 0.0


class FixedGamma(BalancedUpdate):
    guard = 0.0


class WeakGamma(BalancedUpdate):
    least_gamma, guard = 0.1, 5.0


class FallingGamma(BalancedUpdate):
    """γ falls from 2 to 0.2 along a cosine (R3GAN, arXiv 2501.05441), and rises where D's lead is more than 0.5."""

    def __init__(self, *words):
        super().__init__(*words)
        self.step = 0

    def __call__(self, *words) -> Tensor:
        self.step += 1
        return super().__call__(*words)

    @property
    def gamma(self) -> Tensor:
        progress = min(1.0, self.step / self.n_steps)
        return (0.2 + 0.9 * (1 + math.cos(math.pi * progress))) * (5 * (self.lead - 0.5).clamp(min=0)).exp()


class Augmented(BalancedUpdate):
    """What the discriminator sees is moved a little, and loses a square. R1 is at what it sees."""

    def __call__(self, real: Tensor, noise: Tensor, weight: float = 1.0) -> Tensor:
        generated = self.generated
        self.generated = lambda t: self.changed(generated(t))
        values = super().__call__(self.changed(real), noise, weight)
        self.generated = generated
        return values

    @staticmethod
    def changed(c: Tensor) -> Tensor:
        return changed(c, torch.rand(len(c), NUMBERS).to(c.device))


class CutOut(Augmented):
    """A square is cut out of most of what the discriminator sees; nothing is moved."""

    @staticmethod
    def changed(c: Tensor) -> Tensor:
        numbers = torch.rand(len(c), NUMBERS)
        numbers[:, 0] = 1  # never below MOVED
        return changed(c, numbers.to(c.device))


class Flipped(Augmented):
    """Half of what the discriminator sees is mirrored left to right."""

    @staticmethod
    def changed(c: Tensor) -> Tensor:
        mirrored = (torch.rand(len(c), 1, 1, 1) < 0.5).to(c.device)
        return torch.where(mirrored, c.flip(3), c)


class BothPenalties(BalancedUpdate):
    """R1, and R2 with the same γ: the penalty at generated latents (R3GAN, arXiv 2501.05441, section 2.2)."""

    def _logits(self, x: Tensor) -> Tensor:
        self.judged_last = x, super()._logits(x.requires_grad_())
        return self.judged_last[1]

    def penalty(self, real: Tensor, d_real: Tensor) -> Tensor:
        x, d_fake = self.judged_last
        (gradient,) = torch.autograd.grad(d_fake.sum(), x, create_graph=True)
        of_latents = gradient[:, : real.shape[1]]  # and not of the position
        return super().penalty(real, d_real) + self.gamma / 2 * of_latents.square().sum((1, 2, 3)).mean()


class LeCam(BalancedUpdate):
    """D's logits of either side are held to the running mean of the other's (LeCam, arXiv 2104.03310).

    As in the paper, without the ReLU of its code.
    """

    strength, decay = 0.1, 0.99

    def __init__(self, *words):
        super().__init__(*words)
        self.means = None

    def _logits(self, x: Tensor) -> Tensor:
        self.logits_last = super()._logits(x)
        return self.logits_last

    def penalty(self, real: Tensor, d_real: Tensor) -> Tensor:
        both = d_real, self.logits_last
        now = torch.stack([logits.detach().mean() for logits in both])
        self.means = now if self.means is None else self.means.lerp(now, 1 - self.decay)
        apart = sum((logits - mean).square().mean() for logits, mean in zip(both, self.means.flip(0), strict=True))
        return super().penalty(real, d_real) + self.strength * apart


class SpectrumLoss(BalancedUpdate):
    """The generator also learns how the batch's images differ in the power of their leading coefficients.

    Log power of each image in each ring of frequencies, sorted over the batch: mean absolute difference to real ones.
    """

    strength = 1.0

    def __call__(self, real: Tensor, noise: Tensor, weight: float = 1.0) -> Tensor:
        generated, aim = self.generated, self.powers(real.detach())

        def taught(t: Tensor) -> Tensor:
            c = generated(t)
            copy = c.detach().requires_grad_()
            with torch.autocast(c.device.type, enabled=False):  # spectra need float32
                loss = self.strength * (self.powers(copy) - aim).abs().mean()
            (gradient,) = torch.autograd.grad(loss, copy)
            c.register_hook(lambda found: found + gradient * weight)  # beside what D says
            return c

        self.generated = taught
        values = super().__call__(real, noise, weight)
        self.generated = generated
        return values

    @staticmethod
    def powers(c: Tensor) -> Tensor:
        """(B, 4, R) of coefficients (B, K, 64, 64) at R rings of frequencies, each sorted over the batch."""
        spectra = torch.stack([covariance_spectrum(image[None]) for image in c[:, :4]])
        return (spectra.diagonal(dim1=2, dim2=3).mT + 1e-6).log().sort(0).values


class Unflattened(BalancedUpdate):
    fit_scale = staticmethod(partial(LatentScale.fit, emphasis=0.0))


class Whitened(BalancedUpdate):
    fit_scale = staticmethod(partial(LatentScale.fit, emphasis=1.0))


class ManyDirections(BalancedUpdate):
    fit_scale = staticmethod(partial(LatentScale.fit, n_directions=61))  # three channels are left for the position


class Everywhere(BalancedUpdate):
    """Without the mask of where heads are."""

    @staticmethod
    def fit_scale(vqvae, dataset) -> LatentScale:
        scale = LatentScale.fit(vqvae, dataset)
        return replace(scale, support=torch.ones_like(scale.support))


class Quantized(BalancedUpdate):
    quantized = True


class Unaveraged(BalancedUpdate):
    average_decay = 0.0


class ShortAverage(BalancedUpdate):
    average_decay = 0.95
