"""The priors over coefficients: noise -> coefficients -> codes -> slices."""

import copy

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import update_bn

from modules import VQVAE, Generator
from priors.latent_space import LatentSpace
from priors.spectrum import covariance_spectrum, multiply_spectrum, transport
from support import console, files
from support.device import move


class Prior:
    """A network that makes coefficients of noise, and what turns these into brains: their space and the VQ-VAE.

    All are on one device. What is made from samples of a prior trained on phantoms says so. A subclass has
    `noise_shape` and `coefficients`.
    """

    kind: str  # in its file

    def __init__(
        self,
        network: nn.Module,
        space: LatentSpace,
        vqvae: VQVAE,
        phantoms: bool = False,
        gain: Tensor | None = None,  # (R, K, K), what multiplies coefficients at each ring of frequencies
    ):
        self.network, self.space, self.vqvae, self.phantoms, self.gain = network, space, vqvae, phantoms, gain

    @property
    def networks(self) -> dict[str, nn.Module]:
        """All networks, by their key in the prior's file."""
        return {"state_dict": self.network}

    @property
    def noise_shape(self) -> tuple[int, int, int]:
        """The noise of one image is (C, H, W)."""
        raise NotImplementedError

    def coefficients(self, noise: Tensor) -> Tensor:
        """Noise (B, *noise_shape), on the network's device -> coefficients (B, K, 64, 64), not calibrated."""
        raise NotImplementedError

    def noise(self, n: int, rng: torch.Generator) -> Tensor:
        """The noise of n images (n, *noise_shape) from N(0, 1), on the CPU."""
        return torch.randn(n, *self.noise_shape, generator=rng)

    @torch.no_grad()
    def sample(self, noise: Tensor) -> Tensor:
        """Noise (B, *noise_shape) -> codes (B, 64, 64): generated latents snapped to the nearest embeddings."""
        c = self.coefficients(noise.to(self.space.device))
        if self.gain is not None:
            c = multiply_spectrum(c, self.gain)
        return self.vqvae.vector_quantizer.nearest(self.space.decode(c))

    def sample_images(self, noise: Tensor, size: int = 32) -> Tensor:
        """Noise (B, *noise_shape) -> brains (B, 1, 256, 256) in [0, 1], made `size` at a time."""
        images = []
        few = len(noise) <= size
        with console.progress(total=len(noise), desc="Sampling", unit=" images", leave=False, disable=few) as bar:
            for part in noise.split(size):
                images.append(self.vqvae.decode(self.sample(part)).clamp(0, 1))
                bar.update(len(part))
                console.stop_if_signalled()
        return torch.cat(images)

    @torch.no_grad()
    def calibrated(self, real: Tensor, noise: Tensor) -> "Prior":
        """A prior whose coefficients have the covariance about 0 of real ones, at each radial frequency.

        A discriminator with BatchNorm hardly sees amplitudes, and a mean squared error favours small ones, so
        coefficients may be too weak.

        Args:
            real: `covariance_spectrum` of real coefficients.
            noise: (B, *noise_shape), on the CPU, of the samples that are compared.
        """
        device = self.space.device
        generated = torch.cat([self.coefficients(move(part, device)) for part in noise.split(32)])
        prior = copy.copy(self)
        prior.gain = transport(covariance_spectrum(generated), real)
        return prior

    def checkpoint(self) -> dict:
        """The contents of the prior's file."""
        contents = {
            "kind": self.kind,
            **{key: files.cpu_state(network) for key, network in self.networks.items()},
            **self.space.to("cpu").tensors(),
            "codebook": files.digest(self.vqvae.vector_quantizer.embedding.weight),
            "phantoms": self.phantoms,
        }
        return contents if self.gain is None else contents | {"gain": self.gain.cpu()}

    @classmethod
    def untrained(cls, contents: dict, *words) -> "Prior":
        """A prior with a network of the size that a `checkpoint` has. `words` are the arguments after the network.

        Raises ValueError if the contents do not say the size.
        """
        raise NotImplementedError


class DCGANPrior(Prior):
    """The DCGAN's generator. Its noise vectors are (128, 1, 1)."""

    kind = "dcgan"

    @property
    def noise_shape(self) -> tuple[int, int, int]:
        return self.network.net[0][0].in_channels, 1, 1

    def coefficients(self, noise: Tensor) -> Tensor:
        return self.space.from_generator(self.network.eval()(noise))

    def measure_statistics(self, noise: Tensor) -> None:
        """Set the statistics of the generator's BatchNorm to those that its weights have for noise (on the CPU).

        An average of the statistics of past weights is not that of averaged weights.
        """
        update_bn([part.to(self.space.device) for part in noise.split(32)], self.network)

    @classmethod
    def untrained(cls, contents: dict, *words) -> "DCGANPrior":
        space = words[0]
        return cls(Generator(embeddings_dim=len(space.shift)), *words)


def walk(start: Tensor, end: Tensor, n: int) -> Tensor:
    """n noises (n, C, H, W) from one (C, H, W) to another, in equal steps of angle.

    On a straight line they would be shorter half way than any that the generator was trained on (White 2016,
    arXiv 1609.04468).
    """
    device, start, end = start.device, start.cpu().double(), end.cpu().double()  # MPS has no float64
    a, b = start / start.norm(), end / end.norm()
    angle = torch.acos((a * b).sum().clamp(-1, 1))
    steps = torch.linspace(0, 1, n, dtype=torch.double).view(-1, 1, 1, 1)
    from_start, from_end = (torch.sinc(part * angle / torch.pi) * part for part in (1 - steps, steps))
    lengths = (1 - steps) * start.norm() + steps * end.norm()
    return ((from_start * a + from_end * b) / torch.sinc(angle / torch.pi) * lengths).float().to(device)
