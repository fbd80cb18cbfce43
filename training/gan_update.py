"""The two update rules of `--gan-training`: balanced, and the report's own.

Both minimise binary cross entropy, with the non-saturating loss for the generator (arXiv 1406.2661, section 3), as
arXiv 1511.06434 does. Real latents come as coefficients (B, K, 64, 64) of `training.scale.LatentScale`.
"""

from contextlib import nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor

from support import distributed
from training.scale import LatentScale


class PlainUpdate:
    """The report's procedure, that of PyTorch's DCGAN tutorial: cross entropy and nothing else.

    Real latents are quantized. Real and generated latents go through the discriminator in separate batches. The
    networks are in training mode; the optimizers are those of the generator and of the discriminator.
    """

    fit_scale = LatentScale.of_codebook  # (vqvae, train_set) -> the map between latents and the generator's range
    quantized = True  # whether real latents are embeddings, or the encoder's output before quantization
    calibrated = False  # whether samples are, by `training.prior.Prior.calibrate`
    average_decay = 0.0  # of the EMA of the generator's weights, which draws the samples
    most_start_steps = 0  # in which the generator learns real latents before it meets a discriminator
    generated = seen = staticmethod(lambda x: x)  # the methods of `LatentScale`
    basis = None  # of `LatentScale` too
    autocast = staticmethod(nullcontext)  # for the networks and `generated`; losses are float32

    def __init__(self, generator, discriminator, optimizers):
        self.generator, self.discriminator = generator, discriminator
        self.generator_optimizer, self.discriminator_optimizer = optimizers

    def __call__(self, real: Tensor, noise: Tensor, weight: float = 1.0) -> Tensor:
        """Update D, then G.

        Args:
            real: coefficients of real latents (B, K, 64, 64), this process's part of the batch.
            noise: (B, noise_dim, 1, 1), for generated ones.
            weight: this process's share of the batch.

        Returns:
            (4,): the discriminator's loss, mean D(x) and mean D(G(z)) before its step, and the generator's loss.
        """
        # (1) Update D: minimise -log D(x) - log(1 - D(G(z))), plus a penalty on its gradient at real latents
        with self.autocast():
            fake = self.seen(self.generated(self.generator(noise)))
        d_real, d_fake = self._logits(self.seen(real)), self._logits(fake.detach())
        d_loss = cross_entropy(d_real, 1) + cross_entropy(d_fake, 0)
        loss = d_loss + self.penalty(real, d_real)
        _step(self.discriminator, self.discriminator_optimizer, loss * weight)
        # (2) Update G: minimise -log D(G(z))
        g_loss = cross_entropy(self._logits(fake), 1)
        _step(self.generator, self.generator_optimizer, g_loss * weight)
        return torch.stack([d_loss, d_real.sigmoid().mean(), d_fake.sigmoid().mean(), g_loss]).detach()

    def _logits(self, x: Tensor) -> Tensor:
        with self.autocast():  # anew for each call: it keeps a copy of the weights until it ends
            logits = self.discriminator.logits(x, self.basis)
        return logits.to(torch.promote_types(logits.dtype, torch.float32))

    @torch.no_grad()
    def judged(self, real: Tensor) -> Tensor:
        """D(x) of coefficients (B, K, 64, 64) as in `__call__`: (B, 1)."""
        return self._logits(self.seen(real)).sigmoid()

    def penalty(self, real: Tensor, d_real: Tensor) -> Tensor | float:
        """A further loss of the discriminator, given its logits (B, 1) of real latents."""
        return 0.0

    def state_dict(self) -> dict[str, Tensor]:
        """Scalars that resuming needs, each of them also a column of metrics.csv."""
        return {}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Continue from a `state_dict`."""


class BalancedUpdate(PlainUpdate):
    """Cross entropy with a weak R1, from a start that is learned from data.

    - Real latents are continuous, cut to what decodes to heads, with a flatter spectrum (`LatentScale.fit`); the
      discriminator sees where it is (`LatentScale.seen`).
    - The generator begins with heads that are learned from data (`training.start`). Samples are of its EMA, calibrated.
    - R1 (arXiv 1801.04406, eq. 9) penalises the discriminator's gradient at real latents. Its weight γ is 0.3 while the
      discriminator's lead d, the running mean of D(x) - D(G(z)), is below 0.4, and 0.3 exp(10 (d - 0.4)) above.
    """

    fit_scale = LatentScale.fit
    quantized, calibrated = False, True
    average_decay = 0.999
    most_start_steps = 3000
    least_gamma, guard, tolerated_lead, lead_decay = 0.3, 10.0, 0.4, 0.98

    def __init__(self, generator, discriminator, optimizers):
        super().__init__(generator, discriminator, optimizers)
        self.lead = next(discriminator.parameters()).new_zeros(())

    @property
    def gamma(self) -> Tensor:
        return self.least_gamma * (self.guard * (self.lead - self.tolerated_lead).clamp(min=0)).exp()

    def __call__(self, real: Tensor, noise: Tensor, weight: float = 1.0) -> Tensor:
        values = super().__call__(real.requires_grad_(True), noise, weight)
        self.lead.lerp_(distributed.total((values[1] - values[2]) * weight), 1 - self.lead_decay)
        return values

    def penalty(self, real: Tensor, d_real: Tensor) -> Tensor:
        (gradient,) = torch.autograd.grad(d_real.sum(), real, create_graph=True)
        return self.gamma / 2 * gradient.square().sum((1, 2, 3)).mean()

    def state_dict(self) -> dict[str, Tensor]:
        return {"ahead": self.lead}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self.lead.copy_(state["ahead"])


METHODS = {"balanced": BalancedUpdate, "report": PlainUpdate}


def cross_entropy(logits: Tensor, target: int) -> Tensor:
    """Binary cross entropy of logits (B, 1) with one target for all."""
    return F.binary_cross_entropy_with_logits(logits, torch.full_like(logits, target))


def _step(network, optimizer, loss: Tensor) -> None:
    """Update one network; only its gradients are computed."""
    optimizer.zero_grad()
    loss.backward(inputs=list(network.parameters()))
    distributed.sum_gradients(network)
    optimizer.step()
