"""Between VQ-VAE and DCGAN: a split's latents, sampling, snapping to codes, generator.pth."""

import hashlib
import math
from collections.abc import Sequence
from dataclasses import fields, replace
from functools import cached_property, partial
from pathlib import Path

import torch
from torch import Tensor
from torch.optim.swa_utils import update_bn
from torch.utils.data import Dataset

from modules import VQVAE, Generator
from support import console, files
from support.console import in_batches
from support.device import fits, move
from training.scale import LatentScale, power_spectrum

LARGEST_FACTOR = 2.0  # of calibration


class Latents(Dataset):
    """The coefficients of a split's latents, which the DCGAN learns to generate.

    Their mixtures are cut to tanh's range. They are kept in half precision (8·K kB an image) if that takes at most
    half of the free memory, on the device or else on the host. Otherwise each batch is encoded when it is asked for.

    Args:
        vqvae, dataset, scale: the trained network, a `dataset.OasisDataset` and the map, on one device.
        quantized: whether latents are the embeddings of an image's codes, or the encoder's output z_e.
        stored: whether the latents are kept; decided by the free memory if None. Also an attribute.
    """

    def __init__(self, vqvae: VQVAE, dataset: Dataset, scale: LatentScale, quantized: bool = False, stored=None):
        self.vqvae, self.dataset = vqvae.eval().to(memory_format=torch.channels_last), dataset
        self.scale, self.quantized = scale, quantized
        size = (len(dataset), *scale.support.shape, scale.mix.shape[1])
        n_bytes = 2 * math.prod(size)
        device, host = scale.support.device, torch.device("cpu")
        self.stored = fits(n_bytes, device) or fits(n_bytes, host) if stored is None else stored
        if not self.stored:
            return
        self.kept = torch.empty(size, dtype=torch.half, device=device if fits(n_bytes, device) else host)
        start = 0
        for x in in_batches(dataset, desc="Encoding"):
            self.kept[start : start + len(x)] = self._encode(x).permute(0, 2, 3, 1)
            start += len(x)

    @torch.no_grad()
    def _encode(self, x: Tensor) -> Tensor:
        """Images (B, 1, 256, 256) -> coefficients (B, K, 64, 64) half."""
        z = self.vqvae.latents(x)
        if self.quantized:
            z = self.vqvae.vector_quantizer.look_up(self.vqvae.vector_quantizer.nearest(z))
        return self.scale.clipped(self.scale.coefficients(z)).half()

    def __len__(self) -> int:
        return len(self.dataset)

    def batch(self, indices: Sequence[int]) -> Tensor:
        """(B, K, 64, 64) float32, on the scale's device."""
        if not self.stored:
            return self._encode(self.dataset.batch(indices)).float()
        kept = self.kept[move(torch.as_tensor(indices), self.kept.device)]
        return move(kept, self.scale.support.device).permute(0, 3, 1, 2).float()

    __getitems__ = batch  # what DataLoader calls

    @cached_property
    def power(self) -> Tensor:
        """`power_spectrum` of at most 512 images, spaced evenly."""
        picked = torch.arange(0, len(self), -(-len(self) // 512))
        return power_spectrum(torch.cat([self.batch(part) for part in picked.split(32)]))


class Prior:
    """A generator and what turns its output into brains: the scale of latents, and the VQ-VAE that they belong to.

    All are on one device. What is made from samples of a prior trained on phantoms says so.
    """

    def __init__(self, generator: Generator, scale: LatentScale, vqvae: VQVAE, phantoms: bool = False):
        self.generator, self.scale, self.vqvae, self.phantoms = generator, scale, vqvae, phantoms

    def noise(self, n: int, rng: torch.Generator) -> Tensor:
        """n noise vectors (n, noise_dim, 1, 1) from N(0, 1), on the CPU."""
        return torch.randn(n, self.generator.net[0][0].in_channels, 1, 1, generator=rng)

    @torch.no_grad()
    def sample(self, noise: Tensor) -> Tensor:
        """Noise (B, noise_dim, 1, 1) -> codes (B, 64, 64): generated latents snapped to the nearest embeddings."""
        t = self.generator.eval()(noise.to(self.scale.support.device))
        latents = self.scale.latents(self.scale.generated(t))
        return self.vqvae.vector_quantizer.nearest(latents)

    def sample_images(self, noise: Tensor, size: int = 32) -> Tensor:
        """Noise (B, noise_dim, 1, 1) -> brains (B, 1, 256, 256) in [0, 1], decoded `size` at a time."""
        images = []
        with console.progress(total=len(noise), desc="Decoding", unit=" images", leave=False) as bar:
            for part in noise.split(size):
                images.append(self.vqvae.decode(self.sample(part)).clamp(0, 1))
                bar.update(len(part))
                console.stop_if_signalled()
        return torch.cat(images)

    def measure_statistics(self, noise: Tensor) -> None:
        """Set the statistics of the generator's BatchNorm to those that its weights have for noise (on the CPU).

        An average of the statistics of past weights is not that of averaged weights.
        """
        update_bn([part.to(self.scale.support.device) for part in noise.split(32)], self.generator)

    @torch.no_grad()
    def calibrate(self, power: Tensor, fitted: LatentScale, noise: Tensor) -> None:
        """Bring the power of generated latents half way to that of real ones, at each spatial frequency.

        A discriminator with BatchNorm hardly sees amplitudes, so coefficients may be too weak. Half way, because what
        has not been learned is noise, which would become grain (docs/results.md).

        Args:
            power: `power_spectrum` of real coefficients.
            fitted: the scale that the generator was trained with.
            noise: (B, noise_dim, 1, 1), on the CPU, of the samples that are compared.
        """
        batches = [move(part, fitted.support.device) for part in noise.split(32)]
        generated = torch.cat([fitted.generated(self.generator.eval()(part)) for part in batches])
        factor = (power / power_spectrum(generated)) ** 0.25  # of amplitudes: half of the exponent that equals powers
        self.scale = replace(fitted, scale=fitted.scale / factor.clamp(1 / LARGEST_FACTOR, LARGEST_FACTOR))

    def checkpoint(self) -> dict:
        """The contents of generator.pth."""
        return {
            "state_dict": files.cpu_state(self.generator),
            **self.scale.to("cpu").tensors(),
            "codebook": codebook_hash(self.vqvae),
            "phantoms": self.phantoms,
        }

    @classmethod
    def from_checkpoint(cls, contents: dict, vqvae: VQVAE) -> "Prior":
        """The prior of a `checkpoint`, for the VQ-VAE that it belongs to and on its device.

        Raises ValueError if the contents are not a generator's, or belong to another codebook.
        """
        needed = {"state_dict", "codebook"} | {field.name for field in fields(LatentScale)}
        if not isinstance(contents, dict) or not needed <= contents.keys():
            raise ValueError("it holds no generator of this version (name the generator.pth of a run)")
        if contents["codebook"] != codebook_hash(vqvae):
            raise ValueError("it belongs to another codebook; use the vqvae.pth that it was trained with")
        weight = vqvae.vector_quantizer.embedding.weight
        dim, device = weight.shape[1], weight.device
        generator = Generator(embeddings_dim=dim)
        files.load_state(generator, contents["state_dict"])
        scale = LatentScale.from_tensors(contents, dim).to(device)
        for network in (generator, vqvae):  # as in training, for the same digits
            network.to(device, memory_format=torch.channels_last).eval()
        return cls(generator, scale, vqvae, bool(contents.get("phantoms", False)))


def load_prior(path: str | Path, vqvae: VQVAE) -> Prior:
    """The prior in a generator.pth, on the VQ-VAE's device. Raises UserError if it is none, or not this VQ-VAE's."""
    return files.load(path, partial(Prior.from_checkpoint, vqvae=vqvae))


def walk(start: Tensor, end: Tensor, n: int) -> Tensor:
    """n noise vectors (n, noise_dim, 1, 1) from one (noise_dim, 1, 1) to another, in equal steps of angle.

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


def codebook_hash(vqvae: VQVAE) -> str:
    """SHA-256 of the codebook's float32 values."""
    values = vqvae.vector_quantizer.embedding.weight.detach().cpu().float().contiguous()
    return hashlib.sha256(values.numpy().tobytes()).hexdigest()
