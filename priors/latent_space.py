"""The map between latents and the range of the generator, [-1, 1], because that ends in tanh."""

from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F
from scipy.fft import dct
from torch import Tensor
from torch.utils.data import Dataset

from modules import VQVAE
from priors.spectrum import power_spectrum
from support.console import in_batches

FIT_IMAGES = 128  # that a space is fitted on, spaced evenly over the split
CLIPPED = 0.005  # share of the heads' values that tanh's range cuts off
HEAD_MARGIN = 2  # rows and columns around heads that belong to them


@dataclass(frozen=True, eq=False)
class LatentSpace:
    """Maps latents z (B, D, H, W) to coefficients c (B, K, H, W) and back, and the generator's output t to c.

    D is the length of an embedding, K the number of coefficients at a position. The map is stored in generator.pth.

    c = scale * (directionsᵀ (z - shift)) within `support`, where * multiplies the 2-d Fourier transform; back,
    z = shift + directions (scale⁻¹ * c) within `support`. Generated coefficients are mixᵀ t, with t (B, D, H, W) in
    [-1, 1]. A discriminator sees mix c.

    Attributes:
        shift: (D, H, W), what maps to 0.
        directions: (D, K), orthonormal columns; what is orthogonal to them is not kept.
        scale: (K, H, W // 2 + 1), positive.
        mix: (D, K), orthonormal columns.
        support: (H, W), 1 where latents can differ from `shift`, else 0.
    """

    shift: Tensor
    directions: Tensor
    scale: Tensor
    mix: Tensor
    support: Tensor

    def to(self, device: torch.device | str) -> "LatentSpace":
        """The same map on another device."""
        return LatentSpace(**{name: value.to(device) for name, value in vars(self).items()})

    @property
    def device(self) -> torch.device:
        return self.support.device

    def encode(self, z: Tensor) -> Tensor:
        """Latents (B, D, H, W) -> (B, K, H, W)."""
        return _filter(_multiply(self.directions.T, z - self.shift), self.scale) * self.support

    def decode(self, c: Tensor) -> Tensor:
        """Coefficients (B, K, H, W) -> latents (B, D, H, W)."""
        c = _filter(c, 1 / self.scale) * self.support
        return _multiply(self.directions, c) + self.shift

    def to_coefficients(self, t: Tensor) -> Tensor:
        """The generator's output (B, D, H, W) in [-1, 1] -> mixᵀ t, (B, K, H, W), within `support`.

        The result is float32 where t is bfloat16, because `support` is.
        """
        return _multiply(self.mix.T, t) * self.support

    def to_channels(self, c: Tensor) -> Tensor:
        """Coefficients (B, K, H, W) -> mix c, (B, D, H, W)."""
        return _multiply(self.mix, c)

    def clipped(self, c: Tensor) -> Tensor:
        """Coefficients (B, K, H, W), cut to tanh's range as generated ones are."""
        return self.to_coefficients(self.to_channels(c).clamp(-1, 1))

    @classmethod
    def of_codebook(cls, vqvae: VQVAE) -> "LatentSpace":
        """All embeddings in [-1, 1], by one factor."""
        weight = vqvae.vector_quantizer.embedding.weight.detach()
        size = weight.shape[1]
        identity = torch.eye(size).to(weight)
        shift = weight.new_zeros(size, 64, 64)
        support = weight.new_ones(64, 64)
        scale = (1 / weight.abs().max()).expand(size, 64, 33).clone()
        return cls(shift, identity, scale, identity, support)

    @classmethod
    @torch.no_grad()
    def fit(cls, vqvae: VQVAE, dataset: Dataset, directions: int, emphasis: float) -> "LatentSpace":
        """The map of `--dcgan-training balanced`: only what decodes to heads is kept, with a flatter spectrum.

        - shift: where one code is in more than half of the images, its embedding, elsewhere the background's. So
          z - shift is about 0 outside the head, also along the border of the image, where convolutions see padding.
        - directions: leading principal ones of z - shift in heads. Their signs depend on the machine.
        - scale: divides each coefficient at each frequency by its amplitude over the images to the power of `emphasis`,
          and all by one factor, so that tanh's range cuts off the share CLIPPED of the heads' values.
        - mix: the first functions of a cosine transform. They spread each coefficient over all channels, so that fewer
          values are cut off.
        - support: positions at most HEAD_MARGIN from one where some image has another code than that of shift.
        """
        n = min(FIT_IMAGES, len(dataset))
        picked = [i * len(dataset) // n for i in range(n)]
        latents = [vqvae.latents(x) for x in in_batches(dataset, picked, desc="Encoding")]
        z = torch.cat(latents).cpu()
        codes = torch.cat([vqvae.vector_quantizer.nearest(part) for part in latents]).cpu()
        weight = vqvae.vector_quantizer.embedding.weight.detach().cpu()
        frequent = codes.mode(0).values
        constant = (codes == frequent).double().mean(0) > 0.5
        background = torch.where(constant, frequent, codes.flatten().mode().values)
        shift = weight[background].permute(2, 0, 1)
        head = codes != background
        if not head.any():  # one code everywhere: all positions count
            head[:] = True
        difference = (z - shift).permute(0, 2, 3, 1)[head].double()
        scatter = difference.T @ difference

        directions = min(directions, len(scatter))
        space = cls(
            shift=shift,
            directions=torch.linalg.eigh(scatter).eigenvectors.flip(1)[:, :directions].float(),
            scale=torch.ones(directions, z.shape[2], z.shape[3] // 2 + 1),
            mix=torch.from_numpy(dct(np.eye(len(scatter)), norm="ortho"))[:, :directions].float(),
            support=F.max_pool2d(head.any(0)[None].float(), 2 * HEAD_MARGIN + 1, 1, HEAD_MARGIN)[0],
        )
        power = power_spectrum(space.encode(z))
        power = power.clamp(min=1e-5 * power.mean())
        space = replace(space, scale=power ** (-emphasis / 2))
        values = space.to_channels(space.encode(z)).permute(0, 2, 3, 1)[head].abs().flatten()
        largest = values.kthvalue(max(1, round((1 - CLIPPED) * len(values)))).values.clamp(min=1e-6)
        space = replace(space, scale=space.scale / largest)
        return space.to(latents[0].device)


def _multiply(matrix: Tensor, x: Tensor) -> Tensor:
    """The matrix (M, C) times the vector at each position of x (B, C, H, W): (B, M, H, W)."""
    return F.conv2d(x, matrix[:, :, None, None])


def _filter(c: Tensor, gain: Tensor) -> Tensor:
    """Multiply the Fourier transform of c (B, K, H, W) by gain (K, H, W // 2 + 1)."""
    return torch.fft.irfft2(torch.fft.rfft2(c) * gain, s=c.shape[-2:])
