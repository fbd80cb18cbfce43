"""The DCGAN as a prior: noise -> coefficients -> codes -> slices."""

import copy
from dataclasses import fields

import torch
from scipy.spatial import geometric_slerp
from torch import Tensor
from torch.optim.swa_utils import update_bn

from modules import NOISE, VQVAE, Generator
from priors.latent_space import LatentSpace
from priors.spectrum import covariance_spectrum, multiply_spectrum, transport
from support import console, files
from support.device import move

AT_ONCE = 32  # images that are made together: as many as memory easily holds


class DCGANPrior:
    """A generator of coefficients, and what turns these into slices: their space and the VQ-VAE.

    All are on one device. What is made from samples of a prior that was trained on phantoms says so.

    Args:
        gain: (R, K, K), calibration: what multiplies coefficients at each ring of frequencies; None for none.
    """

    def __init__(
        self,
        generator: Generator,
        space: LatentSpace,
        vqvae: VQVAE,
        phantoms: bool = False,
        gain: Tensor | None = None,
    ):
        self.generator = generator
        self.space = space
        self.vqvae = vqvae
        self.phantoms = phantoms
        self.gain = gain

    def noise(self, n: int, rng: torch.Generator) -> Tensor:
        """The noise of n images (n, 128, 1, 1) from N(0, 1), on the CPU."""
        return torch.randn(n, NOISE, 1, 1, generator=rng)

    def coefficients(self, noise: Tensor) -> Tensor:
        """Noise (B, 128, 1, 1), on the space's device -> coefficients (B, K, 64, 64), not calibrated."""
        return self.space.to_coefficients(self.generator.eval()(noise))

    @torch.no_grad()
    def sample(self, noise: Tensor) -> Tensor:
        """Noise (B, 128, 1, 1) -> codes (B, 64, 64): generated latents snapped to the nearest embeddings."""
        c = self.coefficients(noise.to(self.space.device))
        if self.gain is not None:
            c = multiply_spectrum(c, self.gain)
        return self.vqvae.vector_quantizer.nearest(self.space.decode(c))

    def sample_images(self, noise: Tensor) -> Tensor:
        """Noise (B, 128, 1, 1) -> slices (B, 1, 256, 256) in [0, 1]."""
        parts = console.in_parts(noise, AT_ONCE, "Sampling")
        return torch.cat([self.vqvae.decode(self.sample(part)).clamp(0, 1) for part in parts])

    @torch.no_grad()
    def calibrated(self, real: Tensor, noise: Tensor) -> "DCGANPrior":
        """A prior whose coefficients have the second moments of real ones, at each radial frequency.

        A discriminator with BatchNorm hardly sees amplitudes, so coefficients may be too weak.

        Args:
            real: `covariance_spectrum` of real coefficients.
            noise: (B, 128, 1, 1), on the CPU, of the samples that are compared.
        """
        generated = torch.cat([self.coefficients(move(part, self.space.device)) for part in noise.split(AT_ONCE)])
        prior = copy.copy(self)
        prior.gain = transport(covariance_spectrum(generated), real)
        return prior

    def reset_batch_norm(self, noise: Tensor) -> None:
        """Compute the statistics of the generator's BatchNorm anew, for noise (B, 128, 1, 1) on the CPU.

        Averaged statistics do not fit averaged weights.
        """
        update_bn([part.to(self.space.device) for part in noise.split(AT_ONCE)], self.generator)

    def checkpoint(self) -> dict:
        """The contents of generator.pth."""
        contents = {
            "kind": "dcgan",
            "version": files.VERSION,
            "state_dict": files.cpu_state(self.generator),
            **vars(self.space.to("cpu")),
            "codebook": files.digest(self.vqvae.vector_quantizer.embedding.weight),
            "phantoms": self.phantoms,
        }
        return contents if self.gain is None else contents | {"gain": self.gain.cpu()}

    @classmethod
    def from_checkpoint(cls, contents: dict, vqvae: VQVAE) -> "DCGANPrior":
        """The prior of a `checkpoint` of this VQ-VAE, on its device. Other contents raise an error of some kind."""
        weight = vqvae.vector_quantizer.embedding.weight
        space = LatentSpace(**{field.name: contents[field.name] for field in fields(LatentSpace)}).to(weight.device)
        gain = contents["gain"].to(weight.device) if "gain" in contents else None
        generator = Generator(weight.shape[1])
        files.load_state(generator, contents["state_dict"])
        generator.to(weight.device, memory_format=torch.channels_last).eval()  # as in training, for the same digits
        return cls(generator, space, vqvae, bool(contents["phantoms"]), gain)


def walk(start: Tensor, end: Tensor, n: int) -> Tensor:
    """Spherical interpolation on the CPU: n noises (n, C, H, W) from one (C, H, W) to another, in equal steps of angle.

    Half way on a straight line, noise would be shorter than any that the generator was trained on (White 2016,
    arXiv 1609.04468).
    """
    ends = [each.flatten().double() for each in (start, end)]
    lengths = [each.norm() for each in ends]
    units = [each / length for each, length in zip(ends, lengths, strict=True)]
    directions = geometric_slerp(*units, torch.linspace(0, 1, n, dtype=torch.double))
    steps = torch.from_numpy(directions) * torch.linspace(*lengths, n, dtype=torch.double)[:, None]
    return steps.view(n, *start.shape).float()
