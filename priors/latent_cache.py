"""A split, encoded once: what the DCGAN learns."""

from collections.abc import Sequence
from functools import cached_property

import torch
from torch import Tensor
from torch.utils.data import Dataset

from modules import VQVAE
from priors.latent_space import LatentSpace
from priors.spectrum import covariance_spectrum
from support.console import UserError, in_batches
from support.device import fits, free_memory, move

COMPARED = 512  # images, at most, and as many generated ones, whose covariances calibration compares


class LatentCache(Dataset):
    """The coefficients of a split's latents, which the DCGAN learns to generate.

    They are clipped as the generator's output is (`LatentSpace.clipped`), and stored in float16 (8·K kB per image) on
    the device if they take at most half of its free memory, else on the host. Raises UserError if neither has enough.

    Args:
        vqvae, dataset, space: the trained network, a `dataset.OasisDataset` and the map, on one device.
        quantized: whether latents are z_q, the embeddings of an image's codes, or z_e, the encoder's output.
    """

    @torch.no_grad()
    def __init__(self, vqvae: VQVAE, dataset: Dataset, space: LatentSpace, quantized: bool = False):
        self.space = space
        size = (len(dataset), *space.support.shape, len(space.scale))
        n_bytes = 2 * torch.Size(size).numel()
        device = space.device if fits(n_bytes, space.device) else torch.device("cpu")
        if n_bytes > free_memory(device):
            raise UserError(
                f"latents of {len(dataset)} slices need {n_bytes / 1e9:.1f} GB of memory, more than is free; train on "
                "fewer slices, or without --dcgan-training report"
            )
        self.coefficients = torch.empty(size, dtype=torch.half, device=device)
        start = 0
        for x in in_batches(dataset, desc="Encoding"):
            z = vqvae.latents(x)
            if quantized:
                z = vqvae.vector_quantizer.look_up(vqvae.vector_quantizer.nearest(z))
            self.coefficients[start : start + len(x)] = space.clipped(space.encode(z)).permute(0, 2, 3, 1)
            start += len(x)

    def __len__(self) -> int:
        return len(self.coefficients)

    def batch(self, indices: Sequence[int]) -> Tensor:
        """(B, K, 64, 64) float32, on the space's device."""
        coefficients = self.coefficients[move(torch.as_tensor(indices), self.coefficients.device)]
        return move(coefficients, self.space.device).permute(0, 3, 1, 2).float()

    __getitems__ = batch  # what DataLoader calls

    @cached_property
    def covariance(self) -> Tensor:
        """`covariance_spectrum` of at most COMPARED images, spaced evenly."""
        picked = torch.arange(0, len(self), -(-len(self) // COMPARED))
        return covariance_spectrum(torch.cat([self.batch(part) for part in picked.split(32)]))
