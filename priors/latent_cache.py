"""A split, encoded once: what a prior over coefficients learns."""

import math
from collections.abc import Sequence
from functools import cached_property

import torch
from torch import Tensor
from torch.utils.data import Dataset

from modules import VQVAE
from priors.latent_space import LatentSpace
from priors.spectrum import covariance_spectrum
from support.console import in_batches
from support.device import fits, move

COMPARED = 512  # images, at most, whose covariances are the target of calibration


class LatentCache(Dataset):
    """The coefficients of a split's latents, which a prior learns to generate.

    They are clipped as the generator's output is (`LatentSpace.clipped`), and stored in float16 (8·K kB per image)
    on the device or else on the host, if half of the free memory there is enough. Otherwise batches are encoded on use.

    Args:
        vqvae, dataset, space: the trained network, a `dataset.OasisDataset` and the map, on one device.
        quantized: whether latents are the embeddings of an image's codes, or the encoder's output z_e.
        stored: whether coefficients are stored; None decides by the free memory. Also an attribute.
    """

    def __init__(self, vqvae: VQVAE, dataset: Dataset, space: LatentSpace, quantized: bool = False, stored=None):
        self.vqvae = vqvae
        self.dataset = dataset
        self.space = space
        self.quantized = quantized
        size = (len(dataset), *space.support.shape, space.rank)
        n_bytes = 2 * math.prod(size)
        device = space.device
        host = torch.device("cpu")
        self.stored = fits(n_bytes, device) or fits(n_bytes, host) if stored is None else stored
        if not self.stored:
            return
        self.coefficients = torch.empty(size, dtype=torch.half, device=device if fits(n_bytes, device) else host)
        start = 0
        for x in in_batches(dataset, desc="Encoding"):
            self.coefficients[start : start + len(x)] = self._encode(x).permute(0, 2, 3, 1)
            start += len(x)

    @torch.no_grad()
    def _encode(self, x: Tensor) -> Tensor:
        """Images (B, 1, 256, 256) -> coefficients (B, K, 64, 64) half."""
        z = self.vqvae.latents(x)
        if self.quantized:
            z = self.vqvae.vector_quantizer.look_up(self.vqvae.vector_quantizer.nearest(z))
        return self.space.clipped(self.space.encode(z)).half()

    def __len__(self) -> int:
        return len(self.dataset)

    def batch(self, indices: Sequence[int]) -> Tensor:
        """(B, K, 64, 64) float32, on the space's device."""
        if not self.stored:
            return self._encode(self.dataset.batch(indices)).float()
        coefficients = self.coefficients[move(torch.as_tensor(indices), self.coefficients.device)]
        return move(coefficients, self.space.device).permute(0, 3, 1, 2).float()

    __getitems__ = batch  # what DataLoader calls

    @cached_property
    def covariance(self) -> Tensor:
        """`covariance_spectrum` of at most COMPARED images, spaced evenly."""
        picked = torch.arange(0, len(self), -(-len(self) // COMPARED))
        return covariance_spectrum(torch.cat([self.batch(part) for part in picked.split(32)]))
