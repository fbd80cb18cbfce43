"""One update of the DCGAN, in two ways: what keeps its networks in balance, and the report's bare procedure.

Both minimise binary cross entropy, with the non-saturating loss for the generator (arXiv 1406.2661, section 3), as
arXiv 1511.06434 does. Latents are (B, D, 64, 64) in [-1, 1].
"""

import torch
import torch.nn.functional as F
from torch import Tensor

import parallel

COLUMNS = ("d_loss", "d_real", "d_fake", "g_loss")  # what `update` returns of each update


class Report:
    """The report's procedure, that of PyTorch's DCGAN tutorial: cross entropy and nothing else.

    The real side is quantized latents. Real and generated latents go through the discriminator apart.

    Args:
        generator, discriminator: in training mode when they are updated.
        optimizers: of the generator and of the discriminator.
    """

    quantized = True  # the real side: embeddings, or the encoder's output before it is quantized
    average_decay = 0.0  # of the generator's weights that samples are drawn with
    calibrated = False  # whether generated latents are given the brightness of real ones (`prior.Prior.calibrate`)

    def __init__(self, generator, discriminator, optimizers):
        self.generator, self.discriminator = generator, discriminator
        self.generator_optimizer, self.discriminator_optimizer = optimizers

    def state(self) -> dict:
        """What resuming needs besides networks and optimizers."""
        return {}

    def restore(self, state: dict) -> None:
        """Go on from what `state` gave."""

    def update(self, real: Tensor, noise: Tensor, weight: float = 1.0) -> Tensor:
        """One step of the discriminator, then one of the generator.

        Args:
            real: latents, this process's part of the batch.
            noise: (B, noise_dim, 1, 1).
            weight: the part's share of the batch.

        Returns:
            (4,): the discriminator's loss, mean D(x) and mean D(G(z)) before its step, the generator's loss.
        """
        fake = self.generator(noise)
        d_real, d_fake = self.discriminator.logits(real), self.discriminator.logits(fake.detach())
        d_loss = cross_entropy(d_real, 1) + cross_entropy(d_fake, 0)
        loss = d_loss + self.penalty(real, d_real)
        step(self.discriminator, self.discriminator_optimizer, loss * weight)
        g_loss = cross_entropy(self.discriminator.logits(fake), 1)
        step(self.generator, self.generator_optimizer, g_loss * weight)
        return torch.stack([d_loss, d_real.sigmoid().mean(), d_fake.sigmoid().mean(), g_loss]).detach()

    def penalty(self, real: Tensor, d_real: Tensor) -> Tensor | float:
        """What is added to the discriminator's loss, given its logits (B, 1) of real latents."""
        return 0.0


class Balanced(Report):
    """What keeps the two in balance.

    - *R1* (arXiv 1801.04406, eq. 9), a penalty on the discriminator's gradient at real latents. Its γ follows how far
      the discriminator is ahead: exp(5 d), with d the running mean of D(x) - D(G(z)).
    - The real side is continuous, so that the discriminator cannot tell real latents by their lying on embeddings.
    - Samples are drawn with a short exponential average of the generator's weights: a long one blurs what is fine.
    """

    R1_STRENGTH = 5.0
    AHEAD_DECAY = 0.98  # of the running mean

    quantized = False
    average_decay = 0.95
    calibrated = True

    def __init__(self, generator, discriminator, optimizers):
        super().__init__(generator, discriminator, optimizers)
        self.ahead = next(discriminator.parameters()).new_zeros(())

    @property
    def gamma(self) -> Tensor:
        return (self.R1_STRENGTH * self.ahead).exp()

    def state(self) -> dict:
        return {"ahead": self.ahead}

    def restore(self, state: dict) -> None:
        self.ahead.copy_(state["ahead"])

    def update(self, real: Tensor, noise: Tensor, weight: float = 1.0) -> Tensor:
        values = super().update(real.requires_grad_(True), noise, weight)
        self.ahead.lerp_(parallel.total((values[1] - values[2]) * weight), 1 - self.AHEAD_DECAY)
        return values

    def penalty(self, real: Tensor, d_real: Tensor) -> Tensor:
        (gradient,) = torch.autograd.grad(d_real.sum(), real, create_graph=True)
        return self.gamma / 2 * gradient.square().sum((1, 2, 3)).mean()


WAYS = {"balanced": Balanced, "report": Report}


def cross_entropy(logits: Tensor, target: int) -> Tensor:
    return F.binary_cross_entropy_with_logits(logits, torch.full_like(logits, target))


def step(network, optimizer, loss: Tensor) -> None:
    """One step of one network: the other's gradients are not computed."""
    optimizer.zero_grad()
    loss.backward(inputs=list(network.parameters()))
    parallel.sum_gradients(network)
    optimizer.step()
