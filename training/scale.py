"""The map between latents and the generator's range, and what a discriminator is to see of them.

The generator ends in tanh, so its range is [-1, 1]. `LatentScale` is fitted on the training split and stored in
generator.pth.
"""

from dataclasses import dataclass, fields, replace

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import Dataset

from evaluation.texture import blur
from modules import VQVAE
from support.console import in_batches

FIT_IMAGES = 128  # that a scale is fitted on, spaced evenly over the split
DIRECTIONS = 6  # images decode from so many with the same SSIM as from all (benchmarks/limits.py)
EMPHASIS = 0.5  # exponent of the amplitude spectrum that latents are divided by: 0 keeps them, 1 whitens them
CLIPPED = 0.005  # share of the head's values that tanh's range cuts off
OUTLINE = 0.4  # length of latents that belong to a head, as a share of the root mean square length in heads
MARGIN = 2  # positions around heads


@dataclass(frozen=True, eq=False)
class LatentScale:
    """Latents z (B, D, H, W) <-> coefficients c (B, K, H, W) <-> tanh's range t (B, D, H, W).

    c = scale * (directionsᵀ (z - shift)) within `support`, where * multiplies the 2-d Fourier transform, and
    t = `visible`(clip(mix c, -1, 1)); back, z = shift + directions (scale⁻¹ * mixᵀ t) within `support`, and at most
    MARGIN positions from the head that z shows.

    Attributes:
        shift: (D, H, W), what maps to 0.
        directions: (D, K), orthonormal columns; what is orthogonal to them is not kept.
        scale: (K, H, W // 2 + 1), positive.
        mix: (D, K), orthonormal columns.
        support: (H, W), 1 where latents differ from `shift`, else 0.
        outline: (), the root mean square length of z - shift, around a position, from which on it shows a head.
    """

    shift: Tensor
    directions: Tensor
    scale: Tensor
    mix: Tensor
    support: Tensor
    outline: Tensor

    def to(self, device: torch.device | str) -> "LatentScale":
        """The same map on another device."""
        return LatentScale(**{name: value.to(device) for name, value in self.tensors().items()})

    def tensors(self) -> dict[str, Tensor]:
        """The attributes by name."""
        return {field.name: getattr(self, field.name) for field in fields(self)}

    @classmethod
    def from_tensors(cls, tensors: dict[str, Tensor], dim: int) -> "LatentScale":
        """The map with such attributes for latents of `dim` channels. Raises ValueError if they are not a map's."""
        scale = tensors["scale"]
        n = len(scale) if isinstance(scale, Tensor) and scale.ndim else 0
        shapes = {"scale": (n, 64, 33), "shift": (dim, 64, 64), "directions": (dim, n), "mix": (dim, n)}
        shapes |= {"support": (64, 64), "outline": ()}
        found = {}
        for name, shape in shapes.items():
            value = tensors[name]
            if not isinstance(value, Tensor) or value.shape != shape or not value.is_floating_point():
                raise ValueError(f"its '{name}' is not {' x '.join(map(str, shape))} numbers")
            found[name] = value.float()
            if not found[name].isfinite().all():
                raise ValueError(f"its '{name}' has values that are not finite")
        if not (found["scale"] > 0).all() or not (1 / found["scale"]).isfinite().all():
            raise ValueError("its 'scale' has values that are not positive")
        return cls(**found)

    def times(self, factor: float | Tensor) -> "LatentScale":
        """The map that gives z - shift `factor` times as long, by coefficient and frequency if it is a tensor."""
        return replace(self, scale=self.scale / factor)

    def coefficients(self, z: Tensor) -> Tensor:
        """Latents (B, D, H, W) -> (B, K, H, W)."""
        return _filter(_multiply(self.directions.T, z - self.shift), self.scale) * self.support

    def mixed(self, c: Tensor) -> Tensor:
        """Coefficients (B, K, H, W) -> (B, D, H, W), what is visible of their mixture cut to [-1, 1]."""
        return self.visible(_multiply(self.mix, c).clamp(-1, 1))

    def unmixed(self, t: Tensor) -> Tensor:
        """(B, D, H, W) -> coefficients (B, K, H, W)."""
        return _multiply(self.mix.T, t) * self.support

    def to_tanh(self, z: Tensor) -> Tensor:
        """Latents (B, D, H, W) -> (B, D, H, W) in [-1, 1]."""
        return self.mixed(self.coefficients(z))

    def from_tanh(self, t: Tensor) -> Tensor:
        """(B, D, H, W) in [-1, 1] -> latents (B, D, H, W)."""
        c = _filter(self.unmixed(t), 1 / self.scale) * self.support
        head = blur(c.square().sum(1, keepdim=True), 1) >= self.outline.square()
        return _multiply(self.directions, c * _around(head)) + self.shift

    def visible(self, t: Tensor) -> Tensor:
        """What of the generator's output (B, D, H, W) in [-1, 1] reaches latents: its projection on `mix` in `support`.

        Real and generated latents both pass here, so neither can be told by what the other cannot have.
        """
        if self.mix.shape[0] == self.mix.shape[1]:
            return t * self.support
        return _multiply(self.mix, self.unmixed(t))

    @classmethod
    def of_codebook(cls, vqvae: VQVAE, dataset: Dataset | None = None) -> "LatentScale":
        """All embeddings in [-1, 1], by one factor. The data set is not used."""
        weight = vqvae.vector_quantizer.embedding.weight.detach()
        size, identity = weight.shape[1], torch.eye(weight.shape[1]).to(weight)
        shift, support = weight.new_zeros(size, 64, 64), weight.new_ones(64, 64)
        scale = (1 / weight.abs().max()).expand(size, 64, 33).clone()
        return cls(shift, identity, scale, identity, support, outline=weight.new_zeros(()))

    @classmethod
    @torch.no_grad()
    def fit(cls, vqvae: VQVAE, dataset: Dataset, n_directions: int = DIRECTIONS, emphasis: float = EMPHASIS):
        """The map of `--gan-training balanced`: only what decodes to heads is kept, with a flatter spectrum.

        - shift: where one code is in more than half of the images, its embedding, elsewhere the background's. So
          latents are 0 outside the head, also along the border of the image, where convolutions see padding.
        - directions: the leading principal ones of z - shift in heads.
        - scale: divides each coefficient at each frequency by its amplitude over the images to the power of `emphasis`,
          and all by one factor, so that tanh's range cuts off CLIPPED of the heads' values.
        - mix: the first functions of a cosine transform, which spread each coefficient over all channels.
        - support: where z differs from `shift` in any of the images, and MARGIN positions around.
        - outline: OUTLINE times the root mean square length of z - shift in heads. Real latents lose next to nothing by
          it (benchmarks/limits.py); generated ones lose speckle around their heads.
        """
        z, codes = _encode(vqvae, dataset)
        weight = vqvae.vector_quantizer.embedding.weight.detach().cpu()
        frequent = codes.mode(0).values
        constant = (codes == frequent).double().mean(0) > 0.5
        usual = torch.where(constant, frequent, codes.flatten().mode().values)
        shift = weight[usual].permute(2, 0, 1)
        head = codes != usual if (codes != usual).any() else torch.ones_like(codes, dtype=torch.bool)
        difference = (z - shift).permute(0, 2, 3, 1)[head].double()
        second = difference.T @ difference / len(difference)
        size = second.trace().sqrt().clamp(min=1e-6).float()
        near = ((z - shift).norm(dim=1) > 0.1 * size).any(0)

        n_directions = min(n_directions, len(second))
        found = cls(
            shift=shift,
            directions=torch.linalg.eigh(second).eigenvectors.flip(1)[:, :n_directions].float(),
            scale=torch.ones(n_directions, z.shape[2], z.shape[3] // 2 + 1),
            mix=_cosines(len(second))[:, :n_directions],
            support=_around(near[None])[0],
            outline=OUTLINE * size,
        )
        power = power_spectrum(found.coefficients(z)).clamp(min=1e-5 * size**2)
        found = replace(found, scale=power ** (-emphasis / 2))
        values = _multiply(found.mix, found.coefficients(z)).permute(0, 2, 3, 1)[head].abs().flatten()
        largest = values.kthvalue(max(1, round((1 - CLIPPED) * len(values)))).values.clamp(min=1e-6)
        return found.times(largest).to(vqvae.vector_quantizer.embedding.weight.device)


def _encode(vqvae: VQVAE, dataset: Dataset) -> tuple[Tensor, Tensor]:
    """Latents (N, D, H, W) and codes (N, H, W) of FIT_IMAGES images, on the CPU."""
    n = min(FIT_IMAGES, len(dataset))
    picked = [i * len(dataset) // n for i in range(n)]
    latents = (vqvae.latents(x) for x in in_batches(dataset, picked, desc="Encoding"))
    both = [(z.cpu(), vqvae.vector_quantizer.nearest(z).cpu()) for z in latents]
    z, codes = zip(*both, strict=True)
    return torch.cat(z), torch.cat(codes)


def _cosines(n: int) -> Tensor:
    """The functions of the cosine transform (DCT-II), orthonormal columns (n, n)."""
    k = torch.arange(n, dtype=torch.double)
    columns = torch.cos(torch.pi * (k[:, None] + 0.5) * k / n) * (2 / n) ** 0.5
    columns[:, 0] /= 2**0.5
    return columns.float()


def _multiply(matrix: Tensor, x: Tensor) -> Tensor:
    """The matrix (M, C) times the vector at each position of x (B, C, H, W): (B, M, H, W), in channels_last."""
    return F.linear(x.permute(0, 2, 3, 1), matrix).permute(0, 3, 1, 2)


def _around(head: Tensor) -> Tensor:
    """1 at most MARGIN positions, along both axes, from where head (..., H, W) is true, else 0."""
    return F.max_pool2d(head.float(), 2 * MARGIN + 1, 1, MARGIN)


def _filter(c: Tensor, gain: Tensor) -> Tensor:
    """Multiply the Fourier transform of c (B, K, H, W) by gain (K, H, W // 2 + 1)."""
    return torch.fft.irfft2(torch.fft.rfft2(c) * gain, s=c.shape[-2:])


def power_spectrum(c: Tensor) -> Tensor:
    """Mean power of coefficients c (B, K, H, W) by radial frequency, at each frequency of rfft2: (K, H, W // 2 + 1).

    Rings are one cycle per image wide, the constant part belongs to the first. Logarithms are averaged over three.
    """
    size = c.shape[-1]
    power = sum(torch.fft.fft2(x, norm="ortho").abs().square().sum(0) for x in c.split(32)).flatten(1) / len(c)
    frequency = torch.fft.fftfreq(size, device=c.device)
    frequency = torch.hypot(frequency[:, None], frequency)
    ring = (frequency * size).round().long().clamp(min=1).flatten() - 1
    total = power.new_zeros(len(power), int(ring.max()) + 1).index_add_(1, ring, power)
    mean = (total / torch.bincount(ring)).clamp(min=1e-12).log()
    smooth = F.avg_pool1d(F.pad(mean[None], (1, 1), mode="replicate"), 3, 1)[0].exp()
    return smooth[:, ring].view(-1, size, size)[:, :, : size // 2 + 1].contiguous()
